"""Where the operators go: hooks on a loaded model.

Per decoder layer there are four sites: the attention output before its projection (heads), the outputs of
the attention and of the MLP block, and the residual stream after the layer; behind the layers there is
the final norm. A layer returns either ``(hidden_states, residual)``, whose sum is the stream and whose
second part is edited, or the stream itself. vLLM's own models carry ``[T, hidden_size]``, its
Transformers backend ``[1, T, hidden_size]``.

On the stream after a layer, probes and gates read first, then projections act, then additions. Additions are
plain torch in traced code; everything else is behind the operators of :mod:`steering.ops.site`. Code that
runs eagerly on a CPU asks the step what there is to do and mostly returns at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from steering.engine.discovery import residual_stream, with_stream
from steering.engine.gates import decide_on_host
from steering.engine.step import Step
from steering.engine.tables import KINDS
from steering.ops.project import project_on_host
from steering.ops.residual_add import residual_add, residual_add_, residual_add_on_host
from steering.ops.scale_heads import scale_heads_on_host
from steering.ops.site import heads_, register_site, stream_

ADD, HEADS, RESIDUAL, ATTENTION, MLP = range(len(KINDS))


@dataclass
class LayerSite:
    """One site of one layer; see :class:`steering.ops.site.Site`.

    Attributes:
        layer: its number in the whole model; the number of layers for the final norm.
        table: which of :data:`steering.engine.tables.KINDS` acts here.
        num_heads: query heads of this rank, where ``table`` is ``HEADS``.
        gates: whether gates read here.
        probes: whether probes are read here.
    """

    step: Step
    layer: int
    table: int | None
    gates: bool = False
    num_heads: int = 0
    probes: bool = False

    def stream(self, x: torch.Tensor, rest: torch.Tensor | None) -> None:
        step, layer = self.step, self.layer
        if not step.on_host:
            self._launch(x, rest)
            return
        if self.probes and layer in step.reader.due:
            step.reader.read_on_host(layer, x, rest)
        if self.gates and layer in step.due:
            decide_on_host(step, layer, x, rest)
        if self.table is not None and step.edited[self.table, layer]:
            tables, site = step.tables, KINDS[self.table]
            project_on_host(
                x,
                rest,
                tables.basis[site][layer],
                tables.parameters[site][layer],
                tables.used[site][layer],
                step.slots,
                step.strengths,
                step.uniform,
            )

    def _launch(self, x: torch.Tensor, rest: torch.Tensor | None) -> None:
        from steering.ops import gate_triton, project_triton, read_out_triton

        step, tables, layer = self.step, self.step.tables, self.layer
        if self.probes:
            read_out_triton.launch(x, rest, layer, step.reader.tensors)
        if self.gates:
            gate_triton.launch(x, rest, layer, step.gate_tensors)
        if self.table is not None:
            site = KINDS[self.table]
            project_triton.launch(
                x,
                rest,
                tables.basis[site][layer],
                tables.parameters[site][layer],
                tables.used[site][layer],
                step.slots,
                step.strengths,
                step.counts[self.table, layer : layer + 1],
            )

    def heads(self, out: torch.Tensor) -> None:
        step, tables, layer = self.step, self.step.tables, self.layer
        if not step.on_host:
            from steering.ops import scale_heads_triton

            scale_heads_triton.launch(
                out,
                tables.heads[layer],
                tables.renormalise[layer],
                step.slots,
                step.strengths,
                step.counts[HEADS, layer : layer + 1],
                self.num_heads,
            )
        elif step.edited[HEADS, layer]:
            scale_heads_on_host(
                out,
                tables.heads[layer],
                tables.renormalise[layer],
                tables.live_slots[HEADS, layer],
                step.slots,
                step.strengths,
                self.num_heads,
                step.uniform,
            )


def _hook_residual(
    number: int, step: Step, site: LayerSite | None
) -> Callable[[Any, Any, Any], Any]:
    """The forward hook of one layer.

    Traced code takes its tensors from the layer's buffers. Code that runs eagerly on the host also
    looks at what the step's description already says, which a captured graph could not.
    """
    table = step.tables.add[number]
    count = step.counts[ADD, number : number + 1]
    edited = step.edited
    hidden_size = step.tables.sizes.hidden_size

    def edit(module: Any, args: Any, output: Any) -> Any:
        x, rest = residual_stream(output, number, hidden_size)
        if torch.compiler.is_compiling():
            if site is not None:
                stream_(x, rest, module.trimtab_slots, module.trimtab_site)
            x = residual_add(
                x, module.trimtab_table, module.trimtab_slots, module.trimtab_strengths
            )
            return with_stream(output, x)
        if site is not None:
            site.stream(x, rest)
        if not step.on_host:
            residual_add_(x, table, step.slots, step.strengths, count)
        elif steered_here := edited[ADD, number]:
            residual_add_on_host(
                x, table, step.slots, step.strengths, int(steered_here), step.uniform
            )
        return None

    return edit


def hook_residual(
    layer: nn.Module,
    number: int,
    step: Step,
    *,
    gates: bool,
    projections: bool,
    probes: bool,
) -> None:
    """Put reading and editing of the stream behind a decoder layer.

    A forward hook, because it is traced by ``torch.compile`` and called on every path that vLLM takes
    to a decoder layer. The tables are buffers of the layer, so every layer's traced code is the same
    and compiled once.
    """
    site = None
    if gates or projections or probes:
        table = RESIDUAL if projections else None
        site = LayerSite(step, number, table, gates, probes=probes)
        layer.register_buffer("trimtab_site", register_site(site), persistent=False)
    for name, tensor in (
        ("trimtab_table", step.tables.add[number]),
        ("trimtab_slots", step.slots),
        ("trimtab_strengths", step.strengths),
    ):
        layer.register_buffer(name, tensor, persistent=False)
    layer.register_forward_hook(_hook_residual(number, step, site))


def _register(module: nn.Module, site: LayerSite, step: Step) -> None:
    """Give traced code of a module what it calls its site with."""
    module.register_buffer("trimtab_site", register_site(site), persistent=False)
    module.register_buffer("trimtab_slots", step.slots, persistent=False)


def _hook_output(module: nn.Module, site: LayerSite, step: Step) -> None:
    """Call a site with what a module returns, or with the first part of it."""
    _register(module, site, step)

    def visit(module: Any, args: Any, output: Any) -> None:
        x = output if isinstance(output, torch.Tensor) else output[0]
        if torch.compiler.is_compiling():
            stream_(x, None, module.trimtab_slots, module.trimtab_site)
        else:
            site.stream(x, None)

    module.register_forward_hook(visit)


def hook_block(block: nn.Module, number: int, step: Step, table: int) -> None:
    """Put projections behind the attention or the MLP block of a layer."""
    _hook_output(block, LayerSite(step, number, table), step)


def hook_final_norm(norm: nn.Module, step: Step, *, gates: bool, probes: bool) -> None:
    """Let gates and probes read the final norm's output."""
    site = LayerSite(step, step.tables.sizes.num_layers, None, gates=gates, probes=probes)
    _hook_output(norm, site, step)


def hook_heads(attention: nn.Module, number: int, step: Step, num_heads: int) -> None:
    """Scale heads between attention and its output projection.

    The instance's ``forward`` is wrapped, since vLLM's Transformers backend calls that and passes forward
    hooks by.
    """
    site = LayerSite(step, number, HEADS, num_heads=num_heads)
    _register(attention, site, step)
    forward: Callable[..., torch.Tensor] = attention.forward

    def scaled(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = forward(*args, **kwargs)
        if torch.compiler.is_compiling():
            heads_(out, attention.trimtab_slots, attention.trimtab_site)
        else:
            site.heads(out)
        return out

    attention.forward = scaled
