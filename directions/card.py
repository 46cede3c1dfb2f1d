"""The card: what an artefact says about itself.

An artefact's tensors are only numbers. Whether they may touch a given model's activations, where and
how strongly, is what its card answers: which model they were read from (the fingerprint), by which
method, at which tokens, from which data, and how good the result is. Each kind of artefact (direction,
probe, head set) adds what only it has to say. The card names the tensors by hash, and the card's own
hash names the artefact.

A draft is a card before its tensors are stored: all that a method knows. Storing seals it.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Annotated, Final, Literal, Self

import rfc8785
from pydantic import BaseModel, ConfigDict, Field, model_validator

from directions.errors import TrimtabError

API_VERSION: Final = "trimtab/v1"

MAX_OUTPUTS: Final = 64
"""The most outputs that one probe may have."""

MAX_HEADS: Final = 1 << 16
"""The most heads that one head set may name."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Norm = Annotated[float, Field(allow_inf_nan=False, ge=0.0)]

_OUTPUT_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Incompatibility:
    """One way in which a served model is not the model an artefact was made on.

    Attributes:
        field: the fingerprint's field.
        expected: what the artefact was made on.
        found: what is served.
        fatal: whether the artefact must not be used; otherwise it is worth a warning.
    """

    field: str
    expected: str | int | None
    found: str | int | None
    fatal: bool


class _Closed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelFingerprint(_Closed):
    """What makes two checkpoints interchangeable for an artefact.

    Architecture, sizes, tokenizer and chat template must agree: with any of them different, "layer
    12 at the last prompt token" is another place. The weights are recorded and compared too, but a
    fine-tuned sibling is a legitimate thing to steer, so a difference there is only a warning.

    Attributes:
        architecture: the class named first in the checkpoint's config, e.g. ``LlamaForCausalLM``.
        hidden_size: width of the residual stream.
        num_layers: number of decoder layers.
        num_heads: query heads a layer.
        num_kv_heads: key/value heads a layer.
        tokenizer_sha256: hash of the vocabulary and the rules; see ``directions.fingerprint``.
        chat_template_sha256: hash of the chat template's text; None where there is none.
        weights_sha256: hash of the weight files; None where they were not read.
    """

    architecture: str = Field(min_length=1, max_length=256)
    hidden_size: int = Field(ge=1, le=1 << 20)
    num_layers: int = Field(ge=1, le=1 << 14)
    num_heads: int = Field(ge=1, le=1 << 16)
    num_kv_heads: int = Field(ge=1, le=1 << 16)
    tokenizer_sha256: Sha256
    chat_template_sha256: Sha256 | None = None
    weights_sha256: Sha256 | None = None

    def incompatibilities(self, served: ModelFingerprint) -> list[Incompatibility]:
        """Every field in which a served model differs from this one; empty when none does.

        Weights are compared only where both sides know them.
        """
        found = []
        for field in type(self).model_fields:
            mine, theirs = getattr(self, field), getattr(served, field)
            if mine == theirs:
                continue
            if field == "weights_sha256":
                if mine is not None and theirs is not None:
                    found.append(Incompatibility(field, mine, theirs, fatal=False))
                continue
            found.append(Incompatibility(field, mine, theirs, fatal=True))
        return found


class Source(_Closed):
    """One set of examples that went into an artefact.

    Attributes:
        name: a file's name or ``dataset:NAME``.
        sha256: hash of exactly the examples used, in order; see ``directions.datasets``.
        rows: how many there were.
        role: the side of the difference they are on; ``both`` where both models read them.
        licence: SPDX name where it is known.
    """

    name: str
    sha256: Sha256
    rows: int = Field(ge=0)
    role: Literal["positive", "negative", "both"]
    licence: str | None = None


