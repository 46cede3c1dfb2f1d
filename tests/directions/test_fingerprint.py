"""A checkpoint's fingerprint: what changes it, and what does not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from directions.errors import TrimtabError
from directions.fingerprint import fingerprint
from tests.conftest import CHAT_TEMPLATE, build_tiny_checkpoint


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "home"))
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_it_tells_the_sizes_of_the_model(checkpoint: Path) -> None:
    found = fingerprint(checkpoint)
    assert (found.architecture, found.hidden_size, found.num_layers) == ("LlamaForCausalLM", 64, 4)
    assert (found.num_heads, found.num_kv_heads) == (4, 2)
    assert found.weights_sha256 is not None
    assert fingerprint(checkpoint, weights=False).weights_sha256 is None


def test_a_copy_elsewhere_is_the_same_model(checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    assert fingerprint(copy) == fingerprint(checkpoint)


def test_other_weights_change_only_the_weights_hash(checkpoint: Path, tmp_path: Path) -> None:
    other = build_tiny_checkpoint(tmp_path / "other", seed=1)
    (difference,) = fingerprint(checkpoint).incompatibilities(fingerprint(other))
    assert (difference.field, difference.fatal) == ("weights_sha256", False)


def test_weights_changed_in_place_are_noticed(checkpoint: Path) -> None:
    before = fingerprint(checkpoint).weights_sha256
    weights = checkpoint / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert fingerprint(checkpoint).weights_sha256 != before


def test_hashes_of_weights_are_remembered_and_a_bad_memory_does_no_harm(
    checkpoint: Path, tmp_path: Path
) -> None:
    true = fingerprint(checkpoint).weights_sha256
    (memory,) = (tmp_path / "home" / "cache" / "weights").iterdir()
    edit(memory, lambda entry: entry.update(sha256="0" * 64))
    assert fingerprint(checkpoint).weights_sha256 != true  # it is what is remembered that counts
    os.utime(checkpoint / "model.safetensors", (5, 5))
    assert fingerprint(checkpoint).weights_sha256 == true
    memory.write_text("{half")
    assert fingerprint(checkpoint).weights_sha256 == true


def test_a_home_that_cannot_be_written_does_no_harm(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = fingerprint(checkpoint).weights_sha256
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "file"))
    assert fingerprint(checkpoint).weights_sha256 == true


def test_saving_the_tokenizer_with_other_padding_is_the_same_tokenizer(checkpoint: Path) -> None:
    before = fingerprint(checkpoint)

    def incidental(document: dict[str, Any]) -> None:
        document["padding"] = {"strategy": "BatchLongest"}
        document["truncation"] = {"max_length": 5}
        merges = document["model"]["merges"]
        document["model"]["merges"] = [
            " ".join(merge) if isinstance(merge, list) else merge.split(" ") for merge in merges
        ]

    edit(checkpoint / "tokenizer.json", incidental)
    assert fingerprint(checkpoint) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document["model"]["vocab"].update({"new": 299}),
        lambda document: document["model"]["merges"].pop(),
        lambda document: document["added_tokens"].pop(),
        lambda document: document.update(normalizer={"type": "Lowercase"}),
        lambda document: document["pre_tokenizer"].update(add_prefix_space=True),
    ],
    ids=["vocabulary", "merges", "added-tokens", "normaliser", "splitting"],
)
def test_what_changes_tokens_changes_the_tokenizers_hash(
    checkpoint: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    before = fingerprint(checkpoint)
    edit(checkpoint / "tokenizer.json", change)
    (difference,) = before.incompatibilities(fingerprint(checkpoint))
    assert (difference.field, difference.fatal) == ("tokenizer_sha256", True)


def test_the_chat_template_counts_wherever_it_is_kept(checkpoint: Path) -> None:
    in_a_file = fingerprint(checkpoint)
    (checkpoint / "chat_template.jinja").unlink()
    assert fingerprint(checkpoint).chat_template_sha256 is None
    config = checkpoint / "tokenizer_config.json"
    edit(config, lambda document: document.update(chat_template=CHAT_TEMPLATE))
    assert fingerprint(checkpoint) == in_a_file
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHAT_TEMPLATE}]
    edit(config, lambda document: document.update(chat_template=named))
    assert fingerprint(checkpoint) == in_a_file
    (checkpoint / "chat_template.jinja").write_text("another")
    (difference,) = in_a_file.incompatibilities(fingerprint(checkpoint))
    assert difference.field == "chat_template_sha256"


def test_sizes_of_the_language_model_count_where_there_is_more_than_one(checkpoint: Path) -> None:
    before = fingerprint(checkpoint)

    def nest(document: dict[str, Any]) -> None:
        text = {
            key: document.pop(key)
            for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")
        }
        document["text_config"] = {**text, "num_key_value_heads": 2}

    edit(checkpoint / "config.json", nest)
    assert fingerprint(checkpoint) == before


@pytest.mark.parametrize(
    ("break_it", "code"),
    [
        (lambda path: shutil.rmtree(path), "E_MODEL_NOT_FOUND"),
        (lambda path: (path / "config.json").unlink(), "E_MODEL_NOT_FOUND"),
        (lambda path: (path / "config.json").write_text("{half"), "E_MODEL_CONFIG"),
        (lambda path: (path / "config.json").write_text("[]"), "E_MODEL_CONFIG"),
        (lambda path: edit(path / "config.json", lambda d: d.pop("hidden_size")), "E_MODEL_CONFIG"),
        (lambda path: (path / "tokenizer.json").unlink(), "E_MODEL_TOKENIZER"),
    ],
    ids=["no-folder", "no-config", "half-a-config", "list-config", "no-size", "no-tokenizer"],
)
def test_what_is_no_checkpoint_is_refused(
    checkpoint: Path, break_it: Callable[[Path], object], code: str
) -> None:
    break_it(checkpoint)
    with pytest.raises(TrimtabError) as caught:
        fingerprint(checkpoint)
    assert caught.value.code == code
