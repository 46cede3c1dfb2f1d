"""What is found in a model is what the reference has there, and what cannot be told is refused."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from directions.errors import TrimtabError
from steering.engine.discovery import (
    find_attention,
    find_blocks,
    find_decoder_layers,
    find_final_norm,
    refuse_partial_sums,
    residual_stream,
    with_stream,
)
from steering.reference import decoder_layers
from tests.steering.engine.architectures import ARCHITECTURES, Architecture, Served
from tests.steering.engine.harness import Request, run

pytestmark = pytest.mark.engine

STEPS = 4


def leading(output: Any) -> torch.Tensor:
    """The tensor of a block's or norm's output."""
    return output[0] if isinstance(output, tuple) else output


def form(output: Any, stream: torch.Tensor) -> tuple[str, int]:
    if not isinstance(output, tuple):
        return "stream", stream.dim()
    return "pair" if output[1] is not None else "stream and none", stream.dim()


class Watch:
    """Outputs by place, one for each time the place was passed."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, int], list[torch.Tensor]] = defaultdict(list)
        self.forms: set[tuple[str, int]] = set()
        self._undo: list[Callable[[], None]] = []

    def hook(self, place: tuple[str, int], module: nn.Module) -> None:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self.seen[place].append(leading(output).clone())

        self._undo.append(module.register_forward_hook(keep).remove)

    def hook_layer(self, number: int, module: nn.Module, hidden_size: int) -> None:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            stream, _ = residual_stream(output, number, hidden_size)
            self.forms.add(form(output, stream))
            whole = output[0] + stream if form(output, stream)[0] == "pair" else stream
            self.seen["layer", number].append(whole.clone())

        self._undo.append(module.register_forward_hook(keep).remove)

    def wrap(self, place: tuple[str, int], module: nn.Module) -> None:
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            self.seen[place].append(output.clone())
            return output

        module.forward = forward  # type: ignore[method-assign]
        self._undo.append(lambda: delattr(module, "forward"))

    @contextmanager
    def until_done(self) -> Iterator[None]:
        try:
            yield
        finally:
            for undo in self._undo:
                undo()


def watch_engine(served: Served, architecture: Architecture) -> tuple[Watch, tuple[int, ...], Any]:
    """Answer one prompt with everything that discovery finds watched: places, tokens, widths of heads."""
    world = served.world
    hidden_size = world.fingerprint.hidden_size
    (model,) = served.llm.apply_model(lambda model: model)
    layers = find_decoder_layers(model, world.num_layers)
    assert [n for n, _ in layers] == list(range(world.num_layers))
    watch, heads = Watch(), []
    with watch.until_done():
        for number, layer in layers:
            attention, num_heads, width = find_attention(layer, number)
            heads.append((num_heads, width))
            watch.wrap(("heads", number), attention)
            block, mlp = find_blocks(layer, number)
            watch.hook(("attention", number), block)
            watch.hook(("mlp", number), mlp)
            watch.hook_layer(number, layer, hidden_size)
        norm = find_final_norm(model, layers)
        assert norm is not None
        watch.hook(("norm", 0), norm)
        prompt = tuple(world.prompt("Which way does the wind blow?"))
        (answer,) = run(served.llm, world, [Request(prompt, max_tokens=STEPS)])
    assert watch.forms == {architecture.form}
    return watch, (*prompt, *answer.token_ids[:-1]), heads


def watch_reference(served: Served, architecture: Architecture, text: tuple[int, ...]) -> Watch:
    """The same places in the reference, by their names there; heads are what the projection is given."""
    model, watch = served.world.model, Watch()
    with watch.until_done():
        for number, layer in enumerate(decoder_layers(model)):
            block = getattr(layer, architecture.attention)
            watch.hook(("attention", number), block)
            watch.hook(("mlp", number), getattr(layer, architecture.mlp))
            watch.hook(("layer", number), layer)

            def keep(module: nn.Module, args: Any, number: int = number) -> None:
                watch.seen["heads", number].append(args[0].clone())

            handle = getattr(block, architecture.projection).register_forward_pre_hook(keep)
            watch._undo.append(handle.remove)
        watch.hook(("norm", 0), getattr(model.base_model, architecture.norm))
        with torch.no_grad():
            model(torch.tensor([text]), use_cache=False)
    return watch


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_found_is_what_the_reference_has_there(name, serve_architecture) -> None:
    served, architecture = serve_architecture(name), ARCHITECTURES[name]
    found, text, heads = watch_engine(served, architecture)
    expected = watch_reference(served, architecture, text)
    hidden_size = served.world.fingerprint.hidden_size
    dimensions = architecture.form[1]
    first = len(text) - (STEPS - 1)
    assert set(found.seen) == set(expected.seen)
    for place, outputs in found.seen.items():
        site, number = place
        width = hidden_size
        if site == "heads":
            num_heads, head_width = heads[number]
            assert num_heads == 4
            width = num_heads * head_width
        # Once on every forward pass, over all of its tokens: the prompt, then one at a time.
        shapes = [(first, width)] + [(1, width)] * (STEPS - 1)
        if site != "heads" and dimensions == 3:
            shapes = [(1, *shape) for shape in shapes]
        assert [tuple(output.shape) for output in outputs] == shapes, place
        engine = torch.cat([output.reshape(-1, width) for output in outputs])
        (reference,) = expected.seen[place]
        difference = (engine - reference.reshape(engine.shape)).abs().max()
        assert difference <= 1e-3 * reference.abs().max(), f"{place}: {difference:.2g}"


