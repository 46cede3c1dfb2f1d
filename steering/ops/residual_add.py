"""The operator ``trimtab::residual_add_``: a per-token row of a table added to the residual stream.

For every token ``t`` whose slot is not 0::

    x[t] ← x[t] + strengths[t] · table[slots[t]]

computed in float32 and rounded once to the dtype of ``x``. A token in slot 0 is not touched at all, so
its bits are those of a model without the operator; adding a zero would already turn −0 into +0.

The operator is opaque to ``torch.compile``: one node in the graph, whatever the batch holds. Its tensors
keep their addresses for the life of the process and only their contents change, so a captured CUDA graph
stays valid. It is given the number of tokens that this layer edits in this step, and returns at once when
that is 0: an idle layer costs one call, which code inlined into the graph could not avoid paying in full.
"""

from __future__ import annotations

from typing import Any

import torch

_library: Any = torch.library.Library("trimtab", "DEF")  # type: ignore[no-untyped-call]
_library.define(
    "residual_add_(Tensor(a!) x, Tensor table, Tensor slots, Tensor strengths, Tensor count) -> ()"
)


def residual_add(
    x: torch.Tensor, table: torch.Tensor, slots: torch.Tensor, strengths: torch.Tensor
) -> torch.Tensor:
    """The operator's meaning, one token at a time; returns a new tensor.

    Args:
        x: ``[T, hidden_size]``, any floating dtype.
        table: ``[num_slots, hidden_size] float32``.
        slots: ``[>= T] int32``.
        strengths: ``[>= T] float32``.
    """
    out = x.clone()
    for token in range(x.shape[0]):
        slot = int(slots[token])
        if slot:
            out[token] = (x[token].float() + strengths[token] * table[slot]).to(x.dtype)
    return out


def _cpu(
    x: torch.Tensor,
    table: torch.Tensor,
    slots: torch.Tensor,
    strengths: torch.Tensor,
    count: torch.Tensor,
) -> None:
    steered_here = count.item()
    if steered_here == 0:
        return
    rows = x.view(-1, x.shape[-1])
    tokens = rows.shape[0]
    slots = slots[:tokens]
    if steered_here == tokens:
        delta = table.index_select(0, slots).mul_(strengths[:tokens, None])
        if rows.dtype == torch.float32:
            rows.add_(delta)
        else:
            rows.copy_(delta.add_(rows))
        return
    steered = slots.nonzero().view(-1)
    delta = table.index_select(0, slots.index_select(0, steered))
    delta.mul_(strengths.index_select(0, steered)[:, None])
    if rows.dtype == torch.float32:
        rows.index_add_(0, steered, delta)
    else:
        rows.index_copy_(0, steered, delta.add_(rows.index_select(0, steered)).to(rows.dtype))


def _cuda(
    x: torch.Tensor,
    table: torch.Tensor,
    slots: torch.Tensor,
    strengths: torch.Tensor,
    count: torch.Tensor,
) -> None:
    from steering.ops.residual_add_triton import launch

    launch(x.view(-1, x.shape[-1]), table, slots, strengths, count)


def _meta(
    x: torch.Tensor,
    table: torch.Tensor,
    slots: torch.Tensor,
    strengths: torch.Tensor,
    count: torch.Tensor,
) -> None:
    return None


_library.impl("residual_add_", _cpu, "CPU")
_library.impl("residual_add_", _cuda, "CUDA")
_library.impl("residual_add_", _meta, "Meta")

residual_add_ = torch.ops.trimtab.residual_add_.default
"""Edit ``x`` in place.

Args:
    x: ``[T, hidden_size]`` or ``[1, T, hidden_size]``, contiguous; float32, bfloat16 or float16.
    table: ``[num_slots, hidden_size] float32``; row 0 is never read.
    slots: ``[>= T] int32``, the slot of each token, 0 for the identity.
    strengths: ``[>= T] float32``.
    count: ``[1] int32`` on the device of ``x``: how many of the ``T`` tokens have a row that is not
        zero in this table; 0 skips the call.
"""
