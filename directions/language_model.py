"""A Hugging Face model opened for reading: its tokens, its decoder layers, its own answers."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from directions.errors import TrimtabError
from directions.examples import Example
from directions.model_sites import decoder_layers
from directions.progress import Progress, silent
from directions.quiet import hide_bars

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Reading:
    """How a model is loaded and read.

    Attributes:
        dtype: ``float32`` or ``bfloat16``.
        device: ``cpu``, ``cuda``, ``cuda:1`` …, or ``auto`` (CUDA where there is one).
        batch_size: sequences in one forward pass.
        chat_template: whether prompts go through the tokenizer's chat template, where it has one.
    """

    dtype: str = "float32"
    device: str = "auto"
    batch_size: int = 8
    chat_template: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise TrimtabError("E_DTYPE", f"no dtype {self.dtype!r}", expected=", ".join(DTYPES))
        if self.batch_size < 1:
            raise TrimtabError("E_BATCH_SIZE", f"batch size {self.batch_size}", expected=">= 1")

    def torch_device(self) -> torch.device:
        """The device meant.

        Raises:
            TrimtabError: E_DEVICE where there is no such device here.
        """
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise TrimtabError(
                "E_DEVICE", f"no device {self.device!r} here: {reason}", expected="cpu, cuda, auto"
            ) from error
        return device


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model and its tokenizer, ready to read.

    Attributes:
        network: the transformers model, in evaluation mode.
        tokenizer: its tokenizer.
        device: where the model is.
        layers: its decoder layers, in order.
        reading: how it was opened.
    """

    network: Any
    tokenizer: Any
    device: torch.device
    layers: nn.ModuleList
    reading: Reading

    def prompt_tokens(self, example: Example) -> tuple[int, ...]:
        """The rendered prompt as tokens, up to where the answer begins.

        Without a chat template, the contents of the messages are joined by empty lines.

        Raises:
            TrimtabError: E_PROMPT_TEMPLATE where the template refuses the conversation.
        """
        if not self.reading.chat_template or self.tokenizer.chat_template is None:
            text = "\n\n".join(content for _, content in example.messages)
            return tuple(self.tokenizer(text)["input_ids"])
        messages = [{"role": role, "content": content} for role, content in example.messages]
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # jinja's, or whatever a template raises by itself
            raise TrimtabError(
                "E_PROMPT_TEMPLATE", f"the chat template refuses a conversation: {error}"
            ) from error
        return tuple(self.tokenizer(rendered, add_special_tokens=False)["input_ids"])

    def text_tokens(self, text: str, limit: int) -> tuple[int, ...]:
        """The first tokens of an answer's text."""
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"][:limit])

    def room(self) -> int | None:
        """How many tokens a sequence may have; None where the model does not say."""
        limit = getattr(self.network.config, "max_position_embeddings", None)
        return limit if isinstance(limit, int) else None

    def padded(self, rows: Sequence[Sequence[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of tokens as ``[rows, longest] int64`` with their attention mask."""
        longest = max(len(row) for row in rows)
        # What a padding token is does not matter: the mask and causality keep it from real ones.
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for position, row in enumerate(rows):
            place = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
            ids[position, place] = torch.tensor(row, dtype=torch.long)
            mask[position, place] = 1
        return ids.to(self.device), mask.to(self.device)

    def answers(
        self, prompts: Sequence[Sequence[int]], limit: int, progress: Progress = silent
    ) -> list[tuple[int, ...]]:
        """The model's own answers: greedy, at most ``limit`` tokens, without the end token.

        Returns:
            One answer for each prompt, in order; an answer may be empty.
        """
        advance = progress("generate answers", len(prompts))
        found: list[tuple[int, ...]] = [()] * len(prompts)
        ends = self.network.generation_config.eos_token_id
        stop = set(ends) if isinstance(ends, list) else {ends}
        for batch in batches_by_length([len(row) for row in prompts], self.reading.batch_size):
            ids, mask = self.padded([prompts[i] for i in batch], "left")
            with torch.inference_mode():
                output = self.network.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=limit,
                    do_sample=False,
                    num_beams=1,
                    # Greedy ignores these; a checkpoint that sets them would make it warn.
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    pad_token_id=next(iter(stop - {None}), 0),
                )
            for row, index in zip(output[:, ids.shape[1] :].tolist(), batch, strict=True):
                end = next((i for i, token in enumerate(row) if token in stop), len(row))
                found[index] = tuple(row[:end])
            advance(len(batch))
        return found


def batches_by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, the longest first: little padding, and a batch that
    does not fit into memory fails at once and not at the end."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


@contextmanager
def opened(path: Path, reading: Reading, progress: Progress = silent) -> Iterator[LanguageModel]:
    """Load a model for the length of a block.

    Raises:
        TrimtabError: E_MODEL_LOAD (transformers cannot load it), E_MODEL_LAYERS (its decoder layers
            are not found), E_DEVICE.
    """
    hide_bars()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = reading.torch_device()
    advance = progress(f"load {path.name}", 1)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        network, report = AutoModelForCausalLM.from_pretrained(
            path, dtype=DTYPES[reading.dtype], local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # each file format brings errors of its own
        raise TrimtabError(
            "E_MODEL_LOAD", f"{path} cannot be loaded: {error}", field=str(path)
        ) from error
    # transformers fills in weights that are missing with random ones, and goes on.
    missing = sorted(report["missing_keys"]) + [str(key) for key in report["mismatched_keys"]]
    if missing:
        raise TrimtabError(
            "E_MODEL_LOAD",
            f"{path} lacks {len(missing)} weights, {missing[0]} among them",
            field=str(path),
        )
    network = network.to(device).eval()
    advance(1)
    try:
        try:
            layers = decoder_layers(network)
        except ValueError as error:
            raise TrimtabError("E_MODEL_LAYERS", str(error)) from error
        yield LanguageModel(network, tokenizer, device, layers, reading)
    finally:
        del network
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
