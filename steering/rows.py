"""What happens to one token: a row.

A row is the engine's unit: it takes one slot of the tables, however many requests use it. It says,
layer by layer, what is added to the residual stream, which components along stored directions are
changed and how, and by how much attention heads are scaled. All of it is at request strength 1; the
request's own strength is a number per token and no part of a row.

Within a layer the order is: heads are scaled before the attention's output projection; then, at
each site, the projections of the row in their order, each seeing the result of the one before; then
the sum of what is added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from directions.errors import TrimtabError
from directions.store import Store

Site = Literal["residual", "attention", "mlp"]
"""``residual``: the stream after a decoder layer. ``attention``, ``mlp``: the output of the layer's
attention or MLP block, before it is added to the stream."""

ProjectionKind = Literal["clip", "turn_to", "turn_by"]

Source = tuple[str, int | None]
"""A stored vector: the artefact's sha256, and the layer whose vector is used at every layer, or
``None`` where each layer uses its own."""

MIN_SINE: Final = 1e-3
"""Two directions whose angle has a smaller sine span no plane worth the name."""


@dataclass(frozen=True)
class Term:
    """One direction's share of what a row adds.

    Attributes:
        direction: sha256 of the artefact.
        coefficients: ``(layer, multiplier of the stored vector)``, by ascending layer, none zero.
        vector_layer: the layer whose vector is added everywhere; ``None``: each layer's own.
    """

    direction: str
    coefficients: tuple[tuple[int, float], ...]
    vector_layer: int | None = None


@dataclass(frozen=True)
class Projection:
    """A change of the component along one direction, or in the plane of two, at one site.

    With ``r̂`` the unit vector, ``p = h·r̂`` and ``s`` the request's strength, ``clip`` is::

        h ← h + s·(clip(gain·p, low, high) − p) r̂

    With ``b1, b2`` the plane's orthonormal basis, ``φ`` and ``ρ`` the angle and length of ``(h·b1,
    h·b2)``, a turn is::

        turn_by   φ' = φ + s·θ
        turn_to   φ' = φ + s·wrap(θ − φ)                   wrap: to (−π, π]
        h ← h + ρ(cos φ' − cos φ) b1 + ρ(sin φ' − sin φ) b2

    Attributes:
        site: where in the layer.
        kind: which of the three.
        directions: one stored vector for ``clip``; two, the first the angle's zero, for turns.
        layers: ``(layer, numbers)`` by ascending layer. The numbers are ``(gain, low, high)`` for
            ``clip``, with ``None`` for a bound that is not there, and ``(θ in radians,)`` for turns.
    """

    site: Site
    kind: ProjectionKind
    directions: tuple[Source, ...]
    layers: tuple[tuple[int, tuple[float | None, ...]], ...]


@dataclass(frozen=True)
class Row:
    """One behaviour of a token.

    Attributes:
        add: what is added to the residual stream: the sum of the terms.
        projections: in the order in which they act.
        heads: ``(layer, query head, g)``, ascending, no ``g`` zero: the head's slice of the
            attention output, before the output projection, is multiplied by ``1 + s·g``.
        renormalise: the layers, ascending, at which scaling heads keeps the length of the attention
            output of all heads together.
    """

    add: tuple[Term, ...] = ()
    projections: tuple[Projection, ...] = ()
    heads: tuple[tuple[int, int, float], ...] = ()
    renormalise: tuple[int, ...] = ()

    @property
    def is_empty(self) -> bool:
        """The row changes nothing."""
        return not (self.add or self.projections or self.heads)


def row_vectors(
    terms: tuple[Term, ...], store: Store, num_layers: int, hidden_size: int
) -> NDArray[np.float32]:
    """What a row adds after each layer at request strength 1.

    Summed in float64 and rounded once, so the order of terms does not show.

    Args:
        terms: a row's ``add``.

    Returns:
        ``[num_layers, hidden_size] float32``.

    Raises:
        TrimtabError: ``E_ARTEFACT_…`` (the store's), ``E_DIRECTION_WIDTH`` (vectors of another
            shape), ``E_LAYER_RANGE`` (a layer that the model lacks).
    """
    total = np.zeros((num_layers, hidden_size), dtype=np.float64)
    for term in terms:
        vectors = _vectors(term.direction, store, num_layers, hidden_size)
        for layer, coefficient in term.coefficients:
            total[layer_of(layer, num_layers)] += coefficient * _vector(
                vectors, term.vector_layer, layer
            )
    with np.errstate(over="ignore"):
        return total.astype(np.float32)


def projection_vectors(
    projection: Projection, store: Store, num_layers: int, hidden_size: int
) -> dict[int, NDArray[np.float32]]:
    """The orthonormal vectors that a projection reads and writes along, for each of its layers.

    Returns:
        By layer, ``[1, hidden_size] float32`` for ``clip`` (``r̂``) and ``[2, hidden_size]`` for
        turns (``b1, b2``). Computed in float64 and rounded once.

    Raises:
        TrimtabError: as :func:`row_vectors`, and ``E_DIRECTION_ZERO`` or ``E_PLANE_PARALLEL``
            where there is no such vector or plane.
    """
    sources = [
        (_vectors(sha256, store, num_layers, hidden_size), vector_layer)
        for sha256, vector_layer in projection.directions
    ]
    found: dict[int, NDArray[np.float32]] = {}
    for layer, _ in projection.layers:
        layer_of(layer, num_layers)
        stored = [_vector(vectors, vector_layer, layer) for vectors, vector_layer in sources]
        if any(not np.linalg.norm(vector) > 0.0 for vector in stored):
            raise TrimtabError("E_DIRECTION_ZERO", f"a zero vector at layer {layer} has no unit")
        basis, sine = orthonormal(*stored)
        if sine < MIN_SINE:
            raise TrimtabError("E_PLANE_PARALLEL", f"no plane at layer {layer}")
        found[layer] = basis.astype(np.float32)
    return found


def orthonormal(
    first: NDArray[np.float64], second: NDArray[np.float64] | None = None
) -> tuple[NDArray[np.float64], float]:
    """The unit vector of ``first`` and, of what ``second`` adds to it, another.

    Returns:
        ``[1 or 2, hidden_size] float64``, and the sine of the angle between the two (1.0 for one
        alone); below :data:`MIN_SINE` the second row means nothing.
    """
    b1 = first / np.linalg.norm(first)
    if second is None:
        return b1[None], 1.0
    unit = second / np.linalg.norm(second)
    rest = unit - (unit @ b1) * b1
    sine = float(np.linalg.norm(rest))
    return np.stack([b1, rest / sine if sine > 0.0 else rest]), sine


def layer_of(layer: int, num_layers: int) -> int:
    """The layer, if the model has it.

    Raises:
        TrimtabError: ``E_LAYER_RANGE``.
    """
    if not 0 <= layer < num_layers:
        raise TrimtabError("E_LAYER_RANGE", f"layer {layer} of a model with {num_layers} layers")
    return layer


def _vectors(sha256: str, store: Store, num_layers: int, hidden: int) -> NDArray[np.float32]:
    vectors = store.load(f"sha256:{sha256}").vectors
    if vectors.shape != (num_layers, hidden):
        raise TrimtabError(
            "E_DIRECTION_WIDTH",
            f"direction {sha256[:12]} has the shape {list(vectors.shape)}, "
            f"the model needs {[num_layers, hidden]}",
        )
    return vectors


def _vector(
    vectors: NDArray[np.float32], vector_layer: int | None, layer: int
) -> NDArray[np.float64]:
    row = layer_of(layer if vector_layer is None else vector_layer, len(vectors))
    vector: NDArray[np.float64] = vectors[row].astype(np.float64)
    return vector
