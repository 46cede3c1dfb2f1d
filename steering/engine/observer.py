"""Who is told of what the engine reports, in the API process that asked: metrics, and whoever watches."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Protocol

from steering.engine.exchange import Exchange
from steering.readings import Reading


class Observer(Protocol):
    """The rule book for an observer.

    All methods run on the event loop, between a step's outputs and the answers that they become. They
    must be quick and must not raise; what they are given must not be changed.
    """

    def read(self, exchange: Exchange, engine: int, reading: Reading, scores: array[float]) -> None:
        """Scores of generated tokens have come, each for the first time."""
        ...

    def ended(self, exchange: Exchange, request_id: str, finished: bool) -> None:
        """An engine request of an exchange has ended, by itself or because it was given up."""
        ...

    def stepped(self, engine: int, seconds: float, edited: Mapping[str, int]) -> None:
        """The engine has run a step in which somebody was steered or read.

        Args:
            engine: the number of the data parallel engine.
            seconds: what the host spent on Trimtab in it.
            edited: tokens computed in it under at least one edit of each kind.
        """
        ...
