"""The curve of an answer as a PNG file, opened and looked at by its pixels."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from directions.errors import TrimtabError
from server.score_picture import HEIGHT, PHASE_COLOURS, WIDTH, draw
from server.score_trace import ScoreTrace, read_trace
from tests.server.scripted_server import chat_answer, thinking_answer

Colour = tuple[int, int, int]

CURVE = (0x1B, 0x2A, 0x49)
LEVEL = (0x0B, 0x6E, 0x99)
CLIFF = (0xA3, 0x12, 0x2B)


def trace_of(answer: dict[str, Any], probe: str | None = None) -> ScoreTrace:
    return read_trace(answer, "smollm2", probe)


def pixels(path: Path) -> dict[Colour, int]:
    """How often each colour is in a picture of the right size."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.size == (WIDTH, HEIGHT)
        colours = image.convert("RGB").getcolors(WIDTH * HEIGHT)
    assert colours is not None
    return {colour: count for count, colour in colours}  # type: ignore[misc]


def near(found: dict[Colour, int], wanted: Colour, within: int = 2) -> int:
    return sum(
        count
        for colour, count in found.items()
        if all(abs(a - b) <= within for a, b in zip(colour, wanted, strict=True))
    )


def rgb(phase: str) -> Colour:
    text = PHASE_COLOURS[phase]
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)


def rows_and_columns(path: Path, wanted: Colour) -> tuple[np.ndarray, np.ndarray]:
    """Where a picture has a colour."""
    with Image.open(path) as image:
        picture = np.asarray(image.convert("RGB"), dtype=int)
    rows, columns = np.nonzero((abs(picture - np.array(wanted)) <= 2).all(axis=2))
    return rows, columns


def test_every_phase_that_occurred_is_shaded_as_wide_as_it_is_long(tmp_path: Path) -> None:
    draw(trace_of(thinking_answer()), tmp_path / "curve.png")

    found = pixels(tmp_path / "curve.png")
    areas = {phase: near(found, rgb(phase)) for phase in PHASE_COLOURS}
    assert areas["prompt"] < 1000  # not traced, and not in the legend
    assert areas["thinking"] > areas["answer"] > areas["think_end"] > areas["prompt_end"] > 5000
    # 20 tokens, 2 and 11: the areas tell, less what the curve and the lines cover.
    assert areas["thinking"] / areas["think_end"] == pytest.approx(10, rel=0.3)
    assert areas["thinking"] / areas["answer"] == pytest.approx(20 / 11, rel=0.1)
    assert near(found, (255, 255, 255)) > WIDTH * HEIGHT * 0.15


def test_the_curve_the_levels_and_the_cliff_are_drawn(tmp_path: Path) -> None:
    draw(trace_of(thinking_answer()), tmp_path / "curve.png")

    found = pixels(tmp_path / "curve.png")
    assert near(found, CURVE) > 1500
    assert near(found, LEVEL) > 1500
    assert near(found, CLIFF) > 1500


def test_the_arrow_spans_plateau_to_final(tmp_path: Path) -> None:
    draw(trace_of(thinking_answer()), tmp_path / "curve.png")

    rows, columns = rows_and_columns(tmp_path / "curve.png", CLIFF)
    shaft = rows[columns == np.bincount(columns).argmax()]
    # The axis goes from -0.04 to 1.04, over about three quarters of the height.
    assert np.ptp(shaft) == pytest.approx(0.8 / 1.08 * HEIGHT * 0.76, rel=0.08)


def test_without_thinking_there_are_no_levels_and_no_cliff(tmp_path: Path) -> None:
    draw(trace_of(chat_answer(["a", "b", "c"], [0.9, 0.4, 0.3])), tmp_path / "curve.png")

    found = pixels(tmp_path / "curve.png")
    assert near(found, CLIFF) == near(found, LEVEL) == 0
    assert near(found, CURVE) > 1500
    assert near(found, rgb("thinking")) == near(found, rgb("think_end")) == 0
    assert near(found, rgb("answer")) > 100_000


