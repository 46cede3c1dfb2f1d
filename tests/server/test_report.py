"""The ``gates`` of an answer: each choice tells of its own engine request, whatever came first."""

from __future__ import annotations

import json
import math

import pytest

from server.report import steering_object
from server.response import EventStream, decorate_json
from steering.engine.exchange import Acknowledgement, Exchange
from steering.engine.gate_report import GateReport
from steering.plan import Plan, PlanGate, Row, Term

LATER = GateReport("harm", fired=False)


def gated_plan() -> Plan:
    row = Row((Term("0" * 64, ((1, 1.0),)),))
    gate = PlanGate("harm", "1" * 64, 0, "prompt_end", 0.5, None, 1)
    return Plan.of([[Row()] * 5, [row] * 5], gates=[gate])


def make_exchange(*, strength: float = 1.0, plan: Plan | None = None) -> Exchange:
    return Exchange("guard@3", "enforce", "closed", strength, plan or gated_plan())


def begin(exchange: Exchange, *requests: tuple[str, str, int]) -> None:
    for request_id, prompt_id, index in requests:
        exchange.begin(request_id, prompt_id, index)
        exchange.acknowledgements[request_id] = Acknowledgement(applied=True)
        # A score that tells which request it is of.
        score = 100.0 * int(request_id.partition("-")[0]) / 100
        exchange.gates[request_id] = (GateReport("harm", fired=True, at=9, score=score),)


def score(report: dict) -> float:
    return report["gates"]["harm"]["score"]


def test_what_a_gate_came_to_is_told_by_its_name() -> None:
    exchange = make_exchange()
    begin(exchange, ("1-x", "chatcmpl-f00", 0))
    assert steering_object(exchange, 0) == {
        "policy": "guard@3",
        "mode": "enforce",
        "applied": True,
        "strength": 1.0,
        "gates": {"harm": {"fired": True, "at": 9, "score": 1.0}},
    }


def test_a_gate_that_was_not_decided_says_so_and_one_per_token_counts() -> None:
    exchange = make_exchange()
    begin(exchange, ("1-x", "p", 0))
    exchange.gates["1-x"] = (LATER, GateReport("each", True, 4, 0.75, 12))
    assert steering_object(exchange, 0)["gates"] == {
        "harm": {"fired": False, "at": None, "score": None},
        "each": {"fired": True, "at": 4, "score": 0.75, "tokens": 12},
    }


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_json_cannot_say_is_null(value: float) -> None:
    exchange = make_exchange()
    begin(exchange, ("1-x", "p", 0))
    exchange.gates["1-x"] = (GateReport("harm", False, 3, value),)
    report = steering_object(exchange, 0)
    assert report["gates"]["harm"]["score"] is None
    json.dumps(report, allow_nan=False)


def test_without_gates_or_without_being_applied_there_is_no_such_key() -> None:
    plain = make_exchange(plan=Plan.everywhere(Row((Term("0" * 64, ((1, 1.0),)),))))
    plain.begin("1-x", "p", 0)
    plain.acknowledgements["1-x"] = Acknowledgement(applied=True)
    assert "gates" not in steering_object(plain, 0)

    refused = make_exchange()
    begin(refused, ("1-x", "p", 0))
    refused.acknowledgements["1-x"] = Acknowledgement(applied=False, reason="plan_unknown")
    assert "gates" not in steering_object(refused, 0)

    off = Exchange("guard@3", "shadow", "closed", 1.0, None)
    off.begin("1-x", "p", 0)
    assert "gates" not in steering_object(off, 0)


def test_each_of_n_answers_has_its_own() -> None:
    exchange = make_exchange()
    begin(exchange, ("2-x", "p", 1), ("1-x", "p", 0), ("3-x", "p", 2))
    assert [score(steering_object(exchange, i)) for i in range(3)] == [1.0, 2.0, 3.0]
    assert "gates" not in steering_object(exchange, 3)


def test_several_prompts_are_numbered_by_prompt_and_then_by_answer() -> None:
    exchange = make_exchange()
    # Eleven prompts, whose ids sort otherwise as text, two answers each, the last prompt first.
    begin(
        exchange,
        *((f"{2 * p + i}-x", f"cmpl-a-{p}", i) for p in reversed(range(11)) for i in range(2)),
    )
    assert [score(steering_object(exchange, i)) for i in range(22)] == [float(i) for i in range(22)]


def test_an_answer_without_choices_has_the_gates_of_its_last_part() -> None:
    exchange = make_exchange()
    begin(exchange, ("1-x", "resp-a", 0), ("2-x", "resp-b", 0))
    assert score(steering_object(exchange)) == 2.0
    assert "gates" not in steering_object(make_exchange())


def test_whole_answers_carry_the_gates_of_each_choice() -> None:
    exchange = make_exchange()
    begin(exchange, ("1-x", "p", 0), ("2-x", "p", 1))
    body = {"choices": [{"index": 1}, {"index": 0}]}
    choices = json.loads(decorate_json(json.dumps(body).encode(), exchange, None))["choices"]
    assert [score(choice["steering"]) for choice in choices] == [2.0, 1.0]

    message = decorate_json(b'{"type": "message"}', exchange, None)
    assert score(json.loads(message)["steering"]) == 2.0


def test_a_stream_tells_what_is_known_when_the_choice_ends() -> None:
    exchange = make_exchange()
    begin(exchange, ("1-x", "p", 0), ("2-x", "p", 1))
    exchange.gates["2-x"] = (LATER,)
    stream = EventStream(exchange, None)

    def end(index: int) -> dict:
        choice = {"index": index, "delta": {}, "finish_reason": "stop"}
        event = b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"
        return json.loads(stream.feed(event)[5:])["choices"][0]["steering"]["gates"]["harm"]

    assert end(0)["score"] == 1.0
    exchange.gates["2-x"] = (GateReport("harm", fired=False, at=9, score=0.25),)
    assert end(1) == {"fired": False, "at": 9, "score": 0.25}
