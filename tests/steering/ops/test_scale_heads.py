"""Scaling heads does what its definition says, in every dtype and form, and leaves other tokens alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from steering.ops.scale_heads import scale_heads_on_host
from tests.steering.ops.kernels import needs_gpu, replay, tolerance

HEADS, WIDTH = 5, 24
SLOTS = 5
# Slot 0 is the identity and slot 4 scales heads of another layer.
PLAIN, KEEPING, SILENT, ELSEWHERE = range(1, SLOTS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Batch:
    out: torch.Tensor
    deviations: torch.Tensor
    renormalise: torch.Tensor
    used: torch.Tensor
    slots: torch.Tensor
    strengths: torch.Tensor

    @property
    def tokens(self) -> int:
        return self.out.shape[-2]

    @property
    def count(self) -> torch.Tensor:
        return self.used[self.slots[: self.tokens].long()].sum().to(torch.int32).view(1)


def batch(tokens: int, dtype: torch.dtype, which: int | None = None, device: str = "cpu") -> Batch:
    """Tokens in each of the slots in turn, or all in one; what is never to be read holds NaN or nonsense."""
    generator = torch.Generator().manual_seed(tokens)
    out = torch.randn(tokens, HEADS * WIDTH, generator=generator).to(dtype)
    out[0, :4] = torch.tensor([-0.0, 0.0, -0.0, 1.0]).to(dtype)
    # Wider than the heads, as a table is that is as wide as the layer with the most.
    deviations = torch.zeros(SLOTS, HEADS + 2)
    deviations[0] = deviations[:, HEADS:] = float("nan")
    deviations[0, 0] = 7.0
    deviations[PLAIN, :HEADS] = torch.tensor([0.5, 0.0, -1.0, 3.0, 0.0])
    deviations[KEEPING, :HEADS] = torch.tensor([0.0, -2.5, 0.0, 0.0, 1.0])
    deviations[SILENT, :HEADS] = -1.0
    renormalise = torch.zeros(SLOTS, dtype=torch.bool)
    renormalise[[KEEPING, SILENT]] = True
    used = torch.tensor([False, True, True, True, False])
    slots = torch.zeros(tokens + 3, dtype=torch.int32)
    slots[:tokens] = torch.arange(tokens) % SLOTS if which is None else which
    strengths = torch.randn(tokens + 3, generator=generator)
    strengths[slots == SILENT] = 1.0
    made = Batch(out, deviations, renormalise, used, slots, strengths)
    return Batch(*(t.to(device) for t in vars(made).values()))


def by_definition(b: Batch) -> torch.Tensor:
    """One token and one head at a time, in float64."""
    out = b.out.clone()
    for token in range(b.tokens):
        slot = int(b.slots[token])
        if not b.used[slot]:
            continue
        old = b.out[token].double().cpu().numpy().reshape(HEADS, WIDTH)
        new = old.copy()
        for head in range(HEADS):
            new[head] *= 1.0 + float(b.strengths[token]) * float(b.deviations[slot, head])
        if b.renormalise[slot] and np.linalg.norm(new) > 0:
            new *= np.linalg.norm(old) / np.linalg.norm(new)
        out[token] = torch.from_numpy(new.reshape(-1)).to(out.device).to(out.dtype)
    return out


def on_host(b: Batch, uniform: tuple[int, float] | None = None) -> None:
    scale_heads_on_host(
        b.out, b.deviations, b.renormalise, b.used, b.slots, b.strengths, HEADS, uniform
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 17, 100])
def test_it_equals_its_definition(dtype: torch.dtype, tokens: int) -> None:
    b = batch(tokens, dtype)
    expected = by_definition(b)
    on_host(b)
    torch.testing.assert_close(b.out, expected, **tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slot", [PLAIN, KEEPING, SILENT])
@pytest.mark.parametrize("told", [False, True])
def test_one_slot_and_strength_for_all_is_the_same_thing(
    dtype: torch.dtype, slot: int, told: bool
) -> None:
    b = batch(9, dtype, slot)
    b.strengths.fill_(1.0)
    expected = by_definition(b)
    assert not torch.equal(expected, b.out)
    on_host(b, (slot, 1.0) if told else None)
    torch.testing.assert_close(b.out, expected, **tolerance(dtype))


def test_a_leading_batch_dimension_changes_nothing() -> None:
    b = batch(10, torch.float32)
    expected = by_definition(b)
    b.out = b.out[None]
    on_host(b)
    torch.testing.assert_close(b.out[0], expected, **tolerance(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_whose_slot_scales_nothing_here_keep_their_bits(dtype: torch.dtype) -> None:
    b = batch(15, dtype)
    before = b.out.clone()
    on_host(b)
    plain = ~b.used[b.slots[:15].long()]
    as_bits = torch.int32 if dtype is torch.float32 else torch.int16
    assert plain.sum() == 6
    assert torch.equal(b.out[plain].view(as_bits), before[plain].view(as_bits))
    assert not torch.equal(b.out[~plain], before[~plain])


def test_a_row_keeps_its_norm_where_asked_and_stays_0_where_nothing_is_left() -> None:
    b = batch(15, torch.float32)
    before = b.out.norm(dim=1)
    on_host(b)
    of = b.slots[:15]
    torch.testing.assert_close(b.out.norm(dim=1)[of == KEEPING], before[of == KEEPING])
    assert (b.out.norm(dim=1) - before)[of == PLAIN].abs().min() > 1e-2
    assert not b.out[of == SILENT].any()


def check_kernel(device: str) -> int:
    """The Triton form against the definition; returns how many cases it was checked in."""
    from steering.ops.scale_heads_triton import launch

    def launched(b: Batch, count: torch.Tensor) -> Callable[[], None]:
        return lambda: launch(
            b.out, b.deviations, b.renormalise, b.slots, b.strengths, count, HEADS
        )

    checked = 0
    for dtype in DTYPES:
        for tokens, which in ((1, KEEPING), (11, None), (4, PLAIN), (3, 0)):
            b = batch(tokens, dtype, which, device)
            before, expected = b.out.clone(), by_definition(b)
            replay(device, launched(b, b.count), [b.out])
            torch.testing.assert_close(b.out, expected, **tolerance(dtype))
            plain = ~b.used[b.slots[:tokens].long()]
            assert torch.equal(b.out[plain].signbit(), before[plain].signbit())
            checked += 1
    b = batch(5, torch.float32, device=device)
    before, expected = b.out.clone(), by_definition(b)
    replay(device, launched(b, torch.zeros(1, dtype=torch.int32, device=device)), [b.out])
    assert torch.equal(b.out, before)
    count = b.count
    b.out = b.out[None]
    replay(device, launched(b, count), [b.out])
    torch.testing.assert_close(b.out[0], expected, **tolerance(torch.float32))
    return checked + 2


def test_the_kernel_equals_the_definition_under_the_interpreter(
    interpreted: dict[str, int],
) -> None:
    assert interpreted["scale_heads"] == 14


@needs_gpu
def test_the_kernel_equals_the_definition_on_a_gpu() -> None:
    assert check_kernel("cuda") == 14
