"""A real server for tests: the command a user types, a real checkpoint, real policies."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np

from directions.card import CardDraft, ProbeDraft
from directions.fingerprint import fingerprint
from directions.store import Store

TRIMTAB = str(Path(sys.executable).with_name("trimtab"))

# What makes a server small and exact enough to test: float32, no compilation, little memory.
ENGINE_FLAGS = (
    "--dtype=float32",
    "--enforce-eager",
    "--max-model-len=512",
    "--max-num-seqs=16",
)


def put_random_direction(home: Path, checkpoint: Path, name: str = "north", seed: int = 7) -> None:
    """Store a direction of random unit vectors, one for every layer of the checkpoint."""
    model = fingerprint(checkpoint)
    shape = (model.num_layers, model.hidden_size)
    vectors = np.random.default_rng(seed).normal(size=shape)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    card = CardDraft(
        method="test",
        description="random unit vectors",
        model=model,
        activation_norms=(1.0,) * model.num_layers,
        dtype="float32",
        created="2026-01-01T00:00:00Z",
    )
    Store(home).put(card, vectors, [True] * model.num_layers, name=name)


def put_random_probe(
    home: Path,
    checkpoint: Path,
    name: str = "judge",
    *,
    layer: int | None = 1,
    outputs: Sequence[str] = ("first", "second"),
    calibration: Mapping[str, float] | None = None,
    seed: int = 3,
    **model: object,
) -> None:
    """Store a probe of random weights, whose scores of a random model lie on both sides of a half.

    Args:
        layer: after which it reads; ``None`` for the final norm.
        model: changes of the fingerprint of the model that it was made on.
    """
    made_on = fingerprint(checkpoint).model_copy(update=model)
    draft = ProbeDraft(
        method="random",
        model=made_on,
        dtype="float32",
        created="2026-01-01T00:00:00Z",
        site="final_norm" if layer is None else "residual",
        layer=layer,
        read_out="affine",
        calibration=dict(calibration or {}),
        outputs=tuple(outputs),
    )
    shape = (len(outputs), made_on.hidden_size)
    weights = np.random.default_rng(seed).standard_normal(shape) * 0.3
    Store(home).put_probe(draft, weights, [0.0] * len(outputs), name=name)


def write_policy(folder: Path, name: str, *, strength: float = 8.0, keys: str = "") -> Path:
    """Write a policy that adds the stored direction at all layers."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(
        f"apiVersion: trimtab/v1\nkind: Policy\nname: {name}\n{keys}"
        f"edits:\n  turn:\n    add: {{direction: north@1, layers: all, strength: {strength}}}\n"
    )
    return path


def environment(home: Path, **more: str) -> dict[str, str]:
    """The environment of a test's server."""
    # Not what engines in the test's own process are given.
    own = ("TRIMTAB_", "VLLM_")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(own)}
    return {
        **inherited,
        "TRIMTAB_HOME": str(home),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "NO_COLOR": "1",
        "COLUMNS": "200",
        **more,
    }


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Served:
    """A running server.

    Attributes:
        url: its root.
        model: the model's served name.
        log: everything that it printed.
    """

    url: str
    model: str
    log: Path
    process: subprocess.Popen[bytes]

    def client(self, **keys: object) -> httpx.Client:
        # Without TLS there is nothing to verify, and loading certificates takes its time.
        return httpx.Client(base_url=self.url, timeout=60, verify=False, **keys)  # type: ignore[arg-type]

    def metrics(self) -> dict[str, float]:
        """The samples of ``/metrics`` by name and labels, as they are written there."""
        with self.client() as client:
            text = client.get("/metrics").text
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


@contextmanager
def serve(
    checkpoint: Path,
    home: Path,
    arguments: Sequence[str],
    *,
    log: Path,
    model: str = "tiny",
    env: Mapping[str, str] | None = None,
    ready_within: float = 240.0,
) -> Iterator[Served]:
    """Run ``trimtab serve`` until the block ends.

    Raises:
        RuntimeError: the server ended, or was not ready in time; with the end of its log.
    """
    port = free_port()
    command = [
        TRIMTAB,
        "serve",
        str(checkpoint),
        *ENGINE_FLAGS,
        f"--served-model-name={model}",
        f"--port={port}",
        *arguments,
    ]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment(home, **(env or {})),
            # A group of its own, to be able to end all of it; not a session of its own, to which
            # the kernel would give as much of the processor as to all tests together.
            process_group=0,
        )
    served = Served(f"http://127.0.0.1:{port}", model, log, process)
    try:
        _wait_until_ready(served, ready_within)
        yield served
    finally:
        _end(process)


def _wait_until_ready(served: Served, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if served.process.poll() is not None:
            break
        try:
            if httpx.get(f"{served.url}/health", timeout=2, verify=False).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.25)
    tail = served.log.read_text(errors="replace")[-4000:]
    raise RuntimeError(f"the server is not ready (exit {served.process.poll()}):\n{tail}")


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            # The whole group, which holds the processes that vLLM started.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
