"""The CUDA form of :mod:`steering.ops.project`: one Triton program per token, which holds its whole row.

A program returns before it touches the stream when its layer projects nothing in this step or its token's
slot holds no vector here. The number of programs depends only on the shape, as graph capture requires.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from steering.ops.project import CLIP, NOTHING, TURN_TO

# A kernel sees globals only if they are marked as constants.
_NOTHING = tl.constexpr(NOTHING)
_CLIP = tl.constexpr(CLIP)
_TURN_TO = tl.constexpr(TURN_TO)

_PI = tl.constexpr(3.141592653589793)
_TAN_EIGHTH_OF_PI = tl.constexpr(0.41421356237309503)
# π/4 in two parts: the first has few enough bits for its multiples up to 4 to be exact in float32.
_QUARTER_HIGH = tl.constexpr(0.785398006439209)
_QUARTER_LOW = tl.constexpr(1.5695823663008923e-07)


@triton.jit
def arctangent(y, x):  # type: ignore[no-untyped-def]
    """``atan2(y, x)`` in float32, within 2e-7 rad, and 0 where both are 0.

    Triton has none of its own. The angle is ``n·π/4 ± atan(t)`` with ``|t| ≤ tan(π/8)``, where a minimax
    polynomial is within 1e-8.
    """
    across = tl.abs(x)
    up = tl.abs(y)
    less = tl.minimum(across, up)
    more = tl.maximum(across, up)
    far = less > _TAN_EIGHTH_OF_PI * more
    top = tl.where(far, less - more, less)
    bottom = tl.where(far, less + more, more)
    t = tl.div_rn(top, tl.where(bottom > 0.0, bottom, 1.0))
    u = t * t
    tail = 0.1997792010 + u * (-0.1387977939 + u * 0.0806006306)
    angle = t + t * u * (-0.3333295511 + u * tail)
    steps = tl.where(far, 1.0, 0.0)
    steep = up > across
    steps = tl.where(steep, 2.0 - steps, steps)
    angle = tl.where(steep, -angle, angle)
    steps = tl.where(x < 0.0, 4.0 - steps, steps)
    angle = tl.where(x < 0.0, -angle, angle)
    angle = steps * _QUARTER_HIGH + (steps * _QUARTER_LOW + angle)
    return tl.where(y < 0.0, -angle, angle)


@triton.jit
def _wrap(angle):  # type: ignore[no-untyped-def]
    """The same angle in (−π, π]."""
    rest = _PI - angle
    return _PI - (rest - 2.0 * _PI * tl.floor(rest / (2.0 * _PI)))


@triton.jit  # type: ignore[untyped-decorator]
def _project(  # type: ignore[no-untyped-def]
    x_ptr,
    rest_ptr,
    basis_ptr,
    parameters_ptr,
    used_ptr,
    slots_ptr,
    strengths_ptr,
    count_ptr,
    hidden,
    x_stride,
    rest_stride,
    basis_slot_stride,
    basis_stride,
    parameters_slot_stride,
    parameters_stride,
    HAS_REST: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    if tl.load(count_ptr) == 0:
        return
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    depth = tl.load(used_ptr + slot)
    if depth == 0:
        return
    strength = tl.load(strengths_ptr + token)
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden
    row = x_ptr + token * x_stride + columns
    x = tl.load(row, mask=inside, other=0.0)
    start = x.to(tl.float32)
    if HAS_REST:
        rest = tl.load(rest_ptr + token * rest_stride + columns, mask=inside, other=0.0)
        start += rest.to(tl.float32)
    h = start
    for k in range(depth):
        vector = basis_ptr + slot * basis_slot_stride + k * basis_stride + columns
        settings = parameters_ptr + slot * parameters_slot_stride + k * parameters_stride
        mode = tl.load(settings).to(tl.int32)
        first = tl.load(settings + 1)
        # The second vector of a turn has no mode of its own.
        if mode != _NOTHING:
            b = tl.load(vector, mask=inside, other=0.0)
            p = tl.sum(h * b, axis=0)
            if mode == _CLIP:
                low = tl.load(settings + 2)
                high = tl.load(settings + 3)
                clipped = tl.minimum(tl.maximum(first * p, low), high)
                h += strength * (clipped - p) * b
            else:
                c = tl.load(vector + basis_stride, mask=inside, other=0.0)
                q = tl.sum(h * c, axis=0)
                turn = first
                if mode == _TURN_TO:
                    turn = _wrap(first - arctangent(q, p))
                turn = strength * turn
                cosine = tl.cos(turn)
                sine = tl.sin(turn)
                h += (p * cosine - q * sine - p) * b + (p * sine + q * cosine - q) * c
    edited = x.to(tl.float32) + (h - start)
    tl.store(row, edited.to(x.dtype), mask=inside)


def launch(
    x: torch.Tensor,
    rest: torch.Tensor | None,
    basis: torch.Tensor,
    parameters: torch.Tensor,
    used: torch.Tensor,
    slots: torch.Tensor,
    strengths: torch.Tensor,
    count: torch.Tensor,
) -> None:
    """Apply each token's projections in place, on the current stream and without waiting for it.

    Args:
        x: ``[T, hidden_size]`` or ``[1, T, hidden_size]``, last dimension contiguous; float32, bfloat16 or
            float16.
        rest: like ``x``: the activation is ``x + rest``, of which only ``x`` is changed.
        basis: ``[num_slots, K, hidden_size] float32``, last dimension contiguous.
        parameters: ``[num_slots, K, 4] float32``, last dimension contiguous: the mode, then its three
            parameters.
        used: ``[num_slots] int32``: how many vectors each slot holds here; 0 for slot 0, of which nothing
            else is read.
        slots: ``[>= T] int32``.
        strengths: ``[>= T] float32``.
        count: ``[1] int32``: 0 skips the call.
    """
    rows = x.view(-1, x.shape[-1])
    others = rows if rest is None else rest.view(-1, rest.shape[-1])
    tokens, hidden = rows.shape
    if tokens == 0:
        return
    block = triton.next_power_of_2(hidden)
    _project[(tokens,)](
        rows,
        others,
        basis,
        parameters,
        used,
        slots,
        strengths,
        count,
        hidden,
        rows.stride(0),
        others.stride(0),
        basis.stride(0),
        basis.stride(1),
        parameters.stride(0),
        parameters.stride(1),
        HAS_REST=rest is not None,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
    )
