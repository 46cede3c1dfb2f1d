"""What each token of the next forward pass gets: the per-token buffers, filled before every pass.

::

    slots      [max_tokens] int32      each token's slot; gates change it as the pass goes on
    strengths  [max_tokens] float32    each token's strength
    rows       [max_tokens] int32      the row of its request, 0 for none
    cases      [max_tokens] int32      its phase, refined by the windows of its plan
    positions  [max_tokens] int32      its absolute position
    masks      [max_tokens] int32      the gates that are open for it
    decides    [max_tokens] int32      the gates that are decided at it
    counts     [tables, L] int32       how many tokens each layer edits at most, by table

Everything that the host knows is computed on the host: positions, prompt tokens, tokens that are computed
again. What only the device knows is computed there, without waiting for it: the phase of a token that was
sampled in the step before, and what gates have decided. Under asynchronous scheduling the host prepares a
step before it has seen the last one's tokens, and both still hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from steering.engine.probe_reader import ProbeReader
from steering.engine.request_rows import Placement, RequestRows
from steering.engine.tables import IDENTITY, KINDS, MAX_GATES, SteeringTables
from steering.engine.transfer import to_device
from steering.ops.read_out import COMPUTED_BEFORE

if TYPE_CHECKING:
    from steering.ops.gate_triton import GateTensors

IntArray = np.ndarray[Any, np.dtype[np.int32]]

_ANSWER = 2


@dataclass(frozen=True)
class Batch:
    """The next forward pass, as a model runner describes it.

    Attributes:
        request_ids: in batch order; each has consecutive tokens.
        computed: ``[N]``: tokens of each request computed before this step.
        scheduled: ``[N]``: tokens of each request in this step.
        prompt_lengths: ``[N]``.
        tokens: ``(index, start, stop)`` to token ids of request ``index`` that the host knows: those of
            its prompt, and its answer's if they are computed again.
        input_ids: ``[T]`` on the device, what the model will read.
    """

    request_ids: Sequence[str]
    computed: IntArray
    scheduled: IntArray
    prompt_lengths: IntArray
    tokens: Callable[[int, int, int], np.ndarray[Any, Any]]
    input_ids: torch.Tensor


@dataclass(frozen=True)
class Due:
    """Gates to be decided at one layer, for code that runs on the host.

    Attributes:
        gate: the bit.
        tokens: ``[n]`` which tokens of the batch.
    """

    gate: int
    tokens: torch.Tensor


@dataclass(frozen=True)
class Edited:
    """Tokens of one pass by kind of edit, on their way to the host.

    Attributes:
        counts: ``[kinds]``, in the order of :data:`steering.engine.tables.EDIT_KINDS`.
        event: when they are there; ``None``: now.
    """

    counts: np.ndarray[Any, Any] | torch.Tensor
    event: torch.cuda.Event | None

    def resolve(self) -> list[int]:
        """The counts; waits for the device."""
        if self.event is not None:
            self.event.synchronize()
        return [int(count) for count in self.counts]


class Tracker:
    """The thinking tracker's tables on host and device; see ``steering.thinking``."""

    def __init__(
        self,
        transitions: np.ndarray[Any, np.dtype[np.uint8]],
        phases: np.ndarray[Any, np.dtype[np.uint8]],
        ended: np.ndarray[Any, np.dtype[np.bool_]],
        start: int,
        device: torch.device,
    ) -> None:
        self.host = transitions
        self.start = start
        self.ended = ended
        # As offsets in the triple of generated cases: thinking, think end, answer.
        self.host_phases = phases.astype(np.int32) - 2
        self.transitions = torch.from_numpy(transitions.copy()).to(device)
        self.phases = torch.from_numpy(self.host_phases.copy()).to(device)

    def run(self, state: int, tokens: np.ndarray[Any, Any]) -> list[int]:
        """The state after each token."""
        states = []
        transitions = self.host
        for token in tokens.tolist():
            state = int(transitions[state, token])
            states.append(state)
        return states


