"""``trimtab trace`` against a server that answers as each test tells it to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner, Result

from server.cli.main import app
from server.cli.score_style import luminance, score_style, viridis
from server.printable import printable, well_formed
from server.score_trace import read_trace, token_texts
from tests.server.scripted_server import (
    CHAT,
    MODELS,
    Scripted,
    chat_answer,
    serving,
    thinking_answer,
    unused_port,
)

Run = Callable[..., Result]

TRIMTAB = str(Path(sys.executable).with_name("trimtab"))

PLAIN = {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "", "FORCE_COLOR": ""}
COLOURED = {
    "COLUMNS": "100",
    "TERM": "xterm-256color",
    "COLORTERM": "truecolor",
    "FORCE_COLOR": "1",
    "NO_COLOR": "",
}
NAMES = {"data": [{"id": "smollm2@guard"}, {"id": "smollm2"}, {"id": "smollm2@off"}]}


@pytest.fixture(scope="module")
def listening() -> Iterator[Scripted]:
    scripted = Scripted(unused_port())
    with serving(scripted):
        yield scripted


@pytest.fixture
def server(listening: Scripted) -> Scripted:
    listening.reset({MODELS: (200, NAMES), CHAT: (200, thinking_answer())})
    return listening


@pytest.fixture
def run(server: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.delenv("TRIMTAB_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: str, env: dict[str, str] = PLAIN, url: str | None = None) -> Result:
        command = ["trace", *arguments, "--url", url or server.url]
        return CliRunner().invoke(app, command, env=env)

    return invoke


def error_of(result: Result, exit_code: int = 2) -> dict[str, Any]:
    assert result.exit_code == exit_code, result.output
    document = json.loads(result.stdout)
    assert set(document) == {"error"}
    found: dict[str, Any] = document["error"]
    return found


def background(score: float) -> str:
    return "48;2;{};{};{}m".format(*viridis(score))


def test_the_request_asks_for_a_trace_and_leaves_the_rest_to_the_server(
    run: Run, server: Scripted
) -> None:
    assert run("Hello?").exit_code == 0
    assert server.asked == [
        ("GET", MODELS, None),
        (
            "POST",
            CHAT,
            {
                "model": "smollm2",
                "messages": [{"role": "user", "content": "Hello?"}],
                "logprobs": True,
                "steering": {"trace": True},
            },
        ),
    ]


def test_what_is_given_is_passed_on(run: Run, server: Scripted) -> None:
    given = ["--model", "m", "--policy", "guard@7", "--max-tokens", "9", "--temperature", "0"]
    assert run("Höllo 🚢", *given).exit_code == 0
    ((_, path, body),) = server.asked
    assert path == CHAT
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": "Höllo 🚢"}],
        "logprobs": True,
        "steering": {"trace": True, "policy": "guard@7"},
        "max_completion_tokens": 9,
        "temperature": 0.0,
    }


def test_without_colours_every_token_has_its_score_in_a_column(run: Run) -> None:
    result = run("Hello?")

    assert result.exit_code == 0
    assert "\x1b" not in result.stdout
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    # The 20th token stands at position 77; the last one is never read.
    assert "   20  0.900  thinking   ' thought19'" in lines
    assert "   22  0.100  think_end  '\\n\\n'" in lines
    assert "   34      –  –          ' word11'" in lines
    for shown in (
        "probe         refusal@2",
        "prompt_end    0.910",
        "plateau       0.900",
        "final         0.100",
        "cliff         0.800",
        "answer_start  0.200",
        "answer_mean   0.200",
        "tokens        33",
        "policy        guard@7, enforce",
        "applied       yes",
    ):
        assert shown in lines


def test_on_a_terminal_every_token_stands_on_the_colour_of_its_own_score(run: Run) -> None:
    result = run("Hello?", env=COLOURED)

    assert result.exit_code == 0
    for text, score in ((" thought7", 0.9), ("</think>", 0.4), (" word3", 0.2)):
        before = result.stdout.partition(text + "\x1b")[0]
        assert before.endswith(background(score)), (text, before[-40:])
    # Line breaks are made visible, and what has no score has no colour.
    assert background(0.1) + "↵" in result.stdout
    assert "\x1b[0m word11\n" in result.stdout
    assert "thinking   '" not in result.stdout


def test_no_color_and_a_pipe_have_the_column(run: Run) -> None:
    for env in (COLOURED | {"NO_COLOR": "1"}, PLAIN):
        result = run("Hello?", env=env)
        assert "48;2" not in result.stdout
        assert "' word10'" in result.stdout


def test_a_terminal_of_sixteen_colours_gets_those(run: Run) -> None:
    result = run("Hello?", env=COLOURED | {"TERM": "xterm", "COLORTERM": ""})
    assert result.exit_code == 0
    assert "30;103m thought1\x1b" in result.stdout  # black on bright yellow
    assert "37;44m word1\x1b" in result.stdout  # white on blue


def test_colours_are_readable_and_told_apart_by_lightness_alone() -> None:
    console = Console(force_terminal=True, color_system="truecolor")
    lightness = []
    for step in range(101):
        style = score_style(step / 100, (0.0, 1.0), console)
        assert style.color is not None
        assert style.bgcolor is not None
        behind = luminance(style.bgcolor.get_truecolor())
        text = luminance(style.color.get_truecolor())
        contrast = (max(text, behind) + 0.05) / (min(text, behind) + 0.05)
        assert contrast >= 4.5  # WCAG AA
        lightness.append(behind)
    assert lightness == sorted(lightness)


def test_the_json_document_has_everything_and_standard_error_the_picture_for_eyes(
    run: Run,
) -> None:
    result = run("Hello?", "--json")

    assert result.exit_code == 0
    document = json.loads(result.stdout)
    tokens = document.pop("tokens")
    trace = document.pop("trace")
    assert document == {
        "model": "smollm2",
        "policy": "guard@7",
        "mode": "enforce",
        "applied": True,
        "reason": None,
        "strength": 1.0,
        "gates": None,
        "probe": "refusal@2",
        "probes": ["refusal@2"],
        "summary": {
            "prompt_end": 0.91,
            "plateau": 0.9,
            "final": 0.1,
            "cliff": 0.8,
            "answer_start": 0.2,
            "answer_mean": 0.2,
            "tokens": 33,
        },
        "prompt_end": 57,
        "phases": [
            ["prompt_end", 57, 57],
            ["thinking", 58, 77],
            ["think_end", 78, 79],
            ["answer", 80, 90],
        ],
        "text": document["text"],
        "finish_reason": "stop",
        "picture": None,
    }
    assert (trace[0], trace[-1], len(trace)) == ([57, 0.91], [90, 0.2], 34)
    assert len(tokens) == 34
    assert tokens[0] == {"text": " thought0", "position": 58, "phase": "thinking", "score": 0.9}
    assert tokens[20] == {"text": "</think>", "position": 78, "phase": "think_end", "score": 0.4}
    assert tokens[33] == {"text": " word11", "position": 91, "phase": None, "score": None}
    assert "plateau" in result.stderr


def test_output_draws_the_curve(run: Run, tmp_path: Path) -> None:
    result = run("Hello?", "--output", "curve.png", "--json")

    assert result.exit_code == 0
    assert json.loads(result.stdout)["picture"] == "curve.png"
    assert "drew curve.png" in result.stderr
    with Image.open(tmp_path / "curve.png") as image:
        assert image.size == (1800, 900)
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]


@pytest.mark.parametrize("output", ["curve.jpg", "curve", "gone/curve.png", "folder.png"])
def test_a_picture_without_a_place_is_refused_before_the_server_is_asked(
    run: Run, server: Scripted, tmp_path: Path, output: str
) -> None:
    (tmp_path / "folder.png").mkdir()
    error = error_of(run("Hello?", "--output", output, "--json"))
    assert (error["code"], error["field"]) == ("E_OPTION", "--output")
    assert server.asked == []


def test_without_matplotlib_the_error_names_the_extra_before_the_server_is_asked(
    run: Run, server: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    error = error_of(run("Hello?", "--output", "curve.png", "--json"))
    assert error["code"] == "E_DEPENDENCY"
    assert "trimtab[pictures]" in error["expected"]
    assert server.asked == []
    # Nothing else needs it.
    assert run("Hello?").exit_code == 0


def test_without_httpx_the_error_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    error = error_of(run("Hello?", "--json"))
    assert error["code"] == "E_DEPENDENCY"
    assert "httpx" in error["message"]


def two_probes() -> dict[str, Any]:
    answer = chat_answer(["a", "b", "c"], [0.9, 0.4, 0.3])
    probes = answer["choices"][0]["steering"]["probes"]
    for key, score in (("harm@1/odd", -0.5), ("harm@1/even", 0.25)):
        probes[key] = {**probes["refusal@2"], "trace": [[57, 0.0], [58, score], [59, score]]}
    return answer


@pytest.mark.parametrize(
    ("wanted", "found", "score"),
    [
        ([], "refusal@2", 0.4),
        (["--probe", "harm@1/odd"], "harm@1/odd", -0.5),
        (["--probe", "harm/even"], "harm@1/even", 0.25),
        (["--probe", "refusal"], "refusal@2", 0.4),
    ],
)
def test_one_of_several_probes_is_chosen_and_the_others_are_named(
    run: Run, server: Scripted, wanted: list[str], found: str, score: float
) -> None:
    server.answers[CHAT] = (200, two_probes())
    result = run("Hello?", *wanted, "--json")
    document = json.loads(result.stdout)
    assert document["probe"] == found
    assert document["tokens"][0]["score"] == score
    (note,) = [line for line in result.stderr.splitlines() if "--probe" in line]
    others = {"refusal@2", "harm@1/odd", "harm@1/even"} - {found}
    assert all(other in note for other in others)
    assert found not in note


@pytest.mark.parametrize("wanted", ["harm", "harm@1", "refusal@3", ""])
def test_a_probe_that_was_not_read_is_an_error_that_lists_those_that_were(
    run: Run, server: Scripted, wanted: str
) -> None:
    server.answers[CHAT] = (200, two_probes())
    error = error_of(run("Hello?", "--probe", wanted, "--json"))
    assert error["code"] == "E_PROBE_UNKNOWN"
    assert error["expected"] == "refusal@2, harm@1/odd, harm@1/even"


def test_a_policy_that_was_not_applied_is_said_with_its_reason(run: Run, server: Scripted) -> None:
    steering = {"applied": False, "reason": "slots_exhausted", "policy": "kind@1"}
    server.answers[CHAT] = (200, chat_answer(["a", "b"], [0.9, 0.4], steering=steering))
    result = run("Hello?")
    assert "applied       no (slots_exhausted)" in result.stdout
    assert "policy        kind@1, enforce" in result.stdout


def test_a_character_that_spans_tokens_belongs_to_the_one_that_completes_it(
    run: Run, server: Scripted
) -> None:
    ship = "🚢".encode()
    tokens: list[str | bytes] = ["a", ship[:1], ship[1:3], ship[3:] + b"!", "é"]
    server.answers[CHAT] = (200, chat_answer(tokens, [0.9, 0.1, 0.2, 0.3, 0.4]))
    document = json.loads(run("Hello?", "--json").stdout)
    assert [(t["text"], t["score"]) for t in document["tokens"]] == [
        ("a", 0.1),
        ("", 0.2),
        ("", 0.3),
        ("🚢!", 0.4),
        ("é", None),
    ]


@pytest.mark.parametrize(
    ("entries", "texts"),
    [
        ([], []),
        ([{"token": "a"}, {"token": "b", "bytes": None}], ["a", "b"]),
        # A character that is never completed.
        ([{"bytes": [0xF0, 0x9F]}, {"bytes": [0x61]}], ["", "\ufffda"]),
        ([{"bytes": [0x61]}, {"bytes": [0xF0]}], ["a", "\ufffd"]),
        ([{"bytes": [0xF0]}, {"token": "b"}], ["", "\ufffdb"]),
        ([{"bytes": [300], "token": "c"}, {"bytes": [True], "token": None}, {}], ["c", "\x01", ""]),
    ],
)
def test_token_texts_come_from_bytes_where_there_are_some(
    entries: list[dict[str, Any]], texts: list[str]
) -> None:
    assert token_texts(entries) == texts


def test_what_a_model_writes_cannot_act_on_the_terminal(run: Run, server: Scripted) -> None:
    tokens: list[str | bytes] = ["a\x1b[2J", "[red]", "\u202eb", "\x9b31m", "\r\x07", "c"]
    steering = {"reason": "\x1b]0;title\x07", "applied": False}
    answer = chat_answer(tokens, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], steering=steering)
    answer["choices"][0]["steering"]["probes"]["\x1b[31mp@1"] = answer["choices"][0]["steering"][
        "probes"
    ]["refusal@2"]
    server.answers[CHAT] = (200, answer)
    for env in (PLAIN, COLOURED):
        result = run("Hello?", env=env)
        assert result.exit_code == 0
        for acting in ("\x1b[2J", "\x1b]0", "\x1b[31mp", "\x9b", "\u202e", "\x07"):
            assert acting not in result.stdout + result.stderr
        assert "\r" not in result.stdout
        assert "[red]" in result.stdout
        assert "␛[2J" in result.stdout


def test_half_a_surrogate_pair_is_shown_as_a_replacement(run: Run, server: Scripted) -> None:
    answer = json.dumps(chat_answer(["a", "b"], [0.1, 0.2]))
    server.answers[CHAT] = (
        200,
        answer.replace('"content": "ab"', r'"content": "\ud83dx"').encode(),
    )
    assert json.loads(run("Hello?", "--json").stdout)["text"] == "\ufffdx"
    assert well_formed({"\ud83d": ["\ude00", 1, None]}) == {"\ufffd": ["\ufffd", 1, None]}
    assert well_formed("\ud83d\ude00") == "😀"
    assert printable("a\tb\n\x7f\x85", keep="\n") == "a␉b\n␡\ufffd"


def test_without_texts_of_tokens_the_answer_is_printed_plain(run: Run, server: Scripted) -> None:
    answer = thinking_answer()
    answer["choices"][0]["logprobs"] = None
    answer["choices"][0]["message"] = {"reasoning": "hm", "content": "well [x]"}
    server.answers[CHAT] = (200, answer)
    result = run("Hello?", env=COLOURED)
    assert result.exit_code == 0
    assert "hm\n\nwell [x]\n" in result.stdout
    assert "no texts of tokens" in result.stderr
    assert "0.800" in result.stdout


def test_the_position_of_the_prompt_s_end_is_found_without_phases() -> None:
    answer = chat_answer(["a", "b"], [0.1, 0.2], phases=[])
    assert read_trace(answer, "m").prompt_end == 57
    del answer["usage"]
    assert read_trace(answer, "m").prompt_end == 57
    assert read_trace(answer, "m").tokens[0].score == 0.2


@pytest.mark.parametrize("model", ["smollm2", "smollm2@guard", "smollm2@guard@7"])
def test_the_title_names_the_model_and_the_policy_once(model: str) -> None:
    assert read_trace(thinking_answer(), model).title == "smollm2@guard@7"


REFUSED: list[tuple[int, Any, int, dict[str, Any]]] = [
    (
        400,
        {
            "error": {
                "message": "no probes to trace",
                "type": "invalid_request_error",
                "param": "$.steering.trace",
                "code": "E_TRACE_UNSUPPORTED",
                "expected": "false",
            }
        },
        2,
        {
            "code": "E_TRACE_UNSUPPORTED",
            "message": "no probes to trace",
            "field": "$.steering.trace",
            "expected": "false",
        },
    ),
    (
        404,
        {"error": {"message": "no x", "code": "E_POLICY_UNKNOWN"}},
        2,
        {"code": "E_POLICY_UNKNOWN"},
    ),
    (
        429,
        {"error": {"message": "full", "code": "E_SLOTS_EXHAUSTED"}},
        3,
        {"code": "E_SLOTS_EXHAUSTED"},
    ),
    (503, {"error": {"message": "no", "code": "E_PLAN_INACTIVE"}}, 3, {"code": "E_PLAN_INACTIVE"}),
    (
        404,
        {"error": {"message": "The model `x` does not exist.", "param": "model", "code": 404}},
        2,
        {"code": "E_SERVER_REFUSED", "field": "model"},
    ),
    (400, {"error": {"message": "too\x1b long", "code": 400}}, 2, {"code": "E_SERVER_REFUSED"}),
    (400, {"error": {"message": "m", "code": "E_x\x1b"}}, 2, {"code": "E_SERVER_REFUSED"}),
    (404, {"detail": "Not Found"}, 2, {"code": "E_NOT_TRIMTAB"}),
    (404, {"error": {"message": "Not Found", "code": 404}}, 2, {"code": "E_NOT_TRIMTAB"}),
    (405, b"", 2, {"code": "E_SERVER_REFUSED"}),
    (401, {"error": "Unauthorized"}, 2, {"code": "E_UNAUTHORIZED", "field": "--api-key"}),
    (500, b"<html>", 3, {"code": "E_SERVER_FAILED"}),
    (502, [1], 3, {"code": "E_SERVER_FAILED"}),
]


@pytest.mark.parametrize(("status", "content", "exit_code", "expected"), REFUSED)
def test_what_the_server_refuses_is_passed_on(
    run: Run,
    server: Scripted,
    status: int,
    content: Any,
    exit_code: int,
    expected: dict[str, Any],
) -> None:
    server.answers[CHAT] = (status, content)
    error = error_of(run("Hello?", "--json"), exit_code)
    assert expected.items() <= error.items()
    assert error["message"]
    assert "\x1b" not in error["message"]

    plain = run("Hello?")
    assert (plain.exit_code, plain.stdout) == (exit_code, "")
    assert error["code"] in plain.stderr


def malformed(**steering: Any) -> dict[str, Any]:
    return chat_answer(["a", "b"], [0.1, 0.2], steering=steering)


@pytest.mark.parametrize(
    ("content", "exit_code", "code"),
    [
        (b"", 2, "E_NOT_TRIMTAB"),
        (b"<html>", 2, "E_NOT_TRIMTAB"),
        (b"[]", 2, "E_NOT_TRIMTAB"),
        (b"\xff", 2, "E_NOT_TRIMTAB"),
        (b"[" * 100_000, 2, "E_NOT_TRIMTAB"),
        (b'{"choices": [{"steering": {"strength": 1e999}}]}', 2, "E_NOT_TRIMTAB"),
        ({}, 3, "E_SERVER_ANSWER"),
        ({"choices": []}, 3, "E_SERVER_ANSWER"),
        ({"choices": [{"index": 0}]}, 2, "E_NOT_TRIMTAB"),
        ({"choices": [{"steering": 1}]}, 3, "E_SERVER_ANSWER"),
        (malformed(probes={}), 2, "E_NO_PROBES"),
        (malformed(probes={"p": {"trace": [[1, 2, 3]]}}), 3, "E_SERVER_ANSWER"),
        (malformed(probes={"p": {"trace": [[1, "x"]]}}), 3, "E_SERVER_ANSWER"),
        (malformed(probes={"p": {"trace": [[2, 0.5], [2, 0.5]]}}), 3, "E_SERVER_ANSWER"),
        (malformed(probes={"p": {"plateau": "0.5"}}), 3, "E_SERVER_ANSWER"),
        (malformed(phases=[["answer", 1]]), 3, "E_SERVER_ANSWER"),
        (malformed(applied="yes"), 3, "E_SERVER_ANSWER"),
        (malformed(policy=None), 3, "E_SERVER_ANSWER"),
    ],
)
def test_an_answer_of_another_form_is_an_error_and_no_stack_trace(
    run: Run, server: Scripted, content: Any, exit_code: int, code: str
) -> None:
    server.answers[CHAT] = (200, content)
    assert error_of(run("Hello?", "--json"), exit_code)["code"] == code


def test_keys_of_a_newer_server_are_ignored(run: Run, server: Scripted) -> None:
    answer = malformed(new={"a": 1})
    answer["choices"][0]["steering"]["probes"]["refusal@2"]["slope"] = [1]
    server.answers[CHAT] = (200, answer)
    assert run("Hello?").exit_code == 0


@pytest.mark.parametrize(
    ("names", "exit_code", "code"),
    [
        ({"data": [{"id": "a@b"}]}, 2, "E_OPTION"),
        ({"data": []}, 3, "E_SERVER_ANSWER"),
        ({"data": [{"name": 1}, 2]}, 3, "E_SERVER_ANSWER"),
        ({}, 3, "E_SERVER_ANSWER"),
    ],
)
def test_without_a_plain_name_the_model_must_be_named(
    run: Run, server: Scripted, names: Any, exit_code: int, code: str
) -> None:
    server.answers[MODELS] = (200, names)
    assert error_of(run("Hello?", "--json"), exit_code)["code"] == code
    assert run("Hello?", "--model", "a@b").exit_code == 0


def test_a_redirect_is_not_followed(run: Run, server: Scripted) -> None:
    server.headers = {"location": "http://127.0.0.1:1/elsewhere"}
    server.answers[CHAT] = (307, b"")
    error = error_of(run("Hello?", "--json", "--api-key", "secret"))
    assert error["code"] == "E_URL"
    assert "http://127.0.0.1:1/elsewhere" in error["message"]
    assert "secret" not in json.dumps(error)


def test_a_server_that_is_not_there_is_an_error_from_outside(run: Run) -> None:
    url = f"127.0.0.1:{unused_port()}"
    error = error_of(run("Hello?", "--json", url=url), 3)
    assert error["code"] == "E_UNREACHABLE"
    assert error["message"] == f"cannot reach http://{url}: Connection refused"


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--temperature", "nan"], "--temperature"),
        (["--temperature", "-1"], "--temperature"),
        (["--temperature", "inf"], "--temperature"),
        (["--max-tokens", "0"], None),
        (["--api-key", "a\nb"], "--api-key"),
        (["--api-key", "schlüssel"], "--api-key"),
        (["--model", "\udcff"], "--model"),
        (["--policy", "\udcff"], "--policy"),
    ],
)
def test_bad_options_are_refused_before_the_server_is_asked(
    run: Run, server: Scripted, arguments: list[str], field: str | None
) -> None:
    result = run("Hello?", *arguments, "--json")
    assert result.exit_code == 2
    if field is not None:
        error = error_of(result)
        assert (error["code"], error["field"]) == ("E_OPTION", field)
        assert "schl" not in error["message"]
    assert server.asked == []


def test_an_interrupt_while_the_server_thinks_ends_with_130(
    server: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = threading.Event()
    release = threading.Event()
    answer = server.answer

    def slow(path: str, *rest: Any) -> Any:
        if path == CHAT:
            asked.set()
            release.wait(30)
        return answer(path, *rest)

    monkeypatch.setattr(server, "answer", slow)
    child = subprocess.Popen(
        [TRIMTAB, "trace", "x", "--json", "--url", server.url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert asked.wait(30)
    time.sleep(0.2)
    child.send_signal(signal.SIGINT)
    stdout, stderr = child.communicate(timeout=30)
    release.set()
    assert child.returncode == 130, stderr
    assert json.loads(stdout)["error"]["code"] == "E_INTERRUPTED"
    assert "Traceback" not in stderr


def test_help_imports_none_of_what_the_commands_need() -> None:
    code = (
        "import sys\nfrom server.cli.main import app\n"
        "try:\n    app()\nexcept SystemExit:\n    pass\n"
        "heavy = {'httpx', 'matplotlib', 'torch', 'vllm', 'numpy'}\n"
        "print(heavy & set(sys.modules), file=sys.stderr)"
    )
    for arguments in (["--help"], ["trace", "--help"], ["watch", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "COLUMNS": "200"},
        )
        assert done.stderr.splitlines()[-1] == "set()"
        assert "trace" in done.stdout or "watch" in done.stdout
