"""The start-up proof passes on a steered engine, and names the cause on one that only looks steered."""

from __future__ import annotations

import asyncio

import pytest

from directions.errors import TrimtabError
from steering.engine.control import activate, rank_status
from steering.engine.exchange import Exchange, current_exchange
from steering.engine.proof import prove

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def loop():
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def async_engine(tiny_world, loop):
    """The engine client of a server: the engine runs in a process of its own."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    async def start():
        return AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=str(tiny_world.path),
                dtype="float32",
                enforce_eager=True,
                max_model_len=256,
                kv_cache_memory_bytes=64 * 2**20,
            )
        )

    engine = loop.run_until_complete(start())
    yield engine
    engine.shutdown()
    loop.run_until_complete(end_tasks())


def test_every_layer_is_shown_to_act_and_nothing_is_left_behind(async_engine, loop) -> None:
    proof = loop.run_until_complete(prove(async_engine))
    print(f"\n{proof}")
    assert proof.layers == (0, 1, 2, 3)
    assert proof.least_effect > 1e-2
    assert proof.drowned is not None
    assert proof.drowned < 0.2 * proof.apart
    for rank in loop.run_until_complete(rank_status(async_engine)):
        assert not [plan for plan in rank["plans"] if plan.startswith("proof")]
    frontend = async_engine.input_processor.trimtab_frontend
    assert frontend.requests == {}
    assert not [plan for plan in frontend.plans if plan.startswith("proof")]


def test_a_raw_prompt_is_steered_though_it_is_processed_on_another_thread(
    async_engine, tiny_world, loop
) -> None:
    """Executor threads do not see context variables by themselves."""
    from vllm import SamplingParams

    loop.run_until_complete(activate(async_engine, [tiny_world.plans["several"]], tiny_world.store))
    exchange = Exchange("several@1", "enforce", "closed", 1.0, tiny_world.plans["several"])
    answers = {}

    async def ask(name: str, selected: Exchange | None) -> None:
        current_exchange.set(selected)
        async for output in async_engine.generate(
            "Who keeps the light when the keeper sleeps?",
            SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True),
            f"raw-{name}",
        ):
            answers[name] = output.outputs[0].token_ids

    for name, selected in (("plain", None), ("steered", exchange)):
        loop.run_until_complete(ask(name, selected))
    assert exchange.applied() == (True, None)
    assert answers["plain"] != answers["steered"]


def test_a_client_that_leaves_gives_its_slot_back(async_engine, tiny_world, loop) -> None:
    from vllm import SamplingParams

    frontend = loop.run_until_complete(
        activate(async_engine, [tiny_world.plans["one"]], tiny_world.store)
    )
    exchange = Exchange("one@1", "enforce", "closed", 1.0, tiny_world.plans["one"])
    started = asyncio.Event()

    async def client() -> None:
        current_exchange.set(exchange)
        async for _ in async_engine.generate(
            "Count every wave. " * 4,
            SamplingParams(max_tokens=200, ignore_eos=True, n=2),
            "leaver",
        ):
            started.set()

    async def leave() -> None:
        task = asyncio.create_task(client())
        await started.wait()
        assert frontend.ledger.in_use == 1
        assert len(frontend.requests) == 2
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    loop.run_until_complete(leave())
    assert frontend.ledger.in_use == 0
    assert frontend.requests == {}


def test_an_engine_whose_hooks_are_gone_fails_the_proof(async_engine, tiny_world, loop) -> None:
    """The worst case: everything loads, every request is reported as placed, and nothing steers."""
    removed = loop.run_until_complete(async_engine.collective_rpc(_unhook))
    # The hooks of 4 layers, of the two blocks of each, and of the final norm; and each layer's heads.
    assert removed == [(13, 4)]
    with pytest.raises(TrimtabError, match="changes nothing at any layer") as caught:
        loop.run_until_complete(prove(async_engine))
    assert caught.value.code == "E_PROOF_NO_EFFECT"
    assert "VLLM_DISABLE_COMPILE_CACHE" in caught.value.message


async def end_tasks() -> None:
    """What the engine client left running would keep the interpreter from ending."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _unhook(worker) -> tuple[int, int]:
    hooks = forwards = 0
    for module in worker.model_runner.get_model().modules():
        hooks += len(module._forward_hooks)
        module._forward_hooks.clear()
        forwards += vars(module).pop("forward", None) is not None
    return hooks, forwards
