"""The stamp that a request carries through vLLM's scheduler to the worker.

vLLM passes ``SamplingParams.extra_args`` through every process untouched; the stamp is one entry of it.
Admission writes it in the API process, after everything that could be wrong with the request has been
checked. A client cannot: the HTTP layer refuses the key.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

KEY = "trimtab"
_OPTIONAL = {"phased", "readings", "whole_prompt"}


@dataclass(frozen=True)
class Stamp:
    """Which plan a request runs under, and what probes read of it.

    Attributes:
        plan: the plan's id; ``None`` for a request that is only read.
        strength: finite multiplier, not 0.
        phased: whether what happens to a token depends on where it stands in its request, so that its
            keys and values fit only requests whose prompt ends at the same place.
        readings: the numbers of the readings, ascending.
        whole_prompt: whether every prompt token is read, not the last alone.
    """

    plan: str | None
    strength: float
    phased: bool = False
    readings: tuple[int, ...] = ()
    whole_prompt: bool = False

    def to_extra_args(self, extra_args: dict[str, Any] | None) -> dict[str, Any]:
        """``extra_args`` with this stamp in it; the original is left alone."""
        entry = {
            "plan": self.plan,
            "strength": self.strength,
            "phased": self.phased,
            "readings": list(self.readings),
            "whole_prompt": self.whole_prompt,
        }
        return {**(extra_args or {}), KEY: entry}


def read_stamp(extra_args: dict[str, Any] | None) -> Stamp | None:
    """The stamp in a request's ``extra_args``, or ``None``.

    Raises:
        ValueError: an entry of the stamp's name that is not a stamp.
    """
    entry = (extra_args or {}).get(KEY)
    if entry is None:
        return None
    if not isinstance(entry, dict) or set(entry) - _OPTIONAL != {"plan", "strength"}:
        raise ValueError(f"{KEY!r} must hold a plan and a strength, it holds {entry!r}")
    plan, strength, phased = entry["plan"], entry["strength"], entry.get("phased", False)
    readings = entry.get("readings", [])
    if not (isinstance(plan, str) or (plan is None and readings)):
        raise ValueError(f"the plan must be a string, it is {plan!r}")
    if isinstance(strength, bool) or not isinstance(strength, int | float):
        raise ValueError(f"the strength must be a number, it is {strength!r}")
    if not math.isfinite(strength):
        raise ValueError(f"the strength must be finite, it is {strength!r}")
    # The tables hold float32: what overflows there is infinite, what underflows is 0.
    rounded = to_float32(strength)
    if not math.isfinite(rounded):
        raise ValueError(f"the strength must fit 32-bit numbers, it is {strength!r}")
    return Stamp(
        plan,
        float(strength) if rounded else 0.0,
        bool(phased),
        tuple(int(n) for n in readings),
        bool(entry.get("whole_prompt", False)),
    )


def stamped(request: Any) -> dict[str, Any]:
    """What admission stamped on a request that is in the scheduler, unread; empty if nothing."""
    params = request.sampling_params
    entry = None if params is None else (params.extra_args or {}).get(KEY)
    return entry if isinstance(entry, dict) else {}


def to_float32(value: float) -> float:
    """``value`` as the nearest float32, infinite beyond its range."""
    with np.errstate(over="ignore"):
        return float(np.float32(value))
