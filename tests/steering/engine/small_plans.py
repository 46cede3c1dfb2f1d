"""Small plans, and the worker's side of an engine without the engine.

A plan here is a list of edits, each with a scope, and of gates that open some of them, so that a test can say
for itself what a token gets. Nothing of :mod:`steering.plan` is used.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from steering.engine.payload import GatePayload, PlanPayload, ProjectionPayload, RowPayload
from steering.engine.request_rows import RequestRows
from steering.engine.runner import WorkerRequests
from steering.engine.step import Batch, Step, Tracker
from steering.engine.tables import Sizes, SteeringTables
from steering.thinking import ThinkingTracker

LAYERS, HIDDEN, HEADS, TOKENS = 3, 4, 4, 64
CPU = torch.device("cpu")

GENERATED = ("thinking", "think_end", "answer")
EVERYWHERE = frozenset({"prompt", "prompt_end", *GENERATED})

MARKERS = ("<t>", "</t>")
TEXTS = ("a", " ", "<t>", "</t>", "\n", "<t></t>", "<", "t>", "</t> b")


def tables(**sizes: Any) -> SteeringTables:
    """Tables of 3 layers of width 4, 4 heads, 4 slots unless told otherwise."""
    given = {"num_slots": 4, "num_heads": HEADS, **sizes}
    return SteeringTables(
        Sizes(num_layers=LAYERS, hidden_size=HIDDEN, max_tokens=TOKENS, **given), CPU
    )


def worker(rows: int = 32, heard: bool = True, **sizes: Any) -> WorkerRequests:
    """A worker's requests over fresh tables, with the thinking tracker of :data:`TEXTS`."""
    step = Step(tables(**sizes), RequestRows(rows, CPU))
    tracker = ThinkingTracker.build(TEXTS, *MARKERS)
    step.tracker = Tracker(
        tracker.transitions, tracker.phase_of_state, tracker.ended, tracker.start_state, CPU
    )
    return WorkerRequests(step, heard)


def added(layer: int = 1, value: float = 1.0) -> RowPayload:
    """A row that adds a constant at one layer."""
    return RowPayload((layer,), np.full((1, HIDDEN), value, dtype=np.float32))


def projected(
    *, site: int = 0, layer: int = 1, vectors: int = 1, low: float = -np.inf, width: int = HIDDEN
) -> RowPayload:
    """A row with one projection, on the first one or two axes."""
    projection = ProjectionPayload(
        site, layer, 1, (1.0, low, 0.5), np.eye(width, dtype=np.float32)[:vectors]
    )
    return RowPayload((), np.empty((0, HIDDEN), dtype=np.float32), (projection,))


def scaled(*heads: tuple[int, int, float], renormalise: tuple[int, ...] = ()) -> RowPayload:
    """A row that scales heads."""
    none = np.empty((0, HIDDEN), dtype=np.float32)
    return RowPayload((), none, heads=heads, renormalise=renormalise)


def uniform(name: str, *rows: RowPayload) -> PlanPayload:
    """A plan whose every token gets the first of its rows; the others only take slots."""
    return PlanPayload(name, rows or (added(),), ((0,) * 5,))


@dataclass(frozen=True)
class Edit:
    """Adds ``value`` at ``layer``, or scales head 0 there by ``1 + value``."""

    layer: int = 1
    value: float = 1.0
    scope: frozenset[str] = EVERYWHERE
    first: int | None = None
    kind: str = "add"

    def covers(self, phase: str, offset: int) -> bool:
        """Whether the scope holds a token of this phase, ``offset`` tokens behind the prompt."""
        early = self.first is not None and 0 <= offset < self.first
        return phase in self.scope or early


@dataclass(frozen=True)
class Rule:
    """A gate that opens the edits with the indices ``then`` and reads column ``g`` of the activation.

    ``g`` is the gate's index; the score is the sigmoid of what it reads.
    """

    at: str
    layer: int = 0
    low: float = 0.5
    high: float = np.inf
    then: frozenset[int] = frozenset({0})

    def opens(self, score: float) -> bool:
        return self.low < score < self.high


