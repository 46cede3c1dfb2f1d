"""What every method that makes a direction shares: a recipe in, a draft of an artefact out."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import numpy as np

from directions.activations import Float64Array, Moments
from directions.card import Card, CardDraft
from directions.progress import Progress
from directions.quality import activation_norms, quality
from directions.store import ArtefactRef, BoolArray, FloatArray, Store


@dataclass(frozen=True)
class Extraction:
    """A direction that is not stored yet.

    Attributes:
        card: all that is known of it.
        vectors: ``[num_layers, hidden_size] float32``.
        present: ``[num_layers] bool``.
    """

    card: CardDraft
    vectors: FloatArray
    present: BoolArray

    def store(self, store: Store, name: str) -> ArtefactRef:
        """Put it under a name."""
        return store.put(self.card, self.vectors, self.present, name=name)


class Method(Protocol):
    """A recipe: a method with everything it needs.

    ``facts`` says, before anything is computed, all that decides the result: two recipes with equal
    facts make the same direction. ``run`` makes it.
    """

    def facts(self) -> dict[str, Any]:
        """The card's fields that are known beforehand: method, position, model, sources …"""
        ...

    def run(self, progress: Progress) -> Extraction:
        """Make the direction."""
        ...


def already_made(method: Method, store: Store, name: str) -> ArtefactRef | None:
    """The latest version under a name, where this very recipe made it and it is intact."""
    if name not in store.names():
        return None
    direction = store.load(name)
    if matches(direction.card, method.facts()):
        return ArtefactRef(direction.name, direction.version, direction.sha256)
    return None


def matches(card: Card, facts: dict[str, Any]) -> bool:
    """Whether a card says of a direction what a recipe's facts do."""
    return all(getattr(card, key) == value for key, value in facts.items())


def difference(
    facts: dict[str, Any], positive: Moments, negative: Moments, norms_of: tuple[Moments, ...]
) -> Extraction:
    """The direction ``mean(positive) − mean(negative)`` with its card.

    Args:
        facts: the recipe's.
        positive: activations on the side that the direction points to.
        negative: activations on the other side.
        norms_of: whose tokens the activation norms are averaged over.
    """
    vectors: Float64Array = positive.mean - negative.mean
    card = CardDraft(
        **facts,
        activation_norms=activation_norms(*norms_of),
        quality=quality(positive, negative),
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )
    return Extraction(card, vectors.astype(np.float32), np.ones(len(vectors), dtype=bool))
