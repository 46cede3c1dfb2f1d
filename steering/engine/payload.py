"""The wire form of a plan: numbers, not names.

Workers never read artefacts. The API process loads and verifies each one once, multiplies it out, and
sends every worker the same float32 numbers, so that ranks cannot disagree about a file and need no shared
disk. Only the layers that a row edits are sent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from directions.store import Store
from steering.ops.project import CLIP, SITES, TURN_BY, TURN_TO
from steering.plan import PHASES, Plan, PlanGate, Projection, Row, projection_vectors, row_vectors

FloatArray = np.ndarray[Any, np.dtype[np.float32]]

MODES: Final = {"clip": CLIP, "turn_to": TURN_TO, "turn_by": TURN_BY}


@dataclass(frozen=True)
class ProjectionPayload:
    """One ``ablate``, ``clamp`` or ``rotate`` at one site of one layer.

    Attributes:
        site: index into :data:`steering.ops.project.SITES`.
        layer: decoder layer.
        mode: ``CLIP``, ``TURN_TO`` or ``TURN_BY``.
        parameters: ``(gain, low, high)`` of a clip, ``(angle in radians, 0, 0)`` of a turn.
        vectors: ``[1 or 2, hidden_size] float32``, orthonormal.
    """

    site: int
    layer: int
    mode: int
    parameters: tuple[float, float, float]
    vectors: FloatArray


@dataclass(frozen=True)
class RowPayload:
    """One row: everything that a token in its slot gets.

    Attributes:
        layers: decoder layers at which something is added, ascending.
        vectors: ``[len(layers), hidden_size] float32``: what is added there.
        projections: in the order in which they act.
        heads: ``(layer, query head of the whole model, factor - 1)``.
        renormalise: layers whose attention output keeps its norm.
    """

    layers: tuple[int, ...]
    vectors: FloatArray
    projections: tuple[ProjectionPayload, ...] = ()
    heads: tuple[tuple[int, int, float], ...] = ()
    renormalise: tuple[int, ...] = ()


@dataclass(frozen=True)
class GatePayload:
    """One gate.

    Attributes:
        name: as the policy calls it.
        layer: decoder layer whose output is read; the number of layers for the final norm's output.
        at: ``token``, ``prompt_end`` or ``think_end``.
        low, high: open if the score lies strictly between.
        read_out: ``affine`` or ``cosine``.
        weight: ``[hidden_size] float32``.
        bias: of an affine read-out.
    """

    name: str
    layer: int
    at: str
    low: float
    high: float
    read_out: str
    weight: FloatArray
    bias: float


@dataclass(frozen=True)
class PlanPayload:
    """A plan ready for the tables.

    Attributes:
        id: the plan's id.
        rows: one per slot that the plan takes.
        cases: for each set of open gates (bit ``g`` for gate ``g``) and each case the index into
            ``rows``, or ``None`` for the identity.
        windows: ascending; a generated token's window is how many of them its offset has reached.
        gates: by bit.
        thinking: whether the cases tell thinking, its end and the answer apart.
    """

    id: str
    rows: tuple[RowPayload, ...]
    cases: tuple[tuple[int | None, ...], ...]
    windows: tuple[int, ...] = ()
    gates: tuple[GatePayload, ...] = ()
    thinking: bool = False

    @property
    def hidden_sizes(self) -> frozenset[int]:
        """The widths of all vectors in it."""
        return frozenset(
            [row.vectors.shape[1] for row in self.rows if row.layers]
            + [p.vectors.shape[1] for row in self.rows for p in row.projections]
            + [len(gate.weight) for gate in self.gates]
        )

    @property
    def num_bytes(self) -> int:
        """What its vectors take."""
        vectors = [row.vectors for row in self.rows]
        vectors += [p.vectors for row in self.rows for p in row.projections]
        return sum(v.nbytes for v in vectors) + sum(gate.weight.nbytes for gate in self.gates)

    @property
    def sites(self) -> dict[str, set[int]]:
        """Where it acts: site to layers, in the words of ``EngineSettings.sites``."""
        found: dict[str, set[int]] = {}
        for row in self.rows:
            found.setdefault("add", set()).update(row.layers)
            found.setdefault("heads", set()).update(layer for layer, _, _ in row.heads)
            for p in row.projections:
                found.setdefault(SITES[p.site], set()).add(p.layer)
        found["gates"] = {gate.layer for gate in self.gates}
        return {site: layers for site, layers in found.items() if layers}

    def to_wire(self) -> dict[str, Any]:
        """msgpack-native form for vLLM's ``collective_rpc``."""
        return {
            "id": self.id,
            "cases": [list(case) for case in self.cases],
            "windows": list(self.windows),
            "thinking": self.thinking,
            "rows": [
                {
                    "layers": list(row.layers),
                    "vectors": _to_wire(row.vectors),
                    "projections": [
                        {
                            "site": p.site,
                            "layer": p.layer,
                            "mode": p.mode,
                            "parameters": list(p.parameters),
                            "vectors": _to_wire(p.vectors),
                        }
                        for p in row.projections
                    ],
                    "heads": [list(head) for head in row.heads],
                    "renormalise": list(row.renormalise),
                }
                for row in self.rows
            ],
            "gates": [
                {
                    "name": gate.name,
                    "layer": gate.layer,
                    "at": gate.at,
                    "low": gate.low,
                    "high": gate.high,
                    "read_out": gate.read_out,
                    "weight": _to_wire(gate.weight),
                    "bias": gate.bias,
                }
                for gate in self.gates
            ],
        }

    @classmethod
    def from_wire(cls, data: dict[str, Any]) -> PlanPayload:
        """Read :meth:`to_wire`'s form.

        Raises:
            ValueError: sizes that do not add up.
        """
        rows = tuple(
            RowPayload(
                tuple(int(layer) for layer in row["layers"]),
                _from_wire(row["vectors"], len(row["layers"])),
                tuple(
                    ProjectionPayload(
                        int(p["site"]),
                        int(p["layer"]),
                        int(p["mode"]),
                        _three(p["parameters"]),
                        _from_wire(p["vectors"]),
                    )
                    for p in row["projections"]
                ),
                tuple((int(n), int(h), float(d)) for n, h, d in row["heads"]),
                tuple(int(layer) for layer in row["renormalise"]),
            )
            for row in data["rows"]
        )
        gates = tuple(
            GatePayload(
                gate["name"],
                int(gate["layer"]),
                gate["at"],
                float(gate["low"]),
                float(gate["high"]),
                gate["read_out"],
                _from_wire(gate["weight"]),
                float(gate["bias"]),
            )
            for gate in data["gates"]
        )
        return cls(
            data["id"],
            rows,
            tuple(tuple(case) for case in data["cases"]),
            tuple(int(n) for n in data["windows"]),
            gates,
            bool(data["thinking"]),
        )


