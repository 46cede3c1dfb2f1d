"""The adapter for vLLM's Model Runner V1, the one that CPU uses and CUDA offers.

Extension points, checked against vLLM 0.32 and 0.33 (``v1/worker/gpu_model_runner.py``):

* ``GPUModelRunner._update_states(scheduler_output)``: requests enter and leave. A preempted request
  keeps its entry in ``runner.requests`` and its placement with it.
* ``GPUModelRunner._prepare_inputs(scheduler_output, num_scheduled_tokens)``: the batch and the input ids
  on the device are final when the original returns.
* ``GPUModelRunner.sample_tokens(grammar_output)``: returns the step's output, or with asynchronous
  scheduling an object that yields it later.
* ``GPUModelRunner._dummy_run(…)``: profiling, warm-up, and the empty steps of a data-parallel rank; they
  do not come through ``_prepare_inputs`` and must be plain.
* ``InputBatch``: ``num_reqs``, ``req_ids``, ``num_computed_tokens_cpu``, ``num_prompt_tokens``,
  ``token_ids_cpu``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from steering.engine.runner import WorkerRequests, attach_reports
from steering.engine.step import Batch


class RunnerV1Adapter:
    """Makes a ``GPUModelRunner`` or ``CPUModelRunner`` steer, by subclassing the instance's class."""

    def attach(self, runner: Any, requests: WorkerRequests) -> None:
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
                batch = self.input_batch
                count = batch.num_reqs

                def tokens(index: int, start: int, stop: int) -> np.ndarray[Any, Any]:
                    found: np.ndarray[Any, Any] = batch.token_ids_cpu[index, start:stop]
                    return found

                requests.prepare(
                    Batch(
                        batch.req_ids[:count],
                        batch.num_computed_tokens_cpu[:count],
                        num_scheduled_tokens,
                        batch.num_prompt_tokens[:count],
                        tokens,
                        self.input_ids.gpu,
                    )
                )
                return prepared

            def _dummy_run(self, *args: Any, **kwargs: Any) -> Any:
                requests.step.clear()
                return super()._dummy_run(*args, **kwargs)

            def sample_tokens(self, grammar_output: Any) -> Any:
                output = super().sample_tokens(grammar_output)
                return attach_reports(output, requests.take_reports())

        Steered.__name__ = Steered.__qualname__ = f"Steered{base.__name__}"
        runner.__class__ = Steered
