"""The start-up proof: a server that cannot steer does not become ready.

Nothing that loads without an error shows that the operators are in the code that runs: compiled code may
come from elsewhere, a plug-in may be missing from one process, a hook may sit on a path that is not taken.
So the running engine is asked for one token, again and again:

1. plain, twice: how much two equal runs differ is the floor;
2. with a known edit at one hooked layer, for every hooked layer: each answer must differ from the plain
   one by far more than the floor;
3. with an edit at the last layer that drowns the stream. The definition ``h ← h + v`` then leaves ``v``
   alone: the final norm removes its length, and the next token's distribution no longer depends on the
   prompt. Two prompts whose plain answers differ must agree;
4. plain again: the edits of the others must have left nothing behind.

With data parallelism every engine is proved by itself: vLLM would spread the questions over all of them, and
an edit that is missing from one would be found or not as it happens.

Extension point, checked against vLLM 0.32 and 0.33: ``AsyncLLM.generate(…, data_parallel_rank=)``, the number
of an engine among those that this process reaches.
"""

from __future__ import annotations

import contextlib
import secrets
from dataclasses import dataclass
from typing import Any

import numpy as np

from directions.errors import TrimtabError
from steering.engine.control import activate_payloads, deactivate, rank_status
from steering.engine.exchange import Exchange, current_exchange
from steering.engine.payload import PlanPayload, RowPayload, uniform_payload
from steering.engine.site_checks import hooked_layers
from steering.plan import Plan, Row, Term

_PROMPTS = (tuple(range(1, 9)), tuple(range(19, 10, -1)))
_EDIT = 1.0
_DROWNING = 1e4
_LEAST_EFFECT = 1e-4

_STALE = (
    "the likely cause is compiled code that was made without the operators; start again with "
    "VLLM_DISABLE_COMPILE_CACHE=1, and with --enforce-eager to tell compilation from other causes"
)

Distribution = dict[int, float]


@dataclass(frozen=True)
class Proof:
    """What the proof measured, in nats of log-probability; of several engines, the worst of each.

    Attributes:
        engines: data parallel engines, each of which was proved.
        layers: hooked layers that were each shown to act.
        floor: largest difference between plain runs.
        least_effect: smallest effect of the edit over the layers.
        drowned: largest difference between the two prompts with the stream drowned; ``None`` when the
            last layer is not hooked.
        apart: their difference when plain.
    """

    engines: int
    layers: tuple[int, ...]
    floor: float
    least_effect: float
    drowned: float | None
    apart: float


async def prove(engine: Any) -> Proof:
    """Show on the running engine that every hooked layer steers.

    Args:
        engine: vLLM's ``AsyncLLM``, with the plug-in.

    Raises:
        TrimtabError: ``E_PROOF_NO_EFFECT``, ``E_PROOF_WRONG_EFFECT``, ``E_PROOF_LEAK`` or
            ``E_PLUGIN_ABSENT``, with a sentence that names the likely cause.
    """
    ranks = await rank_status(engine)
    engines = 1 + max(rank["engine"] for rank in ranks)
    hooked = hooked_layers([rank for rank in ranks if rank["engine"] == 0], "add")
    hidden_size, num_layers = ranks[0]["hidden_size"], ranks[0]["num_layers"]

    vector = np.random.default_rng(0).standard_normal((hidden_size,)).astype(np.float32)
    # Ids of their own, so that two API processes that prove at once do not take each other's away.
    nonce = secrets.token_hex(8)
    payloads = {n: _payload(f"proof-{nonce}-{n}", n, _EDIT * vector) for n in hooked}
    drowning = _payload(f"proof-{nonce}-drowning", num_layers - 1, _DROWNING * vector)
    everything = list(payloads.values()) + ([drowning] if num_layers - 1 in hooked else [])
    plans = {payload.id: _plan(payload) for payload in everything}
    await activate_payloads(engine, everything, plans.values())
    edits = {n: plans[payload.id] for n, payload in payloads.items()}
    try:
        proofs = [
            await _prove_one(_Asker(engine, n, engines), edits, plans.get(drowning.id))
            for n in range(engines)
        ]
    except BaseException:
        # The engine may be gone; what it died of is what has to be said.
        with contextlib.suppress(Exception):
            await deactivate(engine, [payload.id for payload in everything])
        raise
    await deactivate(engine, [payload.id for payload in everything])
    drowned = [proof.drowned for proof in proofs if proof.drowned is not None]
    return Proof(
        engines=engines,
        layers=tuple(hooked),
        floor=max(proof.floor for proof in proofs),
        least_effect=min(proof.least_effect for proof in proofs),
        drowned=max(drowned, default=None),
        apart=min(proof.apart for proof in proofs),
    )


