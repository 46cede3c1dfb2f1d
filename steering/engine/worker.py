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
from collections.abc import Callable
from typing import Any

import numpy as np

from directions.errors import TrimtabError
from steering.engine.discovery import (
    find_attention,
    find_blocks,
    find_decoder_layers,
    find_final_norm,
    refuse_partial_sums,
)
from steering.engine.payload import PlanPayload
from steering.engine.probe_reader import ReadingPayload
from steering.engine.request_rows import RequestRows
from steering.engine.runner import RunnerAdapter, WorkerRequests
from steering.engine.runner_v1 import RunnerV1Adapter
from steering.engine.runner_v2 import RunnerV2Adapter
from steering.engine.settings import EngineSettings
from steering.engine.sites import hook_block, hook_final_norm, hook_heads, hook_residual
from steering.engine.step import Step, Tracker
from steering.engine.tables import KINDS, Sizes, SteeringTables
from steering.engine.touchpoints import check_touchpoints
from steering.ops.project import SITES as PROJECTION_SITES

# A child of vLLM's logger, so that it shows where vLLM's own lines do.
logger = logging.getLogger("vllm.trimtab")

_ATTRIBUTE = "trimtab_worker"

# Requests that may be running or preempted at once, as a multiple of those that run: preempted ones keep
# their row, and come back before others begin.
_ROWS_A_SEQUENCE = 4


