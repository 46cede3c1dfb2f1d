"""Which tokens an edit touches.

A token's phase follows from its absolute position ``p`` in the request: ``prompt`` if ``p`` is less
than the number of prompt tokens, else ``generation``. The last prompt token, whose output predicts
the first token of the answer, is still ``prompt``. A scope names one or more sets of phases, and an
edit acts on a token if the token's phase is in its scope.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Final, Literal, cast

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from steering.policy_errors import shown

Phase = Literal["prompt", "generation"]
ScopeName = Literal["all", "prompt", "generation"]

PHASES: Final[tuple[Phase, ...]] = ("prompt", "generation")

COVERS: Final[dict[ScopeName, frozenset[Phase]]] = {
    "all": frozenset(PHASES),
    "prompt": frozenset({"prompt"}),
    "generation": frozenset({"generation"}),
}
"""The phases that each scope name stands for."""


def phases_of(scope: Iterable[ScopeName]) -> frozenset[Phase]:
    """The phases in which an edit with this scope acts."""
    return frozenset(phase for name in scope for phase in COVERS[name])


def _refuse(reason: str) -> PydanticCustomError:
    return PydanticCustomError(
        "E_POLICY_SCOPE",
        "{reason}; write one of {names}, or a list of them",
        {"reason": reason, "names": ", ".join(COVERS)},
    )


def parse_scope(value: object) -> tuple[ScopeName, ...]:
    """A scope as written to its normal form: sorted, and ``("all",)`` for what covers everything.

    Raises:
        PydanticCustomError: ``E_POLICY_SCOPE``: an unknown name, an empty list, or a name that the
            others already cover.
    """
    items = list(value) if isinstance(value, list | tuple) else [value]
    if not items:
        raise _refuse("the scope is empty")
    for item in items:
        if not isinstance(item, str) or item not in COVERS:
            raise _refuse(f"{shown(item)} is not a scope")
    names = cast("list[ScopeName]", items)
    for i, name in enumerate(names):
        if COVERS[name] <= phases_of(names[:i] + names[i + 1 :]):
            raise _refuse(f"{name} adds nothing to the rest of the list")
    if phases_of(names) == COVERS["all"]:
        return ("all",)
    return tuple(sorted(names))


Scope = Annotated[
    tuple[ScopeName, ...],
    BeforeValidator(parse_scope, json_schema_input_type=ScopeName | list[ScopeName]),
]
"""The pydantic field type of a scope: takes any spelling, holds the normal form."""
