"""What is told of a gate, from the worker that decides it to the answer that carries it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GateReport:
    """What one gate of one engine request has come to so far.

    Attributes:
        name: as the policy calls it.
        fired: whether it has opened.
        at: absolute position of the token that decided (of the first that it opened for, where every
            token decides for itself); ``None`` before.
        score: the probe's score there.
        tokens: for how many tokens a gate per token has opened; ``None`` for the others.
    """

    name: str
    fired: bool
    at: int | None = None
    score: float | None = None
    tokens: int | None = None

    def to_wire(self) -> list[Any]:
        """msgpack-native."""
        return [self.name, self.fired, self.at, self.score, self.tokens]

    @classmethod
    def from_wire(cls, data: list[Any]) -> GateReport:
        """Read :meth:`to_wire`'s form."""
        return cls(*data)
