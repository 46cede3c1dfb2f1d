"""Which generated tokens are thinking, told from the text that tokens decode to.

A model that thinks writes it between two markers, such as ``<think>`` and ``</think>``. A request's
tokens, the prompt's included, are read one by one as the text each decodes to:

* outside, text that completes a start marker leads inside; inside, text that completes an end
  marker leads out again. A marker may span several tokens, or share a token with other text.
* a token in which an end marker is completed is ``think_end``, whatever else it holds, and so are
  tokens of nothing but white space that directly follow it;
* a token in which a start marker is completed, and all up to the next end, is ``thinking``;
* everything else is ``answer``. Only the past is known: a token inside a marker that is not yet
  complete still belongs to what came before it.

Where one token completes several markers, the last decides. All this is a finite automaton, so it
is tabulated once for a vocabulary, and what remains for each token is one look-up.

The matching is that of Knuth, Morris & Pratt 1977 (*Fast pattern matching in strings*), begun anew
after each complete marker.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from directions.errors import TrimtabError
from steering.edits.scope import PHASES

MAX_MARKER: Final = 64
"""Longest marker, in characters; far more than any model's."""

_STARTED, _ENDED = 1, 2


@dataclass(frozen=True, eq=False)
class ThinkingTracker:
    """The automaton of one vocabulary and one pair of markers.

    Attributes:
        transitions: ``[S, V] uint8``: the state after a token, from the state before it.
        phase_of_state: ``[S] uint8``: the phase, as an index into ``PHASES``, of a generated token
            that led to the state.
        ended: ``[S] bool``: thinking has just ended: an end marker was completed, and nothing but
            white space followed in tokens of its own.
        start_state: the state before the first token of a request.
    """

    transitions: NDArray[np.uint8]
    phase_of_state: NDArray[np.uint8]
    ended: NDArray[np.bool_]
    start_state: int = 0

    @classmethod
    def build(cls, texts: Sequence[str], start: str, end: str) -> ThinkingTracker:
        """Tabulate the automaton.

        Args:
            texts: what each token of the vocabulary decodes to, by token id.
            start: the marker before thinking.
            end: the marker after it.

        Raises:
            TrimtabError: ``E_THINKING_MARKERS``: a marker is empty or too long.
        """
        for marker in (start, end):
            if not 1 <= len(marker) <= MAX_MARKER:
                raise TrimtabError(
                    "E_THINKING_MARKERS",
                    f"a marker of {len(marker)} characters",
                    expected=f"1 to {MAX_MARKER} characters",
                )
        ids = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        which = np.fromiter((ids[text] for text in texts), dtype=np.int64, count=len(texts))
        blank = np.array([not text.strip() for text in ids], dtype=bool)
        states, completed = _read(list(ids), start, end)
        # Outside comes twice: at its end, the states in which thinking has just ended.
        outside, every = len(start), len(start) + len(end)
        before = np.concatenate([np.arange(every), np.arange(outside)])
        states, completed = states[before], completed[before]
        just_ended = completed == _ENDED
        just_ended[every:] |= (completed[every:] == 0) & blank
        transitions = np.where(just_ended, states + np.uint8(every), states)
        phases = ["answer"] * outside + ["thinking"] * len(end) + ["think_end"] * outside
        return cls(
            np.ascontiguousarray(transitions[:, which]),
            np.array([PHASES.index(phase) for phase in phases], dtype=np.uint8),
            np.array([phase == "think_end" for phase in phases]),
        )

    @cached_property
    def _rows(self) -> list[bytes]:
        # Looking up one token at a time, bytes are several times faster than an array.
        return [row.tobytes() for row in self.transitions]

    def state_after(self, token_ids: Iterable[int], state: int | None = None) -> int:
        """The state after the last of these tokens; arguments as for :meth:`states`."""
        at = self.start_state if state is None else state
        rows = self._rows
        for token in token_ids:
            at = rows[at][token]
        return at

    def states(self, token_ids: Iterable[int], state: int | None = None) -> NDArray[np.uint8]:
        """The state after each token.

        Args:
            token_ids: the tokens.
            state: the one before the first of them; by default that of an empty request.
        """
        at = self.start_state if state is None else state
        found = []
        for token in token_ids:
            at = int(self.transitions[at, token])
            found.append(at)
        return np.array(found, dtype=np.uint8)


def _read(texts: list[str], start: str, end: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The effect of each text on each state of the two matchers, all texts at once.

    States are the number of characters of ``start`` that are matched (outside), or ``len(start)``
    plus that of ``end`` (inside).

    Returns:
        The state after the text, ``[states, texts] uint8``, and which marker it completed last, in
        the same shape: 0 for none, 1 for the start, 2 for the end.
    """
    alphabet = sorted(set(start + end))
    step, completes = _matchers(start, end, alphabet)
    # Longest first, so that the texts that have an i-th character are always the first few.
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    lengths = np.array([len(texts[i]) for i in order], dtype=np.int64)
    characters = np.frombuffer(
        "".join(texts[i] for i in order).encode("utf-32-le", "surrogatepass"), dtype=np.uint32
    )
    known = np.array([ord(character) for character in alphabet], dtype=np.uint32)
    found = np.minimum(np.searchsorted(known, characters), len(known) - 1)
    classes = np.where(known[found] == characters, found, len(known))
    first = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)

    states = np.repeat(np.arange(len(step), dtype=np.uint8)[:, None], len(texts), axis=1)
    completed = np.zeros_like(states)
    for i in range(int(lengths[0]) if len(texts) else 0):
        longer = int(np.searchsorted(-lengths, -i, side="left"))
        reads = classes[first[:longer] + i]
        now = states[:, :longer]
        done = completes[now, reads]
        completed[:, :longer] = np.where(done > 0, done, completed[:, :longer])
        states[:, :longer] = step[now, reads]
    back = np.argsort(order)
    return states[:, back], completed[:, back]


def _matchers(
    start: str, end: str, alphabet: list[str]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The automaton over characters: next state, and which marker is completed.

    The last column stands for every character that is in neither marker.
    """
    step = np.zeros((len(start) + len(end), len(alphabet) + 1), dtype=np.uint8)
    completes = np.zeros_like(step)
    for marker, base, other, code in (
        (start, 0, len(start), _STARTED),
        (end, len(start), 0, _ENDED),
    ):
        for matched in range(len(marker)):
            step[base + matched, -1] = base
            for column, character in enumerate(alphabet):
                text = marker[:matched] + character
                if text == marker:
                    step[base + matched, column] = other
                    completes[base + matched, column] = code
                    continue
                kept = next(k for k in range(len(text), -1, -1) if text.endswith(marker[:k]))
                step[base + matched, column] = base + kept
    return step, completes
