"""What a server says about scores, as its clients read it.

These models hold only what the commands show. Keys that they do not know are ignored, so that a
newer server can say more; what they do know must have the right type, so that a table never shows
a number that is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, TypeVar

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError

from server.printable import printable
from server.steering_client import ServerFailedError

Model = TypeVar("Model", bound=BaseModel)

# JSON has arrays only; these are pairs and triples of fixed types.
Pair = Annotated[tuple[int, float], Strict(False)]
PhaseRun = Annotated[tuple[str, int, int], Strict(False)]

_MOST_FAULTS: Final = 3


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)


class Summary(_Answer):
    """One probe's figures of one answer; None where the phase did not occur.

    Attributes:
        prompt_end: the score at the last token of the prompt.
        plateau: the mean of the top tenth of the scores over thinking tokens.
        final: the score at the last token that ends the thinking.
        cliff: ``plateau - final``.
        answer_start: the score at the first token of the answer.
        answer_mean: the mean over the tokens of the answer.
        tokens: how many generated tokens were read.
    """

    prompt_end: float | None = None
    plateau: float | None = None
    final: float | None = None
    cliff: float | None = None
    answer_start: float | None = None
    answer_mean: float | None = None
    tokens: int = 0


class ProbeReport(Summary):
    """One probe's figures with its curve.

    Attributes:
        trace: position of the token that was read, and its score, ascending.
    """

    trace: list[Pair] = Field(default_factory=list)


class SteeringReport(_Answer):
    """The ``steering`` object of one choice.

    Attributes:
        phases: phase, first and last position of each run of tokens that was read.
    """

    policy: str
    mode: str
    applied: bool
    reason: str | None = None
    strength: float | None = None
    probes: dict[str, ProbeReport] = Field(default_factory=dict)
    phases: list[PhaseRun] = Field(default_factory=list)
    gates: dict[str, Any] | None = None


class Running(_Answer):
    """One running request and one probe that reads it."""

    id: str
    policy: str
    mode: str
    probe: str
    phase: str | None = None
    tokens: int = 0
    score: float | None = None
    recent: list[float] = Field(default_factory=list)


class Finished(_Answer):
    """One request that ended, and one probe that read it.

    Attributes:
        ended: when, in seconds since 1970.
    """

    id: str
    policy: str
    mode: str
    probe: str
    outcome: str
    ended: float
    summary: Summary
    recent: list[float] = Field(default_factory=list)


class LiveDocument(_Answer):
    """``GET /v1/steering/live``: what one API process of a server is reading.

    Attributes:
        process: which of the server's API processes answered.
        finished: newest first.
    """

    model: str
    process: int
    probes: list[str]
    running: list[Running]
    finished: list[Finished]


def read_answer(model: type[Model], document: Mapping[str, Any], where: str = "$") -> Model:
    """A document as one of these models.

    Args:
        model: which.
        document: the parsed JSON.
        where: the document's place in the answer, for the error.

    Raises:
        ServerFailedError: ``E_SERVER_ANSWER``, with the first faults, if it has another form.
    """
    try:
        return model.model_validate(document)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False, include_input=False)
        said = "; ".join(
            _fault(where, fault["loc"], fault["msg"]) for fault in faults[:_MOST_FAULTS]
        )
        more = len(faults) - _MOST_FAULTS
        raise ServerFailedError(
            "E_SERVER_ANSWER",
            "the server's answer has another form than this version reads: "
            + said
            + (f"; and {more} more" if more > 0 else ""),
            expected="a server of the same version as this command",
        ) from error


def _fault(where: str, place: tuple[int | str, ...], message: str) -> str:
    steps = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place)
    return printable(f"{where}{steps}: {message}")
