"""The start-up proof: a server that cannot steer does not become ready.

Nothing that loads without an error shows that the operators are in the code that runs: compiled code may
come from elsewhere, a plug-in may be missing from one process, a hook may sit on a path that is not taken.
So the running engine is asked for one token, again and again:

1. plain, twice: how much two equal runs differ is the floor;
2. with a known edit at one site of one layer, for every site that is hooked and every layer of it: each
   answer must differ from the plain one by far more than the floor. Additions, projections on a vector, and
   all heads scaled to nothing;
3. with an addition at the last layer behind a gate that reads an earlier one, for every layer that gates
   read: open, the answer must differ, and shut, it must not;
4. with an addition at the last hooked layer that drowns the stream. The definition ``h ← h + v`` then
   leaves ``v`` alone: the final norm removes its length, and the next token's distribution no longer depends
   on the prompt. Two prompts whose plain answers differ must agree;
5. plain again: the edits of the others must have left nothing behind.

With data parallelism every engine is proved by itself: vLLM would spread the questions over all of them, and
an edit that is missing from one would be found or not as it happens.

Extension point, checked against vLLM 0.32 and 0.33: ``AsyncLLM.generate(…, data_parallel_rank=)``, the number
of an engine among those that this process reaches.
"""

from __future__ import annotations

