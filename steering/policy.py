"""A policy: a named, versioned set of edits, with a mode and a failure rule.

This is the closed specification that operators write and requests choose by name. It is checked
without a model, torch or vLLM: unknown keys are refused, nothing is coerced, every fault has a
stable code and a JSON path, and all faults of a document are reported together. What a policy comes
to on one model is :func:`steering.plan.compile_policy`'s business.

A policy has one canonical form: RFC 8785 JSON of its normal form, defaults filled in, layers and
scopes expanded, free text left out. The sha256 of that is its identity: two spellings of one policy
share it, and any change of what the policy says changes it.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Annotated, Any, Final, Literal, Self, get_args

import rfc8785
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from steering.edits.ablate import Ablate
from steering.edits.add import Add
from steering.edits.clamp import Clamp
from steering.edits.kind import ClosedModel, EditSpec, FiniteFloat, NamedArtefact, Reference
from steering.edits.rotate import Rotate
from steering.edits.scale_heads import ScaleHeads
from steering.edits.scope import MAX_WINDOWS, Scope, windows_of
from steering.gates import MAX_GATES, Gate
from steering.policy_document import COMMA_HINT
from steering.policy_errors import PathParts, PolicyError, PolicyErrors, shown

Mode = Literal["off", "shadow", "enforce"]
OnFailure = Literal["closed", "open"]

RESERVED_NAMES: Final = frozenset({"off"})
"""``off`` selects "no steering" wherever a policy can be named."""

MAX_EDITS: Final = 64
MAX_PROBES: Final = 16

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}\Z")
_RANGE: Final = re.compile(r"[0-9]+(-[0-9]+)?\Z")
_INNER_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}\Z")


def _policy_name(name: str) -> str:
    if _NAME.match(name) is None:
        raise PydanticCustomError(
            "E_POLICY_NAME",
            "{found} is not a name; use up to 64 lower-case letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit",
            {"found": shown(name)},
        )
    if name in RESERVED_NAMES:
        raise PydanticCustomError(
            "E_POLICY_NAME_RESERVED",
            "{found} is reserved: it selects no steering; choose another name",
            {"found": shown(name)},
        )
    return name


def _inner_name(name: str, what: str) -> str:
    # No dot, so that its JSON path needs no quotes.
    if _INNER_NAME.match(name) is None:
        raise PydanticCustomError(
            "E_POLICY_NAME",
            "{found} is not a name of {what}; use up to 64 lower-case letters, digits, '_' and "
            "'-', beginning with a letter or digit",
            {"found": shown(name), "what": what},
        )
    return name


def _edit_name(name: str) -> str:
    return _inner_name(name, "an edit")


def _gate_name(name: str) -> str:
    return _inner_name(name, "a gate")


def _no_edit(name: str, edits: Collection[str]) -> str:
    return f"no edit is named {shown(name)}; there are {', '.join(sorted(edits)) or 'none'}"[:400]


def _pair(value: object) -> object:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise PydanticCustomError(
            "E_POLICY_STRENGTH_RANGE",
            "{found} is not a list of two numbers, lowest and highest",
            {"found": shown(value)},
        )
    return tuple(value)


def _holds_one(value: tuple[float, float]) -> tuple[float, float]:
    low, high = value
    if not low <= 1.0 <= high:
        # A request that names no strength runs at 1, "as written"; that must be allowed.
        raise PydanticCustomError(
            "E_POLICY_STRENGTH_RANGE",
            "the range from {low} to {high} does not hold 1, the strength of a request that asks "
            "for none; scale the strengths of the edits instead",
            {"low": f"{low:g}", "high": f"{high:g}"},
        )
    return value


def _not_too_many(edits: dict[str, Edit]) -> dict[str, Edit]:
    if len(edits) > MAX_EDITS:
        raise PydanticCustomError(
            "E_POLICY_SIZE",
            "{count} edits; at most {most} are allowed",
            {"count": len(edits), "most": MAX_EDITS},
        )
    windows = {n for edit in edits.values() for n in windows_of(edit.scope)}
    if len(windows) > MAX_WINDOWS:
        raise PydanticCustomError(
            "E_POLICY_SIZE",
            "{count} different numbers of first tokens; at most {most} are allowed",
            {"count": len(windows), "most": MAX_WINDOWS},
        )
    return edits


def _probes(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _sorted_once(probes: tuple[str, ...]) -> tuple[str, ...]:
    if len(probes) > MAX_PROBES:
        raise PydanticCustomError(
            "E_POLICY_SIZE",
            "{count} probes; at most {most} are allowed",
            {"count": len(probes), "most": MAX_PROBES},
        )
    for probe in probes:
        if probes.count(probe) > 1:
            raise PydanticCustomError(
                "E_POLICY_PROBES", "{found} is named twice", {"found": shown(probe)}
            )
    return tuple(sorted(probes))


def _not_too_many_gates(gates: dict[str, Gate]) -> dict[str, Gate]:
    if len(gates) > MAX_GATES:
        raise PydanticCustomError(
            "E_POLICY_SIZE",
            "{count} gates; at most {most} are allowed",
            {"count": len(gates), "most": MAX_GATES},
        )
    return gates


class Edit(ClosedModel):
    """One change to activations: exactly one kind, and the tokens it applies to.

    Each field but ``scope`` is a kind (see :mod:`steering.edits.kind`). Their order here is that in
    which the edits of a policy act within a layer; edits of one kind act in the order of their
    names.
    """

    scale_heads: ScaleHeads | None = None
    ablate: Ablate | None = None
    clamp: Clamp | None = None
    rotate: Rotate | None = None
    add: Add | None = None
    scope: Scope = ("all",)

    @classmethod
    def key_fault(cls, keys: Collection[str]) -> tuple[str, str] | None:
        given = [kind for kind in KINDS if kind in keys]
        if len(given) == 1:
            return None
        if given:
            said = f"an edit has one kind, found {' and '.join(given)}; make an edit of each"
        else:
            said = f"an edit needs its kind: {' or '.join(KINDS)}"
        return "E_POLICY_EDIT_KIND", said

    @property
    def kind(self) -> str:
        """The kind's name, e.g. ``add``."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def spec(self) -> EditSpec:
        """The keys of the kind."""
        spec = getattr(self, self.kind)
        assert isinstance(spec, EditSpec)
        return spec


