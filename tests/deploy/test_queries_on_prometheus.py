"""The board's and the rules' queries on a real Prometheus, with figures that are known.

What is scraped here is made up: the server's metrics, with a traffic that is easy to reckon with. The
same queries on a real server's page are in ``test_prometheus_engine.py``.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, start_http_server

from server.metrics import EngineMetrics, RequestMetrics
from tests.deploy.declared import DECLARED, exposed_name
from tests.deploy.prometheus_process import Prometheus, QueryError, prometheus
from tests.deploy.queries import (
    Query,
    alerts,
    annotation_queries,
    in_window,
    panel_queries,
    recording_rules,
    values_of_variable,
    variable_queries,
    with_everything_chosen,
)

pytestmark = pytest.mark.prometheus

# Long enough for the slowest machine; what was added within it counts however long ago it was.
WINDOW = "10m"
VALUES = {
    "model_name": ["m"],
    "engine": ["0", "1"],
    "probe": ["refusal"],
    "policy": ["guard"],
    "variant": ["stable"],
    "phase": ["prompt_end", "plateau", "final", "answer"],
    "gate": ["harmful"],
    "edit_kind": ["add", "project"],
    "state": ["in_use", "free"],
    "version": ["1"],
    "vllm_version": ["0"],
    "hash": ["0123456789ab"],
    "mode": ["enforce"],
}
DECISIONS = {
    "trimtab_probe_decisions_total": ["above", "below"],
    "trimtab_gate_decisions_total": ["open", "closed", "undecided"],
}
# Of a hundred requests: mode, outcome, reason, and how many.
REQUESTS = [
    ("enforce", "ok", "", 80),
    ("enforce", "ok", "slots_exhausted", 4),
    ("enforce", "ok", "strength_zero", 3),
    ("enforce", "refused", "E_SLOTS_EXHAUSTED", 5),
    ("enforce", "refused", "E_STRENGTH_RANGE", 2),
    ("enforce", "error", "http_500", 1),
    ("shadow", "ok", "", 5),
]
# What the tiles say of that traffic.
TILES = {
    "Unreachable servers A": 0,
    "Refused for want of steering A": 0.05,
    "Answered unsteered A": 0.04,
    "Cliffs over 0.5 A": 0.25,
    "Scores missing A": 0.02,
    "Slots in use A": 0.5,
}


class Page:
    """A page of metrics with every declared one, and figures of the test's own in it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        RequestMetrics(self.registry)
        EngineMetrics(self.registry)
        collectors: Any = self.registry._collector_to_names
        self.metrics = {exposed_name(metric): metric for metric in collectors}

    def children(self, name: str) -> Iterator[Any]:
        """The metric with every combination of labels that makes sense."""
        labels = DECLARED[name].labels
        values = {**VALUES, "decision": DECISIONS.get(name, [])}
        for combination in product(*(values[label] for label in labels)):
            yield self.metrics[name].labels(*combination)

    def serve_some_traffic(self) -> None:
        """A hundred requests, a hundred scores, four cliffs and a few steps."""
        requests = self.metrics["trimtab_requests_total"]
        for mode, outcome, reason, count in REQUESTS:
            requests.labels("m", "guard", mode, outcome, reason).inc(count)
        for name in ("trimtab_probe_score", "trimtab_probe_token_score"):
            for child in self.children(name):
                for score in (0.12, 0.52, 0.92):
                    child.observe(score, {"request_id": "cmpl-1"})
        for child in self.children("trimtab_refusal_cliff"):
            for cliff in (-0.2, 0.1, 0.5, 0.8):
                child.observe(cliff)
        for child in self.children("trimtab_engine_step_overhead_seconds"):
            child.observe(0.0002)
        counts = {
            "trimtab_probe_tokens_total": 98,
            "trimtab_probe_tokens_missing_total": 2,
            "trimtab_probe_decisions_total": 1,
            "trimtab_gate_decisions_total": 1,
            "trimtab_edits_applied_tokens_total": 10,
        }
        for name, count in counts.items():
            for child in self.children(name):
                child.inc(count)
        for name, declared in DECLARED.items():
            if declared.kind == "gauge":
                for child in self.children(name):
                    child.set(1)


