"""Where a loaded model can be edited: its decoder layers, their attention, their blocks, its final norm.

vLLM has over a hundred model files and a backend for Hugging Face's own classes. Names differ between them,
structure hardly does: one list of decoder layers; in each, one child with attention and one with the MLP;
beside the list, one norm. That structure is looked for, and what does not have it is refused: a server
that hooks the wrong module would answer as if nothing were wrong. Nothing here changes a model.

Checked against vLLM 0.32:

* ``make_layers`` and ``PPMissingLayer`` (``model_executor/models/utils.py``): the list holds a placeholder
  for every layer of another pipeline stage. Weight offloading (``model_executor/offloader``) replaces the
  ``forward`` of layers, and one of its ways calls the layer inside the layer, so that hooks would run twice.
* ``Attention.forward`` and ``MLAAttention.forward`` (``model_executor/layers/attention``) return
  ``[T, num_heads · value_width]``, heads of this rank side by side, before the output projection.
* ``transformers/`` calls ``forward`` of the ``Attention`` *instance*: forward hooks on it do not fire
  there. Wrapping the instance's ``forward`` works everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from directions.errors import TrimtabError

NumberedLayers = Sequence[tuple[int, nn.Module]]


def find_decoder_layers(model: nn.Module, num_layers: int) -> list[tuple[int, nn.Module]]:
    """The decoder layers that this process runs, each with its 0-based number in the whole model.

    Args:
        model: the loaded model of this rank.
        num_layers: what the configuration says.

    Raises:
        TrimtabError: ``E_SITE_LAYERS`` when not exactly one list fits the configuration, or when the
            forward pass of a layer has been replaced.
    """
    counts = [(_count_layers(found), found) for found in _module_lists(model)]
    # Some models hold the same layers in a second list.
    fitting = {
        tuple(id(layer) for layer in found): found
        for count, found in counts
        if count == num_layers == len(found)
    }
    if len(fitting) != 1:
        best = max((count for count, _ in counts), default=0)
        found = (
            f"{len(fitting)} lists have that many"
            if fitting
            else f"the longest list of layers with attention has {best}"
        )
        raise TrimtabError(
            "E_SITE_LAYERS",
            f"the decoder layers of {type(model).__name__} could not be told: the configuration says "
            f"{num_layers}, {found}",
            field="model",
            expected=f"one list of {num_layers} layers with attention",
        )
    (stack,) = fitting.values()
    layers = [(n, layer) for n, layer in enumerate(stack) if not _is_elsewhere(layer)]
    for number, layer in layers:
        if "forward" in vars(layer):
            raise TrimtabError(
                "E_SITE_LAYERS",
                f"the forward pass of layer {number} has been replaced, as vLLM's weight offloading "
                f"does; an edit after it may be applied twice",
                field="model",
                expected="decoder layers as vLLM makes them; no --cpu-offload-gb",
            )
    return layers


def residual_stream(
    output: Any, number: int, hidden_size: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The tensor of a decoder layer's output whose change changes the stream, and what is added to it.

    Models that keep several streams, or that wind them into one wide row, would be edited in the wrong
    place, so the shape is checked as well. A stream that is cut along its tokens looks like any other and
    has to be refused by configuration.

    Args:
        output: ``(hidden_states, residual)``, whose sum is the stream and whose second part is edited,
            ``(stream, None)``, ``(stream,)`` or the stream itself.
        number: the layer's, for the message.
        hidden_size: the configuration's.

    Returns:
        Each ``[T, hidden_size]``, or ``[1, T, hidden_size]`` from vLLM's Transformers backend; the second is
        ``None`` where the first is the whole stream.

    Raises:
        TrimtabError: ``E_SITE_FORM``; the first forward pass raises it or none does, since a layer's form
            does not depend on the batch.
    """
    stream = output
    if isinstance(output, tuple) and 1 <= len(output) <= 2:
        stream = output[_place(output)]
    if not isinstance(stream, torch.Tensor):
        raise _no_stream(number, hidden_size, f"it returns {_names(output)}")
    shape = stream.shape
    if shape[-1] != hidden_size or not (len(shape) == 2 or (len(shape) == 3 and shape[0] == 1)):
        raise _no_stream(number, hidden_size, f"it has the shape {list(shape)}")
    rest = output[0] if isinstance(output, tuple) and _place(output) == 1 else None
    return stream, rest


