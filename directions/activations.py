"""Mean activations of a model over examples, after every decoder layer.

The place is the residual stream after decoder layer ``l``, counted from 0: what a forward hook on
that layer sees. (The last entry of transformers' ``hidden_states`` is something else: it has been
through the final norm.) The tokens are chosen by a ``Position``. Each example counts once: its
chosen tokens are averaged first, and the examples' means after that, so long answers weigh no more
than short ones.

Sequences are padded on the right. With causal attention no real token sees a padding token there,
and each keeps its own position number, so a batch gives what its sequences give one by one.

Sums are kept in float64 whatever the model computes in, and they are running sums: memory does not
grow with the number of examples, apart from a bounded sample kept for the quality figures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from directions.errors import TrimtabError
from directions.examples import Example
from directions.language_model import LanguageModel, batches_by_length
from directions.position import Position
from directions.progress import Progress, silent

# Held-out examples kept one by one, for figures that need the spread and not only the mean.
HELD_OUT_SAMPLE = 128

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Passage:
    """One example as tokens, and which of them are averaged.

    Attributes:
        id: the example's id.
        tokens: prompt and answer.
        span: the token positions that are averaged; not empty.
    """

    id: str
    tokens: tuple[int, ...]
    span: range


@dataclass
class Moments:
    """What is kept of the activations of a set of passages.

    The passages fall into two halves, every second one in the order of their ids, so that one half
    can judge what the other says.

    Attributes:
        sums: ``[2, num_layers, hidden_size] float64``: sums of passage means, a half each.
        counts: passages in each half.
        norm_sum: ``[num_layers] float64``: sum of the L2 norms of all averaged tokens.
        num_tokens: how many tokens those are.
        held_out: up to 128 passage means of the second half, ``[num_layers, hidden_size] float32``.
    """

    sums: Float64Array
    counts: list[int]
    norm_sum: Float64Array
    num_tokens: int = 0
    held_out: list[npt.NDArray[np.float32]] = field(default_factory=list)

    @property
    def mean(self) -> Float64Array:
        """Mean over all passages, ``[num_layers, hidden_size] float64``."""
        mean: Float64Array = self.sums.sum(axis=0) / sum(self.counts)
        return mean

    def half_mean(self, half: int) -> Float64Array:
        """Mean over one half's passages, ``[num_layers, hidden_size] float64``."""
        mean: Float64Array = self.sums[half] / self.counts[half]
        return mean


def passages(
    model: LanguageModel,
    examples: Sequence[Example],
    position: Position,
    progress: Progress = silent,
) -> list[Passage]:
    """Turn examples into tokens; where an answer is needed and not given, have the model write it.

    Examples whose answer is empty are left out: they have nothing to average.

    Raises:
        TrimtabError: E_PROMPT_TEMPLATE; E_PROMPT_TOO_LONG; E_EXAMPLES_EMPTY where nothing is left.
    """
    prompts = [model.prompt_tokens(example) for example in examples]
    room = model.room()
    for prompt, example in zip(prompts, examples, strict=True):
        if not prompt or (room is not None and len(prompt) + position.answer_tokens > room):
            raise TrimtabError(
                "E_PROMPT_TOO_LONG",
                f"a prompt has {len(prompt)} tokens: {example.messages[-1][1][:60]!r}",
                expected=f"1 to {room} tokens, with {position.answer_tokens} for the answer",
            )
    answers: list[tuple[int, ...]] = [()] * len(examples)
    if position.answer_tokens:
        answers = [
            model.text_tokens(example.answer, position.answer_tokens) if example.answer else ()
            for example in examples
        ]
        missing = [i for i, example in enumerate(examples) if example.answer is None]
        if missing:
            written = model.answers([prompts[i] for i in missing], position.answer_tokens, progress)
            for index, answer in zip(missing, written, strict=True):
                answers[index] = answer
    found = []
    for example, prompt, answer in zip(examples, prompts, answers, strict=True):
        tokens = prompt + answer
        span = position.span(len(prompt), len(tokens))
        if span:
            # What comes after the last averaged token cannot change it.
            found.append(Passage(example.id, tokens[: span.stop], span))
    if not found:
        raise TrimtabError("E_EXAMPLES_EMPTY", "every answer is empty", field="position")
    return found


