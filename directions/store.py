"""The store: immutable artefacts, found by name and version or by content hash.

On disk, under ``TRIMTAB_HOME``::

    artefacts/<sha256>/card.json             canonical JSON; its sha256 is the artefact's identity
    artefacts/<sha256>/tensors.safetensors   its sha256 is in the card
    names/<name>/<version>.json              which artefact a name and version mean

The hash in the reference covers the card, and the card covers the tensors by theirs, so whoever
holds ``sha256:…`` can tell whether they got exactly what was meant. Nothing is trusted because of
where it lies: every load reads, hashes and checks everything. Tensors are safetensors read into
numpy; no pickle is ever opened.

Versions count from 1 and are never reused. Each index entry is created exclusively, so two writers
of one name get two versions, and neither is lost. Artefacts are written whole and renamed into
place; a crash between the steps leaves at most an artefact that no name points at.
"""

from __future__ import annotations

import builtins
import hashlib
import json
import os
import re
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rfc8785
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from directions.atomic import create_file, staged_folder, sweep, temporary_beside
from directions.card import API_VERSION, Card, CardDraft
from directions.errors import TrimtabError

NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_VERSION_PATTERN = re.compile(r"[1-9][0-9]{0,8}")
_SHA256_PATTERN = re.compile(r"[0-9a-f]{64}")

CARD_FILE = "card.json"
TENSORS_FILE = "tensors.safetensors"

# A card is a few kilobytes; a file far beyond that is not one, and is not read into memory.
_MAX_CARD_BYTES = 4 << 20
_MAX_INDEX_BYTES = 4096
# What the safetensors header may take beside the tensors themselves.
_MAX_HEADER_BYTES = 64 << 10
# A temporary entry this old belongs to a writer that is no more.
_STALE_SECONDS = 3600.0

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]


def home() -> Path:
    """The folder of everything Trimtab keeps: ``$TRIMTAB_HOME`` or ``~/.local/share/trimtab``."""
    configured = os.environ.get("TRIMTAB_HOME")
    return Path(configured).expanduser() if configured else Path.home() / ".local/share/trimtab"


@dataclass(frozen=True)
class ArtefactRef:
    """One artefact, exactly.

    Attributes:
        name: the name it was found under; None when asked for by hash.
        version: the version under that name; None when asked for by hash.
        sha256: the identity, in hex.
    """

    name: str | None
    version: int | None
    sha256: str

    @property
    def reference(self) -> str:
        """The shortest exact way to name it: ``name@3`` or ``sha256:…``."""
        if self.name is None:
            return f"sha256:{self.sha256}"
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, eq=False)
class Direction:
    """A loaded, verified direction.

    Attributes:
        name: the name it was loaded by; None when loaded by hash.
        version: the version under that name; None when loaded by hash.
        sha256: the artefact's identity.
        card: what it says about itself.
        vectors: ``[num_layers, hidden_size] float32``, read-only; zero where no layer is present.
        present: ``[num_layers] bool``, read-only: the layers that have a vector.
    """

    name: str | None
    version: int | None
    sha256: str
    card: Card
    vectors: FloatArray
    present: BoolArray

    @property
    def reference(self) -> str:
        """``name@3``, or ``sha256:…`` when loaded by hash."""
        return ArtefactRef(self.name, self.version, self.sha256).reference


