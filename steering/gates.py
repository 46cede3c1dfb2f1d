"""Gates: rules on a probe's score that switch edits on.

A probe reads one site: the residual stream after a layer, before that layer's edits, or the output
of the final norm, which counts as the layer after the last. With ``h`` what it reads there and ``w``,
``b`` the probe's weights and bias for the gate's output, the score is::

    affine   sigmoid(w·h + b)
    cosine   cos(h, tanh((w·h / ‖w‖²) w))         (CAST: Lee et al. 2024, arXiv 2409.05907)

and the gate is open iff ``low < score < high``. When it is decided is said by ``at``:

* ``token``: for each token in the scope of an edit that it opens by itself, for the token's later
  layers only.
* ``prompt_end``: at the last prompt token, for what comes after the reading (the stream's edits of
  the same layer, and all later layers) and for all later tokens.
* ``think_end``: where thinking first ends, for what comes after the reading and for all later
  tokens. That is at each token of the first unbroken run of ``think_end`` tokens, which begins with
  the last prompt token if the prompt ends just after its thinking; for what follows, the latest
  decision counts. Ends of thinking after that run decide nothing.

A token at which a gate is decided begins with it closed.

Before its first decision a gate is closed. An edit that gates name is in force where its scope holds
and at least one of them is open.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from directions.card import MAX_OUTPUTS
from directions.errors import TrimtabError
from steering.edits.kind import (
    ClosedModel,
    FiniteFloat,
    NamedArtefact,
    Reference,
    Target,
    one_of,
)
from steering.edits.layers import named_layers
from steering.edits.scope import Phase, ScopePart, phases_of, windows_of
from steering.policy_errors import shown

At = Literal["prompt_end", "think_end", "token"]

MAX_GATES: Final = 3

_LATER: Final[dict[At, frozenset[Phase]]] = {
    "prompt_end": frozenset({"thinking", "think_end", "answer"}),
    "think_end": frozenset({"thinking", "answer"}),
}
"""The phases in which a token may find a gate open that an earlier token decided."""

_SCORES: Final = {"affine": (0.0, 1.0), "cosine": (-1.0, 1.0)}
"""The range of the scores of each read-out."""


def _pair(value: object) -> object:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise PydanticCustomError(
            "E_GATE_THRESHOLD",
            "{found} is not a list of two numbers, lower and upper",
            {"found": shown(value)},
        )
    return tuple(value)


def _apart(value: tuple[float, float]) -> tuple[float, float]:
    low, high = value
    if not low < high:
        raise PydanticCustomError(
            "E_GATE_THRESHOLD",
            "no number lies between {low} and {high}",
            {"low": f"{low:g}", "high": f"{high:g}"},
        )
    return value


def _names(value: object) -> object:
    items = list(value) if isinstance(value, list | tuple) else []
    if not items or not all(isinstance(item, str) for item in items):
        raise PydanticCustomError(
            "E_GATE_EDIT", "{found} is not a list of names of edits", {"found": shown(value)}
        )
    for item in items:
        if items.count(item) > 1:
            raise PydanticCustomError(
                "E_GATE_EDIT", "{found} is named twice", {"found": shown(item)}
            )
    return tuple(sorted(items))


class Gate(ClosedModel):
    """A rule that opens edits.

    Attributes:
        probe: whose score decides, one fixed artefact.
        output: which of the probe's outputs, from 0.
        at: the tokens at which it is decided.
        above: open where the score is greater. Exactly one of the three is given.
        below: open where the score is less.
        between: open where the score is between the two.
        then: the edits that it opens, sorted.
    """

    probe: Reference
    output: Annotated[int, Field(ge=0, le=MAX_OUTPUTS - 1)] = 0
    at: At
    above: FiniteFloat | None = None
    below: FiniteFloat | None = None
    between: (
        Annotated[
            tuple[FiniteFloat, FiniteFloat],
            BeforeValidator(_pair, json_schema_input_type=list[float]),
            AfterValidator(_apart),
        ]
        | None
    ) = None
    then: Annotated[tuple[str, ...], BeforeValidator(_names, json_schema_input_type=list[str])]

    @classmethod
    def key_fault(cls, keys: Collection[str]) -> tuple[str, str] | None:
        return one_of(("above", "below", "between"), keys)

    @property
    def low(self) -> float | None:
        """The score must be greater than this; ``None``: no such bound."""
        return self.above if self.between is None else self.between[0]

    @property
    def high(self) -> float | None:
        """The score must be less than this; ``None``: no such bound."""
        return self.below if self.between is None else self.between[1]

    @property
    def artefact(self) -> NamedArtefact:
        """The probe, with its path inside the gate's keys."""
        return NamedArtefact(("probe",), "probe", self.probe)

    def compile(self, name: str, target: Target) -> PlanGate | None:
        """What the gate comes to on ``target.model``; after a fault, ``None``.

        Faults: ``E_ARTEFACT_…`` (the store's), ``E_PROBE_MODEL``, ``E_PROBE_OUTPUT``,
        ``E_GATE_NEVER``.
        """
        try:
            probe = target.store.load_probe(self.probe)
        except TrimtabError as error:
            target.refuse_missing(error, "probe")
            return None
        if not target.fits(probe.card.model, "E_PROBE_MODEL", "probe"):
            return None
        outputs = len(probe.weights)
        if self.output >= outputs:
            target.refuse(
                "E_PROBE_OUTPUT",
                "output",
                f"{self.probe} has {outputs} output{'s' if outputs > 1 else ''}, counted from 0",
                expected=f"0-{outputs - 1}",
            )
            return None
        lowest, highest = _SCORES[probe.card.read_out]
        if (self.low is not None and self.low >= highest) or (
            self.high is not None and self.high <= lowest
        ):
            key = next(
                key for key in ("above", "below", "between") if getattr(self, key) is not None
            )
            target.refuse(
                "E_GATE_NEVER",
                key,
                f"the scores of {self.probe} are between {lowest:g} and {highest:g}, so the gate "
                "never opens",
                expected=f"within {lowest:g} and {highest:g}",
            )
        layer = probe.card.layer
        return PlanGate(
            name,
            probe.sha256,
            self.output,
            self.at,
            self.low,
            self.high,
            target.model.num_layers if layer is None else layer,
        )

    def check_edit(
        self,
        edit: str,
        scope: Collection[ScopePart],
        layers: Collection[int],
        gate_layer: int,
        target: Target,
    ) -> None:
        """Note a fault if the gate cannot open an edit that it names, or not all of it.

        Args:
            edit: its name.
            scope: its scope.
            layers: where it acts.
            gate_layer: the layer at which the gate reads.

        Faults: ``E_GATE_ORDER``, ``E_GATE_NEVER``.
        """
        early = sorted(layer for layer in layers if layer <= gate_layer)
        read = f"the gate reads layer {gate_layer}"
        if gate_layer == target.model.num_layers:
            read = "the gate reads the final norm"
        if self.at == "token" and early:
            target.refuse(
                "E_GATE_ORDER",
                "then",
                f"{edit} acts at {named_layers(early)}, but {read}, and opens later layers only; "
                "leave the layers out or use a probe of an earlier layer",
            )
        elif (
            self.at != "token"
            and all(layer < gate_layer for layer in layers)
            and not phases_of(scope) & _LATER[self.at]
            and not windows_of(scope)
        ):
            target.refuse(
                "E_GATE_NEVER",
                "then",
                f"{edit} never acts: {read}, all its layers come before at the token that decides, "
                "and its scope holds no later token",
            )


@dataclass(frozen=True)
class PlanGate:
    """A gate on one model.

    Attributes:
        name: as in the policy.
        probe: sha256 of the artefact.
        output: which of its outputs.
        at: the tokens at which it is decided.
        low: open where the score is greater; ``None``: no such bound.
        high: open where the score is less; ``None``: no such bound.
        layer: after which it reads; ``num_layers`` is the final norm.
    """

    name: str
    probe: str
    output: int
    at: At
    low: float | None
    high: float | None
    layer: int
