"""The architectures that the engine is checked with: how vLLM serves each, and what its reference calls things.

An engine that has started stays to the end of the session, so every test of an architecture shares one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steering.engine.control import activate_local
from tests.steering.engine import checkpoints
from tests.steering.engine.harness import (
    World,
    build_world,
    engine,
    every_kind,
    standard_policies,
)


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Attributes:
        build: makes the checkpoint.
        served_by: vLLM's class; ``TransformersForCausalLM`` runs Hugging Face's own modules.
        form: what a decoder layer returns, and the number of dimensions of the stream.
        attention, projection, mlp, norm: the reference's names of a layer's attention block, the output
            projection inside it, a layer's MLP block, and the final norm.
        options: of the engine.
    """

    build: Callable[[Path], Path]
    served_by: str
    form: tuple[str, int] = ("pair", 2)
    attention: str = "self_attn"
    projection: str = "o_proj"
    mlp: str = "mlp"
    norm: str = "norm"
    options: dict[str, Any] = field(default_factory=dict)


ARCHITECTURES = {
    "llama": Architecture(checkpoints.llama, "LlamaForCausalLM"),
    "qwen2": Architecture(checkpoints.qwen2, "Qwen2ForCausalLM"),
    "qwen3": Architecture(checkpoints.qwen3, "Qwen3ForCausalLM"),
    "qwen3_moe": Architecture(checkpoints.qwen3_moe, "Qwen3MoeForCausalLM"),
    "mistral": Architecture(checkpoints.mistral, "MistralForCausalLM"),
    "mixtral": Architecture(checkpoints.mixtral, "MixtralForCausalLM"),
    "gemma2": Architecture(checkpoints.gemma2, "Gemma2ForCausalLM"),
    "gemma3": Architecture(checkpoints.gemma3, "Gemma3ForCausalLM"),
    "gemma4": Architecture(checkpoints.gemma4, "Gemma4ForCausalLM", ("stream and none", 2)),
    "phi3": Architecture(checkpoints.phi3, "Phi3ForCausalLM"),
    "olmo2": Architecture(checkpoints.olmo2, "TransformersForCausalLM", ("stream", 3)),
    "gpt_neox": Architecture(
        checkpoints.gpt_neox,
        "TransformersForCausalLM",
        ("stream", 3),
        attention="attention",
        projection="dense",
        norm="final_layer_norm",
    ),
    "gpt2": Architecture(
        checkpoints.gpt2,
        "GPT2LMHeadModel",
        ("stream", 2),
        attention="attn",
        projection="c_proj",
        norm="ln_f",
    ),
    "granite": Architecture(checkpoints.granite, "GraniteForCausalLM", ("stream", 2)),
    "deepseek_v2": Architecture(
        checkpoints.deepseek_v2,
        "DeepseekV2ForCausalLM",
        # The other backend for latent attention on CPU has no float32.
        options={"attention_backend": "CPU_MLA"},
    ),
    "gpt_oss": Architecture(checkpoints.gpt_oss, "GptOssForCausalLM"),
}


@dataclass(frozen=True)
class Served:
    """A running engine with the standard policies active, and its reference."""

    llm: Any
    world: World


def serve(architecture: Architecture, folder: Path) -> Served:
    """Make a checkpoint in an empty folder and start an engine on it."""
    path = architecture.build(folder / "checkpoint")
    world = build_world(path, folder / "store", ("t", "e"))
    standard_policies(world)
    every_kind(world)
    with expert_capable_engine(path, **architecture.options) as llm:
        activate_local(llm, world.plans.values(), world.store)
    return Served(llm, world)


def expert_capable_engine(path: Path, **options: Any) -> Any:
    """An engine that can be a mixture of experts.

    vLLM makes a process's group of experts with its first engine, and only if that one is a mixture.
    """
    from vllm.distributed import parallel_state

    if parallel_state.model_parallel_is_initialized() and parallel_state._EP is None:
        parallel_state._EP = parallel_state.init_model_parallel_group(
            [[0]], local_rank=0, backend="gloo", group_name="ep"
        )
    return engine(path, kv_cache_memory_bytes=32 * 2**20, **options)
