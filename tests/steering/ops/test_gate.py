"""Deciding gates within a pass: both forms against a definition that takes one token at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from steering.engine.gates import decide_on_host
from steering.engine.request_rows import NEVER, RequestRows
from steering.engine.sites import LayerSite
from steering.engine.step import Due, Step
from steering.engine.tables import MAX_GATES, NUM_CASES, Sizes, SteeringTables
from steering.ops.read_out import AFFINE, COSINE
from tests.steering.ops.kernels import needs_gpu, replay
from tests.steering.ops.test_read_out import by_definition as score_by_definition

HIDDEN, LAYERS, SLOTS, ROWS, TOKENS = 40, 4, 8, 7, 24
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BEFORE = 1 << 8
"""The bit of ``decides`` that says that a token was computed before."""

WRITTEN = ("is_open", "decided_at", "score", "first_open", "opened")


@dataclass
class World:
    """A step in the middle of a pass, and the activations at one of its layers."""

    step: Step
    x: torch.Tensor
    rest: torch.Tensor | None

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that deciding may change."""
        state = {name: getattr(self.step.requests, name) for name in WRITTEN}
        return state | {"masks": self.step.masks, "slots": self.step.slots}

    def values(self) -> dict[str, torch.Tensor]:
        """:meth:`state` as it is now, with the parts of what is packed."""
        values = {name: tensor.clone().cpu() for name, tensor in self.state().items()}
        first = values.pop("first_open")
        values["first_at"] = first >> 32
        values["first_score"] = (first & 0xFFFFFFFF).int().view(torch.float32)
        return values


def world(seed: int, dtype: torch.dtype, rest: bool = False, device: str = "cpu") -> World:
    """Requests in every situation: gates latched and not, decided before, here, later and never.

    As in a real pass, one token of a request at most decides a latched gate anew, and a token's slot is what
    its mask calls for.
    """
    random = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    place = torch.device(device)
    tables = SteeringTables(Sizes(LAYERS, SLOTS, HIDDEN, TOKENS + 4), place)
    entries = tables.gate_layer.numel()
    tables.gate_weight.copy_(torch.randn(entries, HIDDEN, generator=generator))
    tables.gate_weight[0] = tables.gate_bias[0] = math.nan
    tables.gate_bias[1:] = torch.randn(entries - 1, generator=generator).to(place)
    kinds = torch.tensor(random.choice([AFFINE, COSINE], entries), dtype=torch.int32)
    tables.gate_read_out.copy_(kinds)
    middle = torch.where(kinds == AFFINE, 0.5, 0.0)
    edges = torch.tensor(random.choice([0, 1, 2], entries))
    tables.gate_bounds[:, 0] = torch.where(edges == 0, -math.inf, middle - 0.02).to(place)
    tables.gate_bounds[:, 1] = torch.where(edges == 1, math.inf, middle + 0.3).to(place)
    layers = random.choice([1, 2, LAYERS], entries).astype(np.int32)
    layers[0] = -1
    tables.gate_layer.copy_(torch.from_numpy(layers))
    tables.host_gate_layer[:] = layers

    requests = RequestRows(ROWS, place)
    picks = random.permutation(np.arange(1, entries))[: ROWS * MAX_GATES].reshape(ROWS, -1)
    picks[0] = 0
    requests.gates.copy_(torch.from_numpy(picks))
    latched = random.random((ROWS, MAX_GATES)) < 0.5
    latched[0] = False
    requests.latched.copy_(torch.from_numpy(latched))
    requests.is_open.copy_(torch.from_numpy(random.random((ROWS, MAX_GATES)) < 0.5))
    requests.case_slots.copy_(
        torch.from_numpy(random.integers(0, SLOTS, (ROWS, 1 << MAX_GATES, NUM_CASES)))
    )

    step = Step(tables, requests)
    # Requests of consecutive tokens, then some that belong to nobody.
    rows = np.sort(random.integers(1, ROWS, TOKENS)).astype(np.int32)
    rows[-3:] = 0
    positions = np.zeros(TOKENS, dtype=np.int32)
    decided_at = np.full((ROWS, MAX_GATES), -1, dtype=np.int32)
    for row in range(1, ROWS):
        mine = np.flatnonzero(rows == row)
        positions[mine] = random.integers(0, 50) + np.arange(len(mine))
        for g in range(MAX_GATES):
            # The last token is beyond it, at it, or before it.
            if len(mine):
                last = positions[mine[-1]]
                decided_at[row, g] = max(last + random.choice([-1, 0, 1]), -1)
    requests.decided_at.copy_(torch.from_numpy(decided_at))
    decides = random.integers(0, 1 << MAX_GATES, TOKENS) | BEFORE * random.integers(0, 2, TOKENS)
    decides[rows == 0] = 0
    masks = random.integers(0, 1 << MAX_GATES, TOKENS) & ~decides
    cases = random.integers(0, NUM_CASES, TOKENS)
    for name, values in (
        ("rows", rows),
        ("positions", positions),
        ("decides", decides),
        ("masks", masks),
        ("cases", cases),
    ):
        getattr(step, name)[:TOKENS] = torch.from_numpy(values.astype(np.int32)).to(place)
    step.slots[:TOKENS] = requests.case_slots[rows, masks, cases]
    step.gate_counts.fill_(1)
    step._filled = TOKENS
    for g in range(MAX_GATES):
        of = tables.host_gate_layer[picks[rows, g]]
        for layer in range(LAYERS + 1):
            due = np.flatnonzero((decides >> g & 1).astype(bool) & (of == layer))
            if len(due):
                step.due.setdefault(layer, []).append(Due(g, torch.from_numpy(due)))
    x = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype)
    others = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype) if rest else None
    return World(step, x.to(place), None if others is None else others.to(place))


