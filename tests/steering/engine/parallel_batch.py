"""What every way of running on several processes is checked with."""

from __future__ import annotations

from tests.steering.engine.harness import Request, World

# Plain first. A new kind of edit joins by the name of a policy of the world.
POLICIES: tuple[str | None, ...] = (
    None,
    "every",
    "every-phase",
    "several",
    "generation",
    "heads",
    "ablate",
    "clamp",
    "rotate",
    "everything",
    "phases",
    "late-gate",
)
# Gates that reach over pipeline stages.
EARLY_GATES = ("gate-above", "gate-below", "gate-token", "gate-think")

_QUESTIONS = (
    "Which way does the wind blow today, and how should a small boat set its sails?",
    "Who keeps the light when the keeper sleeps?",
)


def parallel_policies(world: World) -> None:
    """Add what the standard policies lack: edits of every layer that differ by phase."""
    alpha = {"direction": "alpha@1", "unit": "relative", "strength": 0.05}
    beta = {"direction": "beta@1", "unit": "relative", "strength": -0.05}
    world.add_policy(
        "every-phase",
        {"p": {"add": alpha, "scope": "prompt"}, "g": {"add": beta, "scope": "generation"}},
    )
    half = world.num_layers // 2
    late = {**alpha, "strength": 0.3, "layers": f"{half}-{world.num_layers - 1}"}
    world.add_policy(
        "late-gate",
        {"rise": {"add": late, "scope": "generation"}, "always": {"add": late, "scope": "prompt"}},
        {"g": {"probe": "top@1", "at": "prompt_end", "above": 0.001, "then": ["rise"]}},
    )


def batch(world: World, policies: tuple[str | None, ...] = POLICIES) -> list[Request]:
    """Every policy with every prompt, and about as many plain requests, since they are the floor."""
    prompts = [tuple(world.prompt(question)) for question in _QUESTIONS]
    prompts.append(prompts[0][::-1])
    requests = [Request(p, name, max_tokens=32) for name in policies for p in prompts]
    plain = [p * 2 for p in prompts] + [p[n:] for p in prompts for n in range(2, 16, 2)]
    return [*requests, *(Request(p, max_tokens=32) for p in plain)]
