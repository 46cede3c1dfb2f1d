"""Compiled engines steer, and compiled code that does not steer is never loaded into a steered one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from steering.engine import identity
from steering.engine.gate_report import GateReport
from tests.conftest import build_tiny_checkpoint
from tests.steering.engine.harness import (
    Answer,
    Request,
    assert_parity,
    build_world,
    every_kind,
    standard_policies,
)

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[3]


class Starts:
    """Compiled engines that share one compile cache, each in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.cache = folder / "cache"
        self.model = build_tiny_checkpoint(folder / "tiny", num_layers=4)
        self.world = build_world(self.model, folder / "store", ("t", "e"))
        standard_policies(self.world)
        every_kind(self.world)
        self.prompt = tuple(self.world.prompt("Which way does the wind blow today?"))

    def start(self, mode: str) -> tuple[dict, list[Answer]]:
        environment = {**os.environ, "VLLM_CACHE_ROOT": str(self.cache), "OMP_NUM_THREADS": "1"}
        if mode == "plain":
            del environment["TRIMTAB_ENGINE"]
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "tests.steering.engine.compiled_engine",
                str(self.model),
                mode,
                str(self.world.store.root),
            ],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=400,
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        assert lines, done.stdout[-2000:] + done.stderr[-4000:]
        result = json.loads(lines[0].removeprefix("RESULT "))
        answers = [
            Answer(
                Request(tuple(prompt), policy, strength),
                tuple(ids),
                tuple(lp),
                "",
                None,
                0,
                tuple(GateReport(**gate) for gate in gates),
                scores,
            )
            for prompt, policy, strength, ids, lp, gates, scores in result["answers"]
        ]
        return result, answers


@pytest.fixture(scope="module")
def starts(tmp_path_factory) -> Starts:
    return Starts(tmp_path_factory.mktemp("compiled"))


def test_the_compile_cache_tells_plain_and_steered_code_apart(starts: Starts) -> None:
    plain, plain_answers = starts.start("plain")
    assert plain["mode"] not in ("0", "CompilationMode.NONE", "NONE")
    assert plain["loaded"] == 0

    # What the identity is for: without it, plain code is loaded and every edit is silently gone.
    stale, stale_answers = starts.start("steered-without-identity")
    assert stale["key"] == plain["key"]
    assert stale["loaded"] > 0
    first = plain_answers[0]
    same = [a for a in stale_answers if a.request.prompt == first.request.prompt]
    assert len(same) > 10
    assert {a.token_ids for a in same} == {first.token_ids}

    steered, answers = starts.start("steered")
    assert steered["key"] != plain["key"]
    assert steered["loaded"] == 0
    parity = assert_parity(starts.world, answers, "compiled, cold cache")
    assert parity.scores_read > 1000
    # Slot 0 and strength 0 are plain vLLM to the bit, in compiled code too.
    for answer in (answers[0], answers[-1]):
        assert answer.logprobs == plain_answers[0].logprobs

    again, answers = starts.start("steered")
    assert again["key"] == steered["key"]
    assert again["loaded"] > 0
    parity = assert_parity(starts.world, answers, "compiled, loaded from the cache")
    assert parity.scores_read > 1000


@pytest.fixture
def config_hash(tiny_checkpoint):
    """The hash of an engine's configuration, as vLLM puts it into the compile cache's key."""
    from vllm.engine.arg_utils import EngineArgs

    from steering.engine import plugin

    plugin.register()

    def compute(steered: bool = True) -> str:
        args = EngineArgs(model=str(tiny_checkpoint), dtype="float32", max_model_len=128)
        create = EngineArgs.create_engine_config
        config = create(args) if steered else create.__wrapped__(args)
        return config.compute_hash()

    return compute


def test_the_key_holds_the_plug_in_its_operators_its_sites_and_its_sizes(
    config_hash, monkeypatch, tmp_path
) -> None:
    plain, steered = config_hash(steered=False), config_hash()
    assert plain == config_hash(steered=False)
    assert steered == config_hash()
    hashes = {"plain": plain, "steered": steered}
    with monkeypatch.context() as patch:
        patch.setenv("TRIMTAB_LAYERS", "1,2")
        hashes["other sites"] = config_hash()
    with monkeypatch.context() as patch:
        patch.setenv("TRIMTAB_PROBE_LAYERS", "2")
        hashes["other probes"] = config_hash()
    with monkeypatch.context() as patch:
        patch.setenv("TRIMTAB_SLOTS", "7")
        hashes["other sizes"] = config_hash()
    with monkeypatch.context() as patch:
        changed = tmp_path / "residual_add.py"
        source = Path(identity.__file__).parents[1] / "ops" / "residual_add.py"
        changed.write_text(source.read_text() + "\n# one more line\n")
        patch.setattr(identity, "operator_sources", lambda: (changed,))
        first = config_hash()
        identity.digest_sources.cache_clear()
        changed.write_text(source.read_text() + "\n# another line\n")
        second = config_hash()
        hashes["other operator"], hashes["yet another operator"] = first, second
    assert len(set(hashes.values())) == len(hashes), hashes


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("kv_sharing_fast_prefill", True),
        (
            "speculative_config",
            {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2},
        ),
    ],
)
def test_a_mode_that_would_steer_wrongly_is_refused_with_its_name(
    tiny_checkpoint, config_hash, option, value
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from directions.errors import TrimtabError

    args = EngineArgs(
        model=str(tiny_checkpoint), dtype="float32", max_model_len=128, **{option: value}
    )
    with pytest.raises(TrimtabError) as caught:
        args.create_engine_config()
    assert caught.value.code == "E_ENGINE_MODE"
    assert caught.value.field in ("--kv-sharing-fast-prefill", "--speculative-config")
