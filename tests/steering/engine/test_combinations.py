"""Policies together with what else a request can ask of vLLM, in the same batch.

Every distribution is compared, over the whole vocabulary and for prompts too, with the reference's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steering.engine.control import activate_local
from steering.reference import steered_logprobs
from tests.steering.engine.adapters import merged, save_adapter
from tests.steering.engine.harness import (
    TOLERANCE,
    Request,
    World,
    build_world,
    engine,
    standard_policies,
)
from tests.steering.engine.harness import run as run_batch
from tests.steering.engine.quantised import INT4, INT8, Scheme, quantise, round_activations

pytestmark = pytest.mark.engine

QUESTIONS = (
    "Which way does the wind blow today, and how should a small boat set its sails?",
    "Explain in two sentences why ships float.",
    "Write a short letter to a friend about the sea.",
)

COMPASS = ["north", "north-east", "east", "south-east", "south", "south-west", "west"]
ORDER = {
    "type": "object",
    "properties": {
        "course": {"enum": COMPASS},
        "reef": {"type": "boolean"},
        "crew": {"type": "array", "items": {"enum": ["Ann", "Bo", "Cid"]}, "maxItems": 3},
    },
    "required": ["course", "reef", "crew"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        constraint: keywords of vLLM's ``StructuredOutputsParams``.
        stop: strings that end the answer.
    """

    prompt: tuple[int, ...]
    policy: str | None = None
    strength: float = 1.0
    adapter: str | None = None
    constraint: dict[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] = ()

    @property
    def case(self) -> str:
        return f"{self.policy or 'plain'}/{self.adapter or 'no adapter'}"


@dataclass(frozen=True)
class Told:
    """What came back: the chosen tokens with the log-probabilities of all tokens, by position."""

    ask: Ask
    token_ids: tuple[int, ...]
    rows: list[dict[int, float]]
    prompt_rows: list[dict[int, float] | None]
    text: str
    cached_tokens: int
    finish_reason: str | None


@dataclass(frozen=True)
class Setting:
    """An engine, and the reference model of each adapter; ``None`` is the model without one."""

    llm: Any
    world: World
    adapters: dict[str, Path]
    models: dict[str | None, Any]

    def run(self, asks: Sequence[Ask], **options: Any) -> list[Told]:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import StructuredOutputsParams

        numbers = {name: n for n, name in enumerate(self.adapters, start=1)}
        params, adapters = [], []
        for ask in asks:
            stamp = None
            if ask.policy is not None:
                plan = self.world.plans[ask.policy].id
                stamp = {"trimtab": {"plan": plan, "strength": ask.strength}}
            settings: dict[str, Any] = {"max_tokens": 24, "logprobs": -1, **options}
            if ask.constraint:
                settings["structured_outputs"] = StructuredOutputsParams(**ask.constraint)
            params.append(
                SamplingParams(
                    temperature=0.0,
                    stop=list(ask.stop) or None,
                    # To find the text of every token of every row takes longer than all else.
                    detokenize=bool(ask.stop),
                    extra_args=stamp,
                    **settings,
                )
            )
            adapters.append(
                None
                if ask.adapter is None
                else LoRARequest(ask.adapter, numbers[ask.adapter], str(self.adapters[ask.adapter]))
            )
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(ask.prompt)} for ask in asks],
            params,
            lora_request=adapters,
            use_tqdm=False,
        )
        return [
            Told(
                ask,
                tuple(output.outputs[0].token_ids),
                [_by_token(row) for row in output.outputs[0].logprobs],
                [row and _by_token(row) for row in output.prompt_logprobs or []],
                self.world.tokenizer.decode(output.outputs[0].token_ids, skip_special_tokens=True),
                output.num_cached_tokens or 0,
                output.outputs[0].finish_reason,
            )
            for ask, output in zip(asks, outputs, strict=True)
        ]

    def expected(self, told: Told, policy: str | None) -> torch.Tensor:
        """The reference's rows for prompt and answer; row t is the distribution of token t + 1."""
        ask = told.ask
        return steered_logprobs(
            self.models[ask.adapter],
            None if policy is None else self.world.policies[policy],
            self.world.store,
            [*ask.prompt, *told.token_ids],
            len(ask.prompt),
            ask.strength,
            tokenizer=self.world.tokenizer,
            thinking=self.world.thinking,
        )


def _by_token(row: dict[int, Any]) -> dict[int, float]:
    return {token: entry.logprob for token, entry in row.items()}


def _difference(found: dict[int, float], expected: torch.Tensor) -> float:
    """The largest difference over the tokens that were allowed, both renormalised over those."""
    allowed = [token for token, value in found.items() if value > -1e4]
    engine = torch.tensor([found[token] for token in allowed])
    reference = expected[allowed]
    if len(allowed) < len(found):
        reference = reference.log_softmax(-1)
    return float((engine - reference).abs().max())


