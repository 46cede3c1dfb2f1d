"""A request's row: fresh for each, kept to its end, and what is told of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from steering.engine.gate_report import GateReport
from steering.engine.request_rows import (
    PROMPT_END_CASE,
    THINK_END_CASES,
    NoFreeRowError,
    RequestRows,
)
from steering.engine.tables import NUM_CASES
from tests.steering.engine.small_plans import CPU, Edit, Rule, SmallPlan, tables

GATED = SmallPlan(
    "gated",
    (Edit(), Edit(2, scope=frozenset({"think_end", "answer"}), first=3)),
    (Rule("prompt_end"), Rule("think_end", 1), Rule("token", 0, then=frozenset({1}))),
)
SIMPLE = SmallPlan("simple", (Edit(),))


def take(rows: RequestRows, plan: SmallPlan = GATED):
    t = tables(num_slots=32)
    t.add_plan(plan.payload())
    return rows.take(plan.name, t.place(plan.name), 0.5)


def test_a_row_says_what_its_plan_says() -> None:
    rows = RequestRows(3, CPU)
    placement = take(rows)
    row, resident = placement.row, placement.resident
    assert row != 0
    cases = resident.case_slots.shape[1]
    assert rows.case_slots[row, :, :cases].tolist() == resident.case_slots.tolist()
    assert not rows.case_slots[row, :, cases:].any()
    assert rows.gates[row].tolist() == list(resident.entries)
    assert rows.latched[row].tolist() == [True, True, False]
    assert rows.windows[row].tolist()[:1] == [3]
    assert (rows.windows[row][1:] > 2**30).all()
    assert not placement.simple
    assert take(rows, SIMPLE).simple


def test_each_gate_is_decided_at_its_own_cases_only() -> None:
    rows = RequestRows(2, CPU)
    bits = rows.decides[take(rows).row].tolist()
    assert [case for case in range(NUM_CASES) if bits[case] & 1] == [PROMPT_END_CASE]
    assert [case for case in range(NUM_CASES) if bits[case] & 2] == list(THINK_END_CASES)
    # The edit that the third opens covers, before its window, all that is generated; behind it the
    # end of thinking and the answer.
    assert [case for case in range(NUM_CASES) if bits[case] & 4] == [2, 3, 4, 6, 7]


@pytest.mark.parametrize("plan", [SIMPLE, GATED], ids=["simple", "gated"])
def test_a_prompt_that_ends_thinking_decides_the_gates_at_the_think_end(plan: SmallPlan) -> None:
    rows = RequestRows(2, CPU)
    placement = take(rows, plan)
    before = rows.decides[placement.row].clone()
    rows.also_decide_at_prompt_end(placement)
    added = rows.decides[placement.row] - before
    assert added.tolist() == [
        2 if plan is GATED and case == PROMPT_END_CASE else 0 for case in range(NUM_CASES)
    ]


@pytest.mark.parametrize("next_plan", [SIMPLE, GATED], ids=["simple", "gated"])
def test_a_row_that_changes_hands_holds_nothing_of_what_it_held(next_plan: SmallPlan) -> None:
    rows = RequestRows(2, CPU)
    first = take(rows)
    rows.also_decide_at_prompt_end(first)
    rows.is_open[first.row] = True
    rows.decided_at[first.row] = 7
    rows.score[first.row] = 0.75
    rows.first_open[first.row] = 5 << 32
    rows.opened[first.row] = 3
    rows.give_back(first)

    found = take(rows, next_plan)
    fresh_rows = RequestRows(2, CPU)
    fresh = take(fresh_rows, next_plan)
    assert found.row == fresh.row == first.row
    names = ["case_slots", "decides", "latched", "gates"]
    if next_plan is GATED:
        names += ["is_open", "decided_at", "score", "first_open", "opened"]
    for name in names:
        mine, theirs = getattr(rows, name), getattr(fresh_rows, name)
        assert torch.equal(mine[found.row], theirs[fresh.row]), name
    assert np.array_equal(rows.windows, fresh_rows.windows)
    assert (found.tracked, found.state, found.computed) == (0, None, 0)
    if next_plan is GATED:
        snapshot = rows.snapshot([("next", found)])
        assert snapshot is not None
        assert not any(decision.fired for decision in snapshot.decisions()["next"])


def test_there_are_as_many_rows_as_were_asked_for_and_the_first_is_nobody_s() -> None:
    rows = RequestRows(4, CPU)
    taken = [take(rows, SIMPLE) for _ in range(3)]
    assert sorted(placement.row for placement in taken) == [1, 2, 3]
    with pytest.raises(NoFreeRowError):
        take(rows, SIMPLE)
    rows.give_back(taken[1])
    assert take(rows, SIMPLE).row == taken[1].row


# -- what is told ----------------------------------------------------------------------------------


def told(rows: RequestRows, *placements) -> dict[str, list[GateReport]]:
    named = [(f"request {n}", placement) for n, placement in enumerate(placements)]
    snapshot = rows.snapshot(named)
    return {} if snapshot is None else snapshot.decisions()


def test_a_decision_is_told_once_and_again_when_it_is_another() -> None:
    rows = RequestRows(3, CPU)
    a, b = take(rows), take(rows)
    nothing = [
        GateReport("g0", False, None, None, None),
        GateReport("g1", False, None, None, None),
        GateReport("g2", False, None, None, 0),
    ]
    assert told(rows, a, b) == {"request 0": nothing, "request 1": nothing}
    assert told(rows, a, b) == {}

    rows.decided_at[a.row, 0], rows.score[a.row, 0] = 4, 0.25
    decided = GateReport("g0", False, 4, 0.25, None)
    assert told(rows, a, b) == {"request 0": [decided, *nothing[1:]]}
    rows.is_open[a.row, 0] = True
    rows.opened[a.row, 2] = 2
    score = int(np.float32(0.75).view(np.int32))
    rows.first_open[a.row, 2] = 6 << 32 | score
    news = [GateReport("g0", True, 4, 0.25, None), nothing[1], GateReport("g2", True, 6, 0.75, 2)]
    assert told(rows, a, b) == {"request 0": news}
    assert told(rows, a, b) == {}


def test_a_snapshot_is_of_its_own_moment() -> None:
    rows = RequestRows(2, CPU)
    placement = take(rows)
    snapshot = rows.snapshot([("a", placement)])
    rows.decided_at[placement.row, 0] = 4
    assert snapshot is not None
    assert [decision.at for decision in snapshot.decisions()["a"]] == [None] * 3


def test_a_score_below_0_is_told_as_it_is_and_the_first_opening_is_the_least() -> None:
    """A cosine may be negative; its bits share an integer with the position."""
    rows = RequestRows(2, CPU)
    placement = take(rows)
    packed = [
        position << 32 | int(np.float32(score).view(np.uint32))
        for position, score in ((9, 0.5), (2, -0.5), (3, 0.25))
    ]
    rows.first_open[placement.row, 2] = min(packed)
    rows.opened[placement.row, 2] = 3
    assert told(rows, placement)["request 0"][2] == GateReport("g2", True, 2, -0.5, 3)


def test_requests_without_gates_are_not_asked_after() -> None:
    rows = RequestRows(2, CPU)
    assert rows.snapshot([("a", take(rows, SIMPLE))]) is None
    assert rows.snapshot([]) is None


def test_a_report_that_arrives_late_takes_nothing_from_the_request_that_has_the_row_now() -> None:
    """The host may read a step's decisions after the row has gone to a request that decides the same."""
    rows = RequestRows(2, CPU)
    first = take(rows)
    rows.decided_at[first.row, 0] = 4
    late = rows.snapshot([("first", first)])
    rows.give_back(first)
    second = take(rows)
    assert second.row == first.row
    assert late is not None
    decisions = late.decisions().get("first")
    rows.decided_at[second.row, 0] = 4
    assert told(rows, second) == {"request 0": decisions}


def test_a_decision_travels_as_it_is() -> None:
    for decision in (GateReport("g", True, 4, 0.5, None), GateReport("h", False, None, None, 0)):
        assert GateReport.from_wire(decision.to_wire()) == decision
