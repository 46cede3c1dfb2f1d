"""What a method asks of a model at the end of a text: one number, larger where there is more of it.

A probe's log-odds ``w·h + b`` at the probe's site, or the log-odds of what comes next::

    log Σ_{t ∈ for} p(t) − log Σ_{t ∈ against} p(t)

over two sets of first tokens, such as those that begin refusals and those that begin compliances. Both
can be differentiated, and both are linear in the activation that they are read from, up to the final norm
and the weights of the tokens, which is what the direct method needs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from directions.errors import TrimtabError
from directions.language_model import LanguageModel
from directions.model_sites import final_norm
from directions.store import Probe


class Objective:
    """See the module's docstring. An objective belongs to one opened model."""

    @abstractmethod
    def describe(self) -> str:
        """For the card: what is measured."""

    @abstractmethod
    def values(self, model: LanguageModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Run a batch, padded on the right; the objective at the last token of each row.

        Args:
            ids: ``[rows, longest] int64``.
            mask: like ``ids``.

        Returns:
            ``[rows] float32``, differentiable where gradients are on.
        """

    @abstractmethod
    def sensitivity(
        self, model: LanguageModel, ids: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, int]:
        """By what vector a part of the residual stream at the last token enters the objective.

        Runs the batch once. The final norm's divisor and the tokens' weights are those of this pass,
        held fixed.

        Returns:
            ``[rows, hidden_size] float32``, and how many layers' outputs are part of what is read.
        """


@dataclass(frozen=True)
class ProbeObjective(Objective):
    """The log-odds of a probe's output.

    Attributes:
        probe: an affine one.
        output: which of its outputs.
    """

    probe: Probe
    output: int = 0

    def __post_init__(self) -> None:
        if self.probe.card.read_out != "affine":
            raise TrimtabError(
                "E_OBJECTIVE",
                f"{self.probe.reference} is read out by a cosine, which has no log-odds",
                field="--probe",
                expected="an affine probe",
            )
        if not 0 <= self.output < len(self.probe.weights):
            raise TrimtabError(
                "E_PROBE_OUTPUT",
                f"{self.probe.reference} has no output {self.output}",
                field="--output",
                expected=f"0 to {len(self.probe.weights) - 1}",
            )

    def describe(self) -> str:
        name = self.probe.card.outputs[self.output]
        return f"log-odds of {self.probe.reference}/{name}"

    def values(self, model: LanguageModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        h = self._read(model, ids, mask)
        w, b = self._weights(h)
        return h @ w + b

    def sensitivity(
        self, model: LanguageModel, ids: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, int]:
        layer = self.probe.card.layer
        if layer is not None:
            self._read(model, ids, mask)
            w, _ = self._weights(ids)
            return w.expand(len(ids), -1), layer + 1
        with _entering(final_norm(model.network), mask) as seen:
            self._read(model, ids, mask)
        w, _ = self._weights(ids)
        return _through_norm(final_norm(model.network), seen[0], w[None]), len(model.layers)

    def _weights(self, like: torch.Tensor) -> tuple[torch.Tensor, float]:
        weights = torch.tensor(self.probe.weights[self.output], device=like.device)
        return weights.float(), float(self.probe.bias[self.output])

    def _read(self, model: LanguageModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        layer = self.probe.card.layer
        module = final_norm(model.network) if layer is None else model.layers[layer]
        seen: list[torch.Tensor] = []
        handle = module.register_forward_hook(lambda m, i, output: seen.append(_first(output)))
        try:
            model.network.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        finally:
            handle.remove()
        return last(seen[0], mask).float()


@dataclass(frozen=True)
class LogOdds(Objective):
    """The log-odds of the next token.

    Attributes:
        wanted: texts whose first tokens count for it.
        unwanted: texts whose first tokens count against it.
    """

    wanted: tuple[str, ...]
    unwanted: tuple[str, ...]

    def describe(self) -> str:
        return f"log-odds of {' | '.join(self.wanted)} against {' | '.join(self.unwanted)}"

    def tokens(self, model: LanguageModel) -> tuple[list[int], list[int]]:
        """The two sets of first tokens.

        Raises:
            TrimtabError: E_OBJECTIVE where a text is empty or the sets share a token.
        """
        sides = []
        for field, texts in (("--for", self.wanted), ("--against", self.unwanted)):
            found = {tokens[0] for text in texts if (tokens := model.text_tokens(text, 1))}
            if not found or not all(texts):
                raise TrimtabError("E_OBJECTIVE", "no text to begin with", field=field)
            sides.append(found)
        if sides[0] & sides[1]:
            raise TrimtabError(
                "E_OBJECTIVE",
                "the texts for and against begin with the same token",
                field="--against",
                expected="texts whose first tokens differ",
            )
        return sorted(sides[0]), sorted(sides[1])

    def values(self, model: LanguageModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        wanted, unwanted = self.tokens(model)
        logits = self._logits(model, ids, mask)
        return logits[:, wanted].logsumexp(1) - logits[:, unwanted].logsumexp(1)

    def sensitivity(
        self, model: LanguageModel, ids: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, int]:
        wanted, unwanted = self.tokens(model)
        norm = final_norm(model.network)
        with _entering(norm, mask) as seen:
            logits = self._logits(model, ids, mask)
        rows = model.network.get_output_embeddings().weight.float()
        w = (
            logits[:, wanted].softmax(1) @ rows[wanted]
            - logits[:, unwanted].softmax(1) @ rows[unwanted]
        )
        return _through_norm(norm, seen[0], w), len(model.layers)

    def _logits(self, model: LanguageModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        network = model.network
        hidden = network.base_model(
            input_ids=ids, attention_mask=mask, use_cache=False
        ).last_hidden_state
        # Only the last token's row of the vocabulary is looked at.
        logits: torch.Tensor = network.get_output_embeddings()(last(hidden, mask)).float()
        return logits


def last(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The last real token's row of each sequence: ``[rows, …]`` of ``[rows, longest, …]``."""
    ends = mask.sum(dim=1) - 1
    return hidden[torch.arange(len(hidden), device=hidden.device), ends]


@contextmanager
def _entering(module: Any, mask: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """What enters a module at the last token of each row of the pass inside the block."""
    seen: list[torch.Tensor] = []

    def hook(_: Any, inputs: Sequence[Any]) -> None:
        seen.append(last(_first(inputs), mask).float())

    handle = module.register_forward_pre_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def _through_norm(norm: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """``w`` taken back through a root-mean-square norm whose divisor is held: ``gain ⊙ w / rms(x)``.

    Raises:
        TrimtabError: E_NORM_KIND for a norm that also subtracts a mean.
    """
    if "rms" not in type(norm).__name__.lower():
        raise TrimtabError(
            "E_NORM_KIND",
            f"the direct method knows root-mean-square norms, this model ends in {type(norm).__name__}",
            field="--method",
            expected="gradient or causal",
        )
    ones = torch.ones(1, x.shape[1], dtype=next(norm.parameters()).dtype, device=x.device)
    gain = norm(ones).float()
    entering: torch.Tensor = gain * w / x.square().mean(dim=1, keepdim=True).sqrt()
    return entering


def _first(output: Any) -> torch.Tensor:
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found