class Store:
    """Artefacts under one folder.

    Args:
        root: the folder; ``home()`` when None. It is made when something is first put.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = home() if root is None else Path(root)
        self.artefacts = self.root / "artefacts"
        self.index = self.root / "names"

    def put(
        self,
        card: CardDraft,
        vectors: npt.ArrayLike,
        present: npt.ArrayLike,
        *,
        name: str,
    ) -> ArtefactRef:
        """Store a direction under a name and return the version it got.

        Putting what the name's latest version already says (apart from ``created``) returns that
        version, so a repeated recipe makes no new one.

        Args:
            card: the draft; ``layers`` and ``tensors_sha256`` are filled in here.
            vectors: ``[num_layers, hidden_size]``, converted to float32; rows of absent layers are
                stored as zero.
            present: ``[num_layers]``, truthy where a layer has a vector.
            name: ``[a-z0-9][a-z0-9._-]{0,63}``.

        Raises:
            TrimtabError: E_ARTEFACT_NAME, E_ARTEFACT_SHAPE, E_ARTEFACT_NONFINITE.
        """
        check_name(name)
        rows, mask = _checked_tensors(card, vectors, present)
        tensors = save_safetensors({"present": mask.astype(np.uint8), "vectors": rows})
        fields = {
            **card.model_dump(exclude={"layers", "tensors_sha256"}),
            "layers": tuple(int(layer) for layer in np.flatnonzero(mask)),
            "tensors_sha256": hashlib.sha256(tensors).hexdigest(),
        }
        sealed = Card.model_validate(fields)
        while True:
            latest = self._latest_version(name)
            if latest:
                stored = self._stored_equal(name, latest, sealed)
                if stored is not None:
                    return stored
            sha256 = sealed.identity()
            self._place(sha256, sealed.canonical(), tensors)
            entry: dict[str, Any] = {
                "apiVersion": API_VERSION,
                "kind": "name",
                "name": name,
                "version": latest + 1,
                "sha256": sha256,
            }
            try:
                create_file(self._entry(name, latest + 1), rfc8785.dumps(entry))
            except FileExistsError:
                continue  # another writer took this version; look at what it wrote and go on
            return ArtefactRef(name, latest + 1, sha256)

    def resolve(self, reference: str) -> ArtefactRef:
        """Find what a reference means, without opening the artefact.

        Args:
            reference: ``name`` (its latest version), ``name@3`` or ``sha256:<64 hex digits>``.

        Raises:
            TrimtabError: E_ARTEFACT_NAME (not a reference), E_ARTEFACT_UNKNOWN (no such name or
                hash), E_ARTEFACT_VERSION (no such version of that name), or a broken index entry
                (E_ARTEFACT_TRUNCATED, E_ARTEFACT_TAMPERED, E_ARTEFACT_FOREIGN).
        """
        if reference.startswith("sha256:"):
            sha256 = reference.removeprefix("sha256:")
            if not _SHA256_PATTERN.fullmatch(sha256):
                raise TrimtabError(
                    "E_ARTEFACT_NAME",
                    f"{_shown(reference)} is not a content hash",
                    expected="sha256: and 64 lower-case hexadecimal digits",
                )
            if not os.path.lexists(self.artefacts / sha256):
                raise TrimtabError(
                    "E_ARTEFACT_UNKNOWN", f"no artefact {reference} in {self.artefacts}"
                )
            return ArtefactRef(None, None, sha256)
        name, at, version_text = reference.partition("@")
        check_name(name)
        versions = self._versions(name)
        if not versions:
            known = ", ".join(self.names()[:20]) or "none"
            raise TrimtabError(
                "E_ARTEFACT_UNKNOWN",
                f"no artefact is named {name!r} in {self.root}",
                expected=f"one of the names there: {known}",
            )
        if not at:
            return self._read_entry(name, versions[-1])
        if not _VERSION_PATTERN.fullmatch(version_text) or int(version_text) not in versions:
            raise TrimtabError(
                "E_ARTEFACT_VERSION",
                f"{name!r} has no version {_shown(version_text)}",
                expected=f"a version from 1 to {versions[-1]}",
            )
        return self._read_entry(name, int(version_text))

    def load(self, reference: str) -> Direction:
        """Read a direction and verify all of it: both hashes, the card, shapes and numbers.

        Raises:
            TrimtabError: those of ``resolve``, and E_ARTEFACT_TRUNCATED (a file is missing or
                short), E_ARTEFACT_TAMPERED (a hash differs), E_ARTEFACT_FOREIGN (not a direction of
                ours), E_ARTEFACT_SHAPE, E_ARTEFACT_NONFINITE.
        """
        ref = self.resolve(reference)
        card, vectors, present = self._read(ref.sha256)
        vectors.setflags(write=False)
        present.setflags(write=False)
        return Direction(ref.name, ref.version, ref.sha256, card, vectors, present)

    def names(self) -> builtins.list[str]:
        """All names that have a version, in order."""
        if not self.index.is_dir():
            return []
        return sorted(
            entry.name
            for entry in self.index.iterdir()
            if NAME_PATTERN.fullmatch(entry.name) and self._versions(entry.name)
        )

    def versions(self, name: str) -> builtins.list[int]:
        """The versions of a name, ascending; empty where there is no such name.

        Raises:
            TrimtabError: E_ARTEFACT_NAME.
        """
        check_name(name)
        return self._versions(name)

    def identities(self) -> builtins.list[str]:
        """The hashes under which something is stored, whether or not a name points at it."""
        if not self.artefacts.is_dir():
            return []
        return sorted(
            entry.name
            for entry in self.artefacts.iterdir()
            if _SHA256_PATTERN.fullmatch(entry.name)
        )

    def list(self) -> builtins.list[ArtefactRef]:
        """All versions of all names, in order of name and version.

        Raises:
            TrimtabError: where an index entry is broken, as for ``resolve``.
        """
        return [
            self._read_entry(name, version)
            for name in self.names()
            for version in self._versions(name)
        ]

    # -- the name index ------------------------------------------------------------------------

    def _entry(self, name: str, version: int) -> Path:
        return self.index / name / f"{version}.json"

    def _versions(self, name: str) -> builtins.list[int]:
        folder = self.index / name
        if not folder.is_dir():
            return []
        found = (path.name.removesuffix(".json") for path in folder.glob("*.json"))
        return sorted(int(text) for text in found if _VERSION_PATTERN.fullmatch(text))

    def _latest_version(self, name: str) -> int:
        return max(self._versions(name), default=0)

    def _read_entry(self, name: str, version: int) -> ArtefactRef:
        path = self._entry(name, version)
        content = _read_own(path, _MAX_INDEX_BYTES)
        try:
            entry = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise _broken("E_ARTEFACT_TRUNCATED", path, "is not whole JSON") from error
        if not isinstance(entry, dict) or entry.get("kind") != "name":
            raise _broken("E_ARTEFACT_FOREIGN", path, "is not an entry of the name index")
        sha256 = entry.get("sha256")
        agrees = entry.get("name") == name and entry.get("version") == version
        if not agrees or not isinstance(sha256, str) or not _SHA256_PATTERN.fullmatch(sha256):
            raise _broken("E_ARTEFACT_TAMPERED", path, f"does not describe {name}@{version}")
        return ArtefactRef(name, version, sha256)

    def _stored_equal(self, name: str, version: int, sealed: Card) -> ArtefactRef | None:
        """The named version where it is intact and says the same as a card about to be stored."""
        try:
            ref = self._read_entry(name, version)
            card, _, _ = self._read(ref.sha256)
        except TrimtabError:
            return None  # a broken version is never "the same"; the new one gets its own number
        return ref if sealed.says_the_same_as(card) else None

    # -- artefacts -----------------------------------------------------------------------------

    def _place(self, sha256: str, card: bytes, tensors: bytes) -> None:
        """Bring one artefact's folder into place, healing a broken one of the same hash."""
        target = self.artefacts / sha256
        sweep(self.artefacts, older_than=_STALE_SECONDS)
        while True:
            try:
                with staged_folder(target) as staging:
                    (staging / CARD_FILE).write_bytes(card)
                    (staging / TENSORS_FILE).write_bytes(tensors)
                return
            except FileExistsError:
                try:
                    self._read(sha256)
                    return
                except TrimtabError:
                    # The hash says what belongs here, and this is not it.
                    aside = temporary_beside(target)
                    target.rename(aside)
                    if aside.is_dir() and not aside.is_symlink():
                        shutil.rmtree(aside, ignore_errors=True)
                    else:
                        aside.unlink(missing_ok=True)

    def _read(self, sha256: str) -> tuple[Card, FloatArray, BoolArray]:
        folder = self.artefacts / sha256
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise _broken("E_ARTEFACT_FOREIGN", folder, "is not a plain folder")
        if not folder.exists():
            raise _broken("E_ARTEFACT_UNKNOWN", folder, "is not there, though the index names it")
        card = self._read_card(folder / CARD_FILE, sha256)
        vectors, present = _read_tensors(folder / TENSORS_FILE, card)
        return card, vectors, present

    def _read_card(self, path: Path, sha256: str) -> Card:
        content = _read_own(path, _MAX_CARD_BYTES)
        whole = True
        document: Any = None
        try:
            document = json.loads(content)
        except (ValueError, RecursionError):
            whole = False
        if hashlib.sha256(content).hexdigest() != sha256:
            if not whole:
                raise _broken("E_ARTEFACT_TRUNCATED", path, "is not whole JSON")
            raise _broken("E_ARTEFACT_TAMPERED", path, "does not have the hash it is stored under")
        if not isinstance(document, dict) or document.get("apiVersion") != API_VERSION:
            raise _broken("E_ARTEFACT_FOREIGN", path, f"is not a card of {API_VERSION}")
        if document.get("kind") != "direction":
            kind = _shown(document.get("kind"))
            raise _broken("E_ARTEFACT_FOREIGN", path, f"is a card of kind {kind}, not direction")
        try:
            card = Card.model_validate(document)
            canonical = rfc8785.dumps(document)
        except (ValidationError, rfc8785.CanonicalizationError) as error:
            raise _broken("E_ARTEFACT_FOREIGN", path, f"is not a direction's card: {error}") from (
                error
            )
        if canonical != content:
            raise _broken("E_ARTEFACT_FOREIGN", path, "is not in canonical form (RFC 8785)")
        return card