def measure(
    model: LanguageModel, passages: Sequence[Passage], progress: Progress = silent, what: str = ""
) -> Moments:
    """Read a model's activations on passages.

    Args:
        model: the model.
        passages: what it reads; at least one.
        progress: told of each passage read.
        what: what to call the passages there.

    Raises:
        TrimtabError: E_ACTIVATIONS_NONFINITE where a mean is NaN or infinite (the model overflows
            in this dtype).
    """
    num_layers = len(model.layers)
    rank = {
        index: place
        for place, index in enumerate(
            sorted(range(len(passages)), key=lambda i: (passages[i].id, i))
        )
    }
    moments: Moments | None = None
    advance = progress(f"read {what or 'activations'}", len(passages))
    lengths = [len(passage.tokens) for passage in passages]
    for batch in batches_by_length(lengths, model.reading.batch_size):
        chosen = [passages[i] for i in batch]
        means, norms = _read_batch(model, chosen)
        if not np.isfinite(means).all():
            raise TrimtabError(
                "E_ACTIVATIONS_NONFINITE",
                f"activations are not finite in {model.reading.dtype}",
                field="--dtype",
                expected="a dtype whose range the model keeps to",
            )
        if moments is None:
            shape = (2, num_layers, means.shape[2])
            moments = Moments(np.zeros(shape), [0, 0], np.zeros(num_layers))
        for row, index in enumerate(batch):
            half = rank[index] % 2
            moments.sums[half] += means[row]
            moments.counts[half] += 1
            if half == 1 and rank[index] // 2 < HELD_OUT_SAMPLE:
                moments.held_out.append(means[row].astype(np.float32))
        moments.norm_sum += norms
        moments.num_tokens += sum(len(passage.span) for passage in chosen)
        advance(len(batch))
    assert moments is not None
    return moments


def _read_batch(
    model: LanguageModel, batch: Sequence[Passage]
) -> tuple[Float64Array, Float64Array]:
    """Means ``[passages, layers, hidden]`` and summed token norms ``[layers]`` of one batch."""
    ids, mask = model.padded([passage.tokens for passage in batch], "right")
    row_of = [row for row, passage in enumerate(batch) for _ in passage.span]
    column_of = [column for passage in batch for column in passage.span]
    rows = torch.tensor(row_of, device=model.device)
    columns = torch.tensor(column_of, device=model.device)
    share = torch.tensor(
        [1.0 / len(passage.span) for passage in batch for _ in passage.span],
        dtype=torch.float64,
        device=model.device,
    )
    means: list[torch.Tensor] = []
    norms: list[torch.Tensor] = []

    def take(hidden: torch.Tensor) -> None:
        picked = hidden[rows, columns].to(torch.float64)
        mean = torch.zeros(len(batch), picked.shape[1], dtype=torch.float64, device=picked.device)
        means.append(mean.index_add_(0, rows, picked * share[:, None]))
        norms.append(picked.norm(dim=-1).sum())

    with torch.inference_mode(), _watching(model, take):
        # The base model stops before the output head, which for a large vocabulary costs as much
        # as many layers and is not looked at.
        model.network.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    if len(means) != len(model.layers):
        raise TrimtabError(
            "E_MODEL_LAYERS", f"{len(means)} of {len(model.layers)} decoder layers ran"
        )
    return torch.stack(means, dim=1).cpu().numpy(), torch.stack(norms).cpu().numpy()


@contextmanager
def _watching(model: LanguageModel, take: Any) -> Iterator[None]:
    """Hand each decoder layer's output, in order, to ``take``."""

    def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        take(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(hook) for layer in model.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
