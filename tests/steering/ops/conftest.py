"""The kernels under Triton's interpreter, in one process for all tests that look at the result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def interpreted() -> dict[str, int]:
    """By kernel, in how many cases it equals its definition; fails where one does not."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.steering.ops.kernels"],
        cwd=Path(__file__).parents[3],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    counts: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return counts
