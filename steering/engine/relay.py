"""The way back: the worker's word on each request, to the API process that asked.

A report rides on what vLLM already sends, so its order against the tokens is vLLM's own and there is no
second connection to lose: the model runner's output (worker → scheduler), then
``EngineCoreOutput.kv_transfer_params`` (scheduler → API process), from which it is taken before anything
else sees it.

Scores of probes come this way too, and what a step cost: a step has one report, which travels with one of
its outputs and is so told to one API process, once.

A request whose plan was not placed has run unsteered, and the keys and values that it wrote lie in the
prefix cache under the steered salt. The scheduler ends such a request with an error, and with it every
request under the same plan, which may have read them, and evicts their blocks, so that nobody's answer is
built on them; under either failure rule, since what ran cannot be told apart any more. Admission makes
this a defect's consequence, not an operating state.

Extension points, checked against vLLM 0.32 and 0.33:

* ``SchedulerConfig.get_scheduler_cls()`` (``config/scheduler.py``), subclassed so that synchronous and
  asynchronous scheduling stay what they are.
* ``Scheduler.update_from_output``, ``finish_requests`` (``v1/core/sched/scheduler.py``),
  ``KVCacheManager.get_block_ids``, ``evict_blocks`` (``v1/core/kv_cache_manager.py``).
* ``OutputProcessor.add_request``, ``process_outputs``, ``abort_requests``, ``_finish_request``,
  ``RequestState._new_completion_output``, ``RequestOutputCollector.get``, ``get_nowait``
  (``v1/engine/output_processor.py``).
* ``ParallelConfig.data_parallel_index`` (``config/parallel.py``).
"""

from __future__ import annotations

import functools
import logging
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from steering.engine.admission import Frontend, frontend_of, plan_not_placed
from steering.engine.exchange import Acknowledgement, Exchange, current_exchange
from steering.engine.gate_report import GateReport
from steering.engine.runner import REPORTS, STEP
from steering.engine.stamp import read_stamp, stamped
from steering.engine.tables import EDIT_KINDS

# A child of vLLM's logger, so that it shows where vLLM's own lines do.
logger = logging.getLogger("vllm.trimtab")

CARRIER = "_trimtab"
"""Key in ``kv_transfer_params`` between the scheduler and the API process; never seen by a client."""

_REQUEST: Final = "trimtab_request"
"""Attribute of a ``CompletionOutput`` that says which engine request it is of."""

_MOST_STEPS: Final = 4096
"""Steps whose figures may wait for an output to travel with; steps of a long prompt have none."""


def wrap_get_scheduler_cls(scheduler_config_class: Any) -> None:
    """Make every scheduler pass the workers' reports on."""
    original = scheduler_config_class.get_scheduler_cls

    @functools.wraps(original)
    def get_scheduler_cls(self: Any) -> Any:
        return _reporting(original(self))

    scheduler_config_class.get_scheduler_cls = get_scheduler_cls


