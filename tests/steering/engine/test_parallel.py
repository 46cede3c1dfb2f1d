"""Several ranks and several engines steer as one process does, and one that cannot is told.

Each engine client here is a server's: the engines and their workers are processes of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from directions.errors import TrimtabError
from steering.engine.control import (
    activate,
    activate_local,
    activate_readings,
    rank_status,
)
from steering.engine.exchange import current_exchange
from steering.engine.proof import prove
from steering.readings import Reading
from tests.steering.engine.harness import (
    TOLERANCE,
    Answer,
    Request,
    World,
    answers_of,
    assert_parity,
    engine,
    exchange_for,
    run,
    sampling,
)
from tests.steering.engine.parallel_batch import (
    EARLY_GATES,
    POLICIES,
    batch,
    parallel_policies,
)
from tests.steering.engine.test_proof import end_tasks

pytestmark = pytest.mark.engine

# vLLM cannot run eager pipeline stages on CPU; tracing without generating code starts faster.
TRACED = {
    "enforce_eager": False,
    "compilation_config": {"mode": "DYNAMO_TRACE_ONCE", "backend": "eager"},
}
ALL = (0, 1, 2, 3)
STEERED = [name for name in POLICIES if name is not None]
ALL_POLICIES = (*POLICIES, *EARLY_GATES)


@dataclass(frozen=True)
class Mode:
    """A way of running: what vLLM is told, and the layers of each rank of each engine."""

    options: dict[str, Any]
    layers: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def policies(self) -> tuple[str | None, ...]:
        """What can be active: gates cannot reach over pipeline stages."""
        return POLICIES if "pipeline_parallel_size" in self.options else ALL_POLICIES

    @property
    def readable(self) -> tuple[int, ...]:
        """Where probes can be read: the last stage's layers, and the final norm, counted as one more."""
        return (*self.layers[0][-1], len(ALL))

    @property
    def places(self) -> list[tuple[int, int]]:
        """Engine and rank of each worker."""
        return [(n, rank) for n, ranks in enumerate(self.layers) for rank in range(len(ranks))]


MODES = {
    "tensor": Mode({"tensor_parallel_size": 2}, ((ALL, ALL),)),
    "pipeline": Mode({"pipeline_parallel_size": 2, **TRACED}, (((0, 1), (2, 3)),)),
    "data": Mode({"data_parallel_size": 2}, ((ALL,), (ALL,))),
}


@dataclass
class Parallel:
    """A running engine client, and the loop that it lives on."""

    mode: Mode
    world: World
    client: Any
    loop: asyncio.AbstractEventLoop
    numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def frontend(self) -> Any:
        return self.client.input_processor.trimtab_frontend

    def wait(self, coroutine: Any) -> Any:
        return self.loop.run_until_complete(coroutine)

    def activate(self, *names: str) -> None:
        plans = [self.world.plans[name] for name in names]
        self.wait(activate(self.client, plans, self.world.store))

    def read(self, readings: Sequence[Reading]) -> None:
        self.wait(activate_readings(self.client, readings, self.world.store, self.world.thinking))

    def on_ranks(self, function: Any, *args: Any) -> None:
        self.wait(self.client.collective_rpc(function, args=args))

    def run(self, requests: Sequence[Request], number: int | None = None) -> list[Answer]:
        """All requests at once, on one of the engines if its number is given."""

        from vllm.inputs.engine import tokens_input

        async def ask(request: Request) -> Answer:
            exchange = exchange_for(self.world, request, self.frontend)
            # In a task of its own, so the context is too.
            current_exchange.set(exchange)
            answers = self.client.generate(
                tokens_input(list(request.prompt)),
                sampling(request),
                f"request-{next(self.numbers)}",
                data_parallel_rank=number,
            )
            outputs = [output async for output in answers]
            (answer,) = answers_of(request, exchange, outputs[-1])
            return answer

        async def ask_all() -> list[Answer]:
            return await asyncio.gather(*(ask(request) for request in requests))

        return list(self.wait(ask_all()))


@pytest.fixture(scope="module")
def world(tiny_world: World) -> World:
    parallel_policies(tiny_world)
    return tiny_world


@pytest.fixture(scope="module")
def alone(world: World) -> list[Answer]:
    """The answers of one process."""
    with engine(world.path) as llm:
        steered = [*STEERED, *EARLY_GATES]
        activate_local(llm, [world.plans[name] for name in steered], world.store)
        return run(llm, world, batch(world, ALL_POLICIES))


