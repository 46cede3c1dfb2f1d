"""Slots are shared, pinned, evicted and written; what does not fit the tables is refused with its reason."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from steering.engine.payload import GatePayload, PlanPayload, RowPayload, uniform_payload
from steering.engine.tables import IDENTITY, KINDS, MAX_GATES, NoFreeSlotError, SteeringTables
from tests.steering.engine.small_plans import (
    HEADS,
    HIDDEN,
    LAYERS,
    Edit,
    Rule,
    SmallPlan,
    added,
    projected,
    scaled,
    tables,
    uniform,
)


def gate(**changes: object) -> GatePayload:
    weight = np.ones(HIDDEN, dtype=np.float32)
    return replace(GatePayload("g", 1, "token", 0.25, 0.75, "cosine", weight, 2.0), **changes)


def gated(name: str, *gates: GatePayload) -> PlanPayload:
    return uniform_payload(name, added(), gates or (gate(),))


def full(layer: int = 1) -> RowPayload:
    """A row with something in every table."""
    eye = np.eye(HIDDEN, dtype=np.float32)
    projections = [
        replace(projected(site=site).projections[0], layer=layer, vectors=eye[:1])
        for site in range(3)
    ]
    return RowPayload(
        (layer,),
        np.ones((1, HIDDEN), dtype=np.float32),
        tuple(projections),
        ((layer, 2, 0.5),),
        (layer,),
    )


# -- slots -----------------------------------------------------------------------------------------


def test_requests_with_the_same_plan_share_its_slot() -> None:
    t = tables()
    t.add_plan(uniform("a"))
    first, second = t.place("a"), t.place("a")
    assert first.slots == second.slots
    assert t.pinned == 1
    assert t.add[1, first.slots[0]].tolist() == [1.0] * HIDDEN
    assert not t.add[0].any()
    assert not t.add[:, IDENTITY].any()
    t.release("a")
    assert t.pinned == 1
    t.release("a")
    assert t.pinned == 0


def test_each_set_of_open_gates_and_each_case_has_its_slot() -> None:
    t = tables(num_slots=8)
    plan = SmallPlan("p", (Edit(), Edit(2, scope=frozenset({"prompt"}))), (Rule("prompt_end"),))
    t.add_plan(plan.payload())
    resident = t.place("p")
    closed, opened, both = resident.slots
    assert len({IDENTITY, closed, opened, both}) == 4
    assert resident.case_slots.tolist() == [
        [closed, *[IDENTITY] * 4],
        [opened, *[both] * 4],
    ]
    assert [t.add[:, slot, 0].tolist() for slot in (closed, opened, both)] == [
        [0.0, 0.0, 1.0],
        [0.0, 1.0, 1.0],
        [0.0, 1.0, 0.0],
    ]


def test_a_pinned_plan_is_never_evicted_and_an_idle_one_is_the_oldest_first() -> None:
    t = tables(num_slots=4)
    for name in "abcde":
        t.add_plan(uniform(name, added(value=ord(name))))
    a, b, c = t.place("a"), t.place("b"), t.place("c")
    with pytest.raises(NoFreeSlotError):
        t.place("d")
    t.release("b")
    t.release("a")
    t.place("b")
    t.release("b")  # used after "a", so "a" is the older
    d = t.place("d")
    assert d.slots == a.slots
    assert t.evictions == 1
    assert [t.add[1, r.slots[0], 0] for r in (b, c, d)] == [ord("b"), ord("c"), ord("d")]
    e = t.place("e")
    assert e.slots == b.slots
    assert t.evictions == 2


def test_a_plan_of_several_rows_evicts_as_many_idle_ones_as_it_needs_and_no_more() -> None:
    t = tables(num_slots=5)
    for name in "abc":
        t.add_plan(uniform(name))
        t.place(name)
        t.release(name)
    c = t.place("c")
    t.add_plan(uniform("two", added(0), added(2)))
    two = t.place("two")
    assert t.evictions == 1
    assert len(set(two.slots) | set(c.slots)) == 3
    t.add_plan(uniform("three", added(), added(), added()))
    with pytest.raises(NoFreeSlotError, match="3 slots wanted, 1 not pinned"):
        t.place("three")
    assert t.evictions == 1, "plans were evicted for one that has no room anyway"


def test_an_idle_plan_stays_resident_until_its_slot_is_wanted() -> None:
    t = tables(num_slots=3)
    t.add_plan(uniform("a"))
    first = t.place("a")
    t.release("a")
    t.add[1, first.slots[0]] = 9.0  # would be overwritten if it were written again
    assert t.place("a").slots == first.slots
    assert t.add[1, first.slots[0], 0] == 9.0


def test_a_removed_plan_serves_its_running_requests_to_the_end() -> None:
    t = tables(num_slots=2)
    t.add_plan(uniform("a"))
    running = t.place("a")
    t.remove_plan("a")
    assert t.plans == frozenset()
    with pytest.raises(KeyError):
        t.place("a")
    assert t.add[1, running.slots[0], 0] == 1.0
    t.release("a")
    assert t.pinned == 0
    t.add_plan(uniform("b"))
    assert t.place("b").slots == running.slots
    assert t.evictions == 0, "a removed plan was kept until its slot was wanted"


def test_a_slot_that_changes_hands_holds_nothing_of_what_it_held() -> None:
    t = tables(num_slots=2, head_offset=0)
    for name, row in {
        "full": full(0),
        "add": added(1),
        "project": projected(layer=2, vectors=2),
        "heads": scaled((1, 3, -1.0)),
        "empty": uniform("empty").rows[0],
    }.items():
        t.add_plan(uniform(name, row))
        t.place("full")
        t.release("full")
        resident = t.place(name)
        fresh = tables(num_slots=2)
        fresh.add_plan(uniform(name, row))
        assert fresh.place(name).slots == resident.slots
        assert contents(t) == contents(fresh), name
        t.release(name)


def contents(t: SteeringTables) -> list[object]:
    """What the operators can see of the tables."""
    found: list[object] = [t.add.tolist(), t.heads.tolist(), t.renormalise.tolist()]
    for site, used in t.used.items():
        seen = torch.arange(t.basis[site].shape[2]) < used[..., None]
        found += [used.tolist(), t.parameters[site].tolist()]
        found.append((t.basis[site] * seen[..., None]).tolist())
    return [*found, t.live.tolist()]


def test_every_table_is_written_where_the_row_says() -> None:
    t = tables()
    t.add_plan(uniform("full", full(2)))
    (slot,) = t.place("full").slots
    assert t.add[2, slot].tolist() == [1.0] * HIDDEN
    assert t.heads[2, slot].tolist() == [0.0, 0.0, 0.5, 0.0]
    assert t.renormalise.nonzero().tolist() == [[2, slot]]
    for site in ("residual", "attention", "mlp"):
        assert t.basis[site][2, slot, 0].tolist() == [1.0, 0.0, 0.0, 0.0]
        assert t.parameters[site][2, slot, 0].tolist() == [1.0, 1.0, -np.inf, 0.5]
        assert t.used[site].nonzero().tolist() == [[2, slot]]
    assert np.argwhere(t.live).tolist() == [[kind, 2, slot] for kind in range(len(KINDS))]
    assert (t.live_slots.numpy() == t.live).all()


def test_projections_of_one_site_are_stacked_in_their_order() -> None:
    t = tables()
    turn = replace(projected(vectors=2).projections[0], mode=2, parameters=(0.5, 0.0, 0.0))
    clip = projected().projections[0]
    row = replace(projected(), projections=(clip, turn, replace(clip, layer=0), clip))
    t.add_plan(uniform("p", row))
    (slot,) = t.place("p").slots
    assert t.used["residual"][:, slot].tolist() == [1, 4, 0]
    # The second vector of a turn has no mode of its own.
    assert t.parameters["residual"][1, slot, :, 0].tolist() == [1.0, 2.0, 0.0, 1.0]
    assert t.basis["residual"][1, slot, :, 0].tolist() == [1.0, 1.0, 0.0, 1.0]


def test_a_rank_scales_its_own_heads_and_knows_of_the_others() -> None:
    t = tables(num_heads=2, head_offset=2)
    row = scaled((0, 1, 5.0), (1, 2, -1.0), (1, 3, 0.5))
    t.add_plan(uniform("p", row))
    (slot,) = t.place("p").slots
    assert t.heads[:, slot].tolist() == [[0.0, 0.0], [-1.0, 0.5], [0.0, 0.0]]
    assert t.live[KINDS.index("heads"), :, slot].tolist() == [1, 1, 0]


# -- gates -----------------------------------------------------------------------------------------


def test_a_gate_is_written_to_its_entry() -> None:
    t = tables()
    t.add_plan(gated("p", gate(), gate(name="h", layer=LAYERS, low=-np.inf, read_out="affine")))
    first, second = t.place("p").entries
    assert 0 not in (first, second)
    assert t.gate_weight[first].tolist() == [1.0] * HIDDEN
    assert t.gate_bias[first] == 2.0
    assert t.gate_bounds[[first, second]].tolist() == [[0.25, 0.75], [-np.inf, 0.75]]
    assert t.gate_read_out[[first, second]].tolist() == [1, 0]
    assert t.gate_layer[[first, second]].tolist() == [1, LAYERS]
    assert t.host_gate_layer[[first, second]].tolist() == [1, LAYERS]
    assert t.gate_layer[0] == -1


def test_there_are_entries_for_as_many_gates_as_plans_can_have() -> None:
    t = tables(num_slots=5)
    names = [f"p{n}" for n in range(20)]
    for name in names:
        t.add_plan(gated(name, *[gate(name=f"g{n}") for n in range(MAX_GATES)]))
    for start in range(0, 20, 4):
        residents = [t.place(name) for name in names[start : start + 4]]
        entries = [entry for resident in residents for entry in resident.entries]
        assert len(set(entries)) == 4 * MAX_GATES
        for name in names[start : start + 4]:
            t.release(name)
    assert t.evictions == 16


def test_what_could_not_be_written_is_not_found_later_and_keeps_nothing(monkeypatch) -> None:
    """A device that runs out of memory must not leave an empty row that looks resident."""
    t = tables(num_slots=2)
    t.add_plan(gated("p", *[gate()] * MAX_GATES))

    def fail(*args: object) -> None:
        raise RuntimeError("out of memory")

    for method in ("_write", "_write_gate"):
        for _ in range(3):
            with monkeypatch.context() as patch:
                patch.setattr(t, method, fail)
                with pytest.raises(RuntimeError, match="out of memory"):
                    t.place("p")
    assert t.pinned == 0
    (slot,) = t.place("p").slots
    assert t.add[1, slot].tolist() == [1.0] * HIDDEN


# -- faults ----------------------------------------------------------------------------------------


def bad(name: str, **changes: object) -> PlanPayload:
    return replace(gated(name), **changes)


def many(name: str, projections: int) -> PlanPayload:
    return uniform(name, replace(projected(), projections=projected().projections * projections))


WIDE = np.ones((1, HIDDEN + 1), dtype=np.float32)

FAULTS = {
    "needs 4 slots, there are 3": uniform("p", *[added()] * 4),
    "has 4 gates": gated("p", *[gate()] * 4),
    "has 1 gates and 1 sets of cases": bad("p", cases=((0,) * 5,)),
    "has 4 windows, 3 are the most": bad("p", windows=(1, 2, 3, 4)),
    "is 5 wide, the residual stream 4": uniform("p", RowPayload((0,), WIDE)),
    "is 5 wide, the residual": uniform("p", projected(width=5)),
    "is 5 wide": gated("p", gate(weight=WIDE[0])),
    "reads layer 4, the model has layers 0 to 2": gated("p", gate(layer=LAYERS + 1)),
    "reads layer -1": gated("p", gate(layer=-1)),
    "has a probe of kind cosine that is not finite": gated(
        "p", gate(weight=np.full(HIDDEN, np.nan, dtype=np.float32))
    ),
    "has a probe of kind other": gated("p", gate(read_out="other")),
    "edits layer 3, the model has layers 0 to 2": uniform("p", added(LAYERS)),
    "edits layer 4": uniform("p", projected(layer=4)),
    "edits layer 5": uniform("p", scaled((5, 0, 1.0))),
    "holds a number that is not finite": uniform("p", added(value=float("nan"))),
    "not finite or that": uniform("p", added(value=float("inf"))),
    "holds a projection that is not finite": uniform("p", projected(low=float("nan"))),
    "projects on more than 4 vectors at the residual site of layer 1": many("p", 5),
}


@pytest.mark.parametrize(("reason", "plan"), FAULTS.items(), ids=FAULTS)
def test_a_plan_that_does_not_fit_is_refused(reason: str, plan: PlanPayload) -> None:
    t = tables()
    with pytest.raises(ValueError, match=f"plan p .*{reason}"):
        t.add_plan(plan)
    assert t.plans == frozenset()


@pytest.mark.parametrize(
    "plan",
    [
        uniform("p", *[added()] * 3),
        gated("p", *[gate()] * 3),
        gated("p", gate(layer=LAYERS)),
        many("p", 4),
        uniform("p", projected(low=-np.inf)),
        uniform("p", scaled((LAYERS - 1, HEADS - 1, 1.0))),
    ],
    ids=["slots", "gates", "final norm", "projections", "no bound", "heads"],
)
def test_a_plan_that_just_fits_is_not(plan: PlanPayload) -> None:
    t = tables()
    t.add_plan(plan)
    t.place("p")


def test_what_is_not_hooked_is_refused() -> None:
    t = tables(num_heads=0, sites=("residual",))
    with pytest.raises(ValueError, match="scales attention heads, which are not hooked"):
        t.add_plan(uniform("p", scaled((0, 0, 1.0))))
    for site, name in ((1, "attention"), (2, "mlp")):
        with pytest.raises(ValueError, match=f"edits the site {name}, which is not hooked"):
            t.add_plan(uniform("p", projected(site=site)))
    t.add_plan(uniform("p", projected(site=0)))


def test_a_row_that_the_stream_s_type_cannot_hold_is_refused() -> None:
    half = tables(dtype=torch.float16)
    half.add_plan(uniform("fits", added(value=6e4)))
    with pytest.raises(ValueError, match="65504"):
        half.add_plan(uniform("large", added(value=1e5)))


# -- the wire --------------------------------------------------------------------------------------


def test_the_wire_form_round_trips() -> None:
    nothing = RowPayload((), np.empty((0, HIDDEN), np.float32))
    rows = (full(), projected(vectors=2), nothing)
    cases = tuple(tuple((0, 1, 2, None)[(n + m) % 4] for n in range(8)) for m in range(2))
    plan = PlanPayload("p", rows, cases, (7,), (gate(low=-np.inf),), thinking=True)
    back = PlanPayload.from_wire(plan.to_wire())
    assert back.to_wire() == plan.to_wire()
    assert (back.cases, back.windows, back.thinking) == (plan.cases, plan.windows, plan.thinking)
    assert np.array_equal(back.rows[0].vectors, plan.rows[0].vectors)
    assert [p.parameters for p in back.rows[0].projections] == [(1.0, -np.inf, 0.5)] * 3
    assert back.rows[0].heads == plan.rows[0].heads
    assert (back.gates[0].low, back.gates[0].high, back.gates[0].bias) == (-np.inf, 0.75, 2.0)


def test_vectors_that_do_not_add_up_are_refused() -> None:
    wire = uniform("p").to_wire()
    wire["rows"][0]["layers"] = [0, 1]
    with pytest.raises(ValueError, match="1 vectors for 2 layers"):
        PlanPayload.from_wire(wire)


def test_a_plan_says_where_it_acts() -> None:
    plan = replace(gated("p", gate(layer=2)), rows=(full(0), added(1)))
    assert plan.sites == {
        "add": {0, 1},
        "heads": {0},
        "residual": {0},
        "attention": {0},
        "mlp": {0},
        "gates": {2},
    }
