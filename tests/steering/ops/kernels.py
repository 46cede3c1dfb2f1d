"""Running kernels in tests: under Triton's interpreter, or captured in a CUDA graph where there is a GPU.

The interpreter has to be chosen before Triton is imported, so it runs in a process of its own:
``python -m tests.steering.ops.kernels`` checks every kernel and prints how many cases of each it checked. The
``interpreted`` fixture runs it once for all tests.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """Rounding in float32 and once to ``dtype``, for numbers of order 1."""
    last_place = torch.finfo(dtype).eps
    return {"rtol": 2e-6 if dtype is torch.float32 else last_place, "atol": 1e-5}


def replay(device: str, call: Callable[[], None], changed: Sequence[torch.Tensor]) -> None:
    """Run ``call`` once; on a GPU as a captured graph, which also shows that it can be captured.

    Args:
        device: ``cpu`` or ``cuda``.
        call: launches kernels.
        changed: the tensors that it changes.
    """
    if device == "cpu":
        call()
        return
    before = [tensor.clone() for tensor in changed]
    call()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for tensor, values in zip(changed, before, strict=True):
        tensor.copy_(values)
    graph.replay()
    torch.cuda.synchronize()


def elementwise(function: Any, device: str, *values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A jitted function of one or two float32 numbers, applied to each element."""
    import triton

    from tests.steering.ops import elementwise_kernels

    arguments = [torch.from_numpy(v).to(device) for v in values]
    out = torch.empty_like(arguments[0])
    kernel = elementwise_kernels.of_two if len(arguments) == 2 else elementwise_kernels.of_one
    block = 1024
    kernel[(triton.cdiv(out.numel(), block),)](*arguments, out, out.numel(), function, block)
    return out.cpu().numpy()


def main() -> None:
    """Check every kernel and print the counts."""
    from tests.steering.ops import test_gate, test_project, test_read_out, test_scale_heads

    print(
        json.dumps(
            {
                "project": test_project.check_kernel("cpu"),
                "arctangent": test_project.check_arctangent("cpu"),
                "scale_heads": test_scale_heads.check_kernel("cpu"),
                "gate": test_gate.check_kernel("cpu"),
                "tanh": test_read_out.check_hyperbolic_tangent("cpu"),
                "reading": test_read_out.check_reading("cpu"),
            }
        )
    )


if __name__ == "__main__":
    main()
