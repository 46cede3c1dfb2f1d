"""Examples: the prompts, and sometimes answers, that a method reads activations on.

An example is a conversation that ends with the user's turn, and perhaps the answer to it. They come
from files (JSON lines, or plain text with one prompt a line) or from a named data set
(``directions.datasets``).

Every example has an id that depends on its conversation alone. Choosing a part of a set goes by
these ids, not by chance or by order, so ``--limit 64`` means the same 64 prompts on every machine,
and most of them stay the same when rows are added to the file.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import rfc8785

from directions.card import Source
from directions.errors import TrimtabError

_JSON_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Example:
    """One conversation and perhaps its answer.

    Attributes:
        messages: (role, content) pairs, the last one the user's.
        answer: the assistant's answer; None where it is not given.
    """

    messages: tuple[tuple[str, str], ...]
    answer: str | None = None

    @property
    def id(self) -> str:
        """Hash of the conversation without the answer, in hex."""
        return hashlib.sha256(rfc8785.dumps([list(pair) for pair in self.messages])).hexdigest()


@dataclass(frozen=True)
class ExampleSet:
    """Examples with a name.

    Attributes:
        name: a file's name, or ``dataset:NAME``.
        examples: at least one.
        licence: SPDX name where it is known.
    """

    name: str
    examples: tuple[Example, ...]
    licence: str | None = None

    def limited(self, limit: int | None) -> ExampleSet:
        """At most ``limit`` of the examples: those of the smallest ids, in their old order."""
        if limit is None or limit >= len(self.examples):
            return self
        ranked = sorted(range(len(self.examples)), key=lambda i: (self.examples[i].id, i))
        kept = tuple(self.examples[i] for i in sorted(ranked[:limit]))
        return ExampleSet(self.name, kept, self.licence)

    def source(self, role: Literal["positive", "negative", "both"]) -> Source:
        """What a card says of this set. The hash is over every example used, answers included."""
        digest = hashlib.sha256()
        for example in self.examples:
            row = {"messages": [list(pair) for pair in example.messages], "answer": example.answer}
            digest.update(rfc8785.dumps(row) + b"\n")
        return Source(
            name=self.name,
            sha256=digest.hexdigest(),
            rows=len(self.examples),
            role=role,
            licence=self.licence,
        )


def read_examples(path: Path) -> ExampleSet:
    """Read a file of examples.

    ``.jsonl`` and ``.ndjson`` hold one JSON object a line: the conversation under ``prompt``,
    ``text`` (both a string) or ``messages`` (a list of ``{"role", "content"}``), and the answer, if
    any, under ``answer`` or ``completion``, or as a last message of the assistant. Other keys are
    left alone. Any other file is UTF-8 text with one prompt a line. Empty lines do not count.

    Raises:
        TrimtabError: E_EXAMPLES_FILE (unreadable, or a line that is no example; the line is
            named), E_EXAMPLES_EMPTY.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise TrimtabError(
            "E_EXAMPLES_FILE", f"{path}: {error.strerror or error}", field=str(path)
        ) from error
    except UnicodeDecodeError as error:
        raise TrimtabError(
            "E_EXAMPLES_FILE", f"{path} is not UTF-8 text: {error}", field=str(path)
        ) from error
    json_lines = path.suffix.lower() in _JSON_LINES
    examples = []
    # Not splitlines(): it also splits at characters that a prompt may well contain.
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), start=1):
        if not line.strip():
            continue
        if not json_lines:
            examples.append(Example((("user", line.strip()),)))
            continue
        try:
            examples.append(example_from(json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise TrimtabError(
                "E_EXAMPLES_FILE",
                f"line {number} is no example: {error}",
                field=f"{path}:{number}",
                expected='an object with "prompt", "text" or "messages"',
            ) from error
    if not examples:
        raise TrimtabError("E_EXAMPLES_EMPTY", f"{path} holds no examples", field=str(path))
    return ExampleSet(path.name, tuple(examples))


def example_from(row: Any) -> Example:
    """An example from one JSON object; see ``read_examples``.

    Raises:
        ValueError: it is not one.
    """
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    given = [key for key in ("prompt", "text", "messages") if key in row]
    if len(given) != 1:
        raise ValueError(f"one of prompt, text and messages is needed, and {given or 'none'} given")
    answers = [row[key] for key in ("answer", "completion") if row.get(key) is not None]
    if len(answers) > 1:
        raise ValueError("answer and completion are both given")
    if given != ["messages"]:
        messages = [("user", _text(row[given[0]], given[0]))]
    else:
        messages = _messages(row["messages"])
        if messages[-1][0] == "assistant":
            answers.append(messages.pop()[1])
            if len(answers) > 1:
                raise ValueError("the answer is given twice: as a message and as a key")
    if not messages or messages[-1][0] != "user":
        raise ValueError("the conversation must end with the user, or the user and an answer")
    return Example(tuple(messages), _text(answers[0], "answer") if answers else None)


def _messages(value: Any) -> list[tuple[str, str]]:
    if not isinstance(value, list) or not value:
        raise ValueError("messages must be a list with at least one message")
    found = []
    for message in value:
        if not isinstance(message, dict):
            raise ValueError("a message must be an object with role and content")
        role = message.get("role")
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"a message has role {role!r}, not system, user or assistant")
        found.append((role, _text(message.get("content"), "content")))
    return found


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key} must be a string that is not empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{key} holds half a surrogate pair") from error
    return value