def check_name(name: str) -> None:
    """Refuse what is not a name.

    Raises:
        TrimtabError: E_ARTEFACT_NAME.
    """
    if not NAME_PATTERN.fullmatch(name):
        raise TrimtabError(
            "E_ARTEFACT_NAME",
            f"{_shown(name)} is not a name",
            expected="a lower-case letter or digit, then up to 63 of a-z 0-9 . _ -",
        )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…'"


def _broken(code: str, path: Path, what: str) -> TrimtabError:
    return TrimtabError(code, f"{path} {what}", field=str(path))


def _read_own(path: Path, limit: int) -> bytes:
    """Read a plain file of the store, up to a limit.

    The store makes neither links nor pipes: a link could point out of the store, and opening a pipe
    would wait for ever.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise _broken("E_ARTEFACT_TRUNCATED", path, "is missing") from None
    except OSError as error:
        if path.is_symlink():
            raise _broken("E_ARTEFACT_FOREIGN", path, "is a symbolic link") from error
        raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise _broken("E_ARTEFACT_FOREIGN", path, "is not a plain file")
    with os.fdopen(descriptor, "rb") as file:
        if status.st_size > limit:
            raise _broken(
                "E_ARTEFACT_FOREIGN", path, f"has {status.st_size} bytes, more than {limit}"
            )
        return file.read(limit + 1)


def _read_tensors(path: Path, card: Card) -> tuple[FloatArray, BoolArray]:
    num_layers, hidden_size = card.model.num_layers, card.model.hidden_size
    content = _read_own(path, num_layers * (hidden_size * 4 + 1) + _MAX_HEADER_BYTES)
    tampered = hashlib.sha256(content).hexdigest() != card.tensors_sha256
    if tampered and _is_short(content):
        raise _broken("E_ARTEFACT_TRUNCATED", path, "ends before its tensors do")
    if tampered:
        raise _broken("E_ARTEFACT_TAMPERED", path, "does not have the hash that its card states")
    try:
        tensors = load_safetensors(content)
    except (SafetensorError, ValueError) as error:
        raise _broken("E_ARTEFACT_FOREIGN", path, f"is not a safetensors file: {error}") from error
    if set(tensors) != {"vectors", "present"}:
        names = ", ".join(sorted(tensors))
        raise _broken("E_ARTEFACT_FOREIGN", path, f"holds {names}, not vectors and present")
    vectors, present = tensors["vectors"], tensors["present"]
    if vectors.dtype != np.float32 or present.dtype not in (np.dtype(np.uint8), np.dtype(np.bool_)):
        raise _broken("E_ARTEFACT_SHAPE", path, f"holds {vectors.dtype} and {present.dtype}")
    rows, mask = _checked_tensors(card, vectors, present)
    if tuple(np.flatnonzero(mask)) != card.layers:
        raise _broken("E_ARTEFACT_SHAPE", path, "has other layers than its card says")
    if np.any(vectors[~mask]):
        raise _broken("E_ARTEFACT_SHAPE", path, "has numbers in layers it says are absent")
    return rows, mask


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


def _checked_tensors(
    card: CardDraft, vectors: npt.ArrayLike, present: npt.ArrayLike
) -> tuple[FloatArray, BoolArray]:
    """The tensors as they are stored, or why they cannot be a direction of this model."""
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinity, refused below
        rows = np.array(vectors, dtype=np.float32, order="C")
    mask = np.array(present).astype(bool)
    shape = (card.model.num_layers, card.model.hidden_size)
    if rows.shape != shape:
        raise TrimtabError(
            "E_ARTEFACT_SHAPE", f"vectors have shape {rows.shape}", expected=f"{shape}"
        )
    if mask.shape != shape[:1]:
        raise TrimtabError(
            "E_ARTEFACT_SHAPE",
            f"the mask of layers has shape {mask.shape}",
            expected=f"{shape[:1]}",
        )
    if not mask.any():
        raise TrimtabError("E_ARTEFACT_SHAPE", "no layer is present", expected="at least one")
    finite = np.isfinite(rows).all(axis=1)
    bad = np.flatnonzero(mask & ~finite)
    if bad.size:
        raise TrimtabError(
            "E_ARTEFACT_NONFINITE",
            f"vectors hold NaN or infinity at layer {int(bad[0])}",
            expected="finite numbers",
        )
    rows[~mask] = 0.0
    return rows, mask
