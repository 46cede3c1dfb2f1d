"""``trimtab serve``: a model behind vLLM's OpenAI-compatible API, steered by policies.

Trimtab's own flags are read here, and everything else is vLLM's, in the order in which it was
given.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from directions.errors import TrimtabError
from server.cli.output import (
    EXIT_BAD_INPUT,
    EXIT_CHECK_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OUTSIDE,
    OUTSIDE_CODES,
    Output,
    progress_reporter,
)
from server.settings import DEFAULT_MAX_BODY_BYTES, DEFAULT_RELATIVE_CEILING

if TYPE_CHECKING:
    from server.launch import Options, Prepared

OWN_FLAGS: Final = (
    "--policies",
    "--default-policy",
    "--slots",
    "--steering-layers",
    "--relative-ceiling",
    "--max-body-bytes",
    "--allow-unchecked-vllm",
    "--vllm-help",
)

CONTEXT: Final = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    # vLLM takes flags with underscores, so ours do too.
    "token_normalize_func": lambda token: token.replace("_", "-"),
}

USAGE: Final = "MODEL [OPTIONS] [ANY vLLM FLAG]..."
# One line a paragraph: the terminal decides where it breaks.
HELP: Final = (
    "Serve a model whose activations are steered, one policy a request.\n\n"
    "MODEL is a checkpoint's folder or its name on the hub. Flags that are not listed here go to "
    "vLLM's own serve command, in their order; see them with --vllm-help all. The server listens "
    "on 127.0.0.1 unless --host says otherwise."
)

# Found while the server starts, by asking the running engine: a check that failed, not a bad flag.
_CHECKS: Final = ("E_PROOF_", "E_PLUGIN_ABSENT", "E_ACTIVATION", "E_SITE_", "E_VLLM_")


def serve(
    ctx: typer.Context,
    policies: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of policies, one YAML file each."),
    ] = None,
    default_policy: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Policy of requests that choose none; off unless given."),
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option(help="Rows of the engine's tables; how many behaviours can run at once."),
    ] = None,
    steering_layers: Annotated[
        str,
        typer.Option(metavar="LAYERS", help="Layers to hook, such as 8-20; others cost nothing."),
    ] = "all",
    relative_ceiling: Annotated[
        float,
        typer.Option(help="Largest strength of unit 'relative' that a policy can reach.", min=0.0),
    ] = DEFAULT_RELATIVE_CEILING,
    max_body_bytes: Annotated[
        int,
        typer.Option(help="Longest request body that is read.", min=1024),
    ] = DEFAULT_MAX_BODY_BYTES,
    allow_unchecked_vllm: Annotated[
        bool,
        typer.Option(
            "--allow-unchecked-vllm",
            help="Start with a vLLM release that Trimtab has not been checked with.",
        ),
    ] = False,
    vllm_help: Annotated[
        str | None,
        typer.Option(
            metavar="TOPIC",
            help="Show vLLM's flags: 'all', the name of a group, or a word in a flag's name.",
        ),
    ] = None,
) -> None:
    """Prepare the server, say what is served, and hand over to vLLM."""
    from server import launch, vllm_command

    try:
        if vllm_help is not None:
            vllm_command.print_help(vllm_help)
            return
        options = _options(
            policies, default_policy, slots, steering_layers, relative_ceiling, max_body_bytes
        )
        launch.set_environment(options.engine, allow_unchecked_vllm=allow_unchecked_vllm)
        with progress_reporter(Output(json_mode=False)) as progress:
            prepared = launch.prepare(options, ctx.args, OWN_FLAGS, progress)
        _banner(prepared)
        launch.serve(prepared, options.max_body_bytes)
    except TrimtabError as error:
        raise typer.Exit(_say_last(error)) from None
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _options(
    policies: Path | None,
    default_policy: str | None,
    slots: int | None,
    steering_layers: str,
    relative_ceiling: float,
    max_body_bytes: int,
) -> Options:
    from pydantic_core import PydanticCustomError

    from server.launch import Options
    from steering.edits.layers import parse_layers
    from steering.engine.settings import DEFAULT_SLOTS, EngineSettings

    try:
        layers = parse_layers(steering_layers)
    except PydanticCustomError as error:
        raise TrimtabError("E_LAYERS", error.message(), field="--steering-layers") from None
    engine = EngineSettings(
        slots=DEFAULT_SLOTS if slots is None else slots,
        layers=None if layers == "all" else layers,
    )
    return Options(policies, default_policy, engine, relative_ceiling, max_body_bytes)


def _banner(prepared: Prepared) -> None:
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    console = Console()
    catalogue = prepared.catalogue
    name = prepared.names[0]
    facts = Table.grid(padding=(0, 2))
    facts.add_row("model", Text(", ".join(prepared.names)))
    facts.add_row("default policy", catalogue.default)
    facts.add_row("API", f"{prepared.url}/v1")
    facts.add_row("status", f"{prepared.url}/v1/steering/status")
    facts.add_row("metrics", f"{prepared.url}/metrics")
    if prepared.unchecked is not None:
        facts.add_row("vLLM", f"{prepared.unchecked}, which Trimtab has not been checked with")
    console.print(Panel(facts, title="Trimtab", title_align="left", expand=False))
    if not catalogue.entries:
        console.print("no policies: nothing will be steered (see --policies)")
        return
    table = Table("policy", "mode", "on failure", "strength", "choose it by model name")
    for entry in catalogue.entries.values():
        policy = entry.policy
        low, high = policy.strength_range
        table.add_row(
            policy.reference,
            policy.mode,
            policy.on_failure,
            f"{low:g} to {high:g}",
            Text(f"{name}@{policy.name}"),
        )
    console.print(table)


def _say_last(error: TrimtabError) -> int:
    """Print the reason as the last thing on standard error; return the exit code."""
    sys.stdout.flush()
    sys.stderr.write(f"error {error}\n")
    if error.expected:
        sys.stderr.write(f"  expected: {error.expected}\n")
    sys.stderr.flush()
    if error.code.startswith(_CHECKS):
        return EXIT_CHECK_FAILED
    if error.code in OUTSIDE_CODES or error.code == "E_ENGINE":
        return EXIT_OUTSIDE
    return EXIT_BAD_INPUT
