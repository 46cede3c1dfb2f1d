"""``trimtab watch`` against a server that answers as each test tells it to."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text
from typer.testing import CliRunner, Result

from directions.errors import TrimtabError
from server.cli.live_view import Column, LivePicture, column_widths
from server.cli.main import app
from server.cli.score_style import sparkline
from server.steering_answers import LiveDocument, read_answer
from server.steering_client import server_url
from tests.server.scripted_server import LIVE, Scripted, live_document, serving, unused_port

Run = Callable[..., Result]

TRIMTAB = str(Path(sys.executable).with_name("trimtab"))
PLAIN = {"COLUMNS": "160", "TERM": "dumb", "NO_COLOR": "", "FORCE_COLOR": ""}


@pytest.fixture(scope="module")
def listening() -> Iterator[Scripted]:
    scripted = Scripted(unused_port())
    with serving(scripted):
        yield scripted


@pytest.fixture
def server(listening: Scripted) -> Scripted:
    listening.reset({LIVE: (200, live_document())})
    return listening


@pytest.fixture
def run(server: Scripted, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.delenv("TRIMTAB_API_KEY", raising=False)

    def invoke(*arguments: str, url: str | None = None, **env: str) -> Result:
        command = ["watch", url or server.url, *arguments]
        return CliRunner().invoke(app, command, env=PLAIN | env)

    return invoke


def error_of(result: Result, exit_code: int = 2) -> dict[str, Any]:
    assert result.exit_code == exit_code, result.output
    document = json.loads(result.stdout)
    assert set(document) == {"error"}
    found: dict[str, Any] = document["error"]
    return found


def rendered(document: dict[str, Any], width: int, height: int | None = None) -> list[str]:
    """The lines of a picture in a window of this size."""
    console = Console(width=width, height=height, color_system=None, force_terminal=True)
    picture = LivePicture("http://h:1", read_answer(LiveDocument, document), time.time())
    options = console.options if height is None else console.options.update(height=height)
    lines = console.render_lines(picture, options, pad=False)
    shown = ["".join(segment.text for segment in line).rstrip() for line in lines]
    # Rich fills a fixed height with empty lines.
    while shown and not shown[-1]:
        shown.pop()
    return shown


def test_once_shows_running_and_finished_requests(run: Run) -> None:
    result = run("--once")

    assert result.exit_code == 0
    lines = [re.sub(r"\s+", " ", line).strip() for line in result.stdout.splitlines()]
    assert lines[0].startswith("smollm2 · http://127.0.0.1:")
    assert lines[0].endswith("process 1234 · probes refusal@2")
    assert lines[1:5] == [
        "Running (2)",
        "id policy probe phase tokens score recent",
        "chatcmpl-abc-0 guard@7 refusal@2 thinking 143 0.31 ▁▄▅█▃",
        "chatcmpl-abd-0 heed@1 (shadow) refusal@2 prompt_end 0 0.88",
    ]
    assert lines[6:] == [
        "Finished (2)",
        "id policy probe ended tokens prompt_end plateau final cliff recent",
        "chatcmpl-aaa-0 off refusal@2 1 min ago 77 0.91 0.87 0.12 0.75 ██████ ▇▇▁▂",
        "chatcmpl-aa9-0 off refusal@2 2 h ago, aborted 3 0.50 – – – ▅",
    ]
    assert "\x1b" not in result.stdout


def test_once_with_json_prints_the_document_as_it_came(run: Run, server: Scripted) -> None:
    document = live_document(new_in_a_later_version=[1])
    server.answers[LIVE] = (200, document)

    result = run("--once", "--json")

    assert result.exit_code == 0
    assert json.loads(result.stdout) == document
    assert "Running (2)" in result.stderr
    assert server.asked == [("GET", LIVE, None)]


def test_nothing_yet_is_a_picture_too(run: Run, server: Scripted) -> None:
    server.answers[LIVE] = (200, live_document(running=[], finished=[], probes=[]))
    result = run("--once")
    assert result.exit_code == 0
    assert "probes none" in result.stdout
    assert "Running (0)" in result.stdout
    assert "Finished (0)" in result.stdout


def test_scores_stand_on_their_colours_on_a_terminal_that_has_some(run: Run) -> None:
    colours = {"TERM": "xterm-256color", "COLORTERM": "truecolor", "FORCE_COLOR": "1"}
    assert "48;2;189;223;38" not in run("--once").stdout
    shown = run("--once", **colours).stdout
    assert re.search(r"\x1b\[38;2;255;255;255;48;2;\d+;\d+;\d+m0\.31\x1b", shown)
    assert re.search(r"\x1b\[38;2;0;0;0;48;2;\d+;\d+;\d+m0\.88\x1b", shown)
    assert "48;2" not in run("--once", **colours, NO_COLOR="1").stdout


@pytest.mark.parametrize("url", ["127.0.0.1:{}", "http://127.0.0.1:{}/v1/", "localhost:{}/v1"])
def test_addresses_are_taken_as_people_type_them(run: Run, server: Scripted, url: str) -> None:
    assert run("--once", url=url.format(server.port)).exit_code == 0
    assert [path for _, path, _ in server.asked] == [LIVE]


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("host", "http://host"),
        ("host:8000/", "http://host:8000"),
        (" https://host/v1 ", "https://host"),
        ("https://host/models/v1/", "https://host/models"),
        ("https://host/v12", "https://host/v12"),
        ("[::1]:8000", "http://[::1]:8000"),
        ("HTTP://Host:80", "http://Host:80"),
    ],
)
def test_an_address_has_one_form(given: str, url: str) -> None:
    assert server_url(given) == url


@pytest.mark.parametrize(
    "given",
    [
        *("", " ", "/v1", "http://", "ftp://host", "file:///etc/passwd", "host:port", "host:99999"),
        *("host:0", "http://[::1", "::1", "ho st:80", "host\n:80", "host/?q=1", "host/#top"),
        *("http://user:secret@host", "http://host:80\x1b[2J"),
    ],
)
def test_what_is_no_address_is_refused(given: str) -> None:
    with pytest.raises(TrimtabError) as raised:
        server_url(given)
    assert raised.value.code == "E_URL"
    assert "secret" not in str(raised.value)
    assert "\x1b" not in str(raised.value)


@pytest.mark.parametrize("given", ["http://host..name", "xn--\u2603.example", "a" * 300, "%zz"])
def test_an_address_that_cannot_exist_is_no_stack_trace(run: Run, given: str) -> None:
    result = run("--once", "--json", url=given)
    assert result.exit_code in (2, 3)
    assert json.loads(result.stdout)["error"]["code"] in ("E_URL", "E_UNREACHABLE")


def test_the_key_comes_from_the_option_or_the_environment(run: Run, server: Scripted) -> None:
    server.key = "open-sesame"
    assert run("--once", "--api-key", "open-sesame").exit_code == 0
    assert run("--once", TRIMTAB_API_KEY="open-sesame").exit_code == 0

    error = error_of(run("--once", "--json"))
    assert (error["code"], error["field"]) == ("E_UNAUTHORIZED", "--api-key")
    assert "asks for an API key" in error["message"]
    error = error_of(run("--once", "--json", "--api-key", "wrong-one"))
    assert "does not accept the API key" in error["message"]
    assert "wrong-one" not in json.dumps(error)


@pytest.mark.parametrize(
    "content", [{"detail": "Not Found"}, {"error": {"message": "Not Found", "code": 404}}, b"gone"]
)
def test_another_server_is_told_from_a_trimtab_server(
    run: Run, server: Scripted, content: Any
) -> None:
    server.answers[LIVE] = (404, content)
    error = error_of(run("--once", "--json"))
    assert error["code"] == "E_NOT_TRIMTAB"
    assert server.url in error["message"]


def test_once_a_server_that_is_not_there_is_an_error(run: Run) -> None:
    error = error_of(run("--once", "--json", url=f"127.0.0.1:{unused_port()}"), 3)
    assert error["code"] == "E_UNREACHABLE"
    assert error["message"].endswith("Connection refused")


def without(key: str) -> dict[str, Any]:
    return {k: v for k, v in live_document().items() if k != key}


def with_row(table: str, **changes: Any) -> dict[str, Any]:
    document = live_document()
    document[table][0].update(changes)
    return document


@pytest.mark.parametrize(
    ("document", "place"),
    [
        ({}, "$.model"),
        (without("running"), "$.running"),
        (live_document(running={}), "$.running"),
        (live_document(running=[1]), "$.running[0]"),
        (with_row("running", score="high"), "$.running[0].score"),
        (with_row("running", score=True), "$.running[0].score"),
        (with_row("running", recent=[0.5, None]), "$.running[0].recent[1]"),
        (with_row("running", tokens=1.5), "$.running[0].tokens"),
        (with_row("finished", ended="now"), "$.finished[0].ended"),
        (with_row("finished", summary=None), "$.finished[0].summary"),
        (with_row("finished", summary={"cliff": "x"}), "$.finished[0].summary.cliff"),
    ],
)
def test_a_document_of_another_form_is_an_error_that_names_the_place(
    run: Run, server: Scripted, document: Any, place: str
) -> None:
    server.answers[LIVE] = (200, document)
    error = error_of(run("--once", "--json"), 3)
    assert error["code"] == "E_SERVER_ANSWER"
    assert place + ":" in error["message"]


@pytest.mark.parametrize("content", [b"", b"<html>", b"[1]", b'{"model": NaN}', b"\xff\xfe"])
def test_what_is_no_json_object_comes_from_another_server(
    run: Run, server: Scripted, content: bytes
) -> None:
    server.answers[LIVE] = (200, content)
    assert error_of(run("--once", "--json"))["code"] == "E_NOT_TRIMTAB"


@pytest.mark.parametrize(
    ("status", "exit_code", "code"),
    [
        (500, 3, "E_SERVER_FAILED"),
        (503, 3, "E_SERVER_FAILED"),
        (429, 3, "E_SERVER_FAILED"),
        (400, 2, "E_SERVER_REFUSED"),
        (302, 2, "E_URL"),
    ],
)
def test_other_answers_are_passed_on(
    run: Run, server: Scripted, status: int, exit_code: int, code: str
) -> None:
    server.answers[LIVE] = (status, {"error": {"message": "for a reason", "code": status}})
    error = error_of(run("--once", "--json"), exit_code)
    assert error["code"] == code
    assert status == 302 or error["message"].endswith(f"HTTP {status}: for a reason")


def test_names_cannot_act_on_the_terminal(run: Run, server: Scripted) -> None:
    document = with_row(
        "running", id="\x1b[2J[red]x", probe="naïve🚢@1", policy="a\nb", phase="\x07"
    )
    server.answers[LIVE] = (200, document | {"model": "\x1b]0;t\x07"})
    result = run("--once")
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout
    assert "\x07" not in result.stdout
    for shown in ("␛[2J[red]x", "naïve🚢@1", "a␊b"):
        assert shown in result.stdout


@pytest.mark.parametrize("interval", ["0", "0.01", "-1", "nan", "inf"])
def test_an_interval_that_is_none_is_refused(run: Run, interval: str) -> None:
    error = error_of(run("--once", "--json", "--interval", interval))
    assert (error["code"], error["field"]) == ("E_OPTION", "--interval")


def test_what_cannot_be_redrawn_is_refused_with_the_way_out(run: Run, server: Scripted) -> None:
    result = run()
    assert result.exit_code == 2
    assert "--once" in result.stderr
    assert error_of(run("--json"))["field"] == "--once"
    assert run(FORCE_COLOR="1", TERM="dumb").exit_code == 2
    assert server.asked == []


@pytest.mark.parametrize("width", [200, 120, 100, 80, 60, 40, 24])
def test_a_picture_never_is_wider_than_the_window(width: int) -> None:
    document = live_document()
    document["running"][0]["recent"] = [0.5] * 59 + [1.0]
    lines = rendered(document, width)
    assert max(len(line) for line in lines) <= width
    assert len(lines) == 10
    # What it is about stays to the last.
    assert any("0.31" in line for line in lines)
    assert any("0.75" in line for line in lines)


def test_in_a_narrow_window_a_line_of_bars_keeps_its_end() -> None:
    document = live_document()
    document["running"][0]["recent"] = [0.0] * 59 + [1.0]
    wide = rendered(document, 200)[3]
    narrow = rendered(document, 90)[3]
    assert wide.endswith("▁" * 59 + "█")
    assert narrow.endswith("▁█")
    assert "▁" * 59 not in narrow


def test_with_several_probes_a_narrow_window_still_says_which() -> None:
    document = live_document(probes=["refusal@2", "harm@1"])
    assert not any("probe " in line for line in rendered(live_document(), 60)[1:])
    assert any("probe " in line for line in rendered(document, 60)[1:])


@pytest.mark.parametrize(("running", "finished"), [(0, 50), (50, 0), (50, 50), (3, 3), (400, 1)])
@pytest.mark.parametrize("height", [10, 24, 50])
def test_a_picture_is_never_higher_than_the_window_and_counts_what_it_leaves_out(
    running: int, finished: int, height: int
) -> None:
    document = live_document()
    document["running"] = document["running"][:1] * running
    document["finished"] = document["finished"][:1] * finished
    lines = rendered(document, 100, height)
    assert len(lines) <= height
    shown = sum("chatcmpl" in line for line in lines)
    left_out = sum(int(line.split()[2]) for line in lines if line.startswith("… and"))
    assert shown + left_out == running + finished
    if finished:
        assert any("chatcmpl-aaa" in line for line in lines)


def test_columns_share_what_there_is() -> None:
    columns = [
        Column("id", [Text("x" * 20)], least=8),
        Column("n", [Text("12345")], rank=1, right=True),
        Column("bars", [Text("b" * 30)], least=10, rank=2, tail=True),
    ]
    assert column_widths(columns, 100) == [20, 5, 30]
    assert column_widths(columns, 50) == [20, 5, 21]
    assert column_widths(columns, 27) == [8, 5, 10]
    assert column_widths(columns, 26) == [19, 5, 0]
    assert column_widths(columns, 14) == [14, 0, 0]
    assert column_widths(columns, 3) == [8, 0, 0]


def test_bars_are_as_high_as_the_scores_on_their_range() -> None:
    assert sparkline([0.0, 0.5, 1.0], (0.0, 1.0)) == "▁▅█"
    assert sparkline([-1.0, 0.0, 1.0], (-1.0, 1.0)) == "▁▅█"
    assert sparkline([-7.0, 9.0], (0.0, 1.0)) == "▁█"


class Terminal:
    """A command on a terminal of its own, and everything that it has written there."""

    def __init__(self, *arguments: str, columns: int = 120, rows: int = 30) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        own = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TRIMTAB_API_KEY")
        env = {k: v for k, v in os.environ.items() if k not in own}
        self.child = subprocess.Popen(
            [TRIMTAB, *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=subprocess.PIPE,
            env=env | {"TERM": "xterm-256color"},
            start_new_session=True,
        )
        os.close(theirs)
        self.written = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.child.poll() is None:
            self.child.kill()
        self.child.wait()
        if self.child.stderr is not None:
            self.child.stderr.close()
        os.close(self._ours)

    def read(self, seconds: float) -> None:
        if select.select([self._ours], [], [], seconds)[0]:
            try:
                self.written += os.read(self._ours, 1 << 16).decode("utf-8", "replace")
            except OSError:
                # The other side is closed.
                time.sleep(0.02)

    def wait_for(self, text: str, since: int = 0) -> int:
        """Wait until a text is written after a place; return the place after it."""
        deadline = time.monotonic() + 60
        while text not in self.written[since:]:
            assert time.monotonic() < deadline, (text, self.written[since:][-2000:])
            assert self.child.poll() is None, self.stderr()
            self.read(0.1)
        return self.written.index(text, since) + len(text)

    def end(self) -> int:
        """Wait for the command's end; return its exit code."""
        deadline = time.monotonic() + 60
        while self.child.poll() is None:
            assert time.monotonic() < deadline
            self.read(0.1)
        self.read(0)
        return self.child.returncode

    def stderr(self) -> str:
        assert self.child.stderr is not None
        return self.child.stderr.read().decode()


