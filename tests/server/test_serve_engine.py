"""The real server: ``trimtab serve`` on a tiny checkpoint, spoken to as clients speak to it."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.conftest import build_tiny_checkpoint
from tests.server.served import Served, put_random_direction, serve, write_policy

pytestmark = pytest.mark.engine

LIMIT = 65536
LAYERS = 24
MESSAGES = [{"role": "user", "content": "Which way does the ship turn?"}]
GUARD = {"policy": "guard@3", "mode": "enforce", "applied": True, "strength": 1.0}
OFF = {"policy": "off", "mode": "off", "applied": False}

# One request of each API, and the key under which it takes the length of its answer.
APIS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 8},
    "/v1/completions": {"prompt": "Which way?", "max_tokens": 8},
    "/v1/responses": {"input": "Which way?", "max_output_tokens": 8},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 8},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with enough layers that an answer takes seconds, and can be met while it runs."""
    return build_tiny_checkpoint(tmp_path_factory.mktemp("deep") / "deep-llama", num_layers=LAYERS)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    folder = tmp_path_factory.mktemp("trimtab-home")
    put_random_direction(folder, checkpoint)
    return folder


@pytest.fixture(scope="module")
def policies(home: Path) -> Path:
    folder = home / "policies"
    write_policy(folder, "guard", keys="version: 3\nstrengthRange: [0.0, 2.0]\n")
    write_policy(folder, "kind", strength=5.0, keys="onFailure: open\n")
    write_policy(folder, "watch", keys="mode: shadow\n")
    return folder


@pytest.fixture(scope="module")
def served(checkpoint: Path, home: Path, policies: Path) -> Iterator[Served]:
    arguments = [f"--policies={policies}", f"--max-body-bytes={LIMIT}", "--enable-scale-out"]
    arguments += ["--enable-auto-tool-choice", "--tool-call-parser=hermes"]
    log = home / "serve.log"
    with serve(checkpoint, home, arguments, log=log) as server:
        yield server
        assert server.process.poll() is None, log.read_text()[-4000:]
    # It was asked to end, which is no failure.
    assert "E_ENGINE" not in log.read_text(errors="replace")


@pytest.fixture
def client(served: Served) -> Iterator[httpx.Client]:
    with served.client() as client:
        yield client


def events(text: str) -> list[dict[str, Any]]:
    return [
        json.loads(line[5:])
        for line in text.splitlines()
        if line.startswith("data:") and "[DONE]" not in line
    ]


def greedy(**keys: Any) -> dict[str, Any]:
    return {
        "model": "tiny",
        "prompt": "The rudder is moved by",
        "max_tokens": 24,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **keys,
    }


def tokens(client: httpx.Client, headers: dict[str, str] | None = None, **keys: Any) -> list[int]:
    answer = client.post("/v1/completions", json=greedy(**keys), headers=headers)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["choices"][0]["token_ids"])


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


# --- what an answer says, on every API


@pytest.mark.parametrize("path", APIS)
@pytest.mark.parametrize(
    ("model", "expected", "applied"),
    [("tiny@guard", GUARD, "enforce"), ("tiny", OFF, "off")],
)
def test_a_whole_answer_says_what_was_applied(
    client: httpx.Client, path: str, model: str, expected: Any, applied: str
) -> None:
    answer = client.post(path, json={"model": model, **APIS[path]})
    assert answer.status_code == 200, answer.text
    document = answer.json()
    holders = document.get("choices") or [document]
    assert [holder["steering"] for holder in holders] == [expected]
    assert document["model"] == model
    assert answer.headers["x-trimtab-policy"] == expected["policy"]
    assert answer.headers["x-trimtab-applied"] == applied


