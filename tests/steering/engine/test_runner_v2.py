"""Model Runner V2 steers like V1 does; see :mod:`tests.steering.engine.interpreted_triton`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.steering.engine.harness import LEAST_FLOOR, TOLERANCE

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def served(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one starved V2 engine said and did; in a process of its own, since Triton is changed."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.steering.engine.v2_engine",
            str(tiny_checkpoint),
            str(tmp_path_factory.mktemp("v2-store")),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    result: dict[str, Any] = json.loads(lines[0].removeprefix("RESULT "))
    # An engine request's id starts with its number in the batch.
    result["policy_of"] = {
        request_id: result["policies"][int(request_id.partition("-")[0])]
        for request_id in result["watch"]["texts"]
        if int(request_id.partition("-")[0]) < len(result["policies"])
    }
    return result


def test_it_is_model_runner_v2_and_requests_were_split_and_preempted(served) -> None:
    assert "vllm.v1.worker.gpu.model_runner" in served["runner"]
    assert "vllm.v1.worker.gpu_model_runner" not in served["runner"]
    watch = served["watch"]
    preempted = Counter(watch["preempted"])
    print(
        f"\n{len(served['answers'])} requests in {served['seconds']:.0f} s, "
        f"{preempted.total()} preemptions of {len(preempted)}, {len(set(watch['split']))} split"
    )
    assert sum(1 for r in preempted if served["policy_of"][r] is not None) >= 2
    assert set(watch["split"]) >= set(served["policy_of"])
    assert any(served["policy_of"][r] is not None for r in watch["resumed"])
    entries = Counter(watch["entered"])
    assert all(entries[r] == 1 + preempted[r] for r in served["policy_of"])


def test_it_agrees_with_the_reference(served) -> None:
    lines = "  ".join(f"{case}: {value:.1e}" for case, value in sorted(served["by_case"].items()))
    print(f"\nfloor {served['floor']:.2e}, smallest effect {served['effect']:.2g} nats; {lines}")
    assert {"one", "everything", "rows", "phases", "gate-token", "gate-think"} <= set(
        served["policies"]
    )
    assert {"thinking", "think_end", "answer"} <= set(served["phases"])
    assert len(set(served["fired"])) == 2, "all gates came to the same"
    assert served["effect"] > 100 * TOLERANCE
    assert served["floor"] <= TOLERANCE
    assert served["worst"] <= min(TOLERANCE, 2 * max(served["floor"], LEAST_FLOOR))
    assert served["scores_read"] > 1000
    assert served["scores"] <= TOLERANCE
    assert served["scores_spread"] > 100 * TOLERANCE


def test_a_request_leaves_when_it_is_finished_and_not_when_it_is_preempted(served) -> None:
    watch = served["watch"]
    assert watch["preempted"]
    assert Counter(r for r in watch["left"] if r in served["policy_of"]) == Counter(
        list(served["policy_of"])
    )
    assert served["pinned"] == 0


def test_the_scheduler_is_told_of_every_steered_request_once(served) -> None:
    steered = [r for r, policy in served["policy_of"].items() if policy is not None]
    reported = Counter(served["watch"]["reported"])
    assert reported == Counter(steered)


def test_each_batch_says_what_the_model_reads(served) -> None:
    watch = served["watch"]
    assert watch["wrong"] == []
    for request_id in served["policy_of"]:
        number = int(request_id.partition("-")[0])
        prompt, answer = served["prompts"][number], served["answers"][number]
        read = {int(position): token for position, token in watch["texts"][request_id].items()}
        # The last token that is sampled is never read.
        text = [*prompt, *answer[:-1]]
        assert set(read) <= set(range(len(text)))
        assert set(read) >= set(range(len(prompt), len(text)))
        assert all(text[position] == token for position, token in read.items())
        assert watch["prompt_lengths"][request_id] == [len(prompt)]


def test_a_dummy_run_is_plain(served) -> None:
    assert served["dummy_cleared"] == 1
