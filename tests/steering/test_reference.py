"""The reference does what its formulas say, judged by arithmetic and by models edited otherwise.

A bias on a Llama layer's down projection adds a constant to the residual stream after that layer,
at every token; weights made orthogonal to a direction never write it; a head's columns of the
output projection scale the head: oracles that share no code with the hooks. Scopes and gates are
judged by which tokens of which layers change, and by what a causal model can and cannot show: what
comes before the first touched token keeps every bit.
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

from directions.card import HeadSetDraft, ProbeDraft
from directions.store import Store
from steering.policy import Policy, parse_policy
from steering.policy_errors import PolicyErrors
from tests.steering.conftest import PutDirection, model_fingerprint

torch = pytest.importorskip("torch")

from steering.reference import (  # noqa: E402
    GateResult,
    answer_logprobs,
    generate_greedy,
    probe_scores,
    steered,
    steered_logprobs,
    steering,
    text_phases,
    token_texts,
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
    for module in loaded.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


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


# -- the kinds of edit, against arithmetic ---------------------------------------------------------


def document(edits: dict[str, Any], gates: dict[str, Any] | None = None) -> Policy:
    """A policy of any edits and gates."""
    return parse_policy(
        {
            "apiVersion": "trimtab/v1",
            "kind": "Policy",
            "name": "guard",
            "edits": edits,
            **({"gates": gates} if gates else {}),
        }
    )


def rows_of(value: Any) -> np.ndarray:
    tensor = value[0] if isinstance(value, tuple) else value
    return tensor[0].double().numpy().copy()


def observed(
    model: Any, module: Any, guard: Policy, store: Store, strength: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """What a module returns before and after the edits: ``[T, width] float64`` each."""
    seen: list[np.ndarray] = []
    handles = [module.register_forward_hook(lambda m, i, o: seen.append(rows_of(o)))]
    try:
        with steering(model, guard, store, num_prompt_tokens=len(PROMPT), strength=strength):
            # Hooks run in the order in which they were registered.
            handles.append(module.register_forward_hook(lambda m, i, o: seen.append(rows_of(o))))
            plain_logprobs(model, TEXT)
    finally:
        for handle in handles:
            handle.remove()
    before, after = seen
    return before, after


@pytest.mark.parametrize(("c", "s"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.5), (1.5, -2.0)])
def test_ablate_takes_a_share_of_the_projection_away(
    c: float, s: float, model: Any, store: Store, vectors: dict[str, np.ndarray]
) -> None:
    guard = document({"a": {"ablate": {"direction": "one@1", "layers": 2, "strength": c}}})

    before, after = observed(model, model.model.layers[2], guard, store, s)

    u = unit_of(vectors["one"])[2]
    p, q = before @ u, after @ u
    assert np.allclose(q, (1 - s * c) * p, atol=1e-5)
    assert np.allclose(after - np.outer(q, u), before - np.outer(p, u), atol=1e-5)
    assert np.abs(q - p).max() > 0.1


@torch.no_grad()
def test_ablating_the_blocks_is_never_writing_the_direction(
    model: Any, store: Store, put_direction: PutDirection
) -> None:
    r = np.random.default_rng(9).normal(size=64).astype(np.float32)
    put_direction("same", vectors=np.tile(r, (4, 1)))
    guard = document(
        {"a": {"ablate": {"direction": "same@1", "sites": ["attention", "mlp"], "layers": "1-3"}}}
    )
    oracle = copy.deepcopy(model)
    u = torch.tensor(unit_of(r))
    for layer in list(oracle.model.layers)[1:]:
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
            weight -= torch.outer(u, u @ weight.double()).float()

    got = steered_logprobs(model, guard, store, TEXT, len(PROMPT))

    assert (got - plain_logprobs(oracle, TEXT)).abs().max() < 2e-5
    assert (got - plain_logprobs(model, TEXT)).abs().max() > 0.02


@pytest.mark.parametrize("site", ["attention", "mlp", "residual"])
def test_ablate_acts_at_the_sites_that_it_names_and_no_other(
    site: str, model: Any, store: Store, vectors: dict[str, np.ndarray]
) -> None:
    guard = document({"a": {"ablate": {"direction": "one@1", "layers": 2, "sites": [site]}}})
    layer = model.model.layers[2]
    modules = {"attention": layer.self_attn, "mlp": layer.mlp, "residual": layer}
    u = unit_of(vectors["one"])[2]

    for name, module in modules.items():
        before, after = observed(model, module, guard, store)
        if name == site:
            assert np.allclose(after, before - np.outer(before @ u, u), atol=1e-5)
            assert np.abs(before @ u).max() > 0.01
        else:
            assert np.array_equal(before, after)


@pytest.mark.parametrize("unit", ["absolute", "relative"])
@pytest.mark.parametrize(
    "bounds",
    [{"to": 0.4}, {"atLeast": 0.1}, {"atMost": -0.1}, {"atLeast": -0.2, "atMost": 0.3}],
    ids=lambda bounds: "+".join(bounds),
)
@pytest.mark.parametrize("s", [1.0, 0.25])
def test_clamp_moves_the_projection_to_its_bounds(
    s: float,
    bounds: dict[str, float],
    unit: str,
    model: Any,
    store: Store,
    vectors: dict[str, np.ndarray],
) -> None:
    guard = document({"c": {"clamp": {"direction": "one@1", "layers": 1, "unit": unit, **bounds}}})

    before, after = observed(model, model.model.layers[1], guard, store, s)

    u = unit_of(vectors["one"])[1]
    scale = NORMS[1] if unit == "relative" else 1.0
    low = bounds.get("to", bounds.get("atLeast", -np.inf)) * scale
    high = bounds.get("to", bounds.get("atMost", np.inf)) * scale
    p, q = before @ u, after @ u
    assert np.allclose(q, p + s * (np.clip(p, low, high) - p), atol=1e-5)
    assert np.allclose(after - np.outer(q, u), before - np.outer(p, u), atol=1e-5)
    moved = (p < low) | (p > high)
    assert moved.any()
    assert np.array_equal(after[~moved], before[~moved])


def plane_of(vectors: dict[str, np.ndarray], layer: int) -> tuple[np.ndarray, np.ndarray]:
    """An orthonormal basis of the plane, by QR, with the signs that the definition gives."""
    q, r = np.linalg.qr(
        np.stack([vectors["one"][layer], vectors["two"][layer]], axis=1).astype(np.float64)
    )
    q = q * np.sign(np.diag(r))
    return q[:, 0], q[:, 1]


@pytest.mark.parametrize("s", [1.0, 0.5, -1.0])
@pytest.mark.parametrize(("key", "degrees"), [("by", 90), ("by", -150), ("to", 30), ("to", -180)])
def test_rotate_turns_the_part_in_the_plane_and_keeps_its_length(
    key: str,
    degrees: float,
    s: float,
    model: Any,
    store: Store,
    vectors: dict[str, np.ndarray],
) -> None:
    guard = document({"r": {"rotate": {"plane": ["one@1", "two@1"], "layers": 2, key: degrees}}})

    before, after = observed(model, model.model.layers[2], guard, store, s)

    b1, b2 = plane_of(vectors, 2)
    old, new = before @ b1 + 1j * (before @ b2), after @ b1 + 1j * (after @ b2)
    theta = np.deg2rad(degrees)
    # As complex numbers: the angle from where it is to where it goes lies in (−π, π] by itself.
    turn = theta if key == "by" else np.angle(np.exp(1j * theta) / (old / np.abs(old)))
    assert np.allclose(new, old * np.exp(1j * s * turn), atol=1e-5)
    if key == "to" and s == 1.0:
        assert np.allclose(new, np.abs(old) * np.exp(1j * theta), atol=1e-5)
    rest = [h - np.outer(h @ b1, b1) - np.outer(h @ b2, b2) for h in (before, after)]
    assert np.allclose(*rest, atol=1e-5)
    assert np.allclose(np.linalg.norm(after, axis=1), np.linalg.norm(before, axis=1), rtol=1e-6)
    assert np.abs(new - old).max() > 0.1


def test_a_plane_of_parallel_directions_is_refused(
    model: Any, store: Store, vectors: dict[str, np.ndarray], put_direction: PutDirection
) -> None:
    put_direction("near", vectors=-3.0 * vectors["one"] + 1e-4 * vectors["two"])
    guard = document({"r": {"rotate": {"plane": ["one@1", "near@1"], "layers": 2, "by": 10}}})

    with pytest.raises(ValueError, match="parallel at layer 2"):
        steered_logprobs(model, guard, store, TEXT, len(PROMPT))


@pytest.mark.parametrize("kind", ["add", "ablate", "clamp"])
def test_one_layers_vector_may_serve_all_layers(
    kind: str, model: Any, store: Store, put_direction: PutDirection
) -> None:
    values = np.random.default_rng(4).normal(size=(4, 64)).astype(np.float32)
    put_direction("some", vectors=values, present=[False, True, False, True], norms=NORMS)
    keys: dict[str, Any] = {"direction": "some@1", "layers": "all", "vectorLayer": 1}
    keys |= {"add": {"strength": 0.2, "unit": "relative"}, "clamp": {"to": 2.0}}.get(kind, {})
    if kind == "clamp":
        keys["unit"] = "relative"
    guard = document({"e": {kind: keys}})
    u = unit_of(values)[1]

    for layer in model.model.layers:
        before, after = observed(model, layer, guard, store)
        expected = {
            "add": before + 0.2 * NORMS[1] * u,
            "ablate": before - np.outer(before @ u, u),
            "clamp": before + np.outer(2.0 * NORMS[1] - before @ u, u),
        }[kind]
        assert np.allclose(after, expected, atol=1e-5)
        assert np.abs(after - before).max() > 0.01


def test_edits_of_one_layer_act_in_the_order_of_kinds_and_then_of_names(
    model: Any, store: Store, vectors: dict[str, np.ndarray]
) -> None:
    guard = document(
        {
            "d": {"add": {"direction": "two@1", "layers": 2, "strength": 0.5}},
            "c": {"rotate": {"plane": ["one@1", "two@1"], "layers": 2, "by": 40}},
            "b": {"clamp": {"direction": "two@1", "layers": 2, "atLeast": 2.0}},
            "a": {"clamp": {"direction": "one@1", "layers": 2, "to": 1.0}},
            "e": {"ablate": {"direction": "two@1", "layers": 2, "strength": 0.7}},
        }
    )

    before, after = observed(model, model.model.layers[2], guard, store)

    u, v = unit_of(vectors["one"])[2], unit_of(vectors["two"])[2]
    b1, b2 = plane_of(vectors, 2)
    assert abs(u @ v) > 0.01, "with orthogonal directions any order of clamps is the same"
    h = before - 0.7 * np.outer(before @ v, v)
    h = h + np.outer(1.0 - h @ u, u)
    h = h + np.outer(np.maximum(h @ v, 2.0) - h @ v, v)
    z = h @ b1 + 1j * (h @ b2)
    turned = z * np.exp(1j * np.deg2rad(40))
    h = h + np.outer((turned - z).real, b1) + np.outer((turned - z).imag, b2)
    h = h + 0.5 * vectors["two"][2]
    assert np.allclose(after, h, atol=2e-5)


# -- heads -----------------------------------------------------------------------------------------


def put_heads(store: Store, heads: list[tuple[int, int]]) -> None:
    draft = HeadSetDraft(
        method="test",
        model=model_fingerprint(),
        dtype="float32",
        created="2026-01-01T00:00:00Z",
    )
    store.put_head_set(draft, heads, np.ones(len(heads), dtype=np.float32), name="some")


@torch.no_grad()
def test_scaling_heads_is_scaling_their_columns_of_the_output_projection(
    model: Any, store: Store
) -> None:
    put_heads(store, [(1, 3), (2, 0)])
    guard = document(
        {
            "set": {"scale_heads": {"heads": "some@1", "factor": 0.0}},
            "inline": {"scale_heads": {"heads": [[2, 0], [3, 1]], "factor": [1.5, -2.0]}},
        }
    )
    s = 0.5
    factors = {(1, 3): 1 - s * 1.0, (2, 0): 1 + s * (-1.0 + 0.5), (3, 1): 1 + s * (-3.0)}
    oracle = copy.deepcopy(model)
    for (layer, head), factor in factors.items():
        oracle.model.layers[layer].self_attn.o_proj.weight[:, head * 32 : head * 32 + 32] *= factor

    got = steered_logprobs(model, guard, store, TEXT, len(PROMPT), s)

    assert (got - plain_logprobs(oracle, TEXT)).abs().max() < 2e-5
    assert (got - plain_logprobs(model, TEXT)).abs().max() > 0.02


def observed_heads(
    model: Any, layer: int, guard: Policy, store: Store, strength: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """The heads' outputs side by side before and after they are scaled: ``[T, 4 · 32]``."""
    seen: list[np.ndarray] = []
    projection = model.model.layers[layer].self_attn.o_proj
    handles = [projection.register_forward_pre_hook(lambda m, i: seen.append(rows_of(i)))]
    try:
        with steering(model, guard, store, num_prompt_tokens=len(PROMPT), strength=strength):
            handles.append(
                projection.register_forward_pre_hook(lambda m, i: seen.append(rows_of(i)))
            )
            plain_logprobs(model, TEXT)
    finally:
        for handle in handles:
            handle.remove()
    before, after = seen
    return before, after


