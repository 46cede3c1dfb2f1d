"""Gates, thinking and tools through the real server: every choice tells of its own gates."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import build_tiny_checkpoint, tiny_tokenizer
from tests.server.served import Served, put_random_direction, put_random_probe, serve

pytestmark = pytest.mark.engine

MESSAGES = [{"role": "user", "content": "Which way does the ship turn?"}]
# Scores of a random probe of a random model lie on both sides of it.
MIDDLE = 0.5
POLICY = """\
apiVersion: trimtab/v1
kind: Policy
name: {name}
edits:
  turn:
    add: {{direction: north@1, layers: "2-3", strength: 4.0}}
    scope: {scope}
  quiet:
    scale_heads: {{heads: [[3, 0], [3, 2]], factor: 0.0, renormalise: row}}
gates:
  {gates}
"""
GATES = {
    "open": ("all", "high: {probe: judge@1, at: prompt_end, above: 0.000001, then: [turn]}"),
    "shut": ("all", "high: {probe: judge@1, at: prompt_end, above: 0.999999, then: [turn]}"),
    "each": (
        "generation",
        f"token: {{probe: judge@1, at: token, above: {MIDDLE}, then: [turn]}}",
    ),
    "after": (
        "[think_end, answer]",
        "end: {probe: judge@1, output: 1, at: think_end, above: 0.000001, then: [turn]}",
    ),
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("gates")
    checkpoint = build_tiny_checkpoint(folder / "tiny")
    home = folder / "home"
    put_random_direction(home, checkpoint)
    put_random_probe(home, checkpoint)
    policies = home / "policies"
    policies.mkdir()
    for name, (scope, gates) in GATES.items():
        (policies / f"{name}.yaml").write_text(POLICY.format(name=name, scope=scope, gates=gates))
    tools = ["--enable-auto-tool-choice", "--tool-call-parser=hermes"]
    arguments = [f"--policies={policies}", "--think-start=t", "--think-end=e", *tools]
    with serve(checkpoint, home, arguments, log=folder / "log") as server:
        yield server


def ask(served: Served, path: str, policy: str, **body: Any) -> dict[str, Any]:
    with served.client() as client:
        headers = {"X-Trimtab-Policy": policy}
        answer: httpx.Response = client.post(
            path, json={"model": served.model, **body}, headers=headers
        )
    assert answer.status_code == 200, answer.text
    document: dict[str, Any] = answer.json()
    return document


def chat(served: Served, policy: str, **body: Any) -> dict[str, Any]:
    full = {"messages": MESSAGES, "max_tokens": 24, "temperature": 0, **body}
    return ask(served, "/v1/chat/completions", policy, **full)


def test_a_gate_at_the_prompt_s_end_opens_or_not_and_says_where(served: Served) -> None:
    found = {name: chat(served, name) for name in ("open", "shut")}
    gates = {name: a["choices"][0]["steering"]["gates"]["high"] for name, a in found.items()}
    last = found["open"]["usage"]["prompt_tokens"] - 1
    assert gates["open"]["fired"] is True
    assert gates["shut"]["fired"] is False
    assert [gate["at"] for gate in gates.values()] == [last, last]
    assert gates["open"]["score"] == pytest.approx(gates["shut"]["score"], abs=1e-6)
    assert found["open"]["choices"][0]["message"] != found["shut"]["choices"][0]["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "Which way?", "max_tokens": 8}),
        ("/v1/responses", {"input": "Which way?", "max_output_tokens": 8}),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 8}),
    ],
)
def test_every_api_tells_of_gates(served: Served, path: str, body: dict[str, Any]) -> None:
    answer = ask(served, path, "open", **body)
    report = answer["choices"][0] if "choices" in answer else answer
    assert report["steering"]["gates"]["high"]["fired"] is True


def test_each_choice_and_each_prompt_has_gates_of_its_own(served: Served) -> None:
    prompts = ["Which way does the ship turn before the storm?", "No."]
    body = {"prompt": prompts, "max_tokens": 16, "n": 2, "temperature": 1.0, "seed": None}
    whole = ask(served, "/v1/completions", "open", **body)
    by_choice = [choice["steering"]["gates"]["high"] for choice in whole["choices"]]
    assert len(by_choice) == 4
    # Two answers to the same prompt share its end; the prompts' ends are elsewhere.
    assert by_choice[0] == by_choice[1]
    assert by_choice[2] == by_choice[3]
    assert by_choice[0]["at"] > by_choice[2]["at"]

    single = [
        ask(served, "/v1/completions", "open", prompt=p, max_tokens=1)["choices"][0]["steering"]
        for p in prompts
    ]
    for choice, alone in ((0, single[0]), (2, single[1])):
        assert by_choice[choice]["at"] == alone["gates"]["high"]["at"]
        assert by_choice[choice]["score"] == pytest.approx(
            alone["gates"]["high"]["score"], abs=1e-4
        )


def test_a_stream_tells_at_its_end_what_the_whole_answer_tells(served: Served) -> None:
    whole = {name: chat(served, name)["choices"][0]["steering"] for name in GATES}
    for name, expected in whole.items():
        body = {"model": served.model, "messages": MESSAGES, "max_tokens": 24, "temperature": 0}
        with served.client() as client:
            text = client.post(
                "/v1/chat/completions",
                json={**body, "stream": True},
                headers={"X-Trimtab-Policy": name},
            ).text
        chunks = [json.loads(line[5:]) for line in text.splitlines() if line.startswith("data: {")]
        (told,) = (c["choices"][0]["steering"] for c in chunks if "steering" in c["choices"][0])
        assert told["gates"].keys() == expected["gates"].keys()
        for gate, report in told["gates"].items():
            assert report["fired"] == expected["gates"][gate]["fired"]
            assert report["at"] == expected["gates"][gate]["at"]
    assert whole["each"]["gates"]["token"]["tokens"] > 0
    # Twenty-four tokens of a random model, in which "t" and "e" are common.
    assert whole["after"]["gates"]["end"]["fired"] is True


def test_a_tool_is_called_by_a_steered_model(served: Served) -> None:
    parameters = {
        "type": "object",
        "properties": {"side": {"enum": ["port", "starboard"]}},
        "required": ["side"],
        "additionalProperties": False,
    }
    # Not strict, the arguments may be any JSON, which a random model does not end.
    function = {"name": "turn", "parameters": parameters, "strict": True}
    tool = {"type": "function", "function": function}
    choice = {"type": "function", "function": {"name": "turn"}}
    # Given blanks to choose, which a grammar leaves it, a random model does not come to an end.
    tokenizer = tiny_tokenizer()
    blank = {n: -100 for n in range(len(tokenizer)) if not tokenizer.decode([n]).strip()}
    asked = {"tools": [tool], "tool_choice": choice, "max_tokens": 96, "logit_bias": blank}
    answers = {policy: chat(served, policy, logprobs=True, **asked) for policy in ("open", "shut")}
    for policy, answer in answers.items():
        (found,) = answer["choices"]
        (call,) = found["message"]["tool_calls"]
        assert json.loads(call["function"]["arguments"])["side"] in ("port", "starboard")
        assert found["steering"]["applied"] is True
        assert found["steering"]["gates"]["high"]["fired"] is (policy == "open")
    # The grammar leaves little to choose; that it is chosen by the steered model shows in the numbers.
    numbers = [
        [token["logprob"] for token in answer["choices"][0]["logprobs"]["content"]]
        for answer in answers.values()
    ]
    assert numbers[0] != numbers[1]


def test_policies_that_tell_thinking_are_refused_where_nothing_marks_it(
    served: Served, tmp_path: Path
) -> None:
    """The tiny model's template names no markers, so without the flags the start is refused."""
    home = served.log.parent / "home"
    arguments = [f"--policies={home / 'policies'}"]
    checkpoint = served.log.parent / "tiny"
    with (
        pytest.raises(RuntimeError, match="E_THINKING_MARKERS"),
        serve(checkpoint, home, arguments, log=tmp_path / "log"),
    ):
        pass
