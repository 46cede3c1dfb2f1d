"""Serve one batch on Model Runner V2 in this process and print what came of it; run by test_runner_v2.

Usage: v2_engine.py MODEL STORE. ``TRIMTAB_ENGINE`` is set. The engine is starved: it must split every
prompt and preempt requests.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.steering.engine import interpreted_triton

QUESTIONS = ("Why do ships float?", "Which way does the wind blow today?")
MAX_TOKENS = 28


def batch_of(world: Any) -> list[Any]:
    """Plain requests for the floor, each policy of the world once, and a strength of its own."""
    from tests.steering.engine.harness import Request

    prompts = [tuple(world.prompt(question)) for question in QUESTIONS]
    # The floor is the largest difference that is seen among plain requests, so there are several.
    plain = [*prompts, *(prompt[::-1] for prompt in prompts), *(prompt[5:] for prompt in prompts)]
    requests = [Request(prompt, max_tokens=MAX_TOKENS) for prompt in plain]
    for n, policy in enumerate(world.policies):
        requests.append(Request(prompts[n % 2], policy, max_tokens=MAX_TOKENS))
    return [*requests, Request(prompts[0], "every", -1.0, max_tokens=MAX_TOKENS)]


@dataclass
class Watch:
    """What the worker's side saw, taken down between the runner, the adapter and the requests.

    Attributes:
        preempted: ids that the scheduler took back, as often as it did.
        resumed: ids that came again with a part of their answer.
        split: ids whose prompt did not fit into one step.
        entered, left: ids in the order of the adapter's calls.
        texts: every token id that the model read, by request and absolute position.
        prompt_lengths: by request, every value that a batch gave.
        reported: ids whose placement the scheduler was told of.
        wrong: descriptions of batches that contradict themselves.
    """

    preempted: list[str] = field(default_factory=list)
    resumed: list[str] = field(default_factory=list)
    split: list[str] = field(default_factory=list)
    entered: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    texts: dict[str, dict[int, int]] = field(default_factory=dict)
    prompt_lengths: dict[str, list[int]] = field(default_factory=dict)
    reported: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def attach(self, runner: Any, requests: Any, scheduler: Any) -> None:
        update = scheduler.update_from_output
        execute, enter, leave = runner.execute_model, requests.enter, requests.leave
        prepare = requests.prepare

        from steering.engine.runner import REPORTS

        def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            self.preempted += scheduler_output.preempted_req_ids or ()
            for new in scheduler_output.scheduled_new_reqs:
                if len(new.prefill_token_ids) > new.prompt_len:
                    self.resumed.append(new.req_id)
                scheduled = scheduler_output.num_scheduled_tokens[new.req_id]
                if new.num_computed_tokens + scheduled < new.prompt_len:
                    self.split.append(new.req_id)
            return execute(scheduler_output, *args, **kwargs)

        def watched_enter(request_id: str, extra_args: Any) -> None:
            self.entered.append(request_id)
            enter(request_id, extra_args)

        def watched_leave(request_id: str) -> None:
            self.left.append(request_id)
            leave(request_id)

        def watched_prepare(batch: Any) -> None:
            self._read(batch)
            prepare(batch)

        def update_from_output(scheduler_output: Any, model_runner_output: Any) -> Any:
            reports = getattr(model_runner_output, REPORTS, {})
            self.reported += [name for name, report in reports.items() if "applied" in report]
            return update(scheduler_output, model_runner_output)

        scheduler.update_from_output = update_from_output
        runner.execute_model = execute_model
        requests.enter, requests.leave = watched_enter, watched_leave
        requests.prepare = watched_prepare

    def _read(self, batch: Any) -> None:
        at = 0
        ids = batch.input_ids.tolist()
        if len(ids) != batch.scheduled.sum():
            self.wrong.append(f"{len(ids)} ids for {batch.scheduled.sum()} tokens")
        for index, request_id in enumerate(batch.request_ids):
            computed, scheduled = int(batch.computed[index]), int(batch.scheduled[index])
            text = self.texts.setdefault(request_id, {})
            for position in range(computed, computed + scheduled):
                if text.setdefault(position, ids[at]) != ids[at]:
                    self.wrong.append(f"{request_id} reads another token at {position}")
                at += 1
            lengths = self.prompt_lengths.setdefault(request_id, [])
            if int(batch.prompt_lengths[index]) not in lengths:
                lengths.append(int(batch.prompt_lengths[index]))
            # What the host says of the past is what the model has read, before and after preemptions.
            known = batch.tokens(index, 0, computed).tolist()
            if known != [text.get(position, known[position]) for position in range(computed)]:
                self.wrong.append(f"{request_id} has another past than the model read")


def main(model: str, store: str) -> None:
    from steering.engine.control import activate_local
    from tests.steering.engine.harness import (
        Request,
        build_world,
        compare,
        engine,
        every_kind,
        run,
        standard_policies,
    )

    world = build_world(Path(model), Path(store), ("t", "e"))
    standard_policies(world)
    every_kind(world)
    requests = batch_of(world)
    with engine(
        Path(model),
        block_size=32,
        num_gpu_blocks_override=9,
        max_num_batched_tokens=16,
        max_num_seqs=8,
        max_model_len=128,
    ) as llm:
        activate_local(llm, world.plans.values(), world.store)
        worker = llm.llm_engine.model_executor.driver_worker.worker
        steering = worker.trimtab_worker
        watch = Watch()
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        watch.attach(worker.model_runner, steering.requests, scheduler)
        started = time.monotonic()
        answers = run(llm, world, requests)
        seconds = time.monotonic() - started

        cleared: list[bool] = []
        clear = steering.step.clear
        steering.step.clear = lambda: (cleared.append(True), clear())[1]
        worker.model_runner._dummy_run(4)
        steering.step.clear = clear
        dummy_cleared = len(cleared)
        # Workers are told of the last finished requests with the next step.
        run(llm, world, [Request(requests[0].prompt, max_tokens=1)])
    parity = compare(world, answers)
    result = {
        "runner": [base.__module__ for base in type(worker.model_runner).__mro__],
        "watch": asdict(watch),
        "prompts": [list(a.request.prompt) for a in answers],
        "answers": [list(a.token_ids) for a in answers],
        "policies": [a.request.policy for a in answers],
        "phases": sorted({phase for a in answers for phase in world.phases(a)}),
        "fired": [gate.fired for a in answers for gate in a.gates],
        "pinned": steering.tables.pinned,
        "dummy_cleared": dummy_cleared,
        "seconds": seconds,
        **asdict(parity),
    }
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    interpreted_triton.install()
    main(*sys.argv[1:])
