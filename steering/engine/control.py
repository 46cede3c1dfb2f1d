"""Making plans active on every worker of an engine, from the API process.

A plan is active when every rank of every engine that this process reaches has confirmed it; until then no
request is admitted under it. One rank that refuses fails the activation, not the answers.

Extension points, checked against vLLM 0.32 and 0.33: ``AsyncLLM.collective_rpc`` (broadcast to all data
parallel engines; an exception on any rank is raised here, the return value is the first engine's),
``LLM.collective_rpc`` for an engine in this process.
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
from steering.plan import Plan

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
        weight = sum(row.vectors.nbytes for row in payload.rows)
        if batch and size + weight > _BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(payload.to_wire())
        size += weight
    if batch:
        yield batch


def _confirm(frontend: Frontend, payloads: Sequence[PlanPayload], ranks: Any) -> None:
    hooked = {layer for rank in ranks for layer in rank["hooked_layers"]}
    for payload in payloads:
        missing = [n for n, rank in enumerate(ranks) if payload.id not in rank["plans"]]
        if missing:
            raise TrimtabError(
                "E_ACTIVATION",
                f"ranks {missing} did not take plan {payload.id[:12]}",
                field="engine",
            )
        if len(payload.rows) > frontend.ledger.capacity:
            raise TrimtabError(
                "E_SLOTS",
                f"a policy needs {len(payload.rows)} slots at once, this process has "
                f"{frontend.ledger.capacity}",
                field="--slots",
            )
        unhooked = sorted({n for row in payload.rows for n in row.layers} - hooked)
        if unhooked:
            raise TrimtabError(
                "E_SITE_UNHOOKED",
                f"a policy edits layers {unhooked}, which this server was started without",
                field="--steering-layers",
            )


def _refused(error: Exception) -> TrimtabError:
    # An executor in this process says the first, one with processes of its own the second.
    unknown = ("is not implemented", "has no attribute 'trimtab_")
    if any(words in str(error) for words in unknown):
        return TrimtabError(
            "E_PLUGIN_ABSENT",
            "the engine's workers do not know Trimtab: its plug-in failed to load there; look for "
            "'Failed to load plugin trimtab' further up",
            field="engine",
        )
    return TrimtabError("E_ACTIVATION", f"a worker refused the plans: {error}", field="engine")


async def rank_status(engine: Any) -> list[dict[str, Any]]:
    """Every rank's facts, as ``steering.engine.worker.SteeringWorker.status`` gives them.

    Raises:
        TrimtabError: ``E_PLUGIN_ABSENT``.
    """
    _frontend(engine)
    try:
        ranks: list[dict[str, Any]] = await engine.collective_rpc("trimtab_status")
    except Exception as error:
        raise _refused(error) from error
    return ranks


async def activate_payloads(
    engine: Any, payloads: Sequence[PlanPayload], plans: Iterable[Plan]
) -> Frontend:
    """:func:`activate` for plans that are multiplied out already."""
    frontend = _frontend(engine)
    ranks = await rank_status(engine)
    try:
        for batch in _batches(payloads):
            ranks = await engine.collective_rpc("trimtab_activate", args=(batch,))
    except Exception as error:
        raise _refused(error) from error
    _confirm(frontend, payloads, ranks)
    frontend.plans.update({plan.id: plan for plan in plans})
    return frontend


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


async def deactivate(engine: Any, plan_ids: Sequence[str]) -> None:
    """Stop admitting under plans and forget them on every worker; running requests keep them."""
    frontend = _frontend(engine)
    for plan_id in plan_ids:
        frontend.plans.pop(plan_id, None)
    await engine.collective_rpc("trimtab_deactivate", args=(list(plan_ids),))


def activate_local(llm: Any, plans: Iterable[Plan], store: Store | None = None) -> Frontend:
    """:func:`activate` for vLLM's offline ``LLM``.

    Requests then name their plan in ``SamplingParams(extra_args={"trimtab": {"plan": …, "strength": …}})``.
    """
    return asyncio.run(activate(_Local(llm), plans, store))


class _Local:
    """An offline ``LLM`` with the part of ``AsyncLLM`` that activation uses."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self.vllm_config = llm.llm_engine.vllm_config
        self.input_processor = llm.llm_engine.input_processor
        self.output_processor = llm.llm_engine.output_processor

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> Any:
        return self._llm.collective_rpc(method, args=args)
