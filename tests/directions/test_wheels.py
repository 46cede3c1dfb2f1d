"""Pinned wheels, fetched by the real pip from a package index that the test serves."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from directions.errors import TrimtabError
from directions.wheels import Wheel, fetch_wheel, read_member, wheels_folder

FILE = "prompts_for_test-1.0-py3-none-any.whl"


def a_wheel() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("prompts/data.txt", "one\ntwo\n")
        archive.writestr("prompts/filler.bin", os.urandom(1 << 20))
        info = "prompts_for_test-1.0.dist-info"
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: prompts-for-test\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return buffer.getvalue()


class Index(ThreadingHTTPServer):
    """A package index with one wheel; it can be made to stop in the middle of it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = a_wheel()
        self.downloads = 0
        self.stall = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/simple"


class Handler(BaseHTTPRequestHandler):
    server: Index

    def do_GET(self) -> None:
        if self.path == "/simple/prompts-for-test/":
            self.answer("text/html", f'<a href="/files/{FILE}">{FILE}</a>'.encode())
        elif self.path == f"/files/{FILE}":
            self.server.downloads += 1
            self.answer("application/zip", self.server.content)
        else:
            self.send_error(404)

    def answer(self, kind: str, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        half = len(content) // 2
        self.wfile.write(content[:half])
        self.wfile.flush()
        while kind == "application/zip" and self.server.stall.is_set():
            time.sleep(0.05)
        self.wfile.write(content[half:])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    server = Index()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", server.url)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_RETRIES", "0")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "home"))
    yield server
    server.stall.clear()
    server.shutdown()
    server.server_close()


def pin(index: Index, sha256: str | None = None, version: str = "1.0") -> Wheel:
    found = sha256 or hashlib.sha256(index.content).hexdigest()
    return Wheel("prompts-for-test", version, found, len(index.content))


def kept() -> list[str]:
    folder = wheels_folder()
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def code_of(action: Callable[[], object]) -> str:
    with pytest.raises(TrimtabError) as caught:
        action()
    return caught.value.code


def test_a_wheel_is_fetched_once_and_its_members_read(index: Index) -> None:
    told: list[tuple[str, int | None]] = []
    arrived: list[int] = []

    def progress(description: str, total: int | None) -> Callable[[int], None]:
        told.append((description, total))
        return arrived.append

    path = fetch_wheel(pin(index), progress=progress)
    assert path.read_bytes() == index.content
    assert read_member(path, "prompts/data.txt") == b"one\ntwo\n"
    assert fetch_wheel(pin(index)) == path
    assert index.downloads == 1
    assert kept() == [path.name]
    assert [total for _, total in told] == [1]
    assert sum(arrived) == 1


def test_a_wheel_that_is_not_the_pinned_one_is_refused_and_not_kept(index: Index) -> None:
    assert code_of(lambda: fetch_wheel(pin(index, sha256="0" * 64))) == "E_CHECKSUM"
    assert index.downloads == 1
    assert kept() == []


def test_a_wheel_that_pip_cannot_get_is_an_error_with_pips_own_words(index: Index) -> None:
    with pytest.raises(TrimtabError) as caught:
        fetch_wheel(pin(index, version="9.9"))
    assert caught.value.code == "E_DOWNLOAD"
    assert "prompts-for-test==9.9" in caught.value.message
    assert "No matching distribution found" in caught.value.message
    assert kept() == []


def test_a_damaged_wheel_is_fetched_again(index: Index) -> None:
    path = fetch_wheel(pin(index))
    path.write_bytes(index.content[:1000])
    assert fetch_wheel(pin(index)).read_bytes() == index.content
    assert index.downloads == 2


def test_a_member_that_is_not_there_is_named(index: Index) -> None:
    path = fetch_wheel(pin(index))
    with pytest.raises(TrimtabError) as caught:
        read_member(path, "prompts/missing.txt")
    assert (caught.value.code, caught.value.field) == ("E_WHEEL_MEMBER", "prompts/missing.txt")


FETCH = """
import sys
from directions.wheels import Wheel, fetch_wheel
print(fetch_wheel(Wheel("prompts-for-test", "1.0", sys.argv[1], int(sys.argv[2]))))
"""


def fetching(index: Index) -> subprocess.Popen[str]:
    wheel = pin(index)
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, wheel.sha256, str(wheel.size)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_download_leaves_nothing_that_counts_and_can_be_repeated(
    index: Index, how: signal.Signals
) -> None:
    index.stall.set()
    child = fetching(index)
    deadline = time.monotonic() + 30
    while index.downloads == 0:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.3)
    os.killpg(child.pid, how)
    assert child.wait(timeout=20) != 0
    assert [name for name in kept() if name.endswith(".whl")] == []
    if how == signal.SIGINT:
        assert kept() == []
    index.stall.clear()
    assert fetch_wheel(pin(index)).read_bytes() == index.content
    assert kept() == [fetch_wheel(pin(index)).name]


def test_processes_that_want_the_same_wheel_share_one_download(index: Index) -> None:
    children = [fetching(index) for _ in range(3)]
    told = {child.communicate(timeout=60)[0] for child in children}
    assert len(told) == 1
    assert index.downloads == 1
