"""Which policy a request runs under.

A request can say it in three places, and they must agree:

1. the model's name, ``NAME@POLICY`` or ``NAME@POLICY@VERSION``;
2. the header ``X-Trimtab-Policy: POLICY`` or ``POLICY@VERSION``;
3. the body's ``steering`` object, which can also set the strength.

If it says it nowhere, the server's default policy holds. Everything a client sends here is closed
and typed: an unknown key or a wrong type is refused, and so is a strength outside the policy's
range, because an answer that was steered differently from what was asked would be worse than none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Final

from directions.errors import TrimtabError
from server.body import JsonObject
from server.catalogue import OFF, Catalogue, Entry
from steering.engine.exchange import Exchange, Trace
from steering.engine.stamp import to_float32
from steering.readings import Reading

HEADER: Final = b"x-trimtab-policy"
_HEADER_PREFIX: Final = b"x-trimtab-"
MAX_HEADER_BYTES: Final = 128

_REFERENCE: Final = re.compile(r"([a-z0-9][a-z0-9._-]{0,63})(?:@([1-9][0-9]{0,8}))?")
_KEYS: Final = ("policy", "strength", "trace")


@dataclass(frozen=True)
class Choice:
    """A policy as one of the three places names it.

    Attributes:
        where: the place, as error messages call it.
        name: the policy's name, ``off`` included.
        version: the version, where the client insists on one.
    """

    where: str
    name: str
    version: int | None = None

    def __str__(self) -> str:
        return self.name if self.version is None else f"{self.name}@{self.version}"


@dataclass(frozen=True)
class Alias:
    """A model name that carries a policy.

    Attributes:
        base: the plain name, one that is served.
        choice: the policy behind the ``@``.
    """

    base: str
    choice: Choice


@dataclass(frozen=True)
class SteeringField:
    """The body's ``steering`` object, checked for form but not yet against the catalogue."""

    choice: Choice | None = None
    strength: float | None = None
    trace: Trace = False


@dataclass(frozen=True)
class Selection:
    """What a request runs under.

    Attributes:
        entry: the policy; None for ``off``.
        strength: the effective strength; 1.0 for ``off``, where it means nothing.
        readings: what probes read of the request.
        trace: which tokens' scores the answer reports.
    """

    entry: Entry | None
    strength: float
    readings: tuple[Reading, ...] = ()
    trace: Trace = False

    def exchange(self) -> Exchange:
        """A new exchange for one request under this selection."""
        if self.entry is None:
            exchange = Exchange(OFF, "off", "closed", self.strength, None)
        else:
            policy = self.entry.policy
            exchange = Exchange(
                policy=policy.reference,
                mode=policy.mode,
                on_failure=policy.on_failure,
                strength=self.strength,
                plan=self.entry.effective_plan if to_float32(self.strength) else None,
            )
        exchange.readings = self.readings
        exchange.trace = self.trace
        return exchange


def header_choice(headers: Iterable[tuple[bytes, bytes]]) -> Choice | None:
    """The policy that the request's headers name.

    Args:
        headers: name and value, names in lower case, as ASGI has them.

    Raises:
        TrimtabError: ``E_HEADER`` for a header given twice, of an unknown ``X-Trimtab-`` name, too
            long, or anything but a policy's name and an optional version.
    """
    values = []
    for name, value in headers:
        if name == HEADER:
            values.append(value)
        elif name.startswith(_HEADER_PREFIX):
            raise TrimtabError(
                "E_HEADER",
                f"the header {_shown(name)} means nothing here",
                expected="X-Trimtab-Policy",
            )
    if not values:
        return None
    field = "X-Trimtab-Policy"
    expected = "POLICY or POLICY@VERSION"
    if len(values) > 1:
        raise TrimtabError("E_HEADER", f"{field} is given {len(values)} times", field=field)
    (value,) = values
    if len(value) > MAX_HEADER_BYTES:
        message = f"{field} is {len(value)} bytes long, more than {MAX_HEADER_BYTES}"
        raise TrimtabError("E_HEADER", message, field=field, expected=expected)
    choice = _parse_reference(value.strip(b" \t").decode("latin-1"), f"the header {field}")
    if choice is None:
        message = f"{field} is {_shown(value)}"
        raise TrimtabError("E_HEADER", message, field=field, expected=expected)
    return choice


def alias_choice(model: object, served: Collection[str]) -> Alias | None:
    """The policy that a model's name carries.

    A served name may hold an ``@`` itself: an exact match is a plain name, and otherwise the
    longest served name before an ``@`` is the model. A name whose base is not served is left to
    vLLM, whose 404 lists what is.

    Raises:
        TrimtabError: ``E_POLICY_UNKNOWN`` if what follows a served name is not a policy's name.
    """
    if not isinstance(model, str) or "@" not in model or model in served:
        return None
    at = len(model)
    while (at := model.rfind("@", 0, at)) != -1:
        base = model[:at]
        if base not in served:
            continue
        choice = _parse_reference(model[at + 1 :], "the model's name")
        if choice is None:
            raise TrimtabError(
                "E_POLICY_UNKNOWN",
                f"{_shown(model[at + 1 :])} after the '@' of the model's name is not a policy",
                field="$.model",
                expected="NAME@POLICY or NAME@POLICY@VERSION",
            )
        return Alias(base, choice)
    return None


