from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from directions.errors import TrimtabError
from steering.thinking import ThinkingTracker
from steering.thinking_markers import HARMONY, detect_markers, given_markers

THINK = ("<think>", "</think>")
BRACKETS = ("[THINK]", "[/THINK]")


def write(folder: Path, **files: Any) -> Path:
    for name, document in files.items():
        (folder / f"{name}.json").write_text(json.dumps(document))
    return folder


def fast(*added: str, vocab: Any = None) -> dict[str, Any]:
    return {
        "model": {"vocab": {"a": 0, "b": 1} if vocab is None else vocab},
        "added_tokens": [{"id": 2 + i, "content": token} for i, token in enumerate(added)],
    }


def with_template(text: str) -> dict[str, Any]:
    return {"chat_template": text}


def test_nothing_is_known_of_a_model_whose_files_name_no_pair(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    assert detect_markers(tmp_path) is None
    assert detect_markers(tiny_checkpoint) is None


@pytest.mark.parametrize("pair", [THINK, BRACKETS])
def test_a_pair_that_the_chat_template_names_is_the_models(
    tmp_path: Path, pair: tuple[str, str]
) -> None:
    start, end = pair
    template = f"{{% if thinks %}}{start}{{{{ m.split('{end}') }}}}{{% endif %}}"
    write(tmp_path, tokenizer=fast(), tokenizer_config=with_template(template))
    assert detect_markers(tmp_path) == pair


def test_half_a_pair_is_none(tmp_path: Path) -> None:
    config = with_template("{{ content.split('</think>')[-1] }}")
    write(tmp_path, tokenizer=fast("[THINK]"), tokenizer_config=config)
    assert detect_markers(tmp_path) is None


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer": fast(*THINK)},
        {"tokenizer": fast(vocab={"<think>": 0, "</think>": 1})},
        {"tokenizer": fast(vocab=[["<think>", 0.0], ["</think>", -1.5]])},
        {"added_tokens": {"<think>": 7, "</think>": 8}},
        {
            "tokenizer_config": {
                "added_tokens_decoder": {"7": {"content": "<think>"}, "8": {"content": "</think>"}}
            }
        },
        {"tekken": {"special_tokens": [{"token_str": "<think>"}, {"token_str": "</think>"}]}},
    ],
)
def test_a_pair_of_tokens_is_found_in_every_form_of_vocabulary(
    tmp_path: Path, files: dict[str, Any]
) -> None:
    assert detect_markers(write(tmp_path, **files)) == THINK


def test_the_template_counts_before_the_vocabulary(tmp_path: Path) -> None:
    write(tmp_path, tokenizer=fast(*THINK), tokenizer_config=with_template("[THINK]x[/THINK]"))
    assert detect_markers(tmp_path) == BRACKETS
    assert detect_markers(tmp_path, "a template of the operator's, without markers") == THINK


def test_harmony_marks_thinking_by_its_channels(tmp_path: Path) -> None:
    write(tmp_path, tokenizer=fast("<|channel|>", "<|message|>", *THINK))
    assert detect_markers(tmp_path) == HARMONY
    texts = ["<|channel|>", "<|message|>", "analysis", "final", "hm", "Yes", "<|end|>"]
    tracker = ThinkingTracker.build(texts, *HARMONY)
    states = tracker.states([0, 2, 1, 4, 6, 0, 3, 1, 5])
    phases = [int(tracker.phase_of_state[state]) for state in states]
    # Answer until the first header is complete, thinking until the second is, its end, the answer.
    assert phases == [4, 4, 2, 2, 2, 2, 2, 3, 4]


def test_markers_are_named_in_pairs() -> None:
    assert given_markers(None, None) is None
    assert given_markers("<a>", "</a>") == ("<a>", "</a>")
    with pytest.raises(TrimtabError, match="--think-start is given without --think-end") as caught:
        given_markers("<a>", None)
    assert (caught.value.code, caught.value.field) == ("E_THINKING_MARKERS", "--think-end")
