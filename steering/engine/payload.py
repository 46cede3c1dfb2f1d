"""The wire form of a plan: numbers, not names.

Workers never read artefacts. The API process loads and verifies each direction once, multiplies it out,
and sends every worker the same float32 rows, so that ranks cannot disagree about a file and need no shared
disk. Only the layers that a row edits are sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from directions.store import Store
from steering.plan import Plan, row_vectors


@dataclass(frozen=True)
class RowPayload:
    """One row: the sum that is added at each of ``layers``.

    Attributes:
        layers: decoder layers, ascending.
        vectors: ``[len(layers), hidden_size] float32``.
    """

    layers: tuple[int, ...]
    vectors: np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class PlanPayload:
    """A plan ready for the tables.

    Attributes:
        id: the plan's id.
        rows: one per slot that the plan takes.
        phase_rows: for each phase the index into ``rows``, or ``None`` for the identity.
    """

    id: str
    rows: tuple[RowPayload, ...]
    phase_rows: tuple[int | None, ...]

    def to_wire(self) -> dict[str, Any]:
        """msgpack-native form for vLLM's ``collective_rpc``."""
        return {
            "id": self.id,
            "phase_rows": list(self.phase_rows),
            "rows": [
                {
                    "layers": list(row.layers),
                    "hidden_size": int(row.vectors.shape[1]),
                    "vectors": np.ascontiguousarray(row.vectors, dtype="<f4").tobytes(),
                }
                for row in self.rows
            ],
        }

    @classmethod
    def from_wire(cls, data: dict[str, Any]) -> PlanPayload:
        """Read :meth:`to_wire`'s form.

        Raises:
            ValueError: sizes that do not add up.
        """
        rows = []
        for row in data["rows"]:
            layers = tuple(int(layer) for layer in row["layers"])
            vectors = np.frombuffer(row["vectors"], dtype="<f4").reshape(
                len(layers), int(row["hidden_size"])
            )
            rows.append(RowPayload(layers, vectors))
        return cls(data["id"], tuple(rows), tuple(data["phase_rows"]))


def build_payload(plan: Plan, store: Store, num_layers: int, hidden_size: int) -> PlanPayload:
    """Multiply a plan out into rows of numbers.

    Args:
        plan: as compiled for a model of ``num_layers`` layers of width ``hidden_size``.
        store: where the plan's directions are; each is verified as it is read.

    Raises:
        TrimtabError: ``E_ARTEFACT_…`` from the store.
    """
    rows = []
    for terms in plan.rows:
        dense = row_vectors(terms, store, num_layers, hidden_size)
        layers = tuple(int(layer) for layer in np.flatnonzero(dense.any(axis=1)))
        rows.append(RowPayload(layers, np.ascontiguousarray(dense[list(layers)])))
    return PlanPayload(plan.id, tuple(rows), plan.phase_rows)
