"""Every score that leaves the engine is the reference's, whatever the scheduler did on the way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from steering.engine.control import activate_local, activate_readings_local
from steering.engine.exchange import Exchange, current_exchange
from steering.readings import Reading, compile_readings
from steering.reference import probe_scores
from tests.steering.engine.harness import Request, World, engine, exchange_for, sampling

pytestmark = pytest.mark.engine

# The probes of the worlds: affine after an early and a middle layer, cosine, and at the final norm.
PROBES = ("early@1", "middle@1", "similar@1", "top@1")
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def world(tiny_world: World) -> World:
    return tiny_world


@pytest.fixture(scope="module")
def readings(world: World) -> tuple[Reading, ...]:
    return compile_readings(PROBES, world.store, world.fingerprint)


def start(world: World, readings: Sequence[Reading], **options: Any) -> Any:
    with engine(world.path, **options) as llm:
        activate_local(llm, world.plans.values(), world.store)
        activate_readings_local(llm, readings, world.store, world.thinking)
    return llm


@pytest.fixture(scope="module")
def roomy(world: World, readings: tuple[Reading, ...]) -> Any:
    return start(world, readings)


@pytest.fixture(scope="module")
def starved(world: World, readings: tuple[Reading, ...]) -> Any:
    """An engine that must split every prompt and preempt requests."""
    return start(
        world,
        readings,
        block_size=32,
        num_gpu_blocks_override=24,
        max_num_batched_tokens=32,
        max_num_seqs=16,
        max_model_len=256,
    )


def ask(
    llm: Any, world: World, requests: Sequence[tuple[Request, Sequence[Reading], Any]]
) -> list[tuple[Exchange, Any]]:
    """All requests as one batch; each with what is read of it, and how much of that is traced."""
    from vllm.inputs.engine import tokens_input

    exchanges = []
    for number, (request, readings, trace) in enumerate(requests):
        exchange = exchange_for(world, request)
        exchange.readings, exchange.trace = tuple(readings), trace
        token = current_exchange.set(exchange)
        try:
            prompt = tokens_input(list(request.prompt))
            llm.llm_engine.add_request(f"{id(exchange)}-{number}", prompt, sampling(request))
        finally:
            current_exchange.reset(token)
        exchanges.append(exchange)
    finished: list[Any] = []
    while llm.llm_engine.has_unfinished_requests():
        finished += [output for output in llm.llm_engine.step() if output.finished]
    outputs = sorted(finished, key=lambda output: int(output.request_id.rpartition("-")[2]))
    return list(zip(exchanges, outputs, strict=True))


def check(
    world: World, request: Request, exchange: Exchange, output: Any
) -> tuple[int, float, float]:
    """Hold all scores of all choices against the reference.

    Returns:
        How many there were, the largest difference, and how far apart they are among themselves.
    """
    count, worst, spread = 0, 0.0, 0.0
    first = 0 if exchange.trace == "all" else len(request.prompt) - 1
    for choice in output.outputs:
        log = exchange.scores_of_choice(choice.index)
        assert log is not None
        text = [*request.prompt, *choice.token_ids]
        policy = world.policies[request.policy] if request.policy else None
        for n, reading in enumerate(log.readings):
            expected = probe_scores(
                world.model,
                policy,
                world.store,
                reading.key.partition("/")[0],
                text[:-1],
                len(request.prompt),
                request.strength,
                output=reading.output,
                tokenizer=world.tokenizer,
                thinking=world.thinking,
            ).numpy()
            trace = log.trace(n)
            assert [position for position, _ in trace] == list(range(first, len(text) - 1))
            found = np.array([score for _, score in trace])
            worst = max(worst, float(np.abs(found - expected[first:]).max()))
            spread = max(spread, float(found.max() - found.min()))
            assert log.summary(n).missing == 0
            count += len(found)
    return count, worst, spread


QUESTIONS = (
    "Which way does the wind blow today, and how should a small boat set its sails?",
    "Explain in two sentences why ships float.",
    "Write a short letter to a friend about the sea.",
)


def mixed(world: World, readings: tuple[Reading, ...]) -> list[tuple[Request, Any, Any]]:
    prompts = [tuple(world.prompt(question)) for question in QUESTIONS]
    batch: list[tuple[Request, Any, Any]] = []
    policies = [None, "one", "everything", "phases", "gate-above", "gate-think", "prompt"]
    for n, policy in enumerate(policies):
        for m, prompt in enumerate(prompts):
            # Some are read by all probes, some by a few, some by none, and of some the prompt too.
            chosen = (readings, readings[1:3], (), readings[-1:])[(n + m) % 4]
            trace = ("all", True, False)[(n + 2 * m) % 3]
            batch.append((Request(prompt, policy, max_tokens=48), chosen, trace))
    batch.append((Request(prompts[0], n=3, max_tokens=48), readings, True))
    batch.append((Request(prompts[1], "split", -1.0, max_tokens=48), readings, "all"))
    return batch


def assert_agrees(world: World, batch: list[tuple[Request, Any, Any]], answers: Any) -> None:
    total, worst, spread = 0, 0.0, 0.0
    for (request, readings, _), (exchange, output) in zip(batch, answers, strict=True):
        if not readings:
            assert exchange.scores == {}
            continue
        count, difference, apart = check(world, request, exchange, output)
        total, worst, spread = total + count, max(worst, difference), max(spread, apart)
    print(f"\n[scores] {total} scores, worst difference {worst:.1e}, spread {spread:.2f}")
    assert total > 2000
    assert spread > 0.5, "scores that are all alike show nothing"
    assert worst <= TOLERANCE


def test_scores_of_a_mixed_batch_are_the_reference_s(world, roomy, readings) -> None:
    batch = mixed(world, readings)
    assert_agrees(world, batch, ask(roomy, world, batch))


def test_chunked_and_preempted_requests_have_each_score_once(world, starved, readings) -> None:
    def preemptions() -> float:
        found = (m for m in starved.get_metrics() if m.name == "vllm:num_preemptions")
        return sum(m.value for m in found)

    before = preemptions()
    batch = mixed(world, readings)
    assert max(len(request.prompt) for request, _, _ in batch) > 32
    answers = ask(starved, world, batch)
    assert preemptions() > before
    assert_agrees(world, batch, answers)


def test_the_prompt_s_end_is_read_where_the_prefix_comes_from_the_cache(
    world, roomy, readings
) -> None:
    # A block on CPU has 128 tokens, unless it is told otherwise.
    prompt = tuple(world.prompt(" ".join(QUESTIONS) * 3))
    request = Request(prompt, max_tokens=8)
    for trace, cached in ((True, False), (True, True), ("all", False), (True, True)):
        ((exchange, output),) = ask(roomy, world, [(request, readings, trace)])
        assert (output.num_cached_tokens > 0) is cached
        _, worst, _ = check(world, request, exchange, output)
        assert worst <= TOLERANCE


def test_an_answer_that_a_string_stops_has_the_scores_of_its_tokens(world, roomy, readings) -> None:
    prompt = tuple(world.prompt(QUESTIONS[1]))
    ((_, full),) = ask(roomy, world, [(Request(prompt, "one"), readings, True)])
    middle = full.outputs[0].text[len(full.outputs[0].text) // 3 :].strip()[:4]
    request = Request(prompt, "one", stop=(middle,))
    ((exchange, output),) = ask(roomy, world, [(request, readings, True)])
    assert output.outputs[0].finish_reason == "stop"
    assert 0 < len(output.outputs[0].token_ids) < 64
    count, worst, _ = check(world, request, exchange, output)
    assert count == len(readings) * len(output.outputs[0].token_ids)
    assert worst <= TOLERANCE


def test_what_a_reading_comes_to_is_what_its_scores_come_to(world, roomy, readings) -> None:
    requests = [(Request(tuple(world.prompt(q)), max_tokens=96), readings, True) for q in QUESTIONS]
    seen = set()
    for (request, _, _), (exchange, output) in zip(
        requests, ask(roomy, world, requests), strict=True
    ):
        (choice,) = output.outputs
        log = exchange.scores_of_choice(0)
        text = [*request.prompt, *choice.token_ids]
        from steering.reference import text_phases, token_texts

        phases = text_phases(
            token_texts(world.tokenizer, text), len(request.prompt), world.thinking
        ).phases
        runs = log.runs()
        told = [phase for phase, first, last in runs for _ in range(first, last + 1)]
        assert told == list(phases[len(request.prompt) - 1 : -1])
        for n in range(len(readings)):
            scores = dict(log.trace(n))
            summary = log.summary(n)
            read = range(len(request.prompt), len(text) - 1)
            assert summary.tokens == len(read)
            assert summary.prompt_end == scores[len(request.prompt) - 1]
            ends = [p for p in read if phases[p] == "think_end"]
            stop = ends[0] if ends else len(text)
            while stop in read and phases[stop] == "think_end":
                stop += 1
            thinking = sorted(scores[p] for p in read if phases[p] == "thinking" and p < stop)
            top = thinking[-math.ceil(len(thinking) / 10) :]
            assert summary.plateau == (pytest.approx(np.mean(top)) if top else None)
            assert summary.final == (scores[stop - 1] if ends else None)
            answer = [scores[p] for p in read if phases[p] == "answer"]
            assert summary.answer_start == (answer[0] if answer else None)
            assert summary.answer_mean == (pytest.approx(np.mean(answer)) if answer else None)
            seen |= {k for k in ("plateau", "final", "cliff") if getattr(summary, k) is not None}
    assert seen == {"plateau", "final", "cliff"}


def test_scores_lost_on_the_way_are_missing_and_the_others_stay_where_they_belong(
    world, roomy, readings, monkeypatch
) -> None:
    reader = roomy.llm_engine.model_executor.driver_worker.worker.trimtab_worker.step.reader
    take, steps, lost = reader.take, [], []

    def losing() -> Any:
        found = take()
        steps.append(found)
        if found is not None and len(steps) % 5 == 0:
            lost.append(found)
            return None
        return found

    monkeypatch.setattr(reader, "take", losing)
    requests = [
        (Request(tuple(world.prompt(q)), "one", max_tokens=24), readings, True) for q in QUESTIONS
    ]
    answers = ask(roomy, world, requests)
    assert len(lost) >= 4
    gone: dict[str, set[int]] = {}
    for snapshot in lost:
        for request_id, (position, _, scores) in snapshot.by_request().items():
            count = len(scores) // 4 // len(readings)
            gone.setdefault(request_id, set()).update(range(position, position + count))
    for (request, _, _), (exchange, output) in zip(requests, answers, strict=True):
        (choice,) = output.outputs
        log = exchange.scores_of_choice(0)
        mine = gone[exchange.request_of_choice(0)]
        text = [*request.prompt, *choice.token_ids]
        for n, reading in enumerate(readings):
            expected = probe_scores(
                world.model,
                world.policies["one"],
                world.store,
                reading.key.partition("/")[0],
                text[:-1],
                len(request.prompt),
                output=reading.output,
            )
            trace = log.trace(n)
            every = range(len(request.prompt) - 1, len(text) - 1)
            assert [position for position, _ in trace] == [p for p in every if p not in mine]
            assert all(abs(score - float(expected[p])) <= TOLERANCE for p, score in trace)
            assert log.summary(n).missing == len(mine) > 0