class Draft(_Closed):
    """What the draft of every kind says.

    Attributes:
        method: ``contrast``, ``alignment``, ``import`` …
        position: which tokens were read, e.g. ``last-prompt-token``; empty where unknown.
        description: a sentence for people.
        model: the model whose activations the artefact is about.
        sources: the examples.
        settings: the method's options, for whoever repeats it.
        quality: named figures; what each means is said in ``docs/directions.md``.
        licence: SPDX name of the artefact's own licence, where somebody has decided it.
        dtype: the type the model computed in.
        created: ISO 8601, UTC, to the second.
    """

    apiVersion: Literal["trimtab/v1"] = API_VERSION  # noqa: N815
    method: str = Field(min_length=1, max_length=64)
    position: str = Field(default="", max_length=64)
    description: str = Field(default="", max_length=4096)
    model: ModelFingerprint
    # Strict mode takes no list for a tuple, and JSON has nothing else.
    sources: tuple[Source, ...] = Field(default=(), strict=False)
    settings: dict[str, str | int | Finite | bool] = Field(default_factory=dict)
    quality: dict[str, Finite] = Field(default_factory=dict)
    licence: str | None = None
    dtype: str = Field(min_length=1, max_length=32)
    created: str = Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$")


class SealedCard(Draft):
    """What the card of every kind of stored artefact says and does.

    Attributes:
        tensors_sha256: hash of the bytes of the safetensors file beside the card.
    """

    tensors_sha256: Sha256

    def canonical(self) -> bytes:
        """The card's one JSON form (RFC 8785): what is stored and hashed."""
        return rfc8785.dumps(self.model_dump(mode="json"))

    def identity(self) -> str:
        """The artefact's identity: sha256 of the canonical form, in hex."""
        return hashlib.sha256(self.canonical()).hexdigest()

    def says_the_same_as(self, other: SealedCard) -> bool:
        """Whether two cards differ at most in when they were made."""
        moment = {"created": other.created}
        return self.model_copy(update=moment) == other


class CardDraft(Draft):
    """The draft of a direction's card.

    Attributes:
        base_model: the other model, for methods that compare two.
        activation_norms: mean L2 norm of the residual stream after each layer, ``[num_layers]``,
            over the tokens that were averaged; None where it was not measured. Strengths with
            ``unit: relative`` are multiples of these.
    """

    kind: Literal["direction"] = "direction"
    base_model: ModelFingerprint | None = None
    activation_norms: tuple[Norm | None, ...] = Field(strict=False)

    @model_validator(mode="after")
    def _one_norm_a_layer(self) -> Self:
        if len(self.activation_norms) != self.model.num_layers:
            raise ValueError(
                f"activation_norms has {len(self.activation_norms)} values "
                f"for {self.model.num_layers} layers"
            )
        return self


class Card(CardDraft, SealedCard):
    """The card of a stored direction.

    Attributes:
        layers: the layers that have a vector, ascending, 0-based.
    """

    layers: tuple[int, ...] = Field(strict=False)

    @model_validator(mode="after")
    def _layers_ascend_within_the_model(self) -> Self:
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError("layers must ascend without repetition")
        if self.layers and not 0 <= self.layers[0] <= self.layers[-1] < self.model.num_layers:
            raise ValueError(f"layers must lie in 0..{self.model.num_layers - 1}")
        return self


