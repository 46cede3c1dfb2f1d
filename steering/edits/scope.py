"""Which tokens an edit touches.

A token is in one of five phases. With ``p`` its absolute position in the request and ``P`` the
number of prompt tokens: ``prompt`` if ``p < P − 1``; ``prompt_end`` if ``p = P − 1``, the token
whose output predicts the first of the answer; and after that ``thinking``, ``think_end`` or
``answer``, told from the text (see :mod:`steering.thinking`). A scope names sets of phases, and
possibly the first ``N`` generated tokens, ``P ≤ p < P + N``; an edit acts on what any of them
covers.

Phases, and within the generated ones the windows between the ``N`` of a policy, make up the *cases*
that a plan tells apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from steering.edits.kind import ClosedModel
from steering.policy_errors import shown

Phase = Literal["prompt", "prompt_end", "thinking", "think_end", "answer"]
ScopeName = Literal["all", "prompt", "prompt_end", "generation", "thinking", "think_end", "answer"]

PHASES: Final[tuple[Phase, ...]] = ("prompt", "prompt_end", "thinking", "think_end", "answer")
GENERATED: Final[tuple[Phase, ...]] = PHASES[2:]
"""The phases of generated tokens; only markers in the text tell one from another."""

COVERS: Final[dict[ScopeName, frozenset[Phase]]] = {
    "all": frozenset(PHASES),
    "prompt": frozenset({"prompt", "prompt_end"}),
    "prompt_end": frozenset({"prompt_end"}),
    "generation": frozenset(GENERATED),
    "thinking": frozenset({"thinking"}),
    "think_end": frozenset({"think_end"}),
    "answer": frozenset({"answer"}),
}
"""The phases that each scope name stands for."""

MAX_FIRST: Final = 4096
MAX_WINDOWS: Final = 3
"""How many different ``{first: N}`` one policy may have."""


class First(ClosedModel):
    """The first generated tokens.

    Attributes:
        first: how many.
    """

    first: Annotated[int, Field(ge=1, le=MAX_FIRST)]


ScopePart = ScopeName | First


@dataclass(frozen=True)
class Case:
    """One situation of a token that scopes tell apart.

    Attributes:
        phase: the token's phase.
        offset: for generated tokens, the smallest ``p − P`` of the case.
    """

    phase: Phase
    offset: int | None = None


def cases(windows: Sequence[int]) -> tuple[Case, ...]:
    """The cases, in the order of a plan: ``prompt``, ``prompt_end``, and ``2 + 3w + k``.

    ``w`` counts the windows ``n`` (ascending) with ``p − P >= n``; ``k`` is the index in
    :data:`GENERATED`.
    """
    generated = [Case(phase, offset) for offset in (0, *windows) for phase in GENERATED]
    return (Case("prompt"), Case("prompt_end"), *generated)


def covers(scope: Iterable[ScopePart], case: Case) -> bool:
    """Whether an edit with this scope acts on the tokens of the case.

    The windows that the case was made with must include those of the scope.
    """
    return any(
        case.offset is not None and case.offset < part.first
        if isinstance(part, First)
        else case.phase in COVERS[part]
        for part in scope
    )


def phases_of(scope: Iterable[ScopePart]) -> frozenset[Phase]:
    """The phases that the scope covers wholly."""
    return frozenset(p for part in scope if not isinstance(part, First) for p in COVERS[part])


def windows_of(scope: Iterable[ScopePart]) -> frozenset[int]:
    """Every ``N`` of a ``{first: N}``."""
    return frozenset(part.first for part in scope if isinstance(part, First))


def needs_markers(scope: Iterable[ScopePart]) -> bool:
    """Whether the scope tells thinking from answering."""
    return 0 < len(phases_of(scope) & frozenset(GENERATED)) < len(GENERATED)


def _refuse(reason: str) -> PydanticCustomError:
    return PydanticCustomError(
        "E_POLICY_SCOPE",
        "{reason}; write one of {names}, {{first: N}}, or a list of them",
        {"reason": reason, "names": ", ".join(COVERS)},
    )


def _part(item: object) -> ScopePart:
    if isinstance(item, First):
        return item
    if isinstance(item, str) and item in COVERS:
        return item
    if isinstance(item, dict) and item.keys() == {"first"}:
        count = item["first"]
        if isinstance(count, int) and not isinstance(count, bool) and 1 <= count <= MAX_FIRST:
            return First(first=count)
        raise _refuse(f"first is {shown(count)}, not a whole number from 1 to {MAX_FIRST}")
    raise _refuse(f"{shown(item)} is not a scope")


def _adds_nothing(part: ScopePart, others: list[ScopePart]) -> bool:
    if isinstance(part, First):
        longer = any(part.first <= other for other in windows_of(others))
        return longer or phases_of(others) >= frozenset(GENERATED)
    return COVERS[part] <= phases_of(others)


def parse_scope(value: object) -> tuple[ScopePart, ...]:
    """A scope as written to its normal form: the widest names, sorted, then ``first``.

    Raises:
        PydanticCustomError: ``E_POLICY_SCOPE``: an unknown name, an empty list, or a part that the
            others already cover.
    """
    items = list(value) if isinstance(value, list | tuple) else [value]
    if not items:
        raise _refuse("the scope is empty")
    parts = [_part(item) for item in items]
    for i, part in enumerate(parts):
        if _adds_nothing(part, parts[:i] + parts[i + 1 :]):
            name = f"first: {part.first}" if isinstance(part, First) else part
            raise _refuse(f"{name} adds nothing to the rest of the list")
    names: list[ScopeName] = []
    left = phases_of(parts)
    for name, phases in COVERS.items():  # the wide ones come first
        if phases <= left:
            names.append(name)
            left -= phases
    return (*sorted(names), *(part for part in parts if isinstance(part, First)))


Scope = Annotated[
    tuple[ScopePart, ...],
    BeforeValidator(
        parse_scope, json_schema_input_type=ScopeName | First | list[ScopeName | First]
    ),
]
"""The pydantic field type of a scope: takes any spelling, holds the normal form."""
