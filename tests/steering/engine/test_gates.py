"""A gate that is decided in the middle of a pass moves its tokens, and remembers what it has decided."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from steering.engine.gates import decide_on_host
from steering.engine.runner import WorkerRequests
from steering.engine.tables import KINDS
from tests.steering.engine.small_plans import (
    GENERATED,
    HIDDEN,
    LAYERS,
    TEXTS,
    Edit,
    Rule,
    Sequence,
    SmallPlan,
    batch_of,
    worker,
)

A, BLANK, START, END, ENDED = (TEXTS.index(text) for text in ("a", " ", "<t>", "</t>", "<t></t>"))
HIGH, LOW = 2.0, -2.0


class Gated:
    """One request under one plan, run pass by pass; every gate reads what it is given."""

    def __init__(self, plan: SmallPlan, prompt: int = 2, tokens: tuple[int, ...] = (A,) * 12):
        self.requests: WorkerRequests = worker(num_slots=16)
        self.requests.step.tables.add_plan(plan.payload())
        self.sequence = Sequence("s", prompt, list(tokens), plan)
        self.requests.enter("s", self.sequence.stamp)
        self.told: list = []

    @property
    def step(self):
        return self.requests.step

    def run(self, count: int, *logits: float, layers: int = LAYERS + 1) -> list[bool]:
        """``logits``: one for all tokens, or one for each; returns which tokens end in a slot."""
        self.requests.prepare(batch_of([(self.sequence, count)]))
        values = logits if len(logits) == count else logits * count
        x = torch.tensor(values)[:, None].repeat(1, HIDDEN)
        for layer in range(layers):
            decide_on_host(self.step, layer, x, None)
        found = self.step.slots[:count].bool().tolist()
        self.sequence.advance(count)
        reports = self.requests.take_reports()
        if reports is not None and reports.gates is not None:
            self.told = reports.gates.decisions().get("s", self.told)
        return found


def one(at: str, layer: int = 1, **edit: object) -> SmallPlan:
    return SmallPlan("p", (Edit(**{"layer": 2, **edit}),), (Rule(at, layer),))


# -- scores ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, HIDDEN), (1, 3, HIDDEN)])
@pytest.mark.parametrize("read_out", ["affine", "cosine"])
def test_a_gate_reads_the_sum_of_what_it_is_given(shape: tuple[int, ...], read_out: str) -> None:
    rng = np.random.default_rng(3)
    h, rest = rng.normal(size=(2, 3, HIDDEN))
    w, b = rng.normal(size=HIDDEN).astype(np.float32), 0.25
    if read_out == "affine":
        expected = 1 / (1 + np.exp(-((h + rest) @ w + b)))
    else:
        along = np.tanh(np.outer((h + rest) @ w / (w @ w), w))
        lengths = np.linalg.norm(h + rest, axis=1) * np.linalg.norm(along, axis=1)
        expected = ((h + rest) * along).sum(1) / lengths
    payload = one("prompt_end").payload()
    gate = replace(payload.gates[0], read_out=read_out, weight=w, bias=b, low=-2.0)
    requests = worker()
    requests.step.tables.add_plan(replace(payload, gates=(gate,)))
    sequence = Sequence("s", 3, [A] * 4, one("prompt_end"))
    requests.enter("s", sequence.stamp)
    requests.prepare(batch_of([(sequence, 3)]))
    x, others = (torch.tensor(part, dtype=torch.float32).view(shape) for part in (h, rest))
    decide_on_host(requests.step, 1, x, others)
    row = requests.placements["s"].row
    assert requests.step.requests.score[row, 0].item() == pytest.approx(expected[2], abs=1e-5)


@pytest.mark.parametrize(("low", "high"), [(0.5, np.inf), (-np.inf, 0.5)])
def test_a_bound_is_not_within_its_range(low: float, high: float) -> None:
    gated = Gated(SmallPlan("p", (Edit(2),), (Rule("prompt_end", 1, low, high),)))
    assert gated.run(2, 0.0) == [False, False]
    assert [(d.fired, d.at, d.score) for d in gated.told] == [(False, 1, 0.5)]


# -- when and for what a gate opens ----------------------------------------------------------------


def test_a_gate_opens_once_its_layer_is_reached_and_the_counts_follow() -> None:
    gated = Gated(one("prompt_end", layer=1))
    add = KINDS.index("add")
    for layers, is_open in ((0, False), (1, False), (2, True)):
        assert gated.run(2, HIGH, layers=layers) == [False, is_open]
        assert gated.step.edited[add].tolist() == [0, 0, int(is_open)]
        assert gated.step.counts[add].tolist() == [0, 0, int(is_open)]
        gated.sequence.preempt()
    assert gated.step.due.keys() == {1}


def test_a_gate_behind_the_layers_opens_for_later_tokens_only() -> None:
    gated = Gated(one("prompt_end", layer=LAYERS))
    assert gated.run(2, HIGH, layers=LAYERS) == [False, False]
    gated.sequence.preempt()
    gated.run(2, HIGH)
    assert [(d.fired, d.at) for d in gated.told] == [(True, 1)]
    assert gated.run(1, LOW) == [True]
    assert gated.step.due == {}


def test_one_open_gate_of_two_is_enough_and_each_opens_its_own() -> None:
    plan = SmallPlan(
        "p",
        (Edit(2, 1.0), Edit(2, 2.0)),
        (
            Rule("prompt_end", 0, then=frozenset({0})),
            Rule("prompt_end", 1, low=-np.inf, high=0.5, then=frozenset({0, 1})),
        ),
    )
    for logit, expected in ((HIGH, 1.0), (LOW, 3.0)):
        gated = Gated(plan)
        gated.run(2, logit)
        assert gated.step.tables.add[2, gated.step.slots[1], 0] == expected
        assert gated.step.slots[0] == 0


def test_a_gate_per_token_opens_for_its_token_only_and_is_read_only_where_it_matters() -> None:
    gated = Gated(one("token", scope=frozenset(GENERATED)))
    assert gated.run(2, HIGH) == [False, False]
    assert gated.step.due == {}
    found = [gated.run(1, logit) for logit in (LOW, HIGH, LOW, HIGH)]
    assert found == [[False], [True], [False], [True]]
    assert [(d.fired, d.at, d.tokens) for d in gated.told] == [(True, 3, 2)]
    assert gated.told[0].score == pytest.approx(1 / (1 + np.exp(-HIGH)))


def test_the_end_of_thinking_decides_in_one_run_and_later_ends_find_it_decided() -> None:
    tokens = (A, A, START, END, BLANK, A, START, END, A)
    gated = Gated(one("think_end"), tokens=tokens)
    assert gated.run(2, HIGH) == [False, False]
    found = [gated.run(1, logit) for logit in (HIGH, HIGH, LOW, HIGH, HIGH, HIGH, HIGH)]
    #          <t>      </t>    " " closes    a        <t>      </t>     a
    assert found == [[False], [True], [False], [False], [False], [False], [False]]
    assert [(d.fired, d.at) for d in gated.told] == [(False, 4)]

    gated = Gated(one("think_end"), tokens=tokens)
    gated.run(2, LOW)
    found = [gated.run(1, logit) for logit in (LOW, LOW, HIGH, LOW, LOW, LOW, LOW)]
    assert found == [[False], [False], [True], [True], [True], [True], [True]]
    assert [(d.fired, d.at) for d in gated.told] == [(True, 4)]


def test_a_deciding_token_begins_closed_after_an_open_decision() -> None:
    gated = Gated(one("think_end"), tokens=(A, A, START, END, BLANK, A))
    gated.run(2, HIGH)
    gated.run(1, HIGH)
    assert gated.run(1, HIGH) == [True]
    gated.requests.prepare(batch_of([(gated.sequence, 1)]))
    assert not gated.step.slots[0]
    decide_on_host(gated.step, 1, torch.full((1, HIDDEN), HIGH), None)
    assert gated.step.slots[0]


@pytest.mark.parametrize("chunks", [(3,), (1, 2), (2, 1), (1, 1, 1)])
def test_a_prompt_that_ends_thinking_decides_at_its_last_token(chunks: tuple[int, ...]) -> None:
    gated = Gated(one("think_end"), prompt=3, tokens=(A, ENDED, BLANK, BLANK, A, START, END, A))
    found = [is_open for count in chunks for is_open in gated.run(count, HIGH)]
    assert found == [False, False, True]
    assert [(d.fired, d.at) for d in gated.told] == [(True, 2)]
    # The white space after it belongs to the same end, and closes; the next end does not decide.
    found = [gated.run(1, logit) for logit in (LOW, HIGH, HIGH, HIGH, HIGH)]
    assert found == [[False]] * 5
    assert [(d.fired, d.at) for d in gated.told] == [(False, 3)]


# -- preemption ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "again"), [(HIGH, LOW), (LOW, HIGH)])
@pytest.mark.parametrize("chunks", [(6,), (1, 1, 4), (2, 4), (3, 3)])
def test_what_is_latched_stays_when_its_token_is_computed_again(
    first: float, again: float, chunks: tuple[int, ...]
) -> None:
    """Another batch shape rounds otherwise; here it reads the very opposite."""
    gated = Gated(one("prompt_end"), prompt=2)
    decided = gated.run(2, first)
    then = [gated.run(1, again) for _ in range(3)]
    told = gated.told
    is_open = first == HIGH
    assert (decided, then) == ([False, is_open], [[is_open]] * 3)

    gated.sequence.preempt()
    found = [opened for count in chunks for opened in gated.run(count, again)]
    assert found == [False, *[is_open] * 5]
    assert gated.told is told, "nothing new was decided"


def test_a_token_that_is_computed_again_is_not_counted_again() -> None:
    gated = Gated(one("token"), prompt=3)
    gated.run(2, HIGH)
    assert [(d.at, d.tokens) for d in gated.told] == [(0, 2)]
    gated.sequence.preempt()
    assert gated.run(3, HIGH) == [True] * 3
    assert [(d.at, d.tokens) for d in gated.told] == [(0, 3)]
    gated.run(1, LOW)
    gated.run(1, HIGH)
    gated.sequence.preempt(1)
    assert gated.run(5, HIGH, HIGH, LOW, HIGH, HIGH) == [True, True, False, True, True]
    assert [(d.at, d.tokens) for d in gated.told] == [(0, 5)]


def test_the_end_of_thinking_is_found_again_after_a_preemption() -> None:
    """The token after a preemption has a phase that follows from tokens which the worker saw long ago."""
    plan = SmallPlan(
        "p",
        (Edit(2, 1.0), Edit(0, 2.0, scope=frozenset({"thinking"}))),
        (Rule("think_end", 1),),
    )
    tokens = (A, START, A, END, A, START, A, A)
    straight, resumed = Gated(plan, tokens=tokens), Gated(plan, tokens=tokens)
    for gated in (straight, resumed):
        gated.run(2, HIGH)
        for _ in range(3):
            gated.run(1, HIGH)
    resumed.sequence.preempt()
    resumed.run(4, LOW)
    resumed.run(1, LOW)
    for _ in range(3):
        straight.run(1, HIGH)
        resumed.run(1, LOW)
        slots = [gated.step.slots[0] for gated in (straight, resumed)]
        amounts = [
            gated.step.tables.add[:, slot, 0].tolist()
            for gated, slot in zip((straight, resumed), slots, strict=True)
        ]
        assert amounts[0] == amounts[1] == [2.0, 0.0, 1.0]


def test_requests_under_one_plan_decide_for_themselves() -> None:
    plan = one("prompt_end")
    requests = worker(num_slots=16)
    requests.step.tables.add_plan(plan.payload())
    pair = [Sequence(name, 2, [A] * 4, plan) for name in ("open", "closed")]
    for sequence in pair:
        requests.enter(sequence.name, sequence.stamp)
    requests.prepare(batch_of([(sequence, 2) for sequence in pair]))
    x = torch.tensor([HIGH, HIGH, LOW, LOW])[:, None].repeat(1, HIDDEN)
    decide_on_host(requests.step, 1, x, None)
    assert requests.step.slots[:4].bool().tolist() == [False, True, False, False]
    reports = requests.take_reports()
    assert reports is not None
    resolved = reports.resolve()
    assert [resolved[name]["gates"][0][:3] for name in ("open", "closed")] == [
        ["g0", True, 1],
        ["g0", False, 1],
    ]
    requests.leave("open")
    newcomer = Sequence("newcomer", 2, [A] * 4, plan)
    requests.enter("newcomer", newcomer.stamp)
    pair[1].advance(2)
    requests.prepare(batch_of([(pair[1], 1), (newcomer, 1)]))
    assert not requests.step.slots.any(), "the newcomer has the decision of the one before it"
