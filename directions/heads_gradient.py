"""Heads by gradient: ``−∂f/∂s_{l,h}`` at ``s = 1``, to first order what ``s = 0`` changes in the objective."""

from __future__ import annotations

import torch

from directions.head_scales import every_head, scaled
from directions.language_model import LanguageModel
from directions.objective import Objective


def evidence(
    model: LanguageModel, objective: Objective, ids: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """The sum over the batch's rows, ``[num_layers, num_heads]``; one pass forward and one back."""
    heads = every_head(model)
    factors = torch.ones(len(heads), heads[0].count, device=ids.device, requires_grad=True)
    with torch.enable_grad(), scaled(heads, factors):
        total = objective.values(model, ids, mask).sum()
        (gradient,) = torch.autograd.grad(total, factors)
    return -gradient
