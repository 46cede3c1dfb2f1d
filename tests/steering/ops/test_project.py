"""Projections do what their definition says, in every dtype and form, and leave other tokens alone."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from steering.ops.project import CLIP, TURN_BY, TURN_TO, project_on_host
from tests.steering.ops.kernels import needs_gpu, replay, tolerance

HIDDEN = 96
SLOTS, DEPTH = 6, 4
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INF = math.inf

# Slot 0 is the identity and slot 5 has its vectors at another layer. A turn takes two vectors.
ROWS: dict[int, list[tuple[int, float, float, float]]] = {
    1: [(CLIP, 0.0, -INF, INF)],
    2: [(CLIP, 1.0, 0.5, INF), (TURN_TO, math.radians(170), 0.0, 0.0)],
    3: [(TURN_BY, math.radians(-75), 0.0, 0.0), (CLIP, 0.3, -INF, INF), (CLIP, 1.0, -0.4, 0.6)],
    4: [(TURN_TO, math.radians(-30), 0.0, 0.0), (TURN_BY, math.radians(180), 0.0, 0.0)],
}


@dataclass
class Batch:
    x: torch.Tensor
    rest: torch.Tensor | None
    basis: torch.Tensor
    parameters: torch.Tensor
    used: torch.Tensor
    slots: torch.Tensor
    strengths: torch.Tensor

    @property
    def tokens(self) -> int:
        return self.x.shape[-2]

    @property
    def count(self) -> torch.Tensor:
        live = self.used[self.slots[: self.tokens].long()] != 0
        return live.sum().to(torch.int32).view(1)


def batch(
    tokens: int, dtype: torch.dtype, which: str = "mixed", rest: bool = False, device: str = "cpu"
) -> Batch:
    """Tokens in the slots of :data:`ROWS`; what is never to be read holds NaN."""
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x = (2.0 * normal(tokens, HIDDEN)).to(dtype)
    x[0, :4] = torch.tensor([-0.0, 0.0, -0.0, 1.0]).to(dtype)
    others = (2.0 * normal(tokens, HIDDEN)).to(dtype) if rest else None
    basis = torch.linalg.qr(normal(SLOTS, HIDDEN, DEPTH))[0].mT.contiguous()
    parameters = torch.zeros(SLOTS, DEPTH, 4)
    used = torch.zeros(SLOTS, dtype=torch.int32)
    for slot, row in ROWS.items():
        k = 0
        for setting in row:
            parameters[slot, k] = torch.tensor(setting)
            k += 1 if setting[0] == CLIP else 2
        used[slot] = k
    basis[0] = parameters[0] = math.nan
    slots = torch.zeros(tokens + 3, dtype=torch.int32)
    if which == "mixed":
        slots[:tokens] = torch.arange(tokens) % SLOTS
    elif which != "none":
        slots[:tokens] = int(which)
    strengths = 1.5 * normal(tokens + 3)
    made = Batch(x, others, basis, parameters, used, slots, strengths)
    return Batch(*(None if t is None else t.to(device) for t in vars(made).values()))


def by_definition(b: Batch) -> torch.Tensor:
    """One token at a time, in float64, turning by complex numbers."""
    out = b.x.clone()
    for token in range(b.tokens):
        slot, s = int(b.slots[token]), float(b.strengths[token])
        h = b.x[token].double().cpu().numpy()
        if b.rest is not None:
            h = h + b.rest[token].double().cpu().numpy()
        vectors = b.basis[slot].double().cpu().numpy()
        start, k = h, 0
        for mode, first, low, high in ROWS.get(slot, []):
            p = h @ vectors[k]
            if mode == CLIP:
                h = h + s * (np.clip(first * p, low, high) - p) * vectors[k]
                k += 1
                continue
            z = complex(p, h @ vectors[k + 1])
            turn = first if mode == TURN_BY else cmath.phase(cmath.rect(1, first) / z * abs(z))
            moved = z * cmath.rect(1, s * turn) - z
            h = h + moved.real * vectors[k] + moved.imag * vectors[k + 1]
            k += 2
        if k:
            out[token] = (b.x[token].double() + torch.from_numpy(h - start).to(out.device)).to(
                out.dtype
            )
    return out


def on_host(b: Batch) -> None:
    project_on_host(b.x, b.rest, b.basis, b.parameters, b.used, b.slots, b.strengths)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 17, 100])
@pytest.mark.parametrize("rest", [False, True])
def test_it_equals_its_definition(dtype: torch.dtype, tokens: int, rest: bool) -> None:
    b = batch(tokens, dtype, rest=rest)
    expected = by_definition(b)
    before = None if b.rest is None else b.rest.clone()
    on_host(b)
    torch.testing.assert_close(b.x, expected, **tolerance(dtype))
    assert before is None or torch.equal(b.rest, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slot", [1, 2, 3, 4])
@pytest.mark.parametrize("rest", [False, True])
def test_one_slot_and_strength_for_all_is_the_same_thing(
    dtype: torch.dtype, slot: int, rest: bool
) -> None:
    b = batch(9, dtype, str(slot), rest)
    b.strengths.fill_(0.75)
    expected = by_definition(b)
    assert not torch.equal(expected, b.x)
    uniform = (slot, 0.75)
    project_on_host(b.x, b.rest, b.basis, b.parameters, b.used, b.slots, b.strengths, uniform)
    torch.testing.assert_close(b.x, expected, **tolerance(dtype))


def test_a_stream_with_a_leading_batch_dimension_is_the_same_stream() -> None:
    b = batch(12, torch.float32, rest=True)
    expected = by_definition(b)
    b.x, b.rest = b.x[None], b.rest[None] if b.rest is not None else None
    on_host(b)
    torch.testing.assert_close(b.x[0], expected, **tolerance(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_without_a_projection_keep_their_bits(dtype: torch.dtype) -> None:
    b = batch(18, dtype)
    before = b.x.clone()
    on_host(b)
    plain = b.used[b.slots[:18].long()] == 0
    as_bits = torch.int32 if dtype is torch.float32 else torch.int16
    assert plain.sum() == 6
    assert torch.equal(b.x[plain].view(as_bits), before[plain].view(as_bits))
    assert not torch.equal(b.x[~plain], before[~plain])


def test_ablating_twice_over_takes_the_projection_to_its_opposite_and_turns_keep_the_norm() -> None:
    b = batch(8, torch.float32, "1")
    b.strengths.fill_(2.0)
    before = b.x @ b.basis[1, 0]
    on_host(b)
    torch.testing.assert_close(b.x @ b.basis[1, 0], -before, rtol=1e-5, atol=1e-5)

    b = batch(8, torch.float32, "4")
    norms = b.x.norm(dim=1)
    on_host(b)
    torch.testing.assert_close(b.x.norm(dim=1), norms, rtol=1e-6, atol=0)


def test_a_token_without_a_part_in_the_plane_is_not_turned() -> None:
    b = batch(2, torch.float32, "4")
    plane = b.basis[4]
    b.x = b.x - (b.x @ plane.T) @ plane
    b.x[1] = 0.0
    before = b.x.clone()
    on_host(b)
    torch.testing.assert_close(b.x, before, rtol=0, atol=1e-6)


def check_kernel(device: str) -> int:
    """The Triton form against the definition; returns how many cases it was checked in."""
    from steering.ops.project_triton import launch

    def launched(b: Batch, count: torch.Tensor) -> Callable[[], None]:
        return lambda: launch(
            b.x, b.rest, b.basis, b.parameters, b.used, b.slots, b.strengths, count
        )

    checked = 0
    for dtype in DTYPES:
        for tokens, which, rest in (
            (1, "2", False),
            (12, "mixed", True),
            (13, "mixed", False),
            (3, "none", False),
        ):
            b = batch(tokens, dtype, which, rest, device)
            before, expected = b.x.clone(), by_definition(b)
            replay(device, launched(b, b.count), [b.x])
            torch.testing.assert_close(b.x, expected, **tolerance(dtype))
            plain = b.used[b.slots[:tokens].long()] == 0
            assert torch.equal(b.x[plain].signbit(), before[plain].signbit())
            if device == "cpu":
                b.x.copy_(before)
                on_host(b)
                torch.testing.assert_close(b.x, expected, **tolerance(dtype))
            checked += 1
    b = batch(6, torch.float32, rest=True, device=device)
    before, expected = b.x.clone(), by_definition(b)
    replay(device, launched(b, torch.zeros(1, dtype=torch.int32, device=device)), [b.x])
    assert torch.equal(b.x, before)
    count = b.count
    b.x, b.rest = b.x[None], b.rest[None] if b.rest is not None else None
    replay(device, launched(b, count), [b.x])
    torch.testing.assert_close(b.x[0], expected, **tolerance(torch.float32))
    return checked + 2


def check_arctangent(device: str) -> int:
    """The kernel's own arctangent against numpy's, all the way round and on the axes."""
    from steering.ops.project_triton import arctangent
    from tests.steering.ops.kernels import elementwise

    angles = np.linspace(-np.pi, np.pi, 4001)
    radii = np.random.default_rng(0).uniform(1e-3, 1e3, angles.shape)
    axes = [(0.0, 0.0), (0.0, 1.0), (0.0, -1.0), (1.0, 0.0), (-1.0, 0.0), (1.0, 1.0), (-1.0, -1.0)]
    y = np.concatenate([radii * np.sin(angles), [a for a, _ in axes]]).astype(np.float32)
    x = np.concatenate([radii * np.cos(angles), [b for _, b in axes]]).astype(np.float32)
    found = elementwise(arctangent, device, y, x).astype(np.float64)
    expected = np.arctan2(y.astype(np.float64), x.astype(np.float64))
    assert np.abs(found - expected).max() <= 2e-7
    return len(found)


def test_the_kernel_equals_the_definition_under_the_interpreter(
    interpreted: dict[str, int],
) -> None:
    assert interpreted["project"] == 14
    assert interpreted["arctangent"] == 4008


@needs_gpu
def test_the_kernel_equals_the_definition_on_a_gpu() -> None:
    assert check_kernel("cuda") == 14
    assert check_arctangent("cuda") == 4008