@functools.cache
def _reporting(base: Any) -> Any:
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
    from vllm.v1.request import RequestStatus

    class Reporting(base):  # type: ignore[misc]
        """A scheduler that carries reports by request until there is an output to attach them to."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._trimtab_reports: dict[str, dict[str, Any]] = {}
            self._trimtab_steps: deque[list[float]] = deque(maxlen=_MOST_STEPS)
            parallel = self.vllm_config.parallel_config
            self._trimtab_engine = int(parallel.data_parallel_index)

        def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
            outputs = super().update_from_output(scheduler_output, model_runner_output)
            for request_id, report in (getattr(model_runner_output, REPORTS, None) or {}).items():
                waiting = self._trimtab_reports.setdefault(request_id, {})
                # Of a prompt that is computed in several steps, all of them are kept.
                scores = [*waiting.get("scores", ()), *report.get("scores", ())]
                waiting.update(report)
                if scores:
                    waiting["scores"] = scores
            step = getattr(model_runner_output, STEP, None)
            if step is not None:
                self._trimtab_steps.append(step)
            if self._trimtab_reports or self._trimtab_steps:
                self._attach_reports(outputs)
            return outputs

        def _attach_reports(self, outputs: dict[int, Any]) -> None:
            reports = self._trimtab_reports
            for request_id, report in list(reports.items()):
                if not report.get("applied", True) and request_id in self.requests:
                    self._fail(self.requests[request_id], report["reason"], outputs)
            for group in outputs.values():
                for output in group.outputs:
                    report = reports.pop(output.request_id, {})
                    if self._trimtab_steps:
                        report["steps"] = list(self._trimtab_steps)
                        self._trimtab_steps.clear()
                    if report:
                        report["engine"] = self._trimtab_engine
                        output.kv_transfer_params = {
                            **(output.kv_transfer_params or {}),
                            CARRIER: report,
                        }
            # What is left waits for its request's first output; a request that is gone has none.
            for request_id in [r for r in reports if r not in self.requests]:
                del reports[request_id]

        def _fail(self, unplaced: Any, reason: str | None, outputs: dict[int, Any]) -> None:
            plan = stamped(unplaced).get("plan")
            same = [r for r in self.requests.values() if stamped(r).get("plan") == plan]
            # Requests without a plan have nothing in common.
            for request in [unplaced] if plan is None else same:
                logger.error("plan of request %s was not placed: %s", request.request_id, reason)
                failure = {"applied": False, "reason": reason}
                self._trimtab_reports.setdefault(request.request_id, {}).update(failure)
                blocks = self.kv_cache_manager.get_block_ids(request.request_id)
                self.kv_cache_manager.evict_blocks({n for group in blocks for n in group})
                self.finish_requests(request.request_id, RequestStatus.FINISHED_ERROR)
                group = outputs.setdefault(request.client_index, EngineCoreOutputs())
                group.outputs = [o for o in group.outputs if o.request_id != request.request_id]
                group.outputs.append(
                    EngineCoreOutput(
                        request_id=request.request_id,
                        new_token_ids=[],
                        finish_reason=FinishReason.ERROR,
                    )
                )

    Reporting.__name__ = Reporting.__qualname__ = f"Reporting{base.__name__}"
    return Reporting


def _take_outcome(exchange: Exchange, request_id: str, report: dict[str, Any]) -> None:
    if "applied" in report:
        exchange.acknowledgements[request_id] = Acknowledgement(report["applied"], report["reason"])
    if "gates" in report:
        exchange.gates[request_id] = tuple(map(GateReport.from_wire, report["gates"]))
    exchange.engine = report.get("engine", 0)


def _take_scores(
    frontend: Frontend, exchange: Exchange, request_id: str, report: dict[str, Any]
) -> None:
    log = exchange.scores.get(request_id)
    if log is None:
        return
    log.engine = exchange.engine
    for position, numbers, scores in report.get("scores", ()):
        index = [log.number(frontend.readings[n]) for n in numbers]
        fresh = log.add_scores(position, index, scores)
        if frontend.observer is not None:
            for i, new in zip(index, fresh, strict=True):
                frontend.observer.read(exchange, log.engine, log.readings[i], new)


def _take_steps(frontend: Frontend, report: dict[str, Any]) -> None:
    steps = report.pop("steps", ())
    if frontend.observer is not None:
        for seconds, *edited in steps:
            counts = {k: int(n) for k, n in zip(EDIT_KINDS, edited, strict=True)}
            frontend.observer.stepped(report["engine"], seconds, counts)


def _observe(what: Callable[..., None], *args: Any) -> None:
    """Do what only looks: an error of it must not end everybody's requests, as it would here."""
    try:
        what(*args)
    except Exception:
        logger.exception("a report of the engine's was lost")


