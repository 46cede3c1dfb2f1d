"""What every method that makes a direction shares: a recipe in, a draft of an artefact out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import numpy as np

from directions.activations import Float64Array, Moments
from directions.card import AnyCard, CardDraft
from directions.progress import Progress
from directions.quality import activation_norms, quality
from directions.store import ArtefactRef, BoolArray, Direction, FloatArray, Probe, Store


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


class Recipe(Protocol):
    """A method with everything it needs.

    ``facts`` says, before anything is computed, all that decides the result: two recipes with equal
    facts make the same artefact.
    """

    def facts(self) -> dict[str, Any]:
        """The card's fields that are known beforehand: method, position, model, sources …"""
        ...


class Method(Recipe, Protocol):
    """A recipe of a direction. ``run`` makes it."""

    def run(self, progress: Progress) -> Extraction:
        """Make the direction."""
        ...


def already_made(
    recipe: Recipe, store: Store, name: str, load: Callable[[str], Direction | Probe]
) -> ArtefactRef | None:
    """The latest version under a name, where this very recipe made it and it is intact.

    Args:
        load: the store's way to an artefact of the kind that the recipe makes.
    """
    if name not in store.names():
        return None
    found = load(name)
    if matches(found.card, recipe.facts()):
        return ArtefactRef(found.name, found.version, found.sha256)
    return None


def matches(card: AnyCard, facts: dict[str, Any]) -> bool:
    """Whether a card says of an artefact what a recipe's facts do."""
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
