"""Triton's interpreter with a driver for the host, so that Model Runner V2 runs without a GPU.

Model Runner V2 prepares its batches with Triton kernels, and vLLM runs it only where Triton has a driver.
PyPI's Triton has none for CPU, but it has an interpreter that runs any kernel as Python on host tensors.
:func:`install` gives Triton a driver for the host and switches the interpreter on. What then runs is the
runner's own code, slowly; no CUDA graphs, streams or asynchronous scheduling are exercised.
"""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any


def install() -> None:
    """Make this process run Model Runner V2 on the host; to be called before vllm is imported."""
    assert "vllm" not in sys.modules, "vLLM looks for Triton's drivers once, when it is imported"
    os.environ.update(TRITON_INTERPRET="1", VLLM_USE_V2_MODEL_RUNNER="1")

    import torch
    from triton.backends import backends
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.runtime import driver

    class HostDriver(DriverBase):  # type: ignore[misc]
        @classmethod
        def is_active(cls) -> bool:
            return True

        def get_current_target(self) -> Any:
            return GPUTarget("cpu", "x86", 1)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def map_python_to_cpp_type(self, ty: str) -> str:
            raise NotImplementedError("the interpreter compiles nothing")

        def get_benchmarker(self) -> Any:
            raise NotImplementedError("the interpreter measures nothing")

    backends["cpu"] = SimpleNamespace(compiler=None, driver=HostDriver)
    driver.set_active(HostDriver())
