"""A plan: what a policy comes to on one model.

A policy speaks of edits, units and layer ranges; the engine only knows what happens to one token.
A plan is the bridge. It has *rows*, each one behaviour of a token (see :mod:`steering.rows`), and
says which row a token gets from two things: its *case*, which is its phase and how many tokens were
generated before it, and which of the plan's *gates* are open. Where there is no row, the token is
left alone. A row takes one slot of the engine's tables, however many requests use it. Request
strength is no part of a plan: it multiplies a row token by token.

Plans are canonical. What adds up is summed, what does nothing is dropped, the rest is sorted as far
as its order does not matter, equal rows are merged, and windows that make no difference are left
out; so that two policies with the same effect, however they are written and whatever they and their
edits are called, have the same plan and the same id, and share slots and cached prefixes.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import rfc8785

from directions.errors import TrimtabError
from directions.store import Direction, Store
from steering.edits.kind import Contribution, Target
from steering.edits.scope import GENERATED, cases, covers, needs_markers, windows_of
from steering.edits.scope import PHASES as PHASES
from steering.gates import At
from steering.gates import PlanGate as PlanGate
from steering.policy_errors import PolicyError, PolicyErrors
from steering.rows import Projection as Projection
from steering.rows import ProjectionKind, Site, Source
from steering.rows import Row as Row
from steering.rows import Term as Term
from steering.rows import projection_vectors as projection_vectors
from steering.rows import row_vectors as row_vectors

if TYPE_CHECKING:
    from directions.card import ModelFingerprint
    from steering.policy import Policy


@dataclass(frozen=True)
class Plan:
    """A compiled policy.

    Attributes:
        id: sha256 of what the plan does.
        rows: the distinct behaviours, in the order in which ``cases`` first names them.
        cases: ``cases[mask][case]`` is an index into ``rows``, or ``None`` for no change. Bit ``g``
            of the mask is set where ``gates[g]`` is open; there are ``2 ** len(gates)`` masks. The
            cases are those of :func:`steering.edits.scope.cases` for ``windows``.
        windows: ascending numbers of generated tokens after which something changes.
        gates: by name.
        thinking: the markers that begin and end thinking, where the plan depends on them.
    """

    id: str
    rows: tuple[Row, ...]
    cases: tuple[tuple[int | None, ...], ...]
    windows: tuple[int, ...] = ()
    gates: tuple[PlanGate, ...] = ()
    thinking: tuple[str, str] | None = None

    @classmethod
    def of(
        cls,
        behaviours: Sequence[Sequence[Row]],
        windows: Sequence[int] = (),
        gates: Sequence[PlanGate] = (),
        thinking: tuple[str, str] | None = None,
    ) -> Plan:
        """The plan with the row ``behaviours[mask][case]``, in canonical form.

        Args:
            behaviours: a row for every mask and case; an empty one for no change.
            windows: ascending.
            gates: sorted by name; the masks' bits are in this order.
            thinking: the markers; left out of the plan if nothing depends on them.
        """
        table = [list(rows) for rows in behaviours]
        kept = list(windows)
        for w in reversed(range(len(windows))):
            before = slice(2 + w * len(GENERATED), 2 + (w + 1) * len(GENERATED))
            after = slice(2 + (w + 1) * len(GENERATED), 2 + (w + 2) * len(GENERATED))
            if all(rows[before] == rows[after] for rows in table):
                del kept[w]
                for rows in table:
                    del rows[after]
        told_apart = any(
            len(set(rows[first : first + len(GENERATED)])) > 1
            for rows in table
            for first in range(2, len(rows), len(GENERATED))
        ) or any(gate.at == "think_end" for gate in gates)
        rows = list(dict.fromkeys(row for found in table for row in found if not row.is_empty))
        plan = cls(
            "",
            tuple(rows),
            tuple(
                tuple(None if row.is_empty else rows.index(row) for row in found) for found in table
            ),
            tuple(kept),
            tuple(gates),
            thinking if told_apart else None,
        )
        return replace(plan, id=_id(plan))

    @classmethod
    def everywhere(cls, row: Row) -> Plan:
        """The plan that does the same to every token."""
        return cls.of([[row] * len(PHASES)])

    @property
    def is_identity(self) -> bool:
        """The plan changes nothing: no edits, or all of them of strength 0."""
        return not self.rows

    @property
    def phased(self) -> bool:
        """Whether tokens are treated differently, by their case or by a gate."""
        return bool(self.gates) or len(set(self.cases[0])) > 1

    @property
    def kinds(self) -> frozenset[str]:
        """What the engine has to be able to do: of ``add``, ``projection``, ``heads``, ``gate``."""
        found = {
            "add": any(row.add for row in self.rows),
            "projection": any(row.projections for row in self.rows),
            "heads": any(row.heads for row in self.rows),
            "gate": bool(self.gates),
        }
        return frozenset(kind for kind, there in found.items() if there)

    def to_json(self) -> dict[str, Any]:
        """Lists, strings, numbers and ``None`` only: fit for JSON and msgpack."""
        return {"id": self.id, **_content(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """The plan that :meth:`to_json` wrote.

        Raises:
            TrimtabError: ``E_PLAN_INVALID``: another shape, or an id that is not the content's.
        """
        try:
            plan = cls(
                str(data["id"]),
                tuple(_row_of(row) for row in data["rows"]),
                tuple(
                    tuple(None if index is None else int(index) for index in found)
                    for found in data["cases"]
                ),
                tuple(int(window) for window in data["windows"]),
                tuple(_gate_of(gate) for gate in data["gates"]),
                None if data["thinking"] is None else _two(data["thinking"]),
            )
            expected = _id(plan)
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise TrimtabError("E_PLAN_INVALID", f"not a plan: {error!r}") from None
        width = 2 + len(GENERATED) * (len(plan.windows) + 1)
        if len(plan.cases) != 2 ** len(plan.gates) or any(
            len(found) != width
            or any(index is not None and not 0 <= index < len(plan.rows) for index in found)
            for found in plan.cases
        ):
            raise TrimtabError("E_PLAN_INVALID", "the cases do not fit the rows")
        if list(plan.windows) != sorted(set(plan.windows)):
            raise TrimtabError("E_PLAN_INVALID", f"windows {plan.windows} do not ascend")
        if plan.id != expected:
            raise TrimtabError("E_PLAN_INVALID", f"id {plan.id[:64]!a} is not the content's")
        return plan


# -- the JSON form ---------------------------------------------------------------------------------


def _content(plan: Plan) -> dict[str, Any]:
    return {
        "rows": [_row_json(row) for row in plan.rows],
        "cases": [list(found) for found in plan.cases],
        "windows": list(plan.windows),
        "gates": [
            {
                "name": gate.name,
                "probe": gate.probe,
                "output": gate.output,
                "at": gate.at,
                "low": gate.low,
                "high": gate.high,
                "layer": gate.layer,
            }
            for gate in plan.gates
        ],
        "thinking": None if plan.thinking is None else list(plan.thinking),
    }


def _id(plan: Plan) -> str:
    return hashlib.sha256(rfc8785.dumps({"plan": 2, **_content(plan)})).hexdigest()


def _row_json(row: Row) -> dict[str, Any]:
    return {
        "add": [
            {
                "direction": term.direction,
                "vector_layer": term.vector_layer,
                "coefficients": [[layer, c] for layer, c in term.coefficients],
            }
            for term in row.add
        ],
        "projections": [
            {
                "site": projection.site,
                "kind": projection.kind,
                "directions": [list(source) for source in projection.directions],
                "layers": [[layer, list(numbers)] for layer, numbers in projection.layers],
            }
            for projection in row.projections
        ],
        "heads": [list(head) for head in row.heads],
        "renormalise": list(row.renormalise),
    }


def _row_of(data: Mapping[str, Any]) -> Row:
    return Row(
        tuple(
            Term(
                str(term["direction"]),
                tuple((int(layer), float(c)) for layer, c in term["coefficients"]),
                _whole(term["vector_layer"]),
            )
            for term in data["add"]
        ),
        tuple(_projection_of(projection) for projection in data["projections"]),
        tuple((int(layer), int(head), float(g)) for layer, head, g in data["heads"]),
        tuple(int(layer) for layer in data["renormalise"]),
    )


def _projection_of(data: Mapping[str, Any]) -> Projection:
    site, kind = data["site"], data["kind"]
    if site not in get_args(Site) or kind not in get_args(ProjectionKind):
        raise ValueError(f"{kind!a} at {site!a}")
    directions = tuple((str(sha256), _whole(of)) for sha256, of in data["directions"])
    layers = tuple(
        (int(layer), tuple(None if x is None else float(x) for x in numbers))
        for layer, numbers in data["layers"]
    )
    sources, numbers = (1, 3) if kind == "clip" else (2, 1)
    if len(directions) != sources or any(len(found) != numbers for _, found in layers):
        raise ValueError(f"{kind} takes {sources} directions and {numbers} numbers a layer")
    return Projection(site, kind, directions, layers)


def _gate_of(data: Mapping[str, Any]) -> PlanGate:
    if data["at"] not in get_args(At):
        raise ValueError(f"a gate at {data['at']!a}")
    return PlanGate(
        str(data["name"]),
        str(data["probe"]),
        int(data["output"]),
        data["at"],
        None if data["low"] is None else float(data["low"]),
        None if data["high"] is None else float(data["high"]),
        int(data["layer"]),
    )


def _whole(value: Any) -> int | None:
    return None if value is None else int(value)


def _two(value: Any) -> tuple[str, str]:
    start, end = value
    return str(start), str(end)


# -- from contributions to rows --------------------------------------------------------------------


def combined(contributions: Iterable[Contribution]) -> Row:
    """The row of several edits, given in the order in which they act.

    Raises:
        OverflowError, ValueError: a sum is not finite.
    """
    found = list(contributions)
    return Row(_terms(found), _projections(found), *_heads(found))


def _terms(contributions: list[Contribution]) -> tuple[Term, ...]:
    parts: dict[tuple[str, int | None, int], list[float]] = defaultdict(list)
    for contribution in contributions:
        for key, coefficient in contribution.add.items():
            parts[key].append(coefficient)
    layers: dict[Source, list[tuple[int, float]]] = defaultdict(list)
    for (direction, of, layer), coefficients in parts.items():
        # fsum is exact before its one rounding, so the order of edits cannot show.
        total = math.fsum(coefficients)
        if total != 0.0:
            layers[direction, of].append((layer, total))
    return tuple(
        Term(direction, tuple(sorted(coefficients)), of)
        for (direction, of), coefficients in sorted(
            layers.items(), key=lambda item: _source_key(item[0])
        )
    )


def _projections(contributions: list[Contribution]) -> tuple[Projection, ...]:
    # Only at one site of one layer does the order matter. So what acts there is numbered, and the
    # rest of the order, and what is one projection and what are two, is arbitrary but fixed.
    acted: Counter[tuple[Site, int]] = Counter()
    grouped: dict[
        tuple[int, Site, ProjectionKind, tuple[Source, ...]], dict[int, tuple[float | None, ...]]
    ] = defaultdict(dict)
    for contribution in contributions:
        for projection in contribution.projections:
            for layer, numbers in projection.layers:
                if _does_nothing(projection.kind, numbers):
                    continue
                directions = tuple(
                    (sha256, None if of == layer else of) for sha256, of in projection.directions
                )
                depth = acted[projection.site, layer]
                acted[projection.site, layer] += 1
                grouped[depth, projection.site, projection.kind, directions][layer] = numbers
    ordered = sorted(
        grouped.items(), key=lambda item: (*item[0][:3], *map(_source_key, item[0][3]))
    )
    return tuple(
        Projection(site, kind, directions, tuple(sorted(layers.items(), key=lambda item: item[0])))
        for (_, site, kind, directions), layers in ordered
    )


def _does_nothing(kind: ProjectionKind, numbers: tuple[float | None, ...]) -> bool:
    return numbers == ((1.0, None, None) if kind == "clip" else (0.0,)) and kind != "turn_to"


def _heads(
    contributions: list[Contribution],
) -> tuple[tuple[tuple[int, int, float], ...], tuple[int, ...]]:
    parts: dict[tuple[int, int], list[float]] = defaultdict(list)
    renormalise: set[int] = set()
    for contribution in contributions:
        renormalise |= contribution.renormalise
        for head, change in contribution.heads.items():
            parts[head].append(change)
    sums = {head: math.fsum(changes) for head, changes in parts.items()}
    heads = tuple((*head, change) for head, change in sorted(sums.items()) if change != 0.0)
    scaled = {layer for layer, _, _ in heads}
    return heads, tuple(sorted(renormalise & scaled))


def _source_key(source: Source) -> tuple[str, int]:
    sha256, of = source
    return sha256, -1 if of is None else of


# -- compiling -------------------------------------------------------------------------------------


class _LoadedOnce(Store):
    """A store that reads and checks each direction once, for the length of one compilation."""

    def __init__(self, root: Any) -> None:
        super().__init__(root)
        self._loaded: dict[str, Direction] = {}

    def load(self, reference: str) -> Direction:
        if reference not in self._loaded:
            found = super().load(reference)
            self._loaded[reference] = self._loaded[f"sha256:{found.sha256}"] = found
        return self._loaded[reference]


def compile_policy(
    policy: Policy,
    store: Store,
    model: ModelFingerprint,
    *,
    relative_ceiling: float = 1.0,
    thinking: tuple[str, str] | None = None,
) -> Plan:
    """What ``policy`` comes to on ``model``, whatever its mode.

    Args:
        policy: a valid policy.
        store: where its artefacts are; each is loaded and verified.
        model: the served model.
        relative_ceiling: the largest ``relative`` strength that may be reached at the ends of the
            policy's strength range.
        thinking: the texts that begin and end the model's thinking, if it is known to think.

    Raises:
        PolicyErrors: every fault, with the JSON path of what it is about: ``E_ARTEFACT_…``,
            ``E_DIRECTION_WIDTH``, ``E_DIRECTION_MODEL``, ``E_DIRECTION_ZERO``, ``E_LAYER_RANGE``,
            ``E_LAYER_ABSENT``, ``E_NORMS_MISSING``, ``E_STRENGTH_CEILING``, ``E_PLANE_PARALLEL``,
            ``E_HEADS_MODEL``, ``E_HEAD_RANGE``, ``E_PROBE_MODEL``, ``E_PROBE_OUTPUT``,
            ``E_GATE_ORDER``, ``E_GATE_NEVER``, ``E_THINKING_MARKERS``.
    """
    target = Target(_LoadedOnce(store.root), model, policy.largest_strength, relative_ceiling)
    contributions = _contributions(policy, target)
    gates = _gates(policy, contributions, target)
    _check_probes(policy, target)
    if thinking is None:
        _refuse_unmarked(policy, target)
    target.path = ()
    plan = None
    if not target.errors:
        try:
            plan = _plan(policy, contributions, gates, thinking)
            finite = all(_stays_finite(row, target) for row in plan.rows)
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


def _contributions(policy: Policy, target: Target) -> dict[str, Contribution]:
    found = {}
    for name, edit in policy.edits.items():
        target.path = ("edits", name, edit.kind)
        contribution = edit.spec.compile(target)
        if contribution is not None:
            found[name] = contribution
    return found


def _gates(
    policy: Policy, contributions: Mapping[str, Contribution], target: Target
) -> list[PlanGate]:
    found = []
    for name, gate in sorted(policy.gates.items()):
        target.path = ("gates", name)
        compiled = gate.compile(name, target)
        if compiled is None:
            continue
        found.append(compiled)
        for edit in gate.then:
            if edit in contributions:
                gate.check_edit(
                    edit,
                    policy.edits[edit].scope,
                    contributions[edit].layers,
                    compiled.layer,
                    target,
                )
    return found


def _check_probes(policy: Policy, target: Target) -> None:
    target.path = ()
    for reference in policy.probes:
        try:
            probe = target.store.load_probe(reference)
        except TrimtabError as error:
            target.refuse_missing(error, "probes")
            continue
        target.fits(probe.card.model, "E_PROBE_MODEL", "probes")


def _refuse_unmarked(policy: Policy, target: Target) -> None:
    places = [("edits", n, "scope") for n, e in policy.edits.items() if needs_markers(e.scope)]
    places += [("gates", n, "at") for n, g in policy.gates.items() if g.at == "think_end"]
    target.path = ()
    for place in places:
        target.refuse(
            "E_THINKING_MARKERS",
            place,
            "it is not known how this model marks its thinking; name the texts that begin and end "
            "it with --think-start and --think-end, or use scopes and gates that do without",
        )


def _plan(
    policy: Policy,
    contributions: Mapping[str, Contribution],
    gates: Sequence[PlanGate],
    thinking: tuple[str, str] | None,
) -> Plan:
    opened_by: dict[str, int] = defaultdict(int)
    for bit, gate in enumerate(gates):
        for edit in policy.gates[gate.name].then:
            opened_by[edit] |= 1 << bit
    windows = sorted({n for edit in policy.edits.values() for n in windows_of(edit.scope)})
    order = policy.acting_order
    rows: dict[tuple[str, ...], Row] = {}
    behaviours = []
    for mask in range(2 ** len(gates)):
        found = []
        for case in cases(windows):
            active = tuple(
                name
                for name in order
                if covers(policy.edits[name].scope, case)
                and (name not in opened_by or opened_by[name] & mask)
            )
            if active not in rows:
                rows[active] = combined(contributions[name] for name in active)
            found.append(rows[active])
        behaviours.append(found)
    return Plan.of(behaviours, windows, gates, thinking)


def _stays_finite(row: Row, target: Target) -> bool:
    """Whether no number of the row is beyond float32 at any strength that may be asked for."""
    model = target.model
    numbers = [change for _, _, change in row.heads]
    for projection in row.projections:
        for _, found in projection.layers:
            numbers += [number for number in found if number is not None]
    with np.errstate(over="ignore", invalid="ignore"):
        strength = np.float32(max(target.strength_limit, 1.0))
        added = row_vectors(row.add, target.store, model.num_layers, model.hidden_size)
        return bool(
            np.isfinite(added * strength).all()
            and np.isfinite(np.array(numbers, dtype=np.float32) * strength).all()
        )


def fingerprint_warnings(
    policy: Policy, store: Store, model: ModelFingerprint
) -> tuple[PolicyError, ...]:
    """What is odd about the policy's artefacts on ``model`` but does not forbid it.

    For instance a direction made with other weights of the same architecture. Codes are
    ``W_DIRECTION_MODEL``, ``W_PROBE_MODEL`` and ``W_HEADS_MODEL``; artefacts that cannot be loaded
    are passed over, as they are :func:`compile_policy`'s to report.
    """
    found: list[PolicyError] = []
    for named in policy.artefacts:
        try:
            made_on = named.model(store)
        except TrimtabError:
            continue
        found.extend(
            PolicyError(
                named.warning_code,
                f"{named.reference} was made with another {difference.field} than the served "
                "model's; its effect may differ from what was measured",
                named.path,
                policy=policy.name,
            )
            for difference in made_on.incompatibilities(model)
            if not difference.fatal
        )
    return tuple(found)
