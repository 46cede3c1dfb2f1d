"""Every metric that Trimtab exposes, with its labels: the list that the board and rules are held against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

MODEL = ("model_name",)
ENGINE = (*MODEL, "engine")
PROBE = (*ENGINE, "probe", "policy", "variant")


@dataclass(frozen=True)
class Declared:
    """A metric as ``/metrics`` names it, without the suffixes of a histogram's series."""

    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]


DECLARED = {
    "trimtab_requests_total": Declared("counter", (*MODEL, "policy", "mode", "outcome", "reason")),
    "trimtab_slots": Declared("gauge", (*MODEL, "state")),
    "trimtab_build_info": Declared("gauge", ("version", "vllm_version")),
    "trimtab_probe_score": Declared("histogram", (*PROBE, "phase")),
    "trimtab_refusal_cliff": Declared("histogram", PROBE),
    "trimtab_probe_token_score": Declared("histogram", PROBE),
    "trimtab_probe_tokens_total": Declared("counter", PROBE),
    "trimtab_probe_tokens_missing_total": Declared("counter", PROBE),
    "trimtab_probe_decisions_total": Declared("counter", (*PROBE, "phase", "decision")),
    "trimtab_gate_decisions_total": Declared(
        "counter", (*ENGINE, "policy", "variant", "gate", "decision")
    ),
    "trimtab_edits_applied_tokens_total": Declared("counter", (*ENGINE, "edit_kind")),
    "trimtab_engine_step_overhead_seconds": Declared("histogram", ENGINE),
    "trimtab_policy_info": Declared("gauge", (*MODEL, "policy", "version", "hash", "mode")),
    "trimtab_policy_generation": Declared("gauge", MODEL),
}


def family(series: str) -> str | None:
    """The declared metric that a series belongs to; None if there is none."""
    for name in (series, *(series.removesuffix(end) for end in ("_bucket", "_count", "_sum"))):
        declared = DECLARED.get(name)
        if declared is not None and (declared.kind == "histogram") == (name != series):
            return name
    return None


def exposed_name(metric: Any) -> str:
    """The name under which ``/metrics`` shows a metric of the client library."""
    return f"{metric._name}_total" if metric._type == "counter" else str(metric._name)
