"""What every kind of edit has in common, and how one is added.

An edit kind is one file of this folder: a closed pydantic model of its keys, derived from
:class:`EditSpec`, that can say what it comes to on a given model. A field of
:class:`steering.policy.Edit`, named after the kind, is all that makes it known. Kind names are
permanent: new behaviour is a new kind, so a stored policy never changes its meaning.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from directions.card import ModelFingerprint
from directions.store import Store
from steering.policy_errors import PathParts, PolicyError

Additions = dict[tuple[str, int], float]
"""What an edit adds to the residual stream at request strength 1.

``(artefact sha256, layer) -> coefficient`` of the stored vector of that layer.
"""


class ClosedModel(BaseModel):
    """Immutable, no unknown keys, nothing coerced: ``"0.5"`` and ``true`` are not numbers."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


def _no_negative_zero(value: float) -> float:
    return value + 0.0


FiniteFloat = Annotated[float, Field(allow_inf_nan=False), AfterValidator(_no_negative_zero)]
"""A finite number; -0.0 becomes 0.0, so that the two spellings compare and hash alike."""


@dataclass
class Target:
    """What a policy is compiled for, and where faults found on the way are gathered.

    Attributes:
        store: where artefacts come from.
        model: the served model.
        strength_limit: the largest magnitude of strength that a request may ask of this policy.
        relative_ceiling: the largest ``relative`` strength that may be reached.
        path: where in the document the edit stands.
        errors: the faults so far.
    """

    store: Store
    model: ModelFingerprint
    strength_limit: float
    relative_ceiling: float
    path: PathParts = ()
    errors: list[PolicyError] = field(default_factory=list)

    def refuse(self, code: str, key: str, message: str, expected: str | None = None) -> None:
        """Note a fault of the edit's ``key`` and carry on, so that later ones are found too."""
        self.errors.append(PolicyError(code, message, (*self.path, key), expected=expected))


class EditSpec(ClosedModel):
    """The keys of one kind of edit."""

    @property
    @abstractmethod
    def references(self) -> dict[str, str]:
        """The artefacts that the edit names: key -> reference."""

    @abstractmethod
    def compile(self, target: Target) -> Additions:
        """What the edit comes to on ``target.model``.

        Faults go to :meth:`Target.refuse`; what is returned after one is not used.
        """