def steering_field(value: object) -> SteeringField:
    """Check the body's ``steering`` value for form.

    Raises:
        TrimtabError: ``E_STEERING_FIELD`` for an unknown key or a wrong type, ``E_BODY_JSON`` for a
            repeated key, ``E_STRENGTH_FINITE``, or ``E_POLICY_UNKNOWN`` for a string that is no
            policy's name.
    """
    if not isinstance(value, dict):
        raise _wrong_type("$.steering", value, "an object")
    if isinstance(value, JsonObject) and value.repeated:
        key = min(value.repeated)
        raise TrimtabError("E_BODY_JSON", f"the key {_shown(key)} is repeated", field="$.steering")
    for key in value:
        if key not in _KEYS:
            raise TrimtabError(
                "E_STEERING_FIELD",
                f"'steering' has no key {_shown(key)}",
                field="$.steering",
                expected=", ".join(_KEYS),
            )
    choice = None
    if "policy" in value:
        name = value["policy"]
        if not isinstance(name, str):
            raise _wrong_type("$.steering.policy", name, "a string")
        choice = _parse_reference(name, "the body's 'steering.policy'")
        if choice is None:
            raise TrimtabError(
                "E_POLICY_UNKNOWN",
                f"{_shown(name)} is not a policy's name",
                field="$.steering.policy",
                expected="POLICY or POLICY@VERSION",
            )
    strength = None
    if "strength" in value:
        strength = _strength(value["strength"])
    trace = value.get("trace", False)
    if not isinstance(trace, bool) and trace != "all":
        raise _wrong_type("$.steering.trace", trace, 'true, false or "all"')
    return SteeringField(choice, strength, trace)


def select(
    catalogue: Catalogue,
    choices: Iterable[Choice | None],
    strength: float | None = None,
    trace: Trace = False,
) -> Selection:
    """Resolve what a request names against what is served.

    Args:
        catalogue: the policies served.
        choices: what the places name, in order of precedence; None where one is silent.
        strength: the strength that the body asks for.
        trace: the per-token scores that the body asks for.

    Raises:
        TrimtabError: ``E_POLICY_UNKNOWN``, ``E_POLICY_VERSION``, ``E_SELECTION_CONFLICT`` when two
            places name different policies, ``E_STRENGTH_RANGE``, ``E_STEERING_FIELD`` for a
            strength with nothing to apply it to, or ``E_TRACE_UNSUPPORTED`` for scores of a request
            that no probe reads.
    """
    made = [choice for choice in choices if choice is not None]
    # All are looked up, so that a mistake in one is not hidden by another that is right.
    found = [(choice, catalogue.find(choice.name, choice.version)) for choice in made]
    if found:
        entry = found[0][1]
        for choice, other in found[1:]:
            if other is not entry:
                first = found[0][0]
                raise TrimtabError(
                    "E_SELECTION_CONFLICT",
                    f"{first.where} selects {first} and {choice.where} selects {choice}",
                    expected="one policy, or the same in every place",
                )
    else:
        entry = catalogue.find(catalogue.default, None)
    readings = catalogue.readings_of(entry)
    if trace and not readings:
        raise TrimtabError(
            "E_TRACE_UNSUPPORTED",
            f"no probe reads a request under {OFF if entry is None else entry.policy.reference}; "
            "name probes in the policy, or start the server with --probe",
            field="$.steering.trace",
            expected="false",
        )
    if entry is None:
        if strength is not None:
            raise TrimtabError(
                "E_STEERING_FIELD",
                "a strength is given, and the request's policy is 'off'",
                field="$.steering.strength",
                expected="a policy to go with it",
            )
        return Selection(None, 1.0, readings, trace)
    if strength is None:
        return Selection(entry, 1.0, readings, trace)
    low, high = entry.policy.strength_range
    if not low <= strength <= high:
        raise TrimtabError(
            "E_STRENGTH_RANGE",
            f"policy {entry.policy.reference} takes no strength of {strength:g}",
            field="$.steering.strength",
            expected=f"{low:g} to {high:g}",
        )
    return Selection(entry, strength, readings, trace)


def _strength(value: object) -> float:
    field = "$.steering.strength"
    # A bool is an int in Python, and no strength.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong_type(field, value, "a number")
    try:
        strength = float(value)
    except OverflowError:
        strength = math.inf
    if not math.isfinite(strength):
        raise TrimtabError("E_STRENGTH_FINITE", "the strength is not a finite number", field=field)
    return strength


def _parse_reference(text: str, where: str) -> Choice | None:
    found = _REFERENCE.fullmatch(text)
    if found is None:
        return None
    return Choice(where, found[1], int(found[2]) if found[2] else None)


def _wrong_type(field: str, value: Any, expected: str) -> TrimtabError:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    found = "null" if value is None else kinds.get(type(value), "a number")
    if isinstance(value, dict):
        found = "an object"
    return TrimtabError("E_STEERING_FIELD", f"found {found}", field=field, expected=expected)


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
