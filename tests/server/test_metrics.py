"""Metrics of what the engine reports: bounded in number, exact in their counts, read from the text."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from server.metrics import MAX_POLICY_LABELS, OTHER, EngineMetrics
from steering.engine.exchange import Exchange
from steering.engine.gate_report import GateReport
from steering.engine.score_log import ScoreLog
from steering.readings import Reading
from tests.server.conftest import make_entry

READING = Reading("mood@1", "mood", "a" * 64, 0, 3, "affine", threshold=0.5)
Sample = tuple[str, dict[str, str], float]


def samples(registry: CollectorRegistry) -> Iterator[Sample]:
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            yield sample.name, sample.labels, sample.value


def value(registry: CollectorRegistry, name: str, **labels: str) -> float:
    return sum(
        v for n, found, v in samples(registry) if n == name and labels.items() <= found.items()
    )


def served(count: int) -> tuple[EngineMetrics, CollectorRegistry]:
    registry = CollectorRegistry()
    metrics = EngineMetrics(registry)
    metrics.model_name = "tiny"
    policies = [make_entry(f"policy-{n}").policy for n in range(count)]
    metrics.observe_policies(policies, generation=1)
    return metrics, registry


def finished(policy: str, scores: list[float], mode: str = "enforce") -> Exchange:
    """One request of one prompt token whose answer had these scores, the prompt's end first."""
    exchange = Exchange(policy, mode, "closed", 1.0, None)  # type: ignore[arg-type]
    exchange.begin("r", "chat-1", 0)
    log = exchange.scores["r"] = ScoreLog((READING,), [1], 1, None)
    log.add_tokens([1] * len(scores))
    log.add_scores(0, [0], array("f", scores).tobytes())
    return exchange


def observe(metrics: EngineMetrics, exchange: Exchange) -> None:
    (log,) = exchange.scores.values()
    metrics.read(exchange, 0, READING, array("f", [score for _, score in log.trace(0)[1:]]))
    metrics.ended(exchange, "r", finished=True)


def test_a_thousand_policies_make_a_bounded_number_of_series() -> None:
    metrics, registry = served(1000)
    for n in range(1000):
        observe(metrics, finished(f"policy-{n}@3", [0.5, 0.25, 0.75]))
    before = sum(1 for _ in samples(registry))
    labels = {found["policy"] for _, found, _ in samples(registry) if "policy" in found}
    assert labels == {OTHER, *(f"policy-{n}" for n in range(MAX_POLICY_LABELS))}
    total = value(registry, "trimtab_probe_tokens_total")
    assert total == value(registry, "trimtab_probe_token_score_count") == 2000
    assert value(registry, "trimtab_probe_tokens_total", policy=OTHER) == 2 * (
        1000 - MAX_POLICY_LABELS
    )
    for n in range(1000):
        observe(metrics, finished(f"policy-{n}@4", [0.5, 0.25, 0.75]))
    assert sum(1 for _ in samples(registry)) == before
    assert before < 20_000


def test_a_threshold_is_counted_exactly_where_a_bucket_could_not_tell() -> None:
    metrics, registry = served(1)
    for score in (0.4999, 0.5, 0.5001, 0.51):
        observe(metrics, finished("policy-0@1", [score, score]))
    for phase in ("prompt_end", "answer"):
        counts = {
            decision: value(
                registry, "trimtab_probe_decisions_total", phase=phase, decision=decision
            )
            for decision in ("above", "below")
        }
        assert counts == {"above": 2.0, "below": 2.0}
    assert value(registry, "trimtab_probe_score_count", phase="plateau") == 0


def test_gates_and_missing_scores_are_counted_a_choice() -> None:
    metrics, registry = served(1)
    exchange = finished("policy-0@1", [0.5, float("nan"), 0.5], mode="shadow")
    exchange.gates["r"] = (
        GateReport("opened", True, 4, 0.9),
        GateReport("shut", False, 4, 0.1),
        GateReport("waiting", False),
        GateReport("each", False, None, None, 0),
        GateReport("some", True, 2, 0.8, 3),
    )
    observe(metrics, exchange)
    decisions = {
        found["gate"]: found["decision"]
        for name, found, _ in samples(registry)
        if name == "trimtab_gate_decisions_total"
    }
    assert decisions == {
        "opened": "open",
        "shut": "closed",
        "waiting": "undecided",
        "each": "closed",
        "some": "open",
    }
    assert value(registry, "trimtab_probe_tokens_missing_total", variant="shadow") == 1
    metrics.ended(exchange, "r", finished=False)
    assert value(registry, "trimtab_probe_tokens_missing_total") == 1


def test_steps_are_observed_by_engine() -> None:
    metrics, registry = served(0)
    metrics.stepped(1, 2e-4, {"add": 7, "project": 0, "rotate": 0, "scale_heads": 3})
    metrics.stepped(1, 3e-4, {"add": 1, "project": 0, "rotate": 0, "scale_heads": 0})
    name = "trimtab_edits_applied_tokens_total"
    found = {f["edit_kind"]: v for n, f, v in samples(registry) if n == name}
    assert found == {"add": 8.0, "scale_heads": 3.0}
    name = "trimtab_engine_step_overhead_seconds_sum"
    assert value(registry, name, engine="1") == pytest.approx(5e-4)


def test_a_score_s_exemplar_is_the_request() -> None:
    from prometheus_client.openmetrics.exposition import generate_latest as openmetrics

    metrics, registry = served(1)
    observe(metrics, finished("policy-0@1", [0.5, 0.5]))
    assert '# {request_id="chat-1"} 0.5' in openmetrics(registry).decode()