def assert_agreement(setting: Setting, answers: Sequence[Told], label: str) -> None:
    """The project's bound for every allowed token of every distribution; every policy has an effect."""
    worst: dict[str, float] = {}
    effects: dict[str, float] = {}
    for told in answers:
        prompt = len(told.ask.prompt)
        rows = setting.expected(told, told.ask.policy)
        found = [
            (row, rows[n - 1]) for n, row in enumerate(told.prompt_rows) if row is not None
        ] + [(row, rows[prompt - 1 + n]) for n, row in enumerate(told.rows)]
        assert len(told.rows) == len(told.token_ids) > 0
        case = told.ask.case
        worst[case] = max([worst.get(case, 0.0), *(_difference(*pair) for pair in found)])
        for token, row in zip(told.token_ids, told.rows, strict=True):
            assert row[token] >= max(row.values()) - 2 * TOLERANCE, "not the greedy choice"
        if told.ask.policy is not None and told.ask.strength:
            plain = setting.expected(told, None)
            moved = max(_difference(row, plain[prompt - 1 + n]) for n, row in enumerate(told.rows))
            # Where a grammar leaves one token, nothing can move; so the largest of the answers.
            effects[case] = max(effects.get(case, 0.0), moved)
    # Adapters add to the noise, so the floor is taken over unsteered answers with and without them.
    floor = max(value for case, value in worst.items() if case.startswith("plain/"))
    steered = max(value for case, value in worst.items() if not case.startswith("plain/"))
    least_effect = min(effects.values())
    print(f"\n[{label}] floor {floor:.1e}, steered {steered:.1e}, least effect {least_effect:.2g}")
    assert least_effect > 100 * TOLERANCE, "a policy of this batch does nothing measurable"
    assert floor <= TOLERANCE
    assert steered <= TOLERANCE
    assert steered <= 2 * floor, worst


def cases(world: World) -> list[str | None]:
    """Every policy once, and as many unsteered requests to take the floor from."""
    return [*world.policies, *[None] * len(world.policies)]