def test_renormalising_gives_a_token_the_joint_length_of_its_heads_back(
    model: Any, store: Store
) -> None:
    heads = {"heads": [[2, 1], [2, 3]], "factor": [0.0, 3.0]}
    guard = document(
        {
            "plain": {"scale_heads": heads, "scope": "prompt"},
            "row": {"scale_heads": {**heads, "renormalise": "row"}, "scope": "generation"},
        }
    )

    before, after = observed_heads(model, 2, guard, store)

    scaled = before * np.repeat([1.0, 0.0, 1.0, 3.0], 32)
    lengths = np.linalg.norm(before, axis=1), np.linalg.norm(scaled, axis=1)
    ratio = lengths[0] / lengths[1]
    ratio[: len(PROMPT)] = 1.0
    assert np.allclose(after, scaled * ratio[:, None], atol=1e-6)
    assert (np.abs(ratio[len(PROMPT) :] - 1.0) > 0.01).all()


def test_heads_that_are_all_zero_stay_zero_when_renormalised(model: Any, store: Store) -> None:
    every = [[1, head] for head in range(4)]
    guard = document({"a": {"scale_heads": {"heads": every, "factor": 0.0, "renormalise": "row"}}})

    _, after = observed_heads(model, 1, guard, store)

    assert not after.any()


