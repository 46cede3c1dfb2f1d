"""Files and folders that appear whole or not at all.

Everything under ``TRIMTAB_HOME`` is written beside its place, flushed to the disk and then renamed
into it, so a reader never meets half a file and a crash leaves nothing behind but a ``.tmp-…``
entry that nobody reads.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY_PREFIX = ".tmp-"


def temporary_beside(target: Path) -> Path:
    """A fresh path in the target's folder (so in its file system), not yet made."""
    return target.parent / f"{TEMPORARY_PREFIX}{target.name}-{os.getpid()}-{secrets.token_hex(6)}"


def flush(path: Path) -> None:
    """Flush one file's, or one folder's, content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_new(path: Path, content: bytes) -> None:
    """Write a file that does not exist yet and flush it; its mode follows the umask."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_file(path: Path, content: bytes) -> None:
    """Replace a file's content in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        write_new(temporary, content)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
    flush(path.parent)


def create_file(path: Path, content: bytes) -> None:
    """Create a file with its whole content in one step.

    A hard link is what makes this both exclusive and whole: opening exclusively and then writing
    would let a crash leave an empty file under the final name.

    Raises:
        FileExistsError: somebody else's file is there; it is left as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        write_new(temporary, content)
        os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    flush(path.parent)


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``target`` when the body ends without an error.

    Raises:
        FileExistsError: ``target`` holds something already; it is left as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = temporary_beside(target)
    staging.mkdir()
    try:
        yield staging
        for folder, _, names in os.walk(staging):
            for name in names:
                flush(Path(folder) / name)
            flush(Path(folder))
        try:
            staging.rename(target)
        except OSError as error:
            if target.exists():
                raise FileExistsError(f"{target} exists") from error
            raise
        flush(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def sweep(folder: Path, *, older_than: float = 0.0) -> None:
    """Remove what crashed writers left in a folder.

    Args:
        folder: where to look; its temporary entries only, not deeper.
        older_than: seconds; younger entries may belong to a writer that is still at work. With 0
            the caller holds a lock that says there is none.
    """
    if not folder.is_dir():
        return
    horizon = time.time() - older_than
    for entry in folder.iterdir():
        if not entry.name.startswith(TEMPORARY_PREFIX):
            continue
        try:
            if entry.lstat().st_mtime > horizon:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
        except FileNotFoundError:
            continue


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes; wait for it. A crash releases it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