@pytest.mark.parametrize("path", APIS)
@pytest.mark.parametrize("model", ["tiny@guard", "tiny@kind", "tiny"])
def test_a_stream_says_it_once_where_it_ends(client: httpx.Client, path: str, model: str) -> None:
    answer = client.post(path, json={"model": model, "stream": True, **APIS[path]})
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-trimtab-applied"] == ("off" if model == "tiny" else "enforce")
    carrying = [e for e in events(answer.text) if '"steering"' in json.dumps(e)]
    (last,) = carrying
    if "choices" in last:
        (choice,) = last["choices"]
        assert choice["finish_reason"] == "length"
        report = choice["steering"]
    elif last["type"] == "message_delta":
        assert last["delta"]["stop_reason"] == "max_tokens"
        report = last["steering"]
    else:
        assert last["type"] == "response.completed"
        report = last["response"]["steering"]
    assert report["policy"].partition("@")[0] == (model.partition("@")[2] or "off")
    assert report["applied"] is (model != "tiny")
    named = [e[k]["model"] for e in events(answer.text) for k in ("response", "message") if k in e]
    named += [e["model"] for e in events(answer.text) if "choices" in e]
    assert named
    assert set(named) == {model}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_every_choice_of_several_says_it(client: httpx.Client, path: str, stream: bool) -> None:
    keys = {"n": 3, "temperature": 0.8, "stream": stream, "stream_options": None}
    if stream:
        keys["stream_options"] = {"include_usage": True}
    answer = client.post(path, json={"model": "tiny@guard", **APIS[path], **keys})
    assert answer.status_code == 200, answer.text
    documents = events(answer.text) if stream else [answer.json()]
    reports = {
        choice["index"]: choice["steering"]
        for document in documents
        for choice in document["choices"]
        if "steering" in choice
    }
    assert reports == {0: GUARD, 1: GUARD, 2: GUARD}
    if stream:
        assert documents[-1]["choices"] == []
        assert documents[-1]["usage"]["completion_tokens"] > 0


# --- selection, with its effect


def test_every_way_of_choosing_a_policy_gives_the_same_steered_answer(client: httpx.Client) -> None:
    plain = tokens(client)
    steered = tokens(client, model="tiny@guard")
    assert steered != plain
    assert tokens(client, model="tiny@guard@3") == steered
    assert tokens(client, headers={"X-Trimtab-Policy": "guard"}) == steered
    assert tokens(client, headers={"X-Trimtab-Policy": "guard@3"}) == steered
    assert tokens(client, steering={"policy": "guard"}) == steered
    assert tokens(client, steering={"policy": "guard@3", "strength": 1}) == steered
    agreeing = {"X-Trimtab-Policy": "guard"}
    assert tokens(client, agreeing, model="tiny@guard@3", steering={"strength": 1.0}) == steered
    assert tokens(client, model="tiny@guard", steering={"strength": 2.0}) != steered
    assert tokens(client, model="tiny@kind") != steered
    assert tokens(client) == plain


def test_strength_zero_shadow_and_off_change_nothing_and_say_so(client: httpx.Client) -> None:
    plain = tokens(client)
    for keys, applied, reason in (
        ({"steering": {"policy": "guard", "strength": 0}}, "off", "strength_zero"),
        ({"model": "tiny@watch"}, "shadow", None),
        ({"model": "tiny@off"}, "off", None),
    ):
        answer = client.post("/v1/completions", json=greedy(**keys))
        (choice,) = answer.json()["choices"]
        assert choice["token_ids"] == plain
        assert answer.headers["x-trimtab-applied"] == applied
        assert choice["steering"]["applied"] is False
        assert choice["steering"].get("reason") == reason


def test_several_prompts_in_one_request_are_all_steered(client: httpx.Client) -> None:
    prompts = ["The rudder is moved by", "What is the capital"]
    answer = client.post("/v1/completions", json=greedy(model="tiny@guard", prompt=prompts))
    choices = answer.json()["choices"]
    assert [choice["steering"] for choice in choices] == [GUARD, GUARD]
    assert choices[0]["token_ids"] == tokens(client, model="tiny@guard")


