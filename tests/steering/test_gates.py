"""Gates: what may be written, what they come to on a model, and which rows they lead to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from directions.card import ModelFingerprint, ProbeDraft
from directions.store import ArtefactRef, Store
from steering.gates import MAX_GATES, Gate
from steering.plan import Plan, PlanGate, compile_policy, fingerprint_warnings
from steering.policy import Policy, parse_policy
from steering.policy_errors import PolicyErrors
from steering.policy_files import unresolved_artefacts
from tests.steering.conftest import PutDirection, model_fingerprint

THINK = ("<think>", "</think>")
PutProbe = Callable[..., ArtefactRef]


@pytest.fixture
def put_probe(store: Store) -> PutProbe:
    """Put a probe into the store: of the final norm unless a layer is given."""

    def put(
        *,
        layer: int | None = None,
        read_out: Any = "affine",
        outputs: int = 2,
        name: str = "probe",
        model: ModelFingerprint | None = None,
    ) -> ArtefactRef:
        draft = ProbeDraft(
            method="test",
            model=model or model_fingerprint(),
            site="final_norm" if layer is None else "residual",
            layer=layer,
            read_out=read_out,
            outputs=tuple(f"o{i}" for i in range(outputs)),
            dtype="float32",
            created="2026-01-01T00:00:00Z",
        )
        return store.put_probe(draft, np.ones((outputs, 64)), np.zeros(outputs), name=name)

    return put


GATE: dict[str, Any] = {"probe": "probe@1", "at": "prompt_end", "above": 0.5, "then": ["e"]}


def ablate(layers: Any = "all", scope: Any = "all", strength: float = 1.0) -> dict[str, Any]:
    spec = {"direction": "demo@1", "layers": layers, "strength": strength}
    return {"ablate": spec, "scope": scope}


def document(gates: dict[str, Any], **edits: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "trimtab/v1",
        "kind": "Policy",
        "name": "guard",
        "edits": edits or {"e": ablate()},
        "gates": gates,
    }


def policy(gates: dict[str, Any], **edits: dict[str, Any]) -> Policy:
    return parse_policy(document(gates, **edits))


def gate(**keys: Any) -> dict[str, Any]:
    """The gate that opens ``e``; keys that are ``...`` are left out."""
    return {key: value for key, value in {**GATE, **keys}.items() if value is not ...}


def faults(policy: Policy, store: Store, model: ModelFingerprint) -> list[tuple[str, str]]:
    with pytest.raises(PolicyErrors) as caught:
        compile_policy(policy, store, model, thinking=THINK)
    return [(error.field, error.code) for error in caught.value.errors]


# -- what may be written ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("threshold", "bounds"),
    [
        ({"above": 0.5}, (0.5, None)),
        ({"below": -1}, (None, -1.0)),
        ({"between": [-0.5, 2]}, (-0.5, 2.0)),
    ],
)
def test_a_threshold_is_a_lower_bound_an_upper_bound_or_both(
    threshold: dict[str, Any], bounds: tuple[float | None, float | None]
) -> None:
    found = policy({"g": {**gate(above=...), **threshold}}).gates["g"]

    assert (found.low, found.high) == bounds
    assert (found.output, found.then) == (0, ("e",))


@pytest.mark.parametrize(
    ("written", "field", "code"),
    [
        (gate(probe=...), ".probe", "E_POLICY_MISSING"),
        (gate(probe="probe"), ".probe", "E_POLICY_REFERENCE"),
        (gate(output=-1), ".output", "E_POLICY_NUMBER"),
        (gate(output="0"), ".output", "E_POLICY_TYPE"),
        (gate(at="prompt"), ".at", "E_POLICY_VALUE"),
        (gate(above=...), "", "E_POLICY_CHOICE"),
        (gate(below=0.1), "", "E_POLICY_CHOICE"),
        (gate(above=float("nan")), ".above", "E_POLICY_NUMBER"),
        (gate(above=float("inf")), ".above", "E_POLICY_NUMBER"),
        (gate(above=..., between=[0.5]), ".between", "E_GATE_THRESHOLD"),
        (gate(above=..., between=[0.5, 0.5]), ".between", "E_GATE_THRESHOLD"),
        (gate(above=..., between=[0.5, 0.1]), ".between", "E_GATE_THRESHOLD"),
        (gate(above=..., between=["0", 1]), ".between[0]", "E_POLICY_TYPE"),
        (gate(then=[]), ".then", "E_GATE_EDIT"),
        (gate(then="e"), ".then", "E_GATE_EDIT"),
        (gate(then=["e", "e"]), ".then", "E_GATE_EDIT"),
        (gate(then=["e", "f"]), ".then[1]", "E_GATE_EDIT"),
        (gate(when="now"), ".when", "E_POLICY_KEY"),
        ("e", "", "E_POLICY_TYPE"),
    ],
)
def test_a_fault_has_its_code_and_place(written: Any, field: str, code: str) -> None:
    with pytest.raises(PolicyErrors) as caught:
        parse_policy(document({"g": written}))

    assert [(e.field, e.code) for e in caught.value.errors] == [(f"$.gates.g{field}", code)]


def test_a_gate_has_a_name_of_its_own() -> None:
    with pytest.raises(PolicyErrors) as caught:
        parse_policy(document({"G.1": GATE}))

    assert (caught.value.code, caught.value.field) == ("E_POLICY_NAME", '$.gates["G.1"]')


def test_too_many_gates_are_refused() -> None:
    assert policy({f"g{i}": GATE for i in range(MAX_GATES)})
    with pytest.raises(PolicyErrors) as caught:
        policy({f"g{i}": GATE for i in range(MAX_GATES + 1)})

    assert (caught.value.code, caught.value.field) == ("E_POLICY_SIZE", "$.gates")


def test_the_order_of_what_a_gate_opens_does_not_show() -> None:
    edits = {"e": ablate(), "f": ablate()}

    one = policy({"g": gate(then=["f", "e"])}, **edits)

    assert one.gates["g"].then == ("e", "f")
    assert one.identity == policy({"g": gate(then=["e", "f"])}, **edits).identity


def test_a_policy_with_gates_names_its_edits_in_python_too() -> None:
    sound = policy({"g": GATE})

    with pytest.raises(ValueError, match="no edit is named 'f'; there are e"):
        Policy.model_validate(
            {**document({}), "gates": {"g": Gate.model_validate(gate(then=["f"]))}}
        )
    assert sound.gates["g"].artefact.reference == "probe@1"


def test_the_probes_of_gates_are_among_the_artefacts_of_a_policy(
    store: Store, put_direction: PutDirection, put_probe: PutProbe, served: ModelFingerprint
) -> None:
    put_direction()
    gated = policy({"g": GATE})

    (error,) = unresolved_artefacts(gated, store)
    assert (error.field, error.code) == ("$.gates.g.probe", "E_ARTEFACT_UNKNOWN")

    put_probe(model=model_fingerprint(weights_sha256="d" * 64))
    assert unresolved_artefacts(gated, store) == ()
    (warning,) = fingerprint_warnings(gated, store, served)
    assert (warning.field, warning.code) == ("$.gates.g.probe", "W_PROBE_MODEL")


# -- what they come to -----------------------------------------------------------------------------


def compiled(store: Store, served: ModelFingerprint, gates: Any, **edits: Any) -> Plan:
    return compile_policy(policy(gates, **edits), store, served, thinking=THINK)


@pytest.mark.parametrize(("layer", "at_layer"), [(2, 2), (None, 4)])
def test_a_gate_reads_a_layer_or_the_final_norm(
    layer: int | None,
    at_layer: int,
    store: Store,
    put_direction: PutDirection,
    put_probe: PutProbe,
    served: ModelFingerprint,
) -> None:
    put_direction()
    ref = put_probe(layer=layer)

    plan = compiled(store, served, {"g": gate(above=..., between=[0.2, 0.75], output=1)})

    assert plan.gates == (PlanGate("g", ref.sha256, 1, "prompt_end", 0.2, 0.75, at_layer),)
    assert plan.cases == ((None,) * 5, (0,) * 5)
    assert plan.kinds == {"projection", "gate"}
    assert plan.phased
    assert plan.thinking is None


def test_an_edit_is_in_force_if_any_of_its_gates_is_open(
    store: Store, put_direction: PutDirection, put_probe: PutProbe, served: ModelFingerprint
) -> None:
    put_direction()
    put_probe()

    plan = compiled(
        store,
        served,
        {"b": gate(then=["e", "f"]), "a": gate(then=["f"], below=0.1, above=...)},
        e=ablate(1, scope="generation"),
        f=ablate(2),
        free=ablate(3),
    )

    layers = [
        [
            None
            if row is None
            else [layer for found in plan.rows[row].projections for layer, _ in found.layers]
            for row in cases
        ]
        for cases in plan.cases
    ]
    assert [found.name for found in plan.gates] == ["a", "b"]
    assert layers == [
        [[3]] * 5,  # all closed
        [[2, 3]] * 5,  # a
        [[2, 3]] * 2 + [[1, 2, 3]] * 3,  # b
        [[2, 3]] * 2 + [[1, 2, 3]] * 3,  # both
    ]


def test_a_gate_of_edits_that_do_nothing_leaves_no_rows(
    store: Store, put_direction: PutDirection, put_probe: PutProbe, served: ModelFingerprint
) -> None:
    put_direction()
    put_probe()

    assert compiled(store, served, {"g": GATE}, e=ablate(strength=0)).is_identity


def test_every_part_of_a_gate_is_part_of_the_plan(
    store: Store, put_direction: PutDirection, put_probe: PutProbe, served: ModelFingerprint
) -> None:
    put_direction()
    put_probe(layer=1)
    put_probe(layer=1, name="other", read_out="cosine")
    edits = {"e": ablate([2, 3]), "f": ablate(3)}
    gates = [
        GATE,
        gate(probe="other@1"),
        gate(output=1),
        gate(at="think_end"),
        gate(at="token"),
        gate(above=0.6),
        gate(above=..., below=0.5),
        gate(above=..., between=[0.5, 2.0]),
        gate(then=["f"]),
        gate(then=["e", "f"]),
    ]

    plans = [compiled(store, served, {"g": found}, **edits) for found in gates]

    assert len({plan.id for plan in plans}) == len(gates)
    assert [plan.thinking for plan in plans if plan.gates[0].at == "think_end"] == [THINK]


def test_scopes_and_gates_of_thinking_need_its_markers(
    store: Store, put_direction: PutDirection, put_probe: PutProbe, served: ModelFingerprint
) -> None:
    put_direction()
    put_probe(layer=0)
    thinking = policy(
        {"g": gate(at="think_end", then=["b"])},
        a=ablate(scope="thinking"),
        b=ablate(scope=["thinking", "think_end", "answer"]),
        c=ablate(scope=["prompt", "answer"]),
    )

    with pytest.raises(PolicyErrors) as caught:
        compile_policy(thinking, store, served)

    assert [(error.field, error.code) for error in caught.value.errors] == [
        ("$.edits.a.scope", "E_THINKING_MARKERS"),
        ("$.edits.c.scope", "E_THINKING_MARKERS"),
        ("$.gates.g.at", "E_THINKING_MARKERS"),
    ]
    assert compile_policy(thinking, store, served, thinking=THINK).thinking == THINK


# -- what can never act ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "layers", "scope", "code"),
    [
        ("token", [2, 3], "all", None),
        ("token", [1, 2, 3], "all", "E_GATE_ORDER"),
        ("token", [1], "prompt", "E_GATE_ORDER"),
        ("token", [3], "prompt", None),
        ("prompt_end", [0], "prompt", "E_GATE_NEVER"),
        ("prompt_end", [0], "prompt_end", "E_GATE_NEVER"),
        ("prompt_end", [0, 1], "prompt_end", None),
        ("prompt_end", [0, 2], "prompt_end", None),
        ("prompt_end", [0, 1], "all", None),
        ("prompt_end", [0, 1], "think_end", None),
        ("prompt_end", [0, 1], ["prompt_end", {"first": 1}], None),
        ("think_end", [0], "prompt", "E_GATE_NEVER"),
        ("think_end", [0], ["prompt_end", "think_end"], "E_GATE_NEVER"),
        ("think_end", [0, 2], "think_end", None),
        ("think_end", [0, 2], "prompt_end", None),
        ("think_end", [0, 1], "answer", None),
        ("think_end", [0, 1], {"first": 1}, None),
    ],
)
def test_a_gate_must_be_able_to_open_what_it_names(
    at: str,
    layers: list[int],
    scope: Any,
    code: str | None,
    store: Store,
    put_direction: PutDirection,
    put_probe: PutProbe,
    served: ModelFingerprint,
) -> None:
    put_direction()
    put_probe(layer=1)
    gated = policy({"g": gate(at=at)}, e=ablate(layers, scope))

    if code is None:
        assert compile_policy(gated, store, served, thinking=THINK).gates
    else:
        assert faults(gated, store, served) == [("$.gates.g.then", code)]


def test_a_token_gate_at_the_final_norm_opens_nothing(
    store: Store, put_direction: PutDirection, put_probe: PutProbe, served: ModelFingerprint
) -> None:
    put_direction()
    put_probe()

    assert faults(policy({"g": gate(at="token")}), store, served) == [
        ("$.gates.g.then", "E_GATE_ORDER")
    ]


@pytest.mark.parametrize(
    ("read_out", "threshold", "key"),
    [
        ("affine", {"above": 1}, "above"),
        ("affine", {"below": 0}, "below"),
        ("affine", {"between": [-2, 0]}, "between"),
        ("affine", {"between": [1, 2]}, "between"),
        ("affine", {"above": 0.999}, None),
        ("affine", {"above": -1}, None),
        ("cosine", {"below": 0}, None),
        ("cosine", {"between": [-2, -0.9]}, None),
        ("cosine", {"below": -1}, "below"),
        ("cosine", {"above": 1.5}, "above"),
    ],
)
def test_a_threshold_must_be_among_the_scores(
    read_out: str,
    threshold: dict[str, Any],
    key: str | None,
    store: Store,
    put_direction: PutDirection,
    put_probe: PutProbe,
    served: ModelFingerprint,
) -> None:
    put_direction()
    put_probe(read_out=read_out)
    gated = policy({"g": {**gate(above=...), **threshold}})

    if key is None:
        assert compile_policy(gated, store, served).gates
    else:
        assert faults(gated, store, served) == [(f"$.gates.g.{key}", "E_GATE_NEVER")]


def test_a_probe_must_fit_the_model_and_have_the_output(
    store: Store, put_direction: PutDirection, put_probe: PutProbe, served: ModelFingerprint
) -> None:
    put_direction()
    put_probe(outputs=2)
    put_probe(name="foreign", model=model_fingerprint(tokenizer_sha256="d" * 64))

    gated = policy(
        {"a": gate(probe="foreign@1"), "b": gate(output=2), "c": gate(probe="demo@1")},
        e=ablate(),
        wrong=ablate(7),
    )

    assert faults(gated, store, served) == [
        ("$.edits.wrong.ablate.layers", "E_LAYER_RANGE"),
        ("$.gates.a.probe", "E_PROBE_MODEL"),
        ("$.gates.b.output", "E_PROBE_OUTPUT"),
        ("$.gates.c.probe", "E_ARTEFACT_KIND"),
    ]
