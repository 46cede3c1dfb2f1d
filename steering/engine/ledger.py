"""Counting slots where requests are admitted, so that a worker never runs out.

A worker's slots are shared by every API process of the server. Each process gets an equal share and
counts the distinct plans of its own unfinished requests against it; the shares add up to no more than
the table has, so what is admitted can be placed, and a request that does not fit is refused before any
compute instead of being served unsteered.
"""

from __future__ import annotations

from collections import Counter

from steering.plan import Plan


class SlotLedger:
    """The slots that this process may fill.

    Args:
        num_slots: rows of each worker's table, the identity included.
        num_processes: API processes that share them.
    """

    def __init__(self, num_slots: int, num_processes: int = 1) -> None:
        self.capacity = max((num_slots - 1) // num_processes, 0)
        self._users: Counter[str] = Counter()
        self._cost: dict[str, int] = {}

    def can_admit(self, plan: Plan) -> bool:
        """Whether a request under ``plan`` fits now."""
        return plan.id in self._users or self.in_use + len(plan.rows) <= self.capacity

    def acquire(self, plan_id: str, rows: int) -> None:
        """Count one engine request under a plan that takes ``rows`` slots."""
        self._users[plan_id] += 1
        self._cost[plan_id] = rows

    def release(self, plan_id: str) -> None:
        """Stop counting one engine request."""
        self._users[plan_id] -= 1
        if self._users[plan_id] <= 0:
            del self._users[plan_id]
            del self._cost[plan_id]

    @property
    def in_use(self) -> int:
        """Slots that unfinished requests of this process hold."""
        return sum(self._cost.values())

    def snapshot(self) -> dict[str, int]:
        """Slots by state, for the metrics."""
        return {"in_use": self.in_use, "free": max(self.capacity - self.in_use, 0)}