class SteeringWorker:
    """Everything that Trimtab keeps in one worker process for one model.

    Args:
        worker: vLLM's worker, with its model loaded.
        settings: sizes and sites.

    Raises:
        TrimtabError: ``E_SITE_LAYERS`` or ``E_LAYERS`` when the model cannot be hooked as asked,
            ``E_VLLM_TOUCHPOINT`` when the model runner is not one that the adapter knows.

    Attributes:
        hooked: by site, the layers at which it is hooked on this rank; gates read the final norm as the
            layer behind the last.
        unavailable: by site, why this model does not have it.
    """

    def __init__(self, worker: Any, settings: EngineSettings) -> None:
        check_touchpoints(heavy=True)
        runner = worker.model_runner
        model_config = worker.vllm_config.model_config
        model = runner.get_model()
        num_layers = model_config.hf_text_config.num_hidden_layers
        refuse_partial_sums(model, worker.vllm_config.parallel_config.tensor_parallel_size)
        every = find_decoder_layers(model, num_layers)
        layers = every
        if settings.layers is not None:
            if settings.layers[-1] >= num_layers:
                raise TrimtabError(
                    "E_LAYERS",
                    f"layer {settings.layers[-1]} cannot be hooked, the model has layers 0 to "
                    f"{num_layers - 1}",
                    field="--steering-layers",
                )
            layers = [(n, layer) for n, layer in every if n in settings.layers]
        parallel = worker.vllm_config.parallel_config
        self.num_layers = num_layers
        self.hooked: dict[str, list[int]] = {"add": [n for n, _ in layers]}
        self.unavailable: dict[str, str] = {}
        wanted = set(settings.sites)
        attentions = self._find(("heads",), wanted, layers, find_attention)
        blocks = self._find(("attention", "mlp"), wanted, layers, find_blocks)
        norm = self._find_norm(model, every) if wanted & {"gates", "probes"} else None
        num_heads = max((heads for _, heads, _ in attentions.values()), default=0)
        self.tables = SteeringTables(
            Sizes(
                num_layers,
                settings.rows,
                model_config.get_hidden_size(),
                runner.max_num_tokens,
                num_heads=num_heads,
                head_offset=worker.rank % parallel.tensor_parallel_size * num_heads,
                projections=settings.projections,
                sites=tuple(
                    site
                    for site in PROJECTION_SITES
                    if site in wanted and site not in self.unavailable
                ),
                dtype=model_config.dtype,
            ),
            runner.device,
        )
        rows = worker.vllm_config.scheduler_config.max_num_seqs * _ROWS_A_SEQUENCE + 1
        self.step = Step(self.tables, RequestRows(rows, runner.device))
        # vLLM returns the output of the first tensor-parallel rank of the last pipeline stage.
        replying = parallel.world_size - parallel.tensor_parallel_size
        self.requests = WorkerRequests(self.step, heard=worker.rank == replying)
        self.tensor_parallel = parallel.tensor_parallel_size
        self._hook(layers, attentions, blocks, norm, settings)
        v2 = RunnerV2Adapter.fits(runner)
        adapter: RunnerAdapter = RunnerV2Adapter() if v2 else RunnerV1Adapter()
        adapter.attach(runner, self.requests)
        logger.info(
            "steering %d of %d layers (%s), %d slots, tables of %.1f MiB%s",
            len(layers),
            num_layers,
            ", ".join(self.hooked),
            settings.slots,
            self.tables.num_bytes / 2**20,
            "".join(f"; no {site}: {reason}" for site, reason in self.unavailable.items()),
        )

    def _find(
        self,
        sites: tuple[str, ...],
        wanted: set[str],
        layers: list[tuple[int, Any]],
        find: Callable[[Any, int], Any],
    ) -> dict[int, Any]:
        """What sites need of every layer; none at all where one layer does not have it."""
        if wanted.isdisjoint(sites):
            return {}
        try:
            return {n: find(layer, n) for n, layer in layers}
        except TrimtabError as error:
            self.unavailable |= dict.fromkeys(sites, str(error))
            return {}

    def _find_norm(self, model: Any, layers: list[tuple[int, Any]]) -> Any:
        try:
            return find_final_norm(model, layers)
        except TrimtabError as error:
            self.unavailable["final norm"] = str(error)
            return None

    def _hook(
        self,
        layers: list[tuple[int, Any]],
        attentions: dict[int, Any],
        blocks: dict[int, Any],
        norm: Any,
        settings: EngineSettings,
    ) -> None:
        wanted = set(settings.sites)
        gates, projections = "gates" in wanted, "residual" in wanted
        numbers = [n for n, _ in layers]
        read = [*numbers, self.num_layers] if "probes" in wanted else []
        if settings.probe_layers is not None:
            read = [n for n in read if n in settings.probe_layers]
        for n, (attention, heads, _) in attentions.items():
            hook_heads(attention, n, self.step, heads)
            self.hooked.setdefault("heads", []).append(n)
        for n, (attention_block, mlp_block) in blocks.items():
            for site, block in (("attention", attention_block), ("mlp", mlp_block)):
                if site in wanted:
                    hook_block(block, n, self.step, KINDS.index(site))
                    self.hooked.setdefault(site, []).append(n)
        for n, layer in layers:
            hook_residual(
                layer, n, self.step, gates=gates, projections=projections, probes=n in read
            )
        if projections:
            self.hooked["residual"] = numbers
        if gates:
            self.hooked["gates"] = numbers + [self.num_layers] * (norm is not None)
        if read:
            self.hooked["probes"] = [n for n in read if n < self.num_layers or norm is not None]
        probes = self.num_layers in read
        if norm is not None and (gates or probes):
            hook_final_norm(norm, self.step, gates=gates, probes=probes)

    def check(self, plan: PlanPayload) -> None:
        """Refuse a plan that this rank could place but not carry out.

        Raises:
            ValueError: with the site and the reason.
        """
        if self.tensor_parallel > 1 and any(row.renormalise for row in plan.rows):
            raise ValueError(
                "renormalise: row needs the norm over all heads of a token, and each of "
                f"{self.tensor_parallel} tensor-parallel ranks has only its own"
            )
        if plan.thinking and self.step.tracker is None:
            raise ValueError("the thinking markers have not been sent to this rank")

    def status(self) -> dict[str, Any]:
        """msgpack-native facts about this rank."""
        return {
            "hooked": {site: list(layers) for site, layers in self.hooked.items()},
            "unavailable": dict(self.unavailable),
            "num_layers": self.num_layers,
            "hidden_size": self.tables.sizes.hidden_size,
            "num_heads": self.tables.sizes.num_heads * self.tensor_parallel,
            "num_slots": self.tables.sizes.num_slots,
            "pinned_slots": self.tables.pinned,
            "evictions": self.tables.evictions,
            "plans": sorted(self.tables.plans),
            "readings": list(self.step.reader.ids),
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


def trimtab_track(wrapper: Any, tracker: dict[str, Any]) -> dict[str, Any]:
    """Give this rank the thinking tracker's tables; sent before the first plan that needs them."""
    steering = _steering(wrapper)
    step = steering.step
    states = int(tracker["states"])
    step.tracker = Tracker(
        np.frombuffer(tracker["transitions"], dtype=np.uint8).reshape(states, -1),
        np.frombuffer(tracker["phases"], dtype=np.uint8),
        np.frombuffer(tracker["ended"], dtype=np.uint8).astype(np.bool_),
        int(tracker["start"]),
        step.tables.device,
    )
    return steering.status()


def trimtab_read(wrapper: Any, readings: list[dict[str, Any]]) -> dict[str, Any]:
    """Let requests ask for readings on this rank; raises for one that is not possible."""
    steering = _steering(wrapper)
    for reading in readings:
        steering.step.reader.activate(ReadingPayload.from_wire(reading))
    return steering.status()


def trimtab_activate(wrapper: Any, plans: list[dict[str, Any]]) -> dict[str, Any]:
    """Make plans placeable on this rank; raises for one that is not, which fails the whole call."""
    steering = _steering(wrapper)
    for plan in plans:
        payload = PlanPayload.from_wire(plan)
        steering.check(payload)
        steering.tables.add_plan(payload)
    return steering.status()


def trimtab_deactivate(wrapper: Any, plan_ids: list[str]) -> dict[str, Any]:
    """Forget plans on this rank; running requests keep them to their end."""
    for plan_id in plan_ids:
        _steering(wrapper).tables.remove_plan(plan_id)
    return _steering(wrapper).status()


def trimtab_status(wrapper: Any) -> dict[str, Any]:
    """This rank's :meth:`SteeringWorker.status`."""
    return _steering(wrapper).status()


RPC_METHODS = (trimtab_track, trimtab_read, trimtab_activate, trimtab_deactivate, trimtab_status)
