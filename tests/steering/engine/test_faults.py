"""What goes wrong is found before compute, reaches one client, and harms no neighbour."""

from __future__ import annotations

import numpy as np
import pytest

from steering.engine.admission import SlotsExhaustedError
from steering.engine.control import activate_local
from steering.engine.exchange import Exchange, current_exchange
from steering.engine.payload import RowPayload, uniform_payload
from tests.steering.engine.harness import (
    Request,
    answers_of,
    compare,
    engine,
    exchange_for,
    run,
    sampling,
)

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def llm(tiny_world):
    with engine(tiny_world.path, block_size=32) as llm:
        activate_local(llm, tiny_world.plans.values(), tiny_world.store)
        yield llm


def worker_tables(llm):
    return llm.llm_engine.model_executor.driver_worker.worker.trimtab_worker.tables


def frontend(llm):
    return llm.llm_engine.input_processor.trimtab_frontend


@pytest.fixture
def prompt(tiny_world) -> tuple[int, ...]:
    return tuple(tiny_world.prompt("Who keeps the light when the keeper sleeps? " * 4))


def play(llm, world, requests):
    """Like :func:`run`, for requests whose policy is not applied: their exchanges and vLLM's outputs."""
    exchanges = [exchange_for(world, request) for request in requests]
    for number, (request, exchange) in enumerate(zip(requests, exchanges, strict=True)):
        token = current_exchange.set(exchange)
        try:
            prompt = {"prompt_token_ids": list(request.prompt)}
            llm.llm_engine.add_request(f"play-{number}", prompt, sampling(request))
        finally:
            current_exchange.reset(token)
    finished = []
    while llm.llm_engine.has_unfinished_requests():
        finished += [output for output in llm.llm_engine.step() if output.finished]
    return exchanges, sorted(finished, key=lambda output: output.request_id)


@pytest.mark.parametrize(
    ("stamp", "code"),
    [
        ({"plan": "not-active", "strength": 1.0}, "E_PLAN_INACTIVE"),
        ({"plan": "x", "strength": float("nan")}, "E_STAMP"),
        ({"plan": "x", "strength": float("inf")}, "E_STAMP"),
        ({"plan": "x", "strength": "1"}, "E_STAMP"),
        ({"plan": "x", "strength": True}, "E_STAMP"),
        ({"plan": 3, "strength": 1.0}, "E_STAMP"),
        ({"plan": "x"}, "E_STAMP"),
        ("guard", "E_STAMP"),
    ],
)
def test_a_bad_stamp_is_a_validation_error_before_the_engine_sees_it(
    llm, tiny_world, prompt, stamp, code
) -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    steps = llm.llm_engine.engine_core.engine_core.scheduler
    with pytest.raises(VLLMValidationError, match=code):
        llm.generate(
            {"prompt_token_ids": list(prompt)},
            SamplingParams(max_tokens=4, extra_args={"trimtab": stamp}),
            use_tqdm=False,
        )
    assert not steps.requests
    assert frontend(llm).requests == {}


def test_a_client_of_the_http_layer_cannot_stamp_its_own_request(llm, prompt) -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    token = current_exchange.set(Exchange("off", "off", "closed", 1.0, None))
    try:
        with pytest.raises(VLLMValidationError, match="E_RESERVED_KEY"):
            llm.generate(
                {"prompt_token_ids": list(prompt)},
                SamplingParams(
                    max_tokens=4, extra_args={"trimtab": {"plan": "x", "strength": 1.0}}
                ),
                use_tqdm=False,
            )
    finally:
        current_exchange.reset(token)


def test_a_plan_that_a_worker_lost_is_an_error_and_leaves_no_trace_in_the_cache(
    llm, tiny_world, prompt
) -> None:
    """The worker's tables are robbed of one plan behind the server's back."""
    plan = tiny_world.plans["several"]
    robbed = worker_tables(llm)._plans[plan.id]
    worker_tables(llm).remove_plan(plan.id)
    batch = [Request(prompt, max_tokens=16), Request(prompt, "several", max_tokens=16)]
    batch += [Request(prompt, "one", max_tokens=16)]
    exchanges, outputs = play(llm, tiny_world, batch)
    assert [output.outputs[0].finish_reason for output in outputs] == ["length", "error", "length"]
    assert list(outputs[1].outputs[0].token_ids) == []
    assert [e.applied() for e in exchanges[1:]] == [(False, "plan_unknown"), (True, None)]
    neighbours = [
        answer for n in (0, 2) for answer in answers_of(batch[n], exchanges[n], outputs[n])
    ]
    parity = compare(tiny_world, neighbours)
    assert max(parity.floor, parity.worst) < 1e-4, "a neighbour of the lost request was harmed"

    worker_tables(llm).add_plan(robbed)
    found = run(llm, tiny_world, batch)
    # Nothing that the lost request computed unsteered may be found under the steered salt.
    assert found[1].cached_tokens == 0
    assert compare(tiny_world, found).worst < 1e-4
    assert frontend(llm).requests == {}


