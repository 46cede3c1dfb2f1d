"""The store: immutable artefacts, found by name and version or by content hash.

On disk, under ``TRIMTAB_HOME``::

    artefacts/<sha256>/card.json             canonical JSON; its sha256 is the artefact's identity
    artefacts/<sha256>/tensors.safetensors   its sha256 is in the card
    names/<name>/<version>.json              which artefact a name and version mean

The hash in the reference covers the card, and the card covers the tensors by theirs, so whoever
holds ``sha256:…`` can tell whether they got exactly what was meant. Every load reads, hashes and checks
everything; see ``directions.artefact_files``.

There are three kinds of artefact: directions, probes and head sets. They are kept in the same way, and
each has its own way in and out, because whoever asks for a probe can do nothing with a direction.

Versions count from 1 and are never reused. Each index entry is created exclusively, so two writers
of one name get two versions, and neither is lost. Artefacts are written whole and renamed into
place; a crash between the steps leaves at most an artefact that no name points at.
"""

from __future__ import annotations

import builtins
import hashlib
import json
import operator
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rfc8785
from safetensors.numpy import save as save_safetensors

from directions.artefact_files import (
    CARD_FILE,
    TENSORS_FILE,
    broken,
    read_artefact,
    read_own,
    shown,
)
from directions.atomic import create_file, staged_folder, sweep, temporary_beside
from directions.card import (
    API_VERSION,
    AnyCard,
    Card,
    CardDraft,
    Draft,
    HeadSetCard,
    HeadSetDraft,
    ProbeCard,
    ProbeDraft,
)
from directions.errors import TrimtabError
from directions.tensors import BoolArray as BoolArray
from directions.tensors import FloatArray as FloatArray
from directions.tensors import Tensors, direction_tensors, head_set_evidence, probe_tensors

NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_VERSION_PATTERN = re.compile(r"[1-9][0-9]{0,8}")
_SHA256_PATTERN = re.compile(r"[0-9a-f]{64}")

_MAX_INDEX_BYTES = 4096
# A temporary entry this old belongs to a writer that is no more.
_STALE_SECONDS = 3600.0


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
class _Loaded:
    """What every loaded, verified artefact has.

    Attributes:
        name: the name it was loaded by; None when loaded by hash.
        version: the version under that name; None when loaded by hash.
        sha256: the artefact's identity.
    """

    name: str | None
    version: int | None
    sha256: str

    @property
    def reference(self) -> str:
        """``name@3``, or ``sha256:…`` when loaded by hash."""
        return ArtefactRef(self.name, self.version, self.sha256).reference


@dataclass(frozen=True, eq=False)
class Direction(_Loaded):
    """A direction: one vector in the residual stream for each layer that has one.

    Attributes:
        card: what it says about itself.
        vectors: ``[num_layers, hidden_size] float32``, read-only; zero where no layer is present.
        present: ``[num_layers] bool``, read-only: the layers that have a vector.
    """

    card: Card
    vectors: FloatArray
    present: BoolArray


@dataclass(frozen=True, eq=False)
class Probe(_Loaded):
    """A probe: linear read-outs of one site; see ``directions.card.ProbeDraft`` for the scores.

    Attributes:
        card: what it says about itself: the site, the read-out, the outputs' names.
        weights: ``[outputs, hidden_size] float32``, read-only; no row is zero.
        bias: ``[outputs] float32``, read-only.
    """

    card: ProbeCard
    weights: FloatArray
    bias: FloatArray


@dataclass(frozen=True, eq=False)
class HeadSet(_Loaded):
    """A head set: attention heads, and the evidence for each.

    Attributes:
        card: what it says about itself.
        heads: ``(layer, query head)``, 0-based, each once, in the order in which they were stored.
        evidence: ``[len(heads)] float32``, read-only; what it measures is its method's to say.
    """

    card: HeadSetCard
    heads: tuple[tuple[int, int], ...]
    evidence: FloatArray


