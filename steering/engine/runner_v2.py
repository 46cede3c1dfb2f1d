"""The adapter for vLLM's Model Runner V2, the one that CUDA uses unless told otherwise.

Extension points, checked against vLLM 0.32 and 0.33 (``v1/worker/gpu/model_runner.py``), in the order in
which ``GPUModelRunner.execute_model`` reaches them:

* ``finish_requests(scheduler_output)``: requests leave. It drops the state of those that are finished and
  of those that are preempted; the scheduler output tells the two apart. A preempted request comes back
  as a new one, so it keeps its placement, and only ``finished_req_ids`` leave. A preempted request that
  is aborted while it waits is among them too.
* ``add_requests(scheduler_output)``: requests enter, or enter again after a preemption. Then
  ``prefill_token_ids`` holds the prompt and what was generated before, ``prompt_len`` the prompt alone.
* ``prepare_inputs(scheduler_output, batch_req_state, …)``: returns the ``InputBatch``, with the requests
  in the order in which the model sees them and the input ids in place. It runs for real batches only.
* ``_dummy_run(…)``, ``capture_model(…)``: profiling, warm-up, capture and the empty steps of a
  data-parallel rank, which do not come through ``prepare_inputs`` and must be plain.
* ``sample_tokens(grammar_output)``: returns the step's output, in the last pipeline stage as an
  ``AsyncModelRunnerOutput``, also where scheduling is synchronous.

CUDA graphs and asynchronous scheduling:

* A step whose graph is FULL replays it without entering the model, ``forward`` hooks or a forward
  context. What the replay reads are the tables' contents at their fixed addresses, and those are written
  by copies that ``prepare_inputs`` enqueues on the stream that is current there. ``execute_model``
  switches streams nowhere between ``prepare_inputs`` and the replay, so the copies are done when the
  replay starts, and they start when the step before is done with the tables. PIECEWISE and eager steps
  run on the same stream after the same hook.
* With asynchronous scheduling the host prepares step N+1 while the device still runs step N. What the
  host knows about a batch (order, computed, scheduled, prompt lengths) is exact then too, as long as
  nothing is drafted; the ids of tokens sampled in step N are on the device only, which is why a
  :class:`Batch` carries the device's input ids.
* Unlike V1, this runner has no event that keeps the host from refilling pinned buffers which a copy
  still reads. Like its own inputs, what :meth:`WorkerRequests.prepare` sends therefore has to lie in a
  fresh buffer each step.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from steering.engine.runner import WorkerRequests, attach_reports
from steering.engine.step import Batch

MODULE = "vllm.v1.worker.gpu.model_runner"
"""Where this runner's class lives; V1's has the same name elsewhere."""

_Tokens = np.ndarray[tuple[int], np.dtype[np.int32]]


class RunnerV2Adapter:
    """Makes a V2 ``GPUModelRunner`` or ``CPUModelRunner`` steer, by subclassing the instance's class."""

    @staticmethod
    def fits(runner: Any) -> bool:
        """Whether ``runner`` is a Model Runner V2."""
        return any(base.__module__ == MODULE for base in type(runner).__mro__)

    def attach(self, runner: Any, requests: WorkerRequests) -> None:
        """See :class:`steering.engine.runner.RunnerAdapter`."""
        base = type(runner)
        # Each request's ids at its last entry. The list is not copied, and in the scheduler's process it
        # is the scheduler's own, which grows; hence the length.
        prefills: dict[str, tuple[list[int], int]] = {}

        class Steered(base):  # type: ignore[valid-type,misc]
            def finish_requests(self, scheduler_output: Any) -> None:
                for request_id in scheduler_output.finished_req_ids:
                    requests.leave(request_id)
                    prefills.pop(request_id, None)
                super().finish_requests(scheduler_output)

            def add_requests(self, scheduler_output: Any) -> None:
                for new in scheduler_output.scheduled_new_reqs:
                    prefills[new.req_id] = (new.prefill_token_ids, len(new.prefill_token_ids))
                    params = new.sampling_params
                    requests.enter(new.req_id, params.extra_args if params is not None else None)
                super().add_requests(scheduler_output)

            def prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
                batch = super().prepare_inputs(*args, **kwargs)
                states = self.req_states

                def tokens(index: int, start: int, stop: int) -> _Tokens:
                    known, length = prefills[batch.req_ids[index]]
                    if stop <= length:
                        return np.array(known[start:stop], dtype=np.int32)
                    # Ids sampled since then; this waits for the device.
                    row = states.all_token_ids.gpu[batch.idx_mapping_np[index], start:stop]
                    return np.asarray(row.cpu().numpy(), dtype=np.int32)

                requests.prepare(
                    Batch(
                        request_ids=batch.req_ids,
                        computed=batch.num_computed_tokens_np,
                        scheduled=batch.num_scheduled_tokens,
                        prompt_lengths=states.prompt_len.np[batch.idx_mapping_np],
                        tokens=tokens,
                        input_ids=batch.input_ids[: batch.num_tokens],
                    )
                )
                return batch

            def _dummy_run(self, *args: Any, **kwargs: Any) -> Any:
                requests.step.clear()
                return super()._dummy_run(*args, **kwargs)

            def capture_model(self, *args: Any, **kwargs: Any) -> Any:
                requests.step.clear()
                return super().capture_model(*args, **kwargs)

            def sample_tokens(self, grammar_output: Any) -> Any:
                output = super().sample_tokens(grammar_output)
                return attach_reports(output, requests.take_reports())

        Steered.__name__ = Steered.__qualname__ = f"Steered{base.__name__}"
        runner.__class__ = Steered
