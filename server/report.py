"""What an answer says about its steering: the ``steering`` object and two headers.

Both are derived from the :class:`~steering.engine.exchange.Exchange`, that is from what the worker
reported, and never from what was asked for.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from steering.engine.exchange import Exchange
from steering.engine.gate_report import GateReport
from steering.engine.score_log import Summary

Applied = Literal["enforce", "shadow", "off"]


def steering_object(
    exchange: Exchange, choice: int | None = None, *, untold: bool = False
) -> dict[str, Any]:
    """The object that every choice of an answer carries.

    ``strength`` is there when a policy was chosen, ``reason`` when an ``enforce`` policy was not
    applied, ``gates`` when the policy has gates and was applied, ``probes`` when something was read,
    with every token's score and the phases of what was read where they were asked for.

    Args:
        exchange: the HTTP request's.
        choice: the index of the choice; ``None`` for an answer without choices.
        untold: of the tokens' scores, only those that :func:`steering_of_tokens` has not given.
    """
    applied, reason = exchange.applied()
    report: dict[str, Any] = {
        "policy": exchange.policy,
        "mode": exchange.mode,
        "applied": applied,
    }
    if exchange.policy != "off":
        report["strength"] = exchange.strength
    if not applied and exchange.mode == "enforce":
        report["reason"] = reason
    gates = exchange.gates_of_choice(choice)
    if applied and gates:
        report["gates"] = {gate.name: _gate(gate) for gate in gates}
    log = exchange.scores_of_choice(choice)
    if log is not None:
        report["probes"] = {
            reading.key: {
                **summary_object(log.summary(n)),
                **({"trace": _pairs(log.trace(n, untold=untold))} if exchange.trace else {}),
            }
            for n, reading in enumerate(log.readings)
        }
        if exchange.trace:
            report["phases"] = log.runs()
    return report


def steering_of_tokens(exchange: Exchange, choice: int | None = None) -> dict[str, Any] | None:
    """The object that a piece of a stream carries: the scores that led to its tokens, each given once.

    Args:
        exchange: the HTTP request's.
        choice: as for :func:`steering_object`.

    Returns:
        ``None`` where there is none to give.
    """
    log = exchange.scores_of_choice(choice) if exchange.trace else None
    if log is None:
        return None
    traces = {
        reading.key: _pairs(log.trace(n, delivered=True, untold=True))
        for n, reading in enumerate(log.readings)
    }
    log.tell()
    if not any(traces.values()):
        return None
    return {"probes": {key: {"trace": trace} for key, trace in traces.items()}}


def _pairs(trace: list[tuple[int, float]]) -> list[tuple[int, float]]:
    # What is beyond the seventh place says nothing in float32, and is most of the bytes.
    return [(position, round(score, 7)) for position, score in trace]


def summary_object(summary: Summary) -> dict[str, Any]:
    """What one probe's scores of one choice come to, as answers have it."""
    report = {
        "prompt_end": summary.prompt_end,
        "plateau": summary.plateau,
        "final": summary.final,
        "cliff": summary.cliff,
        "answer_start": summary.answer_start,
        "answer_mean": summary.answer_mean,
        "tokens": summary.tokens,
    }
    if summary.missing:
        report["missing"] = summary.missing
    return report


def _gate(gate: GateReport) -> dict[str, Any]:
    score = gate.score if gate.score is not None and math.isfinite(gate.score) else None
    report: dict[str, Any] = {"fired": gate.fired, "at": gate.at, "score": score}
    if gate.tokens is not None:
        report["tokens"] = gate.tokens
    return report


def applied_word(exchange: Exchange) -> Applied:
    """The value of ``X-Trimtab-Applied`` for an answer that is complete."""
    if exchange.mode == "shadow":
        return "shadow"
    return "enforce" if exchange.applied()[0] else "off"


def promised_word(exchange: Exchange) -> Applied:
    """The value of ``X-Trimtab-Applied`` for a stream that is about to begin.

    Under a ``closed`` policy a stream whose plan cannot be placed ends in an error, so what has
    begun to be applied may be promised for the rest of it. Under ``open`` only what is known
    counts.
    """
    if (
        exchange.plan is not None
        and exchange.mode == "enforce"
        and exchange.on_failure == "closed"
        and not refused_by_worker(exchange)
    ):
        return "enforce"
    return applied_word(exchange)


def refused_by_worker(exchange: Exchange) -> bool:
    """Whether a worker has reported that it did not place the plan."""
    return any(a is not None and not a.applied for a in exchange.acknowledgements.values())


def settled(exchange: Exchange) -> bool:
    """Whether the headers of a stream can be sent because what they say can no longer change.

    ``open`` waits for the report on every engine request started so far, ``closed`` for the first
    good one; after a bad one an error follows.
    """
    if exchange.on_failure == "closed" and exchange.plan is not None:
        return any(a is not None and a.applied for a in exchange.acknowledgements.values())
    return exchange.acknowledged


def report_headers(exchange: Exchange, word: Applied) -> list[tuple[bytes, bytes]]:
    """The two headers, as ASGI has them."""
    return [
        (b"x-trimtab-policy", exchange.policy.encode()),
        (b"x-trimtab-applied", word.encode()),
    ]