def by_definition(w: World, layer: int) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """What is to be found afterwards, and how often each situation occurred."""
    step, requests, tables = w.step, w.step.requests, w.step.tables
    out = w.values()
    seen = dict.fromkeys(("kept", "recorded", "past", "opened", "again", "closed", "cosine"), 0)
    for token in range(TOKENS):
        row, decides = int(step.rows[token]), int(step.decides[token])
        position = int(step.positions[token])
        h = w.x[token].float() + (0.0 if w.rest is None else w.rest[token].float())
        for g in range(MAX_GATES):
            entry = int(requests.gates[row, g])
            if not decides >> g & 1 or int(tables.gate_layer[entry]) != layer:
                continue
            kind = int(tables.gate_read_out[entry])
            weight, bias = tables.gate_weight[entry], float(tables.gate_bias[entry])
            score = score_by_definition(h, weight, bias, kind)
            low, high = tables.gate_bounds[entry].tolist()
            assert min(abs(score - low), abs(score - high)) > 1e-5, "another seed"
            opens = low < score < high
            decided_at = int(requests.decided_at[row, g])
            if requests.latched[row, g]:
                if position == decided_at:
                    opens = bool(requests.is_open[row, g])
                elif position > decided_at:
                    out["is_open"][row, g] = opens
                    out["decided_at"][row, g] = position
                    out["score"][row, g] = score
                kept = "kept" if position == decided_at else "past"
                seen["recorded" if position > decided_at else kept] += 1
            elif opens and not decides & BEFORE:
                out["opened"][row, g] += 1
                if position < out["first_at"][row, g]:
                    out["first_at"][row, g] = position
                    out["first_score"][row, g] = score
                seen["opened"] += 1
            else:
                seen["again" if opens else "closed"] += 1
            seen["cosine"] += kind == COSINE
            out["masks"][token] |= opens << g
            mask, case = int(out["masks"][token]), int(step.cases[token])
            out["slots"][token] = requests.case_slots[row, mask, case]
    return out, seen


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, values in expected.items():
        if name.endswith("score"):
            torch.testing.assert_close(
                found[name], values, rtol=1e-5, atol=2e-6, equal_nan=True, msg=name
            )
        else:
            assert torch.equal(found[name], values), name


