"""The options that commands have in common which read a model's activations on examples."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from directions.examples import ExampleSet
    from directions.progress import Progress

EXAMPLES_HELP = "a file (.jsonl, or text with one prompt a line) or dataset:NAME; may be repeated"

NameOption = Annotated[str, typer.Option("--name", help="Name to store it under.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="float32 or bfloat16.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, help="Prompts a forward pass.")]
DescriptionOption = Annotated[str, typer.Option("--description", help="A sentence for the card.")]
LimitOption = Annotated[
    int | None, typer.Option("--limit", min=1, help="At most so many examples of each source.")
]
ChatTemplateOption = Annotated[
    bool, typer.Option("--chat-template/--no-chat-template", help="Render prompts with it.")
]
ReuseOption = Annotated[
    bool, typer.Option("--reuse", help="Where the latest version has this very recipe, keep it.")
]


def open_sets(
    sources: Iterable[str], limit: int | None, progress: Progress
) -> tuple[ExampleSet, ...]:
    """The examples that an option names, as far as the limit goes.

    Raises:
        TrimtabError: those of ``directions.datasets.open_examples``.
    """
    from directions.datasets import open_examples

    return tuple(open_examples(where, progress=progress).limited(limit) for where in sources)
