"""A card's rules, its canonical form, and the comparison of fingerprints."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import pytest
from pydantic import ValidationError

from directions.card import Card, CardDraft, ModelFingerprint

FINGERPRINT = ModelFingerprint(
    architecture="LlamaForCausalLM",
    hidden_size=8,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    tokenizer_sha256="a" * 64,
    chat_template_sha256="b" * 64,
    weights_sha256="c" * 64,
)


def a_card(**changes: object) -> Card:
    fields: dict[str, object] = {
        "method": "contrast",
        "position": "last-prompt-token",
        "model": FINGERPRINT,
        "activation_norms": (1.0, 2.5, None),
        "dtype": "float32",
        "created": "2026-01-02T03:04:05Z",
        "layers": (0, 2),
        "tensors_sha256": "d" * 64,
    }
    return Card.model_validate({**fields, **changes})


def test_a_card_read_back_from_its_canonical_form_is_the_same_card() -> None:
    card = a_card(quality={"separation": 1.0}, settings={"limit": 64, "chat_template": True})
    again = Card.model_validate(json.loads(card.canonical()))
    assert again == card
    assert again.identity() == card.identity() == hashlib.sha256(card.canonical()).hexdigest()


def test_the_canonical_form_orders_keys_and_writes_whole_numbers_without_a_fraction() -> None:
    text = a_card().canonical().decode()
    assert text.startswith('{"activation_norms":[1,2.5,null],"apiVersion":"trimtab/v1",')
    assert " " not in text


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "probe"},
        {"apiVersion": "trimtab/v2"},
        {"surprise": 1},
        {"layers": (2, 0)},
        {"layers": (0, 0)},
        {"layers": (0, 3)},
        {"layers": (-1,)},
        {"activation_norms": (1.0, 2.0)},
        {"activation_norms": (1.0, float("nan"), 2.0)},
        {"activation_norms": (1.0, -2.0, 2.0)},
        {"quality": {"separation": float("inf")}},
        {"tensors_sha256": "D" * 64},
        {"tensors_sha256": "d" * 64 + "\n"},
        {"created": "yesterday"},
        {"method": ""},
    ],
    ids=lambda changes: next(iter(changes.items())).__repr__(),
)
def test_a_card_that_breaks_a_rule_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        a_card(**changes)


def test_a_draft_has_no_hash_and_no_layers() -> None:
    assert {"layers", "tensors_sha256"}.isdisjoint(CardDraft.model_fields)


def test_a_model_is_compatible_with_itself() -> None:
    assert FINGERPRINT.incompatibilities(FINGERPRINT) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architecture", "Qwen3ForCausalLM"),
        ("hidden_size", 16),
        ("num_layers", 4),
        ("num_heads", 4),
        ("num_kv_heads", 2),
        ("tokenizer_sha256", "e" * 64),
        ("chat_template_sha256", "e" * 64),
        ("chat_template_sha256", None),
    ],
)
def test_a_difference_that_moves_layers_or_tokens_is_fatal(field: str, value: object) -> None:
    served = FINGERPRINT.model_copy(update={field: value})
    (difference,) = FINGERPRINT.incompatibilities(served)
    assert (difference.field, difference.fatal) == (field, True)
    assert (difference.expected, difference.found) == (getattr(FINGERPRINT, field), value)


def test_other_weights_are_a_warning_and_unknown_weights_are_not_compared() -> None:
    (difference,) = FINGERPRINT.incompatibilities(
        FINGERPRINT.model_copy(update={"weights_sha256": "f" * 64})
    )
    assert (difference.field, difference.fatal) == ("weights_sha256", False)
    unknown = FINGERPRINT.model_copy(update={"weights_sha256": None})
    assert FINGERPRINT.incompatibilities(unknown) == unknown.incompatibilities(FINGERPRINT) == []


def test_card_and_store_import_neither_torch_nor_transformers_nor_vllm() -> None:
    code = (
        "import sys, directions.card, directions.store, directions.fingerprint\n"
        "print({'torch', 'transformers', 'vllm'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"
