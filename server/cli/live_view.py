"""What a person sees of a server's live scores: running requests above, finished ones below.

The picture is made for the room that there is. In a narrow window columns go away, the least
needed first, before numbers are cut; in a low one the oldest rows go, and a line counts them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from server.cli.artefact_view import bar
from server.cli.score_style import score_text, sparkline
from server.printable import printable
from server.score_trace import span_of

if TYPE_CHECKING:
    from server.steering_answers import Finished, LiveDocument, Running

_GAP: Final = 2
_CLIFF_BAR: Final = 8
# Rows that are no rows of a table: the head, two titles, two lines of headings, a blank line, and
# the two lines that count what is left out.
_OTHER_ROWS: Final = 8
_FEWEST_FINISHED: Final = 3


@dataclass(frozen=True)
class Column:
    """One column, before it is known how wide it may be.

    Attributes:
        heading: its title.
        cells: one a row.
        least: the width down to which it may be cut; 0 if it must be whole.
        rank: the higher, the sooner it goes away; 0 stays always.
        right: whether it is set to the right, as numbers are.
        tail: whether the end of a cell is what counts when it is cut.
    """

    heading: str
    cells: list[Text]
    least: int = 0
    rank: int = 0
    right: bool = False
    tail: bool = False

    @property
    def natural(self) -> int:
        """The width at which nothing is cut."""
        return max([len(self.heading), *(cell.cell_len for cell in self.cells)])

    @property
    def smallest(self) -> int:
        """The width below which it goes away."""
        return min(self.natural, self.least) if self.least else self.natural


@dataclass(frozen=True)
class LivePicture:
    """One picture of a server.

    Attributes:
        url: the server's address.
        document: what it said last; None if it has not answered yet.
        now: seconds since 1970, for how long ago requests ended.
        trouble: why the server does not answer now.
    """

    url: str
    document: LiveDocument | None
    now: float
    trouble: str | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render for the width, and where the height is fixed, for the height."""
        width = options.max_width
        yield from self._head()
        if self.document is None:
            return
        running, finished = self.document.running, self.document.finished
        most_running, most_finished = _rows(len(running), len(finished), options.height)
        dim = "dim" if self.trouble else ""
        several = len(self.document.probes) > 1
        yield Text(f"Running ({len(running)})", style="bold")
        if running:
            yield _table(_running_columns(running[:most_running], several, console), width, dim)
        yield from _left_out(len(running) - most_running)
        yield Text()
        yield Text(f"Finished ({len(finished)})", style="bold")
        if finished:
            columns = _finished_columns(finished[:most_finished], several, console, self.now)
            yield _table(columns, width, dim)
        yield from _left_out(len(finished) - most_finished)

    def _head(self) -> Iterator[Text]:
        said = [self.url]
        if self.document is not None:
            document = self.document
            probes = ", ".join(document.probes) or "none"
            said = [document.model, *said, f"process {document.process}", f"probes {probes}"]
        yield _line(" · ".join(printable(part) for part in said), "bold")
        if self.trouble is not None:
            yield _line(f"{printable(self.trouble)}; trying again", "bold red")


def _line(text: str, style: str) -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _left_out(number: int) -> Iterator[Text]:
    if number > 0:
        yield Text(f"… and {number} more", style="dim")


