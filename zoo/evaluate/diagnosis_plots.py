"""The pictures of a diagnosis: saliency by layer, what hiding or exchanging the image costs, and where the gradient went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from zoo.evaluate._style import FAINT, INK, LINES, MAIN, UNTRAINED, plain, png

_FLOWS = {"visual": "S_v, from the image", "text": "S_t, from the text", "other": "S_o, everything else"}
_SUBSETS = {"all": "All", "short_query": "Short query", "short_target": "Short target"}


def pictures(diagnosis: Mapping[str, Any]) -> dict[str, bytes]:
    """PNG by name for each part that was measured."""
    found = {}
    if "saliency" in diagnosis:
        found["saliency"] = saliency_plot({"": diagnosis["saliency"]["layers"]})
    if "shapley" in diagnosis or "permutation" in diagnosis:
        found["modalities"] = modality_plot(diagnosis)
    if "gradients" in diagnosis:
        found["gradients"] = gradient_plot(diagnosis["gradients"])
    return found


def saliency_plot(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """PNG of the shares of S_v, S_t and S_o over the layers, a panel each, a line a run, with the scatter between batches.

    Args:
        runs: By name, the layers as ``diagnosis.json`` has them.
    """
    figure = Figure(figsize=(9, 3.1), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for one, (flow, title) in zip(axes, _FLOWS.items(), strict=True):
        for i, (name, layers) in enumerate(runs.items()):
            rows = [(layer["layer"], layer["shares"][flow], layer["spread"][flow]) for layer in layers]
            places, shares, spread = np.array(rows, np.float64).T  # None, where nothing flows, becomes NaN
            colour = LINES[i % len(LINES)]
            one.plot(places, shares, "o-", color=colour, markersize=4, linewidth=1.6, label=name)
            one.fill_between(places, shares - spread, shares + spread, color=colour, alpha=0.15, linewidth=0)
        one.axhline(1 / 3, color=FAINT, linewidth=1, zorder=0)
        one.set_title(title, fontsize=10, loc="left", color=INK)
        one.set_xlabel("layer")
        one.set_ylim(-0.03, 1)
        one.xaxis.set_major_locator(MaxNLocator(integer=True))
        plain(one)
    axes[0].set_ylabel("share of the layer")
    if len(runs) > 1:
        axes[-1].legend(frameon=False, fontsize=8)
    return png(figure)


def modality_plot(diagnosis: Mapping[str, Any]) -> bytes:
    """PNG of recall with modalities hidden and with images exchanged, a panel for each subset of the queries."""
    bars: dict[str, dict[str, float]] = {}  # label: {subset: recall}
    for record in diagnosis.get("shapley", {}).get("missing", []):
        bars.setdefault(" + ".join(record["shown"]) or "nothing (chance)", {})[record["subset"]] = record["recall"]
    for record in diagnosis.get("permutation", {}).get("records", []):
        bars.setdefault("images permuted", {})[record["subset"]] = record["permuted"]
        if "shapley" not in diagnosis:
            bars.setdefault("as they are", {})[record["subset"]] = record["recall"]
    panels = [name for name in _SUBSETS if any(name in row for row in bars.values())]
    figure = Figure(figsize=(9, 1.1 + 0.32 * len(bars)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    places = np.arange(len(bars))[::-1]
    reach = max(max(row.values()) for row in bars.values())
    for one, panel in zip(axes, panels, strict=True):
        recalls = [row[panel] for row in bars.values()]
        one.barh(places, recalls, height=0.66, color=[UNTRAINED if "(" in name or "permuted" in name else MAIN for name in bars])
        for place, recall in zip(places, recalls, strict=True):
            one.text(recall + 0.015 * reach, place, f"{recall:.3f}", va="center", fontsize=8.5, color=INK)
        one.set_title(_SUBSETS[panel], fontsize=10, loc="left", color=INK)
        one.set_xlim(0, reach * 1.2 or 1)
        one.set_xlabel(f"recall@{diagnosis['metric']['k']}")
        one.xaxis.set_major_locator(MaxNLocator(4))
        one.tick_params(axis="y", length=0)
        plain(one)
    axes[0].set_yticks(places, list(bars))
    return png(figure)


def gradient_plot(gradients: Mapping[str, Any]) -> bytes:
    """PNG of each modality's share of the squared gradient norm over the training steps."""
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.stackplot(gradients["steps"], *gradients["shares"].values(), labels=list(gradients["shares"]), colors=LINES, alpha=0.75)
    axes.set_xlabel("step")
    axes.set_ylabel("share of the gradient")
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, ncols=4, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1))
    plain(axes)
    return png(figure)
