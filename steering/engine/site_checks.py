"""Whether the ranks of an engine can carry out a plan between them: the sites that it acts on, and gates.

A gate moves a token into another slot on the rank that reads the probe. Tensor-parallel ranks hold the same
stream and decide alike. Pipeline stages do not: a stage that comes later, or that ran earlier in the same
pass, would not know. So with several stages everything that belongs to a gate must be on the last one, which
is also the one whose reports vLLM passes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from directions.errors import TrimtabError
from steering.engine.payload import PlanPayload
from steering.readings import Reading

Status = Mapping[str, Any]
"""A rank's facts, as ``steering.engine.worker.SteeringWorker.status`` gives them."""


def hooked_layers(ranks: Sequence[Status], site: str) -> list[int]:
    """The layers at which a site is hooked on some of these ranks, ascending."""
    return sorted({layer for rank in ranks for layer in rank["hooked"].get(site, ())})


def unavailable_sites(ranks: Sequence[Status]) -> dict[str, str]:
    """The sites that the model of these ranks does not have, each with the reason."""
    return {site: reason for rank in ranks for site, reason in rank["unavailable"].items()}


def check_sites(payload: PlanPayload, ranks: Sequence[Status]) -> None:
    """Refuse a plan that acts where nothing would happen.

    Args:
        payload: what is to be activated.
        ranks: of one engine, in vLLM's order: the last belongs to the last pipeline stage.

    Raises:
        TrimtabError: ``E_SITE_UNHOOKED`` for a site that the model or this server does not have,
            ``E_GATE_PIPELINE`` for gates that reach over pipeline stages.
    """
    unavailable = unavailable_sites(ranks)
    for site, layers in payload.sites.items():
        missing = sorted(layers - set(hooked_layers(ranks, site)))
        if not missing:
            continue
        reason = unavailable.get(site)
        if site == "gates" and missing == [ranks[0]["num_layers"]]:
            reason = reason or unavailable.get("final norm")
        raise TrimtabError(
            "E_SITE_UNHOOKED",
            f"a policy acts on {site} at layers {missing}, which "
            + (
                f"this model does not have: {reason}"
                if reason
                else "this server was started without"
            ),
            field="model" if reason else _left_out_by(site, ranks),
        )
    if payload.gates:
        _check_stage(payload, ranks[-1])


def check_readings(readings: Sequence[Reading], ranks: Sequence[Status]) -> None:
    """Refuse probes that would never be read, or whose scores nobody would hear.

    Args:
        readings: what is to be activated.
        ranks: of one engine, in vLLM's order.

    Raises:
        TrimtabError: ``E_SITE_UNHOOKED`` for a layer that the model or this server does not have,
            ``E_PROBE_PIPELINE`` for one that runs on a pipeline stage whose output vLLM does not return.
    """
    last = set(ranks[-1]["hooked"].get("probes", ()))
    everywhere = set(hooked_layers(ranks, "probes"))
    for reading in readings:
        if reading.layer in last:
            continue
        where = (
            "the final norm"
            if reading.layer == ranks[0]["num_layers"]
            else f"the stream after layer {reading.layer}"
        )
        if reading.layer in everywhere:
            raise TrimtabError(
                "E_PROBE_PIPELINE",
                f"probe {reading.key} reads {where}, which runs on a pipeline stage other than the last; "
                "only that stage's scores come back",
                field="--pipeline-parallel-size",
                expected=f"probes at layer {min(last, default=ranks[0]['num_layers'])} and above",
            )
        reason = unavailable_sites(ranks).get("final norm") if where == "the final norm" else None
        raise TrimtabError(
            "E_SITE_UNHOOKED",
            f"probe {reading.key} reads {where}, which "
            + (
                f"this model does not have: {reason}"
                if reason
                else "this server was started without"
            ),
            field="model" if reason else _left_out_by("probes", ranks),
        )


def _left_out_by(site: str, ranks: Sequence[Status]) -> str:
    return "--steering-layers" if hooked_layers(ranks, site) else "--steering-sites"


def _check_stage(payload: PlanPayload, last: Status) -> None:
    for site, layers in payload.sites.items():
        elsewhere = sorted(layers - set(last["hooked"].get(site, ())))
        if elsewhere:
            raise TrimtabError(
                "E_GATE_PIPELINE",
                f"a policy with gates acts on {site} at layers {elsewhere}, which run on a pipeline stage "
                "other than the last and could not know what the gates decided",
                field="--pipeline-parallel-size",
                expected=f"probes and edits at layer {min(last['hooked']['add'])} and above",
            )
