"""The operator does what its definition says, in every dtype and batch shape, and leaves the rest alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from steering.ops.residual_add import residual_add, residual_add_

HIDDEN = 96
SLOTS = 5


def by_definition(
    x: torch.Tensor, table: torch.Tensor, slots: torch.Tensor, strengths: torch.Tensor
) -> torch.Tensor:
    """What both forms mean, one token at a time."""
    out = x.clone()
    for token in range(x.shape[0]):
        slot = int(slots[token])
        if slot:
            out[token] = (x[token].float() + strengths[token] * table[slot]).to(x.dtype)
    return out


def batch(tokens: int, dtype: torch.dtype, steered: str) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    x[0, :4] = torch.tensor([-0.0, 0.0, -0.0, 1.0]).to(dtype)
    table = torch.randn(SLOTS, HIDDEN, generator=generator)
    table[0] = float("nan")
    slots = torch.zeros(tokens + 3, dtype=torch.int32)
    if steered == "all":
        slots[:tokens] = 1 + torch.arange(tokens) % (SLOTS - 1)
    elif steered == "same":
        slots[:tokens] = 2
    elif steered == "some":
        slots[1:tokens:2] = 3
    strengths = torch.randn(tokens + 3, generator=generator)
    count = (slots[:tokens] != 0).sum().to(torch.int32).view(1)
    return x, table, slots, strengths, count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 2, 17, 300])
@pytest.mark.parametrize("steered", ["all", "same", "some", "none"])
def test_it_equals_its_definition(dtype: torch.dtype, tokens: int, steered: str) -> None:
    x, table, slots, strengths, count = batch(tokens, dtype, steered)
    expected = by_definition(x, table, slots, strengths)
    residual_add_(x, table, slots, strengths, count)
    exactly = {"rtol": 1e-6 if dtype is torch.float32 else 0, "atol": 1e-6}
    torch.testing.assert_close(x, expected, **exactly)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("steered", ["all", "some", "none"])
def test_the_traced_form_equals_it_too_compiled_and_not(dtype: torch.dtype, steered: str) -> None:
    x, table, slots, strengths, _ = batch(17, dtype, steered)
    expected = by_definition(x, table, slots, strengths)
    table[0] = 0.0
    exactly = {"rtol": 1e-6 if dtype is torch.float32 else 0, "atol": 1e-6}
    compiled = torch.compile(residual_add, fullgraph=True, dynamic=False)
    for form in (residual_add, compiled):
        torch.testing.assert_close(form(x, table, slots, strengths), expected, **exactly)
        stream = form(x[None], table, slots, strengths)
        torch.testing.assert_close(stream[0], expected, **exactly)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_in_slot_0_keep_their_bits(dtype: torch.dtype) -> None:
    x, table, slots, strengths, count = batch(17, dtype, "some")
    before = x.clone()
    residual_add_(x, table, slots, strengths, count)
    plain = slots[:17] == 0
    as_bits = torch.int32 if dtype is torch.float32 else torch.int16
    assert torch.equal(x[plain].view(as_bits), before[plain].view(as_bits))
    assert not torch.equal(x[~plain], before[~plain])


def test_a_stream_with_a_leading_batch_dimension_is_the_same_stream() -> None:
    x, table, slots, strengths, count = batch(9, torch.float32, "some")
    expected = by_definition(x, table, slots, strengths)
    stream = x.clone()[None]
    residual_add_(stream, table, slots, strengths, count)
    torch.testing.assert_close(stream[0], expected)


def test_a_count_of_0_skips_the_call_whatever_the_slots_say() -> None:
    x, table, slots, strengths, _ = batch(5, torch.float32, "all")
    before = x.clone()
    residual_add_(x, table, slots, strengths, torch.zeros(1, dtype=torch.int32))
    assert torch.equal(x, before)


def test_torch_compile_keeps_the_edit_and_sees_new_contents_without_recompiling() -> None:
    x, table, slots, strengths, count = batch(8, torch.float32, "some")

    def layer(x: torch.Tensor) -> torch.Tensor:
        y = x * 2.0
        residual_add_(y, table, slots, strengths, count)
        return y + 1.0

    compiled = torch.compile(layer, fullgraph=True, dynamic=False)
    for change in ("as is", "other slots", "idle"):
        if change == "other slots":
            slots[:8] = 4
            count.fill_(8)
        if change == "idle":
            count.zero_()
        torch.testing.assert_close(compiled(x), layer(x))


TRITON_CHECK = """
import torch
from steering.ops.residual_add_triton import launch
from tests.steering.ops.test_residual_add import batch, by_definition

checked = 0
for dtype in (torch.float32, torch.bfloat16):
    for tokens in (1, 5):
        for steered in ("all", "some", "none"):
            x, table, slots, strengths, count = batch(tokens, dtype, steered)
            expected = by_definition(x, table, slots, strengths)
            launch(x, table, slots, strengths, count)
            torch.testing.assert_close(x, expected, rtol=1e-2 if dtype is torch.bfloat16 else 1e-6, atol=1e-6)
            checked += 1
print("checked", checked)
"""


def test_the_triton_kernel_equals_the_definition_under_the_interpreter() -> None:
    """Triton's interpreter has to be chosen before Triton is imported, hence a process of its own."""
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", TRITON_CHECK],
        cwd=root,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "checked 12" in done.stdout