KINDS: Final[dict[str, type[EditSpec]]] = {
    name: spec
    for name, field in Edit.model_fields.items()
    for spec in get_args(field.annotation)
    if isinstance(spec, type) and issubclass(spec, EditSpec)
}
"""The kinds of edit that a policy may hold, read off the fields of :class:`Edit`."""


class Policy(ClosedModel):
    """A valid policy, in normal form. Make one with :func:`parse_policy`.

    Attributes:
        name: what clients select; ``off`` is reserved.
        version: from 1; raised by whoever changes the policy.
        description: free text; not part of the identity.
        mode: ``enforce`` applies the edits, ``shadow`` only reports, ``off`` does neither.
        on_failure: ``closed``: a request that cannot be steered fails; ``open``: it is answered
            unsteered, and the answer says so.
        strength_range: the lowest and highest multiplier that a request may ask for; holds 1.
        probes: probes whose scores answers under this policy report, sorted.
        edits: by name; several may act on one layer.
        gates: by name; an edit that gates name is in force only where one of them is open.
    """

    api_version: Literal["trimtab/v1"] = Field(alias="apiVersion")
    kind: Literal["Policy"]
    name: Annotated[str, AfterValidator(_policy_name)]
    version: Annotated[int, Field(ge=1, le=2**31 - 1)] = 1
    description: Annotated[str, Field(max_length=4096)] = ""
    mode: Mode = "enforce"
    on_failure: OnFailure = Field(default="closed", alias="onFailure")
    strength_range: Annotated[
        tuple[FiniteFloat, FiniteFloat],
        BeforeValidator(_pair, json_schema_input_type=list[float]),
        AfterValidator(_holds_one),
    ] = Field(default=(0.0, 1.0), alias="strengthRange")
    probes: Annotated[
        tuple[Reference, ...],
        BeforeValidator(_probes, json_schema_input_type=list[str]),
        AfterValidator(_sorted_once),
    ] = ()
    edits: Annotated[
        dict[Annotated[str, AfterValidator(_edit_name)], Edit], AfterValidator(_not_too_many)
    ] = Field(default_factory=dict)
    gates: Annotated[
        dict[Annotated[str, AfterValidator(_gate_name)], Gate], AfterValidator(_not_too_many_gates)
    ] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _gates_open_what_is_there(self) -> Self:
        for gate in self.gates.values():
            for name in gate.then:
                if name not in self.edits:
                    raise PydanticCustomError(
                        "E_GATE_EDIT", "{fault}", {"fault": _no_edit(name, self.edits)}
                    )
        return self

    @property
    def reference(self) -> str:
        """``name@version``."""
        return f"{self.name}@{self.version}"

    @property
    def acting_order(self) -> tuple[str, ...]:
        """The names of the edits in the order in which they act within a layer."""
        kinds = list(KINDS)
        return tuple(
            sorted(self.edits, key=lambda name: (kinds.index(self.edits[name].kind), name))
        )

    @property
    def artefacts(self) -> tuple[NamedArtefact, ...]:
        """Every place that names an artefact, with its path in the document."""
        in_edits = [
            replace(named, path=("edits", name, edit.kind, *named.path))
            for name, edit in self.edits.items()
            for named in edit.spec.artefacts
        ]
        in_gates = [
            replace(gate.artefact, path=("gates", name, *gate.artefact.path))
            for name, gate in self.gates.items()
        ]
        # They are sorted, so a place in the list is no place in the document.
        read = [NamedArtefact(("probes",), "probe", reference) for reference in self.probes]
        return (*in_edits, *in_gates, *read)

    @cached_property
    def canonical(self) -> bytes:
        """The canonical form: RFC 8785 JSON, itself a valid policy document.

        A key that a later release adds is left out of it while it has its default, so that the
        identity of a stored policy never changes by an upgrade.
        """
        form = self.model_dump(
            mode="json", by_alias=True, exclude_none=True, exclude={"description"}
        )
        for key in ("gates", "probes"):
            if not form[key]:
                del form[key]
        return rfc8785.dumps(form)

    @cached_property
    def identity(self) -> str:
        """sha256 of the canonical form, 64 hexadecimal digits."""
        return hashlib.sha256(self.canonical).hexdigest()

    @property
    def largest_strength(self) -> float:
        """The largest magnitude of strength that a request may ask for."""
        return max(abs(bound) for bound in self.strength_range)


