"""Run the neglect experiment, as often as it takes, and judge it by the criteria that stand in recipes/notellm2/neglect/README.md.

    python studies/neglect/study.py [--seeds 5] [--jobs 2]

What is finished under ``runs/neglect_study`` is not done again. Results go beside this file.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from zoo.compare import compare
from zoo.diagnose import diagnose
from zoo.evaluate.diagnosis_plots import saliency_plot
from zoo.evaluate.retrieval import Difference, paired_difference
from zoo.files import write_bytes, write_json, write_text
from zoo.study import result
from zoo.trials import trials

HERE, OUT = Path(__file__).parent, Path("runs/neglect_study")
RECIPES = [f"notellm2/neglect/{name}" for name in ("main", "connector_rate", "aligned", "untaught", "blind", "pooled")]
RATES = {"optimizer.lr": [3e-5, 1e-4, 3e-4, 1e-3, 3e-3]}
CURES = {"NoteLLM-2": "main", "+mICL": "main, micl", "+late": "main, late"}
K, FAR = 20, 200  # the headline's, and the one at which text alone is nearly enough
NEAR_CHANCE, SMALL, LITTLE = 0.10, 0.05, 0.05  # recall
SEEING = ("main", "main, base", "main, micl", "main, late", "main, only late")  # arms that a permutation of the images may hurt


class Criterion(NamedTuple):
    """One line of the judgement."""

    says: str
    seen: str
    passed: bool | None  # None: it is reported, and not judged


class Study:
    """The hits of every query, averaged over the seeds."""

    def __init__(self, seeds: int) -> None:
        self.folders: dict[str, list[Path]] = {}
        self.hits: dict[tuple[str, str, str, int], list[np.ndarray]] = {}
        for trial in trials(RECIPES, out=OUT / "arms", seeds=seeds, arms=("all",)):
            self.folders.setdefault(trial.cell, []).append(trial.recipe.out)
            for m in result(trial).metrics:
                self.hits.setdefault((trial.cell, m.subset, m.input, m.k), []).append(m.hits)

    def recall(self, cell: str, shown: str = "both", subset: str = "all", k: int = K) -> float:
        return float(np.mean(self.hits[cell, subset, shown, k]))

    def difference(self, cell: str, other: str, subset: str = "all", k: int = K) -> Difference:
        """Paired over the queries, each with the mean of its hits over the seeds."""
        a, b = (np.mean(self.hits[name, subset, "both", k], axis=0) for name in (cell, other))
        return paired_difference(a, b)


def signed(found: Difference) -> str:
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def neglect(study: Study) -> Iterator[Criterion]:
    """1: the base model sees next to nothing, and its text skill is whole."""
    alone = study.recall("main, base", "image")
    yield Criterion(f"Base finds at most {NEAR_CHANCE:.0%} by the image alone", f"{alone:.3f}", alone <= NEAR_CHANCE)
    for subset in ("all", "short_query", "short_target"):
        gain = study.difference("main, base", "main, text only", subset)
        yield Criterion(f"Base gains at most {SMALL:.2f} over text only, {subset}", signed(gain), gain.mean <= SMALL)


def cure(study: Study) -> Iterator[Criterion]:
    """2: each cure is above Base where the text is short, and gains more there than on all."""
    for name, cell in CURES.items():
        short = [study.difference(cell, "main, base", subset) for subset in ("short_query", "short_target")]
        yield Criterion(f"{name} above Base on both short subsets", "; ".join(map(signed, short)), all(d.low > 0 for d in short))
        for k in (K, FAR):
            found = [study.difference(cell, "main, base", subset, k).mean for subset in ("all", "short_query", "short_target")]
            says = f"{name} gains more on both short subsets than on all, recall@{k}"
            yield Criterion(says, "; ".join(f"{x:+.3f}" for x in found), min(found[1:]) > found[0])
    yield Criterion("only late, for the record", signed(study.difference("main, only late", "main, base")), None)


def controls(study: Study) -> Iterator[Criterion]:
    """4: what each control must change."""
    base = study.recall("main, base", "image")
    for name in ("connector_rate", "aligned"):
        here = study.recall(f"{name}, base", "image")
        yield Criterion(f"{name}: Base finds at least twice as much by the image alone", f"{here:.3f} and {base:.3f}", here >= 2 * base)
    for cell in ("connector_rate, base at ten times", "pooled, base", "pooled, base at a hundred times"):
        yield Criterion(f"{cell}: by the image alone, for the record", f"{study.recall(cell, 'image'):.3f}", None)
    here = study.recall("untaught, base", "image")
    gain = study.difference("untaught, base", "untaught, text only")
    yield Criterion(f"untaught: Base gains over {SMALL:.2f} over text only", signed(gain), gain.mean > SMALL)
    yield Criterion("untaught: Base by the image alone, for the record", f"{here:.3f}", None)
    gain, before = study.difference("aligned", "aligned, base"), study.difference("main", "main, base")
    yield Criterion(
        "aligned: NoteLLM-2 gains less than half of what it gains on main", f"{signed(gain)}; {signed(before)}", gain.mean < before.mean / 2
    )
    gain = study.difference("aligned, only late", "aligned, base")
    yield Criterion("aligned: only late is not above Base", signed(gain), gain.low <= 0)
    for cell in ("blind", "blind, base"):
        gain = study.difference(cell, "blind, text only")
        yield Criterion(f"{cell}: at most {LITTLE / 5:.2f} above text only", signed(gain), gain.mean <= LITTLE / 5)


def diagnosed(study: Study) -> Iterator[Criterion]:
    """3: what a permutation of the images costs, and how salient they are; of every seed."""
    drop: dict[str, list[float]] = {}
    share: dict[str, list[list[float]]] = {}
    for cell in SEEING:
        parts = ("permutation",) if cell == "main, only late" else ("permutation", "saliency")  # nothing visual stands in its prompt
        for folder in study.folders[cell]:
            file = folder / "diagnosis.json"
            found = json.loads(file.read_text()) if file.is_file() else diagnose(folder, what=parts, permutations=1, batches=4).found
            record = next(r for r in found["permutation"]["records"] if r["subset"] == "all")
            drop.setdefault(cell, []).append(record["recall"] - record["permuted"])
            if "saliency" in parts:
                share.setdefault(cell, []).append([layer["shares"]["visual"] for layer in found["saliency"]["layers"]])
    base = drop["main, base"]
    for name, cell in CURES.items():
        seen = f"{np.mean(drop[cell]):+.3f} and {np.mean(base):+.3f}"
        yield Criterion(
            f"{name}: a permutation of the images costs more than in Base, under every seed",
            seen,
            bool(np.all(np.greater(drop[cell], base))),
        )
    yield Criterion("only late: what a permutation costs, for the record", f"{np.mean(drop['main, only late']):+.3f}", None)
    visual = {cell: np.mean(shares, axis=0) for cell, shares in share.items()}
    seen = "; ".join(f"{cell}: {' '.join(f'{x:.2f}' for x in shares)}" for cell, shares in visual.items())
    yield Criterion(
        "+mICL: S_v has a larger share than in Base, mean over layers",
        seen,
        bool(visual["main, micl"].mean() > visual["main, base"].mean()),
    )


def judge(seeds: int) -> str:
    """The criteria as they fall, as Markdown; as numbers in criteria.json."""
    study = Study(seeds)
    parts = {"1 neglect": neglect, "2 cure": cure, "3 diagnosis": diagnosed, "4 controls": controls}
    found = {name: list(part(study)) for name, part in parts.items()}
    write_json(HERE / "criteria.json", {name: [c._asdict() for c in criteria] for name, criteria in found.items()})
    outcome = {True: "pass", False: "**fail**", None: "–"}
    lines = [f"# The criteria, {seeds} seeds", "", f"Recall@{K}, one target, test split, unless it says otherwise.", ""]
    lines += ["| part | criterion | seen | outcome |", "|---|---|---|---|"]
    lines += [f"| {name} | {c.says} | {c.seen} | {outcome[c.passed]} |" for name, criteria in found.items() for c in criteria]
    return "\n".join([*lines, ""])


def figure(study: Study) -> bytes:
    """Shares of S_v, S_t and S_o by layer, before the cures and after, mean and standard deviation over the seeds; as a PNG."""
    layers = {}
    for name, cell in {"Base": "main, base", **{name: CURES[name] for name in ("+mICL", "+late", "NoteLLM-2")}}.items():
        found = [json.loads((folder / "diagnosis.json").read_text())["saliency"]["layers"] for folder in study.folders[cell]]
        flows = {
            flow: np.array([[layer["shares"][flow] for layer in one] for one in found]) for flow in found[0][0]["shares"]
        }  # (seeds, layers)
        layers[name] = [
            {"layer": i, "shares": {f: x[:, i].mean() for f, x in flows.items()}, "spread": {f: x[:, i].std() for f, x in flows.items()}}
            for i in range(len(found[0]))
        ]
    return saliency_plot(layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1)
    settings = vars(parser.parse_args())
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    compare(RECIPES, arms=("all",), against="main, base", out=OUT / "arms", budget_seconds=60, **settings)
    compare(RECIPES[:1], "model.fusion=early", grid=RATES, out=OUT / "rates", budget_seconds=60, **settings)
    for name in ("arms", "rates"):
        for kind in ("json", "md"):
            shutil.copy(OUT / name / f"compare.{kind}", HERE / f"{name}.{kind}")
    write_text(HERE / "criteria.md", judge(settings["seeds"]))
    write_bytes(HERE / "saliency.png", figure(Study(settings["seeds"])))
    print((HERE / "criteria.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
