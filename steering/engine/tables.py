"""The persistent tables that the operators read, and the slots in them.

Memory layout, allocated once per worker before the first forward pass::

    table      [num_layers, num_slots, hidden_size] float32   what each slot adds at each layer
    slots      [max_tokens] int32                             each token's slot in this step
    strengths  [max_tokens] float32                           each token's strength in this step
    counts     [num_layers] int32                             tokens that each layer edits in this step

Addresses never change, contents change only between forward passes on the stream that runs the model.
Slot 0 is the identity. A slot holds one row of one plan; plans that requests use are pinned, the others
stay resident until their slots are needed, least recently used first.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from steering.engine.payload import PlanPayload

IDENTITY = 0


class NoFreeSlotError(Exception):
    """Every slot is pinned by a running request."""


@dataclass(frozen=True)
class Placement:
    """Where one request's plan is.

    Attributes:
        plan: the plan's id.
        slots: the slot of each phase, in the order of ``steering.plan.PHASES``.
        strength: the request's multiplier.
    """

    plan: str
    slots: tuple[int, ...]
    strength: float


@dataclass
class _Resident:
    slots: tuple[int, ...]
    users: int = 0


class SteeringTables:
    """One worker's tables.

    Args:
        num_layers: decoder layers of the whole model (a pipeline stage uses its own rows).
        num_slots: rows per layer, the identity included.
        hidden_size: width of the residual stream.
        max_tokens: most tokens in one forward pass.
        device: where the model runs.
        dtype: type of the residual stream.

    Attributes:
        edited: ``counts`` on the host, for code that runs eagerly on the host.
        uniform: the slot and strength of all tokens of this step, where they have one in common.
    """

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        hidden_size: int,
        max_tokens: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.largest = torch.finfo(dtype).max
        self.num_layers = num_layers
        self.num_slots = num_slots
        self.hidden_size = hidden_size
        self.table = torch.zeros(num_layers, num_slots, hidden_size, device=device)
        self.slots = torch.zeros(max_tokens, dtype=torch.int32, device=device)
        self.strengths = torch.zeros(max_tokens, dtype=torch.float32, device=device)
        self.counts = torch.zeros(num_layers, dtype=torch.int32, device=device)
        self.edited: np.ndarray[Any, np.dtype[np.int32]] = np.zeros(num_layers, dtype=np.int32)
        self.uniform: tuple[int, float] | None = None
        self._staging = _Staging(max_tokens, num_layers, self)
        self._live = np.zeros((num_layers, num_slots), dtype=np.int32)
        self._plans: dict[str, PlanPayload] = {}
        self._resident: OrderedDict[str, _Resident] = OrderedDict()
        self._free = list(range(num_slots - 1, IDENTITY, -1))
        self._filled = 0

    # Plans: what may be placed.

    def add_plan(self, plan: PlanPayload) -> None:
        """Make a plan placeable; the same id again changes nothing.

        Raises:
            ValueError: a row of another width, a layer that the model lacks, a number that is not
                finite, or more rows than there are slots.
        """
        if plan.id in self._plans:
            return
        if len(plan.rows) > self.num_slots - 1:
            raise ValueError(
                f"plan {plan.id[:12]} needs {len(plan.rows)} slots, there are {self.num_slots - 1}"
            )
        for row in plan.rows:
            if row.vectors.shape[1] != self.hidden_size:
                raise ValueError(
                    f"plan {plan.id[:12]} is {row.vectors.shape[1]} wide, "
                    f"the residual stream {self.hidden_size}"
                )
            if row.layers and not 0 <= row.layers[0] <= row.layers[-1] < self.num_layers:
                raise ValueError(
                    f"plan {plan.id[:12]} edits layer {row.layers[-1]}, "
                    f"the model has layers 0 to {self.num_layers - 1}"
                )
            # Not finite fails the comparison too.
            if not (np.abs(row.vectors) <= self.largest).all():
                raise ValueError(
                    f"plan {plan.id[:12]} holds a number that is not finite or that the residual "
                    f"stream's type cannot hold (largest: {self.largest:g})"
                )
        self._plans[plan.id] = plan

    def remove_plan(self, plan_id: str) -> None:
        """Forget a plan; running requests keep their slots until they end."""
        self._plans.pop(plan_id, None)
        resident = self._resident.get(plan_id)
        if resident is not None and resident.users == 0:
            self._evict(plan_id)

    @property
    def plans(self) -> frozenset[str]:
        """Ids of the placeable plans."""
        return frozenset(self._plans)

    @property
    def pinned(self) -> int:
        """Slots that running requests use."""
        return sum(len(r.slots) for r in self._resident.values() if r.users)

    # Slots: where a running request's plan is.

    def place(self, plan_id: str, strength: float) -> Placement:
        """Pin a plan's slots for one request, writing its rows first if they are not resident.

        Raises:
            KeyError: no such plan.
            NoFreeSlotError: every slot is pinned.
        """
        plan = self._plans[plan_id]
        resident = self._resident.get(plan_id)
        if resident is None:
            slots = self._take(len(plan.rows))
            try:
                for slot, row in zip(slots, plan.rows, strict=True):
                    self._write(slot, row.layers, row.vectors)
            except BaseException:
                # Resident is what is written; a half-written row must never be found later.
                self._free.extend(reversed(slots))
                raise
            resident = self._resident[plan_id] = _Resident(slots)
        resident.users += 1
        self._resident.move_to_end(plan_id)
        slots = tuple(IDENTITY if row is None else resident.slots[row] for row in plan.phase_rows)
        return Placement(plan_id, slots, strength)

    def release(self, placement: Placement) -> None:
        """Unpin what :meth:`place` pinned."""
        resident = self._resident[placement.plan]
        resident.users -= 1
        if resident.users == 0 and placement.plan not in self._plans:
            self._evict(placement.plan)

    def _take(self, wanted: int) -> tuple[int, ...]:
        idle = [plan_id for plan_id, r in self._resident.items() if r.users == 0]
        available = len(self._free) + sum(len(self._resident[p].slots) for p in idle)
        if available < wanted:
            raise NoFreeSlotError(f"{wanted} slots wanted, {available} not pinned")
        while len(self._free) < wanted:
            self._evict(idle.pop(0))
        return tuple(self._free.pop() for _ in range(wanted))

    def _evict(self, plan_id: str) -> None:
        self._free.extend(reversed(self._resident.pop(plan_id).slots))

    def _write(
        self,
        slot: int,
        layers: tuple[int, ...],
        vectors: np.ndarray[tuple[int, int], np.dtype[np.float32]],
    ) -> None:
        self.table[:, slot].zero_()
        self._live[:, slot] = 0
        if layers:
            index = torch.tensor(layers, device=self.table.device)
            self.table[index, slot] = torch.from_numpy(vectors.copy()).to(self.table.device)
            self._live[list(layers), slot] = 1

    # Steps: what each token of the next forward pass gets.

    def fill(
        self,
        placements: list[Placement | None],
        computed: np.ndarray[tuple[int], np.dtype[np.int32]],
        scheduled: np.ndarray[tuple[int], np.dtype[np.int32]],
        prompt_lengths: np.ndarray[tuple[int], np.dtype[np.int32]],
    ) -> None:
        """Describe the next forward pass: requests in batch order, each with consecutive tokens.

        Args:
            placements: one per request, ``None`` for a request that nothing edits.
            computed: tokens of each request computed before this step.
            scheduled: tokens of each request in this step.
            prompt_lengths: each request's prompt length; a token at an absolute position below it is
                in phase ``prompt``, the others are in ``generation``.
        """
        if not any(placements):
            self.clear()
            return
        by_phase = np.array(
            [p.slots if p is not None else (IDENTITY, IDENTITY) for p in placements], dtype=np.int32
        )
        strengths = np.array(
            [p.strength if p is not None else 0.0 for p in placements], dtype=np.float32
        )
        in_prompt = np.clip(prompt_lengths - computed, 0, scheduled)
        runs = np.stack([in_prompt, scheduled - in_prompt], axis=1).reshape(-1)
        slots = np.repeat(by_phase.reshape(-1), runs)
        per_slot = np.bincount(slots, minlength=self.num_slots)
        one_slot = per_slot[slots[0]] == len(slots)
        one_strength = bool((strengths == strengths[0]).all())
        self.uniform = (int(slots[0]), float(strengths[0])) if one_slot and one_strength else None
        per_slot[IDENTITY] = 0
        np.matmul(self._live, per_slot, out=self.edited, casting="unsafe")
        self._staging.copy(slots, np.repeat(strengths, scheduled), self.edited, self._filled)
        self._filled = len(slots)

    def clear(self) -> None:
        """Make the next forward pass plain."""
        if self._filled:
            self.slots[: self._filled].zero_()
            self.strengths[: self._filled].zero_()
            self.counts.zero_()
            self.edited.fill(0)
            self.uniform = None
            self._filled = 0


class _Staging:
    """Host copies of the per-step buffers, pinned when the device is not the host.

    On CPU the staging tensors are the buffers themselves, so a step costs no copy.
    """

    def __init__(self, max_tokens: int, num_layers: int, tables: SteeringTables) -> None:
        self._tables = tables
        self._on_host = tables.slots.device.type == "cpu"
        if self._on_host:
            self._slots, self._strengths, self._counts = (
                tables.slots,
                tables.strengths,
                tables.counts,
            )
        else:
            self._slots = torch.zeros(max_tokens, dtype=torch.int32, pin_memory=True)
            self._strengths = torch.zeros(max_tokens, dtype=torch.float32, pin_memory=True)
            self._counts = torch.zeros(num_layers, dtype=torch.int32, pin_memory=True)
        self._slots_np = self._slots.numpy()
        self._strengths_np = self._strengths.numpy()
        self._counts_np = self._counts.numpy()

    def copy(
        self,
        slots: np.ndarray[tuple[int], np.dtype[np.int32]],
        strengths: np.ndarray[tuple[int], np.dtype[np.float32]],
        counts: np.ndarray[Any, np.dtype[np.int32]],
        filled_before: int,
    ) -> None:
        tokens = len(slots)
        # Rows behind the batch may be run as padding: they keep slot 0.
        end = max(tokens, filled_before)
        self._slots_np[:tokens] = slots
        self._slots_np[tokens:end] = IDENTITY
        self._strengths_np[:tokens] = strengths
        self._counts_np[:] = counts
        if not self._on_host:
            tables = self._tables
            tables.slots[:end].copy_(self._slots[:end], non_blocking=True)
            tables.strengths[:tokens].copy_(self._strengths[:tokens], non_blocking=True)
            tables.counts.copy_(self._counts, non_blocking=True)
