"""Activation norms for a direction that came without them.

A direction from elsewhere says nothing of how large its model's activations are, and a strength
``relative`` to them then means nothing. Reading a few prompts with the model supplies them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from directions.activations import measure, passages
from directions.card import CardDraft
from directions.examples import ExampleSet
from directions.extraction import Extraction
from directions.language_model import Reading, opened
from directions.position import Position
from directions.progress import Progress, silent
from directions.quality import activation_norms


def with_norms(
    made: Extraction,
    model: Path,
    prompts: ExampleSet,
    reading: Reading,
    progress: Progress = silent,
) -> Extraction:
    """The same direction, with the mean norms over the tokens of some prompts in its card.

    Args:
        made: a direction of this model.
        model: the checkpoint's folder.
        prompts: what is read; every token but the first of each counts.
        reading: how the model is loaded and read.
        progress: told of each prompt read.

    Raises:
        TrimtabError: those of ``opened``, ``passages`` and ``measure``.
    """
    with opened(model, reading, progress) as opened_model:
        found = passages(opened_model, prompts.examples, Position("prompt-mean"), progress)
        moments = measure(opened_model, found, progress, "norms")
    fields = {
        **made.card.model_dump(),
        "activation_norms": activation_norms(moments),
        "sources": [*made.card.sources, prompts.source("both")],
        "dtype": reading.dtype,
    }
    return replace(made, card=CardDraft.model_validate(fields))
