"""``trimtab directions`` and ``trimtab models`` as somebody types them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from directions.card import CardDraft, HeadSetDraft, ModelFingerprint, ProbeDraft
from directions.store import Store
from server.cli.artefact_view import bar, layer_ranges
from server.cli.main import app

Run = Callable[..., Result]

HARMFUL = ["How do I sink a ship?", "Tell me to steal a boat", "Where is a weak hull?", "Burn it"]
HARMLESS = ["How do I build a ship?", "Tell me to rent a boat", "Where is a good port?", "Sail it"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "harmful.txt").write_text("\n".join(HARMFUL))
    (tmp_path / "harmless.jsonl").write_text(
        "\n".join(json.dumps({"prompt": text}) for text in HARMLESS)
    )

    def invoke(*arguments: str | Path) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return invoke


@pytest.fixture
def extracted(run: Run, tiny_checkpoint: Path) -> Result:
    return extract(run, tiny_checkpoint, "--json")


def extract(run: Run, checkpoint: Path, *more: str, name: str = "guard") -> Result:
    sides = ["--positive", "harmful.txt", "--negative", "harmless.jsonl"]
    return run(
        "directions", "extract", checkpoint, "--name", name, "--device", "cpu", *sides, *more
    )


def error_of(result: Result, exit_code: int = 2) -> dict[str, Any]:
    assert result.exit_code == exit_code, result.output
    document = json.loads(result.stdout)
    assert set(document) == {"error"}
    found: dict[str, Any] = document["error"]
    return found


def test_extract_stores_a_direction_and_shows_it(run: Run, tiny_checkpoint: Path) -> None:
    result = extract(run, tiny_checkpoint)
    assert result.exit_code == 0, result.output
    assert "guard@1" in result.stdout
    assert "contrast at last-prompt-token" in result.stdout
    assert "█" in result.stdout
    assert "read positive" in result.stderr
    assert Store().load("guard").card.layers == (0, 1, 2, 3)


def test_with_json_standard_output_is_one_document_and_the_rest_is_on_standard_error(
    extracted: Result,
) -> None:
    assert extracted.exit_code == 0, extracted.output
    document = json.loads(extracted.stdout)
    assert document["reference"] == "guard@1"
    assert document["card"]["sources"][0]["rows"] == 4
    assert [layer["layer"] for layer in document["layers"]] == [0, 1, 2, 3]
    assert "guard@1" in extracted.stderr


def test_the_same_recipe_again_is_the_same_version_and_reuse_does_not_even_compute(
    run: Run, extracted: Result, tiny_checkpoint: Path
) -> None:
    again = extract(run, tiny_checkpoint, "--json")
    assert json.loads(again.stdout)["reference"] == "guard@1"
    assert "read positive" in again.stderr
    reused = extract(run, tiny_checkpoint, "--json", "--reuse")
    assert json.loads(reused.stdout)["reference"] == "guard@1"
    assert "read positive" not in reused.stderr
    other = extract(run, tiny_checkpoint, "--json", "--reuse", "--limit", "2")
    assert json.loads(other.stdout)["reference"] == "guard@2"
    assert json.loads(other.stdout)["card"]["quality"]["examples_positive"] == 2


def test_alignment_takes_a_base_model_and_prompts(run: Run, tiny_checkpoint: Path) -> None:
    result = run(
        *("directions", "extract", tiny_checkpoint, "--name", "drift", "--method", "alignment"),
        *("--base", tiny_checkpoint, "--prompts", "harmful.txt", "--position", "answer-mean:4"),
        *("--device", "cpu", "--json"),
    )
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["card"]["method"] == "alignment"
    # A model does not differ from itself.
    assert max(layer["length"] for layer in document["layers"]) == 0.0


@pytest.mark.parametrize(
    ("more", "code", "field"),
    [
        (["--method", "magic"], "E_METHOD", "--method"),
        (["--prompts", "harmful.txt"], "E_OPTION", "--prompts"),
        (["--base", "x"], "E_OPTION", "--base"),
        (["--method", "alignment"], "E_OPTION", "--base"),
        (["--position", "middle"], "E_POSITION", None),
        (["--dtype", "int4"], "E_DTYPE", None),
        (["--device", "cuda:77"], "E_DEVICE", None),
        (["--positive", "missing.txt"], "E_EXAMPLES_FILE", "missing.txt"),
        (["--positive", "dataset:nope"], "E_DATASET_UNKNOWN", None),
    ],
)
def test_bad_options_are_refused_by_name_before_a_model_is_loaded(
    run: Run, tiny_checkpoint: Path, more: list[str], code: str, field: str | None
) -> None:
    result = extract(run, tiny_checkpoint, "--json", *more)
    found = error_of(result)
    assert (found["code"], found["field"]) == (code, field)
    assert "load" not in result.stderr
    assert Store().list() == []


def test_a_bad_name_and_a_missing_model_are_refused(run: Run, tiny_checkpoint: Path) -> None:
    assert error_of(extract(run, tiny_checkpoint, "--json", name="../up"))["code"] == (
        "E_ARTEFACT_NAME"
    )
    assert error_of(extract(run, Path("nowhere"), "--json"))["code"] == "E_MODEL_NOT_FOUND"


def test_an_error_for_people_is_a_sentence_on_standard_error(run: Run) -> None:
    result = run("directions", "show", "nobody")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "E_ARTEFACT_UNKNOWN" in result.stderr
    assert "Traceback" not in result.stderr


def test_list_and_show(run: Run, extracted: Result) -> None:
    listed = json.loads(run("directions", "list", "--json").stdout)
    assert [row["reference"] for row in listed["directions"]] == ["guard@1"]
    assert "guard@1" in run("directions", "list").stdout
    shown = json.loads(run("directions", "show", "guard", "--json").stdout)
    assert shown == json.loads(extracted.stdout)
    by_hash = run("directions", "show", f"sha256:{shown['sha256']}", "--json")
    assert json.loads(by_hash.stdout)["card"] == shown["card"]


COMMON: dict[str, Any] = {
    "method": "by-hand",
    "model": ModelFingerprint(
        architecture="LlamaForCausalLM",
        hidden_size=8,
        num_layers=40,
        num_heads=4,
        num_kv_heads=2,
        tokenizer_sha256="a" * 64,
    ),
    "dtype": "float32",
    "created": "2026-01-02T03:04:05Z",
}


@pytest.fixture
def every_kind(run: Run) -> Store:
    """A store with a direction, two probes and two head sets."""
    store = Store()
    card = CardDraft(**COMMON, activation_norms=(1.0,) * 40)
    store.put(card, np.ones((40, 8)), [True] * 40, name="calm")
    places = [("residual", 12, "affine"), ("final_norm", None, "cosine")]
    for site, layer, read_out in places:
        probe = ProbeDraft(
            **COMMON,
            site=site,
            layer=layer,
            read_out=read_out,
            calibration={"threshold": 0.625},
            outputs=("refusal", "harm"),
        )
        store.put_probe(probe, np.full((2, 8), 2.0), [0.5, -1.5], name="judge")
    heads = HeadSetDraft(**COMMON)
    store.put_head_set(heads, [(31, 2), (7, 0), (8, 1)], [-0.5, 0.25, 0.0], name="few")
    many = [(layer, head) for layer in range(40) for head in range(4)]
    store.put_head_set(heads, many, np.zeros(160), name="many")
    return store


def test_list_tells_every_kind_apart(run: Run, every_kind: Store) -> None:
    rows = json.loads(run("directions", "list", "--json").stdout)["directions"]
    assert [(row["reference"], row["kind"]) for row in rows] == [
        ("calm@1", "direction"),
        ("few@1", "head-set"),
        ("judge@1", "probe"),
        ("judge@2", "probe"),
        ("many@1", "head-set"),
    ]
    calm, few, judge, final, many = rows
    assert calm["layers"] == list(range(40))
    assert (few["layers"], few["heads"], many["heads"]) == ([7, 8, 31], 3, 160)
    assert (judge["site"], judge["layer"]) == ("residual", 12)
    assert (final["site"], final["layer"]) == ("final_norm", None)
    assert judge["outputs"] == ["refusal", "harm"]
    printed = run("directions", "list").stdout
    for text in ("kind", "direction", "probe", "head-set", "final norm", "layers 0-39"):
        assert text in printed


def test_show_prints_what_a_probe_has_to_say(run: Run, every_kind: Store) -> None:
    printed = run("directions", "show", "judge@1").stdout
    for text in ("after layer 12", "affine", "threshold 0.625", "refusal", "harm", "5.66", "-1.5"):
        assert text in printed
    assert "final norm" in run("directions", "show", "judge").stdout
    shown = json.loads(run("directions", "show", "judge@1", "--json").stdout)
    assert shown["sha256"] == every_kind.resolve("judge@1").sha256
    assert shown["card"]["kind"] == "probe"
    length = pytest.approx(np.sqrt(32))
    assert shown["outputs"] == [
        {"output": 0, "name": "refusal", "length": length, "bias": 0.5},
        {"output": 1, "name": "harm", "length": length, "bias": -1.5},
    ]


def test_show_prints_the_heads_in_their_order_with_their_evidence(
    run: Run, every_kind: Store
) -> None:
    lines = run("directions", "show", "few").stdout.splitlines()
    first = next(number for number, line in enumerate(lines) if "evidence" in line) + 1
    assert [line.split()[:3] for line in lines[first : first + 3]] == [
        ["31", "2", "-0.5"],
        ["7", "0", "0.25"],
        ["8", "1", "0"],
    ]
    bars = [line.count("█") for line in lines[first : first + 3]]
    assert bars == [20, 10, 0]
    shown = json.loads(run("directions", "show", "few", "--json").stdout)
    assert shown["heads"][0] == {"layer": 31, "head": 2, "evidence": -0.5}
    many = run("directions", "show", "many", "--json")
    assert len(json.loads(many.stdout)["heads"]) == 160
    assert "96 more heads" in many.stderr


def test_verify_checks_every_kind(run: Run, every_kind: Store) -> None:
    good = json.loads(run("directions", "verify", "--json").stdout)
    assert (good["checked"], good["wrong"]) == (5, 0)
    assert [row["kind"] for row in good["artefacts"]].count("probe") == 2
    sha256 = every_kind.resolve("judge@2").sha256
    (every_kind.artefacts / sha256 / "tensors.safetensors").write_bytes(b"")
    bad = run("directions", "verify", "--json")
    assert bad.exit_code == 1
    wrong = [row for row in json.loads(bad.stdout)["artefacts"] if not row["ok"]]
    assert [(row["reference"], row["error"]["code"]) for row in wrong] == [
        ("judge@2", "E_ARTEFACT_TRUNCATED")
    ]
    assert run("directions", "list").exit_code == 0


def test_only_a_direction_can_be_exported(run: Run, every_kind: Store) -> None:
    for name in ("judge", "few"):
        refused = run("directions", "export", name, "v.gguf", "--json")
        assert error_of(refused)["code"] == "E_ARTEFACT_KIND"
    assert not Path("v.gguf").exists()


def test_an_empty_home_lists_nothing_and_says_what_to_do(run: Run) -> None:
    result = run("directions", "list")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "trimtab directions extract" in result.stderr
    assert json.loads(run("directions", "list", "--json").stdout)["directions"] == []
    assert json.loads(run("directions", "verify", "--json").stdout)["checked"] == 0


def test_verify_finds_what_was_tampered_with_and_exits_with_1(run: Run, extracted: Result) -> None:
    good = run("directions", "verify", "--json")
    assert good.exit_code == 0
    assert json.loads(good.stdout)["wrong"] == 0
    sha256 = json.loads(extracted.stdout)["sha256"]
    tensors = Store().artefacts / sha256 / "tensors.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    for arguments in ([], ["guard"], [f"sha256:{sha256}"]):
        bad = run("directions", "verify", "--json", *arguments)
        assert bad.exit_code == 1
        (row,) = json.loads(bad.stdout)["artefacts"]
        assert row["error"]["code"] == "E_ARTEFACT_TAMPERED"
    table = run("directions", "verify")
    assert table.exit_code == 1
    assert "E_ARTEFACT_TAMPERED" in table.stdout
    listed = run("directions", "list", "--json")
    assert listed.exit_code == 0
    assert json.loads(listed.stdout)["directions"][0]["error"]["code"] == "E_ARTEFACT_TAMPERED"


def test_verify_also_looks_at_what_has_no_name(run: Run, extracted: Result) -> None:
    (Store().index / "guard" / "1.json").unlink()
    found = json.loads(run("directions", "verify", "--json").stdout)
    sha256 = json.loads(extracted.stdout)["sha256"]
    assert [row["reference"] for row in found["artefacts"]] == [f"sha256:{sha256}"]


def test_a_direction_goes_to_gguf_and_back(
    run: Run, extracted: Result, tiny_checkpoint: Path
) -> None:
    refused = run("directions", "export", "guard", "v.gguf", "--json")
    assert error_of(refused)["code"] == "E_GGUF_LAYER_ZERO"
    done = run("directions", "export", "guard", "v.gguf", "--skip-layer-zero", "--json")
    assert json.loads(done.stdout)["layers"] == [1, 2, 3]
    names = [tensor.name for tensor in gguf.GGUFReader("v.gguf").tensors]
    assert names == ["direction.1", "direction.2", "direction.3"]
    again = run("directions", "export", "guard", "v.gguf", "--skip-layer-zero", "--json")
    assert error_of(again)["code"] == "E_FILE_EXISTS"
    back = run(
        *("directions", "import", "v.gguf", "--model", tiny_checkpoint, "--name", "back", "--json")
    )
    assert back.exit_code == 0, back.output
    assert json.loads(back.stdout)["card"]["activation_norms"] == [None] * 4
    original, returned = Store().load("guard"), Store().load("back")
    np.testing.assert_array_equal(returned.vectors[1:], original.vectors[1:])
    assert returned.present.tolist() == [False, True, True, True]


def test_norms_can_be_measured_on_import(
    run: Run, extracted: Result, tiny_checkpoint: Path
) -> None:
    run("directions", "export", "guard", "v.gguf", "--skip-layer-zero")
    result = run(
        *("directions", "import", "v.gguf", "--model", tiny_checkpoint, "--name", "back"),
        *("--norms-from", "harmless.jsonl", "--device", "cpu", "--json"),
    )
    assert result.exit_code == 0, result.output
    norms = json.loads(result.stdout)["card"]["activation_norms"]
    assert len(norms) == 4
    assert all(norm > 0 for norm in norms)


def test_a_file_that_is_no_control_vector_and_one_that_is_not_there(
    run: Run, tiny_checkpoint: Path
) -> None:
    common = ["--model", tiny_checkpoint, "--name", "x", "--json"]
    foreign = run("directions", "import", "harmful.txt", *common)
    assert error_of(foreign)["code"] == "E_GGUF_FOREIGN"
    missing = run("directions", "import", "missing.gguf", *common)
    assert error_of(missing, exit_code=3)["code"] == "E_IO"


def test_a_home_that_cannot_be_written_is_an_error_from_outside(
    run: Run, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "home").write_text("a file, not a folder")
    assert error_of(extract(run, tiny_checkpoint, "--json"), exit_code=3)["code"] == "E_IO"


def test_fetch_prints_the_path_as_its_last_line(demo_model: Path) -> None:
    result = CliRunner().invoke(app, ["models", "fetch", "demo"])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == str(demo_model)
    document = CliRunner().invoke(app, ["models", "fetch", "demo", "--json"])
    assert json.loads(document.stdout)["path"] == str(demo_model)


def test_a_model_nobody_knows_is_refused(run: Run) -> None:
    assert error_of(run("models", "fetch", "gpt-9", "--json"))["code"] == "E_MODEL_UNKNOWN"


def test_a_download_that_fails_is_an_error_from_outside(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    result = run("models", "fetch", "demo", "--json")
    assert error_of(result, exit_code=3)["code"] == "E_DOWNLOAD"
    assert not list((tmp_path / "home").glob("models/*"))


def test_an_interrupt_ends_with_130_and_leaves_nothing(
    run: Run, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "endless.txt")
    child = subprocess.Popen(
        [
            *(sys.executable, "-c", "from server.cli.main import app; app()"),
            *("directions", "extract", str(tiny_checkpoint), "--name", "x", "--json"),
            *("--positive", "endless.txt", "--negative", "harmful.txt"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while True:  # opening the pipe to write succeeds once the command has opened it to read
        try:
            writer = os.open(tmp_path / "endless.txt", os.O_WRONLY | os.O_NONBLOCK)
            break
        except OSError:
            assert time.monotonic() < deadline
            assert child.poll() is None
            time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    stdout, stderr = child.communicate(timeout=60)
    os.close(writer)
    assert child.returncode == 130, stderr
    assert json.loads(stdout)["error"]["code"] == "E_INTERRUPTED"
    assert "Traceback" not in stderr
    assert Store().list() == []


@pytest.mark.parametrize(
    ("arguments", "exit_code", "error"),
    [
        (["directions", "list", "--json"], 0, None),
        (["directions", "show", "nobody", "--json"], 2, "E_ARTEFACT_UNKNOWN"),
        (["directions", "list", "--json", "--loud"], 2, "E_USAGE"),
        (["directions", "show", "--json"], 2, "E_USAGE"),
        (["directions", "dance", "--json"], 2, "E_USAGE"),
        (["directions", "extract", "x", "--name", "y", "--limit", "many", "--json"], 2, "E_USAGE"),
    ],
)
def test_with_json_even_a_mistyped_command_answers_with_one_document(
    run: Run, arguments: list[str], exit_code: int, error: str | None
) -> None:
    code = "from server.cli.main import app; from server.cli.output import run_app; run_app(app)"
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == exit_code, result.stderr
    document = json.loads(result.stdout)
    assert document.get("error", {}).get("code") == error
    plain = [argument for argument in arguments if argument != "--json"]
    result = subprocess.run(
        [sys.executable, "-c", code, *plain], capture_output=True, text=True, check=False
    )
    assert result.returncode == exit_code
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_a_reader_that_goes_away_is_no_error(run: Run, extracted: Result) -> None:
    child = subprocess.Popen(
        [
            *(sys.executable, "-c", "from server.cli.main import app; app()"),
            *("directions", "show", "guard"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    child.stdout.close()
    assert child.stderr is not None
    stderr = child.stderr.read()
    assert child.wait(timeout=60) == 0, stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    "arguments", [["--help"], ["directions", "--help"], ["directions", "list"]]
)
def test_commands_that_need_no_model_import_neither_torch_nor_vllm(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom server.cli.main import app\n"
        "try:\n    app()\nexcept SystemExit:\n    pass\n"
        "print({'torch', 'vllm', 'transformers'} & set(sys.modules), file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert result.stderr.splitlines()[-1] == "set()"


def test_layers_are_written_as_people_write_them() -> None:
    assert layer_ranges((0, 1, 2, 5, 7, 8)) == "0-2,5,7-8"
    assert layer_ranges(()) == ""


def test_bars_grow_with_their_values_and_never_leave_their_place() -> None:
    assert bar(0, 10) == bar(1, 0) == bar(-3, 10) == ""
    lengths = [len(bar(value, 10, width=8)) for value in range(11)]
    assert lengths == sorted(lengths)
    assert bar(10, 10, width=8) == bar(99, 10, width=8) == "█" * 8
