"""The layer around vLLM's HTTP server: what a request runs under, and what its answer says.

It is a plain ASGI layer inside vLLM's own authentication, so that a request without a key is turned
away before anything here reads it. For every POST it

1. reads the headers and the body, bounded, and resolves the policy: every mistake is an answer of
   the 4xx kind here, before vLLM has seen anything;
2. takes Trimtab's own parts out of the body and passes the rest on, byte for byte where there were
   none;
3. sets the request's exchange, which follows it into the engine's admission;
4. writes what was applied into the answer and its headers.

The answer's headers go out before its body, and must be true: they are held back until the worker
has reported. That also lets a refusal by the engine be a real HTTP status on a stream, where vLLM
would answer 200 and send the error as an event.

No list of routes decides who is steered: a route that is unknown here still runs under the
default policy. The list below says only which answers count as generation when nothing ran.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Final, Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from directions.errors import TrimtabError
from server.body import (
    ClientGoneError,
    JsonObject,
    check_length,
    declared_length,
    dump_object,
    parse_object,
    read_body,
    replay,
)
from server.catalogue import Catalogue
from server.errors import error_body, error_headers, in_flight_error, status_of
from server.exposition import send_openmetrics, wants_openmetrics
from server.form import form_model, is_form
from server.metrics import UNRESOLVED, Outcome, RequestMetrics
from server.models_list import MODELS_PATH, ListedModels
from server.report import (
    applied_word,
    promised_word,
    report_headers,
    settled,
)
from server.response import EventStream, decorate_json, error_messages
from server.selection import Choice, alias_choice, header_choice, select, steering_field
from steering.engine.exchange import Exchange, current_exchange
from steering.engine.stamp import KEY as STAMP_KEY
from steering.plan import Plan

logger = logging.getLogger(__name__)

GENERATION_PATHS: Final = frozenset(
    {
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/audio/transcriptions",
        "/v1/audio/translations",
        "/v1/decisions",
        "/v1/systemone",
        "/cohere/v2/chat",
        "/generative_scoring",
        "/inference/v1/generate",
        "/invocations",
    }
)
"""vLLM's routes that generate: their requests are counted, their bodies must be JSON objects."""

_READ_KEYS: Final = frozenset(
    {"model", "steering", "use_beam_search", "background", "vllm_xargs", "sampling_params"}
)
_FALSE_WORDS: Final = frozenset({"false", "f", "no", "n", "off", "0"})


class Ledger(Protocol):
    """What the HTTP layer asks of the engine's slot ledger."""

    def can_admit(self, plan: Plan) -> bool:
        """Whether a request under ``plan`` would find its slots."""
        ...

    def snapshot(self) -> dict[str, int]:
        """Slots by state: ``in_use`` and ``free``."""
        ...


def _name_alone(reference: str) -> str:
    return reference.partition("@")[0]


@dataclass(frozen=True)
class Service:
    """What the layer works with; made when the engine has started.

    Attributes:
        catalogue: the policies served.
        ledger: the engine's slots.
        metrics: where requests are counted.
        model_name: the served model's first name, the label of all metrics.
        served_names: every name that vLLM answers to at the moment, adapters included.
        max_body_bytes: the longest body that is read.
        policy_label: the metrics' label of a policy.
    """

    catalogue: Catalogue
    ledger: Ledger
    metrics: RequestMetrics
    model_name: str
    served_names: Callable[[], Collection[str]]
    max_body_bytes: int
    policy_label: Callable[[str], str] = _name_alone


class TrimtabMiddleware:
    """See the module's docstring. The service is found at ``app.state.trimtab``."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        service: Service = scope["app"].state.trimtab
        path: str = scope["path"].removeprefix(scope.get("root_path", ""))
        if scope["type"] == "websocket":
            await self._websocket(service, scope, receive, send)
        elif scope["method"] == "POST":
            await _Request(self.app, service, path, scope, receive, send).run()
        elif scope["method"] == "GET" and wants_openmetrics(scope, path):
            await send_openmetrics(send)
        elif scope["method"] == "GET" and path == MODELS_PATH:
            await self.app(scope, receive, ListedModels(service.catalogue, send).send)
        else:
            await self.app(scope, receive, send)

    async def _websocket(
        self, service: Service, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Let a socket through under ``off`` and refuse it under a policy that would apply.

        vLLM's realtime route has no place for the report, so steering there would be silent.
        """
        try:
            exchange = select(service.catalogue, [header_choice(scope["headers"])]).exchange()
            if exchange.plan is not None:
                raise TrimtabError(
                    "E_WEBSOCKET", f"policy {exchange.policy} cannot be applied to a WebSocket"
                )
        except TrimtabError as error:
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": str(error)[:120]})
            return
        token = current_exchange.set(exchange)
        try:
            await self.app(scope, receive, send)
        finally:
            current_exchange.reset(token)


