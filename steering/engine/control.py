"""Making plans active on every worker of an engine, from the API process.

A plan is active when every rank of every engine that this process reaches has confirmed it; until then no
request is admitted under it. One rank that refuses fails the activation, not the answers.

Extension points, checked against vLLM 0.32 and 0.33: ``AsyncLLM.collective_rpc`` (broadcast to all data
parallel engines; an exception on any rank is raised here, the return value is the first engine's),
``LLM.collective_rpc`` for an engine in this process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from directions.errors import TrimtabError
from directions.store import Store
from steering.engine.admission import Frontend, attach_frontend, frontend_of
from steering.engine.identity import NAME
from steering.engine.ledger import SlotLedger
from steering.engine.payload import PlanPayload, build_payload
from steering.plan import Plan
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


def _confirm(frontend: Frontend, payloads: Sequence[PlanPayload], ranks: Any) -> None:
    hooked: dict[str, set[int]] = {}
    refused: dict[str, str] = {}
    for rank in ranks:
        refused.update(rank["refused"])
        for site, layers in rank["hooked"].items():
            hooked.setdefault(site, set()).update(layers)
    last_stage = ranks[-1]["hooked"]
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
        for site, layers in payload.sites.items():
            missing = sorted(layers - hooked.get(site, set()))
            if missing:
                raise TrimtabError(
                    "E_SITE_UNHOOKED",
                    f"a policy acts on {site} at layers {missing}, which "
                    + (
                        f"this model does not have: {refused[site]}"
                        if site in refused
                        else "this server was started without"
                    ),
                    field="--steering-sites" if site in refused else "--steering-layers",
                )
        # A gate moves a token into another slot on its own rank; other stages would not know.
        for gate in payload.gates:
            if gate.layer not in last_stage.get("gates", ()):
                raise TrimtabError(
                    "E_GATE_PIPELINE",
                    f"gate {gate.name} reads layer {gate.layer}, which runs on a pipeline stage other than "
                    "the last; the last stage could not know what it decided",
                    field="--pipeline-parallel-size",
                    expected=f"a probe at layers {min(last_stage['gates'], default=0)} and above",
                )
        if payload.gates and _acts_before(payload, last_stage):
            raise TrimtabError(
                "E_GATE_PIPELINE",
                "a policy with gates edits layers of a pipeline stage other than the last, which could "
                "not know what the gates decided",
                field="--pipeline-parallel-size",
                expected="edits within the last pipeline stage",
            )


def _acts_before(payload: PlanPayload, last_stage: Mapping[str, Sequence[int]]) -> bool:
    """Whether a plan with gates edits outside of the last pipeline stage."""
    return any(
        layers - set(last_stage.get(site, ()))
        for site, layers in payload.sites.items()
        if site != "gates"
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
    plans = list(plans)
    ranks = await rank_status(engine)
    try:
        await _track(engine, frontend, plans)
        for batch in _batches(payloads):
            ranks = await engine.collective_rpc("trimtab_activate", args=(batch,))
    except Exception as error:
        raise _refused(error) from error
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
    size = engine.vllm_config.model_config.get_vocab_size()
    texts = _token_texts(engine.input_processor.tokenizer, size)
    tracker = ThinkingTracker.build(texts, *pair)
    await engine.collective_rpc(
        "trimtab_track",
        args=(
            {
                "states": len(tracker.phase_of_state),
                "transitions": tracker.transitions.tobytes(),
                "phases": tracker.phase_of_state.tobytes(),
                "ended": tracker.ended.astype("u1").tobytes(),
                "start": int(tracker.start_state),
            },
        ),
    )
    frontend.thinking = pair


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
