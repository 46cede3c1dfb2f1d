"""The flags that name a model's thinking markers, which several commands take."""

from __future__ import annotations

from typing import Annotated

import typer

ThinkStart = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="Text that begins the model's thinking; told from the checkpoint unless given.",
    ),
]
ThinkEnd = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="Text that ends it; to be given with --think-start."),
]
