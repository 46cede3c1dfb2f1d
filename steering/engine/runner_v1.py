"""The adapter for vLLM's Model Runner V1, the one that CPU uses and CUDA offers.

Extension points, checked against vLLM 0.32 and 0.33 (``v1/worker/gpu_model_runner.py``):

* ``GPUModelRunner._update_states(scheduler_output)``: requests enter and leave. A preempted request
  keeps its entry in ``runner.requests`` and its placement with it.
* ``GPUModelRunner._prepare_inputs(scheduler_output, num_scheduled_tokens)``: the batch is final when
  the original returns, and the host buffers that were copied to the device are guarded by the same
  ``synchronize_input_prep`` as the runner's own, so the next step does not overwrite them in flight.
* ``GPUModelRunner.sample_tokens(grammar_output)``: returns the step's output, or with asynchronous
  scheduling an object that yields it later.
"""

from __future__ import annotations

from typing import Any

from steering.engine.runner import WorkerRequests
from steering.engine.tables import SteeringTables

REPORTS = "trimtab_reports"
"""Attribute of a ``ModelRunnerOutput`` that carries :meth:`WorkerRequests.take_reports`."""


class RunnerV1Adapter:
    """Makes a ``GPUModelRunner`` or ``CPUModelRunner`` steer, by subclassing the instance's class."""

    def attach(self, runner: Any, tables: SteeringTables, requests: WorkerRequests) -> None:
        """See :class:`steering.engine.runner.RunnerAdapter`."""
        base = type(runner)

        class Steered(base):  # type: ignore[valid-type,misc]
            def _update_states(self, scheduler_output: Any) -> Any:
                for request_id in scheduler_output.finished_req_ids:
                    requests.leave(request_id)
                for new in scheduler_output.scheduled_new_reqs:
                    params = new.sampling_params
                    requests.enter(new.req_id, params.extra_args if params is not None else None)
                return super()._update_states(scheduler_output)

            def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
                prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
                if not requests.placements:
                    tables.clear()
                    return prepared
                batch = self.input_batch
                count = batch.num_reqs
                tables.fill(
                    [requests.placements.get(request_id) for request_id in batch.req_ids[:count]],
                    batch.num_computed_tokens_cpu[:count],
                    num_scheduled_tokens,
                    batch.num_prompt_tokens[:count],
                )
                return prepared

            def sample_tokens(self, grammar_output: Any) -> Any:
                output = super().sample_tokens(grammar_output)
                reports = requests.take_reports()
                if reports:
                    _attach(output, reports)
                return output

        Steered.__name__ = Steered.__qualname__ = f"Steered{base.__name__}"
        runner.__class__ = Steered


def _attach(output: Any, reports: dict[str, tuple[bool, str | None]]) -> None:
    from vllm.v1.outputs import (
        EMPTY_MODEL_RUNNER_OUTPUT,
        AsyncModelRunnerOutput,
        ModelRunnerOutput,
    )

    if output is EMPTY_MODEL_RUNNER_OUTPUT:
        return  # shared by everyone, and read by nobody
    if isinstance(output, ModelRunnerOutput):
        setattr(output, REPORTS, reports)
    elif isinstance(output, AsyncModelRunnerOutput):
        original = output.get_output

        def get_output() -> Any:
            inner = original()
            setattr(inner, REPORTS, reports)
            return inner

        output.get_output = get_output