class _Request:
    """One POST request, from its headers to the last byte of its answer."""

    def __init__(
        self,
        app: ASGIApp,
        service: Service,
        path: str,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        self.app = app
        self.service = service
        self.path = path
        self.scope = scope
        self.receive = receive
        self.client_send = send
        self.exchange: Exchange | None = None
        self.alias: str | None = None
        self.client_gone = False

    async def run(self) -> None:
        try:
            receive = await self.admit()
        except TrimtabError as error:
            await _send_error(self.client_send, error, self.path)
            self.count("refused", error.code)
            return
        except ClientGoneError:
            self.count("aborted", "")
            return
        exchange = self.exchange
        assert exchange is not None
        answer = _Answer(exchange, self.alias, self.path, self.client_send)
        token = current_exchange.set(exchange)
        try:
            await self.app(self.scope, self.watch(receive, answer), answer.send)
        except Exception as failure:
            refusal = exchange.refusal or _refusal_in(failure)
            if refusal is None or not await answer.replace_by(refusal):
                raise
        finally:
            current_exchange.reset(token)
            self.finish(answer)

    def watch(self, receive: Receive, answer: _Answer) -> Receive:
        """Note when the client goes away before its answer is complete."""

        async def watched() -> Message:
            message = await receive()
            # After a complete answer every connection reads as closed.
            if message["type"] == "http.disconnect" and not answer.ended:
                self.client_gone = True
            return message

        return watched

    async def admit(self) -> Receive:
        """Resolve the request's exchange; return what vLLM reads the body from."""
        scope, service = self.scope, self.service
        choice = header_choice(scope["headers"])
        limit = service.max_body_bytes
        if is_form(_header(scope["headers"], b"content-type")):
            return await self.admit_form(choice)
        if not _is_json(scope):
            self.exchange = select(service.catalogue, [choice]).exchange()
            self.check_slots(self.exchange)
            check_length(declared_length(scope["headers"]) or 0, limit)
            return self.limited(self.receive, self.exchange, limit)

        body = await read_body(self.receive, scope["headers"], limit)
        document = self.parse(body)
        alias = alias_choice(document.get("model"), service.served_names())
        steering = steering_field(document["steering"]) if "steering" in document else None
        selection = select(
            service.catalogue,
            [alias.choice if alias else None, choice, steering.choice if steering else None],
            steering.strength if steering else None,
            steering.trace if steering else False,
        )
        exchange = self.exchange = selection.exchange()
        _check_reserved(document)
        _check_supported(document, exchange)
        self.check_slots(exchange)
        if alias is None and steering is None:
            return replay(body, self.receive)
        document.pop("steering", None)
        if alias is not None:
            self.alias = document["model"]
            document["model"] = alias.base
        body = dump_object(document)
        self.scope = _with_length(scope, len(body))
        return replay(body, self.receive)

    async def admit_form(self, choice: Choice | None) -> Receive:
        """:meth:`admit` for a form, in which only the model's name can say something."""
        scope, service = self.scope, self.service
        body = await read_body(self.receive, scope["headers"], service.max_body_bytes)
        model = form_model(body, _header(scope["headers"], b"content-type"))
        alias = alias_choice(model.value, service.served_names()) if model else None
        selection = select(service.catalogue, [alias.choice if alias else None, choice])
        self.exchange = selection.exchange()
        self.check_slots(self.exchange)
        if model is not None and alias is not None:
            self.alias = model.value
            body = model.replace_by_prefix(body, alias.base)
            self.scope = _with_length(scope, len(body))
        return replay(body, self.receive)

    def parse(self, body: bytes) -> dict[str, Any]:
        """The body's document; empty for what is no object on a route that takes other things."""
        try:
            document = parse_object(body)
        except TrimtabError:
            if self.path in GENERATION_PATHS:
                raise
            return {}
        if isinstance(document, JsonObject) and (twice := document.repeated & _READ_KEYS):
            raise TrimtabError(
                "E_BODY_JSON", f"the key {min(twice)!r} is repeated", field=f"$.{min(twice)}"
            )
        return document

    def check_slots(self, exchange: Exchange) -> None:
        """Refuse, or under ``open`` decline, before vLLM spends anything on the request."""
        # Other routes do not generate as a rule, and an operator needs them most on a full server;
        # what they do generate, admission checks.
        if self.path not in GENERATION_PATHS:
            return
        if exchange.plan is None or self.service.ledger.can_admit(exchange.plan):
            return
        if exchange.on_failure == "open":
            exchange.declined = "slots_exhausted"
            return
        raise TrimtabError(
            "E_SLOTS_EXHAUSTED",
            f"all slots are in use by other policies; {exchange.policy} finds none free. "
            "Try again when a request has ended, or start the server with more --slots",
        )

    def limited(self, receive: Receive, exchange: Exchange, limit: int) -> Receive:
        """A ``receive`` for bodies that are not read here, which still ends at the limit."""
        length = 0

        async def receive_limited() -> Message:
            nonlocal length
            message = await receive()
            length += len(message.get("body", b""))
            try:
                check_length(length, limit)
            except TrimtabError as error:
                # Frameworks turn what a body reader raises into answers of their own.
                exchange.refusal = error
                raise
            return message

        return receive_limited

    def finish(self, answer: _Answer) -> None:
        if self.path not in GENERATION_PATHS and not answer.exchange.acknowledgements:
            return
        if answer.refusal is not None:
            self.count("refused", answer.refusal.code)
        elif self.client_gone or not answer.started:
            self.count("aborted", "")
        elif answer.status >= 400:
            self.count("error", f"http_{answer.status}")
        elif answer.stream is not None and answer.stream.failed:
            self.count("error", "stream")
        elif not answer.ended:
            self.count("aborted", "")
        else:
            applied, reason = answer.exchange.applied()
            told = answer.exchange.mode == "enforce" and not applied
            self.count("ok", (reason or "unknown") if told else "")

    def count(self, outcome: Outcome, reason: str) -> None:
        exchange = self.exchange
        self.service.metrics.count_request(
            model_name=self.service.model_name,
            policy=self.service.policy_label(exchange.policy) if exchange else UNRESOLVED,
            mode=exchange.mode if exchange else "",
            outcome=outcome,
            reason=reason,
        )


class _Answer:
    """One answer on its way out.

    Attributes:
        status: vLLM's status, 0 before it is known.
        started: whether vLLM began an answer.
        ended: whether the last byte went out.
        refusal: the engine's refusal that the answer turned out to be.
        stream: the rewriter of an event stream, where the answer is one.
    """

    def __init__(self, exchange: Exchange, alias: str | None, path: str, client_send: Send) -> None:
        self.exchange = exchange
        self.alias = alias
        self.path = path
        self.client_send = client_send
        self.status = 0
        self.started = False
        self.ended = False
        self.refusal: TrimtabError | None = None
        self.stream: EventStream | None = None
        self._start: Message | None = None
        self._held: list[bytes] = []
        self._replaced = False
        self._whole = False

    async def send(self, message: Message) -> None:
        """ASGI's ``send`` for the app inside."""
        if self._replaced:
            return
        if message["type"] == "http.response.start":
            await self._begin(message)
        elif message["type"] == "http.response.body":
            part, more = message.get("body", b""), message.get("more_body", False)
            if self._whole:
                self._held.append(part)
                if not more:
                    await self._send_whole()
            elif self.stream is not None:
                await self._send_events(self.stream, part, more)
            else:
                await self._forward(part, more)
        else:
            await self.client_send(message)

    async def replace_by(self, error: TrimtabError) -> bool:
        """Answer with ``error`` instead, if nothing has gone out; say whether that was possible."""
        self.refusal = error
        if self.started and self._start is None:
            return False
        self.started = self._replaced = self.ended = True
        self.status = status_of(error)
        await _send_error(self.client_send, error, self.path)
        return True

    async def _begin(self, message: Message) -> None:
        self.started = True
        self.status = message["status"]
        self._start = message
        media_type = _header(message["headers"], b"content-type").partition(b";")[0].strip()
        if self.status >= 400 or media_type == b"application/json":
            self._whole = True
        elif media_type == b"text/event-stream":
            self.stream = EventStream(self.exchange, self.alias)
            if self.exchange.plan is None or self.exchange.declined is not None:
                await self._release(complete=False)
        else:
            await self._release(complete=True)

    async def _send_whole(self) -> None:
        body = b"".join(self._held)
        self._held.clear()
        if self.status >= 400:
            refusal = self.exchange.refusal
            for text in error_messages(body):
                refusal = refusal or in_flight_error(text)
            if refusal is not None:
                await self.replace_by(refusal)
                return
        else:
            lost = self._unapplied()
            if lost is not None:
                await self.replace_by(lost)
                return
            body = decorate_json(body, self.exchange, self.alias)
        await self._release(complete=True, length=len(body))
        await self._forward(body, more=False)

    def _unapplied(self) -> TrimtabError | None:
        """The refusal for a whole answer that a ``closed`` policy was to steer and did not."""
        exchange = self.exchange
        if (
            exchange.plan is None
            or exchange.on_failure != "closed"
            or not exchange.acknowledgements
        ):
            return None
        applied, reason = exchange.applied()
        if applied:
            return None
        return TrimtabError(
            "E_PLAN_NOT_PLACED", f"the answer ended before the policy was applied ({reason})"
        )

    async def _send_events(self, stream: EventStream, part: bytes, more: bool) -> None:
        out = stream.feed(part)
        if not more:
            out += stream.flush()
        if self._start is not None:
            self._held.append(out)
            if stream.refusal is not None:
                await self.replace_by(stream.refusal)
                return
            if more and not self._may_release(stream):
                return
            await self._release(complete=not more)
            out = b"".join(self._held)
            self._held.clear()
        elif stream.refusal is not None:
            self.refusal = stream.refusal
        if out or not more:
            await self._forward(out, more)

    def _may_release(self, stream: EventStream) -> bool:
        exchange = self.exchange
        if settled(exchange) or stream.failed:
            return True
        # A comment keeps an idle connection open. Under ``closed`` it need not wait: should the
        # plan not be placed, the stream ends in an error, and the headers have promised nothing
        # false.
        return exchange.on_failure == "closed" and stream.commented

    async def _release(self, *, complete: bool, length: int | None = None) -> None:
        """Send the held start with the report's headers."""
        start, self._start = self._start, None
        assert start is not None
        headers = list(start["headers"])
        if length is not None:
            headers = [h for h in headers if h[0].lower() != b"content-length"]
            headers.append((b"content-length", str(length).encode()))
        if self.path in GENERATION_PATHS or self.exchange.acknowledgements:
            failed = self.status >= 400
            word = applied_word(self.exchange) if complete else promised_word(self.exchange)
            headers += report_headers(self.exchange, "off" if failed else word)
        await self.client_send({**start, "headers": headers})

    async def _forward(self, body: bytes, more: bool) -> None:
        await self.client_send({"type": "http.response.body", "body": body, "more_body": more})
        self.ended = not more


def _is_json(scope: Scope) -> bool:
    # Exactly the media type that vLLM's own JSON routes insist on.
    content_type = _header(scope["headers"], b"content-type").lower()
    return content_type.partition(b";")[0].strip() == b"application/json"


def _header(headers: Collection[tuple[bytes, bytes]], name: bytes) -> bytes:
    return next((value for key, value in headers if key.lower() == name), b"")


def _with_length(scope: Scope, length: int) -> Scope:
    headers = [h for h in scope["headers"] if h[0] not in (b"content-length", b"transfer-encoding")]
    return {**scope, "headers": [*headers, (b"content-length", str(length).encode())]}


def _check_reserved(document: dict[str, Any]) -> None:
    """Refuse a body that tries to write the engine's own stamp."""
    sampling = document.get("sampling_params")
    places = {
        "$.vllm_xargs": document.get("vllm_xargs"),
        "$.sampling_params.extra_args": (
            sampling.get("extra_args") if isinstance(sampling, dict) else None
        ),
    }
    for field, extra_args in places.items():
        if isinstance(extra_args, dict) and STAMP_KEY in extra_args:
            raise TrimtabError(
                "E_RESERVED_KEY", f"the key {STAMP_KEY!r} is the server's own", field=field
            )


def _check_supported(document: dict[str, Any], exchange: Exchange) -> None:
    """Refuse what a policy cannot be applied to, or what could not be reported on."""
    if exchange.trace and _is_true(document.get("background")):
        raise TrimtabError(
            "E_BACKGROUND",
            "an answer in the background is given before there are scores to trace",
            field="$.background",
            expected="false",
        )
    if exchange.plan is None:
        return
    if _is_true(document.get("use_beam_search")):
        raise TrimtabError(
            "E_BEAM_SEARCH",
            f"beam search starts its beams anew at every token, and {exchange.policy} could not "
            "tell their prompt from their answer; choose the policy 'off' or sample",
            field="$.use_beam_search",
        )
    if _is_true(document.get("background")):
        raise TrimtabError(
            "E_BACKGROUND",
            f"an answer in the background is given before {exchange.policy} could be reported on",
            field="$.background",
            expected="false",
        )


def _is_true(value: object) -> bool:
    """Whether vLLM's lenient parsing could take ``value`` for true."""
    if isinstance(value, str):
        return value.lower() not in _FALSE_WORDS
    return bool(value)


def _refusal_in(failure: BaseException | None) -> TrimtabError | None:
    """The refusal that an exception, or one that it came from, carries in its text."""
    while failure is not None:
        if refusal := in_flight_error(str(failure)):
            return refusal
        failure = failure.__cause__ or failure.__context__
    return None


async def _send_error(send: Send, error: TrimtabError, path: str) -> None:
    body = error_body(error, path=path)
    await send(
        {
            "type": "http.response.start",
            "status": status_of(error),
            "headers": error_headers(error, body),
        }
    )
    await send({"type": "http.response.body", "body": body, "more_body": False})
