"""The HTTP layer around an app that answers in vLLM's shapes.

What is tested here is what no engine is needed for: framing, limits, selection, and which bytes go
where. The same layer around the real server is in ``test_serve_engine.py``.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from directions.errors import TrimtabError
from server.catalogue import Catalogue
from server.metrics import RequestMetrics
from server.middleware import Service, TrimtabMiddleware
from steering.engine.exchange import Acknowledgement, Exchange, current_exchange
from steering.engine.ledger import SlotLedger
from tests.server.asgi_client import Answer, Connection, post
from tests.server.conftest import make_entry

CHAT = "/v1/chat/completions"
LIMIT = 4096

Chunks = Callable[[Exchange], AsyncIterator[bytes]]


def event(document: Any) -> bytes:
    return b"data: " + json.dumps(document, separators=(",", ":")).encode() + b"\n\n"


def chunk(content: str, finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": {"content": content}, "finish_reason": finish}
    return {"object": "chat.completion.chunk", "model": "m", "choices": [choice]}


def acknowledge(exchange: Exchange, *, applied: bool = True, reason: str | None = None) -> None:
    if exchange.plan is not None and exchange.declined is None:
        exchange.acknowledgements["r"] = Acknowledgement(applied, reason)


async def ordinary_stream(exchange: Exchange) -> AsyncIterator[bytes]:
    acknowledge(exchange)
    for document in (chunk(""), chunk("hello"), chunk("", "stop")):
        yield event(document)
    yield b"data: [DONE]\n\n"


@dataclass
class Inner:
    """The app inside: what it saw of each request, and what it streams."""

    seen: list[tuple[Exchange | None, dict[bytes, bytes], bytes]] = field(default_factory=list)
    chunks: Chunks = ordinary_stream
    answer: Callable[[Exchange], Response] | None = None

    async def endpoint(self, request: Request) -> Response:
        exchange = current_exchange.get()
        body = await request.body()
        self.seen.append((exchange, dict(request.scope["headers"]), body))
        assert exchange is not None
        if self.answer is not None:
            return self.answer(exchange)
        document = json.loads(body) if body[:1] == b"{" else {}
        if document.get("stream"):
            return StreamingResponse(self.chunks(exchange), media_type="text/event-stream")
        acknowledge(exchange)
        return JSONResponse({"object": "chat.completion", "model": "m", "choices": [{"index": 0}]})

    @property
    def body(self) -> Any:
        return json.loads(self.seen[-1][2])


@dataclass
class Site:
    """An app with the layer around it."""

    app: Any
    inner: Inner
    ledger: SlotLedger
    registry: CollectorRegistry

    def counts(self) -> dict[tuple[str, str, str, str], float]:
        """Requests by policy, mode, outcome and reason, read as a scraper reads them."""
        text = generate_latest(self.registry).decode()
        counts = {}
        for line in text.splitlines():
            if line.startswith("trimtab_requests_total{"):
                labels, _, value = line.removeprefix("trimtab_requests_total{").partition("} ")
                named = dict(pair.split("=", 1) for pair in labels.split(","))
                key = tuple(
                    named[label].strip('"') for label in ("policy", "mode", "outcome", "reason")
                )
                counts[key] = float(value)
        return counts


def make_site(catalogue: Catalogue) -> Site:
    inner = Inner()
    paths = [CHAT, "/v1/messages", "/tokenize", "/v1/audio/transcriptions", "/new/route"]
    routes = [Route(path, inner.endpoint, methods=["POST"]) for path in paths]

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "m", "root": "/x", "parent": None}]})

    async def health(request: Request) -> Response:
        return PlainTextResponse("ok")

    routes += [Route("/v1/models", models), Route("/health", health)]
    app = Starlette(routes=routes)
    registry, ledger = CollectorRegistry(), SlotLedger(num_slots=2)
    app.state.trimtab = Service(
        catalogue=catalogue,
        ledger=ledger,
        metrics=RequestMetrics(registry),
        model_name="m",
        served_names=lambda: {"m", "lora@x"},
        max_body_bytes=LIMIT,
    )
    app.add_middleware(TrimtabMiddleware)
    return Site(app, inner, ledger, registry)


@pytest.fixture
def site(catalogue: Catalogue) -> Site:
    return make_site(catalogue)


@pytest.fixture
def default_site() -> Site:
    """A server whose default policy is guard."""
    return make_site(Catalogue.of([make_entry("guard"), make_entry("kind")], default="guard"))


def chat(**keys: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "hi"}], **keys}


def report(answer: Answer) -> Any:
    return answer.json()["choices"][0]["steering"]


# --- what vLLM gets


async def test_a_request_without_anything_of_ours_passes_byte_for_byte(site: Site) -> None:
    body = b'{"model": "m",\n  "temperature": 0.10, "messages": [], "messages": []}'
    answer = await post(site.app, CHAT, body)
    exchange, headers, seen = site.inner.seen[0]
    assert seen == body
    assert headers[b"content-length"] == str(len(body)).encode()
    assert exchange is not None
    assert (exchange.policy, exchange.mode, exchange.plan) == ("off", "off", None)
    assert report(answer) == {"policy": "off", "mode": "off", "applied": False}
    assert answer.header("x-trimtab-policy") == "off"
    assert answer.header("x-trimtab-applied") == "off"
    assert answer.header("content-length") == str(len(answer.body))


async def test_our_part_is_taken_out_and_the_rest_keeps_its_meaning(site: Site) -> None:
    document = chat(
        model="m@guard",
        steering={"policy": "guard@3", "strength": 0.5},
        temperature=0.1,
        seed=12345678901234567890,
        stop=["\ud800", "é", "\x00"],
    )
    answer = await post(site.app, CHAT, document)
    exchange, headers, seen = site.inner.seen[0]
    assert site.inner.body == {
        **{key: value for key, value in document.items() if key != "steering"},
        "model": "m",
    }
    assert headers[b"content-length"] == str(len(seen)).encode()
    assert exchange is not None
    assert exchange.strength == 0.5
    assert answer.json()["model"] == "m@guard"
    assert report(answer) == {
        "policy": "guard@3",
        "mode": "enforce",
        "applied": True,
        "strength": 0.5,
    }


async def test_a_served_name_with_an_at_sign_is_a_plain_name(site: Site) -> None:
    answer = await post(site.app, CHAT, chat(model="lora@x"))
    assert site.inner.body["model"] == "lora@x"
    assert report(answer)["policy"] == "off"
    answer = await post(site.app, CHAT, chat(model="lora@x@guard"))
    assert site.inner.body["model"] == "lora@x"
    assert report(answer)["policy"] == "guard@3"


async def test_a_body_in_many_pieces_is_one_body(site: Site) -> None:
    body = json.dumps(chat(steering={"policy": "guard"})).encode()
    parts = [body[i : i + 7] for i in range(0, len(body), 7)]
    headers = [("content-type", "application/json"), ("transfer-encoding", "chunked")]
    answer = await Connection(site.app, CHAT, parts, headers=headers).run()
    assert report(answer)["applied"] is True
    seen_headers = site.inner.seen[0][1]
    assert b"transfer-encoding" not in seen_headers
    assert seen_headers[b"content-length"] == str(len(site.inner.seen[0][2])).encode()


async def test_an_unknown_route_is_under_the_default_policy_too(default_site: Site) -> None:
    await post(default_site.app, "/new/route", {"anything": 1})
    exchange = default_site.inner.seen[0][0]
    assert exchange is not None
    assert exchange.policy == "guard@1"
    assert exchange.plan is not None


async def test_a_body_that_is_not_json_is_under_the_default_policy_and_the_header(
    default_site: Site,
) -> None:
    headers = [("content-type", "multipart/form-data; boundary=x"), ("x-trimtab-policy", "kind")]
    path = "/v1/audio/transcriptions"
    await Connection(default_site.app, path, [b"--x--"], headers=headers[:1]).run()
    await Connection(default_site.app, path, [b"--", b"x--"], headers=headers).run()
    policies = [exchange.policy for exchange, _, _ in default_site.inner.seen if exchange]
    assert policies == ["guard@1", "kind@1"]
    assert default_site.inner.seen[1][2] == b"--x--"


async def test_off_is_chosen_over_the_default_in_each_place(default_site: Site) -> None:
    app = default_site.app
    answers = [
        await post(app, CHAT, chat(model="m@off")),
        await post(app, CHAT, chat(), headers=[("x-trimtab-policy", "off")]),
        await post(app, CHAT, chat(steering={"policy": "off"})),
    ]
    assert [report(answer)["policy"] for answer in answers] == ["off"] * 3
    assert report(await post(app, CHAT, chat()))["policy"] == "guard@1"


async def test_other_methods_and_routes_are_left_alone(default_site: Site) -> None:
    answer = await Connection(default_site.app, "/health", method="GET").run()
    assert answer.body == b"ok"
    assert answer.header("x-trimtab-policy") is None
    assert default_site.counts() == {}


async def test_an_answer_that_generated_nothing_claims_nothing(default_site: Site) -> None:
    default_site.inner.answer = lambda exchange: JSONResponse({"tokens": [1]})
    answer = await post(default_site.app, "/tokenize", {"prompt": "x"})
    assert answer.body == b'{"tokens":[1]}'
    assert answer.header("x-trimtab-applied") is None
    assert default_site.counts() == {}


# --- refusals


@pytest.mark.parametrize(
    ("document", "status", "code"),
    [
        (b"", 400, "E_BODY_JSON"),
        (b"{", 400, "E_BODY_JSON"),
        (b"[]", 400, "E_BODY_JSON"),
        (b"\xff\xfe\xfd", 400, "E_BODY_JSON"),
        (b"[" * 3000, 400, "E_BODY_JSON"),
        (b'{"model": "m", "model": "m@guard"}', 400, "E_BODY_JSON"),
        (b'{"steering": {"policy": "guard"}, "steering": {}}', 400, "E_BODY_JSON"),
        (b'{"steering": {"policy": "guard", "policy": "off"}}', 400, "E_BODY_JSON"),
        (b'{"steering": {"policy": "guard", "strength": NaN}}', 400, "E_STRENGTH_FINITE"),
        (b'{"steering": {"policy": "guard", "strength": Infinity}}', 400, "E_STRENGTH_FINITE"),
        (b'{"steering": {"policy": "guard", "strength": 1e999}}', 400, "E_STRENGTH_FINITE"),
        (chat(steering={"policy": "guard", "strength": 2.5}), 400, "E_STRENGTH_RANGE"),
        (chat(steering={"policy": "guard", "strength": -1}), 400, "E_STRENGTH_RANGE"),
        (chat(steering={"policy": "guard", "strength": "1"}), 400, "E_STEERING_FIELD"),
        (chat(steering={"policy": "guard", "layers": "1"}), 400, "E_STEERING_FIELD"),
        (chat(steering="guard"), 400, "E_STEERING_FIELD"),
        (chat(steering={"strength": 1}), 400, "E_STEERING_FIELD"),
        (chat(steering={"policy": "guard", "trace": True}), 400, "E_TRACE_UNSUPPORTED"),
        (chat(steering={"policy": "nobody"}), 404, "E_POLICY_UNKNOWN"),
        (chat(steering={"policy": "../../etc/passwd"}), 404, "E_POLICY_UNKNOWN"),
        (chat(steering={"policy": "guard@9"}), 404, "E_POLICY_VERSION"),
        (chat(model="m@nobody"), 404, "E_POLICY_UNKNOWN"),
        (chat(model="m@guard@9"), 404, "E_POLICY_VERSION"),
        (chat(model="m@guard", steering={"policy": "kind"}), 400, "E_SELECTION_CONFLICT"),
        (chat(model="m@guard", use_beam_search=True), 400, "E_BEAM_SEARCH"),
        (chat(model="m@guard", use_beam_search="yes"), 400, "E_BEAM_SEARCH"),
        (chat(model="m@guard", background=True), 400, "E_BACKGROUND"),
        (chat(vllm_xargs={"trimtab": {"plan": "x"}}), 400, "E_RESERVED_KEY"),
        (chat(sampling_params={"extra_args": {"trimtab": 1}}), 400, "E_RESERVED_KEY"),
    ],
)
async def test_bad_input_is_refused_before_vllm_sees_it(
    site: Site, document: Any, status: int, code: str
) -> None:
    answer = await post(site.app, CHAT, document)
    assert answer.status == status
    assert site.inner.seen == []
    error = answer.json()["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    assert error["code"] == code
    assert answer.header("content-length") == str(len(answer.body))
    assert answer.header("x-trimtab-applied") is None
    ((policy, _, outcome, reason), count), *others = site.counts().items()
    assert others == []
    assert (outcome, reason, count) == ("refused", code, 1.0)
    assert policy in ("_unresolved", "guard", "off")


async def test_what_a_policy_cannot_do_is_fine_without_one(site: Site) -> None:
    for keys in ({"use_beam_search": True}, {"background": True}, {"use_beam_search": False}):
        assert (await post(site.app, CHAT, chat(**keys))).status == 200
    zero = chat(steering={"policy": "guard", "strength": 0}, use_beam_search=True)
    answer = await post(site.app, CHAT, zero)
    assert report(answer)["reason"] == "strength_zero"
    assert (await post(site.app, CHAT, chat(model="m@guard", use_beam_search=False))).status == 200


@pytest.mark.parametrize("value", [b"guard\r\nX: y", b"guard\x00", b"", b"a" * 200, b"guard@1@1"])
async def test_a_bad_header_is_refused_and_never_echoed_raw(site: Site, value: bytes) -> None:
    answer = await post(site.app, CHAT, chat(), headers=[("x-trimtab-policy", value)])
    assert (answer.status, answer.code) == (400, "E_HEADER")
    for _, header in answer.headers:
        assert b"\r" not in header
        assert b"\n" not in header


async def test_a_repeated_header_is_refused(site: Site) -> None:
    headers = [("X-Trimtab-Policy", "guard"), ("x-trimtab-policy", "guard")]
    assert (await post(site.app, CHAT, chat(), headers=headers)).code == "E_HEADER"


async def test_an_error_on_the_anthropic_route_has_their_shape(site: Site) -> None:
    answer = await post(site.app, "/v1/messages", chat(model="m@nobody"))
    assert answer.json()["type"] == "error"
    assert answer.code == "E_POLICY_UNKNOWN"


async def test_a_body_at_the_limit_passes_and_one_byte_more_does_not(site: Site) -> None:
    body = json.dumps(chat(user="x")).encode()
    padded = body[:-1] + b" " * (LIMIT - len(body)) + b"}"
    assert len(padded) == LIMIT
    assert (await post(site.app, CHAT, padded)).status == 200
    answer = await post(site.app, CHAT, padded + b" ")
    assert (answer.status, answer.code) == (413, "E_BODY_TOO_LARGE")
    assert answer.header("connection") == "close"


@pytest.mark.parametrize("content_type", ["application/json", "multipart/form-data; boundary=x"])
@pytest.mark.parametrize("claim", [None, "10", "many"])
async def test_reading_stops_at_the_limit_whatever_the_length_claims(
    site: Site, content_type: str, claim: str | None
) -> None:
    headers = [("content-type", content_type)] + ([("content-length", claim)] if claim else [])
    connection = Connection(site.app, CHAT, [b"x" * 1000] * 1000, headers=headers)
    answer = await connection.run()
    assert (answer.status, answer.code) == (413, "E_BODY_TOO_LARGE")
    assert connection.read <= LIMIT // 1000 + 1


async def test_a_length_over_the_limit_is_refused_before_a_byte_is_read(site: Site) -> None:
    for content_type in ("application/json", "application/octet-stream"):
        headers = [("content-type", content_type), ("content-length", str(LIMIT + 1))]
        connection = Connection(site.app, CHAT, [b"x"], headers=headers)
        assert (await connection.run()).code == "E_BODY_TOO_LARGE"
        assert connection.read == 0


# --- slots


async def test_a_closed_policy_without_a_free_slot_is_429_with_advice(site: Site) -> None:
    site.ledger.acquire("another plan", 1)
    answer = await post(site.app, CHAT, chat(model="m@guard"))
    assert (answer.status, answer.code) == (429, "E_SLOTS_EXHAUSTED")
    assert answer.header("retry-after") == "1"
    assert site.inner.seen == []
    assert site.counts() == {("guard", "enforce", "refused", "E_SLOTS_EXHAUSTED"): 1.0}
    site.ledger.release("another plan")
    assert (await post(site.app, CHAT, chat(model="m@guard"))).status == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_an_open_policy_without_a_free_slot_answers_and_says_so(
    site: Site, stream: bool
) -> None:
    site.ledger.acquire("another plan", 1)
    answer = await post(site.app, CHAT, chat(model="m@kind", stream=stream))
    assert answer.status == 200
    assert answer.header("x-trimtab-policy") == "kind@1"
    assert answer.header("x-trimtab-applied") == "off"
    expected = {
        "policy": "kind@1",
        "mode": "enforce",
        "applied": False,
        "strength": 1.0,
        "reason": "slots_exhausted",
    }
    assert json.dumps(expected, separators=(",", ":")).encode() in answer.body
    assert site.counts() == {("kind", "enforce", "ok", "slots_exhausted"): 1.0}


async def test_slots_are_shown_as_they_are_when_scraped(site: Site) -> None:
    service = site.app.state.trimtab
    service.metrics.follow_slots("m", site.ledger.snapshot)
    assert (
        'trimtab_slots{model_name="m",state="free"} 1.0' in generate_latest(site.registry).decode()
    )
    site.ledger.acquire("p", 1)
    assert (
        'trimtab_slots{model_name="m",state="in_use"} 1.0'
        in generate_latest(site.registry).decode()
    )


# --- streams


async def test_a_streams_headers_wait_for_the_workers_report(site: Site) -> None:
    gate = asyncio.Event()

    async def chunks(exchange: Exchange) -> AsyncIterator[bytes]:
        exchange.acknowledgements["r"] = None
        yield event({"type": "response.created", "response": {}})
        await gate.wait()
        acknowledge(exchange)
        yield event(chunk("", "stop"))

    site.inner.chunks = chunks
    body = json.dumps(chat(model="m@kind", stream=True)).encode()
    headers = [("content-type", "application/json")]
    connection = Connection(site.app, CHAT, [body], headers=headers)
    running = asyncio.create_task(connection.run())
    await asyncio.sleep(0.05)
    assert site.inner.seen
    assert connection.answer.status == 0
    gate.set()
    answer = await running
    assert answer.header("x-trimtab-applied") == "enforce"
    assert b'"applied":true' in answer.body
    assert answer.body.startswith(b'data: {"type":"response.created"')


async def test_without_a_policy_a_streams_headers_do_not_wait(site: Site) -> None:
    gate = asyncio.Event()

    async def chunks(exchange: Exchange) -> AsyncIterator[bytes]:
        await gate.wait()
        yield event(chunk("", "stop"))

    site.inner.chunks = chunks
    body = json.dumps(chat(stream=True)).encode()
    connection = Connection(site.app, CHAT, [body], headers=[("content-type", "application/json")])
    running = asyncio.create_task(connection.run())
    await asyncio.sleep(0.05)
    assert connection.answer.status == 200
    gate.set()
    await running


async def test_keep_alive_comments_flow_under_closed_and_wait_under_open(site: Site) -> None:
    gate = asyncio.Event()

    async def chunks(exchange: Exchange) -> AsyncIterator[bytes]:
        yield b": keep-alive\n\n"
        await gate.wait()
        acknowledge(exchange)
        yield event(chunk("", "stop"))

    site.inner.chunks = chunks
    started = {}
    for policy in ("guard", "kind"):
        gate.clear()
        body = json.dumps(chat(model=f"m@{policy}", stream=True)).encode()
        headers = [("content-type", "application/json")]
        connection = Connection(site.app, CHAT, [body], headers=headers)
        running = asyncio.create_task(connection.run())
        await asyncio.sleep(0.05)
        started[policy] = bool(connection.answer.status)
        gate.set()
        answer = await running
        assert answer.header("x-trimtab-applied") == "enforce"
        assert answer.body.count(b"keep-alive") == 1
    assert started == {"guard": True, "kind": False}


@pytest.mark.parametrize("model", ["m@guard", "m@kind"])
async def test_a_refusal_by_the_engine_is_an_http_status_on_a_stream(
    site: Site, model: str
) -> None:
    async def chunks(exchange: Exchange) -> AsyncIterator[bytes]:
        yield event({"type": "response.created", "response": {}})
        message = "E_SLOTS_EXHAUSTED: every steering slot is in use; try again"
        yield event({"error": {"message": message, "type": "TooManyRequests", "code": 429}})
        yield b"data: [DONE]\n\n"

    site.inner.chunks = chunks
    answer = await post(site.app, CHAT, chat(model=model, stream=True))
    assert (answer.status, answer.code) == (429, "E_SLOTS_EXHAUSTED")
    assert answer.header("retry-after") == "1"
    assert answer.header("content-type") == "application/json"
    assert answer.complete
    (count,) = site.counts()
    assert count[2:] == ("refused", "E_SLOTS_EXHAUSTED")


async def test_an_exception_before_the_report_becomes_the_refusal_that_caused_it(
    site: Site,
) -> None:
    async def chunks(exchange: Exchange) -> AsyncIterator[bytes]:
        yield event({"type": "response.created", "response": {}})
        try:
            raise ValueError("E_PLAN_NOT_PLACED: the engine did not apply the policy (x)")
        except ValueError as cause:
            raise RuntimeError("response already started") from cause

    site.inner.chunks = chunks
    answer = await post(site.app, CHAT, chat(model="m@guard", stream=True))
    assert (answer.status, answer.code) == (503, "E_PLAN_NOT_PLACED")
    assert site.counts() == {("guard", "enforce", "refused", "E_PLAN_NOT_PLACED"): 1.0}


async def test_the_exchanges_own_refusal_counts_whatever_the_handler_made_of_it(
    site: Site,
) -> None:
    def answer_with(exchange: Exchange) -> Response:
        exchange.refusal = TrimtabError("E_PLAN_NOT_PLACED", "why")
        return JSONResponse({"error": {"message": "5 validation errors"}}, status_code=500)

    site.inner.answer = answer_with
    answer = await post(site.app, CHAT, chat(model="m@guard"))
    assert (answer.status, answer.code) == (503, "E_PLAN_NOT_PLACED")


async def test_a_failure_in_the_middle_of_a_stream_ends_it_with_our_code(site: Site) -> None:
    async def chunks(exchange: Exchange) -> AsyncIterator[bytes]:
        acknowledge(exchange)
        yield event(chunk("a"))
        yield event({"error": {"message": "E_PLAN_NOT_PLACED: second prompt", "code": 503}})
        yield b"data: [DONE]\n\n"

    site.inner.chunks = chunks
    answer = await post(site.app, CHAT, chat(model="m@guard", stream=True))
    assert answer.status == 200
    last = json.loads(answer.body.split(b"\n\n")[1][6:])
    assert last["error"]["code"] == "E_PLAN_NOT_PLACED"
    assert site.counts() == {("guard", "enforce", "refused", "E_PLAN_NOT_PLACED"): 1.0}


async def test_a_worker_that_did_not_apply_the_plan_is_not_covered_up(site: Site) -> None:
    def answer_with(exchange: Exchange) -> Response:
        acknowledge(exchange, applied=False, reason="plan_unknown")
        return JSONResponse({"choices": [{"index": 0}]})

    site.inner.answer = answer_with
    answer = await post(site.app, CHAT, chat(model="m@kind"))
    assert report(answer)["applied"] is False
    assert report(answer)["reason"] == "plan_unknown"
    assert answer.header("x-trimtab-applied") == "off"
    # Whatever the engine made of it, a closed policy's answer is steered or no answer.
    refused = await post(site.app, CHAT, chat(model="m@guard"))
    assert refused.status == 503
    assert refused.json()["error"]["code"] == "E_PLAN_NOT_PLACED"
    assert "plan_unknown" in refused.json()["error"]["message"]


async def test_an_error_of_vllms_own_passes_as_it_is_and_is_counted(site: Site) -> None:
    body = {"error": {"message": "max_tokens is too large", "type": "BadRequestError", "code": 400}}
    site.inner.answer = lambda exchange: JSONResponse(body, status_code=400)
    answer = await post(site.app, CHAT, chat(model="m@guard"))
    assert answer.status == 400
    assert answer.json() == body
    assert answer.header("x-trimtab-applied") == "off"
    assert site.counts() == {("guard", "enforce", "error", "http_400"): 1.0}


async def test_shadow_is_reported_and_never_applied(site: Site) -> None:
    answer = await post(site.app, CHAT, chat(model="m@watch"))
    assert answer.header("x-trimtab-applied") == "shadow"
    assert report(answer) == {
        "policy": "watch@1",
        "mode": "shadow",
        "applied": False,
        "strength": 1.0,
    }
    assert site.inner.seen[0][0] is not None
    assert site.inner.seen[0][0].plan is None


# --- clients that leave


async def test_a_client_that_leaves_in_its_body_reaches_nobody(site: Site) -> None:
    headers = [("content-type", "application/json")]
    connection = Connection(site.app, CHAT, [b'{"mod'], headers=headers, leaves_in_body=True)
    answer = await connection.run()
    assert answer.status == 0
    assert site.inner.seen == []
    assert site.counts() == {("_unresolved", "", "aborted", ""): 1.0}


async def test_a_client_that_leaves_a_stream_is_seen_inside_and_counted(site: Site) -> None:
    stopped = asyncio.Event()

    async def chunks(exchange: Exchange) -> AsyncIterator[bytes]:
        acknowledge(exchange)
        try:
            while True:
                yield event(chunk("x"))
                await asyncio.sleep(0.001)
        finally:
            stopped.set()

    site.inner.chunks = chunks
    body = json.dumps(chat(model="m@guard", stream=True)).encode()
    headers = [("content-type", "application/json")]
    connection = Connection(site.app, CHAT, [body], headers=headers, leaves_after=3)
    answer = await connection.run()
    await asyncio.wait_for(stopped.wait(), 5)
    assert not answer.complete
    assert site.counts() == {("guard", "enforce", "aborted", ""): 1.0}


async def test_a_client_that_leaves_before_a_whole_answer_is_counted_as_gone(site: Site) -> None:
    async def endpoint(scope: Any, receive: Any, send: Any) -> None:
        # As vLLM does it: the handler listens, gives up, and answers nobody with "null".
        assert (await receive())["type"] == "http.request"
        assert (await receive())["type"] == "http.disconnect"
        await JSONResponse(None)(scope, receive, send)

    body = json.dumps(chat(model="m@guard")).encode()
    headers = [("content-type", "application/json")]
    site.app.router.routes[0].app = endpoint
    connection = Connection(site.app, CHAT, [body], headers=headers, leaves_after=0)
    answer = await connection.run()
    assert answer.body == b"null"
    assert site.counts() == {("guard", "enforce", "aborted", ""): 1.0}


async def test_requests_at_the_same_time_keep_their_own_exchange(site: Site) -> None:
    async def chunks(exchange: Exchange) -> AsyncIterator[bytes]:
        acknowledge(exchange)
        for _ in range(5):
            await asyncio.sleep(0.001)
            seen = current_exchange.get()
            assert seen is exchange
            yield event(chunk("x"))
        yield event(chunk("", "stop"))

    site.inner.chunks = chunks
    models = ["m", "m@guard", "m@kind", "m@watch"] * 5
    answers = await asyncio.gather(
        *(post(site.app, CHAT, chat(model=model, stream=True)) for model in models)
    )
    found = [(answer.header("x-trimtab-policy") or "").partition("@")[0] for answer in answers]
    assert found == [model.partition("@")[2] or "off" for model in models]
    assert current_exchange.get() is None


# --- the list of models


async def test_the_list_of_models_shows_every_alias_beside_vllms_own_entries(
    site: Site, default_site: Site
) -> None:
    async def listed(app: Any) -> list[Any]:
        answer = await Connection(app, "/v1/models", method="GET").run()
        assert answer.header("content-length") == str(len(answer.body))
        data = answer.json()["data"]
        assert isinstance(data, list)
        return data

    data = await listed(site.app)
    assert data[0] == {"id": "m", "root": "/x", "parent": None}
    assert [card["id"] for card in data] == ["m", "m@guard", "m@kind", "m@watch", "m@still"]
    assert {(card["root"], card["parent"]) for card in data[1:]} == {("/x", "m")}
    ids = [card["id"] for card in await listed(default_site.app)]
    assert ids == ["m", "m@guard", "m@kind", "m@off"]
    plain = make_site(Catalogue())
    assert [card["id"] for card in await listed(plain.app)] == ["m"]


# --- sockets


async def test_a_websocket_under_a_policy_is_refused_and_under_off_it_is_not(
    default_site: Site, site: Site
) -> None:
    async def open_socket(app: Any) -> list[dict[str, Any]]:
        sent: list[dict[str, Any]] = []
        scope = {
            "type": "websocket",
            "path": "/v1/realtime",
            "raw_path": b"/v1/realtime",
            "root_path": "",
            "query_string": b"",
            "headers": [],
            "subprotocols": [],
        }

        async def receive() -> dict[str, Any]:
            return {"type": "websocket.connect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        await app(scope, receive, send)
        return sent

    (refused,) = await open_socket(default_site.app)
    assert (refused["type"], refused["code"]) == ("websocket.close", 1008)
    assert refused["reason"].startswith("E_WEBSOCKET")
    (unknown,) = await open_socket(site.app)
    assert unknown.get("reason") != refused["reason"]