@pytest.fixture(scope="module")
def setting(tiny_world, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    """One engine that takes adapters and constrains output.

    It has room for one adapter more than there are: in a mixed batch vLLM 0.32's CPU kernels index the
    adapters of requests that have none with -1, and must find the last place empty.
    """
    folder = tmp_path_factory.mktemp("adapters")
    adapters = {
        name: save_adapter(folder / name, tiny_world.model, seed=seed)
        for seed, name in enumerate(("port", "starboard"))
    }
    models = {name: merged(tiny_world.model, path) for name, path in adapters.items()}
    with engine(
        tiny_world.path,
        block_size=32,
        max_num_batched_tokens=64,
        max_logprobs=-1,
        enable_lora=True,
        max_loras=len(adapters) + 1,
        max_lora_rank=8,
        structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
    ) as llm:
        activate_local(llm, tiny_world.plans.values(), tiny_world.store)
        yield Setting(llm, tiny_world, adapters, {None: tiny_world.model, **models})


@pytest.fixture(scope="module")
def plain_setting(tiny_world) -> Iterator[Setting]:
    """The same without adapters: vLLM 0.32 on CPU cannot tell log-probabilities of prompts with them."""
    with engine(
        tiny_world.path,
        block_size=32,
        max_num_batched_tokens=64,
        max_logprobs=-1,
        structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
    ) as llm:
        activate_local(llm, tiny_world.plans.values(), tiny_world.store)
        yield Setting(llm, tiny_world, {}, {None: tiny_world.model})


def prompts(world: World) -> list[tuple[int, ...]]:
    return [tuple(world.prompt(question)) for question in QUESTIONS]


def test_adapters_and_policies_combine_and_share_no_cached_prefix(setting: Setting) -> None:
    texts = prompts(setting.world)
    asks = [
        Ask(texts[n % 3], policy, adapter=adapter)
        for adapter in (None, *setting.adapters)
        for n, policy in enumerate(cases(setting.world))
    ]
    asks += [Ask(texts[0], policy, -0.5, "port") for policy in setting.world.policies]
    first = setting.run(asks)
    assert_agreement(setting, first, "adapters")
    # The adapter is a change that the comparison can see: answers with it are another model's.
    plain = {told.ask.adapter: told for told in first if told.ask.policy is None}
    for name in setting.adapters:
        told = plain[name]
        without = replace(told, ask=replace(told.ask, adapter=None))
        gap = setting.expected(told, None) - setting.expected(without, None)
        assert gap.abs().max() > 1000 * TOLERANCE

    again = setting.run(asks)
    assert all(told.cached_tokens >= 32 for told in again)
    assert_agreement(setting, again, "adapters, prefixes from the cache")


def test_constrained_answers_are_valid_and_chosen_by_the_steered_model(setting: Setting) -> None:
    texts = prompts(setting.world)
    asks = [
        Ask(texts[n % 3], policy, adapter=adapter, constraint=constraint)
        for constraint in ({"json": ORDER}, {"choice": COMPASS}, {"regex": "[a-f]{4}-[0-9]{3}"})
        for adapter in (None, "port")
        for n, policy in enumerate(cases(setting.world))
    ]
    answers = setting.run(asks, max_tokens=128)
    assert_agreement(setting, answers, "constrained")
    for told in answers:
        if "json" in told.ask.constraint:
            order = json.loads(told.text)
            assert set(order) == {"course", "reef", "crew"}
            assert order["course"] in COMPASS
        elif "choice" in told.ask.constraint:
            assert told.text in COMPASS
        else:
            assert len(told.text) == 8
            assert told.text[4] == "-"
    # Forbidden tokens are forbidden under a policy too.
    assert all(min(row.values()) < -1e4 for told in answers for row in told.rows)


def test_log_probabilities_of_all_tokens_of_prompt_and_answer_are_the_steered_ones(
    plain_setting: Setting,
) -> None:
    texts = prompts(plain_setting.world)
    asks = [
        Ask(texts[n % 3], policy, strength)
        for n, policy in enumerate(cases(plain_setting.world))
        for strength in (1.0, -0.5)
    ]
    answers = plain_setting.run(asks, prompt_logprobs=-1)
    for told in answers:
        assert [row is None for row in told.prompt_rows] == [True] + [False] * (
            len(told.ask.prompt) - 1
        )
        assert all(len(row) >= 300 for row in told.rows)
    assert_agreement(plain_setting, answers, "prompt log-probabilities")


def test_everything_at_once(plain_setting: Setting) -> None:
    """Schema or stop strings, log-probabilities of prompt and answer, in one batch under all policies."""
    texts = prompts(plain_setting.world)
    kinds: list[dict[str, Any]] = [{"constraint": {"json": ORDER}}, {"stop": ("e", "a")}, {}]
    asks = [
        Ask(texts[n % 3], policy, **kind)
        for kind in kinds
        for n, policy in enumerate(cases(plain_setting.world))
    ]
    answers = plain_setting.run(asks, prompt_logprobs=4, max_tokens=64)
    assert_agreement(plain_setting, answers, "everything at once")
    stopped = 0
    for told in answers:
        if told.ask.stop:
            before = plain_setting.world.tokenizer.decode(told.token_ids[:-1])
            assert not set(told.ask.stop) & set(before)
            stopped += told.finish_reason == "stop"
        elif told.ask.constraint:
            assert json.loads(told.text)["course"] in COMPASS
        else:
            assert told.finish_reason == "length" or told.token_ids[-1] == 2
    assert stopped > len(plain_setting.world.policies)


@pytest.mark.parametrize("scheme", [INT4, INT8], ids=lambda scheme: scheme.name)
def test_policies_on_quantised_weights_agree_with_the_weights_that_they_stand_for(
    scheme: Scheme, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """What is left is the noise of the kernels' half precision or rounded activations.

    It is far above the bound of the other tests, so means are compared, of all tokens of a policy: the
    difference under a policy is at most 1.5 times that without, and less than a tenth of its effect.
    """
    stored, meant = quantise(tiny_checkpoint, tmp_path, scheme)
    world = build_world(meant, tmp_path / "store")
    standard_policies(world)
    if scheme.activations:
        round_activations(world.model)
    with engine(stored, dtype=scheme.dtype) as llm:
        assert llm.llm_engine.model_config.quantization == "compressed-tensors"
        activate_local(llm, world.plans.values(), world.store)
        texts = prompts(world)
        answers = run_batch(
            llm,
            world,
            [Request(text, policy) for text in texts for policy in (None, *world.policies)],
        )
    differences: dict[str | None, list[torch.Tensor]] = {}
    effects: dict[str | None, list[torch.Tensor]] = {}
    for answer in answers:
        policy, prompt = answer.request.policy, answer.request.prompt
        told = torch.tensor(answer.logprobs)
        text = [*prompt, *answer.token_ids]

        def chosen(
            named: str | None, text: list[int] = text, first: int = len(prompt) - 1
        ) -> torch.Tensor:
            rows = steered_logprobs(
                world.model,
                None if named is None else world.policies[named],
                world.store,
                text,
                first + 1,
            )[first:-1]
            return rows.gather(1, torch.tensor(text[first + 1 :])[:, None])[:, 0]

        differences.setdefault(policy, []).append((told - chosen(policy)).abs())
        effects.setdefault(policy, []).append((chosen(None) - chosen(policy)).abs())
    noise = {policy: float(torch.cat(found).mean()) for policy, found in differences.items()}
    effect = {policy: float(torch.cat(found).mean()) for policy, found in effects.items()}
    print(f"\n[{scheme.name}] mean difference {noise}; mean effect {effect}")
    assert 0 < noise[None] < 0.02
    for policy in world.policies:
        assert noise[policy] <= 1.5 * noise[None], policy
        assert noise[policy] < effect[policy] / 10, policy
