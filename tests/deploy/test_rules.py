"""The rules of Prometheus: valid, tested on both sides of every threshold, and pointing at what exists."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from server.errors import STATUS
from tests.deploy.declared import DECLARED, family
from tests.deploy.queries import (
    ROOT,
    RULES,
    Query,
    alerts,
    panels,
    recording_rules,
    rules,
    selectors,
)

PROMETHEUS = ROOT / "deploy" / "prometheus"
TESTS = sorted((PROMETHEUS / "tests").glob("*.test.yml"))
by_alert = pytest.mark.parametrize("alert", alerts(), ids=lambda rule: rule["alert"])
by_record = pytest.mark.parametrize("rule", recording_rules(), ids=str)


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- what Prometheus says


@pytest.mark.prometheus
def test_prometheus_takes_the_configuration_and_the_rules(promtool: str) -> None:
    said = run(promtool, "check", "config", "--lint-fatal", str(PROMETHEUS / "prometheus.yml"))
    assert f"{len(rules())} rules found" in said
    run(promtool, "check", "rules", "--lint-fatal", str(RULES))


@pytest.mark.prometheus
@pytest.mark.parametrize("file", TESTS, ids=lambda file: file.name)
def test_alerts_fire_when_they_should_and_not_before(promtool: str, file: Path) -> None:
    assert "SUCCESS" in run(promtool, "test", "rules", str(file))


@by_alert
def test_every_alert_is_tested_firing_and_silent(alert: dict[str, Any]) -> None:
    cases = [
        case
        for file in TESTS
        for test in yaml.safe_load(file.read_text(encoding="utf-8"))["tests"]
        for case in test.get("alert_rule_test", [])
        if case["alertname"] == alert["alert"]
    ]
    assert {bool(case["exp_alerts"]) for case in cases} == {True, False}


# --- conventions


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.get("alert", rule.get("record")))
def test_every_expression_is_promql(rule: dict[str, Any]) -> None:
    promql_parser.parse(rule["expr"])


@by_record
def test_a_recording_is_named_by_level_metric_and_operation(rule: Query) -> None:
    level, metric, operation = rule.where.split(":")
    (kept,) = set(re.findall(r"\bby \(([^)]*)\)", rule.expr))
    short = [label.removesuffix("_name") for label in kept.split(", ") if label != "le"]
    assert level == "_".join(short)
    assert any(metric.startswith(name.removesuffix("_total")) for name in DECLARED)
    (window,) = set(re.findall(r"\[(\w+)\]", rule.expr))
    assert operation.endswith(window)


@by_record
def test_a_recording_keeps_only_labels_that_its_metrics_have(rule: Query) -> None:
    for selector in selectors(rule.expr):
        name = family(selector.series)
        assert name is not None
        (kept,) = set(re.findall(r"\bby \(([^)]*)\)", rule.expr))
        assert set(kept.split(", ")) <= {"job", "instance", "le", *DECLARED[name].labels}


@by_alert
def test_an_alert_says_how_bad_what_where_and_what_to_do(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert alert["for"]
    annotations = alert["annotations"]
    assert annotations.keys() == {"summary", "description", "dashboard_panel", "runbook"}
    board, _, title = annotations["dashboard_panel"].partition(": ")
    assert board == "Trimtab / Overview"
    assert title in {panel["title"] for panel in panels()}
    file, _, anchor = annotations["runbook"].partition("#")
    headings = re.findall(r"^#+ (.+)$", (ROOT / file).read_text(encoding="utf-8"), re.M)
    assert anchor == alert["alert"].lower()
    assert alert["alert"] in headings


@by_alert
def test_an_alert_s_panel_shows_the_metric_that_it_watches(alert: dict[str, Any]) -> None:
    recorded = {rule.where: rule.expr for rule in recording_rules()}
    _, _, title = alert["annotations"]["dashboard_panel"].partition(": ")
    (panel,) = (panel for panel in panels() if panel["title"] == title)
    shown = {family(s.series) or s.series for t in panel["targets"] for s in selectors(t["expr"])}
    watched = {s.series for s in selectors(alert["expr"])}
    sources = {
        family(s.series) or s.series
        for name in watched
        for s in selectors(recorded.get(name, name))
    }
    assert sources <= shown


def test_the_refusals_that_alert_are_those_that_are_the_servers_doing() -> None:
    (failing,) = (rule for rule in alerts() if rule["alert"] == "TrimtabPolicyFailing")
    (listed,) = re.findall(r'reason=~"([^"]*)"', failing["expr"])
    assert set(listed.split("|")) == {c for c, status in STATUS.items() if status in (429, 503)}
