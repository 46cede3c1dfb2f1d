"""What gates decide comes back with the answer that they decided for, while it is being made."""

from __future__ import annotations

import itertools

import pytest

from steering.engine.control import activate_local
from steering.engine.exchange import current_exchange
from tests.steering.engine.harness import (
    Answer,
    Request,
    assert_parity,
    compare,
    engine,
    exchange_for,
    run,
    sampling,
)

pytestmark = pytest.mark.engine

QUESTIONS = ("Why do ships float?", "Who keeps the light?", "Which way does the wind blow?")

ids = itertools.count()


@pytest.fixture(scope="module")
def llm(tiny_world):
    with engine(tiny_world.path) as llm:
        activate_local(llm, tiny_world.plans.values(), tiny_world.store)
        yield llm


@pytest.fixture(scope="module")
def prompts(tiny_world) -> list[tuple[int, ...]]:
    return [tuple(tiny_world.prompt(question)) for question in QUESTIONS]


@pytest.mark.parametrize("policy", ["gate-above", "gate-below"])
def test_each_of_several_answers_reports_the_decision_at_its_prompt_s_end(
    llm, tiny_world, prompts, policy
) -> None:
    answers = run(llm, tiny_world, [Request(p, policy, n=3, max_tokens=8) for p in prompts])
    assert len({a.token_ids for a in answers}) > len(prompts), (
        "all answers to a prompt are the same"
    )
    compare(tiny_world, answers)
    for prompt in prompts:
        reports = [a.gates for a in answers if a.request.prompt == prompt]
        assert reports == [reports[0]] * 3
        assert reports[0][0].at == len(prompt) - 1
    assert len({a.gates for a in answers}) == len(prompts)


def test_each_of_several_answers_reports_what_was_decided_in_it(llm, tiny_world, prompts) -> None:
    """Sampled answers end their thinking at different places, or never."""
    requests = [Request(p, policy, n=4) for p in prompts for policy in ("gate-think", "gate-token")]
    answers = run(llm, tiny_world, requests)
    compare(tiny_world, answers)
    for request in requests:
        assert len({a.gates for a in answers if a.request is request}) > 1


def test_choices_of_several_prompts_report_in_the_order_of_the_prompts(
    llm, tiny_world, prompts
) -> None:
    """One HTTP request with a list of prompts is one exchange; vLLM numbers the prompts by a suffix."""
    from vllm.inputs.engine import tokens_input

    requests = [Request(p, "gate-think", n=2) for p in prompts * 4]
    exchange = exchange_for(tiny_world, requests[0])
    name = f"cmpl-{next(ids)}"
    token = current_exchange.set(exchange)
    try:
        for number in reversed(range(len(requests))):
            request = requests[number]
            prompt = tokens_input(list(request.prompt))
            llm.llm_engine.add_request(f"{name}-{number}", prompt, sampling(request))
    finally:
        current_exchange.reset(token)
    outputs = {output.request_id: output for output in finished(llm)}
    answers = [
        answer_to(request, outputs[f"{name}-{n}"], index, exchange.gates_of_choice(2 * n + index))
        for n, request in enumerate(requests)
        for index in range(2)
    ]
    assert exchange.applied() == (True, None)
    assert len({a.gates for a in answers}) > len(prompts)
    compare(tiny_world, answers)
    assert exchange.gates_of_choice(len(answers)) == ()


@pytest.mark.parametrize("policy", ["gate-above", "gate-think", "gate-token"])
def test_what_is_reported_while_an_answer_is_made_is_true_of_the_tokens_so_far(
    llm, tiny_world, prompts, policy
) -> None:
    from vllm.inputs.engine import tokens_input
    from vllm.sampling_params import RequestOutputKind

    request = Request(prompts[0], policy, max_tokens=48)
    streamed = sampling(request)
    streamed.output_kind = RequestOutputKind.CUMULATIVE
    exchange = exchange_for(tiny_world, request)
    token = current_exchange.set(exchange)
    try:
        prompt = tokens_input(list(request.prompt))
        llm.llm_engine.add_request(f"streamed-{next(ids)}", prompt, streamed)
    finally:
        current_exchange.reset(token)
    parts = []
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            assert output.kv_transfer_params is None, "the carrier is seen by clients"
            assert exchange.applied() == (True, None)
            parts.append(answer_to(request, output, 0, exchange.gates_of_choice(0)))
    assert [len(part.token_ids) for part in parts] == list(range(1, 49))
    compare(tiny_world, parts)
    if policy == "gate-above":
        assert parts[0].gates[0].at == len(request.prompt) - 1
    else:
        assert len({part.gates for part in parts}) > 1


def test_a_gate_opens_the_edits_of_the_stream_that_it_has_just_read(
    llm, tiny_world, prompts
) -> None:
    """A gate and an edit of the residual stream may meet at one layer; the gate reads first."""
    middle = (tiny_world.num_layers - 1) // 2
    alpha = {"direction": "alpha@1", "unit": "relative", "strength": 0.5, "layers": middle}
    names = []
    for n, edit in enumerate(
        ({"add": alpha}, {"ablate": {"direction": "beta@1", "layers": middle}})
    ):
        for key in ("above", "below"):
            names.append(f"meeting-{n}-{key}")
            tiny_world.add_policy(
                names[-1],
                {"a": edit},
                {"g": {"probe": "middle@1", "at": "prompt_end", key: 0.5, "then": ["a"]}},
            )
    plans = [tiny_world.plans[name] for name in names]
    try:
        activate_local(llm, plans, tiny_world.store)
        requests = [Request(p, name) for p in prompts for name in (None, "one", *names)]
        answers = run(llm, tiny_world, requests)
        assert {gate.fired for a in answers for gate in a.gates} == {True, False}
        assert_parity(tiny_world, answers, "a gate and an edit at one layer")
    finally:
        for name in names:
            del tiny_world.plans[name], tiny_world.policies[name]


def finished(llm):
    while llm.llm_engine.has_unfinished_requests():
        yield from (output for output in llm.llm_engine.step() if output.finished)


def answer_to(request, output, index, gates) -> Answer:
    sequence = output.outputs[index]
    logprobs = tuple(
        entry[token].logprob
        for token, entry in zip(sequence.token_ids, sequence.logprobs, strict=True)
    )
    return Answer(
        request,
        tuple(sequence.token_ids),
        logprobs,
        sequence.text,
        sequence.finish_reason,
        output.num_cached_tokens or 0,
        gates,
    )