class ProbeDraft(Draft):
    """The draft of a probe's card: linear read-outs of one site, one score for each output.

    With ``h`` the activation at the site, ``w`` and ``b`` an output's weights and bias:

    * ``affine``: ``sigmoid(w·h + b)``;
    * ``cosine``: ``cos(h, tanh((w·h / ‖w‖²) w))``, the condition of CAST (Lee et al. 2024,
      arXiv 2409.05907); the bias has no part in it.

    Attributes:
        site: ``residual``, the stream after decoder layer ``layer``; or ``final_norm``, the output
            of the model's final norm.
        layer: 0-based; None exactly where the site is ``final_norm``.
        read_out: how an activation becomes a score.
        calibration: named figures that say what a score means, e.g. thresholds.
        outputs: the outputs' names, 1 to ``MAX_OUTPUTS``, each once: a letter or digit, then up to 63
            letters, digits and ``._-``.

    Raises:
        TrimtabError: E_ARTEFACT_SITE (the site and the layer do not go together, or the model has no
            such layer), E_ARTEFACT_OUTPUTS (too many or no outputs, a bad name, a name twice).
        pydantic.ValidationError: a field of another type.
    """

    kind: Literal["probe"] = "probe"
    site: Literal["residual", "final_norm"]
    layer: int | None = None
    read_out: Literal["affine", "cosine"]
    calibration: dict[str, Finite] = Field(default_factory=dict)
    outputs: tuple[str, ...] = Field(strict=False)

    # Pydantic turns only ValueError into its own error; TrimtabError leaves as it is.
    @model_validator(mode="after")
    def _reads_one_place_of_the_model(self) -> Self:
        if self.site == "final_norm" and self.layer is not None:
            raise TrimtabError(
                "E_ARTEFACT_SITE",
                f"the final norm belongs to no layer, found layer {self.layer}",
                field="$.layer",
                expected="null",
            )
        if self.site == "residual" and (
            self.layer is None or not 0 <= self.layer < self.model.num_layers
        ):
            raise TrimtabError(
                "E_ARTEFACT_SITE",
                f"the residual stream is read after a layer of the model, found {self.layer}",
                field="$.layer",
                expected=f"a layer from 0 to {self.model.num_layers - 1}",
            )
        return self

    @model_validator(mode="after")
    def _outputs_have_names_of_their_own(self) -> Self:
        fault = None
        if not 1 <= len(self.outputs) <= MAX_OUTPUTS:
            fault = f"a probe has 1 to {MAX_OUTPUTS} outputs, found {len(self.outputs)}"
        elif len(set(self.outputs)) < len(self.outputs):
            fault = "two outputs have the same name"
        elif bad := [name for name in self.outputs if not _OUTPUT_PATTERN.fullmatch(name)]:
            fault = f"{bad[0][:80]!r} is not the name of an output"
        if fault is not None:
            raise TrimtabError(
                "E_ARTEFACT_OUTPUTS",
                fault,
                field="$.outputs",
                expected=f"1 to {MAX_OUTPUTS} different names of up to 64 of A-Z a-z 0-9 . _ -",
            )
        return self


class ProbeCard(ProbeDraft, SealedCard):
    """The card of a stored probe."""


class HeadSetDraft(Draft):
    """The draft of a head set's card."""

    kind: Literal["head-set"] = "head-set"


class HeadSetCard(HeadSetDraft, SealedCard):
    """The card of a stored head set.

    Attributes:
        heads: ``(layer, query head)``, 0-based, each once, in the order they were given; the
            evidence in the tensors has the same order.

    Raises:
        TrimtabError: E_ARTEFACT_HEADS (none or too many, a head twice, or not in the model).
        pydantic.ValidationError: a field of another type.
    """

    heads: tuple[Annotated[tuple[int, int], Field(strict=False)], ...] = Field(strict=False)

    @model_validator(mode="after")
    def _heads_are_different_heads_of_the_model(self) -> Self:
        layers, heads = self.model.num_layers, self.model.num_heads
        fault = None
        if not 1 <= len(self.heads) <= MAX_HEADS:
            fault = f"a head set has 1 to {MAX_HEADS} heads, found {len(self.heads)}"
        seen = set()
        for layer, head in self.heads:
            if not (0 <= layer < layers and 0 <= head < heads):
                fault = f"the model has no head {head} in layer {layer}"
            elif (layer, head) in seen:
                fault = f"head {head} of layer {layer} is there twice"
            if fault is not None:
                break
            seen.add((layer, head))
        if fault is not None:
            raise TrimtabError(
                "E_ARTEFACT_HEADS",
                fault,
                field="$.heads",
                expected=f"different heads 0 to {heads - 1} of layers 0 to {layers - 1}",
            )
        return self


AnyCard = Card | ProbeCard | HeadSetCard

CARDS: Final[dict[str, type[AnyCard]]] = {
    "direction": Card,
    "probe": ProbeCard,
    "head-set": HeadSetCard,
}
"""The kinds of artefact, and the card of each."""
