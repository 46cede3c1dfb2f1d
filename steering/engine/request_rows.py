"""What the device knows about each steered request: which slot it is in when, and what its gates decided.

A steered request owns one row of these tensors from its first forward pass to its end, preemptions
included, so that what a gate decided once holds for the rest of the request even if its tokens are computed
again. Row 0 belongs to nobody. ``R`` rows, ``G`` gates (bit ``g`` of a mask), ``C`` cases::

    case_slots  [R, 2**G, C] int32    slot for each set of open gates and each case
    decides     [R, C] int32          which gates are decided at a token of each case
    latched     [R, G] bool           gates whose decision holds for later tokens
    gates       [R, G] int32          their rows in the gate tables, 0 for none
    is_open     [R, G] bool           the latched decision
    decided_at  [R, G] int32          position of the (last) deciding token, -1 before
    score       [R, G] float32        the score there
    first_open  [R, G] int64          of a gate per token: where it first opened, as ``position << 32 | bits``
                                      of the score there, so that the least is the first
    opened      [R, G] int32          of a gate per token: how many tokens it opened for
    state       [R] int32             the thinking tracker's state after the request's last token
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from steering.engine.gate_report import GateReport
from steering.engine.tables import MAX_GATES, MAX_WINDOWS, NUM_CASES, Resident
from steering.engine.transfer import to_device

NEVER: Final = int(np.iinfo(np.int64).max)

PROMPT_END_CASE: Final = 1
THINK_END_CASES: Final = tuple(range(3, NUM_CASES, 3))


class NoFreeRowError(Exception):
    """More steered requests are running or preempted than there are rows."""


@dataclass
class Placement:
    """Where one request's plan is, and how far the request has come.

    Attributes:
        plan: the plan's id.
        resident: the plan in the tables.
        strength: the request's multiplier.
        row: its row here.
        simple: whether a token's slot follows from its position relative to the prompt's end alone.
        tracked: up to which position the thinking tracker's state is known.
        state: that state where the host knows it; ``None`` once the device has moved it on.
        computed: the highest number of tokens computed so far; what lies below is computed again.
        told: what was last reported of its gates.
    """

    plan: str
    resident: Resident
    strength: float
    row: int
    simple: bool
    tracked: int = 0
    state: int | None = None
    computed: int = 0
    told: list[GateReport] | None = None


class RequestRows:
    """One worker's rows.

    Args:
        count: rows, nobody's included.
        device: where the model runs.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(count, *shape, dtype=dtype, device=device)

        self.device = device
        self.case_slots = zeros(1 << MAX_GATES, NUM_CASES)
        self.decides = zeros(NUM_CASES)
        self.latched = zeros(MAX_GATES, dtype=torch.bool)
        self.gates = zeros(MAX_GATES)
        self.is_open = zeros(MAX_GATES, dtype=torch.bool)
        self.decided_at = zeros(MAX_GATES) - 1
        self.score = zeros(MAX_GATES, dtype=torch.float32)
        self.first_open = torch.full((count, MAX_GATES), NEVER, dtype=torch.int64, device=device)
        self.opened = zeros(MAX_GATES)
        self.state = zeros()
        self.windows = np.full((count, MAX_WINDOWS), np.iinfo(np.int32).max, dtype=np.int32)
        self._free = list(range(count - 1, 0, -1))
        self._gated: set[int] = set()

    def take(self, plan: str, resident: Resident, strength: float) -> Placement:
        """A fresh row for one request.

        Raises:
            NoFreeRowError: all are taken.
        """
        if not self._free:
            raise NoFreeRowError
        row = self._free.pop()
        payload = resident.plan
        masks, cases = resident.case_slots.shape
        slots = np.zeros((1 << MAX_GATES, NUM_CASES), dtype=np.int32)
        # Masks beyond the plan's gates and cases beyond its windows cannot occur.
        slots[:masks, :cases] = resident.case_slots
        self._write(self.case_slots, row, slots)
        if payload.gates:
            self._gated.add(row)
            entries = np.zeros(MAX_GATES, dtype=np.int32)
            entries[: len(resident.entries)] = resident.entries
            latched = np.zeros(MAX_GATES, dtype=np.bool_)
            latched[: len(payload.gates)] = [gate.at != "token" for gate in payload.gates]
            self._write(self.gates, row, entries)
            self._write(self.latched, row, latched)
            self._write(self.decides, row, _decides(resident))
            self.is_open[row] = False
            self.decided_at[row] = -1
            self.score[row] = 0.0
            self.first_open[row] = NEVER
            self.opened[row] = 0
        self.windows[row] = np.iinfo(np.int32).max
        self.windows[row, : len(payload.windows)] = payload.windows
        simple = not (payload.gates or payload.windows or payload.thinking)
        return Placement(plan, resident, strength, row, simple)

    def give_back(self, placement: Placement) -> None:
        """Free a request's row."""
        row = placement.row
        if row in self._gated:
            self._gated.discard(row)
            # A row without gates is never looked at for them again.
            self.gates[row] = 0
            self.decides[row] = 0
            self.latched[row] = False
        self._free.append(row)

    def also_decide_at_prompt_end(self, placement: Placement) -> None:
        """The prompt itself ends thinking: gates at the think end are decided at its last token."""
        bits = sum(
            1 << g for g, gate in enumerate(placement.resident.plan.gates) if gate.at == "think_end"
        )
        if bits:
            self.decides[placement.row, PROMPT_END_CASE] |= bits

    def _write(self, tensor: torch.Tensor, row: int, values: np.ndarray[Any, Any]) -> None:
        tensor[row] = to_device(values, self.device)

    def snapshot(self, placements: Sequence[tuple[str, Placement]]) -> Snapshot | None:
        """The gates of these requests as they stand once the work queued so far is done."""
        gated = [(name, p) for name, p in placements if p.row in self._gated]
        if not gated:
            return None
        rows = to_device(np.array([p.row for _, p in gated], dtype=np.int64), self.device)
        columns = (self.is_open, self.decided_at, self.score, self.first_open, self.opened)
        copies = [column.index_select(0, rows) for column in columns]
        if self.device.type == "cpu":
            return Snapshot(gated, copies, None)
        copies = [copy.to("cpu", non_blocking=True) for copy in copies]
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return Snapshot(gated, copies, event)


