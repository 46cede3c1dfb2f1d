from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from directions.errors import TrimtabError
from server.body import parse_object
from server.catalogue import Catalogue
from server.selection import (
    Choice,
    alias_choice,
    header_choice,
    select,
    steering_field,
)
from steering.readings import Reading, tell_apart
from tests.server.conftest import make_entry

POLICY = b"x-trimtab-policy"


def refusal(call: object, *args: object) -> TrimtabError:
    with pytest.raises(TrimtabError) as caught:
        call(*args)  # type: ignore[operator]
    return caught.value


# --- the header


def test_no_header_selects_nothing() -> None:
    assert header_choice([(b"host", b"x"), (b"x-request-id", b"y")]) is None


@pytest.mark.parametrize(
    ("value", "name", "version"),
    [(b"guard", "guard", None), (b"guard@3", "guard", 3), (b" off\t", "off", None)],
)
def test_the_header_names_a_policy_and_perhaps_a_version(
    value: bytes, name: str, version: int | None
) -> None:
    choice = header_choice([(POLICY, value)])
    assert choice is not None
    assert (choice.name, choice.version) == (name, version)


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"guard\r\nX-Evil: 1",
        b"guard\x00",
        b"gu ard",
        b"Guard",
        b"guard@",
        b"guard@0",
        b"guard@-1",
        b"guard@1@2",
        b"guard@99999999999999999999",
        b"gu\xc3\xa4rd",
        b"guard,guard",
        b'"guard"',
        b"g" * 129,
    ],
)
def test_a_header_that_is_not_a_policys_name_is_refused(value: bytes) -> None:
    error = refusal(header_choice, [(POLICY, value)])
    assert error.code == "E_HEADER"
    assert "\r" not in error.message
    assert "\n" not in error.message
    assert len(error.message) < 200


def test_a_repeated_header_is_refused_even_if_both_agree() -> None:
    assert refusal(header_choice, [(POLICY, b"guard"), (POLICY, b"guard")]).code == "E_HEADER"


def test_an_unknown_trimtab_header_is_refused_rather_than_ignored() -> None:
    error = refusal(header_choice, [(b"x-trimtab-strength", b"2")])
    assert error.code == "E_HEADER"
    assert "x-trimtab-strength" in error.message


# --- the model's name


def test_a_plain_name_carries_no_policy() -> None:
    assert alias_choice("m", {"m"}) is None
    assert alias_choice(None, {"m"}) is None
    assert alias_choice(7, {"m"}) is None


def test_an_alias_is_split_at_the_longest_served_name() -> None:
    served = {"a", "a@b", "org/m@main"}
    assert alias_choice("a@b", served) is None
    found = alias_choice("a@b@c", served)
    assert found is not None
    assert (found.base, found.choice.name, found.choice.version) == ("a@b", "c", None)
    found = alias_choice("a@c@3", served)
    assert found is not None
    assert (found.base, found.choice.name, found.choice.version) == ("a", "c", 3)
    found = alias_choice("org/m@main@guard@7", served)
    assert found is not None
    assert (found.base, found.choice.name, found.choice.version) == ("org/m@main", "guard", 7)


def test_an_alias_of_a_model_that_is_not_served_is_left_to_vllm() -> None:
    assert alias_choice("other@guard", {"m"}) is None
    assert alias_choice("@guard", {"m"}) is None


@pytest.mark.parametrize("model", ["m@", "m@@", "m@Guard", "m@a b", "m@a@0", "m@a@b", "m@a\n"])
def test_what_follows_a_served_name_must_be_a_policys_name(model: str) -> None:
    assert refusal(alias_choice, model, {"m"}).code == "E_POLICY_UNKNOWN"


# --- the body's field