TOOL = {
    "type": "function",
    "function": {
        "name": "turn",
        # Without it vLLM takes any JSON for the arguments.
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"course": {"type": "string", "pattern": "^[a-z]{12}$"}},
            "required": ["course"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def terse(checkpoint: Path) -> dict[str, int]:
    """A bias against white space, of which JSON allows any amount and a random model writes no end."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return {str(n): -100 for n in range(len(tokenizer)) if not tokenizer.decode([n]).strip()}


def tool_call(client: httpx.Client, choice: Any, *, stream: bool, **keys: Any) -> str:
    """The course that the model calls the tool with, from a whole answer or pieced together."""
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 200, "temperature": 0, **keys}
    body |= {"tools": [TOOL], "tool_choice": choice, "parallel_tool_calls": False, "stream": stream}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    choices = [c for e in events(answer.text) for c in e["choices"]] if stream else []
    choices = choices or answer.json()["choices"]
    parts = [choice["delta" if stream else "message"] for choice in choices]
    calls = [call["function"] for part in parts for call in part.get("tool_calls") or []]
    assert "".join(call.get("name") or "" for call in calls) == "turn", answer.text
    arguments = json.loads("".join(call.get("arguments") or "" for call in calls))
    reports = [choice["steering"] for choice in choices if "steering" in choice]
    assert len(reports) == 1
    assert reports[0]["applied"] is (answer.headers["x-trimtab-applied"] == "enforce")
    assert reports[0]["applied"] is (body["model"] == "tiny@guard")
    return str(arguments["course"])


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    "choice",
    ["required", {"type": "function", "function": {"name": "turn"}}],
    ids=["required", "named"],
)
def test_a_tool_is_called_with_what_the_steered_model_says(
    client: httpx.Client, terse: dict[str, int], choice: Any, stream: bool
) -> None:
    keys: dict[str, Any] = {"stream": stream, "logit_bias": terse}
    guarded = {**keys, "model": "tiny@guard"}
    plain = tool_call(client, choice, **keys)
    steered = tool_call(client, choice, **guarded)
    assert len(plain) == len(steered) == 12
    assert steered != plain
    assert tool_call(client, choice, **{**guarded, "stream": not stream}) == steered
    assert tool_call(client, choice, **keys) == plain


def test_a_route_that_only_passes_tokens_is_steered_too(client: httpx.Client) -> None:
    def generated(model: str) -> Any:
        sampling = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
        body = {"model": model, "token_ids": [5, 6, 7, 8], "sampling_params": sampling}
        answer = client.post("/inference/v1/generate", json=body)
        return answer.status_code, answer.headers.get("x-trimtab-applied"), answer.json()

    status, applied, document = generated("tiny@guard")
    assert (status, applied) == (200, "enforce"), document
    assert document["choices"][0]["token_ids"] != generated("tiny")[2]["choices"][0]["token_ids"]


def test_a_route_that_takes_any_apis_body_is_steered_too(client: httpx.Client) -> None:
    answer = client.post("/invocations", json={"model": "tiny@guard", **APIS["/v1/completions"]})
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["steering"] == GUARD
    assert answer.headers["x-trimtab-applied"] == "enforce"


# --- bad input, while good neighbours run

BAD_BODIES: list[tuple[str, int, Any]] = [
    ("E_POLICY_UNKNOWN", 404, {"steering": {"policy": "nobody"}}),
    ("E_POLICY_UNKNOWN", 404, {"model": "tiny@nobody"}),
    ("E_POLICY_UNKNOWN", 404, {"steering": {"policy": "sha256:" + "0" * 64}}),
    ("E_POLICY_VERSION", 404, {"steering": {"policy": "guard@1"}}),
    ("E_POLICY_VERSION", 404, {"model": "tiny@guard@4"}),
    ("E_SELECTION_CONFLICT", 400, {"model": "tiny@guard", "steering": {"policy": "kind"}}),
    ("E_STEERING_FIELD", 400, {"steering": {"policy": "guard", "edits": {}}}),
    ("E_STEERING_FIELD", 400, {"steering": {"policy": "guard", "strength": "2"}}),
    ("E_STEERING_FIELD", 400, {"steering": {"policy": ["guard"]}}),
    ("E_STEERING_FIELD", 400, {"steering": None}),
    ("E_STEERING_FIELD", 400, {"steering": {"strength": 1.0}}),
    ("E_STRENGTH_RANGE", 400, {"steering": {"policy": "guard", "strength": 2.01}}),
    ("E_STRENGTH_RANGE", 400, {"steering": {"policy": "guard", "strength": -1e308}}),
    ("E_STRENGTH_FINITE", 400, {"steering": {"policy": "guard", "strength": float("nan")}}),
    ("E_STRENGTH_FINITE", 400, {"steering": {"policy": "guard", "strength": float("-inf")}}),
    ("E_TRACE_UNSUPPORTED", 400, {"steering": {"policy": "guard", "trace": True}}),
    ("E_BEAM_SEARCH", 400, {"model": "tiny@guard", "use_beam_search": True, "n": 2}),
    ("E_RESERVED_KEY", 400, {"vllm_xargs": {"trimtab": "x"}}),
    ("E_BODY_TOO_LARGE", 413, {"user": "x" * LIMIT}),
]
BAD_TEXTS: list[tuple[str, int, bytes]] = [
    ("E_BODY_JSON", 400, b'{"model": "tiny", "prompt": '),
    ("E_BODY_JSON", 400, b"prompt=hello"),
    ("E_BODY_JSON", 400, b'["tiny"]'),
    ("E_BODY_JSON", 400, b"\x00\xff"),
    ("E_BODY_JSON", 400, b'{"model":"tiny","steering":{"policy":"off","policy":"guard"}}'),
    ("E_STRENGTH_FINITE", 400, b'{"steering":{"policy":"guard","strength":1e400}}'),
]
BAD_HEADERS: list[tuple[str, int, dict[str, str]]] = [
    ("E_POLICY_UNKNOWN", 404, {"X-Trimtab-Policy": "nobody"}),
    ("E_POLICY_VERSION", 404, {"X-Trimtab-Policy": "guard@2"}),
    ("E_HEADER", 400, {"X-Trimtab-Policy": "guard; strength=2"}),
    ("E_HEADER", 400, {"X-Trimtab-Policy": ""}),
    ("E_HEADER", 400, {"X-Trimtab-Policy": "g" * 1000}),
    ("E_HEADER", 400, {"X-Trimtab-Strength": "2"}),
]


def test_every_bad_input_is_a_coded_refusal_and_hurts_no_neighbour(served: Served) -> None:
    long = {"max_tokens": 400, "ignore_eos": True}
    with served.client() as client:
        alone = {model: tokens(client, model=model, **long) for model in ("tiny", "tiny@guard")}
    neighbours: dict[str, list[int]] = {}
    finished: dict[str, float] = {}

    def neighbour(model: str) -> None:
        with served.client() as own:
            neighbours[model] = tokens(own, model=model, **long)
            finished[model] = time.monotonic()

    threads = [threading.Thread(target=neighbour, args=(model,)) for model in alone]
    for thread in threads:
        thread.start()
    wait_for(lambda: served.metrics()[slots("in_use")] >= 1)

    found, answered = [], []
    with served.client() as client:
        for path in APIS:
            base = {"model": "tiny", **APIS[path]}
            for code, status, keys in BAD_BODIES:
                # json= refuses NaN, which is among what is sent here.
                body = json.dumps({**base, **keys}).encode()
                headers = {"content-type": "application/json"}
                answer = client.post(path, content=body, headers=headers)
                found.append((path, code, status, answer.status_code, answer.json()["error"]))
                answered.append(time.monotonic())
            for code, status, text in BAD_TEXTS:
                answer = client.post(
                    path, content=text, headers={"content-type": "application/json"}
                )
                found.append((path, code, status, answer.status_code, answer.json()["error"]))
            for code, status, headers in BAD_HEADERS:
                answer = client.post(path, json=base, headers=headers)
                found.append((path, code, status, answer.status_code, answer.json()["error"]))
    for thread in threads:
        thread.join()
    for path, code, status, got, error in found:
        assert (got, error["code"]) == (status, code), (path, error)
        assert error["message"]
    assert neighbours == alone
    assert min(answered) < min(finished.values()), "no bad input met a running neighbour"


def slots(state: str) -> str:
    return f'trimtab_slots{{model_name="tiny",state="{state}"}}'


def counted(policy: str, mode: str, outcome: str, reason: str) -> str:
    return (
        f'trimtab_requests_total{{mode="{mode}",model_name="tiny",outcome="{outcome}",'
        f'policy="{policy}",reason="{reason}"}}'
    )


def raw(served: Served, request: bytes) -> bytes:
    """Send bytes as they are, and read until the server closes or has said enough."""
    url = httpx.URL(served.url)
    with socket.create_connection((url.host, url.port or 80), timeout=20) as connection:
        with contextlib.suppress(OSError):  # it may hang up while we still talk
            connection.sendall(request)
        received = b""
        with contextlib.suppress(OSError):
            while part := connection.recv(65536):
                received += part
        return received


def head(length: int, *lines: bytes) -> bytes:
    own = (b"POST /v1/completions HTTP/1.1", b"host: x", b"content-type: application/json")
    more = (b"connection: close", b"content-length: %d" % length)
    return b"\r\n".join([*own, *lines, *more]) + b"\r\n\r\n"


def test_headers_cannot_be_injected_through_the_policys_name(served: Served) -> None:
    body = json.dumps(greedy(max_tokens=1)).encode()
    for line in (
        b"x-trimtab-policy: guard\r\n x-injected: 1",
        b"x-trimtab-policy: guard\x0bx-injected: 1",
        b"x-trimtab-policy: guard\x00",
        b"x-trimtab-policy: guard\nx-injected: 1\nx-trimtab-policy: guard",
        b"x-trimtab-policy: guard\r\nx-trimtab-policy: guard",
        b"x-trimtab-policy: gu\xe4rd",
    ):
        answer = raw(served, head(len(body), line) + body)
        status = answer.split(b"\r\n", 1)[0]
        assert b" 400 " in status, (line, answer[:300])
        headers = answer.split(b"\r\n\r\n", 1)[0].lower()
        assert b"x-injected" not in headers
        assert b"x-trimtab-applied" not in headers


def test_a_body_that_grows_past_its_limit_is_cut_off_early(served: Served) -> None:
    lines = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    endless = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    request = lines + b"transfer-encoding: chunked\r\n\r\n" + endless * 64
    answer = raw(served, request)
    assert b" 413 " in answer.split(b"\r\n", 1)[0]
    assert b'"code":"E_BODY_TOO_LARGE"' in answer
    claimed = raw(served, head(10**12) + b"{")
    assert b" 413 " in claimed.split(b"\r\n", 1)[0]


# --- vLLM's own errors, lists, metrics, clients


def test_vllms_own_errors_stay_its_own(client: httpx.Client) -> None:
    answer = client.post("/v1/completions", json=greedy(model="tiny@guard", max_tokens=-1))
    assert answer.status_code == 400
    assert not str(answer.json()["error"]["code"]).startswith("E_")
    answer = client.post("/v1/completions", json=greedy(model="other@guard"))
    assert answer.status_code == 404
    assert "other@guard" in answer.json()["error"]["message"]
    answer = client.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"})
    assert 400 <= answer.status_code < 500


def test_a_client_that_leaves_frees_its_slot_and_is_counted(served: Served) -> None:
    aborted = counted("guard", "enforce", "aborted", "")
    before = served.metrics().get(aborted, 0.0)
    body = greedy(model="tiny@guard", max_tokens=480, stream=True)
    with (
        served.client() as client,
        client.stream("POST", "/v1/completions", json=body) as answer,
    ):
        assert answer.headers["x-trimtab-applied"] == "enforce"
        lines = answer.iter_lines()  # kept: without it, the stream is closed
        next(lines)
        assert served.metrics()[slots("in_use")] == 1
    wait_for(lambda: served.metrics().get(aborted, 0.0) == before + 1)
    wait_for(lambda: served.metrics()[slots("in_use")] == 0)
    with served.client() as client:
        assert len(tokens(client, model="tiny@guard")) == 24


def test_a_client_that_leaves_a_whole_answer_is_counted_too(served: Served) -> None:
    aborted = counted("kind", "enforce", "aborted", "")
    before = served.metrics().get(aborted, 0.0)
    body = greedy(model="tiny@kind", max_tokens=480)
    with served.client() as client, pytest.raises(httpx.TimeoutException):
        client.post("/v1/completions", json=body, timeout=0.15)
    wait_for(lambda: served.metrics().get(aborted, 0.0) == before + 1)
    wait_for(lambda: served.metrics()[slots("in_use")] == 0)


def test_metrics_count_requests_by_policy_and_outcome(served: Served) -> None:
    before = served.metrics()
    with served.client() as client:
        tokens(client)
        tokens(client, model="tiny@guard")
        tokens(client, model="tiny@watch")
        client.post("/v1/completions", json=greedy(steering={"policy": "evil{label}"}))
        client.post("/v1/completions", json=greedy(model="tiny@guard", max_tokens=-1))
    after = served.metrics()
    grown = {
        name: value - before.get(name, 0.0)
        for name, value in after.items()
        if name.startswith("trimtab_requests_total") and value != before.get(name, 0.0)
    }
    assert grown == {
        counted("off", "off", "ok", ""): 1.0,
        counted("guard", "enforce", "ok", ""): 1.0,
        counted("watch", "shadow", "ok", ""): 1.0,
        counted("_unresolved", "", "refused", "E_POLICY_UNKNOWN"): 1.0,
        counted("guard", "enforce", "error", "http_400"): 1.0,
    }
    assert after[slots("in_use")] == 0
    assert after[slots("free")] == 31
    (build,) = [name for name in after if name.startswith("trimtab_build_info")]
    assert 'version="0.1.0"' in build
    assert 'vllm_version="0.' in build
    assert not any(name.startswith("vllm:trimtab") for name in after)


def test_the_list_of_models_shows_the_aliases(client: httpx.Client) -> None:
    data = client.get("/v1/models").json()["data"]
    assert [card["id"] for card in data] == ["tiny", "tiny@guard", "tiny@kind", "tiny@watch"]
    assert data[0]["parent"] is None
    assert {card["parent"] for card in data[1:]} == {"tiny"}
    assert {card["root"] for card in data} == {data[0]["root"]}


def test_the_status_tells_what_is_served_and_that_it_was_proved(client: httpx.Client) -> None:
    status = client.get("/v1/steering/status").json()
    assert status["default"] == "off"
    policies = {policy["name"]: policy for policy in status["policies"]}
    assert policies["guard"]["version"] == 3
    assert policies["guard"]["strengthRange"] == [0.0, 2.0]
    assert policies["watch"]["mode"] == "shadow"
    assert policies["guard"]["plan"] == policies["watch"]["plan"] != policies["kind"]["plan"]
    assert status["proof"]["layers"] == list(range(LAYERS))
    assert status["proof"]["least_effect"] > 10 * status["proof"]["floor"]
    assert status["slots"] == {"in_use": 0, "free": 31}
    # No more than these policies need.
    assert status["sites"] == {
        "hooked": {"add": list(range(LAYERS))},
        "unavailable": {},
        "thinking": None,
    }
    paths = client.get("/openapi.json").json()["paths"]
    assert "/v1/steering/status" in paths


def test_the_openai_sdk_needs_nothing_new(served: Served) -> None:
    sdk = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    assert "tiny@guard" in [model.id for model in sdk.models.list()]
    by_name = sdk.chat.completions.create(
        model="tiny@guard", messages=MESSAGES, max_tokens=8, temperature=0
    )
    assert by_name.choices[0].model_extra is not None
    assert by_name.choices[0].model_extra["steering"] == GUARD
    by_body = sdk.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=8,
        temperature=0,
        extra_body={"steering": {"policy": "guard", "strength": 1.0}},
    )
    assert by_body.choices[0].message.content == by_name.choices[0].message.content
    by_header = sdk.chat.completions.with_raw_response.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=8,
        temperature=0,
        extra_headers={"X-Trimtab-Policy": "guard"},
    )
    assert by_header.headers["x-trimtab-policy"] == "guard@3"
    streamed = ""
    reports = []
    for chunk in sdk.chat.completions.create(
        model="tiny@guard", messages=MESSAGES, max_tokens=8, temperature=0, stream=True
    ):
        streamed += chunk.choices[0].delta.content or ""
        if chunk.choices[0].finish_reason:
            reports.append((chunk.choices[0].model_extra or {})["steering"])
    assert streamed == by_name.choices[0].message.content
    assert reports == [GUARD]
    response = sdk.responses.create(model="tiny@guard", input="Which way?", max_output_tokens=8)
    assert (response.model_extra or {})["steering"] == GUARD
    with pytest.raises(openai.NotFoundError) as caught:
        sdk.chat.completions.create(model="tiny@nobody", messages=MESSAGES)
    assert caught.value.code == "E_POLICY_UNKNOWN"


# --- a second server: a default policy, a key, two API processes, few slots


@pytest.fixture(scope="module")
def guarded(checkpoint: Path, home: Path, policies: Path) -> Iterator[Served]:
    arguments = [
        f"--policies={policies}",
        "--default-policy=guard",
        "--api-key=secret",
        "--api-server-count=2",
        # The identity, and one for each of the two processes.
        "--slots=3",
    ]
    with serve(checkpoint, home, arguments, log=home / "guarded.log") as server:
        yield server


@pytest.fixture
def keyed(guarded: Served) -> Iterator[httpx.Client]:
    with guarded.client(headers={"authorization": "Bearer secret"}) as client:
        yield client


def test_without_the_key_nothing_is_read_and_nothing_is_told(guarded: Served) -> None:
    before = guarded.metrics()
    with guarded.client() as client:
        answers = [
            client.post("/v1/completions", content=b"not json", headers={"x-trimtab-policy": "?"}),
            client.get("/v1/models"),
            client.get("/v1/steering/status"),
        ]
    assert [answer.status_code for answer in answers] == [401, 401, 401]
    assert [answer.headers.get("x-trimtab-policy") for answer in answers] == [None] * 3
    name = "trimtab_requests_total"
    assert {k: v for k, v in guarded.metrics().items() if name in k} == {
        k: v for k, v in before.items() if name in k
    }


def test_the_default_policy_holds_unless_another_is_chosen(keyed: httpx.Client) -> None:
    by_default = tokens(keyed)
    assert tokens(keyed, model="tiny@guard") == by_default
    plain = tokens(keyed, headers={"X-Trimtab-Policy": "off"})
    assert plain != by_default
    assert tokens(keyed, model="tiny@off") == plain
    # A route on which a policy cannot be chosen in the body is under the default as well.
    answer = keyed.post("/v1/completions", json=greedy())
    assert answer.headers["x-trimtab-policy"] == "guard@3"
    ids = [card["id"] for card in keyed.get("/v1/models").json()["data"]]
    assert ids == ["tiny", "tiny@guard", "tiny@kind", "tiny@watch", "tiny@off"]


def test_counters_add_up_over_the_api_processes(guarded: Served, keyed: httpx.Client) -> None:
    name = counted("guard", "enforce", "ok", "")
    before = guarded.metrics().get(name, 0.0)
    for _ in range(12):
        # A new connection each, so that both processes get some.
        with guarded.client(headers={"authorization": "Bearer secret"}) as client:
            tokens(client, max_tokens=1)
    assert guarded.metrics()[name] == before + 12
    assert any(name.startswith("trimtab_build_info") for name in guarded.metrics())
    # The two processes have one slot each.
    wait_for(lambda: guarded.metrics()[slots("free")] == 2)
    assert guarded.metrics()[slots("in_use")] == 0


def test_no_free_slot_is_429_under_closed_and_said_under_open(
    guarded: Served, keyed: httpx.Client
) -> None:
    with contextlib.ExitStack() as stack:
        streams = []
        for _ in range(6):
            client = stack.enter_context(guarded.client(headers={"authorization": "Bearer secret"}))
            body = greedy(model="tiny@kind", max_tokens=480, stream=True)
            stream = stack.enter_context(client.stream("POST", "/v1/completions", json=body))
            assert stream.headers["x-trimtab-applied"] == "enforce"
            streams.append(stream)
        refused = keyed.post("/v1/completions", json=greedy(model="tiny@guard"))
        still = keyed.post("/v1/completions", json=greedy(model="tiny@kind", max_tokens=2))
        off = keyed.post("/v1/completions", json=greedy(model="tiny@off", max_tokens=2))
        wait_for(lambda: guarded.metrics()[slots("in_use")] == 2)
    assert refused.status_code == 429, refused.text
    assert refused.json()["error"]["code"] == "E_SLOTS_EXHAUSTED"
    assert refused.headers["retry-after"] == "1"
    # The same plan shares the slot, and no policy needs none.
    assert still.json()["choices"][0]["steering"]["applied"] is True
    assert off.status_code == 200
    wait_for(lambda: keyed.post("/v1/completions", json=greedy()).status_code == 200)

    with contextlib.ExitStack() as stack:
        for _ in range(6):
            client = stack.enter_context(guarded.client(headers={"authorization": "Bearer secret"}))
            body = greedy(model="tiny@guard", max_tokens=480, stream=True)
            stack.enter_context(client.stream("POST", "/v1/completions", json=body))
        declined = keyed.post("/v1/completions", json=greedy(model="tiny@kind"))
    assert declined.status_code == 200
    assert declined.headers["x-trimtab-applied"] == "off"
    report = declined.json()["choices"][0]["steering"]
    assert (report["applied"], report["reason"]) == (False, "slots_exhausted")
    wait_for(lambda: keyed.post("/v1/completions", json=greedy(model="tiny@kind")).is_success)
    plain = tokens(keyed, model="tiny@off")
    assert declined.json()["choices"][0]["token_ids"] == plain


# --- servers that must not start


@pytest.mark.parametrize("processes", [1, 2])
def test_a_server_that_cannot_steer_ends_with_the_reason_as_its_last_line(
    checkpoint: Path, home: Path, policies: Path, processes: int
) -> None:
    arguments = [
        f"--policies={policies}",
        "--steering-layers=0",
        f"--api-server-count={processes}",
    ]
    log = home / f"unhooked-{processes}.log"
    with (
        pytest.raises(RuntimeError, match="exit 1"),
        serve(checkpoint, home, arguments, log=log),
    ):
        pass
    last = log.read_text(errors="replace").strip().splitlines()[-1]
    assert last.startswith("error E_SITE_UNHOOKED at --steering-layers:")
    assert "layers [1, 2, 3, " in last
    assert "Application startup complete" not in log.read_text(errors="replace")