def test_a_head_that_the_model_does_not_have_is_refused(model: Any, store: Store) -> None:
    guard = document({"a": {"scale_heads": {"heads": [[1, 4]], "factor": 0.0}}})

    with pytest.raises(ValueError, match="layer 1 has 4 heads"):
        steered_logprobs(model, guard, store, TEXT, len(PROMPT))


def every_kind() -> dict[str, Any]:
    """One edit of each kind, each on all layers."""
    return {
        "add": {"add": {"direction": "one@1", "strength": 0.3}},
        "ablate": {
            "ablate": {"direction": "two@1", "sites": ["attention", "mlp", "residual"]},
        },
        "clamp": {"clamp": {"direction": "two@1", "atLeast": 0.3}},
        "rotate": {"rotate": {"plane": ["one@1", "two@1"], "by": 25}},
        "heads": {
            "scale_heads": {
                "heads": [[n, n] for n in range(4)],
                "factor": 0.3,
                "renormalise": "row",
            },
        },
    }


def test_no_kind_changes_a_bit_at_strength_zero(
    model: Any, store: Store, vectors: dict[str, np.ndarray]
) -> None:
    plain = plain_logprobs(model, TEXT)

    for name, edit in every_kind().items():
        guard = document({name: edit})
        assert torch.equal(steered_logprobs(model, guard, store, TEXT, len(PROMPT), 0.0), plain)
        at_one = steered_logprobs(model, guard, store, TEXT, len(PROMPT), 1.0)
        assert (at_one - plain).abs().max() > 0.01


