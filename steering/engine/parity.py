"""Whether the engine computes what the reference says a policy means.

The engine's log-probability of every token that it chose is compared with the reference's, teacher-forced
over the same tokens. The same comparison on unsteered requests of the same run is the floor: what two
stacks that agree on the mathematics differ by in float32. The suite and ``trimtab verify`` use the same
comparison.

Extension points, checked against vLLM 0.32 and 0.33: ``LLM`` and, in its ``llm_engine``, ``add_request``,
``step`` and ``has_unfinished_requests``, for an engine in this process.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from directions.card import ModelFingerprint
from directions.errors import TrimtabError
from directions.model_sites import decoder_layers
from directions.store import Store
from steering.engine.admission import Frontend, frontend_of
from steering.engine.control import activate_readings_local, local_status
from steering.engine.exchange import Exchange, current_exchange
from steering.engine.gate_report import GateReport
from steering.engine.score_log import ScoreLog
from steering.engine.site_checks import hooked_layers
from steering.plan import Plan, compile_policy
from steering.policy import Policy, parse_policy
from steering.readings import Reading
from steering.reference import Steered, reading, steered, text_phases, token_texts

TOLERANCE: Final = 1e-4
"""Largest difference, in nats, that is put down to the order of float32 sums."""

_ENGINES: list[Any] = []
_REQUESTS = itertools.count()


@dataclass
class World:
    """A checkpoint, its reference model, a store, and policies for it.

    Attributes:
        path: the checkpoint's folder.
        model: the reference's model.
        thinking: the texts that begin and end the model's thinking, where they are known.
        plans: by policy name.
        policies: by name; taken as if enforced.
        readings: what is read of every request, as far as the engine has the sites.
    """

    path: Path
    model: Any
    tokenizer: Any
    fingerprint: ModelFingerprint
    store: Store
    thinking: tuple[str, str] | None
    plans: dict[str, Plan] = field(default_factory=dict)
    policies: dict[str, Policy] = field(default_factory=dict)
    readings: tuple[Reading, ...] = ()

    @property
    def num_layers(self) -> int:
        """The model's decoder layers."""
        return self.fingerprint.num_layers

    def prompt(self, text: str) -> list[int]:
        """The tokens of a user's message in the chat template; without one, of the text."""
        if not self.tokenizer.chat_template:
            return list(self.tokenizer(text)["input_ids"])
        ids = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
        return list(ids)

    def add_policy(
        self, name: str, edits: dict[str, Any], gates: dict[str, Any] | None = None
    ) -> None:
        """Compile a policy of these edits and gates, with room for strengths from -4 to 4."""
        policy = parse_policy(
            {
                "apiVersion": "trimtab/v1",
                "kind": "Policy",
                "name": name,
                "mode": "enforce",
                "strengthRange": [-4.0, 4.0],
                "edits": edits,
                **({} if gates is None else {"gates": gates}),
            }
        )
        self.add(policy)

    def add(self, policy: Policy) -> None:
        """Compile a policy.

        Raises:
            PolicyErrors: as :func:`steering.plan.compile_policy`.
        """
        plan = compile_policy(
            policy, self.store, self.fingerprint, relative_ceiling=math.inf, thinking=self.thinking
        )
        self.policies[policy.name] = policy
        self.plans[policy.name] = plan

    def steered(self, answer: Answer, policy: str | None) -> Steered:
        """What the reference makes of an answer's tokens under a policy; the last is never run."""
        request = answer.request
        return steered(
            self.model,
            None if policy is None else self.policies[policy],
            self.store,
            [*request.prompt, *answer.token_ids[:-1]],
            len(request.prompt),
            request.strength,
            tokenizer=self.tokenizer,
            thinking=self.thinking,
        )

    def scores(self, answer: Answer, policy: str | None) -> tuple[Steered, dict[str, torch.Tensor]]:
        """:meth:`steered`, and the scores ``[T]`` of what was read of the answer, by key."""
        read: dict[str, list[torch.Tensor]] = {}
        with ExitStack() as stack:
            for found in self.readings:
                if found.key in answer.scores:
                    probe = self.store.load_probe(f"sha256:{found.probe}")
                    take = read.setdefault(found.key, []).append
                    stack.enter_context(reading(self.model, probe, found.output, take))
            reference = self.steered(answer, policy)
        return reference, {key: torch.cat(parts) for key, parts in read.items()}

    def phases(self, answer: Answer) -> tuple[str, ...]:
        """The phase of each token of an answer; the markers must be known."""
        assert self.thinking is not None
        prompt = answer.request.prompt
        texts = token_texts(self.tokenizer, [*prompt, *answer.token_ids])
        return text_phases(texts, len(prompt), self.thinking).phases[len(prompt) :]


