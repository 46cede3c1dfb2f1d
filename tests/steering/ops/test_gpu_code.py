"""Every kernel compiles to GPU code, of which the interpreter shows nothing; that needs no GPU."""

from __future__ import annotations

import os
from typing import Any

import pytest

triton = pytest.importorskip("triton")

# The types of the arguments that are not int32.
FLOATS = (
    "table",
    "strengths",
    "basis",
    "parameters",
    "deviations",
    "weight",
    "bias",
    "bounds",
    "scores",
)
TYPES = {
    **{f"{name}_ptr": "*fp32" for name in (*FLOATS, "score")},
    **{f"{name}_ptr": "*i1" for name in ("renormalise", "latched", "is_open")},
    "first_open_ptr": "*i64",
}
ACTIVATIONS = ("x_ptr", "rest_ptr", "out_ptr")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled")
@pytest.mark.parametrize("dtype", ["*bf16", "*fp32"])
@pytest.mark.parametrize(
    ("module", "kernel", "constants"),
    [
        ("residual_add", "_residual_add", {"BLOCK": 1024}),
        ("project", "_project", {"HAS_REST": True, "BLOCK": 4096}),
        ("scale_heads", "_scale_heads", {"HEADS": 16, "WIDTH": 128}),
        ("gate", "_decide", {"HAS_REST": True, "GATES": 3, "CASES": 14, "BLOCK": 4096}),
        ("read_out", "_read", {"HAS_REST": True, "READINGS": 16, "BLOCK": 4096}),
    ],
)
def test_it_compiles_for_the_oldest_gpus(
    module: str, kernel: str, constants: dict[str, Any], dtype: str
) -> None:
    from importlib import import_module

    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(import_module(f"steering.ops.{module}_triton"), kernel)
    types = TYPES | dict.fromkeys(ACTIVATIONS, dtype)
    signature = {
        name: "constexpr"
        if name in constants
        else types.get(name, "*i32" if name.endswith("_ptr") else "i32")
        for name in function.arg_names
    }
    compiled = triton.compile(
        ASTSource(function, signature, constants),
        target=GPUTarget("cuda", 80, 32),
        options={"num_warps": 8},
    )
    assert compiled.asm["cubin"]
