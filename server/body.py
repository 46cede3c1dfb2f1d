"""Reading a request's body: bounded, and strict about what it is.

The body is read here once, before vLLM sees any of it, and then given to vLLM again, byte for byte
where nothing in it had to change. Reading stops at the limit whatever ``Content-Length`` claims, so
a client cannot make the server hold more than the limit for one request.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

from starlette.types import Message, Receive

from directions.errors import TrimtabError


class JsonObject(dict[str, Any]):
    """A JSON object in which keys were repeated; the last value of each is kept.

    JSON leaves open which one counts, so two programs may read different things from one body.

    Attributes:
        repeated: the keys given more than once.
    """

    repeated: frozenset[str] = frozenset()


class ClientGoneError(Exception):
    """The client closed the connection before its request was complete."""


def declared_length(headers: Iterable[tuple[bytes, bytes]]) -> int | None:
    """What ``Content-Length`` claims; None where it is absent or no number."""
    for name, value in headers:
        if name == b"content-length":
            return int(value) if value.isdigit() else None
    return None


def check_length(length: int, limit: int) -> None:
    """Refuse a body longer than the limit.

    Raises:
        TrimtabError: ``E_BODY_TOO_LARGE``.
    """
    if length > limit:
        raise TrimtabError(
            "E_BODY_TOO_LARGE",
            f"the request's body is longer than {limit} bytes",
            expected=f"at most {limit} bytes",
        )


async def read_body(receive: Receive, headers: Iterable[tuple[bytes, bytes]], limit: int) -> bytes:
    """Read a whole body of at most ``limit`` bytes.

    Raises:
        TrimtabError: ``E_BODY_TOO_LARGE``, as soon as it is known, before the rest is read.
        ClientGoneError: the connection closed first.
    """
    check_length(declared_length(headers) or 0, limit)
    parts: list[bytes] = []
    length = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise ClientGoneError
        part = message.get("body", b"")
        length += len(part)
        check_length(length, limit)
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def replay(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives the body once and then what the connection really says.

    The second part matters: vLLM listens on it for the client's going away.
    """
    given = False

    async def receive_again() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return receive_again


def parse_object(body: bytes) -> dict[str, Any]:
    """Parse a JSON object as vLLM will, noting repeated keys on the way.

    Raises:
        TrimtabError: ``E_BODY_JSON`` if it is not JSON, or not an object.
    """
    try:
        value = json.loads(body, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        message = f"the body is not JSON: {error.msg} at character {error.pos}"
        raise TrimtabError("E_BODY_JSON", message) from None
    except (ValueError, RecursionError):
        # Not UTF-8, a number of thousands of digits, or nested beyond reason.
        raise TrimtabError("E_BODY_JSON", "the body is not JSON that can be read") from None
    if not isinstance(value, dict):
        raise TrimtabError("E_BODY_JSON", "the body is not a JSON object", expected="an object")
    return value


def dump_object(value: dict[str, Any]) -> bytes:
    """The bytes of a body that had to change; values keep their exact meaning."""
    return json.dumps(value, separators=(",", ":")).encode()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    plain = dict(pairs)
    if len(plain) == len(pairs):
        return plain
    counts = Counter(key for key, _ in pairs)
    kept = JsonObject(plain)
    kept.repeated = frozenset(key for key, count in counts.items() if count > 1)
    return kept
