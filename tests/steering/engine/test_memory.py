"""Ten thousand requests under five hundred policies through sixteen slots, in constant memory."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from steering.engine.control import activate_local
from tests.steering.engine.harness import (
    Answer,
    Request,
    World,
    build_world,
    compare,
    engine,
    run,
)

pytestmark = pytest.mark.engine

POLICIES = 500
REQUESTS = 10_000
SLOTS = 16
# Plans of a wave: even if each takes the most rows, all fit.
PLANS_AT_ONCE = (SLOTS - 1) // 2
REQUESTS_OF_A_PLAN = 6
WARM_UP = REQUESTS // 5
# A kilobyte that each request leaves behind would be twice this.
LEAST_LEAK = 4 * 2**20


def edits(number: int, num_layers: int) -> dict[str, Any]:
    """The edits of one policy of many, all of them different, some with a row for each phase."""
    strength = 0.02 + 0.0005 * number
    alpha = {"direction": "alpha@1", "unit": "relative", "layers": number % num_layers}
    beta = {"direction": "beta@1", "unit": "absolute", "layers": (number + 1) % num_layers}
    kinds: list[dict[str, Any]] = [
        {"a": {"add": {**alpha, "strength": strength}, "scope": "all"}},
        {"a": {"add": {**alpha, "strength": strength}, "scope": "prompt"}},
        {
            "a": {"add": {**alpha, "strength": strength}, "scope": "prompt"},
            "b": {"add": {**beta, "strength": 1.0}, "scope": "generation"},
        },
        {
            "a": {"add": {**alpha, "strength": -strength}, "scope": "all"},
            "b": {"add": {**beta, "strength": 1.0}, "scope": "all"},
        },
    ]
    return kinds[number % len(kinds)]


@pytest.fixture(scope="module")
def world(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    world = build_world(tiny_checkpoint, tmp_path_factory.mktemp("many"))
    for number in range(POLICIES):
        world.add_policy(f"p{number}", edits(number, world.num_layers))
    assert len({plan.id for plan in world.plans.values()}) == POLICIES
    return world


@pytest.fixture(scope="module")
def llm(world: World) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRIMTAB_SLOTS", str(SLOTS))
        with engine(world.path, max_num_seqs=128) as llm:
            activate_local(llm, world.plans.values(), world.store)
            yield llm


def resident_bytes() -> int:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def test_many_requests_under_many_policies_reuse_the_slots_and_leave_nothing_behind(
    world: World, llm: Any
) -> None:
    prompts = [tuple(world.prompt(text)) for text in ("Ahoy?", "Which way?", "Ease the sheet.")]
    names = list(world.policies)
    # Each round over the policies has an order of its own, so that slots pass between other pairs.
    order = [names[n * step % POLICIES] for step in (1, 3, 7, 9) for n in range(POLICIES)]
    served: Counter[str] = Counter()
    first: dict[str, Answer] = {}
    last: dict[str, Answer] = {}
    memory: list[int] = []
    done = wave = 0
    while done < REQUESTS:
        chosen = order[wave * PLANS_AT_ONCE : (wave + 1) * PLANS_AT_ONCE]
        batch = [
            Request(prompts[n % 3], name, max_tokens=1)
            for n in range(REQUESTS_OF_A_PLAN)
            for name in chosen
        ]
        answers = run(llm, world, batch)
        assert all(a.finish_reason == "length" and len(a.token_ids) == 1 for a in answers)
        for answer in answers[: len(chosen)]:
            first.setdefault(str(answer.request.policy), answer)
            last[str(answer.request.policy)] = answer
        served.update(dict.fromkeys(chosen, 1))
        done += len(batch)
        wave += 1
        if not memory and done >= WARM_UP:
            memory.append(resident_bytes())
    memory.append(resident_bytes())

    (rank,) = llm.collective_rpc("trimtab_status")
    frontend = llm.llm_engine.input_processor.trimtab_frontend
    run(llm, world, [Request(prompts[0], max_tokens=1)])
    grown = memory[1] - memory[0]
    # A plan that is served holds a row of its own, so whatever came on top of the rows took another's.
    evictions = len(served) - rank["num_slots"]
    print(
        f"\n{done} requests, {len(served)} policies, {sum(served.values())} times in a wave, "
        f"{rank['num_slots']} rows, at least {evictions} evictions, "
        f"resident memory {memory[0] / 2**20:.0f} MiB and {grown / 2**20:+.2f} MiB"
    )
    assert len(served) == POLICIES
    assert min(served.values()) >= 2
    assert evictions > 400
    assert grown < LEAST_LEAK
    assert frontend.requests == {}
    assert frontend.ledger.snapshot() == {"in_use": 0, "free": SLOTS - 1}
    assert llm.collective_rpc("trimtab_status")[0]["pinned_slots"] == 0

    # What a slot held before has left no trace in what it holds now.
    for name, answer in last.items():
        assert answer is not first[name]
        assert answer.token_ids == first[name].token_ids
        assert answer.logprobs == pytest.approx(first[name].logprobs, abs=1e-5)
    parity = compare(world, [last[name] for name in names[::10]])
    print(f"parity {parity.worst:.1e}, smallest effect {parity.effect:.2g}")
    assert parity.worst < 1e-4
    assert parity.effect > 1e-4
