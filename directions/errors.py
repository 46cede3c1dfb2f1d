"""The one error type that every Trimtab package raises for what a person can put right.

An error carries a stable code (``E_…``), the field it is about (a JSON path, an option or a file),
the value found and what was expected, so that a program can branch on the code and a person can act
on the sentence.
"""

from __future__ import annotations

from typing import Any


class TrimtabError(Exception):
    """A refusal with a stable code.

    Args:
        code: stable identifier, ``E_`` and upper case; never reused for another meaning.
        message: one sentence: what was found, what was expected, what to do.
        field: JSON path (``$.edits.calm.add.layers``), option (``--positive``) or file path.
        expected: what would have been accepted, when that is short.
    """

    def __init__(
        self, code: str, message: str, *, field: str | None = None, expected: str | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.field = field
        self.expected = expected

    def __str__(self) -> str:
        where = f" at {self.field}" if self.field else ""
        return f"{self.code}{where}: {self.message}"

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.code, self.message, self.field, self.expected))

    def to_dict(self) -> dict[str, Any]:
        """The JSON form that the command line's ``--json`` and the HTTP errors share."""
        return {
            "code": self.code,
            "message": self.message,
            "field": self.field,
            "expected": self.expected,
        }


def _rebuild(
    cls: type[TrimtabError], code: str, message: str, field: str | None, expected: str | None
) -> TrimtabError:
    return cls(code, message, field=field, expected=expected)
