"""The two files of a stored artefact, read back only if they are exactly what was stored.

Nothing is trusted because of where it lies: the card must have the hash it is stored under, the tensors
the hash that the card states, and both must keep the rules of the card's kind. Tensors are
safetensors read into numpy; no pickle is ever opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import rfc8785
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors

from directions.card import API_VERSION, CARDS, AnyCard
from directions.errors import TrimtabError
from directions.tensors import Tensors, check_stored, layout

CARD_FILE = "card.json"
TENSORS_FILE = "tensors.safetensors"

# A card is a few kilobytes; a file far beyond that is not one, and is not read into memory.
_MAX_CARD_BYTES = 4 << 20
# What the safetensors header may take beside the tensors themselves.
_MAX_HEADER_BYTES = 64 << 10


def read_artefact(folder: Path, sha256: str) -> tuple[AnyCard, Tensors]:
    """Read and verify the artefact in a folder: both hashes, the card, shapes and numbers.

    Args:
        folder: ``artefacts/<sha256>``.
        sha256: the identity it must have.

    Raises:
        TrimtabError: E_ARTEFACT_UNKNOWN (no such folder), E_ARTEFACT_TRUNCATED (a file is missing or
            short), E_ARTEFACT_TAMPERED (a hash differs), E_ARTEFACT_FOREIGN (not an artefact of
            ours), E_ARTEFACT_SITE, E_ARTEFACT_OUTPUTS, E_ARTEFACT_HEADS, E_ARTEFACT_SHAPE,
            E_ARTEFACT_NONFINITE, E_ARTEFACT_WEIGHTS (it breaks a rule of its kind).
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise broken("E_ARTEFACT_FOREIGN", folder, "is not a plain folder")
    if not folder.exists():
        raise broken("E_ARTEFACT_UNKNOWN", folder, "is not there, though the index names it")
    card = _read_card(folder / CARD_FILE, sha256)
    return card, _read_tensors(folder / TENSORS_FILE, card)


def read_own(path: Path, limit: int) -> bytes:
    """Read a plain file of the store, up to a limit in bytes.

    The store makes neither links nor pipes: a link could point out of the store, and opening a pipe
    would wait for ever.

    Raises:
        TrimtabError: E_ARTEFACT_TRUNCATED (missing), E_ARTEFACT_FOREIGN (too long, or no plain file).
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise broken("E_ARTEFACT_TRUNCATED", path, "is missing") from None
    except OSError as error:
        if path.is_symlink():
            raise broken("E_ARTEFACT_FOREIGN", path, "is a symbolic link") from error
        raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise broken("E_ARTEFACT_FOREIGN", path, "is not a plain file")
    with os.fdopen(descriptor, "rb") as file:
        if status.st_size > limit:
            raise broken(
                "E_ARTEFACT_FOREIGN", path, f"has {status.st_size} bytes, more than {limit}"
            )
        return file.read(limit + 1)


def _read_card(path: Path, sha256: str) -> AnyCard:
    content = read_own(path, _MAX_CARD_BYTES)
    whole = True
    document: Any = None
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        whole = False
    if hashlib.sha256(content).hexdigest() != sha256:
        if not whole:
            raise broken("E_ARTEFACT_TRUNCATED", path, "is not whole JSON")
        raise broken("E_ARTEFACT_TAMPERED", path, "does not have the hash it is stored under")
    if not isinstance(document, dict) or document.get("apiVersion") != API_VERSION:
        raise broken("E_ARTEFACT_FOREIGN", path, f"is not a card of {API_VERSION}")
    kind = document.get("kind")
    if not isinstance(kind, str) or kind not in CARDS:
        raise broken(
            "E_ARTEFACT_FOREIGN", path, f"is a card of kind {shown(kind)}, not {', '.join(CARDS)}"
        )
    try:
        card = CARDS[kind].model_validate(document)
        canonical = rfc8785.dumps(document)
    except TrimtabError as error:
        raise broken(error.code, path, f"is not the card of a {kind}: {error.message}") from error
    except (ValidationError, rfc8785.CanonicalizationError) as error:
        raise broken("E_ARTEFACT_FOREIGN", path, f"is not the card of a {kind}: {error}") from error
    if canonical != content:
        raise broken("E_ARTEFACT_FOREIGN", path, "is not in canonical form (RFC 8785)")
    return card


def _read_tensors(path: Path, card: AnyCard) -> Tensors:
    shapes = layout(card)
    # No tensor has an element of more than four bytes.
    room = sum(4 * int(np.prod(shape, dtype=np.int64)) for shape in shapes.values())
    content = read_own(path, room + _MAX_HEADER_BYTES)
    tampered = hashlib.sha256(content).hexdigest() != card.tensors_sha256
    if tampered and _is_short(content):
        raise broken("E_ARTEFACT_TRUNCATED", path, "ends before its tensors do")
    if tampered:
        raise broken("E_ARTEFACT_TAMPERED", path, "does not have the hash that its card states")
    try:
        tensors = load_safetensors(content)
    except (SafetensorError, ValueError) as error:
        raise broken("E_ARTEFACT_FOREIGN", path, f"is not a safetensors file: {error}") from error
    if set(tensors) != set(shapes):
        names, expected = ", ".join(sorted(tensors)), " and ".join(shapes)
        raise broken("E_ARTEFACT_FOREIGN", path, f"holds {names}, not {expected}")
    try:
        return check_stored(card, tensors)
    except TrimtabError as error:
        raise broken(error.code, path, f"breaks a rule: {error.message}") from error


def _is_short(content: bytes) -> bool:
    """Whether a safetensors file ends before its header says."""
    if len(content) < 8:
        return True
    header_size = int.from_bytes(content[:8], "little")
    if header_size > _MAX_HEADER_BYTES:
        return False
    if len(content) < 8 + header_size:
        return True
    try:
        header = json.loads(content[8 : 8 + header_size])
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name[:2] != "__"]
        return len(content) < 8 + header_size + max(ends, default=0)
    except (ValueError, LookupError, TypeError, AttributeError):
        return False


def broken(code: str, path: Path, what: str) -> TrimtabError:
    """The refusal of a file of the store."""
    return TrimtabError(code, f"{path} {what}", field=str(path))


def shown(value: object) -> str:
    """A stranger's value in a message: as Python writes it, and not for pages."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…'"
