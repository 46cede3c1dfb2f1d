"""What every kind of edit has in common, and how one is added.

An edit kind is one file of this folder: a closed pydantic model of its keys, derived from
:class:`EditSpec`, that can say what it comes to on a given model. A field of
:class:`steering.policy.Edit`, named after the kind, is all that makes it known. Kind names are
permanent: new behaviour is a new kind, so a stored policy never changes its meaning.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Final, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from directions.card import ModelFingerprint
from directions.errors import TrimtabError
from directions.store import Store
from steering.policy_errors import PathParts, PolicyError, json_path, shown
from steering.rows import Projection

Additions = Mapping[tuple[str, int | None, int], float]
"""What is added to the residual stream at request strength 1.

``(artefact sha256, vector layer, layer) -> coefficient`` of the stored vector; the vector layer is
``None`` where it is the layer itself.
"""


@dataclass(frozen=True)
class Contribution:
    """What one edit comes to at request strength 1; a row is made of several.

    Attributes:
        add: what it adds.
        projections: what it does along directions, in the order in which it does so.
        heads: ``(layer, query head) -> factor − 1``.
        renormalise: the layers at which it keeps the length of the attention output.
    """

    add: Additions = field(default_factory=dict)
    projections: tuple[Projection, ...] = ()
    heads: Mapping[tuple[int, int], float] = field(default_factory=dict)
    renormalise: frozenset[int] = frozenset()

    @property
    def layers(self) -> frozenset[int]:
        """Every layer that the edit touches, also where its strength there is 0."""
        return frozenset(
            [layer for _, _, layer in self.add]
            + [layer for projection in self.projections for layer, _ in projection.layers]
            + [layer for layer, _ in self.heads]
        )


class ClosedModel(BaseModel):
    """Immutable, no unknown keys, nothing coerced: ``"0.5"`` and ``true`` are not numbers."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    @classmethod
    def key_fault(cls, keys: Collection[str]) -> tuple[str, str] | None:
        """Code and message of what is wrong with the given keys being there together, if anything.

        Asked of the keys alone, so that it is found beside faults of their values.
        """
        return None

    @model_validator(mode="after")
    def _keys_fit(self) -> Self:
        fields = type(self).model_fields
        given = [f.alias or name for name, f in fields.items() if getattr(self, name) is not None]
        fault = self.key_fault(given)
        if fault is not None:
            raise PydanticCustomError(fault[0], "{fault}", {"fault": fault[1]})
        return self


def one_of(choices: Collection[str], keys: Collection[str]) -> tuple[str, str] | None:
    """A :meth:`ClosedModel.key_fault` for keys of which exactly one must be given."""
    given = [choice for choice in choices if choice in keys]
    if len(given) == 1:
        return None
    found = f"found {' and '.join(given)}" if given else "found none"
    return "E_POLICY_CHOICE", f"exactly one of {', '.join(choices)} is needed, {found}"


def _no_negative_zero(value: float) -> float:
    return value + 0.0


FiniteFloat = Annotated[float, Field(allow_inf_nan=False), AfterValidator(_no_negative_zero)]
"""A finite number; -0.0 becomes 0.0, so that the two spellings compare and hash alike."""

_REFERENCE: Final = re.compile(
    r"(?:[a-z0-9][a-z0-9._-]{0,63}@[1-9][0-9]{0,8}|sha256:[0-9a-f]{64})\Z"
)


def check_reference(reference: str) -> str:
    """Refuse what does not name one fixed artefact.

    Raises:
        PydanticCustomError: ``E_POLICY_REFERENCE``.
    """
    # "The latest" would let a policy change its meaning under the same name, version and identity.
    if _REFERENCE.match(reference) is None:
        raise PydanticCustomError(
            "E_POLICY_REFERENCE",
            "{found} does not name one version of an artefact; write NAME@VERSION, "
            "e.g. calm@1, or sha256:<64 hexadecimal digits>",
            {"found": shown(reference)},
        )
    return reference


