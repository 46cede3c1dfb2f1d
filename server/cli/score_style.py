"""How a terminal shows scores: a colour behind the text, and lines of bars.

The colours are those of the viridis scale, from dark blue (low) to yellow (high): their lightness
rises evenly, so they can be told apart without colour vision and in print. They stand behind the
text, which is black or white, whichever the more readable; so it does not matter whether the
terminal itself is dark or light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from rich.console import Console
    from rich.style import Style
    from rich.text import Text

# The viridis scale at every tenth.
_VIRIDIS: Final = (
    (68, 1, 84),
    (72, 36, 117),
    (65, 68, 135),
    (53, 95, 141),
    (42, 120, 142),
    (33, 145, 140),
    (34, 168, 132),
    (68, 191, 112),
    (122, 209, 81),
    (189, 223, 38),
    (253, 231, 37),
)
# What comes nearest where a terminal has its own sixteen colours only.
_SIXTEEN: Final = (
    ("white", "blue"),
    ("black", "cyan"),
    ("black", "green"),
    ("black", "bright_yellow"),
)
_BARS: Final = "▁▂▃▄▅▆▇█"
_LEGEND_STEPS: Final = 5


def shows_colours(console: Console) -> bool:
    """Whether colours reach the reader: a terminal that has them, and no ``NO_COLOR``."""
    return console.color_system is not None and not console.no_color


def share(score: float, span: tuple[float, float]) -> float:
    """Where a score lies on its range, from 0 to 1; what lies beyond it counts as its end."""
    low, high = span
    return min(1.0, max(0.0, (score - low) / (high - low)))


def score_style(score: float, span: tuple[float, float], console: Console) -> Style:
    """The colour behind a score and the colour of the text on it."""
    from rich.color import Color
    from rich.style import Style

    at = share(score, span)
    if console.color_system == "standard":
        text, behind = _SIXTEEN[min(int(at * len(_SIXTEEN)), len(_SIXTEEN) - 1)]
        return Style(color=text, bgcolor=behind)
    red, green, blue = viridis(at)
    white_on_it = 1.05 / (luminance((red, green, blue)) + 0.05)
    black_on_it = (luminance((red, green, blue)) + 0.05) / 0.05
    text_level = 0 if black_on_it > white_on_it else 255
    return Style(
        color=Color.from_rgb(text_level, text_level, text_level),
        bgcolor=Color.from_rgb(red, green, blue),
    )


def viridis(at: float) -> tuple[int, int, int]:
    """The scale's colour at a place from 0 to 1, linear between its tenths."""
    steps = len(_VIRIDIS) - 1
    below = min(int(at * steps), steps - 1)
    part = at * steps - below
    low, high = _VIRIDIS[below], _VIRIDIS[below + 1]
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(low, high, strict=True))
    return red, green, blue


def luminance(colour: tuple[int, int, int]) -> float:
    """Relative luminance of an sRGB colour, 0 to 1, as WCAG 2 defines it for contrasts."""
    linear = [
        c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4
        for c in (value / 255 for value in colour)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def score_text(score: float | None, span: tuple[float, float], console: Console) -> Text:
    """A score in two decimals on its colour; a dash where there is none."""
    from rich.text import Text

    if score is None:
        return Text("–")
    style = score_style(score, span, console) if shows_colours(console) else ""
    # Appended, so that in a wider column the colour stays behind the number.
    return Text().append(f"{score:.2f}", style)


def legend(span: tuple[float, float], console: Console) -> Text:
    """The scale with its numbers, for a line above what is coloured."""
    from rich.text import Text

    low, high = span
    line = Text("score ")
    for step in range(_LEGEND_STEPS):
        value = low + (high - low) * step / (_LEGEND_STEPS - 1)
        line.append(f" {value:g} ", score_style(value, span, console))
    return line


def sparkline(scores: list[float], span: tuple[float, float]) -> str:
    """One bar a score, as high as the score lies on its range.

    It has no colours: the height says it already, and thin bars in dark or light colours would
    be lost on a dark or a light terminal.
    """
    return "".join(
        _BARS[min(int(share(score, span) * len(_BARS)), len(_BARS) - 1)] for score in scores
    )
