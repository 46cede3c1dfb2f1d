"""Figures that say how far a direction can be trusted.

They are cheap, and they judge the examples against each other, not the model's behaviour: a
direction with good figures separates its two sets, and whether adding it does what one hopes is for
a run with the model to say.

``examples_positive`` and ``examples_negative`` count what was averaged (an example with an empty
answer is not), ``norm_mean`` is the mean length of the layers' vectors. With the examples of each
side in two halves, and for every layer:

* ``split_half_cosine``: cosine between the directions that the two halves give by themselves. Near 1,
  more examples would hardly turn it; near 0, it is noise.
* ``separation``: Cohen's d along the first half's direction on examples of the second half, which had
  no part in it: (mean₊ − mean₋) / √((var₊ + var₋) / 2). 0 is no separation; above 2 the two sets hardly
  overlap.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from directions.activations import Float64Array, Moments

# Fewer examples a half than this and a variance means nothing.
_FEWEST = 2


def activation_norms(*sides: Moments) -> tuple[float, ...]:
    """Mean L2 norm of the residual stream after each layer, over all averaged tokens."""
    total = sum(side.num_tokens for side in sides)
    norms = np.sum([side.norm_sum for side in sides], axis=0) / total
    return tuple(float(norm) for norm in norms)


def quality(positive: Moments, negative: Moments) -> dict[str, float]:
    """The figures of ``positive − negative``, per layer as ``separation.12`` and summed up.

    Where a side has too few examples to be halved, only what can be said is there.
    """
    vectors = positive.mean - negative.mean
    figures = {
        "examples_positive": float(sum(positive.counts)),
        "examples_negative": float(sum(negative.counts)),
    }
    figures["norm_mean"] = float(np.linalg.norm(vectors, axis=1).mean())
    if min(*positive.counts, *negative.counts) < 1:
        return figures
    first = positive.half_mean(0) - negative.half_mean(0)
    second = positive.half_mean(1) - negative.half_mean(1)
    cosines = _cosine(first, second)
    figures["split_half_cosine_mean"] = float(cosines.mean())
    figures |= {f"split_half_cosine.{layer}": float(v) for layer, v in enumerate(cosines)}
    if min(len(positive.held_out), len(negative.held_out)) >= _FEWEST:
        separation = _cohens_d(positive.held_out, negative.held_out, first)
        figures["separation_mean"] = float(separation.mean())
        figures["separation_best"] = float(separation.max())
        figures["separation_best_layer"] = float(separation.argmax())
        figures |= {f"separation.{layer}": float(v) for layer, v in enumerate(separation)}
    return figures


def _cosine(left: Float64Array, right: Float64Array) -> Float64Array:
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    products = np.einsum("lh,lh->l", left, right)
    cosines: Float64Array = np.zeros_like(products)
    np.divide(products, lengths, out=cosines, where=lengths > 0)
    return cosines


def _cohens_d(
    positive: list[npt.NDArray[np.float32]],
    negative: list[npt.NDArray[np.float32]],
    direction: Float64Array,
) -> Float64Array:
    plus = np.einsum("nlh,lh->nl", np.stack(positive).astype(np.float64), direction)
    minus = np.einsum("nlh,lh->nl", np.stack(negative).astype(np.float64), direction)
    spread = np.sqrt((plus.var(axis=0, ddof=1) + minus.var(axis=0, ddof=1)) / 2)
    gap = plus.mean(axis=0) - minus.mean(axis=0)
    effect: Float64Array = np.zeros_like(gap)
    np.divide(gap, spread, out=effect, where=spread > 0)
    return effect
