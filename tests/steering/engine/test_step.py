"""What each token of a forward pass gets is what its request's plan says of its position and phase.

Random requests are driven through random schedules as a scheduler might: prompts in chunks and from cache,
decoding with tokens that the host does not know, preemption and computing again, requests that end and others
that get their rows. What a token ought to get is worked out from the whole text, one token at a time, with the
reference's reading of its phases.
"""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steering.engine.gate_report import GateReport
from steering.engine.gates import decide_on_host
from steering.engine.runner import WorkerRequests
from steering.engine.tables import IDENTITY, KINDS
from steering.reference import text_phases
from tests.steering.engine.small_plans import (
    EVERYWHERE,
    GENERATED,
    HIDDEN,
    LAYERS,
    MARKERS,
    TEXTS,
    TOKENS,
    Edit,
    Rule,
    Sequence,
    SmallPlan,
    amounts,
    batch_of,
    worker,
)

SCOPES = (
    EVERYWHERE,
    frozenset({"prompt", "prompt_end"}),
    frozenset({"prompt_end"}),
    frozenset(GENERATED),
    frozenset({"thinking"}),
    frozenset({"prompt_end", "think_end"}),
    frozenset({"answer"}),
)


class Life(Sequence):
    """A request and, beside it, what its tokens ought to get."""

    def begin(self, rng: random.Random) -> Life:
        found = text_phases([TEXTS[token] for token in self.tokens], self.prompt, MARKERS)
        self.phases = found.phases
        self.prompt_ended = found.prompt_ended
        self.rules = self.plan.rules if self.plan is not None else ()
        self.logits = [
            [rng.choice([-2.0, -1.0, 1.0, 2.0]) for _ in self.tokens] for _ in self.rules
        ]
        self.latest: list[tuple[int, bool, float] | None] = [None for _ in self.rules]
        self.opened: list[dict[int, float]] = [{} for _ in self.rules]
        self.furthest = 0
        self.told: list[GateReport] | None = None
        return self

    def ends_thinking(self, position: int) -> bool:
        if position == self.prompt - 1:
            return self.prompt_ended
        return self.phases[position] == "think_end"

    def decides(self, g: int, position: int) -> bool:
        rule, at_end = self.rules[g], position == self.prompt - 1
        if rule.at == "token":
            phase, offset = self.phases[position], position - self.prompt
            return any(self.plan.edits[n].covers(phase, offset) for n in rule.then)
        if rule.at == "prompt_end":
            return at_end
        ends = [p for p in range(len(self.tokens)) if self.ends_thinking(p)]
        first_run = ends[:1]
        for before, after in pairwise(ends):
            if after != before + 1:
                break
            first_run.append(after)
        return position in first_run

    def logit(self, g: int, position: int) -> float:
        """What the gate reads; where a latched decision is computed again, its opposite."""
        latest = self.latest[g]
        again = latest is not None and latest[0] == position
        return -self.logits[g][position] if again else self.logits[g][position]

    def opens(self, g: int, position: int) -> bool:
        latest = self.latest[g]
        if latest is not None and latest[0] == position:
            return latest[1]
        return self.rules[g].opens(sigmoid(self.logits[g][position]))

    def active(self, position: int, layer: int) -> tuple[Edit, ...]:
        """The edits of one token, once the gates up to a layer are decided."""
        if self.plan is None:
            return ()
        doors = []
        for g, rule in enumerate(self.rules):
            latest = self.latest[g]
            if self.decides(g, position):
                doors.append(rule.layer <= layer and self.opens(g, position))
            elif rule.at != "token" and latest is not None and latest[0] < position:
                doors.append(latest[1])
            else:
                doors.append(False)
        return self.plan.active(self.phases[position], position - self.prompt, doors)

    def ran(self, count: int) -> None:
        """``count`` tokens were computed: what was decided at them."""
        for position in range(self.computed, self.computed + count):
            for g, rule in enumerate(self.rules):
                if not self.decides(g, position):
                    continue
                score = sigmoid(self.logits[g][position])
                latest = self.latest[g]
                if rule.at == "token":
                    if position >= self.furthest and rule.opens(score):
                        self.opened[g][position] = score
                elif latest is None or latest[0] < position:
                    self.latest[g] = (position, rule.opens(score), score)
        self.furthest = max(self.furthest, self.computed + count)
        self.advance(count)

    def decisions(self) -> list[GateReport]:
        found = []
        for g, rule in enumerate(self.rules):
            if rule.at == "token":
                at = min(self.opened[g], default=None)
                score = None if at is None else self.opened[g][at]
                found.append(GateReport(f"g{g}", at is not None, at, score, len(self.opened[g])))
            else:
                at, is_open, score = self.latest[g] or (None, False, None)
                found.append(GateReport(f"g{g}", is_open, at, score, None))
        return found