@dataclass(frozen=True)
class SmallPlan:
    """A plan as a test thinks of it."""

    name: str
    edits: tuple[Edit, ...]
    rules: tuple[Rule, ...] = ()

    def active(self, phase: str, offset: int, is_open: Iterable[bool]) -> tuple[Edit, ...]:
        """The edits that a token gets while these of the gates are open."""
        doors = [rule.then for rule in self.rules]
        opened = {edit for then, door in zip(doors, is_open, strict=True) if door for edit in then}
        gated = {edit for then in doors for edit in then}
        return tuple(
            edit
            for n, edit in enumerate(self.edits)
            if edit.covers(phase, offset) and (n not in gated or n in opened)
        )

    @property
    def tells_phases(self) -> bool:
        scopes = [edit.scope & frozenset(GENERATED) for edit in self.edits]
        return any(0 < len(scope) < 3 for scope in scopes) or any(
            rule.at == "think_end" for rule in self.rules
        )

    def payload(self) -> PlanPayload:
        """What the engine is sent."""
        windows = sorted({edit.first for edit in self.edits if edit.first is not None})
        situations = [("prompt", -2), ("prompt_end", -1)]
        situations += [(phase, offset) for offset in (0, *windows) for phase in GENERATED]
        found: list[tuple[Edit, ...]] = []
        cases = []
        for mask in range(1 << len(self.rules)):
            doors = [bool(mask >> g & 1) for g in range(len(self.rules))]
            row_of = []
            for phase, offset in situations:
                active = self.active(phase, offset, doors)
                if active and active not in found:
                    found.append(active)
                row_of.append(found.index(active) if active else None)
            cases.append(tuple(row_of))
        gates = tuple(
            GatePayload(
                f"g{g}",
                rule.layer,
                rule.at,
                rule.low,
                rule.high,
                "affine",
                np.eye(HIDDEN, dtype=np.float32)[g],
                0.0,
            )
            for g, rule in enumerate(self.rules)
        )
        rows = tuple(_row(active) for active in found)
        return PlanPayload(self.name, rows, tuple(cases), tuple(windows), gates, self.tells_phases)


def amounts(active: Iterable[Edit], kind: str) -> list[float]:
    """``[layers]``: what these edits come to."""
    found = [0.0] * LAYERS
    for edit in active:
        if edit.kind == kind:
            found[edit.layer] += edit.value
    return found


def _row(active: tuple[Edit, ...]) -> RowPayload:
    adds, factors = amounts(active, "add"), amounts(active, "heads")
    layers = tuple(n for n, value in enumerate(adds) if value)
    vectors = np.array([[adds[n]] * HIDDEN for n in layers], dtype=np.float32)
    heads = tuple((n, 0, value) for n, value in enumerate(factors) if value)
    return RowPayload(layers, vectors.reshape(len(layers), HIDDEN), heads=heads)


@dataclass
class Sequence:
    """One request as a model runner sees it.

    Attributes:
        tokens: the prompt and all of the answer, also what is not sampled yet.
        known: how many of the tokens there are so far.
        on_host: how many of them the host knows: under asynchronous scheduling those of the prompt, and
            what a preempted request brings back with it.
    """

    name: str
    prompt: int
    tokens: list[int]
    plan: SmallPlan | None = None
    strength: float = 1.0
    computed: int = 0
    known: int = field(default=0)
    on_host: int = field(default=0)

    def __post_init__(self) -> None:
        self.known = self.on_host = self.prompt

    @property
    def stamp(self) -> dict[str, Any] | None:
        if self.plan is None:
            return None
        return {"trimtab": {"plan": self.plan.name, "strength": self.strength}}

    @property
    def is_done(self) -> bool:
        return self.computed == len(self.tokens)

    def advance(self, count: int) -> None:
        """``count`` tokens were computed; behind the last known one, another is sampled."""
        self.computed += count
        if self.computed == self.known:
            self.known = min(self.known + 1, len(self.tokens))

    def preempt(self, computed: int = 0) -> None:
        """Computing starts again, behind what the prefix cache still has."""
        self.computed, self.on_host = computed, self.known


def batch_of(scheduled: list[tuple[Sequence, int]]) -> Batch:
    """The next forward pass over so many tokens of each."""
    ids = [t for s, count in scheduled for t in s.tokens[s.computed : s.computed + count]]

    def tokens(index: int, start: int, stop: int) -> np.ndarray[Any, Any]:
        sequence = scheduled[index][0]
        assert stop <= sequence.on_host, "the host does not know these tokens"
        return np.array(sequence.tokens[start:stop], dtype=np.int64)

    return Batch(
        [s.name for s, _ in scheduled],
        np.array([s.computed for s, _ in scheduled], dtype=np.int32),
        np.array([count for _, count in scheduled], dtype=np.int32),
        np.array([s.prompt for s, _ in scheduled], dtype=np.int32),
        tokens,
        torch.tensor([*ids, *[0] * (TOKENS - len(ids))]),
    )
