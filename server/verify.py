"""Holding the engine against the reference on one checkpoint, site by site.

An engine in this process, eager and in float32, answers a few prompts under one policy after
another, all in one batch beside unsteered requests. Each answer is then computed again by the
reference (:mod:`steering.reference`), on transformers' model. What the two differ by on the
unsteered answers is the floor.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from directions.checkpoint import local_checkpoint
from directions.errors import TrimtabError
from directions.progress import Progress, silent
from directions.quiet import hide_bars
from directions.store import Store
from steering.engine.control import activate_local, local_status
from steering.engine.parity import (
    TOLERANCE,
    Judgement,
    Request,
    World,
    engine,
    judge,
    load_world,
    run,
)
from steering.engine.payload import PlanPayload, build_payload
from steering.engine.random_artefacts import put_random_artefacts
from steering.engine.settings import DEFAULT_SLOTS, SITE_NAMES, EngineSettings
from steering.engine.site_checks import check_sites, unavailable_sites
from steering.policy import Policy
from steering.readings import Reading, compile_readings
from steering.thinking_markers import detect_markers

Verdict = Literal["pass", "FAIL", "no effect", "not available", "not checked"]

PROMPTS: Final = (
    "Which way does the wind blow today?",
    "Explain in two sentences why ships float.",
    "Write a short letter to a friend about the sea.",
    "What is seven times eight?",
)
STEERED_PROMPTS: Final = 2
"""How many of them each policy answers; unsteered requests answer them all."""

MAX_TOKENS: Final = 24

LEAST_EFFECT: Final = 10.0
"""An edit must move a log-probability by this many times the bound, or the row shows nothing."""


_SHOWN: Final = {name: name for name in SITE_NAMES} | {"add": "residual", "gates": "gate"}
"""The engine's names of sites in the words of policies."""


@dataclass(frozen=True)
class Check:
    """A row of the table before it is filled in.

    Attributes:
        site: where the edit acts.
        edit: what it is.
        policies: names of the policies that show it, together.
        asked: whether the caller named the policy, and so needs its sites.
    """

    site: str
    edit: str
    policies: tuple[str, ...]
    asked: bool = False


@dataclass(frozen=True)
class Finding:
    """A row of the table.

    Attributes:
        check: what was checked.
        verdict: ``pass``; ``FAIL`` beyond the bound, or where the engine chose another token or
            decided a gate otherwise; ``no effect`` where the edit moved nothing, so that agreement
            shows nothing; ``not available`` where the server would refuse the policy on this model;
            ``not checked`` where the reference cannot tell the site.
        difference: the largest, in nats, of a probe in its scores; None where nothing ran.
        effect: by how much the edit moved a log-probability, at most, in nats; of a probe, how far apart
            its scores are at most.
        reason: why it is not ``pass``.
    """

    check: Check
    verdict: Verdict
    difference: float | None = None
    effect: float | None = None
    reason: str | None = None

    @property
    def holds(self) -> bool:
        """Whether nothing is wrong: it passes, or no policy can come to act there."""
        return self.verdict == "pass" or (self.verdict == "not available" and not self.check.asked)


@dataclass(frozen=True)
class Verification:
    """What came of it.

    Attributes:
        floor: largest difference of the unsteered answers, in nats.
        tokens: how many were compared.
        findings: one a row.
    """

    floor: float
    tokens: int
    findings: tuple[Finding, ...]

    @property
    def bound(self) -> float:
        """The largest difference that passes; see :func:`bound_of`."""
        return bound_of(self.floor)

    @property
    def holds(self) -> bool:
        """Whether every row does."""
        return all(finding.holds for finding in self.findings)


def bound_of(floor: float) -> float:
    """1e-4 nats and, where the floor itself is larger, twice the floor."""
    return TOLERANCE if floor <= TOLERANCE else 2 * floor


