"""Tiny random checkpoints, one builder for each architecture that the engine is checked with.

Each has four decoder layers and a hidden size of 128 with four query heads, in float32, with the byte-level
tokenizer and the chat template of the tiny Llama. Every parameter is drawn: norms around one and biases
around zero, which a fresh model has exactly there, so that a path that drops one shows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from tests.conftest import tiny_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
}
MIXTURE: dict[str, Any] = {"num_experts_per_tok": 2, "output_router_logits": False}


def save(
    path: Path,
    config_class: Any,
    *,
    adjust: Callable[[Any], None] = lambda model: None,
    key_value_heads: int | None = 2,
    **options: Any,
) -> Path:
    """Draw a causal language model of a configuration and save it with the tokenizer.

    Args:
        path: where to.
        config_class: the configuration's class.
        adjust: changes the drawn model, whose parameters need no gradient then.
        key_value_heads: ``None`` for architectures that have as many as query heads.
        options: arguments of the configuration beside :data:`SIZES`, or instead of them.
    """
    tokenizer = tiny_tokenizer()
    grouped = {} if key_value_heads is None else {"num_key_value_heads": key_value_heads}
    arguments = {
        **SIZES,
        **grouped,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **options,
    }
    torch.manual_seed(3)
    model = hf.AutoModelForCausalLM.from_config(config_class(**arguments)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
        adjust(model)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def llama(path: Path) -> Path:
    return save(path, hf.LlamaConfig, head_dim=32)


def qwen2(path: Path) -> Path:
    """Biases on queries, keys and values."""
    return save(path, hf.Qwen2Config)


def qwen3(path: Path) -> Path:
    """Norms on queries and keys; heads wider than the hidden size's share."""
    return save(path, hf.Qwen3Config, head_dim=64)


def qwen3_moe(path: Path) -> Path:
    return save(
        path,
        hf.Qwen3MoeConfig,
        head_dim=32,
        num_experts=4,
        moe_intermediate_size=96,
        norm_topk_prob=True,
        **MIXTURE,
    )


def mistral(path: Path) -> Path:
    """A window of 16 tokens, shorter than the tests' texts."""
    return save(path, hf.MistralConfig, head_dim=32, sliding_window=16)


def mixtral(path: Path) -> Path:
    return save(path, hf.MixtralConfig, head_dim=32, num_local_experts=4, **MIXTURE)


def _free_the_tied_head(model: Any) -> None:
    """Small embeddings and a large final norm: else the head would only repeat the last token."""
    model.get_input_embeddings().weight *= 0.2
    model.model.norm.weight += 4.0


def gemma2(path: Path) -> Path:
    """Norms after the blocks as well as before, soft caps, every other layer with a window."""
    return save(
        path,
        hf.Gemma2Config,
        head_dim=64,
        query_pre_attn_scalar=64,
        sliding_window=16,
        tie_word_embeddings=True,
        adjust=_free_the_tied_head,
    )


def gemma3(path: Path) -> Path:
    return save(
        path,
        hf.Gemma3TextConfig,
        head_dim=64,
        query_pre_attn_scalar=64,
        sliding_window=16,
        tie_word_embeddings=True,
        adjust=_free_the_tied_head,
    )


def gemma4(path: Path) -> Path:
    """Heads of another width in the layers without a window; layers that return no residual."""
    return save(
        path,
        hf.Gemma4TextConfig,
        head_dim=32,
        global_head_dim=64,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=16,
        hidden_size_per_layer_input=0,
        tie_word_embeddings=True,
        adjust=_free_the_tied_head,
    )


def gemma3n(path: Path) -> Path:
    """Four streams side by side, and layers that share keys and values."""
    return save(
        path,
        hf.Gemma3nTextConfig,
        head_dim=32,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=16,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=300,
        laurel_rank=8,
        activation_sparsity_pattern=[0.0] * 4,
        tie_word_embeddings=True,
    )


def phi3(path: Path) -> Path:
    """Fused projections."""
    return save(path, hf.Phi3Config)


def olmo2(path: Path) -> Path:
    """Norms after the blocks only."""
    return save(path, hf.Olmo2Config)


def gpt_neox(path: Path) -> Path:
    """Attention and MLP in parallel, each from the layer's input."""
    return save(path, hf.GPTNeoXConfig, key_value_heads=None, use_parallel_residual=True)


def gpt2(path: Path) -> Path:
    """Learned positions; no grouped queries."""
    return save(path, hf.GPT2Config, key_value_heads=None, n_positions=512, n_inner=192)


def granite(path: Path) -> Path:
    """Each block's output is multiplied before it joins the stream."""
    return save(
        path,
        hf.GraniteConfig,
        embedding_multiplier=2.0,
        residual_multiplier=0.7,
        logits_scaling=0.7,
        attention_multiplier=0.2,
    )


def deepseek_v2(path: Path) -> Path:
    """Latent attention; the first layer's MLP is dense, the others are mixtures."""
    return save(
        path,
        hf.DeepseekV2Config,
        key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        v_head_dim=32,
        n_routed_experts=4,
        n_shared_experts=1,
        first_k_dense_replace=1,
        moe_intermediate_size=96,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
        **MIXTURE,
    )


def gpt_oss(path: Path) -> Path:
    """Sinks, every other layer with a window, biases everywhere."""
    return save(
        path,
        hf.GptOssConfig,
        head_dim=32,
        num_local_experts=4,
        sliding_window=16,
        **MIXTURE,
    )


BUILDERS: dict[str, Callable[[Path], Path]] = {
    builder.__name__: builder
    for builder in (
        llama,
        qwen2,
        qwen3,
        qwen3_moe,
        mistral,
        mixtral,
        gemma2,
        gemma3,
        gemma3n,
        gemma4,
        phi3,
        olmo2,
        gpt_neox,
        gpt2,
        granite,
        deepseek_v2,
        gpt_oss,
    )
}