def with_stream(output: Any, stream: torch.Tensor) -> Any:
    """A decoder layer's output with another stream in the place of :func:`residual_stream`'s."""
    if not isinstance(output, tuple):
        return stream
    place = _place(output)
    return (*output[:place], stream, *output[place + 1 :])


def refuse_partial_sums(model: nn.Module, tensor_parallel: int) -> None:
    """Refuse a model whose layers hand on a part of a sum, which the next layer's norm completes.

    vLLM's model packages of their own (``vllm.models``: DeepSeek-V3.2, MiniMax-M3, Kimi-K3 …) fuse the sum
    over tensor-parallel ranks into that norm, so between layers no rank has the stream.

    Raises:
        TrimtabError: ``E_SITE_STREAM`` with several tensor-parallel ranks.
    """
    if tensor_parallel > 1 and type(model).__module__.startswith("vllm.models."):
        raise TrimtabError(
            "E_SITE_STREAM",
            f"the layers of {type(model).__name__} hand on partial sums where there are several "
            "tensor-parallel ranks, so there is no residual stream between them to edit or to read",
            field="--tensor-parallel-size",
            expected="1, for this model",
        )


def find_attention(layer: nn.Module, number: int = 0) -> tuple[nn.Module, int, int]:
    """The attention whose output holds the heads, before the output projection.

    Args:
        layer: a decoder layer.
        number: the layer's, for the message.

    Returns:
        The module, how many query heads of it this rank has (rank ``r`` has ``r·n`` to ``(r+1)·n - 1``
        of the model's), and the width ``w`` of each in its output ``[T, n·w]``. The module's instance
        attribute ``forward`` is what every caller reaches.

    Raises:
        TrimtabError: ``E_SITE_HEADS`` when the layer has no such attention, several, one whose
            forward pass is its own, since then its output need not be the heads', or one behind which
            a norm undoes a factor that all heads share.
    """
    from vllm.model_executor.layers.attention import Attention, MLAAttention

    found = [m for m in layer.modules() if isinstance(m, (Attention, MLAAttention))]
    if not found:
        others = sorted({type(m).__name__ for m in layer.modules() if _is_attention(m)})
        raise _no_heads(number, f"it has {', '.join(others) or 'no attention'}")
    if len(found) > 1:
        names = ", ".join(type(m).__name__ for m in found)
        raise _no_heads(number, f"it has several: {names}")
    module = found[0]
    if type(module).forward not in (Attention.forward, MLAAttention.forward):
        raise _no_heads(number, f"{type(module).__name__} has a forward pass of its own")
    between = _norm_of_heads(layer, module)
    if between is not None:
        raise _no_heads(number, f"{between} stands between the heads and their output projection")
    width = module.v_head_dim if isinstance(module, MLAAttention) else module.head_size_v
    return module, int(module.num_heads), int(width)


def _norm_of_heads(layer: nn.Module, attention: nn.Module) -> str | None:
    """The name of a norm beside the attention that is not one of what goes into it."""
    for block in layer.modules():
        # A layer that holds its attention itself has its own norms beside it, which come before.
        if block is not layer and any(child is attention for child in block.children()):
            for name, child in block.named_children():
                inputs = name.startswith(("q", "k", "v"))  # q_norm, key_layernorm, kv_a_layernorm …
                if "norm" in type(child).__name__.lower() and not inputs and child is not attention:
                    return name
    return None


def find_blocks(layer: nn.Module, number: int = 0) -> tuple[nn.Module, nn.Module]:
    """The two children of a decoder layer whose outputs join the stream: attention block and MLP block.

    Args:
        layer: a decoder layer.
        number: the layer's, for the message.

    Returns:
        The block with attention and its output projection, and the block with the MLP or the mixture of
        experts. The output of either is a tensor or a tuple that begins with it, ``[T, hidden_size]`` or
        ``[1, T, hidden_size]``. Norms and multipliers that a layer applies to a block's output come
        after it. With tensor parallelism the output may be this rank's part of a sum.

    Raises:
        TrimtabError: ``E_SITE_BLOCK`` when the layer has another structure.
    """
    children = list(layer.named_children())
    attending = [
        (name, child) for name, child in children if any(_is_attention(m) for m in child.modules())
    ]
    if len(attending) != 1:
        raise _no_block(number, "attention", attending)
    name, attention = attending[0]
    # A block that only wraps one, say together with its norm, has an output of another meaning.
    if not any(_is_projection(child) for child in attention.children()):
        raise _no_block(number, "attention", [], f"{name} has no projection of its own")
    rest = [
        (name, child)
        for name, child in children
        if child is not attention and _mixes_features(child)
    ]
    if len(rest) != 1:
        raise _no_block(number, "MLP", rest)
    if any(p.dim() > 1 for p in layer.parameters(recurse=False)):
        raise _no_block(number, "MLP", [], "the layer has weights of its own between its blocks")
    return attention, rest[0][1]