def load_world(path: Path, store: Store, thinking: tuple[str, str] | None) -> World:
    """Open a checkpoint in float32, with nothing in its world yet.

    Raises:
        TrimtabError: ``E_REFERENCE``: transformers cannot load it, or its layers cannot be told.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from directions.fingerprint import fingerprint

    described = fingerprint(path, weights=False)
    try:
        # The faster ways in which Transformers computes attention leave out soft caps and sinks.
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        tokenizer = AutoTokenizer.from_pretrained(path)
        decoder_layers(model)
    # Loading runs the code of any of hundreds of models.
    except Exception as error:
        raise TrimtabError(
            "E_REFERENCE", f"the reference cannot run this model: {error}", field=str(path)
        ) from error
    for module in model.modules():
        # vLLM's Transformers backend puts its compilation into classes that the reference shares.
        module.do_not_compile = True
    return World(path, model, tokenizer, described, store, thinking)


@contextmanager
def engine(path: Path, **options: Any) -> Iterator[Any]:
    """A real vLLM engine in this process, float32 and eager unless ``options`` say otherwise."""
    from vllm import LLM

    settings: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 64,
        "disable_log_stats": False,
        "kv_cache_memory_bytes": 256 * 2**20,
        **options,
    }
    llm = LLM(str(path), **settings)
    # Kept to the end: an engine that is finalised tears down the process groups of all the others.
    _ENGINES.append(llm)
    yield llm


@dataclass(frozen=True)
class Request:
    """One request of a batch.

    Attributes:
        prompt: its tokens.
        policy: whose name the world knows; None is unsteered.
        strength: the multiplier of the policy's strengths.
        n: how many answers; one alone is greedy, several are sampled.
        max_tokens: of each answer; it is not ended sooner except by ``stop``.
        stop: texts that end it.
    """

    prompt: tuple[int, ...]
    policy: str | None = None
    strength: float = 1.0
    n: int = 1
    max_tokens: int = 64
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """One sequence that the engine made.

    Attributes:
        request: what was asked.
        token_ids: the tokens, at least one.
        logprobs: the log-probability that the engine gives for each, in nats.
        text: what they decode to.
        finish_reason: as vLLM calls it.
        cached_tokens: of the prompt, found in the prefix cache.
        gates: what the worker reported.
        scores: what was read of it: pairs of position and score, by the reading's key.
    """

    request: Request
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: str | None
    cached_tokens: int
    gates: tuple[GateReport, ...] = ()
    scores: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)


def exchange_for(world: World, request: Request, frontend: Frontend | None = None) -> Exchange:
    """What the server would make of a request's choice of policy, with every token's scores.

    Args:
        frontend: the engine's; nothing is read that it does not have.
    """
    readings = () if frontend is None else world.readings
    return Exchange(
        policy=request.policy or "off",
        mode="off" if request.policy is None else "enforce",
        on_failure="closed",
        strength=request.strength,
        plan=world.plans[request.policy] if request.policy and request.strength else None,
        readings=tuple(found for found in readings if frontend and found.id in frontend.readings),
        trace=True,
    )


def sampling(request: Request) -> Any:
    """A request's parameters for vLLM."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        output_kind=RequestOutputKind.FINAL_ONLY,
        n=request.n,
        temperature=0.0 if request.n == 1 else 1.0,
        max_tokens=request.max_tokens,
        ignore_eos=True,
        logprobs=0,
        stop=list(request.stop) or None,
    )


def answers_of(request: Request, exchange: Exchange, output: Any) -> list[Answer]:
    """The sequences of vLLM's output for a request.

    Raises:
        TrimtabError: ``E_PLAN_NOT_PLACED``: the worker did not report the policy as applied.
    """
    if exchange.plan is not None and exchange.applied() != (True, None):
        raise TrimtabError(
            "E_PLAN_NOT_PLACED", f"{exchange.policy} was not applied: {exchange.applied()[1]}"
        )
    return [
        Answer(
            request,
            tuple(sequence.token_ids),
            tuple(
                entry[token].logprob
                for token, entry in zip(sequence.token_ids, sequence.logprobs, strict=True)
            ),
            sequence.text,
            sequence.finish_reason,
            output.num_cached_tokens or 0,
            exchange.gates_of_choice(sequence.index),
            _scores(exchange.scores_of_choice(sequence.index)),
        )
        for sequence in output.outputs
    ]


def _scores(log: ScoreLog | None) -> dict[str, list[tuple[int, float]]]:
    if log is None:
        return {}
    return {found.key: log.trace(n) for n, found in enumerate(log.readings)}


def activate_world_readings(llm: Any, world: World) -> Frontend:
    """Let everything that the engine has a site for be read."""
    ranks = local_status(llm)
    hooked = hooked_layers(ranks, "probes")
    return activate_readings_local(
        llm,
        [found for found in world.readings if found.layer in hooked],
        world.store,
        world.thinking,
    )


