"""The reference does what its formulas say, judged by models that were edited in other ways.

A bias on a Llama layer's down projection adds a constant to the residual stream after that layer,
at every token: an oracle for ``add`` with scope ``all`` that shares no code with the hooks. Other
scopes are judged by what a causal model can and cannot show: what comes before the first touched
token keeps every bit.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from directions.store import Store
from steering.policy import Policy, parse_policy
from steering.policy_errors import PolicyErrors
from tests.steering.conftest import PutDirection

torch = pytest.importorskip("torch")

from steering.reference import (  # noqa: E402
    answer_logprobs,
    decoder_layers,
    generate_greedy,
    steered_logprobs,
    steering,
)

PROMPT = [5, 17, 42, 99, 7, 250, 31, 64]
ANSWER = [12, 200, 3, 77, 150, 18]
TEXT = PROMPT + ANSWER
NORMS = [2.0, 3.0, 5.0, 7.0]


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Iterator[Any]:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()
    before = {name: value.clone() for name, value in loaded.state_dict().items()}
    yield loaded
    assert all(torch.equal(before[name], value) for name, value in loaded.state_dict().items())
    assert not any(module._forward_hooks for module in loaded.modules())


@pytest.fixture
def vectors(put_direction: PutDirection) -> dict[str, np.ndarray]:
    """Two stored directions and their vectors."""
    made = {}
    for seed, name in enumerate(("one", "two")):
        values = np.random.default_rng(seed).normal(size=(4, 64)).astype(np.float32)
        put_direction(name, vectors=values, norms=NORMS)
        made[name] = values
    return made


def policy(*edits: dict[str, Any], **keys: Any) -> Policy:
    """A policy of ``add`` edits: the keys of ``add``, and ``scope``."""
    return parse_policy(
        {
            "apiVersion": "trimtab/v1",
            "kind": "Policy",
            "name": "guard",
            "edits": {
                f"e{i}": {
                    "add": {k: v for k, v in edit.items() if k != "scope"},
                    "scope": edit.get("scope", "all"),
                }
                for i, edit in enumerate(edits)
            },
            **keys,
        }
    )


def one(strength: float = 1.0, **keys: Any) -> dict[str, Any]:
    return {"direction": "one@1", "strength": strength, **keys}


def with_constants(model: Any, constants: dict[int, np.ndarray]) -> Any:
    """A copy of a Llama whose residual stream gets a constant after some layers, by biases."""
    edited = copy.deepcopy(model)
    for layer, constant in constants.items():
        projection = edited.model.layers[layer].mlp.down_proj
        projection.bias = torch.nn.Parameter(torch.tensor(constant, dtype=torch.float32))
    return edited


@torch.no_grad()
def plain_logprobs(model: Any, text: list[int]) -> Any:
    return model(input_ids=torch.tensor([text])).logits[0].float().log_softmax(-1)


# -- the formulas ----------------------------------------------------------------------------------


def unit_of(v: np.ndarray) -> np.ndarray:
    return v / np.sqrt((v.astype(np.float64) ** 2).sum(-1, keepdims=True))


@pytest.mark.parametrize("strength", [-1.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("unit", ["absolute", "unit", "relative"])
def test_add_is_a_constant_on_the_residual_stream(
    unit: str, strength: float, model: Any, store: Store, vectors: dict[str, np.ndarray]
) -> None:
    v = vectors["one"]
    norms = np.array(NORMS)[:, None]
    added = {"absolute": v, "unit": unit_of(v), "relative": norms * unit_of(v)}[unit]
    oracle = with_constants(model, {n: strength * 0.3 * added[n] for n in (1, 2)})

    got = steered_logprobs(
        model, policy(one(0.3, layers="1-2", unit=unit)), store, TEXT, len(PROMPT), strength
    )

    difference = (got - plain_logprobs(oracle, TEXT)).abs().max()
    effect = (got - plain_logprobs(model, TEXT)).abs().max()
    assert difference < 2e-5
    assert effect > 0.02, "the edit is too weak for the comparison to mean anything"


def test_edits_on_the_same_layer_add_up(
    model: Any, store: Store, vectors: dict[str, np.ndarray]
) -> None:
    a, b = vectors["one"], vectors["two"]
    edits = [
        one(0.5),
        {"direction": "two@1", "strength": -0.4, "layers": "2-3"},
        one(0.2, layers=2),
    ]
    oracle = with_constants(
        model,
        {0: 0.5 * a[0], 1: 0.5 * a[1], 2: 0.7 * a[2] - 0.4 * b[2], 3: 0.5 * a[3] - 0.4 * b[3]},
    )

    got = steered_logprobs(model, policy(*edits), store, TEXT, len(PROMPT))

    assert (got - plain_logprobs(oracle, TEXT)).abs().max() < 2e-5
    assert (got - plain_logprobs(model, TEXT)).abs().max() > 0.05


def test_all_layers_are_those_that_the_direction_has(
    model: Any, store: Store, put_direction: PutDirection
) -> None:
    v = np.random.default_rng(3).normal(size=(4, 64)).astype(np.float32)
    put_direction("partial", vectors=v, present=[True, False, False, True])

    got = steered_logprobs(
        model, policy({"direction": "partial@1", "strength": 0.5}), store, TEXT, len(PROMPT)
    )

    oracle = with_constants(model, {0: 0.5 * v[0], 3: 0.5 * v[3]})
    assert (got - plain_logprobs(oracle, TEXT)).abs().max() < 2e-5
    assert (got - plain_logprobs(model, TEXT)).abs().max() > 0.05


def test_no_policy_and_strength_zero_change_no_bit(
    model: Any, store: Store, vectors: dict[str, np.ndarray]
) -> None:
    plain = plain_logprobs(model, TEXT)

    for guard, strength in ((None, 1.0), (policy(), 1.0), (policy(one()), 0.0)):
        assert torch.equal(
            steered_logprobs(model, guard, store, TEXT, len(PROMPT), strength), plain
        )


def test_the_mode_is_the_servers_business(
    model: Any, store: Store, vectors: dict[str, np.ndarray]
) -> None:
    enforced, off = policy(one()), policy(one(), mode="off")

    assert torch.equal(
        steered_logprobs(model, enforced, store, TEXT, len(PROMPT)),
        steered_logprobs(model, off, store, TEXT, len(PROMPT)),
    )


# -- scopes ----------------------------------------------------------------------------------------


def test_generation_leaves_the_prompt_alone_and_touches_what_follows(
    model: Any, store: Store, vectors: dict[str, np.ndarray]
) -> None:
    plain = plain_logprobs(model, TEXT)

    got = steered_logprobs(model, policy(one(scope="generation")), store, TEXT, len(PROMPT))

    # The last prompt token, which predicts the first token of the answer, is still the prompt.
    assert torch.equal(got[: len(PROMPT)], plain[: len(PROMPT)])
    assert ((got - plain)[len(PROMPT) :].abs().amax(-1) > 0.05).all()


def test_prompt_touches_the_prompt_and_what_follows_only_through_it(
    model: Any, store: Store, vectors: dict[str, np.ndarray]
) -> None:
    # On the last layer nothing later reads the change, so it stays at its own tokens.
    last = policy(one(layers=3, scope="prompt"))
    early = policy(one(layers=0, scope="prompt"))
    plain = plain_logprobs(model, TEXT)

    at_last = (steered_logprobs(model, last, store, TEXT, len(PROMPT)) - plain).abs().amax(-1)
    at_early = (steered_logprobs(model, early, store, TEXT, len(PROMPT)) - plain).abs().amax(-1)

    assert (at_last[: len(PROMPT)] > 0.05).all()
    assert (at_last[len(PROMPT) :] == 0).all()
    assert (at_early > 1e-3).all(), "later tokens attend to the steered prompt"


@pytest.mark.parametrize("layer", range(4))
def test_prompt_and_generation_together_are_all(
    layer: int, model: Any, store: Store, vectors: dict[str, np.ndarray]
) -> None:
    both = policy(one(layers=layer, scope="prompt"), one(layers=layer, scope="generation"))

    assert torch.equal(
        steered_logprobs(model, both, store, TEXT, len(PROMPT)),
        steered_logprobs(model, policy(one(layers=layer)), store, TEXT, len(PROMPT)),
    )


def test_a_scope_touches_exactly_its_tokens(
    model: Any, store: Store, vectors: dict[str, np.ndarray]
) -> None:
    stream: list[Any] = []
    watch = model.model.layers[2].register_forward_hook(lambda m, i, o: stream.append(o.clone()))
    guard = policy(one(layers=2, scope="prompt"), one(-2.0, layers=2, scope="generation"))
    try:
        plain_logprobs(model, TEXT)
        with steering(model, guard, store, num_prompt_tokens=len(PROMPT), strength=0.5):
            # Hooks run in the order in which they were registered; watch after the edit.
            watch.remove()
            watch = model.model.layers[2].register_forward_hook(
                lambda m, i, o: stream.append(o.clone())
            )
            plain_logprobs(model, TEXT)
    finally:
        watch.remove()

    plain, steered = stream
    v = torch.tensor(vectors["one"][2])
    expected = plain.clone()
    expected[:, : len(PROMPT)] += 0.5 * v
    expected[:, len(PROMPT) :] += 0.5 * (-2.0 * v)
    assert torch.equal(steered, expected)


# -- generation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["all", "prompt", "generation"])
def test_greedy_generation_agrees_with_teacher_forcing_on_its_own_answer(
    scope: str, model: Any, store: Store, vectors: dict[str, np.ndarray]
) -> None:
    guard = policy(one(layers="1-2", scope=scope))

    answer = generate_greedy(model, guard, store, PROMPT, 24, strength=0.5)

    assert len(answer.token_ids) == 24
    rows = steered_logprobs(model, guard, store, [*PROMPT, *answer.token_ids], len(PROMPT), 0.5)
    assert tuple(rows[len(PROMPT) - 1 : -1].argmax(-1).tolist()) == answer.token_ids
    chosen = answer_logprobs(model, guard, store, PROMPT, answer.token_ids, 0.5)
    assert (chosen - torch.tensor(answer.logprobs)).abs().max() < 1e-4
    plain = generate_greedy(model, None, store, PROMPT, 24)
    assert plain.token_ids != answer.token_ids


def test_generation_ends_with_the_first_stop_token(model: Any, store: Store) -> None:
    whole = generate_greedy(model, None, store, PROMPT, 12)
    stop = whole.token_ids[5]

    short = generate_greedy(model, None, store, PROMPT, 12, stop_ids=frozenset({stop}))

    assert short.token_ids == whole.token_ids[: whole.token_ids.index(stop) + 1]


# -- the model -------------------------------------------------------------------------------------


def test_a_model_that_is_not_in_float32_is_refused(model: Any, store: Store) -> None:
    half = copy.deepcopy(model).to(torch.bfloat16)

    with pytest.raises(ValueError, match="float32"):
        steered_logprobs(half, None, store, TEXT, len(PROMPT))


class Attention(torch.nn.Module):
    """Stands for attention where layers are looked for."""


def layers_with_attention(count: int) -> Any:
    return torch.nn.ModuleList(
        torch.nn.Sequential(Attention(), torch.nn.Linear(2, 2)) for _ in range(count)
    )


def test_layers_are_the_longest_list_with_attention(model: Any) -> None:
    assert decoder_layers(model) is model.model.layers

    other = torch.nn.ModuleDict(
        {
            "vision": layers_with_attention(3),
            "text": layers_with_attention(5),
            "experts": torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(9)),
        }
    )
    assert decoder_layers(other) is other["text"]


def test_layers_are_of_the_number_that_the_configuration_states(model: Any) -> None:
    with_tower = copy.deepcopy(model)
    with_tower.tower = layers_with_attention(9)

    assert decoder_layers(with_tower) is with_tower.model.layers


def test_layers_that_cannot_be_told_are_refused(model: Any) -> None:
    twins = torch.nn.ModuleDict({"a": layers_with_attention(3), "b": layers_with_attention(3)})
    shortened = copy.deepcopy(model)
    shortened.config.num_hidden_layers = 5

    for unclear in (twins, torch.nn.Linear(2, 2), shortened):
        with pytest.raises(ValueError, match="lists of decoder layers"):
            decoder_layers(unclear)


class TupleLayer(torch.nn.Module):
    """A decoder layer of the older convention: its output is a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, stream: Any) -> tuple[Any, str]:
        return 2.0 * stream, "kept"


