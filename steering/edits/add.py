"""``add``: a multiple of a direction is added to the residual stream.

With ``h_l[t]`` the residual stream after decoder layer ``l`` at token ``t``, ``v_l`` the
direction's vector for that layer, ``a`` the edit's strength and ``s`` the request's::

    absolute   h_l[t] += s · a · v_l
    unit       h_l[t] += s · a · v_l / ‖v_l‖
    relative   h_l[t] += s · a · n_l · v_l / ‖v_l‖      n_l = mean ‖h_l‖, from the direction's card

for every layer of the edit and every token in its scope (activation addition: Turner et al., arXiv
2308.10248; contrastive directions: Rimsky et al., arXiv 2312.06681). ``relative`` is the one unit
in which a number means about the same on different layers and models: 0.1 is a tenth of what is
there.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Final, Literal

import numpy as np
from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from directions.errors import TrimtabError
from directions.store import Direction
from steering.edits.kind import Additions, EditSpec, FiniteFloat, Target
from steering.edits.layers import Layers
from steering.policy_errors import shown

Unit = Literal["absolute", "unit", "relative"]

_REFERENCE: Final = re.compile(
    r"(?:[a-z0-9][a-z0-9._-]{0,63}@[1-9][0-9]{0,8}|sha256:[0-9a-f]{64})\Z"
)


def _pinned(reference: str) -> str:
    # "The latest" would let a policy change its meaning under the same name, version and identity.
    if _REFERENCE.match(reference) is None:
        raise PydanticCustomError(
            "E_POLICY_REFERENCE",
            "{found} does not name one version of a direction; write NAME@VERSION, "
            "e.g. calm@1, or sha256:<64 hexadecimal digits>",
            {"found": shown(reference)},
        )
    return reference


class Add(EditSpec):
    """The keys of ``add``.

    Attributes:
        direction: ``name@version`` or ``sha256:<hex>``; always one fixed artefact.
        layers: ``"all"`` (those that the direction has) or a sorted tuple, from 0.
        strength: multiplier, of either sign.
        unit: what the strength is a multiple of; see the module's formulas.
    """

    direction: Annotated[str, AfterValidator(_pinned)]
    layers: Layers = "all"
    strength: FiniteFloat
    unit: Unit = "absolute"

    @property
    def references(self) -> dict[str, str]:
        return {"direction": self.direction}

    def compile(self, target: Target) -> Additions:
        """One coefficient of the stored vector per layer.

        Faults: ``E_ARTEFACT_…`` (the store's), ``E_DIRECTION_WIDTH``, ``E_DIRECTION_MODEL``,
        ``E_LAYER_RANGE``, ``E_LAYER_ABSENT``, ``E_DIRECTION_ZERO``, ``E_NORMS_MISSING``,
        ``E_STRENGTH_CEILING``.
        """
        self._check_ceiling(target)
        beyond = [layer for layer in self._named if layer >= target.model.num_layers]
        if beyond:
            target.refuse(
                "E_LAYER_RANGE",
                "layers",
                f"{_layers(beyond)} beyond the model, which has {target.model.num_layers} layers",
                expected=f"0-{target.model.num_layers - 1}",
            )
        try:
            direction = target.store.load(self.direction)
        except TrimtabError as error:
            target.refuse(error.code, "direction", error.message, error.expected)
            return {}
        if not _fits(direction, target) or beyond:
            return {}
        layers = self._present(direction, target)
        return {
            (direction.sha256, layer): coefficient
            for layer, coefficient in self._coefficients(direction, layers, target).items()
        }

    @property
    def _named(self) -> tuple[int, ...]:
        return () if self.layers == "all" else self.layers

    def _check_ceiling(self, target: Target) -> None:
        reached = abs(self.strength) * target.strength_limit
        if self.unit == "relative" and reached > target.relative_ceiling:
            target.refuse(
                "E_STRENGTH_CEILING",
                "strength",
                f"relative strength {self.strength:g} times the policy's strength range reaches "
                f"{reached:g}, above this server's ceiling of {target.relative_ceiling:g}",
                expected=f"at most {target.relative_ceiling:g} over the whole strengthRange",
            )

    def _present(self, direction: Direction, target: Target) -> tuple[int, ...]:
        has = tuple(int(layer) for layer in np.flatnonzero(direction.present))
        wanted = has if self.layers == "all" else self.layers
        absent = [layer for layer in wanted if layer not in has]
        if absent or not wanted:
            target.refuse(
                "E_LAYER_ABSENT",
                "layers",
                f"{self.direction} has no vector for {_layers(absent)}"
                if absent
                else f"{self.direction} has no vector for any layer",
                expected=f"among {_ranges(has)}" if has else None,
            )
            return ()
        return wanted

    def _coefficients(
        self, direction: Direction, layers: tuple[int, ...], target: Target
    ) -> dict[int, float]:
        if self.unit == "absolute":
            return dict.fromkeys(layers, self.strength)
        # In float64: squares of float32 values neither overflow nor vanish there.
        norms = np.linalg.norm(direction.vectors.astype(np.float64), axis=1)
        zero = [layer for layer in layers if not norms[layer] > 0.0]
        if zero:
            target.refuse(
                "E_DIRECTION_ZERO",
                "direction",
                f"the vector of {self.direction} is zero at {_layers(zero)}, so it has no unit "
                "vector there; leave the layers out or use unit: absolute",
            )
            return {}
        if self.unit == "unit":
            return {layer: self.strength / float(norms[layer]) for layer in layers}
        means = direction.card.activation_norms
        usable = {
            layer: mean
            for layer in layers
            if (mean := means[layer] if layer < len(means) else None) is not None
            and math.isfinite(mean)
            and mean > 0.0
        }
        missing = [layer for layer in layers if layer not in usable]
        if missing:
            target.refuse(
                "E_NORMS_MISSING",
                "unit",
                f"the card of {self.direction} has no mean activation norm for "
                f"{_layers(missing)}; extract the direction again or use another unit",
            )
            return {}
        return {layer: self.strength * mean / float(norms[layer]) for layer, mean in usable.items()}


def _fits(direction: Direction, target: Target) -> bool:
    """Whether the direction was made for a model like the target; if not, the fault is noted."""
    width = direction.vectors.shape[1]
    if width != target.model.hidden_size:
        target.refuse(
            "E_DIRECTION_WIDTH",
            "direction",
            f"its vectors have {width} numbers, the model's residual stream has "
            f"{target.model.hidden_size}",
            expected=str(target.model.hidden_size),
        )
        return False
    differs = [
        f"{difference.field} is {shown(difference.expected)} in the card and "
        f"{shown(difference.found)} in the served model"
        for difference in direction.card.model.incompatibilities(target.model)
        if difference.fatal
    ]
    if differs or direction.vectors.shape[0] != target.model.num_layers:
        target.refuse(
            "E_DIRECTION_MODEL",
            "direction",
            "made for another model: "
            + ("; ".join(differs) or f"it has {direction.vectors.shape[0]} layers"),
        )
        return False
    return True


def _ranges(layers: tuple[int, ...] | list[int]) -> str:
    """``[3, 4, 5, 9]`` as ``3-5,9``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(f"{a}-{b}" if b > a else str(a) for a, b in runs)


def _layers(layers: list[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {_ranges(layers)}"
