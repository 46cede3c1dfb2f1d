"""Writing the ``steering`` object into vLLM's answers, without rewriting vLLM's servers.

An answer is recognised by its shape, not by its route: ``choices`` of the completion APIs, a
``response`` of the Responses API, a ``message`` of the Anthropic API. Whatever has another shape
passes through untouched. In streams only the events that end a choice are parsed; the others cost
one search of their bytes and are forwarded as they came.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, Final

from directions.errors import TrimtabError
from server.errors import error_object, in_flight_error
from server.report import steering_object, steering_of_tokens
from steering.engine.exchange import Exchange

_JSON_SHAPES: Final = (b'"choices"', b'"response"', b'"message"')

# A key with its quotes cannot stand inside a JSON string, where quotes are escaped; so these
# searches never mistake generated text for structure.
_MAY_CHANGE: Final = re.compile(
    rb'"finish_reason":\s*"'
    rb'|"type":\s*"(?:response\.(?:completed|incomplete|failed)|message_delta)"'
    rb'|"error":\s*[{"]'
)
_LAST_EVENTS: Final = frozenset({"response.completed", "response.incomplete", "response.failed"})
_DELTA: Final = r"content_block_delta|response\.[a-z_.]+\.delta"
_IS_DELTA: Final = re.compile(_DELTA)
_HAS_TOKENS: Final = re.compile(rf'"choices"|"type":\s*"(?:{_DELTA})"'.encode())
_NAMES_THE_MODEL: Final = re.compile(
    rb'"type":\s*"(?:response\.(?:created|queued|in_progress)|message_start)"'
)
_PREAMBLE: Final = re.compile(rb'"type":\s*"response\.(?:created|queued|in_progress)"')
_MODEL: Final = re.compile(rb'"model":\s*"(?:[^"\\]|\\.)*"')
_EVENT_END: Final = re.compile(rb"\r\n\r\n|\n\n|\r\r")


def decorate_json(body: bytes, exchange: Exchange, model: str | None) -> bytes:
    """Write the steering object into a complete JSON answer.

    Args:
        body: vLLM's answer.
        exchange: the request's exchange, complete.
        model: the name to give as the answer's model; None leaves it.

    Returns:
        The answer with the object in it, or ``body`` itself if its shape is not known.
    """
    if not any(shape in body for shape in _JSON_SHAPES):
        return body
    try:
        document = json.loads(body)
    except ValueError:
        return body
    if not isinstance(document, dict):
        return body
    known = False
    if isinstance(choices := document.get("choices"), list):
        for choice in choices:
            if isinstance(choice, dict):
                choice["steering"] = steering_object(exchange, _index(choice))
                known = True
    elif document.get("object") == "response" or document.get("type") == "message":
        document["steering"] = steering_object(exchange)
        known = True
    if not known:
        return body
    if model is not None and "model" in document:
        document["model"] = model
    return _dump(document)


class EventStream:
    """Rewrites one ``text/event-stream`` as it passes.

    Args:
        exchange: the request's exchange; read when a choice ends.
        model: the name to give as the answer's model; None leaves it.

    Attributes:
        refusal: the engine's refusal that an error event carried, if one did.
        failed: whether any error event passed.
        speaking: whether anything but comments and the opening events of a response passed.
        commented: whether a comment passed, which keeps an idle connection open.
    """

    def __init__(self, exchange: Exchange, model: str | None) -> None:
        self._exchange = exchange
        self._model = model
        self._model_member = None if model is None else b'"model":' + _dump(model)
        self._traced = bool(exchange.trace)
        self._pending = b""
        self.refusal: TrimtabError | None = None
        self.failed = False
        self.speaking = False
        self.commented = False

    def feed(self, part: bytes) -> bytes:
        """Take the next bytes; return those of the events that are complete."""
        pending = self._pending + part if self._pending else part
        out = []
        start = 0
        for end in _EVENT_END.finditer(pending):
            out.append(self._rewrite(pending[start : end.end()]))
            start = end.end()
        self._pending = pending[start:]
        return b"".join(out)

    def flush(self) -> bytes:
        """The rest, when the stream has ended, whether or not its last event was closed."""
        rest, self._pending = self._pending, b""
        return self._rewrite(rest) if rest else b""

    def _rewrite(self, event: bytes) -> bytes:
        if event.startswith(b":"):
            self.commented = True
            return event
        if not _PREAMBLE.search(event):
            self.speaking = True
        if (
            _MAY_CHANGE.search(event)
            or (self._model and _NAMES_THE_MODEL.search(event))
            or (self._traced and _HAS_TOKENS.search(event))
        ):
            return _edit_data(event, self._edit)
        if self._model_member is not None and b'"choices"' in event:
            # Every chunk of the completion APIs names the model, before anything nested does.
            member = self._model_member
            return _MODEL.sub(lambda _: member, event, count=1)
        return event

    def _edit(self, document: dict[str, Any]) -> bool:
        """Change one event's document; say whether anything changed."""
        renamed = self._rename(document)
        if document.get("error") is not None:
            return self._edit_error(document) or renamed
        kind = document.get("type")
        ended: list[dict[str, Any]] = []
        carrying: list[dict[str, Any]] = []
        if isinstance(choices := document.get("choices"), list):
            parts = [choice for choice in choices if isinstance(choice, dict)]
            ended = [choice for choice in parts if choice.get("finish_reason") is not None]
            carrying = [choice for choice in parts if choice not in ended and _has_tokens(choice)]
        elif kind == "message_delta":
            delta = document.get("delta")
            if isinstance(delta, dict) and delta.get("stop_reason") is not None:
                ended = [document]
        elif kind in _LAST_EVENTS and isinstance(response := document.get("response"), dict):
            ended = [response]
            self.failed |= kind == "response.failed"
        elif isinstance(kind, str) and _IS_DELTA.fullmatch(kind):
            carrying = [document]
        for part in ended:
            # What the parts of a stream have told is not told again; a whole response is told whole.
            untold = kind not in _LAST_EVENTS
            part["steering"] = steering_object(self._exchange, _choice(part, kind), untold=untold)
        told = False
        if self._traced:
            for part in carrying:
                steering = steering_of_tokens(self._exchange, _choice(part, kind))
                if steering is not None:
                    part["steering"] = steering
                    told = True
        return renamed or bool(ended) or told

    def _rename(self, document: dict[str, Any]) -> bool:
        if self._model is None:
            return False
        for holder in (document, document.get("response"), document.get("message")):
            if isinstance(holder, dict) and "model" in holder:
                holder["model"] = self._model
        return True

    def _edit_error(self, document: dict[str, Any]) -> bool:
        self.failed = True
        error = document["error"]
        message = error.get("message") if isinstance(error, dict) else error
        refusal = self._exchange.refusal or in_flight_error(message)
        if refusal is None:
            return False
        self.refusal = refusal
        document["error"] = error_object(refusal)
        return True


