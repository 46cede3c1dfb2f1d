"""What the engine side is told before it starts, carried by the environment into every process.

vLLM starts its engine and worker processes by itself and they load the plug-in from its entry point, so
the environment is the only channel that reaches all of them early enough. The plug-in is inert unless
``TRIMTAB_ENGINE=1``: an environment with Trimtab installed serves plain vLLM untouched.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from directions.errors import TrimtabError

ENABLE = "TRIMTAB_ENGINE"
SLOTS = "TRIMTAB_SLOTS"
LAYERS = "TRIMTAB_LAYERS"
SITES = "TRIMTAB_SITES"
PROJECTIONS = "TRIMTAB_PROJECTIONS"
PROBE_LAYERS = "TRIMTAB_PROBE_LAYERS"

SITE_NAMES = ("add", "heads", "residual", "attention", "mlp", "gates", "probes")
"""What can be hooked: additions to the stream (always are), attention heads, projections at three sites,
gates, and probes whose scores are reported."""

MAX_READINGS = 16
"""Outputs of probes that one server reads."""

DEFAULT_SLOTS = 32
DEFAULT_PROJECTIONS = 4

SPARE_ROWS = 8
"""Rows that workers have beyond the slots that are given out. The API process frees a slot when it has
seen a request's last output; the worker a step later. A new plan that overtakes the old one's end in
between finds its rows here."""


@dataclass(frozen=True)
class EngineSettings:
    """Sizes and sites that are fixed when the engine starts.

    Attributes:
        slots: rows of the tables, the identity included; a plan takes one or two.
        layers: decoder layers to hook; ``None`` hooks all.
        sites: which of :data:`SITE_NAMES` are hooked at those layers.
        projections: vectors that a policy may project on at one site of one layer.
        probe_layers: layers, of those that are hooked, after which probes are read; the number of layers
            is the final norm. ``None``: after each.
    """

    slots: int = DEFAULT_SLOTS
    layers: tuple[int, ...] | None = None
    sites: tuple[str, ...] = SITE_NAMES
    projections: int = DEFAULT_PROJECTIONS
    probe_layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.slots <= 4096:
            raise TrimtabError(
                "E_SLOTS",
                f"{self.slots} slots; a server needs at least 2 (slot 0 is the identity)",
                field="--slots",
                expected="2 to 4096",
            )
        unknown = [site for site in self.sites if site not in SITE_NAMES]
        if unknown:
            raise TrimtabError(
                "E_SITES",
                f"{unknown[0]!r} is not a site",
                field="--steering-sites",
                expected=", ".join(SITE_NAMES),
            )
        if not 1 <= self.projections <= 64:
            raise TrimtabError(
                "E_PROJECTIONS",
                f"{self.projections} projections at one site of one layer",
                field="--projections",
                expected="1 to 64",
            )

    @property
    def rows(self) -> int:
        """Rows of a worker's tables."""
        return self.slots + SPARE_ROWS

    def to_environment(self) -> dict[str, str]:
        """The variables that make child processes run with these settings."""
        environment = {
            ENABLE: "1",
            SLOTS: str(self.slots),
            SITES: ",".join(self.sites),
            PROJECTIONS: str(self.projections),
        }
        if self.layers is not None:
            environment[LAYERS] = ",".join(map(str, self.layers))
        if self.probe_layers is not None:
            environment[PROBE_LAYERS] = ",".join(map(str, self.probe_layers))
        return environment

    @classmethod
    def from_environment(cls) -> EngineSettings:
        """Read back what :meth:`to_environment` wrote.

        Raises:
            TrimtabError: ``E_SLOTS``, ``E_PROJECTIONS``, ``E_SITES`` or ``E_LAYERS`` for values that
                cannot be read.
        """
        slots = _whole(SLOTS, "E_SLOTS", DEFAULT_SLOTS)
        projections = _whole(PROJECTIONS, "E_PROJECTIONS", DEFAULT_PROJECTIONS)
        sites_text = os.environ.get(SITES)
        sites = SITE_NAMES if sites_text is None else tuple(filter(None, sites_text.split(",")))
        return cls(
            slots=slots,
            layers=_layers(LAYERS) or None,
            sites=sites,
            projections=projections,
            probe_layers=_layers(PROBE_LAYERS),
        )


def _layers(variable: str) -> tuple[int, ...] | None:
    text = os.environ.get(variable)
    if text is None:
        return None
    try:
        return tuple(sorted({int(n) for n in text.split(",") if n.strip()}))
    except ValueError:
        raise TrimtabError(
            "E_LAYERS", f"{text!r} is not a list of layers", field=variable
        ) from None


def _whole(variable: str, code: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    try:
        return int(text)
    except ValueError:
        raise TrimtabError(code, f"{text!r} is not a whole number", field=variable) from None


def enabled() -> bool:
    """Whether this process is meant to steer."""
    return os.environ.get(ENABLE) == "1"