def parse_policy(data: object) -> Policy:
    """Check plain data (what a JSON parser gives) and return the policy in normal form.

    Raises:
        PolicyErrors: every fault of the document. Codes: ``E_POLICY_TYPE``, ``E_POLICY_KEY``
            (unknown), ``E_POLICY_MISSING``, ``E_POLICY_VALUE`` (not among the allowed words, or too
            long), ``E_POLICY_NUMBER`` (not finite, or out of bounds), ``E_POLICY_SIZE`` (too many
            edits), ``E_POLICY_NAME``, ``E_POLICY_NAME_RESERVED``, ``E_POLICY_STRENGTH_RANGE``,
            ``E_POLICY_EDIT_KIND``, ``E_POLICY_SCOPE``, ``E_POLICY_LAYERS``, ``E_POLICY_REFERENCE``,
            ``E_POLICY_CHOICE`` (not exactly one of several keys), ``E_POLICY_SITES``,
            ``E_POLICY_BOUNDS``, ``E_POLICY_PLANE``, ``E_POLICY_HEADS``, ``E_POLICY_PROBES``,
            ``E_GATE_THRESHOLD``, ``E_GATE_EDIT``.
    """
    try:
        return Policy.model_validate(data)
    except ValidationError as error:
        faults = [_fault(details) for details in error.errors(include_url=False)]
    # Pydantic asks whether keys fit together only if each is sound; here it is asked regardless,
    # except where an unknown key, reported above, is likely to be one of them misspelt.
    known = {(fault.path, fault.code) for fault in faults}
    unknown_in = {fault.path[:-1] for fault in faults if fault.code == "E_POLICY_KEY"}
    for path, model, keys in _raw_models(data):
        fault = model.key_fault([key for key, value in keys.items() if value is not None])
        if fault is None or path in unknown_in or (path, fault[0]) in known:
            continue
        faults.append(PolicyError(*fault, path))
    # Likewise whether gates name edits that are there; what pydantic found has no place.
    faults = [fault for fault in faults if (fault.code, fault.path) != ("E_GATE_EDIT", ())]
    faults.extend(_missing_edits(data))
    stated = data.get("name") if isinstance(data, Mapping) else None
    policy = stated if isinstance(stated, str) and _NAME.match(stated) else None
    raise PolicyErrors(
        PolicyError(fault.code, fault.message, fault.path, fault.expected, policy)
        for fault in faults
    )