SEEDS = (0, 1, 2)
AT = (1, 2, LAYERS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rest", [False, True])
def test_the_host_form_equals_its_definition(dtype: torch.dtype, rest: bool) -> None:
    seen: dict[str, int] = {}
    for seed in SEEDS:
        for layer in AT:
            w = world(seed, dtype, rest)
            expected, here = by_definition(w, layer)
            decide_on_host(w.step, layer, w.x, w.rest)
            assert_same(w.values(), expected)
            seen = {name: seen.get(name, 0) + n for name, n in here.items()}
    assert all(seen.values()), seen


def test_several_gates_of_a_token_at_one_layer_are_all_decided() -> None:
    w = world(3, torch.float32)
    w.step.tables.gate_layer[1:] = 2
    w.step.due = {2: [due for layer in AT for due in w.step.due.get(layer, ())]}
    several = [int(n).bit_count() > 1 for n in w.step.decides[:TOKENS] & 7]
    assert any(several)
    expected, _ = by_definition(w, 2)
    decide_on_host(w.step, 2, w.x[None], None)
    assert_same(w.values(), expected)


def test_a_layer_that_no_gate_reads_changes_nothing() -> None:
    w = world(0, torch.float32)
    before = w.values()
    decide_on_host(w.step, 3, w.x, None)
    assert_same(w.values(), before)


def _at_the_bound(kind: int, low: float, high: float, device: str = "cpu") -> World:
    """One token of one gate per token, whose score is exactly 0.5 (affine) or 0 (cosine)."""
    w = world(0, torch.float32, device=device)
    step, requests, tables = w.step, w.step.requests, w.step.tables
    w.x.zero_()
    tables.gate_bias.zero_()
    tables.gate_bounds[1] = torch.tensor([low, high])
    tables.gate_read_out[1] = kind
    tables.gate_layer[1] = 1
    requests.gates[1, 0] = 1
    requests.latched[1, 0] = False
    step.decides.zero_()
    step.decides[0], step.rows[0], step.masks[0] = 1, 1, 0
    step.due = {1: [Due(0, torch.tensor([0]))]}
    return w


BOUNDS = [
    (AFFINE, 0.5, math.inf, False),
    (AFFINE, -math.inf, 0.5, False),
    (AFFINE, 0.49, 0.51, True),
    (COSINE, 0.0, math.inf, False),
    (COSINE, -math.inf, 0.0, False),
    (COSINE, -0.1, 0.1, True),
]


@pytest.mark.parametrize(("kind", "low", "high", "opens"), BOUNDS)
def test_a_score_on_a_bound_does_not_open(kind: int, low: float, high: float, opens: bool) -> None:
    w = _at_the_bound(kind, low, high)
    decide_on_host(w.step, 1, w.x, None)
    assert bool(w.step.masks[0] & 1) == opens
    assert int(w.step.requests.opened[1, 0]) == opens


def check_kernel(device: str) -> int:
    """The Triton form, called as the engine calls it, against the definition; returns how many cases."""

    def decide(w: World, layer: int) -> None:
        w.step.on_host = False
        site = LayerSite(w.step, layer, None, gates=True)
        replay(device, lambda: site.stream(w.x, w.rest), list(w.state().values()))

    checked = 0
    seen: dict[str, int] = {}
    for dtype in DTYPES:
        for rest in (False, True):
            for seed in SEEDS:
                layer = AT[(seed + rest) % len(AT)]
                w = world(seed, dtype, rest, device)
                expected, here = by_definition(w, layer)
                read = w.x.clone()
                decide(w, layer)
                assert_same(w.values(), expected)
                assert torch.equal(w.x, read)
                seen = {name: seen.get(name, 0) + n for name, n in here.items()}
                checked += 1
    assert all(seen.values()), seen

    w = world(3, torch.float32, device=device)
    w.step.tables.gate_layer[1:] = 2
    expected, _ = by_definition(w, 2)
    w.x = w.x[None]
    decide(w, 2)
    assert_same(w.values(), expected)

    w = world(0, torch.float32, device=device)
    before = w.values()
    decide(w, 3)
    assert_same(w.values(), before)
    w.step.gate_counts[1] = 0
    decide(w, 1)
    assert_same(w.values(), before)
    w.step.gate_counts[1] = 1
    decide(w, 1)
    assert not torch.equal(w.values()["masks"], before["masks"])

    for kind, low, high, opens in BOUNDS:
        w = _at_the_bound(kind, low, high, device)
        decide(w, 1)
        assert bool(w.step.masks[0] & 1) == opens
        first = int(w.step.requests.first_open[1, 0])
        assert (first == NEVER) != opens
    return checked + 4 + len(BOUNDS)


def test_the_kernel_equals_the_definition_under_the_interpreter(
    interpreted: dict[str, int],
) -> None:
    assert interpreted["gate"] == 28


@needs_gpu
def test_the_kernel_equals_the_definition_on_a_gpu() -> None:
    assert check_kernel("cuda") == 28
