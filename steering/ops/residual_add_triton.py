"""The CUDA form of ``trimtab::residual_add_``: one Triton program per token and block of the hidden size.

A program returns before it touches the stream when its layer edits nothing in this step or its token
is in slot 0, so an idle step costs one small launch a layer, inside the captured graph. The number of
programs depends only on the shape, as capture requires.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def _residual_add(  # type: ignore[no-untyped-def]
    x_ptr,
    table_ptr,
    slots_ptr,
    strengths_ptr,
    count_ptr,
    hidden,
    x_stride,
    table_stride,
    BLOCK: tl.constexpr,  # noqa: N803
):
    if tl.load(count_ptr) == 0:
        return
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot == 0:
        return
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < hidden
    strength = tl.load(strengths_ptr + token)
    row = x_ptr + token * x_stride + columns
    x = tl.load(row, mask=inside, other=0.0)
    vector = tl.load(table_ptr + slot * table_stride + columns, mask=inside, other=0.0)
    edited = x.to(tl.float32) + strength * vector
    tl.store(row, edited.to(x.dtype), mask=inside)


def launch(
    x: torch.Tensor,
    table: torch.Tensor,
    slots: torch.Tensor,
    strengths: torch.Tensor,
    count: torch.Tensor,
) -> None:
    """Run the kernel on the current stream; arguments as for ``residual_add_`` with ``x`` flattened.

    Args:
        x: ``[T, hidden_size]``, last dimension contiguous; edited in place.
        table: ``[num_slots, hidden_size] float32``.
        slots: ``[>= T] int32``.
        strengths: ``[>= T] float32``.
        count: ``[1] int32``.
    """
    tokens, hidden = x.shape
    if tokens == 0:
        return
    block = min(1024, triton.next_power_of_2(hidden))
    _residual_add[(tokens, triton.cdiv(hidden, block))](
        x, table, slots, strengths, count, hidden, x.stride(0), table.stride(0), BLOCK=block
    )
