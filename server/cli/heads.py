"""``trimtab heads``: finding attention heads that hold something down."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from directions.errors import TrimtabError
from server.cli.artefact_view import show_artefact
from server.cli.output import JsonOption, command_output, progress_reporter
from server.cli.reading_options import (
    EXAMPLES_HELP,
    BatchOption,
    ChatTemplateOption,
    DescriptionOption,
    DeviceOption,
    DtypeOption,
    LimitOption,
    NameOption,
    open_sets,
)

if TYPE_CHECKING:
    from directions.objective import Objective

app = typer.Typer(name="heads", help="Find attention heads.", no_args_is_help=True)


@app.callback()
def heads() -> None:
    """Find attention heads."""


@app.command()
def trace(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, or its name on the hub.")],
    name: NameOption,
    examples: Annotated[
        list[str],
        typer.Option(help=f"Prompts at whose last token the objective is read: {EXAMPLES_HELP}."),
    ],
    method: Annotated[str, typer.Option(help="gradient, causal or direct.")] = "gradient",
    probe: Annotated[
        str | None, typer.Option(help="The objective: log-odds of this probe, e.g. refusal@2.")
    ] = None,
    output: Annotated[int, typer.Option(min=0, help="Which of the probe's outputs.")] = 0,
    wanted: Annotated[
        list[str] | None,
        typer.Option(
            "--for", help="The objective: log-odds of answers that begin so; repeatable …"
        ),
    ] = None,
    unwanted: Annotated[
        list[str] | None,
        typer.Option("--against", help="… against answers that begin so; repeatable."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many heads to take.")] = 8,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Draw the evidence for every head into this file."),
    ] = None,
    limit: LimitOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    batch_size: BatchOption = 8,
    chat_template: ChatTemplateOption = True,
    description: DescriptionOption = "",
    json_output: JsonOption = False,
) -> None:
    """Find the heads that suppress an objective, and store them as a head set.

    The evidence for a head is how much the objective rises when the head is scaled to nothing: measured
    (causal), or estimated from its gradient or from what the head writes (direct).
    """
    with command_output(json_output) as out:
        from directions.checkpoint import local_checkpoint
        from directions.head_tracing import METHODS, HeadTracing
        from directions.language_model import Reading
        from directions.store import Store, check_name

        check_name(name)
        by = next((known for known in METHODS if known == method), None)
        if by is None:
            raise TrimtabError(
                "E_METHOD",
                f"no method is called {method!r}",
                field="--method",
                expected=", ".join(METHODS),
            )
        if picture is not None:
            from server.heads_picture import check_picture

            check_picture(picture)
        store = Store()
        objective = _objective(store, probe, output, wanted or [], unwanted or [])
        with progress_reporter(out) as progress:
            checkpoint = local_checkpoint(model)
            sets = open_sets(examples, limit, progress)
            reading = Reading(dtype, device, batch_size, chat_template)
            recipe = HeadTracing(checkpoint, sets, objective, by, top, reading, description)
            found = recipe.run(progress)
            ref = found.store(store, name)
        show_artefact(out, store.load_head_set(ref.reference))
        if picture is not None:
            from server.heads_picture import draw

            draw(found, picture)
            out.note(f"drew {picture}")


def _objective(
    store: object, probe: str | None, output: int, wanted: list[str], unwanted: list[str]
) -> Objective:
    from directions.objective import LogOdds, ProbeObjective
    from directions.store import Store

    assert isinstance(store, Store)
    if probe is not None and not (wanted or unwanted):
        return ProbeObjective(store.load_probe(probe), output)
    if probe is None and wanted and unwanted:
        return LogOdds(tuple(wanted), tuple(unwanted))
    raise TrimtabError(
        "E_OPTION",
        "an objective is needed, and one only",
        field="--probe",
        expected="--probe NAME, or --for TEXT with --against TEXT",
    )
