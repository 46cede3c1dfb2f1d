"""Heads by cause: the objective with a head scaled to nothing, minus the objective as it is."""

from __future__ import annotations

import torch

from directions.head_scales import every_head, scaled
from directions.language_model import LanguageModel
from directions.objective import Objective


def evidence(
    model: LanguageModel, objective: Objective, ids: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """The sum over the batch's rows, ``[num_layers, num_heads]``; one pass a head and row, in batches."""
    heads = every_head(model)
    layers, count = len(heads), heads[0].count
    found = torch.zeros(layers * count, device=ids.device)
    at_once = model.reading.batch_size
    with torch.inference_mode():
        for row, attended in zip(ids, mask, strict=True):
            length = int(attended.sum())
            one, seen = row[None, :length], attended[None, :length]
            plain = objective.values(model, one, seen)[0]
            for first in range(0, layers * count, at_once):
                chosen = range(first, min(first + at_once, layers * count))
                factors = torch.ones(len(chosen), layers * count, device=ids.device)
                factors[torch.arange(len(chosen)), torch.tensor(chosen)] = 0.0
                rows = one.expand(len(chosen), -1), seen.expand(len(chosen), -1)
                with scaled(heads, factors.view(-1, layers, count)):
                    found[chosen.start : chosen.stop] += objective.values(model, *rows) - plain
    return found.view(layers, count)
