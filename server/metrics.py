"""Every metric that Trimtab exposes: declared here, observed from here.

They join vLLM's on the one ``/metrics`` endpoint and share its ``model_name`` and ``engine`` labels.
The ``vllm:`` prefix is not used: vLLM unregisters everything under it when its own loggers start.
Labels come from closed sets only (the names of loaded policies and probes, stable codes and words), so
no client can make a new time series; and of the policies only the first :data:`MAX_POLICY_LABELS` have
a label of their own, so no operator makes too many either.

With several API processes vLLM sets ``PROMETHEUS_MULTIPROC_DIR`` before it starts them and sums
what they write there; counters add up, and of the gauges each says how it is combined.
"""

from __future__ import annotations

import asyncio
import os
from array import array
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Final, Literal

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from steering.engine.exchange import Exchange
from steering.policy import Policy
from steering.readings import Reading

Outcome = Literal["ok", "error", "refused", "aborted"]

UNRESOLVED: Final = "_unresolved"
"""The policy label of requests refused before a policy was known; no policy can have this name."""

OTHER: Final = "_other"
"""The policy label of policies beyond the first :data:`MAX_POLICY_LABELS`; no policy can have it."""

MAX_POLICY_LABELS: Final = 64

SCORE_BUCKETS: Final = (0.01, *(round(0.05 * n, 2) for n in range(1, 20)), 0.99, 1.0)
CLIFF_BUCKETS: Final = tuple(round(0.1 * n, 1) for n in range(-10, 11))
OVERHEAD_BUCKETS: Final = (
    1e-5,
    2e-5,
    5e-5,
    1e-4,
    2e-4,
    5e-4,
    1e-3,
    2e-3,
    5e-3,
    1e-2,
    2e-2,
    5e-2,
    0.1,
)

_READ: Final = ["model_name", "engine", "probe", "policy", "variant"]


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
            policy: the policy's label, ``off``, or :data:`UNRESOLVED`.
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


