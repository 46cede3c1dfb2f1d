"""The curve of one answer as a picture: a probe's score at every token, by phase.

A thinking model's score often stays high while it thinks and drops where the thinking ends; how far
is the cliff. The picture shows the two levels and the arrow between them on the curve that they are
taken from. After Yin et al. 2025, "Refusal Falls off a Cliff", arXiv 2510.06036.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Final

from directions.atomic import write_file
from directions.errors import TrimtabError
from server.printable import printable
from server.score_trace import SIGNED, ScoreTrace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH: Final = 1800
HEIGHT: Final = 900
# Twice the density of a page that shows the picture at half its width, where 10 points are
# then as large as the page's own text.
_DPI: Final = 200

# Light tints, told apart by their lightness too; the short phases have the strong ones.
PHASE_COLOURS: Final = {
    "prompt": "#e9e9e9",
    "prompt_end": "#a6a6a6",
    "thinking": "#d3e5f5",
    "think_end": "#f0a830",
    "answer": "#fbf4cf",
}
_PHASE_NAMES: Final = {
    "prompt": "prompt",
    "prompt_end": "end of the prompt",
    "thinking": "thinking",
    "think_end": "end of the thinking",
    "answer": "answer",
}
_CURVE: Final = "#1b2a49"
_LEVEL: Final = "#0b6e99"
_CLIFF: Final = "#a3122b"
_DASHED: Final = (0, (5, 2.5))
_DOTTED: Final = (0, (1.2, 1.6))
# What fits beside and above the axes.
_LONGEST_PROBE: Final = 36
_LONGEST_TITLE: Final = 90
# Up to so many tokens each has a dot.
_MOST_DOTS: Final = 150


def require_matplotlib() -> None:
    """Make sure that pictures can be drawn.

    Raises:
        TrimtabError: ``E_DEPENDENCY`` where matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise TrimtabError(
            "E_DEPENDENCY",
            "drawing the curve needs matplotlib, which is not installed",
            field="--output",
            expected="pip install 'trimtab[pictures]'",
        ) from error


def draw(trace: ScoreTrace, path: Path) -> None:
    """Draw the curve into a PNG file of 1800 by 900 pixels, in one step.

    Args:
        trace: the answer and its scores.
        path: the file; replaced if it is there.

    Raises:
        TrimtabError: ``E_DEPENDENCY`` without matplotlib, ``E_TRACE_EMPTY`` without scores.
        OSError: the file cannot be written.
    """
    require_matplotlib()
    if not trace.scores:
        message = f"the server sent no scores of {trace.probe}, so there is no curve to draw"
        raise TrimtabError("E_TRACE_EMPTY", message, field="--output")
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    content = io.BytesIO()
    # The same picture whatever the reader's own settings, and no window system is asked for.
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        # A name may hold letters that the font lacks; they become boxes.
        warnings.simplefilter("ignore", UserWarning)
        figure = Figure(
            figsize=(WIDTH / _DPI, HEIGHT / _DPI), dpi=_DPI, facecolor="white", layout="constrained"
        )
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        _shade(axes, trace)
        _curve(axes, trace)
        _levels(axes, trace)
        _frame(axes, trace)
        figure.savefig(content, format="png")
    write_file(path, content.getvalue())


def _x(trace: ScoreTrace, position: float) -> float:
    return position - trace.prompt_end


def _shade(axes: Axes, trace: ScoreTrace) -> None:
    """A band for each phase, half a token wider on both sides than its tokens."""
    named: set[str] = set()
    for phase, first, last in trace.phases:
        if phase not in PHASE_COLOURS:
            continue
        axes.axvspan(
            _x(trace, first) - 0.5,
            _x(trace, last) + 0.5,
            facecolor=PHASE_COLOURS[phase],
            edgecolor="none",
            # One entry of the legend for all runs of a phase.
            label=None if phase in named else _PHASE_NAMES[phase],
            zorder=0,
        )
        named.add(phase)


def _curve(axes: Axes, trace: ScoreTrace) -> None:
    """The line, broken where scores are missing, so that it claims nothing there."""
    xs: list[float] = []
    ys: list[float] = []
    before: int | None = None
    for position, score in trace.scores:
        if before is not None and position != before + 1:
            xs.append(_x(trace, position) - 0.5)
            ys.append(float("nan"))
        xs.append(_x(trace, position))
        ys.append(score)
        before = position
    dots = len(trace.scores) <= _MOST_DOTS
    axes.plot(
        xs,
        ys,
        color=_CURVE,
        linewidth=1.4,
        marker="o" if dots else None,
        markersize=2.6,
        solid_joinstyle="round",
        zorder=3,
    )


