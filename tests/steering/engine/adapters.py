"""A small random LoRA adapter, as PEFT writes one to disk, and the model that it makes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

RANK = 4
ALPHA = 8


def save_adapter(folder: Path, model: Any, *, seed: int, scale: float = 0.02) -> Path:
    """Write an adapter of rank 4 for every projection of every layer of ``model``.

    The files are those of PEFT's LoRA format: ``adapter_config.json`` and, for each module, the two
    factors ``lora_A [rank, in]`` and ``lora_B [out, rank]`` in ``adapter_model.safetensors``.
    """
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    targets = set()
    for name, module in model.named_modules():
        if not name.endswith("_proj"):
            continue
        targets.add(name.rpartition(".")[2])
        rows, columns = module.weight.shape
        stem = f"base_model.model.{name}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(RANK, columns, generator=random) * scale
        tensors[f"{stem}.lora_B.weight"] = torch.randn(rows, RANK, generator=random)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": sorted(targets),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def merged(model: Any, folder: Path) -> Any:
    """A copy of ``model`` with the adapter worked into its weights: ``W + alpha/rank · B A``."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    result = copy.deepcopy(model)
    for name, module in result.named_modules():
        stem = f"base_model.model.{name}"
        if f"{stem}.lora_A.weight" in tensors:
            a, b = tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"]
            module.weight += ALPHA / RANK * (b @ a)
    return result
