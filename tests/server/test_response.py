"""How answers are rewritten: every way of cutting a stream must give the same bytes."""

from __future__ import annotations

import json
import random

import pytest

from server.errors import in_flight_error
from server.response import EventStream, decorate_json
from steering.engine.exchange import Acknowledgement, Exchange
from tests.server.conftest import make_entry

STEERING = {"policy": "guard@3", "mode": "enforce", "applied": True, "strength": 0.5}


@pytest.fixture
def exchange() -> Exchange:
    plan = make_entry("guard").plan
    return Exchange("guard@3", "enforce", "closed", 0.5, plan, {"r": Acknowledgement(applied=True)})


def sse(*documents: object, kind: str | None = None) -> bytes:
    return b"".join(
        (f"event: {kind}\n" if kind else "").encode()
        + b"data: "
        + json.dumps(document, separators=(",", ":")).encode()
        + b"\n\n"
        for document in documents
    )


def chunk(content: str, finish: str | None = None, index: int = 0) -> dict[str, object]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [{"index": index, "delta": {"content": content}, "finish_reason": finish}],
    }


def events(stream: bytes) -> list[dict]:
    return [
        json.loads(line[5:])
        for line in stream.splitlines()
        if line.startswith(b"data:") and b"[DONE]" not in line
    ]


CHAT = b"".join(
    [
        sse(chunk("")),
        b": keep-alive\n\n",
        sse(chunk('say "finish_reason":"stop" or "model":"x"\n\n')),
        sse(chunk("die Bö", None, 1), chunk("ü", "length", 1), chunk("", "stop", 0)),
        sse({"object": "chat.completion.chunk", "model": "m", "choices": [], "usage": {"t": 1}}),
        b"data: [DONE]\n\n",
    ]
)


def rewrite(stream: EventStream, parts: list[bytes]) -> bytes:
    return b"".join(stream.feed(part) for part in parts) + stream.flush()


def test_the_last_chunk_of_every_choice_carries_the_report(exchange: Exchange) -> None:
    out = events(rewrite(EventStream(exchange, None), [CHAT]))
    reports = [
        (choice["index"], choice.get("steering")) for e in out for choice in e.get("choices", [])
    ]
    assert reports == [(0, None), (0, None), (1, None), (1, STEERING), (0, STEERING)]


def test_events_without_a_report_pass_byte_for_byte(exchange: Exchange) -> None:
    out = rewrite(EventStream(exchange, None), [CHAT])
    before, after = CHAT.split(b"\n\n"), out.split(b"\n\n")
    assert len(before) == len(after)
    changed = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    assert changed == [4, 5]


@pytest.mark.parametrize("model", [None, "m@guard"])
@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b"\r"])
def test_the_cut_of_the_stream_does_not_matter(
    exchange: Exchange, model: str | None, ending: bytes
) -> None:
    stream = CHAT.replace(b"\n", ending)
    whole = rewrite(EventStream(exchange, model), [stream])
    assert whole != stream
    assert rewrite(EventStream(exchange, model), [bytes([b]) for b in stream]) == whole
    generator = random.Random(0)
    for _ in range(50):
        cuts = sorted(generator.sample(range(len(stream)), 7))
        parts = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
        assert rewrite(EventStream(exchange, model), parts) == whole


def test_complete_events_are_not_held_back_for_the_next(exchange: Exchange) -> None:
    stream = EventStream(exchange, None)
    first = sse(chunk("a"))
    assert stream.feed(first + b"data: {") == first


def test_an_alias_is_echoed_in_every_chunk_and_nothing_else_changes(exchange: Exchange) -> None:
    out = events(rewrite(EventStream(exchange, 'm@g"\\1'), [CHAT]))
    assert {e["model"] for e in out} == {'m@g"\\1'}
    assert [e["choices"][0]["delta"]["content"] for e in out if e["choices"]] == [
        e["choices"][0]["delta"]["content"] for e in events(CHAT) if e["choices"]
    ]


def response_event(kind: str, **more: object) -> bytes:
    tools = [{"parameters": {"properties": {"error": {"type": "string"}, "model": {"a": 1}}}}]
    response = {"object": "response", "model": "m", "tools": tools, "error": None, **more}
    return sse({"type": kind, "sequence_number": 1, "response": response}, kind=kind)


@pytest.mark.parametrize("last", ["completed", "incomplete", "failed"])
def test_the_last_event_of_a_response_carries_the_report(exchange: Exchange, last: str) -> None:
    delta = sse({"type": "response.output_text.delta", "delta": "x"}, kind="…")
    stream = EventStream(exchange, "m@guard")
    out = stream.feed(response_event("response.created") + delta)
    assert not stream.failed
    more = {"error": {"message": "x"}} if last == "failed" else {}
    out += stream.feed(response_event(f"response.{last}", **more))
    first, middle, end = events(out)
    assert first["response"]["model"] == end["response"]["model"] == "m@guard"
    assert "steering" not in first["response"]
    assert middle == {"type": "response.output_text.delta", "delta": "x"}
    assert end["response"]["steering"] == STEERING
    assert end["response"]["tools"] == first["response"]["tools"]
    assert stream.failed is (last == "failed")
    assert out.count(b"event: response.created\ndata: ") == 1