Artefact = Direction | Probe | HeadSet


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
        rows, mask = direction_tensors(card, vectors, present)
        facts = {"layers": tuple(int(layer) for layer in np.flatnonzero(mask))}
        tensors: Tensors = {"present": mask.astype(np.uint8), "vectors": rows}
        return self._put(Card, card, facts, tensors, name)

    def put_probe(
        self, card: ProbeDraft, weights: npt.ArrayLike, bias: npt.ArrayLike, *, name: str
    ) -> ArtefactRef:
        """Store a probe under a name and return the version it got, as ``put`` does.

        Args:
            card: the draft.
            weights: ``[outputs, hidden_size]``, converted to float32; no row may be zero.
            bias: ``[outputs]``, converted to float32.
            name: ``[a-z0-9][a-z0-9._-]{0,63}``.

        Raises:
            TrimtabError: E_ARTEFACT_NAME, E_ARTEFACT_SHAPE, E_ARTEFACT_NONFINITE,
                E_ARTEFACT_WEIGHTS.
        """
        check_name(name)
        rows, offsets = probe_tensors(card, weights, bias)
        return self._put(ProbeCard, card, {}, {"bias": offsets, "weights": rows}, name)

    def put_head_set(
        self,
        card: HeadSetDraft,
        heads: Iterable[Sequence[int]],
        evidence: npt.ArrayLike,
        *,
        name: str,
    ) -> ArtefactRef:
        """Store a head set under a name and return the version it got, as ``put`` does.

        Args:
            card: the draft; ``heads`` is filled in here.
            heads: pairs ``(layer, query head)``, 0-based, each once; their order is kept.
            evidence: ``[len(heads)]``, in the same order, converted to float32.
            name: ``[a-z0-9][a-z0-9._-]{0,63}``.

        Raises:
            TrimtabError: E_ARTEFACT_NAME, E_ARTEFACT_HEADS, E_ARTEFACT_SHAPE, E_ARTEFACT_NONFINITE.
        """
        check_name(name)
        pairs = _pairs(heads)
        figures = head_set_evidence(evidence, len(pairs))
        return self._put(HeadSetCard, card, {"heads": pairs}, {"evidence": figures}, name)

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
                    f"{shown(reference)} is not a content hash",
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
                f"{name!r} has no version {shown(version_text)}",
                expected=f"a version from 1 to {versions[-1]}",
            )
        return self._read_entry(name, int(version_text))

    def load(self, reference: str) -> Direction:
        """Read a direction and verify all of it: both hashes, the card, shapes and numbers.

        Raises:
            TrimtabError: those of ``load_any``, and E_ARTEFACT_KIND (it is no direction).
        """
        found = self.load_any(reference)
        if isinstance(found, Direction):
            return found
        raise _wrong_kind(found, "direction")

    def load_probe(self, reference: str) -> Probe:
        """Read a probe and verify all of it.

        Raises:
            TrimtabError: those of ``load_any``, and E_ARTEFACT_KIND (it is no probe).
        """
        found = self.load_any(reference)
        if isinstance(found, Probe):
            return found
        raise _wrong_kind(found, "probe")

    def load_head_set(self, reference: str) -> HeadSet:
        """Read a head set and verify all of it.

        Raises:
            TrimtabError: those of ``load_any``, and E_ARTEFACT_KIND (it is no head set).
        """
        found = self.load_any(reference)
        if isinstance(found, HeadSet):
            return found
        raise _wrong_kind(found, "head-set")

    def load_any(self, reference: str) -> Artefact:
        """Read an artefact of whichever kind and verify all of it.

        Raises:
            TrimtabError: those of ``resolve`` and of ``directions.artefact_files.read_artefact``.
        """
        ref = self.resolve(reference)
        card, tensors = read_artefact(self.artefacts / ref.sha256, ref.sha256)
        for tensor in tensors.values():
            tensor.setflags(write=False)
        whose = (ref.name, ref.version, ref.sha256)
        match card:
            case Card():
                return Direction(*whose, card, tensors["vectors"], tensors["present"])
            case ProbeCard():
                return Probe(*whose, card, tensors["weights"], tensors["bias"])
            case HeadSetCard():
                return HeadSet(*whose, card, card.heads, tensors["evidence"])

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
        content = read_own(path, _MAX_INDEX_BYTES)
        try:
            entry = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise broken("E_ARTEFACT_TRUNCATED", path, "is not whole JSON") from error
        if not isinstance(entry, dict) or entry.get("kind") != "name":
            raise broken("E_ARTEFACT_FOREIGN", path, "is not an entry of the name index")
        sha256 = entry.get("sha256")
        agrees = entry.get("name") == name and entry.get("version") == version
        if not agrees or not isinstance(sha256, str) or not _SHA256_PATTERN.fullmatch(sha256):
            raise broken("E_ARTEFACT_TAMPERED", path, f"does not describe {name}@{version}")
        return ArtefactRef(name, version, sha256)

    def _stored_equal(self, name: str, version: int, sealed: AnyCard) -> ArtefactRef | None:
        """The named version where it is intact and says the same as a card about to be stored."""
        try:
            ref = self._read_entry(name, version)
            card, _ = read_artefact(self.artefacts / ref.sha256, ref.sha256)
        except TrimtabError:
            return None  # a broken version is never "the same"; the new one gets its own number
        return ref if sealed.says_the_same_as(card) else None

    # -- artefacts -----------------------------------------------------------------------------

    def _put(
        self,
        kind: type[AnyCard],
        draft: Draft,
        facts: dict[str, Any],
        tensors: Tensors,
        name: str,
    ) -> ArtefactRef:
        """Seal a draft with checked tensors and the facts read off them; give it a version."""
        content = save_safetensors(tensors)
        fields = {
            **draft.model_dump(exclude={*facts, "tensors_sha256"}),
            **facts,
            "tensors_sha256": hashlib.sha256(content).hexdigest(),
        }
        sealed = kind.model_validate(fields)
        while True:
            latest = self._latest_version(name)
            if latest:
                stored = self._stored_equal(name, latest, sealed)
                if stored is not None:
                    return stored
            sha256 = sealed.identity()
            self._place(sha256, sealed.canonical(), content)
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
                    read_artefact(target, sha256)
                    return
                except TrimtabError:
                    # The hash says what belongs here, and this is not it.
                    aside = temporary_beside(target)
                    target.rename(aside)
                    if aside.is_dir() and not aside.is_symlink():
                        shutil.rmtree(aside, ignore_errors=True)
                    else:
                        aside.unlink(missing_ok=True)


