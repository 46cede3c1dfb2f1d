"""What reading probes costs a client: ``make bench`` after the engines' own figures.

Three servers run side by side: plain vLLM twice, and ``trimtab serve`` with a probe of two outputs on all
traffic. In every round each answers the same streamed requests, in random order and one server at a time;
the times of a round are divided by the mean of the two plain servers'. The second plain server is the
control: what it differs from that mean by is what this machine does to a ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tests.bench.engine_process import plans_for

PLAIN, CONTROL, READ, TRACED = "plain", "plain again", "2 probes read", "2 probes read, traced"
# Tokens per second as a share of plain vLLM's at least, time to the first token at most.
LEAST_RATE = {READ: 0.985, TRACED: 0.97}
MOST_WAIT = {READ: 1.02}
FLAGS = (
    "--dtype=float32",
    "--max-model-len=512",
    "--max-num-seqs=16",
    "--no-enable-prefix-caching",
)


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str

    def ask(self, concurrency: int, tokens: int, traced: bool) -> tuple[list[float], float]:
        """The same streamed requests at once; seconds to each first token, and to the last of all."""

        def one(number: int) -> float:
            body: dict[str, Any] = {
                "model": "bench",
                "prompt": list(range(100 + number, 228 + number)),
                "max_tokens": tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
            }
            if traced:
                body["steering"] = {"trace": True}
            began = time.perf_counter()
            with client.stream("POST", "/v1/completions", json=body) as answer:
                answer.raise_for_status()
                lines = answer.iter_lines()
                next(lines)
                first = time.perf_counter() - began
                for _ in lines:
                    pass
            return first

        with (
            httpx.Client(base_url=self.url, timeout=120, verify=False) as client,
            ThreadPoolExecutor(concurrency) as pool,
        ):
            began = time.perf_counter()
            firsts = list(pool.map(one, range(concurrency)))
            return firsts, time.perf_counter() - began


@contextmanager
def serving(command: list[str], home: Path) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRIMTAB_", "VLLM_"))}
    environment |= {
        "TRIMTAB_HOME": str(home),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    process = subprocess.Popen(
        [*command, *FLAGS, f"--port={port}", "--served-model-name=bench"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        process_group=0,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 400
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} is not ready (exit {process.poll()})")
            try:
                if httpx.get(f"{url}/health", timeout=2, verify=False).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        yield Server(url)
    finally:
        process.terminate()
        process.wait(60)


def measure(
    model: Path, mode: str, concurrencies: list[int], rounds: int, tokens: int
) -> dict[int, list[dict[str, tuple[list[float], float]]]]:
    """By concurrency and round, what each way of asking took."""
    found: dict[int, list[dict[str, tuple[list[float], float]]]] = {n: [] for n in concurrencies}
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        plans_for(model, home, 1)  # puts the probe into the store
        eager = ["--enforce-eager"] if mode == "eager" else []
        plain = [sys.executable, "-m", "tests.bench.plain_server", str(model), *eager]
        trimtab = str(Path(sys.executable).with_name("trimtab"))
        steered = [
            trimtab,
            "serve",
            str(model),
            "--probe=bench-probe@1",
            "--host=127.0.0.1",
            *eager,
        ]
        servers = {
            PLAIN: stack.enter_context(serving(plain, home)),
            CONTROL: stack.enter_context(serving(plain, home)),
            READ: stack.enter_context(serving(steered, home)),
        }
        work = [
            (PLAIN, servers[PLAIN], False),
            (CONTROL, servers[CONTROL], False),
            (READ, servers[READ], False),
            (TRACED, servers[READ], True),
        ]
        progress = stack.enter_context(Progress(console=Console(stderr=True)))
        task = progress.add_task(f"http, {mode}", total=rounds * len(concurrencies) * len(work))
        for concurrency in concurrencies:
            for _, server, traced in work:
                server.ask(concurrency, 4, traced)
        for _ in range(rounds):
            for concurrency in concurrencies:
                took = {}
                for name, server, traced in random.sample(work, len(work)):
                    took[name] = server.ask(concurrency, tokens, traced)
                    progress.advance(task)
                found[concurrency].append(took)
    return found


def first(took: tuple[list[float], float]) -> float:
    """The median of the seconds to the first tokens."""
    return statistics.median(took[0])


def report(
    mode: str,
    found: dict[int, list[dict[str, tuple[list[float], float]]]],
    tokens: int,
    console: Console,
) -> None:
    """Print the medians of the rounds' ratios, with their spread."""
    table = Table(title="Through HTTP, streamed: against plain vLLM (median, least to most)")
    for column in ("case", "mode", "requests", "tokens/s", "target", "first token", "target"):
        table.add_column(column)
    for concurrency, rounds in found.items():
        for case in (CONTROL, READ, TRACED):
            rates = sorted((r[PLAIN][1] + r[CONTROL][1]) / 2 / r[case][1] for r in rounds)
            waits = sorted(
                2 * first(r[case]) / (first(r[PLAIN]) + first(r[CONTROL])) for r in rounds
            )
            rate, wait = statistics.median(rates), statistics.median(waits)
            least, most = LEAST_RATE.get(case), MOST_WAIT.get(case)
            table.add_row(
                case,
                mode,
                str(concurrency),
                f"{rate:.3f} ({rates[0]:.2f}–{rates[-1]:.2f})",
                "" if least is None else f"{least} {'met' if rate >= least else 'missed'}",
                f"{wait:.3f} ({waits[0]:.2f}–{waits[-1]:.2f})",
                "" if most is None else f"{most} {'met' if wait <= most else 'missed'}",
            )
        plain = [r[PLAIN] for r in rounds]
        console.print(
            f"{mode}, {concurrency} requests: plain vLLM "
            f"{concurrency * tokens / statistics.median(p[1] for p in plain):.0f} tokens/s, first token "
            f"after {1000 * statistics.median(statistics.median(p[0]) for p in plain):.0f} ms"
        )
    console.print(table)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--modes", default="eager")
    parser.add_argument("--concurrency", default="1,16")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    concurrencies = [int(n) for n in options.concurrency.split(",")]
    for mode in options.modes.split(","):
        found = measure(options.model, mode, concurrencies, options.rounds, options.tokens)
        if options.json:
            options.json.write_text(json.dumps(found))
        report(mode, found, options.tokens, Console(width=130))


if __name__ == "__main__":
    main()
