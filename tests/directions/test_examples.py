"""Files of examples, and choosing a part of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from directions.errors import TrimtabError
from directions.examples import Example, ExampleSet, read_examples


def lines(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def user(text: str) -> tuple[tuple[str, str], ...]:
    return (("user", text),)


def test_json_lines_in_all_their_forms(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "rows.jsonl",
        {"prompt": "a", "unknown": [1]},
        {"text": "b", "answer": "B"},
        {"prompt": "c", "completion": "C"},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "d"}]},
        {
            "messages": [
                {"role": "user", "content": "e"},
                {"role": "assistant", "content": "E"},
            ]
        },
        {"prompt": "f", "answer": None},
    )
    found = read_examples(path)
    assert found.name == "rows.jsonl"
    assert found.examples == (
        Example(user("a")),
        Example(user("b"), "B"),
        Example(user("c"), "C"),
        Example((("system", "s"), ("user", "d"))),
        Example(user("e"), "E"),
        Example(user("f")),
    )


def test_plain_text_is_one_prompt_a_line_whatever_it_looks_like(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    content = '\ufefffirst\r\n\r\n  {"prompt": "x"} \nwith\x0bseparators\x1c\u2028inside\n'
    path.write_bytes(content.encode())
    assert [example.messages[0][1] for example in read_examples(path).examples] == [
        "first",
        '{"prompt": "x"}',
        "with\x0bseparators\x1c\u2028inside",
    ]


@pytest.mark.parametrize(
    "row",
    [
        "text",
        [],
        {},
        {"prompt": ""},
        {"prompt": "  "},
        {"prompt": 3},
        {"prompt": "a", "text": "b"},
        {"prompt": "a", "answer": 1},
        {"prompt": "a", "answer": "x", "completion": "y"},
        {"messages": []},
        {"messages": "hello"},
        {"messages": ["hello"]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "robot", "content": "x"}]},
        {"messages": [{"role": "assistant", "content": "x"}]},
        {"messages": [{"role": "system", "content": "x"}]},
        {
            "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
            "answer": "z",
        },
        {"prompt": "half a pair \ud800"},
    ],
    ids=json.dumps,
)
def test_a_line_that_is_no_example_is_refused_by_number(tmp_path: Path, row: object) -> None:
    path = lines(tmp_path / "rows.jsonl", {"prompt": "fine"}, row)
    with pytest.raises(TrimtabError) as caught:
        read_examples(path)
    assert caught.value.code == "E_EXAMPLES_FILE"
    assert caught.value.field == f"{path}:2"


@pytest.mark.parametrize("content", [b'{"prompt": ', b"\xff\xfe", b"[" * 100_000])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(TrimtabError) as caught:
        read_examples(path)
    assert caught.value.code == "E_EXAMPLES_FILE"


def test_a_missing_and_an_empty_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrimtabError) as caught:
        read_examples(tmp_path / "nowhere.txt")
    assert caught.value.code == "E_EXAMPLES_FILE"
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(TrimtabError) as caught:
        read_examples(tmp_path / "empty.txt")
    assert caught.value.code == "E_EXAMPLES_EMPTY"


def a_set(*texts: str) -> ExampleSet:
    return ExampleSet("set", tuple(Example(user(text)) for text in texts))


def test_a_part_is_the_same_whatever_the_order_and_keeps_the_order() -> None:
    texts = [f"prompt {number}" for number in range(100)]
    part = a_set(*texts).limited(20)
    turned = a_set(*reversed(texts)).limited(20)
    assert set(part.examples) == set(turned.examples)
    assert len(part.examples) == 20
    order = [texts.index(example.messages[0][1]) for example in part.examples]
    assert order == sorted(order)
    assert order != list(range(20))


def test_a_part_mostly_stays_when_rows_are_added() -> None:
    texts = [f"prompt {number}" for number in range(100)]
    before = set(a_set(*texts).limited(50).examples)
    after = set(a_set(*texts, *(f"new {number}" for number in range(10))).limited(50).examples)
    assert len(before & after) >= 40
    assert a_set("x").limited(5) == a_set("x")
    assert a_set("x", "y").limited(None) == a_set("x", "y")


def test_a_source_tells_every_change_of_what_was_used() -> None:
    source = a_set("a", "b").source("positive")
    assert (source.name, source.rows, source.role) == ("set", 2, "positive")
    others = [
        a_set("a", "c"),
        a_set("b", "a"),
        a_set("a"),
        ExampleSet("set", (Example(user("a")), Example(user("b"), "answer"))),
        ExampleSet("set", (Example((("system", "a"),)), Example(user("b")))),
    ]
    hashes = {other.source("positive").sha256 for other in others}
    assert len(hashes) == len(others)
    assert source.sha256 not in hashes
    assert a_set("a", "b").source("negative").sha256 == source.sha256
