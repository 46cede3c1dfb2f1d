"""Worlds with random artefacts and policies for every kind of edit, and the project's bounds on parity.

The comparison itself is :mod:`steering.engine.parity`'s, which ``trimtab verify`` uses too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from directions.store import Store
from steering.engine.parity import (
    TOLERANCE,
    Answer,
    Request,
    World,
    answers_of,
    engine,
    exchange_for,
    judge,
    load_world,
    run,
    sampling,
)
from steering.engine.random_artefacts import put_random_artefacts

__all__ = [
    "TOLERANCE",
    "Answer",
    "Parity",
    "Request",
    "World",
    "answers_of",
    "assert_parity",
    "build_world",
    "compare",
    "engine",
    "every_kind",
    "exchange_for",
    "run",
    "sampling",
    "standard_policies",
]


def build_world(
    path: Path, store_root: Path, thinking: tuple[str, str] = ("<think>", "</think>")
) -> World:
    """Load a checkpoint and make random artefacts for it; see :func:`put_random_artefacts`."""
    world = load_world(path, Store(store_root), thinking)
    put_random_artefacts(world)
    return world


def standard_policies(world: World) -> None:
    """The edits that every engine configuration is checked with, at depths that fit the model."""
    last = world.num_layers - 1
    low, middle, high = last // 4, last // 2, (3 * last) // 4
    alpha = {"direction": "alpha@1", "unit": "relative", "strength": 0.15}
    beta = {"direction": "beta@1", "unit": "absolute", "strength": 1.5}
    world.add_policy("one", {"a": {"add": {**alpha, "layers": middle}, "scope": "all"}})
    world.add_policy("every", {"a": {"add": {**alpha, "strength": 0.05}, "scope": "all"}})
    world.add_policy(
        "several",
        {
            "a": {"add": {**alpha, "layers": f"{low}-{middle}"}, "scope": "all"},
            "b": {"add": {**beta, "layers": f"{middle}-{high}"}, "scope": "all"},
            "c": {
                "add": {"direction": "beta@1", "unit": "unit", "strength": 2.0, "layers": last},
                "scope": ["prompt", "generation"],
            },
        },
    )
    world.add_policy("prompt", {"a": {"add": {**alpha, "layers": middle}, "scope": "prompt"}})
    world.add_policy(
        "generation", {"a": {"add": {**alpha, "layers": middle}, "scope": "generation"}}
    )
    world.add_policy(
        "split",
        {
            "p": {"add": {**alpha, "layers": f"{low}-{middle}"}, "scope": "prompt"},
            "g": {"add": {**beta, "layers": f"{middle}-{high}"}, "scope": "generation"},
        },
    )


def every_kind(world: World) -> None:
    """Policies of every kind of edit, scope and gate, at depths that fit the model."""
    last = world.num_layers - 1
    heads = world.fingerprint.num_heads
    low, middle, high = last // 4, last // 2, (3 * last) // 4
    alpha = {"direction": "alpha@1", "unit": "relative", "strength": 0.15}
    rise = {"add": {**alpha, "layers": f"{middle + 1}-{last}"}}
    # From before the probe's layer to after it: what has come before the reading stays as it was.
    across = {"add": {**alpha, "layers": f"{low}-{last}"}}
    some_heads = [[low, 0], [middle, 1], [high, heads - 1], [last, 0]]
    world.add_policy("heads", {"h": {"scale_heads": {"heads": some_heads, "factor": 0.0}}})
    world.add_policy(
        "rows",
        {
            "h": {
                "scale_heads": {
                    "heads": some_heads,
                    "factor": [0.0, 2.0, -0.5, 0.25],
                    "renormalise": "row",
                }
            },
            "i": {"scale_heads": {"heads": "few@1", "factor": 1.5}, "scope": "generation"},
        },
    )
    world.add_policy(
        "ablate",
        {
            "a": {
                "ablate": {
                    "direction": "alpha@1",
                    "layers": "all",
                    "vectorLayer": middle,
                    "sites": ["residual", "attention", "mlp"],
                }
            }
        },
    )
    world.add_policy(
        "clamp",
        {
            "a": {
                "clamp": {
                    "direction": "alpha@1",
                    "layers": f"{low}-{high}",
                    "to": 0.2,
                    "unit": "relative",
                }
            },
            "b": {"clamp": {"direction": "beta@1", "layers": last, "atLeast": -0.5, "atMost": 0.5}},
        },
    )
    world.add_policy(
        "rotate",
        {
            "a": {
                "rotate": {"plane": ["alpha@1", "beta@1"], "layers": f"{low}-{middle}", "to": 60}
            },
            "b": {"rotate": {"plane": ["beta@1", "alpha@1"], "layers": high, "by": -75}},
        },
    )
    world.add_policy(
        "everything",
        {
            "add": {"add": {**alpha, "layers": f"{low}-{high}"}, "scope": "all"},
            "ablate": {"ablate": {"direction": "beta@1", "layers": middle, "strength": 0.7}},
            "clamp": {"clamp": {"direction": "alpha@1", "layers": middle, "atMost": 0.1}},
            "rotate": {"rotate": {"plane": ["alpha@1", "beta@1"], "layers": high, "by": 20}},
            "heads": {"scale_heads": {"heads": some_heads, "factor": 0.5}, "scope": "prompt"},
        },
    )
    world.add_policy(
        "prompt-end", {"a": {"add": {**alpha, "layers": "all"}, "scope": "prompt_end"}}
    )
    world.add_policy(
        "phases",
        {
            "t": {"add": {**alpha, "layers": middle}, "scope": "thinking"},
            "e": {"scale_heads": {"heads": some_heads, "factor": 0.0}, "scope": "think_end"},
            "a": {"ablate": {"direction": "beta@1", "layers": high}, "scope": "answer"},
        },
    )
    world.add_policy(
        "first",
        {
            "a": {"add": {**alpha, "layers": middle}, "scope": [{"first": 5}]},
            "b": {"add": {**alpha, "layers": high}, "scope": ["prompt_end", {"first": 20}]},
        },
    )
    for name, keys in (("above", {"above": 0.5}), ("below", {"below": 0.5})):
        world.add_policy(
            f"gate-{name}",
            {
                "rise": {**across, "scope": "all"},
                "turn": {"rotate": {"plane": ["beta@1", "alpha@1"], "layers": middle, "by": 40}},
                "quiet": {"scale_heads": {"heads": [[middle, 0], [last, 1]], "factor": 0.0}},
                "always": {"add": {**alpha, "layers": low}},
            },
            {
                "g": {
                    "probe": "middle@1",
                    "at": "prompt_end",
                    **keys,
                    "then": ["rise", "turn", "quiet"],
                }
            },
        )
    world.add_policy(
        "gate-token",
        {"rise": {**rise, "scope": "all"}},
        {
            "g": {
                "probe": "early@1",
                "output": 1,
                "at": "token",
                "between": [0.2, 0.7],
                "then": ["rise"],
            }
        },
    )
    world.add_policy(
        "gate-think",
        {
            "rise": {**rise, "scope": ["think_end", "answer"]},
            "quiet": {"scale_heads": {"heads": some_heads, "factor": 0.0}, "scope": "generation"},
        },
        {
            "end": {"probe": "top@1", "at": "think_end", "above": 0.4, "then": ["rise"]},
            "cos": {
                "probe": "similar@1",
                "at": "prompt_end",
                "above": -0.9,
                "then": ["quiet", "rise"],
            },
        },
    )


LEAST_FLOOR = 5e-6


@dataclass(frozen=True)
class Parity:
    """How far the engine is from the reference, in nats of the chosen tokens' log-probabilities.

    Attributes:
        floor: largest difference of unsteered answers.
        worst: largest difference of steered answers.
        effect: smallest over policies and strengths of how much the first answer was moved at any token.
        by_case: largest difference by policy and strength.
        scores: largest difference of a probe's score.
        scores_spread: how far apart the scores of a probe are at most; what never changes shows nothing.
        scores_read: how many there were.
    """

    floor: float
    worst: float
    effect: float
    by_case: dict[str, float]
    scores: float = 0.0
    scores_spread: float = 0.0
    scores_read: int = 0


def compare(world: World, answers: Sequence[Answer]) -> Parity:
    """Hold every answer against the reference; greedy ones must be the reference's choice too."""
    by_case: dict[str, float] = {}
    floor = worst = scores = spread = 0.0
    effect = float("inf")
    for answer in answers:
        request = answer.request
        case = "plain" if request.policy is None else f"{request.policy} x {request.strength:g}"
        found = judge(world, answer, with_effect=case not in by_case)
        assert found.regret is None or found.regret <= 2 * TOLERANCE, (
            f"not the reference's greedy choice: {found.regret:.2g} nats"
        )
        assert not found.gate_faults, (request, found.gate_faults)
        if request.policy is None:
            floor = max(floor, found.difference)
        else:
            worst = max(worst, found.difference)
            if found.effect is not None and not world.policies[request.policy].gates:
                effect = min(effect, found.effect)
        by_case[case] = max(by_case.get(case, 0.0), found.difference)
        assert not found.score_faults, (request, found.score_faults)
        for difference, apart in found.scores.values():
            scores, spread = max(scores, difference), max(spread, apart)
    read = sum(len(trace) for answer in answers for trace in answer.scores.values())
    return Parity(floor, worst, effect, by_case, scores, spread, read)


