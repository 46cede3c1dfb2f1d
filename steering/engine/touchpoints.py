"""The parts of vLLM that Trimtab holds on to, and what each must look like.

vLLM's insides move between releases. Each name that the plug-in wraps or calls is listed here with the
parameters that it relies on, so that an upgrade which moves one ends with a sentence at start-up and not
with a stack trace in the middle of a request.
"""

from __future__ import annotations

import importlib
import inspect
import os
from dataclasses import dataclass

from directions.errors import TrimtabError

CHECKED_VERSIONS = ("0.32", "0.33")
ALLOW_UNCHECKED = "TRIMTAB_ALLOW_UNCHECKED_VLLM"


@dataclass(frozen=True)
class Touchpoint:
    """One name inside vLLM.

    Attributes:
        module: importable module.
        name: dotted name in it.
        parameters: parameters that must exist, in this order among the others.
    """

    module: str
    name: str
    parameters: tuple[str, ...]


TOUCHPOINTS = (
    Touchpoint("vllm.engine.arg_utils", "EngineArgs.create_engine_config", ("self",)),
    Touchpoint("vllm.config.scheduler", "SchedulerConfig.get_scheduler_cls", ("self",)),
    Touchpoint(
        "vllm.v1.core.sched.scheduler",
        "Scheduler.update_from_output",
        ("self", "scheduler_output", "model_runner_output"),
    ),
    Touchpoint(
        "vllm.v1.core.sched.scheduler",
        "Scheduler.finish_requests",
        ("self", "request_ids", "finished_status"),
    ),
    Touchpoint(
        "vllm.v1.core.kv_cache_utils",
        "generate_block_hash_extra_keys",
        ("request", "start_token_idx", "end_token_idx", "start_mm_idx"),
    ),
    Touchpoint(
        "vllm.v1.core.kv_cache_manager", "KVCacheManager.get_block_ids", ("self", "request_id")
    ),
    Touchpoint(
        "vllm.v1.core.kv_cache_manager", "KVCacheManager.evict_blocks", ("self", "block_ids")
    ),
    Touchpoint(
        "vllm.entrypoints.generate.beam_search.online",
        "BeamSearchOnlineMixin.beam_search",
        ("self", "prompt", "request_id", "params"),
    ),
    Touchpoint(
        "vllm.v1.engine.core_client", "AsyncMPClient.call_utility_all_async", ("self", "method")
    ),
    Touchpoint(
        "vllm.v1.engine.async_llm",
        "AsyncLLM.generate",
        ("self", "prompt", "sampling_params", "request_id", "data_parallel_rank"),
    ),
    Touchpoint(
        "vllm.v1.engine.input_processor",
        "InputProcessor.process_inputs",
        ("self", "request_id", "prompt", "params", "resumable"),
    ),
    Touchpoint(
        "vllm.v1.engine.output_processor",
        "OutputProcessor.add_request",
        ("self", "request", "prompt", "parent_req", "request_index"),
    ),
    Touchpoint(
        "vllm.v1.engine.output_processor",
        "OutputProcessor.process_outputs",
        ("self", "engine_core_outputs"),
    ),
    Touchpoint(
        "vllm.v1.engine.output_processor",
        "OutputProcessor.abort_requests",
        ("self", "request_ids", "internal"),
    ),
    Touchpoint(
        "vllm.v1.engine.output_processor", "OutputProcessor._finish_request", ("self", "req_state")
    ),
    Touchpoint("vllm.v1.worker.worker_base", "WorkerWrapperBase.init_device", ("self",)),
    Touchpoint(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._update_states",
        ("self", "scheduler_output"),
    ),
    Touchpoint(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._prepare_inputs",
        ("self", "scheduler_output", "num_scheduled_tokens"),
    ),
    Touchpoint(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner.sample_tokens",
        ("self", "grammar_output"),
    ),
)

# The runner module pulls in kernels and devices; only workers, which import it anyway, look inside.
_HEAVY = ("vllm.v1.worker.gpu_model_runner",)


def check_touchpoints(*, heavy: bool = False) -> None:
    """Compare this vLLM with what the plug-in was written against.

    Args:
        heavy: also the modules that only a worker imports.

    Raises:
        TrimtabError: ``E_VLLM_VERSION`` outside the checked releases, unless
            ``TRIMTAB_ALLOW_UNCHECKED_VLLM=1``; ``E_VLLM_TOUCHPOINT`` for a name that is missing or
            takes other parameters.
    """
    import vllm

    release = ".".join(str(vllm.__version__).split(".")[:2])
    if release not in CHECKED_VERSIONS and os.environ.get(ALLOW_UNCHECKED) != "1":
        raise TrimtabError(
            "E_VLLM_VERSION",
            f"vLLM {vllm.__version__} has not been checked; set {ALLOW_UNCHECKED}=1 to try it anyway",
            field="vllm",
            expected=" or ".join(CHECKED_VERSIONS),
        )
    for touchpoint in TOUCHPOINTS:
        if heavy or touchpoint.module not in _HEAVY:
            _check(touchpoint)


def _check(touchpoint: Touchpoint) -> None:
    where = f"{touchpoint.module}.{touchpoint.name}"
    try:
        found = importlib.import_module(touchpoint.module)
        for part in touchpoint.name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise TrimtabError(
            "E_VLLM_TOUCHPOINT", f"{where} is gone from this vLLM: {error}", field="vllm"
        ) from error
    actual = list(inspect.signature(found).parameters)  # type: ignore[arg-type]
    wanted = [p for p in actual if p in touchpoint.parameters]
    if wanted != list(touchpoint.parameters):
        raise TrimtabError(
            "E_VLLM_TOUCHPOINT",
            f"{where} takes ({', '.join(actual)}) in this vLLM",
            field="vllm",
            expected=f"({', '.join(touchpoint.parameters)}) among them",
        )
