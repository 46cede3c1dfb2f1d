"""The entry point that vLLM loads in every one of its processes.

``register`` changes vLLM's classes in place: nothing is forked, nothing on disk is edited, and the set of
changes is the list in :data:`PATCHES`. It does nothing unless ``TRIMTAB_ENGINE=1``. vLLM only logs an
exception raised here and would go on unsteered, so the API process does not take its word for it: it calls
every worker and proves by a generation that steering works before it becomes ready.
"""

from __future__ import annotations

from steering.engine.settings import enabled
from steering.engine.touchpoints import check_touchpoints

_registered = False


def register() -> None:
    """Install Trimtab in this process; a second call changes nothing.

    Raises:
        TrimtabError: ``E_VLLM_VERSION`` or ``E_VLLM_TOUCHPOINT`` when this vLLM is not one that the
            plug-in knows.
    """
    global _registered
    if _registered or not enabled():
        return
    check_touchpoints()
    import vllm.v1.core.kv_cache_utils as kv_cache_utils
    from vllm.config.scheduler import SchedulerConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.output_processor import (
        OutputProcessor,
        RequestOutputCollector,
        RequestState,
    )
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    from steering.engine.admission import wrap_beam_search, wrap_process_inputs
    from steering.engine.blocks import wrap_block_keys
    from steering.engine.identity import wrap_create_engine_config
    from steering.engine.rank_calls import answering
    from steering.engine.relay import (
        wrap_delivery,
        wrap_get_scheduler_cls,
        wrap_output_processor,
    )
    from steering.engine.worker import RPC_METHODS, wrap_init_device

    wrap_create_engine_config(EngineArgs)
    wrap_process_inputs(InputProcessor)
    wrap_beam_search(BeamSearchOnlineMixin)
    wrap_output_processor(OutputProcessor)
    wrap_delivery(RequestState, RequestOutputCollector)
    wrap_get_scheduler_cls(SchedulerConfig)
    wrap_block_keys(kv_cache_utils)
    wrap_init_device(WorkerWrapperBase)
    for method in RPC_METHODS:
        setattr(WorkerWrapperBase, method.__name__, answering(method))
    _registered = True
