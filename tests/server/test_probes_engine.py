"""Scores of probes through the real server: every API, whole and streamed, in metrics and live."""

from __future__ import annotations

import asyncio
import json
import math
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from steering.policy_files import read_policy
from steering.reference import probe_scores
from tests.conftest import build_tiny_checkpoint
from tests.server.served import TRIMTAB, Served, put_random_probe, serve
from tests.steering.engine.harness import World, build_world

pytestmark = pytest.mark.engine

THINKING = ("t", "e")
TOLERANCE = 1e-4
MESSAGES = [{"role": "user", "content": "Which way does the wind blow over the water today?"}]
TOKENS = 64
RISE = '{{add: {{direction: alpha@1, layers: "1-3", strength: 0.3, unit: relative}}}}'
POLICY = """\
apiVersion: trimtab/v1
kind: Policy
name: {name}
mode: {mode}
probes: [{probes}]
edits: {{rise: {{add: {{direction: alpha@1, layers: "1-3", strength: 0.3, unit: relative}}}}}}
{gates}
"""
GATE = "gates: {early: {probe: early@1, at: prompt_end, above: 0.000001, then: [rise]}}"
POLICIES = {
    "steer": ("enforce", "middle@1", ""),
    "watch": ("shadow", "middle@1", ""),
    "gated": ("enforce", "similar@1", GATE),
}
ALL = "mood@1"
READ = {
    "off": [ALL],
    "steer": [ALL, "middle@1/first", "middle@1/second"],
    "watch": [ALL, "middle@1/first", "middle@1/second"],
    "gated": [ALL, "similar@1/first", "similar@1/second"],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("probes")
    world = build_world(build_tiny_checkpoint(folder / "tiny"), folder / "home", THINKING)
    put_random_probe(
        world.store.root,
        world.path,
        "mood",
        layer=None,
        outputs=["only"],
        calibration={"threshold": 0.5},
        seed=11,
    )
    (world.store.root / "policies").mkdir()
    for name, (mode, probes, gates) in POLICIES.items():
        text = POLICY.format(name=name, mode=mode, probes=probes, gates=gates)
        (world.store.root / "policies" / f"{name}.yaml").write_text(text)
        world.add(read_policy(text))
    return world


@pytest.fixture(scope="module")
def served(world: World) -> Iterator[Served]:
    home = world.store.root
    arguments = [f"--policies={home / 'policies'}", f"--probe={ALL}"]
    arguments += [f"--think-start={THINKING[0]}", f"--think-end={THINKING[1]}"]
    arguments.append("--enable-prompt-tokens-details")
    with serve(world.path, home, arguments, log=home / "log") as server:
        yield server


def reference(world: World, policy: str, key: str, prompt: list[int], answer: list[int]) -> Any:
    """The scores from the prompt's end on, position by position."""
    probe, _, output = key.partition("/")
    steered = world.policies[policy] if policy not in ("off", "watch") else None
    scores = probe_scores(
        world.model,
        steered,
        world.store,
        probe,
        [*prompt, *answer][:-1],
        len(prompt),
        output=("first", "second").index(output) if output else 0,
        tokenizer=world.tokenizer,
        thinking=THINKING,
    )
    return dict(enumerate(scores.tolist()))


def chat_body(policy: str, **more: Any) -> dict[str, Any]:
    return {
        "model": "tiny",
        "messages": MESSAGES,
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "steering": {"policy": policy, "trace": True},
        **more,
    }


def post(served: Served, path: str, body: dict[str, Any]) -> dict[str, Any]:
    with served.client() as client:
        answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    document: dict[str, Any] = answer.json()
    return document


def events(served: Served, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    with served.client() as client:
        answer = client.post(path, json={**body, "stream": True})
    assert answer.status_code == 200, answer.text
    lines = [line for line in answer.text.splitlines() if line.startswith("data: {")]
    return [json.loads(line[5:]) for line in lines]


def check_steering(
    world: World, policy: str, steering: dict[str, Any], prompt: list[int], answer: list[int]
) -> int:
    """Hold what an answer says of its probes against the reference; returns the number of scores."""
    assert list(steering["probes"]) == READ[policy]
    count = 0
    first, last = len(prompt) - 1, len(prompt) + len(answer) - 2
    for key, told in steering["probes"].items():
        expected = reference(world, policy, key, prompt, answer)
        assert [position for position, _ in told["trace"]] == list(range(first, last + 1))
        for position, score in told["trace"]:
            assert abs(score - expected[position]) <= TOLERANCE
        assert told["tokens"] == len(answer) - 1
        assert abs(told["prompt_end"] - expected[first]) <= TOLERANCE
        assert "missing" not in told
        scores = dict(told["trace"])
        of = {
            name: [
                p for phase, a, b in steering["phases"] if phase == name for p in range(a, b + 1)
            ]
            for name in ("thinking", "think_end", "answer")
        }
        mean = np.mean([scores[p] for p in of["answer"]]) if of["answer"] else None
        assert told["answer_mean"] == (None if mean is None else pytest.approx(mean, abs=1e-6))
        if told["cliff"] is not None:
            assert told["cliff"] == pytest.approx(told["plateau"] - told["final"])
        count += len(scores)
    return count


@pytest.mark.parametrize("policy", READ)
def test_a_whole_chat_answer_has_the_reference_s_scores(
    served: Served, world: World, policy: str
) -> None:
    answer = post(served, "/v1/chat/completions", chat_body(policy))
    (choice,) = answer["choices"]
    count = check_steering(
        world, policy, choice["steering"], answer["prompt_token_ids"], choice["token_ids"]
    )
    assert count == len(READ[policy]) * TOKENS
    # The probes differ among themselves and along the text, so agreement says something.
    spread = [score for told in choice["steering"]["probes"].values() for _, score in told["trace"]]
    assert max(spread) - min(spread) > 0.2


def test_answers_that_think_have_a_cliff(served: Served, world: World) -> None:
    body = chat_body("steer", n=8, temperature=1.0)
    answer = post(served, "/v1/chat/completions", body)
    cliffs = set()
    for choice in answer["choices"]:
        prompt = answer["prompt_token_ids"]
        check_steering(world, "steer", choice["steering"], prompt, choice["token_ids"])
        cliffs |= {told["cliff"] for told in choice["steering"]["probes"].values()}
    assert len(cliffs - {None}) > 3


@pytest.mark.parametrize("policy", READ)
def test_a_streamed_chat_carries_each_token_s_score_with_the_token(
    served: Served, world: World, policy: str
) -> None:
    whole = post(served, "/v1/chat/completions", chat_body(policy))
    prompt = whole["prompt_token_ids"]
    chunks = events(served, "/v1/chat/completions", chat_body(policy))
    told: dict[str, list[Any]] = {key: [] for key in READ[policy]}
    tokens: list[int] = []
    last = None
    for chunk in chunks:
        for choice in chunk["choices"]:
            tokens += choice.get("token_ids") or []
            steering = choice.get("steering")
            if steering is not None:
                for key, probe in steering["probes"].items():
                    told[key] += probe["trace"]
                # What led to the tokens so far has been told, and nothing beyond.
                assert all(pairs[-1][0] == len(prompt) + len(tokens) - 2 for pairs in told.values())
                last = steering
    assert tokens == whole["choices"][0]["token_ids"]
    assert last is not None
    assert len([c for c in chunks if c["choices"] and "steering" in c["choices"][0]]) > TOKENS / 2
    for key in last["probes"]:
        last["probes"][key]["trace"] = told[key]
    assert check_steering(world, policy, last, prompt, tokens) == len(READ[policy]) * TOKENS


def text_body(policy: str, **more: Any) -> dict[str, Any]:
    body = chat_body(policy, **{"prompt": "The ship turns when", **more})
    del body["messages"]
    return body


def test_completions_of_several_choices_have_each_their_own(served: Served, world: World) -> None:
    prompts = ["The ship turns when", "What is the capital of"]
    body = text_body("steer", prompt=prompts, n=2, temperature=1.0)
    answer = post(served, "/v1/completions", body)
    assert len(answer["choices"]) == 4
    for choice in answer["choices"]:
        check_steering(
            world, "steer", choice["steering"], choice["prompt_token_ids"], choice["token_ids"]
        )
    told: dict[int, dict[str, Any]] = {}
    for chunk in events(served, "/v1/completions", body):
        for choice in chunk["choices"]:
            mine = told.setdefault(choice["index"], {"tokens": [], "traces": {}})
            mine["prompt"] = choice.get("prompt_token_ids") or mine.get("prompt")
            mine["tokens"] += choice.get("token_ids") or []
            for key, probe in choice.get("steering", {"probes": {}})["probes"].items():
                mine["traces"].setdefault(key, []).extend(probe["trace"])
            mine["last"] = choice.get("steering", mine.get("last"))
    assert sorted(told) == [0, 1, 2, 3]
    for mine in told.values():
        for key, trace in mine["traces"].items():
            mine["last"]["probes"][key]["trace"] = trace
        check_steering(world, "steer", mine["last"], mine["prompt"], mine["tokens"])


@pytest.mark.parametrize("policy", READ)
def test_responses_and_messages_say_what_chat_says(served: Served, policy: str) -> None:
    steering = {"policy": policy, "trace": True}
    body = chat_body(policy)
    del body["ignore_eos"]
    chat = post(served, "/v1/chat/completions", body)["choices"][0]["steering"]
    asked = {
        "/v1/responses": {
            "input": MESSAGES[0]["content"],
            "max_output_tokens": TOKENS,
            "temperature": 0,
        },
        "/v1/messages": {"messages": MESSAGES, "max_tokens": TOKENS, "temperature": 0},
    }
    for path, more in asked.items():
        request = {"model": "tiny", "steering": steering, **more}
        whole = post(served, path, request)["steering"]
        assert whole["phases"] == chat["phases"]
        stream = events(served, path, request)
        carried = [e["steering"] for e in stream if "steering" in e]
        ended = [
            e["response"]["steering"]
            for e in stream
            if isinstance(e.get("response"), dict) and "steering" in e["response"]
        ]
        (last,) = ended or carried[-1:]
        for key, told in chat["probes"].items():
            assert whole["probes"][key]["trace"] == [
                [position, pytest.approx(score, abs=TOLERANCE)] for position, score in told["trace"]
            ]
            for name in ("prompt_end", "cliff", "answer_mean", "tokens"):
                expected = told[name]
                approx = None if expected is None else pytest.approx(expected, abs=TOLERANCE)
                assert whole["probes"][key][name] == approx
                assert last["probes"][key][name] == approx
            pieces = [pair for s in carried for pair in s["probes"][key].get("trace", ())]
            everything = whole["probes"][key]["trace"]
            assert len(pieces) > TOKENS / 2
            if ended:
                # The response at the end is whole; tokens without text have no event before it.
                assert pieces == everything[: len(pieces)]
                assert last["probes"][key]["trace"] == everything
            else:
                assert pieces == everything


def test_the_whole_prompt_is_read_where_all_is_asked_for_and_the_cache_does_not_hide_it(
    served: Served, world: World
) -> None:
    prompt = "The ship turns when the wind is right. " * 12
    body = text_body("steer", prompt=prompt, max_tokens=4)
    body["steering"]["trace"] = "all"
    for _ in range(2):
        (choice,) = post(served, "/v1/completions", body)["choices"]
        ids = choice["prompt_token_ids"]
        assert len(ids) > 256
        for key, told in choice["steering"]["probes"].items():
            expected = reference(world, "steer", key, ids, choice["token_ids"])
            assert [position for position, _ in told["trace"]] == list(range(len(ids) + 3))
            for position, score in told["trace"]:
                assert abs(score - expected[position]) <= TOLERANCE
        assert choice["steering"]["phases"][0] == ["prompt", 0, len(ids) - 2]
    # With the prefix from the cache, the prompt's end is read all the same.
    body["steering"]["trace"] = True
    with served.client() as client:
        answer = client.post("/v1/completions", json=body).json()
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= 128
    told = answer["choices"][0]["steering"]["probes"][ALL]
    assert told["trace"][0][0] == len(ids) - 1
    assert told["prompt_end"] == pytest.approx(
        reference(world, "steer", ALL, ids, [1, 1])[len(ids) - 1], abs=TOLERANCE
    )


def test_without_trace_there_is_a_summary_and_no_more(served: Served) -> None:
    body = chat_body("steer")
    del body["steering"]["trace"]
    steering = post(served, "/v1/chat/completions", body)["choices"][0]["steering"]
    assert "phases" not in steering
    assert all("trace" not in told for told in steering["probes"].values())
    chunks = events(served, "/v1/chat/completions", body)
    carrying = [c for chunk in chunks for c in chunk["choices"] if "steering" in c]
    assert len(carrying) == 1
    assert carrying[0]["steering"]["probes"].keys() == steering["probes"].keys()


@pytest.mark.parametrize("value", [1, "yes", None, ["all"]])
def test_what_is_no_trace_is_refused(served: Served, value: Any) -> None:
    with served.client() as client:
        answer = client.post(
            "/v1/chat/completions",
            json={"model": "tiny", "messages": MESSAGES, "steering": {"trace": value}},
        )
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "E_STEERING_FIELD"
    assert answer.json()["error"]["param"] == "$.steering.trace"


def test_two_hundred_requests_at_once_each_have_their_own_scores(
    served: Served, world: World
) -> None:
    texts = [f"Wave {n} of {n % 7} came from the sea {n * n}." for n in range(200)]
    prompts = [world.tokenizer(text)["input_ids"] for text in texts]
    expected = [reference(world, "off", ALL, prompt, [0, 0])[len(prompt) - 1] for prompt in prompts]
    # Distinct, or a swap could not be seen.
    assert np.min(np.diff(np.sort(expected))) > 0
    assert np.std(expected) > 100 * TOLERANCE

    async def ask_all() -> list[float]:
        limits = httpx.Limits(max_connections=32)
        async with httpx.AsyncClient(base_url=served.url, timeout=120, limits=limits) as client:

            async def ask(n: int) -> float:
                body = {
                    "model": "tiny",
                    "prompt": prompts[n],
                    "max_tokens": 1 + n % 5,
                    "temperature": 0,
                    "ignore_eos": True,
                }
                answer = await client.post("/v1/completions", json=body)
                told = answer.json()["choices"][0]["steering"]["probes"][ALL]
                assert told["tokens"] == n % 5
                return float(told["prompt_end"])

            return await asyncio.gather(*(ask(n) for n in range(len(prompts))))

    found = asyncio.run(ask_all())
    assert found == [pytest.approx(score, abs=TOLERANCE) for score in expected]


def samples(served: Served, name: str) -> dict[tuple[tuple[str, str], ...], float]:
    found = {}
    for key, value in served.metrics().items():
        if key.startswith(f"{name}{{"):
            labels = re.findall(r'(\w+)="([^"]*)"', key)
            found[tuple(sorted(labels))] = value
    return found


def total(served: Served, name: str, **labels: str) -> float:
    return sum(
        value
        for key, value in samples(served, name).items()
        if all(dict(key).get(label) == wanted for label, wanted in labels.items())
    )


def test_metrics_are_what_the_answers_said(served: Served) -> None:
    gated = {"probe": "mood", "policy": "gated"}
    names = {
        "score_count": ("trimtab_probe_score_count", {"probe": "middle/first", "policy": "steer"}),
        "score_sum": ("trimtab_probe_score_sum", {**gated, "phase": "prompt_end"}),
        "tokens": ("trimtab_probe_tokens_total", gated),
        "token_count": ("trimtab_probe_token_score_count", gated),
        "token_sum": ("trimtab_probe_token_score_sum", gated),
        "gates": (
            "trimtab_gate_decisions_total",
            {"gate": "early", "decision": "open", "policy": "gated"},
        ),
        "above": (
            "trimtab_probe_decisions_total",
            {**gated, "decision": "above", "phase": "answer"},
        ),
        "below": (
            "trimtab_probe_decisions_total",
            {**gated, "decision": "below", "phase": "answer"},
        ),
        "edited": ("trimtab_edits_applied_tokens_total", {"edit_kind": "add"}),
        "shadow": ("trimtab_probe_tokens_total", {"variant": "shadow", "policy": "watch"}),
        "missing": ("trimtab_probe_tokens_missing_total", {}),
        "steps": ("trimtab_engine_step_overhead_seconds_count", {"engine": "0"}),
    }

    def read() -> dict[str, float]:
        return {key: total(served, name, **labels) for key, (name, labels) in names.items()}

    before = read()
    answers = [post(served, "/v1/chat/completions", chat_body("gated")) for _ in range(2)]
    told = [a["choices"][0]["steering"]["probes"]["mood@1"] for a in answers]
    post(served, "/v1/chat/completions", chat_body("watch"))
    prompt = answers[0]["usage"]["prompt_tokens"]
    change = {key: value - before[key] for key, value in read().items()}
    assert change["score_count"] == 0
    assert change["score_sum"] == pytest.approx(sum(t["prompt_end"] for t in told), abs=1e-6)
    assert change["tokens"] == change["token_count"] == 2 * (TOKENS - 1)
    scores = [score for t in told for _, score in t["trace"][1:]]
    assert change["token_sum"] == pytest.approx(sum(scores), abs=1e-4)
    assert change["gates"] == 2
    above = sum(t["answer_mean"] > 0.5 for t in told)
    assert (change["above"], change["below"]) == (above, 2 - above)
    # The gate decides at the prompt's end, so what comes before it is not edited.
    assert change["edited"] == 2 * TOKENS
    assert prompt > 2
    assert change["shadow"] == 3 * (TOKENS - 1)
    assert change["missing"] == before["missing"] == 0
    assert change["steps"] >= 3 * TOKENS
    info = samples(served, "trimtab_policy_info")
    assert {(dict(key)["policy"], dict(key)["mode"]) for key in info} == {
        (name, mode) for name, (mode, _, _) in POLICIES.items()
    }
    assert set(info.values()) == {1.0}
    assert total(served, "trimtab_policy_generation") == 1.0


def test_exemplars_name_the_request_where_openmetrics_is_asked_for(served: Served) -> None:
    answer = post(served, "/v1/chat/completions", chat_body("steer"))
    with served.client() as client:
        found = client.get("/metrics", headers={"Accept": "application/openmetrics-text"})
    assert found.headers["content-type"].startswith("application/openmetrics-text")
    exemplars = re.findall(
        r'trimtab_probe_score_bucket\S+ \S+ # \{request_id="([^"]+)"\}', found.text
    )
    assert any(name.startswith(answer["id"]) for name in exemplars)


def test_an_id_that_cannot_be_written_is_refused_and_leaves_nothing_behind(served: Served) -> None:
    body = json.dumps(text_body("steer", request_id="ID")).replace('"ID"', '"\\ud800"')
    with served.client() as client:
        answer = client.post(
            "/v1/completions", content=body, headers={"content-type": "application/json"}
        )
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["code"] == "E_REQUEST_ID"
    assert live(served)["running"] == []
    assert served.metrics()['trimtab_slots{model_name="tiny",state="in_use"}'] == 0


def live(served: Served) -> dict[str, Any]:
    with served.client() as client:
        answer = client.get("/v1/steering/live")
    assert answer.status_code == 200
    document: dict[str, Any] = answer.json()
    return document


def test_running_and_finished_requests_can_be_watched(served: Served) -> None:
    body = text_body("steer", max_tokens=400)
    with (
        served.client() as client,
        client.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            running = [r for r in live(served)["running"] if r["tokens"] > 3]
            if running:
                break
        assert {r["probe"] for r in running} == set(READ["steer"])
        assert all(r["policy"] == "steer@1" and r["mode"] == "enforce" for r in running)
        assert all(len(r["recent"]) <= 60 and r["recent"][-1] == r["score"] for r in running)
        gone = running[0]["id"]
    deadline = time.monotonic() + 20
    while any(r["id"] == gone for r in live(served)["running"]):
        assert time.monotonic() < deadline, "a client that left is still shown as running"
    ended = [f for f in live(served)["finished"] if f["id"] == gone]
    assert {f["outcome"] for f in ended} == {"aborted"}
    answer = post(served, "/v1/chat/completions", chat_body("off"))
    newest = live(served)["finished"][0]
    assert newest["id"].startswith(answer["id"])
    assert newest["outcome"] == "finished"
    told = answer["choices"][0]["steering"]["probes"][ALL]
    assert newest["summary"]["prompt_end"] == told["prompt_end"]
    assert math.isclose(newest["ended"], time.time(), abs_tol=60)


def test_a_reader_that_stops_reading_blocks_nobody_and_grows_nothing(served: Served) -> None:
    import psutil

    api = psutil.Process(served.process.pid)
    body = text_body("steer", max_tokens=400)
    post(served, "/v1/completions", body)

    def memory() -> int:
        return sum(p.memory_info().rss for p in [api, *api.children(recursive=True)])

    with served.client() as client:
        before = memory()
        for _ in range(3):
            with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as slow:
                parts = slow.iter_bytes()
                next(parts)
                # The reader sleeps while others are served.
                began = time.monotonic()
                post(served, "/v1/completions", text_body("off", max_tokens=32))
                assert time.monotonic() - began < 30
        assert memory() - before < 32 * 2**20
    post(served, "/v1/completions", text_body("off", max_tokens=4))
    assert total(served, "trimtab_probe_tokens_missing_total") == 0


def command(*arguments: object) -> dict[str, Any]:
    done = subprocess.run(
        [TRIMTAB, *map(str, arguments), "--json"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_the_commands_show_what_the_server_says(served: Served, tmp_path: Path) -> None:
    picture = tmp_path / "curve.png"
    flags = ["--policy", "steer", "--max-tokens", TOKENS, "--temperature", 0, "--output", picture]
    shown = command("trace", MESSAGES[0]["content"], "--url", served.url, *flags)
    body = {**chat_body("steer"), "max_completion_tokens": TOKENS}
    del body["ignore_eos"]
    (choice,) = post(served, "/v1/chat/completions", body)["choices"]
    told = choice["steering"]["probes"][ALL]
    assert (shown["probe"], shown["policy"], shown["applied"]) == (ALL, "steer@1", True)
    assert [p for p, _ in shown["trace"]] == [p for p, _ in told["trace"]]
    assert [s for _, s in shown["trace"]] == pytest.approx([s for _, s in told["trace"]], abs=1e-4)
    assert shown["summary"]["prompt_end"] == pytest.approx(told["prompt_end"], abs=1e-4)
    assert len(shown["tokens"]) == len(choice["token_ids"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    seen = command("watch", served.url, "--once")
    assert seen["probes"][0] == ALL
    assert {f["policy"] for f in seen["finished"][:3]} == {"steer@1"}
    assert seen["finished"][0]["summary"]["tokens"] == told["tokens"]
