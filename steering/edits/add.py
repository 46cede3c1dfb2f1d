"""``add``: a multiple of a direction is added to the residual stream.

With ``h_l[t]`` the residual stream after decoder layer ``l`` at token ``t``, ``v_l`` the vector that
the direction has for that layer (with ``vectorLayer: k`` that of layer ``k``, for every ``l``),
``a`` the edit's strength and ``s`` the request's::

    absolute   h_l[t] += s · a · v_l
    unit       h_l[t] += s · a · v_l / ‖v_l‖
    relative   h_l[t] += s · a · n_l · v_l / ‖v_l‖      n_l = mean ‖h_l‖, from the direction's card

for every layer of the edit and every token in its scope (activation addition: Turner et al., arXiv
2308.10248; contrastive directions: Rimsky et al., arXiv 2312.06681). ``relative`` is the one unit
in which a number means about the same on different layers and models: 0.1 is a tenth of what is
there.
"""

from __future__ import annotations

from typing import Literal

from steering.edits.direction import DirectionEdit, Resolved
from steering.edits.kind import Contribution, FiniteFloat, Target

Unit = Literal["absolute", "unit", "relative"]


class Add(DirectionEdit):
    """The keys of ``add``: those of :class:`DirectionEdit`, and two.

    Attributes:
        strength: multiplier, of either sign.
        unit: what the strength is a multiple of; see the module's formulas.
    """

    strength: FiniteFloat
    unit: Unit = "absolute"

    def compile(self, target: Target) -> Contribution | None:
        """One coefficient of the stored vector per layer.

        Faults: those of :meth:`DirectionEdit.resolve`, ``E_DIRECTION_ZERO``, ``E_NORMS_MISSING``,
        ``E_STRENGTH_CEILING``.
        """
        if self.unit == "relative":
            target.check_ceiling(self.strength, "strength")
        resolved = self.resolve(target)
        if resolved is None:
            return None
        coefficients = self._coefficients(resolved, target)
        sha256, of = resolved.source
        return Contribution(
            add={
                (sha256, None if of == layer else of, layer): coefficient
                for layer, coefficient in coefficients.items()
            }
        )

    def _coefficients(self, resolved: Resolved, target: Target) -> dict[int, float]:
        if self.unit == "absolute":
            return dict.fromkeys(resolved.layers, self.strength)
        norms = resolved.norms(target)
        if norms is None:
            return {}
        if self.unit == "unit":
            return {layer: self.strength / norm for layer, norm in norms.items()}
        means = resolved.activation_norms(target) or {}
        return {layer: self.strength * mean / norms[layer] for layer, mean in means.items()}