def run(llm: Any, world: World, requests: Sequence[Request]) -> list[Answer]:
    """All requests as one batch, each admitted like a request of the server's."""
    from vllm.inputs.engine import tokens_input

    frontend = frontend_of(llm.llm_engine.input_processor)
    if frontend is not None and world.readings and not frontend.readings:
        activate_world_readings(llm, world)
    exchanges = [exchange_for(world, request, frontend) for request in requests]
    for number, (request, exchange) in enumerate(zip(requests, exchanges, strict=True)):
        prompt = tokens_input(list(request.prompt))
        token = current_exchange.set(exchange)
        try:
            llm.llm_engine.add_request(f"{next(_REQUESTS)}-{number}", prompt, sampling(request))
        finally:
            current_exchange.reset(token)
    finished: list[Any] = []
    while llm.llm_engine.has_unfinished_requests():
        finished += [output for output in llm.llm_engine.step() if output.finished]
    outputs = sorted(finished, key=lambda output: int(output.request_id.rpartition("-")[2]))
    return [
        answer
        for request, exchange, output in zip(requests, exchanges, outputs, strict=True)
        for answer in answers_of(request, exchange, output)
    ]


@dataclass(frozen=True)
class Judgement:
    """How one answer of the engine's fares against the reference, in nats.

    Attributes:
        answer: what is judged.
        difference: largest difference of the log-probabilities of the tokens that it chose.
        regret: how much more probable, at most, the reference finds another token than the one that was
            chosen; None for sampled answers, which need not choose the most probable.
        effect: by how much the policy moves the log-probability of any chosen token, by the reference;
            None for unsteered answers.
        gate_faults: where the engine's word on a gate is not the reference's.
        scores: by reading, the largest difference of its scores and how far apart these are at most.
        score_faults: by reading, what is wrong with which tokens have a score.
    """

    answer: Answer
    difference: float
    regret: float | None
    effect: float | None
    gate_faults: tuple[str, ...]
    scores: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    score_faults: Mapping[str, str] = field(default_factory=dict)


def judge(world: World, answer: Answer, *, with_effect: bool = True) -> Judgement:
    """Hold an answer against the reference.

    Args:
        with_effect: also measure by how much the policy moves it, which takes as long again.

    Raises:
        ValueError: the reference cannot tell a site of this model.
    """
    request = answer.request
    chosen = torch.tensor(answer.token_ids)[:, None]
    first = len(request.prompt) - 1
    reference, expected_scores = world.scores(answer, request.policy)
    rows = reference.logprobs[first:]
    expected = rows.gather(1, chosen)[:, 0]
    effect = None
    faults: tuple[str, ...] = ()
    if request.policy is not None and request.strength:
        faults = gate_faults(answer, reference)
        if with_effect:
            plain = world.steered(answer, None).logprobs[first:]
            effect = float((plain.gather(1, chosen)[:, 0] - expected).abs().max())
    scores: dict[str, tuple[float, float]] = {}
    score_faults: dict[str, str] = {}
    positions = list(range(first, len(request.prompt) + len(answer.token_ids) - 1))
    for key, trace in answer.scores.items():
        if [position for position, _ in trace] != positions:
            score_faults[key] = f"{len(trace)} scores, not one for each of {len(positions)} tokens"
            continue
        found = torch.tensor([score for _, score in trace], dtype=torch.float64)
        difference = float((found - expected_scores[key][first:]).abs().max())
        scores[key] = (difference, float(found.max() - found.min()))
    return Judgement(
        answer,
        float((torch.tensor(answer.logprobs) - expected).abs().max()),
        float((rows.max(dim=1).values - expected).max()) if request.n == 1 else None,
        effect,
        faults,
        scores,
        score_faults,
    )


def gate_faults(answer: Answer, reference: Steered) -> tuple[str, ...]:
    """Where the engine's word on a gate is not the reference's."""
    found = {gate.name: gate for gate in answer.gates}
    if found.keys() != reference.gates.keys():
        return (f"the engine reports on gates {sorted(found)}, not {sorted(reference.gates)}",)
    faults = []
    for name, expected in reference.gates.items():
        gate = found[name]
        agrees = gate.fired == expected.open
        if gate.fired or gate.tokens is None:
            agrees &= gate.at == expected.position
        if gate.score is not None:
            agrees &= expected.score is not None and abs(gate.score - expected.score) <= TOLERANCE
        if gate.tokens is not None:
            agrees &= gate.tokens == expected.open_tokens
        if not agrees:
            faults.append(f"gate {name}: the engine says {gate}, the reference {expected}")
    return tuple(faults)
