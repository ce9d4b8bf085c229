"""Run the comparisons of item models and the paper's ablations, as often as it takes.

    python studies/items/study.py --data DIR [--only NAME ...] [--seeds 3] [--jobs 2]

``DIR`` holds the folder retail_notes. What is finished under ``runs/items`` is not done again. Results go beside this file.
"""

from __future__ import annotations

import argparse
import logging
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from zoo.compare import compare

HERE, OUT = Path(__file__).parent, Path("runs/items")
ARMS = ("text only", "base", "+mICL", "+late", "only late")
BUDGET = 180  # seconds of one training
SHORT = ("run.steps=200",)  # 1.2 passes over the pairs
TOKENS, ALPHA = {"model.num_visual_tokens": [8, 16, 32, 48]}, {"objective.alpha": [1, 3, 9, 19]}
PLANTED, MASKED = "notellm2/neglect/main", "notellm2/retail_masked"


class Plan(NamedTuple):
    """One call of `zoo.compare.compare`."""

    recipe: str
    overrides: tuple[str, ...] = ()
    arms: tuple[str, ...] = ()
    against: str | None = None
    grid: dict[str, list[Any]] | None = None


PLANS = {
    "titles": Plan("notellm2/retail", SHORT, arms=("bm25", *ARMS[1:]), against="retail, base"),
    "masked": Plan(MASKED, SHORT, arms=("bm25", *ARMS), against="retail_masked, base"),
    "tokens_masked": Plan(MASKED, SHORT, grid=TOKENS, against="retail_masked, model.num_visual_tokens=16"),
    "tokens_planted": Plan(
        PLANTED,
        ("model.connector={name: qformer, layers: 2, hidden: 64, heads: 4, ffn: 256}",),
        grid=TOKENS,
        against="main, model.num_visual_tokens=16",
    ),
    "alpha_masked": Plan(MASKED, SHORT, grid=ALPHA, against="retail_masked, objective.alpha=9"),
    "alpha_planted": Plan(PLANTED, grid=ALPHA, against="main, objective.alpha=9"),
    "table": Plan("notellm2/table", SHORT, arms=("all",), against="table"),
    "generating": Plan(
        "notellm2/retail_generating", SHORT, arms=("contrast alone", "weight 1"), against="retail_generating, contrast alone"
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=PLANS, default=list(PLANS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings = {"data_root": given.data, "seeds": given.seeds, "jobs": given.jobs, "budget_seconds": BUDGET}
    for name in given.only:
        plan = PLANS[name]
        found = compare([plan.recipe], *plan.overrides, arms=plan.arms, against=plan.against, grid=plan.grid, out=OUT / name, **settings)
        for kind in ("json", "md"):
            shutil.copy(found.folder / f"compare.{kind}", HERE / f"{name}.{kind}")
        print(found.table)


if __name__ == "__main__":
    main()
