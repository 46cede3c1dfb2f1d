"""The closed specification: what a policy may say, its normal form and its identity."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from steering.edits.ablate import Ablate
from steering.edits.add import Add
from steering.edits.clamp import Clamp
from steering.edits.layers import parse_layers
from steering.edits.rotate import Rotate
from steering.edits.scale_heads import ScaleHeads
from steering.edits.scope import First
from steering.policy import KINDS, MAX_EDITS, Edit, Policy, parse_policy
from steering.policy_errors import PolicyErrors, json_path

MINIMAL: dict[str, Any] = {
    "apiVersion": "trimtab/v1",
    "kind": "Policy",
    "name": "guard",
    "edits": {"calm": {"add": {"direction": "calm@1", "strength": 0.5}}},
}
FULL: dict[str, Any] = {
    "apiVersion": "trimtab/v1",
    "kind": "Policy",
    "name": "guard",
    "version": 1,
    "description": "",
    "mode": "enforce",
    "onFailure": "closed",
    "strengthRange": [0, 1],
    "edits": {
        "calm": {
            "add": {"direction": "calm@1", "strength": 0.5, "layers": "all", "unit": "absolute"},
            "scope": "all",
        }
    },
}


def changed(path: tuple[str | int, ...], value: object) -> dict[str, Any]:
    """The minimal document with one value set."""
    document = copy.deepcopy(MINIMAL)
    at: Any = document
    for part in path[:-1]:
        at = at[part]
    at[path[-1]] = value
    return document


def with_add(**keys: object) -> dict[str, Any]:
    document = copy.deepcopy(MINIMAL)
    document["edits"]["calm"]["add"].update(keys)
    return document


def errors_of(document: object) -> dict[str, str]:
    """JSON path -> code of every fault."""
    with pytest.raises(PolicyErrors) as caught:
        parse_policy(document)
    found = {error.field: error.code for error in caught.value.errors}
    assert len(found) == len(caught.value.errors), "two faults at one place"
    return found


def test_defaults_are_filled_in() -> None:
    policy = parse_policy(MINIMAL)

    assert policy.reference == "guard@1"
    assert (policy.mode, policy.on_failure, policy.strength_range) == ("enforce", "closed", (0, 1))
    edit = policy.edits["calm"]
    assert (edit.kind, edit.scope) == ("add", ("all",))
    assert edit.spec == Add(direction="calm@1", layers="all", strength=0.5, unit="absolute")


def test_a_policy_cannot_be_changed() -> None:
    policy = parse_policy(MINIMAL)

    with pytest.raises(ValidationError):
        policy.mode = "off"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("document", "path", "code"),
    [
        ([], "$", "E_POLICY_TYPE"),
        (None, "$", "E_POLICY_TYPE"),
        (changed(("edits",), []), "$.edits", "E_POLICY_TYPE"),
        (changed(("edits",), None), "$.edits", "E_POLICY_TYPE"),
        (changed(("edits", "calm"), None), "$.edits.calm", "E_POLICY_TYPE"),
        (changed(("edits", "calm", "add"), "calm@1"), "$.edits.calm.add", "E_POLICY_TYPE"),
        (changed(("description",), 3), "$.description", "E_POLICY_TYPE"),
        (changed(("version",), "1"), "$.version", "E_POLICY_TYPE"),
        (changed(("version",), True), "$.version", "E_POLICY_TYPE"),
        (changed(("version",), 1.0), "$.version", "E_POLICY_TYPE"),
        (changed(("version",), 0), "$.version", "E_POLICY_NUMBER"),
        (changed(("version",), 2**31), "$.version", "E_POLICY_NUMBER"),
        (changed(("version",), 10**400), "$.version", "E_POLICY_NUMBER"),
        (changed(("apiVersion",), "trimtab/v2"), "$.apiVersion", "E_POLICY_VALUE"),
        (changed(("kind",), "policy"), "$.kind", "E_POLICY_VALUE"),
        (changed(("mode",), "on"), "$.mode", "E_POLICY_VALUE"),
        (changed(("mode",), False), "$.mode", "E_POLICY_VALUE"),
        (changed(("onFailure",), "close"), "$.onFailure", "E_POLICY_VALUE"),
        (changed(("description",), "x" * 4097), "$.description", "E_POLICY_VALUE"),
        (changed(("description",), "\ud800"), "$.description", "E_POLICY_VALUE"),
        (changed(("modes",), "off"), "$.modes", "E_POLICY_KEY"),
        (changed(("on_failure",), "open"), "$.on_failure", "E_POLICY_KEY"),
        (changed(("gates",), []), "$.gates", "E_POLICY_TYPE"),
        (changed(("probes",), "refusal@1"), "$.probes", "E_POLICY_TYPE"),
        (changed(("probes",), ["refusal"]), "$.probes[0]", "E_POLICY_REFERENCE"),
        (changed(("probes",), ["a@1", "a@1"]), "$.probes", "E_POLICY_PROBES"),
        (changed(("probes",), [f"a@{n}" for n in range(1, 18)]), "$.probes", "E_POLICY_SIZE"),
        (changed(("od\nd",), 1), '$["od\\nd"]', "E_POLICY_KEY"),
        (changed(("edits", "calm", "erase"), {}), "$.edits.calm.erase", "E_POLICY_KEY"),
        (changed(("edits", "calm", "scaleHeads"), {}), "$.edits.calm.scaleHeads", "E_POLICY_KEY"),
        (with_add(vectorLayer="3"), "$.edits.calm.add.vectorLayer", "E_POLICY_TYPE"),
        (with_add(vectorLayer=-1), "$.edits.calm.add.vectorLayer", "E_POLICY_NUMBER"),
        (with_add(vectorLayer=1000), "$.edits.calm.add.vectorLayer", "E_POLICY_NUMBER"),
        (with_add(vector_layer=3), "$.edits.calm.add.vector_layer", "E_POLICY_KEY"),
        (with_add(layer=3), "$.edits.calm.add.layer", "E_POLICY_KEY"),
        (changed(("name",), "Guard"), "$.name", "E_POLICY_NAME"),
        (changed(("name",), ""), "$.name", "E_POLICY_NAME"),
        (changed(("name",), "guard\n"), "$.name", "E_POLICY_NAME"),
        (changed(("name",), "a" * 65), "$.name", "E_POLICY_NAME"),
        (changed(("name",), "guard@1"), "$.name", "E_POLICY_NAME"),
        (changed(("name",), "off"), "$.name", "E_POLICY_NAME_RESERVED"),
        (changed(("edits", "a.b"), MINIMAL["edits"]["calm"]), '$.edits["a.b"]', "E_POLICY_NAME"),
        (changed(("strengthRange",), [0.0]), "$.strengthRange", "E_POLICY_STRENGTH_RANGE"),
        (changed(("strengthRange",), 1.0), "$.strengthRange", "E_POLICY_STRENGTH_RANGE"),
        (changed(("strengthRange",), [0, 0.5]), "$.strengthRange", "E_POLICY_STRENGTH_RANGE"),
        (changed(("strengthRange",), [2, -2]), "$.strengthRange", "E_POLICY_STRENGTH_RANGE"),
        (changed(("strengthRange",), [0, float("inf")]), "$.strengthRange[1]", "E_POLICY_NUMBER"),
        (changed(("strengthRange",), [True, 1]), "$.strengthRange[0]", "E_POLICY_TYPE"),
        (changed(("edits", "calm"), {}), "$.edits.calm", "E_POLICY_EDIT_KIND"),
        (changed(("edits", "calm"), {"add": None}), "$.edits.calm", "E_POLICY_EDIT_KIND"),
        (with_add(strength="0.5"), "$.edits.calm.add.strength", "E_POLICY_TYPE"),
        (with_add(strength=True), "$.edits.calm.add.strength", "E_POLICY_TYPE"),
        (with_add(strength=None), "$.edits.calm.add.strength", "E_POLICY_TYPE"),
        (with_add(strength=float("nan")), "$.edits.calm.add.strength", "E_POLICY_NUMBER"),
        (with_add(strength=float("-inf")), "$.edits.calm.add.strength", "E_POLICY_NUMBER"),
        (with_add(strength=10**400), "$.edits.calm.add.strength", "E_POLICY_NUMBER"),
        (with_add(strength=10**5000), "$.edits.calm.add.strength", "E_POLICY_NUMBER"),
        (with_add(unit="percent"), "$.edits.calm.add.unit", "E_POLICY_VALUE"),
        (with_add(direction=3), "$.edits.calm.add.direction", "E_POLICY_TYPE"),
        (with_add(direction="calm"), "$.edits.calm.add.direction", "E_POLICY_REFERENCE"),
        (with_add(direction="calm@0"), "$.edits.calm.add.direction", "E_POLICY_REFERENCE"),
        (with_add(direction="../calm@1"), "$.edits.calm.add.direction", "E_POLICY_REFERENCE"),
        (with_add(direction="calm@1\n"), "$.edits.calm.add.direction", "E_POLICY_REFERENCE"),
        (with_add(direction="sha256:12"), "$.edits.calm.add.direction", "E_POLICY_REFERENCE"),
    ],
)
def test_a_fault_has_its_code_and_place(document: object, path: str, code: str) -> None:
    assert errors_of(document) == {path: code}


@pytest.mark.parametrize("key", ["apiVersion", "kind", "name"])
def test_a_document_says_what_it_is(key: str) -> None:
    document = copy.deepcopy(MINIMAL)
    del document[key]

    assert errors_of(document) == {f"$.{key}": "E_POLICY_MISSING"}


@pytest.mark.parametrize("key", ["direction", "strength"])
def test_add_needs_a_direction_and_a_strength(key: str) -> None:
    document = copy.deepcopy(MINIMAL)
    del document["edits"]["calm"]["add"][key]

    assert errors_of(document) == {f"$.edits.calm.add.{key}": "E_POLICY_MISSING"}


def test_too_many_edits_are_refused() -> None:
    edit = MINIMAL["edits"]["calm"]

    assert parse_policy(changed(("edits",), {f"e{i}": edit for i in range(MAX_EDITS)}))
    too_many = changed(("edits",), {f"e{i}": edit for i in range(MAX_EDITS + 1)})
    assert errors_of(too_many) == {"$.edits": "E_POLICY_SIZE"}


def test_all_faults_are_reported_at_once() -> None:
    document = with_add(layers="20-12", strength=float("nan"), unit="percent")
    document["edits"]["calm"]["scope"] = "thoughts"
    document["edits"]["turn"] = {"rotate": {"plane": ["a@1"], "layers": "4-3"}}
    document["gates"] = {
        "soft": {"probe": "p@1", "at": "start", "then": ["calm", "gone"]},
        "hard": {"then": []},
    }
    document["edits"]["empty"] = {"scope": []}
    document["edits"]["misspelt"] = {"ad": {}}
    document["modus"] = "off"
    document["name"] = "off"

    assert errors_of(document) == {
        "$.name": "E_POLICY_NAME_RESERVED",
        "$.modus": "E_POLICY_KEY",
        "$.edits.calm.add.layers": "E_POLICY_LAYERS",
        "$.edits.calm.add.strength": "E_POLICY_NUMBER",
        "$.edits.calm.add.unit": "E_POLICY_VALUE",
        "$.edits.calm.scope": "E_POLICY_SCOPE",
        "$.edits.empty": "E_POLICY_EDIT_KIND",
        "$.edits.empty.scope": "E_POLICY_SCOPE",
        "$.edits.misspelt.ad": "E_POLICY_KEY",
        "$.edits.turn.rotate": "E_POLICY_CHOICE",
        "$.edits.turn.rotate.plane": "E_POLICY_PLANE",
        "$.edits.turn.rotate.layers": "E_POLICY_LAYERS",
        "$.gates.soft": "E_POLICY_CHOICE",
        "$.gates.soft.at": "E_POLICY_VALUE",
        "$.gates.soft.then[1]": "E_GATE_EDIT",
        "$.gates.hard": "E_POLICY_CHOICE",
        "$.gates.hard.probe": "E_POLICY_MISSING",
        "$.gates.hard.at": "E_POLICY_MISSING",
        "$.gates.hard.then": "E_GATE_EDIT",
    }


def test_an_unknown_key_is_answered_with_the_near_one() -> None:
    with pytest.raises(PolicyErrors) as caught:
        parse_policy(with_add(strenght=1.0))

    assert "did you mean strength?" in caught.value.message


def test_an_edit_without_kind_cannot_be_made_in_python_either() -> None:
    with pytest.raises(ValidationError, match="an edit needs its kind: scale_heads or"):
        Edit()


def test_one_fault_is_raised_under_its_own_code_and_several_under_a_common_one() -> None:
    with pytest.raises(PolicyErrors) as one:
        parse_policy(changed(("name",), "off"))
    with pytest.raises(PolicyErrors) as two:
        parse_policy({**changed(("name",), "off"), "mode": "on"})

    assert (one.value.code, one.value.field) == ("E_POLICY_NAME_RESERVED", "$.name")
    assert two.value.code == "E_POLICY_INVALID"
    assert [e["code"] for e in two.value.to_dict()["errors"]] == [
        "E_POLICY_NAME_RESERVED",
        "E_POLICY_VALUE",
    ]
    restored = pickle.loads(pickle.dumps(two.value))
    assert restored.errors == two.value.errors


def test_messages_are_one_printable_line_whatever_was_found() -> None:
    nasty = "\x1b[31m\r\nSet-Cookie: x{reason}" + "x" * 10_000

    for document in (
        changed(("name",), nasty),
        changed((nasty,), 1),
        changed(("edits", nasty), {"add": nasty}),
        with_add(direction=nasty, layers=nasty, unit=nasty),
        changed(("edits", "calm", "scope"), nasty),
        changed(("strengthRange",), nasty),
    ):
        with pytest.raises(PolicyErrors) as caught:
            parse_policy(document)
        for error in caught.value.errors:
            assert str(error).isprintable()
            assert len(str(error)) < 600


# -- the keys of each kind --------------------------------------------------------------------------

ABLATE = {"direction": "calm@1"}
CLAMP = {"direction": "calm@1", "to": 1}
ROTATE = {"plane": ["a@1", "b@1"], "by": 90}
HEADS = {"heads": [[3, 1], [2, 5]], "factor": 0.5}


def edit(kind: str, base: dict[str, Any], **keys: object) -> dict[str, Any]:
    """A document with one edit; keys that are ``...`` are taken out of ``base``."""
    spec = {key: value for key, value in {**base, **keys}.items() if value is not ...}
    return changed(("edits",), {"e": {kind: spec}})


@pytest.mark.parametrize(
    ("document", "path", "code"),
    [
        (edit("ablate", ABLATE, direction=...), ".ablate.direction", "E_POLICY_MISSING"),
        (edit("ablate", ABLATE, direction="calm"), ".ablate.direction", "E_POLICY_REFERENCE"),
        (edit("ablate", ABLATE, unit="unit"), ".ablate.unit", "E_POLICY_KEY"),
        (edit("ablate", ABLATE, sites=[]), ".ablate.sites", "E_POLICY_SITES"),
        (edit("ablate", ABLATE, sites=["mlp", "mlp"]), ".ablate.sites", "E_POLICY_SITES"),
        (edit("ablate", ABLATE, sites=["heads"]), ".ablate.sites", "E_POLICY_SITES"),
        (edit("ablate", ABLATE, sites=[["mlp"]]), ".ablate.sites", "E_POLICY_SITES"),
        (edit("ablate", ABLATE, strength=float("inf")), ".ablate.strength", "E_POLICY_NUMBER"),
        (edit("clamp", CLAMP, to=...), ".clamp", "E_POLICY_CHOICE"),
        (edit("clamp", CLAMP, atMost=2), ".clamp", "E_POLICY_CHOICE"),
        (edit("clamp", CLAMP, atMost=2, atLeast=0), ".clamp", "E_POLICY_CHOICE"),
        (edit("clamp", CLAMP, to=..., atMost=0, atLeast=1), ".clamp", "E_POLICY_BOUNDS"),
        (edit("clamp", CLAMP, to=..., at_most=0), ".clamp.at_most", "E_POLICY_KEY"),
        (edit("clamp", CLAMP, unit="unit"), ".clamp.unit", "E_POLICY_VALUE"),
        (edit("rotate", ROTATE, by=...), ".rotate", "E_POLICY_CHOICE"),
        (edit("rotate", ROTATE, to=0), ".rotate", "E_POLICY_CHOICE"),
        (edit("rotate", ROTATE, by=181), ".rotate.by", "E_POLICY_NUMBER"),
        (edit("rotate", ROTATE, plane="a@1"), ".rotate.plane", "E_POLICY_PLANE"),
        (edit("rotate", ROTATE, plane=["a@1", "b"]), ".rotate.plane[1]", "E_POLICY_REFERENCE"),
        (edit("rotate", ROTATE, plane=["a@1", 2]), ".rotate.plane[1]", "E_POLICY_TYPE"),
        (edit("scale_heads", HEADS, heads="h"), ".scale_heads.heads", "E_POLICY_REFERENCE"),
        (edit("scale_heads", HEADS, heads=[]), ".scale_heads.heads", "E_POLICY_HEADS"),
        (edit("scale_heads", HEADS, heads=3), ".scale_heads.heads", "E_POLICY_HEADS"),
        (edit("scale_heads", HEADS, heads=[[1]]), ".scale_heads.heads", "E_POLICY_HEADS"),
        (edit("scale_heads", HEADS, heads=[[1, True]]), ".scale_heads.heads", "E_POLICY_HEADS"),
        (edit("scale_heads", HEADS, heads=[[1, -1]]), ".scale_heads.heads", "E_POLICY_HEADS"),
        (
            edit("scale_heads", HEADS, heads=[[1, 1], [1, 1]]),
            ".scale_heads.heads",
            "E_POLICY_HEADS",
        ),
        (edit("scale_heads", HEADS, factor=[1]), ".scale_heads", "E_POLICY_HEADS"),
        (edit("scale_heads", HEADS, heads="h@1", factor=[1]), ".scale_heads", "E_POLICY_HEADS"),
        (edit("scale_heads", HEADS, factor=101), ".scale_heads.factor", "E_POLICY_NUMBER"),
        (
            edit("scale_heads", HEADS, factor=[0, float("nan")]),
            ".scale_heads.factor",
            "E_POLICY_NUMBER",
        ),
        (edit("scale_heads", HEADS, factor=10**400), ".scale_heads.factor", "E_POLICY_NUMBER"),
        (edit("scale_heads", HEADS, factor="0"), ".scale_heads.factor", "E_POLICY_TYPE"),
        (edit("scale_heads", HEADS, factor=[0, True]), ".scale_heads.factor", "E_POLICY_TYPE"),
        (
            edit("scale_heads", HEADS, renormalise="all"),
            ".scale_heads.renormalise",
            "E_POLICY_VALUE",
        ),
        (
            changed(("edits", "calm", "ablate"), {"direction": "calm@1"}),
            "$.edits.calm",
            "E_POLICY_EDIT_KIND",
        ),
    ],
)
def test_a_fault_of_a_kind_has_its_code_and_place(document: object, path: str, code: str) -> None:
    full = path if path.startswith("$") else f"$.edits.e{path}"
    assert errors_of(document) == {full: code}


def test_kinds_have_their_defaults() -> None:
    ablate = parse_policy(edit("ablate", ABLATE)).edits["e"].spec
    clamp = parse_policy(edit("clamp", CLAMP)).edits["e"].spec
    heads = parse_policy(edit("scale_heads", HEADS)).edits["e"].spec

    assert isinstance(ablate, Ablate)
    assert isinstance(clamp, Clamp)
    assert isinstance(heads, ScaleHeads)
    assert (ablate.strength, ablate.sites, ablate.layers) == (1.0, ("residual",), "all")
    assert (clamp.to, clamp.at_least, clamp.at_most, clamp.unit) == (1.0, None, None, "absolute")
    assert heads.renormalise == "none"


def test_heads_are_sorted_and_take_their_factors_along() -> None:
    written = parse_policy(edit("scale_heads", HEADS, factor=[3, 2])).edits["e"].scale_heads
    ordered = edit("scale_heads", HEADS, heads=[[2, 5], [3, 1]], factor=[2, 3])

    assert written is not None
    assert (written.heads, written.factor) == (((2, 5), (3, 1)), (2.0, 3.0))
    assert parse_policy(ordered).edits["e"].scale_heads == written


def test_sites_have_one_normal_form() -> None:
    written = edit("ablate", ABLATE, sites=["mlp", "residual", "attention"])
    spec = parse_policy(written).edits["e"].ablate

    assert spec is not None
    assert spec.sites == ("residual", "attention", "mlp")
    assert parse_policy(edit("ablate", ABLATE, sites="mlp")) == parse_policy(
        edit("ablate", ABLATE, sites=["mlp"])
    )


def test_edits_act_in_the_order_of_their_kinds_and_then_of_their_names() -> None:
    document = changed(
        ("edits",),
        {
            "b": {"ablate": ABLATE},
            "d": {"add": {"direction": "calm@1", "strength": 1}},
            "e": {"scale_heads": HEADS},
            "a": {"ablate": ABLATE},
            "c": {"rotate": ROTATE},
            "f": {"clamp": CLAMP},
        },
    )

    assert parse_policy(document).acting_order == ("e", "a", "b", "f", "c", "d")


def test_a_policy_has_few_windows() -> None:
    def windows(*counts: int) -> dict[str, Any]:
        calm = MINIMAL["edits"]["calm"]
        return changed(
            ("edits",), {f"e{i}": {**calm, "scope": {"first": n}} for i, n in enumerate(counts)}
        )

    assert parse_policy(windows(1, 2, 3, 3, 2, 1))
    assert errors_of(windows(1, 2, 3, 4)) == {"$.edits": "E_POLICY_SIZE"}


# -- layers and scopes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "layers"),
    [
        ("all", "all"),
        (7, (7,)),
        (0, (0,)),
        ("7", (7,)),
        ("2-4", (2, 3, 4)),
        ("4-4", (4,)),
        ("9, 3,5-7", (3, 5, 6, 7, 9)),
        ([5, 3], (3, 5)),
    ],
)
def test_layers_have_one_normal_form(written: object, layers: object) -> None:
    add = parse_policy(with_add(layers=written)).edits["calm"].add

    assert add is not None
    assert add.layers == layers


@pytest.mark.parametrize(
    "written",
    [
        *("", " ", ",", "3,", "3,,4", "-3", "3-", "4-3", "3-5-7", "3..5", "ALL", "all,3", "٣"),
        *("1e1", "0x3", "03", "3,3", "3,1-4", "1000", "0-999999999", "3\n", "3;4", "+3"),
        *([], [3, 3], [True], ["3"], [3.0], [-1], [1000], [[3]], [None]),
        *(-1, 1000, 3.0, True, None, {}, {"from": 3}),
    ],
    ids=repr,
)
def test_layers_that_are_not_plain_are_refused(written: object) -> None:
    assert errors_of(with_add(layers=written)) == {"$.edits.calm.add.layers": "E_POLICY_LAYERS"}


@given(st.sets(st.integers(0, 999), min_size=1, max_size=30), st.randoms())
@settings(deadline=None)
def test_any_spelling_of_a_set_of_layers_is_read_the_same(layers: set[int], random: Any) -> None:
    runs: list[str] = []
    left = sorted(layers)
    while left:
        run = 1
        while run < len(left) and left[run] == left[0] + run and random.random() < 0.7:
            run += 1
        alone = run == 1 and random.random() < 0.5
        runs.append(str(left[0]) if alone else f"{left[0]}-{left[run - 1]}")
        left = left[run:]
    random.shuffle(runs)

    assert parse_layers(",".join(runs)) == parse_layers(list(layers)) == tuple(sorted(layers))


@pytest.mark.parametrize(
    ("written", "scope"),
    [
        ("all", ("all",)),
        (["all"], ("all",)),
        (["generation", "prompt"], ("all",)),
        ("prompt", ("prompt",)),
        (["generation"], ("generation",)),
        ("prompt_end", ("prompt_end",)),
        (["think_end", "answer"], ("answer", "think_end")),
        (["answer", "thinking", "think_end"], ("generation",)),
        (["thinking", "prompt_end"], ("prompt_end", "thinking")),
        (["prompt", "answer", "thinking", "think_end"], ("all",)),
        ({"first": 16}, (First(first=16),)),
        ([{"first": 1}, "prompt_end"], ("prompt_end", First(first=1))),
        ([{"first": 4096}, "thinking"], ("thinking", First(first=4096))),
    ],
)
def test_scopes_have_one_normal_form(written: object, scope: object) -> None:
    policy = parse_policy(changed(("edits", "calm", "scope"), written))

    assert policy.edits["calm"].scope == scope


@pytest.mark.parametrize(
    "written",
    [
        *([], "", "Prompt", "thoughts", "prompt,generation", ["prompt", "prompt"]),
        *(["all", "prompt"], [["prompt"]], [1], None, {}, 0, True),
        *(["prompt", "prompt_end"], ["generation", "answer"], {"last": 3}),
        *({"first": n} for n in (0, -1, 4097, True, 1.0, "1", None)),
        *({"first": 1, "last": 1}, [{"first": 1}, {"first": 2}], [{"first": 1}, "generation"]),
        *([{"first": 1}, "all"], ["answer", "thinking", "think_end", {"first": 9}]),
    ],
    ids=repr,
)
def test_scopes_that_are_not_plain_are_refused(written: object) -> None:
    found = errors_of(changed(("edits", "calm", "scope"), written))

    assert found == {"$.edits.calm.scope": "E_POLICY_SCOPE"}


# -- canonical form and identity -------------------------------------------------------------------

references = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,12}@[1-9][0-9]{0,3}", fullmatch=True)
numbers = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-10, 10)
layer_sets = st.just("all") | st.sets(st.integers(0, 99), min_size=1).map(sorted)
bounds = st.floats(-1e6, 1e6)
names = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,8}", fullmatch=True)


def keys(required: dict[str, Any], **optional: Any) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(required, optional={"layers": layer_sets, **optional})


along = {"direction": references}
of_one_layer = {"vectorLayer": st.integers(0, 99)}
kinds = {
    "add": keys(
        {**along, "strength": numbers},
        unit=st.sampled_from(["absolute", "unit", "relative"]),
        **of_one_layer,
    ),
    "ablate": keys(
        along,
        strength=numbers,
        sites=st.sampled_from([["residual"], ["mlp", "residual"], ["mlp", "attention"]]),
        **of_one_layer,
    ),
    "clamp": st.one_of(
        keys({**along, "to": numbers}, **of_one_layer),
        keys({**along, "atLeast": bounds}, unit=st.sampled_from(["absolute", "relative"])),
        st.tuples(bounds, bounds)
        .map(sorted)
        .flatmap(lambda b: keys({**along, "atLeast": st.just(b[0]), "atMost": st.just(b[1])})),
    ),
    "rotate": st.sampled_from(["to", "by"]).flatmap(
        lambda key: keys(
            {"plane": st.lists(references, min_size=2, max_size=2), key: st.floats(-180, 180)}
        )
    ),
    "scale_heads": st.one_of(
        st.fixed_dictionaries({"heads": references, "factor": st.floats(-100, 100)}),
        st.dictionaries(
            st.tuples(st.integers(0, 99), st.integers(0, 99)), st.floats(-100, 100), min_size=1
        ).map(
            lambda heads: {
                "heads": [list(head) for head in heads],
                "factor": list(heads.values()),
                "renormalise": "row",
            }
        ),
    ),
}
scopes = st.sampled_from(
    ["all", "prompt", ["generation"], ["think_end", "answer"], ["prompt_end", {"first": 16}]]
)
edits = st.sampled_from(list(kinds)).flatmap(
    lambda kind: st.fixed_dictionaries({kind: kinds[kind]}, optional={"scope": scopes})
)


def gate(names: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    return st.sampled_from(
        [{"above": 0.5}, {"below": -1}, {"between": [0.25, 1]}, {"above": 0.5, "output": 1}]
    ).flatmap(
        lambda threshold: st.fixed_dictionaries(
            {
                "probe": references,
                "at": st.sampled_from(["token", "prompt_end", "think_end"]),
                "then": st.lists(st.sampled_from(names), min_size=1, unique=True),
                **{key: st.just(value) for key, value in threshold.items()},
            }
        )
    )


def with_gates(document: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    if not document["edits"]:
        return st.just(document)
    gates = st.dictionaries(names, gate(sorted(document["edits"])), max_size=3)
    return gates.map(lambda found: {**document, "gates": found})


documents = st.fixed_dictionaries(
    {
        "apiVersion": st.just("trimtab/v1"),
        "kind": st.just("Policy"),
        "name": st.from_regex(r"[a-z0-9][a-z0-9._-]{0,12}", fullmatch=True).filter(
            lambda name: name != "off"
        ),
        "edits": st.dictionaries(names, edits, max_size=4),
    },
    optional={
        "version": st.integers(1, 2**31 - 1),
        "description": st.text(max_size=20),
        "mode": st.sampled_from(["off", "shadow", "enforce"]),
        "onFailure": st.sampled_from(["closed", "open"]),
        "strengthRange": st.tuples(st.floats(-1e9, 1.0), st.floats(1.0, 1e9, exclude_max=True)).map(
            list
        ),
    },
).flatmap(with_gates)


def shuffled(value: Any, random: Any) -> Any:
    """The same document with its keys in another order."""
    if not isinstance(value, dict):
        return value
    items = [(key, shuffled(item, random)) for key, item in value.items()]
    random.shuffle(items)
    return dict(items)


@given(documents, st.randoms())
@settings(deadline=None)
def test_identity_does_not_depend_on_the_order_of_keys(document: Any, random: Any) -> None:
    assert parse_policy(document).identity == parse_policy(shuffled(document, random)).identity


@given(documents)
@settings(deadline=None)
def test_the_canonical_form_is_itself_the_policy(document: Any) -> None:
    policy = parse_policy(document)

    again = parse_policy({**json.loads(policy.canonical), "description": policy.description})

    assert again == policy
    assert again.canonical == policy.canonical


@given(documents, documents)
@settings(deadline=None)
def test_different_policies_have_different_identities(one: Any, other: Any) -> None:
    first, second = parse_policy(one), parse_policy(other)

    same = first.model_copy(update={"description": second.description}) == second
    assert (first.identity == second.identity) == same


def test_what_is_left_to_the_defaults_and_what_is_spelt_out_is_the_same_policy() -> None:
    assert parse_policy(MINIMAL).canonical == parse_policy(FULL).canonical


def test_the_identity_leaves_out_the_description_and_nothing_else() -> None:
    policy = parse_policy(MINIMAL)

    assert parse_policy(changed(("description",), "other")).identity == policy.identity
    for path, value in (
        (("name",), "other"),
        (("version",), 2),
        (("mode",), "shadow"),
        (("onFailure",), "open"),
        (("strengthRange",), [0, 2]),
        (("edits",), {}),
        (("edits", "more"), MINIMAL["edits"]["calm"]),
        (("edits", "calm", "scope"), "prompt"),
        (("edits", "calm", "scope"), {"first": 3}),
        (("gates",), {"g": {"probe": "p@1", "at": "token", "above": 0, "then": ["calm"]}}),
        (("edits", "calm", "add", "vectorLayer"), 3),
        (("edits", "calm", "add", "layers"), 3),
        (("edits", "calm", "add", "unit"), "unit"),
        (("edits", "calm", "add", "strength"), -0.5),
        (("edits", "calm", "add", "direction"), "calm@2"),
    ):
        assert parse_policy(changed(path, value)).identity != policy.identity, path


def test_identities_do_not_change_between_releases() -> None:
    # Stored identities and cached prefixes hang on this; a new key must not move it.
    policy = parse_policy(MINIMAL)

    assert policy.canonical == (
        b'{"apiVersion":"trimtab/v1","edits":{"calm":{"add":{"direction":"calm@1","layers":"all",'
        b'"strength":0.5,"unit":"absolute"},"scope":["all"]}},"kind":"Policy","mode":"enforce",'
        b'"name":"guard","onFailure":"closed","strengthRange":[0,1],"version":1}'
    )
    assert policy.identity == "2110811e97334ea2d66ccae34742eb4e33f26c5a723f9681abc9ce89171baac0"


def test_probes_are_a_set_and_none_do_not_show_in_the_canonical_form() -> None:
    read = [
        parse_policy(changed(("probes",), probes)) for probes in (["b@2", "a@1"], ["a@1", "b@2"])
    ]
    assert read[0].probes == ("a@1", "b@2")
    assert read[0].identity == read[1].identity
    plain = parse_policy(changed(("probes",), []))
    assert b"probes" not in plain.canonical
    assert plain.identity != read[0].identity
    named = [(a.kind, a.reference) for a in read[0].artefacts]
    assert named[-2:] == [("probe", "a@1"), ("probe", "b@2")]


def test_keys_that_are_left_out_do_not_show_in_the_canonical_form() -> None:
    spelt = with_add(vectorLayer=None)
    spelt["gates"] = {}
    spelt["edits"]["calm"]["ablate"] = None

    assert parse_policy(spelt).canonical == parse_policy(MINIMAL).canonical


def test_negative_zero_is_zero() -> None:
    zero, negative = with_add(strength=0.0), with_add(strength=-0.0)

    assert parse_policy(zero).identity == parse_policy(negative).identity
    assert str(parse_policy(negative).edits["calm"].add.strength) == "0.0"  # type: ignore[union-attr]


# -- the module ------------------------------------------------------------------------------------


def test_every_kind_of_edit_is_a_field_of_edit() -> None:
    assert {
        "scale_heads": ScaleHeads,
        "ablate": Ablate,
        "clamp": Clamp,
        "rotate": Rotate,
        "add": Add,
    } == KINDS


def test_the_specification_has_a_closed_json_schema() -> None:
    schema = Policy.model_json_schema(by_alias=True)

    assert schema["additionalProperties"] is False
    assert {"apiVersion", "onFailure", "strengthRange"} <= schema["properties"].keys()


def test_a_policy_is_checked_without_torch_or_vllm() -> None:
    script = (
        "import sys, steering.policy, steering.policy_files, steering.plan\n"
        "loaded = {'torch', 'vllm', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'loaded {loaded}' if loaded else 0)"
    )

    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.parametrize(
    ("parts", "path"),
    [
        ((), "$"),
        (("edits", "calm-down", "layers", 3), "$.edits.calm-down.layers[3]"),
        (('a"b',), '$["a\\"b"]'),
        (("é",), '$["\\u00e9"]'),
    ],
)
def test_json_paths_quote_what_is_not_a_plain_word(parts: Any, path: str) -> None:
    assert json_path(parts) == path
