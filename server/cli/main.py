"""The ``trimtab`` command.

Each group of commands lives in its own module and imports what it needs when it runs, so that help
and completion answer at once: neither torch nor vLLM is imported for them.
"""

from __future__ import annotations

from typing import Annotated

import typer

from server.cli import directions, heads, models, policy, probe, serve, trace, verify, watch

app = typer.Typer(
    name="trimtab",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="Serve a language model whose activations are steered, one policy a request.",
)
app.command(
    "serve",
    help=serve.HELP,
    options_metavar=serve.USAGE,
    context_settings=serve.CONTEXT,
    no_args_is_help=True,
)(serve.serve)
app.add_typer(directions.app, name="directions")
app.add_typer(heads.app, name="heads")
app.add_typer(models.app, name="models")
app.add_typer(policy.app, name="policy")
app.add_typer(probe.app, name="probe")
app.command("verify", help=verify.HELP)(verify.verify)
app.command("watch", help=watch.HELP)(watch.watch)
app.command("trace", help=trace.HELP)(trace.trace)


@app.command()
def version(
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show the versions of Trimtab and of what it runs on."""
    from server.cli.output import command_output
    from server.versions import installed_versions

    with command_output(json_output) as out:
        versions = installed_versions()
        for name, found in versions.items():
            out.plain(f"{name} {found or 'not installed'}")
        out.result(versions)


def run() -> None:
    """The console entry point."""
    from server.cli.output import run_app

    run_app(app)
