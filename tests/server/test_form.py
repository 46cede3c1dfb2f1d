"""Forms, as the audio routes take them: the alias in them works, and nothing else is touched."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from server.catalogue import Catalogue
from server.form import form_model
from server.metrics import RequestMetrics
from server.middleware import Service, TrimtabMiddleware
from steering.engine.exchange import Acknowledgement, current_exchange
from steering.engine.ledger import SlotLedger
from tests.server.asgi_client import Answer, Connection

PATH = "/v1/audio/transcriptions"
TYPE = 'multipart/form-data; boundary="edge"'
# Bytes that are no text, with what looks like the end of a line and like a boundary in them.
SOUND = b"RIFF\x00\xff\r\n--edg\r\r\n\n--edge-\x80" * 3
Fields = list[tuple[str, bytes]]


def form(fields: Fields) -> bytes:
    """A form with a sound file in the middle of its fields."""
    parts = [
        f'--edge\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode() + value
        for name, value in fields
    ]
    disposition = b'Content-Disposition: form-data; name="file"; filename="model"'
    sound = b"--edge\r\n" + disposition + b"\r\nContent-Type: audio/wav\r\n\r\n" + SOUND
    parts.insert(len(parts) // 2, sound)
    return b"\r\n".join([*parts, b"--edge--\r\n"])


@pytest.fixture
def seen() -> list[dict[str, Any]]:
    return []


@pytest.fixture
def app(catalogue: Catalogue, seen: list[dict[str, Any]]) -> Any:
    async def transcribe(request: Request) -> Response:
        exchange = current_exchange.get()
        assert exchange is not None
        fields: dict[str, Any] = {"policy": exchange.policy}
        length = request.headers.get("content-length")
        assert length is not None
        assert int(length) == len(await request.body())
        async with request.form() as received:
            for name, value in received.multi_items():
                fields[name] = value if isinstance(value, str) else await value.read()
        seen.append(fields)
        if exchange.plan is not None:
            exchange.acknowledgements["r"] = Acknowledgement(True, None)
        return JSONResponse({"model": fields.get("model"), "choices": [{"index": 0}]})

    app = Starlette(routes=[Route(PATH, transcribe, methods=["POST"])])
    app.state.trimtab = Service(
        catalogue=catalogue,
        ledger=SlotLedger(num_slots=2),
        metrics=RequestMetrics(CollectorRegistry()),
        model_name="m",
        served_names=lambda: {"m", "rüder@x"},
        max_body_bytes=65536,
    )
    app.add_middleware(TrimtabMiddleware)
    return app


async def send(app: Any, body: bytes, *headers: tuple[str, str], cut: int = 10**6) -> Answer:
    parts = [body[i : i + cut] for i in range(0, len(body), cut)]
    own = [("content-type", TYPE), ("content-length", str(len(body)))]
    return await Connection(app, PATH, parts, headers=[*own, *headers]).run()


@pytest.mark.parametrize("cut", [10**6, 7, 1])
@pytest.mark.parametrize(
    ("model", "plain", "policy"),
    [
        ("m@guard", "m", "guard@3"),
        ("m@guard@3", "m", "guard@3"),
        ("m@off", "m", "off"),
        ("rüder@x@kind", "rüder@x", "kind@1"),
        ("m", "m", "off"),
        ("rüder@x", "rüder@x", "off"),
        ("other@guard", "other@guard", "off"),
    ],
)
async def test_an_alias_in_a_form_chooses_and_the_rest_passes_unchanged(
    app: Any, seen: list[dict[str, Any]], model: str, plain: str, policy: str, cut: int
) -> None:
    body = form([("language", b"en"), ("model", model.encode()), ("prompt", b"m@guard")])
    answer = await send(app, body, cut=cut)
    assert answer.status == 200, answer.body
    assert seen == [
        {"policy": policy, "file": SOUND, "language": "en", "model": plain, "prompt": "m@guard"}
    ]
    report = answer.json()["choices"][0]["steering"]
    assert (report["policy"], report["applied"]) == (policy, policy != "off")
    # The answer names the model as the client did.
    assert answer.json()["model"] == model


@pytest.mark.parametrize(
    ("fields", "headers", "status", "code"),
    [
        ([("model", b"m@nobody")], [], 404, "E_POLICY_UNKNOWN"),
        ([("model", b"m@guard@9")], [], 404, "E_POLICY_VERSION"),
        ([("model", b"m@")], [], 404, "E_POLICY_UNKNOWN"),
        ([("model", b"m"), ("model", b"m@guard")], [], 400, "E_BODY_FORM"),
        ([("model", b"m@kind")], [("x-trimtab-policy", "guard")], 400, "E_SELECTION_CONFLICT"),
        ([("steering", b'{"policy": "guard"}')], [], 400, "E_STEERING_FIELD"),
        ([("model", b"m"), ("steering[policy]", b"guard")], [], 400, "E_STEERING_FIELD"),
    ],
)
async def test_what_a_form_cannot_say_is_refused_before_vllm_sees_it(
    app: Any,
    seen: list[dict[str, Any]],
    fields: Fields,
    headers: list[tuple[str, str]],
    status: int,
    code: str,
) -> None:
    answer = await send(app, form(fields), *headers)
    assert (answer.status, answer.code) == (status, code)
    assert seen == []


@pytest.mark.parametrize(
    "body", [b"", b"--edge--", b"no form", b"--edge\r\nbad header\r\n\r\nx", form([])[:-20]]
)
def test_a_form_that_cannot_be_read_names_no_model(body: bytes) -> None:
    assert form_model(body, TYPE.encode()) is None
    assert form_model(form([("model", b"m")]), b"multipart/form-data") is None


def test_an_empty_model_and_one_that_is_no_text_name_nothing_that_is_served() -> None:
    empty = form_model(form([("model", b""), ("a", b"b")]), TYPE.encode())
    assert empty is None or empty.value == ""
    assert form_model(form([("model", b"m\xff@guard")]), TYPE.encode()) is None
