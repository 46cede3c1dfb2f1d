"""What each kind of edit does to one activation; the formulas are in :mod:`steering.reference`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from directions.store import Direction, Store
from steering.edits.ablate import Ablate
from steering.edits.add import Add
from steering.edits.clamp import Clamp
from steering.edits.rotate import Rotate
from steering.edits.scale_heads import ScaleHeads
from steering.policy import Edit

Change = Callable[[Tensor, float], Tensor]
"""What an edit does at one layer: ``(h [..., hidden_size] float32, s)`` to the new ``h``."""


def changes_of(edit: Edit, store: Store, num_layers: int) -> dict[int, Change]:
    """What an edit of the residual stream or of a block's output does, by layer.

    Raises:
        ValueError: a layer has no vector, a zero one, or no activation norm where one is needed;
            the two directions of a plane are parallel.
        TrimtabError: the store's.
    """
    spec = edit.spec
    if isinstance(spec, Rotate):
        return _rotations(spec, store, num_layers)
    assert isinstance(spec, Add | Ablate | Clamp)
    direction = store.load(spec.direction)
    if spec.vector_layer is not None and spec.layers == "all":
        layers: Sequence[int] = range(num_layers)
    elif spec.layers == "all":
        layers = [n for n in range(len(direction.present)) if direction.present[n]]
    else:
        layers = spec.layers
    changes = {}
    for layer in layers:
        source = layer if spec.vector_layer is None else spec.vector_layer
        if isinstance(spec, Add):
            changes[layer] = _addition(spec, direction, source)
        elif isinstance(spec, Ablate):
            changes[layer] = _ablation(spec, direction, source)
        else:
            changes[layer] = _clamp(spec, direction, source)
    return changes


def _addition(spec: Add, direction: Direction, source: int) -> Change:
    if spec.unit == "absolute":
        d = spec.strength * _vector(direction, source)
    elif spec.unit == "unit":
        d = spec.strength * _unit(direction, source)
    else:
        d = spec.strength * _norm(direction, source) * _unit(direction, source)
    return lambda h, s: h + s * d.float().to(h.device)


def _ablation(spec: Ablate, direction: Direction, source: int) -> Change:
    unit = _unit(direction, source)
    return lambda h, s: _moved(h, unit, lambda p: -s * spec.strength * p)


def _clamp(spec: Clamp, direction: Direction, source: int) -> Change:
    unit = _unit(direction, source)
    scale = _norm(direction, source) if spec.unit == "relative" else 1.0
    low = -math.inf if spec.at_least is None else spec.at_least * scale
    high = math.inf if spec.at_most is None else spec.at_most * scale
    if spec.to is not None:
        low = high = spec.to * scale
    return lambda h, s: _moved(h, unit, lambda p: s * (p.clamp(low, high) - p))


def _moved(h: Tensor, unit: Tensor, by: Callable[[Tensor], Tensor]) -> Tensor:
    """``h`` moved along a unit vector, by a function of its projection; float64 inside."""
    wide, along = h.double(), unit.to(h.device)
    p = (wide @ along)[..., None]
    moved: Tensor = wide + by(p) * along
    return moved.float()


def _rotations(spec: Rotate, store: Store, num_layers: int) -> dict[int, Change]:
    first, second = (store.load(reference) for reference in spec.plane)
    if spec.layers == "all":
        layers: Sequence[int] = [
            n for n in range(num_layers) if first.present[n] and second.present[n]
        ]
    else:
        layers = spec.layers
    return {layer: _rotation(spec, first, second, layer) for layer in layers}


def _rotation(spec: Rotate, first: Direction, second: Direction, layer: int) -> Change:
    b1, towards = _unit(first, layer), _unit(second, layer)
    rest = towards - (towards @ b1) * b1  # its length is the sine of the angle between the two
    if rest.norm() < 1e-3:
        raise ValueError(f"the plane's two directions are parallel at layer {layer}")
    b2 = rest / rest.norm()

    def rotate(h: Tensor, s: float) -> Tensor:
        wide, x, y = h.double(), b1.to(h.device), b2.to(h.device)
        p1, p2 = (wide @ x)[..., None], (wide @ y)[..., None]
        rho, phi = torch.hypot(p1, p2), torch.atan2(p2, p1)
        if spec.by is not None:
            turn = torch.full_like(phi, math.radians(spec.by))
        else:
            assert spec.to is not None
            turn = math.radians(spec.to) - phi
            turn = turn - 2 * math.pi * torch.ceil((turn - math.pi) / (2 * math.pi))  # (−π, π]
        new = phi + s * turn
        moved: Tensor = rho * (new.cos() - phi.cos()) * x + rho * (new.sin() - phi.sin()) * y
        return (wide + moved).float()

    return rotate


def _vector(direction: Direction, layer: int) -> Tensor:
    """The stored vector of a layer: ``[hidden_size] float64``."""
    if not (0 <= layer < len(direction.present) and direction.present[layer]):
        raise ValueError(f"{direction.reference} has no vector for layer {layer}")
    return torch.tensor(direction.vectors[layer], dtype=torch.float64)


def _unit(direction: Direction, layer: int) -> Tensor:
    v = _vector(direction, layer)
    if not v.any():
        raise ValueError(f"the vector of {direction.reference} is zero at layer {layer}")
    unit: Tensor = v / v.norm()
    return unit


def _norm(direction: Direction, layer: int) -> float:
    n = direction.card.activation_norms[layer]
    if n is None:
        raise ValueError(f"no activation norm of layer {layer} in {direction.reference}'s card")
    return n


def head_factors(spec: ScaleHeads, store: Store) -> dict[int, dict[int, float]]:
    """The factor ``f`` of every head that an edit names: layer to head to factor."""
    heads = store.load_head_set(spec.heads).heads if isinstance(spec.heads, str) else spec.heads
    each = spec.factor if isinstance(spec.factor, tuple) else [spec.factor] * len(heads)
    factors: dict[int, dict[int, float]] = {}
    for (layer, head), factor in zip(heads, each, strict=True):
        factors.setdefault(layer, {})[head] = factor
    return factors
