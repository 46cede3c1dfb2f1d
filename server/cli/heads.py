"""``trimtab heads``: finding attention heads that hold something down, and looking whether they do."""

from __future__ import annotations

import math
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


ProbeOption = Annotated[
    str | None,
    typer.Option("--probe", help="The objective: log-odds of this probe, e.g. refusal@2."),
]
OutputOption = Annotated[int, typer.Option("--output", min=0, help="Which of the probe's outputs.")]
ForOption = Annotated[
    list[str] | None,
    typer.Option("--for", help="The objective: log-odds of answers that begin so; repeatable …"),
]
AgainstOption = Annotated[
    list[str] | None,
    typer.Option("--against", help="… against answers that begin so; repeatable."),
]


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
    probe: ProbeOption = None,
    output: OutputOption = 0,
    wanted: ForOption = None,
    unwanted: AgainstOption = None,
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


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, or its name on the hub.")],
    reference: Annotated[
        str, typer.Argument(help="The head set: name, name@3 or sha256:…", show_default=False)
    ],
    examples: Annotated[
        list[str],
        typer.Option(help=f"Prompts at whose last token the objective is read: {EXAMPLES_HELP}."),
    ],
    probe: ProbeOption = None,
    output: OutputOption = 0,
    wanted: ForOption = None,
    unwanted: AgainstOption = None,
    factors: Annotated[
        str, typer.Option(metavar="LIST", help="Factors on the heads' outputs.")
    ] = "1,0.75,0.5,0.25,0",
    controls: Annotated[int, typer.Option(min=0, help="How many sets of random heads.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of their choice.")] = 0,
    limit: LimitOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    batch_size: BatchOption = 8,
    chat_template: ChatTemplateOption = True,
    json_output: JsonOption = False,
) -> None:
    """Scale a head set's heads by one factor after another, beside as many random heads.

    Exit code 1: scaled most, the heads do not raise the objective more than every control does.
    """
    with command_output(json_output) as out:
        from rich.table import Table

        from directions.checkpoint import local_checkpoint
        from directions.head_dose import measure_doses
        from directions.language_model import Reading
        from directions.store import Store

        scales = _factors(factors)
        store = Store()
        heads = store.load_head_set(reference)
        objective = _objective(store, probe, output, wanted or [], unwanted or [])
        with progress_reporter(out) as progress:
            checkpoint = local_checkpoint(model)
            found = measure_doses(
                checkpoint,
                heads.heads,
                open_sets(examples, limit, progress),
                objective,
                scales,
                controls=controls,
                seed=seed,
                reading=Reading(dtype, device, batch_size, chat_template),
                progress=progress,
            )
        table = Table("factor", heads.reference, "random heads (mean, least to most)")
        for dose in found.doses:
            of = dose.controls
            shown = f"{sum(of) / len(of):+.3f}  ({min(of):+.3f} to {max(of):+.3f})" if of else ""
            table.add_row(f"{dose.factor:g}", f"{dose.objective:+.3f}", shown)
        table.title = f"{objective.describe()}, mean of {found.texts} prompts"
        out.table(table)
        out.result(
            {
                "heads": heads.reference,
                "objective": objective.describe(),
                "texts": found.texts,
                "plain": found.plain,
                "holds": found.holds,
                "doses": [
                    {
                        "factor": dose.factor,
                        "objective": dose.objective,
                        "controls": list(dose.controls),
                    }
                    for dose in found.doses
                ],
            }
        )
        if not found.holds:
            out.fail_check()


def _factors(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(math.isfinite(factor) for factor in found):
        raise TrimtabError(
            "E_OPTION", f"{text!r} is no list of factors", field="--factors", expected="0,0.5,1"
        )
    return found


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