# -- phases ----------------------------------------------------------------------------------------

THINKING = ("<think>", "</think>")


@pytest.mark.parametrize(
    ("prompt", "made", "phases", "prompt_ended"),
    [
        # An answer without thinking; a marker that shares its token, and one that spans three.
        (["hi"], ["a", " b"], "AA", False),
        (["hi"], ["<think>so", "x", "y</think>z", "w"], "TTEA", False),
        (["hi"], ["<", "thi", "nk>", "x</", "thin", "k>", "a"], "AATTTEA", False),
        # White space and empty tokens directly after the end; not later.
        (["hi"], ["<think>", "</think>", "\n", "", " \n", "a", "\n"], "TEEEEAA", False),
        # A white-space token is only thinking while thinking.
        (["hi"], ["<think>", "\n", "</think>"], "TTE", False),
        # Thinking again; a start directly after an end; both in one token.
        (["hi"], ["<think>", "</think>", "<think>", "x", "</think>"], "TETTE", False),
        (["hi"], ["<think></think>", "<think></think><think>", "x"], "ETT", False),
        (["hi"], ["<think>a</think><think>b</think>", " ", "c"], "EEA", False),
        # An end without a start, a start within thinking, a broken marker.
        (["hi"], ["</think>", "a"], "AA", False),
        (["hi"], ["<think>", "<think>", "</think>", "a"], "TTEA", False),
        (["hi"], ["<th", "ink", "a>", "<think", ">"], "AAAAT", False),
        (["hi"], ["<<think>", "<</think>", "a"], "TEA", False),
        # What the prompt leaves.
        (["q", "<think>", "\n"], ["x", "</think>", "a"], "TEA", False),
        (["q", "<think>", "</think>", "\n\n"], ["\n", "a"], "EA", True),
        (["q", "<think></think>"], ["a"], "A", True),
        (["q", "<think></think>", "so"], ["\n", "a"], "AA", False),
        (["q", "<thi"], ["nk>", "x"], "TT", False),
        (["q", "<think>x</th"], ["ink>", "a"], "EA", False),
    ],
)
def test_phases_of_a_text(
    prompt: list[str], made: list[str], phases: str, prompt_ended: bool
) -> None:
    names = {"A": "answer", "T": "thinking", "E": "think_end"}

    found = text_phases([*prompt, *made], len(prompt), THINKING)

    assert found.phases[: len(prompt)] == ("prompt",) * (len(prompt) - 1) + ("prompt_end",)
    assert found.phases[len(prompt) :] == tuple(names[letter] for letter in phases)
    assert found.prompt_ended is prompt_ended


def test_a_marker_shares_no_character_with_the_one_before() -> None:
    found = text_phases(["x", "|||", "|", "a"], 1, ("||", "||"))

    assert found.phases == ("prompt_end", "thinking", "think_end", "answer")


