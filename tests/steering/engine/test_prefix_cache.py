"""Cached keys and values are shared by requests that compute the same, and by no others."""

from __future__ import annotations

import itertools

import pytest

from steering.engine.admission import derive_salt
from steering.engine.control import activate_local
from steering.engine.exchange import Exchange, current_exchange
from steering.engine.stamp import Stamp
from tests.steering.engine.harness import Answer, Request, assert_parity, engine, run

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def llm(tiny_world):
    with engine(tiny_world.path, block_size=32) as llm:
        activate_local(llm, tiny_world.plans.values(), tiny_world.store)
        yield llm


prompts = itertools.count()


@pytest.fixture
def prompt(tiny_world) -> tuple[int, ...]:
    """A prompt of several cache blocks that no other test has used."""
    text = f"{next(prompts)} times the tide turned before the fleet came in. " * 8
    ids = tuple(tiny_world.prompt(text))
    assert len(ids) > 3 * 32
    return ids


def one(llm, world, prompt, policy=None, strength=1.0) -> Answer:
    return run(llm, world, [Request(prompt, policy, strength, max_tokens=16)])[0]


def same(a: Answer, b: Answer) -> bool:
    return a.token_ids == b.token_ids and a.logprobs == b.logprobs


def test_equal_policies_hit_and_repeat_to_the_bit(llm, tiny_world, prompt) -> None:
    first, second = (one(llm, tiny_world, prompt, "one") for _ in range(2))
    third = one(llm, tiny_world, prompt, "one")
    assert first.cached_tokens == 0
    assert second.cached_tokens >= 64
    assert same(second, third)


def test_different_policies_and_strengths_never_meet(llm, tiny_world, prompt) -> None:
    cold = [
        one(llm, tiny_world, prompt, policy, strength)
        for policy, strength in [
            (None, 1.0),
            ("one", 1.0),
            ("one", 0.5),
            ("every", 1.0),
            ("generation", 1.0),
        ]
    ]
    assert [a.cached_tokens for a in cold] == [0] * len(cold)
    assert len({a.logprobs for a in cold}) == len(cold)


def test_unsteered_answers_are_the_same_bytes_before_and_after_steered_ones(
    llm, tiny_world, prompt
) -> None:
    before = one(llm, tiny_world, prompt)
    steered = one(llm, tiny_world, prompt, "several")
    after = one(llm, tiny_world, prompt)
    assert not same(before, steered)
    assert after.cached_tokens >= 64
    assert same(before, after)


def test_an_unsteered_request_after_a_cold_steered_one_finds_nothing(
    llm, tiny_world, prompt
) -> None:
    steered = one(llm, tiny_world, prompt, "several")
    plain = one(llm, tiny_world, prompt)
    llm.reset_prefix_cache()
    fresh = one(llm, tiny_world, prompt)
    assert steered.cached_tokens == plain.cached_tokens == fresh.cached_tokens == 0
    assert same(plain, fresh)


def test_strength_0_shares_the_cache_of_unsteered_requests(llm, tiny_world, prompt) -> None:
    plain = one(llm, tiny_world, prompt)
    zero = one(llm, tiny_world, prompt, "several", 0.0)
    assert zero.cached_tokens >= 64
    assert same(plain, zero)


