"""Artefacts that mean nothing, to try edits on a model for which none have been made.

Directions, probes and head sets with random numbers whose sizes fit the model's own: enough to show
that what the engine does with them is what it should do.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import numpy as np
import torch

from directions.card import CardDraft, HeadSetDraft, ProbeDraft
from directions.model_sites import decoder_layers
from steering.engine.parity import World
from steering.readings import compile_readings

_CREATED: Final = "2026-01-01T00:00:00Z"

PROBES: Final = ("early@1", "middle@1", "similar@1", "top@1")
"""The probes, two outputs each."""


def put_random_artefacts(world: World) -> None:
    """Put random artefacts for a world's model into its store, and have the probes read.

    ``alpha`` and ``beta`` are directions; ``early``, ``middle``, ``top`` probes that read a quarter and half
    of the way up and the final norm, ``similar`` one with the cosine read-out; ``few`` is a head set.
    """
    described = world.fingerprint
    norms = _activation_norms(world, world.prompt("Which way does the wind blow today?"))
    rng = np.random.default_rng(7)
    size = (world.num_layers, described.hidden_size)
    for name in ("alpha", "beta"):
        unit = rng.standard_normal(size)
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        vectors = unit * np.array(norms)[:, None] * 0.1
        world.store.put(
            CardDraft(
                method="random",
                model=described,
                activation_norms=tuple(norms),
                dtype="float32",
                created=_CREATED,
            ),
            vectors.astype(np.float32),
            np.ones(size[0], dtype=bool),
            name=name,
        )
    last = size[0] - 1
    for name, layer in (("early", last // 4), ("middle", last // 2), ("top", None)):
        # Scores as spread out as a trained probe's: the logit is a few units wide. What leaves the final
        # norm is about as long as the root of its width.
        scale = size[1] ** 0.5 if layer is None else norms[layer]
        weights = rng.standard_normal((2, size[1])) * (3.0 / scale)
        world.store.put_probe(_probe_draft(world, layer, "affine"), weights, [0.0, 0.1], name=name)
    world.store.put_probe(
        _probe_draft(world, last // 2, "cosine"),
        rng.standard_normal((2, size[1])),
        [0.0, 0.0],
        name="similar",
    )
    heads = [(last, 0), (last // 2, described.num_heads - 1), (last // 4, 1 % described.num_heads)]
    distinct = list(dict.fromkeys(heads))
    world.store.put_head_set(
        HeadSetDraft(method="random", model=described, dtype="float32", created=_CREATED),
        distinct,
        [1.0, 0.5, 0.25][: len(distinct)],
        name="few",
    )
    world.readings = compile_readings(PROBES, world.store, described)


def _probe_draft(
    world: World, layer: int | None, read_out: Literal["affine", "cosine"]
) -> ProbeDraft:
    return ProbeDraft(
        method="random",
        model=world.fingerprint,
        dtype="float32",
        created=_CREATED,
        site="final_norm" if layer is None else "residual",
        layer=layer,
        read_out=read_out,
        outputs=("first", "second"),
    )


def _activation_norms(world: World, prompt: list[int]) -> list[float]:
    norms: list[float] = []

    def hook(module: Any, args: Any, output: Any) -> None:
        h = output[0] if isinstance(output, tuple) else output
        # Past the first token, whose norm is an outlier in most models.
        norms.append(float(h[0, 1:].norm(dim=-1).mean()))

    handles = [layer.register_forward_hook(hook) for layer in decoder_layers(world.model)]
    with torch.no_grad():
        world.model(torch.tensor([prompt]))
    for handle in handles:
        handle.remove()
    return norms
