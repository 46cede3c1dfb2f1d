"""The two methods that make directions, on tiny real models, through to the store."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from directions.activations import measure, passages
from directions.alignment import Alignment
from directions.contrast import Contrast
from directions.errors import TrimtabError
from directions.examples import Example, ExampleSet
from directions.extraction import already_made
from directions.fingerprint import fingerprint
from directions.language_model import Reading, opened
from directions.position import Position
from directions.store import Store
from tests.conftest import build_tiny_checkpoint

READING = Reading(device="cpu")


def a_set(name: str, *texts: str, answer: str | None = None) -> ExampleSet:
    return ExampleSet(name, tuple(Example((("user", text),), answer) for text in texts))


SHIPS = a_set("ships", *(f"The ship {i} turns its rudder to the wind" for i in range(8)))
ASKS = a_set("asks", *(f"What is the capital of country number {i}?" for i in range(6)))
PARTS = a_set("parts", "tell me of the river", "and of the sea")


def means_of(checkpoint: Path, examples: tuple[Example, ...], position: str) -> np.ndarray:
    with opened(checkpoint, READING) as model:
        return measure(model, passages(model, examples, Position.parse(position))).mean


def test_contrast_is_the_difference_of_the_two_sides_means(tiny_checkpoint: Path) -> None:
    made = Contrast(tiny_checkpoint, (SHIPS,), (ASKS, PARTS), reading=READING).run()
    expected = means_of(tiny_checkpoint, SHIPS.examples, "last-prompt-token") - means_of(
        tiny_checkpoint, ASKS.examples + PARTS.examples, "last-prompt-token"
    )
    np.testing.assert_allclose(made.vectors, expected, atol=1e-5)
    assert made.vectors.dtype == np.float32
    assert made.present.all()
    card = made.card
    assert (card.method, card.position, card.dtype) == ("contrast", "last-prompt-token", "float32")
    assert [(source.name, source.role, source.rows) for source in card.sources] == [
        ("ships", "positive", 8),
        ("asks", "negative", 6),
        ("parts", "negative", 2),
    ]
    assert card.model == fingerprint(tiny_checkpoint)
    assert len(card.activation_norms) == 4
    assert all(norm is not None and norm > 0 for norm in card.activation_norms)


def test_the_activation_norms_are_means_over_both_sides_tokens(tiny_checkpoint: Path) -> None:
    made = Contrast(
        tiny_checkpoint, (SHIPS,), (PARTS,), Position("prompt-mean"), reading=READING
    ).run()
    with opened(tiny_checkpoint, READING) as model:
        norms = []
        for example in SHIPS.examples + PARTS.examples:
            tokens = model.prompt_tokens(example)
            with torch.no_grad():
                states = model.network(torch.tensor([tokens]), output_hidden_states=True)
            norms.append(states.hidden_states[2][0, 1:].norm(dim=-1))  # after layer 1
    assert made.card.activation_norms[1] == pytest.approx(float(torch.cat(norms).mean()), rel=1e-5)


def test_swapping_the_sides_turns_the_direction_round(tiny_checkpoint: Path) -> None:
    forth = Contrast(tiny_checkpoint, (SHIPS,), (ASKS,), reading=READING).run()
    back = Contrast(tiny_checkpoint, (ASKS,), (SHIPS,), reading=READING).run()
    np.testing.assert_allclose(forth.vectors, -back.vectors, atol=1e-6)


def test_the_figures_tell_a_real_difference_from_none(tiny_checkpoint: Path) -> None:
    words = ["the", "a", "what", "sea", "ship", "wind", "tell", "capital", "of", "turns"]
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, size=8)) for _ in range(80)]
    real = Contrast(tiny_checkpoint, (SHIPS,), (ASKS,), reading=READING).run().card.quality
    none = (
        Contrast(
            tiny_checkpoint,
            (a_set("one", *texts[:40]),),
            (a_set("two", *texts[40:]),),
            Position("prompt-mean"),
            READING,
        )
        .run()
        .card.quality
    )
    assert real["separation_mean"] > 3
    assert real["split_half_cosine_mean"] > 0.9
    assert abs(none["separation_mean"]) < 1
    assert none["split_half_cosine_mean"] < 0.7
    assert real["examples_positive"] == 8
    assert real["separation_best"] == max(real[f"separation.{layer}"] for layer in range(4))
    assert real["separation_best"] == real[f"separation.{int(real['separation_best_layer'])}"]


def test_too_few_examples_to_be_halved_give_no_figures_that_need_halves(
    tiny_checkpoint: Path,
) -> None:
    one = Contrast(tiny_checkpoint, (a_set("a", "x"),), (ASKS,), reading=READING).run()
    assert "split_half_cosine_mean" not in one.card.quality
    two = Contrast(tiny_checkpoint, (PARTS,), (ASKS,), reading=READING).run()
    assert "split_half_cosine_mean" in two.card.quality
    assert "separation_mean" not in two.card.quality


def test_a_repeated_recipe_is_recognised_and_a_changed_one_is_not(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    store = Store(tmp_path)
    recipe = Contrast(tiny_checkpoint, (SHIPS,), (ASKS,), reading=READING)
    assert already_made(recipe, store, "turn", store.load) is None
    ref = recipe.run().store(store, "turn")
    again = Contrast(tiny_checkpoint, (SHIPS,), (ASKS,), reading=Reading(batch_size=2))
    assert already_made(again, store, "turn", store.load) == ref
    for other in (
        Contrast(tiny_checkpoint, (ASKS,), (SHIPS,), reading=READING),
        Contrast(tiny_checkpoint, (SHIPS,), (ASKS,), Position("prompt-mean"), READING),
        Contrast(tiny_checkpoint, (SHIPS,), (ASKS,), reading=Reading(chat_template=False)),
        Contrast(tiny_checkpoint, (SHIPS,), (ASKS,), reading=Reading(dtype="bfloat16")),
        Contrast(tiny_checkpoint, (SHIPS.limited(5),), (ASKS,), reading=READING),
    ):
        assert already_made(other, store, "turn", store.load) is None
    assert again.run().store(store, "turn") == ref


@pytest.fixture(scope="module")
def tuned_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with the output of its layer 1 moved by a known vector."""
    path = tmp_path_factory.mktemp("tuned") / "tuned"
    shutil.copytree(tiny_checkpoint, path)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    model.save_pretrained(path)
    return path


