"""``rotate``: the activation is turned within the plane of two directions.

At each layer of the edit, ``b1`` is the unit vector of the first direction and ``b2`` that of what
is left of the second without its part along ``b1``. With ``h`` the residual stream at one token,
``ρ`` and ``φ`` the length and angle of ``(h·b1, h·b2)``, ``θ`` the edit's angle and ``s`` the
request's strength::

    by   φ' = φ + s · θ
    to   φ' = φ + s · wrap(θ − φ)                  wrap: to (−π, π]
    h ← h + ρ(cos φ' − cos φ) b1 + ρ(sin φ' − sin φ) b2

(angular steering: Vu & Nguyen 2025, arXiv 2510.26243). What lies outside the plane, and the length
of ``h``, stay as they are. Angles are in degrees; 0 is along the first direction, and a positive
angle turns towards the second.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Annotated

import numpy as np
from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from steering.edits.direction import layers_fit, load_direction, present_layers, vector_norms
from steering.edits.kind import (
    Contribution,
    EditSpec,
    FiniteFloat,
    NamedArtefact,
    Reference,
    Target,
    one_of,
)
from steering.edits.layers import Layers, named_layers
from steering.policy_errors import shown
from steering.rows import MIN_SINE, Projection, orthonormal

Degrees = Annotated[FiniteFloat, Field(ge=-180.0, le=180.0)]


def _two(value: object) -> object:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise PydanticCustomError(
            "E_POLICY_PLANE",
            "{found} is not a list of two directions",
            {"found": shown(value)},
        )
    return tuple(value)


class Rotate(EditSpec):
    """The keys of ``rotate``.

    Attributes:
        plane: the two directions that span it, each one fixed artefact.
        layers: ``"all"`` (those that both directions have) or a sorted tuple, from 0.
        to: the angle that the activation gets within the plane, in degrees.
        by: the angle that it is turned by, in degrees. Exactly one of the two is given.
    """

    plane: Annotated[
        tuple[Reference, Reference], BeforeValidator(_two, json_schema_input_type=list[str])
    ]
    layers: Layers = "all"
    to: Degrees | None = None
    by: Degrees | None = None

    @classmethod
    def key_fault(cls, keys: Collection[str]) -> tuple[str, str] | None:
        return one_of(("to", "by"), keys)

    @property
    def artefacts(self) -> tuple[NamedArtefact, ...]:
        return tuple(
            NamedArtefact(("plane", i), "direction", name) for i, name in enumerate(self.plane)
        )

    def compile(self, target: Target) -> Contribution | None:
        """A turn in the plane of the stored vectors.

        Faults: ``E_ARTEFACT_…`` (the store's), ``E_DIRECTION_WIDTH``, ``E_DIRECTION_MODEL``,
        ``E_LAYER_RANGE``, ``E_LAYER_ABSENT``, ``E_DIRECTION_ZERO``, ``E_PLANE_PARALLEL``.
        """
        fit = layers_fit(self.layers, target)
        loaded = [load_direction(target, name, ("plane", i)) for i, name in enumerate(self.plane)]
        first, second = loaded
        if first is None or second is None or not fit:
            return None
        layers = present_layers(self.layers, [first, second], target)
        lengths = [
            vector_norms(direction, layers, target, ("plane", i))
            for i, direction in enumerate((first, second))
        ]
        if not layers or None in lengths:
            return None
        flat = [
            layer
            for layer in layers
            if orthonormal(
                first.vectors[layer].astype(np.float64), second.vectors[layer].astype(np.float64)
            )[1]
            < MIN_SINE
        ]
        if flat:
            target.refuse(
                "E_PLANE_PARALLEL",
                "plane",
                f"the two directions are parallel at {named_layers(flat)} and span no plane there; "
                "leave the layers out or choose another direction",
                expected=f"an angle whose sine is at least {MIN_SINE:g}",
            )
            return None
        kind, degrees = ("turn_by", self.by) if self.by is not None else ("turn_to", self.to)
        assert degrees is not None
        angle = (math.radians(degrees),)
        return Contribution(
            projections=(
                Projection(
                    "residual",
                    "turn_by" if kind == "turn_by" else "turn_to",
                    ((first.sha256, None), (second.sha256, None)),
                    tuple((layer, angle) for layer in layers),
                ),
            )
        )