# What follows is about structure alone, so the modules only have the types that matter.


def attention(base: str = "Attention") -> nn.Module:
    """An instance of one of vLLM's attention classes without what it computes with."""
    from vllm.model_executor.layers import attention as classes

    module = object.__new__(getattr(classes, base))
    nn.Module.__init__(module)
    module.num_heads, module.head_size_v, module.v_head_dim = 4, 8, 16
    return module


def projection() -> nn.Module:
    from vllm.model_executor.layers.linear import LinearBase

    module = object.__new__(LinearBase)
    nn.Module.__init__(module)
    return module


def tree(**children: nn.Module) -> nn.Module:
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


def layer(**others: nn.Module) -> nn.Module:
    """A decoder layer in the usual form, with other children beside the usual or instead of them."""
    usual = {
        "input_layernorm": nn.LayerNorm(8),
        "self_attn": tree(attn=attention(), o_proj=projection()),
        "mlp": tree(down_proj=projection()),
    }
    return tree(**{**usual, **others})


def missing() -> nn.Module:
    from vllm.model_executor.models.utils import PPMissingLayer

    return PPMissingLayer()


def refused(code: str, match: str) -> Any:
    return pytest.raises(TrimtabError, match=rf"{code}.*{match}")


def test_layers_of_another_stage_are_left_out_but_counted() -> None:
    stack = nn.ModuleList([missing(), layer(), layer(), missing()])
    found = find_decoder_layers(tree(layers=stack), 4)
    assert found == [(1, stack[1]), (2, stack[2])]


def test_the_same_layers_in_a_second_list_are_no_other_layers() -> None:
    stack = nn.ModuleList([layer(), layer()])
    model = tree(decoder=tree(own=nn.ModuleList(stack)), layers=stack, norm=nn.LayerNorm(8))
    found = find_decoder_layers(model, 2)
    assert [module for _, module in found] == list(stack)
    assert find_final_norm(model, found) is model.norm


def test_layers_that_cannot_be_told_are_refused() -> None:
    with refused("E_SITE_LAYERS", "says 4, the longest .* has 0"):
        find_decoder_layers(nn.ModuleList([nn.Linear(2, 2)]), 4)
    with refused("E_SITE_LAYERS", "says 4, the longest .* has 2"):
        find_decoder_layers(tree(layers=nn.ModuleList([layer(), layer()])), 4)
    two = {name: nn.ModuleList([layer(), layer()]) for name in ("encoder", "decoder")}
    with refused("E_SITE_LAYERS", "says 2, 2 lists have that many"):
        find_decoder_layers(tree(**two), 2)


def test_layers_whose_forward_pass_is_replaced_are_refused() -> None:
    stack = nn.ModuleList([layer(), layer()])
    stack[1].forward = lambda *args: args  # type: ignore[method-assign]
    with refused("E_SITE_LAYERS", "forward pass of layer 1 has been replaced"):
        find_decoder_layers(tree(layers=stack), 2)


@pytest.mark.parametrize(("base", "width"), [("Attention", 8), ("MLAAttention", 16)])
def test_the_width_of_a_head_is_that_of_its_values(base, width) -> None:
    module = attention(base)
    assert find_attention(layer(self_attn=tree(attn=module))) == (module, 4, width)


