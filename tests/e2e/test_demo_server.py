"""The demonstration model behind the real server, spoken to over HTTP, held against the reference.

The engine's tests compare in process; here the whole path is in between: the command line, HTTP, the
selection of a policy, streams, and an engine in a process of its own.
"""

from __future__ import annotations

import json
import threading

import pytest

from tests.server.served import serve
from tests.steering.engine.harness import Answer, Request, assert_parity

pytestmark = pytest.mark.engine

QUESTION = "Explain in two sentences why ships float."
PLAIN_QUESTIONS = (
    "Which way does the wind blow today, and how should a small boat set its sails?",
    "Write a short letter to a friend about the sea.",
    "Name five things that a sailor takes along.",
)


@pytest.fixture(scope="module")
def demo_world(demo_model, tmp_path_factory):
    from tests.steering.engine.harness import build_world, standard_policies

    world = build_world(demo_model, tmp_path_factory.mktemp("home"))
    standard_policies(world)
    return world


@pytest.fixture(scope="module")
def served(demo_world):
    home = demo_world.store.root
    folder = home / "policies"
    folder.mkdir()
    for name, policy in demo_world.policies.items():
        (folder / f"{name}.yaml").write_text(policy.model_dump_json(by_alias=True))
    with serve(
        demo_world.path,
        home,
        [f"--policies={folder}", "--relative-ceiling=10"],
        log=home / "serve.log",
        model="smollm2",
    ) as server:
        yield server


def ask(
    served,
    world,
    policy: str | None,
    *,
    stream: bool,
    strength: float = 1.0,
    question: str = QUESTION,
) -> tuple[Answer, dict]:
    prompt = world.prompt(question)
    body = {
        "model": "smollm2" if policy is None else f"smollm2@{policy}",
        "prompt": prompt,
        "max_tokens": 64,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 0,
        "return_token_ids": True,
        "stream": stream,
    }
    if policy is not None:
        body["steering"] = {"strength": strength}
    with served.client() as client:
        if not stream:
            response = client.post("/v1/completions", json=body)
            assert response.status_code == 200, response.text
            chunks = [response.json()]
        else:
            with client.stream("POST", "/v1/completions", json=body) as response:
                assert response.status_code == 200
                chunks = [
                    json.loads(line[5:])
                    for line in response.iter_lines()
                    if line.startswith("data:") and "[DONE]" not in line
                ]
            assert len(chunks) > 32, "the stream came in a few pieces"
        assert response.headers["x-trimtab-applied"] == ("off" if policy is None else "enforce")
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    answer = Answer(
        Request(tuple(prompt), policy, strength),
        tuple(t for c in choices for t in (c["token_ids"] or ())),
        tuple(lp for c in choices for lp in ((c["logprobs"] or {}).get("token_logprobs") or ())),
        "".join(c["text"] for c in choices),
        choices[-1]["finish_reason"],
        0,
    )
    return answer, choices[-1]["steering"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_answers_over_http_agree_with_the_reference(served, demo_world, stream) -> None:
    cases = [(None, 1.0), ("one", 1.0), ("several", 1.0), ("split", -1.0), ("generation", 2.0)]
    # The floor is the largest difference among plain answers, so there are several.
    answers = [ask(served, demo_world, None, stream=stream, question=q)[0] for q in PLAIN_QUESTIONS]
    for policy, strength in cases:
        answer, steering = ask(served, demo_world, policy, stream=stream, strength=strength)
        assert len(answer.token_ids) == len(answer.logprobs) == 64
        assert steering["applied"] is (policy is not None)
        if policy is not None:
            assert steering == {
                "policy": f"{policy}@1",
                "mode": "enforce",
                "applied": True,
                "strength": strength,
            }
        answers.append(answer)
    assert_parity(demo_world, answers, f"HTTP, {'stream' if stream else 'whole'}")


def test_clients_that_leave_mid_stream_do_not_disturb_the_others(served, demo_world) -> None:
    """Neighbours of steered streams that are cut off agree with the reference, as if alone."""
    left = threading.Event()

    def leave() -> None:
        body = {
            "model": "smollm2@every",
            "prompt": demo_world.prompt(QUESTION),
            "max_tokens": 400,
            "ignore_eos": True,
            "stream": True,
        }
        with served.client() as client, client.stream("POST", "/v1/completions", json=body) as r:
            for n, _ in enumerate(r.iter_lines()):
                if n == 6:
                    break
        left.set()

    aborted = 'trimtab_requests_total{mode="enforce",model_name="smollm2",outcome="aborted",'
    aborted += 'policy="every",reason=""}'
    before = served.metrics().get(aborted, 0.0)
    thread = threading.Thread(target=leave)
    thread.start()
    answers = [ask(served, demo_world, p, stream=True)[0] for p in (None, "several", "one")]
    answers += [ask(served, demo_world, None, stream=True, question=q)[0] for q in PLAIN_QUESTIONS]
    thread.join()
    assert left.is_set()
    assert_parity(demo_world, answers, "HTTP, a neighbour left mid-stream")
    metrics = served.metrics()
    assert metrics[aborted] == before + 1
    assert metrics['trimtab_slots{model_name="smollm2",state="in_use"}'] == 0


def test_a_direction_of_another_model_stops_the_start_with_its_code(
    demo_world, tiny_checkpoint, tmp_path
) -> None:
    from directions.fingerprint import fingerprint
    from tests.server.served import put_random_direction, write_policy

    put_random_direction(tmp_path, tiny_checkpoint)
    write_policy(tmp_path / "policies", "stranger")
    assert fingerprint(tiny_checkpoint).hidden_size != demo_world.fingerprint.hidden_size
    with (
        pytest.raises(RuntimeError, match=r"E_DIRECTION_(MODEL|WIDTH)"),
        serve(
            demo_world.path,
            tmp_path,
            [f"--policies={tmp_path / 'policies'}"],
            log=tmp_path / "serve.log",
        ),
    ):
        pass
