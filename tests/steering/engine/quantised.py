"""Quantised copies of a checkpoint, in the format of compressed-tensors, and what their weights mean."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 32


@dataclass(frozen=True)
class Scheme:
    """How the projections of a checkpoint are stored.

    Attributes:
        name: for test names.
        dtype: of the engine's activations; the kernel decides.
        format: compressed-tensors' name of the layout.
        weights: its description of the weights.
        activations: its description of the activations, ``None`` if they are not quantised.
    """

    name: str
    dtype: str
    format: str
    weights: dict[str, Any]
    activations: dict[str, Any] | None = None


INT4 = Scheme(
    "int4-weights",
    "float16",
    "pack-quantized",
    {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP},
)
INT8 = Scheme(
    "int8-weights-and-activations",
    "float32",
    "int-quantized",
    {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
    {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "token", "dynamic": True},
)


def quantise(source: Path, folder: Path, scheme: Scheme) -> tuple[Path, Path]:
    """Write ``source`` quantised, and once more with the float32 weights that the integers stand for.

    Returns:
        The quantised checkpoint and the dequantised one.
    """
    stored, meant = folder / "quantised", folder / "dequantised"
    shutil.copytree(source, stored)
    shutil.copytree(source, meant)
    tensors = load_file(source / "model.safetensors")
    quantised: dict[str, Tensor] = {}
    dequantised: dict[str, Tensor] = {}
    for name, weight in tensors.items():
        if not name.endswith("_proj.weight"):
            quantised[name] = dequantised[name] = weight
            continue
        stem = name.removesuffix(".weight")
        if scheme is INT4:
            groups = weight.reshape(weight.shape[0], -1, GROUP)
            # Scales as the engine holds them.
            scale = (groups.abs().amax(2, keepdim=True) / 7).half().float()
            levels = (groups / scale).round().clamp(-8, 7)
            dequantised[name] = (levels * scale).reshape(weight.shape)
            quantised[f"{stem}.weight_packed"] = _pack(levels.reshape(weight.shape))
            quantised[f"{stem}.weight_scale"] = scale[..., 0].contiguous()
            quantised[f"{stem}.weight_shape"] = torch.tensor(weight.shape)
        else:
            scale = weight.abs().amax(1, keepdim=True) / 127
            levels = (weight / scale).round().clamp(-127, 127)
            dequantised[name] = levels * scale
            quantised[name] = levels.to(torch.int8)
            quantised[f"{stem}.weight_scale"] = scale
    save_file(quantised, stored / "model.safetensors", {"format": "pt"})
    save_file(dequantised, meant / "model.safetensors", {"format": "pt"})
    config = json.loads((stored / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": scheme.format,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": scheme.weights,
                "input_activations": scheme.activations,
            }
        },
    }
    (stored / "config.json").write_text(json.dumps(config))
    return stored, meant


def _pack(levels: Tensor) -> Tensor:
    """Eight integers of 4 bits, moved to 0…15, in each int32, the first in the lowest bits."""
    unsigned = (levels + 8).to(torch.int32)
    packed = torch.zeros(levels.shape[0], levels.shape[1] // 8, dtype=torch.int32)
    for n in range(8):
        packed |= unsigned[:, n::8] << (4 * n)
    return packed


def round_activations(model: Any) -> None:
    """Make a model's projections see their inputs as :data:`INT8` does: 256 levels for each token."""

    def hook(module: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
        (x,) = inputs
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        scale = (high - low) / 255
        zero = (-128 - low / scale).round()
        levels = ((x / scale).round() + zero).clamp(-128, 127)
        return ((levels - zero) * scale,)

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(hook)