def test_a_policy_by_another_name_with_the_same_effect_shares_the_cache(
    llm, tiny_world, prompt
) -> None:
    tiny_world.add_policy(
        "twin",
        {
            "renamed": {
                "add": {
                    "direction": "alpha@1",
                    "unit": "relative",
                    "strength": 0.15,
                    "layers": [(tiny_world.num_layers - 1) // 2],
                },
                "scope": ["generation", "prompt"],
            }
        },
    )
    try:
        assert tiny_world.plans["twin"].id == tiny_world.plans["one"].id
        one(llm, tiny_world, prompt, "one")
        assert one(llm, tiny_world, prompt, "twin").cached_tokens >= 64
    finally:
        del tiny_world.plans["twin"], tiny_world.policies["twin"]


def test_the_salt_tells_clients_plans_and_strengths_apart() -> None:
    salts = [
        derive_salt(client, stamp)
        for client in (None, "mine", "yours")
        for stamp in (None, Stamp("p", 1.0), Stamp("p", 0.5), Stamp("q", 1.0))
    ]
    assert salts[0] is None
    assert len(set(salts)) == len(salts)


def test_a_client_cannot_forge_the_salt_of_a_plan(llm, tiny_world, prompt) -> None:
    """Sending the derived salt itself must neither read nor poison the plan's blocks."""
    from vllm import SamplingParams

    plan = tiny_world.plans["several"]
    forged = derive_salt(None, Stamp(plan.id, 1.0))
    params = SamplingParams(temperature=0.0, max_tokens=16, logprobs=0, ignore_eos=True)
    llm.generate({"prompt_token_ids": list(prompt), "cache_salt": forged}, params, use_tqdm=False)
    steered = one(llm, tiny_world, prompt, "several")
    assert steered.cached_tokens == 0
    plain = llm.generate(
        {"prompt_token_ids": list(prompt), "cache_salt": forged}, params, use_tqdm=False
    )[0]
    assert plain.num_cached_tokens >= 64
    assert tuple(plain.outputs[0].token_ids) == one(llm, tiny_world, prompt).token_ids


def test_a_request_that_belongs_to_an_exchange_runs_under_its_plan(llm, tiny_world, prompt) -> None:
    """What the HTTP layer sets is what the engine does, and the worker's word comes back with it."""
    from vllm import SamplingParams

    plan = tiny_world.plans["several"]
    params = {"temperature": 0.0, "max_tokens": 16, "ignore_eos": True}

    def answer(exchange: Exchange | None, **stamp: object) -> tuple[int, ...]:
        token = current_exchange.set(exchange)
        try:
            (output,) = llm.generate(
                {"prompt_token_ids": list(prompt)},
                SamplingParams(**params, **stamp),
                use_tqdm=False,
            )
        finally:
            current_exchange.reset(token)
        return tuple(output.outputs[0].token_ids)

    exchange = Exchange("several@1", "enforce", "closed", 1.0, plan)
    steered = answer(exchange)
    assert exchange.applied() == (True, None)
    assert steered == answer(None, extra_args={"trimtab": {"plan": plan.id, "strength": 1.0}})
    assert steered != answer(None)


# -- the answer of one turn in the prompt of the next ----------------------------------------------

PHASED = (
    "generation",
    "prompt",
    "prompt-end",
    "split",
    "first",
    "phases",
    "gate-above",
    "gate-below",
    "gate-think",
)
"""Policies under which it matters where the prompt ends."""

UNPHASED = ("one", "several", "clamp")


@pytest.mark.parametrize("length", [128, 129, 150], ids=["on", "behind", "between"])
def test_what_was_read_as_an_answer_is_not_what_the_next_turn_finds_as_a_prompt(
    llm, tiny_world, length
) -> None:
    """Turn 2's prompt is turn 1's with its answer and more: the same tokens, but another prompt's end.

    ``length``: turn 1's prompt ends on the border of a block of 32 tokens, just behind one, or between.
    """
    texts = [
        tuple(tiny_world.prompt(f"{next(prompts)} ships and a harbour. " * 40))[:length]
        for _ in range(4)
    ]
    turn = [Request(prompt) for prompt in texts]
    turn += [Request(texts[0], policy) for policy in (*PHASED, *UNPHASED)]
    first = run(llm, tiny_world, turn)
    more = tuple(tiny_world.prompt("And what of the tide?"))
    again = [
        Request((*a.request.prompt, *a.token_ids, *more), a.request.policy, max_tokens=16)
        for a in first
    ]
    # The last token of an answer is never run.
    computed = length + len(first[0].token_ids) - 1
    assert computed // 32 > length // 32, "no block of the answer is full"

    second = run(llm, tiny_world, again)

    assert {gate.fired for a in second for gate in a.gates} == {True, False}
    assert_parity(tiny_world, second, f"second turn, {length} tokens")
    for answer in second:
        if answer.request.policy in PHASED:
            # Up to the first prompt's last token, which another prompt's end makes another token.
            assert answer.cached_tokens == (length - 1) // 32 * 32, answer.request.policy
        else:
            assert answer.cached_tokens == computed // 32 * 32, answer.request.policy


def test_the_same_turn_again_finds_all_of_its_prompt(llm, tiny_world, prompt) -> None:
    """Where the prompt ends at the same place, blocks that reach its end are shared too."""
    aligned = prompt[: len(prompt) // 32 * 32] + prompt[:1]
    for policy in PHASED:
        first, second = (one(llm, tiny_world, aligned, policy) for _ in range(2))
        assert (first.cached_tokens, second.cached_tokens) == (0, len(aligned) - 1), policy
        assert second.token_ids == first.token_ids