def test_alignment_is_the_difference_between_the_models_on_the_same_tokens(
    tiny_checkpoint: Path, tuned_checkpoint: Path
) -> None:
    recipe = Alignment(
        tuned_checkpoint, tiny_checkpoint, (ASKS,), Position("answer-mean", 5), READING
    )
    made = recipe.run()
    with opened(tuned_checkpoint, READING) as aligned:
        answers = aligned.answers([aligned.prompt_tokens(e) for e in ASKS.examples], 5)
        texts = passages(aligned, ASKS.examples, recipe.position)
        up = measure(aligned, texts).mean
    assert [passage.tokens[passage.span.start :] for passage in texts] == [a for a in answers if a]
    with opened(tiny_checkpoint, READING) as base:
        down = measure(base, texts).mean
    np.testing.assert_allclose(made.vectors, up - down, atol=1e-5)
    # The models are one up to layer 1, where they part.
    assert np.abs(made.vectors[0]).max() < 1e-6
    assert np.abs(made.vectors[1]).max() > 1e-2
    assert made.card.model == fingerprint(tuned_checkpoint)
    assert made.card.base_model == fingerprint(tiny_checkpoint)
    assert made.card.position == "answer-mean:5"
    assert [source.role for source in made.card.sources] == ["both"]


def test_alignment_reads_given_answers_as_they_are(
    tiny_checkpoint: Path, tuned_checkpoint: Path
) -> None:
    given = a_set("given", "What is it?", "And where?", answer="The sea, by the river.")
    made = Alignment(
        tuned_checkpoint, tiny_checkpoint, (given,), Position("answer-mean", 64), READING
    ).run()
    expected = means_of(tuned_checkpoint, given.examples, "answer-mean:64") - means_of(
        tiny_checkpoint, given.examples, "answer-mean:64"
    )
    np.testing.assert_allclose(made.vectors, expected, atol=1e-5)


def test_alignment_refuses_a_base_model_of_another_shape(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    other = build_tiny_checkpoint(tmp_path / "other", num_layers=3)
    with pytest.raises(TrimtabError) as caught:
        Alignment(tiny_checkpoint, other, (ASKS,), reading=READING).run()
    assert caught.value.code == "E_BASE_MODEL"
    assert "num_layers" in caught.value.message


def test_a_model_that_cannot_be_loaded_is_a_clear_error(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(TrimtabError) as caught:
        Contrast(broken, (SHIPS,), (ASKS,), reading=READING).run()
    assert caught.value.code == "E_MODEL_LOAD"


def test_a_model_with_a_weight_missing_is_refused_and_not_filled_in(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, broken)
    weights = load_file(broken / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrimtabError) as caught:
        Contrast(broken, (SHIPS,), (ASKS,), reading=READING).run()
    assert caught.value.code == "E_MODEL_LOAD"
    assert "model.layers.2.mlp.up_proj.weight" in caught.value.message
