"""What every command prints, and how it ends.

One rule holds everything together: with ``--json`` a command writes exactly one JSON document on
standard output, its result or ``{"error": {...}}``, and everything meant for eyes (tables,
progress, notes) goes to standard error. Without ``--json``, tables and results go to standard
output, progress and notes to standard error, so that ``trimtab … | less`` shows the result alone.

Exit codes: 0 done; 1 a check found something wrong; 2 bad usage or bad input; 3 something outside
Trimtab failed (disk, network); 130 interrupted.

A command looks like this::

    @app.command()
    def show(reference: str, json_output: JsonOption = False) -> None:
        with command_output(json_output) as out:
            direction = Store().load(reference)
            out.table(picture_of(direction))
            out.result({"name": direction.name})
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from directions.errors import TrimtabError
from directions.progress import Advance
from directions.progress import Progress as ProgressReport

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress

EXIT_OK = 0
EXIT_CHECK_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_OUTSIDE = 3
EXIT_INTERRUPTED = 130

# Codes whose cause lies outside Trimtab and outside what the caller typed.
OUTSIDE_CODES = frozenset({"E_DOWNLOAD", "E_ENGINE", "E_IO"})

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on standard output.")
]


class Output:
    """Where one command's results, notes and progress go.

    Attributes:
        json_mode: whether standard output is reserved for one JSON document.
        console: where tables and pictures go (standard error under ``--json``).
        notes: standard error, always.
    """

    def __init__(self, json_mode: bool) -> None:
        from rich.console import Console

        class PipeAwareConsole(Console):
            """Rich ends the process with 1 when the reader is gone; here 1 means something else."""

            def on_broken_pipe(self) -> None:
                raise BrokenPipeError

        self.json_mode = json_mode
        self.notes: Console = PipeAwareConsole(stderr=True, soft_wrap=True)
        self.console: Console = self.notes if json_mode else PipeAwareConsole()
        self._document: Any = None
        self._has_document = False

    def result(self, document: Any) -> None:
        """Set the JSON document that ``--json`` prints when the command ends; the last one wins."""
        self._document = document
        self._has_document = True

    def table(self, renderable: RenderableType) -> None:
        """Show a table or picture to a person."""
        self.console.print(renderable)

    def note(self, text: str) -> None:
        """Say something in passing on standard error."""
        self.notes.print(text, markup=False, highlight=False)

    def plain(self, text: str) -> None:
        """Write one line on standard output as it is, unwrapped, for scripts to read.

        Under ``--json`` the line belongs in the document instead, and nothing is written.
        """
        if not self.json_mode:
            sys.stdout.write(text + "\n")

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """A rich progress display on standard error."""
        with rich_progress(self.notes) as progress:
            yield progress

    def fail_check(self) -> NoReturn:
        """End the command with exit code 1: it ran, and found something wrong."""
        raise CheckFailedError

    def finish(self) -> None:
        """Write the JSON document, once, where one is due."""
        if self.json_mode:
            write_json(self._document if self._has_document else {})


def run_app(app: typer.Typer) -> NoReturn:
    """Run a command line as the process's own, and end the process.

    What typer itself refuses (an unknown option, a missing argument) never reaches a command, so
    under ``--json`` it is turned into a document here.
    """
    if "--json" not in sys.argv[1:]:
        app()
        sys.exit(EXIT_OK)
    try:
        code = app(standalone_mode=False)
    except Exception as error:
        # The class of such errors moved between typer's versions; this is what they all have.
        describe = getattr(error, "format_message", None)
        if describe is None:
            raise
        write_json({"error": TrimtabError("E_USAGE", describe()).to_dict()})
        sys.exit(EXIT_BAD_INPUT)
    sys.exit(code if isinstance(code, int) else EXIT_OK)


class CheckFailedError(Exception):
    """A check that ran to its end and found something wrong (exit code 1)."""


def write_json(document: Any) -> None:
    """Write one JSON document on standard output (no NaN: JSON has none)."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


@contextmanager
def rich_progress(console: Console | None = None) -> Iterator[Progress]:
    """The one look of progress bars: what, bar, count, time gone, time left."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
        console=console or Console(stderr=True),
    ) as progress:
        yield progress


@contextmanager
def command_output(json_mode: bool = False) -> Iterator[Output]:
    """Run a command's body; turn how it ends into what is printed and the exit code.

    Raises:
        typer.Exit: with code 1, 2, 3 or 130 where the body did not simply succeed.
    """
    out = Output(json_mode)
    try:
        yield out
    except CheckFailedError:
        out.finish()
        raise typer.Exit(EXIT_CHECK_FAILED) from None
    except TrimtabError as error:
        print_error(out, error)
        code = EXIT_OUTSIDE if error.code in OUTSIDE_CODES else EXIT_BAD_INPUT
        raise typer.Exit(code) from error
    except KeyboardInterrupt:
        print_error(out, TrimtabError("E_INTERRUPTED", "interrupted"))
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:
        # The reader (`| head`) has gone: nothing is wrong, and nothing more can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(EXIT_OK) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        message = f"{where}{error.strerror or error}"
        print_error(out, TrimtabError("E_IO", message))
        raise typer.Exit(EXIT_OUTSIDE) from error
    else:
        out.finish()


def print_error(out: Output, error: TrimtabError) -> None:
    """Show one error: the JSON document under ``--json``, else a sentence on standard error."""
    if out.json_mode:
        write_json({"error": error.to_dict()})
        return
    where = f" ({error.field})" if error.field else ""
    out.notes.print(f"[bold red]error[/] [bold]{error.code}[/]", end="", highlight=False)
    out.notes.print(f"{where}: {error.message}", markup=False, highlight=False)
    if error.expected:
        out.notes.print(f"  expected: {error.expected}", markup=False, highlight=False)


@contextmanager
def progress_reporter(out: Output) -> Iterator[ProgressReport]:
    """Bars for library code, which takes a ``directions.progress.Progress`` and knows no rich."""
    with out.progress() as progress:

        def start(description: str, total: int | None) -> Advance:
            task = progress.add_task(description, total=total)
            return lambda amount: progress.advance(task, amount)

        yield start
