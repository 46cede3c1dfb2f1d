"""``trimtab serve``: a model behind vLLM's OpenAI-compatible API, steered by policies.

Trimtab's own flags are read here, and everything else is vLLM's, in the order in which it was
given.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

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
from server.cli.thinking_flags import ThinkEnd, ThinkStart
from server.settings import DEFAULT_MAX_BODY_BYTES, DEFAULT_RELATIVE_CEILING

if TYPE_CHECKING:
    from server.launch import Prepared
    from steering.engine.settings import EngineSettings

OWN_FLAGS: Final = (
    "--policies",
    "--default-policy",
    "--probe",
    "--slots",
    "--steering-layers",
    "--steering-sites",
    "--projections",
    "--think-start",
    "--think-end",
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
    probe: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME@VERSION", help="Probe that reads all traffic; may be given several times."
        ),
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option(help="Rows of the engine's tables; how many behaviours can run at once."),
    ] = None,
    steering_layers: Annotated[
        str,
        typer.Option(metavar="LAYERS", help="Layers to hook, such as 8-20; others cost nothing."),
    ] = "all",
    steering_sites: Annotated[
        str,
        typer.Option(
            metavar="SITES",
            help="Sites to hook, such as heads,gates; auto: those that the policies need.",
        ),
    ] = "auto",
    projections: Annotated[
        int | None,
        typer.Option(help="Vectors that a policy may project on at one site of one layer."),
    ] = None,
    think_start: ThinkStart = None,
    think_end: ThinkEnd = None,
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
        options = launch.Options(
            policies,
            default_policy,
            _engine_settings(slots, steering_layers, steering_sites, projections),
            relative_ceiling,
            max_body_bytes,
            auto_sites=steering_sites == "auto",
            thinking=_thinking(think_start, think_end),
            probes=tuple(probe or ()),
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


def _thinking(start: str | None, end: str | None) -> tuple[str, str] | None:
    if start is None and end is None:
        return None
    from steering.thinking_markers import given_markers

    return given_markers(start, end)


def _engine_settings(
    slots: int | None, layers_text: str, sites_text: str, projections: int | None
) -> EngineSettings:
    from pydantic_core import PydanticCustomError

    from steering.edits.layers import parse_layers
    from steering.engine.settings import SITE_NAMES, EngineSettings

    try:
        layers = parse_layers(layers_text)
    except PydanticCustomError as error:
        raise TrimtabError("E_LAYERS", error.message(), field="--steering-layers") from None
    sites: tuple[str, ...] = SITE_NAMES
    if sites_text not in ("auto", "all"):
        # Additions are always hooked.
        sites = tuple(dict.fromkeys(["add", *(name.strip() for name in sites_text.split(","))]))
    sizes: dict[str, Any] = {"slots": slots, "projections": projections}
    return EngineSettings(
        layers=None if layers == "all" else layers,
        sites=sites,
        **{name: size for name, size in sizes.items() if size is not None},
    )


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
    facts.add_row("sites", ", ".join(prepared.engine.sites))
    if catalogue.probes:
        facts.add_row("probes", ", ".join(reading.key for reading in catalogue.probes))
    if prepared.thinking is not None:
        facts.add_row("thinking", Text(" … ".join(map(repr, prepared.thinking))))
    facts.add_row("API", f"{prepared.url}/v1")
    facts.add_row("status", f"{prepared.url}/v1/steering/status")
    facts.add_row("metrics", f"{prepared.url}/metrics")
    if prepared.unchecked is not None:
        facts.add_row("vLLM", f"{prepared.unchecked}, which Trimtab has not been checked with")
    console.print(Panel(facts, title="Trimtab", title_align="left", expand=False))
    if not catalogue.entries:
        console.print("no policies: nothing will be steered (see --policies)")
        return
    table = Table("policy", "mode", "on failure", "strength", "reads", "choose it by model name")
    for entry in catalogue.entries.values():
        policy = entry.policy
        low, high = policy.strength_range
        table.add_row(
            policy.reference,
            policy.mode,
            policy.on_failure,
            f"{low:g} to {high:g}",
            ", ".join(reading.key for reading in catalogue.readings_of(entry)),
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
    if error.code in OUTSIDE_CODES:
        return EXIT_OUTSIDE
    return EXIT_BAD_INPUT
