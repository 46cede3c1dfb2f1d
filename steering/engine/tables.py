"""The persistent tables that the operators read, and the slots in them.

Memory layout, allocated once per worker before the first forward pass, ``L`` layers, ``S`` slots::

    add          [L, S, hidden_size] float32      what each slot adds to the stream after each layer
    heads        [L, S, num_heads] float32        each head's factor minus 1 (the heads of this rank)
    renormalise  [L, S] bool                      whether the scaled attention output keeps its norm
    basis        [site][L, S, K, hidden_size]     the vectors of each slot's projections, float32
    parameters   [site][L, S, K, 4] float32       their modes and parameters
    used         [site][L, S] int32               how many there are
    gate_*       [E, …]                           what each gate reads and when it opens

Addresses never change, contents change only between forward passes on the stream that runs the model.
Slot 0 is the identity and gate entry 0 reads nothing. A slot holds one row of one plan; plans that requests
use are pinned, the others stay resident until their slots are needed, least recently used first.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from steering.engine.payload import GatePayload, PlanPayload, RowPayload
from steering.engine.settings import DEFAULT_PROJECTIONS
from steering.engine.transfer import to_device
from steering.ops.project import CLIP, SITES
from steering.ops.read_out import READ_OUTS

IDENTITY: Final = 0
MAX_GATES: Final = 3
MAX_WINDOWS: Final = 3
NUM_CASES: Final = 2 + 3 * (MAX_WINDOWS + 1)

KINDS: Final = ("add", "heads", *SITES)
"""The tables that a slot may have something in, per layer."""


EDIT_KINDS: Final = ("add", "project", "rotate", "scale_heads")
"""What is told apart where edited tokens are counted; ``project`` is ``ablate`` and ``clamp``."""


class NoFreeSlotError(Exception):
    """Every slot is pinned by a running request."""


@dataclass(frozen=True)
class Sizes:
    """How large the tables of one worker are.

    Attributes:
        num_layers: decoder layers of the whole model (a pipeline stage uses its own rows).
        num_slots: rows per layer, the identity included.
        hidden_size: width of the residual stream.
        max_tokens: most tokens in one forward pass.
        num_heads: query heads of this rank; 0 where heads are not hooked.
        head_offset: the first of them in the whole model.
        max_requests: requests that may be running or preempted at once.
        projections: vectors that a slot may hold at one site of one layer.
        sites: the sites of :data:`steering.ops.project.SITES` that are hooked.
        dtype: type of the activations.
    """

    num_layers: int
    num_slots: int
    hidden_size: int
    max_tokens: int
    num_heads: int = 0
    head_offset: int = 0
    max_requests: int = 1024
    projections: int = DEFAULT_PROJECTIONS
    sites: tuple[str, ...] = SITES
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Resident:
    """A plan whose rows are in the tables.

    Attributes:
        plan: what it is.
        case_slots: ``[2**gates, cases] int32``: the slot for each set of open gates and each case.
        entries: each gate's row in the gate tables.
        touched: ``[tables, L] int32``: 1 where one of its slots has something.
    """

    plan: PlanPayload
    slots: tuple[int, ...]
    case_slots: np.ndarray[Any, np.dtype[np.int32]]
    entries: tuple[int, ...]
    touched: np.ndarray[Any, np.dtype[np.int32]]


class SteeringTables:
    """One worker's tables and what is in them."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.sizes = sizes
        self.device = device
        layers, slots, hidden = sizes.num_layers, sizes.num_slots, sizes.hidden_size
        self.add = torch.zeros(layers, slots, hidden, device=device)
        self.heads = torch.zeros(layers, slots, max(sizes.num_heads, 1), device=device)
        self.renormalise = torch.zeros(layers, slots, dtype=torch.bool, device=device)
        depth = sizes.projections
        self.basis = {
            site: torch.zeros(layers, slots, depth, hidden, device=device) for site in sizes.sites
        }
        self.parameters = {
            site: torch.zeros(layers, slots, depth, 4, device=device) for site in sizes.sites
        }
        self.used = {
            site: torch.zeros(layers, slots, dtype=torch.int32, device=device)
            for site in sizes.sites
        }
        gates = MAX_GATES * slots + 1
        self.gate_weight = torch.zeros(gates, hidden, device=device)
        self.gate_bias = torch.zeros(gates, device=device)
        self.gate_bounds = torch.zeros(gates, 2, device=device)
        self.gate_read_out = torch.zeros(gates, dtype=torch.int32, device=device)
        self.gate_layer = torch.full((gates,), -1, dtype=torch.int32, device=device)
        self.host_gate_layer = np.full(gates, -1, dtype=np.int32)
        # Whether a slot has anything in a table at a layer; on the host, to tell which layers a step edits.
        self.live = np.zeros((len(KINDS), layers, slots), dtype=np.int32)
        self.live_slots = torch.from_numpy(self.live)
        self.slot_kinds = np.zeros((len(EDIT_KINDS), slots), dtype=np.int64)
        self.slot_kinds_on_device = torch.zeros(
            len(EDIT_KINDS), slots, dtype=torch.int64, device=device
        )
        self._largest = torch.finfo(sizes.dtype).max
        self._plans: dict[str, PlanPayload] = {}
        self._resident: OrderedDict[str, Resident] = OrderedDict()
        self._users: dict[str, int] = {}
        self._free = list(range(slots - 1, IDENTITY, -1))
        self._free_gates = list(range(gates - 1, 0, -1))
        self.evictions = 0

    @property
    def num_bytes(self) -> int:
        """What the tables take on the device."""
        tables = [self.add, self.heads, self.gate_weight, *self.basis.values()]
        return sum(table.numel() * table.element_size() for table in tables)

    # Plans: what may be placed.

    def add_plan(self, plan: PlanPayload) -> None:
        """Make a plan placeable; the same id again changes nothing.

        Raises:
            ValueError: another width, a layer, head or site that the model lacks or that is not hooked, a
                number that is not finite, or more than the tables hold.
        """
        if plan.id in self._plans:
            return
        fault = self._fault(plan)
        if fault is not None:
            raise ValueError(f"plan {plan.id[:12]} {fault}")
        self._plans[plan.id] = plan

    def _fault(self, plan: PlanPayload) -> str | None:
        sizes = self.sizes
        if len(plan.rows) > sizes.num_slots - 1:
            return f"needs {len(plan.rows)} slots, there are {sizes.num_slots - 1}"
        if len(plan.gates) > MAX_GATES or len(plan.cases) != 1 << len(plan.gates):
            return f"has {len(plan.gates)} gates and {len(plan.cases)} sets of cases"
        if len(plan.windows) > MAX_WINDOWS:
            return f"has {len(plan.windows)} windows, {MAX_WINDOWS} are the most"
        wrong = sorted(plan.hidden_sizes - {sizes.hidden_size})
        if wrong:
            return f"is {wrong[0]} wide, the residual stream {sizes.hidden_size}"
        for gate in plan.gates:
            if not 0 <= gate.layer <= sizes.num_layers:
                return f"reads layer {gate.layer}, the model has layers 0 to {sizes.num_layers - 1}"
            if not np.isfinite(gate.weight).all() or gate.read_out not in READ_OUTS:
                return f"has a probe of kind {gate.read_out} that is not finite or not known"
        for row in plan.rows:
            fault = self._row_fault(row)
            if fault is not None:
                return fault
        return None

    def _row_fault(self, row: RowPayload) -> str | None:
        sizes = self.sizes
        layers = [*row.layers, *(p.layer for p in row.projections), *(n for n, _, _ in row.heads)]
        if layers and not 0 <= min(layers) <= max(layers) < sizes.num_layers:
            return f"edits layer {max(layers)}, the model has layers 0 to {sizes.num_layers - 1}"
        # Not finite fails the comparison too.
        if not (np.abs(row.vectors) <= self._largest).all():
            return (
                "holds a number that is not finite or that the residual stream's type cannot hold "
                f"(largest: {self._largest:g})"
            )
        if row.heads and sizes.num_heads == 0:
            return "scales attention heads, which are not hooked"
        depth: dict[tuple[int, int], int] = {}
        for p in row.projections:
            if SITES[p.site] not in self.basis:
                return f"edits the site {SITES[p.site]}, which is not hooked"
            where = (p.site, p.layer)
            depth[where] = depth.get(where, 0) + len(p.vectors)
            if depth[where] > sizes.projections:
                return (
                    f"projects on more than {sizes.projections} vectors at the {SITES[p.site]} site of "
                    f"layer {p.layer}"
                )
            if not np.isfinite(p.vectors).all() or np.isnan(p.parameters).any():
                return "holds a projection that is not finite"
        return None

    def remove_plan(self, plan_id: str) -> None:
        """Forget a plan; running requests keep their slots until they end."""
        self._plans.pop(plan_id, None)
        if plan_id in self._resident and not self._users.get(plan_id):
            self._evict(plan_id)

    @property
    def plans(self) -> frozenset[str]:
        """Ids of the placeable plans."""
        return frozenset(self._plans)

    @property
    def pinned(self) -> int:
        """Slots that running requests use."""
        return sum(len(self._resident[plan].slots) for plan in self._users)

    # Slots: where a running request's plan is.

    def place(self, plan_id: str) -> Resident:
        """Pin a plan's slots for one request, writing its rows first if they are not resident.

        Raises:
            KeyError: no such plan.
            NoFreeSlotError: every slot is pinned.
        """
        plan = self._plans[plan_id]
        resident = self._resident.get(plan_id)
        if resident is None:
            resident = self._move_in(plan)
        self._users[plan_id] = self._users.get(plan_id, 0) + 1
        self._resident.move_to_end(plan_id)
        return resident

    def release(self, plan_id: str) -> None:
        """Unpin what :meth:`place` pinned."""
        self._users[plan_id] -= 1
        if self._users[plan_id] == 0:
            del self._users[plan_id]
            if plan_id not in self._plans:
                self._evict(plan_id)

    def _move_in(self, plan: PlanPayload) -> Resident:
        slots = self._take(len(plan.rows))
        # Three a slot and at most three a plan: there are always enough.
        entries = tuple(self._free_gates.pop() for _ in plan.gates)
        try:
            for slot, row in zip(slots, plan.rows, strict=True):
                self._write(slot, row)
            for entry, gate in zip(entries, plan.gates, strict=True):
                self._write_gate(entry, gate)
        except BaseException:
            # Resident is what is written; a half-written row must never be found later.
            self._free.extend(reversed(slots))
            self._free_gates.extend(reversed(entries))
            raise
        case_slots = np.array(
            [[IDENTITY if row is None else slots[row] for row in cases] for cases in plan.cases],
            dtype=np.int32,
        )
        touched = np.asarray(self.live[:, :, list(slots)].any(axis=2), dtype=np.int32)
        resident = Resident(plan, slots, case_slots, entries, touched)
        self._resident[plan.id] = resident
        return resident

    def _take(self, wanted: int) -> tuple[int, ...]:
        idle = [plan_id for plan_id in self._resident if plan_id not in self._users]
        available = len(self._free) + sum(len(self._resident[p].slots) for p in idle)
        if available < wanted:
            raise NoFreeSlotError(f"{wanted} slots wanted, {available} not pinned")
        while len(self._free) < wanted:
            self._evict(idle.pop(0))
            self.evictions += 1
        return tuple(self._free.pop() for _ in range(wanted))

    def _evict(self, plan_id: str) -> None:
        resident = self._resident.pop(plan_id)
        self._free.extend(reversed(resident.slots))
        self._free_gates.extend(reversed(resident.entries))

    def _write(self, slot: int, row: RowPayload) -> None:
        device, sizes = self.device, self.sizes
        if self.live[:, :, slot].any():
            self.add[:, slot].zero_()
            self.heads[:, slot].zero_()
            self.renormalise[:, slot] = False
            for site in self.basis:
                self.used[site][:, slot] = 0
                self.parameters[site][:, slot].zero_()
            self.live[:, :, slot] = 0
        self.slot_kinds[:, slot] = _kinds(row)
        self.slot_kinds_on_device[:, slot] = to_device(self.slot_kinds[:, slot], device)
        if row.layers:
            index = to_device(np.array(row.layers, dtype=np.int64), device)
            self.add[index, slot] = to_device(row.vectors, device)
            self.live[KINDS.index("add"), list(row.layers), slot] = 1
        # A rank scales its own heads; a layer that keeps its norm does so only where a head is scaled.
        scaled = np.zeros((sizes.num_layers, self.heads.shape[2]), dtype=np.float32)
        for layer, head, deviation in row.heads:
            local = head - sizes.head_offset
            self.live[KINDS.index("heads"), layer, slot] = 1
            if 0 <= local < sizes.num_heads:
                scaled[layer, local] = deviation
        if row.heads:
            self.heads[:, slot] = to_device(scaled, device)
            for layer in row.renormalise:
                self.renormalise[layer, slot] = True
        depths: dict[tuple[int, int], int] = {}
        for p in row.projections:
            site = SITES[p.site]
            depth = depths.get((p.site, p.layer), 0)
            end = depths[p.site, p.layer] = depth + len(p.vectors)
            self.basis[site][p.layer, slot, depth:end] = torch.from_numpy(p.vectors.copy()).to(
                device
            )
            numbers = np.array([p.mode, *p.parameters], dtype=np.float32)
            self.parameters[site][p.layer, slot, depth] = to_device(numbers, device)
            self.used[site][p.layer, slot] = end
            self.live[KINDS.index(site), p.layer, slot] = 1

    def _write_gate(self, entry: int, gate: GatePayload) -> None:
        self.gate_weight[entry] = to_device(gate.weight, self.device)
        self.gate_bias[entry] = gate.bias
        bounds = np.array([gate.low, gate.high], dtype=np.float32)
        self.gate_bounds[entry] = to_device(bounds, self.device)
        self.gate_read_out[entry] = READ_OUTS.index(gate.read_out)
        self.gate_layer[entry] = gate.layer
        self.host_gate_layer[entry] = gate.layer


def _kinds(row: RowPayload) -> list[bool]:
    modes = {p.mode for p in row.projections}
    return [bool(row.layers), CLIP in modes, bool(modes - {CLIP}), bool(row.heads)]