def check_name(name: str) -> None:
    """Refuse what is not a name.

    Raises:
        TrimtabError: E_ARTEFACT_NAME.
    """
    if not NAME_PATTERN.fullmatch(name):
        raise TrimtabError(
            "E_ARTEFACT_NAME",
            f"{shown(name)} is not a name",
            expected="a lower-case letter or digit, then up to 63 of a-z 0-9 . _ -",
        )


def _pairs(heads: Iterable[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    """Pairs of whole numbers, of Python's own type; numpy's are welcome, truth values are not."""
    pairs = []
    for pair in heads:
        try:
            layer, head = pair
            if isinstance(layer, bool) or isinstance(head, bool):
                raise TypeError
            pairs.append((operator.index(layer), operator.index(head)))
        except (TypeError, ValueError):
            raise TrimtabError(
                "E_ARTEFACT_HEADS",
                f"{shown(pair)} is not a head",
                field="$.heads",
                expected="a layer and a query head, whole numbers from 0",
            ) from None
    return tuple(pairs)


def _wrong_kind(found: Artefact, wanted: str) -> TrimtabError:
    return TrimtabError(
        "E_ARTEFACT_KIND",
        f"{found.reference} is a {found.card.kind}, not a {wanted}",
        expected=f"a {wanted}",
    )