class Snapshot:
    """The gates of a step's requests, on their way to the host."""

    def __init__(
        self,
        gated: list[tuple[str, Placement]],
        columns: list[torch.Tensor],
        event: torch.cuda.Event | None,
    ) -> None:
        self._gated = gated
        self._columns = columns
        self._event = event

    def decisions(self) -> dict[str, list[GateReport]]:
        """By request, for those whose gates have come to something new; waits for the device."""
        if self._event is not None:
            self._event.synchronize()
        is_open, decided_at, score, first_open, opened = (c.numpy() for c in self._columns)
        found = {}
        for n, (request_id, placement) in enumerate(self._gated):
            gates = placement.resident.plan.gates
            decisions = [
                _latched(gate.name, is_open[n, g], decided_at[n, g], score[n, g])
                if gate.at != "token"
                else _per_token(gate.name, int(first_open[n, g]), int(opened[n, g]))
                for g, gate in enumerate(gates)
            ]
            # By request and not by row: this may run after the row has gone to another.
            if placement.told != decisions:
                placement.told = decisions
                found[request_id] = decisions
        return found


def _latched(name: str, is_open: Any, decided_at: Any, score: Any) -> GateReport:
    if decided_at < 0:
        return GateReport(name, False, None, None, None)
    return GateReport(name, bool(is_open), int(decided_at), float(score), None)


def _per_token(name: str, first_open: int, opened: int) -> GateReport:
    if first_open == NEVER:
        return GateReport(name, False, None, None, 0)
    bits = np.array([first_open & 0xFFFFFFFF], dtype=np.uint32)
    return GateReport(name, True, first_open >> 32, float(bits.view(np.float32)[0]), opened)


def _decides(resident: Resident) -> np.ndarray[Any, np.dtype[np.int32]]:
    """``[C]``: the gates that are decided at a token of each case.

    A gate per token is read only where its opening makes a difference.
    """
    bits = np.zeros(NUM_CASES, dtype=np.int32)
    slots = resident.case_slots
    masks, cases = slots.shape
    for g, gate in enumerate(resident.plan.gates):
        if gate.at == "prompt_end":
            bits[PROMPT_END_CASE] |= 1 << g
        elif gate.at == "think_end":
            bits[list(THINK_END_CASES)] |= 1 << g
        else:
            closed = [mask for mask in range(masks) if not mask >> g & 1]
            differs = (slots[closed] != slots[[mask | 1 << g for mask in closed]]).any(axis=0)
            bits[:cases][differs] |= 1 << g
    return bits