def test_the_steering_object_gives_policy_and_strength() -> None:
    found = steering_field({"policy": "guard@3", "strength": 2, "trace": False})
    assert found.choice is not None
    assert (found.choice.name, found.choice.version, found.strength) == ("guard", 3, 2.0)
    assert isinstance(found.strength, float)
    assert steering_field({}).choice is None


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (None, "E_STEERING_FIELD"),
        ("guard", "E_STEERING_FIELD"),
        ([], "E_STEERING_FIELD"),
        ({"polcy": "guard"}, "E_STEERING_FIELD"),
        ({"policy": None}, "E_STEERING_FIELD"),
        ({"policy": 7}, "E_STEERING_FIELD"),
        ({"policy": ["guard"]}, "E_STEERING_FIELD"),
        ({"policy": {"name": "x"}}, "E_STEERING_FIELD"),
        ({"policy": "../guard"}, "E_POLICY_UNKNOWN"),
        ({"policy": "guard\r\n"}, "E_POLICY_UNKNOWN"),
        ({"strength": "1"}, "E_STEERING_FIELD"),
        ({"strength": True}, "E_STEERING_FIELD"),
        ({"strength": None}, "E_STEERING_FIELD"),
        ({"strength": [1]}, "E_STEERING_FIELD"),
        ({"strength": float("nan")}, "E_STRENGTH_FINITE"),
        ({"strength": float("inf")}, "E_STRENGTH_FINITE"),
        ({"strength": -float("inf")}, "E_STRENGTH_FINITE"),
        ({"strength": 10**400}, "E_STRENGTH_FINITE"),
        ({"trace": 1}, "E_STEERING_FIELD"),
        ({"trace": None}, "E_STEERING_FIELD"),
        ({"trace": "some"}, "E_STEERING_FIELD"),
    ],
)
def test_anything_else_in_the_steering_object_is_refused(value: object, code: str) -> None:
    error = refusal(steering_field, value)
    assert error.code == code
    assert error.field is not None
    assert error.field.startswith("$.steering")


def test_a_key_given_twice_is_refused_since_two_readers_could_disagree() -> None:
    document = parse_object(b'{"steering": {"policy": "guard", "policy": "off"}}')
    assert refusal(steering_field, document["steering"]).code == "E_BODY_JSON"


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    )
)
def test_every_json_value_that_is_not_a_steering_object_gets_a_coded_refusal(value: object) -> None:
    codes = {"E_STEERING_FIELD", "E_STRENGTH_FINITE", "E_TRACE_UNSUPPORTED", "E_POLICY_UNKNOWN"}
    if isinstance(value, dict) and not value:
        assert steering_field(value).choice is None
        return
    error = refusal(steering_field, value)
    assert error.code in codes
    json.dumps(error.to_dict())


# --- which one holds


def test_the_default_holds_where_nothing_is_selected(catalogue: Catalogue) -> None:
    assert select(catalogue, [None, None, None]).entry is None
    with_default = Catalogue.of([make_entry("guard")], default="guard")
    selection = select(with_default, [None])
    assert selection.entry is not None
    assert (selection.entry.policy.name, selection.strength) == ("guard", 1.0)


def test_off_can_be_chosen_over_the_default() -> None:
    with_default = Catalogue.of([make_entry("guard")], default="guard")
    assert select(with_default, [Choice("the header", "off")]).entry is None


def test_places_that_agree_are_one_selection_whether_or_not_they_give_the_version(
    catalogue: Catalogue,
) -> None:
    choices = [Choice("a", "guard"), Choice("b", "guard", 3), None]
    selection = select(catalogue, choices, 2.0)
    assert selection.entry is catalogue.entries["guard"]
    assert selection.exchange().policy == "guard@3"
    assert selection.exchange().strength == 2.0


@pytest.mark.parametrize("other", ["kind", "off"])
def test_places_that_disagree_are_refused(catalogue: Catalogue, other: str) -> None:
    error = refusal(select, catalogue, [Choice("the alias", "guard"), Choice("the header", other)])
    assert error.code == "E_SELECTION_CONFLICT"
    assert "the alias selects guard" in error.message
    assert f"the header selects {other}" in error.message


def test_an_unknown_policy_is_found_even_behind_one_that_is_known(catalogue: Catalogue) -> None:
    choices = [Choice("the alias", "guard"), Choice("the header", "nobody")]
    assert refusal(select, catalogue, choices).code == "E_POLICY_UNKNOWN"


