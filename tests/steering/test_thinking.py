"""Which tokens are thinking, from the text they decode to."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from directions.errors import TrimtabError
from steering.edits.scope import PHASES
from steering.thinking import MAX_MARKER, ThinkingTracker


def read(texts: list[str], start: str = "<think>", end: str = "</think>") -> list[str]:
    """The phase of each token of a text, were it generated."""
    vocabulary = sorted(set(texts))
    tracker = ThinkingTracker.build(vocabulary, start, end)
    states = tracker.states([vocabulary.index(text) for text in texts])
    return [PHASES[tracker.phase_of_state[state]] for state in states]


A, T, E = "answer", "thinking", "think_end"


@pytest.mark.parametrize(
    ("texts", "phases"),
    [
        (["Hello", " world"], [A, A]),
        (["<think>", "Hm", "</think>", "Yes"], [T, T, E, A]),
        (
            ["<think>", "Hm", "</think>", "\n\n", "", " ", "Yes", " ", "ok"],
            [T, T, E, E, E, E, A, A, A],
        ),
        (["a<think>b", "c"], [T, T]),
        (["<th", "ink", ">", "a</", "think", ">\n", "\n", "b"], [A, A, T, T, T, E, E, A]),
        (["<th", "in", "<think>"], [A, A, T]),
        (["<<<think>", "<<</think>", "x"], [T, E, A]),
        (["<think>", "<think>", "</think>", "</think>", "b"], [T, T, E, A, A]),
        (["</think>", "b"], [A, A]),
        (["<think></think>", "\n", "b"], [E, E, A]),
        (["<think>", "</think><think>", "b"], [T, T, T]),
        (["<think>", "</think>Yes", "\n", "b"], [T, E, E, A]),
        (["<think>", "</think>", "<th", "ink>", "c"], [T, E, A, T, T]),
        (["<think>", "</think>", "\n", "<think>", "\n", "</think>"], [T, E, E, T, T, E]),
        (["<think>", "é\ufffd𝄞", "</think>", "\u00a0", "𝄞"], [T, T, E, E, A]),
    ],
)
def test_phases_follow_the_markers_in_the_text(texts: list[str], phases: list[str]) -> None:
    assert read(texts) == phases


def by_hand(texts: list[str], start: str, end: str) -> list[str]:
    """The rules, on strings: what was read since the last complete marker is kept whole."""
    inside, ended, seen = False, False, ""
    phases = []
    for text in texts:
        last = None
        for character in text:
            seen += character
            if seen.endswith(end if inside else start):
                last = end if inside else start
                inside, seen = not inside, ""
                ended = False
                completed_end = not inside
        if last is not None:
            ended = completed_end
        elif text.strip():
            ended = False
        phases.append(E if ended else T if inside else A)
    return phases


alphabet = st.text("ab \n<𝄞", max_size=5)


@given(
    st.lists(alphabet, max_size=12),
    st.text("ab<\n", min_size=1, max_size=4),
    st.text("ab<", min_size=1, max_size=4),
)
@example(["aab", "aaab", " ", "ba"], "aab", "aba")
@example(["a", "\n", "\n", "\n"], "a", "\n")
@example(["\n", " a", "\n"], "\n", "a")
@settings(max_examples=500, deadline=None)
def test_the_table_is_what_reading_characters_comes_to(
    texts: list[str], start: str, end: str
) -> None:
    assert read(texts, start, end) == by_hand(texts, start, end)


def test_states_carry_on_from_where_a_prompt_ended() -> None:
    texts = ["<think>", "</think>", "\n", "x"]
    tracker = ThinkingTracker.build(texts, "<think>", "</think>")

    prompt = tracker.states([3, 0, 1, 2])
    answer = tracker.states([2, 3], int(prompt[-1]))

    assert tracker.ended[prompt].tolist() == [False, False, True, True]
    assert [PHASES[tracker.phase_of_state[state]] for state in answer] == [E, A]
    assert tracker.states([]).tolist() == []
    assert PHASES[tracker.phase_of_state[tracker.start_state]] == A


def test_the_tables_are_as_engines_want_them() -> None:
    texts = ["<think>", "x", "x", ""]
    tracker = ThinkingTracker.build(texts, "<think>", "</think>")

    states = len(tracker.phase_of_state)
    assert (tracker.transitions.shape, tracker.transitions.dtype) == ((states, 4), np.uint8)
    assert (tracker.phase_of_state.dtype, tracker.ended.dtype) == (np.uint8, np.bool_)
    assert tracker.transitions.max() < states
    assert tracker.transitions.flags.c_contiguous
    np.testing.assert_array_equal(tracker.transitions[:, 1], tracker.transitions[:, 2])


def test_longest_markers_fit_and_longer_ones_are_refused() -> None:
    longest = "x" * MAX_MARKER
    assert read(["x" * (MAX_MARKER - 1), "x", longest], longest, longest) == [A, T, E]

    for start, end in (("", "b"), ("a", ""), ("x" * (MAX_MARKER + 1), "b")):
        with pytest.raises(TrimtabError) as caught:
            ThinkingTracker.build(["x"], start, end)
        assert caught.value.code == "E_THINKING_MARKERS"


def test_an_empty_vocabulary_has_a_table() -> None:
    assert ThinkingTracker.build([], "<think>", "</think>").transitions.shape[1] == 0


def test_a_large_vocabulary_is_tabulated_quickly() -> None:
    random = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz <>/\n"))
    texts = ["".join(random.choice(letters, size=1 + i % 12)) for i in range(50_000)]

    began = time.process_time()
    ThinkingTracker.build(texts, "<think>", "</think>")

    assert time.process_time() - began < 5.0