class TupleModel(torch.nn.Module):
    """Four such layers between an embedding and the logits."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(300, 64)
        self.layers = torch.nn.ModuleList(TupleLayer() for _ in range(4))

    def forward(self, input_ids: Any, use_cache: bool = False) -> SimpleNamespace:
        stream = self.embed(input_ids)
        for layer in self.layers:
            stream, kept = layer(stream)
            assert kept == "kept"
        return SimpleNamespace(logits=stream)


def test_layers_that_return_tuples_are_edited_in_their_first_part(
    store: Store, vectors: dict[str, np.ndarray]
) -> None:
    tupled = TupleModel()

    got = steered_logprobs(tupled, policy(one(layers=[1, 3])), store, TEXT, len(PROMPT))

    v = torch.tensor(vectors["one"])
    expected = 16.0 * tupled.embed(torch.tensor(TEXT)) + 4.0 * v[1] + v[3]
    assert (got - expected.log_softmax(-1)).abs().max() < 1e-4


# -- independence ----------------------------------------------------------------------------------


def test_the_reference_does_not_lean_on_what_it_judges() -> None:
    script = (
        "import sys, steering.reference\n"
        "judged = ('vllm', 'steering.plan', 'steering.engine', 'steering.ops')\n"
        "loaded = [name for name in sys.modules if name.startswith(judged)]\n"
        "sys.exit(f'loaded {loaded}' if loaded else 0)"
    )

    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_an_unknown_direction_is_the_stores_error(model: Any, store: Store) -> None:
    from directions.errors import TrimtabError

    with pytest.raises(TrimtabError) as caught:
        steered_logprobs(model, policy(one()), store, TEXT, len(PROMPT))

    assert caught.value.code == "E_ARTEFACT_UNKNOWN"
    assert not isinstance(caught.value, PolicyErrors)
