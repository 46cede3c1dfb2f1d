"""Running a real engine in this process and holding its answers against the reference.

The engine's log-probability of every token that it chose is compared with the reference's, teacher-forced
over the same tokens. The same comparison on unsteered requests of the same run is the floor: what two
stacks that agree on the mathematics differ by in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from directions.card import CardDraft, ModelFingerprint
from directions.store import Store
from steering.plan import Plan, compile_policy
from steering.policy import Policy, parse_policy
from steering.reference import decoder_layers, steered_logprobs

TOLERANCE = 1e-4

_ENGINES: list[Any] = []


@dataclass
class World:
    """A checkpoint, its reference model, and a store with directions for it."""

    path: Path
    model: Any
    tokenizer: Any
    fingerprint: ModelFingerprint
    store: Store
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

    def add_policy(self, name: str, edits: dict[str, Any]) -> None:
        policy = parse_policy(
            {
                "apiVersion": "trimtab/v1",
                "kind": "Policy",
                "name": name,
                "mode": "enforce",
                "strengthRange": [-4.0, 4.0],
                "edits": edits,
            }
        )
        self.policies[name] = policy
        self.plans[name] = compile_policy(
            policy, self.store, self.fingerprint, relative_ceiling=10.0
        )


def build_world(path: Path, store_root: Path) -> World:
    """Load a checkpoint and make two random directions whose size is the model's own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from directions.fingerprint import fingerprint

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    world = World(path, model, tokenizer, fingerprint(path, weights=False), Store(store_root))
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
    return world


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


def run(llm: Any, world: World, requests: Sequence[Request]) -> list[Answer]:
    """All requests as one batch."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            n=r.n,
            temperature=0.0 if r.n == 1 else 1.0,
            max_tokens=r.max_tokens,
            ignore_eos=True,
            logprobs=0,
            stop=list(r.stop) or None,
            extra_args=None
            if r.policy is None
            else {"trimtab": {"plan": world.plans[r.policy].id, "strength": r.strength}},
        )
        for r in requests
    ]
    outputs = llm.generate(
        [{"prompt_token_ids": list(r.prompt)} for r in requests], params, use_tqdm=False
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
        )
        for request, output in zip(requests, outputs, strict=True)
        for sequence in output.outputs
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
        text = [*request.prompt, *answer.token_ids]
        chosen = torch.tensor(answer.token_ids)
        first = len(request.prompt) - 1
        policy = None if request.policy is None else world.policies[request.policy]
        rows = steered_logprobs(
            world.model, policy, world.store, text, len(request.prompt), request.strength
        )[first:-1]
        expected = rows.gather(1, chosen[:, None])[:, 0]
        found = torch.tensor(answer.logprobs)
        difference = float((found - expected).abs().max())
        if request.n == 1:
            regret = float((rows.max(dim=1).values - expected).max())
            assert regret <= 2 * TOLERANCE, f"not the reference's greedy choice: {regret:.2g} nats"
        if policy is None:
            floor = max(floor, difference)
            case = "plain"
        else:
            worst = max(worst, difference)
            case = f"{request.policy} x {request.strength:g}"
            if request.strength:
                plain = steered_logprobs(world.model, None, world.store, text, len(request.prompt))[
                    first:-1
                ].gather(1, chosen[:, None])[:, 0]
                effect = min(effect, float((plain - expected).abs().max()))
        by_case[case] = max(by_case.get(case, 0.0), difference)
    return Parity(floor, worst, effect, by_case)


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
