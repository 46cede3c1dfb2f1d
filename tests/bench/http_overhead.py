"""What the HTTP layer costs on top: streams from a plain vLLM server and from a Trimtab server, interleaved.

Both serve the same checkpoint eagerly. In every round each gets the same streamed requests, plain and, on the
second server, under a policy on all layers; times are divided by the plain server's of the same round.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from tests.server.served import ENGINE_FLAGS, environment, free_port, serve

PLAIN_SERVER = """
import sys
from server.vllm_command import parse, run
run(parse(sys.argv[1:]))
"""


@contextmanager
def plain_server(model: Path, home: Path) -> Iterator[str]:
    """vLLM's own server, without the plug-in."""
    port = free_port()
    env = environment(home, VLLM_PLUGINS="", VLLM_WORKER_MULTIPROC_METHOD="spawn")
    arguments = [str(model), *ENGINE_FLAGS, "--served-model-name=model", f"--port={port}"]
    with (home / "plain.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", PLAIN_SERVER, *arguments, "--host=127.0.0.1"],
            env=env,
            stdout=log,
            stderr=log,
            process_group=0,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise RuntimeError((home / "plain.log").read_text()[-4000:])
            try:
                if httpx.get(f"{url}/health", verify=False).is_success:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        yield url
    finally:
        os.killpg(process.pid, 15)
        process.wait(60)


def stream(url: str, model: str, tokens: int) -> float:
    """Seconds to the first byte of one streamed answer; returns when it is complete."""
    body = {
        "model": model,
        "prompt": list(range(100, 132)),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    began = time.perf_counter()
    first = 0.0
    with (
        httpx.Client(base_url=url, timeout=300, verify=False) as client,
        client.stream("POST", "/v1/completions", json=body) as answer,
    ):
        assert answer.status_code == 200
        for part in answer.iter_bytes():
            first = first or time.perf_counter() - began
            assert part
    return first


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args()
    from tests.server.served import put_random_direction, write_policy

    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        put_random_direction(home, options.model)
        write_policy(home / "policies", "all", strength=0.01)
        with (
            plain_server(options.model, home) as plain,
            serve(
                options.model,
                home,
                [f"--policies={home / 'policies'}"],
                log=home / "serve.log",
                model="model",
            ) as steered,
        ):
            work = {
                "plain": (plain, "model"),
                "idle": (steered.url, "model"),
                "all layers": (steered.url, "model@all"),
            }
            totals: dict[tuple[int, str], list[float]] = defaultdict(list)
            firsts: dict[tuple[int, str], list[float]] = defaultdict(list)
            for round_number in range(options.rounds + 1):
                for concurrency in (1, 16):
                    for case in random.sample(list(work), len(work)):
                        url, model = work[case]
                        began = time.perf_counter()
                        with ThreadPoolExecutor(concurrency) as pool:
                            calls = [
                                pool.submit(stream, url, model, options.tokens)
                                for _ in range(concurrency)
                            ]
                            waits = [call.result() for call in calls]
                        if round_number:  # the first round warms up
                            totals[concurrency, case].append(time.perf_counter() - began)
                            firsts[concurrency, case].append(statistics.median(waits))
    table = Table(title="Over HTTP, streamed: shares of the plain server's (median, least to most)")
    for column in ("case", "requests", "tokens per second", "time to first byte"):
        table.add_column(column)
    for concurrency, case in totals:
        if case == "plain":
            continue
        cells = []
        for series, invert in ((totals, True), (firsts, False)):
            plain_series = series[concurrency, "plain"]
            ratios = sorted(
                (p / s if invert else s / p)
                for p, s in zip(plain_series, series[concurrency, case], strict=True)
            )
            middle = statistics.median(ratios)
            cells.append(f"{middle:.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})")
        table.add_row(case, str(concurrency), *cells)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
