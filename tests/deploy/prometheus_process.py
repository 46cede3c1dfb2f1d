"""A real Prometheus for tests: it scrapes what a test serves, under our rules, and answers queries."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.deploy.queries import RULES


class QueryError(Exception):
    """Prometheus did not carry out a query; the message is its own."""


@dataclass
class Prometheus:
    """A running Prometheus."""

    client: httpx.Client

    def get(self, path: str, **parameters: str) -> Any:
        """The data of an answer of the HTTP API.

        Raises:
            QueryError: the answer is an error.
        """
        answer = self.client.get(f"/api/v1/{path}", params=parameters)
        document = answer.json()
        if document["status"] != "success":
            raise QueryError(f"{document['errorType']}: {document['error']}")
        return document["data"]

    def query(self, expr: str) -> list[tuple[dict[str, str], float]]:
        """The labels and the values that a query gives now."""
        data = self.get("query", query=expr)
        if data["resultType"] == "scalar":
            return [({}, float(data["result"][1]))]
        return [(entry["metric"], float(entry["value"][1])) for entry in data["result"]]

    def value(self, expr: str) -> float:
        """The value of a query that gives one sample."""
        ((_, value),) = self.query(expr)
        return value

    def wait_for_scrape(self, seconds: float = 60.0) -> None:
        """Wait until the target has been scraped anew.

        Raises:
            TimeoutError: that did not happen in time; with what Prometheus says of the target.
        """
        asked, deadline = time.time(), time.monotonic() + seconds
        while time.monotonic() < deadline:
            # A scrape's samples have the time of its beginning: one that began before may have
            # been answered before.
            if any(at > asked for _, at in self.query("timestamp(up)")) and self.value("up") == 1:
                return
            time.sleep(0.1)
        targets = self.get("targets", state="active")["activeTargets"]
        said = [(t["scrapeUrl"], t["health"], t["lastError"]) for t in targets]
        raise TimeoutError(f"not scraped within {seconds:.0f} s: {said}")


@contextmanager
def prometheus(program: str, folder: Path, target: str) -> Iterator[Prometheus]:
    """Run Prometheus with our rules, a scrape a second, until the block ends.

    Args:
        program: the path of prometheus.
        folder: an empty one, for its data.
        target: what is scraped, ``HOST:PORT``, as the job ``trimtab``.

    Raises:
        RuntimeError: it ended, or was not ready in time; with the end of its log.
    """
    configuration = folder / "prometheus.yml"
    scrape = {"job_name": "trimtab", "static_configs": [{"targets": [target]}]}
    document = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [scrape],
    }
    configuration.write_text(yaml.safe_dump(document))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "log"
    command = [
        program,
        f"--config.file={configuration}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--enable-feature=exemplar-storage",
        "--log.level=warn",
    ]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        # Without TLS there is nothing to verify, and loading certificates takes its time.
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", verify=False, timeout=30) as client:
            _wait_until_ready(process, client, log)
            yield Prometheus(client)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], client: httpx.Client, log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if client.get("/-/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    tail = log.read_text(errors="replace")[-2000:]
    raise RuntimeError(f"prometheus is not ready (exit {process.poll()}):\n{tail}")
