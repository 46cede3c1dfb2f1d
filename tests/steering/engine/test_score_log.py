"""Scores by position and phase: what comes twice counts once, what never comes is known to be missing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steering.engine.score_log import ScoreLog
from steering.readings import Reading
from steering.thinking import ThinkingTracker
from tests.steering.engine.small_plans import MARKERS, TEXTS

A, BLANK, START, END = 0, 1, 2, 3
TRACKER = ThinkingTracker.build(TEXTS, *MARKERS)
READINGS = tuple(Reading(f"p@1/{n}", f"p/{n}", "f" * 64, n, 1, "affine") for n in range(2))


def log(prompt: list[int], *, tracker: ThinkingTracker | None = TRACKER, whole: bool = False):
    return ScoreLog(READINGS, prompt, len(prompt), tracker, whole_prompt=whole)


def packed(*rows: list[float]) -> bytes:
    return np.array(rows, dtype="<f4").tobytes()


def filled(prompt: list[int], answer: list[int], scores: list[float]) -> ScoreLog:
    """A log of which reading 0 got these scores, from the prompt's end on, and reading 1 none."""
    made = log(prompt)
    made.add_tokens(answer)
    made.add_scores(len(prompt) - 1, [0], packed(scores))
    return made


def test_a_cliff_is_the_plateau_of_thinking_minus_its_end() -> None:
    answer = [START, *[A] * 18, END, BLANK, A, A, A]
    thought = [0.5, *[0.01 * n for n in range(18)]]
    scores = [0.9, *thought, 0.2, 0.1, 0.3, 0.5]
    made = filled([A, A], answer, [float(np.float32(s)) for s in scores])
    found = made.summary(0)
    assert found.prompt_end == pytest.approx(0.9)
    # Of nineteen thinking tokens, the two highest.
    assert found.plateau == pytest.approx((0.5 + 0.17) / 2)
    assert found.final == pytest.approx(0.1)
    assert found.cliff == pytest.approx(0.335 - 0.1)
    assert found.answer_start == pytest.approx(0.3)
    assert found.answer_mean == pytest.approx(0.4)
    assert (found.tokens, found.missing) == (23, 0)
    assert made.runs() == [
        ("prompt_end", 1, 1),
        ("thinking", 2, 20),
        ("think_end", 21, 22),
        ("answer", 23, 24),
    ]
    other = made.summary(1)
    assert (other.tokens, other.missing) == (0, 24)
    assert (other.prompt_end, other.plateau, other.cliff, other.answer_mean) == (None,) * 4


@pytest.mark.parametrize(
    ("prompt", "answer", "phases"),
    [
        # The template opens the thinking.
        ([A, START], [A, END, A, A], {"plateau": 0.1, "final": 0.2, "answer_mean": 0.3}),
        # The prompt itself ends it, with and without blanks that follow.
        ([START, A, END], [A, A, A], {"plateau": None, "final": 0.0, "answer_mean": 0.15}),
        ([START, END], [BLANK, A, A], {"plateau": None, "final": 0.1, "answer_mean": 0.2}),
        # Thinking that does not end, none at all, and a second thought that no longer counts.
        ([A], [START, A, A], {"plateau": 0.2, "final": None, "answer_mean": None}),
        ([A], [A, A, A], {"plateau": None, "final": None, "answer_mean": 0.15}),
        ([A], [START, END, A, START, END, A], {"plateau": 0.1, "final": 0.2, "answer_mean": 0.3}),
    ],
)
def test_phases_that_do_not_occur_are_none(prompt, answer, phases) -> None:
    scores = [n / 10 for n in range(len(answer))]
    found = filled(prompt, answer, scores).summary(0)
    for name, expected in phases.items():
        score = getattr(found, name)
        assert score == (None if expected is None else pytest.approx(expected)), name
    assert found.prompt_end == 0.0
    assert found.missing == 0


def test_without_markers_all_is_answer() -> None:
    made = log([A], tracker=None)
    made.add_tokens([START, END, A])
    made.add_scores(0, [0, 1], packed([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]))
    assert made.summary(1).answer_mean == pytest.approx(0.55)
    assert made.runs() == [("prompt_end", 0, 0), ("answer", 1, 2)]
    assert made.phase == "answer"