ENTERS, LEAVES = "\x1b[?1049h", "\x1b[?1049l"


def test_watching_goes_on_while_the_server_is_away_and_ends_with_ctrl_c() -> None:
    scripted = Scripted(unused_port())
    scripted.answers = {LIVE: (200, live_document())}
    with Terminal("watch", f"127.0.0.1:{scripted.port}", "--interval", "0.1") as terminal:
        # Given a server that is not there yet …
        place = terminal.wait_for("Connection refused; trying again")
        assert ENTERS in terminal.written
        with serving(scripted):
            # … then is …
            place = terminal.wait_for("chatcmpl-abc-0", place)
            scripted.answers[LIVE] = (200, with_row("running", id="chatcmpl-new-0"))
            place = terminal.wait_for("chatcmpl-new-0", place)
            # … then has too much to do …
            scripted.answers[LIVE] = (503, b"")
            place = terminal.wait_for("HTTP 503; trying again", place)
            scripted.answers[LIVE] = (200, {"model": 1})
            place = terminal.wait_for("another form", place)
        # … then goes away, and what was seen last stays.
        place = terminal.wait_for("Connection refused; trying again", place)
        terminal.wait_for("chatcmpl-new-0", place)
        scripted.answers[LIVE] = (200, with_row("running", id="chatcmpl-back-0"))
        with serving(scripted):
            place = terminal.wait_for("chatcmpl-back-0", place)
            terminal.child.send_signal(signal.SIGINT)
            code = terminal.end()
        assert code == 0, terminal.stderr()
        assert terminal.stderr() == ""
        left = terminal.written.rindex(LEAVES)
        assert "trying again" not in terminal.written[place:left]
        # The last picture stays on the person's own screen.
        assert "chatcmpl-back-0" in terminal.written[left:]