@pytest.fixture(scope="module")
def page() -> Page:
    return Page()


@pytest.fixture(scope="module")
def watching(
    prometheus_program: str, page: Page, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    page.serve_some_traffic()
    server, thread = start_http_server(port, "127.0.0.1", page.registry)
    folder = tmp_path_factory.mktemp("prometheus")
    with prometheus(prometheus_program, folder, f"127.0.0.1:{port}") as running:
        # What a series begins with counts for nothing; what is added while it is watched does.
        running.wait_for_scrape()
        page.serve_some_traffic()
        running.wait_for_scrape()
        yield running
    server.shutdown()
    thread.join()


@pytest.mark.parametrize("query", panel_queries() + annotation_queries(), ids=str)
def test_every_query_of_the_board_gives_figures(watching: Prometheus, query: Query) -> None:
    found = watching.query(with_everything_chosen(query.expr, WINDOW))
    assert found
    assert not any(math.isnan(value) for _, value in found)


@pytest.mark.parametrize("query", variable_queries(), ids=str)
def test_every_choice_has_something_to_choose(watching: Prometheus, query: Query) -> None:
    assert watching.query(values_of_variable(query.expr))


@pytest.mark.parametrize("rule", recording_rules(), ids=str)
def test_every_recording_gives_figures(watching: Prometheus, rule: Query) -> None:
    assert watching.query(in_window(rule.expr, WINDOW))


@pytest.mark.parametrize("alert", alerts(), ids=lambda rule: rule["alert"])
def test_every_alert_can_be_asked_for(watching: Prometheus, alert: dict[str, Any]) -> None:
    watching.query(alert["expr"])


def test_the_rules_are_evaluated_without_fault(watching: Prometheus) -> None:
    rules = [rule for group in watching.get("rules")["groups"] for rule in group["rules"]]
    assert len(rules) == len(recording_rules()) + len(alerts())
    assert {rule["health"] for rule in rules} <= {"ok", "unknown"}
    assert not [rule["lastError"] for rule in rules if rule.get("lastError")]


@pytest.mark.parametrize("tile", TILES)
def test_tiles_say_what_the_traffic_was(watching: Prometheus, tile: str) -> None:
    (query,) = (query for query in panel_queries() if str(query) == tile)
    found = watching.value(with_everything_chosen(query.expr, WINDOW))
    assert found == pytest.approx(TILES[tile], abs=1e-9)


def test_a_quantile_is_within_its_bucket_and_a_mean_is_exact(watching: Prometheus) -> None:
    queries = {str(query): with_everything_chosen(query.expr, WINDOW) for query in panel_queries()}
    for _, median in watching.query(queries["Score quantiles by phase B"]):
        assert 0.5 <= median <= 0.55
    (mean,) = watching.query(queries["Mean score at the prompt's end by policy A"])
    assert mean[1] == pytest.approx(0.52)


def test_choosing_nothing_that_is_there_gives_nothing(watching: Prometheus) -> None:
    for query in panel_queries():
        if "vector(0)" not in query.expr:
            expr = with_everything_chosen(query.expr, WINDOW).replace('".*"', '"nobody"')
            assert watching.query(expr) == []


def test_exemplars_carry_the_request(watching: Prometheus) -> None:
    found = watching.get(
        "query_exemplars", query="trimtab_probe_score_bucket", start="0", end="9999999999"
    )
    labels = [exemplar["labels"] for series in found for exemplar in series["exemplars"]]
    assert {"request_id": "cmpl-1"} in labels


def test_a_query_that_is_wrong_is_told_apart_from_one_that_is_empty(watching: Prometheus) -> None:
    assert watching.query("nobody_declared_this") == []
    with pytest.raises(QueryError, match="bad_data"):
        watching.query("rate(up)")
