"""``trimtab policy``: check policies before a server is asked to run them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from directions.errors import TrimtabError
from server.cli.output import JsonOption, command_output, progress_reporter
from server.cli.thinking_flags import ThinkEnd, ThinkStart

if TYPE_CHECKING:
    from rich.table import Table

    from steering.edits.scope import ScopePart
    from steering.gates import Gate
    from steering.plan import Plan
    from steering.policy import Edit, Policy
    from steering.policy_errors import PolicyError

app = typer.Typer(no_args_is_help=True, help="Check policies.")


@app.callback()
def policy() -> None:
    """Keep ``validate`` a subcommand: with one command alone, typer would leave its name out."""


@app.command()
def validate(
    paths: Annotated[
        list[Path], typer.Argument(metavar="FILE…", help="Policy files, or folders of them.")
    ],
    model: Annotated[
        str | None,
        typer.Option(help="Also compile for this checkpoint, with the directions in the store."),
    ] = None,
    artefacts: Annotated[
        bool, typer.Option("--artefacts", help="Also load every artefact that is named.")
    ] = False,
    relative_ceiling: Annotated[
        float, typer.Option(help="Largest relative strength that may be reached.", min=0.0)
    ] = 1.0,
    think_start: ThinkStart = None,
    think_end: ThinkEnd = None,
    json_output: JsonOption = False,
) -> None:
    """Check policies: their text, and with --model what they come to on a checkpoint.

    Ends with 0 if all is well, with 1 if anything is wrong.
    """
    from directions.checkpoint import local_checkpoint
    from directions.store import Store
    from steering.plan import compile_policy, fingerprint_warnings
    from steering.policy_errors import PolicyErrors
    from steering.policy_files import check_policy_files, unresolved_artefacts
    from steering.thinking_markers import detect_markers, given_markers

    with command_output(json_output) as out:
        thinking = given_markers(think_start, think_end)
        files = _files(paths)
        policies, found = check_policy_files(files)
        errors = list(found)
        warnings: list[PolicyError] = []
        plans: dict[Path, Plan] = {}
        if model is not None:
            from directions.fingerprint import fingerprint

            with progress_reporter(out) as progress:
                served = fingerprint(model, progress=progress)
            thinking = thinking or detect_markers(local_checkpoint(model))
            for path, policy in policies.items():
                try:
                    plans[path] = compile_policy(
                        policy,
                        Store(),
                        served,
                        relative_ceiling=relative_ceiling,
                        thinking=thinking,
                    )
                except PolicyErrors as error:
                    errors.extend(error.located(file=str(path)).errors)
                warnings.extend(_in_file(path, fingerprint_warnings(policy, Store(), served)))
        elif artefacts:
            for path, policy in policies.items():
                errors.extend(_in_file(path, unresolved_artefacts(policy, Store())))
        out.result(
            {
                "valid": not errors,
                "policies": [_summary(path, p, plans.get(path)) for path, p in policies.items()],
                "errors": [error.to_dict() for error in errors],
                "warnings": [warning.to_dict() for warning in warnings],
            }
        )
        if policies:
            out.table(_policies_table(policies))
        if warnings:
            out.table(_faults_table("Warnings", warnings))
        if errors:
            out.table(_faults_table("Errors", errors))
            out.fail_check()
        if not policies:
            out.note("no policy files found")


def _files(paths: Iterable[Path]) -> list[Path]:
    """The files that the arguments name, each once, folders replaced by the policies in them."""
    from steering.policy_files import policy_paths

    files: dict[Path, None] = {}
    for path in paths:
        if not path.exists():
            raise TrimtabError("E_POLICY_FILE", "no such file or folder", field=str(path))
        files.update(dict.fromkeys(policy_paths(path) if path.is_dir() else [path]))
    return list(files)


def _in_file(path: Path, faults: Iterable[PolicyError]) -> list[PolicyError]:
    return [replace(fault, file=str(path)) for fault in faults]


def _summary(path: Path, policy: Policy, plan: Plan | None) -> dict[str, Any]:
    return {
        "file": str(path),
        "name": policy.name,
        "version": policy.version,
        "mode": policy.mode,
        "onFailure": policy.on_failure,
        "strengthRange": list(policy.strength_range),
        "edits": {
            name: {
                "kind": edit.kind,
                "scope": [_part_json(part) for part in edit.scope],
                **edit.spec.references,
            }
            for name, edit in policy.edits.items()
        },
        "gates": {name: _gate_json(gate) for name, gate in policy.gates.items()},
        "identity": policy.identity,
        "plan": plan.id if plan is not None else None,
    }


def _part_json(part: ScopePart) -> str | dict[str, int]:
    return part if isinstance(part, str) else {"first": part.first}


def _gate_json(gate: Gate) -> dict[str, Any]:
    return gate.model_dump(mode="json", by_alias=True, exclude_none=True)


def _edit_text(name: str, edit: Edit) -> str:
    named = ", ".join(edit.spec.references.values())
    scope = ", ".join(p if isinstance(p, str) else f"first {p.first}" for p in edit.scope)
    return f"{name}: {edit.kind} {named}{' ' if named else ''}({scope})"


def _gate_text(name: str, gate: Gate) -> str:
    if gate.between is not None:
        opens = f"between {gate.between[0]:g} and {gate.between[1]:g}"
    else:
        opens = f"above {gate.above:g}" if gate.above is not None else f"below {gate.below:g}"
    read = f"{gate.probe}[{gate.output}]"
    return f"{name}: {read} {opens} at {gate.at} opens {', '.join(gate.then)}"


def _policies_table(policies: dict[Path, Policy]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Policies")
    gated = any(policy.gates for policy in policies.values())
    for heading in ("name", "version", "mode", "edits", *(["gates"] if gated else []), "identity"):
        table.add_column(heading)
    for policy in policies.values():
        cells = [
            policy.name,
            str(policy.version),
            policy.mode,
            "\n".join(_edit_text(name, edit) for name, edit in policy.edits.items()),
            policy.identity[:12],
        ]
        if gated:
            gates = [_gate_text(name, gate) for name, gate in policy.gates.items()]
            cells.insert(4, "\n".join(gates))
        # As Text, because a name may hold what rich would take for markup.
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _faults_table(title: str, faults: Iterable[PolicyError]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title)
    for heading in ("file", "path", "code", "message"):
        table.add_column(heading, overflow="fold")
    for fault in faults:
        file = fault.file or ""
        place = file if fault.line is None else f"{file}:{fault.line}"
        table.add_row(*(Text(cell) for cell in (place, fault.field, fault.code, fault.message)))
    return table
