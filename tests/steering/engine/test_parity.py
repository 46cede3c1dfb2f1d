"""The engine says what the reference says, whatever the scheduler does with the requests."""

from __future__ import annotations

import pytest
import torch

from steering.engine.control import activate_local
from steering.reference import steered_logprobs
from tests.steering.engine.harness import TOLERANCE, Request, assert_parity, engine, run

pytestmark = pytest.mark.engine

QUESTIONS = (
    "Which way does the wind blow today, and how should a small boat set its sails?",
    "Explain in two sentences why ships float.",
    "Write a short letter to a friend about the sea.",
)


def mixed_batch(world):
    """Plain, steered and differently steered requests, every scope and strength, some with several answers."""
    prompts = [tuple(world.prompt(q)) for q in QUESTIONS]
    # As many plain tokens as steered ones: the floor is the largest difference among them.
    requests = [Request(p) for p in prompts] + [Request(p, n=16) for p in prompts]
    for n, policy in enumerate(world.policies):
        requests += [Request(prompts[n % 3], policy), Request(prompts[(n + 1) % 3], policy)]
    requests += [Request(prompts[0], "one", s) for s in (-1.0, 0.0, 0.5, 2.0)]
    requests += [Request(prompts[1], "split", s) for s in (-1.0, 0.5, 2.0)]
    requests += [Request(prompts[2], "several", n=4)]
    return requests


