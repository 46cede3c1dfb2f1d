"""``trimtab models``: fetching a model to try things on."""

from __future__ import annotations

from typing import Annotated

import typer

from directions.errors import TrimtabError
from server.cli.output import JsonOption, command_output, progress_reporter

app = typer.Typer(name="models", help="Fetch models to try things on.", no_args_is_help=True)


@app.callback()
def models() -> None:
    """Fetch models to try things on."""


@app.command()
def fetch(
    model: Annotated[str, typer.Argument(help="Which model: `demo` is the only one.")],
    json_output: JsonOption = False,
) -> None:
    """Fetch a model, convert it where need be, and print its folder as the last line.

    `demo` is SmolLM2-135M-Instruct (Apache-2.0): 93 MB to download, 540 MB on disk in float32,
    about half a minute. What is there already is not fetched again.
    """
    with command_output(json_output) as out:
        if model != "demo":
            raise TrimtabError(
                "E_MODEL_UNKNOWN", f"no model is called {model!r}", field="MODEL", expected="demo"
            )
        from directions.demo_model import DEMO_LICENCE, DEMO_MODEL, fetch_demo_model

        with progress_reporter(out) as progress:
            path = fetch_demo_model(progress=progress)
        out.result({"name": DEMO_MODEL, "licence": DEMO_LICENCE, "path": str(path)})
        out.plain(str(path))
