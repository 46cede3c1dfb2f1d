"""What the engine needs from a vLLM model runner, whichever of the two it is.

vLLM has two model runners with different insides. Everything that depends on which one runs is behind
:class:`RunnerAdapter`; the rest of the worker side sees only requests, tokens and tables.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from steering.engine.probe_reader import ScoreSnapshot, Wanted
from steering.engine.request_rows import NoFreeRowError, Placement, Snapshot
from steering.engine.stamp import Stamp, read_stamp
from steering.engine.step import Batch, Edited, Step
from steering.engine.tables import EDIT_KINDS, NoFreeSlotError

# A child of vLLM's logger, so that it shows where vLLM's own lines do.
logger = logging.getLogger("vllm.trimtab")

REPORTS = "trimtab_reports"
"""Attribute of a ``ModelRunnerOutput`` that carries :meth:`Reports.resolve`."""

STEP = "trimtab_step"
"""Attribute of a ``ModelRunnerOutput`` that carries :meth:`Reports.step`."""

_REASONS = {
    KeyError: "plan_unknown",
    NoFreeSlotError: "slots_exhausted",
    NoFreeRowError: "slots_exhausted",
}


class RunnerAdapter(Protocol):
    """The rule book for an adapter.

    ``attach`` runs once, after the model is loaded and before the first forward pass, on the worker's
    main thread. From then on the adapter makes the runner do three things, all on that thread and on
    the stream that runs the model:

    * when a request enters the batch or leaves it for good, call :meth:`WorkerRequests.enter` or
      :meth:`WorkerRequests.leave`; a preempted request may enter again, and does not leave;
    * before each forward pass, after the batch is final, call :meth:`WorkerRequests.prepare` with the
      batch in its order, or :meth:`Step.clear` for a pass without requests; nothing may be read back
      from the device to do so;
    * with each step's output, send what :meth:`WorkerRequests.take_reports` returns, through
      :func:`attach_reports`.

    An adapter never raises for one request's sake and never changes what the runner itself computes.
    """

    def attach(self, runner: Any, requests: WorkerRequests) -> None:
        """Start steering what ``runner`` runs."""
        ...


@dataclass
class Reports:
    """What a step has to tell about its requests.

    Attributes:
        placed: whether each request that entered has its plan, and if not, why.
        gates: of the requests in the step.
        scores: of the tokens that were read in the step.
        edited: how many tokens of the step were edited.
        seconds: what the host spent on Trimtab before and after the step's pass.
    """

    placed: dict[str, tuple[bool, str | None]]
    gates: Snapshot | None
    scores: ScoreSnapshot | None = None
    edited: Edited | None = None
    seconds: float = 0.0

    def step(self) -> list[float]:
        """What the step cost and how many tokens it edited, by kind; waits for the device."""
        edited = [0] * len(EDIT_KINDS) if self.edited is None else self.edited.resolve()
        return [self.seconds, *edited]

    def resolve(self) -> dict[str, dict[str, Any]]:
        """By request, msgpack-native; waits for the device where gates are asked about."""
        reports: dict[str, dict[str, Any]] = {
            request_id: {"applied": applied, "reason": reason}
            for request_id, (applied, reason) in self.placed.items()
        }
        if self.gates is not None:
            for request_id, decisions in self.gates.decisions().items():
                wire = [decision.to_wire() for decision in decisions]
                reports.setdefault(request_id, {})["gates"] = wire
        if self.scores is not None:
            for request_id, found in self.scores.by_request().items():
                reports.setdefault(request_id, {})["scores"] = [found]
        return reports


@dataclass
class WorkerRequests:
    """The steered requests that a worker has in hand.

    Attributes:
        step: the buffers of the next forward pass.
        heard: whether this rank's reports reach the scheduler. A fault on a rank that nobody hears
            ends the engine: an error for everyone, where silence would be an unsteered answer.
        placements: by engine request id.
        reading: what is to be read, by engine request id.
    """

    step: Step
    heard: bool = True
    placements: dict[str, Placement] = field(default_factory=dict)
    reading: dict[str, Wanted] = field(default_factory=dict)
    _stamps: dict[str, Stamp] = field(default_factory=dict)
    _placed: dict[str, tuple[bool, str | None]] = field(default_factory=dict)
    _in_step: list[tuple[str, Placement]] = field(default_factory=list)
    _seconds: float = 0.0

    def enter(self, request_id: str, extra_args: dict[str, Any] | None) -> None:
        """Place a new request's plan, if it has one, and note the outcome.

        A request that is back after a preemption keeps its placement and what its gates decided.
        Raises nothing on a rank that is heard.
        """
        try:
            stamp = read_stamp(extra_args)
            if stamp is None or self._stamps.get(request_id) == stamp:
                return
            if request_id in self._stamps:
                self.leave(request_id)
            if stamp.plan is not None:
                self.placements[request_id] = self._place(stamp.plan, stamp.strength)
                self._placed[request_id] = (True, None)
            if stamp.readings:
                self.reading[request_id] = Wanted(stamp.readings, stamp.whole_prompt)
            self._stamps[request_id] = stamp
        except Exception as error:
            if not self.heard:
                raise
            reason = _REASONS.get(type(error), "internal")
            if reason == "internal":
                logger.exception("placing the plan of request %s failed", request_id)
            self._placed[request_id] = (False, reason)

    def _place(self, plan: str, strength: float) -> Placement:
        tables = self.step.tables
        resident = tables.place(plan)
        try:
            return self.step.requests.take(plan, resident, strength)
        except BaseException:
            tables.release(plan)
            raise

    def leave(self, request_id: str) -> None:
        """Release a request's plan, if it has one, and read it no more."""
        self._stamps.pop(request_id, None)
        self.reading.pop(request_id, None)
        placement = self.placements.pop(request_id, None)
        if placement is not None:
            self.step.requests.give_back(placement)
            self.step.tables.release(placement.plan)

    def prepare(self, batch: Batch) -> None:
        """Describe the next forward pass."""
        if not self._stamps:
            self._in_step = []
            self._seconds = 0.0
            self.step.clear()
            return
        began = time.perf_counter()
        self._describe(batch)
        self._seconds = time.perf_counter() - began

    def _describe(self, batch: Batch) -> None:
        if self.reading:
            self.step.reader.fill([self.reading.get(r) for r in batch.request_ids], batch)
        else:
            self.step.reader.clear()
        found = [self.placements.get(request_id) for request_id in batch.request_ids]
        self._in_step = [
            (request_id, placement)
            for request_id, placement in zip(batch.request_ids, found, strict=True)
            if placement is not None and placement.resident.plan.gates
        ]
        self.step.fill(found, batch)

    def take_reports(self) -> Reports | None:
        """What is to be told with the step that has just been queued; ``None`` for nothing."""
        placed, self._placed = self._placed, {}
        in_step, self._in_step = self._in_step, []
        if not self._seconds:
            return Reports(placed, None) if placed else None
        began = time.perf_counter()
        gates = self.step.requests.snapshot(in_step) if in_step else None
        scores = self.step.reader.take()
        edited = self.step.edited_tokens()
        seconds = self._seconds + time.perf_counter() - began
        self._seconds = 0.0
        return Reports(placed, gates, scores, edited, seconds)


def attach_reports(output: Any, reports: Reports | None) -> Any:
    """Send reports with a model runner's output, now or once it is there."""
    from vllm.v1.outputs import (
        EMPTY_MODEL_RUNNER_OUTPUT,
        AsyncModelRunnerOutput,
        ModelRunnerOutput,
    )

    if reports is None or output is EMPTY_MODEL_RUNNER_OUTPUT:
        return output  # the empty output is shared by everyone, and read by nobody
    if isinstance(output, ModelRunnerOutput):
        _attach(output, reports)
    elif isinstance(output, AsyncModelRunnerOutput):
        original = output.get_output

        def get_output() -> Any:
            inner = original()
            _attach(inner, reports)
            return inner

        output.get_output = get_output
    return output


def _attach(output: Any, reports: Reports) -> None:
    setattr(output, REPORTS, reports.resolve())
    if reports.seconds:
        setattr(output, STEP, reports.step())