def sigmoid(x: float) -> float:
    return float(torch.sigmoid(torch.tensor(x)))


def random_plan(rng: random.Random, name: str) -> SmallPlan:
    edits = tuple(
        Edit(
            rng.randrange(LAYERS),
            float(2**n),
            rng.choice(SCOPES),
            rng.choice([None, None, None, 1, 2, 3, 5]),
            rng.choice(["add", "add", "heads"]),
        )
        for n in range(rng.randint(1, 3))
    )
    rules = tuple(
        Rule(
            rng.choice(["token", "prompt_end", "think_end"]),
            rng.randrange(LAYERS + 1),
            *rng.choice([(0.5, np.inf), (-np.inf, 0.5), (0.2, 0.8)]),
            frozenset(rng.sample(range(len(edits)), rng.randint(1, len(edits)))),
        )
        for _ in range(rng.choice([0, 0, 1, 1, 2, 3]))
    )
    return SmallPlan(name, edits, rules)


def random_life(rng: random.Random, name: str, plans: list[SmallPlan | None]) -> Life:
    prompt = rng.randint(1, 9)
    tokens = rng.choices(range(len(TEXTS)), [2, 2, 3, 3, 1, 1, 1, 1, 1], k=prompt)
    tokens += rng.choices(range(len(TEXTS)), [2, 3, 3, 4, 2, 1, 1, 1, 1], k=rng.randint(1, 12))
    life = Life(name, prompt, tokens, rng.choice(plans), rng.choice([1.0, 1.0, 0.5, -2.0]))
    life.computed = rng.choice([0, 0, rng.randrange(prompt)])  # the rest is in the cache
    return life.begin(rng)


def simulate(seed: int) -> Counter[str]:
    """One random schedule, checked pass by pass; returns what situations it had."""
    rng = random.Random(seed)
    seen: Counter[str] = Counter()
    plans: list[SmallPlan | None] = [random_plan(rng, f"plan {n}") for n in range(4)]
    requests = worker(rows=rng.choice([3, 8]), num_slots=rng.choice([8, 16, 32]))
    for plan in plans:
        requests.step.tables.add_plan(plan.payload())
    plans += [None] * rng.choice([0, 1, 4])
    running: list[Life] = []
    waiting = [random_life(rng, f"request {n}", plans) for n in range(12)]
    while running or waiting:
        while waiting and len(running) < 5 and rng.random() < 0.6:
            life = waiting.pop()
            requests.enter(life.name, life.stamp)
            running.append(life)
        placed = {} if (found := requests.take_reports()) is None else found.placed
        for name, (applied, reason) in placed.items():
            if not applied:
                assert reason == "slots_exhausted"
                seen["refused"] += 1
                running = [life for life in running if life.name != name]
        scheduled = [
            (life, rng.randint(1, min(life.known - life.computed, 5)))
            for life in rng.sample(running, len(running))
            if rng.random() < 0.8
        ]
        if scheduled:
            check_pass(requests, scheduled, rng, seen)
        else:
            requests.step.clear()
            assert not requests.step.slots.any()
        for life in [life for life in running if life.is_done or rng.random() < 0.02]:
            running.remove(life)
            requests.leave(life.name)
            seen["left"] += 1
        for life in running:
            if rng.random() < 0.08:
                life.preempt(rng.choice([0, rng.randint(0, life.computed)]))
    assert requests.step.tables.pinned == 0
    seen["evictions"] = requests.step.tables.evictions
    return seen


