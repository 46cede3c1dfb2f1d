"""``GET /v1/steering/status``: what this server steers with, and how it is known to work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from server.catalogue import Catalogue
from server.versions import installed_versions
from steering.engine.proof import Proof
from steering.engine.site_checks import hooked_layers, unavailable_sites


class PolicyStatus(BaseModel):
    """One policy as it is served."""

    name: str
    version: int
    mode: Literal["off", "shadow", "enforce"]
    onFailure: Literal["closed", "open"]  # noqa: N815 (a key of the policy language)
    strengthRange: tuple[float, float]  # noqa: N815
    description: str
    identity: str = Field(description="sha256 of the policy's canonical form")
    plan: str = Field(description="identity of what it does to this model")


class ProofStatus(BaseModel):
    """What the start-up proof measured, in nats of log-probability."""

    engines: int = Field(description="data parallel engines, each of which was proved")
    layers: list[int] = Field(description="layers whose edits were each shown to act")
    floor: float = Field(description="largest difference between two plain runs")
    least_effect: float = Field(description="smallest effect of the known edit over the layers")


class ThinkingStatus(BaseModel):
    """The texts between which the model thinks."""

    start: str
    end: str


class SiteStatus(BaseModel):
    """What of the model can be edited and read."""

    hooked: dict[str, list[int]] = Field(
        description="layers at which each site is hooked; gates read the final norm as the layer "
        "after the last"
    )
    unavailable: dict[str, str] = Field(
        description="sites that were asked for and that this model does not have, with the reason"
    )
    thinking: ThinkingStatus | None = Field(description="null where they are not known")


class SteeringStatus(BaseModel):
    """The answer."""

    model: str
    default: str
    policies: list[PolicyStatus]
    slots: dict[str, int] = Field(description="this process's share, by state")
    proof: ProofStatus
    sites: SiteStatus
    versions: dict[str, str | None]


router = APIRouter()


@router.get("/v1/steering/status")
async def steering_status(request: Request) -> SteeringStatus:
    """The policies, the slots, the proof and the versions of this process."""
    state = request.app.state
    return SteeringStatus(
        model=state.trimtab.model_name,
        default=state.trimtab.catalogue.default,
        policies=policy_statuses(state.trimtab.catalogue),
        slots=state.trimtab.ledger.snapshot(),
        proof=proof_status(state.trimtab_proof),
        sites=state.trimtab_sites,
        versions=installed_versions(),
    )


def policy_statuses(catalogue: Catalogue) -> list[PolicyStatus]:
    """The policies of a catalogue, in its order."""
    return [
        PolicyStatus(
            name=entry.policy.name,
            version=entry.policy.version,
            mode=entry.policy.mode,
            onFailure=entry.policy.on_failure,
            strengthRange=entry.policy.strength_range,
            description=entry.policy.description,
            identity=entry.policy.identity,
            plan=entry.plan.id,
        )
        for entry in catalogue.entries.values()
    ]


def site_status(ranks: Sequence[Mapping[str, Any]], thinking: tuple[str, str] | None) -> SiteStatus:
    """What all ranks together hook.

    Args:
        ranks: as :func:`steering.engine.control.rank_status` gives them.
        thinking: the markers.
    """
    sites = dict.fromkeys(site for rank in ranks for site in rank["hooked"])
    return SiteStatus(
        hooked={site: hooked_layers(ranks, site) for site in sites},
        unavailable=unavailable_sites(ranks),
        thinking=None if thinking is None else ThinkingStatus(start=thinking[0], end=thinking[1]),
    )


def proof_status(proof: Proof) -> ProofStatus:
    """The part of a proof that is worth telling."""
    return ProofStatus(
        engines=proof.engines,
        layers=list(proof.layers),
        floor=proof.floor,
        least_effect=proof.least_effect,
    )
