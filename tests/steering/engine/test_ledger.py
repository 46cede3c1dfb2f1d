"""The front end's count of slots in use."""

from __future__ import annotations

from steering.engine.ledger import SlotLedger
from steering.plan import Plan, Row


def plan(name: str, rows: int) -> Plan:
    return Plan(name, (Row(),) * rows, ((0,) * 5,))


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