def check_pass(
    requests: WorkerRequests,
    scheduled: list[tuple[Life, int]],
    rng: random.Random,
    seen: Counter[str],
) -> None:
    step = requests.step
    requests.prepare(batch_of(scheduled))
    tokens = [(life, life.computed + i) for life, count in scheduled for i in range(count)]
    note(scheduled, tokens, seen)
    check_buffers(requests, tokens, layer=-1)
    read = torch.zeros(len(tokens), HIDDEN)
    for t, (life, position) in enumerate(tokens):
        read[t, : len(life.rules)] = torch.tensor(
            [life.logit(g, position) for g in range(len(life.rules))]
        )
    rest = torch.tensor([[rng.choice([-4.0, 0.0, 4.0])] * HIDDEN for _ in tokens])
    for layer in range(LAYERS + 1):
        due = {(due.gate, t) for due in step.due.get(layer, ()) for t in due.tokens.tolist()}
        assert due == {
            (g, t)
            for t, (life, position) in enumerate(tokens)
            for g, rule in enumerate(life.rules)
            if rule.layer == layer and life.decides(g, position)
        }
        if due:
            decide_on_host(step, layer, read - rest, rest)
            check_buffers(requests, tokens, layer)
    check_uniform(step, len(tokens), seen)
    for life, count in scheduled:
        life.ran(count)
    check_reports(requests, [life for life, _ in scheduled], seen)


def check_buffers(requests: WorkerRequests, tokens: list[tuple[Life, int]], layer: int) -> None:
    step, tables = requests.step, requests.step.tables
    counts = np.zeros((len(KINDS), LAYERS), dtype=np.int32)
    for t, (life, position) in enumerate(tokens):
        active = life.active(position, layer)
        slot = int(step.slots[t])
        assert (slot == IDENTITY) == (not active)
        assert tables.add[:, slot, 0].tolist() == amounts(active, "add")
        assert tables.heads[:, slot, 0].tolist() == amounts(active, "heads")
        assert life.plan is None or step.strengths[t] == life.strength
        for kind, place in {(edit.kind, edit.layer) for edit in active}:
            counts[KINDS.index(kind), place] += 1
    assert step.edited.tolist() == counts.tolist()
    assert step.counts.tolist() == counts.tolist()
    for buffer in (step.slots, step.rows, step.decides):
        assert not buffer[len(tokens) : TOKENS].any()


def check_uniform(step, count: int, seen: Counter[str]) -> None:
    pairs = set(zip(step.slots[:count].tolist(), step.strengths[:count].tolist(), strict=True))
    if step.edited.any():
        assert step.uniform == (pairs.pop() if len(pairs) == 1 else None)
        seen["uniform" if step.uniform else "not uniform"] += 1
    else:
        assert step.uniform is None or step.uniform[0] == IDENTITY


def check_reports(requests: WorkerRequests, lives: list[Life], seen: Counter[str]) -> None:
    reports = requests.take_reports()
    told = {} if reports is None or reports.gates is None else reports.gates.decisions()
    for life in lives:
        expected = life.decisions()
        if not expected or expected == life.told:
            assert life.name not in told
            seen["nothing new"] += bool(expected)
        else:
            assert told.pop(life.name) == expected
            life.told = expected
            seen["news"] += 1
    assert not told