def _rows(running: int, finished: int, height: int | None) -> tuple[int, int]:
    """How many rows of each table fit; a few finished ones keep their place."""
    if height is None:
        return running, finished
    room = max(height - _OTHER_ROWS, 2)
    kept = min(finished, _FEWEST_FINISHED, room // 2)
    shown = min(running, room - kept)
    return shown, min(finished, room - shown)


def _running_columns(rows: Sequence[Running], several: bool, console: Console) -> list[Column]:
    spans = [span_of([*row.recent, *_known(row.score)]) for row in rows]
    return [
        Column("id", [_name(row.id) for row in rows], least=8),
        Column("policy", [_policy(row) for row in rows], least=8, rank=3),
        _probe_column([row.probe for row in rows], several),
        Column("phase", [_name(row.phase or "–") for row in rows], rank=1),
        Column("tokens", [Text(str(row.tokens)) for row in rows], rank=5, right=True),
        Column(
            "score",
            [score_text(row.score, span, console) for row, span in zip(rows, spans, strict=True)],
            right=True,
        ),
        _recent_column([row.recent for row in rows], spans),
    ]


def _finished_columns(
    rows: Sequence[Finished], several: bool, console: Console, now: float
) -> list[Column]:
    spans = []
    for row in rows:
        s = row.summary
        known = _known(s.prompt_end, s.plateau, s.final, s.answer_start, s.answer_mean)
        spans.append(span_of([*row.recent, *known]))

    def scores(values: Sequence[float | None]) -> list[Text]:
        pairs = zip(values, spans, strict=True)
        return [score_text(value, span, console) for value, span in pairs]

    return [
        Column("id", [_name(row.id) for row in rows], least=8),
        Column("policy", [_policy(row) for row in rows], least=8, rank=3),
        _probe_column([row.probe for row in rows], several),
        Column("ended", [_ended(row, now) for row in rows], rank=5),
        Column("tokens", [Text(str(row.summary.tokens)) for row in rows], rank=7, right=True),
        Column("prompt_end", scores([row.summary.prompt_end for row in rows]), rank=6, right=True),
        Column("plateau", scores([row.summary.plateau for row in rows]), rank=1, right=True),
        Column("final", scores([row.summary.final for row in rows]), rank=1, right=True),
        Column("cliff", [_cliff(row.summary.cliff) for row in rows]),
        _recent_column([row.recent for row in rows], spans),
    ]


def _probe_column(probes: Sequence[str], several: bool) -> Column:
    """The probes' names; where there is one only, the head has it already."""
    return Column("probe", [_name(p) for p in probes], least=8, rank=2 if several else 9)


def _recent_column(recent: Sequence[list[float]], spans: Sequence[tuple[float, float]]) -> Column:
    bars = [Text(sparkline(scores, span)) for scores, span in zip(recent, spans, strict=True)]
    return Column("recent", bars, least=10, rank=4, tail=True)


def _known(*scores: float | None) -> list[float]:
    return [score for score in scores if score is not None]


def _name(text: str) -> Text:
    return Text(printable(text))


def _policy(row: Running | Finished) -> Text:
    # In mode shadow a policy is only watched, and what is read is an unsteered answer.
    shadow = " (shadow)" if row.mode == "shadow" else ""
    return _name(f"{row.policy}{shadow}")


def _ended(row: Finished, now: float) -> Text:
    ago = _duration(max(0.0, now - row.ended))
    outcome = "" if row.outcome == "finished" else f", {row.outcome}"
    return _name(f"{ago} ago{outcome}")


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return f"{int(seconds)} s"


def _cliff(value: float | None) -> Text:
    """The number, and a bar for how far the score fell."""
    if value is None:
        return Text(f"{'–':>5}")
    return Text(f"{value:5.2f} {bar(value, 1.0, width=_CLIFF_BAR)}".rstrip())


def _table(columns: Sequence[Column], width: int, style: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), style=style)
    widths = column_widths(columns, width)
    shown = [(c, w) for c, w in zip(columns, widths, strict=True) if w]
    for column, given in shown:
        table.add_column(
            column.heading,
            width=given,
            justify="right" if column.right else "left",
            no_wrap=True,
            overflow="ellipsis",
        )
    for row in zip(*(_cut(column, given) for column, given in shown), strict=True):
        table.add_row(*row)
    return table


def column_widths(columns: Sequence[Column], width: int) -> list[int]:
    """The width of each column in a line of ``width``; 0 for one that goes away.

    Those that may be cut share what is left over, the most needed first; one of which only the end
    counts comes last, because it can use any width.
    """
    kept = list(columns)
    while _needed([column.smallest for column in kept]) > width:
        going = max(kept, key=lambda column: column.rank)
        if going.rank == 0:
            break
        kept = [column for column in kept if column is not going]
    widths = {id(column): column.smallest for column in kept}
    spare = width - _needed(list(widths.values()))
    for column in sorted(kept, key=lambda column: (column.tail, column.rank)):
        more = min(max(spare, 0), column.natural - column.smallest)
        widths[id(column)] += more
        spare -= more
    return [widths.get(id(column), 0) for column in columns]


def _needed(widths: Sequence[int]) -> int:
    return sum(widths) + _GAP * max(len(widths) - 1, 0)


def _cut(column: Column, width: int) -> list[Text]:
    if not column.tail:
        return column.cells
    return [cell[-width:] if len(cell) > width else cell for cell in column.cells]
