"""Reading a policy's text: the part of YAML that means what JSON means, and nothing else."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steering.policy_document import MAX_BYTES, MAX_DEPTH, read_document
from steering.policy_errors import PolicyErrors


def refusal(text: str | bytes) -> PolicyErrors:
    with pytest.raises(PolicyErrors) as caught:
        read_document(text)
    return caught.value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("off", "off"),
        ("on", "on"),
        ("yes", "yes"),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("12", 12),
        ("-3", -3),
        ("010", 10),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("12:30", "12:30"),
        ("12-20", "12-20"),
        ("3,5,12-20", "3,5,12-20"),
        ("2026-01-01", "2026-01-01"),
        ("1e-3", 0.001),
        (".5", 0.5),
        ("-1.", -1.0),
        (".inf", float("inf")),
        ("-.INF", float("-inf")),
        ("'12'", "12"),
        ("=", "="),
    ],
)
def test_unquoted_words_and_numbers_follow_the_core_schema(text: str, value: object) -> None:
    data = read_document(f"x: {text}").data

    assert data == {"x": value}
    assert type(data["x"]) is type(value)  # type: ignore[index]


def test_merge_keys_have_no_meaning() -> None:
    assert read_document("<<: {a: 1}").data == {"<<": {"a": 1}}


@pytest.mark.parametrize(
    ("text", "code", "line"),
    [
        ("a: 1\nb: &x 2", "E_POLICY_YAML", 2),
        ("a: &x [1]\nb: *x", "E_POLICY_YAML", 1),
        ("a: 1\nb: *x", "E_POLICY_YAML", 2),
        ("!!python/object/apply:os.system [id]", "E_POLICY_YAML", 1),
        ("a: !!str 1", "E_POLICY_YAML", 1),
        ("a: ! 1", "E_POLICY_YAML", 1),
        ("&x a: 1", "E_POLICY_YAML", 1),
        ("a: 1\n---\nb: 2", "E_POLICY_YAML", 2),
        ("a: [1\nb: 2", "E_POLICY_YAML", 2),
        ("a: 1\n\tb: 2", "E_POLICY_YAML", 2),
        ("a: \x00", "E_POLICY_YAML", None),
        (b"a: \xff", "E_POLICY_YAML", None),
        ('a: "\\UFFFFFFFF"', "E_POLICY_YAML", None),
        ("a: " + "[" * MAX_DEPTH, "E_POLICY_SIZE", 1),
        ("#" * (MAX_BYTES + 1), "E_POLICY_SIZE", None),
        ("é" * (MAX_BYTES // 2 + 1), "E_POLICY_SIZE", None),
    ],
)
def test_what_is_not_plain_data_is_refused(text: str | bytes, code: str, line: int | None) -> None:
    (error,) = refusal(text).errors

    assert (error.code, error.line) == (code, line)
    assert error.message.isprintable()


def test_the_largest_document_is_read() -> None:
    document = b"a: 1\n#"

    assert read_document(document + b"x" * (MAX_BYTES - len(document))).data == {"a": 1}


def test_a_document_that_reaches_the_depth_limit_is_read() -> None:
    depth = MAX_DEPTH - 1

    assert read_document("[" * depth + "1" + "]" * depth).data is not None


def test_bombs_are_refused_before_they_are_read() -> None:
    laughs = "a0: &a0 [ha]\n" + "".join(
        f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 100)
    )
    started = time.process_time()
    for bomb in (laughs, "[" * MAX_BYTES, "{a: " * (MAX_BYTES // 4)):
        refusal(bomb)

    assert time.process_time() - started < 1.0


def test_a_repeated_key_is_reported_with_both_lines_and_the_rest_is_read() -> None:
    document = read_document("a:\n  b: 1\n  c: 2\n  b: 3\na: 4\n")

    assert document.data == {"a": {"b": 1, "c": 2}}
    assert [(e.code, e.field, e.line) for e in document.errors] == [
        ("E_POLICY_DUPLICATE_KEY", "$.a.b", 4),
        ("E_POLICY_DUPLICATE_KEY", "$.a", 5),
    ]
    assert "line 2" in document.errors[0].message


@pytest.mark.parametrize(
    "text", ["1: x", "true: x", "null: x", "1.5: x", "? [a]\n: x", "? {a: 1}\n: x"]
)
def test_a_key_that_is_not_a_string_is_reported(text: str) -> None:
    document = read_document(f"a:\n  b: 1\n{text}")

    assert document.data == {"a": {"b": 1}}
    assert [(e.code, e.field, e.line) for e in document.errors] == [("E_POLICY_TYPE", "$", 3)]


def test_a_list_that_lost_its_quotes_between_braces_is_explained() -> None:
    (error,) = read_document("{layers: 3,5}").errors

    assert "needs quotes" in error.message


def test_an_endless_number_is_reported() -> None:
    (error,) = read_document("a: " + "9" * 5000).errors

    assert (error.code, error.field) == ("E_POLICY_NUMBER", "$.a")


def test_the_line_of_a_value_is_that_of_its_key_or_else_of_what_is_around_it() -> None:
    document = read_document("a:\n  b:\n    - 1\n    - c: 2\n")

    assert document.line(("a", "b")) == 2
    assert document.line(("a", "b", 1, "c")) == 4
    assert document.line(("a", "b", 7)) == 2
    assert document.line(("z",)) == 1


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="ascii"), max_size=10),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(codec="ascii"), max_size=5), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(json_values)
@settings(deadline=None)
def test_json_is_read_as_json(value: Any) -> None:
    assert read_document(json.dumps(value)).data == value


@given(st.text(max_size=200) | st.binary(max_size=200))
@settings(deadline=None)
def test_any_text_is_read_or_refused(text: str | bytes) -> None:
    with contextlib.suppress(PolicyErrors):
        read_document(text)


@given(st.text(alphabet="ab:-?,[]{}&*!|>'\"%@#\\ \n\t1.~<=x", max_size=60))
@settings(deadline=None)
def test_any_punctuation_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(PolicyErrors):
        read_document(text)
