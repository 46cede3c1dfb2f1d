"""``scale_heads``: the outputs of chosen attention heads are scaled.

With ``a`` the attention output of one token at a layer, before the output projection, ``a_i`` the
slice of query head ``i``, ``f_e`` the factor that the edit ``e`` gives the head and ``s`` the
request's strength::

    a_i ← a_i · (1 + s · Σ_e (f_e − 1))           over the edits in force that name the head

A factor of 0 takes the head out, 1 leaves it, 2 doubles it. With ``renormalise: row`` on any edit in
force that touches the layer, the result is brought back to the length that all heads together had:
``a ← a · ‖a before‖ / ‖a after‖``, and is left alone where ``‖a after‖`` is 0. (Heads as the unit of
intervention: Li et al. 2023, arXiv 2306.03341; heads that suppress refusal taken out: Yin et al. 2025,
arXiv 2510.06036.)
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Final, Literal, Self

from pydantic import BeforeValidator, model_validator
from pydantic_core import PydanticCustomError

from directions.errors import TrimtabError
from steering.edits.kind import Contribution, EditSpec, NamedArtefact, Target, check_reference
from steering.edits.layers import MAX_LAYER
from steering.policy_errors import shown

MAX_HEAD: Final = 1023
MAX_HEADS: Final = 4096
MAX_FACTOR: Final = 100.0

Head = tuple[int, int]
"""Layer and query head, both from 0."""


def _is_head(value: object) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(isinstance(part, int) and not isinstance(part, bool) for part in value)
        and 0 <= value[0] <= MAX_LAYER
        and 0 <= value[1] <= MAX_HEAD
    )


def _heads(value: object) -> object:
    if isinstance(value, str):
        return check_reference(value)
    items = value if isinstance(value, list | tuple) else None
    if not items or len(items) > MAX_HEADS:
        raise _refused("{found} is neither a head set nor a list of up to {most} heads", value)
    for item in items:
        if not _is_head(item):
            raise _refused("{found} is not [layer, head]", item)
    heads = [tuple(item) for item in items]
    heads.sort()
    for one, next_one in pairwise(heads):
        if one == next_one:
            raise _refused("{found} is named twice", list(one))
    return tuple(heads)


def _refused(message: str, found: object) -> PydanticCustomError:
    return PydanticCustomError(
        "E_POLICY_HEADS",
        message + '; write NAME@VERSION of a head set, or a list as in "[[12, 3], [14, 0]]"',
        {"found": shown(found), "most": MAX_HEADS},
    )


def _factor(value: object) -> object:
    if isinstance(value, list | tuple):
        return tuple(_number(item) for item in value)
    return _number(value)


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        code = "E_POLICY_TYPE"
    elif not abs(value) <= MAX_FACTOR:  # also for NaN
        code = "E_POLICY_NUMBER"
    else:
        return float(value) + 0.0
    raise PydanticCustomError(
        code,
        "{found} is not a number from -{most} to {most}",
        {"found": shown(value), "most": f"{MAX_FACTOR:g}"},
    )


class ScaleHeads(EditSpec):
    """The keys of ``scale_heads``.

    Attributes:
        heads: a head set, one fixed artefact, or the heads themselves, ascending.
        factor: one for all heads or, where the heads are listed, one for each, in their order.
        renormalise: ``row``: the attention output keeps its length over all heads of the token.
    """

    heads: Annotated[
        str | tuple[Head, ...],
        BeforeValidator(_heads, json_schema_input_type=str | list[list[int]]),
    ]
    factor: Annotated[
        float | tuple[float, ...],
        BeforeValidator(_factor, json_schema_input_type=float | list[float]),
    ]
    renormalise: Literal["none", "row"] = "none"

    @model_validator(mode="before")
    @classmethod
    def _in_order(cls, data: object) -> object:
        # Heads are sorted in the normal form; factors listed beside them have to go along.
        if not isinstance(data, Mapping):
            return data
        heads, factors = data.get("heads"), data.get("factor")
        if (
            not isinstance(heads, list | tuple)
            or not isinstance(factors, list | tuple)
            or len(heads) != len(factors)
            or not all(_is_head(head) for head in heads)
        ):
            return data  # whatever is wrong is found below
        order = sorted(range(len(heads)), key=lambda i: tuple(heads[i]))
        return {
            **data,
            "heads": [heads[i] for i in order],
            "factor": [factors[i] for i in order],
        }

    @model_validator(mode="after")
    def _one_factor_a_head(self) -> Self:
        if isinstance(self.factor, tuple):
            if isinstance(self.heads, str):
                raise PydanticCustomError(
                    "E_POLICY_HEADS", "a list of factors needs a list of heads, not a head set"
                )
            if len(self.factor) != len(self.heads):
                raise PydanticCustomError(
                    "E_POLICY_HEADS",
                    "{factors} factors for {heads} heads; give one, or one for each head",
                    {"factors": len(self.factor), "heads": len(self.heads)},
                )
        return self

    @property
    def artefacts(self) -> tuple[NamedArtefact, ...]:
        named = isinstance(self.heads, str)
        return (NamedArtefact(("heads",), "head-set", str(self.heads)),) if named else ()

    def compile(self, target: Target) -> Contribution | None:
        """``factor − 1`` for each head.

        Faults: ``E_ARTEFACT_…`` (the store's), ``E_HEADS_MODEL``, ``E_HEAD_RANGE``.
        """
        heads = self._resolved(target)
        if heads is None:
            return None
        model = target.model
        beyond = [
            head for head in heads if head[0] >= model.num_layers or head[1] >= model.num_heads
        ]
        if beyond:
            target.refuse(
                "E_HEAD_RANGE",
                "heads",
                f"{', '.join(str(list(head)) for head in beyond[:8])} "
                f"{'is' if len(beyond) == 1 else 'are'} beyond the model, which has "
                f"{model.num_layers} layers of {model.num_heads} query heads",
                expected=f"layers 0-{model.num_layers - 1}, heads 0-{model.num_heads - 1}",
            )
            return None
        factors = self.factor if isinstance(self.factor, tuple) else (self.factor,) * len(heads)
        return Contribution(
            heads={head: factor - 1.0 for head, factor in zip(heads, factors, strict=True)},
            renormalise=frozenset(layer for layer, _ in heads if self.renormalise == "row"),
        )

    def _resolved(self, target: Target) -> tuple[Head, ...] | None:
        if not isinstance(self.heads, str):
            return self.heads
        try:
            stored = target.store.load_head_set(self.heads)
        except TrimtabError as error:
            target.refuse_missing(error, "heads")
            return None
        return stored.heads if target.fits(stored.card.model, "E_HEADS_MODEL", "heads") else None