Reference = Annotated[str, AfterValidator(check_reference)]
"""``name@version`` or ``sha256:<hex>``: always one fixed artefact."""

ArtefactKind = Literal["direction", "probe", "head-set"]

_WARNINGS: Final[dict[ArtefactKind, str]] = {
    "direction": "W_DIRECTION_MODEL",
    "probe": "W_PROBE_MODEL",
    "head-set": "W_HEADS_MODEL",
}


@dataclass(frozen=True)
class NamedArtefact:
    """A place of a policy that names an artefact.

    Attributes:
        path: the place: within the edit's keys, or from the whole document.
        kind: what must be found there.
        reference: the name.
    """

    path: PathParts
    kind: ArtefactKind
    reference: str

    def model(self, store: Store) -> ModelFingerprint:
        """The model that the artefact was made on.

        Raises:
            TrimtabError: ``E_ARTEFACT_…``, the store's.
        """
        if self.kind == "probe":
            return store.load_probe(self.reference).card.model
        if self.kind == "head-set":
            return store.load_head_set(self.reference).card.model
        return store.load(self.reference).card.model

    @property
    def warning_code(self) -> str:
        """Under which a harmless difference of models is reported."""
        return _WARNINGS[self.kind]


@dataclass
class Target:
    """What a policy is compiled for, and where faults found on the way are gathered.

    Attributes:
        store: where artefacts come from.
        model: the served model.
        strength_limit: the largest magnitude of strength that a request may ask of this policy.
        relative_ceiling: the largest ``relative`` strength that may be reached.
        path: where in the document the edit or gate stands.
        errors: the faults so far.
    """

    store: Store
    model: ModelFingerprint
    strength_limit: float
    relative_ceiling: float
    path: PathParts = ()
    errors: list[PolicyError] = field(default_factory=list)

    def refuse(
        self, code: str, at: str | PathParts, message: str, expected: str | None = None
    ) -> None:
        """Note a fault of a key (or of a place inside one) and carry on, so that all are found."""
        inner = (at,) if isinstance(at, str) else at
        self.errors.append(PolicyError(code, message, (*self.path, *inner), expected=expected))

    def refuse_missing(self, error: TrimtabError, at: str | PathParts) -> None:
        """Note that the store cannot load what is named at a place."""
        self.refuse(error.code, at, error.message, error.expected)

    def check_ceiling(self, strength: float, key: str) -> None:
        """Note ``E_STRENGTH_CEILING`` if a ``relative`` strength can be made to pass the ceiling."""
        reached = abs(strength) * self.strength_limit
        if reached > self.relative_ceiling:
            self.refuse(
                "E_STRENGTH_CEILING",
                key,
                f"relative strength {strength:g} times the policy's strength range reaches "
                f"{reached:g}, above this server's ceiling of {self.relative_ceiling:g}",
                expected=f"at most {self.relative_ceiling:g} over the whole strengthRange",
            )

    def fits(self, made_on: ModelFingerprint, code: str, at: str | PathParts) -> bool:
        """Whether an artefact made on one model may be used on this; if not, a fault is noted."""
        differs = [
            f"{difference.field} is {shown(difference.expected)} in the card and "
            f"{shown(difference.found)} in the served model"
            for difference in made_on.incompatibilities(self.model)
            if difference.fatal
        ]
        if differs:
            self.refuse(code, at, "made for another model: " + "; ".join(differs))
        return not differs


class EditSpec(ClosedModel):
    """The keys of one kind of edit."""

    @property
    @abstractmethod
    def artefacts(self) -> tuple[NamedArtefact, ...]:
        """The artefacts that the edit names, with paths inside its keys."""

    @property
    def references(self) -> dict[str, str]:
        """The names of those artefacts, by place: ``direction``, ``plane[0]``."""
        return {
            json_path(named.path).removeprefix("$."): named.reference for named in self.artefacts
        }

    @abstractmethod
    def compile(self, target: Target) -> Contribution | None:
        """What the edit comes to on ``target.model``.

        Faults go to :meth:`Target.refuse`; after one that leaves nothing to work with, ``None``.
        """
