"""A factor on every attention head of a Hugging Face model, for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from directions.errors import TrimtabError
from directions.language_model import LanguageModel
from directions.model_sites import Heads, heads_of


def every_head(model: LanguageModel) -> list[Heads]:
    """The heads of each layer.

    Raises:
        TrimtabError: E_SITE_HEADS where they cannot be told.
    """
    try:
        return [heads_of(model.network, layer) for layer in model.layers]
    except ValueError as error:
        raise TrimtabError("E_SITE_HEADS", str(error), field="MODEL") from error


@contextmanager
def scaled(heads: Sequence[Heads], factors: torch.Tensor) -> Iterator[None]:
    """Multiply each head's output, at every token, before the output projection.

    Args:
        heads: of each layer.
        factors: ``[num_layers, num_heads]``, or ``[rows, num_layers, num_heads]`` for a factor of each
            sequence's own.
    """

    def hook_of(layer: int, of: Heads) -> Any:
        def hook(module: Any, inputs: Any) -> Any:
            a = inputs[0]
            by = factors[..., layer, :].to(a.dtype)
            # [rows, 1, heads, 1] or [heads, 1] against [rows, tokens, heads, width].
            by = by[:, None, :, None] if by.dim() == 2 else by[:, None]
            return ((a.unflatten(-1, (of.count, of.width)) * by).flatten(-2), *inputs[1:])

        return hook

    with ExitStack() as stack:
        for layer, of in enumerate(heads):
            handle = of.projection.register_forward_pre_hook(hook_of(layer, of))
            stack.callback(handle.remove)
        yield
