"""``clamp``: the component along a direction is kept within bounds, or set.

With ``h`` the residual stream after a layer at one token, ``r̂ = v_l / ‖v_l‖`` and ``s`` the
request's strength::

    p  = h·r̂
    p' = min(max(p, atLeast), atMost)          to: x is atLeast = atMost = x
    h ← h + s · (p' − p) r̂

``relative`` multiplies the bounds by ``n_l``, the mean ``‖h_l‖`` from the direction's card. With
``s = 1`` the component is within the bounds afterwards; a token that was within them is not
touched, unlike with ``add``. (Clamping a feature to a value: Templeton et al. 2024, *Scaling
Monosemanticity*, there of dictionary features.)
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from steering.edits.direction import DirectionEdit
from steering.edits.kind import Contribution, FiniteFloat, Target, one_of
from steering.rows import Projection


class Clamp(DirectionEdit):
    """The keys of ``clamp``: those of :class:`DirectionEdit`, and the bounds.

    Attributes:
        to: the value that the component gets; given alone.
        at_least: the lowest value it may have.
        at_most: the highest; may stand beside ``at_least``.
        unit: what the bounds are multiples of: 1, or the layer's mean activation norm.
    """

    to: FiniteFloat | None = None
    at_least: FiniteFloat | None = Field(default=None, alias="atLeast")
    at_most: FiniteFloat | None = Field(default=None, alias="atMost")
    unit: Literal["absolute", "relative"] = "absolute"

    @classmethod
    def key_fault(cls, keys: Collection[str]) -> tuple[str, str] | None:
        if "to" not in keys and "atLeast" in keys and "atMost" in keys:
            return None
        return one_of(("to", "atLeast", "atMost"), keys)

    @model_validator(mode="after")
    def _bounds_ascend(self) -> Self:
        low, high = self.bounds
        if low is not None and high is not None and low > high:
            raise PydanticCustomError(
                "E_POLICY_BOUNDS",
                "atLeast is {low}, above atMost, which is {high}",
                {"low": f"{low:g}", "high": f"{high:g}"},
            )
        return self

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        """Lowest and highest value, ``None`` where there is no bound."""
        return (self.at_least, self.at_most) if self.to is None else (self.to, self.to)

    def compile(self, target: Target) -> Contribution | None:
        """A ``clip`` with gain 1 between the bounds.

        Faults: those of :meth:`DirectionEdit.resolve`, ``E_DIRECTION_ZERO``, ``E_NORMS_MISSING``,
        ``E_STRENGTH_CEILING``.
        """
        low, high = self.bounds
        if self.unit == "relative":
            # Where a token without the direction is moved to. A bound on the far side of zero only
            # ever makes a component smaller, and needs no ceiling.
            target.check_ceiling(max(low or 0.0, 0.0), "to" if self.to is not None else "atLeast")
            target.check_ceiling(min(high or 0.0, 0.0), "to" if self.to is not None else "atMost")
        resolved = self.resolve(target)
        if resolved is None or resolved.norms(target) is None:
            return None
        scale: dict[int, float] | None = dict.fromkeys(resolved.layers, 1.0)
        if self.unit == "relative":
            scale = resolved.activation_norms(target)
        if scale is None:
            return None
        layers = tuple(
            (layer, (1.0, None if low is None else low * n, None if high is None else high * n))
            for layer, n in scale.items()
        )
        return Contribution(
            projections=(Projection("residual", "clip", (resolved.source,), layers),)
        )