def test_what_is_computed_again_replaces_itself_and_is_fresh_once() -> None:
    made = log([A, A, A])
    made.add_tokens([A, A, A])
    assert [list(f) for f in made.add_scores(2, [0], packed([0.5, 0.25]))] == [[0.25]]
    # After a preemption, from the prompt's start on, and one token further.
    again = made.add_scores(0, [0], packed([9.0, 9.0, 0.5, 0.75, 0.125]))
    assert [list(f) for f in again] == [[0.125]]
    assert made.trace(0) == [(2, 0.5), (3, 0.75), (4, 0.125)]
    assert made.recent(0, 1) == [0.125]
    assert made.recent(0, 60) == [0.75, 0.125]


def test_what_was_not_written_did_not_come() -> None:
    made = log([A, A])
    made.add_tokens([A, A, A, A])
    made.add_scores(1, [0], packed([0.5, math.nan, 0.25]))
    assert made.trace(0) == [(1, 0.5), (3, 0.25)]
    assert made.summary(0).missing == 2
    assert made.summary(0).tokens == 1
    assert made.summary(0).answer_start is None


def test_the_whole_prompt_is_kept_where_it_is_read() -> None:
    made = log([A, A, A], whole=True)
    made.add_tokens([A])
    fresh = made.add_scores(0, [0], packed([0.125, 0.25]))
    made.add_scores(2, [0], packed([0.5]))
    assert [list(f) for f in fresh] == [[]], "only generated tokens are counted"
    assert made.trace(0) == [(0, 0.125), (1, 0.25), (2, 0.5)]
    assert made.runs() == [("prompt", 0, 1), ("prompt_end", 2, 2)]
    assert made.summary(0).prompt_end == 0.5


@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=12),
    ahead=st.integers(0, 3),
)
@settings(max_examples=80, deadline=None)
def test_a_stream_tells_each_score_once_and_with_the_token_that_it_led_to(lengths, ahead) -> None:
    prompt = [A, A]
    made = log(prompt)
    total = sum(lengths)
    scores = [n / 100 for n in range(total)]
    told: list[tuple[int, float]] = []
    delivered = made_tokens = 0
    for length in lengths:
        # The engine may be ahead of what the client is given.
        while made_tokens < min(total, delivered + length + ahead):
            made.add_tokens([A])
            made.add_scores(1 + made_tokens, [0], packed([scores[made_tokens]]))
            made_tokens += 1
        made.deliver(length)
        delivered += length
        told += made.trace(0, delivered=True, untold=True)
        made.tell()
        assert told[-1][0] == len(prompt) + delivered - 2
    assert told == made.trace(0)
    assert made.trace(0, untold=True) == []


def test_nothing_is_told_with_a_chunk_before_a_token_is_on_its_way() -> None:
    made = log([A, A], whole=True)
    made.add_tokens([A])
    made.add_scores(0, [0], packed([0.125, 0.25]))
    assert made.trace(0, delivered=True, untold=True) == []
    made.tell()
    made.deliver(1)
    assert made.trace(0, delivered=True, untold=True) == [(0, 0.125), (1, 0.25)]


def test_a_lost_score_of_the_prompt_is_missing_where_the_whole_prompt_is_read() -> None:
    made = log([A] * 10, whole=True)
    made.add_scores(0, [0], packed([0.5] * 2 + [math.nan] * 3))
    assert made.summary(0).missing == 0, "nothing can be missing before there is an answer"
    made.add_tokens([A])
    made.add_scores(9, [0], packed([0.25]))
    assert made.summary(0).missing == 7
    assert made.summary(0).prompt_end == 0.25


@given(
    pieces=st.lists(
        st.tuples(st.integers(0, 12), st.lists(st.sampled_from([0.25, 0.5, math.nan]), max_size=6)),
        max_size=8,
    ),
    whole=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_pieces_of_any_length_and_order_are_kept_by_position(pieces, whole) -> None:
    prompt = [A] * 4
    made = log(prompt, whole=whole)
    made.add_tokens([A] * 30)
    kept: dict[int, float] = {}
    for position, scores in pieces:
        (fresh,) = made.add_scores(position, [0], packed(scores)) if scores else ([],)
        expected = []
        for p, score in enumerate(scores, start=position):
            if p < (0 if whole else len(prompt) - 1) or math.isnan(score):
                continue
            if p not in kept and p >= len(prompt):
                expected.append(score)
            kept[p] = score
        assert list(fresh) == expected
    assert made.trace(0) == sorted(kept.items())
    assert made.summary(1).tokens == 0