def _raw_models(
    data: object,
) -> Iterator[tuple[PathParts, type[ClosedModel], Mapping[Any, object]]]:
    """Every mapping that stands where an edit, the keys of its kind, or a gate belongs."""
    for name, edit in _raw_mappings(data, "edits").items():
        yield ("edits", name), Edit, edit
        for kind, spec in KINDS.items():
            keys = edit.get(kind)
            if isinstance(keys, Mapping):
                yield ("edits", name, kind), spec, keys
    for name, gate in _raw_mappings(data, "gates").items():
        yield ("gates", name), Gate, gate


def _raw_mappings(data: object, key: str) -> dict[str, Mapping[Any, object]]:
    found = data.get(key) if isinstance(data, Mapping) else None
    if not isinstance(found, Mapping):
        return {}
    return {
        name: value
        for name, value in found.items()
        if isinstance(name, str) and isinstance(value, Mapping)
    }


def _missing_edits(data: object) -> Iterator[PolicyError]:
    edits = data.get("edits") if isinstance(data, Mapping) else None
    there = [name for name in edits if isinstance(name, str)] if isinstance(edits, Mapping) else []
    for name, gate in _raw_mappings(data, "gates").items():
        then = gate.get("then")
        for i, edit in enumerate(then if isinstance(then, list | tuple) else ()):
            if isinstance(edit, str) and edit not in there:
                yield PolicyError("E_GATE_EDIT", _no_edit(edit, there), ("gates", name, "then", i))


_NUMBER_FAULTS: Final = frozenset(
    {"finite_number", "greater_than_equal", "less_than_equal", "int_parsing_size"}
)
_SAID: Final = {"model_type": "should be a mapping", "dict_type": "should be a mapping"}
_VALUE_FAULTS: Final = frozenset({"literal_error", "string_too_long", "string_unicode"})


def _fault(details: ErrorDetails) -> PolicyError:
    """One of pydantic's errors under our codes, with what was found."""
    path = tuple(part for part in details["loc"] if part != "[key]")
    kind, found = details["type"], details["input"]
    if kind.startswith("E_"):
        return PolicyError(kind, details["msg"], path)
    if kind == "missing":
        return PolicyError("E_POLICY_MISSING", f"the key {path[-1]} is required", path)
    if kind == "extra_forbidden":
        return _unknown_key(path)
    said = _SAID.get(kind, details["msg"].removeprefix("Input "))
    message = f"{said}, found {shown(found)}"
    expected = details.get("ctx", {}).get("expected") if kind == "literal_error" else None
    # Pydantic calls an integer that no float can hold a wrong type.
    too_large = kind == "float_type" and isinstance(found, int) and not isinstance(found, bool)
    if kind in _NUMBER_FAULTS or too_large:
        return PolicyError("E_POLICY_NUMBER", message, path)
    if kind in _VALUE_FAULTS:
        return PolicyError("E_POLICY_VALUE", message, path, expected)
    return PolicyError("E_POLICY_TYPE", message, path)


def _unknown_key(path: PathParts) -> PolicyError:
    allowed = _keys_at(path[:-1])
    near = difflib.get_close_matches(str(path[-1]), allowed, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(allowed)}"
    if _RANGE.match(str(path[-1])):
        hint = COMMA_HINT
    return PolicyError(
        "E_POLICY_KEY", f"unknown key; {hint}", path, expected=" | ".join(allowed) or None
    )


def _keys_at(path: PathParts) -> list[str]:
    match path:
        case ():
            return _keys(Policy)
        case ("edits", _):
            return _keys(Edit)
        case ("edits", _, str(kind)) if kind in KINDS:
            return _keys(KINDS[kind])
        case ("gates", _):
            return _keys(Gate)
    return []


def _keys(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]
