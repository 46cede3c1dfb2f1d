"""A per-token row of a table added to the residual stream, in the two forms that the engine needs.

For every token ``t`` whose slot is not 0::

    x[t] ← x[t] + strengths[t] · table[slots[t]]

computed in float32 and rounded once to the dtype of ``x``. Row 0 of the table is zero and means "no
edit". The tables and per-token buffers keep their addresses for the life of the process and only their
contents change, so compiled code and captured CUDA graphs stay valid.

:func:`residual_add` is plain torch, for code that is being compiled: the compiler fuses it into the
kernels around it, and it costs no call of its own. ``residual_add_`` is an operator for code that runs
eagerly, where plain torch would be three kernels a layer: it is told how many tokens its layer edits in
this step, returns at once when there are none, and does not touch a token in slot 0. What each costs is
in ``docs/engine.md``.
"""

from __future__ import annotations

from typing import Any

import torch

_library: Any = torch.library.Library("trimtab", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(
    "residual_add_(Tensor(a!) x, Tensor table, Tensor slots, Tensor strengths, Tensor count) -> ()"
)


def residual_add(
    x: torch.Tensor, table: torch.Tensor, slots: torch.Tensor, strengths: torch.Tensor
) -> torch.Tensor:
    """The edited stream as a new tensor, in plain torch.

    Args:
        x: ``[T, hidden_size]`` or ``[1, T, hidden_size]``, any floating dtype.
        table: ``[num_slots, hidden_size] float32``; row 0 is zero.
        slots: ``[>= T] int32``, the slot of each token.
        strengths: ``[>= T] float32``.
    """
    tokens = x.shape[-2]
    return (x.float() + strengths[:tokens, None] * table[slots[:tokens]]).to(x.dtype)


def residual_add_on_host(
    x: torch.Tensor,
    table: torch.Tensor,
    slots: torch.Tensor,
    strengths: torch.Tensor,
    steered_here: int,
    uniform: tuple[int, float] | None = None,
) -> None:
    """``residual_add_`` for a CPU tensor, by a caller that knows the step and needs no dispatcher.

    Args:
        x, table, slots, strengths: as for ``residual_add_``.
        steered_here: how many of the tokens have a row that is not zero in this table.
        uniform: the slot and strength of all tokens, where they have one in common.
    """
    if steered_here == 0:
        return
    if uniform is not None and x.dtype == torch.float32:
        slot, strength = uniform
        x.add_(table[slot], alpha=strength)
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


def _cpu(
    x: torch.Tensor,
    table: torch.Tensor,
    slots: torch.Tensor,
    strengths: torch.Tensor,
    count: torch.Tensor,
) -> None:
    residual_add_on_host(x, table, slots, strengths, int(count.item()))


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
