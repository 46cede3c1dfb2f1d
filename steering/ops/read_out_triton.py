"""The CUDA form of :mod:`steering.ops.read_out`: a score inside a kernel, and the kernel that reads probes.

Reading is one Triton program per token, between two layers of a running pass. A program returns at once when
nothing is read at this layer in this step, or not of its token. The number of programs depends only on the
shape, as graph capture requires.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from steering.ops.read_out import COSINE

# A kernel sees globals only if they are marked as constants.
_COSINE = tl.constexpr(COSINE)


@triton.jit
def hyperbolic_tangent(z):  # type: ignore[no-untyped-def]
    """``tanh(z)`` in float32, within 4e-7 of its value; Triton has none of its own.

    Near 0, where the quotient of exponentials cancels, a minimax polynomial takes over: what a probe leaves
    of an activation is mostly small.
    """
    magnitude = tl.abs(z)
    u = z * z
    tail = 0.1333195824 + u * (-0.0537866832 + u * (0.0208053832 - u * 0.0059058667))
    near = z + z * u * (-0.3333329927 + u * tail)
    far = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * magnitude))
    far = tl.where(z < 0.0, -far, far)
    return tl.where(magnitude < 0.6, near, far)


@triton.jit
def score_of(h, weights_ptr, inside, bias_ptr, read_out_ptr):  # type: ignore[no-untyped-def]
    """The score of one activation, held whole, by the weights at ``weights_ptr``."""
    weight = tl.load(weights_ptr, mask=inside, other=0.0)
    along = tl.sum(h * weight, axis=0)
    score = 1.0 / (1.0 + tl.exp(-(along + tl.load(bias_ptr))))
    if tl.load(read_out_ptr) == _COSINE:
        # The least positive normal number stands in for a weight of 0.
        square = tl.maximum(tl.sum(weight * weight, axis=0), 1.1754943508222875e-38)
        part = hyperbolic_tangent(tl.div_rn(along, square) * weight)
        norms = tl.sqrt_rn(tl.sum(h * h, axis=0)) * tl.sqrt_rn(tl.sum(part * part, axis=0))
        inner = tl.sum(h * part, axis=0)
        score = tl.where(norms > 0.0, inner / tl.where(norms > 0.0, norms, 1.0), 0.0)
    return score


@dataclass(frozen=True)
class ReadingTensors:
    """What reading reads and writes, of ``P`` readings; all on one device and contiguous.

    Attributes:
        weight: ``[P, hidden_size] float32``.
        bias: ``[P] float32``.
        read_out: ``[P] int32``: a kind of :mod:`steering.ops.read_out`.
        layer: ``[P] int32``: the layer that each reads, -1 for none.
        wants: ``[>= T] int32``: bit ``p``: reading ``p`` is wanted of the token.
        scores: ``[P, max_tokens] float32``; written where wanted.
        layer_counts: ``[>= layer + 1] int32``: 0 for layers at which nothing is read in this step.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    read_out: torch.Tensor
    layer: torch.Tensor
    wants: torch.Tensor
    scores: torch.Tensor
    layer_counts: torch.Tensor


# Compiled once for all layers: a number that is 1 or divisible by 16 would be special otherwise.
@triton.jit(do_not_specialize=["layer"])  # type: ignore[untyped-decorator]
def _read(  # type: ignore[no-untyped-def]
    x_ptr,
    rest_ptr,
    weight_ptr,
    bias_ptr,
    read_out_ptr,
    layer_ptr,
    wants_ptr,
    scores_ptr,
    layer_counts_ptr,
    layer,
    hidden,
    x_stride,
    rest_stride,
    scores_stride,
    HAS_REST: tl.constexpr,  # noqa: N803
    READINGS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    if tl.load(layer_counts_ptr + layer) == 0:
        return
    token = tl.program_id(0).to(tl.int64)
    wants = tl.load(wants_ptr + token)
    if wants == 0:
        return
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden
    h = tl.load(x_ptr + token * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_REST:
        rest = tl.load(rest_ptr + token * rest_stride + columns, mask=inside, other=0.0)
        h += rest.to(tl.float32)
    for p in range(READINGS):
        if (((wants >> p) & 1) != 0) & (tl.load(layer_ptr + p) == layer):
            place = weight_ptr + p * hidden + columns
            score = score_of(h, place, inside, bias_ptr + p, read_out_ptr + p)
            tl.store(scores_ptr + p * scores_stride + token, score)


def launch(x: torch.Tensor, rest: torch.Tensor | None, layer: int, tensors: ReadingTensors) -> None:
    """Read what is wanted at a layer, on the current stream and without waiting for it.

    Args:
        x: ``[T, hidden_size]`` or ``[1, T, hidden_size]``, last dimension contiguous; float32, bfloat16 or
            float16; only read.
        rest: like ``x``; the activation is ``x + rest``.
        layer: decoder layer, or the number of layers for the final norm.
        tensors: what is read and written beside it.
    """
    rows = x.view(-1, x.shape[-1])
    others = rows if rest is None else rest.view(-1, rest.shape[-1])
    tokens, hidden = rows.shape
    if tokens == 0:
        return
    block = triton.next_power_of_2(hidden)
    t = tensors
    _read[(tokens,)](
        rows,
        others,
        t.weight,
        t.bias,
        t.read_out,
        t.layer,
        t.wants,
        t.scores,
        t.layer_counts,
        layer,
        hidden,
        rows.stride(0),
        others.stride(0),
        t.scores.stride(0),
        HAS_REST=rest is not None,
        READINGS=t.weight.shape[0],
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
    )