def verify(
    model: str | Path,
    policies: Sequence[Policy] = (),
    *,
    thinking: tuple[str, str] | None = None,
    progress: Progress = silent,
) -> Verification:
    """Check the engine on a checkpoint.

    The engine runs in this process, with the sizes that the policies need; they are left in the
    environment, where engines look for them.

    Args:
        model: a checkpoint's folder, or its name on the hub.
        policies: what to check, with artefacts from the user's store, each taken as if enforced;
            none: every kind of edit and of probe, with random artefacts in a store of their own.
        thinking: the markers; None: told from the checkpoint.
        progress: told of the answers that are judged.

    Raises:
        TrimtabError: ``E_MODEL_…``, ``E_REFERENCE``, ``E_ENGINE``, ``E_SITE_…`` where the model cannot
            be steered at all; PolicyErrors for policies that do not fit the model.
    """
    hide_bars()
    folder = local_checkpoint(model)
    thinking = thinking or detect_markers(folder)
    if policies:
        world = load_world(folder, Store(), thinking)
        return _verified(world, _given(world, policies), progress)
    with tempfile.TemporaryDirectory(prefix="trimtab-verify-") as root:
        world = load_world(folder, Store(Path(root)), thinking)
        put_random_artefacts(world)
        return _verified(world, every_edit(world), progress)


# -- what is checked -------------------------------------------------------------------------------


def _given(world: World, policies: Sequence[Policy]) -> list[Check]:
    checks = []
    for policy in policies:
        world.add(policy)
        kinds = dict.fromkeys(edit.kind for edit in policy.edits.values())
        sites = dict.fromkeys(_SHOWN[name] for name in _payload(world, policy.name).sites)
        site = ", ".join(sites)
        edit = f"{policy.reference}: {', '.join(kinds)}"
        checks.append(Check(site or "none", edit, (policy.name,), asked=True))
    named = [reference for policy in policies for reference in policy.probes]
    world.readings = compile_readings(named, world.store, world.fingerprint)
    return checks


def every_edit(world: World) -> list[Check]:
    """Policies of every kind of edit at every site, and gates of every kind, at depths that fit."""
    last = world.num_layers - 1
    low, middle, high = last // 4, last // 2, (3 * last) // 4
    heads = sorted(
        {(n, h % world.fingerprint.num_heads) for n, h in ((low, 0), (middle, 1), (last, 2))}
    )
    named = [list(head) for head in heads]
    alpha: dict[str, Any] = {"direction": "alpha@1", "unit": "relative"}
    rise: dict[str, Any] = {"add": {**alpha, "strength": 0.15, "layers": "all"}}
    plane = ["alpha@1", "beta@1"]
    checks = []

    def check(site: str, edit: str, **spec: Any) -> None:
        name = f"check-{len(world.policies)}"
        world.add_policy(name, spec)
        checks.append(Check(site, edit, (name,)))

    def gate(edit: str, opened: dict[str, Any], *conditions: dict[str, Any]) -> None:
        names = []
        for condition in conditions:
            names.append(f"check-{len(world.policies)}")
            world.add_policy(names[-1], {"e": opened}, {"g": {**condition, "then": ["e"]}})
        checks.append(Check("gate", edit, tuple(names)))

    check("residual", "add", a=rise)
    check("residual", "ablate", a={"ablate": {"direction": "alpha@1", "vectorLayer": middle}})
    check(
        "residual",
        "clamp",
        a={"clamp": {**alpha, "layers": list(range(low, high + 1)), "to": 0.2}},
        b={"clamp": {"direction": "beta@1", "layers": last, "atLeast": -0.5, "atMost": 0.5}},
    )
    check("residual", "rotate to", a={"rotate": {"plane": plane, "layers": "all", "to": 60}})
    check("residual", "rotate by", a={"rotate": {"plane": plane, "layers": "all", "by": -75}})
    for site in ("attention", "mlp"):
        # Turned round and doubled, since a random direction holds little of a block's output.
        ablate = {"direction": "alpha@1", "sites": [site], "strength": 3.0}
        check(site, "ablate", a={"ablate": ablate})
    check("heads", "scale_heads", a={"scale_heads": {"heads": named, "factor": 0.0}})
    check(
        "heads",
        "scale_heads, renormalise: row",
        a={"scale_heads": {"heads": named, "factor": -1.5, "renormalise": "row"}},
        b={"scale_heads": {"heads": "few@1", "factor": 2.0}, "scope": "generation"},
    )
    # At a layer after the probe's, as a gate per token needs; the others open edits at every layer.
    late = {"add": {**alpha, "strength": 0.3, "layers": last}}
    for edit, opened, probe, keys in (
        ("affine, at: prompt_end", rise, "middle@1", {"at": "prompt_end"}),
        ("cosine, at: prompt_end", late, "similar@1", {"at": "prompt_end"}),
        ("final norm, at: prompt_end", rise, "top@1", {"at": "prompt_end"}),
        ("affine, at: token", late, "early@1", {"at": "token", "output": 1}),
    ):
        if keys["at"] == "token" and last == low:
            continue  # there is no layer after the probe's
        threshold = 0.0 if probe == "similar@1" else 0.5
        # One of the two opens, whatever the score.
        conditions = [{"probe": probe, **keys, key: threshold} for key in ("above", "below")]
        gate(edit, opened, *conditions)
    check(
        "all",
        "several edits, scopes",
        add={**rise, "scope": ["prompt_end", {"first": 8}]},
        ablate={"ablate": {"direction": "beta@1", "layers": middle, "strength": 0.7}},
        clamp={"clamp": {**alpha, "layers": middle, "atMost": 0.1}, "scope": "generation"},
        rotate={"rotate": {"plane": plane, "layers": high, "by": 20}, "scope": "prompt"},
        heads={"scale_heads": {"heads": named, "factor": 0.5}, "scope": {"first": 16}},
    )
    return checks


