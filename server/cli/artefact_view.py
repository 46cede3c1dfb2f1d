"""What a person sees of an artefact: its card in two columns, and a picture of what it holds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from server.cli.output import Output

if TYPE_CHECKING:
    from directions.store import Artefact, Direction, HeadSet, Probe

# Two of these and the figures fit into 80 columns.
_BAR = 20
# What a screen takes of a list; all of it is in the JSON document.
_MOST_ROWS = 64


def described(artefact: Artefact) -> tuple[str, dict[str, Any]]:
    """Where in the model an artefact is, in a few words, and as fields of a JSON row."""
    from directions.store import Direction, Probe

    if isinstance(artefact, Direction):
        layers = artefact.card.layers
        return f"layers {layer_ranges(layers)}", {"layers": list(layers)}
    if isinstance(artefact, Probe):
        card = artefact.card
        fields = {"site": card.site, "layer": card.layer, "outputs": list(card.outputs)}
        where = "final norm" if card.layer is None else f"after layer {card.layer}"
        return where, fields
    heads = artefact.heads
    layers = tuple(sorted({layer for layer, _ in heads}))
    where = f"{_counted(len(heads), 'head')} in {layer_ranges(layers)}"
    return where, {"layers": list(layers), "heads": len(heads)}


def show_artefact(out: Output, artefact: Artefact) -> None:
    """Print an artefact of any kind; the JSON document is its card and what it holds."""
    from rich.table import Table

    from directions.store import Direction, Probe

    card = artefact.card
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    facts.add_row(card.kind, artefact.reference)
    facts.add_row("sha256", artefact.sha256)
    facts.add_row("method", card.method + (f" at {card.position}" if card.position else ""))
    facts.add_row("description", card.description)
    model = card.model
    facts.add_row(
        "model", f"{model.architecture}, {model.num_layers} layers of {model.hidden_size}"
    )
    if isinstance(artefact, Probe):
        layer = artefact.card.layer
        facts.add_row(
            "site", "final norm" if layer is None else f"residual stream after layer {layer}"
        )
        facts.add_row("read-out", artefact.card.read_out)
        if artefact.card.calibration:
            facts.add_row("calibration", _figures(artefact.card.calibration))
    for source in card.sources:
        facts.add_row(source.role, f"{source.name}, {source.rows} rows, {source.licence or '?'}")
    summary = {key: value for key, value in card.quality.items() if "." not in key}
    if summary:
        facts.add_row("quality", _figures(summary))
    facts.add_row("made", f"{card.created} in {card.dtype}")
    out.table(facts)

    if isinstance(artefact, Direction):
        held = _show_layers(out, artefact)
    elif isinstance(artefact, Probe):
        held = _show_outputs(out, artefact)
    else:
        held = _show_heads(out, artefact)
    out.result(
        {
            "reference": artefact.reference,
            "sha256": artefact.sha256,
            "card": card.model_dump(mode="json"),
            **held,
        }
    )


def _show_layers(out: Output, direction: Direction) -> dict[str, Any]:
    """A direction's layers, as bars."""
    import numpy as np
    from rich.table import Table

    card = direction.card
    norms = np.linalg.norm(direction.vectors, axis=1)
    picture = Table(box=None, pad_edge=False)
    picture.add_column("layer", justify="right")
    picture.add_column("length", justify="right")
    picture.add_column("", min_width=_BAR, no_wrap=True)
    picture.add_column("of norm", justify="right", no_wrap=True)
    picture.add_column("separation", justify="right", no_wrap=True)
    picture.add_column("", min_width=_BAR, no_wrap=True)
    separations = [card.quality.get(f"separation.{layer}") for layer in card.layers]
    best = max((value for value in separations if value is not None), default=0.0)
    layers = []
    for layer, separation in zip(card.layers, separations, strict=True):
        length, activation = float(norms[layer]), card.activation_norms[layer]
        share = length / activation if activation else None
        picture.add_row(
            str(layer),
            f"{length:.3g}",
            bar(length, float(norms.max())),
            "" if share is None else f"{share:.1%}",
            "" if separation is None else f"{separation:.2f}",
            "" if separation is None else bar(separation, best),
        )
        layers.append(
            {
                "layer": layer,
                "length": length,
                "activation_norm": activation,
                "separation": separation,
            }
        )
    out.table(picture)
    return {"layers": layers}


def _show_outputs(out: Output, probe: Probe) -> dict[str, Any]:
    """A probe's outputs: what a policy writes for each, and how long its weights are."""
    import numpy as np
    from rich.table import Table

    picture = Table(box=None, pad_edge=False)
    picture.add_column("output", justify="right")
    picture.add_column("name", overflow="fold")
    picture.add_column("length", justify="right")
    picture.add_column("bias", justify="right")
    outputs = []
    # In float64, so that no length that float32 can hold becomes infinite here.
    lengths = np.linalg.norm(probe.weights.astype(np.float64), axis=1)
    for index, name in enumerate(probe.card.outputs):
        length, bias = float(lengths[index]), float(probe.bias[index])
        picture.add_row(str(index), name, f"{length:.3g}", f"{bias:.3g}")
        outputs.append({"output": index, "name": name, "length": length, "bias": bias})
    out.table(picture)
    return {"outputs": outputs}


def _show_heads(out: Output, head_set: HeadSet) -> dict[str, Any]:
    """A head set's heads in their order, the size of their evidence as bars."""
    from rich.table import Table

    picture = Table(box=None, pad_edge=False)
    picture.add_column("layer", justify="right")
    picture.add_column("head", justify="right")
    picture.add_column("evidence", justify="right")
    picture.add_column("", min_width=_BAR, no_wrap=True)
    evidence = [float(value) for value in head_set.evidence]
    largest = max(abs(value) for value in evidence)
    heads = [
        {"layer": layer, "head": head, "evidence": value}
        for (layer, head), value in zip(head_set.heads, evidence, strict=True)
    ]
    for (layer, head), value in list(zip(head_set.heads, evidence, strict=True))[:_MOST_ROWS]:
        picture.add_row(str(layer), str(head), f"{value:.3g}", bar(abs(value), largest))
    out.table(picture)
    if len(heads) > _MOST_ROWS:
        out.note(f"… and {_counted(len(heads) - _MOST_ROWS, 'more head')}: --json has them all")
    return {"heads": heads}


def _figures(figures: dict[str, float]) -> str:
    return ", ".join(f"{key} {value:.3g}" for key, value in sorted(figures.items()))


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def layer_ranges(layers: Iterable[int]) -> str:
    """Ascending layers as people write them: ``0-3,7``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def bar(value: float, longest: float, width: int = _BAR) -> str:
    """A horizontal bar, to an eighth of a character."""
    if longest <= 0 or value <= 0:
        return ""
    eighths = round(min(1.0, value / longest) * width * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