class Step:
    """One worker's per-token buffers.

    Attributes:
        reader: what probes are to read in the pass.
        tracker: set once a plan needs it.
        edited: ``counts`` on the host; exact on a CPU, where gates recount.
        uniform: the slot and strength of all tokens, where they have one in common.
        due: by layer, the gates to decide in this pass; only for a CPU.
    """

    def __init__(self, tables: SteeringTables, rows: RequestRows) -> None:
        device, tokens = tables.device, tables.sizes.max_tokens
        self.tables = tables
        self.requests = rows
        self.reader = ProbeReader(tables.sizes.num_layers, tables.sizes.hidden_size, tokens, device)
        self.on_host = device.type == "cpu"
        self.slots = torch.zeros(tokens, dtype=torch.int32, device=device)
        self.strengths = torch.zeros(tokens, dtype=torch.float32, device=device)
        self.rows = torch.zeros(tokens, dtype=torch.int32, device=device)
        self.cases = torch.zeros(tokens, dtype=torch.int32, device=device)
        self.positions = torch.zeros(tokens, dtype=torch.int32, device=device)
        self.masks = torch.zeros(tokens, dtype=torch.int32, device=device)
        self.decides = torch.zeros(tokens, dtype=torch.int32, device=device)
        layers = tables.sizes.num_layers
        self.counts = torch.zeros(len(KINDS), layers, dtype=torch.int32, device=device)
        self.gate_counts = torch.zeros(layers + 1, dtype=torch.int32, device=device)
        self.edited: IntArray = np.zeros((len(KINDS), layers), dtype=np.int32)
        self.uniform: tuple[int, float] | None = None
        self.due: dict[int, list[Due]] = {}
        self.tracker: Tracker | None = None
        self._filled = 0
        self._decided = False

    @cached_property
    def gate_tensors(self) -> GateTensors:
        """What the CUDA form of deciding gates reads and writes; their addresses never change."""
        from steering.ops.gate_triton import GateTensors

        tables, requests = self.tables, self.requests
        return GateTensors(
            weight=tables.gate_weight,
            bias=tables.gate_bias,
            bounds=tables.gate_bounds,
            read_out=tables.gate_read_out,
            gate_layer=tables.gate_layer,
            gates=requests.gates,
            latched=requests.latched,
            is_open=requests.is_open,
            decided_at=requests.decided_at,
            score=requests.score,
            first_open=requests.first_open,
            opened=requests.opened,
            case_slots=requests.case_slots,
            rows=self.rows,
            cases=self.cases,
            positions=self.positions,
            decides=self.decides,
            masks=self.masks,
            slots=self.slots,
            layer_counts=self.gate_counts,
        )

    def clear(self) -> None:
        """Make the next forward pass plain, and read nothing in it."""
        self.reader.clear()
        self.clear_edits()

    def clear_edits(self) -> None:
        """Make the next forward pass plain."""
        if self._filled:
            for buffer in (self.slots, self.strengths, self.rows, self.decides):
                buffer[: self._filled].zero_()
            self.counts.zero_()
            self.gate_counts.zero_()
            self.edited.fill(0)
            self.uniform = None
            self.due = {}
            self._filled = 0
            self._decided = False

    def fill(self, placements: Sequence[Placement | None], batch: Batch) -> None:
        """Describe the next forward pass; ``None`` stands for a request that nothing edits."""
        if not any(placements):
            self.clear_edits()
            return
        strengths = np.array(
            [p.strength if p is not None else 0.0 for p in placements], dtype=np.float32
        )
        tokens = int(batch.scheduled.sum())
        # Rows behind the batch may be run as padding: they keep slot 0.
        if tokens < self._filled:
            for buffer in (self.slots, self.rows, self.decides):
                buffer[tokens : self._filled].zero_()
        if self._decided:
            self.decides[:tokens].zero_()
            self.gate_counts.zero_()
            self.due = {}
            self._decided = False
        self._filled = tokens
        self._send(self.strengths, np.repeat(strengths, batch.scheduled))
        if all(p is None or p.simple for p in placements):
            slots = _simple_slots(placements, batch)
            self._send(self.slots, slots)
            self._count(slots, strengths)
        else:
            self._fill_general(placements, batch, strengths, tokens)
        for p, computed, scheduled in zip(placements, batch.computed, batch.scheduled, strict=True):
            if p is not None:
                p.computed = max(p.computed, int(computed + scheduled))

    def _fill_general(
        self,
        placements: Sequence[Placement | None],
        batch: Batch,
        strengths: np.ndarray[Any, np.dtype[np.float32]],
        tokens: int,
    ) -> None:
        row_of = np.array([0 if p is None else p.row for p in placements], dtype=np.int32)
        ends = np.cumsum(batch.scheduled, dtype=np.int32)
        first = ends - batch.scheduled
        rows = np.repeat(row_of, batch.scheduled)
        positions = np.arange(tokens, dtype=np.int32) + np.repeat(
            batch.computed - first, batch.scheduled
        )
        offsets = positions - np.repeat(batch.prompt_lengths, batch.scheduled)
        window = (offsets[:, None] >= self.requests.windows[rows]).sum(axis=1, dtype=np.int32)
        cases = np.where(offsets < -1, 0, np.where(offsets == -1, 1, 2 + 3 * window + _ANSWER))
        cases = cases.astype(np.int32)
        decoding = self._track(placements, batch, cases, first)
        self._send(self.rows, rows)
        self._send(self.cases, cases)
        self._send(self.positions, positions)
        if len(decoding):
            self._track_on_device(decoding, batch.input_ids)
        self._resolve(tokens)
        gated = [p for p in placements if p is not None and p.resident.plan.gates]
        if self.on_host:
            slots = self.slots[:tokens].numpy()
            self._count(slots, strengths)
        else:
            self._count_at_most(placements, batch.scheduled)
        if gated:
            self._decided = True
            again = np.array([0 if p is None else p.computed for p in placements], dtype=np.int32)
            self._expect(tokens, positions < np.repeat(again, batch.scheduled), gated)

    # Phases.

    def _track(
        self,
        placements: Sequence[Placement | None],
        batch: Batch,
        cases: IntArray,
        first: IntArray,
    ) -> IntArray:
        """Put the phases that the host can tell into ``cases``; returns the tokens left to the device.

        A token that was sampled in the step before is the device's; everything else, prompts and what is
        computed again after a preemption, is known here.
        """
        decoding = []
        for n, p in enumerate(placements):
            if p is None or not p.resident.plan.thinking:
                continue
            assert self.tracker is not None
            computed, scheduled = int(batch.computed[n]), int(batch.scheduled[n])
            length = int(batch.prompt_lengths[n])
            if scheduled == 1 and computed >= length and p.tracked == computed:
                decoding.append(int(first[n]))
                p.tracked, p.state = computed + 1, None
                continue
            if p.tracked != computed or p.state is None:
                known = self.tracker.run(self.tracker.start, batch.tokens(n, 0, computed))
                p.state = known[-1] if known else self.tracker.start
            states = self.tracker.run(p.state, batch.tokens(n, computed, computed + scheduled))
            p.tracked, p.state = computed + scheduled, states[-1]
            self.requests.state[p.row] = p.state
            for i, state in enumerate(states):
                if computed + i >= length:
                    at = int(first[n]) + i
                    cases[at] += int(self.tracker.host_phases[state]) - _ANSWER
                elif computed + i == length - 1 and self.tracker.ended[state]:
                    self.requests.also_decide_at_prompt_end(p)
        return np.array(decoding, dtype=np.int64)

    def _track_on_device(self, decoding: IntArray, input_ids: torch.Tensor) -> None:
        tracker = self.tracker
        assert tracker is not None
        index = to_device(decoding, self.tables.device)
        rows = self.rows.index_select(0, index).long()
        states = tracker.transitions[
            self.requests.state.index_select(0, rows).long(),
            input_ids.index_select(0, index).long(),
        ].long()
        self.requests.state[rows] = states.int()
        self.cases[index] += tracker.phases.index_select(0, states) - _ANSWER

    # Slots and gates.

    def _resolve(self, tokens: int) -> None:
        """Each token's slot and the gates to decide at it, from its case and what is latched."""
        requests = self.requests
        rows = self.rows[:tokens].long()
        cases = self.cases[:tokens].long()
        positions = self.positions[:tokens]
        decides = requests.decides[rows, cases]
        masks = torch.zeros_like(decides)
        for g in range(MAX_GATES):
            decided_at = requests.decided_at[rows, g]
            latched = requests.latched[rows, g]
            # Only the first run of think-end tokens decides; what comes after it stands.
            late = latched & (decided_at >= 0) & (positions > decided_at + 1)
            decides &= ~(late.int() << g)
            held = requests.is_open[rows, g] & latched & (positions > decided_at)
            masks |= held.int() << g
        # A gate that is decided at a token is closed for it until then.
        masks &= ~decides
        self.decides[:tokens] = decides
        self.masks[:tokens] = masks
        self.slots[:tokens] = requests.case_slots[rows, masks.long(), cases]

    def _expect(self, tokens: int, again: np.ndarray[Any, Any], gated: list[Placement]) -> None:
        """Make known at which layers gates are decided in this pass."""
        if again.any():
            before = again.astype(np.int32) << COMPUTED_BEFORE
            self.decides[:tokens] |= to_device(before, self.tables.device)
        if not self.on_host:
            counts = np.zeros(len(self.gate_counts), dtype=np.int32)
            counts[[gate.layer for p in gated for gate in p.resident.plan.gates]] = 1
            self._send(self.gate_counts, counts)
            return
        decides = self.decides[:tokens].numpy()
        for g in range(MAX_GATES):
            due = np.flatnonzero(decides >> g & 1)
            if len(due) == 0:
                continue
            entries = self.requests.gates[self.rows[due].long(), g].numpy()
            layers_of = self.tables.host_gate_layer[entries]
            for layer in np.unique(layers_of):
                chosen = torch.from_numpy(due[layers_of == layer])
                self.due.setdefault(int(layer), []).append(Due(g, chosen))

    # Counts.

    def edited_tokens(self) -> Edited | None:
        """How many tokens of the pass that has just been queued each kind of edit acts on; ``None``: none.

        To be asked once the pass is queued, since gates change slots until its end.
        """
        if not self._filled:
            return None
        slots = self.slots[: self._filled]
        if self.on_host:
            per_slot = np.bincount(slots.numpy(), minlength=self.tables.sizes.num_slots)
            return Edited(self.tables.slot_kinds @ per_slot, None)
        counts = self.tables.slot_kinds_on_device.index_select(1, slots.long()).sum(dim=1)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        counts = counts.to("cpu", non_blocking=True)
        event.record()
        return Edited(counts, event)

    def recount(self) -> None:
        """Count again after a gate has changed slots; only for a CPU."""
        slots = self.slots[: self._filled].numpy()
        self._count(slots, self.strengths[: self._filled].numpy())

    def _count(self, slots: IntArray, strengths: np.ndarray[Any, Any]) -> None:
        live = self.tables.live
        per_slot = np.bincount(slots, minlength=live.shape[2])
        one_slot = per_slot[slots[0]] == len(slots)
        one_strength = bool((strengths == strengths[0]).all())
        self.uniform = (int(slots[0]), float(strengths[0])) if one_slot and one_strength else None
        per_slot[IDENTITY] = 0
        np.matmul(live, per_slot, out=self.edited, casting="unsafe")
        if self.on_host:
            self.counts.numpy()[:] = self.edited
        else:
            self._send(self.counts.view(-1), self.edited.reshape(-1))

    def _count_at_most(self, placements: Sequence[Placement | None], scheduled: IntArray) -> None:
        """Counts for a device whose gates and phases the host does not see: what may be edited."""
        self.edited.fill(0)
        for p, tokens in zip(placements, scheduled, strict=True):
            if p is not None:
                self.edited += p.resident.touched * np.int32(tokens)
        self.uniform = None
        self._send(self.counts.view(-1), self.edited.reshape(-1))

    def _send(self, buffer: torch.Tensor, values: np.ndarray[Any, Any]) -> None:
        if self.on_host:
            buffer[: len(values)].numpy()[:] = values
        else:
            buffer[: len(values)].copy_(to_device(values, self.tables.device))


def _simple_slots(placements: Sequence[Placement | None], batch: Batch) -> IntArray:
    """Slots of requests whose tokens differ at most by prompt, prompt end and answer."""
    by_phase = np.array(
        [
            (IDENTITY, IDENTITY, IDENTITY)
            if p is None
            else (
                p.resident.case_slots[0, 0],
                p.resident.case_slots[0, 1],
                p.resident.case_slots[0, 2 + _ANSWER],
            )
            for p in placements
        ],
        dtype=np.int32,
    )
    before_end = np.clip(batch.prompt_lengths - 1 - batch.computed, 0, batch.scheduled)
    through_end = np.clip(batch.prompt_lengths - batch.computed, 0, batch.scheduled)
    runs = np.stack(
        [before_end, through_end - before_end, batch.scheduled - through_end], axis=1
    ).reshape(-1)
    return np.repeat(by_phase.reshape(-1), runs)
