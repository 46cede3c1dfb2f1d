"""The card: what an artefact says about itself.

A direction is only numbers. Whether they may be added to a given model's activations, at which
layers and how strongly, is what its card answers: which model it was read from (the fingerprint),
by which method, at which tokens, from which data, how large that model's activations are, and how
good the result is. The card names the tensors by hash, and the card's own hash names the artefact.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated, Final, Literal, Self

import rfc8785
from pydantic import BaseModel, ConfigDict, Field, model_validator

API_VERSION: Final = "trimtab/v1"

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Norm = Annotated[float, Field(allow_inf_nan=False, ge=0.0)]


@dataclass(frozen=True)
class Incompatibility:
    """One way in which a served model is not the model a direction was made on.

    Attributes:
        field: the fingerprint's field.
        expected: what the direction was made on.
        found: what is served.
        fatal: whether the direction must not be used; otherwise it is worth a warning.
    """

    field: str
    expected: str | int | None
    found: str | int | None
    fatal: bool


class _Closed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelFingerprint(_Closed):
    """What makes two checkpoints interchangeable for a direction.

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


class CardDraft(_Closed):
    """A card before its tensors are stored: all that a method knows.

    Attributes:
        method: ``contrast``, ``alignment``, ``import`` …
        position: which tokens were averaged, e.g. ``last-prompt-token``; empty where unknown.
        description: a sentence for people.
        model: the model whose residual stream the vectors live in.
        base_model: the other model, for methods that compare two.
        activation_norms: mean L2 norm of the residual stream after each layer, ``[num_layers]``,
            over the tokens that were averaged; None where it was not measured. Strengths with
            ``unit: relative`` are multiples of these.
        sources: the examples.
        settings: the method's options, for whoever repeats it.
        quality: named figures; what each means is said in ``docs/directions.md``.
        licence: SPDX name of the artefact's own licence, where somebody has decided it.
        dtype: the type the model computed in.
        created: ISO 8601, UTC, to the second.
    """

    apiVersion: Literal["trimtab/v1"] = API_VERSION  # noqa: N815
    kind: Literal["direction"] = "direction"
    method: str = Field(min_length=1, max_length=64)
    position: str = Field(default="", max_length=64)
    description: str = Field(default="", max_length=4096)
    model: ModelFingerprint
    base_model: ModelFingerprint | None = None
    # Strict mode takes no list for a tuple, and JSON has nothing else.
    activation_norms: tuple[Norm | None, ...] = Field(strict=False)
    sources: tuple[Source, ...] = Field(default=(), strict=False)
    settings: dict[str, str | int | Finite | bool] = Field(default_factory=dict)
    quality: dict[str, Finite] = Field(default_factory=dict)
    licence: str | None = None
    dtype: str = Field(min_length=1, max_length=32)
    created: str = Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$")

    @model_validator(mode="after")
    def _one_norm_a_layer(self) -> Self:
        if len(self.activation_norms) != self.model.num_layers:
            raise ValueError(
                f"activation_norms has {len(self.activation_norms)} values "
                f"for {self.model.num_layers} layers"
            )
        return self


class Card(CardDraft):
    """The card of a stored direction.

    Attributes:
        layers: the layers that have a vector, ascending, 0-based.
        tensors_sha256: hash of the bytes of the safetensors file beside the card.
    """

    layers: tuple[int, ...] = Field(strict=False)
    tensors_sha256: Sha256

    @model_validator(mode="after")
    def _layers_ascend_within_the_model(self) -> Self:
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError("layers must ascend without repetition")
        if self.layers and not 0 <= self.layers[0] <= self.layers[-1] < self.model.num_layers:
            raise ValueError(f"layers must lie in 0..{self.model.num_layers - 1}")
        return self

    def canonical(self) -> bytes:
        """The card's one JSON form (RFC 8785): what is stored and hashed."""
        return rfc8785.dumps(self.model_dump(mode="json"))

    def identity(self) -> str:
        """The artefact's identity: sha256 of the canonical form, in hex."""
        return hashlib.sha256(self.canonical()).hexdigest()

    def says_the_same_as(self, other: Card) -> bool:
        """Whether two cards differ at most in when they were made."""
        moment = {"created": other.created}
        return self.model_copy(update=moment) == other
