"""The catalogue: the policies one server serves, each with its compiled plan.

It is made once by the launcher, which has read and checked everything, and handed to the API
processes as a file. A request can only name what is in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from directions.errors import TrimtabError
from steering.plan import Plan
from steering.policy import Policy, parse_policy
from steering.readings import Reading

OFF = "off"
"""The reserved policy name that means: no steering."""


@dataclass(frozen=True)
class Entry:
    """One policy as it is served.

    Attributes:
        policy: the policy.
        plan: what its edits do to the served model, whatever its mode.
        probes: what the probes that it names read of the served model.
    """

    policy: Policy
    plan: Plan
    probes: tuple[Reading, ...] = ()

    @property
    def effective_plan(self) -> Plan | None:
        """The plan, where the policy's mode is to apply it and there is anything to apply."""
        return self.plan if self.policy.mode == "enforce" and not self.plan.is_identity else None


@dataclass(frozen=True)
class Catalogue:
    """Every policy served, by name, and the default.

    Attributes:
        entries: by policy name; in this version a name has one version.
        default: the policy of a request that selects none; ``off`` where the server has none.
        probes: what is read of all traffic, steered or not.
    """

    entries: dict[str, Entry] = field(default_factory=dict)
    default: str = OFF
    probes: tuple[Reading, ...] = ()

    def __post_init__(self) -> None:
        if self.default != OFF and self.default not in self.entries:
            raise TrimtabError(
                "E_POLICY_UNKNOWN",
                f"the default policy {self.default!r} is not among the policies that are served",
                field="--default-policy",
                expected=", ".join([*self.entries, OFF]),
            )

    @property
    def plans(self) -> list[Plan]:
        """The distinct plans that requests can ask for."""
        plans = {e.plan.id: e.plan for e in self.entries.values() if e.effective_plan is not None}
        return list(plans.values())

    @property
    def readings(self) -> tuple[Reading, ...]:
        """Everything that may be read, each once."""
        named = [reading for entry in self.entries.values() for reading in self.readings_of(entry)]
        return _distinct([*self.probes, *named])

    def readings_of(self, entry: Entry | None) -> tuple[Reading, ...]:
        """What is read of a request under an entry; ``None`` is ``off``."""
        # A policy of mode off neither applies nor reports anything of its own.
        if entry is None or entry.policy.mode == "off":
            return self.probes
        return _distinct([*self.probes, *entry.probes])

    def find(self, name: str, version: int | None) -> Entry | None:
        """The entry of a name, at a version if one is given; None for ``off``.

        Raises:
            TrimtabError: ``E_POLICY_UNKNOWN`` or ``E_POLICY_VERSION``.
        """
        if name == OFF:
            if version is not None:
                raise TrimtabError("E_POLICY_VERSION", "the policy 'off' has no versions")
            return None
        entry = self.entries.get(name)
        if entry is None:
            raise TrimtabError(
                "E_POLICY_UNKNOWN",
                f"there is no policy {_shown(name)} here; GET /v1/steering/status lists them",
            )
        if version is not None and version != entry.policy.version:
            raise TrimtabError(
                "E_POLICY_VERSION",
                f"policy {name!r} is served at version {entry.policy.version}, not {version}",
                expected=entry.policy.reference,
            )
        return entry

    def to_json(self) -> dict[str, Any]:
        """The form in which the launcher hands the catalogue to the API processes."""
        return {
            "default": self.default,
            "entries": [
                {
                    "policy": json.loads(e.policy.canonical),
                    "description": e.policy.description,
                    "plan": e.plan.to_json(),
                    "probes": [reading.to_json() for reading in e.probes],
                }
                for e in self.entries.values()
            ],
            "probes": [reading.to_json() for reading in self.probes],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Catalogue:
        """The catalogue that :meth:`to_json` wrote."""
        entries = [
            Entry(
                parse_policy({**e["policy"], "description": e["description"]}),
                Plan.from_json(e["plan"]),
                tuple(map(Reading.from_json, e["probes"])),
            )
            for e in data["entries"]
        ]
        probes = tuple(map(Reading.from_json, data["probes"]))
        return cls.of(entries, default=data["default"], probes=probes)

    @classmethod
    def of(
        cls, entries: Iterable[Entry], *, default: str = OFF, probes: tuple[Reading, ...] = ()
    ) -> Catalogue:
        """A catalogue of entries whose names are distinct."""
        return cls({e.policy.name: e for e in entries}, default, probes)


def _distinct(readings: Iterable[Reading]) -> tuple[Reading, ...]:
    return tuple({reading.id: reading for reading in readings}.values())


def _shown(name: str) -> str:
    text = ascii(name)
    return text if len(text) <= 80 else text[:77] + "..."
