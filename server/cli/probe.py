"""``trimtab probe``: making probes.

What is in the store is listed, shown and checked by ``trimtab directions``, which knows every kind.
"""

from __future__ import annotations

from typing import Annotated

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
    ReuseOption,
    open_sets,
)

app = typer.Typer(name="probe", help="Make probes.", no_args_is_help=True)


@app.callback()
def probe() -> None:
    """Make probes."""


@app.command()
def train(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, or its name on the hub.")],
    name: NameOption,
    positive: Annotated[
        list[str],
        typer.Option(help=f"What scores high: {EXAMPLES_HELP}."),
    ],
    negative: Annotated[list[str], typer.Option(help="What scores low; likewise.")],
    position: Annotated[
        str, typer.Option(help="last-prompt-token, prompt-mean or answer-mean:N.")
    ] = "last-prompt-token",
    layer: Annotated[
        str,
        typer.Option(help="Layer after which it reads; best: the one that tells them apart best."),
    ] = "best",
    limit: LimitOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    batch_size: BatchOption = 8,
    chat_template: ChatTemplateOption = True,
    description: DescriptionOption = "",
    reuse: ReuseOption = False,
    json_output: JsonOption = False,
) -> None:
    """Make a probe from the difference of two sides' mean activations, and store it.

    Its score is the probability that an activation is of the positive side, were the two sides normal
    along the difference and equally likely. Half of the examples give the difference, the other half
    the rest and the figures.
    """
    with command_output(json_output) as out:
        from directions.checkpoint import local_checkpoint
        from directions.contrast import Contrast
        from directions.extraction import already_made
        from directions.language_model import Reading
        from directions.mean_probe import MeanProbe
        from directions.position import Position
        from directions.store import Store, check_name

        check_name(name)
        place, chosen = Position.parse(position), _layer(layer)
        store = Store()
        with progress_reporter(out) as progress:
            checkpoint = local_checkpoint(model)
            sides = [open_sets(side, limit, progress) for side in (positive, negative)]
            reading = Reading(dtype, device, batch_size, chat_template)
            contrast = Contrast(checkpoint, sides[0], sides[1], place, reading, description)
            recipe = MeanProbe(contrast, chosen)
            found = already_made(recipe, store, name, store.load_probe) if reuse else None
            ref = found or recipe.run(progress).store(store, name)
        if found:
            out.note(f"{ref.reference} was made by this very recipe already")
        show_artefact(out, store.load_probe(ref.reference))


def _layer(text: str) -> int | None:
    if text == "best":
        return None
    if not text.isdecimal() or len(text) > 6:
        raise TrimtabError(
            "E_LAYER_RANGE", f"{text!r} is no layer", field="--layer", expected="a number, or best"
        )
    return int(text)
