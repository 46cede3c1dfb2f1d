"""What a probe makes of an activation.

``affine``: ``sigmoid(w·h + b)``, a linear probe's probability.
``cosine``: ``cos(h, tanh((w·h / ‖w‖²) w))``, the similarity of an activation to what of it lies along ``w``
(the condition of CAST, Lee et al. 2024, arXiv 2409.05907, section 3.2); 0 where either vector is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

READ_OUTS: Final = ("affine", "cosine")
"""The names of the kinds, in the order of their numbers."""

AFFINE: Final = READ_OUTS.index("affine")
COSINE: Final = READ_OUTS.index("cosine")

COMPUTED_BEFORE: Final = 8
"""The bit, beside those of the gates that are decided at a token, that says that the token was computed
before: a gate per token does not count it twice."""


def read_out(
    h: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor, kinds: torch.Tensor
) -> torch.Tensor:
    """One score per row.

    Args:
        h: ``[n, hidden_size] float32``.
        weights: ``[n, hidden_size] float32``.
        bias: ``[n] float32``.
        kinds: ``[n]``: ``AFFINE`` or ``COSINE``.

    Returns:
        ``[n] float32``.
    """
    along = (h * weights).sum(-1)
    scores = torch.sigmoid(along + bias)
    if (kinds == COSINE).any():
        share = along / (weights * weights).sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        part = torch.tanh(share[:, None] * weights)
        norms = h.norm(dim=-1) * part.norm(dim=-1)
        cosine = torch.where(norms > 0, (h * part).sum(-1) / norms, 0.0)
        scores = torch.where(kinds == COSINE, cosine, scores)
    return scores


def read_out_all(
    h: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor, kinds: Sequence[int]
) -> torch.Tensor:
    """Every score of every row.

    Args:
        h: ``[n, hidden_size] float32``.
        weights: ``[P, hidden_size] float32``.
        bias: ``[P] float32``.
        kinds: ``P`` of ``AFFINE`` or ``COSINE``.

    Returns:
        ``[P, n] float32``.
    """
    along = weights @ h.T
    scores = torch.sigmoid(along + bias[:, None])
    for p in [p for p, kind in enumerate(kinds) if kind == COSINE]:
        w = weights[p]
        share = along[p] / (w @ w).clamp_min(torch.finfo(torch.float32).tiny)
        part = torch.tanh(share[:, None] * w)
        norms = h.norm(dim=-1) * part.norm(dim=-1)
        scores[p] = torch.where(norms > 0, (h * part).sum(-1) / norms, 0.0)
    return scores
