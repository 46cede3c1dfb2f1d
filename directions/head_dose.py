"""Dose and response of a head set: an objective with its heads scaled by one factor after another.

Beside it stand controls: as many random heads, drawn from all others, scaled alike. What a set does that random
heads do too says nothing of the set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from directions.activations import passages
from directions.errors import TrimtabError
from directions.examples import ExampleSet
from directions.head_scales import every_head, scaled
from directions.language_model import LanguageModel, Reading, batches_by_length, opened
from directions.objective import Objective
from directions.position import Position
from directions.progress import Progress, silent

Heads = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Dose:
    """One factor.

    Attributes:
        factor: on the output of each head of the set.
        objective: its mean over the texts.
        controls: the same of each control.
    """

    factor: float
    objective: float
    controls: tuple[float, ...]


@dataclass(frozen=True)
class DoseResponse:
    """What came of it.

    Attributes:
        texts: how many.
        plain: the objective with nothing scaled.
        doses: in the order of the factors.
    """

    texts: int
    plain: float
    doses: tuple[Dose, ...]

    @property
    def holds(self) -> bool:
        """Whether the heads, scaled most, raise the objective more than any control does."""
        last = min(self.doses, key=lambda dose: dose.factor)
        return last.objective > max(self.plain, *last.controls)


def measure_doses(
    model: Path,
    heads: Heads,
    examples: Sequence[ExampleSet],
    objective: Objective,
    factors: Sequence[float],
    *,
    controls: int = 5,
    seed: int = 0,
    reading: Reading = Reading(),  # noqa: B008 (frozen)
    progress: Progress = silent,
) -> DoseResponse:
    """Scale and look.

    Args:
        model: the checkpoint's folder.
        heads: of the set.
        examples: the texts, up to the token at which the objective is read.
        objective: what is measured.
        factors: 1 changes nothing, 0 takes the heads away.
        controls: how many sets of random heads.
        seed: of their choice.
        reading: how the model is loaded and read.

    Raises:
        TrimtabError: those of ``opened`` and ``passages``; E_SITE_HEADS; E_HEAD_RANGE for a head that the model
            lacks; E_CONTROLS where there are not enough other heads.
    """
    with opened(model, reading, progress) as opened_model:
        found = every_head(opened_model)
        shape = (len(found), found[0].count)
        others = [(n, h) for n in range(shape[0]) for h in range(shape[1]) if (n, h) not in heads]
        beyond = [head for head in heads if not (head[0] < shape[0] and head[1] < shape[1])]
        if beyond:
            raise TrimtabError(
                "E_HEAD_RANGE",
                f"the model has no head {beyond[0][1]} in layer {beyond[0][0]}",
                field="REFERENCE",
            )
        if controls and len(others) < len(heads):
            raise TrimtabError(
                "E_CONTROLS",
                f"{len(others)} heads are left for controls of {len(heads)}",
                field="--controls",
                expected="0",
            )
        random = np.random.default_rng(seed)
        sets: list[Heads] = [heads]
        for _ in range(controls):
            picked = random.choice(len(others), size=len(heads), replace=False)
            sets.append([others[i] for i in picked])
        everything = [example for part in examples for example in part.examples]
        place = Position("last-prompt-token")
        texts = [p.tokens for p in passages(opened_model, everything, place, progress)]
        advance = progress("scale heads", 1 + len(factors) * len(sets))

        def mean(chosen: Heads, factor: float) -> float:
            by = torch.ones(shape, device=opened_model.device)
            for layer, head in chosen:
                by[layer, head] = factor
            value = _mean(opened_model, objective, texts, found, by)
            advance(1)
            return value

        plain = mean([], 1.0)
        doses = []
        for factor in factors:
            values = [mean(chosen, factor) for chosen in sets]
            doses.append(Dose(factor, values[0], tuple(values[1:])))
    return DoseResponse(len(texts), plain, tuple(doses))


def _mean(
    model: LanguageModel,
    objective: Objective,
    texts: Sequence[Sequence[int]],
    heads: Any,
    factors: torch.Tensor,
) -> float:
    total = 0.0
    lengths = [len(text) for text in texts]
    with torch.inference_mode(), scaled(heads, factors):
        for batch in batches_by_length(lengths, model.reading.batch_size):
            ids, mask = model.padded([texts[i] for i in batch], "right")
            total += float(objective.values(model, ids, mask).double().sum())
    return total / len(texts)
