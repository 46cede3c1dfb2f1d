"""The keys that edits along a stored direction share, and what they come to on a model.

A direction has one vector per layer, or for some of them. An edit uses each layer's own vector, or,
with ``vectorLayer``, the vector of that one layer everywhere: then its length, and the mean
activation norm that ``relative`` refers to, are that layer's too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from directions.errors import TrimtabError
from directions.store import Direction
from steering.edits.kind import EditSpec, NamedArtefact, Reference, Target
from steering.edits.layers import MAX_LAYER, Layers, named_layers
from steering.policy_errors import PathParts
from steering.rows import Source


class DirectionEdit(EditSpec):
    """The keys of an edit along one direction.

    Attributes:
        direction: ``name@version`` or ``sha256:<hex>``; always one fixed artefact.
        layers: ``"all"`` or a sorted tuple, from 0. All are those that the direction has or, with
            ``vector_layer``, those that the model has.
        vector_layer: the layer whose stored vector is used at every layer; ``None``: each its own.
    """

    direction: Reference
    layers: Layers = "all"
    vector_layer: Annotated[int, Field(ge=0, le=MAX_LAYER)] | None = Field(
        default=None, alias="vectorLayer"
    )

    @property
    def artefacts(self) -> tuple[NamedArtefact, ...]:
        return (NamedArtefact(("direction",), "direction", self.direction),)

    def resolve(self, target: Target) -> Resolved | None:
        """The direction and the layers on the target's model.

        Faults: ``E_ARTEFACT_…`` (the store's), ``E_DIRECTION_WIDTH``, ``E_DIRECTION_MODEL``,
        ``E_LAYER_RANGE``, ``E_LAYER_ABSENT``.
        """
        fits = layers_fit(self.layers, target)
        if self.vector_layer is not None:
            fits &= layers_fit((self.vector_layer,), target, "vectorLayer")
        direction = load_direction(target, self.direction, "direction")
        if direction is None or not fits:
            return None
        if self.vector_layer is None:
            layers = present_layers(self.layers, [direction], target)
        elif not direction.present[self.vector_layer]:
            has = [int(layer) for layer in np.flatnonzero(direction.present)]
            target.refuse(
                "E_LAYER_ABSENT",
                "vectorLayer",
                f"{self.direction} has no vector for layer {self.vector_layer}",
                expected=f"among {named_layers(has, bare=True)}" if has else None,
            )
            layers = ()
        else:
            every = tuple(range(target.model.num_layers))
            layers = every if self.layers == "all" else self.layers
        return Resolved(direction, layers, self.vector_layer) if layers else None


@dataclass(frozen=True)
class Resolved:
    """An edit's direction on one model.

    Attributes:
        direction: the artefact.
        layers: where the edit acts, ascending.
        vector_layer: as in the edit.
    """

    direction: Direction
    layers: tuple[int, ...]
    vector_layer: int | None

    @property
    def source(self) -> Source:
        """The stored vectors, as a plan names them."""
        return self.direction.sha256, self.vector_layer

    def norms(self, target: Target) -> dict[int, float] | None:
        """The length of the vector used at each layer; ``E_DIRECTION_ZERO`` where one is 0."""
        return vector_norms(
            self.direction, self.layers, target, "direction", vector_layer=self.vector_layer
        )

    def activation_norms(self, target: Target) -> dict[int, float] | None:
        """What ``relative`` multiplies at each layer; ``E_NORMS_MISSING`` where it is unknown."""
        means = self.direction.card.activation_norms
        used = {layer: self._used(layer) for layer in self.layers}
        usable = {
            layer: mean
            for layer, of in used.items()
            if (mean := means[of] if of < len(means) else None) is not None
            and math.isfinite(mean)
            and mean > 0.0
        }
        missing = sorted({used[layer] for layer in self.layers if layer not in usable})
        if missing:
            target.refuse(
                "E_NORMS_MISSING",
                "unit",
                f"the card of {self.direction.reference} has no mean activation norm for "
                f"{named_layers(missing)}; extract the direction again or use another unit",
            )
            return None
        return usable

    def _used(self, layer: int) -> int:
        return layer if self.vector_layer is None else self.vector_layer


def load_direction(target: Target, reference: str, at: str | PathParts) -> Direction | None:
    """The direction, if it is there and made for a model like the target; else a fault is noted."""
    try:
        direction = target.store.load(reference)
    except TrimtabError as error:
        target.refuse_missing(error, at)
        return None
    width = direction.vectors.shape[1]
    if width != target.model.hidden_size:
        target.refuse(
            "E_DIRECTION_WIDTH",
            at,
            f"its vectors have {width} numbers, the model's residual stream has "
            f"{target.model.hidden_size}",
            expected=str(target.model.hidden_size),
        )
        return None
    return direction if target.fits(direction.card.model, "E_DIRECTION_MODEL", at) else None


def layers_fit(layers: Layers, target: Target, key: str = "layers") -> bool:
    """Whether the model has the layers; if not, ``E_LAYER_RANGE`` is noted."""
    last = target.model.num_layers - 1
    beyond = [layer for layer in layers if layer > last] if layers != "all" else []
    if beyond:
        target.refuse(
            "E_LAYER_RANGE",
            key,
            f"{named_layers(beyond)} beyond the model, which has {last + 1} layers",
            expected=f"0-{last}",
        )
    return not beyond


def present_layers(layers: Layers, directions: list[Direction], target: Target) -> tuple[int, ...]:
    """The layers, all of which every direction has; else ``E_LAYER_ABSENT`` is noted, and none."""
    masks = [direction.present for direction in directions]
    has = [int(layer) for layer in np.flatnonzero(np.logical_and.reduce(masks))]
    wanted = tuple(has) if layers == "all" else layers
    absent = [layer for layer in wanted if layer not in has]
    if absent or not wanted:
        names = " and ".join(direction.reference for direction in directions)
        target.refuse(
            "E_LAYER_ABSENT",
            "layers",
            f"{names} has no vector for {named_layers(absent) if absent else 'any layer'}"
            if len(directions) == 1
            else f"{names} do not both have a vector for "
            f"{named_layers(absent) if absent else 'any layer'}",
            expected=f"among {named_layers(has, bare=True)}" if has else None,
        )
        return ()
    return wanted


def vector_norms(
    direction: Direction,
    layers: tuple[int, ...],
    target: Target,
    at: str | PathParts,
    *,
    vector_layer: int | None = None,
) -> dict[int, float] | None:
    """The length of the vector used at each layer; where one is 0, ``E_DIRECTION_ZERO``."""
    # In float64: squares of float32 values neither overflow nor vanish there.
    lengths = np.linalg.norm(direction.vectors.astype(np.float64), axis=1)
    used = {layer: layer if vector_layer is None else vector_layer for layer in layers}
    zero = sorted({of for of in used.values() if not lengths[of] > 0.0})
    if zero:
        target.refuse(
            "E_DIRECTION_ZERO",
            at,
            f"the vector of {direction.reference} is zero at {named_layers(zero)}, so it has no "
            "unit vector there; leave the layers out",
        )
        return None
    return {layer: float(lengths[of]) for layer, of in used.items()}
