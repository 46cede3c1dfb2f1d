"""The tensors of each kind of artefact, and what must hold of them.

What is about to be stored and what was read back pass the same checks, so that nothing is in the store
that could not be put there, and a stranger's file gets no further than a method's mistake.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from directions.card import AnyCard, Card, CardDraft, HeadSetCard, ProbeCard, ProbeDraft
from directions.errors import TrimtabError

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]
Tensors = dict[str, npt.NDArray[Any]]

_FLOAT = np.dtype(np.float32)
_MASK = (np.dtype(np.uint8), np.dtype(np.bool_))


def layout(card: AnyCard) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the tensors beside a card."""
    model = card.model
    match card:
        case Card():
            return {
                "vectors": (model.num_layers, model.hidden_size),
                "present": (model.num_layers,),
            }
        case ProbeCard():
            outputs = len(card.outputs)
            return {"weights": (outputs, model.hidden_size), "bias": (outputs,)}
        case HeadSetCard():
            return {"evidence": (len(card.heads),)}


def check_stored(card: AnyCard, tensors: Tensors) -> Tensors:
    """What was read from a file, as its kind wants it.

    Args:
        card: the card beside the file.
        tensors: by the names of ``layout``.

    Raises:
        TrimtabError: E_ARTEFACT_SHAPE, E_ARTEFACT_NONFINITE, E_ARTEFACT_WEIGHTS.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in (_MASK if name == "present" else (_FLOAT,)):
            raise TrimtabError("E_ARTEFACT_SHAPE", f"{name} has type {tensor.dtype}")
    match card:
        case Card():
            return _stored_direction(card, tensors)
        case ProbeCard():
            weights, bias = probe_tensors(card, tensors["weights"], tensors["bias"])
            return {"weights": weights, "bias": bias}
        case HeadSetCard():
            return {"evidence": head_set_evidence(tensors["evidence"], len(card.heads))}


def direction_tensors(
    card: CardDraft, vectors: npt.ArrayLike, present: npt.ArrayLike
) -> tuple[FloatArray, BoolArray]:
    """A direction's vectors and mask as they are stored, or why they cannot be of this model.

    Returns:
        ``[num_layers, hidden_size] float32``, zero where no layer is present, and
        ``[num_layers] bool``.

    Raises:
        TrimtabError: E_ARTEFACT_SHAPE, E_ARTEFACT_NONFINITE.
    """
    rows = _floats(vectors)
    mask = np.array(present).astype(bool)
    shape = (card.model.num_layers, card.model.hidden_size)
    _check_shape("vectors", rows.shape, shape)
    _check_shape("the mask of layers", mask.shape, shape[:1])
    if not mask.any():
        raise TrimtabError("E_ARTEFACT_SHAPE", "no layer is present", expected="at least one")
    bad = np.flatnonzero(mask & ~np.isfinite(rows).all(axis=1))
    if bad.size:
        raise _nonfinite(f"vectors hold NaN or infinity at layer {int(bad[0])}")
    rows[~mask] = 0.0
    return rows, mask


def probe_tensors(
    card: ProbeDraft, weights: npt.ArrayLike, bias: npt.ArrayLike
) -> tuple[FloatArray, FloatArray]:
    """A probe's weights and bias as they are stored, or why they cannot be of this model.

    Returns:
        ``[outputs, hidden_size] float32`` and ``[outputs] float32``.

    Raises:
        TrimtabError: E_ARTEFACT_SHAPE, E_ARTEFACT_NONFINITE, E_ARTEFACT_WEIGHTS (an output whose
            weights are zero, or so small or large that float32 cannot hold their squared length,
            by which a cosine divides).
    """
    rows, offsets = _floats(weights), _floats(bias)
    _check_shape("weights", rows.shape, (len(card.outputs), card.model.hidden_size))
    _check_shape("bias", offsets.shape, (len(card.outputs),))
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        squares = np.einsum("ph,ph->p", rows, rows)
    finite = np.isfinite(rows).all(axis=1) & np.isfinite(offsets)
    bad_length = ~np.isfinite(squares) | (squares < np.finfo(np.float32).tiny)
    for index, name in enumerate(card.outputs):
        if not finite[index]:
            raise _nonfinite(f"output {name!r} holds NaN or infinity")
        if bad_length[index]:
            what = "zero" if not rows[index].any() else "too small or too large to be squared"
            raise TrimtabError(
                "E_ARTEFACT_WEIGHTS",
                f"the weights of output {name!r} are {what}",
                expected="weights whose squared length is a normal float32",
            )
    return rows, offsets


def head_set_evidence(evidence: npt.ArrayLike, heads: int) -> FloatArray:
    """A head set's evidence as it is stored, one figure for each of so many heads.

    Raises:
        TrimtabError: E_ARTEFACT_SHAPE, E_ARTEFACT_NONFINITE.
    """
    figures = _floats(evidence)
    _check_shape("evidence", figures.shape, (heads,))
    if not np.isfinite(figures).all():
        index = int(np.flatnonzero(~np.isfinite(figures))[0])
        raise _nonfinite(f"the evidence of head number {index} is NaN or infinity")
    return figures


def _stored_direction(card: Card, tensors: Tensors) -> Tensors:
    vectors, mask = direction_tensors(card, tensors["vectors"], tensors["present"])
    if tuple(np.flatnonzero(mask)) != card.layers:
        raise TrimtabError("E_ARTEFACT_SHAPE", "other layers are present than the card says")
    if np.any(tensors["vectors"][~mask]):
        raise TrimtabError("E_ARTEFACT_SHAPE", "there are numbers in layers that are absent")
    return {"vectors": vectors, "present": mask}


def _floats(values: npt.ArrayLike) -> FloatArray:
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinity, refused later
        return np.array(values, dtype=np.float32, order="C")


def _check_shape(what: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise TrimtabError(
            "E_ARTEFACT_SHAPE", f"the shape of {what} is {found}", expected=f"{expected}"
        )


def _nonfinite(what: str) -> TrimtabError:
    return TrimtabError("E_ARTEFACT_NONFINITE", what, expected="finite numbers")
