"""Text that somebody else wrote, made safe to show on a terminal.

A model can write any token and a server any name, escape sequences included, with which a terminal
can be made to clear itself, to lie about what it shows, or to type. What is shown of them goes
through here; what a program gets (``--json``) is left as it came, save what UTF-8 cannot write.
"""

from __future__ import annotations

import unicodedata
from typing import Any, Final

_REPLACEMENT: Final = "\ufffd"
# They reorder the text around them, so that what is read is not what was written.
_BIDI: Final = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str, *, keep: str = "") -> str:
    """The text with a visible sign in the place of every character that would act on a terminal.

    Args:
        text: any text.
        keep: control characters that may stay, such as a newline.
    """
    return "".join(
        character if character in keep or _is_harmless(character) else _sign(character)
        for character in text
    )


def well_formed(value: Any) -> Any:
    """A JSON value whose strings UTF-8 can write.

    JSON can name half a surrogate pair, which no text holds and no stream takes.
    """
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [well_formed(item) for item in value]
    if isinstance(value, dict):
        return {well_formed(key): well_formed(item) for key, item in value.items()}
    return value


def _is_harmless(character: str) -> bool:
    return character not in _BIDI and unicodedata.category(character) not in ("Cc", "Cs")


def _sign(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else _REPLACEMENT
