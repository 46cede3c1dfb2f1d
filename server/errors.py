"""The HTTP form of an error.

A refusal is the same thing everywhere: a stable code, a sentence, the field it is about. Over HTTP
it gets a status and the body that OpenAI's clients expect, with the code where they look for one::

    {"error": {"message": "…", "type": "not_found_error", "param": "$.model", "code": "E_…"}}

On the Anthropic routes the same object carries the ``"type": "error"`` that their clients expect.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

from directions.errors import TrimtabError

STATUS: Final[dict[str, int]] = {
    "E_POLICY_UNKNOWN": 404,
    "E_POLICY_VERSION": 404,
    "E_BODY_TOO_LARGE": 413,
    "E_SLOTS_EXHAUSTED": 429,
    "E_PLAN_NOT_PLACED": 503,
    "E_PLAN_INACTIVE": 503,
    "E_NOT_READY": 503,
}
"""Codes whose status is not 400."""

RETRY_AFTER_SECONDS: Final = 1
"""What a 429 advises: a slot frees when a request ends, which is usually soon."""

_TYPES: Final[dict[int, str]] = {
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}

_IN_FLIGHT: Final = re.compile(
    # vLLM wraps and rewords messages; a code of ours is recognised wherever it stands in one …
    r"(?<![A-Za-z0-9_])"
    r"(E_(?:SLOTS_EXHAUSTED|PLAN_NOT_PLACED|PLAN_INACTIVE|NOT_READY|NOT_GENERATION|BEAM_SEARCH"
    r"|STREAMING_INPUT|RESERVED_KEY|STAMP)): "
    # … and what its validation errors append to the sentence is left off.
    r"([^\n]*?)(?: \(parameter=[^\n]*)?(?:\n|$)"
)


def status_of(error: TrimtabError) -> int:
    """The HTTP status of an error's code; 400 unless :data:`STATUS` says otherwise."""
    return STATUS.get(error.code, 400)


def error_object(error: TrimtabError) -> dict[str, Any]:
    """The inner object: ``message``, ``type``, ``param`` and ``code``."""
    message = error.message
    if error.expected:
        message += f" (expected: {error.expected})"
    return {
        "message": message,
        "type": _TYPES.get(status_of(error), "invalid_request_error"),
        "param": error.field,
        "code": error.code,
    }


def error_body(error: TrimtabError, *, path: str = "") -> bytes:
    """The whole JSON body for a request to ``path``."""
    document: dict[str, Any] = {"error": error_object(error)}
    if path.startswith("/v1/messages"):
        document = {"type": "error", **document}
    return json.dumps(document, separators=(",", ":")).encode()


def error_headers(error: TrimtabError, body: bytes) -> list[tuple[bytes, bytes]]:
    """The response headers that go with :func:`error_body`."""
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    status = status_of(error)
    if status == 429:
        headers.append((b"retry-after", str(RETRY_AFTER_SECONDS).encode()))
    if status == 413:
        # The rest of the body is not read; closing is how the client learns to stop sending it.
        headers.append((b"connection", b"close"))
    return headers


def in_flight_error(message: object) -> TrimtabError | None:
    """The refusal that the engine's side put into an error message, if there is one.

    Args:
        message: an error's text as vLLM's handlers passed it on, whatever they put around it.
    """
    if not isinstance(message, str):
        return None
    found = _IN_FLIGHT.search(message)
    return None if found is None else TrimtabError(found[1], found[2].strip())
