"""How every picture of the zoo looks, and the bytes it becomes."""

from __future__ import annotations

import io

from matplotlib.axes import Axes
from matplotlib.figure import Figure

MAIN, TRAINED, UNTRAINED, INK, FAINT = "#2a6fad", "#8db4d6", "#bfc3c9", "#23272e", "#e3e5e8"
LINES = (MAIN, "#c2571a", "#3c8d5a", "#8a5a9e", "#8c7a2b", "#5b6470")


def plain(axes: Axes) -> None:
    """No frame, faint marks, small labels."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.tick_params(labelsize=9, color=FAINT, labelcolor=INK)
    axes.xaxis.label.set(size=9, color=INK)
    axes.yaxis.label.set(size=9, color=INK)
    axes.set_axisbelow(True)


def png(figure: Figure) -> bytes:
    """Without the name and version of the program in it: the same numbers give the same bytes."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=160, metadata={"Software": None})
    return file.getvalue()
