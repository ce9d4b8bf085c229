"""Run the comparisons of MLA with its peers and baselines on spoken and handwritten digits, as often as it takes.

    python studies/mla/study.py --data DIR [--only NAME ...] [--jobs 2]

``DIR`` holds the folder av_digits. What is finished under ``runs/mla_study`` is not done again. Results go beside this file.
"""

from __future__ import annotations

import argparse
import logging
import shutil
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from zoo.compare import compare

HERE, OUT = Path(__file__).parent, Path("runs/mla_study")
VAL = ("classify.split=val", "classify.missing=[]")  # settings are picked on the speaker of val
MLA = ("mla", "mla_equal", "mla_free", "mla_free_equal")
PEERS = ("concat", "sum", "joint_aux", "ume", "ogm_ge", "mmpareto", "modality_dropout")
PAIR, THREE = "mla/av_digits/", "mla/three_digits/"


class Plan(NamedTuple):
    """One call of `zoo.compare.compare`."""

    recipes: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    against: str | None = None
    grid: dict[str, list[Any]] | None = None
    seeds: int = 3


def of(folder: str, *names: str) -> tuple[str, ...]:
    return tuple(folder + name for name in names)


PLANS = {
    # the rate: where the networks of the ensemble are best alone; then the noise: where they are closest to each other
    "rate": Plan(of(PAIR, "concat", "ume", "mla_free_equal"), (*VAL, "data.image_noise=0.5"), grid={"optimizer.lr": [0.01, 0.03, 0.1]}),
    "noise": Plan(of(PAIR, "ume"), VAL, grid={"data.image_noise": [0.0, 0.5, 0.75, 1.0]}),
    "main": Plan(of(PAIR, *MLA, "mla_calibrated", "mla_twice", *PEERS), against="concat", seeds=5),
    "three": Plan(of(THREE, *MLA, "concat", "sum", "late", "joint_aux", "ume", "ogm_ge", "qmf"), against="concat"),
    "unpaired": Plan(
        of(PAIR, "mla", "mla_free_equal", "ume") + of("mla/unpaired/", "mla_unpaired", "mla_free_equal_unpaired", "ume_unpaired"),
        against="ume",
    ),
    "clean": Plan(of(PAIR, "mla", "concat", "ume"), ("data.image_noise=0",), against="concat"),
    **{
        f"three_without_{name}": Plan(of(THREE, "mla", "concat", "ume"), (f"data.missing_train={{{name}: 0.5}}",), against="concat")
        for name in ("audio", "image", "audio2")
    },
}


def draw_gaps(numbers: Mapping[str, Any]) -> bytes:
    """PNG of the distance between the modalities' centroids, mean and standard deviation over seeds, a bar a cell."""
    cells = [cell for cell in numbers["cells"] if "gap" in cell["more"]]
    pairs = list(cells[0]["more"]["gap"])
    figure = Figure(figsize=(9, 0.8 + 0.3 * len(cells) * len(pairs)), layout="constrained")
    axes = figure.subplots()
    bars = [(f"{cell['cell']}, {pair}" if len(pairs) > 1 else cell["cell"], cell["more"]["gap"][pair]) for cell in cells for pair in pairs]
    axes.barh(
        [name for name, _ in bars], [found["mean"] for _, found in bars], xerr=[found["std"] or 0 for _, found in bars], color="#2a6fad"
    )
    axes.invert_yaxis()
    axes.set_xlabel("distance between the modalities' centroids, features of length 1")
    file = BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=PLANS, default=list(PLANS))
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in given.only:
        plan = PLANS[name]
        settings = {"seeds": plan.seeds, "grid": plan.grid, "against": plan.against, "jobs": given.jobs}
        found = compare(plan.recipes, *plan.overrides, data_root=given.data, out=OUT / name, **settings)
        for kind in ("json", "md"):
            shutil.copy(found.folder / f"compare.{kind}", HERE / f"{name}.{kind}")
        if name in ("main", "three"):
            (HERE / f"{name}_gap.png").write_bytes(draw_gaps(found.numbers))
        print(found.table)


if __name__ == "__main__":
    main()
