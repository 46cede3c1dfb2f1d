"""Readings: outputs of probes whose scores are reported with an answer.

A policy names probes that are read under it, a server those that it reads of all traffic. A probe may have
several outputs; each is a reading of its own, with a name of its own in answers and metrics.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from directions.card import ModelFingerprint
from directions.errors import TrimtabError
from directions.store import Probe, Store


@dataclass(frozen=True)
class Reading:
    """One output of one probe on one model.

    Attributes:
        key: as answers call it: ``refusal@2``, or ``refusal@2/second`` for one output of several.
        label: as metrics call it: ``refusal`` or ``refusal/second``.
        probe: sha256 of the artefact.
        output: which of its outputs.
        layer: after which it reads; the number of layers is the final norm.
        read_out: ``affine``, scores from 0 to 1, or ``cosine``, from -1 to 1.
        threshold: the score that the probe's card calls decisive; ``None`` where it names none.
    """

    key: str
    label: str
    probe: str
    output: int
    layer: int
    read_out: Literal["affine", "cosine"]
    threshold: float | None = None

    @property
    def id(self) -> str:
        """The same for the same output of the same artefact, whatever it is called."""
        return f"{self.probe}/{self.output}"

    def to_json(self) -> dict[str, Any]:
        """Strings, numbers and ``None`` only."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Reading:
        """The reading that :meth:`to_json` wrote."""
        return cls(**data)


def readings_of(probe: Probe, model: ModelFingerprint) -> tuple[Reading, ...]:
    """Every output of a probe, as readings of a model that it fits."""
    card = probe.card
    layer = model.num_layers if card.layer is None else card.layer
    name = probe.name or f"sha256:{probe.sha256[:12]}"
    several = len(card.outputs) > 1
    return tuple(
        Reading(
            f"{probe.reference}/{output}" if several else probe.reference,
            f"{name}/{output}" if several else name,
            probe.sha256,
            number,
            layer,
            card.read_out,
            card.calibration.get("threshold"),
        )
        for number, output in enumerate(card.outputs)
    )


def compile_readings(
    references: Iterable[str], store: Store, model: ModelFingerprint, *, field: str = "--probe"
) -> tuple[Reading, ...]:
    """The readings of probes, each artefact once.

    Args:
        references: as the store takes them.
        store: where the probes are; each is verified.
        model: the served model.
        field: what named them, for the errors.

    Raises:
        TrimtabError: ``E_ARTEFACT_…``, the store's; ``E_PROBE_MODEL`` for a probe of another model.
    """
    found: dict[str, Reading] = {}
    for reference in references:
        try:
            probe = store.load_probe(reference)
        except TrimtabError as error:
            raise TrimtabError(
                error.code, f"{reference}: {error.message}", field=field, expected=error.expected
            ) from error
        fatal = [d for d in probe.card.model.incompatibilities(model) if d.fatal]
        if fatal:
            (first, *_) = fatal
            raise TrimtabError(
                "E_PROBE_MODEL",
                f"{reference} was made on another model: {first.field} is {first.expected}, "
                f"the served model's is {first.found}",
                field=field,
            )
        for reading in readings_of(probe, model):
            found.setdefault(reading.id, reading)
    return tuple(found.values())


def tell_apart(readings: Iterable[Reading]) -> dict[str, Reading]:
    """The readings by id, with labels that tell different ones apart: two versions keep theirs.

    Metrics leave versions out, so that series go on when one takes the place of another; where both
    are read at once, they would be added up.
    """
    found = {reading.id: reading for reading in readings}
    counts = Counter(reading.label for reading in found.values())
    return {
        id_: reading if counts[reading.label] == 1 else replace(reading, label=reading.key)
        for id_, reading in found.items()
    }
