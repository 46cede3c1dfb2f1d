"""Head tracing: which attention heads hold an objective down, and which hold it up.

The evidence for a head is the change of the objective when the head's output is scaled to nothing, measured
or estimated, mean over texts, at the last token of each: positive for heads that suppress it. Three methods, a
file each, in the order of what they cost:

* :mod:`directions.heads_direct`: what the head itself writes towards the objective; misses heads that act
  through later layers.
* :mod:`directions.heads_gradient`: the derivative by a factor of the head; one pass forward and one back.
* :mod:`directions.heads_causal`: scales each head to nothing and looks; one pass a head.

Yin et al. 2025 (arXiv 2510.06036) trace refusal suppression heads by the first; attribution by the gradient
follows attribution patching (Syed et al. 2023, arXiv 2310.10348).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch

from directions import heads_causal, heads_direct, heads_gradient
from directions.activations import Float64Array, passages
from directions.card import HeadSetDraft, ModelFingerprint
from directions.errors import TrimtabError
from directions.examples import ExampleSet
from directions.fingerprint import fingerprint
from directions.language_model import LanguageModel, Reading, batches_by_length, opened
from directions.objective import Objective
from directions.position import Position
from directions.progress import Progress, silent
from directions.store import ArtefactRef, Store

Method = Literal["direct", "gradient", "causal"]

METHODS: Final[tuple[Method, ...]] = ("direct", "gradient", "causal")


@dataclass(frozen=True)
class HeadTrace:
    """What was found, not stored yet.

    Attributes:
        card: all that is known of it.
        evidence: ``[num_layers, num_heads] float64``.
        top: how many heads the set takes.
    """

    card: HeadSetDraft
    evidence: Float64Array
    top: int

    @property
    def heads(self) -> list[tuple[int, int]]:
        """The heads with the most evidence, most first; none whose evidence is not positive."""
        order = np.argsort(-self.evidence, axis=None, kind="stable")[: self.top]
        width = self.evidence.shape[1]
        found = [(int(i) // width, int(i) % width) for i in order]
        return [head for head in found if self.evidence[head] > 0]

    def store(self, store: Store, name: str) -> ArtefactRef:
        """Put the heads under a name.

        Raises:
            TrimtabError: E_HEADS_NONE where no head suppresses the objective.
        """
        heads = self.heads
        if not heads:
            raise TrimtabError("E_HEADS_NONE", "no head was found to suppress the objective")
        return store.put_head_set(self.card, heads, [self.evidence[h] for h in heads], name=name)


@dataclass(frozen=True)
class HeadTracing:
    """The recipe.

    Attributes:
        model: the checkpoint's folder.
        examples: the texts, up to the token at which the objective is read.
        objective: what is held down or up.
        method: one of :data:`METHODS`.
        top: how many heads to take.
        reading: how the model is loaded and read.
        description: a sentence for the card; made up where it is empty.
    """

    model: Path
    examples: tuple[ExampleSet, ...]
    objective: Objective
    method: Method
    top: int
    reading: Reading = Reading()  # noqa: RUF009 (frozen)
    description: str = ""

    @cached_property
    def _fingerprint(self) -> ModelFingerprint:
        return fingerprint(self.model)

    def facts(self) -> dict[str, Any]:
        """What decides the result, as the card says it."""
        return {
            "method": f"heads-{self.method}",
            "position": "last-prompt-token",
            "description": self.description or f"what suppresses the {self.objective.describe()}",
            "model": self._fingerprint,
            "sources": tuple(part.source("positive") for part in self.examples),
            "settings": {
                "objective": self.objective.describe(),
                "top": self.top,
                "chat_template": self.reading.chat_template,
            },
            "dtype": self.reading.dtype,
        }

    def run(self, progress: Progress = silent) -> HeadTrace:
        """Trace.

        Raises:
            TrimtabError: those of ``opened`` and ``passages``; E_SITE_HEADS where the model's heads cannot
                be told; E_NORM_KIND; E_ACTIVATIONS_NONFINITE.
        """
        facts = self.facts()
        with opened(self.model, self.reading, progress) as model:
            everything = [example for part in self.examples for example in part.examples]
            position = Position("last-prompt-token")
            texts = [p.tokens for p in passages(model, everything, position, progress)]
            evidence = trace(model, self.objective, texts, self.method, progress)
        flat = np.sort(evidence, axis=None)[::-1]
        card = HeadSetDraft(
            **facts,
            quality={
                "texts": float(len(texts)),
                "evidence_total": float(flat[: self.top].clip(min=0).sum()),
                "evidence_share": _share(flat, self.top),
            },
            created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        )
        return HeadTrace(card, evidence, self.top)


def trace(
    model: LanguageModel,
    objective: Objective,
    texts: Sequence[Sequence[int]],
    method: Method,
    progress: Progress = silent,
) -> Float64Array:
    """The evidence for every head, ``[num_layers, num_heads]``; see the module's docstring."""
    estimate: Callable[..., torch.Tensor] = {
        "direct": heads_direct.evidence,
        "gradient": heads_gradient.evidence,
        "causal": heads_causal.evidence,
    }[method]
    advance = progress(f"trace heads, {method}", len(texts))
    total: Float64Array | None = None
    lengths = [len(text) for text in texts]
    for batch in batches_by_length(lengths, model.reading.batch_size):
        ids, mask = model.padded([texts[i] for i in batch], "right")
        part = estimate(model, objective, ids, mask).double().cpu().numpy()
        if not np.isfinite(part).all():
            raise TrimtabError(
                "E_ACTIVATIONS_NONFINITE",
                f"activations are not finite in {model.reading.dtype}",
                field="--dtype",
                expected="a dtype whose range the model keeps to",
            )
        total = part if total is None else total + part
        advance(len(batch))
    assert total is not None
    return total / len(texts)


def _share(flat: Float64Array, top: int) -> float:
    positive = flat.clip(min=0)
    return float(positive[:top].sum() / positive.sum()) if positive.sum() > 0 else 0.0
