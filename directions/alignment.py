"""Alignment: the difference that alignment training made, on the same texts.

``v_l = mean of h_l(aligned model) − mean of h_l(base model)`` over the first tokens of the answers
(Giordani, "Re-Emergent Misalignment: How Narrow Fine-Tuning Erodes Safety Alignment in LLMs",
arXiv 2507.03662, which takes the first 64). Both models read the same tokens: the prompts rendered
with the aligned model's chat template, and the same answers. An answer that is not given is written
by the aligned model.

The paper averages over tokens; here each example counts once, so an answer that ends early weighs as
much as one that does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from directions.activations import measure, passages
from directions.card import ModelFingerprint
from directions.errors import TrimtabError
from directions.examples import ExampleSet
from directions.extraction import Extraction, difference
from directions.fingerprint import fingerprint
from directions.language_model import Reading, opened
from directions.position import Position
from directions.progress import Progress, silent

_MUST_AGREE = ("architecture", "hidden_size", "num_layers", "num_heads", "tokenizer_sha256")


@dataclass(frozen=True)
class Alignment:
    """The recipe.

    Attributes:
        model: the aligned checkpoint's folder; the direction is for this model.
        base: the base checkpoint's folder.
        prompts: what both read.
        position: which tokens are averaged.
        reading: how the models are loaded and read, one after the other.
        description: a sentence for the card; made up where it is empty.
    """

    model: Path
    base: Path
    prompts: tuple[ExampleSet, ...]
    position: Position = Position("answer-mean", 64)  # noqa: RUF009 (frozen)
    reading: Reading = Reading()  # noqa: RUF009 (frozen)
    description: str = ""

    @cached_property
    def _fingerprints(self) -> tuple[ModelFingerprint, ModelFingerprint]:
        return fingerprint(self.model), fingerprint(self.base)

    def facts(self) -> dict[str, Any]:
        """What decides the result; see ``directions.extraction.Method``."""
        aligned, base = self._fingerprints
        names = " + ".join(part.name for part in self.prompts)
        return {
            "method": "alignment",
            "position": str(self.position),
            "description": self.description
            or f"{self.model.name} minus {self.base.name} on {names}",
            "model": aligned,
            "base_model": base,
            "sources": tuple(part.source("both") for part in self.prompts),
            "settings": {"chat_template": self.reading.chat_template},
            "dtype": self.reading.dtype,
        }

    def run(self, progress: Progress = silent) -> Extraction:
        """Read the prompts with one model after the other and take the difference.

        The activation norms are the aligned model's, which is the one to be steered.

        Raises:
            TrimtabError: E_BASE_MODEL where the two models cannot be compared; those of
                ``opened``, ``passages`` and ``measure``.
        """
        aligned_is, base_is = self._fingerprints
        differing = [
            field for field in _MUST_AGREE if getattr(aligned_is, field) != getattr(base_is, field)
        ]
        if differing:
            raise TrimtabError(
                "E_BASE_MODEL",
                f"{self.base} differs from {self.model} in {', '.join(differing)}",
                field="--base",
                expected="a model of the same architecture, sizes and tokenizer",
            )
        facts = self.facts()
        examples = [example for part in self.prompts for example in part.examples]
        with opened(self.model, self.reading, progress) as model:
            found = passages(model, examples, self.position, progress)
            aligned = measure(model, found, progress, "aligned")
        with opened(self.base, self.reading, progress) as model:
            base = measure(model, found, progress, "base")
        return difference(facts, aligned, base, norms_of=(aligned,))
