"""The CUDA form of deciding gates: one Triton program per token, between two layers of a running pass.

For each gate that is decided at its token and reads at this layer, a program computes the probe's score
(:mod:`steering.ops.read_out`), keeps or records the decision, and moves the token into the slot that the open
gates call for, where the kernels of later layers find it. A program returns at once when the layer has no
gate in this step or nothing is decided at its token. The number of programs depends only on the shape, as
graph capture requires.

Programs run in any order, so what they share is written so that the order does not matter: counts and the
first opening of a gate per token are atomic, and a latched decision is recorded only by a token beyond the last
decided position, of which a request has one in a pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from steering.ops.read_out import COMPUTED_BEFORE
from steering.ops.read_out_triton import score_of

# A kernel sees globals only if they are marked as constants.
_COMPUTED_BEFORE = tl.constexpr(COMPUTED_BEFORE)


@dataclass(frozen=True)
class GateTensors:
    """What deciding reads and writes. ``E`` gate entries, ``R`` request rows of ``G`` gates, ``C`` cases.

    All are on one device and contiguous.

    Attributes:
        weight: ``[E, hidden_size] float32``: what each gate's probe reads with.
        bias: ``[E] float32``.
        bounds: ``[E, 2] float32``: a gate opens strictly between them.
        read_out: ``[E] int32``: a kind of :mod:`steering.ops.read_out`.
        gate_layer: ``[E] int32``: the layer that the gate reads.
        gates: ``[R, G] int32``: each request's gate entries.
        latched: ``[R, G] bool``: whether a gate's decision holds for later tokens.
        is_open: ``[R, G] bool``, the latched decision; written.
        decided_at: ``[R, G] int32``, the position of the last latched decision, -1 before; written.
        score: ``[R, G] float32``, the score there; written.
        first_open: ``[R, G] int64``: of a gate per token, the least ``position << 32 | score bits`` at which
            it opened; written.
        opened: ``[R, G] int32``: of a gate per token, how many tokens it opened for; written.
        case_slots: ``[R, 2**G, C] int32``: the slot for each set of open gates and each case.
        rows: ``[>= T] int32``: the request row of each token.
        cases: ``[>= T] int32``: its case.
        positions: ``[>= T] int32``: its position in the request.
        decides: ``[>= T] int32``: bit ``g``: gate ``g`` is decided at the token; bit ``COMPUTED_BEFORE``: the
            token was computed before, so a gate per token does not count it.
        masks: ``[>= T] int32``: bit ``g``: gate ``g`` is open for the token; written.
        slots: ``[>= T] int32``: the token's slot; written.
        layer_counts: ``[>= layer + 1] int32``: 0 for layers at which nothing is decided in this step.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    bounds: torch.Tensor
    read_out: torch.Tensor
    gate_layer: torch.Tensor
    gates: torch.Tensor
    latched: torch.Tensor
    is_open: torch.Tensor
    decided_at: torch.Tensor
    score: torch.Tensor
    first_open: torch.Tensor
    opened: torch.Tensor
    case_slots: torch.Tensor
    rows: torch.Tensor
    cases: torch.Tensor
    positions: torch.Tensor
    decides: torch.Tensor
    masks: torch.Tensor
    slots: torch.Tensor
    layer_counts: torch.Tensor