@pytest.mark.parametrize(
    ("status", "content", "code"),
    [(404, {"detail": "Not Found"}, b"E_NOT_TRIMTAB"), (401, b"", b"E_UNAUTHORIZED")],
)
def test_watching_ends_where_waiting_does_not_help(
    server: Scripted, status: int, content: Any, code: bytes
) -> None:
    with Terminal("watch", server.url, "--interval", "0.1") as terminal:
        terminal.wait_for("chatcmpl-abc-0")
        server.answers[LIVE] = (status, content)
        assert terminal.end() == 2
        assert code.decode() in terminal.stderr()
        assert LEAVES in terminal.written


def test_once_an_interrupt_is_an_interruption() -> None:
    # A server that takes the connection and never answers.
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        child = subprocess.Popen(
            [TRIMTAB, "watch", f"127.0.0.1:{port}", "--once", "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        connection, _ = silent.accept()
        connection.recv(1 << 16)
        child.send_signal(signal.SIGINT)
        stdout, stderr = child.communicate(timeout=30)
        connection.close()
    assert child.returncode == 130, stderr
    assert json.loads(stdout)["error"]["code"] == "E_INTERRUPTED"


def test_a_reader_that_goes_away_is_no_error(server: Scripted) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [TRIMTAB, "watch", server.url, "--once"], stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