def test_the_worker_s_refusal_reaches_the_exchange(llm, tiny_world, prompt) -> None:
    plan = tiny_world.plans["split"]
    robbed = worker_tables(llm)._plans[plan.id]
    worker_tables(llm).remove_plan(plan.id)
    try:
        (exchange,), _ = play(llm, tiny_world, [Request(prompt, "split", max_tokens=4)])
    finally:
        worker_tables(llm).add_plan(robbed)
    assert exchange.applied() == (False, "plan_unknown")


def test_when_slots_run_out_closed_policies_are_refused_and_open_ones_say_so(
    tiny_world, prompt, monkeypatch
) -> None:
    monkeypatch.setenv("TRIMTAB_SLOTS", "3")
    with engine(tiny_world.path) as llm:
        plans = {n: p for n, p in tiny_world.plans.items() if n in ("one", "every", "prompt")}
        activate_local(llm, plans.values(), tiny_world.store)
        from vllm import SamplingParams

        core = llm.llm_engine
        for name in ("one", "every"):
            core.add_request(
                name,
                {"prompt_token_ids": list(prompt)},
                SamplingParams(
                    temperature=0.0,
                    max_tokens=8,
                    extra_args={"trimtab": {"plan": plans[name].id, "strength": 1.0}},
                ),
            )
        assert frontend(llm).ledger.snapshot() == {"in_use": 2, "free": 0}
        for on_failure in ("closed", "open"):
            exchange = Exchange("prompt@1", "enforce", on_failure, 1.0, plans["prompt"])
            token = current_exchange.set(exchange)
            try:
                if on_failure == "closed":
                    with pytest.raises(SlotsExhaustedError, match="E_SLOTS_EXHAUSTED"):
                        core.add_request(
                            "closed",
                            {"prompt_token_ids": list(prompt)},
                            SamplingParams(max_tokens=8),
                        )
                else:
                    core.add_request(
                        "open", {"prompt_token_ids": list(prompt)}, SamplingParams(max_tokens=8)
                    )
                    assert exchange.applied() == (False, "slots_exhausted")
            finally:
                current_exchange.reset(token)
        while core.has_unfinished_requests():
            core.step()
        assert frontend(llm).ledger.snapshot() == {"in_use": 0, "free": 2}
        recovered = run(llm, tiny_world, [Request(prompt, "prompt", max_tokens=8)])
        assert compare(tiny_world, recovered).worst < 1e-4


def test_an_aborted_request_gives_its_slot_back(llm, tiny_world, prompt) -> None:
    from vllm import SamplingParams

    core = llm.llm_engine
    core.add_request(
        "leaver",
        {"prompt_token_ids": list(prompt)},
        SamplingParams(
            max_tokens=64,
            ignore_eos=True,
            extra_args={"trimtab": {"plan": tiny_world.plans["one"].id, "strength": 1.0}},
        ),
    )
    core.step()
    assert frontend(llm).ledger.in_use == 1
    assert worker_tables(llm).pinned >= 1
    core.abort_request(["leaver"])
    run(llm, tiny_world, [Request(prompt, max_tokens=2)])
    assert frontend(llm).ledger.in_use == 0
    assert worker_tables(llm).pinned == 0


def test_a_plan_of_another_width_is_refused_by_the_worker_and_not_activated(
    llm, tiny_world
) -> None:
    wide = uniform_payload("wide", RowPayload((0,), np.ones((1, 65), dtype=np.float32)))
    # An answer and not an exception, behind which other ranks' answers would stay unread.
    (answer,) = llm.collective_rpc("trimtab_activate", args=([wide.to_wire()],))
    assert "65 wide" in answer["refused"]
    assert "wide" not in worker_tables(llm).plans
