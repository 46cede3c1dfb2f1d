"""Running a real engine in this process and holding its answers against the reference.

The engine's log-probability of every token that it chose is compared with the reference's, teacher-forced
over the same tokens. The same comparison on unsteered requests of the same run is the floor: what two
stacks that agree on the mathematics differ by in float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from directions.card import CardDraft, HeadSetDraft, ModelFingerprint, ProbeDraft
from directions.store import Store
from steering.engine.exchange import Exchange, GateReport, current_exchange
from steering.plan import Plan, compile_policy
from steering.policy import Policy, parse_policy
from steering.reference import Steered, steered, text_phases, token_texts
from steering.reference_sites import decoder_layers

TOLERANCE = 1e-4

_ENGINES: list[Any] = []
_REQUESTS = itertools.count()


@dataclass
class World:
    """A checkpoint, its reference model, and a store with directions for it."""

    path: Path
    model: Any
    tokenizer: Any
    fingerprint: ModelFingerprint
    store: Store
    thinking: tuple[str, str]
    plans: dict[str, Plan] = field(default_factory=dict)
    policies: dict[str, Policy] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        return self.fingerprint.num_layers

    def prompt(self, text: str) -> list[int]:
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
        self.policies[name] = policy
        self.plans[name] = compile_policy(
            policy,
            self.store,
            self.fingerprint,
            relative_ceiling=10.0,
            thinking=self.thinking,
        )

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

    def phases(self, answer: Answer) -> tuple[str, ...]:
        """The phase of each token of an answer."""
        prompt = answer.request.prompt
        texts = token_texts(self.tokenizer, [*prompt, *answer.token_ids])
        return text_phases(texts, len(prompt), self.thinking).phases[len(prompt) :]


def build_world(
    path: Path,
    store_root: Path,
    thinking: tuple[str, str] = ("<think>", "</think>"),
    **loading: Any,
) -> World:
    """Load a checkpoint and make random directions and probes whose size is the model's own.

    ``alpha`` and ``beta`` are directions; ``early``, ``middle``, ``top`` probes that read a quarter and half
    of the way up and the final norm, ``similar`` one with the cosine read-out; ``few`` is a head set.
    ``loading`` goes to ``from_pretrained``.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from directions.fingerprint import fingerprint

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **loading).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    world = World(
        path, model, tokenizer, fingerprint(path, weights=False), Store(store_root), thinking
    )
    norms = _activation_norms(world, world.prompt("Which way does the wind blow today?"))
    rng = np.random.default_rng(7)
    size = (world.num_layers, world.fingerprint.hidden_size)
    for name in ("alpha", "beta"):
        unit = rng.standard_normal(size)
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        vectors = unit * np.array(norms)[:, None] * 0.1
        world.store.put(
            CardDraft(
                method="random",
                model=world.fingerprint,
                activation_norms=tuple(norms),
                dtype="float32",
                created="2026-01-01T00:00:00Z",
            ),
            vectors.astype(np.float32),
            np.ones(size[0], dtype=bool),
            name=name,
        )
    last = size[0] - 1
    for name, layer in (("early", last // 4), ("middle", last // 2), ("top", None)):
        # Scores as spread out as a trained probe's: the logit has about unit variance.
        scale = 1.0 if layer is None else norms[layer]
        weights = rng.standard_normal((2, size[1])) * (3.0 / scale)
        world.store.put_probe(_probe_draft(world, layer, "affine"), weights, [0.0, 0.1], name=name)
    world.store.put_probe(
        _probe_draft(world, last // 2, "cosine"),
        rng.standard_normal((2, size[1])),
        [0.0, 0.0],
        name="similar",
    )
    heads = [(last, 0), (last // 2, world.fingerprint.num_heads - 1), (last // 4, 1)]
    world.store.put_head_set(
        HeadSetDraft(
            method="random",
            model=world.fingerprint,
            dtype="float32",
            created="2026-01-01T00:00:00Z",
        ),
        heads,
        [1.0, 0.5, 0.25],
        name="few",
    )
    return world


def _probe_draft(
    world: World, layer: int | None, read_out: Literal["affine", "cosine"]
) -> ProbeDraft:
    return ProbeDraft(
        method="random",
        model=world.fingerprint,
        dtype="float32",
        created="2026-01-01T00:00:00Z",
        site="final_norm" if layer is None else "residual",
        layer=layer,
        read_out=read_out,
        outputs=("first", "second"),
    )


def _activation_norms(world: World, prompt: list[int]) -> list[float]:
    norms: list[float] = []

    def hook(module: Any, args: Any, output: Any) -> None:
        h = output[0] if isinstance(output, tuple) else output
        # Past the first token, whose norm is an outlier in most models.
        norms.append(float(h[0, 1:].norm(dim=-1).mean()))

    handles = [layer.register_forward_hook(hook) for layer in decoder_layers(world.model)]
    with torch.no_grad():
        world.model(torch.tensor([prompt]))
    for handle in handles:
        handle.remove()
    return norms


def standard_policies(world: World) -> None:
    """The edits that every engine configuration is checked with, at depths that fit the model."""
    last = world.num_layers - 1
    low, middle, high = last // 4, last // 2, (3 * last) // 4
    alpha = {"direction": "alpha@1", "unit": "relative", "strength": 0.15}
    beta = {"direction": "beta@1", "unit": "absolute", "strength": 1.5}
    world.add_policy("one", {"a": {"add": {**alpha, "layers": middle}, "scope": "all"}})
    world.add_policy("every", {"a": {"add": {**alpha, "strength": 0.05}, "scope": "all"}})
    world.add_policy(
        "several",
        {
            "a": {"add": {**alpha, "layers": f"{low}-{middle}"}, "scope": "all"},
            "b": {"add": {**beta, "layers": f"{middle}-{high}"}, "scope": "all"},
            "c": {
                "add": {"direction": "beta@1", "unit": "unit", "strength": 2.0, "layers": last},
                "scope": ["prompt", "generation"],
            },
        },
    )
    world.add_policy("prompt", {"a": {"add": {**alpha, "layers": middle}, "scope": "prompt"}})
    world.add_policy(
        "generation", {"a": {"add": {**alpha, "layers": middle}, "scope": "generation"}}
    )
    world.add_policy(
        "split",
        {
            "p": {"add": {**alpha, "layers": f"{low}-{middle}"}, "scope": "prompt"},
            "g": {"add": {**beta, "layers": f"{middle}-{high}"}, "scope": "generation"},
        },
    )


def every_kind(world: World) -> None:
    """Policies of every kind of edit, scope and gate, at depths that fit the model."""
    last = world.num_layers - 1
    heads = world.fingerprint.num_heads
    low, middle, high = last // 4, last // 2, (3 * last) // 4
    alpha = {"direction": "alpha@1", "unit": "relative", "strength": 0.15}
    rise = {"add": {**alpha, "layers": f"{middle + 1}-{last}"}}
    some_heads = [[low, 0], [middle, 1], [high, heads - 1], [last, 0]]
    world.add_policy("heads", {"h": {"scale_heads": {"heads": some_heads, "factor": 0.0}}})
    world.add_policy(
        "rows",
        {
            "h": {
                "scale_heads": {
                    "heads": some_heads,
                    "factor": [0.0, 2.0, -0.5, 0.25],
                    "renormalise": "row",
                }
            },
            "i": {"scale_heads": {"heads": "few@1", "factor": 1.5}, "scope": "generation"},
        },
    )
    world.add_policy(
        "ablate",
        {
            "a": {
                "ablate": {
                    "direction": "alpha@1",
                    "layers": "all",
                    "vectorLayer": middle,
                    "sites": ["residual", "attention", "mlp"],
                }
            }
        },
    )
    world.add_policy(
        "clamp",
        {
            "a": {
                "clamp": {
                    "direction": "alpha@1",
                    "layers": f"{low}-{high}",
                    "to": 0.2,
                    "unit": "relative",
                }
            },
            "b": {"clamp": {"direction": "beta@1", "layers": last, "atLeast": -0.5, "atMost": 0.5}},
        },
    )
    world.add_policy(
        "rotate",
        {
            "a": {
                "rotate": {"plane": ["alpha@1", "beta@1"], "layers": f"{low}-{middle}", "to": 60}
            },
            "b": {"rotate": {"plane": ["beta@1", "alpha@1"], "layers": high, "by": -75}},
        },
    )
    world.add_policy(
        "everything",
        {
            "add": {"add": {**alpha, "layers": f"{low}-{high}"}, "scope": "all"},
            "ablate": {"ablate": {"direction": "beta@1", "layers": middle, "strength": 0.7}},
            "clamp": {"clamp": {"direction": "alpha@1", "layers": middle, "atMost": 0.1}},
            "rotate": {"rotate": {"plane": ["alpha@1", "beta@1"], "layers": high, "by": 20}},
            "heads": {"scale_heads": {"heads": some_heads, "factor": 0.5}, "scope": "prompt"},
        },
    )
    world.add_policy(
        "prompt-end", {"a": {"add": {**alpha, "layers": "all"}, "scope": "prompt_end"}}
    )
    world.add_policy(
        "phases",
        {
            "t": {"add": {**alpha, "layers": middle}, "scope": "thinking"},
            "e": {"scale_heads": {"heads": some_heads, "factor": 0.0}, "scope": "think_end"},
            "a": {"ablate": {"direction": "beta@1", "layers": high}, "scope": "answer"},
        },
    )
    world.add_policy(
        "first",
        {
            "a": {"add": {**alpha, "layers": middle}, "scope": [{"first": 5}]},
            "b": {"add": {**alpha, "layers": high}, "scope": ["prompt_end", {"first": 20}]},
        },
    )
    for name, keys in (("above", {"above": 0.5}), ("below", {"below": 0.5})):
        world.add_policy(
            f"gate-{name}",
            {"rise": {**rise, "scope": "all"}, "always": {"add": {**alpha, "layers": low}}},
            {"g": {"probe": "middle@1", "at": "prompt_end", **keys, "then": ["rise"]}},
        )
    world.add_policy(
        "gate-token",
        {"rise": {**rise, "scope": "all"}},
        {
            "g": {
                "probe": "early@1",
                "output": 1,
                "at": "token",
                "between": [0.2, 0.7],
                "then": ["rise"],
            }
        },
    )
    world.add_policy(
        "gate-think",
        {
            "rise": {**rise, "scope": ["think_end", "answer"]},
            "quiet": {"scale_heads": {"heads": some_heads, "factor": 0.0}, "scope": "generation"},
        },
        {
            "end": {"probe": "top@1", "at": "think_end", "above": 0.4, "then": ["rise"]},
            "cos": {
                "probe": "similar@1",
                "at": "prompt_end",
                "above": -0.9,
                "then": ["quiet", "rise"],
            },
        },
    )


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
    """One request of a test batch; ``policy=None`` is unsteered."""

    prompt: tuple[int, ...]
    policy: str | None = None
    strength: float = 1.0
    n: int = 1
    max_tokens: int = 64
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """One sequence that the engine made."""

    request: Request
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: str | None
    cached_tokens: int
    gates: tuple[GateReport, ...] = ()


def exchange_for(world: World, request: Request) -> Exchange:
    """What the server would make of a request's choice of policy."""
    return Exchange(
        policy=request.policy or "off",
        mode="off" if request.policy is None else "enforce",
        on_failure="closed",
        strength=request.strength,
        plan=world.plans[request.policy] if request.policy and request.strength else None,
    )


def sampling(request: Request) -> Any:
    """A request's parameters for vLLM."""
    from vllm import SamplingParams

    return SamplingParams(
        n=request.n,
        temperature=0.0 if request.n == 1 else 1.0,
        max_tokens=request.max_tokens,
        ignore_eos=True,
        logprobs=0,
        stop=list(request.stop) or None,
    )


def answers_of(request: Request, exchange: Exchange, output: Any) -> list[Answer]:
    """The sequences of vLLM's output for a request, which must have been applied."""
    assert exchange.plan is None or exchange.applied() == (True, None)
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
        )
        for sequence in output.outputs
    ]


def run(llm: Any, world: World, requests: Sequence[Request]) -> list[Answer]:
    """All requests as one batch, each admitted like a request of the server's."""
    from vllm.inputs.engine import tokens_input

    exchanges = [exchange_for(world, request) for request in requests]
    for number, (request, exchange) in enumerate(zip(requests, exchanges, strict=True)):
        prompt = tokens_input(list(request.prompt))
        token = current_exchange.set(exchange)
        try:
            llm.llm_engine.add_request(f"{next(_REQUESTS)}-{number}", prompt, sampling(request))
        finally:
            current_exchange.reset(token)
    finished = []
    while llm.llm_engine.has_unfinished_requests():
        finished += [output for output in llm.llm_engine.step() if output.finished]
    outputs = sorted(finished, key=lambda output: int(output.request_id.rpartition("-")[2]))
    return [
        answer
        for request, exchange, output in zip(requests, exchanges, outputs, strict=True)
        for answer in answers_of(request, exchange, output)
    ]


@dataclass(frozen=True)
class Parity:
    """How far the engine is from the reference, in nats of the chosen tokens' log-probabilities.

    Attributes:
        floor: largest difference of unsteered answers.
        worst: largest difference of steered answers.
        effect: smallest over the steered answers of how much the policy moved any chosen token.
        by_case: largest difference by policy and strength.
    """

    floor: float
    worst: float
    effect: float
    by_case: dict[str, float]


def compare(world: World, answers: Sequence[Answer]) -> Parity:
    """Hold every answer against the reference; greedy ones must be the reference's choice too."""
    by_case: dict[str, float] = {}
    floor = worst = 0.0
    effect = float("inf")
    for answer in answers:
        request = answer.request
        chosen = torch.tensor(answer.token_ids)
        first = len(request.prompt) - 1
        reference = world.steered(answer, request.policy)
        rows = reference.logprobs[first:]
        expected = rows.gather(1, chosen[:, None])[:, 0]
        found = torch.tensor(answer.logprobs)
        difference = float((found - expected).abs().max())
        if request.n == 1:
            regret = float((rows.max(dim=1).values - expected).max())
            assert regret <= 2 * TOLERANCE, f"not the reference's greedy choice: {regret:.2g} nats"
        if request.policy is None:
            floor = max(floor, difference)
            case = "plain"
        else:
            worst = max(worst, difference)
            case = f"{request.policy} x {request.strength:g}"
            if request.strength:
                plain = world.steered(answer, None).logprobs[first:]
                moved = float((plain.gather(1, chosen[:, None])[:, 0] - expected).abs().max())
                if not world.policies[request.policy].gates:
                    effect = min(effect, moved)
                else:
                    compare_gates(answer, reference)
        by_case[case] = max(by_case.get(case, 0.0), difference)
    return Parity(floor, worst, effect, by_case)


def compare_gates(answer: Answer, reference: Steered) -> None:
    """The engine's word on each gate is the reference's."""
    assert {gate.name for gate in answer.gates} == set(reference.gates)
    for gate in answer.gates:
        expected = reference.gates[gate.name]
        assert gate.fired == expected.open, (answer.request, gate, expected)
        if gate.fired or gate.tokens is None:
            assert gate.at == expected.position, (answer.request, gate, expected)
        if gate.score is not None:
            assert abs(gate.score - expected.score) <= TOLERANCE, (gate, expected)
        if gate.tokens is not None:
            assert gate.tokens == expected.open_tokens, (gate, expected)


def assert_parity(world: World, answers: Sequence[Answer], label: str) -> Parity:
    """The bound of the project: 1e-4, and no more than twice the floor of the same run."""
    parity = compare(world, answers)
    lines = "  ".join(f"{case}: {value:.1e}" for case, value in sorted(parity.by_case.items()))
    tokens = sum(len(a.token_ids) for a in answers)
    print(
        f"\n[parity {label}] {tokens} tokens, floor {parity.floor:.2e}, steered {parity.worst:.2e}, "
        f"smallest effect {parity.effect:.2g} nats; {lines}"
    )
    assert parity.effect > 100 * TOLERANCE, "a policy of this batch does nothing measurable"
    assert parity.floor <= TOLERANCE
    assert parity.worst <= TOLERANCE
    assert parity.worst <= 2 * parity.floor
    return parity
