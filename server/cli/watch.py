"""``trimtab watch``: the scores of a running server, as they come."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Final

import typer

from directions.errors import TrimtabError
from server.cli.output import JsonOption, Output
from server.cli.remote import ApiKey, remote_output

if TYPE_CHECKING:
    from server.steering_client import SteeringClient

HELP: Final = (
    "Watch the probe scores of a running server.\n\n"
    "URL is the server's address; http:// is added where it is missing. Running requests stand "
    "above, with the score of the latest token and those before it; below are those that ended, "
    "with their plateau, their final score and the cliff between. Ctrl-C leaves."
)

# Longer than a busy server takes, short enough to notice one that hangs.
_WAIT_SECONDS: Final = 10.0
_LEAST_INTERVAL: Final = 0.1


def watch(
    url: Annotated[str, typer.Argument(help="The server, such as 127.0.0.1:8000.")],
    interval: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long to wait between two pictures.")
    ] = 0.5,
    once: Annotated[bool, typer.Option("--once", help="Show one picture and end.")] = False,
    api_key: ApiKey = None,
    json_output: JsonOption = False,
) -> None:
    """See :data:`HELP`."""
    from server.steering_client import SteeringClient

    with remote_output(json_output) as out:
        if not _LEAST_INTERVAL <= interval < float("inf"):
            raise TrimtabError(
                "E_OPTION",
                f"{interval:g} is no interval",
                field="--interval",
                expected=f"seconds, at least {_LEAST_INTERVAL:g}",
            )
        if not once:
            _check_terminal(out)
        with SteeringClient(url, api_key, wait=_WAIT_SECONDS) as client:
            if once:
                _show_once(out, client)
            else:
                _follow(out, client, interval)


def _check_terminal(out: Output) -> None:
    """Refuse to redraw what cannot be redrawn."""
    if out.json_mode:
        reason = "a picture that is redrawn is no JSON document"
    elif not out.console.is_terminal or out.console.is_dumb_terminal:
        reason = "standard output is no terminal on which a picture can be redrawn"
    else:
        return
    raise TrimtabError("E_OPTION", reason, field="--once", expected="--once, or --once --json")


def _show_once(out: Output, client: SteeringClient) -> None:
    from server.cli.live_view import LivePicture
    from server.steering_answers import LiveDocument, read_answer

    found = client.live()
    document = read_answer(LiveDocument, found)
    out.result(found)
    out.table(LivePicture(client.url, document, time.time()))


def _follow(out: Output, client: SteeringClient, interval: float) -> None:
    """Redraw until the person leaves; that is how watching ends, so it is no interruption."""
    from rich.live import Live

    from server.cli.live_view import LivePicture
    from server.steering_answers import LiveDocument, read_answer
    from server.steering_client import ServerFailedError

    document: LiveDocument | None = None
    picture = LivePicture(client.url, None, time.time(), "not asked yet")
    try:
        with Live(console=out.console, screen=True, auto_refresh=False) as live:
            while True:
                trouble = None
                try:
                    document = read_answer(LiveDocument, client.live())
                except ServerFailedError as error:
                    # What was seen last stays, so that a restart does not empty the screen.
                    trouble = error.message
                picture = LivePicture(client.url, document, time.time(), trouble)
                live.update(picture, refresh=True)
                time.sleep(interval)
    except KeyboardInterrupt:
        # The other screen is gone, and with it what was on it.
        if picture.document is not None:
            out.table(picture)
