"""``trimtab trace``: one prompt, its answer, and what a probe read at every token."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from directions.errors import TrimtabError
from server.cli.output import JsonOption
from server.cli.remote import ApiKey, remote_output
from server.printable import printable

if TYPE_CHECKING:
    from server.score_trace import ScoreTrace
    from server.steering_client import SteeringClient

HELP: Final = (
    "Ask a running server one question and show a probe's score at every token of the answer.\n\n"
    "The answer is printed with each token on the colour of its own score; without colours (in a "
    "pipe, or with NO_COLOR) the scores stand in a column instead. --output draws the curve; that "
    "needs matplotlib, which Trimtab's extra 'pictures' brings."
)


def trace(
    prompt: Annotated[str, typer.Argument(help="What the user says.")],
    url: Annotated[str, typer.Option(metavar="URL", help="The server, such as 127.0.0.1:8000.")],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The model's name; the first of the server's without an '@'."
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(metavar="POLICY", help="The policy; the server's default unless given."),
    ] = None,
    probe: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="The probe, such as refusal@2; the first unless given."),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Longest answer; the server's own limit unless given."
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(metavar="T", help="0 for the likeliest tokens; the server's unless given."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the curve into this file.")
    ] = None,
    api_key: ApiKey = None,
    json_output: JsonOption = False,
) -> None:
    """See :data:`HELP`."""
    from rich.text import Text

    from server.cli.trace_view import show_trace
    from server.score_trace import read_trace
    from server.steering_client import SteeringClient

    with remote_output(json_output) as out:
        _check_text(("PROMPT", prompt), ("--model", model), ("--policy", policy))
        _check_temperature(temperature)
        if output is not None:
            _check_output(output)
        with SteeringClient(url, api_key) as client:
            chosen = model or _first_model(client)
            with out.notes.status(Text(f"{printable(chosen)} answers"), spinner="line"):
                answer = client.chat(_body(chosen, prompt, policy, max_tokens, temperature))
        found = read_trace(answer, chosen, probe)
        show_trace(out, found)
        others = [key for key in found.report.probes if key != found.probe]
        if others:
            out.note(printable(f"other probes (--probe): {', '.join(others)}"))
        if output is not None:
            from server.score_picture import draw

            draw(found, output)
            out.note(f"drew {output}")
        out.result(_document(found, output))


def _check_text(*given: tuple[str, str | None]) -> None:
    """Refuse what JSON cannot carry: bytes on the command line that are no text."""
    for field, value in given:
        try:
            (value or "").encode()
        except UnicodeEncodeError as error:
            message = "this is not valid UTF-8"
            raise TrimtabError("E_OPTION", message, field=field, expected="text") from error


def _check_temperature(temperature: float | None) -> None:
    if temperature is not None and not (math.isfinite(temperature) and temperature >= 0):
        message = f"{temperature:g} is no temperature"
        raise TrimtabError("E_OPTION", message, field="--temperature", expected="0 or more")


def _check_output(output: Path) -> None:
    """Find out before the server is asked whether the picture can be drawn and has a place."""
    from server.score_picture import require_matplotlib

    if output.suffix.lower() != ".png":
        message = f"{str(output)!r} is no PNG file"
        raise TrimtabError("E_OPTION", message, field="--output", expected="a name that ends .png")
    if not output.parent.is_dir() or output.is_dir():
        message = f"{output} is a folder" if output.is_dir() else f"no folder {output.parent}"
        raise TrimtabError("E_OPTION", message, field="--output", expected="a file in a folder")
    require_matplotlib()


def _first_model(client: SteeringClient) -> str:
    names = client.models()
    for name in names:
        if "@" not in name:
            return name
    message = "every name that the server lists holds an '@', so which is the model is not clear"
    raise TrimtabError("E_OPTION", message, field="--model", expected=printable(", ".join(names)))


def _body(
    model: str, prompt: str, policy: str | None, max_tokens: int | None, temperature: float | None
) -> dict[str, Any]:
    """The request; what is not given is left to the server."""
    steering: dict[str, Any] = {"trace": True}
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        # For the texts of the tokens, which nothing else in an answer tells.
        "logprobs": True,
        "steering": steering,
    }
    if policy is not None:
        steering["policy"] = policy
    if max_tokens is not None:
        body["max_completion_tokens"] = max_tokens
    if temperature is not None:
        body["temperature"] = temperature
    return body


def _document(trace: ScoreTrace, output: Path | None) -> dict[str, Any]:
    report = trace.report
    return {
        "model": trace.model,
        "policy": report.policy,
        "mode": report.mode,
        "applied": report.applied,
        "reason": report.reason,
        "strength": report.strength,
        "gates": report.gates,
        "probe": trace.probe,
        "probes": list(report.probes),
        "summary": trace.summary.model_dump(exclude={"trace"}),
        "prompt_end": trace.prompt_end,
        "phases": [list(run) for run in trace.phases],
        "trace": [list(pair) for pair in trace.scores],
        "tokens": [
            {
                "text": token.text,
                "position": token.position,
                "phase": token.phase,
                "score": token.score,
            }
            for token in trace.tokens
        ],
        "text": trace.text,
        "finish_reason": trace.finish_reason,
        "picture": None if output is None else str(output),
    }
