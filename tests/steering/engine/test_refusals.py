"""Engines in whose modes steering would be wrong are refused before a model is loaded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from directions.errors import TrimtabError
from steering.engine.identity import refuse_unsupported

pytestmark = pytest.mark.engine


def change(config: Any, path: str, value: Any) -> Any:
    """The configuration with one of its values replaced; only what is looked at is in it."""
    *parents, name = path.split(".")
    owner = config
    for parent in parents:
        owner = getattr(owner, parent)
    setattr(owner, name, value)
    return config


def usual() -> Any:
    from vllm.config import CompilationConfig, ParallelConfig

    return SimpleNamespace(
        parallel_config=ParallelConfig(),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
        compilation_config=CompilationConfig(),
        model_config=SimpleNamespace(
            is_encoder_decoder=False,
            dtype=torch.float16,
            hf_text_config=SimpleNamespace(kv_lora_rank=None, routed_scaling_factor=16.0),
        ),
        kv_transfer_config=None,
        speculative_config=None,
    )


@pytest.mark.parametrize(
    ("path", "value", "option"),
    [
        ("parallel_config.enable_dbo", True, "--enable-dbo"),
        ("parallel_config.ubatch_size", 2, "--enable-dbo"),
        ("compilation_config.pass_config", SimpleNamespace(enable_sp=True), "enable_sp"),
        (
            "parallel_config.prefill_context_parallel_size",
            2,
            "--prefill-context-parallel-size",
        ),
        ("cache_config.kv_sharing_fast_prefill", True, "--kv-sharing-fast-prefill"),
        ("kv_transfer_config", object(), "--kv-transfer-config"),
        ("speculative_config", object(), "--speculative-config"),
        ("model_config.is_encoder_decoder", True, "an encoder-decoder model"),
        ("model_config.hf_text_config.kv_lora_rank", 512, "--dtype float16"),
    ],
)
def test_a_mode_that_cannot_be_steered_is_refused(path, value, option) -> None:
    refuse_unsupported(usual())
    with pytest.raises(TrimtabError, match=option) as caught:
        refuse_unsupported(change(usual(), path, value))
    assert caught.value.code == "E_ENGINE_MODE"


def test_token_shards_between_experts_are_refused() -> None:
    config = usual()
    for name, value in (
        ("enable_expert_parallel", True),
        ("tensor_parallel_size", 2),
        ("data_parallel_size", 2),
    ):
        refuse_unsupported(config)
        change(config, f"parallel_config.{name}", value)
    with pytest.raises(TrimtabError, match="sequence-parallel MoE"):
        refuse_unsupported(config)
