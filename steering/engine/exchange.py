"""What one HTTP request's steering is, shared by the HTTP layer and the engine's client side.

The HTTP layer resolves which policy a request runs under and puts an :class:`Exchange` into
:data:`current_exchange` before the request enters vLLM's own handlers. Context variables follow the
request into every task that those handlers start, so admission, which sits much deeper, finds the
exchange whichever API was called and however many engine requests one HTTP request becomes.

The exchange also carries the way back: the worker's word on whether the plan was placed, which is
the only thing that ``applied`` is ever derived from.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal

from directions.errors import TrimtabError
from steering.engine.gate_report import GateReport
from steering.engine.score_log import ScoreLog
from steering.engine.stamp import to_float32
from steering.plan import Plan
from steering.readings import Reading

Mode = Literal["off", "shadow", "enforce"]
Trace = Literal[False, True, "all"]
OnFailure = Literal["closed", "open"]


@dataclass(frozen=True)
class Acknowledgement:
    """The worker's report on one engine request.

    Attributes:
        applied: the plan was in the tables before the request's first forward pass.
        reason: stable lower-case word when it was not, e.g. ``plan_unknown``.
    """

    applied: bool
    reason: str | None = None


@dataclass
class Exchange:
    """One HTTP request's steering, from selection to the report in its answer.

    Attributes:
        policy: ``name@version`` or ``off``.
        mode: the policy's mode.
        on_failure: the policy's failure rule.
        strength: the request's multiplier of the policy's strengths.
        plan: what to apply; ``None`` when there is nothing to (mode off or shadow, strength 0,
            a policy without edits).
        acknowledgements: by engine request id (one per prompt and per ``n``); ``None`` until the
            worker has reported.
        readings: what probes read of it and its answer reports.
        trace: whether the answer reports the score of every token: of generated tokens, or of
            ``all``, the prompt's included.
        scores: by engine request id.
        engine: the number of the data parallel engine that reported last.
        declined: why an ``open`` policy is not applied to a request that runs all the same, e.g.
            ``slots_exhausted``.
        refusal: the error with which the engine's side refused the request. vLLM's handlers reword
            or cut an exception's message on some routes; the HTTP layer answers from this instead.
    """

    policy: str
    mode: Mode
    on_failure: OnFailure
    strength: float
    plan: Plan | None
    acknowledgements: dict[str, Acknowledgement | None] = field(default_factory=dict)
    gates: dict[str, tuple[GateReport, ...]] = field(default_factory=dict)
    readings: tuple[Reading, ...] = ()
    trace: Trace = False
    scores: dict[str, ScoreLog] = field(default_factory=dict)
    engine: int = 0
    declined: str | None = None
    refusal: TrimtabError | None = None
    _choices: dict[str, tuple[str, int]] = field(default_factory=dict)
    _in_order: list[str] | None = None

    def begin(self, request_id: str, prompt_id: str, index: int) -> None:
        """Note an engine request: answer ``index`` to the prompt that vLLM calls ``prompt_id``."""
        self.acknowledgements[request_id] = None
        self._choices[request_id] = (prompt_id, index)
        self._in_order = None
        if self.plan is not None:
            self.gates[request_id] = tuple(
                GateReport(gate.name, fired=False) for gate in self.plan.gates
            )

    def prompt_id(self, request_id: str) -> str | None:
        """What vLLM calls the prompt of an engine request; in most answers, their id."""
        return self._choices.get(request_id, (None, 0))[0]

    def request_of_choice(self, choice: int | None) -> str | None:
        """The engine request of the answer's choice with this index; without, of its last part.

        vLLM numbers the prompts of one HTTP request by a suffix of their ids, and choices by prompt and
        then by answer.
        """

        def order(request_id: str) -> tuple[int, str, int]:
            prompt_id, index = self._choices[request_id]
            suffix = prompt_id.rpartition("-")[2]
            return (int(suffix) if suffix.isdecimal() else 0, prompt_id, index)

        if choice is None:
            return next(reversed(self._choices), None)
        if self._in_order is None:
            self._in_order = sorted(self._choices, key=order)
        return self._in_order[choice] if 0 <= choice < len(self._in_order) else None

    def gates_of_choice(self, choice: int | None) -> tuple[GateReport, ...]:
        """The gates of :meth:`request_of_choice`."""
        return self.gates.get(self.request_of_choice(choice) or "", ())

    def scores_of_choice(self, choice: int | None) -> ScoreLog | None:
        """The scores of :meth:`request_of_choice`."""
        return self.scores.get(self.request_of_choice(choice) or "")

    @property
    def acknowledged(self) -> bool:
        """Every engine request started so far has been reported on (vacuously true without a plan)."""
        if self.plan is None or self.declined is not None:
            return True
        return bool(self.acknowledgements) and all(self.acknowledgements.values())

    def applied(self) -> tuple[bool, str | None]:
        """Whether every engine request so far ran with the plan, and if not, why."""
        if self.declined is not None:
            return False, self.declined
        if self.plan is None:
            if self.mode != "enforce":
                return False, self.mode
            return False, "strength_zero" if to_float32(self.strength) == 0.0 else "no_edits"
        if not self.acknowledgements:
            return False, "not_run"
        for acknowledgement in self.acknowledgements.values():
            if acknowledgement is None:
                return False, "not_acknowledged"
            if not acknowledgement.applied:
                return False, acknowledgement.reason
        return True, None


current_exchange: ContextVar[Exchange | None] = ContextVar("trimtab_exchange", default=None)
