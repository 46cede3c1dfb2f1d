"""The texts between which a model thinks, told from its checkpoint.

Families of models mark their thinking in different ways, and no file says which. What can be read is
what the chat template and the vocabulary name: a model that thinks between ``<think>`` and
``</think>`` has them as tokens, or its template writes or cuts them. Markers are taken to be known
only if both are named; a wrong guess would steer the wrong tokens unnoticed, a missing one is an
error that the operator can put right.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from directions.checkpoint import read_json
from directions.errors import TrimtabError
from directions.fingerprint import chat_template
from steering.thinking import MAX_MARKER

PAIRS: Final = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
"""Start and end of thinking, as chat templates and vocabularies name them."""

CHANNEL: Final = "<|channel|>"
"""The token by which the harmony format names the channel of what follows."""

HARMONY: Final = ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>")
"""Harmony's markers: the headers of the channel that is thought on, and of the one that answers."""


def given_markers(start: str | None, end: str | None) -> tuple[str, str] | None:
    """The markers that an operator names; None where none are named.

    Raises:
        TrimtabError: ``E_THINKING_MARKERS``: one without the other, or one that is empty or too long.
    """
    if start is None and end is None:
        return None
    if start is None or end is None:
        given, missing = ("--think-end", "--think-start")
        if end is None:
            given, missing = missing, given
        raise TrimtabError(
            "E_THINKING_MARKERS",
            f"{given} is given without {missing}; thinking has a start and an end",
            field=missing,
        )
    for flag, marker in (("--think-start", start), ("--think-end", end)):
        if not 1 <= len(marker) <= MAX_MARKER:
            raise TrimtabError(
                "E_THINKING_MARKERS",
                f"a marker of {len(marker)} characters",
                field=flag,
                expected=f"1 to {MAX_MARKER} characters",
            )
    return start, end


def detect_markers(folder: Path, template: str | None = None) -> tuple[str, str] | None:
    """The markers of a checkpoint's model, where its files name a pair that is known.

    Args:
        folder: in Hugging Face's layout.
        template: the chat template that is used instead of the checkpoint's own.
    """
    vocabulary = token_names(folder)
    if CHANNEL in vocabulary:
        return HARMONY
    written = chat_template(folder) if template is None else template
    for pair in PAIRS:
        if written is not None and all(marker in written for marker in pair):
            return pair
    for pair in PAIRS:
        if vocabulary.issuperset(pair):
            return pair
    return None


def token_names(folder: Path) -> frozenset[str]:
    """The tokens of a checkpoint's vocabulary as its files spell them; added tokens as they are."""
    names: set[str] = set()
    document = _read(folder, "tokenizer.json")
    vocabulary = (document.get("model") or {}).get("vocab") or {}
    if isinstance(vocabulary, dict):
        names |= vocabulary.keys()
    else:  # a unigram model lists pairs of a token and its score
        names |= {str(entry[0]) for entry in vocabulary}
    added = list(document.get("added_tokens") or [])
    added += (_read(folder, "tokenizer_config.json").get("added_tokens_decoder") or {}).values()
    added += _read(folder, "tekken.json").get("special_tokens") or []
    for token in added:
        content = token.get("content") or token.get("token_str")
        if isinstance(content, str):
            names.add(content)
    return frozenset(names | _read(folder, "added_tokens.json").keys())


def _read(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    return read_json(path) if path.is_file() else {}
