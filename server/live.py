"""``GET /v1/steering/live``: the scores of running requests, and what the last finished ones came to.

For people who watch. It holds ids, policies and scores, and no text of anybody's. One API process shows
its own requests.
"""

from __future__ import annotations

import os
import time
from array import array
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from server.report import summary_object
from steering.engine.admission import Frontend
from steering.engine.exchange import Exchange
from steering.engine.observer import Observer
from steering.engine.score_log import ScoreLog
from steering.readings import Reading

MOST_FINISHED: Final = 50
MOST_RECENT: Final = 60


class LiveScore(BaseModel):
    """What one probe reads of one choice."""

    id: str
    policy: str
    mode: Literal["off", "shadow", "enforce"]
    probe: str
    recent: list[float] = Field(description="the latest scores of generated tokens, oldest first")


class Running(LiveScore):
    """A choice that is being generated."""

    phase: str
    tokens: int
    score: float | None = Field(description="of the latest token that was read")


class Finished(LiveScore):
    """A choice that has ended."""

    outcome: Literal["finished", "aborted"]
    ended: float = Field(description="seconds since the epoch")
    summary: dict[str, float | int | None]


class Live(BaseModel):
    """The answer."""

    model: str
    process: int = Field(description="which API process answered")
    probes: list[str]
    running: list[Running]
    finished: list[Finished] = Field(
        description=f"the last {MOST_FINISHED} choices, newest first, a row for each probe"
    )


class LiveView:
    """Everything that is told to an observer, passed on; and the last ended requests kept.

    Args:
        frontend: whose requests are shown.
        inner: who is told first.
    """

    def __init__(self, frontend: Frontend, inner: Observer) -> None:
        self._frontend = frontend
        self._inner = inner
        self._finished: deque[list[Finished]] = deque(maxlen=MOST_FINISHED)

    def read(self, exchange: Exchange, engine: int, reading: Reading, scores: array[float]) -> None:
        """See :class:`steering.engine.observer.Observer`."""
        self._inner.read(exchange, engine, reading, scores)

    def stepped(self, engine: int, seconds: float, edited: Mapping[str, int]) -> None:
        """See :class:`steering.engine.observer.Observer`."""
        self._inner.stepped(engine, seconds, edited)

    def ended(self, exchange: Exchange, request_id: str, finished: bool) -> None:
        """See :class:`steering.engine.observer.Observer`."""
        self._inner.ended(exchange, request_id, finished)
        log = exchange.scores.get(request_id)
        if log is None:
            return
        now = time.time()
        self._finished.appendleft(
            [
                Finished(
                    **_facts(request_id, exchange, log, n),
                    outcome="finished" if finished else "aborted",
                    ended=now,
                    summary=summary_object(log.summary(n)),
                )
                for n, _ in enumerate(log.readings)
            ]
        )

    def picture(self, model: str, probes: list[str]) -> Live:
        """Now."""
        return Live(
            model=model,
            process=os.getpid(),
            probes=probes,
            running=list(self._running()),
            finished=[row for rows in self._finished for row in rows],
        )

    def _running(self) -> Iterator[Running]:
        for request_id, (exchange, _) in list(self._frontend.requests.items()):
            log = None if exchange is None else exchange.scores.get(request_id)
            if exchange is None or log is None:
                continue
            for n, _ in enumerate(log.readings):
                latest = log.recent(n, 1)
                yield Running(
                    **_facts(request_id, exchange, log, n),
                    phase=log.phase,
                    tokens=log.generated,
                    score=latest[-1] if latest else log.summary(n).prompt_end,
                )


def _facts(request_id: str, exchange: Exchange, log: ScoreLog, n: int) -> dict[str, Any]:
    return {
        "id": request_id,
        "policy": exchange.policy,
        "mode": exchange.mode,
        "probe": log.readings[n].key,
        "recent": log.recent(n, MOST_RECENT),
    }


router = APIRouter()


@router.get("/v1/steering/live")
async def live(request: Request) -> Live:
    """The scores of this process's requests."""
    state = request.app.state
    service = state.trimtab
    view: LiveView = state.trimtab_live
    return view.picture(service.model_name, [r.key for r in service.catalogue.readings])