def test_texts_are_what_the_tokenizer_makes_of_each_token_alone(tiny_checkpoint: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    ids = tokenizer.encode("<think> the  ship\n</think><|im_end|>")

    texts = token_texts(tokenizer, ids)

    assert len(texts) == len(ids)
    assert "".join(texts) == "<think> the  ship\n</think><|im_end|>"


# The answer of TEXT: start marker over two tokens, a thought, its end, white space, an answer.
TEXTS = ["x"] * len(PROMPT) + ["<thi", "nk>", "</think>", "\n\n", "Yes", "\n"]
THOUGHT, END, BLANK, YES = 9, 10, 11, 12


def touched(
    model: Any,
    guard: Policy,
    store: Store,
    texts: list[str] = TEXTS,
    num_prompt_tokens: int = len(PROMPT),
) -> list[set[int]]:
    """The positions at which each layer's residual stream was edited, over all passes.

    Each layer's own output is compared with what the next module is given.
    """
    chain = [*model.model.layers, model.model.norm]
    before: list[list[np.ndarray]] = [[] for _ in chain]
    after: list[list[np.ndarray]] = [[] for _ in chain]
    handles = []
    for n in range(4):
        handles += [
            chain[n].register_forward_hook(lambda m, i, o, n=n: before[n].append(rows_of(o))),
            chain[n + 1].register_forward_pre_hook(lambda m, i, n=n: after[n].append(rows_of(i))),
        ]
    try:
        steered(model, guard, store, TEXT, num_prompt_tokens, texts=texts, thinking=THINKING)
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for n in range(4):
        old, new = np.concatenate(before[n]), np.concatenate(after[n])
        assert len(old) == len(new) == len(TEXT)
        found.append({int(t) for t in np.flatnonzero((old != new).any(axis=1))})
    return found


@pytest.mark.parametrize(
    ("scope", "positions"),
    [
        ("all", range(14)),
        ("prompt", range(8)),
        ("prompt_end", [7]),
        ("generation", range(8, 14)),
        ("thinking", [THOUGHT]),
        ("think_end", [END, BLANK]),
        ("answer", [8, YES, 13]),
        ({"first": 1}, [8]),
        ({"first": 3}, [8, 9, 10]),
        ({"first": 4096}, range(8, 14)),
        (["prompt_end", {"first": 2}], [7, 8, 9]),
        (["think_end", "thinking", {"first": 1}], [8, THOUGHT, END, BLANK]),
    ],
    ids=str,
)
def test_each_scope_touches_its_tokens(
    scope: Any, positions: Any, model: Any, store: Store, vectors: dict[str, np.ndarray]
) -> None:
    guard = policy(one(layers="1-2", scope=scope))

    assert touched(model, guard, store) == [set(), set(positions), set(positions), set()]


@pytest.mark.parametrize("missing", ["texts", "thinking"])
def test_thinking_cannot_be_told_without_text_and_markers(
    missing: str, model: Any, store: Store, vectors: dict[str, np.ndarray]
) -> None:
    known: dict[str, Any] = {"texts": TEXTS, "thinking": THINKING}
    del known[missing]

    for scope in ("thinking", "think_end", "answer"):
        with pytest.raises(ValueError, match="thinking markers"):
            steered(model, policy(one(scope=scope)), store, TEXT, len(PROMPT), **known)
    steered(model, policy(one(scope="generation")), store, TEXT, len(PROMPT), **known)


# -- probes and gates ------------------------------------------------------------------------------


def put_probe(store: Store, name: str, layer: int | None = 1, read_out: str = "affine") -> Any:
    """Store a probe of two outputs; returns its weights and bias in float64."""
    rng = np.random.default_rng(11)
    weights = rng.normal(size=(2, 64)).astype(np.float32) * np.float32(0.1)
    bias = np.array([0.1, -0.2], dtype=np.float32)
    draft = ProbeDraft(
        method="test",
        model=model_fingerprint(),
        dtype="float32",
        created="2026-01-01T00:00:00Z",
        site="final_norm" if layer is None else "residual",
        layer=layer,
        read_out=read_out,
        outputs=("zero", "one"),
    )
    store.put_probe(draft, weights, bias, name=name)
    return weights.astype(np.float64), bias.astype(np.float64)


def plain_scores(model: Any, store: Store, probe: str) -> list[float]:
    return probe_scores(model, None, store, probe, TEXT, len(PROMPT)).tolist()


@pytest.mark.parametrize("output", [0, 1])
@pytest.mark.parametrize("read_out", ["affine", "cosine"])
@pytest.mark.parametrize("layer", [0, 2, None])
def test_scores_are_what_the_formulas_say(
    layer: int | None, read_out: str, output: int, model: Any, store: Store
) -> None:
    weights, bias = put_probe(store, "probe", layer, read_out)
    module = model.model.norm if layer is None else model.model.layers[layer]
    seen: list[np.ndarray] = []
    watch = module.register_forward_hook(lambda m, i, o: seen.append(rows_of(o)))

    got = probe_scores(model, None, store, "probe@1", TEXT, len(PROMPT), output=output)

    watch.remove()
    (h,), w = seen, weights[output]
    if read_out == "affine":
        expected = 1 / (1 + np.exp(-(h @ w + bias[output])))
    else:
        squashed = np.tanh(np.outer(h @ w / (w @ w), w))
        expected = (h * squashed).sum(1) / (
            np.linalg.norm(h, axis=1) * np.linalg.norm(squashed, axis=1)
        )
    assert np.allclose(got.numpy(), expected, atol=1e-9)
    assert got.std() > 0.01


def test_a_probe_reads_before_the_edits_of_its_layer_and_after_those_below(
    model: Any, store: Store, vectors: dict[str, np.ndarray]
) -> None:
    put_probe(store, "probe", 1)
    plain = plain_scores(model, store, "probe@1")

    def under(layers: Any) -> list[float]:
        guard = policy(one(layers=layers))
        return probe_scores(model, guard, store, "probe@1", TEXT, len(PROMPT)).tolist()

    assert under("1-3") == plain
    assert all(abs(a - b) > 1e-4 for a, b in zip(under(0), plain, strict=True))


@pytest.mark.parametrize("form", ["above", "below", "between"])
def test_a_token_gate_opens_for_the_tokens_whose_score_is_in_range(
    form: str, model: Any, store: Store, vectors: dict[str, np.ndarray]
) -> None:
    put_probe(store, "probe", 1)
    scores = plain_scores(model, store, "probe@1")
    ranked = sorted(scores)
    low, high = (ranked[4] + ranked[5]) / 2, (ranked[10] + ranked[11]) / 2
    rule, inside = {
        "above": ({"above": low}, lambda x: x > low),
        "below": ({"below": high}, lambda x: x < high),
        "between": ({"between": [low, high]}, lambda x: low < x < high),
    }[form]
    guard = document(
        {
            "gated": {"add": one(layers="2-3")},
            "free": {"add": one(layers=1), "scope": "prompt_end"},
        },
        {"g": {"probe": "probe@1", "output": 0, "at": "token", **rule, "then": ["gated"]}},
    )
    opened = [t for t, score in enumerate(scores) if inside(score)]
    assert 0 < len(opened) < len(TEXT)

    assert touched(model, guard, store) == [set(), {7}, set(opened), set(opened)]
    result = steered(model, guard, store, TEXT, len(PROMPT))
    assert result.gates == {"g": GateResult(True, opened[0], scores[opened[0]], len(opened))}
    assert result.probe_scores["g"].tolist() == scores


def test_a_gates_edits_keep_to_their_scope(
    model: Any, store: Store, vectors: dict[str, np.ndarray]
) -> None:
    put_probe(store, "probe", 0)
    guard = document(
        {"gated": {"add": one(layers=2), "scope": ["prompt_end", "think_end"]}},
        {"g": {"probe": "probe@1", "at": "token", "above": -1.0, "then": ["gated"]}},
    )

    assert touched(model, guard, store) == [set(), set(), {7, END, BLANK}, set()]


def test_a_threshold_is_not_within_its_range(
    model: Any, store: Store, vectors: dict[str, np.ndarray]
) -> None:
    put_probe(store, "probe", 1)

    def gated(rule: dict[str, float]) -> GateResult:
        guard = document(
            {"gated": {"add": one()}},
            {"g": {"probe": "probe@1", "at": "prompt_end", **rule, "then": ["gated"]}},
        )
        return steered(model, guard, store, TEXT, len(PROMPT)).gates["g"]

    # From the same passes: other cuts of the text round otherwise in the last place.
    score = gated({"above": 0.0}).score
    assert score is not None
    for rule in ({"above": score}, {"below": score}):
        result = gated(rule)
        assert (result.open, result.position, result.open_tokens) == (False, 7, 0)
        assert result.score == score


@pytest.mark.parametrize("layer", [0, 1, 3, None])
def test_a_prompt_end_gate_opens_for_what_follows_and_then_for_all(
    layer: int | None, model: Any, store: Store, vectors: dict[str, np.ndarray]
) -> None:
    put_probe(store, "probe", layer)
    score = plain_scores(model, store, "probe@1")[7]

    def guard(threshold: float) -> Policy:
        return document(
            {"gated": {"add": one()}},
            {"g": {"probe": "probe@1", "at": "prompt_end", "above": threshold, "then": ["gated"]}},
        )

    later = set(range(8, 14))
    assert touched(model, guard(score - 1e-3), store) == [
        later | {7} if n >= (4 if layer is None else layer) else later for n in range(4)
    ]
    assert touched(model, guard(score + 1e-3), store) == [set()] * 4
    result = steered(model, guard(score - 1e-3), store, TEXT, len(PROMPT)).gates["g"]
    assert (result.open, result.position, result.open_tokens) == (True, 7, 1)
    assert result.score == pytest.approx(score, abs=1e-5)


def think_end_gate(rule: dict[str, float]) -> Policy:
    return document(
        {"gated": {"add": one()}},
        {"g": {"probe": "probe@1", "at": "think_end", **rule, "then": ["gated"]}},
    )


def test_a_think_end_gate_follows_its_latest_decision(
    model: Any, store: Store, vectors: dict[str, np.ndarray]
) -> None:
    # The probe's layer is never edited before it is read at the two tokens that decide.
    put_probe(store, "probe", 1)
    scores = plain_scores(model, store, "probe@1")
    middle = (scores[END] + scores[BLANK]) / 2
    first, second = {"above": middle}, {"below": middle}
    if scores[END] < scores[BLANK]:
        first, second = second, first
    assert abs(scores[END] - scores[BLANK]) > 1e-3
    rest = {YES, 13}

    # Both decisions open: at a deciding token only what comes after the reading.
    both = [rest, *[rest | {END, BLANK}] * 3]
    assert touched(model, think_end_gate({"above": -1.0}), store) == both
    # Only the first: the second closes again for all that follows.
    assert touched(model, think_end_gate(first), store) == [set(), {END}, {END}, {END}]
    # Only the second.
    late = [rest, *[rest | {BLANK}] * 3]
    assert touched(model, think_end_gate(second), store) == late
    assert touched(model, think_end_gate({"above": 2.0}), store) == [set()] * 4

    for rule, is_open, count in ((first, False, 1), (second, True, 1), ({"above": -1.0}, True, 2)):
        result = steered(
            model, think_end_gate(rule), store, TEXT, len(PROMPT), texts=TEXTS, thinking=THINKING
        ).gates["g"]
        assert (result.open, result.position, result.open_tokens) == (is_open, BLANK, count)
        assert result.score == pytest.approx(scores[BLANK], abs=1e-5)


def test_a_think_end_token_starts_closed_even_after_an_open_decision(
    model: Any, store: Store, vectors: dict[str, np.ndarray]
) -> None:
    put_probe(store, "probe", 1)
    texts = ["x"] * 7 + ["<think></think>", "\n", " ", "so", "a", "b", "c"]

    got = touched(model, think_end_gate({"above": -1.0}), store, texts)

    # The last of the prompt, 8 and 9 decide, each open: none of them is touched before layer 1.
    assert got == [{10, 11, 12, 13}] + [{7, 8, 9, 10, 11, 12, 13}] * 3


@pytest.mark.parametrize("opens", [True, False])
def test_later_ends_of_thinking_find_the_gate_as_the_first_has_left_it(
    opens: bool, model: Any, store: Store, vectors: dict[str, np.ndarray]
) -> None:
    put_probe(store, "probe", 1)
    texts = ["x"] * 8 + ["<think>", "</think>", "so", "<think>", "</think>", "so"]
    scores = plain_scores(model, store, "probe@1")
    # The later end, were it to decide, would decide otherwise.
    middle = (scores[9] + scores[12]) / 2
    assert abs(scores[9] - scores[12]) > 1e-3
    rule = {"above" if (scores[9] > scores[12]) == opens else "below": middle}

    got = touched(model, think_end_gate(rule), store, texts)

    later = {10, 11, 12, 13}
    assert got == ([later] + [later | {9}] * 3 if opens else [set()] * 4)
    result = steered(
        model, think_end_gate(rule), store, TEXT, len(PROMPT), texts=texts, thinking=THINKING
    ).gates["g"]
    assert (result.open, result.position, result.open_tokens) == (opens, 9, int(opens))
    assert result.score == pytest.approx(scores[9], abs=1e-5)


@pytest.mark.parametrize(("end", "ended"), [(["</think>", "\n"], True), (["</think>", "a"], False)])
def test_thinking_that_ends_within_the_prompt_is_decided_at_its_end(
    end: list[str], ended: bool, model: Any, store: Store, vectors: dict[str, np.ndarray]
) -> None:
    put_probe(store, "probe", 1)
    texts = ["x"] * 5 + ["<think>", *end, "\n", "a", "b", "c", "d", "e"]

    got = touched(model, think_end_gate({"above": -1.0}), store, texts)

    if ended:  # the white space at position 8 belongs to the end of thinking
        rest = set(range(9, 14))
        assert got == [rest, *[rest | {7, 8}] * 3]
    else:
        assert got == [set()] * 4


def test_a_gate_that_is_never_decided_is_closed(
    model: Any, store: Store, vectors: dict[str, np.ndarray]
) -> None:
    put_probe(store, "probe", 1)
    guard = think_end_gate({"above": -1.0})

    result = steered(
        model, guard, store, TEXT, len(PROMPT), texts=["x"] * len(TEXT), thinking=THINKING
    )

    assert result.gates == {"g": GateResult(False, None, None, 0)}
    assert torch.equal(result.logprobs, plain_logprobs(model, TEXT))
    assert len(result.probe_scores["g"]) == len(TEXT)


def test_one_open_gate_of_several_is_enough(
    model: Any, store: Store, vectors: dict[str, np.ndarray]
) -> None:
    put_probe(store, "probe", 0)

    def gate(at: str, above: float) -> dict[str, Any]:
        return {"probe": "probe@1", "at": at, "above": above, "then": ["gated"]}

    guard = document(
        {"gated": {"add": one(layers=2)}},
        {"shut": gate("token", 2.0), "end": gate("prompt_end", -1.0)},
    )

    assert touched(model, guard, store) == [set(), set(), set(range(7, 14)), set()]


def gated_policy(scores: list[float]) -> Policy:
    """All kinds of edits behind all kinds of gates."""
    edits = every_kind()
    edits["add"]["scope"] = ["answer", {"first": 2}]
    edits["clamp"]["clamp"]["layers"] = "2-3"
    return document(
        edits,
        {
            "each": {
                "probe": "probe@1",
                "at": "token",
                "above": float(np.median(scores)),
                "then": ["clamp"],
            },
            "asked": {"probe": "probe@1", "at": "prompt_end", "above": -1, "then": ["rotate"]},
            "thought": {
                "probe": "probe@1",
                "output": 1,
                "at": "think_end",
                "above": -1.0,
                "then": ["ablate", "heads"],
            },
        },
    )


@torch.no_grad()
def test_segments_are_the_same_as_token_by_token(
    model: Any, store: Store, vectors: dict[str, np.ndarray]
) -> None:
    put_probe(store, "probe", 1)
    guard = gated_policy(plain_scores(model, store, "probe@1"))
    whole = steered(model, guard, store, TEXT, len(PROMPT), texts=TEXTS, thinking=THINKING)

    rows, cache, position = [], None, 0
    with steering(
        model,
        guard,
        store,
        num_prompt_tokens=len(PROMPT),
        first_position=lambda: position,
        texts=TEXTS,
        thinking=THINKING,
    ) as now:
        for position, token in enumerate(TEXT):  # noqa: B007 (read by first_position)
            output = model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            rows.append(output.logits[0])

    single = torch.cat(rows).log_softmax(-1)
    assert (whole.logprobs - single).abs().max() < 5e-5
    for name, result in now.results().items():
        assert result.open
        assert result.score == pytest.approx(whole.gates[name].score, abs=1e-5)
        assert result.position == whole.gates[name].position
        assert result.open_tokens == whole.gates[name].open_tokens
    assert whole.gates["thought"].open_tokens == 2
    assert 0 < whole.gates["each"].open_tokens < len(TEXT)


class Speller:
    """A tokenizer whose token ids are spelt by their remainder: markers come and go."""

    def decode(self, ids: list[int], **options: Any) -> str:
        assert options == {
            "skip_special_tokens": False,
            "clean_up_tokenization_spaces": False,
        }
        (token,) = ids
        return ["<think>", "</think>", "\n", "a", "b", "<think>", "</think>"][token % 7]


def test_a_gated_answer_agrees_with_teacher_forcing_on_itself(
    model: Any, store: Store, vectors: dict[str, np.ndarray]
) -> None:
    put_probe(store, "probe", 1)
    guard = gated_policy(plain_scores(model, store, "probe@1"))
    known: dict[str, Any] = {"tokenizer": Speller(), "thinking": THINKING}

    answer = generate_greedy(model, guard, store, PROMPT, 24, **known)

    text = [*PROMPT, *answer.token_ids]
    phases = text_phases(token_texts(Speller(), text), len(PROMPT), THINKING).phases
    assert set(phases[len(PROMPT) :]) == {"thinking", "think_end", "answer"}
    rows = steered_logprobs(model, guard, store, text, len(PROMPT), **known)
    assert tuple(rows[len(PROMPT) - 1 : -1].argmax(-1).tolist()) == answer.token_ids
    chosen = answer_logprobs(model, guard, store, PROMPT, answer.token_ids, **known)
    assert (chosen - torch.tensor(answer.logprobs)).abs().max() < 1e-4
    assert generate_greedy(model, None, store, PROMPT, 24).token_ids != answer.token_ids


def test_a_pass_that_runs_over_a_decision_is_an_error_and_no_guess(
    model: Any, store: Store, vectors: dict[str, np.ndarray]
) -> None:
    put_probe(store, "probe", 1)
    guard = think_end_gate({"above": -1.0})

    with (
        steering(
            model,
            guard,
            store,
            num_prompt_tokens=len(PROMPT),
            texts=TEXTS,
            thinking=THINKING,
        ),
        pytest.raises(KeyError),
    ):
        plain_logprobs(model, TEXT)


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
        "judged = ('vllm', 'steering.plan', 'steering.engine', 'steering.ops', 'steering.thinking')\n"
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
