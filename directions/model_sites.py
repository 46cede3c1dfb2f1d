"""Where things are in a Hugging Face model: its decoder layers, their blocks, their heads, its final norm.

Every site is told from the module tree, by what decoders have in common, and held against the
configuration. What fits none or several readings is refused: a method that reads the wrong place, or
a reference that edits it, would call something wrong right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

from torch import nn

Block = Literal["attention", "mlp"]

_OUTPUT_PROJECTIONS: Final = ("o_proj", "out_proj", "c_proj", "dense", "wo")
"""What decoders call the linear map from all heads' outputs back to the residual stream."""

_HEAD_WIDTHS: Final = ("v_head_dim", "head_dim", "head_size")
"""Where an attention module states the width of one head's output; that of the values first, which
differs from the queries' under multi-head latent attention."""


@dataclass(frozen=True)
class Heads:
    """The heads of one attention module, side by side in the input of its output projection.

    Attributes:
        projection: the linear map; its input is ``[..., count · width]``, head ``i`` at
            ``[i · width, (i + 1) · width)``.
        count: query heads.
        width: of one head's output.
    """

    projection: nn.Module
    count: int
    width: int


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The model's decoder layers: its longest list of modules that contain attention.

    Where the configuration says how many layers there are, only lists of that length count, so that
    a vision tower with more layers than the language model is not mistaken for it.

    Raises:
        ValueError: there is no such list, or more than one of the same length.
    """
    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 0
        and all(_contains_attention(child) for child in module)
    ]
    expected = _stated(model, "num_hidden_layers")
    if expected is not None:
        lists = [found for found in lists if len(found) == expected]
    longest = max((len(found) for found in lists), default=0)
    candidates = [found for found in lists if len(found) == longest]
    if len(candidates) != 1:
        raise ValueError(
            f"{len(candidates)} lists of decoder layers in {type(model).__name__}"
            + (f", whose configuration says {expected} layers" if expected is not None else "")
        )
    return candidates[0]


def block_of(layer: nn.Module, block: Block) -> nn.Module:
    """A decoder layer's attention, or its MLP or mixture of experts: one of its direct children.

    The children that hold matrices (norms and dropouts hold none) must be exactly these two. The
    site is what the module returns, or the first part of that where it is a tuple.

    Raises:
        ValueError: the layer's children are others, or more.
    """
    children = {name: child for name, child in layer.named_children() if _holds_matrix(child)}
    attention = [child for name, child in children.items() if _is_attention(name, child)]
    others = [child for name, child in children.items() if not _is_attention(name, child)]
    if len(attention) != 1 or len(others) != 1:
        raise ValueError(
            f"the attention and MLP modules of {type(layer).__name__} cannot be told: its children "
            f"with matrices are {', '.join(children) or 'none'}"
        )
    return attention[0] if block == "attention" else others[0]


def heads_of(model: nn.Module, layer: nn.Module) -> Heads:
    """The heads of a decoder layer, at the input of its attention's output projection.

    Raises:
        ValueError: the projection cannot be told, or its width is not that of the heads that the
            module and the configuration state.
    """
    attention = block_of(layer, "attention")
    named = [child for name, child in attention.named_children() if name in _OUTPUT_PROJECTIONS]
    if len(named) != 1:
        raise ValueError(
            f"{len(named)} of the children of {type(attention).__name__} are named as an output "
            f"projection is ({', '.join(_OUTPUT_PROJECTIONS)}); one is needed"
        )
    # GPT-2's Conv1D, a linear map with its matrix transposed, calls the width of its input ``nx``.
    total = getattr(named[0], "in_features", None) or getattr(named[0], "nx", None)
    width = next((found for key in _HEAD_WIDTHS if (found := getattr(attention, key, None))), None)
    count = _stated(model, "num_attention_heads")
    if total is None or width is None or count is None or count * width != total:
        raise ValueError(
            f"the heads of {type(attention).__name__} cannot be told: its output projection takes "
            f"{total} numbers, the configuration says {count} heads, the module a width of {width}"
        )
    return Heads(named[0], count, width)


def final_norm(model: nn.Module) -> nn.Module:
    """The norm after the last decoder layer: the one norm that stands beside the list of layers.

    Raises:
        ValueError: there is none, or more than one.
    """
    layers = decoder_layers(model)
    beside = [
        sibling
        for parent in model.modules()
        if any(child is layers for child in parent.children())
        for sibling in parent.children()
        if "norm" in type(sibling).__name__.lower()
    ]
    if len(beside) != 1:
        raise ValueError(f"{len(beside)} norms beside the decoder layers; one is needed")
    return beside[0]


def _contains_attention(layer: nn.Module) -> bool:
    return any(
        _is_attention(name.rpartition(".")[2], module)
        for name, module in layer.named_modules()
        if name
    )


def _is_attention(name: str, module: nn.Module) -> bool:
    return "attention" in type(module).__name__.lower() or name.endswith("attn")


def _holds_matrix(module: nn.Module) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters())


def _stated(model: nn.Module, key: str) -> int | None:
    """What the text model's configuration says, where there is one and it says it."""
    config: Any = getattr(model, "config", None)
    if config is None:
        return None
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(text, key, None)
    return found if isinstance(found, int) else None
