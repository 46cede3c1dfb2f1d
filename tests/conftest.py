"""Fixtures that every test folder shares.

Models here are real Hugging Face checkpoints: a tiny random Llama made on the spot for fast tests,
and the demonstration model (SmolLM2-135M-Instruct, fetched once) for those that need real language.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer() -> Any:
    """A byte-level tokenizer of 300 tokens with the chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [
        "The rudder is moved by a small surface on its edge, and the ship turns.",
        "What is the capital of the country where the river meets the sea?",
        "user assistant system: tell me how to trim the sails before the storm.",
    ]
    tokenizer.train_from_iterator(corpus * 4, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=512,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def build_tiny_checkpoint(path: Path, *, seed: int = 0, num_layers: int = 4) -> Path:
    """Save a random Llama with a byte-level tokenizer and a chat template.

    Hidden size 64, 4 heads of width 32, 2 key/value heads, vocabulary 300, float32. The weights are
    drawn wide enough that the next-token distribution is far from uniform, so that a test which
    compares log-probabilities can see a wrong activation. The same seed gives the same bytes.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    wrapped = tiny_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.15,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=wrapped.eos_token_id,
        pad_token_id=wrapped.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(path)
    wrapped.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of a tiny random Llama checkpoint: 4 layers, hidden size 64; see its builder."""
    return build_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """Path of the demonstration model, fetched and converted once under ``$TRIMTAB_HOME``."""
    from directions.demo_model import fetch_demo_model

    return fetch_demo_model()
