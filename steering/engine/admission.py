"""The one door into the engine: every request passes ``InputProcessor.process_inputs``.

Admission runs in the API process, before the scheduler sees the request. It decides under which plan
the request runs, refuses what cannot be served, stamps the engine request and derives the salt of its
prefix-cache blocks. Here an error reaches one client as a 4xx; in a worker it would end everyone's
requests.

Extension points, checked against vLLM 0.32 and 0.33 (``v1/engine/input_processor.py``,
``v1/engine/output_processor.py``, ``vllm/exceptions.py``):

* ``InputProcessor.process_inputs(request_id, prompt, params, ...)`` returns the ``EngineCoreRequest``,
  before ``n > 1`` is fanned out.
* ``InputProcessor.process_inputs_async``: the same on a thread of the renderer, for raw prompts. Threads
  of an executor do not see context variables, so it is replaced by one that carries them.
* ``BeamSearchOnlineMixin.beam_search`` (``entrypoints/generate/beam_search/online.py``).
* ``VLLMValidationError`` becomes a 400, ``GracefulHTTPError`` the status that it names.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import hashlib
import json
import logging
from dataclasses import replace
from http import HTTPStatus
from typing import Any, Final

from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.sampling_params import SamplingParams

from directions.errors import TrimtabError
from steering.engine.exchange import Exchange, current_exchange
from steering.engine.identity import operators_digest
from steering.engine.ledger import SlotLedger
from steering.engine.observer import Observer
from steering.engine.score_log import ScoreLog
from steering.engine.stamp import KEY, Stamp, read_stamp
from steering.plan import Plan
from steering.thinking import ThinkingTracker

_ATTRIBUTE = "trimtab_frontend"

MOST_PROMPT_SCORES: Final = 65_536
"""Scores of prompt tokens that one answer may ask for."""

# A child of vLLM's logger, so that it shows where vLLM's own lines do.
logger = logging.getLogger("vllm.trimtab")


class SlotsExhaustedError(GracefulHTTPError):  # type: ignore[misc]
    """Every slot is in use; the client may try again."""

    def __init__(self, refusal: TrimtabError) -> None:
        super().__init__(str(refusal), HTTPStatus.TOO_MANY_REQUESTS)


class PlanNotPlacedError(GracefulHTTPError):  # type: ignore[misc]
    """The engine did not apply the plan."""

    def __init__(self, refusal: TrimtabError) -> None:
        super().__init__(str(refusal), HTTPStatus.SERVICE_UNAVAILABLE)


def plan_not_placed(exchange: Exchange | None, reason: str | None) -> PlanNotPlacedError:
    """The error for a request whose plan a worker did not place, noted in its exchange."""
    refusal = TrimtabError(
        "E_PLAN_NOT_PLACED", f"the engine did not apply the policy ({reason}); try again"
    )
    if exchange is not None:
        exchange.refusal = refusal
    return PlanNotPlacedError(refusal)


def _invalid(exchange: Exchange | None, code: str, message: str) -> VLLMValidationError:
    refusal = TrimtabError(code, message)
    if exchange is not None:
        exchange.refusal = refusal
    return VLLMValidationError(str(refusal))


class Frontend:
    """What one API process knows about its engine.

    Args:
        ledger: this process's share of the slots.

    Attributes:
        plans: the plans that every worker has confirmed, by id.
        readings: the ids of the readings that every worker has confirmed, in the order of their numbers.
        requests: unfinished engine requests that are steered or read, by internal request id.
        thinking: the markers that the workers' thinking tracker was made for, once one was sent.
        tracker: tells thinking from answering in this process; ``None`` where the markers are not known.
        observer: who is told of scores, gates and steps.
    """

    def __init__(self, ledger: SlotLedger) -> None:
        self.ledger = ledger
        self.plans: dict[str, Plan] = {}
        self.readings: tuple[str, ...] = ()
        self.requests: dict[str, tuple[Exchange | None, str | None]] = {}
        self.thinking: tuple[str, str] | None = None
        self.tracker: ThinkingTracker | None = None
        self.observer: Observer | None = None

    def decide(self, params: Any, resumable: bool = False) -> Stamp | None:
        """What the request that is being admitted runs under.

        Raises:
            VLLMValidationError: it names a plan that is not active, or cannot be steered at all.
            SlotsExhaustedError: no slot is free and the policy fails closed.
        """
        exchange = current_exchange.get()
        extra_args = params.extra_args if isinstance(params, SamplingParams) else None
        read = None
        if exchange is not None:
            if KEY in (extra_args or {}):
                raise _invalid(
                    exchange,
                    "E_RESERVED_KEY",
                    f"{KEY!r} in vllm_xargs is set by the server; choose a policy with the "
                    "steering field",
                )
            read = self._read(exchange, params, resumable)
            if exchange.plan is None or exchange.declined is not None:
                return read
            stamp = Stamp(exchange.plan.id, exchange.strength)
        else:
            try:
                offline = read_stamp(extra_args)
            except ValueError as error:
                raise _invalid(None, "E_STAMP", str(error)) from None
            if offline is None or offline.strength == 0.0:
                return None
            stamp = offline
        if not isinstance(params, SamplingParams):
            raise _invalid(
                exchange,
                "E_NOT_GENERATION",
                "a policy applies to generation, this request is for pooling",
            )
        if resumable:
            raise _invalid(
                exchange,
                "E_STREAMING_INPUT",
                "a request whose input arrives in pieces cannot be steered",
            )
        plan = self.plans.get(stamp.plan or "")
        if plan is None:
            raise _invalid(
                exchange,
                "E_PLAN_INACTIVE",
                f"plan {(stamp.plan or '')[:12]} is not active on this engine",
            )
        if not self.ledger.can_admit(plan):
            if exchange is not None and exchange.on_failure == "open":
                exchange.declined = "slots_exhausted"
                return read
            refusal = TrimtabError("E_SLOTS_EXHAUSTED", "every steering slot is in use; try again")
            if exchange is not None:
                exchange.refusal = refusal
            raise SlotsExhaustedError(refusal)
        stamp = replace(stamp, phased=plan.phased)
        if read is not None:
            stamp = replace(stamp, readings=read.readings, whole_prompt=read.whole_prompt)
        return stamp

    def _read(self, exchange: Exchange, params: Any, resumable: bool) -> Stamp | None:
        """A stamp for a request that is only read; ``None`` where nothing is read of it."""
        if not exchange.readings or resumable or not isinstance(params, SamplingParams):
            return None
        numbers = []
        for reading in exchange.readings:
            if reading.id not in self.readings:
                raise _invalid(
                    exchange,
                    "E_PROBE_INACTIVE",
                    f"probe {reading.key} is not read on this engine",
                )
            numbers.append(self.readings.index(reading.id))
        whole = exchange.trace == "all"
        return Stamp(None, 1.0, readings=tuple(sorted(numbers)), whole_prompt=whole)

    def enter(self, request: Any, stamp: Stamp, index: int) -> None:
        """Count an engine request that is about to be sent to the engine.

        Args:
            request: vLLM's ``EngineCoreRequest``.
            stamp: what it runs under.
            index: which of the ``n`` answers to its prompt it is.
        """
        exchange = current_exchange.get()
        request_id = request.request_id
        self.requests[request_id] = (exchange, stamp.plan)
        if stamp.plan is not None:
            self.ledger.acquire(stamp.plan, len(self.plans[stamp.plan].rows))
        if exchange is None:
            return
        exchange.begin(request_id, request.external_req_id or request_id, index)
        if stamp.readings:
            prompt = request.prompt_token_ids
            exchange.scores[request_id] = ScoreLog(
                exchange.readings,
                prompt or (),
                len(request.prompt_embeds if prompt is None else prompt),
                self.tracker,
                whole_prompt=stamp.whole_prompt,
            )

    def leave(self, request_id: str, *, finished: bool) -> None:
        """Stop counting an engine request that ended.

        Args:
            finished: whether it came to its own end; otherwise it was given up.
        """
        exchange, plan = self.requests.pop(request_id, (None, None))
        if plan is not None:
            self.ledger.release(plan)
        if exchange is not None and self.observer is not None:
            try:
                self.observer.ended(exchange, request_id, finished)
            except Exception:
                # Here an error would end everybody's requests.
                logger.exception("request %s was not observed", request_id)

    def exchange_of(self, request_id: str) -> Exchange | None:
        """The exchange that an unfinished engine request belongs to."""
        exchange, _ = self.requests.get(request_id, (None, ""))
        return exchange


def derive_salt(client_salt: str | None, stamp: Stamp | None) -> str | None:
    """The salt of a request's prefix-cache blocks.

    Keys and values of later layers depend on every edit before them, so blocks may be shared only by
    requests with the same plan at the same strength. The plan's id covers the content of its directions,
    the operators' digest their meaning. A client's own salt is kept in a name space of its own: whatever
    a client sends, it can neither read nor write the blocks of another plan.
    """
    if stamp is None or stamp.plan is None:
        return None if client_salt is None else f"client:{client_salt}"
    material = json.dumps([client_salt, stamp.plan, stamp.strength, operators_digest()])
    return "trimtab:" + hashlib.sha256(material.encode()).hexdigest()


def wrap_process_inputs(input_processor_class: Any) -> None:
    """Put admission in front of every engine request that the class makes."""
    original = input_processor_class.process_inputs

    @functools.wraps(original)
    def process_inputs(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        frontend = frontend_of(self)
        if frontend is None:
            _refuse_unserved(params)
            return original(self, request_id, prompt, params, *args, **kwargs)
        stamp = frontend.decide(params, resumable=bool(kwargs.get("resumable")))
        _check_id(request_id)
        request = original(self, request_id, prompt, params, *args, **kwargs)
        if stamp is not None and stamp.whole_prompt:
            _check_length(request, len(stamp.readings))
        request.cache_salt = derive_salt(request.cache_salt, stamp)
        if request.sampling_params is not None:
            extra_args = request.sampling_params.extra_args
            if stamp is not None:
                request.sampling_params.extra_args = stamp.to_extra_args(extra_args)
                if stamp.whole_prompt:
                    # Tokens whose keys and values come from the cache are not computed, so not read.
                    request.sampling_params.skip_reading_prefix_cache = True
            elif KEY in (extra_args or {}):
                request.sampling_params.extra_args = {
                    k: v for k, v in extra_args.items() if k != KEY
                }
        return request

    input_processor_class.process_inputs = process_inputs


def _check_id(request_id: str) -> None:
    """Refuse an id that cannot be sent to the engine: half a surrogate pair, which JSON can name.

    vLLM would find out only when it sends the request, and then nobody would take it off the books.
    """
    try:
        request_id.encode()
    except UnicodeEncodeError:
        raise _invalid(
            current_exchange.get(), "E_REQUEST_ID", "the request's id is not valid Unicode"
        ) from None


def _check_length(request: Any, outputs: int) -> None:
    """Refuse more scores of one prompt than an answer should carry, or the event loop write at once."""
    prompt = request.prompt_token_ids
    length = len(request.prompt_embeds if prompt is None else prompt)
    if length * outputs > MOST_PROMPT_SCORES:
        raise _invalid(
            current_exchange.get(),
            "E_TRACE_LENGTH",
            f"{length} prompt tokens under {outputs} outputs of probes are more than "
            f"{MOST_PROMPT_SCORES} scores; ask for a trace of true",
        )


def _refuse_unserved(params: Any) -> None:
    exchange = current_exchange.get()
    extra_args = params.extra_args if isinstance(params, SamplingParams) else None
    if KEY in (extra_args or {}) or (exchange is not None and exchange.plan is not None):
        raise _invalid(exchange, "E_NOT_READY", "no policy is active on this engine yet")


def wrap_beam_search(mixin_class: Any) -> None:
    """Refuse beam search under a plan, whatever route it is asked for on.

    Beam search makes a request of its own of every beam at every token, with the answer so far as its
    prompt, so the phases of the tokens are lost. For the same reason nothing is read of it.
    """
    original = mixin_class.beam_search

    @functools.wraps(original)
    async def beam_search(self: Any, *args: Any, **kwargs: Any) -> Any:
        exchange = current_exchange.get()
        if exchange is not None and exchange.plan is not None:
            raise _invalid(
                exchange, "E_BEAM_SEARCH", f"beam search cannot run under {exchange.policy}"
            )
        if exchange is not None:
            exchange.readings = ()
        async for output in original(self, *args, **kwargs):
            yield output

    mixin_class.beam_search = beam_search


def attach_frontend(engine: Any, frontend: Frontend) -> None:
    """Make an ``AsyncLLM`` or ``LLMEngine`` admit through ``frontend``."""
    setattr(engine.input_processor, _ATTRIBUTE, frontend)
    setattr(engine.output_processor, _ATTRIBUTE, frontend)
    input_processor = engine.input_processor

    async def process_inputs_async(*args: Any, **kwargs: Any) -> Any:
        call = functools.partial(input_processor.process_inputs, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(
            input_processor.renderer._executor, contextvars.copy_context().run, call
        )

    input_processor.process_inputs_async = process_inputs_async


def frontend_of(processor: Any) -> Frontend | None:
    """The frontend of an input or output processor, if its engine has one."""
    frontend: Frontend | None = getattr(processor, _ATTRIBUTE, None)
    return frontend
