"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from directions.atomic import create_file, locked, staged_folder, sweep, write_file


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_and_nothing_stays_beside_it(tmp_path: Path) -> None:
    write_file(tmp_path / "deep" / "file", b"one")
    write_file(tmp_path / "deep" / "file", b"two")
    assert (tmp_path / "deep" / "file").read_bytes() == b"two"
    assert names(tmp_path / "deep") == ["file"]


def test_creating_a_file_that_is_there_leaves_it_as_it_was(tmp_path: Path) -> None:
    create_file(tmp_path / "file", b"mine")
    with pytest.raises(FileExistsError):
        create_file(tmp_path / "file", b"yours")
    assert (tmp_path / "file").read_bytes() == b"mine"
    assert names(tmp_path) == ["file"]


def test_a_folder_appears_when_its_body_ends_well(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "model") as staging:
        (staging / "part").mkdir()
        (staging / "part" / "a").write_text("a")
        assert not (tmp_path / "model").exists()
    assert (tmp_path / "model" / "part" / "a").read_text() == "a"
    assert names(tmp_path) == ["model"]


def test_a_folder_does_not_appear_when_its_body_fails(tmp_path: Path) -> None:
    def half_a_model() -> None:
        with staged_folder(tmp_path / "model") as staging:
            (staging / "a").write_text("half")
            assert len(names(tmp_path)) == 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half_a_model()
    assert names(tmp_path) == []


def test_a_folder_that_is_there_already_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").touch()
    with pytest.raises(FileExistsError), staged_folder(tmp_path / "model") as staging:
        (staging / "yours").touch()
    assert names(tmp_path / "model") == ["mine"]
    assert names(tmp_path) == ["model"]


def test_sweeping_takes_old_leftovers_and_nothing_else(tmp_path: Path) -> None:
    for name in (".tmp-folder-1-a", ".tmp-file-1-b", "kept"):
        (tmp_path / name).mkdir() if "folder" in name else (tmp_path / name).touch()
        os.utime(tmp_path / name, (1, 1))
    (tmp_path / ".tmp-young").touch()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").touch()
    (tmp_path / ".tmp-link").symlink_to(tmp_path / "outside")
    os.utime(tmp_path / ".tmp-link", (1, 1), follow_symlinks=False)
    sweep(tmp_path, older_than=3600)
    assert names(tmp_path) == [".tmp-young", "kept", "outside"]
    assert names(tmp_path / "outside") == ["file"]
    sweep(tmp_path / "nowhere")


def test_a_lock_is_waited_for_and_a_killed_holder_releases_it(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom directions.atomic import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    taker = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True
    )
    assert taker.stdout is not None
    readable, _, _ = select.select([taker.stdout], [], [], 0.7)
    assert not readable
    holder.kill()
    holder.wait()
    assert taker.stdout.readline() == "held\n"
    taker.kill()
    taker.wait()
    with locked(tmp_path / "lock"):
        pass
