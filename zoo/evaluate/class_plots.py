"""The picture of a classifier's run: whether a modality that is unsure is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from zoo.evaluate._style import FAINT, INK, LINES, plain, png


def pictures(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, bytes]:
    """PNG by name for what the arms of a run measured.

    Args:
        arms: As in ``metrics.json``.
    """
    curves = {f"{arm}, {name}": curve for arm, found in arms.items() for name, curve in found.get("entropy", {}).items()}
    return {"reliability": reliability_plot(curves)} if curves else {}


def reliability_plot(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> bytes:
    """PNG of error against entropy, a line a modality of an arm.

    Args:
        curves: As of `zoo.evaluate.classification.entropy_and_error`.
    """
    figure = Figure(figsize=(9, 3.1), layout="constrained")
    axes = figure.subplots()
    for i, (name, curve) in enumerate(curves.items()):
        places, errors = [part["entropy"] for part in curve], [part["error"] for part in curve]
        axes.plot(places, errors, "o-", color=LINES[i % len(LINES)], markersize=4, linewidth=1.6, label=name)
    axes.set_xlabel("entropy, nats")
    axes.set_ylabel("error", color=INK)
    axes.set_ylim(-0.03, 1.03)
    axes.grid(color=FAINT, linewidth=0.8)
    axes.legend(frameon=False, fontsize=8, ncols=3)
    plain(axes)
    return png(figure)
