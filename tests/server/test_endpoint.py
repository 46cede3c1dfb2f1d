"""How a server that ends says why: its engine died, or it was asked to."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.settings import Settings


class Client:
    """vLLM's engine client, as far as its end goes: shut down twice, and in error after that."""

    def __init__(self) -> None:
        self.errored = False
        self.stopped: list[float | None] = []

    def shutdown(self, timeout: float | None = None) -> None:
        self.stopped.append(timeout)
        self.errored = True


@pytest.mark.parametrize("died", [True, False])
def test_only_an_engine_that_failed_before_its_shutdown_is_a_failure(
    tmp_path: Path, died: bool
) -> None:
    from server.endpoint import _tell_of_death

    settings, client = Settings(str(tmp_path), 1), Client()
    _tell_of_death(settings, client)
    client.errored = died
    client.shutdown(timeout=3)
    client.shutdown()
    assert client.stopped == [3, None]
    told = settings.recorded_failure()
    assert told == ("E_ENGINE: the engine's process ended while it was serving" if died else None)
