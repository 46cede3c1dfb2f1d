"""The plug-in's identity in vLLM's compile cache.

vLLM stores compiled code under a key that does not contain the source of plug-ins or the hooks on a
model. Without more, code compiled by plain vLLM is loaded into a steered engine, and the steering is
silently gone. ``VllmConfig.additional_config`` is part of the key; the identity goes there: what the
operators' source says, which sites are hooked, and the sizes that end up in the compiled code.

Extension points, checked against vLLM 0.32 and 0.33 (``engine/arg_utils.py``, ``config/vllm.py``):
``EngineArgs.create_engine_config``, ``VllmConfig.additional_config``, ``VllmConfig.compute_hash``.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import torch

import steering.ops
from directions.errors import TrimtabError
from steering.engine.settings import EngineSettings

NAME = "trimtab"


def operator_sources() -> tuple[Path, ...]:
    """The modules that end up in compiled code: the operators, and the hooks that call them."""
    operators = Path(str(steering.ops.__file__)).parent.glob("*.py")
    hooks = (Path(__file__).with_name(name) for name in ("discovery.py", "sites.py"))
    return (*sorted(operators), *hooks)


def operators_digest() -> str:
    """sha256 over the source of every module that ends up in compiled code."""
    return digest_sources(operator_sources())


@functools.cache
def digest_sources(paths: tuple[Path, ...]) -> str:
    """sha256 over names and contents of source files, in order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def compile_factors(settings: EngineSettings) -> dict[str, Any]:
    """What the compile cache's key must tell apart."""
    return {
        "operators": operators_digest(),
        "layers": "all" if settings.layers is None else list(settings.layers),
        "sites": sorted(settings.sites),
        "probes": "all" if settings.probe_layers is None else list(settings.probe_layers),
        "slots": settings.slots,
    }


def refuse_unsupported(config: Any) -> None:
    """Refuse an engine whose mode would make steering wrong or has not been shown to be right.

    Raises:
        TrimtabError: ``E_ENGINE_MODE`` with the option and the reason.
    """
    parallel = config.parallel_config
    model = config.model_config
    passes = config.compilation_config.pass_config
    checks: list[tuple[bool, str, str]] = [
        (
            bool(parallel.use_ubatching),
            "--enable-dbo",
            "a layer sees a slice of the batch, so tokens and slots no longer correspond",
        ),
        (
            bool(parallel.use_sequence_parallel_moe),
            "sequence-parallel MoE",
            "a layer sees a shard of the tokens, so tokens and slots no longer correspond",
        ),
        (
            # Not in every vLLM of the versions that are supported.
            bool(getattr(passes, "enable_sp", False)),
            "pass_config.enable_sp",
            "a layer sees a shard of the tokens, so tokens and slots no longer correspond",
        ),
        (
            parallel.prefill_context_parallel_size > 1,
            "--prefill-context-parallel-size",
            "a rank sees a part of the prompt, so tokens and slots no longer correspond",
        ),
        (
            bool(parallel.enable_elastic_ep),
            "--enable-elastic-ep",
            "engines that are added to a running server would not have its policies",
        ),
        (
            _runs_stages_without_buffers(config),
            "--pipeline-parallel-size",
            "on CPU vLLM makes a later stage's input buffers only while it warms up compiled code; "
            "leave out --enforce-eager and VLLM_CPU_CI_ENV",
        ),
        (
            bool(config.cache_config.kv_sharing_fast_prefill),
            "--kv-sharing-fast-prefill",
            "some layers run on a part of the tokens",
        ),
        (
            config.kv_transfer_config is not None,
            "--kv-transfer-config or --kv-offloading-size",
            "keys and values that come from elsewhere are not told apart by policy",
        ),
        (
            config.speculative_config is not None,
            "--speculative-config",
            "speculative decoding with steering has not been verified",
        ),
        (
            bool(model.is_encoder_decoder),
            "an encoder-decoder model",
            "layers and positions of the encoder and of the decoder are not told apart",
        ),
        (
            model.dtype == torch.float16 and _scales_the_stream_in_float16(model.hf_text_config),
            "--dtype float16",
            "this model's layers keep the stream at a fraction of its size in float16, so an edit "
            "would be too strong by the inverse; use bfloat16",
        ),
    ]
    for unsupported, option, reason in checks:
        if unsupported:
            raise TrimtabError(
                "E_ENGINE_MODE",
                f"{option} cannot be combined with steering: {reason}",
                field=option,
            )


def _runs_stages_without_buffers(config: Any) -> bool:
    # CPUModelRunner.warming_up_model, CPUWorker._should_warm_up_model: without the warm-up the first
    # request ends the engine with an AssertionError, in plain vLLM as well.
    from vllm import envs
    from vllm.config import CompilationMode
    from vllm.platforms import current_platform

    if config.parallel_config.pipeline_parallel_size == 1 or not current_platform.is_cpu():
        return False
    return bool(envs.VLLM_CPU_CI_ENV or config.compilation_config.mode == CompilationMode.NONE)


def _scales_the_stream_in_float16(text_config: Any) -> bool:
    """Whether vLLM divides the stream by the experts' factor against overflow.

    It does so for mixtures with latent attention (``deepseek_v2.py``, ``openpangu.py``, ``AXK1.py``).
    """
    latent = getattr(text_config, "kv_lora_rank", None) is not None
    return latent and getattr(text_config, "routed_scaling_factor", None) not in (None, 1.0)


def wrap_create_engine_config(engine_args_class: Any) -> None:
    """Make every engine configuration carry the plug-in's identity."""
    original = engine_args_class.create_engine_config

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = original(self, *args, **kwargs)
        refuse_unsupported(config)
        if not isinstance(config.additional_config, dict):
            raise TrimtabError(
                "E_ADDITIONAL_CONFIG",
                "--additional-config must be a JSON object, so that the compile cache's key can "
                "hold the plug-in's identity",
                field="--additional-config",
            )
        # A new dict: the original may be shared with the arguments that other processes parse.
        config.additional_config = {
            **config.additional_config,
            NAME: compile_factors(EngineSettings.from_environment()),
        }
        return config

    engine_args_class.create_engine_config = create_engine_config
