"""Whatever arrives, and whenever: random policies, batches and schedules against the reference.

The engine is starved, so that prompts are cut into chunks and requests are preempted; what is drawn is
the policies, what each request asks for, and in which step of the engine it arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from steering.engine.control import activate_local
from tests.steering.engine.harness import (
    TOLERANCE,
    Answer,
    Request,
    World,
    build_world,
    compare,
    engine,
)
from tests.steering.engine.test_parity import metric, record_prompt_spans

pytestmark = pytest.mark.engine

Edits = dict[str, Any]

# The same examples on every run, and no search for a smaller one, which would run the engine for minutes.
BOUNDED = settings(
    max_examples=12,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@st.composite
def scopes(draw: st.DrawFn) -> Any:
    """A scope as a policy's file spells it."""
    return draw(st.sampled_from(["all", "prompt", "generation", ["prompt", "generation"]]))


@st.composite
def layer_ranges(draw: st.DrawFn, num_layers: int) -> Any:
    low = draw(st.integers(0, num_layers - 1))
    return f"{low}-{draw(st.integers(low, num_layers - 1))}"


@st.composite
def add_edits(draw: st.DrawFn, num_layers: int) -> Edits:
    unit, largest = draw(st.sampled_from([("relative", 0.2), ("absolute", 1.5), ("unit", 2.0)]))
    share = draw(st.sampled_from([-1.0, -0.5, 0.25, 0.5, 1.0]))
    add = {
        "direction": draw(st.sampled_from(["alpha@1", "beta@1"])),
        "unit": unit,
        "strength": share * largest,
        "layers": draw(layer_ranges(num_layers)),
    }
    return {"add": add, "scope": draw(scopes())}


EDITS: dict[str, Callable[[int], st.SearchStrategy[Edits]]] = {"add": add_edits}
"""What draws an edit of each kind, given the number of layers."""


def policies(num_layers: int) -> st.SearchStrategy[Edits]:
    """The ``edits`` of a policy: one to three, of any kinds."""
    edit = st.one_of([draw_edit(num_layers) for draw_edit in EDITS.values()])
    return st.lists(edit, min_size=1, max_size=3).map(
        lambda drawn: {f"edit{n}": found for n, found in enumerate(drawn)}
    )


@dataclass(frozen=True)
class Arrival:
    """One request of a schedule.

    Attributes:
        text: which of two token streams its prompt is the beginning of.
        length: of the prompt, in tokens.
        policy: index among the drawn policies; ``None`` is unsteered.
        strength: the request's.
        n: sequences.
        max_tokens: length of each answer.
        pause: steps of the engine before it arrives.
    """

    text: int
    length: int
    policy: int | None
    strength: float
    n: int
    max_tokens: int
    pause: int


@st.composite
def arrivals(draw: st.DrawFn, num_policies: int) -> Arrival:
    return Arrival(
        text=draw(st.integers(0, 1)),
        length=draw(st.integers(1, 150)),
        policy=draw(st.none() | st.integers(0, num_policies - 1)),
        strength=draw(st.sampled_from([1.0, 1.0, 0.5, 2.0, -1.0, 0.0])),
        n=draw(st.sampled_from([1, 1, 1, 2, 3])),
        max_tokens=draw(st.integers(1, 40)),
        # Several at once as a rule, and then a wave that meets the others in the middle.
        pause=draw(st.sampled_from([0, 0, 0, 1, 6])),
    )


@st.composite
def schedules(draw: st.DrawFn, num_layers: int) -> tuple[list[Edits], list[Arrival]]:
    drawn = draw(st.lists(policies(num_layers), min_size=2, max_size=4))
    schedule = draw(st.lists(arrivals(len(drawn)), min_size=8, max_size=16))
    return drawn, schedule


@pytest.fixture(scope="module")
def world(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tiny_checkpoint, tmp_path_factory.mktemp("drawn"))


@pytest.fixture(scope="module")
def starved(world: World) -> Iterator[Any]:
    """Chunks of at most 48 tokens, and cache for a few requests of those that run at once."""
    with engine(
        world.path,
        block_size=32,
        num_gpu_blocks_override=16,
        max_num_batched_tokens=48,
        max_num_seqs=12,
        max_model_len=256,
    ) as llm:
        activate_local(llm, [], world.store)
        yield llm


