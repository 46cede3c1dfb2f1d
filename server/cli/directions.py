"""``trimtab directions``: making, looking at, checking and exchanging directions.

``list``, ``show`` and ``verify`` know every kind of artefact in the store.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from directions.errors import TrimtabError
from server.cli.artefact_view import described, layer_ranges, show_artefact
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

if TYPE_CHECKING:
    from directions.extraction import Method
    from directions.progress import Progress
    from directions.store import Store

app = typer.Typer(
    name="directions",
    help="Make, look at, check and exchange directions.",
    no_args_is_help=True,
)


ReferenceArgument = Annotated[
    str, typer.Argument(help="name, name@3 or sha256:…", show_default=False)
]
ModelOption = Annotated[str, typer.Option("--model", help="Checkpoint it is meant for.")]


@app.command()
def extract(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, or its name on the hub.")],
    name: NameOption,
    method: Annotated[str, typer.Option(help="contrast or alignment.")] = "contrast",
    positive: Annotated[
        list[str] | None, typer.Option(help=f"contrast: what to point to; {EXAMPLES_HELP}.")
    ] = None,
    negative: Annotated[
        list[str] | None, typer.Option(help=f"contrast: what to point away from; {EXAMPLES_HELP}.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="alignment: the base model to subtract.")] = None,
    prompts: Annotated[
        list[str] | None, typer.Option(help=f"alignment: what both models read; {EXAMPLES_HELP}.")
    ] = None,
    position: Annotated[
        str | None,
        typer.Option(
            help="last-prompt-token, prompt-mean or answer-mean:N "
            "[default: last-prompt-token; alignment: answer-mean:64]."
        ),
    ] = None,
    limit: LimitOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    batch_size: BatchOption = 8,
    chat_template: ChatTemplateOption = True,
    description: DescriptionOption = "",
    reuse: ReuseOption = False,
    json_output: JsonOption = False,
) -> None:
    """Make a direction from a model's activations on examples, and store it."""
    with command_output(json_output) as out:
        from directions.checkpoint import local_checkpoint
        from directions.position import Position
        from directions.store import Store, check_name

        check_name(name)
        place = Position.parse(position) if position else None
        store = Store()
        with progress_reporter(out) as progress:
            checkpoint = local_checkpoint(model)
            recipe = _recipe(
                method,
                checkpoint,
                base=base,
                sources={
                    "--positive": positive or [],
                    "--negative": negative or [],
                    "--prompts": prompts or [],
                },
                limit=limit,
                settings=(place, dtype, device, batch_size, chat_template, description),
                progress=progress,
            )
            from directions.extraction import already_made

            found = already_made(recipe, store, name, store.load) if reuse else None
            ref = found or recipe.run(progress).store(store, name)
        direction = store.load(ref.reference)
        if found:
            out.note(f"{ref.reference} was made by this very recipe already")
        show_artefact(out, direction)


def _recipe(
    method: str,
    checkpoint: Path,
    *,
    base: str | None,
    sources: dict[str, list[str]],
    limit: int | None,
    settings: tuple[Any, ...],
    progress: Progress,
) -> Method:
    """The method's recipe, or a refusal that names the option which is missing or too much."""
    if method not in ("contrast", "alignment"):
        raise TrimtabError(
            "E_METHOD",
            f"no method is called {method!r}",
            field="--method",
            expected="contrast or alignment",
        )
    wanted = {"--positive", "--negative"} if method == "contrast" else {"--prompts", "--base"}
    given = {option for option, values in sources.items() if values} | (
        {"--base"} if base else set()
    )
    for option in sorted(wanted - given):
        raise TrimtabError("E_OPTION", f"--method {method} needs {option}", field=option)
    for option in sorted(given - wanted):
        raise TrimtabError("E_OPTION", f"--method {method} has no {option}", field=option)

    # Reading the examples first: a mistyped path should not wait for torch.
    examples = {option: open_sets(named, limit, progress) for option, named in sources.items()}
    from directions.language_model import Reading
    from directions.position import Position

    place, dtype, device, batch_size, chat_template, description = settings
    reading = Reading(dtype, device, batch_size, chat_template)
    if method == "contrast":
        from directions.contrast import Contrast

        return Contrast(
            checkpoint,
            examples["--positive"],
            examples["--negative"],
            place or Position("last-prompt-token"),
            reading,
            description,
        )
    from directions.alignment import Alignment
    from directions.checkpoint import local_checkpoint

    return Alignment(
        checkpoint,
        local_checkpoint(base or ""),
        examples["--prompts"],
        place or Position.parse("answer-mean"),
        reading,
        description,
    )


