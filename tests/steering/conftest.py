"""Stored directions for the tests of policies, plans and the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from directions.card import CardDraft, ModelFingerprint
from directions.store import ArtefactRef, Store

PutDirection = Callable[..., ArtefactRef]


def model_fingerprint(**changes: object) -> ModelFingerprint:
    """A model of 4 layers and width 64, the shape of the tiny checkpoint."""
    fields: dict[str, object] = {
        "architecture": "LlamaForCausalLM",
        "hidden_size": 64,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 2,
        "tokenizer_sha256": "a" * 64,
        "chat_template_sha256": "b" * 64,
        "weights_sha256": "c" * 64,
    }
    return ModelFingerprint.model_validate({**fields, **changes})


@pytest.fixture
def served() -> ModelFingerprint:
    """The fingerprint of the model that is served."""
    return model_fingerprint()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    return Store(tmp_path / "home")


@pytest.fixture
def put_direction(store: Store) -> PutDirection:
    """Put a direction into the store: random vectors unless they are given."""

    def put(
        name: str = "demo",
        *,
        seed: int = 0,
        vectors: np.ndarray | None = None,
        present: Sequence[bool] | None = None,
        norms: Sequence[float | None] | None = None,
        model: ModelFingerprint | None = None,
    ) -> ArtefactRef:
        model = model or model_fingerprint()
        shape = (model.num_layers, model.hidden_size)
        if vectors is None:
            vectors = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
        card = CardDraft(
            method="test",
            description=f"random vectors {seed}",
            model=model,
            activation_norms=tuple(norms if norms is not None else [3.0] * model.num_layers),
            dtype="float32",
            created="2026-01-01T00:00:00Z",
        )
        mask = np.array(present if present is not None else [True] * model.num_layers)
        return store.put(card, vectors, mask, name=name)

    return put