def test_heads_that_cannot_be_told_are_refused() -> None:
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.mamba.abstract import MambaBase

    class Mixer(nn.Module, MambaBase):
        """Attention to vLLM's cache, without heads."""

    Mixer.__abstractmethods__ = frozenset()

    class Fused(Attention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError

    fused = object.__new__(Fused)
    nn.Module.__init__(fused)
    for child, reason in (
        (nn.Linear(2, 2), "layer 3 .* no attention"),
        (Mixer(), "layer 3 .* has Mixer"),
        (tree(a=attention(), b=attention("MLAAttention")), "layer 3 .* Attention, MLAAttention"),
        (tree(attn=fused), "layer 3 .* Fused has a forward pass of its own"),
        (
            tree(q_norm=nn.LayerNorm(8), attn=attention(), sub_norm=nn.LayerNorm(8)),
            "layer 3 .* sub_norm stands between",
        ),
    ):
        with refused("E_SITE_HEADS", reason):
            find_attention(layer(self_attn=child), 3)


def test_norms_of_queries_and_keys_are_no_reason_to_refuse() -> None:
    norms = {name: nn.LayerNorm(8) for name in ("q_norm", "k_norm", "kv_a_layernorm")}
    module = attention()
    assert find_attention(layer(self_attn=tree(attn=module, **norms)))[0] is module
    bare = tree(input_layernorm=nn.LayerNorm(8), attn=module)
    assert find_attention(bare)[0] is module


def test_layers_that_hand_on_partial_sums_are_refused_with_several_ranks() -> None:
    fused = type("Fused", (nn.Module,), {"__module__": "vllm.models.deepseek_v32.nvidia.model"})()
    refuse_partial_sums(fused, 1)
    refuse_partial_sums(nn.Linear(2, 2), 2)
    with refused("E_SITE_STREAM", "Fused hand on partial sums"):
        refuse_partial_sums(fused, 2)


def test_blocks_that_cannot_be_told_are_refused() -> None:
    usual = layer()
    assert find_blocks(usual) == (usual.self_attn, usual.mlp)
    for changed, reason in (
        (layer(self_attn=nn.Linear(2, 2)), "attention block of layer 3 .* none"),
        (layer(cross_attn=tree(attn=attention())), "attention block .* self_attn, cross_attn"),
        # A block with its norm, as DBRX has it, returns more than attention.
        (layer(self_attn=tree(norm=nn.LayerNorm(8), attn=layer().self_attn)), "no projection"),
        (layer(self_attn=attention()), "no projection"),
        (layer(mlp=nn.Identity()), "MLP block of layer 3 .* none"),
        # OPT has its MLP spread over the layer; Gemma 3n has more than one.
        (layer(mlp=nn.Identity(), fc1=projection(), fc2=projection()), "MLP block .* fc1, fc2"),
        (layer(laurel=nn.Linear(2, 2)), "MLP block .* mlp, laurel"),
    ):
        with refused("E_SITE_BLOCK", reason):
            find_blocks(changed, 3)


def test_a_layer_that_mixes_streams_between_its_blocks_is_refused() -> None:
    mixing = layer()
    mixing.hc_attn_fn = nn.Parameter(torch.zeros(2, 2))
    with refused("E_SITE_BLOCK", "weights of its own between its blocks"):
        find_blocks(mixing)


def test_the_final_norm_stands_beside_the_layers() -> None:
    stack = nn.ModuleList([layer(), layer()])
    norm, other = nn.LayerNorm(8), nn.LayerNorm(8)
    for model in (
        tree(embed=nn.Embedding(2, 2), layers=stack, norm=norm),
        tree(final_layer_norm=norm, layers=stack),
        tree(embed_norm=other, layers=stack, norm=norm),
    ):
        whole = tree(model=model, lm_head=nn.Linear(2, 2))
        assert find_final_norm(whole, find_decoder_layers(whole, 2)) is norm


def test_a_stage_without_the_last_layer_has_no_final_norm() -> None:
    first = tree(layers=nn.ModuleList([layer(), missing()]), norm=nn.LayerNorm(8))
    assert find_final_norm(first, find_decoder_layers(first, 2)) is None


def test_a_final_norm_that_cannot_be_told_is_refused() -> None:
    stack = nn.ModuleList([layer(), layer()])
    for model, found in (
        (tree(layers=stack, head=nn.Linear(2, 2)), 0),
        (tree(layers=stack, one=nn.LayerNorm(8), two=nn.LayerNorm(8)), 2),
    ):
        with refused("E_SITE_NORM", f"{found} modules"):
            find_final_norm(model, find_decoder_layers(model, 2))


STREAM = torch.zeros(3, 8)
BATCHED = torch.zeros(1, 3, 8)
OTHER = torch.ones(3, 8)


@pytest.mark.parametrize(
    ("output", "place"),
    [((OTHER, STREAM), 1), ((STREAM, None), 0), ((STREAM,), 0), (STREAM, None), (BATCHED, None)],
)
def test_the_stream_is_found_and_put_back_in_its_place(output, place) -> None:
    stream, _ = residual_stream(output, 0, 8)
    assert stream is (output if place is None else output[place])
    changed = with_stream(output, OTHER + 1)
    assert residual_stream(changed, 0, 8)[0] is not stream
    assert torch.equal(residual_stream(changed, 0, 8)[0], OTHER + 1)
    if place is not None:
        assert len(changed) == len(output)
        assert all(
            a is b for n, (a, b) in enumerate(zip(changed, output, strict=True)) if n != place
        )


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (None, "returns NoneType"),
        ((), "returns a tuple of nothing"),
        ((1, 2), "a tuple of int, int"),
        ((STREAM, STREAM, STREAM), "a tuple of Tensor, Tensor, Tensor"),
        ((STREAM, (STREAM, STREAM)), "a tuple of Tensor, tuple"),
        ({"hidden": STREAM}, "returns dict"),
        (torch.zeros(4, 3, 8), r"shape \[4, 3, 8\]"),
        (torch.zeros(3, 32), r"shape \[3, 32\]"),
        ((OTHER, torch.zeros(3, 4, 8)), r"shape \[3, 4, 8\]"),
        (torch.zeros(8), r"shape \[8\]"),
    ],
)
def test_a_layer_whose_output_has_no_known_form_is_refused(output, reason) -> None:
    with refused("E_SITE_FORM", f"layer 2 .* {reason}"):
        residual_stream(output, 2, 8)
