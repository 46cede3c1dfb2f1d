"""Which tokens of an example a method averages over."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from directions.errors import TrimtabError

DEFAULT_ANSWER_TOKENS = 64


@dataclass(frozen=True)
class Position:
    """A choice of tokens.

    * ``last-prompt-token``: the last token of the rendered prompt, chat template and all. It is the
      one that predicts the first token of the answer.
    * ``prompt-mean``: every token of the rendered prompt but the first, which carries the same large
      activation whatever the text (an attention sink) and says nothing of it.
    * ``answer-mean:N``: the first N tokens of the answer (64 where N is not given).

    Attributes:
        kind: one of the three, without the number.
        tokens: N; None for the other two.
    """

    kind: Literal["last-prompt-token", "prompt-mean", "answer-mean"]
    tokens: int | None = None

    def __str__(self) -> str:
        return self.kind if self.tokens is None else f"{self.kind}:{self.tokens}"

    @property
    def answer_tokens(self) -> int:
        """How many tokens of an answer are needed; 0 where none are."""
        return self.tokens or 0

    def span(self, num_prompt_tokens: int, num_tokens: int) -> range:
        """The token positions of one sequence that are averaged; empty where there are none.

        Args:
            num_prompt_tokens: tokens of the rendered prompt, at least 1.
            num_tokens: tokens of prompt and answer.
        """
        if self.kind == "last-prompt-token":
            return range(num_prompt_tokens - 1, num_prompt_tokens)
        if self.kind == "prompt-mean":
            return range(min(1, num_prompt_tokens - 1), num_prompt_tokens)
        return range(num_prompt_tokens, min(num_tokens, num_prompt_tokens + self.answer_tokens))

    @classmethod
    def parse(cls, text: str) -> Position:
        """Read the form that the command line and cards use.

        Raises:
            TrimtabError: E_POSITION.
        """
        if text == "last-prompt-token":
            return cls("last-prompt-token")
        if text == "prompt-mean":
            return cls("prompt-mean")
        match = re.fullmatch(r"answer-mean(?::([1-9][0-9]{0,4}))?", text)
        if match:
            return cls("answer-mean", int(match.group(1) or DEFAULT_ANSWER_TOKENS))
        raise TrimtabError(
            "E_POSITION",
            f"{text!r} is not a position",
            expected="last-prompt-token, prompt-mean or answer-mean:N",
        )
