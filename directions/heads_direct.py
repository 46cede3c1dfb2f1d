"""Heads by what they write: ``−(W_O [0 … a_h … 0]) · w'`` at the last token.

``w'`` is the objective's vector in the residual stream (:meth:`directions.objective.Objective.sensitivity`): of
a read-out behind the final norm, ``w' = gain ⊙ w / rms``. That is the contribution of Yin et al. 2025
(arXiv 2510.06036) with the norm folded in, without the bias, which no head writes, and not divided by
``‖w‖``, so that it is in the objective's own unit. A head above the layer that is read contributes nothing.

It is meant for layers that add attention's output to the stream as it is; where a norm follows the output
projection (Gemma, OLMo 2), it is off by that norm.
"""

from __future__ import annotations

from typing import Any

import torch

from directions.head_scales import every_head
from directions.language_model import LanguageModel
from directions.objective import Objective, last


def evidence(
    model: LanguageModel, objective: Objective, ids: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """The sum over the batch's rows, ``[num_layers, num_heads]``; one pass forward."""
    heads = every_head(model)
    outputs: dict[int, torch.Tensor] = {}

    def hook_of(layer: int) -> Any:
        def hook(module: Any, inputs: Any) -> None:
            outputs[layer] = last(inputs[0], mask)

        return hook

    handles = [
        of.projection.register_forward_pre_hook(hook_of(layer)) for layer, of in enumerate(heads)
    ]
    try:
        with torch.inference_mode():
            vector, depth = objective.sensitivity(model, ids, mask)
    finally:
        for handle in handles:
            handle.remove()
    found = torch.zeros(len(heads), heads[0].count, device=ids.device)
    with torch.inference_mode():
        for layer, of in enumerate(heads[:depth]):
            a = outputs[layer]
            parts = torch.zeros(of.count, *a.shape, dtype=a.dtype, device=a.device)
            for head in range(of.count):
                piece = slice(head * of.width, (head + 1) * of.width)
                parts[head, :, piece] = a[:, piece]
            bias = of.projection(torch.zeros_like(a))
            written = (of.projection(parts) - bias).float()
            found[layer] = -(written * vector).sum(dim=(1, 2))
    return found
