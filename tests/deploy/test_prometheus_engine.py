"""A real server under a real Prometheus: every query of the board and the rules gives figures, the right ones.

The server runs a tiny model with a probe that reads every request, a policy that steers and has a
gate, and one of mode ``shadow``. Its traffic has all outcomes: answers whole and streamed over every
API, refusals, an error of vLLM's, and a client that goes away.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from tests.conftest import build_tiny_checkpoint
from tests.deploy.declared import DECLARED
from tests.deploy.prometheus_process import Prometheus, prometheus
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
from tests.server.served import Served, put_random_direction, put_random_probe, serve

pytestmark = [pytest.mark.engine, pytest.mark.prometheus]

# Long enough for the slowest machine; what was added within it counts however long ago it was.
WINDOW = "30m"
MESSAGES = [{"role": "user", "content": "Which way does the ship turn?"}]
POLICY = """\
apiVersion: trimtab/v1
kind: Policy
name: {name}
mode: {mode}
edits:
  turn:
    add: {{direction: north@1, layers: "2-3", strength: 4.0}}
  quiet:
    scale_heads: {{heads: [[3, 0], [3, 2]], factor: 0.0, renormalise: row}}
gates:
  high: {{probe: judge@1, at: prompt_end, above: 0.000001, then: [turn]}}
