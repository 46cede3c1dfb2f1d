"""A plan: what a policy comes to on one model, as coefficients of stored directions.

A policy speaks of edits, units and layer ranges; the engine only adds vectors. A plan is the
bridge: for each phase of a token's life it names a *row*, and a row is a sum of terms, each a
stored direction with one coefficient per layer. A row takes one slot of the engine's tables,
however many requests use it; a phase without a row is left alone (slot 0). Request strength is no
part of a plan: it multiplies a row token by token.

Plans are canonical. Coefficients of one direction on one layer are summed, zeros dropped, terms
sorted and equal rows merged, so that two policies with the same effect, however they are written
and whatever they are called, have the same plan and the same id, and share slots and cached
prefixes.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import rfc8785
from numpy.typing import NDArray

from directions.errors import TrimtabError
from steering.edits.kind import Additions, Target
from steering.edits.scope import PHASES as PHASES
from steering.edits.scope import phases_of
from steering.policy_errors import PolicyError, PolicyErrors

if TYPE_CHECKING:
    from directions.card import ModelFingerprint
    from directions.store import Store
    from steering.policy import Policy


@dataclass(frozen=True)
class Term:
    """One direction's share of a row.

    Attributes:
        direction: sha256 of the artefact.
        coefficients: ``(layer, multiplier of the stored vector)``, by ascending layer, none zero.
    """

    direction: str
    coefficients: tuple[tuple[int, float], ...]


Row: TypeAlias = tuple[Term, ...]
"""What is added to the residual stream of one token: the sum of its terms. Not empty in a plan."""


@dataclass(frozen=True)
class Plan:
    """A compiled policy.

    Attributes:
        id: sha256 of what the plan does.
        rows: the distinct behaviours, in the order in which :data:`PHASES` first needs them.
        phase_rows: for each of :data:`PHASES` an index into ``rows``, or ``None`` for no change.
    """

    id: str
    rows: tuple[Row, ...]
    phase_rows: tuple[int | None, ...]

    @classmethod
    def of(cls, phases: Iterable[Additions]) -> Plan:
        """The plan that adds ``phases[i]`` to tokens in phase ``PHASES[i]``."""
        rows: list[Row] = []
        phase_rows: list[int | None] = []
        for additions in phases:
            row = _row(additions)
            if row and row not in rows:
                rows.append(row)
            phase_rows.append(rows.index(row) if row else None)
        return cls(_id(rows, phase_rows), tuple(rows), tuple(phase_rows))

    @property
    def is_identity(self) -> bool:
        """The plan changes nothing: no edits, or all of them of strength 0."""
        return not self.rows

    def to_json(self) -> dict[str, Any]:
        """Lists, strings, numbers and ``None`` only: fit for JSON and msgpack."""
        return {
            "id": self.id,
            "rows": _rows_json(self.rows),
            "phase_rows": list(self.phase_rows),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """The plan that :meth:`to_json` wrote.

        Raises:
            TrimtabError: ``E_PLAN_INVALID``: another shape, or an id that is not the content's.
        """
        try:
            rows = tuple(
                tuple(
                    Term(
                        str(term["direction"]),
                        tuple((int(layer), float(c)) for layer, c in term["coefficients"]),
                    )
                    for term in row
                )
                for row in data["rows"]
            )
            phase_rows = tuple(
                None if index is None else int(index) for index in data["phase_rows"]
            )
            plan = cls(str(data["id"]), rows, phase_rows)
            expected = _id(rows, phase_rows)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise TrimtabError("E_PLAN_INVALID", f"not a plan: {error!r}") from None
        if len(phase_rows) != len(PHASES) or any(
            index is not None and not 0 <= index < len(rows) for index in phase_rows
        ):
            raise TrimtabError("E_PLAN_INVALID", f"phase_rows {phase_rows} do not fit the rows")
        if plan.id != expected:
            raise TrimtabError("E_PLAN_INVALID", f"id {plan.id[:64]!a} is not the content's")
        return plan


def _row(additions: Additions) -> Row:
    layers: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for (direction, layer), coefficient in sorted(additions.items()):
        if coefficient != 0.0:
            layers[direction].append((layer, coefficient))
    return tuple(Term(direction, tuple(found)) for direction, found in layers.items())


def _rows_json(rows: Iterable[Row]) -> list[Any]:
    return [
        [
            {"direction": term.direction, "coefficients": [[n, c] for n, c in term.coefficients]}
            for term in row
        ]
        for row in rows
    ]


def _id(rows: Iterable[Row], phase_rows: Iterable[int | None]) -> str:
    form: dict[str, Any] = {"plan": 1, "rows": _rows_json(rows), "phase_rows": list(phase_rows)}
    return hashlib.sha256(rfc8785.dumps(form)).hexdigest()


def compile_policy(
    policy: Policy, store: Store, model: ModelFingerprint, *, relative_ceiling: float = 1.0
) -> Plan:
    """What ``policy`` comes to on ``model``, whatever its mode.

    Args:
        policy: a valid policy.
        store: where its artefacts are; each is loaded and verified.
        model: the served model.
        relative_ceiling: the largest ``relative`` strength that may be reached at the ends of the
            policy's strength range.

    Raises:
        PolicyErrors: every fault, with the JSON path of what it is about: ``E_ARTEFACT_…``,
            ``E_DIRECTION_WIDTH``, ``E_DIRECTION_MODEL``, ``E_DIRECTION_ZERO``, ``E_LAYER_RANGE``,
            ``E_LAYER_ABSENT``, ``E_NORMS_MISSING``, ``E_STRENGTH_CEILING``.
    """
    target = Target(store, model, policy.largest_strength, relative_ceiling)
    contributions: dict[str, dict[tuple[str, int], list[float]]] = {
        phase: defaultdict(list) for phase in PHASES
    }
    for name, edit in policy.edits.items():
        target.path = ("edits", name, edit.kind)
        additions = edit.spec.compile(target)
        for phase in phases_of(edit.scope):
            for site, coefficient in additions.items():
                contributions[phase][site].append(coefficient)
    target.path = ()
    plan = None
    if not target.errors:
        try:
            # fsum is exact before its one rounding, so the order of edits cannot show.
            plan = Plan.of(
                {site: math.fsum(parts) for site, parts in contributions[phase].items()}
                for phase in PHASES
            )
            finite = _stays_finite(plan, store, model, policy.largest_strength)
        except (OverflowError, ValueError):
            finite = False
        if not finite:
            target.refuse(
                "E_STRENGTH_CEILING",
                "edits",
                "the sum of the edits is too large for 32-bit numbers; lower the strengths",
            )
    if plan is None or target.errors:
        raise PolicyErrors(replace(error, policy=policy.name) for error in target.errors)
    return plan


def _stays_finite(plan: Plan, store: Store, model: ModelFingerprint, strength: float) -> bool:
    with np.errstate(over="ignore", invalid="ignore"):
        return all(
            bool(
                np.isfinite(
                    row_vectors(row, store, model.num_layers, model.hidden_size)
                    * np.float32(max(strength, 1.0))
                ).all()
            )
            for row in plan.rows
        )


def row_vectors(terms: Row, store: Store, num_layers: int, hidden_size: int) -> NDArray[np.float32]:
    """What a row adds after each layer at request strength 1.

    Summed in float64 and rounded once, so the order of terms does not show.

    Returns:
        ``[num_layers, hidden_size] float32``.

    Raises:
        TrimtabError: ``E_ARTEFACT_…`` (the store's), ``E_DIRECTION_WIDTH`` (vectors of another
            shape), ``E_LAYER_RANGE`` (a layer that the model lacks).
    """
    total = np.zeros((num_layers, hidden_size), dtype=np.float64)
    for term in terms:
        vectors = store.load(f"sha256:{term.direction}").vectors
        if vectors.shape != total.shape:
            raise TrimtabError(
                "E_DIRECTION_WIDTH",
                f"direction {term.direction[:12]} has the shape {list(vectors.shape)}, "
                f"the model needs {list(total.shape)}",
            )
        for layer, coefficient in term.coefficients:
            if not 0 <= layer < num_layers:
                raise TrimtabError(
                    "E_LAYER_RANGE", f"layer {layer} of a model with {num_layers} layers"
                )
            total[layer] += coefficient * vectors[layer].astype(np.float64)
    with np.errstate(over="ignore"):
        return total.astype(np.float32)


def fingerprint_warnings(
    policy: Policy, store: Store, model: ModelFingerprint
) -> tuple[PolicyError, ...]:
    """What is odd about the policy's artefacts on ``model`` but does not forbid it.

    For instance a direction made with other weights of the same architecture. Codes are
    ``W_DIRECTION_MODEL``; artefacts that cannot be loaded are passed over, as they are
    :func:`compile_policy`'s to report.
    """
    found: list[PolicyError] = []
    for name, edit in policy.edits.items():
        for key, reference in edit.spec.references.items():
            try:
                card = store.load(reference).card
            except TrimtabError:
                continue
            found.extend(
                PolicyError(
                    "W_DIRECTION_MODEL",
                    f"{reference} was made with another {difference.field} than the served "
                    "model's; its effect may differ from what was measured",
                    ("edits", name, edit.kind, key),
                    policy=policy.name,
                )
                for difference in card.model.incompatibilities(model)
                if not difference.fatal
            )
    return tuple(found)
