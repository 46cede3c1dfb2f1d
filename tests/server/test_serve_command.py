"""``trimtab serve`` where it does not come to a server: help, mistakes, refusals.

Those that need vLLM's parser, which takes seconds to import, are marked with the engine's tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.server.served import (
    TRIMTAB,
    environment,
    free_port,
    put_random_direction,
    put_random_probe,
    write_policy,
)


def run(home: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [TRIMTAB, *arguments],
        env=environment(home, **env),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    return done.stderr.strip().splitlines()[-1]


def test_help_answers_at_once_and_imports_neither_torch_nor_vllm(tmp_path: Path) -> None:
    started = time.monotonic()
    done = run(tmp_path, "serve", "--help")
    seconds = time.monotonic() - started
    assert done.returncode == 0
    for flag in (
        "--policies",
        "--default-policy",
        "--probe",
        "--slots",
        "--allow-unchecked-vllm",
        "--steering-sites",
        "--projections",
        "--think-start",
        "--think-end",
        "--vllm-help",
    ):
        assert flag in done.stdout
    assert "vLLM" in done.stdout
    assert seconds < 10
    code = (
        "import sys, server.cli.main\n"
        "heavy = {'torch', 'vllm', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_version_tells_what_is_installed(tmp_path: Path) -> None:
    done = run(tmp_path, "version")
    assert done.returncode == 0
    assert "trimtab 0.1.0" in done.stdout
    assert "vllm 0.3" in done.stdout


def test_bad_policy_files_stop_the_start_with_all_their_errors_at_once(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    folder = tmp_path / "policies"
    write_policy(folder, "good")
    write_policy(folder, "twice")
    (folder / "again.yaml").write_text((folder / "twice.yaml").read_text())
    (folder / "unknown-key.yaml").write_text(
        "apiVersion: trimtab/v1\nkind: Policy\nname: a\nmoode: enforce\n"
    )
    (folder / "broken.yml").write_text("name: [\n")
    started = time.monotonic()
    done = run(tmp_path, "serve", str(tiny_checkpoint), f"--policies={folder}")
    assert time.monotonic() - started < 20, "errors of policies must not wait for vLLM"
    assert done.returncode == 2
    for said in ("unknown-key.yaml", "E_POLICY_KEY", "broken.yml", "E_POLICY_DUPLICATE_NAME"):
        assert said in done.stderr
    assert "good.yaml" not in done.stderr


def test_a_default_policy_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    write_policy(tmp_path / "policies", "guard")
    arguments = [f"--policies={tmp_path / 'policies'}", "--default-policy=gard"]
    done = run(tmp_path, "serve", "/nowhere", *arguments)
    assert done.returncode == 2
    assert "E_POLICY_UNKNOWN" in done.stderr
    assert "guard, off" in done.stderr


@pytest.mark.engine
def test_a_flag_that_neither_side_knows_names_both(tmp_path: Path) -> None:
    done = run(tmp_path, "serve", "/nowhere", "--dtype", "float32", "--polices", "x")
    assert done.returncode == 2
    assert last_line(done) == (
        "error E_OPTION at --polices: neither trimtab serve nor vLLM knows --polices; "
        "did you mean --policies?"
    )


@pytest.mark.parametrize(
    ("arguments", "env", "said"),
    [
        pytest.param(["/nowhere", "--grpc"], {}, "--grpc", marks=pytest.mark.engine),
        pytest.param(["/nowhere", "--headless"], {}, "--headless", marks=pytest.mark.engine),
        (["/nowhere"], {"VLLM_USE_RUST_FRONTEND": "1"}, "Rust front end"),
    ],
)
def test_what_would_not_be_steered_is_refused_with_a_reason(
    tmp_path: Path, arguments: list[str], env: dict[str, str], said: str
) -> None:
    done = run(tmp_path, "serve", *arguments, **env)
    assert done.returncode == 2
    assert "E_SERVE_UNSUPPORTED" in last_line(done)
    assert said in last_line(done)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--think-end", "</think>"], "error E_THINKING_MARKERS at --think-start: "),
        (["--steering-sites", "heads,tails"], "error E_SITES at --steering-sites: 'tails' is not"),
    ],
)
def test_flags_that_say_nothing_sensible_are_refused_at_once(
    tmp_path: Path, flags: list[str], said: str
) -> None:
    done = run(tmp_path, "serve", "/nowhere", *flags)
    assert done.returncode == 2
    assert said in done.stderr
    assert "vLLM" not in done.stderr


@pytest.mark.engine
def test_thinking_and_sites_that_policies_need_are_asked_for_before_vllm_starts(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    put_random_direction(tmp_path, tiny_checkpoint)
    folder = tmp_path / "policies"
    thinks = write_policy(folder, "thinks")
    thinks.write_text(thinks.read_text() + "    scope: thinking\n")
    arguments = ["serve", str(tiny_checkpoint), f"--policies={folder}"]
    done = run(tmp_path, *arguments)
    assert done.returncode == 2
    assert "E_THINKING_MARKERS at $.edits.turn.scope" in done.stderr
    assert "--think-start and --think-end" in done.stderr
    quiet = write_policy(folder, "quiet")
    quiet.write_text(
        quiet.read_text().partition("edits")[0]
        + "edits:\n  still: {scale_heads: {heads: [[1, 1]], factor: 0}}\n"
    )
    markers = ["--think-start=<a>", "--think-end=</a>"]
    done = run(tmp_path, *arguments, *markers, "--steering-sites=residual")
    assert done.returncode == 2
    assert last_line(done) == "  expected: add, heads"
    assert "policy quiet needs heads, which --steering-sites leaves out" in done.stderr
    assert "EngineCore" not in done.stdout + done.stderr


@pytest.mark.engine
def test_a_vllm_that_was_not_checked_needs_a_flag_and_is_named(tmp_path: Path) -> None:
    # As if Trimtab had been checked with another release, in every process of the server.
    customised = tmp_path / "site"
    customised.mkdir()
    (customised / "sitecustomize.py").write_text(
        "import steering.engine.touchpoints as t\nt.CHECKED_VERSIONS = ('0.1',)\n"
    )
    path = os.pathsep.join([str(customised), os.environ.get("PYTHONPATH", "")])
    done = run(tmp_path, "serve", "/nowhere", PYTHONPATH=path)
    assert done.returncode == 1
    assert "E_VLLM_VERSION at vllm: vLLM 0.3" in done.stderr
    assert "--allow-unchecked-vllm" in done.stderr
    assert last_line(done).endswith("expected: 0.1")
    # With it the start goes on, to the model that is not there.
    done = run(tmp_path, "serve", "/nowhere", "--allow-unchecked-vllm", PYTHONPATH=path)
    assert done.returncode == 3
    assert "which Trimtab has not been checked with" in done.stdout
    assert "E_VLLM_VERSION" not in done.stdout + done.stderr


@pytest.mark.engine
def test_vllms_own_complaints_about_its_flags_are_passed_on(tmp_path: Path) -> None:
    done = run(tmp_path, "serve", "/nowhere", "--port", "many")
    assert done.returncode == 2
    assert "E_OPTION" in last_line(done)
    assert "--port" in last_line(done)
    done = run(tmp_path, "serve", "--dtype", "float32")
    assert (done.returncode, last_line(done)) == (2, "error E_OPTION at MODEL: no model is named")


@pytest.mark.engine
def test_a_policy_that_does_not_fit_the_model_is_found_before_vllm_starts(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    put_random_direction(tmp_path, tiny_checkpoint)
    folder = tmp_path / "policies"
    write_policy(folder, "far").write_text(
        write_policy(folder, "far").read_text().replace("layers: all", 'layers: "2-9"')
    )
    write_policy(folder, "missing").write_text(
        write_policy(folder, "missing").read_text().replace("north@1", "south@1")
    )
    done = run(tmp_path, "serve", str(tiny_checkpoint), f"--policies={folder}")
    assert done.returncode == 2
    assert "E_LAYER_RANGE" in done.stderr
    assert "E_ARTEFACT_UNKNOWN" in done.stderr
    assert "EngineCore" not in done.stdout + done.stderr


@pytest.mark.engine
def test_speculative_decoding_is_refused_with_its_code(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    put_random_direction(tmp_path, tiny_checkpoint)
    folder = tmp_path / "policies"
    write_policy(folder, "guard")
    speculation = '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}'
    done = run(
        tmp_path,
        "serve",
        str(tiny_checkpoint),
        f"--policies={folder}",
        "--dtype=float32",
        "--enforce-eager",
        f"--port={free_port()}",
        f"--speculative-config={speculation}",
    )
    assert done.returncode != 0
    assert "E_ENGINE_MODE" in last_line(done), done.stderr[-2000:]
    assert "--speculative-config cannot be combined with steering" in last_line(done)
    assert "Application startup complete" not in done.stdout + done.stderr


def test_a_probe_that_is_not_there_or_no_probe_is_refused_before_vllm_is_loaded(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    put_random_direction(tmp_path, tiny_checkpoint)
    for reference, code in (
        ("mood@1", "E_ARTEFACT_UNKNOWN"),
        ("north@1", "E_ARTEFACT_KIND"),
        ("no such name", "E_ARTEFACT_NAME"),
    ):
        started = time.monotonic()
        done = run(tmp_path, "serve", str(tiny_checkpoint), "--probe", reference)
        assert time.monotonic() - started < 20
        assert done.returncode == 2
        assert f"{code} at --probe" in done.stderr, done.stderr


@pytest.mark.engine
@pytest.mark.parametrize(
    ("change", "arguments", "said"),
    [
        ({"hidden_size": 72}, [], "E_PROBE_MODEL at --probe: mood@1 was made on another model"),
        ({"tokenizer_sha256": "0" * 64}, [], "E_PROBE_MODEL at --probe"),
        ({}, ["--steering-sites=heads"], "E_SITES at --steering-sites"),
    ],
)
def test_a_probe_that_does_not_fit_is_refused_with_what_does_not(
    tmp_path: Path,
    tiny_checkpoint: Path,
    change: dict[str, object],
    arguments: list[str],
    said: str,
) -> None:
    put_random_probe(tmp_path, tiny_checkpoint, "mood", layer=None, outputs=["only"], **change)
    done = run(tmp_path, "serve", str(tiny_checkpoint), "--probe=mood@1", *arguments)
    assert done.returncode == 2
    assert said in done.stderr, done.stderr


def test_weights_that_are_not_finite_are_no_probe(tmp_path: Path, tiny_checkpoint: Path) -> None:
    put_random_probe(tmp_path, tiny_checkpoint, "mood")
    (tensors,) = (tmp_path / "artefacts").glob("*/tensors.safetensors")
    data = bytearray(tensors.read_bytes())
    data[-4:] = np.array([np.nan], dtype="<f4").tobytes()
    tensors.chmod(0o644)
    tensors.write_bytes(data)
    done = run(tmp_path, "serve", str(tiny_checkpoint), "--probe=mood@1")
    assert done.returncode == 2
    assert "at --probe" in done.stderr
    assert "E_ARTEFACT_" in done.stderr