def assert_parity(world: World, answers: Sequence[Answer], label: str) -> Parity:
    """The bound of the project: 1e-4, and no more than twice the floor of the same run.

    A floor below 5e-6 is a few units in the last place of a logit, and says more about how few plain
    tokens were looked at than about the engine.
    """
    parity = compare(world, answers)
    lines = "  ".join(f"{case}: {value:.1e}" for case, value in sorted(parity.by_case.items()))
    tokens = sum(len(a.token_ids) for a in answers)
    print(
        f"\n[parity {label}] {tokens} tokens, floor {parity.floor:.2e}, steered {parity.worst:.2e}, "
        f"smallest effect {parity.effect:.2g} nats, {parity.scores_read} scores {parity.scores:.2e} "
        f"(spread {parity.scores_spread:.2g}); {lines}"
    )
    assert parity.effect > 100 * TOLERANCE, "a policy of this batch does nothing measurable"
    # Over enough sampled tokens, improbable ones among them, the two stacks' own difference comes near the
    # bound. It is no claim of ours; much more would mean that the reference is not the model's.
    assert parity.floor <= 2 * TOLERANCE
    assert parity.worst <= TOLERANCE
    assert parity.worst <= 2 * max(parity.floor, LEAST_FLOOR)
    assert parity.scores <= TOLERANCE
    if parity.scores_read:
        assert parity.scores_spread > 100 * TOLERANCE, "the probes say the same of everything"
    return parity