@app.command("list")
def list_(json_output: JsonOption = False) -> None:
    """List every version of every artefact: directions, probes and head sets."""
    with command_output(json_output) as out:
        from rich.table import Table

        from directions.store import Store

        store = Store()
        table = Table("artefact", "kind", "method", "model", "where", "made", "sha256")
        table.columns[0].overflow = "fold"
        rows: list[dict[str, Any]] = []
        for reference in _references(store):
            try:
                artefact = store.load_any(reference)
            except TrimtabError as error:
                rows.append({"reference": reference, "error": error.to_dict()})
                table.add_row(reference, "", f"[red]{error.code}[/]")
                continue
            card = artefact.card
            where, fields = described(artefact)
            rows.append(
                {
                    "reference": reference,
                    "kind": card.kind,
                    "sha256": artefact.sha256,
                    "method": card.method,
                    "position": card.position,
                    "architecture": card.model.architecture,
                    **fields,
                    "created": card.created,
                }
            )
            table.add_row(
                reference,
                card.kind,
                f"{card.method} {card.position}",
                f"{card.model.architecture} {card.model.num_layers}×{card.model.hidden_size}",
                where,
                card.created[:10],
                artefact.sha256[:8],
            )
        if rows:
            out.table(table)
        else:
            out.note(f"no artefacts in {store.root} yet: see trimtab directions extract --help")
        out.result({"home": str(store.root), "directions": rows})


@app.command()
def show(reference: ReferenceArgument, json_output: JsonOption = False) -> None:
    """Show the card of a direction, probe or head set, and a picture of what it holds."""
    with command_output(json_output) as out:
        from directions.store import Store

        show_artefact(out, Store().load_any(reference))


@app.command()
def verify(
    references: Annotated[
        list[str] | None, typer.Argument(help="What to check; everything where none is given.")
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Read artefacts again and check every hash; exit with 1 where something is wrong."""
    with command_output(json_output) as out:
        from rich.table import Table

        from directions.store import Store

        store = Store()
        chosen = references or _references(store, unnamed=True)
        table = Table("artefact", "result", "what is wrong")
        rows: list[dict[str, Any]] = []
        wrong = 0
        with out.progress() as progress:
            for reference in progress.track(chosen, description="verify"):
                try:
                    artefact = store.load_any(reference)
                except TrimtabError as error:
                    wrong += 1
                    rows.append({"reference": reference, "ok": False, "error": error.to_dict()})
                    table.add_row(reference, f"[red]{error.code}[/]", error.message)
                else:
                    rows.append(
                        {
                            "reference": reference,
                            "ok": True,
                            "kind": artefact.card.kind,
                            "sha256": artefact.sha256,
                        }
                    )
                    table.add_row(reference, "[green]ok[/]", "")
        if rows:
            out.table(table)
        else:
            out.note(f"nothing to verify in {store.root}")
        out.result({"ok": wrong == 0, "checked": len(rows), "wrong": wrong, "artefacts": rows})
        if wrong:
            out.fail_check()


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="A GGUF control vector.")],
    model: ModelOption,
    name: NameOption,
    norms_from: Annotated[
        str | None,
        typer.Option(
            help="Measure the activation norms, without which `unit: relative` cannot be used, on "
            "these prompts: a file or dataset:NAME."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many prompts.")] = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    batch_size: BatchOption = 8,
    description: DescriptionOption = "",
    json_output: JsonOption = False,
) -> None:
    """Import a GGUF control vector (llama.cpp, repeng) as a direction of a model."""
    with command_output(json_output) as out:
        from directions.checkpoint import local_checkpoint
        from directions.control_vector import import_control_vector
        from directions.fingerprint import fingerprint
        from directions.store import Store, check_name

        check_name(name)
        store = Store()
        with progress_reporter(out) as progress:
            checkpoint = local_checkpoint(model)
            made = import_control_vector(
                file, fingerprint(checkpoint, progress=progress), description=description
            )
            if norms_from is not None:
                from directions.datasets import open_examples
                from directions.language_model import Reading
                from directions.norms import with_norms

                prompts = open_examples(norms_from, progress=progress).limited(limit)
                reading = Reading(dtype, device, batch_size)
                made = with_norms(made, checkpoint, prompts, reading, progress)
            ref = made.store(store, name)
        show_artefact(out, store.load(ref.reference))


@app.command()
def export(
    reference: ReferenceArgument,
    file: Annotated[Path, typer.Argument(help="The GGUF file to write.")],
    skip_layer_zero: Annotated[
        bool, typer.Option("--skip-layer-zero", help="Leave out layer 0, which GGUF cannot hold.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    json_output: JsonOption = False,
) -> None:
    """Export a direction as a GGUF control vector for llama.cpp and others."""
    with command_output(json_output) as out:
        from directions.control_vector import export_control_vector
        from directions.store import Store

        direction = Store().load(reference)
        if file.exists() and not force:
            raise TrimtabError(
                "E_FILE_EXISTS", f"{file} exists", field=str(file), expected="--force to replace it"
            )
        layers = export_control_vector(direction, file, skip_layer_zero=skip_layer_zero)
        out.result({"reference": direction.reference, "file": str(file), "layers": list(layers)})
        out.plain(f"{file}: {direction.reference}, layers {layer_ranges(layers)}")


def _references(store: Store, *, unnamed: bool = False) -> list[str]:
    """Every version of every name, and, where asked for, what no intact name points at."""
    found, named = [], set()
    for name in store.names():
        for version in store.versions(name):
            reference = f"{name}@{version}"
            found.append(reference)
            try:
                named.add(store.resolve(reference).sha256)
            except TrimtabError:
                continue  # loading it will say the same
    if unnamed:
        found += [f"sha256:{sha256}" for sha256 in store.identities() if sha256 not in named]
    return found
