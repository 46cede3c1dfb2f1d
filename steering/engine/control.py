"""Making plans active on every worker of an engine, from the API process.

A plan is active when every rank of every engine that this process reaches has confirmed it; until then no
request is admitted under it. One rank that refuses fails the activation, not the answers.

Extension point, checked against vLLM 0.32 and 0.33: ``LLM.collective_rpc`` for offline engines; served ones
are called by :mod:`steering.engine.rank_calls`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

from directions.errors import TrimtabError
from directions.store import Store
from steering.engine.admission import Frontend, attach_frontend, frontend_of
from steering.engine.identity import NAME
from steering.engine.ledger import SlotLedger
from steering.engine.payload import PlanPayload, build_payload
from steering.engine.probe_reader import ReadingPayload
from steering.engine.rank_calls import Answer, call_ranks, place
from steering.engine.site_checks import check_readings, check_sites
from steering.plan import Plan
from steering.readings import Reading
from steering.thinking import ThinkingTracker

# A row set larger than this is sent in a call of its own, so that no single message grows with the
# number of policies.
_BATCH_BYTES = 64 * 2**20


def _frontend(engine: Any) -> Frontend:
    frontend = frontend_of(engine.input_processor)
    if frontend is None:
        config = engine.vllm_config
        factors = (config.additional_config or {}).get(NAME)
        if factors is None:
            raise TrimtabError(
                "E_PLUGIN_ABSENT",
                "this engine was configured without the Trimtab plug-in: it failed to load, or "
                "TRIMTAB_ENGINE=1 was not set when the engine was made",
                field="engine",
            )
        processes = max(getattr(config.parallel_config, "_api_process_count", 1) or 1, 1)
        frontend = Frontend(SlotLedger(factors["slots"], processes))
        attach_frontend(engine, frontend)
    return frontend


def _payloads(engine: Any, plans: Iterable[Plan], store: Store) -> list[PlanPayload]:
    config = engine.vllm_config.model_config
    return [
        build_payload(
            plan, store, config.hf_text_config.num_hidden_layers, config.get_hidden_size()
        )
        for plan in plans
    ]


def _batches(payloads: Sequence[PlanPayload]) -> Iterable[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    size = 0
    for payload in payloads:
        weight = payload.num_bytes
        if batch and size + weight > _BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(payload.to_wire())
        size += weight
    if batch:
        yield batch


def _confirm(frontend: Frontend, payloads: Sequence[PlanPayload], ranks: Sequence[Answer]) -> None:
    for payload in payloads:
        missing = [place(rank) for rank in ranks if payload.id not in rank["plans"]]
        if missing:
            raise TrimtabError(
                "E_ACTIVATION",
                f"{', '.join(missing)} did not take plan {payload.id[:12]}",
                field="engine",
            )
        if len(payload.rows) > frontend.ledger.capacity:
            raise TrimtabError(
                "E_SLOTS",
                f"a policy needs {len(payload.rows)} slots at once, this process has "
                f"{frontend.ledger.capacity}",
                field="--slots",
            )
        for engine in {rank["engine"] for rank in ranks}:
            check_sites(payload, [rank for rank in ranks if rank["engine"] == engine])


async def rank_status(engine: Any) -> list[Answer]:
    """Every rank's facts, as ``steering.engine.worker.SteeringWorker.status`` gives them, and its place.

    Raises:
        TrimtabError: ``E_PLUGIN_ABSENT``.
    """
    _frontend(engine)
    return await call_ranks(engine, "trimtab_status")


async def activate_payloads(
    engine: Any, payloads: Sequence[PlanPayload], plans: Iterable[Plan]
) -> Frontend:
    """:func:`activate` for plans that are multiplied out already."""
    frontend = _frontend(engine)
    plans = list(plans)
    ranks = await rank_status(engine)
    await _track(engine, frontend, plans)
    for batch in _batches(payloads):
        ranks = await call_ranks(engine, "trimtab_activate", batch)
    _confirm(frontend, payloads, ranks)
    frontend.plans.update({plan.id: plan for plan in plans})
    return frontend


async def _track(engine: Any, frontend: Frontend, plans: Iterable[Plan]) -> None:
    """Give every rank the thinking tracker, if these plans are the first to need it."""
    markers = {plan.thinking for plan in plans if plan.thinking is not None}
    if frontend.thinking is not None:
        markers.add(frontend.thinking)
    if len(markers) > 1:
        raise TrimtabError(
            "E_THINKING_MARKERS",
            f"the policies of one server share their thinking markers, these have {sorted(markers)}",
            field="--think-start",
        )
    if not markers or frontend.thinking is not None:
        return
    (pair,) = markers
    tracker = frontend.tracker = _tracker(engine, pair)
    wire = {
        "states": len(tracker.phase_of_state),
        "transitions": tracker.transitions.tobytes(),
        "phases": tracker.phase_of_state.tobytes(),
        "ended": tracker.ended.astype("u1").tobytes(),
        "start": int(tracker.start_state),
    }
    await call_ranks(engine, "trimtab_track", wire)
    frontend.thinking = pair


def _tracker(engine: Any, markers: tuple[str, str]) -> ThinkingTracker:
    size = engine.vllm_config.model_config.get_vocab_size()
    return ThinkingTracker.build(_token_texts(engine.input_processor.tokenizer, size), *markers)


def _token_texts(tokenizer: Any, size: int) -> list[str]:
    """What each token decodes to by itself; ids that the tokenizer does not have, to nothing."""
    known = min(len(tokenizer), size)
    texts = tokenizer.batch_decode(
        [[n] for n in range(known)],
        skip_special_tokens=False,
        clean_up_tokenization_spaces=False,
    )
    return [*texts, *[""] * (size - known)]


async def activate(engine: Any, plans: Iterable[Plan], store: Store | None = None) -> Frontend:
    """Send plans to every worker and admit requests under them once all have confirmed.

    Args:
        engine: vLLM's ``AsyncLLM``.
        plans: compiled for the served model.
        store: where their directions are; the default store if ``None``.

    Raises:
        TrimtabError: ``E_PLUGIN_ABSENT`` when the engine is not steered, ``E_ACTIVATION`` when a rank
            refuses, ``E_SITE_UNHOOKED``, ``E_SLOTS``, or the store's ``E_ARTEFACT_…``.
    """
    plans = list(plans)
    payloads = _payloads(engine, plans, store or Store())
    return await activate_payloads(engine, payloads, plans)


async def activate_readings(
    engine: Any,
    readings: Sequence[Reading],
    store: Store | None = None,
    thinking: tuple[str, str] | None = None,
) -> Frontend:
    """Send probes to every worker and let requests ask for their scores once all have confirmed.

    Args:
        engine: vLLM's ``AsyncLLM``.
        readings: of the served model.
        store: where their probes are; the default store if ``None``.
        thinking: the texts that begin and end thinking, where they are known.

    Raises:
        TrimtabError: ``E_PLUGIN_ABSENT``, ``E_ACTIVATION`` when a rank refuses, ``E_SITE_UNHOOKED``,
            ``E_PROBE_PIPELINE``, or the store's ``E_ARTEFACT_…``.
    """
    frontend = _frontend(engine)
    store = store or Store()
    wire = []
    for reading in readings:
        probe = store.load_probe(f"sha256:{reading.probe}")
        weight, bias = probe.weights[reading.output], float(probe.bias[reading.output])
        payload = ReadingPayload(reading.id, reading.layer, reading.read_out, weight, bias)
        wire.append(payload.to_wire())
    ranks = await rank_status(engine)
    for number in {rank["engine"] for rank in ranks}:
        check_readings(readings, [rank for rank in ranks if rank["engine"] == number])
    ranks = await call_ranks(engine, "trimtab_read", wire)
    numbered = {tuple(rank["readings"]) for rank in ranks}
    if len(numbered) != 1:
        raise TrimtabError("E_ACTIVATION", "the ranks do not number probes alike", field="engine")
    (frontend.readings,) = numbered
    if thinking is not None and frontend.tracker is None:
        frontend.tracker = _tracker(engine, thinking)
    return frontend


async def deactivate(engine: Any, plan_ids: Sequence[str]) -> None:
    """Stop admitting under plans and forget them on every worker; running requests keep them."""
    frontend = _frontend(engine)
    for plan_id in plan_ids:
        frontend.plans.pop(plan_id, None)
    await call_ranks(engine, "trimtab_deactivate", list(plan_ids))


def activate_local(llm: Any, plans: Iterable[Plan], store: Store | None = None) -> Frontend:
    """:func:`activate` for vLLM's offline ``LLM``.

    Requests then name their plan in ``SamplingParams(extra_args={"trimtab": {"plan": …, "strength": …}})``.
    """
    return asyncio.run(activate(_Local(llm), plans, store))


def activate_readings_local(
    llm: Any,
    readings: Sequence[Reading],
    store: Store | None = None,
    thinking: tuple[str, str] | None = None,
) -> Frontend:
    """:func:`activate_readings` for vLLM's offline ``LLM``."""
    return asyncio.run(activate_readings(_Local(llm), readings, store, thinking))


def local_status(llm: Any) -> list[Answer]:
    """:func:`rank_status` for vLLM's offline ``LLM``."""
    return asyncio.run(rank_status(_Local(llm)))


class _Local:
    """An offline ``LLM``, which has one engine, with the part of ``AsyncLLM`` that activation uses."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self.vllm_config = llm.llm_engine.vllm_config
        self.input_processor = llm.llm_engine.input_processor
        self.output_processor = llm.llm_engine.output_processor
        self.engine_core = self

    async def call_utility_all_async(
        self, utility: str, method: str, timeout: float | None, args: Any, kwargs: Any
    ) -> list[Any]:
        return [getattr(self._llm, utility)(method, timeout, args, kwargs)]
