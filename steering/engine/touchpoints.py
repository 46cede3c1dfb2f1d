"""The parts of vLLM that Trimtab holds on to, and what each must look like.

vLLM's insides move between releases. Each name that the plug-in wraps or calls is listed here with the
parameters that it relies on, so that an upgrade which moves one ends with a sentence at start-up and not
with a stack trace in the middle of a request.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from dataclasses import dataclass

from directions.errors import TrimtabError

CHECKED_VERSIONS = ("0.32", "0.33")
ALLOW_UNCHECKED = "TRIMTAB_ALLOW_UNCHECKED_VLLM"
ALLOW_UNCHECKED_FLAG = "--allow-unchecked-vllm"


@dataclass(frozen=True)
class Touchpoint:
    """One name inside vLLM.

    Attributes:
        module: importable module.
        name: dotted name in it; of a dataclass, the parameters are its fields.
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
    Touchpoint(
        "vllm.v1.engine.output_processor",
        "RequestState._new_completion_output",
        ("self", "token_ids", "finish_reason", "stop_reason"),
    ),
    Touchpoint("vllm.v1.engine.output_processor", "RequestOutputCollector.get", ("self",)),
    Touchpoint("vllm.v1.engine.output_processor", "RequestOutputCollector.get_nowait", ("self",)),
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
    Touchpoint("vllm.v1.worker.gpu_model_runner", "GPUModelRunner._dummy_run", ("self",)),
    Touchpoint(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner.sample_tokens",
        ("self", "grammar_output"),
    ),
    Touchpoint(
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner.finish_requests",
        ("self", "scheduler_output"),
    ),
    Touchpoint(
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner.add_requests",
        ("self", "scheduler_output"),
    ),
    Touchpoint(
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner.prepare_inputs",
        ("self", "scheduler_output", "batch_req_state"),
    ),
    Touchpoint("vllm.v1.worker.gpu.model_runner", "GPUModelRunner._dummy_run", ("self",)),
    Touchpoint("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.capture_model", ("self",)),
    Touchpoint(
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner.sample_tokens",
        ("self", "grammar_output"),
    ),
    Touchpoint(
        "vllm.v1.worker.gpu.input_batch",
        "InputBatch",
        (
            "req_ids",
            "idx_mapping_np",
            "num_scheduled_tokens",
            "num_tokens",
            "num_computed_tokens_np",
            "input_ids",
        ),
    ),
    Touchpoint(
        "vllm.v1.core.sched.output",
        "NewRequestData",
        ("req_id", "prompt_token_ids", "sampling_params", "prefill_token_ids"),
    ),
    Touchpoint(
        "vllm.v1.core.sched.output",
        "SchedulerOutput",
        ("scheduled_new_reqs", "finished_req_ids", "preempted_req_ids"),
    ),
)

# The model runners pull in kernels and devices; only a worker looks inside, at the one that it runs.
_HEAVY = (
    "vllm.v1.worker.gpu_model_runner",
    "vllm.v1.worker.gpu.model_runner",
    "vllm.v1.worker.gpu.input_batch",
)


def check_version() -> str | None:
    """Whether this vLLM is of a release that the plug-in was written against.

    Returns:
        The version if it is not and is allowed all the same, else ``None``.

    Raises:
        TrimtabError: ``E_VLLM_VERSION`` outside the checked releases, unless
            ``TRIMTAB_ALLOW_UNCHECKED_VLLM=1``.
    """
    import vllm

    version = str(vllm.__version__)
    if ".".join(version.split(".")[:2]) in CHECKED_VERSIONS:
        return None
    if os.environ.get(ALLOW_UNCHECKED) == "1":
        return version
    raise TrimtabError(
        "E_VLLM_VERSION",
        f"vLLM {version} has not been checked; {ALLOW_UNCHECKED_FLAG} (or {ALLOW_UNCHECKED}=1) "
        "tries it anyway",
        field="vllm",
        expected=" or ".join(CHECKED_VERSIONS),
    )


def check_touchpoints(*, heavy: bool = False) -> None:
    """Compare this vLLM with what the plug-in was written against.

    Args:
        heavy: also the model runners, those of them that this process has imported.

    Raises:
        TrimtabError: ``E_VLLM_VERSION`` outside the checked releases, unless
            ``TRIMTAB_ALLOW_UNCHECKED_VLLM=1``; ``E_VLLM_TOUCHPOINT`` for a name that is missing or
            takes other parameters.
    """
    check_version()
    for touchpoint in TOUCHPOINTS:
        if touchpoint.module not in _HEAVY or (heavy and touchpoint.module in sys.modules):
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