async def _prove_one(ask: _Asker, edits: dict[int, Plan], drowning: Plan | None) -> Proof:
    # One request at a time keeps every run in the same batch shape, so that the floor is the engine's
    # own noise and not its kernels' choice of tiling.
    plain = await ask(None, 0)
    again = await ask(None, 0)
    other = await ask(None, 1)
    effects = {n: _difference(plain, await ask(plan, 0)) for n, plan in edits.items()}
    drowned = None
    if drowning is not None:
        drowned = _difference(await ask(drowning, 0), await ask(drowning, 1))
    after = await ask(None, 0)
    proof = Proof(
        engines=1,
        layers=tuple(edits),
        floor=_difference(plain, again),
        least_effect=min(effects.values(), default=0.0),
        drowned=drowned,
        apart=_difference(plain, other),
    )
    _judge(proof, effects, leak=_difference(plain, after), failed=ask.failed)
    return proof


def _judge(proof: Proof, effects: dict[int, float], leak: float, failed: str) -> None:
    needed = max(10 * proof.floor, _LEAST_EFFECT)
    idle = [n for n, effect in effects.items() if not effect > needed]
    if idle and len(idle) == len(effects):
        raise TrimtabError(
            "E_PROOF_NO_EFFECT",
            f"{failed}: an edit changes nothing at any layer; {_STALE}",
            field="engine",
        )
    if idle:
        raise TrimtabError(
            "E_PROOF_NO_EFFECT",
            f"{failed}: an edit changes nothing at layers {idle}; the likely cause "
            "is that these layers do not run, or run on a path that passes the hooks by",
            field="engine",
        )
    if proof.drowned is not None and not proof.drowned < 0.2 * proof.apart:
        raise TrimtabError(
            "E_PROOF_WRONG_EFFECT",
            f"{failed}: with the stream of the last layer drowned by an edit, two "
            f"prompts still differ by {proof.drowned:.3g} nats (plain: {proof.apart:.3g}); the likely "
            "cause is a model whose layers do not carry the residual stream where it was looked for",
            field="engine",
        )
    if leak > needed:
        raise TrimtabError(
            "E_PROOF_LEAK",
            f"{failed}: a plain answer differs by {leak:.3g} nats from the one before "
            f"the edits; {_STALE}",
            field="engine",
        )


def _payload(
    plan_id: str, layer: int, vector: np.ndarray[Any, np.dtype[np.float32]]
) -> PlanPayload:
    return uniform_payload(plan_id, RowPayload((layer,), vector[None, :]))


def _plan(payload: PlanPayload) -> Plan:
    layers = tuple((layer, 1.0) for layer in payload.rows[0].layers)
    return Plan(payload.id, (Row(add=(Term(payload.id, layers),)),), payload.cases)


class _Asker:
    """One next-token distribution from one of the engines, under a plan or plain.

    Attributes:
        failed: the first words of what went wrong.
    """

    def __init__(self, engine: Any, number: int, engines: int) -> None:
        self._engine = engine
        self._number = number if engines > 1 else None
        which = f" on engine {number} of {engines}" if engines > 1 else ""
        self.failed = f"the start-up proof failed{which}"
        config = engine.vllm_config.model_config
        self._vocabulary = config.get_vocab_size()
        self._top = max(min(20, config.max_logprobs), 0)

    async def __call__(self, plan: Plan | None, prompt: int) -> Distribution:
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import SamplingParams

        exchange = Exchange(
            policy="proof", mode="enforce", on_failure="closed", strength=1.0, plan=plan
        )
        tokens = [1 + n % (self._vocabulary - 1) for n in _PROMPTS[prompt]]
        params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=self._top, ignore_eos=True)
        token = current_exchange.set(exchange)
        try:
            answers = self._engine.generate(
                tokens_input(tokens, cache_salt=secrets.token_hex(8)),
                params,
                f"trimtab-proof-{secrets.token_hex(8)}",
                data_parallel_rank=self._number,
            )
            outputs = [output async for output in answers]
        finally:
            current_exchange.reset(token)
        if plan is not None and exchange.applied() != (True, None):
            raise TrimtabError(
                "E_PLUGIN_ABSENT",
                f"{self.failed}: a worker did not report its edit as applied "
                f"({exchange.applied()[1]}); the likely cause is that the plug-in failed to load in "
                "the engine's process",
                field="engine",
            )
        return {t: entry.logprob for t, entry in outputs[-1].outputs[0].logprobs[0].items()}


def _difference(a: Distribution, b: Distribution) -> float:
    """Largest difference over the tokens of either; a token that is missing counts as the least seen."""
    least_a, least_b = min(a.values()), min(b.values())
    return max(abs(a.get(t, least_a) - b.get(t, least_b)) for t in a.keys() | b.keys())