def test_the_opening_events_of_a_response_do_not_count_as_speaking(exchange: Exchange) -> None:
    stream = EventStream(exchange, None)
    stream.feed(response_event("response.created") + response_event("response.in_progress"))
    assert not stream.speaking
    stream.feed(sse({"type": "response.output_text.delta", "delta": "x"}))
    assert stream.speaking


def test_a_messages_stream_carries_the_report_beside_its_stop_reason(exchange: Exchange) -> None:
    start = {"type": "message_start", "message": {"model": "m", "stop_reason": None}}
    delta = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {}}
    body = sse(start, kind="message_start") + sse(delta, kind="message_delta")
    first, last = events(rewrite(EventStream(exchange, "m@guard"), [body]))
    assert first["message"]["model"] == "m@guard"
    assert last == {**delta, "steering": STEERING}


def test_a_refusal_by_the_engine_is_recognised_in_an_error_event(exchange: Exchange) -> None:
    stream = EventStream(exchange, None)
    message = "E_PLAN_NOT_PLACED: the engine did not apply the policy (plan_unknown)"
    (out,) = events(stream.feed(sse({"error": {"message": message, "code": 503}})))
    assert stream.failed
    assert stream.refusal is not None
    assert stream.refusal.code == "E_PLAN_NOT_PLACED"
    assert out["error"]["code"] == "E_PLAN_NOT_PLACED"
    assert out["error"]["message"].startswith("the engine did not")


def test_an_error_of_vllms_own_stays_as_it_is(exchange: Exchange) -> None:
    stream = EventStream(exchange, None)
    event = sse({"error": {"message": "no such thing", "type": "x", "code": 400}})
    assert stream.feed(event) == event
    assert stream.failed
    assert stream.refusal is None


def test_events_of_other_shapes_pass_untouched(exchange: Exchange) -> None:
    odd = (
        b'data: {"finish_reason":"stop"}\n\n'
        b'data: ["finish_reason":"x"\n\n'
        b'data: {"choices":[1,{"finish_reason":\ndata: "stop"}]}\n\n'
        b'id: 1\nretry: 2\n\ndata:\n\n\n\ndata: {"choices":[7],"x":{"finish_reason":"y"}}\n\n'
        b"data: no newline at the end"
    )
    assert rewrite(EventStream(exchange, None), [odd]) == odd


@pytest.mark.parametrize(
    ("document", "at"),
    [
        ({"object": "chat.completion", "model": "m", "choices": [{"index": 0}, {"index": 1}]}, 0),
        ({"object": "text_completion", "model": "m", "choices": [{"text": "x"}]}, 0),
        ({"object": "response", "model": "m", "output": []}, None),
        ({"type": "message", "model": "m", "content": []}, None),
    ],
)
def test_a_whole_answer_carries_the_report_where_its_api_has_choices_or_not(
    exchange: Exchange, document: dict, at: int | None
) -> None:
    out = json.loads(decorate_json(json.dumps(document).encode(), exchange, "m@guard"))
    holders = [out] if at is None else out["choices"]
    assert [holder.pop("steering") for holder in holders] == [STEERING] * len(holders)
    assert out.pop("model") == "m@guard"
    document.pop("model")
    assert out == document


@pytest.mark.parametrize(
    "body",
    [
        b"null",
        b"",
        b"[1]",
        b'{"choices": ',
        b'{"choices": 7}',
        b'{"choices": []}',
        b'{"data": [], "object": "list"}',
        b'{"tokens": [1], "count": 1}',
        b'{"object": "list", "note": "\\"choices\\""}',
        b"\xff\xfe",
    ],
)
def test_an_answer_of_another_shape_passes_byte_for_byte(exchange: Exchange, body: bytes) -> None:
    assert decorate_json(body, exchange, "m@guard") == body


def test_half_a_surrogate_pair_in_an_answer_does_no_harm(exchange: Exchange) -> None:
    body = b'{"choices": [{"text": "\\ud800"}]}'
    out = json.loads(decorate_json(body, exchange, None))
    assert out["choices"][0]["text"] == "\ud800"


@pytest.mark.parametrize(
    ("message", "code", "sentence"),
    [
        ("E_SLOTS_EXHAUSTED: all in use; try again", "E_SLOTS_EXHAUSTED", "all in use; try again"),
        ("E_PLAN_INACTIVE: not here (parameter=x, value=y)", "E_PLAN_INACTIVE", "not here"),
        ("1 error\n  E_PLAN_NOT_PLACED: why\n more", "E_PLAN_NOT_PLACED", "why"),
    ],
)
def test_the_engines_codes_are_found_in_whatever_vllm_puts_around_them(
    message: str, code: str, sentence: str
) -> None:
    error = in_flight_error(message)
    assert error is not None
    assert (error.code, error.message) == (code, sentence)


@pytest.mark.parametrize("message", [None, 7, "", "E_SOMETHING: x", "THE_SLOTS_EXHAUSTED: x"])
def test_other_messages_are_not_taken_for_refusals(message: object) -> None:
    assert in_flight_error(message) is None
