"""Sites are found in every architecture that the reference is used on, and nothing is guessed.

Each model is a random one of a few layers. What a site is is judged by what flows through it: a
layer's output is the next one's input, the blocks' outputs are what the layer adds, and the input
of the output projection, taken apart by heads, gives the attention's output back.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from directions.model_sites import (  # noqa: E402
    block_of,
    decoder_layers,
    final_norm,
    heads_of,
)

LAYERS = 3
TEXT = [5, 17, 42, 99, 7, 50, 31]

SIZES = {
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}

# Class prefix, what the sizes above are changed by, width of one head's output. Head widths are
# not hidden_size / heads wherever the architecture allows it.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama": ("Llama", {"head_dim": 16}, 16),
    "qwen2": ("Qwen2", {}, 12),
    "qwen3": ("Qwen3", {"head_dim": 16}, 16),
    "qwen3-moe": ("Qwen3Moe", {"head_dim": 16, **MOE}, 16),
    "mistral": ("Mistral", {"head_dim": 16}, 16),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "head_dim": 16}, 16),
    "gemma2": ("Gemma2", {"head_dim": 16}, 16),
    "gemma3": ("Gemma3", {"head_dim": 16}, 16),
    "phi3": ("Phi3", {}, 12),
    "olmo2": ("Olmo2", {}, 12),
    "gpt-neox": ("GPTNeoX", {}, 12),
    "gpt2": ("GPT2", {}, 12),
    "granite": ("Granite", {"residual_multiplier": 0.5}, 12),
    "deepseek-v2": ("DeepseekV2", LATENT, 10),
    "gpt-oss": ("GptOss", {"head_dim": 16, "num_local_experts": 4}, 16),
}


def build(name: str) -> Any:
    """A random model of an architecture, in float32 and evaluation mode."""
    import transformers

    prefix, changes, _ = ARCHITECTURES[name]
    sizes = {**SIZES, **changes}
    if prefix == "GPT2":
        sizes = {
            "vocab_size": 100,
            "n_embd": 48,
            "n_layer": LAYERS,
            "n_head": 4,
            "n_positions": 64,
            "initializer_range": 0.15,
            "bos_token_id": None,
            "eos_token_id": None,
        }
    config_name = {"Gemma3": "Gemma3TextConfig"}.get(prefix, f"{prefix}Config")
    model_name = {"GPT2": "GPT2LMHeadModel"}.get(prefix, f"{prefix}ForCausalLM")
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**sizes)
    return getattr(transformers, model_name)(config).to(torch.float32).eval()


def first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_sites_are_where_the_numbers_say(name: str) -> None:
    model = build(name)
    layers = decoder_layers(model)
    seen: dict[Any, Any] = {}

    def keep(key: Any, value: Any) -> None:
        assert key not in seen, "a site was passed twice in one pass"
        seen[key] = value.clone()

    handles = []
    for n, layer in enumerate(layers):
        heads = heads_of(model, layer)
        handles += [
            layer.register_forward_pre_hook(
                lambda m, a, k, n=n: keep(("in", n), a[0] if a else k["hidden_states"]),
                with_kwargs=True,
            ),
            layer.register_forward_hook(lambda m, a, o, n=n: keep(("out", n), first(o))),
            heads.projection.register_forward_pre_hook(lambda m, a, n=n: keep(("heads", n), a[0])),
        ]
        handles += [
            block_of(layer, block).register_forward_hook(
                lambda m, a, o, n=n, block=block: keep((block, n), first(o))
            )
            for block in ("attention", "mlp")
        ]
    handles.append(final_norm(model).register_forward_hook(lambda m, a, o: keep("norm", o)))
    logits = model(input_ids=torch.tensor([TEXT]), use_cache=False).logits
    for handle in handles:
        handle.remove()

    assert len(layers) == LAYERS
    for n, layer in enumerate(layers):
        heads = heads_of(model, layer)
        assert (heads.count, heads.width) == (4, ARCHITECTURES[name][2])
        assert seen["heads", n].shape == (1, len(TEXT), heads.count * heads.width)
        # All heads' contributions sum up to the attention's output.
        nothing = torch.zeros_like(seen["heads", n])
        bias = heads.projection(nothing)
        parts = bias.clone()
        for i in range(heads.count):
            only = nothing.clone()
            span = slice(i * heads.width, (i + 1) * heads.width)
            only[..., span] = seen["heads", n][..., span]
            parts += heads.projection(only) - bias
        assert torch.allclose(parts, seen["attention", n], atol=1e-5)
        assert seen["attention", n].abs().max() > 1e-3
        # The two blocks' outputs are what the layer adds, through its norms and multipliers.
        added = seen["out", n] - seen["in", n]
        outputs = [seen["attention", n], seen["mlp", n]]
        if name in ("gemma2", "gemma3", "olmo2"):
            norms = (layer.post_attention_layernorm, layer.post_feedforward_layernorm)
            outputs = [norm(x) for norm, x in zip(norms, outputs, strict=True)]
        multiplier = 0.5 if name == "granite" else 1.0
        assert torch.allclose(added, multiplier * (outputs[0] + outputs[1]), atol=1e-4)
        if n:
            assert torch.equal(seen["in", n], seen["out", n - 1])
    assert torch.equal(final_norm(model)(seen["out", LAYERS - 1]), seen["norm"])
    head = model.get_output_embeddings()(seen["norm"])
    ratio = (logits / head).flatten()
    if name != "gemma2":  # which caps its logits; the others at most scale them
        assert torch.allclose(ratio, ratio[0].expand_as(ratio), rtol=1e-3)


@pytest.fixture(scope="module")
def llama() -> Any:
    return build("llama")


def test_a_layer_with_other_parts_is_refused(llama: Any) -> None:
    layer = copy.deepcopy(llama.model.layers[0])
    layer.adapter = torch.nn.Linear(48, 48)
    with pytest.raises(ValueError, match="self_attn, mlp, adapter"):
        block_of(layer, "mlp")

    twice = copy.deepcopy(llama.model.layers[0])
    twice.cross_attn = torch.nn.Linear(48, 48)
    with pytest.raises(ValueError, match="cannot be told"):
        block_of(twice, "attention")


def test_parts_without_matrices_are_no_blocks(llama: Any) -> None:
    layer = copy.deepcopy(llama.model.layers[0])
    layer.ln_attn = torch.nn.LayerNorm(48)
    layer.dropout = torch.nn.Dropout(0.1)

    assert block_of(layer, "attention") is layer.self_attn
    assert block_of(layer, "mlp") is layer.mlp


@pytest.mark.parametrize("key", ["head_dim", "heads"])
def test_heads_that_do_not_fill_the_projection_are_refused(key: str, llama: Any) -> None:
    model = copy.deepcopy(llama)
    if key == "heads":
        model.config.num_attention_heads = 8
    else:
        for layer in model.model.layers:
            layer.self_attn.head_dim = 12

    with pytest.raises(ValueError, match="takes 64 numbers"):
        heads_of(model, model.model.layers[1])


def test_an_output_projection_of_no_known_name_is_refused(llama: Any) -> None:
    model = copy.deepcopy(llama)
    attention = model.model.layers[0].self_attn
    attention.back = attention.o_proj
    del attention.o_proj

    with pytest.raises(ValueError, match="0 of the children"):
        heads_of(model, model.model.layers[0])


def test_a_final_norm_that_is_missing_or_not_alone_is_refused(llama: Any) -> None:
    without, two = copy.deepcopy(llama), copy.deepcopy(llama)
    del without.model.norm
    two.model.embedding_norm = torch.nn.LayerNorm(48)

    for model, count in ((without, 0), (two, 2)):
        with pytest.raises(ValueError, match=f"{count} norms beside"):
            final_norm(model)


# -- the list of layers ----------------------------------------------------------------------------


class Attention(torch.nn.Module):
    """Stands for attention where layers are looked for."""


def layers_with_attention(count: int) -> Any:
    return torch.nn.ModuleList(
        torch.nn.Sequential(Attention(), torch.nn.Linear(2, 2)) for _ in range(count)
    )


def test_layers_are_the_longest_list_with_attention() -> None:
    other = torch.nn.ModuleDict(
        {
            "vision": layers_with_attention(3),
            "text": layers_with_attention(5),
            "experts": torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(9)),
        }
    )
    assert decoder_layers(other) is other["text"]


def test_layers_are_of_the_number_that_the_configuration_states(llama: Any) -> None:
    with_tower = copy.deepcopy(llama)
    with_tower.tower = layers_with_attention(9)

    assert decoder_layers(with_tower) is with_tower.model.layers


def test_layers_that_cannot_be_told_are_refused(llama: Any) -> None:
    twins = torch.nn.ModuleDict({"a": layers_with_attention(3), "b": layers_with_attention(3)})
    shortened = copy.deepcopy(llama)
    shortened.config = SimpleNamespace(num_hidden_layers=5)

    for unclear in (twins, torch.nn.Linear(2, 2), shortened):
        with pytest.raises(ValueError, match="lists of decoder layers"):
            decoder_layers(unclear)