@pytest.fixture(scope="module", params=MODES)
def parallel(request: pytest.FixtureRequest, world: World) -> Iterator[Parallel]:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    mode = MODES[request.param]
    loop = asyncio.new_event_loop()

    async def start() -> Any:
        options = {"enforce_eager": True, **mode.options}
        return AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=str(world.path),
                dtype="float32",
                max_model_len=256,
                kv_cache_memory_bytes=64 * 2**20,
                **options,
            )
        )

    running = Parallel(mode, world, loop.run_until_complete(start()), loop)
    running.activate(*(name for name in mode.policies if name is not None))
    running.read([reading for reading in world.readings if reading.layer in mode.readable])
    yield running
    running.client.shutdown()
    running.wait(end_tasks())
    loop.close()


def test_every_rank_of_every_engine_has_its_layers_and_all_plans(parallel: Parallel) -> None:
    ranks = parallel.wait(rank_status(parallel.client))
    assert [(rank["engine"], rank["rank"]) for rank in ranks] == parallel.mode.places
    for rank in ranks:
        layers = parallel.mode.layers[rank["engine"]][rank["rank"]]
        assert tuple(rank["hooked"]["add"]) == layers
        assert {parallel.world.plans[name].id for name in STEERED} <= set(rank["plans"])


def test_the_proof_passes_on_every_engine(parallel: Parallel) -> None:
    proof = parallel.wait(prove(parallel.client))
    print(f"\n{proof}")
    assert proof.engines == len(parallel.mode.layers)
    assert proof.layers == ALL
    assert proof.least_effect > 1e-2
    assert proof.drowned is not None
    assert proof.drowned < 0.2 * proof.apart
    for rank in parallel.wait(rank_status(parallel.client)):
        assert not [plan for plan in rank["plans"] if plan.startswith("proof")]


def test_answers_are_those_of_one_process_and_of_the_reference(
    parallel: Parallel, alone: list[Answer], request: pytest.FixtureRequest
) -> None:
    mode = request.node.callspec.params["parallel"]
    engines = range(len(parallel.mode.layers))
    for number in engines:
        requests = batch(parallel.world, parallel.mode.policies)
        answers = parallel.run(requests, number if len(engines) > 1 else None)
        label = f"{mode} parallel, engine {number}"
        parity = assert_parity(parallel.world, answers, label)
        assert parity.scores_read > 32 * len(answers)
        assert all(answer.scores for answer in answers)
        alone = [answer for answer in alone if answer.request in requests]
        assert [a.token_ids for a in answers] == [a.token_ids for a in alone]
        assert any(gate.fired for a in answers for gate in a.gates)
        apart = max(
            abs(here - there)
            for mine, other in zip(answers, alone, strict=True)
            for here, there in zip(mine.logprobs, other.logprobs, strict=True)
        )
        print(f"[{label}] from one process: {apart:.1e}")
        assert apart <= TOLERANCE


def test_what_one_rank_or_stage_cannot_know_is_refused(parallel: Parallel) -> None:
    refused = {
        MODES["tensor"].layers: ("rows", "E_ACTIVATION", "renormalise: row"),
        MODES["pipeline"].layers: ("gate-above", "E_GATE_PIPELINE", "other than the last"),
    }
    if parallel.mode is MODES["data"]:
        parallel.activate("rows")
        return
    if parallel.mode is MODES["pipeline"]:
        early = [reading for reading in parallel.world.readings if reading.layer == 0]
        with pytest.raises(TrimtabError, match="pipeline stage other than the last") as caught:
            parallel.read(early)
        assert caught.value.code == "E_PROBE_PIPELINE"
        assert {reading.id for reading in early}.isdisjoint(parallel.frontend.readings)
    name, code, words = refused[parallel.mode.layers]
    with pytest.raises(TrimtabError, match=words) as caught:
        parallel.activate(name)
    assert caught.value.code == code
    assert parallel.world.plans[name].id not in parallel.frontend.plans