def _has_tokens(choice: dict[str, Any]) -> bool:
    # A chat begins with a chunk that names the role alone, made of the first token's output too.
    delta = choice.get("delta")
    return not (isinstance(delta, dict) and delta.get("role") and not delta.get("content"))


def _choice(part: dict[str, Any], kind: object) -> int | None:
    # An index in an event that has a type counts something else, such as blocks of content.
    return _index(part) if kind is None else None


def _index(part: dict[str, Any]) -> int | None:
    index = part.get("index")
    return index if isinstance(index, int) else None


def _edit_data(event: bytes, edit: Callable[[dict[str, Any]], bool]) -> bytes:
    """Apply ``edit`` to an event's JSON; events of several data lines are left alone."""
    lines = event.splitlines(keepends=True)
    holding = [i for i, line in enumerate(lines) if line.startswith(b"data:")]
    if len(holding) != 1:
        return event
    (at,) = holding
    line = lines[at]
    content = line[len(b"data:") :].strip()
    try:
        document = json.loads(content)
    except ValueError:
        return event
    if not isinstance(document, dict) or not edit(document):
        return event
    ending = line[len(line.rstrip(b"\r\n")) :]
    lines[at] = b"data: " + _dump(document) + ending
    return b"".join(lines)


def error_messages(body: bytes) -> Iterator[object]:
    """The places of an error answer where its message may stand."""
    try:
        document = json.loads(body)
    except ValueError:
        return
    if isinstance(document, dict):
        error = document.get("error")
        yield error.get("message") if isinstance(error, dict) else error
        yield document.get("message")


def _dump(value: Any) -> bytes:
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    try:
        return text.encode()
    except UnicodeEncodeError:
        # Half a surrogate pair, which JSON can name and UTF-8 cannot write.
        return json.dumps(value, separators=(",", ":")).encode()
