"""How library code reports progress without knowing who is watching.

A long function takes ``progress: Progress = silent``, calls ``advance = progress("what", total)``
once a step and ``advance(n)`` as it goes. The command line passes one that draws bars; tests pass
one that collects; everyone else leaves it silent.
"""

from __future__ import annotations

from collections.abc import Callable

Advance = Callable[[int], None]
Progress = Callable[[str, int | None], Advance]


def silent(description: str, total: int | None) -> Advance:
    """Report to nobody."""
    return lambda amount: None