"""
POLICIES = {"steer": "enforce", "watch": "shadow"}
# The keys of a probe's summary in an answer, by the phase under which the metric counts them.
PHASES = {
    "prompt_end": "prompt_end",
    "plateau": "plateau",
    "final": "final",
    "answer": "answer_mean",
}
# What promtool finds in vLLM's own metrics, which are not ours to rename.
THEIRS = ("vllm:", "http_")


@dataclass
class Traffic:
    """What the answers carried.

    Attributes:
        reports: the ``steering`` object of every choice that finished.
        ids: the answers' ids.
    """

    reports: list[dict[str, Any]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)

    def whole(self, client: httpx.Client, path: str, model: str, **body: Any) -> None:
        answer = client.post(path, json={"model": model, **body})
        assert answer.status_code == 200, answer.text
        document = answer.json()
        self.ids.append(document["id"])
        self.reports += [choice["steering"] for choice in document.get("choices", [document])]

    def streamed(self, client: httpx.Client, path: str, model: str, **body: Any) -> None:
        answer = client.post(path, json={"model": model, "stream": True, **body})
        assert answer.status_code == 200, answer.text
        chunks = [json.loads(x[5:]) for x in answer.text.splitlines() if x.startswith("data: {")]
        self.ids.append(chunks[0]["id"])
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        self.reports += [choice["steering"] for choice in choices if choice.get("finish_reason")]

    def round(self, served: Served) -> None:
        """Some requests of every kind; random answers, so that some of them think and stop."""
        chat = {"messages": MESSAGES, "max_tokens": 64, "temperature": 1.0, "ignore_eos": True}
        text = {"prompt": "Which way?", "max_tokens": 16, "temperature": 0}
        with served.client() as client:
            for policy in ("off", *POLICIES):
                model = f"{served.model}@{policy}"
                self.whole(client, "/v1/chat/completions", model, n=4, **chat)
                self.streamed(client, "/v1/chat/completions", model, n=2, **chat)
                self.whole(client, "/v1/completions", model, **text)
                self.streamed(client, "/v1/completions", model, **text)
                self.whole(client, "/v1/responses", model, input="Which way?", max_output_tokens=16)
                self.whole(client, "/v1/messages", model, messages=MESSAGES, max_tokens=16)
            # What is answered without the policy, refused, and turned away by vLLM.
            still = {"policy": "steer", "strength": 0.0}
            self.whole(client, "/v1/completions", served.model, steering=still, **text)
            self._fails(client, 404, f"{served.model}@nobody", **text)
            self._fails(client, 400, f"{served.model}@steer", **{**text, "max_tokens": -1})
        self._goes_away(served)

    @staticmethod
    def _fails(client: httpx.Client, status: int, model: str, **body: Any) -> None:
        answer = client.post("/v1/completions", json={"model": model, **body})
        assert answer.status_code == status, answer.text

    @staticmethod
    def _goes_away(served: Served) -> None:
        def aborted() -> float:
            return sum(v for k, v in served.metrics().items() if 'outcome="aborted"' in k)

        before = aborted()
        body = {"prompt": "Which way?", "max_tokens": 480, "ignore_eos": True, "stream": True}
        model = f"{served.model}@steer"
        with (
            served.client() as client,
            client.stream("POST", "/v1/completions", json={"model": model, **body}) as answer,
        ):
            lines = answer.iter_lines()  # kept: without it, the stream is closed
            next(lines)
        deadline = time.monotonic() + 30
        while aborted() == before:
            assert time.monotonic() < deadline, "the abort was not counted"
            time.sleep(0.1)


@dataclass
class Watched:
    """A server that has had traffic, and the Prometheus that has watched it."""

    served: Served
    prometheus: Prometheus
    traffic: Traffic


@pytest.fixture(scope="module")
def watched(prometheus_program: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("watched")
    checkpoint = build_tiny_checkpoint(folder / "tiny")
    home = folder / "home"
    put_random_direction(home, checkpoint)
    put_random_probe(home, checkpoint, calibration={"threshold": 0.5})
    policies = home / "policies"
    policies.mkdir()
    for name, mode in POLICIES.items():
        (policies / f"{name}.yaml").write_text(POLICY.format(name=name, mode=mode))
    arguments = [
        f"--policies={policies}",
        "--probe=judge@1",
        "--think-start=t",
        "--think-end=e",
    ]
    (folder / "prometheus").mkdir()
    with serve(checkpoint, home, arguments, log=folder / "log") as served:
        target = served.url.removeprefix("http://")
        with prometheus(prometheus_program, folder / "prometheus", target) as running:
            traffic = Traffic()
            # What a series begins with counts for nothing; what is added while it is watched does.
            for _ in range(2):
                traffic.round(served)
                running.wait_for_scrape()
            yield Watched(served, running, traffic)


# --- the traffic is what the tests below take it for


def test_the_traffic_had_everything_in_it(watched: Watched) -> None:
    reports = watched.traffic.reports
    assert {report["policy"].partition("@")[0] for report in reports} == {"off", *POLICIES}
    assert all("probes" in report for report in reports)
    summaries = [summary for report in reports for summary in report["probes"].values()]
    for key in ("cliff", *PHASES.values()):
        assert any(summary[key] is not None for summary in summaries), key
    outcomes = {k for k in watched.served.metrics() if k.startswith("trimtab_requests_total")}
    for outcome in ("ok", "refused", "error", "aborted"):
        assert any(f'outcome="{outcome}"' in line for line in outcomes), outcome


# --- the page


def test_the_page_has_every_declared_metric_and_no_other(watched: Watched) -> None:
    with watched.served.client() as client:
        text = client.get("/metrics").text
    found = dict(re.findall(r"^# TYPE (trimtab_\w+) (\w+)$", text, re.M))
    # When a series began, which the client library tells of by itself.
    kinds = {name: kind for name, kind in found.items() if not name.endswith("_created")}
    assert kinds == {name: declared.kind for name, declared in DECLARED.items()}


def test_every_series_has_the_declared_labels(watched: Watched) -> None:
    with watched.served.client() as client:
        text = client.get("/metrics").text
    labels: dict[str, set[str]] = defaultdict(set)
    for name, inside in re.findall(r"^(trimtab_\w+)\{(.*)\} \S+$", text, re.M):
        labels[name] |= set(re.findall(r'(\w+)="', inside))
    for name, declared in DECLARED.items():
        series = f"{name}_count" if declared.kind == "histogram" else name
        assert labels[series] == set(declared.labels), series


def test_promtool_finds_nothing_in_our_metrics(watched: Watched, promtool: str) -> None:
    with watched.served.client() as client:
        text = client.get("/metrics").text
    done = subprocess.run(
        [promtool, "check", "metrics"],
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    said = (done.stdout + done.stderr).splitlines()
    assert [line for line in said if line and not line.startswith(THEIRS)] == []


# --- the queries


@pytest.mark.parametrize("query", panel_queries() + annotation_queries(), ids=str)
def test_every_query_of_the_board_gives_figures(watched: Watched, query: Query) -> None:
    found = watched.prometheus.query(with_everything_chosen(query.expr, WINDOW))
    assert found


@pytest.mark.parametrize("query", variable_queries(), ids=str)
def test_every_choice_has_something_to_choose(watched: Watched, query: Query) -> None:
    assert watched.prometheus.query(values_of_variable(query.expr))


@pytest.mark.parametrize("rule", recording_rules(), ids=str)
def test_every_recording_gives_figures(watched: Watched, rule: Query) -> None:
    found = watched.prometheus.query(in_window(rule.expr, WINDOW))
    assert found


@pytest.mark.parametrize("alert", alerts(), ids=lambda rule: rule["alert"])
def test_every_alert_can_be_asked_for_and_is_silent(
    watched: Watched, alert: dict[str, Any]
) -> None:
    watched.prometheus.query(alert["expr"])
    active = watched.prometheus.get("alerts")["alerts"]
    firing = [a for a in active if a["labels"]["alertname"] == alert["alert"]]
    assert [a for a in firing if a["state"] == "firing"] == []


def test_the_rules_are_evaluated_without_fault(watched: Watched) -> None:
    groups = watched.prometheus.get("rules")["groups"]
    found = [rule for group in groups for rule in group["rules"]]
    assert len(found) == len(recording_rules()) + len(alerts())
    assert not [rule["lastError"] for rule in found if rule.get("lastError")]


# --- the figures


def test_prometheus_returns_what_the_answers_carried(watched: Watched) -> None:
    expected: dict[tuple[str, str], list[float]] = defaultdict(list)
    cliffs: dict[str, list[float]] = defaultdict(list)
    for report in watched.traffic.reports:
        for key, summary in report["probes"].items():
            # The metric names the probe without its version.
            name, _, output = key.partition("/")
            probe = f"{name.partition('@')[0]}/{output}"
            for phase, value in PHASES.items():
                if summary[value] is not None:
                    expected[probe, phase].append(summary[value])
            if summary["cliff"] is not None:
                cliffs[probe].append(summary["cliff"])
    assert {probe for probe, _ in expected} == {"judge/first", "judge/second"}

    def found(series: str) -> dict[tuple[str, str], float]:
        query = f"sum by (probe, phase) ({series})"
        return {
            (labels["probe"], labels["phase"]): value
            for labels, value in watched.prometheus.query(query)
        }

    assert found("trimtab_probe_score_count") == {k: len(v) for k, v in expected.items()}
    sums = found("trimtab_probe_score_sum")
    assert sums == {k: pytest.approx(sum(v), abs=1e-6) for k, v in expected.items()}
    counted = watched.prometheus.query("sum by (probe) (trimtab_refusal_cliff_count)")
    assert {labels["probe"]: value for labels, value in counted} == {
        probe: len(values) for probe, values in cliffs.items()
    }
    steep = watched.prometheus.query('sum by (probe) (trimtab_refusal_cliff_bucket{le="0.5"})')
    assert {labels["probe"]: value for labels, value in steep} == {
        probe: sum(value <= 0.5 for value in values) for probe, values in cliffs.items()
    }


def test_every_generated_token_s_score_is_counted_once(watched: Watched) -> None:
    """Those of finished answers; the request whose client went away adds some of its own."""
    finished = sum(
        summary["tokens"]
        for report in watched.traffic.reports
        for summary in report["probes"].values()
    )
    counted = watched.prometheus.value("sum(trimtab_probe_token_score_count)")
    gone = 2 * 2 * 480  # clients, outputs of the probe, tokens that they asked for
    assert finished <= counted <= finished + gone
    assert watched.prometheus.value("sum(trimtab_probe_tokens_total)") == counted
    assert watched.prometheus.value("sum(trimtab_probe_tokens_missing_total)") == 0


def test_both_kinds_of_edit_and_the_gate_are_counted(watched: Watched) -> None:
    tokens = watched.prometheus.query("sum by (edit_kind) (trimtab_edits_applied_tokens_total) > 0")
    assert {labels["edit_kind"] for labels, _ in tokens} == {"add", "scale_heads"}
    opened = sum(
        report["gates"]["high"]["fired"] for report in watched.traffic.reports if "gates" in report
    )
    gates = watched.prometheus.value(
        'sum(trimtab_gate_decisions_total{policy="steer", gate="high", decision="open"})'
    )
    assert gates == opened > 0


def test_every_policy_is_told_of(watched: Watched) -> None:
    found = watched.prometheus.query("trimtab_policy_info == 1")
    assert {labels["policy"]: labels["mode"] for labels, _ in found} == POLICIES
    assert all(re.fullmatch(r"[0-9a-f]{12}", labels["hash"]) for labels, _ in found)
    assert watched.prometheus.value("trimtab_policy_generation") == 1


def test_exemplars_lead_to_an_answer(watched: Watched) -> None:
    found = watched.prometheus.get(
        "query_exemplars",
        query="trimtab_probe_score_bucket",
        start="0",
        end=str(time.time() + 60),
    )
    values = [
        value
        for series in found
        for exemplar in series["exemplars"]
        for value in exemplar["labels"].values()
    ]
    assert values
    assert any(value.startswith(tuple(watched.traffic.ids)) for value in values)
