"""The CUDA form of :mod:`steering.ops.scale_heads`: one Triton program per token, which holds all its heads.

A program returns before it touches the heads when its layer scales none in this step or its token's slot
scales none here. The number of programs depends only on the shape, as graph capture requires.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def _scale_heads(  # type: ignore[no-untyped-def]
    out_ptr,
    deviations_ptr,
    renormalise_ptr,
    slots_ptr,
    strengths_ptr,
    count_ptr,
    num_heads,
    width,
    out_stride,
    deviations_stride,
    HEADS: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
):
    if tl.load(count_ptr) == 0:
        return
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot == 0:
        return
    head = tl.arange(0, HEADS)
    is_head = head < num_heads
    deviation = tl.load(deviations_ptr + slot * deviations_stride + head, mask=is_head, other=0.0)
    if tl.max(tl.abs(deviation), axis=0) == 0.0:
        return
    factor = 1.0 + tl.load(strengths_ptr + token) * deviation
    column = tl.arange(0, WIDTH)
    inside = is_head[:, None] & (column < width)[None, :]
    place = out_ptr + token * out_stride + head[:, None] * width + column[None, :]
    out = tl.load(place, mask=inside, other=0.0)
    old = out.to(tl.float32)
    new = old * factor[:, None]
    if tl.load(renormalise_ptr + slot):
        before = tl.sqrt_rn(tl.sum(tl.sum(old * old, axis=1), axis=0))
        after = tl.sqrt_rn(tl.sum(tl.sum(new * new, axis=1), axis=0))
        if after > 0.0:
            new *= tl.div_rn(before, after)
    tl.store(place, new.to(out.dtype), mask=inside)


def launch(
    out: torch.Tensor,
    deviations: torch.Tensor,
    renormalise: torch.Tensor,
    slots: torch.Tensor,
    strengths: torch.Tensor,
    count: torch.Tensor,
    num_heads: int,
) -> None:
    """Scale the heads of each token whose slot asks for it, in place, on the current stream.

    Args:
        out: ``[T, num_heads * width]`` or ``[1, T, num_heads * width]``, last dimension contiguous; float32,
            bfloat16 or float16.
        deviations: ``[num_slots, >= num_heads] float32``: factor minus 1; row 0 is never read.
        renormalise: ``[num_slots] bool``.
        slots: ``[>= T] int32``, 0 for the identity.
        strengths: ``[>= T] float32``.
        count: ``[1] int32``: 0 skips the call.
        num_heads: query heads of this rank.
    """
    rows = out.view(-1, out.shape[-1])
    tokens, total = rows.shape
    if tokens == 0:
        return
    width = total // num_heads
    heads, columns = triton.next_power_of_2(num_heads), triton.next_power_of_2(width)
    _scale_heads[(tokens,)](
        rows,
        deviations,
        renormalise,
        slots,
        strengths,
        count,
        num_heads,
        width,
        rows.stride(0),
        deviations.stride(0),
        HEADS=heads,
        WIDTH=columns,
        num_warps=min(max(heads * columns // 512, 1), 16),
    )
