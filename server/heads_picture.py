"""The evidence for every attention head as a picture: layers across, heads upwards.

Red heads suppress the objective (it rises when they are taken away), blue ones carry it; those that the
head set takes are framed.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from directions.atomic import write_file
from directions.errors import TrimtabError
from server.score_picture import require_matplotlib

if TYPE_CHECKING:
    from directions.head_tracing import HeadTrace

WIDTH: Final = 1800
_DPI: Final = 200


def check_picture(path: Path) -> None:
    """Find out before anything slow whether the picture can be drawn and has a place.

    Raises:
        TrimtabError: ``E_OPTION``, ``E_DEPENDENCY``.
    """
    if path.suffix.lower() != ".png" or not path.parent.is_dir() or path.is_dir():
        raise TrimtabError(
            "E_OPTION",
            f"{str(path)!r} is no PNG file in a folder that is there",
            field="--picture",
            expected="a name that ends .png",
        )
    require_matplotlib()


def draw(trace: HeadTrace, path: Path) -> None:
    """Draw the evidence into a PNG file 1800 pixels wide, in one step.

    Args:
        trace: the evidence and which heads were taken.
        path: the file; replaced if it is there.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    layers, heads = trace.evidence.shape
    height = min(max(3.0, 9.0 * heads / max(layers, 1) + 1.6), 9.0)
    figure = Figure(figsize=(WIDTH / _DPI, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # Symmetric, so that no evidence is white.
    most = float(np.abs(trace.evidence).max()) or 1.0
    image = axes.imshow(
        trace.evidence.T, cmap="RdBu_r", vmin=-most, vmax=most, origin="lower", aspect="auto"
    )
    for layer, head in trace.heads:
        axes.add_patch(
            Rectangle((layer - 0.5, head - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=1.5)
        )
    axes.set_xlabel("layer")
    axes.set_ylabel("head")
    axes.set_xticks(range(0, layers, max(1, layers // 15)))
    axes.set_yticks(range(0, heads, max(1, heads // 12)))
    axes.set_title(f"{trace.card.method}: {trace.card.settings['objective']}"[:90], fontsize=9)
    figure.colorbar(image, ax=axes, label="rise when the head is taken away")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_file(path, buffer.getvalue())