def play(llm: Any, world: World, requests: list[Request], pauses: list[int]) -> list[Answer]:
    """Send each request after its pause, run the engine to the end, return every sequence."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    core = llm.llm_engine
    finished: dict[str, Any] = {}

    def step() -> None:
        finished.update({o.request_id: o for o in core.step() if o.finished})

    for number, (request, pause) in enumerate(zip(requests, pauses, strict=True)):
        for _ in range(pause):
            step()
        core.add_request(
            str(number),
            {"prompt_token_ids": list(request.prompt)},
            SamplingParams(
                n=request.n,
                temperature=0.0 if request.n == 1 else 1.0,
                max_tokens=request.max_tokens,
                ignore_eos=True,
                logprobs=0,
                output_kind=RequestOutputKind.FINAL_ONLY,
                extra_args=None
                if request.policy is None
                else {
                    "trimtab": {
                        "plan": world.plans[request.policy].id,
                        "strength": request.strength,
                    }
                },
            ),
        )
    while core.has_unfinished_requests():
        step()
    return [
        Answer(
            request,
            tuple(sequence.token_ids),
            tuple(
                entry[token].logprob
                for token, entry in zip(sequence.token_ids, sequence.logprobs, strict=True)
            ),
            sequence.text,
            sequence.finish_reason,
            finished[str(number)].num_cached_tokens or 0,
        )
        for number, request in enumerate(requests)
        for sequence in finished[str(number)].outputs
    ]


def test_random_policies_batches_and_schedules_agree_with_the_reference(
    world: World, starved: Any
) -> None:
    numbers = count()
    texts = np.random.default_rng(3).integers(3, 300, size=(2, 150))
    spans = record_prompt_spans(starved)
    before = metric(starved, "vllm:num_preemptions")
    floors: list[float] = []
    steered: list[float] = []
    effects: list[float] = []
    seen = {"sequences": 0, "tokens": 0, "cached": 0, "chunked": 0}

    @BOUNDED
    @given(schedules(world.num_layers))
    def check(drawn: tuple[list[Edits], list[Arrival]]) -> None:
        names = []
        for edits in drawn[0]:
            name = f"drawn{next(numbers)}"
            world.add_policy(name, edits)
            names.append(name)
            note(f"{name}: {edits}")
        activate_local(starved, [world.plans[name] for name in names], world.store)
        spans.clear()
        requests = [
            Request(
                tuple(int(t) for t in texts[a.text][: a.length]),
                None if a.policy is None else names[a.policy],
                a.strength,
                a.n,
                a.max_tokens,
            )
            for a in drawn[1]
        ]
        answers = play(starved, world, requests, [a.pause for a in drawn[1]])
        assert len(answers) == sum(a.n for a in drawn[1])
        for answer in answers:
            assert answer.finish_reason == "length"
            assert len(answer.token_ids) == answer.request.max_tokens
        parity = compare(world, answers)
        note(str(parity))
        assert parity.floor <= TOLERANCE
        assert parity.worst <= TOLERANCE
        floors.append(parity.floor)
        steered.append(parity.worst)
        if parity.effect < float("inf"):
            effects.append(parity.effect)
        seen["sequences"] += len(answers)
        seen["tokens"] += sum(len(a.token_ids) for a in answers)
        seen["cached"] += sum(a.cached_tokens > 0 for a in answers)
        seen["chunked"] += sum(len(chunks) > 1 for chunks in spans.values())
        starved.collective_rpc(
            "trimtab_deactivate", args=([world.plans[name].id for name in names],)
        )

    check()
    preemptions = metric(starved, "vllm:num_preemptions") - before
    print(
        f"\n{len(floors)} examples, {seen}, {preemptions:.0f} preemptions, floor {max(floors):.1e}, "
        f"steered {max(steered):.1e}, largest of the examples' least effects {max(effects):.2g}"
    )
    assert len(floors) >= 10
    assert seen["chunked"] > seen["sequences"] / 8
    assert seen["cached"] > 0
    assert preemptions > 10
    assert max(effects) > 100 * TOLERANCE
    assert max(steered) <= 2 * max(floors)
    frontend = starved.llm_engine.input_processor.trimtab_frontend
    assert frontend.requests == {}
    assert frontend.ledger.in_use == 0
