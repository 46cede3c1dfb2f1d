"""``ablate``: the component along a direction is taken out.

With ``h`` the activation of one token at a site, ``r̂ = v_l / ‖v_l‖``, ``c`` the edit's strength and
``s`` the request's::

    h ← h − s · c · (h·r̂) r̂

for every layer of the edit, every token in its scope and every site named: ``residual`` is the
stream after the decoder layer, ``attention`` and ``mlp`` are what the layer's attention and MLP
blocks output, before it is added to the stream (directional ablation: Arditi et al. 2024, arXiv
2406.11717). With ``s·c = 1`` nothing is left along the direction, with 2 it is mirrored.
"""

from __future__ import annotations

from typing import Annotated, Final, get_args

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from steering.edits.direction import DirectionEdit
from steering.edits.kind import Contribution, FiniteFloat, Target
from steering.policy_errors import shown
from steering.rows import Projection, Site

SITES: Final[tuple[Site, ...]] = get_args(Site)


def _sites(value: object) -> tuple[object, ...]:
    items = list(value) if isinstance(value, list | tuple) else [value]
    if not items or any(item not in SITES or items.count(item) > 1 for item in items):
        raise PydanticCustomError(
            "E_POLICY_SITES",
            "{found} are not sites; write a list of some of {sites}, each once",
            {"found": shown(value), "sites": ", ".join(SITES)},
        )
    return tuple(site for site in SITES if site in items)


class Ablate(DirectionEdit):
    """The keys of ``ablate``: those of :class:`DirectionEdit`, and two.

    Attributes:
        strength: the share that is taken out, 1 for all of it.
        sites: where, each once, in the order of :data:`SITES`.
    """

    strength: FiniteFloat = 1.0
    sites: Annotated[
        tuple[Site, ...], BeforeValidator(_sites, json_schema_input_type=Site | list[Site])
    ] = ("residual",)

    def compile(self, target: Target) -> Contribution | None:
        """A ``clip`` with gain ``1 − c`` and no bounds at each site.

        Faults: those of :meth:`DirectionEdit.resolve`, ``E_DIRECTION_ZERO``.
        """
        resolved = self.resolve(target)
        if resolved is None or resolved.norms(target) is None:
            return None
        layers = tuple((layer, (1.0 - self.strength, None, None)) for layer in resolved.layers)
        return Contribution(
            projections=tuple(
                Projection(site, "clip", (resolved.source,), layers) for site in self.sites
            )
        )
