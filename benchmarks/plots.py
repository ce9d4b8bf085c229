"""Pictures of what `make bench` stored: time and memory of every contender against the number of rows, for docs/.

python -m benchmarks.plots
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from zoo.bench import RESULTS, Record, load, machines
from zoo.errors import ZooError
from zoo.files import write_bytes

COLOURS = {
    "ours": "#2a6fad",
    "ours chunked": "#8db4d6",
    "ours reference": "#bfc3c9",
    "open_clip": "#c2571a",
    "open_clip compiled": "#e39a6b",
    "inf_cl": "#3c8d5a",
    "torch linear_cross_entropy": "#8a5a9e",
    "liger": "#8c7a2b",
    "cut-cross-entropy": "#5b6470",
    "cut-cross-entropy exact": "#a3543f",
    "sentence-transformers": "#23272e",
    "sentence-transformers cached": "#6f7782",
}
DIM = 512
DTYPES = {"cpu": "fp32", "cuda": "bf16"}


def curves(records: Sequence[Record], value: Callable[[Record], float | None]) -> dict[str, list[tuple[int, float]]]:
    """{contender: (rows, value) by rows} of the symmetric loss, forward and backward, at `DIM`; without what was not measured."""
    chosen = [
        (record.contender, record.case.rows, found)
        for record in records
        if record.case.direction == "both" and record.case.backward and record.case.scale == 50
        if record.case.dim == DIM and record.case.dtype == DTYPES[record.case.device]
        if (found := value(record)) is not None
    ]
    lines = {name: sorted((rows, found) for other, rows, found in chosen if other == name) for name in COLOURS}
    return {name: points for name, points in lines.items() if points}


def missing(records: Sequence[Record]) -> dict[str, str]:
    """{contender: reason} of those that were not measured in any case."""
    measured = {record.contender for record in records if record.timing is not None}
    return {r.contender: r.missing for r in records if r.contender not in measured and r.missing is not None}


def picture(by_machine: dict[str, list[Record]], value: Callable[[Record], float | None], axis: str) -> bytes:
    """PNG with a panel for each machine; below it, who is not in it and why."""
    figure = Figure(figsize=(7.5, 4.6 * len(by_machine) + 0.6), layout="constrained")
    panels = figure.subplots(len(by_machine), 1, squeeze=False)[:, 0]
    for panel, (name, records) in zip(panels, by_machine.items(), strict=True):
        _draw(panel, name, curves(records, value), axis)
        if absent := missing(records):
            panel.annotate(
                "\n".join(f"not measured: {one}: {why}" for one, why in absent.items()),
                (0, -0.16), xycoords="axes fraction", va="top", fontsize=7, color="#6f7782", annotation_clip=False,
            )  # fmt: skip
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=160, metadata={"Software": None}, bbox_inches="tight")
    return file.getvalue()


def _draw(panel: Axes, name: str, lines: dict[str, list[tuple[int, float]]], axis: str) -> None:
    for contender, points in lines.items():
        panel.plot(
            *zip(*points, strict=True), marker="o", markersize=4, color=COLOURS[contender], label=contender,
            linewidth=2.4 if contender == "ours" else 1.3, zorder=3 if contender == "ours" else 2,
        )  # fmt: skip
    sizes = sorted({rows for points in lines.values() for rows, _ in points})
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.set_xticks(sizes, [f"{rows:,}" for rows in sizes])
    panel.set_xlabel("rows of each side")
    panel.set_ylabel(axis)
    panel.set_title(f"{name}: symmetric, forward and backward, D={DIM}", fontsize=10, loc="left")
    panel.grid(color="#e3e5e8", linewidth=0.8)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=8)


def draw(results: Path, out: Path) -> list[Path]:
    """Write ``contrastive_time.png`` and ``contrastive_memory.png`` into ``out``.

    Raises:
        ZooError: If there are no results.
    """
    found = {name: load(path) for name, path in machines(results).items()}
    if not found:
        raise ZooError(f"no results in {results}: make some with: make bench")
    values: dict[str, tuple[Callable[[Record], float | None], str]] = {
        "time": (lambda record: record.timing and record.timing.seconds, "seconds of a call (CPU: of the process)"),
        "memory": (lambda record: record.memory and record.memory / 2**20, "MiB above the inputs"),
    }
    return [write_bytes(out / f"contrastive_{name}.png", picture(found, value, axis)) for name, (value, axis) in values.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    given = parser.parse_args()
    print("\n".join(map(str, draw(given.results, given.out))))


if __name__ == "__main__":
    main()
