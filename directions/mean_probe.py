"""A probe from the difference of means: how far along it an activation lies, as a probability.

With ``d = (μ₊ − μ₋)/‖μ₊ − μ₋‖`` at one layer and the projection ``p = d·h``, two normal classes of one
variance ``s²`` and equal weight give the log-odds (Fisher's linear discriminant in one dimension)::

    log-odds = (m₊ − m₋)/s² · (p − (m₊ + m₋)/2)      so  w = (m₊ − m₋)/s² · d,  b = −w·d (m₊ + m₋)/2

where ``m±`` are the classes' means of ``p``. Half of the examples give ``d``; means, variance and every
figure of quality come from the other half, which had no part in it. The score is
``sigmoid(w·h + b)``.

It tells two sets of examples apart, and no more than that: a probe of refusing against complying answers
reads whatever these differ in. Figures are the area under the curve and the Brier score, on examples
that the direction has not seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from directions.activations import Float64Array, Moments, measure, passages
from directions.card import ProbeDraft
from directions.contrast import Contrast
from directions.errors import TrimtabError
from directions.examples import Example
from directions.language_model import opened
from directions.progress import Progress, silent
from directions.store import ArtefactRef, FloatArray, Store

# Fewer examples a half than this, and neither a variance nor a curve means anything.
FEWEST = 8


@dataclass(frozen=True)
class TrainedProbe:
    """A probe that is not stored yet.

    Attributes:
        card: all that is known of it.
        weights: ``[1, hidden_size] float32``.
        bias: of its one output.
    """

    card: ProbeDraft
    weights: FloatArray
    bias: float

    def store(self, store: Store, name: str) -> ArtefactRef:
        """Put it under a name."""
        return store.put_probe(self.card, self.weights, [self.bias], name=name)


@dataclass(frozen=True)
class MeanProbe:
    """The recipe.

    Attributes:
        contrast: the two sides, the tokens and the model; its direction is the probe's.
        layer: after which it reads; ``None`` takes the layer with the best area under the curve.
    """

    contrast: Contrast
    layer: int | None = None

    def facts(self) -> dict[str, Any]:
        """What decides the result, as the card says it."""
        facts = self.contrast.facts()
        layer = "best" if self.layer is None else self.layer
        return {
            **facts,
            "method": "mean-difference",
            "settings": {**facts["settings"], "layer": layer},
        }

    def run(self, progress: Progress = silent) -> TrainedProbe:
        """Read both sides and fit.

        Raises:
            TrimtabError: those of ``opened``, ``passages`` and ``measure``; E_EXAMPLES_FEW; E_LAYER_RANGE;
                E_PROBE_FLAT where the sides do not differ.
        """
        facts = self.facts()
        sides: list[Moments] = []
        with opened(self.contrast.model, self.contrast.reading, progress) as model:
            if self.layer is not None and not 0 <= self.layer < len(model.layers):
                raise TrimtabError(
                    "E_LAYER_RANGE",
                    f"the model has no layer {self.layer}",
                    field="--layer",
                    expected=f"0 to {len(model.layers) - 1}",
                )
            for sets, what in (
                (self.contrast.positive, "positive"),
                (self.contrast.negative, "negative"),
            ):
                examples: list[Example] = [e for part in sets for e in part.examples]
                found = passages(model, examples, self.contrast.position, progress)
                if len(found) < 2 * FEWEST:
                    raise TrimtabError(
                        "E_EXAMPLES_FEW",
                        f"{len(found)} {what} examples are too few for a probe",
                        field=f"--{what}",
                        expected=f"at least {2 * FEWEST}",
                    )
                sides.append(measure(model, found, progress, what))
        positive, negative = sides
        layers = range(len(positive.mean)) if self.layer is None else [self.layer]
        fits = {layer: _fit(positive, negative, layer) for layer in layers}
        best = max(fits, key=lambda layer: (fits[layer].auc, fits[layer].gap))
        fit = fits[best]
        card = ProbeDraft(
            **facts,
            site="residual",
            layer=best,
            read_out="affine",
            outputs=("score",),
            calibration={"threshold": 0.5},
            quality={
                "examples_positive": float(sum(positive.counts)),
                "examples_negative": float(sum(negative.counts)),
                "auc": fit.auc,
                "brier": fit.brier,
                **{f"auc.{layer}": found.auc for layer, found in fits.items()},
            },
            created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        )
        return TrainedProbe(card, fit.weights[None].astype(np.float32), fit.bias)


@dataclass(frozen=True)
class _Fit:
    weights: Float64Array
    bias: float
    auc: float
    brier: float
    gap: float


def _fit(positive: Moments, negative: Moments, layer: int) -> _Fit:
    direction = positive.half_mean(0)[layer] - negative.half_mean(0)[layer]
    length = float(np.linalg.norm(direction))
    if not length > 0:
        raise TrimtabError(
            "E_PROBE_FLAT", f"the two sides are the same at layer {layer}", field="--positive"
        )
    d = direction / length
    plus, minus = (
        np.stack([mean[layer] for mean in side.held_out]).astype(np.float64) @ d
        for side in (positive, negative)
    )
    gap = float(plus.mean() - minus.mean())
    variance = float((plus.var(ddof=1) + minus.var(ddof=1)) / 2)
    if not (variance > 0 and np.isfinite(gap / variance)):
        raise TrimtabError(
            "E_PROBE_FLAT", f"the examples do not vary at layer {layer}", field="--positive"
        )
    weights = gap / variance * d
    bias = -gap / variance * float(plus.mean() + minus.mean()) / 2
    logits = gap / variance * np.concatenate([plus, minus]) + bias
    # The sigmoid, in a form that does not overflow.
    scores = 0.5 * (1.0 + np.tanh(logits / 2.0))
    truth = np.concatenate([np.ones(len(plus)), np.zeros(len(minus))])
    # The share of pairs that are in the right order; ties count half.
    above = (plus[:, None] > minus[None]).mean() + 0.5 * (plus[:, None] == minus[None]).mean()
    return _Fit(
        weights, bias, float(above), float(((scores - truth) ** 2).mean()), gap / variance**0.5
    )
