"""Every metric that Trimtab's HTTP side exposes: declared here, observed from here.

They join vLLM's on the one ``/metrics`` endpoint and share its ``model_name`` label. The ``vllm:``
prefix is not used: vLLM unregisters everything under it when its own loggers start. Labels come
from closed sets only (the names of loaded policies, stable codes and words), so no client can make
a new time series.

With several API processes vLLM sets ``PROMETHEUS_MULTIPROC_DIR`` before it starts them and sums
what they write there; counters add up, and of the gauges each says how it is combined.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from functools import cache
from typing import Final, Literal

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

Outcome = Literal["ok", "error", "refused", "aborted"]

UNRESOLVED: Final = "_unresolved"
"""The policy label of requests refused before a policy was known; no policy can have this name."""


class RequestMetrics:
    """Counters of requests and gauges of slots.

    Args:
        registry: where they are registered; the default one is what ``/metrics`` shows.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._requests = Counter(
            "trimtab_requests",
            "Requests by what became of them. outcome: ok, error, refused, aborted (the client "
            "went away). reason: an E_ code, an HTTP status, or why a policy was not applied.",
            ["model_name", "policy", "mode", "outcome", "reason"],
            registry=registry,
        )
        self._slots = Gauge(
            "trimtab_slots",
            "Slots of the engine's tables: in_use by requests that are running, or free.",
            ["model_name", "state"],
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._build = Gauge(
            "trimtab_build_info",
            "1, with the versions as labels.",
            ["version", "vllm_version"],
            registry=registry,
            multiprocess_mode="livemax",
        )

    def observe_build(self, version: str, vllm_version: str) -> None:
        """Say what is running."""
        self._build.labels(version, vllm_version).set(1)

    def count_request(
        self, *, model_name: str, policy: str, mode: str, outcome: Outcome, reason: str
    ) -> None:
        """Count one finished request.

        Args:
            model_name: the served model's first name, as in vLLM's metrics.
            policy: the policy's name without version, ``off``, or :data:`UNRESOLVED`.
            mode: the policy's mode, empty where none was resolved.
            outcome: what became of the request.
            reason: a stable word or code; empty where there is nothing to explain.
        """
        self._requests.labels(model_name, policy, mode, outcome, reason).inc()

    def follow_slots(self, model_name: str, snapshot: Callable[[], Mapping[str, int]]) -> None:
        """Show the slots' states whenever somebody looks.

        Args:
            snapshot: gives the current count of each state, e.g. ``{"in_use": 1, "free": 31}``.
        """

        def reader(state: str) -> Callable[[], float]:
            return lambda: float(snapshot().get(state, 0))

        for state in snapshot():
            self._slots.labels(model_name, state).set_function(reader(state))

    async def write_slots(
        self, model_name: str, snapshot: Callable[[], Mapping[str, int]], every: float = 1.0
    ) -> None:
        """Write the slots' states down every so many seconds, for ever.

        It stands in for :meth:`follow_slots` where there are several API processes: a scrape is
        answered by one of them, which can read what the others wrote but cannot call them.
        """
        while True:
            for state, count in snapshot().items():
                self._slots.labels(model_name, state).set(count)
            await asyncio.sleep(every)


def several_processes() -> bool:
    """Whether this process's metrics are added up with those of others."""
    return "PROMETHEUS_MULTIPROC_DIR" in os.environ


@cache
def request_metrics() -> RequestMetrics:
    """This process's metrics, registered on first use."""
    return RequestMetrics()
