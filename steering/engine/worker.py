"""The worker side: installing the operators, and the calls that the API process makes on every rank.

Extension points, checked against vLLM 0.32 and 0.33:

* ``WorkerWrapperBase.init_device()`` (``v1/worker/worker_base.py``): the one class around every worker
  under every executor. When it returns, the worker exists and the model is not loaded.
* ``Worker.load_model(...)``: when it returns, the model is loaded and no forward pass has run. That is
  the only moment to hook: vLLM drops all guards of ``torch.compile``, so what is installed after the
  first forward pass is ignored for ever.
* ``collective_rpc(method, args)`` finds methods on ``WorkerWrapperBase`` by name.
"""

from __future__ import annotations

import logging
from typing import Any

from directions.errors import TrimtabError
from steering.engine.payload import PlanPayload
from steering.engine.runner import WorkerRequests
from steering.engine.runner_v1 import RunnerV1Adapter
from steering.engine.settings import EngineSettings
from steering.engine.sites import find_decoder_layers, hook_residual
from steering.engine.tables import SteeringTables
from steering.engine.touchpoints import check_touchpoints

# A child of vLLM's logger, so that it shows where vLLM's own lines do.
logger = logging.getLogger("vllm.trimtab")

_ATTRIBUTE = "trimtab_worker"


class SteeringWorker:
    """Everything that Trimtab keeps in one worker process for one model.

    Args:
        worker: vLLM's worker, with its model loaded.
        settings: sizes and sites.

    Raises:
        TrimtabError: ``E_SITE_LAYERS`` or ``E_LAYERS`` when the model cannot be hooked as asked,
            ``E_VLLM_TOUCHPOINT`` when the model runner is not one that the adapter knows.
    """

    def __init__(self, worker: Any, settings: EngineSettings) -> None:
        check_touchpoints(heavy=True)
        runner = worker.model_runner
        model_config = worker.vllm_config.model_config
        num_layers = model_config.hf_text_config.num_hidden_layers
        layers = find_decoder_layers(runner.get_model(), num_layers)
        if settings.layers is not None:
            if settings.layers[-1] >= num_layers:
                raise TrimtabError(
                    "E_LAYERS",
                    f"layer {settings.layers[-1]} cannot be hooked, the model has layers 0 to "
                    f"{num_layers - 1}",
                    field="--steering-layers",
                )
            layers = [(n, layer) for n, layer in layers if n in settings.layers]
        self.hooked = tuple(n for n, _ in layers)
        self.num_layers = num_layers
        self.tables = SteeringTables(
            num_layers,
            settings.rows,
            model_config.get_hidden_size(),
            runner.max_num_tokens,
            runner.device,
            model_config.dtype,
        )
        parallel = worker.vllm_config.parallel_config
        # vLLM returns the output of the first tensor-parallel rank of the last pipeline stage.
        replying = parallel.world_size - parallel.tensor_parallel_size
        self.requests = WorkerRequests(self.tables, heard=worker.rank == replying)
        hook_residual(layers, self.tables)
        RunnerV1Adapter().attach(runner, self.tables, self.requests)
        logger.info(
            "steering %d of %d layers, %d slots, tables of %.1f MiB",
            len(layers),
            num_layers,
            settings.slots,
            self.tables.table.numel() * 4 / 2**20,
        )

    def status(self) -> dict[str, Any]:
        """msgpack-native facts about this rank."""
        return {
            "hooked_layers": list(self.hooked),
            "num_layers": self.num_layers,
            "hidden_size": self.tables.hidden_size,
            "num_slots": self.tables.num_slots,
            "pinned_slots": self.tables.pinned,
            "plans": sorted(self.tables.plans),
        }


def wrap_init_device(wrapper_class: Any) -> None:
    """Make every worker that ``wrapper_class`` wraps install a :class:`SteeringWorker`."""
    original = wrapper_class.init_device

    def init_device(self: Any) -> None:
        original(self)
        worker = self.worker
        load_model = worker.load_model

        def load_and_install(*args: Any, **kwargs: Any) -> Any:
            result = load_model(*args, **kwargs)
            setattr(worker, _ATTRIBUTE, SteeringWorker(worker, EngineSettings.from_environment()))
            return result

        worker.load_model = load_and_install

    wrapper_class.init_device = init_device


def _steering(wrapper: Any) -> SteeringWorker:
    steering: SteeringWorker = getattr(wrapper.worker, _ATTRIBUTE)
    return steering


def trimtab_activate(wrapper: Any, plans: list[dict[str, Any]]) -> dict[str, Any]:
    """Make plans placeable on this rank; raises for one that is not, which fails the whole call."""
    tables = _steering(wrapper).tables
    for plan in plans:
        tables.add_plan(PlanPayload.from_wire(plan))
    return _steering(wrapper).status()


def trimtab_deactivate(wrapper: Any, plan_ids: list[str]) -> dict[str, Any]:
    """Forget plans on this rank; running requests keep them to their end."""
    for plan_id in plan_ids:
        _steering(wrapper).tables.remove_plan(plan_id)
    return _steering(wrapper).status()


def trimtab_status(wrapper: Any) -> dict[str, Any]:
    """This rank's :meth:`SteeringWorker.status`."""
    return _steering(wrapper).status()


RPC_METHODS = (trimtab_activate, trimtab_deactivate, trimtab_status)