# Compiled once for all layers: a number that is 1 or divisible by 16 would be special otherwise.
@triton.jit(do_not_specialize=["layer"])  # type: ignore[untyped-decorator]
def _decide(  # type: ignore[no-untyped-def]
    x_ptr,
    rest_ptr,
    weight_ptr,
    bias_ptr,
    bounds_ptr,
    read_out_ptr,
    gate_layer_ptr,
    gates_ptr,
    latched_ptr,
    is_open_ptr,
    decided_at_ptr,
    score_ptr,
    first_open_ptr,
    opened_ptr,
    case_slots_ptr,
    rows_ptr,
    cases_ptr,
    positions_ptr,
    decides_ptr,
    masks_ptr,
    slots_ptr,
    layer_counts_ptr,
    layer,
    hidden,
    x_stride,
    rest_stride,
    HAS_REST: tl.constexpr,  # noqa: N803
    GATES: tl.constexpr,  # noqa: N803
    CASES: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    if tl.load(layer_counts_ptr + layer) == 0:
        return
    token = tl.program_id(0).to(tl.int64)
    decides = tl.load(decides_ptr + token)
    if decides == 0:
        return
    row = tl.load(rows_ptr + token).to(tl.int64)
    position = tl.load(positions_ptr + token)
    mask = tl.load(masks_ptr + token)
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden
    for g in tl.static_range(GATES):
        cell = row * GATES + g
        entry = tl.load(gates_ptr + cell).to(tl.int64)
        due = ((decides >> g) & 1) != 0
        if due & (tl.load(gate_layer_ptr + entry) == layer):
            h = tl.load(x_ptr + token * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
            if HAS_REST:
                rest = tl.load(rest_ptr + token * rest_stride + columns, mask=inside, other=0.0)
                h += rest.to(tl.float32)
            score = score_of(
                h,
                weight_ptr + entry * hidden + columns,
                inside,
                bias_ptr + entry,
                read_out_ptr + entry,
            )
            low = tl.load(bounds_ptr + 2 * entry)
            high = tl.load(bounds_ptr + 2 * entry + 1)
            opens = ((score > low) & (score < high)).to(tl.int32)
            if tl.load(latched_ptr + cell):
                decided_at = tl.load(decided_at_ptr + cell)
                if position == decided_at:
                    opens = tl.load(is_open_ptr + cell).to(tl.int32)
                elif position > decided_at:
                    tl.store(is_open_ptr + cell, opens != 0)
                    tl.store(decided_at_ptr + cell, position)
                    tl.store(score_ptr + cell, score)
            elif (opens != 0) & (((decides >> _COMPUTED_BEFORE) & 1) == 0):
                tl.atomic_add(opened_ptr + cell, 1)
                bits = score.to(tl.uint32, bitcast=True).to(tl.int64)
                tl.atomic_min(first_open_ptr + cell, (position.to(tl.int64) << 32) | bits)
            mask |= opens << g
    tl.store(masks_ptr + token, mask)
    case = tl.load(cases_ptr + token)
    slot = tl.load(case_slots_ptr + (row * (1 << GATES) + mask) * CASES + case)
    tl.store(slots_ptr + token, slot)


def launch(x: torch.Tensor, rest: torch.Tensor | None, layer: int, tensors: GateTensors) -> None:
    """Decide the gates that are due at a layer, on the current stream and without waiting for it.

    Args:
        x: ``[T, hidden_size]`` or ``[1, T, hidden_size]``, last dimension contiguous; float32, bfloat16 or
            float16; only read.
        rest: like ``x``; the activation is ``x + rest``.
        layer: decoder layer, or the number of layers for the final norm.
        tensors: what is read and written beside it.
    """
    rows = x.view(-1, x.shape[-1])
    others = rows if rest is None else rest.view(-1, rest.shape[-1])
    tokens, hidden = rows.shape
    if tokens == 0:
        return
    block = triton.next_power_of_2(hidden)
    t = tensors
    _decide[(tokens,)](
        rows,
        others,
        t.weight,
        t.bias,
        t.bounds,
        t.read_out,
        t.gate_layer,
        t.gates,
        t.latched,
        t.is_open,
        t.decided_at,
        t.score,
        t.first_open,
        t.opened,
        t.case_slots,
        t.rows,
        t.cases,
        t.positions,
        t.decides,
        t.masks,
        t.slots,
        t.layer_counts,
        layer,
        hidden,
        rows.stride(0),
        others.stride(0),
        HAS_REST=rest is not None,
        GATES=t.gates.shape[1],
        CASES=t.case_slots.shape[2],
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
    )