class EngineMetrics:
    """Scores, gates and steps, as the engine reports them; a :class:`steering.engine.observer.Observer`.

    Args:
        registry: where they are registered; the default one is what ``/metrics`` shows.

    Attributes:
        model_name: the label; set when the server knows it.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        def histogram(
            name: str, text: str, labels: list[str], buckets: tuple[float, ...]
        ) -> Histogram:
            return Histogram(name, text, labels, buckets=buckets, registry=registry)

        def counter(name: str, text: str, labels: list[str]) -> Counter:
            return Counter(name, text, labels, registry=registry)

        self.model_name = ""
        self._named: frozenset[str] = frozenset()
        # Finding a series by its labels takes longer than adding to it; this is done for every token.
        self._of_tokens: dict[tuple[int, str, str, str], tuple[Counter, Histogram]] = {}
        self._score = histogram(
            "trimtab_probe_score",
            "Probe scores of finished choices, by what they are of: the prompt's end, the plateau of "
            "thinking, the end of thinking (final), or the mean over the answer.",
            [*_READ, "phase"],
            SCORE_BUCKETS,
        )
        self._cliff = histogram(
            "trimtab_refusal_cliff",
            "Plateau minus final score of finished choices that thought to an end.",
            _READ,
            CLIFF_BUCKETS,
        )
        self._token_score = histogram(
            "trimtab_probe_token_score",
            "Probe scores of generated tokens, each once.",
            _READ,
            SCORE_BUCKETS,
        )
        self._tokens = counter(
            "trimtab_probe_tokens", "Scores of generated tokens that arrived.", _READ
        )
        self._missing = counter(
            "trimtab_probe_tokens_missing",
            "Scores that a finished choice should have and did not get.",
            _READ,
        )
        self._decisions = counter(
            "trimtab_probe_decisions",
            "Scores of finished choices against the threshold of the probe's card, exactly.",
            [*_READ, "phase", "decision"],
        )
        self._gates = counter(
            "trimtab_gate_decisions",
            "Gates of finished choices: open, closed, or undecided where the deciding token did not come.",
            ["model_name", "engine", "policy", "variant", "gate", "decision"],
        )
        self._edited = counter(
            "trimtab_edits_applied_tokens",
            "Tokens computed under at least one edit of the kind; project is ablate and clamp.",
            ["model_name", "engine", "edit_kind"],
        )
        self._overhead = histogram(
            "trimtab_engine_step_overhead_seconds",
            "What the host spends on Trimtab in an engine step in which somebody is steered or read.",
            ["model_name", "engine"],
            OVERHEAD_BUCKETS,
        )
        self._info = Gauge(
            "trimtab_policy_info",
            "1 for each policy that is served, with its version and the first digits of its identity.",
            ["model_name", "policy", "version", "hash", "mode"],
            registry=registry,
            multiprocess_mode="livemax",
        )
        self._generation = Gauge(
            "trimtab_policy_generation",
            "Number of the set of policies that is served; it rises with every change.",
            ["model_name"],
            registry=registry,
            multiprocess_mode="livemax",
        )

    def observe_policies(self, policies: Iterable[Policy], generation: int) -> None:
        """Say what is served; to be called once the model's name is set."""
        served = list(policies)
        self._named = frozenset(policy.name for policy in served[:MAX_POLICY_LABELS]) | {"off"}
        self._info.clear()
        self._of_tokens.clear()
        for policy in served[:MAX_POLICY_LABELS]:
            self._info.labels(
                self.model_name,
                policy.name,
                str(policy.version),
                policy.identity[:12],
                policy.mode,
            ).set(1)
        self._generation.labels(self.model_name).set(generation)

    def policy_label(self, reference: str) -> str:
        """The label of a policy given as ``name@version`` or by name."""
        name = reference.partition("@")[0]
        return name if name in self._named else OTHER

    def _who(self, exchange: Exchange) -> tuple[str, str]:
        variant = "shadow" if exchange.mode == "shadow" else "stable"
        return self.policy_label(exchange.policy), variant

    def read(self, exchange: Exchange, engine: int, reading: Reading, scores: array[float]) -> None:
        """See :class:`steering.engine.observer.Observer`."""
        if not scores:
            return
        who = (engine, reading.label, exchange.policy, exchange.mode)
        series = self._of_tokens.get(who)
        if series is None:
            labels = (self.model_name, str(engine), reading.label, *self._who(exchange))
            series = self._tokens.labels(*labels), self._token_score.labels(*labels)
            self._of_tokens[who] = series
        tokens, histogram = series
        tokens.inc(len(scores))
        for score in scores:
            histogram.observe(score)

    def ended(self, exchange: Exchange, request_id: str, finished: bool) -> None:
        """See :class:`steering.engine.observer.Observer`."""
        if not finished:
            return
        policy, variant = self._who(exchange)
        log = exchange.scores.get(request_id)
        engine = str(log.engine if log is not None else exchange.engine)
        for gate in exchange.gates.get(request_id, ()):
            # A gate per token decides at every token; it has no position unless it opened.
            decided = gate.at is not None or gate.tokens is not None
            decision = "open" if gate.fired else "closed" if decided else "undecided"
            self._gates.labels(self.model_name, engine, policy, variant, gate.name, decision).inc()
        if log is None:
            return
        exemplar = _exemplar(exchange.prompt_id(request_id))
        for n, reading in enumerate(log.readings):
            labels = (self.model_name, engine, reading.label, policy, variant)
            summary = log.summary(n)
            for phase, score in (
                ("prompt_end", summary.prompt_end),
                ("plateau", summary.plateau),
                ("final", summary.final),
                ("answer", summary.answer_mean),
            ):
                if score is None:
                    continue
                self._score.labels(*labels, phase).observe(score, exemplar)
                if reading.threshold is not None:
                    decision = "above" if score > reading.threshold else "below"
                    self._decisions.labels(*labels, phase, decision).inc()
            if summary.cliff is not None:
                self._cliff.labels(*labels).observe(summary.cliff, exemplar)
            self._missing.labels(*labels).inc(summary.missing)

    def stepped(self, engine: int, seconds: float, edited: Mapping[str, int]) -> None:
        """See :class:`steering.engine.observer.Observer`."""
        self._overhead.labels(self.model_name, str(engine)).observe(seconds)
        for kind, tokens in edited.items():
            if tokens:
                self._edited.labels(self.model_name, str(engine), kind).inc(tokens)


def _exemplar(request_id: str | None) -> dict[str, str] | None:
    # An exemplar's labels may have 128 characters in all, names included.
    return None if not request_id else {"request_id": request_id[:100]}


def several_processes() -> bool:
    """Whether this process's metrics are added up with those of others."""
    return "PROMETHEUS_MULTIPROC_DIR" in os.environ


@cache
def request_metrics() -> RequestMetrics:
    """This process's metrics of requests, registered on first use."""
    return RequestMetrics()


@cache
def engine_metrics() -> EngineMetrics:
    """This process's metrics of what the engine reports, registered on first use."""
    return EngineMetrics()
