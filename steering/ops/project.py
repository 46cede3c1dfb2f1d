"""Edits that move a token's projection on stored vectors, for CPU tensors; the CUDA form is beside it.

A slot holds up to ``K`` vectors for a site of a layer, each with a mode and three parameters, and they act
one after the other. For a token with activation ``h``, strength ``s`` and a unit vector ``b``::

    CLIP      p = h·b;  h ← h + s (min(max(gain·p, low), high) − p) b       ablate, clamp
    TURN_BY   (p, q) = (h·b, h·c), turned by the angle s·θ in their plane
    TURN_TO   φ = atan2(q, p);  turned by s·wrap(θ − φ), wrap to (−π, π]    rotate

where ``c`` is the next vector of the slot. A turn keeps ``‖h‖``. All arithmetic is in float32.
"""

from __future__ import annotations

import math
from typing import Final

import torch

SITES: Final = ("residual", "attention", "mlp")
"""Where a projection can act: the stream after a layer, or the output of one of the layer's blocks."""

NOTHING: Final = 0
CLIP: Final = 1
TURN_TO: Final = 2
TURN_BY: Final = 3


def project_on_host(
    x: torch.Tensor,
    rest: torch.Tensor | None,
    basis: torch.Tensor,
    parameters: torch.Tensor,
    used: torch.Tensor,
    slots: torch.Tensor,
    strengths: torch.Tensor,
    uniform: tuple[int, float] | None = None,
) -> None:
    """Apply each token's projections in place.

    Args:
        x: ``[T, hidden_size]`` or ``[1, T, hidden_size]``; changed in place.
        rest: like ``x``: the activation is ``x + rest``, of which only ``x`` is changed.
        basis: ``[num_slots, K, hidden_size] float32``.
        parameters: ``[num_slots, K, 4] float32``: the mode, then its three parameters.
        used: ``[num_slots] int32``: how many vectors each slot holds here.
        slots: ``[>= T] int32``.
        strengths: ``[>= T] float32``.
        uniform: the slot and strength of all tokens, where they have one in common.
    """
    rows = x.view(-1, x.shape[-1])
    others = None if rest is None else rest.view(-1, rest.shape[-1])
    tokens = rows.shape[0]
    active: torch.Tensor | None = None
    chosen: torch.Tensor | int
    strength: torch.Tensor | float
    if uniform is not None:
        chosen, strength = uniform
        depth = int(used[chosen])
        h = rows.float()
        h = h.clone() if h is rows else h
        if others is not None:
            h += others
    else:
        depths = used[slots[:tokens]]
        active = depths.nonzero().view(-1)
        if active.numel() == 0:
            return
        depth = int(depths.max())
        chosen = slots.index_select(0, active)
        strength = strengths.index_select(0, active)
        h = rows.index_select(0, active).float()
        if others is not None:
            h += others.index_select(0, active)
    start = h.clone()
    for k in range(depth):
        b = basis[chosen, k]
        mode, first, low, high = parameters[chosen, k].unbind(-1)
        p = h @ b if b.dim() == 1 else (h * b).sum(-1)
        clipped = torch.minimum(torch.maximum(first * p, low), high)
        move = torch.where(mode == CLIP, strength * (clipped - p), 0.0)
        turning = mode >= TURN_TO
        if turning.any():
            c = basis[chosen, k + 1 if k + 1 < basis.shape[1] else k]
            q = h @ c if c.dim() == 1 else (h * c).sum(-1)
            angle = torch.atan2(q, p)
            turn = strength * torch.where(mode == TURN_TO, _wrap(first - angle), first)
            turned_p = p * turn.cos() - q * turn.sin()
            turned_q = p * turn.sin() + q * turn.cos()
            move = torch.where(turning, turned_p - p, move)
            h += torch.where(turning, turned_q - q, 0.0)[:, None] * c
        h += move[:, None] * b
    h -= start
    if active is None:
        rows.add_(h) if rows.dtype == torch.float32 else rows.copy_(rows.float().add_(h))
    elif rows.dtype == torch.float32:
        rows.index_add_(0, active, h)
    else:
        rows.index_copy_(0, active, h.add_(rows.index_select(0, active)).to(rows.dtype))


def _wrap(angle: torch.Tensor) -> torch.Tensor:
    """The same angle in (−π, π]."""
    return math.pi - torch.remainder(math.pi - angle, 2 * math.pi)
