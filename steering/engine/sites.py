"""Where the operators go: finding a model's decoder layers and hooking the residual stream after each.

vLLM has over a hundred model files; what they share is one list of decoder layers, each with attention
inside. The longest such list is taken, checked against the model's configuration, and anything that does
not fit is refused: a server that hooks the wrong list would answer as if nothing were wrong.

Checked against vLLM 0.32 (``model_executor/models/utils.py`` ``make_layers``, ``PPMissingLayer``;
``model_executor/layers/attention_layer_base.py``). A decoder layer returns either ``(hidden_states,
residual)``, whose sum is the stream and whose second part is edited, or the stream itself. vLLM's own
models carry ``[T, hidden_size]``, its Transformers backend ``[1, T, hidden_size]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from directions.errors import TrimtabError
from steering.engine.tables import SteeringTables
from steering.ops.residual_add import residual_add, residual_add_, residual_add_on_host


def find_decoder_layers(model: nn.Module, num_layers: int) -> list[tuple[int, nn.Module]]:
    """The decoder layers that this process runs, each with its 0-based number in the whole model.

    Args:
        model: the loaded model of this rank.
        num_layers: what the configuration says.

    Raises:
        TrimtabError: ``E_SITE_LAYERS`` when no list fits the configuration.
    """
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.models.utils import PPMissingLayer

    best: nn.ModuleList | None = None
    best_count = 0
    for module in model.modules():
        if not isinstance(module, nn.ModuleList):
            continue
        count = sum(
            isinstance(layer, PPMissingLayer)
            or any(isinstance(m, AttentionLayerBase) for m in layer.modules())
            for layer in module
        )
        if count > best_count:
            best, best_count = module, count
    if best is None or len(best) != num_layers or best_count != num_layers:
        found = "none" if best is None else f"{best_count} of {len(best)} with attention"
        raise TrimtabError(
            "E_SITE_LAYERS",
            f"the decoder layers of {type(model).__name__} could not be told: the configuration says "
            f"{num_layers}, the longest list of layers with attention has {found}",
            field="model",
            expected=f"one list of {num_layers} layers with attention",
        )
    return [(n, layer) for n, layer in enumerate(best) if not isinstance(layer, PPMissingLayer)]


def residual_stream(output: Any) -> torch.Tensor:
    """The tensor of a decoder layer's output whose change changes the stream.

    Raises:
        TypeError: a form that is not known; raised by the first forward pass, before the server is
            ready, since a layer's form does not depend on the batch.
    """
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, tuple) and len(output) == 1 and isinstance(output[0], torch.Tensor):
        return output[0]
    if isinstance(output, tuple) and len(output) == 2 and isinstance(output[1], torch.Tensor):
        return output[1]
    raise TypeError(f"E_SITE_FORM: cannot steer a decoder layer that returns {type(output)}")


def _hook(number: int, tables: SteeringTables) -> Callable[[Any, Any, Any], Any]:
    """The forward hook of one layer.

    Traced code takes its tensors from the layer's buffers. Code that runs eagerly on the host also
    looks at what the step's description already says, which a captured graph could not.
    """
    on_host = tables.slots.device.type == "cpu"
    table = tables.table[number]
    slots, strengths = tables.slots, tables.strengths
    count = tables.counts[number : number + 1]
    edited = tables.edited

    def edit(module: Any, args: Any, output: Any) -> Any:
        if torch.compiler.is_compiling():
            stream = residual_add(
                residual_stream(output),
                module.trimtab_table,
                module.trimtab_slots,
                module.trimtab_strengths,
            )
            return (*output[:-1], stream) if isinstance(output, tuple) else stream
        stream = residual_stream(output)
        if not on_host:
            residual_add_(stream, table, slots, strengths, count)
        elif steered_here := edited[number]:
            residual_add_on_host(stream, table, slots, strengths, int(steered_here), tables.uniform)
        return None

    return edit


def hook_residual(layers: list[tuple[int, nn.Module]], tables: SteeringTables) -> None:
    """Put the residual operator behind each layer.

    A forward hook, because it is traced by ``torch.compile`` and called on every path that vLLM takes
    to a decoder layer. The tables are buffers of the layer, so every layer's traced code is the same
    and compiled once.
    """
    for number, layer in layers:
        for name, tensor in (
            ("trimtab_table", tables.table[number]),
            ("trimtab_slots", tables.slots),
            ("trimtab_strengths", tables.strengths),
        ):
            layer.register_buffer(name, tensor, persistent=False)
        layer.register_forward_hook(_hook(number, tables))
