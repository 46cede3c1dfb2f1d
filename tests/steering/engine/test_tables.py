"""Slots are shared, pinned, evicted and filled as the scheduler's batch demands."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steering.engine.ledger import SlotLedger
from steering.engine.payload import PlanPayload, RowPayload
from steering.engine.runner import WorkerRequests
from steering.engine.stamp import read_stamp
from steering.engine.tables import NoFreeSlotError, SteeringTables
from steering.plan import Plan

LAYERS, HIDDEN = 3, 4


def payload(name: str, *, rows: int = 1, layer: int = 1, value: float = 1.0) -> PlanPayload:
    row = RowPayload((layer,), np.full((1, HIDDEN), value, dtype=np.float32))
    return PlanPayload(name, (row,) * rows, (0, rows - 1))


def tables(slots: int = 4) -> SteeringTables:
    return SteeringTables(LAYERS, slots, HIDDEN, 64, torch.device("cpu"))


def test_requests_with_the_same_plan_share_its_slot() -> None:
    t = tables()
    t.add_plan(payload("a"))
    first, second = t.place("a", 1.0), t.place("a", 0.5)
    assert first.slots == second.slots
    assert t.pinned == 1
    assert t.table[1, first.slots[0]].tolist() == [1.0] * HIDDEN
    assert not t.table[0].any()
    assert not t.table[:, 0].any()


def test_a_pinned_plan_is_never_evicted_and_an_idle_one_is_the_oldest_first() -> None:
    t = tables(slots=3)
    for name in "abc":
        t.add_plan(payload(name, value=ord(name)))
    a, b = t.place("a", 1.0), t.place("b", 1.0)
    with pytest.raises(NoFreeSlotError):
        t.place("c", 1.0)
    t.release(a)
    c = t.place("c", 1.0)
    assert c.slots == a.slots
    assert t.table[1, c.slots[0], 0] == ord("c")
    assert t.table[1, b.slots[0], 0] == ord("b")


def test_an_idle_plan_stays_resident_until_its_slot_is_wanted() -> None:
    t = tables(slots=3)
    t.add_plan(payload("a"))
    slots = t.place("a", 1.0)
    t.release(slots)
    t.table[1, slots.slots[0]] = 9.0  # would be overwritten if it were written again
    assert t.place("a", 1.0).slots == slots.slots
    assert t.table[1, slots.slots[0], 0] == 9.0


def test_a_removed_plan_serves_its_running_requests_to_the_end() -> None:
    t = tables()
    t.add_plan(payload("a"))
    running = t.place("a", 1.0)
    t.remove_plan("a")
    with pytest.raises(KeyError):
        t.place("a", 1.0)
    assert t.table[1, running.slots[0], 0] == 1.0
    t.release(running)
    assert t.pinned == 0


@pytest.mark.parametrize(
    "bad",
    [
        payload("rows", rows=4),
        payload("layer", layer=LAYERS),
        payload("nan", value=float("nan")),
        PlanPayload("width", (RowPayload((0,), np.ones((1, 5), dtype=np.float32)),), (0, 0)),
    ],
    ids=lambda p: p.id,
)
def test_a_plan_that_does_not_fit_is_refused(bad: PlanPayload) -> None:
    with pytest.raises(ValueError, match=bad.id):
        tables().add_plan(bad)


def test_the_wire_form_round_trips() -> None:
    plan = PlanPayload(
        "p",
        (
            RowPayload((0, 2), np.arange(8, dtype=np.float32).reshape(2, 4)),
            RowPayload((), np.empty((0, 4), np.float32)),
        ),
        (0, None),
    )
    back = PlanPayload.from_wire(plan.to_wire())
    assert back.phase_rows == plan.phase_rows
    for mine, theirs in zip(plan.rows, back.rows, strict=True):
        assert mine.layers == theirs.layers
        np.testing.assert_array_equal(mine.vectors, theirs.vectors)


request_shapes = st.lists(
    st.tuples(
        st.sampled_from([None, "a", "b", "split"]),
        st.integers(0, 6),  # computed
        st.integers(1, 6),  # scheduled
        st.integers(1, 8),  # prompt length
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=200, deadline=None)
@given(st.lists(request_shapes, min_size=1, max_size=4))
def test_every_token_gets_the_slot_of_its_phase_and_the_rest_of_the_buffer_stays_plain(
    steps,
) -> None:
    t = tables(slots=6)
    t.add_plan(payload("a", layer=0))
    t.add_plan(payload("b", layer=2))
    t.add_plan(
        PlanPayload(
            "split",
            (RowPayload((0, 1), np.ones((2, HIDDEN), dtype=np.float32)),),
            (None, 0),
        )
    )
    for step in steps:
        placements = [
            None if name is None else t.place(name, 0.5 + n) for n, (name, *_) in enumerate(step)
        ]
        t.fill(
            placements,
            np.array([c for _, c, _, _ in step], dtype=np.int32),
            np.array([s for _, _, s, _ in step], dtype=np.int32),
            np.array([p for _, _, _, p in step], dtype=np.int32),
        )
        expected = []
        edited = [0] * LAYERS
        layers_of = {"a": [0], "b": [2], "split": [0, 1]}
        for (name, computed, scheduled, prompt), placement in zip(step, placements, strict=True):
            for position in range(computed, computed + scheduled):
                if placement is None or (name == "split" and position < prompt):
                    expected.append((0, None))
                    continue
                expected.append((placement.slots[0] or placement.slots[1], placement.strength))
                for layer in layers_of[name]:
                    edited[layer] += 1
        found = t.slots.tolist()
        assert found[: len(expected)] == [slot for slot, _ in expected]
        assert not any(found[len(expected) :])
        for token, (_, strength) in enumerate(expected):
            if strength is not None:
                assert t.strengths[token].item() == strength
        assert t.counts.tolist() == edited
        for placement in placements:
            if placement is not None:
                t.release(placement)
    t.clear()
    assert not t.slots.any()
    assert not t.counts.any()


def test_a_worker_reports_what_became_of_each_plan_and_never_raises() -> None:
    requests = WorkerRequests(tables(slots=2))
    requests.tables.add_plan(payload("a"))
    requests.tables.add_plan(payload("b"))
    requests.enter("plain", None)
    requests.enter("fits", {"trimtab": {"plan": "a", "strength": 1.0}})
    requests.enter("full", {"trimtab": {"plan": "b", "strength": 1.0}})
    requests.enter("unknown", {"trimtab": {"plan": "zzz", "strength": 1.0}})
    requests.enter("broken", {"trimtab": {"plan": 7, "strength": "much"}})
    assert requests.take_reports() == {
        "fits": (True, None),
        "full": (False, "slots_exhausted"),
        "unknown": (False, "plan_unknown"),
        "broken": (False, "internal"),
    }
    assert requests.take_reports() == {}
    for name in ("plain", "fits", "full", "unknown", "broken", "never seen"):
        requests.leave(name)
    assert requests.tables.pinned == 0


def plan(name: str, rows: int) -> Plan:
    return Plan(name, ((),) * rows, (0, rows - 1))


def test_the_ledger_counts_distinct_plans_and_forgets_them() -> None:
    ledger = SlotLedger(num_slots=4)
    one, two, other = plan("one", 1), plan("two", 2), plan("other", 1)
    ledger.acquire(one.id, 1)
    ledger.acquire(one.id, 1)
    assert ledger.can_admit(two)
    ledger.acquire(two.id, 2)
    assert not ledger.can_admit(other)
    assert ledger.can_admit(one)
    assert ledger.snapshot() == {"in_use": 3, "free": 0}
    ledger.release(two.id)
    assert ledger.can_admit(other)
    ledger.release(one.id)
    ledger.release(one.id)
    assert ledger.snapshot() == {"in_use": 0, "free": 3}


def test_the_shares_of_several_processes_never_exceed_the_table() -> None:
    for processes in (1, 2, 3, 5):
        assert processes * SlotLedger(32, processes).capacity <= 31


def test_a_row_that_could_not_be_written_is_not_found_later(monkeypatch) -> None:
    """A device that runs out of memory once must not leave an empty row that looks resident."""
    requests = WorkerRequests(tables(slots=2))
    requests.tables.add_plan(payload("a"))

    def fail(*args: object) -> None:
        raise RuntimeError("out of memory")

    stamped = {"trimtab": {"plan": "a", "strength": 1.0}}
    with monkeypatch.context() as patch:
        patch.setattr(requests.tables, "_write", fail)
        requests.enter("first", stamped)
    requests.enter("second", stamped)
    assert requests.take_reports() == {"first": (False, "internal"), "second": (True, None)}
    assert (
        requests.tables.table[1, requests.placements["second"].slots[0]].tolist() == [1.0] * HIDDEN
    )


def test_a_fault_on_a_rank_that_nobody_hears_is_not_kept_quiet(monkeypatch) -> None:
    requests = WorkerRequests(tables(), heard=False)
    requests.tables.add_plan(payload("a"))
    monkeypatch.setattr(requests.tables, "_write", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        requests.enter("first", {"trimtab": {"plan": "a", "strength": 1.0}})


def test_a_row_that_the_stream_s_type_cannot_hold_is_refused() -> None:
    half = SteeringTables(LAYERS, 4, HIDDEN, 64, torch.device("cpu"), torch.float16)
    half.add_plan(payload("fits", value=6e4))
    with pytest.raises(ValueError, match="65504"):
        half.add_plan(payload("large", value=1e5))


@pytest.mark.parametrize(("strength", "kept"), [(1e-46, 0.0), (0.5, 0.5), (-2.0, -2.0)])
def test_a_strength_that_float32_rounds_to_0_is_0(strength: float, kept: float) -> None:
    stamp = read_stamp({"trimtab": {"plan": "a", "strength": strength}})
    assert stamp is not None
    assert stamp.strength == kept


def test_a_strength_beyond_float32_is_refused() -> None:
    with pytest.raises(ValueError, match="32-bit"):
        read_stamp({"trimtab": {"plan": "a", "strength": 1e39}})


def test_a_cleared_step_leaves_no_strength_behind() -> None:
    t = tables()
    t.add_plan(payload("a"))
    one = np.ones(1, dtype=np.int32)
    t.fill([t.place("a", 3.0)], 0 * one, one, one)
    assert t.uniform is not None
    assert t.strengths[0] == 3.0
    t.clear()
    assert not t.strengths.any()
    assert not t.edited.any()
    assert t.uniform is None