import contextlib
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from directions.errors import TrimtabError
from steering.engine.control import activate_payloads, deactivate, rank_status
from steering.engine.exchange import Exchange, current_exchange
from steering.engine.payload import (
    FloatArray,
    GatePayload,
    PlanPayload,
    ProjectionPayload,
    RowPayload,
    uniform_payload,
)
from steering.engine.site_checks import Status, hooked_layers
from steering.ops.project import CLIP, SITES
from steering.plan import Plan, PlanGate, Row

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
        sites: by site, the layers at which it was shown to act.
        floor: largest difference between plain runs.
        least_effect: smallest effect of an edit over sites and layers.
        drowned: largest difference between the two prompts with the stream drowned.
        apart: their difference when plain.
    """

    engines: int
    layers: tuple[int, ...]
    sites: dict[str, tuple[int, ...]]
    floor: float
    least_effect: float
    drowned: float
    apart: float


async def prove(engine: Any) -> Proof:
    """Show on the running engine that every hooked layer steers.

    Args:
        engine: vLLM's ``AsyncLLM``, with the plug-in.

    Raises:
        TrimtabError: ``E_PROOF_NO_EFFECT``, ``E_PROOF_WRONG_EFFECT``, ``E_PROOF_GATE``, ``E_PROOF_LEAK`` or
            ``E_PLUGIN_ABSENT``, with a sentence that names the likely cause.
    """
    ranks = await rank_status(engine)
    engines = 1 + max(rank["engine"] for rank in ranks)
    questions = _Questions.about([rank for rank in ranks if rank["engine"] == 0])
    payloads = questions.payloads
    plans = {payload.id: _plan(payload) for payload in payloads}
    await activate_payloads(engine, payloads, plans.values())
    try:
        proofs = [
            await _prove_one(_Asker(engine, n, engines), questions, plans) for n in range(engines)
        ]
    except BaseException:
        # The engine may be gone; what it died of is what has to be said.
        with contextlib.suppress(Exception):
            await deactivate(engine, list(plans))
        raise
    await deactivate(engine, list(plans))
    return Proof(
        engines=engines,
        layers=proofs[0].layers,
        sites=proofs[0].sites,
        floor=max(proof.floor for proof in proofs),
        least_effect=min(proof.least_effect for proof in proofs),
        drowned=max(proof.drowned for proof in proofs),
        apart=min(proof.apart for proof in proofs),
    )


@dataclass(frozen=True)
class _Questions:
    """What the engine is asked.

    Attributes:
        edits: by site and layer, an edit that must show.
        shut: by layer, an edit behind a gate that is shut.
        drowning: the edit that drowns the stream.
    """

    edits: dict[tuple[str, int], PlanPayload]
    shut: dict[int, PlanPayload]
    drowning: PlanPayload

    @property
    def payloads(self) -> list[PlanPayload]:
        return [*self.edits.values(), *self.shut.values(), self.drowning]

    @classmethod
    def about(cls, ranks: Sequence[Status]) -> _Questions:
        """Every site of an engine with these ranks."""
        hidden_size = ranks[0]["hidden_size"]
        vector = np.random.default_rng(0).standard_normal((hidden_size,)).astype(np.float32)
        # Ids of their own, so that two API processes that prove at once do not take each other's away.
        prefix = f"proof-{secrets.token_hex(8)}"

        def named(
            what: str, layer: int, row: RowPayload, gates: tuple[GatePayload, ...] = ()
        ) -> PlanPayload:
            return uniform_payload(f"{prefix}-{what}-{layer}", row, gates)

        layers = hooked_layers(ranks, "add")
        edits = {("add", n): named("add", n, _adding(n, _EDIT * vector)) for n in layers}
        for n in hooked_layers(ranks, "heads"):
            row = replace(
                _adding(None, vector),
                heads=tuple((n, head, -1.0) for head in range(ranks[0]["num_heads"])),
            )
            edits["heads", n] = named("heads", n, row)
        for site in SITES:
            for n in hooked_layers(ranks, site):
                row = replace(_adding(None, vector), projections=(_moving(site, n, vector),))
                edits[site, n] = named(site, n, row)
        # Gates work on the last pipeline stage alone, and open edits of later layers.
        stage = ranks[-1]["hooked"]
        shut = {}
        for n in stage.get("gates", ()):
            if n < layers[-1]:
                row = _adding(layers[-1], _EDIT * vector)
                edits["gates", n] = named("open", n, row, (_gate(n, vector, -1.0),))
                shut[n] = named("shut", n, row, (_gate(n, vector, 2.0),))
        drowning = named("drowning", layers[-1], _adding(layers[-1], _DROWNING * vector))
        return cls(edits, shut, drowning)


def _adding(layer: int | None, vector: FloatArray) -> RowPayload:
    if layer is None:
        return RowPayload((), vector[None, :][:0])
    return RowPayload((layer,), vector[None, :])


def _moving(site: str, layer: int, vector: FloatArray) -> ProjectionPayload:
    length = float(np.linalg.norm(vector))
    unit = (vector / length)[None, :]
    parameters = (1.0, _EDIT * length, _EDIT * length)
    return ProjectionPayload(SITES.index(site), layer, CLIP, parameters, unit)


def _gate(layer: int, vector: FloatArray, low: float) -> GatePayload:
    """A gate that is open if ``low`` is less than any score, and shut if it is more."""
    return GatePayload("proof", layer, "prompt_end", low, math.inf, "affine", vector, 0.0)


def _plan(payload: PlanPayload) -> Plan:
    gates = tuple(
        PlanGate(gate.name, "", 0, "prompt_end", gate.low, None, gate.layer)
        for gate in payload.gates
    )
    return Plan(payload.id, (Row(),), payload.cases, gates=gates)


async def _prove_one(ask: _Asker, questions: _Questions, plans: dict[str, Plan]) -> Proof:
    # One request at a time keeps every run in the same batch shape, so that the floor is the engine's
    # own noise and not its kernels' choice of tiling.
    plain = await ask(None, 0)
    again = await ask(None, 0)
    other = await ask(None, 1)
    effects = {
        where: _difference(plain, await ask(plans[edit.id], 0))
        for where, edit in questions.edits.items()
    }
    leaks = {
        n: _difference(plain, await ask(plans[edit.id], 0)) for n, edit in questions.shut.items()
    }
    drowning = plans[questions.drowning.id]
    drowned = _difference(await ask(drowning, 0), await ask(drowning, 1))
    after = await ask(None, 0)
    sites: dict[str, tuple[int, ...]] = {}
    for site, layer in effects:
        sites[site] = (*sites.get(site, ()), layer)
    proof = Proof(
        engines=1,
        layers=sites["add"],
        sites=sites,
        floor=_difference(plain, again),
        least_effect=min(effects.values()),
        drowned=drowned,
        apart=_difference(plain, other),
    )
    _judge(proof, effects, leaks, leak=_difference(plain, after), failed=ask.failed)
    return proof


def _judge(
    proof: Proof,
    effects: dict[tuple[str, int], float],
    leaks: dict[int, float],
    leak: float,
    failed: str,
) -> None:
    needed = max(10 * proof.floor, _LEAST_EFFECT)
    idle: dict[str, list[int]] = {}
    for (site, layer), effect in effects.items():
        if not effect > needed:
            idle.setdefault(site, []).append(layer)
    if idle and sum(map(len, idle.values())) == len(effects):
        raise TrimtabError(
            "E_PROOF_NO_EFFECT",
            f"{failed}: an edit changes nothing at any layer; {_STALE}",
            field="engine",
        )
    if idle:
        where = "; ".join(f"{site} at layers {layers}" for site, layers in idle.items())
        raise TrimtabError(
            "E_PROOF_NO_EFFECT",
            f"{failed}: an edit changes nothing: {where}; the likely cause is that these layers do "
            "not run, or run on a path that passes the hooks by",
            field="engine",
        )
    opened = [layer for layer, effect in leaks.items() if effect > needed]
    if opened:
        raise TrimtabError(
            "E_PROOF_GATE",
            f"{failed}: an edit acts behind a gate that is shut, at layers {opened}",
            field="engine",
        )
    if not proof.drowned < 0.2 * proof.apart:
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
