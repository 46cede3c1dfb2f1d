"""Compiling a policy: what each unit comes to, what is refused, and when two plans are one."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from directions.card import ModelFingerprint
from directions.errors import TrimtabError
from directions.store import Store
from steering.plan import PHASES, Plan, Term, compile_policy, row_vectors
from steering.policy import Policy, parse_policy
from steering.policy_errors import PolicyErrors
from tests.steering.conftest import PutDirection, model_fingerprint


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

    assert plan.rows == ((Term(ref.sha256, ((1, -0.5), (3, -0.5))),),)
    assert plan.phase_rows == (0, 0)


def test_unit_strength_is_the_length_of_what_is_added(
    store: Store, put_direction: PutDirection, served: ModelFingerprint
) -> None:
    put_direction()

    plan = compile_policy(policy(add(strength=2.5, unit="unit")), store, served)

    lengths = np.linalg.norm(row_vectors(plan.rows[0], store, 4, 64), axis=1)
    np.testing.assert_allclose(lengths, [2.5] * 4, rtol=1e-6)


def test_relative_strength_is_a_share_of_each_layers_mean_norm(
    store: Store, put_direction: PutDirection, served: ModelFingerprint
) -> None:
    put_direction(norms=[1.0, 10.0, 100.0, 1000.0])

    plan = compile_policy(policy(add(strength=0.1, unit="relative")), store, served)

    lengths = np.linalg.norm(row_vectors(plan.rows[0], store, 4, 64), axis=1)
    np.testing.assert_allclose(lengths, [0.1, 1.0, 10.0, 100.0], rtol=1e-6)


def test_all_layers_are_those_that_the_direction_has(
    store: Store, put_direction: PutDirection, served: ModelFingerprint
) -> None:
    put_direction(present=[False, True, False, True])

    plan = compile_policy(policy(add(layers="all")), store, served)

    assert [layer for layer, _ in plan.rows[0][0].coefficients] == [1, 3]


@pytest.mark.parametrize(
    ("scope", "phase_rows"),
    [("all", (0, 0)), ("prompt", (0, None)), ("generation", (None, 0))],
)
def test_a_scope_leaves_the_other_phase_alone(
    scope: str,
    phase_rows: tuple[int | None, ...],
    store: Store,
    put_direction: PutDirection,
    served: ModelFingerprint,
) -> None:
    put_direction()

    plan = compile_policy(policy(add(scope=scope)), store, served)

    assert (len(plan.rows), plan.phase_rows) == (1, phase_rows)


def test_edits_with_different_scopes_make_a_row_for_each_phase(
    store: Store, put_direction: PutDirection, served: ModelFingerprint
) -> None:
    calm, dry = put_direction("calm", seed=1), put_direction("dry", seed=2)

    plan = compile_policy(
        policy(add("calm@1", layers=1), add("dry@1", layers=2, scope="generation")), store, served
    )

    both = sorted([Term(calm.sha256, ((1, 1.0),)), Term(dry.sha256, ((2, 1.0),))], key=repr)
    assert plan.phase_rows == (0, 1)
    assert plan.rows[0] == (Term(calm.sha256, ((1, 1.0),)),)
    assert sorted(plan.rows[1], key=repr) == both


edits = st.lists(
    st.fixed_dictionaries(
        {
            "direction": st.sampled_from(["one@1", "two@1"]),
            "strength": st.floats(-2, 2).map(lambda x: round(x, 3)),
        },
        optional={
            "layers": st.sets(st.integers(0, 3), min_size=1).map(sorted),
            "scope": st.sampled_from(["all", "prompt", "generation"]),
            "unit": st.sampled_from(["absolute", "unit", "relative"]),
        },
    ),
    max_size=4,
)
with_fixtures = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None
)


def by_hand(
    edits: list[dict[str, Any]], vectors: dict[str, np.ndarray], norms: list[float], phase: str
) -> np.ndarray:
    """What the formulas of ``add`` come to for tokens of one phase, written out."""
    total = np.zeros((4, 64))
    for edit in edits:
        if edit.get("scope", "all") not in ("all", phase):
            continue
        for layer in edit.get("layers", range(4)):
            v = vectors[edit["direction"]][layer].astype(np.float64)
            if edit.get("unit", "absolute") != "absolute":
                v = v / math.sqrt((v * v).sum())
            if edit.get("unit") == "relative":
                v = v * norms[layer]
            total[layer] += edit["strength"] * v
    return total


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

    plan = compile_policy(policy(*edits), store, served, relative_ceiling=2.0)

    for phase, row in zip(PHASES, plan.phase_rows, strict=True):
        expected = by_hand(edits, vectors, norms, phase)
        got = row_vectors(plan.rows[row], store, 4, 64) if row is not None else np.zeros((4, 64))
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

    plan = compile_policy(policy(*edits), store, served, relative_ceiling=2.0)
    other = compile_policy(policy(*shuffled), store, served, relative_ceiling=2.0)

    assert plan == other


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([add(strength=0.5)], [add(strength=0.25), add(strength=0.25)]),
        ([add()], [add(scope="prompt"), add(scope="generation")]),
        ([add()], [add(layers="0-1"), add(layers="2-3")]),
        ([add()], [add(layers="all", unit="absolute"), add(strength=0.0)]),
        ([add()], [add(), add(layers=2, strength=3.0), add(layers=2, strength=-3.0)]),
        ([add()], [add("copy@1")]),
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
        policy(add(unit="unit")),
        policy(add(unit="relative")),
        policy(add("other@1")),
        policy(add(), add("other@1")),
        policy(add(scope="prompt"), add("other@1", scope="generation")),
        policy(add(scope="generation"), add("other@1", scope="prompt")),
    ]

    ids = {compile_policy(each, store, served).id for each in policies}

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
    assert plan.phase_rows == (None, None)


def test_ids_do_not_change_between_releases() -> None:
    term = Term("f" * 64, ((0, 0.1), (5, -2.0)))

    plan = Plan.of([{("f" * 64, 5): -2.0, ("f" * 64, 0): 0.1, ("e" * 64, 1): 0.0}, {}])

    assert plan == Plan(
        "967950b6b3c5fe629f2375549cda210ebdf6bac61fcae323205f5107191d4a2c", ((term,),), (0, None)
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


# -- the JSON form ---------------------------------------------------------------------------------

plans = st.lists(
    st.dictionaries(
        st.tuples(st.sampled_from(["a" * 64, "b" * 64]), st.integers(0, 5)),
        st.floats(allow_nan=False, allow_infinity=False),
        max_size=4,
    ),
    min_size=len(PHASES),
    max_size=len(PHASES),
).map(Plan.of)


@given(plans)
def test_a_plan_survives_json(plan: Plan) -> None:
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize(
    "change",
    [
        {"id": "0" * 64},
        {"id": None},
        {"phase_rows": [0]},
        {"phase_rows": [0, 1]},
        {"phase_rows": [-1, -1]},
        {"phase_rows": [0, "x"]},
        {"rows": [[]]},
        {"rows": None},
        {"rows": [[{"direction": "a" * 64, "coefficients": [[0, 2.0]]}]]},
        {"rows": [[{"direction": "a" * 64, "coefficients": [[0, float("nan")]]}]]},
        {"rows": [[{"direction": "a" * 64, "coefficients": [[0]]}]]},
        {"rows": [[{"direction": "a" * 64}]]},
    ],
    ids=repr,
)
def test_what_is_not_a_plan_is_refused(change: dict[str, Any]) -> None:
    data = Plan.of([{("a" * 64, 0): 1.0}, {("a" * 64, 0): 1.0}]).to_json()

    with pytest.raises(TrimtabError) as caught:
        Plan.from_json({**data, **change})

    assert caught.value.code == "E_PLAN_INVALID"


def test_row_vectors_refuses_what_does_not_fit(store: Store, put_direction: PutDirection) -> None:
    ref = put_direction()

    for term, shape, code in (
        (Term(ref.sha256, ((0, 1.0),)), (4, 32), "E_DIRECTION_WIDTH"),
        (Term(ref.sha256, ((4, 1.0),)), (4, 64), "E_LAYER_RANGE"),
        (Term("0" * 64, ((0, 1.0),)), (4, 64), "E_ARTEFACT_UNKNOWN"),
    ):
        with pytest.raises(TrimtabError) as caught:
            row_vectors((term,), store, *shape)
        assert caught.value.code == code
