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
from steering.engine.exchange import current_exchange
from steering.policy_errors import PolicyErrors
from tests.steering.engine.harness import (
    LEAST_FLOOR,
    TOLERANCE,
    Answer,
    Request,
    World,
    answers_of,
    build_world,
    compare,
    engine,
    exchange_for,
    sampling,
)
from tests.steering.engine.test_parity import metric, record_schedule

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


def scopes() -> st.SearchStrategy[Any]:
    """A scope as a policy's file spells it."""
    return st.sampled_from(
        [
            "all",
            "prompt",
            "generation",
            "prompt_end",
            "answer",
            ["thinking", "think_end"],
            ["think_end", "answer"],
            ["prompt_end", {"first": 3}],
            {"first": 12},
            ["prompt", "generation"],
        ]
    )


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


DIRECTIONS = st.sampled_from(["alpha@1", "beta@1"])


@st.composite
def ablate_edits(draw: st.DrawFn, num_layers: int) -> Edits:
    sites = [["residual"], ["attention"], ["residual", "attention", "mlp"]]
    ablate = {
        "direction": draw(DIRECTIONS),
        "layers": draw(layer_ranges(num_layers)),
        "strength": draw(st.sampled_from([1.0, 0.5, -0.5])),
        "sites": draw(st.sampled_from(sites)),
    }
    return {"ablate": ablate, "scope": draw(scopes())}


@st.composite
def clamp_edits(draw: st.DrawFn, num_layers: int) -> Edits:
    bounds = draw(
        st.sampled_from([{"to": 0.2}, {"atLeast": -0.1}, {"atMost": 0.1, "atLeast": -0.3}])
    )
    clamp = {"direction": draw(DIRECTIONS), "layers": draw(layer_ranges(num_layers)), **bounds}
    return {"clamp": {**clamp, "unit": "relative"}, "scope": draw(scopes())}


@st.composite
def rotate_edits(draw: st.DrawFn, num_layers: int) -> Edits:
    angle = {
        draw(st.sampled_from(["by", "to"])): draw(st.sampled_from([-120.0, -20.0, 45.0, 180.0]))
    }
    rotate = {"plane": ["alpha@1", "beta@1"], "layers": draw(layer_ranges(num_layers)), **angle}
    return {"rotate": rotate, "scope": draw(scopes())}


@st.composite
def head_edits(draw: st.DrawFn, num_layers: int) -> Edits:
    head = st.tuples(st.integers(0, num_layers - 1), st.integers(0, 3)).map(list)
    scale = {
        "heads": draw(st.lists(head, min_size=1, max_size=5, unique_by=tuple)),
        "factor": draw(st.sampled_from([0.0, 0.5, 2.0, -1.0])),
        "renormalise": draw(st.sampled_from(["none", "row"])),
    }
    return {"scale_heads": scale, "scope": draw(scopes())}


EDITS: dict[str, Callable[[int], st.SearchStrategy[Edits]]] = {
    "add": add_edits,
    "ablate": ablate_edits,
    "clamp": clamp_edits,
    "rotate": rotate_edits,
    "scale_heads": head_edits,
}
"""What draws an edit of each kind, given the number of layers."""


@st.composite
def gates(draw: st.DrawFn, edits: list[str]) -> Edits:
    rule = draw(st.sampled_from([{"above": 0.5}, {"below": 0.5}, {"between": [0.25, 0.75]}]))
    return {
        "probe": draw(st.sampled_from(["early@1", "middle@1", "top@1"])),
        "output": draw(st.integers(0, 1)),
        "at": draw(st.sampled_from(["prompt_end", "think_end", "token"])),
        "then": draw(st.lists(st.sampled_from(edits), min_size=1, max_size=2, unique=True)),
        **rule,
    }


@st.composite
def policies(draw: st.DrawFn, num_layers: int) -> tuple[Edits, Edits]:
    """The ``edits`` and ``gates`` of a policy: up to four edits of any kinds, up to two gates."""
    edit = st.one_of([draw_edit(num_layers) for draw_edit in EDITS.values()])
    drawn = draw(st.lists(edit, min_size=1, max_size=4))
    edits = {f"edit{n}": found for n, found in enumerate(drawn)}
    opened = draw(st.lists(gates(list(edits)), max_size=2))
    return edits, {f"gate{n}": found for n, found in enumerate(opened)}


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
def schedules(draw: st.DrawFn, num_layers: int) -> tuple[list[tuple[Edits, Edits]], list[Arrival]]:
    drawn = draw(st.lists(policies(num_layers), min_size=2, max_size=4))
    schedule = draw(st.lists(arrivals(len(drawn)), min_size=8, max_size=16))
    return drawn, schedule


@pytest.fixture(scope="module")
def world(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tiny_checkpoint, tmp_path_factory.mktemp("drawn"), ("t", "e"))


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
    from vllm.inputs.engine import tokens_input

    core = llm.llm_engine
    exchanges = [exchange_for(world, request) for request in requests]
    finished: dict[str, Any] = {}

    def step() -> None:
        finished.update({o.request_id: o for o in core.step() if o.finished})

    for number, (request, pause) in enumerate(zip(requests, pauses, strict=True)):
        for _ in range(pause):
            step()
        token = current_exchange.set(exchanges[number])
        try:
            core.add_request(str(number), tokens_input(list(request.prompt)), sampling(request))
        finally:
            current_exchange.reset(token)
    while core.has_unfinished_requests():
        step()
    return [
        answer
        for number, request in enumerate(requests)
        for answer in answers_of(request, exchanges[number], finished[str(number)])
    ]


def add_policy(world: World, name: str, drawn: tuple[Edits, Edits]) -> bool:
    """Compile a drawn policy; what is drawn may be a gate that could never act, which is refused."""
    edits, gates = drawn
    refused: set[str] = set()
    try:
        world.add_policy(name, edits, gates)
    except PolicyErrors as errors:
        refused = {error.code for error in errors.errors}
        world.add_policy(name, edits)
    assert refused <= {"E_GATE_ORDER", "E_GATE_NEVER"}
    return bool(gates) and not refused


def test_random_policies_batches_and_schedules_agree_with_the_reference(
    world: World, starved: Any
) -> None:
    numbers = count()
    texts = np.random.default_rng(3).integers(3, 300, size=(2, 150))
    spans, _ = record_schedule(starved)
    before = metric(starved, "vllm:num_preemptions")
    floors: list[float] = []
    steered: list[float] = []
    effects: list[float] = []
    seen = {"sequences": 0, "tokens": 0, "cached": 0, "chunked": 0, "gated": 0, "fired": 0}

    @BOUNDED
    @given(schedules(world.num_layers))
    def check(drawn: tuple[list[tuple[Edits, Edits]], list[Arrival]]) -> None:
        names = []
        for policy in drawn[0]:
            name = f"drawn{next(numbers)}"
            seen["gated"] += add_policy(world, name, policy)
            names.append(name)
            note(f"{name}: {policy}")
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
        seen["fired"] += sum(gate.fired for a in answers for gate in a.gates)
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
    assert seen["gated"] > 5
    assert seen["fired"] > 5
    assert preemptions > 10
    assert max(effects) > 100 * TOLERANCE
    assert max(steered) <= 2 * max(*floors, LEAST_FLOOR)
    frontend = starved.llm_engine.input_processor.trimtab_frontend
    assert frontend.requests == {}
    assert frontend.ledger.in_use == 0
