"""What is wrong with a policy, said all at once.

A person who writes a policy wants every mistake listed, each with the place to look at. So nothing
that reads, checks or compiles a policy stops at the first fault: faults are gathered as
:class:`PolicyError` entries and raised together in one :class:`PolicyErrors`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from directions.errors import TrimtabError

PathParts = tuple[str | int, ...]

_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*\Z")


def json_path(parts: Sequence[str | int]) -> str:
    """The JSON path of a value, e.g. ``$.edits.calm.add.layers`` or ``$["odd key"][0]``.

    Keys that are not plain words are quoted and escaped, so a path never holds a control character.
    """
    path = "$"
    for part in parts:
        if isinstance(part, int):
            path += f"[{part}]"
        elif _PLAIN_KEY.match(part):
            path += f".{part}"
        else:
            path += f"[{json.dumps(part if len(part) <= 64 else part[:61] + '...')}]"
    return path


def shown(value: object) -> str:
    """A value as an error message quotes it: escaped, one line, at most 60 characters."""
    try:
        text = ascii(value) if not isinstance(value, dict) else "a mapping"
    except ValueError:  # Python does not write out integers of thousands of digits
        text = f"a {type(value).__name__} that is too long to show"
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True)
class PolicyError:
    """One fault of one policy.

    Attributes:
        code: stable identifier, ``E_…``.
        message: one sentence: what was found, what was expected, what to do.
        path: where in the document, as keys and indexes; ``()`` is the whole document.
        expected: what would have been accepted, when that is short.
        policy: the policy's name, once it is known.
        file: the file it was read from.
        line: line in that file, from 1.
    """

    code: str
    message: str
    path: PathParts = ()
    expected: str | None = None
    policy: str | None = None
    file: str | None = None
    line: int | None = None

    @property
    def field(self) -> str:
        """The JSON path of the fault."""
        return json_path(self.path)

    def __str__(self) -> str:
        where = self.file or (f"policy {self.policy}" if self.policy else "")
        if self.file and self.line is not None:
            where += f":{self.line}"
        return f"{where}{': ' if where else ''}{self.code} at {self.field}: {self.message}"

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: that of :class:`TrimtabError` and, beside it, policy, file and line."""
        return {
            "code": self.code,
            "message": self.message,
            "field": self.field,
            "expected": self.expected,
            "policy": self.policy,
            "file": self.file,
            "line": self.line,
        }


class PolicyErrors(TrimtabError):  # noqa: N818 - many errors in one
    """Everything that is wrong with one policy or with a set of them.

    With a single fault it carries that fault's code, message and field; with several, the code is
    ``E_POLICY_INVALID`` and the message lists them, one a line.

    Attributes:
        errors: the faults in the order in which they were found; never empty.
    """

    errors: tuple[PolicyError, ...]

    def __init__(self, errors: Iterable[PolicyError]) -> None:
        self.errors = tuple(errors)
        if not self.errors:
            raise ValueError("PolicyErrors needs at least one error")
        if len(self.errors) == 1:
            only = self.errors[0]
            super().__init__(only.code, only.message, field=only.field, expected=only.expected)
        else:
            lines = "\n".join(f"  {error}" for error in self.errors)
            super().__init__("E_POLICY_INVALID", f"{len(self.errors)} errors:\n{lines}")

    def __str__(self) -> str:
        return str(self.errors[0]) if len(self.errors) == 1 else f"{self.code}: {self.message}"

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.errors,))

    def to_dict(self) -> dict[str, Any]:
        """As every error's, plus ``errors``: the list of faults."""
        return {**super().to_dict(), "errors": [error.to_dict() for error in self.errors]}

    def located(self, *, policy: str | None = None, file: str | None = None) -> PolicyErrors:
        """The same faults with the policy and the file filled in where they were missing."""
        return PolicyErrors(
            replace(error, policy=error.policy or policy, file=error.file or file)
            for error in self.errors
        )
