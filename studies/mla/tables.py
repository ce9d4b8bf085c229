"""The tables of docs/classification.md, in the layouts of MLA's paper, from the results beside this file.

    python studies/mla/tables.py

A table whose results are not there yet is left out. Written to tables.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.files import write_text
from zoo.metric import subset_name

HERE = Path(__file__).parent
ABLATION = {  # cell: gradient modification, dynamic fusion
    "mla_free_equal": ("", ""),
    "mla_equal": ("x", ""),
    "mla_free": ("", "x"),
    "mla": ("x", "x"),
}


def read(name: str) -> list[Mapping[str, Any]]:
    """The cells of a study; [] where it was not made."""
    path = HERE / f"{name}.json"
    return json.loads(path.read_text())["cells"] if path.is_file() else []


def spread(cell: Mapping[str, Any], shown: str, subset: str = "all") -> str:
    """Accuracy in per cent, mean and standard deviation over seeds."""
    found = next((m for m in cell["metrics"] if (m["input"], m["subset"]) == (shown, subset)), None)
    if found is None:
        return "–"
    return f"{100 * found['mean']:.1f}" + (f" ± {100 * found['std']:.1f}" if found["std"] is not None else "")


def difference(cell: Mapping[str, Any]) -> str:
    """From the reference, of the whole test split, with its interval and the seeds it has the same sign in."""
    found = next(m for m in cell["metrics"] if (m["input"], m["subset"]) == ("all", "all"))["difference"]
    if found is None:
        return ""
    above = sum(d > 0 for d in found["by_seed"].values())
    low, high, mean = (100 * found[key] for key in ("low", "high", "mean"))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}], {above} of {len(found['by_seed'])}"


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown; nothing where there are no rows."""
    if not rows:
        return []
    return [f"### {title}", "", *(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)), ""]


def inputs_of(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """The single modalities, then all."""
    shown = list(dict.fromkeys(m["input"] for cell in cells for m in cell["metrics"]))
    return [name for name in shown if "+" not in name and name != "all"] + ["all"]


def subsets_of(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """All rows, then those with something missing."""
    return list(dict.fromkeys(m["subset"] for cell in cells for m in cell["metrics"]))


def modalities(title: str, name: str, against: str = "concat") -> list[str]:
    """Table 1: what each modality alone and all together reach, and by how much more than ``against``."""
    cells = read(name)
    shown = inputs_of(cells)
    rows = [[cell["cell"], *(spread(cell, one) for one in shown), difference(cell)] for cell in cells]
    return table(title, ["method", *shown, f"all, from {against} (seeds above)"], rows)


def missing(title: str, name: str) -> list[str]:
    """Table 2, in test: accuracy of all that is there, at every rate."""
    cells = read(name)
    subsets = subsets_of(cells)
    heads = ["method", *("complete" if s == "all" else subset_name(s) for s in subsets)]
    return table(title, heads, [[cell["cell"], *(spread(cell, "all", s) for s in subsets)] for cell in cells])


def missing_in_training(names: Sequence[str]) -> list[str]:
    """Table 2, in training: half of a modality's training cells were missing; complete rows and such rows in test."""
    found = {name: {cell["cell"]: cell for cell in read(f"three_without_{name}")} for name in names}
    complete = {cell["cell"]: cell for cell in read("three")}
    cells = list(dict.fromkeys(cell for of in found.values() for cell in of))
    heads = ["method", "nothing missing", *(f"half of {n}{where}" for n in names for where in ("", ", and in test"))]
    rows = []
    for cell in cells:
        short = cell.partition(",")[0]
        row = [short, spread(complete[short], "all") if short in complete else "–"]
        for name, of in found.items():
            row += [spread(of[cell], "all"), spread(of[cell], "all", f"missing_{name}:50")] if cell in of else ["–", "–"]
        rows.append(row)
    return table("Missing in training", heads, rows)


def ablation(title: str, name: str) -> list[str]:
    """Table 3: gradient modification and dynamic fusion, each with and without."""
    cells = {cell["cell"]: cell for cell in read(name)}
    shown = inputs_of(list(cells.values()))
    rows = [[*marks, *(spread(cells[cell], one) for one in shown)] for cell, marks in ABLATION.items() if cell in cells]
    return table(title, ["gradient modification", "dynamic fusion", *shown], rows)


def main() -> None:
    lines = [
        *modalities("Two modalities: each alone, and both", "main"),
        *missing("Two modalities: missing in test", "main"),
        *ablation("Two modalities: what MLA is made of", "main"),
        *modalities("Two modalities without image noise", "clean"),
        *modalities("Three modalities: each alone, and all", "three"),
        *missing("Three modalities: missing in test", "three"),
        *missing_in_training(("audio", "image", "audio2")),
        *ablation("Three modalities: what MLA is made of", "three"),
        *modalities("Unpaired training data", "unpaired", "ume"),
    ]
    write_text(HERE / "tables.md", "\n".join(lines))


if __name__ == "__main__":
    main()
