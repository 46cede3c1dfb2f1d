"""The stream of every architecture is edited as the reference says, or the engine refuses the model."""

from __future__ import annotations

import math

import pytest

from directions.errors import TrimtabError
from steering.reference import steered_logprobs
from tests.steering.engine import checkpoints
from tests.steering.engine.architectures import ARCHITECTURES, expert_capable_engine
from tests.steering.engine.harness import Request, World, assert_parity, run

pytestmark = pytest.mark.engine


def assert_telling(world: World, prompt: tuple[int, ...]) -> None:
    """The distributions are neither uniform nor degenerate, and depend on the text."""
    rows = steered_logprobs(world.model, None, world.store, prompt, len(prompt))
    entropy = float(-(rows.exp() * rows).sum(-1).mean())
    assert 1.0 < entropy < math.log(rows.shape[1]) - 1.0, f"mean entropy {entropy:.2f} nats"
    assert rows.argmax(-1).unique().numel() >= 8
    assert float((rows[8:] - rows[7:-1]).abs().mean()) > 0.5


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_engine_agrees_with_the_reference(name, serve_architecture) -> None:
    served = serve_architecture(name)
    world = served.world
    (served_by,) = served.llm.apply_model(lambda model: type(model).__name__)
    assert served_by == ARCHITECTURES[name].served_by
    prompts = [tuple(world.prompt(f"Wave {n} came from the sea.")) for n in range(24)]
    assert_telling(world, prompts[0])
    requests = [Request(p, max_tokens=24) for p in prompts]
    requests += [Request(prompts[0], policy, max_tokens=24) for policy in world.policies]
    assert_parity(world, run(served.llm, world, requests), name)


def test_a_model_of_several_streams_is_refused(tmp_path) -> None:
    from vllm import SamplingParams

    path = checkpoints.gemma3n(tmp_path / "gemma3n")
    with (
        pytest.raises(TrimtabError, match=r"stream after layer 0 .* shape \[4, ") as caught,
        expert_capable_engine(path) as llm,
    ):
        # The server's start-up proof is such a first request.
        llm.generate([{"prompt_token_ids": [5, 6, 7]}], SamplingParams(max_tokens=1))
    assert caught.value.code == "E_SITE_FORM"