def _levels(axes: Axes, trace: ScoreTrace) -> None:
    """Plateau and final as lines with their numbers at the right, and the arrow between them."""
    summary = trace.summary
    thinking = _extent(trace, "thinking")
    ending = _extent(trace, "think_end")
    left, right = _limits(trace)
    fall = None if ending is None else _x(trace, ending[1])
    falls = summary.cliff is None or summary.cliff >= 0
    if summary.plateau is not None:
        start = left if thinking is None else _x(trace, thinking[0]) - 0.5
        axes.hlines(summary.plateau, start, right, _LEVEL, _DASHED, linewidth=1.3, zorder=4)
        _level_name(axes, "plateau", summary.plateau, right, above=falls)
    if summary.final is not None:
        start = left if fall is None else fall
        axes.hlines(summary.final, start, right, _LEVEL, _DOTTED, linewidth=1.6, zorder=4)
        _level_name(axes, "final", summary.final, right, above=not falls)
    if fall is None or summary.cliff is None or summary.plateau is None or summary.final is None:
        return
    axes.annotate(
        "",
        xy=(fall, summary.final),
        xytext=(fall, summary.plateau),
        arrowprops={
            "arrowstyle": "-|>",
            "color": _CLIFF,
            "linewidth": 1.8,
            "shrinkA": 0,
            "shrinkB": 0,
        },
        zorder=5,
    )
    # The curve comes down on the left, so the right is free, unless the axes end there.
    to_right = fall < left + 0.85 * (right - left)
    axes.annotate(
        f"cliff {_number(summary.cliff)}",
        xy=(fall, (summary.plateau + summary.final) / 2),
        xytext=(7 if to_right else -7, 0),
        textcoords="offset points",
        ha="left" if to_right else "right",
        va="center",
        color=_CLIFF,
        fontweight="bold",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5},
        zorder=6,
    )


def _level_name(axes: Axes, name: str, value: float, x: float, *, above: bool) -> None:
    """A level's name beside the axes, where it hides nothing.

    The upper level's stands above its line and the lower one's below, so that they do not meet
    where the levels are close.
    """
    axes.annotate(
        f"{name} {_number(value)}",
        xy=(x, value),
        xytext=(5, -2 if above else 2),
        textcoords="offset points",
        ha="left",
        va="bottom" if above else "top",
        color=_LEVEL,
        annotation_clip=False,
    )


def _number(value: float) -> str:
    """Two decimals, with the minus sign that the axis has."""
    return f"{value:.2f}".replace("-", "\u2212")


def _extent(trace: ScoreTrace, phase: str) -> tuple[int, int] | None:
    """First and last position of a phase, over all its runs."""
    runs = [(first, last) for name, first, last in trace.phases if name == phase]
    if not runs:
        return None
    return min(first for first, _ in runs), max(last for _, last in runs)


def _limits(trace: ScoreTrace) -> tuple[float, float]:
    """The ends of the x axis: all that was read, half a token more on both sides."""
    positions = [position for position, _ in trace.scores]
    first = min([positions[0], *(first for _, first, _ in trace.phases)])
    last = max([positions[-1], *(last for _, _, last in trace.phases)])
    return _x(trace, first) - 0.5, _x(trace, last) + 0.5


def _frame(axes: Axes, trace: ScoreTrace) -> None:
    """Title, axes and legend."""
    from matplotlib.ticker import MaxNLocator

    low, high = trace.span
    margin = 0.04 * (high - low)
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlim(*_limits(trace))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("tokens since the prompt's end")
    axes.set_ylabel(f"score of {_short(trace.probe, _LONGEST_PROBE)}", parse_math=False)
    axes.set_title(_short(trace.title, _LONGEST_TITLE), fontsize=12, parse_math=False)
    axes.grid(axis="y", color="black", alpha=0.12, linewidth=0.7)
    axes.set_axisbelow(True)
    if trace.span == SIGNED:
        axes.axhline(0, color="black", alpha=0.45, linewidth=0.8, zorder=1)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        # Below the axes, where it hides nothing.
        axes.figure.legend(
            handles, labels, loc="outside lower center", ncols=len(handles), frameon=False
        )


def _short(text: str, most: int) -> str:
    """A name of at most so many characters; its end is kept, where policy and version stand."""
    shown = printable(text)
    return shown if len(shown) <= most else "…" + shown[1 - most :]