def wrap_output_processor(output_processor_class: Any) -> None:
    """Count steered requests and hand each report to the exchange that it belongs to."""
    add_request = output_processor_class.add_request
    process_outputs = output_processor_class.process_outputs
    abort_requests = output_processor_class.abort_requests
    finish_request = output_processor_class._finish_request

    @functools.wraps(add_request)
    def counted_add_request(
        self: Any,
        request: Any,
        prompt: Any,
        parent_req: Any = None,
        request_index: int = 0,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        # A session whose input arrives in pieces adds to a request that is there, and may end it so.
        known = request.request_id in self.request_states
        add_request(self, request, prompt, parent_req, request_index, *args, **kwargs)
        if known or request.request_id not in self.request_states:
            return
        frontend = frontend_of(self)
        params = request.sampling_params
        if frontend is not None and params is not None:
            stamp = read_stamp(params.extra_args)
            if stamp is not None:
                frontend.enter(request, stamp, request_index)

    @functools.wraps(process_outputs)
    def reporting_process_outputs(
        self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        frontend = frontend_of(self)
        failed = []
        for output in engine_core_outputs:
            exchange = None if frontend is None else frontend.exchange_of(output.request_id)
            log = None if exchange is None else exchange.scores.get(output.request_id)
            if log is not None:
                _observe(log.add_tokens, output.new_token_ids)
            carried = output.kv_transfer_params
            if not carried or CARRIER not in carried:
                continue
            report = carried.pop(CARRIER)
            output.kv_transfer_params = carried or None
            if frontend is not None:
                _observe(_take_steps, frontend, report)
                if exchange is not None:
                    _take_outcome(exchange, output.request_id, report)
                    _observe(_take_scores, frontend, exchange, output.request_id, report)
            state = self.request_states.get(output.request_id)
            if not report.get("applied", True) and state is not None:
                failed.append((state, plan_not_placed(exchange, report["reason"])))
        processed = process_outputs(self, engine_core_outputs, *args, **kwargs)
        for state, error in failed:
            if state.parent_req is not None:
                # One error ends the whole request; its other sequences have nobody to answer to.
                processed.reqs_to_abort.extend(
                    self.abort_requests([state.parent_req.request_id], internal=True)
                )
            if state.queue is not None:
                # Last, since it takes the place of whatever the queue holds.
                state.queue.put(error)
        return processed

    @functools.wraps(abort_requests)
    def counted_abort_requests(self: Any, *args: Any, **kwargs: Any) -> Any:
        aborted = abort_requests(self, *args, **kwargs)
        frontend = frontend_of(self)
        if frontend is not None:
            for request_id in aborted:
                frontend.leave(request_id, finished=False)
        return aborted

    @functools.wraps(finish_request)
    def counted_finish_request(self: Any, req_state: Any) -> None:
        finish_request(self, req_state)
        frontend = frontend_of(self)
        if frontend is not None:
            frontend.leave(req_state.request_id, finished=True)

    output_processor_class.add_request = counted_add_request
    output_processor_class.process_outputs = reporting_process_outputs
    output_processor_class.abort_requests = counted_abort_requests
    output_processor_class._finish_request = counted_finish_request


def wrap_delivery(request_state_class: Any, collector_class: Any) -> None:
    """Note which tokens of a stream are on their way to the client, so that each chunk has its scores.

    A stream's task takes an output from the collector, makes chunks of it, and comes back for the next
    once they are sent; what it has taken when a chunk passes is what the chunk's tokens are among.
    """
    new_completion_output = request_state_class._new_completion_output
    get = collector_class.get
    get_nowait = collector_class.get_nowait

    @functools.wraps(new_completion_output)
    def named_completion_output(self: Any, *args: Any, **kwargs: Any) -> Any:
        completion = new_completion_output(self, *args, **kwargs)
        # Outputs that are merged keep the first one's object, which is of the same request.
        setattr(completion, _REQUEST, self.request_id)
        return completion

    def deliver(collector: Any, output: Any) -> Any:
        exchange = current_exchange.get()
        if exchange is not None and exchange.trace and collector.aggregate:
            for completion in getattr(output, "outputs", ()):
                log = exchange.scores.get(getattr(completion, _REQUEST, ""))
                if log is not None:
                    log.deliver(len(completion.token_ids))
        return output

    @functools.wraps(get)
    async def delivering_get(self: Any) -> Any:
        return deliver(self, await get(self))

    @functools.wraps(get_nowait)
    def delivering_get_nowait(self: Any) -> Any:
        return deliver(self, get_nowait(self))

    request_state_class._new_completion_output = named_completion_output
    collector_class.get = delivering_get
    collector_class.get_nowait = delivering_get_nowait
