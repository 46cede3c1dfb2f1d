"""Reading activations: the right place, the right tokens, and the same whatever the batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from directions.activations import HELD_OUT_SAMPLE, Passage, measure, passages
from directions.errors import TrimtabError
from directions.examples import Example
from directions.language_model import LanguageModel, Reading, batches_by_length, opened
from directions.position import Position

TEXTS = [
    "Hi",
    "What is the capital of the country where the river meets the sea?",
    "Tell me how to trim the sails.",
    "a",
    "The rudder is moved by a small surface on its edge, and the ship turns. " * 3,
]
EXAMPLES = [Example((("user", text),)) for text in TEXTS]
ANSWERED = [
    Example((("user", text),), "The answer to this is " + text[::-1][: 5 + 9 * i])
    for i, text in enumerate(TEXTS)
]


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Iterator[LanguageModel]:
    with opened(tiny_checkpoint, Reading(device="cpu", batch_size=3)) as found:
        yield found


def with_batch_size(model: LanguageModel, batch_size: int) -> LanguageModel:
    return LanguageModel(
        model.network,
        model.tokenizer,
        model.device,
        model.layers,
        Reading(device="cpu", batch_size=batch_size),
    )


def hidden_after_each_layer(model: LanguageModel, tokens: tuple[int, ...]) -> np.ndarray:
    """What each decoder layer returns on one sequence alone: [layers, tokens, hidden]."""
    seen = []
    handles = [
        layer.register_forward_hook(
            lambda module, args, output: seen.append(
                output[0] if isinstance(output, tuple) else output
            )
        )
        for layer in model.layers
    ]
    with torch.no_grad():
        model.network(torch.tensor([tokens]))
    for handle in handles:
        handle.remove()
    return torch.stack([hidden[0] for hidden in seen]).double().numpy()


@pytest.mark.parametrize(
    ("text", "examples"),
    [
        ("last-prompt-token", EXAMPLES),
        ("prompt-mean", EXAMPLES),
        ("answer-mean:4", ANSWERED),
        ("answer-mean:64", ANSWERED),
    ],
)
def test_the_mean_is_that_of_the_chosen_tokens_read_one_sequence_at_a_time(
    model: LanguageModel, text: str, examples: list[Example]
) -> None:
    position = Position.parse(text)
    rows, norms = [], []
    for example in examples:
        prompt = model.prompt_tokens(example)
        answer = model.text_tokens(example.answer or "", 10_000)
        hidden = hidden_after_each_layer(model, prompt + answer)
        if text == "last-prompt-token":
            chosen = hidden[:, len(prompt) - 1 : len(prompt)]
        elif text == "prompt-mean":
            chosen = hidden[:, 1 : len(prompt)]
        else:
            chosen = hidden[:, len(prompt) : len(prompt) + (position.tokens or 0)]
        rows.append(chosen.mean(axis=1))
        norms.append(np.linalg.norm(chosen, axis=2))
    found = measure(model, passages(model, examples, position))
    np.testing.assert_allclose(found.mean, np.mean(rows, axis=0), rtol=0, atol=2e-5)
    all_norms = np.concatenate(norms, axis=1)
    assert found.num_tokens == all_norms.shape[1]
    np.testing.assert_allclose(found.norm_sum / found.num_tokens, all_norms.mean(axis=1), rtol=1e-5)


def test_the_answer_positions_differ_from_each_other_and_from_the_prompts(
    model: LanguageModel,
) -> None:
    means = [
        measure(model, passages(model, ANSWERED, Position.parse(text))).mean
        for text in ("last-prompt-token", "prompt-mean", "answer-mean:4", "answer-mean:64")
    ]
    for i, left in enumerate(means):
        for right in means[:i]:
            assert np.abs(left - right).max() > 0.05


@pytest.mark.parametrize("position", ["last-prompt-token", "prompt-mean", "answer-mean:8"])
def test_batched_and_unbatched_readings_agree(model: LanguageModel, position: str) -> None:
    found = passages(model, ANSWERED, Position.parse(position))
    assert len({len(passage.tokens) for passage in found}) == len(found)  # padding is at work
    alone = measure(with_batch_size(model, 1), found)
    for batch_size in (2, 5, 64):
        together = measure(with_batch_size(model, batch_size), found)
        np.testing.assert_allclose(together.sums, alone.sums, rtol=0, atol=1e-4)
        assert together.counts == alone.counts
        assert together.num_tokens == alone.num_tokens


def test_the_last_layer_is_read_before_the_final_norm(model: LanguageModel) -> None:
    found = passages(model, EXAMPLES[:1], Position.parse("last-prompt-token"))
    mean = torch.tensor(measure(model, found).mean[-1], dtype=torch.float32)
    with torch.no_grad():
        output = model.network(torch.tensor([found[0].tokens]), output_hidden_states=True)
    normed = output.hidden_states[-1][0, -1]
    assert not torch.allclose(mean, normed, atol=1e-2)
    torch.testing.assert_close(model.network.model.norm(mean), normed, atol=1e-4, rtol=1e-4)


def test_each_example_counts_once_however_long_its_answer(model: LanguageModel) -> None:
    short = Passage("a", (1, 5, 6, 7), range(3, 4))
    long = Passage("b", (1, *range(10, 40)), range(1, 31))
    both = measure(model, [short, long]).mean
    each = (measure(model, [short]).mean + measure(model, [long]).mean) / 2
    np.testing.assert_allclose(both, each, atol=1e-5)


def test_the_two_halves_make_up_the_whole_and_depend_only_on_ids(model: LanguageModel) -> None:
    found = passages(model, EXAMPLES, Position.parse("prompt-mean"))
    whole = measure(model, found)
    assert whole.counts == [3, 2]
    np.testing.assert_allclose(
        whole.mean, (3 * whole.half_mean(0) + 2 * whole.half_mean(1)) / 5, atol=1e-12
    )
    turned = measure(model, found[::-1])
    np.testing.assert_allclose(turned.sums, whole.sums, atol=1e-5)


def test_the_sample_of_held_out_examples_is_bounded(model: LanguageModel) -> None:
    many = [Passage(f"{i:04}", (1, 3 + i % 290), range(1, 2)) for i in range(700)]
    found = measure(with_batch_size(model, 64), many)
    assert sum(found.counts) == 700
    assert len(found.held_out) == HELD_OUT_SAMPLE


def test_prompts_go_through_the_chat_template_unless_told_otherwise(model: LanguageModel) -> None:
    rendered = model.tokenizer.decode(model.prompt_tokens(EXAMPLES[0]))
    assert rendered == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    plain = LanguageModel(
        model.network, model.tokenizer, model.device, model.layers, Reading(chat_template=False)
    )
    assert plain.tokenizer.decode(plain.prompt_tokens(EXAMPLES[0])) == "Hi"


def test_missing_answers_are_the_models_own_greedy_ones_whatever_the_batch(
    model: LanguageModel,
) -> None:
    prompts = [model.prompt_tokens(example) for example in EXAMPLES]
    found = model.answers(prompts, 6)
    for prompt, answer in zip(prompts, found, strict=True):
        tokens = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                token = int(model.network(torch.tensor([tokens])).logits[0, -1].argmax())
            if token == model.tokenizer.eos_token_id:
                break
            tokens.append(token)
        assert answer == tuple(tokens[len(prompt) :])
    read = passages(model, EXAMPLES, Position.parse("answer-mean:6"))
    assert [passage.tokens for passage in read] == [
        prompt + answer for prompt, answer in zip(prompts, found, strict=True) if answer
    ]


def test_an_empty_answer_is_left_out_and_only_empty_answers_are_refused(
    model: LanguageModel,
) -> None:
    position = Position.parse("answer-mean:4")
    empty = Example((("user", "x"),), "")
    assert len(passages(model, [ANSWERED[0], empty], position)) == 1
    with pytest.raises(TrimtabError) as caught:
        passages(model, [empty], position)
    assert caught.value.code == "E_EXAMPLES_EMPTY"


def test_a_prompt_beyond_the_models_context_is_refused(model: LanguageModel) -> None:
    with pytest.raises(TrimtabError) as caught:
        passages(model, [Example((("user", "sail " * 600),))], Position.parse("prompt-mean"))
    assert caught.value.code == "E_PROMPT_TOO_LONG"


def test_a_model_that_overflows_is_refused(tiny_checkpoint: Path) -> None:
    with opened(tiny_checkpoint, Reading(device="cpu")) as broken:
        with torch.no_grad():
            broken.layers[2].mlp.down_proj.weight.fill_(float("inf"))
        with pytest.raises(TrimtabError) as caught:
            measure(broken, [Passage("a", (1, 2, 3), range(2, 3))])
    assert caught.value.code == "E_ACTIVATIONS_NONFINITE"


def test_bfloat16_reads_nearly_what_float32_reads(
    model: LanguageModel, tiny_checkpoint: Path
) -> None:
    found = passages(model, EXAMPLES, Position.parse("prompt-mean"))
    exact = measure(model, found).mean
    with opened(tiny_checkpoint, Reading(dtype="bfloat16", device="cpu")) as coarse:
        rough = measure(coarse, found).mean
    assert rough.dtype == np.float64
    assert 0 < np.abs(rough - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "share"), [("float32", 1e-3), ("bfloat16", 0.05)])
def test_a_graphics_card_reads_what_the_processor_reads(
    model: LanguageModel, tiny_checkpoint: Path, dtype: str, share: float
) -> None:
    found = passages(model, ANSWERED, Position.parse("answer-mean:8"))
    exact = measure(model, found).mean
    with opened(tiny_checkpoint, Reading(dtype=dtype, device="cuda", batch_size=2)) as card:
        assert card.device.type == "cuda"
        there = measure(card, found).mean
    assert np.abs(there - exact).max() < share * np.abs(exact).max()


def test_no_hook_stays_behind(model: LanguageModel) -> None:
    before = [list(layer._forward_hooks) for layer in model.layers]
    measure(model, [Passage("a", (1, 2, 3), range(2, 3))])
    assert [list(layer._forward_hooks) for layer in model.layers] == before


def test_batches_hold_similar_lengths_the_longest_first() -> None:
    assert list(batches_by_length([3, 9, 1, 9, 5], 2)) == [[1, 3], [4, 0], [2]]


@pytest.mark.parametrize(
    "text", ["", "answer-mean:0", "answer-mean:-1", "answer-mean:x", "first", "answer-mean:123456"]
)
def test_a_position_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(TrimtabError) as caught:
        Position.parse(text)
    assert caught.value.code == "E_POSITION"


def test_a_position_reads_back_from_how_it_is_written() -> None:
    for text in ("last-prompt-token", "prompt-mean", "answer-mean:12"):
        assert str(Position.parse(text)) == text
    assert str(Position.parse("answer-mean")) == "answer-mean:64"


@pytest.mark.parametrize(
    ("reading", "code"), [({"dtype": "int8"}, "E_DTYPE"), ({"batch_size": 0}, "E_BATCH_SIZE")]
)
def test_a_reading_that_cannot_be_is_refused(reading: dict[str, object], code: str) -> None:
    with pytest.raises(TrimtabError) as caught:
        Reading(**reading)
    assert caught.value.code == code


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(TrimtabError) as caught:
        Reading(device="cuda:99").torch_device()
    assert caught.value.code == "E_DEVICE"