def test_thinking_that_does_not_end_has_a_plateau_only(tmp_path: Path) -> None:
    answer = chat_answer(
        ["a", "b", "c"],
        [0.9, 0.4, 0.3],
        phases=[["prompt_end", 57, 57], ["thinking", 58, 59]],
        plateau=0.4,
    )
    draw(trace_of(answer), tmp_path / "curve.png")

    found = pixels(tmp_path / "curve.png")
    assert near(found, LEVEL) > 500
    assert near(found, CLIFF) == 0


def test_a_negative_score_makes_the_axis_start_at_minus_one(tmp_path: Path) -> None:
    scores = [0.5, 0.5, 0.5, 0.5]
    draw(trace_of(chat_answer(["a", "b", "c", "d"], scores)), tmp_path / "unit.png")
    scores = [0.5, 0.5, 0.5, -0.9]
    signed = trace_of(chat_answer(["a", "b", "c", "d"], scores))
    assert signed.span == (-1.0, 1.0)
    draw(signed, tmp_path / "signed.png")

    def height_of_the_first_scores(path: Path) -> float:
        rows, columns = rows_and_columns(path, CURVE)
        return float(rows[(columns > 250) & (columns < 700)].mean())

    unit = height_of_the_first_scores(tmp_path / "unit.png")
    other = height_of_the_first_scores(tmp_path / "signed.png")
    # From the middle of the axis to a quarter from its top.
    assert other == pytest.approx(unit - 0.25 * HEIGHT * 0.76, abs=0.05 * HEIGHT)


def test_missing_scores_break_the_line(tmp_path: Path) -> None:
    whole = chat_answer(["a"] * 40, [0.5] * 40)
    draw(trace_of(whole), tmp_path / "whole.png")
    gap = chat_answer(["a"] * 40, [0.5] * 40)
    report = gap["choices"][0]["steering"]["probes"]["refusal@2"]
    report["trace"] = report["trace"][:10] + report["trace"][30:]
    draw(trace_of(gap), tmp_path / "gap.png")

    whole_ink = near(pixels(tmp_path / "whole.png"), CURVE)
    assert near(pixels(tmp_path / "gap.png"), CURVE) < 0.65 * whole_ink


def test_every_prompt_token_can_be_in_it(tmp_path: Path) -> None:
    answer = chat_answer(
        ["a"] * 5, [0.5] * 5, phases=[["prompt", 0, 56], ["prompt_end", 57, 57], ["answer", 58, 61]]
    )
    report = answer["choices"][0]["steering"]["probes"]["refusal@2"]
    report["trace"] = [[p, 0.3] for p in range(57)] + report["trace"]
    draw(trace_of(answer), tmp_path / "curve.png")
    assert near(pixels(tmp_path / "curve.png"), rgb("prompt")) > 300_000


@pytest.mark.parametrize(
    "model", ["$x_1$", "m" * 300, "模型/\x1b[31m", "a\nb", "~/{weights}\\frac"]
)
def test_any_name_can_stand_in_the_title(tmp_path: Path, model: str) -> None:
    draw(read_trace(thinking_answer(), model), tmp_path / "curve.png")
    assert near(pixels(tmp_path / "curve.png"), rgb("thinking")) > 100_000


def test_one_score_is_enough_and_none_is_an_error(tmp_path: Path) -> None:
    draw(trace_of(chat_answer(["a"], [0.5])), tmp_path / "one.png")
    assert near(pixels(tmp_path / "one.png"), CURVE) > 20

    with pytest.raises(TrimtabError) as raised:
        draw(trace_of(chat_answer(["a"], [])), tmp_path / "none.png")
    assert raised.value.code == "E_TRACE_EMPTY"
    assert not (tmp_path / "none.png").exists()


def test_the_reader_s_own_settings_do_not_change_it(tmp_path: Path) -> None:
    import matplotlib

    draw(trace_of(thinking_answer()), tmp_path / "before.png")
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 30.0}):
        draw(trace_of(thinking_answer()), tmp_path / "after.png")
        assert matplotlib.rcParams["font.size"] == 30.0
    assert (tmp_path / "before.png").read_bytes() == (tmp_path / "after.png").read_bytes()


def test_without_matplotlib_the_error_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(TrimtabError) as raised:
        draw(trace_of(thinking_answer()), tmp_path / "curve.png")
    assert raised.value.code == "E_DEPENDENCY"
    assert "trimtab[pictures]" in (raised.value.expected or "")
