"""The two pictures of a run: how the loss fell, and how far recall reaches against what it has to beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from zoo.evaluate._style import FAINT, INK, LINES, MAIN, TRAINED, UNTRAINED, plain, png

__all__ = ["MAIN", "TRAINED", "UNTRAINED", "Bar", "loss_plot", "recall_plot"]


class Bar(NamedTuple):
    """One row of the recall picture."""

    label: str
    colour: str
    recall: Sequence[float | None]  # by panel; None: not measured
    low: Sequence[float | None]
    high: Sequence[float | None]


def loss_plot(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """PNG of the training loss of each arm over its steps, raw and smoothed, and of the learning rate of the first.

    Args:
        logs: By arm, the main one first, the lines of its log that hold ``step`` and ``loss``, and perhaps ``lr``.
    """
    first = next(iter(logs.values()))
    has_rate = any("lr" in line for line in first)
    figure = Figure(figsize=(9, 3.9 if has_rate else 3.1), layout="constrained")
    axes = figure.subplots(2 if has_rate else 1, 1, sharex=True, squeeze=False, height_ratios=(4, 1) if has_rate else None)[:, 0]
    for i, (name, lines) in enumerate(logs.items()):
        colour = LINES[i % len(LINES)]
        steps, losses = np.array([(line["step"], line["loss"]) for line in lines], np.float64).T
        window = max(1, len(losses) // 25)
        if window > 1:
            axes[0].plot(steps, losses, color=colour, alpha=0.22, linewidth=0.8)
        axes[0].plot(steps, _running_mean(losses, window), color=colour, linewidth=2 if i == 0 else 1.3, label=name, zorder=9 - min(i, 5))
    axes[0].set_ylabel("training loss")
    if len(logs) > 1:
        axes[0].legend(frameon=False, ncols=3, fontsize=9)
    if has_rate:
        rates = np.array([(line["step"], line["lr"]) for line in first if "lr" in line], np.float64).T
        axes[1].plot(*rates, color=INK, linewidth=1.2)
        axes[1].set_ylabel("lr")
        axes[1].set_ylim(bottom=0)
        axes[1].ticklabel_format(axis="y", scilimits=(0, 0))
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    for one in axes:
        one.grid(color=FAINT, linewidth=0.8)
        plain(one)
    return png(figure)


def recall_plot(bars: Sequence[Bar], panels: Sequence[str], axis: str) -> bytes:
    """PNG of recall with its 95 % intervals: one row per system, one panel per subset.

    Args:
        bars: From the top down.
        panels: Title of each panel.
        axis: What the numbers are, such as ``recall@10``.
    """
    figure = Figure(figsize=(9, 1.1 + 0.32 * len(bars)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    places = np.arange(len(bars))[::-1]
    reach = max(high for bar in bars for high in bar.high if high is not None)
    for i, (one, title) in enumerate(zip(axes, panels, strict=True)):
        for place, bar in zip(places, bars, strict=True):
            recall, low, high = bar.recall[i], bar.low[i], bar.high[i]
            if recall is None or low is None or high is None:
                continue
            one.barh(place, recall, height=0.66, color=bar.colour, zorder=2)
            one.plot([low, high], [place, place], color=INK, linewidth=1.1, solid_capstyle="butt", zorder=3)
            one.text(high + 0.015 * reach, place, f"{recall:.3f}", va="center", fontsize=8.5, color=INK)
        one.set_title(title, fontsize=10, loc="left", color=INK)
        one.set_xlim(0, reach * 1.2 or 1)
        one.set_xlabel(axis)
        one.xaxis.set_major_locator(MaxNLocator(4))
        one.grid(axis="x", color=FAINT, linewidth=0.8)
        one.tick_params(axis="y", length=0)
        plain(one)
    axes[0].set_yticks(places, [bar.label for bar in bars])
    return png(figure)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred; at the ends over what is there, so that the curve neither lags nor drops to 0."""
    ones = np.ones(window)
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")
