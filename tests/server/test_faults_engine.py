"""A real server whose engine fails to do what was promised: nobody gets a normal-looking answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.server.served import Served, put_random_direction, serve, write_policy

pytestmark = pytest.mark.engine

MESSAGES = [{"role": "user", "content": "Which way does the ship turn?"}]
APIS = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 8},
    "/v1/completions": {"prompt": "Which way?", "max_tokens": 8},
    "/v1/responses": {"input": "Which way?", "max_output_tokens": 8},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 8},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    folder = tmp_path_factory.mktemp("trimtab-home")
    put_random_direction(folder, tiny_checkpoint)
    write_policy(folder / "policies", "guard")
    write_policy(folder / "policies", "kind", strength=5.0, keys="onFailure: open\n")
    return folder


@pytest.fixture(scope="module")
def robbed(tiny_checkpoint: Path, home: Path) -> Iterator[Served]:
    """A server whose workers have lost both policies behind the API process's back.

    vLLM's development mode has a route that calls workers; the same call that retires a plan takes it
    away here while the API process still admits requests under it.
    """
    with serve(
        tiny_checkpoint,
        home,
        [f"--policies={home / 'policies'}"],
        log=home / "robbed.log",
        env={"VLLM_SERVER_DEV_MODE": "1"},
    ) as served:
        with served.client() as client:
            body = {"model": "tiny@guard", "prompt": "Which way?", "max_tokens": 4}
            assert client.post("/v1/completions", json=body).is_success
            status = client.get("/v1/steering/status").json()
            plans = [policy["plan"] for policy in status["policies"]]
            call = {"method": "trimtab_deactivate", "args": [plans]}
            assert client.post("/collective_rpc", json=call).json()["results"][0]["plans"] == []
        yield served


@pytest.mark.parametrize("path", APIS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("policy", ["guard", "kind"])
def test_a_plan_that_no_worker_holds_is_503_with_its_code(
    robbed: Served, path: str, stream: bool, policy: str
) -> None:
    with robbed.client() as client:
        answer = client.post(path, json={"model": f"tiny@{policy}", "stream": stream, **APIS[path]})
        assert answer.status_code == 503, answer.text
        error = json.loads(answer.text)["error"]
        assert error["code"] == "E_PLAN_NOT_PLACED"
        assert "plan_unknown" in error["message"]
        assert (
            "x-trimtab-applied" not in answer.headers
            or answer.headers["x-trimtab-applied"] == "off"
        )
        # The server goes on, and neighbours are unharmed.
        plain = client.post(path, json={"model": "tiny", **APIS[path]})
        assert plain.status_code == 200


def test_one_lost_sequence_of_several_ends_the_request(robbed: Served) -> None:
    with robbed.client() as client:
        body = {"model": "tiny@guard", "n": 3, **APIS["/v1/chat/completions"]}
        assert client.post("/v1/chat/completions", json=body).status_code == 503


def test_losses_are_counted_and_hold_no_slots(robbed: Served) -> None:
    with robbed.client() as client:
        body = {"model": "tiny@guard", **APIS["/v1/completions"]}
        assert client.post("/v1/completions", json=body).status_code == 503
    metrics = robbed.metrics()
    refused = (
        'trimtab_requests_total{mode="enforce",model_name="tiny",outcome="refused",policy="guard",'
        'reason="E_PLAN_NOT_PLACED"}'
    )
    assert metrics[refused] >= 1
    assert metrics['trimtab_slots{model_name="tiny",state="in_use"}'] == 0


BREAK_THE_ENGINE_PROCESS = """
import sys
# Processes that vLLM spawns are started with this word; the API process is not.
if any("multiprocessing" in word for word in sys.orig_argv):
    sys.modules["steering.engine.plugin"] = None
"""


def test_a_plug_in_that_fails_to_import_in_the_engine_stops_the_start(
    tiny_checkpoint: Path, home: Path, tmp_path: Path
) -> None:
    """vLLM logs such a failure and goes on; a server that answers unsteered would be the result."""
    (tmp_path / "sitecustomize.py").write_text(BREAK_THE_ENGINE_PROCESS)
    log = home / "no-plug-in.log"
    with (
        pytest.raises(RuntimeError, match="exit 1"),
        serve(
            tiny_checkpoint,
            home,
            [f"--policies={home / 'policies'}"],
            log=log,
            env={"PYTHONPATH": str(tmp_path)},
        ),
    ):
        pass
    text = log.read_text(errors="replace")
    assert "Failed to load plugin trimtab" in text
    last = text.strip().splitlines()[-1]
    assert last.startswith("error E_PLUGIN_ABSENT")
    assert "its plug-in failed to load there" in last
    assert "Application startup complete" not in text


def test_the_answer_of_a_server_that_is_up_was_proved(robbed: Served) -> None:
    with httpx.Client(base_url=robbed.url, verify=False) as client:
        proof = client.get("/v1/steering/status").json()["proof"]
    assert proof["layers"] == [0, 1, 2, 3]
    assert proof["least_effect"] > 100 * max(proof["floor"], 1e-6)
