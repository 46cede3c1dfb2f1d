"""Reading probes on the way through a forward pass: what is read of which token, and the scores' way out.

Memory layout, allocated once per worker, ``P`` readings at most::

    weight     [P, hidden_size] float32    what each reading reads with
    wants      [max_tokens] int32          which readings are wanted of each token, a bit each
    scores     [P, max_tokens] float32     written by the pass where wanted
    counts     [L + 1] int32               0 for layers at which nothing is read in this step

A reading is numbered when it is activated, for good, and every rank numbers alike. Scores leave with the
step's output: copied on the stream that runs the model, fetched when the output is, keyed by the absolute
position of the token that was read. What a preemption makes the engine compute again is read again and
replaces itself.

Only tokens that were asked for cost anything: the last prompt token and generated ones, or the whole prompt
where a request wants its every score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from steering.engine.settings import MAX_READINGS
from steering.engine.transfer import to_device
from steering.ops.read_out import READ_OUTS, read_out_all

if TYPE_CHECKING:
    from steering.engine.step import Batch
    from steering.ops.read_out_triton import ReadingTensors

FloatArray = np.ndarray[Any, np.dtype[np.float32]]
IntArray = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True)
class ReadingPayload:
    """One output of one probe, ready for the tables.

    Attributes:
        id: the same for the same output of the same artefact.
        layer: decoder layer whose output is read; the number of layers for the final norm's output.
        read_out: ``affine`` or ``cosine``.
        weight: ``[hidden_size] float32``.
        bias: of an affine read-out.
    """

    id: str
    layer: int
    read_out: str
    weight: FloatArray
    bias: float

    def to_wire(self) -> dict[str, Any]:
        """msgpack-native form for vLLM's ``collective_rpc``."""
        return {
            "id": self.id,
            "layer": self.layer,
            "read_out": self.read_out,
            "weight": np.ascontiguousarray(self.weight, dtype="<f4").tobytes(),
            "bias": self.bias,
        }

    @classmethod
    def from_wire(cls, data: dict[str, Any]) -> ReadingPayload:
        """Read :meth:`to_wire`'s form."""
        weight = np.frombuffer(data["weight"], dtype="<f4")
        return cls(data["id"], int(data["layer"]), data["read_out"], weight, float(data["bias"]))


@dataclass(frozen=True)
class Wanted:
    """What one request wants read.

    Attributes:
        readings: their numbers, ascending.
        prompt: of every prompt token too.
    """

    readings: tuple[int, ...]
    prompt: bool = False

    @cached_property
    def mask(self) -> int:
        """A bit for each reading."""
        return sum(1 << n for n in self.readings)


