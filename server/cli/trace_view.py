"""What a person sees of one answer: its tokens on the colours of their scores, and the figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from server.cli.output import Output
from server.cli.score_style import legend, score_style, shows_colours
from server.printable import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from server.score_trace import ScoreTrace

_FIGURES: Final = ("prompt_end", "plateau", "final", "cliff", "answer_start", "answer_mean")


def show_trace(out: Output, trace: ScoreTrace) -> None:
    """Print the answer with its scores, then the figures."""
    from rich.text import Text

    if not trace.tokens:
        out.table(Text(printable(trace.text, keep="\n\t")))
        out.note("the server gave no texts of tokens, so the answer has no colours")
    elif shows_colours(out.console):
        out.table(legend(trace.span, out.console))
        out.table(Text())
        out.table(coloured_answer(trace, out.console))
    else:
        out.table(Text(printable(trace.text, keep="\n\t")))
        out.table(Text())
        out.table(_tokens_table(trace))
    out.table(Text())
    out.table(_figures_table(trace))


def coloured_answer(trace: ScoreTrace, console: Console) -> Text:
    """The answer, each token on the colour of its own score."""
    from rich.text import Text

    answer = Text()
    for token in trace.tokens:
        # A line break has a token of its own often enough, and nothing to put a colour behind.
        shown = printable(token.text, keep="\n\t").replace("\n", "↵\n")
        if token.score is None:
            answer.append(shown)
        else:
            answer.append(shown, score_style(token.score, trace.span, console))
    return answer


def _tokens_table(trace: ScoreTrace) -> Table:
    """One token a row, for where there are no colours."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("token", justify="right")
    table.add_column("score", justify="right")
    table.add_column("phase")
    table.add_column("text", overflow="fold")
    for number, token in enumerate(trace.tokens, start=1):
        score = "–" if token.score is None else f"{token.score:.3f}"
        cells = (str(number), score, token.phase or "–", repr(printable(token.text, keep="\n\t")))
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table


def _figures_table(trace: ScoreTrace) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    figures = trace.summary.model_dump()
    report = trace.report
    reason = f"no ({report.reason})" if report.reason else "no"
    rows = [
        ("probe", trace.probe),
        *((name, _figure(figures[name])) for name in _FIGURES),
        ("tokens", str(trace.summary.tokens)),
        ("policy", report.policy if report.policy == "off" else f"{report.policy}, {report.mode}"),
        ("applied", "yes" if report.applied else reason),
    ]
    for name, value in rows:
        table.add_row(name, Text(printable(value)))
    return table


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
