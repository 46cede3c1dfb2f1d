"""Kernels that apply a jitted function to each element, for tests; Triton wants their source in a file."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def of_one(x_ptr, out_ptr, n, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=1.0)
    tl.store(out_ptr + at, FUNCTION(x), mask=at < n)


@triton.jit
def of_two(x_ptr, y_ptr, out_ptr, n, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=1.0)
    y = tl.load(y_ptr + at, mask=at < n, other=1.0)
    tl.store(out_ptr + at, FUNCTION(x, y), mask=at < n)
