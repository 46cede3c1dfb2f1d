"""A client that speaks ASGI itself, so that a test decides how a body is cut and when it leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Answer:
    """What came back: the start message, and the body as it was cut."""

    status: int = 0
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    parts: list[bytes] = field(default_factory=list)
    complete: bool = False

    @property
    def body(self) -> bytes:
        return b"".join(self.parts)

    def json(self) -> Any:
        return json.loads(self.body)

    def header(self, name: str) -> str | None:
        found = [v for k, v in self.headers if k.lower() == name.lower().encode()]
        assert len(found) <= 1, f"{name} is there {len(found)} times"
        return found[0].decode() if found else None

    @property
    def code(self) -> str:
        return str(self.json()["error"]["code"])


class Connection:
    """One request to an ASGI app.

    Args:
        parts: the request's body as it arrives.
        leaves_after: the client goes away when it has received so many parts of the answer.
        leaves_in_body: the client goes away when it has sent the parts, before the body's end.
    """

    def __init__(
        self,
        app: Any,
        path: str,
        parts: Sequence[bytes] = (b"",),
        *,
        method: str = "POST",
        headers: Sequence[tuple[str, str | bytes]] = (),
        leaves_after: int | None = None,
        leaves_in_body: bool = False,
    ) -> None:
        self.app = app
        self.answer = Answer()
        self.read = 0
        self._parts = list(parts)
        self._leaves_after = leaves_after
        self._leaves_in_body = leaves_in_body
        self._gone = asyncio.Event()
        if leaves_after == 0:
            self._gone.set()
        encoded = [
            (k.lower().encode(), v if isinstance(v, bytes) else v.encode()) for k, v in headers
        ]
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": encoded,
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }

    async def receive(self) -> dict[str, Any]:
        if self.read < len(self._parts):
            part = self._parts[self.read]
            self.read += 1
            more = self.read < len(self._parts) or self._leaves_in_body
            return {"type": "http.request", "body": part, "more_body": more}
        if not self._leaves_in_body:
            await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        answer = self.answer
        if message["type"] == "http.response.start":
            assert answer.status == 0, "the answer started twice"
            answer.status, answer.headers = message["status"], list(message["headers"])
        elif message["type"] == "http.response.body":
            assert answer.status, "a body before its start"
            assert not answer.complete, "a body after its end"
            answer.parts.append(message.get("body", b""))
            answer.complete = not message.get("more_body", False)
            if self._leaves_after is not None and len(answer.parts) >= self._leaves_after:
                self._gone.set()

    async def run(self) -> Answer:
        await asyncio.wait_for(self.app(self.scope, self.receive, self.send), 20)
        return self.answer


async def post(
    app: Any, path: str, document: Any, *, headers: Sequence[tuple[str, str | bytes]] = ()
) -> Answer:
    """POST a JSON document, or bytes that are meant to be one."""
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    own = [("content-type", "application/json"), ("content-length", str(len(body)))]
    return await Connection(app, path, [body], headers=[*own, *headers]).run()
