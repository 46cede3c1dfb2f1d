"""What the engine needs from a vLLM model runner, whichever of the two it is.

vLLM has two model runners with different insides. Everything that depends on which one runs is behind
:class:`RunnerAdapter`; the rest of the worker side sees only requests, tokens and tables.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, Protocol

from steering.engine.stamp import Stamp, read_stamp
from steering.engine.tables import NoFreeSlotError, Placement, SteeringTables

# A child of vLLM's logger, so that it shows where vLLM's own lines do.
logger = logging.getLogger("vllm.trimtab")


class RunnerAdapter(Protocol):
    """The rule book for an adapter.

    ``attach`` runs once, after the model is loaded and before the first forward pass, on the worker's
    main thread. From then on the adapter makes the runner do three things, all on that thread and on
    the stream that runs the model:

    * when a request enters the batch or leaves it for good, call :meth:`WorkerRequests.enter` or
      :meth:`WorkerRequests.leave`; a preempted request that keeps its state does neither;
    * before each forward pass, after the batch is final, call :meth:`SteeringTables.fill` with the
      batch in its order; nothing may be read back from the device to do so;
    * with each step's output, send what :meth:`WorkerRequests.take_reports` returns.

    An adapter never raises for one request's sake and never changes what the runner itself computes.
    """

    def attach(self, runner: Any, tables: SteeringTables, requests: WorkerRequests) -> None:
        """Start steering what ``runner`` runs."""
        ...


@dataclass
class WorkerRequests:
    """The steered requests that a worker has in hand.

    Attributes:
        tables: where their plans are placed.
        heard: whether this rank's reports reach the scheduler. A fault on a rank that nobody hears
            ends the engine: an error for everyone, where silence would be an unsteered answer.
        placements: by engine request id.
    """

    tables: SteeringTables
    heard: bool = True
    placements: dict[str, Placement] = field(default_factory=dict)
    _reports: dict[str, tuple[bool, str | None]] = field(default_factory=dict)

    def enter(self, request_id: str, extra_args: dict[str, Any] | None) -> None:
        """Place a new request's plan, if it has one, and note the outcome.

        Raises nothing on a rank that is heard.
        """
        stamp: Stamp | None = None
        try:
            stamp = read_stamp(extra_args)
            if stamp is None:
                return
            self.leave(request_id)
            self.placements[request_id] = self.tables.place(stamp.plan, stamp.strength)
            self._reports[request_id] = (True, None)
        except KeyError:
            self._reports[request_id] = (False, "plan_unknown")
        except NoFreeSlotError:
            self._reports[request_id] = (False, "slots_exhausted")
        except Exception:
            if not self.heard:
                raise
            logger.exception("placing the plan of request %s failed", request_id)
            self._reports[request_id] = (False, "internal")

    def leave(self, request_id: str) -> None:
        """Release a request's plan, if it has one."""
        placement = self.placements.pop(request_id, None)
        if placement is not None:
            self.tables.release(placement)

    def take_reports(self) -> dict[str, tuple[bool, str | None]]:
        """What became of the plans of the requests that entered since the last call."""
        reports, self._reports = self._reports, {}
        return reports
