"""``trimtab serve`` on several ranks, several engines and several API processes."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import psutil
import pytest

from steering.engine.gate_report import GateReport
from tests.conftest import build_tiny_checkpoint
from tests.server.served import Served, serve
from tests.steering.engine.harness import (
    TOLERANCE,
    Answer,
    Request,
    World,
    assert_parity,
    build_world,
    every_kind,
    standard_policies,
)
from tests.steering.engine.parallel_batch import batch, parallel_policies

pytestmark = pytest.mark.engine

# Enough that an answer takes a while, and can be met while it runs.
LAYERS = 8
# The identity, and for each of the two processes as many as the policies that differ by phase take.
SLOTS = 5
# Kinds of edit and a gate, each in few slots.
SERVED = ("one", "every", "every-phase", "several", "generation", "split", "heads", "late-gate")
# At the final norm, which every last pipeline stage has.
PROBE = "top@1"
TRACED = json.dumps({"mode": "DYNAMO_TRACE_ONCE", "backend": "eager"})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("parallel")
    checkpoint = build_tiny_checkpoint(folder / "deep-llama", num_layers=LAYERS)
    world = build_world(checkpoint, folder / "home", ("t", "e"))
    standard_policies(world)
    every_kind(world)
    parallel_policies(world)
    (world.store.root / "policies").mkdir()
    for name in SERVED:
        path = world.store.root / "policies" / f"{name}.yaml"
        path.write_bytes(world.policies[name].canonical)
    return world


@contextlib.contextmanager
def start(world: World, name: str, *arguments: str) -> Iterator[Served]:
    home = world.store.root
    with serve(
        world.path,
        home,
        [
            f"--policies={home / 'policies'}",
            "--relative-ceiling=10",
            f"--probe={PROBE}",
            *arguments,
        ],
        log=home / f"{name}.log",
        # For the route that asks the workers.
        env={"VLLM_SERVER_DEV_MODE": "1"},
        # Up to seven processes import vLLM at once.
        ready_within=480,
    ) as server:
        yield server


@pytest.fixture(scope="module")
def engines(world: World) -> Iterator[Served]:
    """Two engines behind two API processes, each of which sends to both."""
    flags = ("--data-parallel-size=2", "--api-server-count=2", f"--slots={SLOTS}")
    with start(world, "engines", *flags) as served:
        yield served


class Connection:
    """A client that stays with one of the server's API processes.

    Attributes:
        process: the id of the process that holds the other end.
    """

    def __init__(self, served: Served, client: httpx.Client) -> None:
        self._client = client
        self._port = _port(client.get("/v1/steering/status"))
        (self.process,) = (
            process.pid
            for process in psutil.Process(served.process.pid).children(recursive=True)
            for end in process.net_connections("tcp")
            if end.raddr and end.raddr.port == self._port
        )

    def post(self, body: dict[str, Any], **headers: str) -> httpx.Response:
        answer = self._client.post("/v1/completions", json=body, headers=headers)
        assert _port(answer) == self._port, "another connection, and maybe another process"
        return answer

    @contextlib.contextmanager
    def stream(self, body: dict[str, Any], **headers: str) -> Iterator[httpx.Response]:
        body = {**body, "stream": True}
        with self._client.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
            assert _port(answer) == self._port, "another connection, and maybe another process"
            yield answer


def _port(answer: httpx.Response) -> int:
    return int(answer.extensions["network_stream"].get_extra_info("client_addr")[1])


@contextlib.contextmanager
def connection(served: Served, process: int) -> Iterator[Connection]:
    """A connection to one API process: the kernel chooses, so it is asked until it chooses right."""
    for _ in range(60):
        with served.client() as client:
            found = Connection(served, client)
            if found.process == process:
                yield found
                return
    raise AssertionError(f"no connection reached process {process}")


@pytest.fixture(scope="module")
def processes(engines: Served) -> list[int]:
    """The ids of the API processes, as connections find them."""
    found: set[int] = set()
    for _ in range(60):
        with engines.client() as client:
            found.add(Connection(engines, client).process)
        if len(found) == 2:
            return sorted(found)
    raise AssertionError(f"all connections reached process {found}")


def body(request: Request) -> dict[str, Any]:
    return {
        "model": "tiny" if request.policy is None else f"tiny@{request.policy}",
        "prompt": list(request.prompt),
        "max_tokens": request.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 1,
        "return_token_ids": True,
        "steering": {"trace": True},
    }


def ask(post: Callable[..., httpx.Response], request: Request, **headers: str) -> Answer:
    answer = post(body(request), **headers)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    assert choice["steering"]["applied"] is (request.policy is not None)
    return Answer(
        request,
        tuple(choice["token_ids"]),
        tuple(choice["logprobs"]["token_logprobs"]),
        choice["text"],
        choice["finish_reason"],
        0,
        tuple(
            GateReport(name, **gate) for name, gate in choice["steering"].get("gates", {}).items()
        ),
        {key: told["trace"] for key, told in choice["steering"]["probes"].items()},
    )


def workers(served: Served) -> list[dict[str, Any]]:
    """What the workers of the first engine say."""
    with served.client() as client:
        answer = client.post("/collective_rpc", json={"method": "trimtab_status"})
    return list(answer.json()["results"])


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def slots(state: str) -> str:
    return f'trimtab_slots{{model_name="tiny",state="{state}"}}'


def test_ranks_of_stages_and_slices_agree_with_the_reference(world: World) -> None:
    """Two pipeline stages of two tensor-parallel ranks each; four processes that go before others come."""
    flags = ("--tensor-parallel-size=2", "--pipeline-parallel-size=2")
    # Eager stages are what vLLM cannot run on CPU.
    traced = ("--no-enforce-eager", f"--compilation-config={TRACED}")
    with start(world, "ranks", *flags, *traced) as ranks, ranks.client() as client:
        proof = client.get("/v1/steering/status").json()["proof"]

        def post(body: dict[str, Any]) -> httpx.Response:
            return client.post("/v1/completions", json=body)

        answers = [ask(post, request) for request in batch(world, (None, *SERVED))]
        found = workers(ranks)
    assert (proof["engines"], proof["layers"]) == (1, list(range(LAYERS)))
    half = LAYERS // 2
    first, second = list(range(half)), list(range(half, LAYERS))
    assert [worker["hooked"]["add"] for worker in found] == [first, first, second, second]
    for worker in found:
        assert {world.plans[name].id for name in SERVED} <= set(worker["plans"])
    parity = assert_parity(world, answers, "served, 2 stages of 2 ranks")
    assert parity.scores_read == 2 * 32 * len(answers)


def test_every_engine_behind_every_process_agrees_with_the_reference(
    engines: Served, processes: list[int], world: World
) -> None:
    met: dict[tuple[int, int], list[Answer]] = {}
    for process in processes:
        with connection(engines, process) as client:
            for number in range(2):
                header = {"X-data-parallel-rank": str(number)}
                answers = [
                    ask(client.post, request, **header) for request in batch(world, (None, *SERVED))
                ]
                met[process, number] = answers
    first = met[processes[0], 0]
    parity = assert_parity(world, first, "served, 2 engines, 2 processes")
    assert parity.scores_read == 2 * 32 * len(first)
    # What every process observed of every engine adds up, whichever of them is asked.
    counted = {
        (engine, output): sum(
            value
            for sample, value in engines.metrics().items()
            if sample.startswith("trimtab_probe_tokens_total{")
            and f'engine="{engine}"' in sample
            and f'probe="top/{output}"' in sample
        )
        for engine in (0, 1)
        for output in ("first", "second")
    }
    assert set(counted.values()) == {31.0 * 2 * len(first)}
    assert len(met) == 4
    for answers in met.values():
        assert [a.token_ids for a in answers] == [a.token_ids for a in first]
        for answer, other in zip(answers, first, strict=True):
            assert answer.logprobs == pytest.approx(other.logprobs, abs=TOLERANCE)


def test_each_process_proves_every_engine(engines: Served) -> None:
    said = re.findall(
        r"\(ApiServer_(\d) [^\n]*steering works: (\d+) layers act on (\d) engines",
        engines.log.read_text(errors="replace"),
    )
    assert sorted(said) == [("0", str(LAYERS), "2"), ("1", str(LAYERS), "2")]
    with engines.client() as client:
        assert client.get("/v1/steering/status").json()["proof"]["engines"] == 2


def test_shares_of_the_slots_hold_where_two_processes_meet_on_one_engine(
    engines: Served, processes: list[int], world: World
) -> None:
    prompt = batch(world, (None, *SERVED))[0].prompt[:8]
    here = {"X-data-parallel-rank": "0"}
    there = {"X-data-parallel-rank": "1"}

    def long(policy: str) -> dict[str, Any]:
        return body(Request(prompt, policy, max_tokens=480))

    def short(policy: str | None) -> dict[str, Any]:
        return body(Request(prompt, policy, max_tokens=2))

    with contextlib.ExitStack() as stack:
        streamers = [stack.enter_context(connection(engines, n)) for n in processes]
        askers = [stack.enter_context(connection(engines, n)) for n in processes]
        # Each takes both slots of its process, on the same engine.
        for streamer, policy in zip(streamers, ("every-phase", "split"), strict=True):
            stream = stack.enter_context(streamer.stream(long(policy), **here))
            assert stream.headers["x-trimtab-applied"] == "enforce"
        (worker,) = workers(engines)
        refused = [
            asker.post(short("every"), **where) for asker in askers for where in (here, there)
        ]
        shared = [
            asker.post(short(policy), **there)
            for asker, policy in zip(askers, ("every-phase", "split"), strict=True)
        ]
        plain = [asker.post(short(None), **here) for asker in askers]
        (still,) = workers(engines)
    assert worker["pinned_slots"] == still["pinned_slots"] == SLOTS - 1
    assert [answer.status_code for answer in refused] == [429] * 4
    assert {answer.json()["error"]["code"] for answer in refused} == {"E_SLOTS_EXHAUSTED"}
    for answer in shared:
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["steering"]["applied"] is True
    assert [answer.status_code for answer in plain] == [200, 200]
    wait_for(lambda: engines.metrics()[slots("free")] == SLOTS - 1)
    assert engines.metrics()[slots("in_use")] == 0
    # A step without work is what tells a worker that the last request is gone.
    with connection(engines, processes[0]) as client:
        assert client.post(short(None), **here).status_code == 200
    assert workers(engines)[0]["pinned_slots"] == 0
