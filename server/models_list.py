"""The aliases in ``GET /v1/models``.

Clients that offer a choice of models show a choice of policies without knowing it: each served
name appears once plain and once per policy, as ``NAME@POLICY``. vLLM's own entries are kept as they
are.
"""

from __future__ import annotations

import json
from typing import Any, Final

from starlette.types import Message, Send

from server.catalogue import OFF, Catalogue

MODELS_PATH: Final = "/v1/models"


def alias_policies(catalogue: Catalogue) -> list[str]:
    """The policies with aliases: all, and ``off`` where a plain name means another."""
    return [*catalogue.entries, *([OFF] if catalogue.default != OFF else [])]


def with_aliases(body: bytes, catalogue: Catalogue) -> bytes:
    """Add the aliases to a list of models; anything else is returned as it is."""
    policies = alias_policies(catalogue)
    try:
        document = json.loads(body)
    except ValueError:
        return body
    data = document.get("data") if isinstance(document, dict) else None
    if not policies or not isinstance(data, list):
        return body
    aliases: list[dict[str, Any]] = [
        {**card, "id": f"{card['id']}@{policy}", "parent": card["id"]}
        for card in data
        if isinstance(card, dict) and isinstance(card.get("id"), str)
        for policy in policies
    ]
    data.extend(aliases)
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()


class ListedModels:
    """ASGI's ``send`` for one answer of the route."""

    def __init__(self, catalogue: Catalogue, client_send: Send) -> None:
        self._catalogue = catalogue
        self._client_send = client_send
        self._start: Message | None = None
        self._parts: list[bytes] = []

    async def send(self, message: Message) -> None:
        """Hold the answer until it is whole, then send it with the aliases."""
        if message["type"] == "http.response.start" and message["status"] == 200:
            self._start = message
        elif message["type"] == "http.response.body" and self._start is not None:
            self._parts.append(message.get("body", b""))
            if message.get("more_body", False):
                return
            body = with_aliases(b"".join(self._parts), self._catalogue)
            headers = [h for h in self._start["headers"] if h[0].lower() != b"content-length"]
            headers.append((b"content-length", str(len(body)).encode()))
            await self._client_send({**self._start, "headers": headers})
            await self._client_send({"type": "http.response.body", "body": body})
        else:
            await self._client_send(message)
