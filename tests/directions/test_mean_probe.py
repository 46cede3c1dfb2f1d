"""A probe from two sets of examples: what its formula says, on tiny real models, through to the store."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from directions.activations import measure, passages
from directions.contrast import Contrast
from directions.errors import TrimtabError
from directions.examples import Example, ExampleSet
from directions.extraction import already_made
from directions.language_model import Reading, opened
from directions.mean_probe import MeanProbe
from directions.position import Position
from directions.store import Store
from server.cli.main import app

READING = Reading(device="cpu")


def a_set(name: str, *texts: str) -> ExampleSet:
    return ExampleSet(name, tuple(Example((("user", text),), None) for text in texts))


SHIPS = a_set("ships", *(f"The ship {i} turns its rudder to the wind" for i in range(20)))
ASKS = a_set("asks", *(f"What is the capital of country number {i}?" for i in range(24)))


def recipe(checkpoint: Path, layer: int | None = 2) -> MeanProbe:
    contrast = Contrast(checkpoint, (SHIPS,), (ASKS,), Position("prompt-mean"), READING)
    return MeanProbe(contrast, layer)


def test_its_score_is_the_probability_of_two_equal_normals(tiny_checkpoint: Path) -> None:
    made = recipe(tiny_checkpoint).run()
    with opened(tiny_checkpoint, READING) as model:
        sides = [
            measure(model, passages(model, part.examples, Position("prompt-mean")))
            for part in (SHIPS, ASKS)
        ]
    d = sides[0].half_mean(0)[2] - sides[1].half_mean(0)[2]
    d /= np.linalg.norm(d)
    plus, minus = (np.stack([h[2] for h in side.held_out]) @ d for side in sides)
    variance = (plus.var(ddof=1) + minus.var(ddof=1)) / 2

    def log_density(x: float, mean: float) -> float:
        return -((x - mean) ** 2) / (2 * variance)

    for side in sides:
        for h in side.held_out:
            x = float(h[2] @ d)
            odds = log_density(x, plus.mean()) - log_density(x, minus.mean())
            assert float(h[2] @ made.weights[0]) + made.bias == pytest.approx(odds, rel=1e-4)
    quality = made.card.quality
    assert quality["auc"] == pytest.approx(
        np.mean([[p > m for m in minus] for p in plus]), abs=1e-9
    )
    assert (quality["examples_positive"], quality["examples_negative"]) == (20, 24)
    assert 0 <= quality["brier"] < 0.25
    assert (made.card.site, made.card.layer, made.card.outputs) == ("residual", 2, ("score",))
    assert made.card.calibration == {"threshold": 0.5}


def test_the_best_layer_is_the_one_with_the_largest_area(tiny_checkpoint: Path) -> None:
    made = recipe(tiny_checkpoint, None).run()
    areas = [made.card.quality[f"auc.{layer}"] for layer in range(4)]
    assert made.card.quality["auc"] == max(areas)
    assert areas[made.card.layer] == max(areas)


def test_the_same_recipe_is_known_again_and_another_is_not(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    store = Store(tmp_path)
    first = recipe(tiny_checkpoint)
    assert already_made(first, store, "ships", store.load_probe) is None
    ref = first.run().store(store, "ships")
    assert ref.reference == "ships@1"
    assert already_made(first, store, "ships", store.load_probe) == ref
    assert already_made(replace(first, layer=1), store, "ships", store.load_probe) is None


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"layer": 4}, "E_LAYER_RANGE"),
        ({"positive": (a_set("few", *"abcdefghijklmno"),)}, "E_EXAMPLES_FEW"),
        ({"positive": (a_set("same", *["The very same words"] * 16),) * 1}, "E_PROBE_FLAT"),
    ],
)
def test_what_makes_no_probe_is_refused(tiny_checkpoint: Path, change: dict, code: str) -> None:
    made = recipe(tiny_checkpoint, change.pop("layer", 2))
    if change:
        same = change["positive"]
        negative = same if code == "E_PROBE_FLAT" else (ASKS,)
        contrast = replace(made.contrast, positive=same, negative=negative)
        made = replace(made, contrast=contrast)
    with pytest.raises(TrimtabError) as caught:
        made.run()
    assert caught.value.code == code


def test_the_command_makes_one_shows_it_and_keeps_it(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "home"))
    for name, part in (("ships", SHIPS), ("asks", ASKS)):
        texts = [example.messages[-1][1] for example in part.examples]
        (tmp_path / f"{name}.txt").write_text("\n".join(texts))
    arguments = ["probe", "train", str(tiny_checkpoint), "--name", "ships", "--reuse"]
    arguments += ["--positive", str(tmp_path / "ships.txt"), "--device", "cpu"]
    arguments += ["--negative", str(tmp_path / "asks.txt"), "--position", "prompt-mean"]
    run = CliRunner().invoke
    first = run(app, arguments)
    assert first.exit_code == 0, first.output
    assert "ships@1" in first.output
    assert "auc" in first.output
    again = run(app, arguments)
    assert "already" in again.output
    assert Store(tmp_path / "home").names() == ["ships"]
    wrong = run(app, [*arguments, "--layer", "-1"])
    assert wrong.exit_code == 2
    assert "E_LAYER_RANGE" in wrong.output
