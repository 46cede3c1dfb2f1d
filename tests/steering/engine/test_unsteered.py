"""Requests that nothing edits get what vLLM without the plug-in gives them, to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from steering.engine.control import activate_local
from tests.steering.engine.harness import Request, engine, run

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def prompts(tiny_world) -> list[tuple[int, ...]]:
    return [tuple(tiny_world.prompt(f"Wave {n} came from the {n}th sea.")) for n in range(6)]


@pytest.fixture(scope="module")
def plain(tiny_world, prompts) -> list[list]:
    """Token ids and log-probabilities from a process in which the plug-in is not loaded."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRIMTAB_")}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.steering.engine.plain_engine",
            str(tiny_world.path),
            json.dumps(prompts),
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-4000:]
    config, answers = json.loads(lines[0].removeprefix("RESULT "))
    assert "trimtab" not in config
    return answers


@pytest.fixture(scope="module")
def llm(tiny_world):
    with engine(tiny_world.path, kv_cache_memory_bytes=64 * 2**20) as llm:
        activate_local(llm, tiny_world.plans.values(), tiny_world.store)
        yield llm


def answers(llm, world, requests) -> list[list]:
    llm.reset_prefix_cache()
    return [[list(a.token_ids), list(a.logprobs)] for a in run(llm, world, requests)]


def test_unsteered_requests(llm, tiny_world, prompts, plain) -> None:
    assert answers(llm, tiny_world, [Request(p, max_tokens=32) for p in prompts]) == plain


def test_requests_at_strength_0(llm, tiny_world, prompts, plain) -> None:
    requests = [Request(p, "several", 0.0, max_tokens=32) for p in prompts]
    assert answers(llm, tiny_world, requests) == plain


def test_unsteered_neighbours_of_steered_requests(llm, tiny_world, prompts, plain) -> None:
    requests = [
        Request(p, "several" if n % 2 else None, max_tokens=32) for n, p in enumerate(prompts)
    ]
    found = answers(llm, tiny_world, requests)
    assert found[::2] == plain[::2]
    assert all(mine[0] != theirs[0] for mine, theirs in zip(found[1::2], plain[1::2], strict=True))