def test_a_version_that_is_not_served_is_refused(catalogue: Catalogue) -> None:
    error = refusal(select, catalogue, [Choice("x", "guard", 2)])
    assert error.code == "E_POLICY_VERSION"
    assert error.expected == "guard@3"
    assert refusal(select, catalogue, [Choice("x", "off", 1)]).code == "E_POLICY_VERSION"


@pytest.mark.parametrize("strength", [-0.001, 2.001, 1e300])
def test_a_strength_outside_the_range_is_refused_and_not_clamped(
    catalogue: Catalogue, strength: float
) -> None:
    error = refusal(select, catalogue, [Choice("x", "guard")], strength)
    assert error.code == "E_STRENGTH_RANGE"
    assert error.expected == "0 to 2"


def test_a_strength_without_a_policy_is_refused_rather_than_ignored(catalogue: Catalogue) -> None:
    assert refusal(select, catalogue, [None], 0.5).code == "E_STEERING_FIELD"


@pytest.mark.parametrize(
    ("name", "strength", "applies", "reason"),
    [
        ("guard", 1.0, True, "not_run"),
        ("guard", 0.0, False, "strength_zero"),
        ("watch", 1.0, False, "shadow"),
        ("still", 1.0, False, "off"),
        ("off", None, False, "off"),
    ],
)
def test_only_an_enforced_policy_at_some_strength_has_a_plan(
    catalogue: Catalogue, name: str, strength: float | None, applies: bool, reason: str
) -> None:
    exchange = select(catalogue, [Choice("x", name)], strength).exchange()
    assert (exchange.plan is not None) is applies
    assert exchange.applied() == (False, reason)


def test_a_policy_without_edits_has_nothing_to_apply() -> None:
    only = Catalogue.of([make_entry("empty", edits=False)])
    exchange = select(only, [Choice("x", "empty")]).exchange()
    assert exchange.plan is None
    assert exchange.applied() == (False, "no_edits")


# -- probes ----------------------------------------------------------------------------------------


def reading(name: str, output: int = 0) -> Reading:
    return Reading(f"{name}@1", name, name * 8, output, 3, "affine")


def test_a_request_is_read_by_the_server_s_probes_and_those_of_its_policy() -> None:
    everyone, mine = reading("mood"), reading("harm")
    entries = [
        replace(make_entry("guard"), probes=(mine, everyone)),
        replace(make_entry("watch", mode="shadow"), probes=(mine,)),
        replace(make_entry("still", mode="off"), probes=(mine,)),
    ]
    catalogue = Catalogue.of(entries, probes=(everyone,))
    assert catalogue.readings == (everyone, mine)

    def read(name: str) -> tuple[Reading, ...]:
        exchange = select(catalogue, [Choice("the header", name)], trace=True).exchange()
        assert exchange.trace is True
        return exchange.readings

    assert read("off") == read("still") == (everyone,)
    assert read("guard") == read("watch") == (everyone, mine)
    assert select(catalogue, [None]).exchange().trace is False
    assert Catalogue.from_json(json.loads(json.dumps(catalogue.to_json()))) == catalogue


@pytest.mark.parametrize("trace", [True, "all"])
def test_a_trace_of_what_no_probe_reads_is_refused(catalogue: Catalogue, trace: Any) -> None:
    for name in ("off", "guard"):
        error = refusal(select, catalogue, [Choice("the header", name)], None, trace)
        assert (error.code, error.field) == ("E_TRACE_UNSUPPORTED", "$.steering.trace")
        assert name in error.message
    for value in (False, True, "all"):
        assert steering_field({"trace": value}).trace == value


def test_two_versions_of_one_probe_have_series_of_their_own() -> None:
    old, new, other = (
        reading("mood"),
        replace(reading("mood"), key="mood@2", probe="b"),
        reading("x"),
    )
    told = tell_apart([old, new, other, old])
    assert {r.key: r.label for r in told.values()} == {
        "mood@1": "mood@1",
        "mood@2": "mood@2",
        "x@1": "x",
    }
