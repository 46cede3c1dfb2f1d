"""Deciding gates in the middle of a forward pass, on the host; the CUDA form is ``steering.ops.gate_triton``.

At the site that a gate reads, its score is computed for the tokens at which it is decided, before the edits
of that site. The decision moves the token into the slot that the open gates call for, so the edits of later
layers find it there: steering before the gate has opened is not a matter of checking, the slot is not there.

A latched decision is written for positions beyond the last decided one only, and taken from memory where a
position is computed again, so that rounding in another batch shape cannot turn it.
"""

from __future__ import annotations

import torch

from steering.engine.step import Step
from steering.ops.read_out import COMPUTED_BEFORE, read_out


def decide_on_host(step: Step, layer: int, x: torch.Tensor, rest: torch.Tensor | None) -> None:
    """Decide the gates that are due at a layer.

    Args:
        step: the pass that is running.
        layer: decoder layer, or the number of layers for the final norm.
        x: ``[T, hidden_size]`` or ``[1, T, hidden_size]``.
        rest: like ``x``; the activation is ``x + rest``.
    """
    tables, requests = step.tables, step.requests
    activations = x.view(-1, x.shape[-1])
    others = None if rest is None else rest.view(-1, rest.shape[-1])
    changed = False
    for due in step.due.get(layer, ()):
        g, tokens = due.gate, due.tokens
        h = activations.index_select(0, tokens).float()
        if others is not None:
            h = h + others.index_select(0, tokens)
        rows = step.rows[tokens].long()
        entries = requests.gates[rows, g].long()
        scores = read_out(
            h,
            tables.gate_weight[entries],
            tables.gate_bias[entries],
            tables.gate_read_out[entries],
        )
        low, high = tables.gate_bounds[entries].unbind(-1)
        opens = (scores > low) & (scores < high)
        positions = step.positions[tokens]
        latched = requests.latched[rows, g]
        decided_at = requests.decided_at[rows, g]
        opens = torch.where(latched & (positions == decided_at), requests.is_open[rows, g], opens)
        new = latched & (positions > decided_at)
        if new.any():
            requests.is_open[rows[new], g] = opens[new]
            requests.decided_at[rows[new], g] = positions[new]
            requests.score[rows[new], g] = scores[new]
        counted = opens & ~latched & (step.decides[tokens] >> COMPUTED_BEFORE & 1 == 0)
        if counted.any():
            requests.opened[:, g].index_add_(0, rows[counted], counted[counted].int())
            packed = positions[counted].long() << 32 | (
                scores[counted].view(torch.int32).long() & 0xFFFFFFFF
            )
            requests.first_open[:, g].scatter_reduce_(0, rows[counted], packed, "amin")
        masks = step.masks[tokens] | opens.int() << g
        step.masks[tokens] = masks
        slots = requests.case_slots[rows, masks.long(), step.cases[tokens].long()]
        if not torch.equal(slots, step.slots[tokens]):
            step.slots[tokens] = slots
            changed = True
    if changed:
        step.recount()