def note(
    scheduled: list[tuple[Life, int]], tokens: list[tuple[Life, int]], seen: Counter[str]
) -> None:
    """Count the situations that a pass has in it."""

    def kind(life: Life) -> str:
        if life.plan is None:
            return "plain"
        simple = not life.rules and not life.plan.tells_phases
        return "simple" if simple and not life.plan.payload().windows else "general"

    kinds = {kind(life) for life, _ in scheduled}
    seen["plain, simple and general"] += len(kinds) == 3
    seen["simple only"] += "general" not in kinds and "simple" in kinds
    for life, count in scheduled:
        end = life.computed + count
        seen["from cache"] += life.furthest == 0 < life.computed
        seen["chunked prompt"] += end < life.prompt
        seen["the token is on the device only"] += end > life.on_host
        again = min(life.furthest, end) - life.computed
        seen["again, prompt and answer in one pass"] += (
            life.computed < life.prompt < life.computed + again
        )
        seen["back by one pass"] += again > 0 and life.computed >= life.prompt
    for life, position in tokens:
        again = position < life.furthest
        for g, rule in enumerate(life.rules):
            decided = life.decides(g, position)
            seen[f"{rule.at} gate"] += decided and not again
            seen[f"{rule.at} gate again"] += decided and again
            if rule.at == "think_end":
                seen["the prompt ends thinking"] += decided and position == life.prompt - 1
                seen["a run of think-end tokens"] += decided and life.latest[g] is not None
                seen["a later end of thinking"] += not decided and life.ends_thinking(position)
        seen["a token behind a window"] += bool(life.plan) and any(
            edit.first is not None and position - life.prompt >= edit.first
            for edit in life.plan.edits
        )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_every_token_gets_what_its_plan_says_of_it(seed: int) -> None:
    simulate(seed)


def test_the_schedules_have_every_situation_in_them() -> None:
    seen: Counter[str] = Counter()
    for seed in range(40):
        seen += simulate(seed)
    wanted = [
        "plain, simple and general",
        "simple only",
        "from cache",
        "chunked prompt",
        "the token is on the device only",
        "again, prompt and answer in one pass",
        "back by one pass",
        "token gate",
        "token gate again",
        "prompt_end gate",
        "prompt_end gate again",
        "think_end gate",
        "think_end gate again",
        "the prompt ends thinking",
        "a run of think-end tokens",
        "a later end of thinking",
        "a token behind a window",
        "uniform",
        "not uniform",
        "news",
        "nothing new",
        "refused",
        "left",
        "evictions",
    ]
    assert {name: seen[name] for name in wanted if seen[name] < 3} == {}


def test_the_phase_of_a_sampled_token_is_the_device_s_business() -> None:
    """A token that the host has not seen is never asked for, and still gets its phase."""
    requests = worker()
    plan = SmallPlan("p", (Edit(scope=frozenset({"thinking"})),))
    requests.step.tables.add_plan(plan.payload())
    a, start, end = (TEXTS.index(text) for text in ("a", "<t>", "</t>"))
    sequence = Sequence("s", 2, [a, start, a, a, end, a], plan)
    requests.enter("s", sequence.stamp)
    edited = []
    for count in (2, 1, 1, 1, 1):
        requests.prepare(batch_of([(sequence, count)]))
        edited.append(requests.step.slots[:count].bool().tolist())
        sequence.advance(count)
    assert sequence.on_host == 2
    assert edited == [[False, False], [True], [True], [False], [False]]


@pytest.mark.parametrize("behind", ["clear", "a plain batch"])
def test_a_pass_after_a_gated_one_finds_nothing_of_it(behind: str) -> None:
    requests = worker()
    plan = SmallPlan("p", (Edit(),), (Rule("token"),))
    requests.step.tables.add_plan(plan.payload())
    gated = Sequence("s", 3, [0] * 4, plan, 3.0)
    requests.enter("s", gated.stamp)
    requests.prepare(batch_of([(gated, 3)]))
    step = requests.step
    decide_on_host(step, 0, torch.full((3, HIDDEN), 2.0), None)
    assert step.uniform == (1, 3.0)
    assert step.edited.any()
    if behind == "clear":
        step.clear()
    else:
        requests.prepare(batch_of([(Sequence("t", 3, [0] * 4), 3)]))
    assert step.due == {}
    assert step.uniform is None
    assert not step.edited.any()
    for buffer in (
        step.slots,
        step.strengths,
        step.rows,
        step.decides,
        step.counts,
        step.gate_counts,
    ):
        assert not buffer.any()