# -- running and judging ---------------------------------------------------------------------------


def _verified(world: World, checks: Sequence[Check], progress: Progress) -> Verification:
    payloads = {name: _payload(world, name) for name in world.plans}
    os.environ.update(_settings(payloads.values()).to_environment())
    prompts = [tuple(world.prompt(text)) for text in PROMPTS]
    length = max(map(len, prompts)) + MAX_TOKENS
    with _started(world, length) as llm:
        refused = _activated(world, llm, checks, payloads)
        requests = [Request(prompt, max_tokens=MAX_TOKENS) for prompt in prompts]
        for check in checks:
            if check not in refused:
                requests += [
                    Request(prompt, policy, max_tokens=MAX_TOKENS)
                    for policy in check.policies
                    for prompt in prompts[:STEERED_PROMPTS]
                ]
        answers = run(llm, world, requests)
    advance = progress("compare answers with the reference", len(answers))
    judged: dict[str | None, list[Judgement]] = {}
    unjudged: dict[str | None, str] = {}
    for answer in answers:
        policy = answer.request.policy
        try:
            judged.setdefault(policy, []).append(judge(world, answer))
        except ValueError as error:
            unjudged[policy] = str(error)
        advance(1)
    if None in unjudged:
        raise TrimtabError("E_REFERENCE", f"the reference cannot run this model: {unjudged[None]}")
    floor = max(found.difference for found in judged[None])
    findings = [
        _finding(check, judged, unjudged, bound_of(floor))
        if check not in refused
        else Finding(check, "not available", reason=refused[check])
        for check in checks
    ]
    every = [judgement for found in judged.values() for judgement in found]
    asked = any(check.asked for check in checks)
    findings += [_reading_finding(reading, every, asked) for reading in world.readings]
    return Verification(floor, sum(len(answer.token_ids) for answer in answers), tuple(findings))


