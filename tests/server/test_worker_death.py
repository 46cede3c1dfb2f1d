"""The process that computes dies in the middle of answers: every client is told, and none is misled."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
import pytest

from tests.conftest import build_tiny_checkpoint
from tests.server.served import Served, put_random_direction, serve, write_policy

pytestmark = pytest.mark.engine

MESSAGES = [{"role": "user", "content": "Which way does the ship turn?"}]
LONG = 440
# Each API's request for an answer that takes many seconds.
APIS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": LONG, "ignore_eos": True},
    "/v1/completions": {"prompt": "Which way?", "max_tokens": LONG, "ignore_eos": True},
    # These two cannot be told to go on after the token that ends an answer.
    "/v1/responses": {"input": "Which way?", "max_output_tokens": LONG, "temperature": 0},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": LONG, "temperature": 0},
}
# What stands in an answer that is complete, or looks so.
ENDINGS = (
    b'"finish_reason":"',
    b'"stop_reason":"',
    b"response.completed",
    b"response.incomplete",
    b'"status":"completed"',
    b'"steering"',
)


@dataclass
class Client:
    """One request on a thread of its own, and all that came back.

    Attributes:
        body: as far as it came.
        broken: the connection ended before the answer did, or was not made.
        ended: when, on the monotonic clock.
    """

    served: Served
    path: str
    model: str
    stream: bool
    status: int = 0
    body: bytes = b""
    broken: bool = False
    ended: float = 0.0
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        document = {"model": self.model, "stream": self.stream, **APIS[self.path]}
        try:
            with (
                self.served.client() as client,
                client.stream("POST", self.path, json=document) as answer,
            ):
                self.status = answer.status_code
                for part in answer.iter_bytes():
                    self.body += part
        except httpx.TransportError:
            self.broken = True
        self.ended = time.monotonic()

    def assert_failed(self) -> None:
        """The answer is an error, or broke off; nothing in it could be taken for a complete one."""
        shown = f"{self.path} {self.model} stream={self.stream} {self.status} {self.body[-400:]!r}"
        compact = self.body.replace(b": ", b":")
        assert not [word for word in ENDINGS if word in compact], shown
        if not self.stream:
            assert self.broken or self.status >= 500, shown
            if not self.broken:
                assert "error" in json.loads(self.body), shown
        elif self.status == 200:
            assert self.broken or b'"error"' in compact or b"response.failed" in compact, shown
        else:
            assert self.broken or self.status >= 500, shown


@pytest.fixture
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of the test's own, which it may destroy."""
    home = tmp_path_factory.mktemp("trimtab-home")
    # Deep enough that long answers take seconds, and can be met while they run.
    checkpoint = build_tiny_checkpoint(home / "deep-llama", num_layers=24)
    put_random_direction(home, checkpoint)
    write_policy(home / "policies", "guard")
    write_policy(home / "policies", "kind", strength=5.0, keys="onFailure: open\n")
    with serve(
        checkpoint, home, [f"--policies={home / 'policies'}"], log=home / "serve.log"
    ) as server:
        yield server


def process_of(served: Served, name: str) -> psutil.Process:
    """One of the processes that vLLM started, by the name that it gave it."""
    found = [
        child
        for child in psutil.Process(served.process.pid).children(recursive=True)
        if name in " ".join([child.name(), *child.cmdline()])
    ]
    assert len(found) == 1, found
    return found[0]


def unhealthy(served: Served) -> bool:
    try:
        return httpx.get(f"{served.url}/health", timeout=5, verify=False).status_code != 200
    except httpx.TransportError:
        return True


@pytest.mark.parametrize("name", ["VLLM::EngineCore", "VLLM::Worker"])
def test_when_a_process_dies_no_client_gets_a_normal_looking_answer(
    served: Served, name: str
) -> None:
    victim = process_of(served, name)
    clients = [
        Client(served, path, model, stream)
        for path in APIS
        for stream in (False, True)
        for model in (("tiny@guard", "tiny@kind") if stream else ("tiny@guard",))
    ]
    clients += [Client(served, "/v1/completions", "tiny", stream) for stream in (False, True)]
    running = 'vllm:num_requests_running{engine="0",model_name="tiny"}'
    deadline = time.monotonic() + 60
    while served.metrics().get(running, 0.0) < sum(not client.ended for client in clients):
        assert time.monotonic() < deadline, "the requests are not running together"
        time.sleep(0.05)
    killed = time.monotonic()
    os.kill(victim.pid, signal.SIGKILL)

    late = Client(served, "/v1/completions", "tiny@guard", False)
    for client in [*clients, late]:
        client.thread.join(60)
        assert not client.thread.is_alive(), f"{client.path} hangs"
    in_flight = [client for client in clients if client.ended > killed]
    assert {(c.path, c.stream) for c in in_flight} == {(p, s) for p in APIS for s in (False, True)}
    for client in in_flight:
        client.assert_failed()
    late.assert_failed()
    streamed = [client for client in in_flight if client.stream and client.status == 200]
    # Some had already said that they are steered, and have then to say that they failed.
    assert streamed

    deadline = time.monotonic() + 30
    while not unhealthy(served):
        assert time.monotonic() < deadline, "the server is ready without an engine"
        time.sleep(0.1)
    # vLLM ends a server whose engine is gone, and the launcher says so.
    assert served.process.wait(60) == 3
    said = served.log.read_text(errors="replace")
    assert "error E_ENGINE: the engine's process ended while it was serving" in said
    assert unhealthy(served)
    assert not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE
