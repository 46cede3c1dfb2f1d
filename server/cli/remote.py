"""What the commands share that ask a running server: the key, and how they end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from server.cli.output import EXIT_OUTSIDE, Output, command_output, print_error

ApiKey = Annotated[
    str | None,
    typer.Option(
        metavar="KEY",
        envvar="TRIMTAB_API_KEY",
        help="The server's API key. The variable keeps it out of the list of processes.",
    ),
]


@contextmanager
def remote_output(json_mode: bool) -> Iterator[Output]:
    """:func:`command_output`, in which a failure of the server or the network ends with 3.

    The code does not decide it, as elsewhere: it may be the server's own.
    """
    from server.steering_client import ServerFailedError

    with command_output(json_mode) as out:
        try:
            yield out
        except ServerFailedError as error:
            print_error(out, error)
            raise typer.Exit(EXIT_OUTSIDE) from error