@contextmanager
def _started(world: World, length: int) -> Iterator[Any]:
    described = world.fingerprint
    token_bytes = 8 * described.num_layers * described.num_kv_heads
    token_bytes *= max(described.hidden_size // described.num_heads, 128)
    sizes: dict[str, Any] = {
        "max_model_len": length,
        "max_num_seqs": 16,
        # Room for eight answers at once; the others wait.
        "kv_cache_memory_bytes": max(64 * 2**20, 8 * token_bytes * (length + 256)),
        "disable_log_stats": True,
    }
    with engine_errors(), engine(world.path, **sizes) as llm:
        yield llm


@contextmanager
def engine_errors() -> Iterator[None]:
    """Errors of vLLM's own as ``E_ENGINE``."""
    try:
        yield
    except (TrimtabError, KeyboardInterrupt):
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        raise TrimtabError("E_ENGINE", f"vLLM ended with {type(error).__name__}: {said}") from error


def _settings(payloads: Collection[PlanPayload]) -> EngineSettings:
    """Sizes at which all plans can be in use at once, with every site hooked."""
    deepest = 1
    for payload in payloads:
        for row in payload.rows:
            used: Counter[tuple[int, int]] = Counter()
            for projection in row.projections:
                used[projection.site, projection.layer] += len(projection.vectors)
            deepest = max(deepest, *used.values(), 1)
    rows = sum(len(payload.rows) for payload in payloads)
    return EngineSettings(slots=max(DEFAULT_SLOTS, rows + 1), sites=SITE_NAMES, projections=deepest)


def _payload(world: World, policy: str) -> PlanPayload:
    described = world.fingerprint
    return build_payload(
        world.plans[policy], world.store, described.num_layers, described.hidden_size
    )


def _activated(
    world: World, llm: Any, checks: Sequence[Check], payloads: Mapping[str, PlanPayload]
) -> dict[Check, str]:
    """Activate what the engine takes; return the other checks with the reasons."""
    ranks = local_status(llm)
    refused = {}
    for check in checks:
        try:
            for policy in check.policies:
                check_sites(payloads[policy], ranks)
            activate_local(llm, [world.plans[policy] for policy in check.policies], world.store)
        except TrimtabError as error:
            refused[check] = _reason(error, check, ranks)
    return refused


def _reason(error: TrimtabError, check: Check, ranks: Sequence[Mapping[str, Any]]) -> str:
    """Why a check cannot run: of a default row, what is said of its site alone."""
    return error.message if check.asked else unavailable_sites(ranks).get(check.site, error.message)


def _reading_finding(reading: Reading, judged: Sequence[Judgement], asked: bool) -> Finding:
    """A row for one output of a probe, over all answers, steered and not; scores instead of nats."""
    check = Check("probe", f"{reading.key}: {reading.read_out}", (), asked)
    faults = [
        found.score_faults[reading.key] for found in judged if reading.key in found.score_faults
    ]
    scores = [found.scores[reading.key] for found in judged if reading.key in found.scores]
    if not scores and not faults:
        return Finding(check, "not available", reason="this model or server does not have its site")
    difference = max((difference for difference, _ in scores), default=None)
    spread = max((apart for _, apart in scores), default=None)
    if not all(difference <= TOLERANCE for difference, _ in scores):
        faults.insert(0, f"scores differ by {difference:.2g}, {TOLERANCE:.2g} is the bound")
    if faults:
        return Finding(check, "FAIL", difference, spread, faults[0])
    if not asked and spread is not None and spread < LEAST_EFFECT * TOLERANCE:
        reason = f"says the same of everything, within {spread:.2g}"
        return Finding(check, "no effect", difference, spread, reason)
    return Finding(check, "pass", difference, spread)


def _finding(
    check: Check,
    judged: Mapping[str | None, Sequence[Judgement]],
    unjudged: Mapping[str | None, str],
    bound: float,
) -> Finding:
    for policy in check.policies:
        if policy in unjudged:
            return Finding(check, "not checked", reason=unjudged[policy])
    found = [judgement for policy in check.policies for judgement in judged[policy]]
    difference = max(judgement.difference for judgement in found)
    effect = max(judgement.effect or 0.0 for judgement in found)
    faults = [fault for judgement in found for fault in judgement.gate_faults]
    # Written so that a difference that is not a number fails.
    if not all(judgement.difference <= bound for judgement in found):
        faults.insert(0, f"differs by {difference:.2g} nats, {bound:.2g} is the bound")
    elif not all((judgement.regret or 0.0) <= 2 * bound for judgement in found):
        faults.insert(0, "the engine chose a token that is not the reference's most probable one")
    if faults:
        return Finding(check, "FAIL", difference, effect, faults[0])
    if not check.asked and effect < LEAST_EFFECT * bound:
        reason = f"moves nothing by more than {effect:.2g} nats, so agreement shows nothing"
        return Finding(check, "no effect", difference, effect, reason)
    return Finding(check, "pass", difference, effect)
