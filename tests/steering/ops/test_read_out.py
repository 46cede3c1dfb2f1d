"""A probe's score is what its definition says, and defined where a vector is 0."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steering.ops.read_out import AFFINE, COSINE, read_out, read_out_all
from tests.steering.ops.kernels import needs_gpu, replay, tolerance

HIDDEN = 24


def by_definition(h: torch.Tensor, weights: torch.Tensor, bias: float, kind: int) -> float:
    """One score, in float64."""
    x, w = h.double().cpu().numpy(), weights.double().cpu().numpy()
    along = float(x @ w)
    if kind == AFFINE:
        return float(1.0 / (1.0 + np.exp(-(along + bias))))
    if not w.any():
        return 0.0
    part = np.tanh(along / float(w @ w) * w)
    norms = float(np.linalg.norm(x) * np.linalg.norm(part))
    return float(x @ part) / norms if norms > 0 else 0.0


@given(
    seed=st.integers(0, 2**32 - 1),
    kinds=st.lists(st.sampled_from([AFFINE, COSINE]), min_size=1, max_size=6),
    size=st.sampled_from([0.01, 1.0, 30.0]),
)
@settings(max_examples=60, deadline=None)
def test_it_equals_its_definition(seed: int, kinds: list[int], size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    h = size * torch.randn(len(kinds), HIDDEN, generator=generator)
    weights = torch.randn(len(kinds), HIDDEN, generator=generator) / size
    bias = torch.randn(len(kinds), generator=generator)
    scores = read_out(h, weights, bias, torch.tensor(kinds))
    expected = [
        by_definition(h[n], weights[n], float(bias[n]), kind) for n, kind in enumerate(kinds)
    ]
    np.testing.assert_allclose(scores.numpy(), expected, rtol=2e-5, atol=2e-6)


@given(
    seed=st.integers(0, 2**32 - 1),
    kinds=st.lists(st.sampled_from([AFFINE, COSINE]), min_size=1, max_size=4),
    rows=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_every_score_of_every_row_equals_its_definition(
    seed: int, kinds: list[int], rows: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(rows, HIDDEN, generator=generator)
    weights = torch.randn(len(kinds), HIDDEN, generator=generator)
    bias = torch.randn(len(kinds), generator=generator)
    scores = read_out_all(h, weights, bias, kinds)
    expected = [
        [by_definition(row, weights[p], float(bias[p]), kind) for row in h]
        for p, kind in enumerate(kinds)
    ]
    assert scores.shape == (len(kinds), rows)
    np.testing.assert_allclose(
        scores.numpy(), np.reshape(expected, scores.shape), rtol=2e-5, atol=2e-6
    )


@pytest.mark.parametrize("zero", ["activation", "weights", "both"])
def test_a_cosine_with_0_is_0_and_an_affine_score_there_its_bias_alone(zero: str) -> None:
    h = torch.zeros(2, HIDDEN) if zero != "weights" else torch.ones(2, HIDDEN)
    weights = torch.zeros(2, HIDDEN) if zero != "activation" else torch.ones(2, HIDDEN)
    scores = read_out(h, weights, torch.tensor([2.0, 2.0]), torch.tensor([COSINE, AFFINE]))
    assert scores[0] == 0.0
    assert scores[1] == torch.sigmoid(torch.tensor(2.0))


def check_hyperbolic_tangent(device: str) -> int:
    """The kernel's own tanh against numpy's, relative to its value however small that is."""
    from steering.ops.read_out_triton import hyperbolic_tangent
    from tests.steering.ops.kernels import elementwise

    half = np.concatenate([np.geomspace(1e-12, 20.0, 4000), np.linspace(0.55, 0.65, 400), [100.0]])
    z = np.concatenate([half, -half]).astype(np.float32)
    expected = np.tanh(z.astype(np.float64))
    found = elementwise(hyperbolic_tangent, device, z)
    assert np.abs(found / expected - 1.0).max() <= 4e-7
    assert elementwise(hyperbolic_tangent, device, np.zeros(1, dtype=np.float32))[0] == 0.0
    return len(z)


def test_the_kernels_tanh_is_within_float32_rounding(interpreted: dict[str, int]) -> None:
    assert interpreted["tanh"] == 8802


@needs_gpu
def test_the_kernels_tanh_is_within_float32_rounding_on_a_gpu() -> None:
    assert check_hyperbolic_tangent("cuda") == 8802


def check_reading(device: str) -> int:
    """The reading kernel against the definition: what is wanted is written, and nothing else."""
    from steering.ops import read_out_triton

    readings, hidden, layers, tokens = 5, 40, 3, 12
    random = np.random.default_rng(2)
    checked = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for has_rest in (False, True):
            generator = torch.Generator().manual_seed(checked)
            x = torch.randn(tokens, hidden, generator=generator).to(dtype)
            rest = torch.randn(tokens, hidden, generator=generator).to(dtype) if has_rest else None
            kinds = random.choice([AFFINE, COSINE], readings).astype(np.int32)
            # The last is nobody's: what it holds must not be looked at.
            at = np.array([0, 1, 1, layers, -1], dtype=np.int32)
            wants = random.integers(0, 1 << 4, tokens).astype(np.int32)
            weight = torch.randn(readings, hidden, generator=generator)
            weight[-1] = torch.nan
            counts = np.array([1, 1, 0, 1], dtype=np.int32)
            t = read_out_triton.ReadingTensors(
                weight=weight.to(device),
                bias=torch.randn(readings, generator=generator).to(device),
                read_out=torch.from_numpy(kinds).to(device),
                layer=torch.from_numpy(at).to(device),
                wants=torch.from_numpy(wants).to(device),
                scores=torch.full((readings, tokens + 3), torch.nan, device=device),
                layer_counts=torch.from_numpy(counts).to(device),
            )
            placed = x.to(device), None if rest is None else rest.to(device)
            for layer in range(layers + 1):
                if layer == 2:
                    t.layer_counts[2] = 0
                launch = functools.partial(read_out_triton.launch, *placed, layer, t)
                replay(device, launch, [t.scores])
            h = x.float() if rest is None else x.float() + rest.float()
            for p in range(readings):
                for token in range(tokens):
                    found = float(t.scores[p, token])
                    if not wants[token] >> p & 1 or at[p] < 0:
                        assert np.isnan(found)
                        continue
                    bias = float(t.bias[p])
                    expected = by_definition(h[token], weight[p], bias, int(kinds[p]))
                    np.testing.assert_allclose(found, expected, **tolerance(torch.float32))
                    checked += 1
            assert bool(t.scores[:, tokens:].isnan().all())
    return checked


def test_the_reading_kernel_equals_the_definition(interpreted: dict[str, int]) -> None:
    assert interpreted["reading"] > 100


@needs_gpu
def test_the_reading_kernel_equals_the_definition_on_a_gpu() -> None:
    assert check_reading("cuda") > 100
