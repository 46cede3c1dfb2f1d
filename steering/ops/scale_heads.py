"""Attention heads' outputs scaled before the output projection, for CPU tensors; the CUDA form is beside it.

For a token with attention output ``a`` (heads side by side), strength ``s`` and the deviations ``d`` of its
slot::

    a_h ← a_h (1 + s d_h)                 for every head h
    a   ← a ‖a before‖ / ‖a after‖        where the slot asks for it and ‖a after‖ > 0

The norm is one token's own, over all heads, so it never depends on a request's neighbours.
"""

from __future__ import annotations

import torch


def scale_heads_on_host(
    out: torch.Tensor,
    deviations: torch.Tensor,
    renormalise: torch.Tensor,
    used: torch.Tensor,
    slots: torch.Tensor,
    strengths: torch.Tensor,
    num_heads: int,
    uniform: tuple[int, float] | None = None,
) -> None:
    """Scale the heads of each token whose slot asks for it, in place.

    Args:
        out: ``[T, num_heads * width]`` or ``[1, T, num_heads * width]``, contiguous.
        deviations: ``[num_slots, >= num_heads] float32``: factor minus 1.
        renormalise: ``[num_slots] bool``.
        used: ``[num_slots] bool``: whether the slot does anything here.
        slots: ``[>= T] int32``.
        strengths: ``[>= T] float32``.
        num_heads: query heads of this rank.
        uniform: the slot and strength of all tokens, where they have one in common.
    """
    rows = out.view(-1, num_heads, out.shape[-1] // num_heads)
    tokens = rows.shape[0]
    if uniform is not None:
        slot, strength = uniform
        factors = 1.0 + strength * deviations[slot, :num_heads]
        wanted = renormalise[slot]
        active = None
        before = rows
    else:
        selected = used[slots[:tokens]]
        active = selected.nonzero().view(-1)
        if active.numel() == 0:
            return
        if active.numel() == tokens:
            active = None
        chosen = slots[:tokens] if active is None else slots.index_select(0, active)
        strength_of = strengths[:tokens] if active is None else strengths.index_select(0, active)
        factors = 1.0 + strength_of[:, None] * deviations[chosen, :num_heads]
        wanted = renormalise[chosen]
        before = rows if active is None else rows.index_select(0, active)
    if active is None and rows.dtype == torch.float32 and not wanted.any():
        rows.mul_(factors[..., None])
        return
    old = before.float()
    new = old * factors[..., None]
    if wanted.any():
        new *= _keeping_norm(old, new, wanted)[:, None, None]
    if active is None:
        rows.copy_(new)
    else:
        rows.index_copy_(0, active, new.to(rows.dtype))


def _keeping_norm(old: torch.Tensor, new: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    norm = new.flatten(1).norm(dim=1)
    ratio = old.flatten(1).norm(dim=1) / norm
    return torch.where(wanted & (norm > 0), ratio, 1.0)
