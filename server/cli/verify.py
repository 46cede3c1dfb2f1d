"""``trimtab verify``: whether steering is right on a checkpoint."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli.output import JsonOption, command_output, progress_reporter
from server.cli.thinking_flags import ThinkEnd, ThinkStart

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from server.verify import Finding, Verification

HELP = (
    "Hold the engine against the reference on a checkpoint, in float32.\n\n"
    "Every kind of edit runs at every site, with random artefacts, and the log-probability of "
    "every token is compared with the reference's. The bound is 1e-4 nats and, where the "
    "unsteered answers (the floor) differ by more than that, twice the floor.\n\n"
    "Ends with 0 if every row passes. A site that Trimtab refuses on this model is 'not available': "
    "no policy can come to act there, so the row alone does not count as a failure, but a policy "
    "given with --policy that needs it does. Any other verdict ends with 1."
)


def verify(
    model: Annotated[str, typer.Argument(help="A checkpoint's folder, or its name on the hub.")],
    policy: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Check this policy instead, with the artefacts in the store; may be repeated.",
        ),
    ] = None,
    think_start: ThinkStart = None,
    think_end: ThinkEnd = None,
    json_output: JsonOption = False,
) -> None:
    """See :data:`HELP`."""
    from steering.policy_errors import PolicyErrors
    from steering.policy_files import check_policy_files
    from steering.thinking_markers import given_markers

    with command_output(json_output) as out:
        thinking = given_markers(think_start, think_end)
        policies, errors = check_policy_files(policy or [])
        if errors:
            raise PolicyErrors(errors)
        out.note("loading the model twice: once for the reference, once in vLLM")
        with _engine_environment(), progress_reporter(out) as progress:
            from server import verify as check

            found = check.verify(
                model, list(policies.values()), thinking=thinking, progress=progress
            )
        out.result(_document(model, found))
        out.table(_table(found))
        if not found.holds:
            out.fail_check()


@contextmanager
def _engine_environment() -> Iterator[None]:
    """The environment of an engine in this process, whose own words go to standard error."""
    from server.launch import set_environment
    from steering.engine.settings import EngineSettings
    from steering.engine.touchpoints import check_version

    before = dict(os.environ)
    set_environment(EngineSettings())
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    check_version()
    sys.stdout.flush()
    # Libraries below Python write to the file descriptor.
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stdout.flush()
        os.dup2(stdout, 1)
        os.close(stdout)
        os.environ.clear()
        os.environ.update(before)


def _document(model: str, found: Verification) -> dict[str, Any]:
    return {
        "model": model,
        "holds": found.holds,
        "floor": _number(found.floor),
        "bound": _number(found.bound),
        "tokens": found.tokens,
        "rows": [
            {
                "site": finding.check.site,
                "edit": finding.check.edit,
                "verdict": finding.verdict,
                "difference": _number(finding.difference),
                "effect": _number(finding.effect),
                "reason": finding.reason,
            }
            for finding in found.findings
        ],
    }


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _table(found: Verification) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=f"{found.tokens} tokens, bound {found.bound:.1e} nats",
        caption="largest differences in nats; floor: of unsteered answers; "
        "effect: by how much the edit moves a log-probability",
    )
    for heading in ("site", "edit", "difference", "floor", "effect", "verdict"):
        table.add_column(heading, overflow="fold")
    for finding in found.findings:
        cells = [
            finding.check.site,
            finding.check.edit,
            _shown(finding.difference),
            _shown(found.floor if finding.difference is not None else None),
            _shown(finding.effect),
        ]
        table.add_row(*(Text(cell) for cell in cells), _verdict(finding))
    return table


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _verdict(finding: Finding) -> Text:
    from rich.text import Text

    said = finding.verdict if finding.reason is None else f"{finding.verdict}: {finding.reason}"
    if finding.verdict == "pass":
        return Text(said, style="green")
    return Text(said, style="yellow" if finding.holds else "bold red")
