"""The scores of one engine request, in the API process: by position, by phase, and what they come to.

Scores arrive with the tokens that they led to. They are kept by the absolute position of the token that was
read, so what comes twice counts once and what never comes is known to be missing. The token at position
``p`` led to the one at ``p + 1``: an answer of ``N`` tokens to a prompt of ``P`` has scores for ``P - 1`` to
``P + N - 2``, and none for its last token, which the model never reads.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

import numpy as np

from steering.edits.scope import PHASES, Phase
from steering.readings import Reading
from steering.thinking import ThinkingTracker

_PROMPT, _PROMPT_END, _THINKING, _THINK_END, _ANSWER = (
    PHASES.index(phase) for phase in ("prompt", "prompt_end", "thinking", "think_end", "answer")
)
_MISSING: Final = math.nan

Scores = np.ndarray[Any, np.dtype[np.float64]]
Phases = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Summary:
    """What one reading's scores over one answer come to; ``None`` where a phase did not occur.

    Attributes:
        prompt_end: the score at the last prompt token.
        plateau: the mean of the top tenth, at least one, of the scores over thinking tokens, up to the
            first end of thinking (the refusal plateau; Yin et al. 2025, arXiv 2510.06036, leave its
            definition open, this is ours).
        final: the score at the last token of the first end of thinking; of the prompt's last token
            where the prompt itself ends thinking.
        answer_start: the score at the first answer token.
        answer_mean: the mean over answer tokens.
        tokens: generated tokens that were read.
        missing: tokens that should have been read and whose score never came.
    """

    prompt_end: float | None
    plateau: float | None
    final: float | None
    answer_start: float | None
    answer_mean: float | None
    tokens: int
    missing: int = 0

    @property
    def cliff(self) -> float | None:
        """``plateau - final``."""
        if self.plateau is None or self.final is None:
            return None
        return self.plateau - self.final


class ScoreLog:
    """One engine request's scores.

    Args:
        readings: what is read of it.
        prompt: the prompt's tokens; empty where they are not known.
        prompt_length: how many there are.
        tracker: tells thinking from answering; ``None`` where the markers are not known, and then every
            generated token is of the answer.
        whole_prompt: whether every prompt token is read.

    Attributes:
        readings: as given.
        engine: the number of the data parallel engine that ran it, once known.
    """

    def __init__(
        self,
        readings: Sequence[Reading],
        prompt: Sequence[int],
        prompt_length: int,
        tracker: ThinkingTracker | None,
        whole_prompt: bool = False,
    ) -> None:
        self.readings = tuple(readings)
        self._numbers = {reading.id: n for n, reading in enumerate(self.readings)}
        self.prompt_length = prompt_length
        self.engine = 0
        self._first = 0 if whole_prompt else prompt_length - 1
        self._scores = [array("f") for _ in self.readings]
        self._generated = 0
        self._tracker = tracker
        self._state = 0 if tracker is None else tracker.state_after(prompt)
        self._prompt_ended = tracker is not None and bool(tracker.ended[self._state])
        self._phases = bytearray()
        self._delivered = 0
        self._told = self._first

    def number(self, reading_id: str) -> int:
        """The index in ``readings`` of the reading with an id."""
        return self._numbers[reading_id]

    def add_tokens(self, token_ids: Sequence[int]) -> None:
        """Note tokens that were generated."""
        self._generated += len(token_ids)
        if self._tracker is None:
            self._phases.extend([_ANSWER] * len(token_ids))
            return
        for token in token_ids:
            self._state = self._tracker.state_after((token,), self._state)
            self._phases.append(int(self._tracker.phase_of_state[self._state]))

    def add_scores(
        self, position: int, numbers: Sequence[int], scores: bytes
    ) -> list[array[float]]:
        """Note scores of consecutive tokens.

        Args:
            position: of the first.
            numbers: which reading each row is of, as an index into ``readings``.
            scores: ``[len(numbers), n] float32``.

        Returns:
            For each row, the scores of generated tokens that had not come before.
        """
        count = len(scores) // (4 * len(numbers))
        rows = array("f", scores)
        add = self._add_one if count == 1 else self._add_several
        return [
            add(self._scores[number], position - self._first, rows[n * count : (n + 1) * count])
            for n, number in enumerate(numbers)
        ]

    def _add_one(self, kept: array[float], at: int, row: array[float]) -> array[float]:
        """The usual case, one new token, without numpy, which would take most of the time."""
        (score,) = row
        # A score that is no number was not written by the pass: it did not come.
        if at < 0 or math.isnan(score):
            return array("f")
        if at == len(kept):
            kept.append(score)
            new = True
        else:
            kept.extend([_MISSING] * (at + 1 - len(kept)))
            new = math.isnan(kept[at])
            kept[at] = score
        return row if new and at + self._first >= self.prompt_length else array("f")

    def _add_several(self, kept: array[float], at: int, row: array[float]) -> array[float]:
        skipped = max(-at, 0)
        at, row = at + skipped, row[skipped:]
        kept.extend([_MISSING] * (at + len(row) - len(kept)))
        scores = np.frombuffer(row, dtype=np.float32)
        place = np.frombuffer(kept, dtype=np.float32)[at : at + len(row)]
        came = ~np.isnan(scores)
        generated = np.arange(at, at + len(row)) + self._first >= self.prompt_length
        new = scores[came & np.isnan(place) & generated]
        place[came] = scores[came]
        return array("f", new.tobytes())

    # What it comes to.

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return self._generated

    @property
    def phase(self) -> Phase:
        """The phase of the latest token."""
        return PHASES[self._phases[-1]] if self._phases else "prompt_end"

    def recent(self, number: int, most: int) -> list[float]:
        """The latest scores of generated tokens, oldest first."""
        scores = self._scores[number]
        begin = max(self.prompt_length - self._first, len(scores) - most, 0)
        return [score for score in scores[begin:] if not math.isnan(score)]

    def summary(self, number: int) -> Summary:
        """What a reading's scores come to so far.

        Args:
            number: the reading's index in ``readings``.
        """
        scores = np.array(self._scores[number], dtype=np.float64)
        before = self.prompt_length - self._first
        prompt_end = scores[before - 1] if len(scores) >= before else _MISSING
        # The last token that was generated is never read.
        expected = max(self._generated - 1, 0)
        read = np.full(expected, _MISSING)
        came = scores[before : before + expected]
        read[: len(came)] = came
        phases = np.frombuffer(bytes(self._phases[:expected]), dtype=np.uint8)
        begin, end = self._end_of_thinking(phases)
        final = None
        if begin is not None:
            final = read[end - 1] if end else prompt_end
        thinking = _known(read[:begin][phases[:begin] == _THINKING])
        answer = read[phases == _ANSWER]
        known = _known(answer)
        top = math.ceil(len(thinking) / 10)
        return Summary(
            prompt_end=_number(prompt_end),
            plateau=float(np.sort(thinking)[-top:].mean()) if top else None,
            final=_number(final),
            answer_start=_number(answer[0]) if len(answer) else None,
            answer_mean=float(known.mean()) if len(known) else None,
            tokens=len(_known(read)),
            missing=int(np.isnan(read).sum()) + (before - self._known_of_prompt(scores, before)),
        )

    def _known_of_prompt(self, scores: Scores, before: int) -> int:
        """How many of the prompt's scores came; all, as long as none could have."""
        return len(_known(scores[:before])) if self._generated else before

    def _end_of_thinking(self, phases: Phases) -> tuple[int | None, int]:
        """Where the first unbroken run of think-end tokens begins and ends; ``None``: there is none.

        Where the prompt itself ends thinking, the run begins with the prompt's last token.
        """
        begin = 0
        if not self._prompt_ended:
            ends = np.flatnonzero(phases == _THINK_END)
            if len(ends) == 0:
                return None, 0
            begin = int(ends[0])
        end = begin
        while end < len(phases) and phases[end] == _THINK_END:
            end += 1
        return begin, end

    # Per-token scores.

    def deliver(self, count: int) -> None:
        """Note that so many more generated tokens are on their way to the client."""
        self._delivered += count

    def trace(
        self, number: int, *, delivered: bool = False, untold: bool = False
    ) -> list[tuple[int, float]]:
        """Pairs of position and score, up to the last that led to a token.

        Args:
            number: the reading's index in ``readings``.
            delivered: only those that led to tokens which :meth:`deliver` noted.
            untold: only those which :meth:`tell` has not marked as told.
        """
        led_to = self._delivered if delivered else self._generated
        if led_to == 0:
            return []
        first = self._told if untold else self._first
        end = self.prompt_length + led_to - 1
        scores = self._scores[number][first - self._first : end - self._first].tolist()
        return [(first + n, score) for n, score in enumerate(scores) if not math.isnan(score)]

    def tell(self) -> None:
        """Mark the pairs of what was delivered as told."""
        if self._delivered:
            self._told = self.prompt_length + self._delivered - 1

    def runs(self) -> list[tuple[Phase, int, int]]:
        """The phases of what was read: phase, first position, last position."""
        phases = [_PROMPT] * (self.prompt_length - 1 - self._first) + [_PROMPT_END]
        phases += self._phases[: max(self._generated - 1, 0)]
        found = []
        at = self._first
        for phase, group in groupby(phases):
            length = sum(1 for _ in group)
            found.append((PHASES[phase], at, at + length - 1))
            at += length
        return found


def _known(scores: Scores) -> Scores:
    known: Scores = scores[~np.isnan(scores)]
    return known


def _number(score: float | None) -> float | None:
    return None if score is None or math.isnan(score) else float(score)
