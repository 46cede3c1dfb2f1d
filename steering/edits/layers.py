"""Which decoder layers an edit touches, counted from 0.

Layer ``l`` stands for the residual stream *after* decoder layer ``l``. Layers are written as
``"12-20"`` (both ends belong), ``"3,5,12-20"``, ``7``, ``[3, 5]`` or ``"all"``: every layer that
the edit's direction has. Which layers a model has is checked when the policy is compiled for one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Final, Literal

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from steering.policy_errors import shown

MAX_LAYER: Final = 999
"""No layer beyond this can be written; a range such as ``0-999999999`` is refused unexpanded."""

_PART = re.compile(r"(0|[1-9][0-9]{0,2})(?:-(0|[1-9][0-9]{0,2}))?\Z")


def _refuse(reason: str) -> PydanticCustomError:
    # Through the context, so that a brace in what was found is never read as a placeholder.
    return PydanticCustomError(
        "E_POLICY_LAYERS",
        '{reason}; write "12-20", "3,5,12-20", 7, [3, 5] or "all"',
        {"reason": reason},
    )


def _part(text: str) -> range:
    match = _PART.match(text)
    if match is None:
        raise _refuse(f"{shown(text)} is not a layer from 0 to {MAX_LAYER} or a range of them")
    first = int(match[1])
    last = int(match[2]) if match[2] is not None else first
    if last < first:
        raise _refuse(f"the range {text} runs backwards")
    return range(first, last + 1)


def _number(value: object) -> range:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_LAYER:
        raise _refuse(f"{shown(value)} is not a layer from 0 to {MAX_LAYER}")
    return range(value, value + 1)


def parse_layers(value: object) -> Literal["all"] | tuple[int, ...]:
    """Layers as written to their normal form: ``"all"``, or a sorted tuple of distinct layers.

    Raises:
        PydanticCustomError: ``E_POLICY_LAYERS``; also for a layer named twice, which is more
            often a slip than a wish.
    """
    if isinstance(value, str):
        if value == "all":
            return "all"
        parts = [_part(part.strip(" ")) for part in value.split(",")]
    elif isinstance(value, list | tuple):
        parts = [_number(item) for item in value]
    else:
        parts = [_number(value)]
    layers = [layer for part in parts for layer in part]
    if not layers:
        raise _refuse("no layer is named")
    seen: set[int] = set()
    for layer in layers:
        if layer in seen:
            raise _refuse(f"layer {layer} is named twice")
        seen.add(layer)
    return tuple(sorted(layers))


Layers = Annotated[
    Literal["all"] | tuple[int, ...],
    BeforeValidator(parse_layers, json_schema_input_type=str | int | list[int]),
]
"""The pydantic field type of layers: takes any spelling, holds the normal form."""


def named_layers(layers: Sequence[int], *, bare: bool = False) -> str:
    """Ascending layers as a message names them: ``[3, 4, 5, 9]`` as ``layers 3-5,9``.

    Args:
        bare: leave out the word.
    """
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    text = ",".join(f"{a}-{b}" if b > a else str(a) for a, b in runs)
    return text if bare else f"layer{'s' if len(layers) > 1 else ''} {text}"