@pytest.mark.parametrize("which", [0, 1])
def test_a_rank_that_refuses_a_plan_fails_the_activation_and_not_the_answers(
    parallel: Parallel, which: int
) -> None:
    from vllm.exceptions import VLLMValidationError

    number, rank = parallel.mode.places[which]
    plan = parallel.world.plans["one"]
    prompt = batch(parallel.world)[0].prompt
    steered = [Request(prompt, name, max_tokens=8) for name in POLICIES[:5]]
    before = parallel.run(steered)

    parallel.on_ranks(_refuse, number, rank)
    with pytest.raises(TrimtabError, match=f"rank {rank} of engine {number} refused") as caught:
        parallel.activate("one")
    assert caught.value.code == "E_ACTIVATION"
    assert "no room here" in caught.value.message
    assert plan.id not in parallel.frontend.plans
    with pytest.raises(VLLMValidationError, match="E_PLAN_INACTIVE"):
        parallel.run([Request(prompt, "one", max_tokens=8)])

    # No answer of the failed call may be left to be taken for that of another.
    again = parallel.run(steered)
    assert [a.token_ids for a in again] == [a.token_ids for a in before]
    parallel.on_ranks(_accept)
    parallel.activate("one")
    places = [(r["engine"], r["rank"]) for r in parallel.wait(rank_status(parallel.client))]
    assert places == parallel.mode.places
    for n in range(len(parallel.mode.layers)):
        answers = parallel.run(
            [Request(prompt, max_tokens=8), Request(prompt, "one", max_tokens=8)],
            n if len(parallel.mode.layers) > 1 else None,
        )
        assert answers[0].token_ids == before[0].token_ids
        assert answers[1].finish_reason == "length"
        assert answers[1].logprobs != answers[0].logprobs
    from steering.engine.control import deactivate

    parallel.wait(deactivate(parallel.client, [plan.id]))


@pytest.mark.parametrize("which", [0, 1])
def test_one_place_whose_hooks_are_gone_fails_the_proof(parallel: Parallel, which: int) -> None:
    """The others go on steering, and every request is reported as applied."""
    number, rank = parallel.mode.places[which]
    if parallel.mode is MODES["pipeline"]:
        pytest.skip("traced code no longer asks the hooks")
    parallel.on_ranks(_unhook, number, rank)
    with pytest.raises(TrimtabError, match="the start-up proof failed") as caught:
        parallel.wait(prove(parallel.client))
    parallel.on_ranks(_hook_again)
    print(f"\n{caught.value}")
    if parallel.mode is MODES["data"]:
        assert caught.value.code == "E_PROOF_NO_EFFECT"
        assert f"failed on engine {number} of 2" in caught.value.message
    parallel.wait(prove(parallel.client))


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "ci"])
def test_stages_that_vllm_cannot_run_here_are_refused_with_the_reason(
    world: World, monkeypatch: pytest.MonkeyPatch, traced: bool
) -> None:
    from vllm import envs
    from vllm.engine.arg_utils import AsyncEngineArgs

    if traced:
        monkeypatch.setattr(envs, "VLLM_CPU_CI_ENV", True, raising=False)
    arguments = AsyncEngineArgs(
        model=str(world.path), pipeline_parallel_size=2, enforce_eager=not traced
    )
    with pytest.raises(TrimtabError, match="enforce-eager") as caught:
        arguments.create_engine_config()
    assert caught.value.code == "E_ENGINE_MODE"
    assert caught.value.field == "--pipeline-parallel-size"


# --- run in the workers


def _is_at(wrapper: Any, number: int, rank: int) -> bool:
    parallel = wrapper.worker.vllm_config.parallel_config
    return (parallel.data_parallel_index, wrapper.worker.rank) == (number, rank)


def _refuse(wrapper: Any, number: int, rank: int) -> None:
    if _is_at(wrapper, number, rank):

        def add_plan(plan: Any) -> None:
            raise MemoryError("no room here")

        wrapper.worker.trimtab_worker.tables.add_plan = add_plan


def _accept(wrapper: Any) -> None:
    with contextlib.suppress(AttributeError):
        del wrapper.worker.trimtab_worker.tables.add_plan


def _unhook(wrapper: Any, number: int, rank: int) -> None:
    worker = wrapper.worker
    if _is_at(wrapper, number, rank):
        modules = list(worker.model_runner.get_model().modules())
        worker.unhooked = [(module, dict(module._forward_hooks)) for module in modules]
        for module in modules:
            module._forward_hooks.clear()


def _hook_again(wrapper: Any) -> None:
    for module, hooks in getattr(wrapper.worker, "unhooked", ()):
        module._forward_hooks.update(hooks)