def find_final_norm(model: nn.Module, layers: NumberedLayers) -> nn.Module | None:
    """The norm between the last decoder layer and the output head.

    Args:
        model: the loaded model of this rank.
        layers: of :func:`find_decoder_layers`, not empty.

    Returns:
        The norm, whose output is ``[T, hidden_size]`` or ``[1, T, hidden_size]``, or a tuple that begins
        with it; ``None`` on a pipeline stage that does not have the last layer.

    Raises:
        TrimtabError: ``E_SITE_NORM`` when not exactly one module can be the norm.
    """
    norms: list[nn.Module] = []
    for parent in model.modules():
        siblings = list(parent.children())
        for position, stack in enumerate(siblings):
            if isinstance(stack, nn.ModuleList) and _holds(stack, layers):
                if _is_elsewhere(stack[-1]):
                    return None
                beside = [module for module in siblings if _is_norm(module)]
                if len(beside) > 1:
                    # One of them belongs to the embedding, which is made before the layers.
                    beside = [module for module in siblings[position + 1 :] if _is_norm(module)]
                norms += beside
    if len(norms) != 1:
        raise TrimtabError(
            "E_SITE_NORM",
            f"the final norm of {type(model).__name__} could not be told: {len(norms)} modules beside "
            f"the decoder layers can be it",
            field="model",
            expected="one norm beside the list of decoder layers",
        )
    return norms[0]


def _holds(stack: nn.ModuleList, layers: NumberedLayers) -> bool:
    held = {id(module) for module in stack}
    return all(id(layer) in held for _, layer in layers)


def _place(output: tuple[Any, ...]) -> int:
    return 0 if output[-1] is None else len(output) - 1


def _module_lists(model: nn.Module) -> list[nn.ModuleList]:
    return [module for module in model.modules() if isinstance(module, nn.ModuleList)]


def _count_layers(modules: nn.ModuleList) -> int:
    return sum(
        _is_elsewhere(layer) or any(_is_attention(m) for m in layer.modules()) for layer in modules
    )


def _is_attention(module: nn.Module) -> bool:
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    return isinstance(module, AttentionLayerBase)


def _is_elsewhere(module: nn.Module) -> bool:
    """Whether a module stands for one that another pipeline stage runs."""
    from vllm.model_executor.models.utils import PPMissingLayer

    return isinstance(module, PPMissingLayer)


def _is_projection(module: nn.Module) -> bool:
    from vllm.model_executor.layers.linear import LinearBase

    # An adapter's wrapper holds the projection that it replaces.
    return isinstance(getattr(module, "base_layer", module), LinearBase)


def _mixes_features(module: nn.Module) -> bool:
    """Whether a module does more than a norm does.

    Matrices alone do not tell: on CPU, loading packs those of projections into another form.
    """
    return any(_is_projection(m) for m in module.modules()) or any(
        p.dim() > 1 for p in module.parameters()
    )


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not _mixes_features(module)


def _names(output: Any) -> str:
    if isinstance(output, tuple):
        return f"a tuple of {', '.join(type(part).__name__ for part in output) or 'nothing'}"
    return type(output).__name__


def _no_stream(number: int, hidden_size: int, reason: str) -> TrimtabError:
    return TrimtabError(
        "E_SITE_FORM",
        f"the stream after layer {number} is not one row of {hidden_size} for each token: {reason}",
        field="model",
        expected=f"[tokens, {hidden_size}] or [1, tokens, {hidden_size}]",
    )


def _no_heads(number: int, reason: str) -> TrimtabError:
    return TrimtabError(
        "E_SITE_HEADS",
        f"the heads of layer {number} cannot be told: {reason}",
        field="model",
        expected="one attention in each layer, whose output is [tokens, heads · width]",
    )


def _no_block(
    number: int, block: str, found: Sequence[tuple[str, nn.Module]], reason: str = ""
) -> TrimtabError:
    names = ", ".join(name for name, _ in found)
    found_text = reason or (f"{len(found)} children can be it: {names}" if found else "none")
    return TrimtabError(
        "E_SITE_BLOCK",
        f"the {block} block of layer {number} cannot be told: {found_text}",
        field="model",
        expected="one child with attention and one other child with weights in each layer",
    )
