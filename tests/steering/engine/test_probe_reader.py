"""What is read of which token: random batches against one token at a time."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steering.engine.probe_reader import ProbeReader, ReadingPayload, Wanted
from steering.engine.settings import MAX_READINGS
from steering.ops.read_out import AFFINE, COSINE
from tests.steering.engine.small_plans import worker
from tests.steering.ops.test_read_out import by_definition

LAYERS, HIDDEN, TOKENS = 3, 8, 64
# Two at one layer, one of them a cosine, one at another, one at the final norm.
SITES = ((1, "affine"), (1, "cosine"), (2, "affine"), (LAYERS, "affine"))


def reader() -> ProbeReader:
    random = np.random.default_rng(5)
    made = ProbeReader(LAYERS, HIDDEN, TOKENS, torch.device("cpu"))
    for n, (layer, kind) in enumerate(SITES):
        weight = random.standard_normal(HIDDEN).astype(np.float32)
        payload = ReadingPayload(f"r{n}", layer, kind, weight, 0.1 * n)
        made.activate(ReadingPayload.from_wire(payload.to_wire()))
    return made


READER = reader()

requests = st.lists(
    st.tuples(
        st.sets(st.integers(0, len(SITES) - 1)),
        st.booleans(),
        st.integers(1, 12),  # prompt
        st.integers(0, 14),  # computed
        st.integers(1, 9),  # scheduled
    ),
    min_size=1,
    max_size=6,
)


@given(drawn=requests, with_rest=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_each_request_gets_the_scores_it_wants_of_the_tokens_it_wants(
    drawn, with_rest, seed
) -> None:
    generator = torch.Generator().manual_seed(seed)
    wanted = [Wanted(tuple(sorted(n)), whole) if n else None for n, whole, *_ in drawn]
    prompts, computed, scheduled = (
        np.array(column, dtype=np.int32) for column in list(zip(*drawn, strict=True))[2:]
    )
    tokens = int(scheduled.sum())
    batch = SimpleNamespace(
        request_ids=[f"q{n}" for n in range(len(drawn))],
        computed=computed,
        scheduled=scheduled,
        prompt_lengths=prompts,
    )
    # What an earlier pass has left there must not come back.
    READER.scores.fill_(0.5)
    READER.fill(wanted, batch)
    x = torch.randn(LAYERS + 1, tokens, HIDDEN, generator=generator)
    rest = torch.randn(LAYERS + 1, tokens, HIDDEN, generator=generator) if with_rest else None
    for layer in range(LAYERS + 1):
        if layer in READER.due:
            READER.read_on_host(layer, x[layer], None if rest is None else rest[layer])
    h = x if rest is None else x + rest
    snapshot = READER.take()
    found = {} if snapshot is None else snapshot.by_request()
    expected = {}
    at = 0
    for n, want in enumerate(wanted):
        positions = [
            p
            for p in range(computed[n], computed[n] + scheduled[n])
            if want is not None and (want.prompt or p >= prompts[n] - 1)
        ]
        if positions:
            expected[f"q{n}"] = [
                [
                    by_definition(
                        h[SITES[r][0], at + p - computed[n]],
                        READER.weight[r],
                        float(READER.bias[r]),
                        COSINE if SITES[r][1] == "cosine" else AFFINE,
                    )
                    for p in positions
                ]
                for r in want.readings
            ]
            start, numbers, scores = found[f"q{n}"]
            assert start == positions[0]
            assert tuple(numbers) == want.readings
            rows = np.frombuffer(scores, dtype="<f4").reshape(len(numbers), -1)
            np.testing.assert_allclose(rows, expected[f"q{n}"], rtol=2e-5, atol=2e-6)
        at += scheduled[n]
    assert found.keys() == expected.keys()
    assert READER.take() is None


def test_a_pass_that_does_not_reach_the_site_leaves_no_score() -> None:
    batch = SimpleNamespace(
        request_ids=["q"],
        computed=np.array([0], dtype=np.int32),
        scheduled=np.array([4], dtype=np.int32),
        prompt_lengths=np.array([4], dtype=np.int32),
    )
    READER.scores.fill_(0.5)
    READER.fill([Wanted((0, 2))], batch)
    READER.read_on_host(2, torch.ones(4, HIDDEN), None)
    snapshot = READER.take()
    assert snapshot is not None
    rows = np.frombuffer(snapshot.by_request()["q"][2], dtype="<f4")
    assert np.isnan(rows[0])
    assert 0.0 < rows[1] < 1.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": np.ones(5, dtype=np.float32)}, "5 wide, the residual stream 8"),
        ({"layer": LAYERS + 1}, "layers 0 to 2"),
        ({"weight": np.full(HIDDEN, np.nan, dtype=np.float32)}, "not finite"),
        ({"bias": float("inf")}, "not finite"),
        ({"read_out": "other"}, "kind other"),
    ],
)
def test_what_cannot_be_read_is_refused(change, words) -> None:
    made = reader()
    good = {
        "id": "new",
        "layer": 0,
        "read_out": "affine",
        "weight": np.ones(HIDDEN, dtype=np.float32),
        "bias": 0.0,
    }
    with pytest.raises(ValueError, match=words):
        made.activate(ReadingPayload(**{**good, **change}))
    assert made.ids == ["r0", "r1", "r2", "r3"]
    made.activate(ReadingPayload(**good))
    made.activate(ReadingPayload(**good))
    assert made.ids[-1] == "new"
    for n in range(MAX_READINGS - len(made.ids)):
        made.activate(ReadingPayload(**{**good, "id": f"more{n}"}))
    with pytest.raises(ValueError, match="at most 16"):
        made.activate(ReadingPayload(**{**good, "id": "one too many"}))


def test_a_worker_reads_requests_that_nothing_steers_and_says_what_steps_cost() -> None:
    requests = worker()
    weight = np.ones(4, dtype=np.float32)
    requests.step.reader.activate(ReadingPayload("r", 1, "affine", weight, 0.0))
    stamp = {"trimtab": {"plan": None, "strength": 1.0, "readings": [0]}}
    requests.enter("read", stamp)
    requests.enter("plain", None)
    assert requests.placements == {}

    def step(*ids: str) -> SimpleNamespace:
        count = len(ids)
        return SimpleNamespace(
            request_ids=list(ids),
            computed=np.zeros(count, dtype=np.int32),
            scheduled=np.full(count, 2, dtype=np.int32),
            prompt_lengths=np.full(count, 2, dtype=np.int32),
        )

    requests.prepare(step("plain", "read"))
    requests.step.reader.read_on_host(1, torch.zeros(4, 4), None)
    reports = requests.take_reports()
    assert reports is not None
    scores = reports.resolve()["read"]["scores"]
    assert scores == [[1, [0], np.array([0.5], dtype="<f4").tobytes()]]
    seconds, *edited = reports.step()
    assert 0 < seconds < 1
    assert edited == [0, 0, 0, 0]
    requests.leave("read")
    requests.prepare(step("plain"))
    assert requests.take_reports() is None
    assert requests.step.reader.due == {}