def _to_wire(array: FloatArray) -> dict[str, Any]:
    return {
        "shape": list(array.shape),
        "data": np.ascontiguousarray(array, dtype="<f4").tobytes(),
    }


def _from_wire(data: dict[str, Any], rows: int | None = None) -> FloatArray:
    array = np.frombuffer(data["data"], dtype="<f4").reshape([int(n) for n in data["shape"]])
    if rows is not None and array.shape[0] != rows:
        raise ValueError(f"{array.shape[0]} vectors for {rows} layers")
    return array


def _three(values: Iterable[float]) -> tuple[float, float, float]:
    a, b, c = (float(value) for value in values)
    return a, b, c


@dataclass
class _Builder:
    """Multiplies plans out; artefacts are verified once each."""

    store: Store
    num_layers: int
    hidden_size: int
    _probes: dict[str, Any] = field(default_factory=dict)

    def row(self, row: Row) -> RowPayload:
        dense = row_vectors(row.add, self.store, self.num_layers, self.hidden_size)
        layers = tuple(int(layer) for layer in np.flatnonzero(dense.any(axis=1)))
        return RowPayload(
            layers,
            np.ascontiguousarray(dense[list(layers)]),
            tuple(p for projection in row.projections for p in self._projection(projection)),
            row.heads,
            row.renormalise,
        )

    def _projection(self, projection: Projection) -> Iterable[ProjectionPayload]:
        vectors = projection_vectors(projection, self.store, self.num_layers, self.hidden_size)
        for layer, parameters in projection.layers:
            yield ProjectionPayload(
                SITES.index(projection.site),
                layer,
                MODES[projection.kind],
                _parameters(parameters),
                vectors[layer],
            )

    def gate(self, gate: PlanGate) -> GatePayload:
        probe = self._probes.get(gate.probe)
        if probe is None:
            probe = self._probes[gate.probe] = self.store.load_probe(f"sha256:{gate.probe}")
        return GatePayload(
            gate.name,
            gate.layer,
            gate.at,
            -math.inf if gate.low is None else gate.low,
            math.inf if gate.high is None else gate.high,
            probe.card.read_out,
            np.ascontiguousarray(probe.weights[gate.output], dtype=np.float32),
            float(probe.bias[gate.output]),
        )


def _parameters(parameters: tuple[float | None, ...]) -> tuple[float, float, float]:
    if len(parameters) == 1:
        (angle,) = parameters
        assert angle is not None
        return angle, 0.0, 0.0
    gain, low, high = parameters
    assert gain is not None
    return gain, -math.inf if low is None else low, math.inf if high is None else high


def build_payload(plan: Plan, store: Store, num_layers: int, hidden_size: int) -> PlanPayload:
    """Multiply a plan out into numbers.

    Args:
        plan: as compiled for a model of ``num_layers`` layers of width ``hidden_size``.
        store: where the plan's artefacts are; each is verified as it is read.

    Raises:
        TrimtabError: ``E_ARTEFACT_…`` from the store.
    """
    builder = _Builder(store, num_layers, hidden_size)
    return PlanPayload(
        plan.id,
        tuple(builder.row(row) for row in plan.rows),
        plan.cases,
        plan.windows,
        tuple(builder.gate(gate) for gate in plan.gates),
        plan.thinking is not None,
    )


def uniform_payload(
    plan_id: str, row: RowPayload, gates: tuple[GatePayload, ...] = ()
) -> PlanPayload:
    """A plan of one row that acts on every token once all of its gates are open."""
    masks = 1 << len(gates)
    cases = tuple(tuple(0 if mask == masks - 1 else None for _ in PHASES) for mask in range(masks))
    return PlanPayload(plan_id, (row,), cases, gates=gates)