@pytest.fixture(scope="module", params=["tiny_world", "demo_world"])
def world(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def roomy(world):
    """An engine that takes every prompt in one piece and never runs out of cache."""
    with engine(world.path) as llm:
        activate_local(llm, world.plans.values(), world.store)
        yield llm


@pytest.fixture(scope="module")
def starved(world):
    """An engine that must split every prompt and preempt requests."""
    with engine(
        world.path,
        block_size=32,
        num_gpu_blocks_override=24,
        max_num_batched_tokens=32,
        max_num_seqs=16,
        max_model_len=256,
    ) as llm:
        activate_local(llm, world.plans.values(), world.store)
        yield llm


def metric(llm, name: str) -> float:
    return sum(m.value for m in llm.get_metrics() if m.name == name)


def test_a_mixed_batch_agrees_with_the_reference(world, roomy) -> None:
    answers = run(roomy, world, mixed_batch(world))
    assert all(len(a.token_ids) == 64 for a in answers)
    assert_parity(world, answers, f"{world.path.name}, mixed batch")
    assert_gates_matter(world, answers)


def test_chunked_prefill_and_preemption_agree_with_the_reference(world, starved) -> None:
    spans, interrupted = record_schedule(starved)
    before = metric(starved, "vllm:num_preemptions")
    batch = mixed_batch(world)
    answers = run(starved, world, batch)
    preemptions = metric(starved, "vllm:num_preemptions") - before
    split = sum(1 for chunks in spans.values() if len(chunks) > 1)
    gated = {plan.id for plan in world.plans.values() if plan.gates}
    phases = {p for a in answers if a.request.policy == "phases" for p in world.phases(a)}
    print(
        f"\n{preemptions:.0f} preemptions, {len(gated & interrupted)} of {len(gated)} policies with gates "
        f"among them, {split} prompts computed in several chunks"
    )
    assert preemptions > 0
    assert gated & interrupted, "no request was preempted after its gates were decided"
    assert split > len(batch) / 2
    assert phases == {"thinking", "think_end", "answer"}
    assert_parity(world, answers, f"{world.path.name}, chunked and preempted")
    assert_gates_matter(world, answers)


def test_cached_prefixes_are_hit_and_agree_with_the_reference(world, starved_free) -> None:
    prompt = tuple(world.prompt(" ".join(QUESTIONS)))
    backwards = tuple(world.prompt(" ".join(reversed(QUESTIONS))))
    # Several plain requests, since the floor is the largest difference that is seen among them.
    requests = [Request(prompt), Request(backwards), Request(prompt * 2), Request(backwards * 2)]
    requests += [Request(prompt, "several"), Request(prompt, "split"), Request(prompt, "prompt")]
    run(starved_free, world, requests)
    again = run(starved_free, world, requests)
    assert all(a.cached_tokens >= 32 for a in again)
    assert_parity(world, again, f"{world.path.name}, from the prefix cache")


def test_stop_strings_end_steered_answers_where_the_reference_has_them(world, roomy) -> None:
    prompt = tuple(world.prompt(QUESTIONS[1]))
    full = run(roomy, world, [Request(prompt, "one")])[0]
    middle = full.text[len(full.text) // 3 :].strip()[:4]
    stopped = run(roomy, world, [Request(prompt, "one", stop=(middle,)), Request(prompt)])
    assert stopped[0].finish_reason == "stop"
    assert 0 < len(stopped[0].token_ids) < 64
    assert stopped[0].token_ids == full.token_ids[: len(stopped[0].token_ids)]
    assert_parity(world, stopped, f"{world.path.name}, stop string")


@pytest.fixture(scope="module")
def starved_free(world):
    """An engine with small cache blocks, so that short prompts fill several."""
    with engine(world.path, block_size=32) as llm:
        activate_local(llm, world.plans.values(), world.store)
        yield llm


def assert_gates_matter(world, answers) -> None:
    """Some gates opened and some did not, and one that opened changed what was answered.

    The edits of a gate that opens at the very end, or in a scope that has passed, may move nothing.
    """
    gates = [(a.request.policy, gate.name, gate.fired) for a in answers for gate in a.gates]
    assert {fired for _, _, fired in gates} == {True, False}
    effects: dict[str, float] = {}
    for answer in answers:
        name = answer.request.policy
        if name not in effects and any(gate.fired for gate in answer.gates):
            effects[name] = gate_effect(world, answer)
    shown = "  ".join(f"{name}: {effect:.2g}" for name, effect in sorted(effects.items()))
    print(f"[gates] largest effect of what they open, in nats; {shown}")
    assert max(effects.values()) > 100 * TOLERANCE


def gate_effect(world, answer) -> float:
    """How much the edits behind gates move any chosen token, by the reference, in nats."""
    policy = world.policies[answer.request.policy]
    gated = {edit for gate in policy.gates.values() for edit in gate.then}
    free = {name: edit for name, edit in policy.edits.items() if name not in gated}
    closed = policy.model_copy(update={"edits": free, "gates": {}})
    prompt = answer.request.prompt
    chosen = torch.tensor(answer.token_ids)[:, None]
    found = []
    for judged in (policy, closed):
        rows = steered_logprobs(
            world.model,
            judged,
            world.store,
            [*prompt, *answer.token_ids[:-1]],
            len(prompt),
            answer.request.strength,
            tokenizer=world.tokenizer,
            thinking=world.thinking,
        )
        found.append(rows[len(prompt) - 1 :].gather(1, chosen))
    return float((found[0] - found[1]).abs().max())


def record_schedule(llm) -> tuple[dict[str, list[int]], set[str]]:
    """Watch the scheduler.

    Returns:
        For each request, the chunks of its prompt before it is first preempted; and the plans of the
        requests that are preempted after their prompt.
    """
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    spans: dict[str, list[int]] = {}
    interrupted: set[str] = set()
    original = scheduler.schedule

    def schedule(*args, **kwargs):
        output = original(*args, **kwargs)
        for request_id, tokens in output.num_scheduled_tokens.items():
            request = scheduler.requests[request_id]
            start = request.num_computed_tokens - tokens
            chunks = spans.setdefault(request_id, [])
            if start == sum(chunks) < request.num_prompt_tokens:
                chunks.append(tokens)
        for request_id in output.preempted_req_ids or ():
            request = scheduler.requests[request_id]
            stamp = (request.sampling_params.extra_args or {}).get("trimtab")
            if stamp is not None and request.num_output_tokens:
                interrupted.add(stamp["plan"])
        return output

    scheduler.schedule = schedule
    return spans, interrupted