class ProbeReader:
    """One worker's readings.

    Attributes:
        due: by layer, the readings and tokens of this pass; only for a CPU. ``None`` is every token.
    """

    def __init__(
        self, num_layers: int, hidden_size: int, max_tokens: int, device: torch.device
    ) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.device = device
        self.on_host = device.type == "cpu"
        self.num_layers = num_layers
        self.hidden_size = hidden_size
        self.ids: list[str] = []
        self.layers: list[int] = []
        self.kinds: list[int] = []
        self.weight = zeros(MAX_READINGS, hidden_size)
        self.bias = zeros(MAX_READINGS)
        self.read_out = zeros(MAX_READINGS, dtype=torch.int32)
        self.layer = zeros(MAX_READINGS, dtype=torch.int32) - 1
        self.wants = zeros(max_tokens, dtype=torch.int32)
        self.scores = zeros(MAX_READINGS, max_tokens)
        self.counts = zeros(num_layers + 1, dtype=torch.int32)
        self.due: dict[int, tuple[list[int], torch.Tensor | None]] = {}
        self._spans: list[tuple[str, Wanted, int, int]] = []
        self._tokens: np.ndarray[Any, np.dtype[np.int64]] = np.zeros(0, dtype=np.int64)
        self._filled = 0

    @cached_property
    def tensors(self) -> ReadingTensors:
        """What the CUDA form reads and writes; their addresses never change."""
        from steering.ops.read_out_triton import ReadingTensors

        return ReadingTensors(
            weight=self.weight,
            bias=self.bias,
            read_out=self.read_out,
            layer=self.layer,
            wants=self.wants,
            scores=self.scores,
            layer_counts=self.counts,
        )

    def activate(self, reading: ReadingPayload) -> None:
        """Number a reading; the same id again changes nothing.

        Raises:
            ValueError: another width, a layer that the model lacks, a number that is not finite, or one
                reading too many.
        """
        if reading.id in self.ids:
            return
        number = len(self.ids)
        if number == MAX_READINGS:
            raise ValueError(f"a server reads at most {MAX_READINGS} outputs of probes")
        if reading.weight.shape != (self.hidden_size,):
            raise ValueError(
                f"a probe is {len(reading.weight)} wide, the residual stream {self.hidden_size}"
            )
        if not 0 <= reading.layer <= self.num_layers:
            raise ValueError(
                f"a probe reads layer {reading.layer}, the model has layers 0 to "
                f"{self.num_layers - 1}"
            )
        if not (np.isfinite(reading.weight).all() and np.isfinite(reading.bias)):
            raise ValueError("a probe holds a number that is not finite")
        if reading.read_out not in READ_OUTS:
            raise ValueError(f"a probe of kind {reading.read_out}")
        kind = READ_OUTS.index(reading.read_out)
        self.weight[number] = to_device(reading.weight, self.device)
        self.bias[number] = reading.bias
        self.read_out[number] = kind
        self.layer[number] = reading.layer
        self.ids.append(reading.id)
        self.layers.append(reading.layer)
        self.kinds.append(kind)

    # Before a pass.

    def clear(self) -> None:
        """Read nothing in the next forward pass."""
        if self._filled:
            self.wants[: self._filled].zero_()
            self.counts.zero_()
            self.due = {}
            self._spans = []
            self._filled = 0

    def fill(self, wanted: Sequence[Wanted | None], batch: Batch) -> None:
        """Mark what is to be read in the next forward pass; ``None`` stands for nothing."""
        masks = np.array([0 if w is None else w.mask for w in wanted], dtype=np.int32)
        whole = np.array([w is not None and w.prompt for w in wanted], dtype=np.bool_)
        computed, scheduled = batch.computed, batch.scheduled
        first = np.cumsum(scheduled) - scheduled
        start = np.maximum(computed, np.where(whole, 0, batch.prompt_lengths - 1))
        count = np.where(masks > 0, np.maximum(computed + scheduled - start, 0), 0)
        total = int(count.sum())
        if total == 0:
            self.clear()
            return
        tokens = int(scheduled.sum())
        begins = np.repeat(first + start - computed, count)
        within = np.arange(total) - np.repeat(np.cumsum(count) - count, count)
        self._tokens = (begins + within).astype(np.int64)
        self._spans = [
            (batch.request_ids[n], w, int(start[n]), int(count[n]))
            for n, w in enumerate(wanted)
            if w is not None and count[n]
        ]
        of_token = np.repeat(masks, count)
        any_mask = int(np.bitwise_or.reduce(of_token))
        at = sorted({self.layers[n] for n in range(len(self.ids)) if any_mask >> n & 1})
        # What the pass does not write must not be taken for a score.
        self.scores[: len(self.ids), :tokens].fill_(torch.nan)
        if self.on_host:
            self._expect(at, of_token, any_mask, tokens)
            self._filled = tokens
            return
        wants = np.zeros(max(tokens, self._filled), dtype=np.int32)
        wants[self._tokens] = of_token
        counts = np.zeros(len(self.counts), dtype=np.int32)
        counts[at] = 1
        # Rows behind the batch may be run as padding: nothing is read of them.
        self.wants[: len(wants)].copy_(to_device(wants, self.device))
        self.counts.copy_(to_device(counts, self.device))
        self._filled = tokens

    def _expect(self, at: list[int], of_token: IntArray, any_mask: int, tokens: int) -> None:
        uniform = bool((of_token == of_token[0]).all())
        everything = None if len(self._tokens) == tokens else torch.from_numpy(self._tokens)
        self.due = {}
        for layer in at:
            numbers = [n for n, of in enumerate(self.layers) if of == layer and any_mask >> n & 1]
            index = everything
            if not uniform:
                asked = of_token & sum(1 << n for n in numbers) != 0
                index = torch.from_numpy(self._tokens[asked])
            self.due[layer] = (numbers, index)

    # During a pass, on a CPU.

    def read_on_host(self, layer: int, x: torch.Tensor, rest: torch.Tensor | None) -> None:
        """Read what is due at a layer.

        Args:
            layer: decoder layer, or the number of layers for the final norm.
            x: ``[T, hidden_size]`` or ``[1, T, hidden_size]``.
            rest: like ``x``; the activation is ``x + rest``.
        """
        numbers, tokens = self.due[layer]
        h = x.view(-1, x.shape[-1])
        others = None if rest is None else rest.view(-1, rest.shape[-1])
        if tokens is not None:
            h = h.index_select(0, tokens)
            others = None if others is None else others.index_select(0, tokens)
        h = h.float()
        if others is not None:
            h = h + others
        run = slice(numbers[0], numbers[-1] + 1)
        weight, bias = self.weight[run], self.bias[run]
        if len(numbers) != len(weight):
            chosen = [n - numbers[0] for n in numbers]
            weight, bias = weight[chosen], bias[chosen]
        scores = read_out_all(h, weight, bias, [self.kinds[n] for n in numbers])
        for n, row in zip(numbers, scores, strict=True):
            if tokens is None:
                self.scores[n, : len(row)] = row
            else:
                self.scores[n].index_copy_(0, tokens, row)

    # After a pass.

    def take(self) -> ScoreSnapshot | None:
        """The scores of the pass that has just been queued; ``None`` for none."""
        spans, self._spans = self._spans, []
        if not spans:
            return None
        count = len(self.ids)
        if self.on_host:
            return ScoreSnapshot(spans, self.scores.numpy()[:count, self._tokens], None)
        index = to_device(self._tokens, self.device)
        values = self.scores[:count].index_select(1, index).to("cpu", non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return ScoreSnapshot(spans, values, event)


class ScoreSnapshot:
    """The scores of one step, on their way to the host."""

    def __init__(
        self,
        spans: list[tuple[str, Wanted, int, int]],
        values: FloatArray | torch.Tensor,
        event: torch.cuda.Event | None,
    ) -> None:
        self._spans = spans
        self._values = values
        self._event = event

    def by_request(self) -> dict[str, list[Any]]:
        """``[position, numbers, scores]`` by request, msgpack-native; waits for the device.

        ``scores`` are the bytes of ``[len(numbers), n] float32``, of the tokens from ``position`` on.
        """
        if self._event is not None:
            self._event.synchronize()
        values = self._values.numpy() if isinstance(self._values, torch.Tensor) else self._values
        found: dict[str, list[Any]] = {}
        at = 0
        for request_id, wanted, start, count in self._spans:
            part = values[list(wanted.readings), at : at + count]
            found[request_id] = [start, list(wanted.readings), part.astype("<f4").tobytes()]
            at += count
        return found
