"""What the server declares, what the board and the rules use, and what the documentation tells of."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from server.metrics import EngineMetrics, RequestMetrics
from tests.deploy.declared import DECLARED, Declared, exposed_name, family
from tests.deploy.queries import (
    ROOT,
    alerts,
    annotation_queries,
    panel_queries,
    recording_rules,
    selectors,
)

# Metrics that neither a panel nor a rule uses, each with the reason.
UNUSED: dict[str, str] = {}

DOCUMENTATION = (ROOT / "docs" / "observability.md").read_text(encoding="utf-8")


def series_used() -> set[str]:
    exprs = [q.expr for q in panel_queries() + annotation_queries() + recording_rules()]
    exprs += [rule["expr"] for rule in alerts()]
    return {selector.series for expr in exprs for selector in selectors(expr)}


def test_the_list_is_what_the_server_declares() -> None:
    registry = CollectorRegistry()
    RequestMetrics(registry)
    EngineMetrics(registry)
    collectors: Any = registry._collector_to_names
    found = {exposed_name(m): Declared(m._type, m._labelnames) for m in collectors}
    assert found == DECLARED


@pytest.mark.prometheus
def test_promtool_finds_nothing_to_say_of_names_and_texts(promtool: str) -> None:
    registry = CollectorRegistry()
    RequestMetrics(registry)
    EngineMetrics(registry)
    done = subprocess.run(
        [promtool, "check", "metrics"],
        input=generate_latest(registry),
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


def test_every_series_that_is_used_is_declared_or_recorded() -> None:
    recorded = {rule.where for rule in recording_rules()}
    assert {s for s in series_used() if family(s) is None} - recorded == {"up"}


def test_every_metric_is_used_or_listed_as_unused() -> None:
    used = {family(series) for series in series_used()} - {None}
    assert used | UNUSED.keys() == DECLARED.keys()
    assert not used & UNUSED.keys()
    assert all(UNUSED.values())


@pytest.mark.parametrize("name", DECLARED)
def test_every_metric_is_documented_with_its_labels(name: str) -> None:
    (labels,) = re.findall(rf"^\| `{name}(?:\{{([\w,]+)\}})?` \| .+ \|$", DOCUMENTATION, re.M)
    assert tuple(labels.split(",")) == DECLARED[name].labels
