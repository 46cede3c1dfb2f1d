"""A server on the loopback that answers as a test tells it to, for the commands that ask one.

It speaks real HTTP, so that connections, keys and errors are what they are in use; what it says is
the test's. A real engine is not needed for how a command behaves towards it.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import Response

LIVE = "/v1/steering/live"
MODELS = "/v1/models"
CHAT = "/v1/chat/completions"


@dataclass
class Scripted:
    """A server's address, what it answers by path, and what it was asked.

    Attributes:
        answers: by path, the status and the body; a body that is not bytes is sent as JSON.
        key: the API key that it asks for.
        headers: what its answers carry besides.
        asked: method, path, and the parsed body of each request, in their order.
    """

    port: int
    answers: dict[str, tuple[int, Any]] = field(default_factory=dict)
    key: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    asked: list[tuple[str, str, Any]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def reset(self, answers: dict[str, tuple[int, Any]]) -> None:
        """Forget what other tests said and asked."""
        self.answers = answers
        self.key = None
        self.headers = {}
        self.asked = []

    def answer(self, path: str, method: str, authorization: str | None, body: bytes) -> Response:
        """What one request gets."""
        self.asked.append((method, path, json.loads(body) if body else None))
        if self.key is not None and authorization != f"Bearer {self.key}":
            return _response(401, {"error": "Unauthorized"}, {})
        status, content = self.answers.get(path, (404, {"detail": "Not Found"}))
        return _response(status, content, self.headers)


def _response(status: int, content: Any, headers: dict[str, str]) -> Response:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return Response(body, status, headers, media_type="application/json")


@contextmanager
def serving(scripted: Scripted) -> Iterator[None]:
    """Answer on the script's port while the body runs."""
    app = FastAPI(openapi_url=None)

    @app.api_route("/{path:path}", methods=["GET", "POST"])
    async def everything(path: str, request: Request) -> Response:
        authorization = request.headers.get("authorization")
        return scripted.answer(f"/{path}", request.method, authorization, await request.body())

    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=scripted.port, log_level="error", lifespan="off")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert thread.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    try:
        yield
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join(timeout=30)


def unused_port() -> int:
    """A port on which nothing listens at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def live_document(**changes: Any) -> dict[str, Any]:
    """Two running requests, two finished ones."""
    return {
        "model": "smollm2",
        "process": 1234,
        "probes": ["refusal@2"],
        "running": [
            {
                "id": "chatcmpl-abc-0",
                "policy": "guard@7",
                "mode": "enforce",
                "probe": "refusal@2",
                "phase": "thinking",
                "tokens": 143,
                "score": 0.31,
                "recent": [0.05, 0.4, 0.6, 0.99, 0.31],
            },
            {
                "id": "chatcmpl-abd-0",
                "policy": "heed@1",
                "mode": "shadow",
                "probe": "refusal@2",
                "phase": "prompt_end",
                "tokens": 0,
                "score": 0.88,
                "recent": [],
            },
        ],
        "finished": [
            {
                "id": "chatcmpl-aaa-0",
                "policy": "off",
                "mode": "off",
                "probe": "refusal@2",
                "outcome": "finished",
                "ended": time.time() - 65,
                "summary": {
                    "prompt_end": 0.91,
                    "plateau": 0.87,
                    "final": 0.12,
                    "cliff": 0.75,
                    "answer_start": 0.2,
                    "answer_mean": 0.2,
                    "tokens": 77,
                },
                "recent": [0.87, 0.8, 0.12, 0.2],
            },
            {
                "id": "chatcmpl-aa9-0",
                "policy": "off",
                "mode": "off",
                "probe": "refusal@2",
                "outcome": "aborted",
                "ended": time.time() - 7300,
                "summary": {"prompt_end": 0.5, "tokens": 3}
                | dict.fromkeys(("plateau", "final", "cliff", "answer_start", "answer_mean"), None),
                "recent": [0.5],
            },
        ],
        **changes,
    }


def chat_answer(
    tokens: list[str | bytes],
    scores: list[float],
    *,
    prompt_tokens: int = 58,
    phases: list[list[Any]] | None = None,
    probe: str = "refusal@2",
    steering: dict[str, Any] | None = None,
    **summary: Any,
) -> dict[str, Any]:
    """An answer of the chat API with a trace.

    Args:
        tokens: the generated tokens' texts, or their bytes.
        scores: of the prompt's last token and of all tokens but the last.
        prompt_tokens: how long the prompt is.
        phases: as the API gives them; all is answer if None.
        probe: the key.
        steering: what else stands in the ``steering`` object.
        summary: figures of the probe that differ from None.
    """
    first = prompt_tokens - 1
    content = []
    for token in tokens:
        data = token.encode() if isinstance(token, str) else token
        shown = data.decode("utf-8", "replace")
        content.append({"token": shown, "logprob": -0.5, "bytes": list(data), "top_logprobs": []})
    last = first + len(scores) - 1
    if phases is None:
        phases = [["prompt_end", first, first], ["answer", first + 1, last]]
    figures = ("prompt_end", "plateau", "final", "cliff", "answer_start", "answer_mean")
    report: dict[str, Any] = {
        **dict.fromkeys(figures),
        "prompt_end": scores[0] if scores else None,
        "tokens": max(len(scores) - 1, 0),
        **summary,
        "trace": [[first + number, score] for number, score in enumerate(scores)],
    }
    text = b"".join(token.encode() if isinstance(token, str) else token for token in tokens)
    return {
        "id": "chatcmpl-1",
        "model": "smollm2",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text.decode("utf-8", "replace")},
                "logprobs": {"content": content},
                "finish_reason": "stop",
                "steering": {
                    "policy": "guard@7",
                    "mode": "enforce",
                    "applied": True,
                    "strength": 1.0,
                    "probes": {probe: report},
                    "phases": phases,
                    **(steering or {}),
                },
            }
        ],
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": len(tokens)},
    }


def thinking_answer() -> dict[str, Any]:
    """An answer that thinks at about 0.9, ends its thinking at 0.1, and goes on at 0.2."""
    thinking = [f" thought{n}" for n in range(20)]
    ending = ["</think>", "\n\n"]
    answer = [f" word{n}" for n in range(12)]
    scores = [0.91] + [0.9] * 20 + [0.4, 0.1] + [0.2] * 11
    return chat_answer(
        [*thinking, *ending, *answer],
        scores,
        phases=[
            ["prompt_end", 57, 57],
            ["thinking", 58, 77],
            ["think_end", 78, 79],
            ["answer", 80, 90],
        ],
        plateau=0.9,
        final=0.1,
        cliff=0.8,
        answer_start=0.2,
        answer_mean=0.2,
    )
