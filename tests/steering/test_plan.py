"""Compiling a policy: what each unit comes to, what is refused, and when two plans are one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from directions.card import HeadSetDraft, ModelFingerprint
from directions.errors import TrimtabError
from directions.store import ArtefactRef, Store
from steering.edits.kind import Contribution
from steering.plan import (
    PHASES,
    Plan,
    PlanGate,
    Projection,
    Row,
    Term,
    combined,
    compile_policy,
    projection_vectors,
    row_vectors,
)
from steering.policy import Policy, parse_policy
from steering.policy_errors import PolicyErrors
from tests.steering.conftest import PutDirection, model_fingerprint

THINK = ("<think>", "</think>")


def policy(*edits: dict[str, Any], **keys: Any) -> Policy:
    """A policy of ``add`` edits: the keys of ``add``, and ``scope``."""
    return parse_policy(
        {
            "apiVersion": "trimtab/v1",
            "kind": "Policy",
            "name": "guard",
            "edits": {
                f"e{i}": {
                    "add": {k: v for k, v in edit.items() if k != "scope"},
                    "scope": edit.get("scope", "all"),
                }
                for i, edit in enumerate(edits)
            },
            **keys,
        }
    )


def add(direction: str = "demo@1", strength: float = 1.0, **keys: Any) -> dict[str, Any]:
    return {"direction": direction, "strength": strength, **keys}


def faults(
    policy: Policy, store: Store, model: ModelFingerprint, **keys: float
) -> list[tuple[str, str]]:
    with pytest.raises(PolicyErrors) as caught:
        compile_policy(policy, store, model, **keys)
    assert {error.policy for error in caught.value.errors} == {"guard"}
    return [(error.field, error.code) for error in caught.value.errors]


# -- what a policy comes to ------------------------------------------------------------------------


def test_absolute_strength_is_the_coefficient_of_the_stored_vector(
    store: Store, put_direction: PutDirection, served: ModelFingerprint
) -> None:
    ref = put_direction()

    plan = compile_policy(policy(add(strength=-0.5, layers=[3, 1])), store, served)

    assert plan.rows == (Row(add=(Term(ref.sha256, ((1, -0.5), (3, -0.5))),)),)
    assert plan.cases == ((0, 0, 0, 0, 0),)
    assert (plan.windows, plan.gates, plan.thinking) == ((), (), None)
    assert (plan.phased, plan.kinds) == (False, {"add"})


def test_unit_strength_is_the_length_of_what_is_added(
    store: Store, put_direction: PutDirection, served: ModelFingerprint
) -> None:
    put_direction()

    plan = compile_policy(policy(add(strength=2.5, unit="unit")), store, served)

    lengths = np.linalg.norm(row_vectors(plan.rows[0].add, store, 4, 64), axis=1)
    np.testing.assert_allclose(lengths, [2.5] * 4, rtol=1e-6)


def test_relative_strength_is_a_share_of_each_layers_mean_norm(
    store: Store, put_direction: PutDirection, served: ModelFingerprint
) -> None:
    put_direction(norms=[1.0, 10.0, 100.0, 1000.0])

    plan = compile_policy(policy(add(strength=0.1, unit="relative")), store, served)

    lengths = np.linalg.norm(row_vectors(plan.rows[0].add, store, 4, 64), axis=1)
    np.testing.assert_allclose(lengths, [0.1, 1.0, 10.0, 100.0], rtol=1e-6)


def test_all_layers_are_those_that_the_direction_has(
    store: Store, put_direction: PutDirection, served: ModelFingerprint
) -> None:
    put_direction(present=[False, True, False, True])

    plan = compile_policy(policy(add(layers="all")), store, served)

    assert [layer for layer, _ in plan.rows[0].add[0].coefficients] == [1, 3]


def test_one_layers_vector_can_be_used_at_all(
    store: Store, put_direction: PutDirection, served: ModelFingerprint
) -> None:
    ref = put_direction(present=[False, True, True, False], norms=[1.0, 10.0, 100.0, 1000.0])

    plan = compile_policy(
        policy(add(strength=0.1, unit="relative", vectorLayer=2), add(layers=[2], vectorLayer=1)),
        store,
        served,
    )

    vectors = store.load(ref.reference).vectors
    expected = np.tile(10.0 * vectors[2] / np.linalg.norm(vectors[2]), (4, 1))
    expected[2] += vectors[1]
    np.testing.assert_allclose(row_vectors(plan.rows[0].add, store, 4, 64), expected, rtol=1e-5)
    assert [term.vector_layer for term in plan.rows[0].add] == [None, 1, 2]


@pytest.mark.parametrize(
    ("scope", "cases", "thinking"),
    [
        ("all", (0, 0, 0, 0, 0), None),
        ("prompt", (0, 0, None, None, None), None),
        ("prompt_end", (None, 0, None, None, None), None),
        ("generation", (None, None, 0, 0, 0), None),
        ("thinking", (None, None, 0, None, None), THINK),
        ("think_end", (None, None, None, 0, None), THINK),
        ("answer", (None, None, None, None, 0), THINK),
        (["prompt_end", "answer"], (None, 0, None, None, 0), THINK),
    ],
)
def test_a_scope_leaves_the_other_phases_alone(
    scope: Any,
    cases: tuple[int | None, ...],
    thinking: tuple[str, str] | None,
    store: Store,
    put_direction: PutDirection,
    served: ModelFingerprint,
) -> None:
    put_direction()

    plan = compile_policy(policy(add(scope=scope)), store, served, thinking=THINK)

    assert (len(plan.rows), plan.cases) == (1, (cases,))
    assert plan.thinking == thinking
    assert plan.phased == (scope != "all")


def test_edits_with_different_scopes_make_a_row_for_each_phase(
    store: Store, put_direction: PutDirection, served: ModelFingerprint
) -> None:
    calm, dry = put_direction("calm", seed=1), put_direction("dry", seed=2)

    plan = compile_policy(
        policy(add("calm@1", layers=1), add("dry@1", layers=2, scope="generation")), store, served
    )

    both = sorted([Term(calm.sha256, ((1, 1.0),)), Term(dry.sha256, ((2, 1.0),))], key=repr)
    assert plan.cases == ((0, 0, 1, 1, 1),)
    assert plan.rows[0].add == (Term(calm.sha256, ((1, 1.0),)),)
    assert sorted(plan.rows[1].add, key=repr) == both


def test_first_tokens_make_windows(
    store: Store, put_direction: PutDirection, served: ModelFingerprint
) -> None:
    put_direction()

    plan = compile_policy(
        policy(
            add(layers=1, scope={"first": 8}),
            add(layers=2, scope=["prompt_end", {"first": 2}]),
            add(layers=3, scope="answer"),
        ),
        store,
        served,
        thinking=THINK,
    )

    layers = [
        [] if row is None else [layer for layer, _ in plan.rows[row].add[0].coefficients]
        for row in plan.cases[0]
    ]
    assert plan.windows == (2, 8)
    assert layers == [
        *([], [2]),
        *([1, 2], [1, 2], [1, 2, 3]),  # tokens 0 and 1
        *([1], [1], [1, 3]),  # 2 to 7
        *([], [], [3]),  # from 8
    ]


def test_a_window_that_changes_nothing_is_left_out(
    store: Store, put_direction: PutDirection, served: ModelFingerprint
) -> None:
    put_direction()
    short, long = add(scope={"first": 2}), add(layers=1, scope={"first": 8})

    def compiled(*edits: dict[str, Any]) -> Plan:
        return compile_policy(policy(*edits), store, served)

    assert compiled({**short, "strength": 0.0}, long) == compiled(long)
    assert compiled(short, {**short, "strength": -1.0}, long) == compiled(long)
    assert compiled(short, {**long, "strength": 0.0}) == compiled(short)
    assert compiled({**short, "strength": 0.0}).is_identity
    assert compiled({**short, "strength": 0.0}).windows == ()


edits = st.lists(
    st.fixed_dictionaries(
        {
            "direction": st.sampled_from(["one@1", "two@1"]),
            "strength": st.floats(-2, 2).map(lambda x: round(x, 3)),
        },
        optional={
            "layers": st.sets(st.integers(0, 3), min_size=1).map(sorted),
            "scope": st.sampled_from(
                ["all", "prompt", "prompt_end", "generation", "thinking", {"first": 3}]
            ),
            "unit": st.sampled_from(["absolute", "unit", "relative"]),
        },
    ),
    max_size=4,
)
with_fixtures = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None
)


def in_scope(scope: Any, phase: str, offset: int | None) -> bool:
    if isinstance(scope, dict):
        return offset is not None and offset < scope["first"]
    return phase in {
        "all": PHASES,
        "prompt": ("prompt", "prompt_end"),
        "generation": ("thinking", "think_end", "answer"),
    }.get(scope, (scope,))


def by_hand(
    edits: list[dict[str, Any]],
    vectors: dict[str, np.ndarray],
    norms: list[float],
    phase: str,
    offset: int | None,
) -> np.ndarray:
    """What the formulas of ``add`` come to for one token, written out."""
    total = np.zeros((4, 64))
    for edit in edits:
        if not in_scope(edit.get("scope", "all"), phase, offset):
            continue
        for layer in edit.get("layers", range(4)):
            v = vectors[edit["direction"]][layer].astype(np.float64)
            if edit.get("unit", "absolute") != "absolute":
                v = v / math.sqrt((v * v).sum())
            if edit.get("unit") == "relative":
                v = v * norms[layer]
            total[layer] += edit["strength"] * v
    return total


def row_of(plan: Plan, phase: str, offset: int | None, opened: int = 0) -> Row:
    """The row of a token, as the engine chooses it; ``opened`` is the mask of open gates."""
    case = PHASES.index(phase)  # type: ignore[arg-type]
    if offset is not None:
        case += 3 * sum(offset >= n for n in plan.windows)
    row = plan.cases[opened][case]
    return Row() if row is None else plan.rows[row]


TOKENS = [("prompt", None), ("prompt_end", None)] + [
    (phase, offset) for phase in PHASES[2:] for offset in (0, 2, 3, 9)
]


@given(edits=edits)
@with_fixtures
def test_a_plan_adds_what_the_formulas_say(
    edits: list[dict[str, Any]],
    store: Store,
    put_direction: PutDirection,
    served: ModelFingerprint,
) -> None:
    norms = [1.0, 2.0, 4.0, 8.0]
    vectors = {
        reference: np.random.default_rng(i).normal(size=(4, 64)).astype(np.float32)
        for i, reference in enumerate(("one@1", "two@1"))
    }
    for reference, values in vectors.items():
        put_direction(reference.removesuffix("@1"), vectors=values, norms=norms)

    plan = compile_policy(policy(*edits), store, served, relative_ceiling=2.0, thinking=THINK)

    for phase, offset in TOKENS:
        expected = by_hand(edits, vectors, norms, phase, offset)
        got = row_vectors(row_of(plan, phase, offset).add, store, 4, 64)
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


# -- when two plans are one ------------------------------------------------------------------------


@given(edits=edits, random=st.randoms())
@with_fixtures
def test_the_order_of_edits_does_not_show(
    edits: list[dict[str, Any]],
    random: Any,
    store: Store,
    put_direction: PutDirection,
    served: ModelFingerprint,
) -> None:
    put_direction("one", seed=1)
    put_direction("two", seed=2)
    shuffled = list(edits)
    random.shuffle(shuffled)

    plan = compile_policy(policy(*edits), store, served, relative_ceiling=2.0, thinking=THINK)
    other = compile_policy(policy(*shuffled), store, served, relative_ceiling=2.0, thinking=THINK)

    assert plan == other


LESS_FIRST = [add(strength=-1.0, scope={"first": 5})]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([add(strength=0.5)], [add(strength=0.25), add(strength=0.25)]),
        ([add()], [add(scope="prompt"), add(scope="generation")]),
        ([add()], [add(layers="0-1"), add(layers="2-3")]),
        ([add()], [add(layers="all", unit="absolute"), add(strength=0.0)]),
        ([add()], [add(), add(layers=2, strength=3.0), add(layers=2, strength=-3.0)]),
        ([add()], [add("copy@1")]),
        ([add(layers=2)], [add(layers=2, vectorLayer=2)]),
        ([add()], [add(scope=["prompt", {"first": 5}]), add(scope="generation"), *LESS_FIRST]),
        ([add(layers=3)], [add(layers=[3], strength=0.75), add(layers="3", strength=0.25)]),
    ],
)
def test_equal_effects_share_a_plan(
    one: list[dict[str, Any]],
    other: list[dict[str, Any]],
    store: Store,
    put_direction: PutDirection,
    served: ModelFingerprint,
) -> None:
    put_direction()
    put_direction("copy")  # the same content under another name
    settings = {"name": "other", "version": 7, "mode": "shadow", "onFailure": "open"}

    assert compile_policy(policy(*one), store, served) == compile_policy(
        policy(*other, **settings), store, served
    )


def test_different_effects_have_different_ids(
    store: Store, put_direction: PutDirection, served: ModelFingerprint
) -> None:
    put_direction(norms=[3.0, 4.0, 5.0, 6.0])
    put_direction("other", seed=1)
    policies = [
        policy(),
        policy(add()),
        policy(add(strength=-1.0)),
        policy(add(layers=3)),
        policy(add(layers=2)),
        policy(add(scope="prompt")),
        policy(add(scope="generation")),
        policy(add(scope="prompt_end")),
        policy(add(scope="answer")),
        policy(add(scope="thinking")),
        policy(add(scope={"first": 1})),
        policy(add(scope={"first": 2})),
        policy(add(vectorLayer=1)),
        policy(add(vectorLayer=2)),
        policy(add(unit="unit")),
        policy(add(unit="relative")),
        policy(add("other@1")),
        policy(add(), add("other@1")),
        policy(add(scope="prompt"), add("other@1", scope="generation")),
        policy(add(scope="generation"), add("other@1", scope="prompt")),
    ]

    ids = {compile_policy(each, store, served, thinking=THINK).id for each in policies}

    assert len(ids) == len(policies)


@pytest.mark.parametrize(
    "edits", [[], [add(strength=0.0)], [add(strength=2.0), add(strength=-2.0)]]
)
def test_a_policy_that_changes_nothing_is_the_identity(
    edits: list[dict[str, Any]],
    store: Store,
    put_direction: PutDirection,
    served: ModelFingerprint,
) -> None:
    put_direction()

    plan = compile_policy(policy(*edits), store, served)

    assert plan.is_identity
    assert plan.cases == ((None,) * 5,)
    assert not plan.phased
    assert plan.kinds == set()


def test_ids_do_not_change_between_releases() -> None:
    clip = Projection("mlp", "clip", (("e" * 64, 2),), ((0, (0.0, None, 1.5)),))
    row = combined(
        [
            Contribution(add={("f" * 64, None, 5): -2.0, ("f" * 64, None, 0): 0.1}),
            Contribution(add={("e" * 64, None, 1): 0.0}, projections=(clip,)),
            Contribution(heads={(3, 1): -1.0}, renormalise=frozenset({2, 3})),
        ]
    )
    gate = PlanGate("g", "d" * 64, 1, "token", 0.5, None, 4)
    closed, opened = [Row()] * 8, [row, row, *[Row()] * 3, row, row, row]

    plan = Plan.of([closed, opened], [4], [gate], THINK)

    assert plan == Plan(
        "91f8e4bd0a0022ae2d89d97153aba63444f35d638a928e2a4cd05d45addc7e6f",
        (
            Row(
                add=(Term("f" * 64, ((0, 0.1), (5, -2.0))),),
                projections=(clip,),
                heads=((3, 1, -1.0),),
                renormalise=(3,),
            ),
        ),
        ((None,) * 8, (0, 0, None, None, None, 0, 0, 0)),
        (4,),
        (gate,),
        None,
    )
    empty = Plan.of([[Row()] * 5])
    assert (empty.id, empty.is_identity) == (
        "cf5a0edcdad5af8b299c3c41fd8e105e007d49e20c1589cc7829d14a9676e3e2",
        True,
    )


# -- what is refused -------------------------------------------------------------------------------


def test_a_layer_beyond_the_model_is_refused(
    store: Store, put_direction: PutDirection, served: ModelFingerprint
) -> None:
    put_direction()

    assert faults(policy(add(layers="2-4")), store, served) == [
        ("$.edits.e0.add.layers", "E_LAYER_RANGE")
    ]


def test_a_layer_that_the_direction_lacks_is_refused(
    store: Store, put_direction: PutDirection, served: ModelFingerprint
) -> None:
    put_direction(present=[False, True, False, True])

    with pytest.raises(PolicyErrors) as caught:
        compile_policy(policy(add(layers="0-3")), store, served)

    assert (caught.value.code, caught.value.field) == ("E_LAYER_ABSENT", "$.edits.e0.add.layers")
    assert "no vector for layers 0,2" in caught.value.message
    assert caught.value.expected == "among 1,3"


def test_a_direction_of_another_width_is_refused(
    store: Store, put_direction: PutDirection, served: ModelFingerprint
) -> None:
    put_direction(model=model_fingerprint(hidden_size=32))

    assert faults(policy(add()), store, served) == [
        ("$.edits.e0.add.direction", "E_DIRECTION_WIDTH")
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": "GemmaForCausalLM"},
        {"num_layers": 5},
        {"num_heads": 8},
        {"num_kv_heads": 4},
        {"tokenizer_sha256": "d" * 64},
        {"chat_template_sha256": None},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_direction_of_another_model_is_refused(
    change: dict[str, Any], store: Store, put_direction: PutDirection, served: ModelFingerprint
) -> None:
    put_direction(model=model_fingerprint(**change))

    with pytest.raises(PolicyErrors) as caught:
        compile_policy(policy(add()), store, served)

    assert (caught.value.code, caught.value.field) == (
        "E_DIRECTION_MODEL",
        "$.edits.e0.add.direction",
    )
    assert next(iter(change)) in caught.value.message


def test_an_artefact_that_is_not_there_is_refused(store: Store, served: ModelFingerprint) -> None:
    assert faults(policy(add(), add("sha256:" + "0" * 64)), store, served) == [
        ("$.edits.e0.add.direction", "E_ARTEFACT_UNKNOWN"),
        ("$.edits.e1.add.direction", "E_ARTEFACT_UNKNOWN"),
    ]


def test_an_artefact_that_was_tampered_with_is_refused(
    store: Store, put_direction: PutDirection, served: ModelFingerprint
) -> None:
    ref = put_direction()
    (file,) = store.root.rglob(f"{ref.sha256}/tensors.safetensors")
    file.chmod(0o644)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)

    assert faults(policy(add()), store, served) == [
        ("$.edits.e0.add.direction", "E_ARTEFACT_TAMPERED")
    ]


@pytest.mark.parametrize("unit", ["unit", "relative"])
def test_a_zero_vector_has_no_unit_vector(
    unit: str, store: Store, put_direction: PutDirection, served: ModelFingerprint
) -> None:
    vectors = np.ones((4, 64), dtype=np.float32)
    vectors[2] = 0.0
    put_direction(vectors=vectors)

    assert faults(policy(add(unit=unit)), store, served) == [
        ("$.edits.e0.add.direction", "E_DIRECTION_ZERO")
    ]
    assert compile_policy(policy(add(unit=unit, layers=[0, 1, 3])), store, served)
    assert compile_policy(policy(add(unit="absolute")), store, served)


@pytest.mark.parametrize("missing", [None, 0.0])
def test_relative_strength_needs_the_layers_norm(
    missing: float | None, store: Store, put_direction: PutDirection, served: ModelFingerprint
) -> None:
    put_direction(norms=[1.0, missing, 1.0, 1.0])

    assert faults(policy(add(unit="relative")), store, served) == [
        ("$.edits.e0.add.unit", "E_NORMS_MISSING")
    ]
    assert compile_policy(policy(add(unit="relative", layers=[0, 2, 3])), store, served)
    assert compile_policy(policy(add(unit="unit")), store, served)


def test_the_ceiling_of_relative_strength_counts_the_whole_range(
    store: Store, put_direction: PutDirection, served: ModelFingerprint
) -> None:
    put_direction()
    edit = add(strength=-0.5, unit="relative")

    assert compile_policy(policy(edit), store, served, relative_ceiling=0.5)
    assert compile_policy(policy(edit, strengthRange=[-2, 1]), store, served, relative_ceiling=1.0)
    ceiling = [("$.edits.e0.add.strength", "E_STRENGTH_CEILING")]
    assert faults(policy(edit), store, served, relative_ceiling=0.49) == ceiling
    assert (
        faults(policy(edit, strengthRange=[-2, 1]), store, served, relative_ceiling=0.99) == ceiling
    )


@pytest.mark.parametrize(
    ("strengths", "top"),
    [([1e39], 1), ([1e308, 1e308], 1), ([3e38, 3e38], 1), ([1e30], 1e30), ([1e300], 1e300)],
)
def test_strengths_too_large_for_32_bit_numbers_are_refused(
    strengths: list[float],
    top: float,
    store: Store,
    put_direction: PutDirection,
    served: ModelFingerprint,
) -> None:
    put_direction(vectors=np.ones((4, 64), dtype=np.float32))
    too_strong = policy(*(add(strength=s) for s in strengths), strengthRange=[0, top])

    assert faults(too_strong, store, served) == [("$.edits", "E_STRENGTH_CEILING")]


def test_all_faults_of_a_policy_are_found_at_once(
    store: Store, put_direction: PutDirection, served: ModelFingerprint
) -> None:
    put_direction()
    put_direction("narrow", model=model_fingerprint(hidden_size=32))

    assert faults(
        policy(
            add(layers=9, strength=7.0, unit="relative"),
            add("narrow@1", layers=9),
            add("gone@1", layers=9),
        ),
        store,
        served,
    ) == [
        ("$.edits.e0.add.strength", "E_STRENGTH_CEILING"),
        ("$.edits.e0.add.layers", "E_LAYER_RANGE"),
        ("$.edits.e1.add.layers", "E_LAYER_RANGE"),
        ("$.edits.e1.add.direction", "E_DIRECTION_WIDTH"),
        ("$.edits.e2.add.layers", "E_LAYER_RANGE"),
        ("$.edits.e2.add.direction", "E_ARTEFACT_UNKNOWN"),
    ]


@pytest.fixture
def put_heads(store: Store) -> Callable[..., ArtefactRef]:
    """Put a head set into the store."""

    def put(
        heads: list[tuple[int, int]], *, name: str = "heads", model: ModelFingerprint | None = None
    ) -> ArtefactRef:
        draft = HeadSetDraft(
            method="test",
            model=model or model_fingerprint(),
            dtype="float32",
            created="2026-01-01T00:00:00Z",
        )
        return store.put_head_set(draft, heads, [1.0] * len(heads), name=name)

    return put


# -- the other kinds of edit -----------------------------------------------------------------------


def mixed(*, top: float = 1.0, **edits: dict[str, Any]) -> Policy:
    """A policy of edits as they are written, by name."""
    document: dict[str, Any] = {
        "apiVersion": "trimtab/v1",
        "kind": "Policy",
        "name": "guard",
        "strengthRange": [0, top],
        "edits": edits,
    }
    return parse_policy(document)


def ablate(direction: str = "demo@1", **keys: Any) -> dict[str, Any]:
    return {"ablate": {"direction": direction, **keys}}


def only_row(policy: Policy, store: Store, model: ModelFingerprint, **keys: Any) -> Row:
    plan = compile_policy(policy, store, model, **keys)
    (row,) = plan.rows
    return row


def test_ablation_is_a_clip_without_bounds_at_each_site(
    store: Store, put_direction: PutDirection, served: ModelFingerprint
) -> None:
    ref = put_direction(present=[False, True, True, False])

    row = only_row(
        mixed(e=ablate(strength=0.25, sites=["mlp", "residual"], layers=[1, 2])), store, served
    )

    layers = ((1, (0.75, None, None)), (2, (0.75, None, None)))
    assert row == Row(
        projections=tuple(
            Projection(site, "clip", ((ref.sha256, None),), layers)  # type: ignore[arg-type]
            for site in ("mlp", "residual")
        )
    )


@pytest.mark.parametrize(
    ("keys", "bounds"),
    [
        ({"to": 2}, (2.0, 2.0)),
        ({"atLeast": -1}, (-1.0, None)),
        ({"atMost": 3}, (None, 3.0)),
        ({"atLeast": 1, "atMost": 3}, (1.0, 3.0)),
    ],
)
def test_clamps_are_clips_between_bounds(
    keys: dict[str, Any],
    bounds: tuple[float | None, float | None],
    store: Store,
    put_direction: PutDirection,
    served: ModelFingerprint,
) -> None:
    ref = put_direction(norms=[1.0, 10.0, 100.0, 1000.0])

    absolute = only_row(
        mixed(e={"clamp": {"direction": "demo@1", "layers": 1, **keys}}), store, served
    )
    relative = only_row(
        mixed(e={"clamp": {"direction": "demo@1", "unit": "relative", "vectorLayer": 2, **keys}}),
        store,
        served,
        relative_ceiling=9.0,
    )

    assert absolute.projections == (
        Projection("residual", "clip", ((ref.sha256, None),), ((1, (1.0, *bounds)),)),
    )
    hundred = tuple(None if bound is None else 100.0 * bound for bound in bounds)
    assert {
        layer: numbers for found in relative.projections for layer, numbers in found.layers
    } == dict.fromkeys(range(4), (1.0, *hundred))


@pytest.mark.parametrize("key", ["to", "by"])
def test_rotations_turn_in_an_orthonormal_plane(
    key: str, store: Store, put_direction: PutDirection, served: ModelFingerprint
) -> None:
    first = put_direction("a", seed=1, present=[True, True, True, False])
    second = put_direction("b", seed=2, present=[False, True, True, True])

    row = only_row(mixed(e={"rotate": {"plane": ["a@1", "b@1"], key: 90}}), store, served)

    (found,) = row.projections
    assert found == Projection(
        "residual",
        "turn_to" if key == "to" else "turn_by",
        ((first.sha256, None), (second.sha256, None)),
        ((1, (math.pi / 2,)), (2, (math.pi / 2,))),
    )
    for layer, basis in projection_vectors(found, store, 4, 64).items():
        assert basis.dtype == np.float32
        a, b = (store.load(name).vectors[layer] for name in ("a@1", "b@1"))
        np.testing.assert_allclose(basis @ basis.T, np.eye(2), atol=1e-6)
        np.testing.assert_allclose(basis[0], a / np.linalg.norm(a), rtol=1e-5)
        in_plane = basis.T @ (basis @ b)
        np.testing.assert_allclose(in_plane, b, atol=1e-5)
        assert basis[1] @ b > 0


def test_the_vector_of_a_clip_is_the_stored_ones_unit(
    store: Store, put_direction: PutDirection
) -> None:
    ref = put_direction()
    clip = Projection("mlp", "clip", ((ref.sha256, 3),), ((0, (0.0, None, None)),))

    (vector,) = projection_vectors(clip, store, 4, 64)[0]

    stored = store.load("demo@1").vectors[3]
    np.testing.assert_allclose(vector, stored / np.linalg.norm(stored), rtol=1e-6)


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [(0.0, 1.0, "E_DIRECTION_ZERO"), (1.0, 1.0, "E_PLANE_PARALLEL")],
)
def test_vectors_without_a_plane_have_no_basis(
    first: float, second: float, code: str, store: Store, put_direction: PutDirection
) -> None:
    a = put_direction("a", vectors=np.full((4, 64), first, dtype=np.float32))
    b = put_direction("b", vectors=np.full((4, 64), second, dtype=np.float32))
    turn = Projection("residual", "turn_by", ((a.sha256, None), (b.sha256, None)), ((0, (1.0,)),))

    with pytest.raises(TrimtabError) as caught:
        projection_vectors(turn, store, 4, 64)

    assert caught.value.code == code


def test_scaled_heads_add_up(
    store: Store, put_heads: Callable[..., ArtefactRef], served: ModelFingerprint
) -> None:
    put_heads([(3, 1), (0, 2)])

    row = only_row(
        mixed(
            a={"scale_heads": {"heads": "heads@1", "factor": 0}},
            b={"scale_heads": {"heads": [[3, 1], [2, 0]], "factor": [3, 1], "renormalise": "row"}},
            c={"scale_heads": {"heads": [[0, 2], [1, 3]], "factor": 2}},
        ),
        store,
        served,
    )

    # b leaves head 0 of layer 2 as it is, so there is nothing to renormalise there.
    assert row == Row(heads=((1, 3, 1.0), (3, 1, 1.0)), renormalise=(3,))


def test_projections_keep_the_order_of_kinds_and_names_where_they_meet(
    store: Store, put_direction: PutDirection, served: ModelFingerprint
) -> None:
    a, b = put_direction("a", seed=1), put_direction("b", seed=2)

    row = only_row(
        mixed(
            a={"rotate": {"plane": ["a@1", "b@1"], "by": 5, "layers": 1}},
            b={"clamp": {"direction": "b@1", "to": 1, "layers": [1, 2]}},
            d=ablate("a@1", layers=1),
            c=ablate("b@1", layers=[1, 3]),
            e={"add": {"direction": "a@1", "strength": 1}},
        ),
        store,
        served,
    )

    met = {
        layer: [
            (found.kind, found.directions[0][0], dict(found.layers)[layer][0])
            for found in row.projections
            if layer in dict(found.layers)
        ]
        for layer in range(4)
    }
    assert met == {
        0: [],
        1: [
            ("clip", b.sha256, 0.0),
            ("clip", a.sha256, 0.0),
            ("clip", b.sha256, 1.0),
            ("turn_by", a.sha256, math.radians(5)),
        ],
        2: [("clip", b.sha256, 1.0)],
        3: [("clip", b.sha256, 0.0)],
    }
    assert row.add


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"e": ablate()}, {"z": ablate("copy@1", strength=1)}),
        ({"e": ablate()}, {"e": ablate(layers="0-1"), "f": ablate(layers="2-3")}),
        ({"e": ablate()}, {"e": ablate(), "f": ablate("other@1", strength=0)}),
        ({"e": ablate(layers=1)}, {"e": ablate(layers=1, vectorLayer=1)}),
        (
            {"e": ablate(layers=1), "f": ablate("other@1", layers=2)},
            {"f": ablate(layers=1), "e": ablate("other@1", layers=2)},
        ),
        (
            {"e": ablate(sites=["mlp", "residual"])},
            {"f": ablate(sites=["mlp"]), "e": ablate(sites=["residual"])},
        ),
        (
            {"e": ablate()},
            {"e": ablate(), "f": {"rotate": {"plane": ["demo@1", "other@1"], "by": 0}}},
        ),
        (
            {"e": {"scale_heads": {"heads": [[0, 1], [2, 3]], "factor": 0}}},
            {
                "e": {"scale_heads": {"heads": [[2, 3]], "factor": 0.5}},
                "f": {"scale_heads": {"heads": [[2, 3], [0, 1]], "factor": [0.5, 0]}},
            },
        ),
    ],
)
def test_equal_effects_of_other_kinds_share_a_plan(
    one: dict[str, Any],
    other: dict[str, Any],
    store: Store,
    put_direction: PutDirection,
    served: ModelFingerprint,
) -> None:
    put_direction()
    put_direction("copy")
    put_direction("other", seed=1)

    plan = compile_policy(mixed(**one), store, served)

    assert not plan.is_identity
    assert plan == compile_policy(mixed(**other), store, served)


def test_the_order_in_which_projections_meet_is_part_of_a_plan(
    store: Store, put_direction: PutDirection, served: ModelFingerprint
) -> None:
    put_direction()
    put_direction("other", seed=1)

    one = compile_policy(mixed(e=ablate(), f=ablate("other@1")), store, served)
    other = compile_policy(mixed(f=ablate(), e=ablate("other@1")), store, served)

    assert one.id != other.id


@pytest.mark.parametrize(
    ("edit", "field", "code"),
    [
        (ablate(layers=[3, 4]), "ablate.layers", "E_LAYER_RANGE"),
        (ablate(vectorLayer=4), "ablate.vectorLayer", "E_LAYER_RANGE"),
        (ablate(vectorLayer=0), "ablate.vectorLayer", "E_LAYER_ABSENT"),
        (ablate(layers=[0]), "ablate.layers", "E_LAYER_ABSENT"),
        (ablate("gone@1"), "ablate.direction", "E_ARTEFACT_UNKNOWN"),
        (ablate("zero@1"), "ablate.direction", "E_DIRECTION_ZERO"),
        (ablate("foreign@1"), "ablate.direction", "E_DIRECTION_MODEL"),
        (ablate("heads@1"), "ablate.direction", "E_ARTEFACT_KIND"),
        (
            {"clamp": {"direction": "zero@1", "to": 1}},
            "clamp.direction",
            "E_DIRECTION_ZERO",
        ),
        (
            {"clamp": {"direction": "normless@1", "to": 1, "unit": "relative"}},
            "clamp.unit",
            "E_NORMS_MISSING",
        ),
        (
            {"clamp": {"direction": "demo@1", "atMost": -1.5, "unit": "relative"}},
            "clamp.atMost",
            "E_STRENGTH_CEILING",
        ),
        (
            {"clamp": {"direction": "demo@1", "to": 1.5, "unit": "relative"}},
            "clamp.to",
            "E_STRENGTH_CEILING",
        ),
        (
            {"rotate": {"plane": ["demo@1", "gone@1"], "by": 1}},
            "rotate.plane[1]",
            "E_ARTEFACT_UNKNOWN",
        ),
        (
            {"rotate": {"plane": ["demo@1", "zero@1"], "by": 1}},
            "rotate.plane[1]",
            "E_DIRECTION_ZERO",
        ),
        (
            {"rotate": {"plane": ["demo@1", "demo@1"], "by": 1}},
            "rotate.plane",
            "E_PLANE_PARALLEL",
        ),
        (
            {"rotate": {"plane": ["normless@1", "demo@1"], "by": 1, "layers": "0-2"}},
            "rotate.layers",
            "E_LAYER_ABSENT",
        ),
        (
            {"scale_heads": {"heads": [[0, 3], [0, 4]], "factor": 0}},
            "scale_heads.heads",
            "E_HEAD_RANGE",
        ),
        (
            {"scale_heads": {"heads": [[4, 0]], "factor": 0}},
            "scale_heads.heads",
            "E_HEAD_RANGE",
        ),
        (
            {"scale_heads": {"heads": "demo@1", "factor": 0}},
            "scale_heads.heads",
            "E_ARTEFACT_KIND",
        ),
        (
            {"scale_heads": {"heads": "elsewhere@1", "factor": 0}},
            "scale_heads.heads",
            "E_HEADS_MODEL",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused(
    edit: dict[str, Any],
    field: str,
    code: str,
    store: Store,
    put_direction: PutDirection,
    put_heads: Callable[..., ArtefactRef],
    served: ModelFingerprint,
) -> None:
    put_direction(present=[False, True, True, True])
    put_direction("normless", norms=[None] * 4, seed=3)
    put_direction("zero", vectors=np.zeros((4, 64), dtype=np.float32))
    put_direction("foreign", model=model_fingerprint(num_kv_heads=1))
    put_heads([(0, 1)])
    put_heads([(0, 1)], name="elsewhere", model=model_fingerprint(num_heads=8))

    assert faults(mixed(e=edit), store, served) == [(f"$.edits.e.{field}", code)]


def test_a_bound_that_only_makes_a_component_smaller_has_no_ceiling(
    store: Store, put_direction: PutDirection, served: ModelFingerprint
) -> None:
    put_direction()
    edit = {"clamp": {"direction": "demo@1", "atLeast": -9, "atMost": 9, "unit": "relative"}}

    assert compile_policy(mixed(e=edit), store, served).kinds == {"projection"}


@pytest.mark.parametrize(
    ("edit", "top"),
    [
        (ablate(strength=1e39), 1),
        (ablate(strength=1e30), 1e30),
        ({"clamp": {"direction": "demo@1", "to": -1e39}}, 1),
        ({"clamp": {"direction": "demo@1", "atMost": 2e38, "unit": "relative"}}, 1),
        ({"scale_heads": {"heads": [[0, 0]], "factor": 100}}, 1e37),
        ({"rotate": {"plane": ["demo@1", "other@1"], "to": 180}}, 2e38),
    ],
)
def test_projections_too_large_for_32_bit_numbers_are_refused(
    edit: dict[str, Any],
    top: float,
    store: Store,
    put_direction: PutDirection,
    served: ModelFingerprint,
) -> None:
    put_direction()
    put_direction("other", seed=1)

    assert faults(mixed(top=top, e=edit), store, served) == [("$.edits", "E_STRENGTH_CEILING")]


# -- the JSON form ---------------------------------------------------------------------------------

sources = st.tuples(st.sampled_from(["a" * 64, "b" * 64]), st.none() | st.integers(0, 5))
finite = st.floats(allow_nan=False, allow_infinity=False)
layers = st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True).map(sorted)


def projection(kind: str) -> st.SearchStrategy[Projection]:
    numbers = (
        st.tuples(finite, st.none() | finite, st.none() | finite)
        if kind == "clip"
        else st.tuples(finite)
    )
    size = 1 if kind == "clip" else 2
    return st.builds(
        Projection,
        st.sampled_from(["residual", "attention", "mlp"]),
        st.just(kind),
        st.tuples(*[sources] * size),
        layers.flatmap(
            lambda found: st.tuples(*[st.tuples(st.just(layer), numbers) for layer in found])
        ),
    )


small = st.floats(-1e6, 1e6)
contributions = st.builds(
    Contribution,
    add=st.dictionaries(
        st.builds(lambda source, layer: (*source, layer), sources, st.integers(0, 5)),
        small,
        max_size=3,
    ),
    projections=st.lists(
        st.sampled_from(["clip", "turn_to", "turn_by"]).flatmap(projection), max_size=2
    ).map(tuple),
    heads=st.dictionaries(st.tuples(st.integers(0, 5), st.integers(0, 3)), small, max_size=3),
    renormalise=st.frozensets(st.integers(0, 5), max_size=2),
)
rows = st.lists(contributions, max_size=3).map(combined)
gates_of_plans = st.builds(
    PlanGate,
    st.just("g"),
    st.just("c" * 64),
    st.integers(0, 3),
    st.sampled_from(["token", "prompt_end", "think_end"]),
    st.none() | finite,
    st.none() | finite,
    st.integers(0, 4),
)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    windows = draw(st.lists(st.integers(1, 9), max_size=3, unique=True).map(sorted))
    gates = draw(st.lists(gates_of_plans, max_size=1))
    few = draw(st.lists(rows, min_size=1, max_size=3))
    width = 2 + 3 * (len(windows) + 1)
    found = st.lists(st.sampled_from(few), min_size=width, max_size=width)
    return Plan.of([draw(found) for _ in range(2 ** len(gates))], windows, gates, THINK)


@given(plans())
@settings(deadline=None)
def test_a_plan_survives_json(plan: Plan) -> None:
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@given(st.data())
@settings(deadline=None)
def test_a_canonical_plan_says_what_it_was_made_of(data: st.DataObject) -> None:
    windows = sorted(data.draw(st.sets(st.integers(1, 6), max_size=3)))
    width = 2 + 3 * (len(windows) + 1)
    few = data.draw(st.lists(rows, min_size=1, max_size=2))
    behaviours = data.draw(st.lists(st.sampled_from(few), min_size=width, max_size=width))

    plan = Plan.of([behaviours], windows, (), THINK)

    for k, phase in enumerate(PHASES[2:]):
        for offset in range(8):
            case = 2 + 3 * sum(offset >= n for n in windows) + k
            assert row_of(plan, phase, offset) == (
                Row() if behaviours[case].is_empty else behaviours[case]
            )


@pytest.mark.parametrize(
    "change",
    [
        {"id": "0" * 64},
        {"id": None},
        {"cases": [[0]]},
        {"cases": [[0, 0, 0, 0, 1]]},
        {"cases": [[-1] * 5]},
        {"cases": [[0, 0, 0, 0, "x"]]},
        {"cases": [[0] * 5] * 2},
        {"cases": []},
        {"windows": [3]},
        {"windows": None},
        {"gates": [{}]},
        {"gates": ["x"]},
        {"thinking": ["<think>"]},
        {"rows": [[]]},
        {"rows": None},
        {"rows": [{"add": []}]},
        {"rows": [{"add": [], "projections": [], "heads": [], "renormalise": []}]},
    ],
    ids=repr,
)
def test_what_is_not_a_plan_is_refused(change: dict[str, Any]) -> None:
    data = Plan.everywhere(Row(add=(Term("a" * 64, ((0, 1.0),)),))).to_json()

    with pytest.raises(TrimtabError) as caught:
        Plan.from_json({**data, **change})

    assert caught.value.code == "E_PLAN_INVALID"


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("add", {"coefficients": [[0, 2.0]]}),
        ("add", {"coefficients": [[0, float("nan")]]}),
        ("add", {"coefficients": [[0]]}),
        ("add", {"coefficients": None}),
        ("projections", {"kind": "flip"}),
        ("projections", {"site": "embedding"}),
        ("projections", {"kind": "turn_by"}),
        ("projections", {"layers": [[0, [1.0]]]}),
        ("projections", {"directions": []}),
    ],
)
def test_a_damaged_row_is_refused(part: str, change: dict[str, Any]) -> None:
    row = Row(
        add=(Term("a" * 64, ((0, 1.0),)),),
        projections=(Projection("mlp", "clip", (("a" * 64, None),), ((0, (0.0, None, None)),)),),
    )
    data = json.loads(json.dumps(Plan.everywhere(row).to_json()))
    assert Plan.from_json(data)
    data["rows"][0][part][0].update(change)

    with pytest.raises(TrimtabError) as caught:
        Plan.from_json(data)

    assert caught.value.code == "E_PLAN_INVALID"


@pytest.mark.parametrize(
    ("content", "shape", "code"),
    [
        (Term("REF", ((0, 1.0),)), (4, 32), "E_DIRECTION_WIDTH"),
        (Term("REF", ((4, 1.0),)), (4, 64), "E_LAYER_RANGE"),
        (Term("REF", ((3, 1.0),), vector_layer=4), (4, 64), "E_LAYER_RANGE"),
        (Term("0" * 64, ((0, 1.0),)), (4, 64), "E_ARTEFACT_UNKNOWN"),
    ],
)
def test_row_vectors_refuses_what_does_not_fit(
    content: Term, shape: tuple[int, int], code: str, store: Store, put_direction: PutDirection
) -> None:
    ref = put_direction()
    term = replace(content, direction=content.direction.replace("REF", ref.sha256))

    with pytest.raises(TrimtabError) as caught:
        row_vectors((term,), store, *shape)

    assert caught.value.code == code
