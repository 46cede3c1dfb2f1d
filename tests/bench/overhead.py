"""What steering costs, against unmodified vLLM: ``make bench``.

Three engines run side by side in processes of their own: plain vLLM twice, and steered. In every round each
of them does the same work once, in random order and one at a time, and each time is divided by the mean of
the two plain engines' times of the same round: where a process lies in memory makes one engine faster than
its twin for as long as it runs. The second plain engine is the control as well: what it differs from that
mean by is what this machine does to a ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tests.bench.engine_process import CASES

TARGETS = {
    "idle": 0.99,
    "one layer": 0.98,
    "all layers": 0.97,
    "all layers, a policy each": 0.97,
    "all layers, 8 heads, 2 probes": 0.96,
    "2 probes read": 0.985,
}
CONTROL = "plain again"
# With many requests, what a policy each costs is measured against one policy for all.
MANY = 64
ONE, EACH, EACH_TARGET = "all layers", "all layers, a policy each", 0.95


@dataclass
class Engine:
    """One engine process."""

    process: subprocess.Popen[str]
    facts: dict[str, float]

    @classmethod
    def start(cls, model: Path, store: Path, mode: str, concurrency: int, steered: bool) -> Engine:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("TRIMTAB_")}
        environment |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_USE_V2_MODEL_RUNNER": "0",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TRIMTAB_SLOTS": "128",
        }
        if steered:
            environment["TRIMTAB_ENGINE"] = "1"
        arguments = [str(model), str(store), mode, str(concurrency)]
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.engine_process", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        engine = cls(process, {})
        engine.facts = engine._read("READY ")
        return engine

    def run(self, case: str, concurrency: int, tokens: int) -> float:
        assert self.process.stdin is not None
        command = {"case": case, "concurrency": concurrency, "tokens": tokens}
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return float(self._read("TOOK "))

    def _read(self, mark: str) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(mark):
                return json.loads(line.removeprefix(mark))
        raise RuntimeError(f"an engine process ended with {self.process.wait()}")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def measure(
    model: Path, mode: str, concurrencies: list[int], rounds: int, tokens: int
) -> dict[str, Any]:
    """Times of every case, by concurrency and round."""
    times: dict[int, list[dict[str, float]]] = defaultdict(list)
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress(console=Console(stderr=True)) as progress,
    ):
        engines = {}
        task = progress.add_task(f"{mode}: starting engines", total=3)
        for name, steered in (("plain", False), (CONTROL, False), ("steered", True)):
            engines[name] = Engine.start(model, Path(folder), mode, max(concurrencies), steered)
            progress.advance(task)
        work = [("plain", "idle"), (CONTROL, "idle"), *[("steered", case) for case in CASES]]
        task = progress.add_task(
            f"{mode}: measuring", total=rounds * len(concurrencies) * len(work)
        )
        for _ in range(rounds):
            for concurrency in concurrencies:
                took = {}
                for name, case in random.sample(work, len(work)):
                    label = case if name == "steered" else name
                    took[label] = engines[name].run(case, concurrency, tokens)
                    progress.advance(task)
                times[concurrency].append(took)
        facts = {name: engine.facts for name, engine in engines.items()}
        for engine in engines.values():
            engine.stop()
    return {"mode": mode, "tokens": tokens, "times": times, "facts": facts}


def report(results: list[dict[str, Any]], console: Console) -> bool:
    """Print the table of throughput ratios; returns whether every target is met."""
    table = Table(title="Tokens per second, as a share of plain vLLM's (median, least to most)")
    for column in ("case", "mode", "requests", "plain tok/s", "ratio", "range", "target"):
        table.add_column(column)
    met = True
    for result in results:
        for concurrency, rounds in result["times"].items():
            plain = statistics.median(r["plain"] for r in rounds)
            speed = concurrency * result["tokens"] / plain
            for case in (CONTROL, *CASES):
                ratios = sorted((r["plain"] + r[CONTROL]) / 2 / r[case] for r in rounds)
                median = statistics.median(ratios)
                target = TARGETS.get(case)
                met = met and (target is None or median >= target)
                table.add_row(
                    case,
                    result["mode"],
                    str(concurrency),
                    f"{speed:.1f}",
                    f"{median:.3f}",
                    f"{ratios[0]:.3f} to {ratios[-1]:.3f}",
                    "" if target is None else f"{target} {'met' if median >= target else 'missed'}",
                )
            if int(concurrency) >= MANY:
                ratios = sorted(r[ONE] / r[EACH] for r in rounds)
                median = statistics.median(ratios)
                met = met and median >= EACH_TARGET
                table.add_row(
                    f"{concurrency} policies, against one",
                    result["mode"],
                    str(concurrency),
                    "",
                    f"{median:.3f}",
                    f"{ratios[0]:.3f} to {ratios[-1]:.3f}",
                    f"{EACH_TARGET} {'met' if median >= EACH_TARGET else 'missed'}",
                )
    console.print(table)
    for result in results:
        plain, steered = result["facts"]["plain"], result["facts"]["steered"]
        again = result["facts"][CONTROL]
        console.print(
            f"{result['mode']}: start {steered['start']:.1f} s (plain {plain['start']:.1f} and "
            f"{again['start']:.1f} s), memory {steered['memory'] / 2**20:.0f} MiB (plain "
            f"{plain['memory'] / 2**20:.0f} and {again['memory'] / 2**20:.0f} MiB)"
        )
    return met


def main() -> None:
    """Measure and print; ``--json`` keeps the raw times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--modes", default="eager,compiled")
    parser.add_argument("--concurrency", default=f"1,16,{MANY}")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    concurrencies = [int(n) for n in options.concurrency.split(",")]
    results = [
        measure(options.model, mode, concurrencies, options.rounds, options.tokens)
        for mode in options.modes.split(",")
    ]
    if options.json:
        options.json.write_text(json.dumps(results))
    met = report(results, Console(width=120))
    print("every target met" if met else "a target was missed; see the table")


if __name__ == "__main__":
    main()
