"""Contrast: the difference between two sets of prompts, as one model sees them.

``v_l = mean of h_l over the positive examples − mean of h_l over the negative ones``: the difference
of means that activation addition and refusal directions are made of (Arditi et al., "Refusal in
Language Models Is Mediated by a Single Direction", arXiv 2406.11717; Rimsky et al., "Steering Llama 2
via Contrastive Activation Addition", arXiv 2312.06681). Added to the residual stream it moves the
model towards how it is on the positive side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from directions.activations import measure, passages
from directions.card import ModelFingerprint
from directions.examples import Example, ExampleSet
from directions.extraction import Extraction, difference
from directions.fingerprint import fingerprint
from directions.language_model import LanguageModel, Reading, opened
from directions.position import Position
from directions.progress import Progress, silent


@dataclass(frozen=True)
class Contrast:
    """The recipe.

    Attributes:
        model: the checkpoint's folder.
        positive: what the direction points to.
        negative: what it points away from.
        position: which tokens are averaged; where it needs answers and they are missing, the model
            writes them, greedily.
        reading: how the model is loaded and read.
        description: a sentence for the card; made up from the sources where it is empty.
    """

    model: Path
    positive: tuple[ExampleSet, ...]
    negative: tuple[ExampleSet, ...]
    position: Position = Position("last-prompt-token")  # noqa: RUF009 (frozen)
    reading: Reading = Reading()  # noqa: RUF009 (frozen)
    description: str = ""

    @cached_property
    def _fingerprint(self) -> ModelFingerprint:
        return fingerprint(self.model)

    def facts(self) -> dict[str, Any]:
        """What decides the result; see ``directions.extraction.Method``."""
        names = [" + ".join(part.name for part in side) for side in (self.positive, self.negative)]
        return {
            "method": "contrast",
            "position": str(self.position),
            "description": self.description or f"{names[0]} minus {names[1]}",
            "model": self._fingerprint,
            "sources": (
                *(part.source("positive") for part in self.positive),
                *(part.source("negative") for part in self.negative),
            ),
            "settings": {"chat_template": self.reading.chat_template},
            "dtype": self.reading.dtype,
        }

    def run(self, progress: Progress = silent) -> Extraction:
        """Read both sides and take the difference.

        Raises:
            TrimtabError: those of ``opened``, ``passages`` and ``measure``.
        """
        facts = self.facts()

        def side(model: LanguageModel, sets: Sequence[ExampleSet], what: str) -> Any:
            examples: list[Example] = [example for part in sets for example in part.examples]
            found = passages(model, examples, self.position, progress)
            return measure(model, found, progress, what)

        with opened(self.model, self.reading, progress) as model:
            positive = side(model, self.positive, "positive")
            negative = side(model, self.negative, "negative")
        return difference(facts, positive, negative, norms_of=(positive, negative))
