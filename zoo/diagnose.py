"""Does the model use the image? Measured in six ways, each with its spread, from a finished run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from zoo.errors import ZooError, unknown
from zoo.evaluate.diagnosis_plots import saliency_plot
from zoo.evaluate.verdict import ENOUGH
from zoo.examine import WHAT, Subject
from zoo.files import write_bytes, write_json
from zoo.hub import load
from zoo.report import report
from zoo.run import evaluation, load_pairs, machine
from zoo.types import PairData

FILE = "diagnosis.json"


class Diagnosis(NamedTuple):
    """What was found of one run."""

    folder: Path
    verdict: str  # one sentence
    found: Mapping[str, Any]  # as in diagnosis.json


def diagnose(
    run: str | Path,
    *,
    what: Sequence[str] = WHAT,
    split: str | None = None,
    batches: int = 8,
    permutations: int = 5,
    seed: int = 0,
    data_root: str | Path | None = None,
    loaded: PairData | None = None,
    device: str = "cpu",
) -> Diagnosis:
    """Measure how much a trained model makes of the image, and write it to ``diagnosis.json`` and ``report.html`` of its run.

    What the model or the run lacks for a part is listed under ``not_available``, with the reason.

    Args:
        run: A run folder.
        what: Any of `WHAT`. ``saliency``: S_v, S_t, S_o of each layer. ``gates``: shares of a gated fusion. ``permutation``: recall with
            images exchanged between notes. ``shapley``: recall for every subset of modalities, and what each modality contributes.
            ``outputs``: image-only recall of every embedding. ``gradients``: whose parameters the training's gradient reached.
        split: Whose pairs; None: the one that the recipe evaluates on.
        batches: For saliency and gates, each of ``run.batch_size`` pairs.
        permutations: Of the images.
        seed: Of the batches, the permutations and the intervals.
        data_root: The folder that holds the folders of data sets.
        loaded: The recipe's data set, where it is loaded already.
        device: Where the model runs.

    Raises:
        Failure: If a file of the run is damaged.
        ZooError: If there is no such run, the model does not look at images or its data shows none, or a fault in the arguments.
    """
    faults = [unknown("part of the diagnosis", name, WHAT) for name in what if name not in WHAT]
    faults += [
        f"{name}: {value} measures nothing: write 1 or more"
        for name, value in (("batches", batches), ("permutations", permutations))
        if value < 1
    ]
    if faults or not what:
        raise ZooError("\n".join(faults) or f"nothing to measure: name any of {', '.join(WHAT)}")
    folder = Path(run)
    model = load(folder, device)
    recipe = evaluation(folder / "recipe.yaml", **({} if split is None else {"evaluate__split": split}))
    data = load_pairs(recipe, "a diagnosis", data_root) if loaded is None else loaded
    subject = Subject(folder, model, recipe, data, batches=batches, permutations=permutations, seed=seed)
    chosen = [name for name in WHAT if name in what]
    found = subject.examine(chosen)
    found = {"verdict": verdict(subject.k, found["metric"]["queries"], found), **found}
    settings = {"split": recipe.evaluate.split, "batches": batches, "permutations": permutations, "seed": seed}
    options = " ".join(f"--{name} {value}" for name, value in settings.items())
    about = {"command": f"zoo diagnose {folder} --what {','.join(chosen)} {options}", **settings, "machine": machine() | {"device": device}}
    write_json(folder / FILE, {**found, **about})
    report(folder)
    return Diagnosis(folder, found["verdict"], {**found, **about})


def saliency_figure(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Draw the shares of S_v, S_t and S_o by layer for several diagnosed runs, as in NoteLLM-2's figures of before and after.

    Args:
        runs: Run folders, in the order of the legend; each is named as its folder.
        out: A PNG file.

    Raises:
        ZooError: If one of them was not diagnosed, or has no saliency.
    """
    shares = {}
    for run in map(Path, runs):
        file = run / FILE
        if not file.is_file():
            raise ZooError(f"{file} is not there: zoo diagnose {run} --what saliency writes it")
        found = json.loads(file.read_text(encoding="utf-8"))
        if "saliency" not in found:
            why = found["not_available"].get("saliency", f"it was not asked for: zoo diagnose {run} --what saliency")
            raise ZooError(f"{file} holds no saliency: {why}")
        name = run.resolve().name if run.resolve().name not in shares else str(run)
        shares[name] = found["saliency"]["layers"]
    return write_bytes(Path(out), saliency_plot(shares))


def verdict(k: int, queries: int, found: Mapping[str, Any]) -> str:
    """One sentence on whether the image is used; what decides is the cost of exchanging images, else that of hiding them."""
    costs = {}
    if "shapley" in found:
        records = [r for r in found["shapley"]["missing"] if r["subset"] == "all"]
        whole = set(records[0]["shown"])
        hidden = next(r for r in records if set(r["shown"]) == whole - {"image"})
        costs["showing the image adds"] = hidden["cost"]
    if "permutation" in found:
        costs["permuting images costs"] = found["permutation"]["records"][0]["drop"]
    if not costs:
        return "Recall was not asked for; permutation or shapley would tell whether the image is used."
    decides = list(costs.values())[-1]
    claim = "The image is used" if decides["low"] > 0 else "The image misleads" if decides["high"] < 0 else "No use of the image is seen"
    if queries < ENOUGH:
        claim = f"{queries} queries are too few to tell"
    amounts = [f"{says} {c['mean']:+z.3f} [{c['low']:+z.3f}, {c['high']:+z.3f}]" for says, c in costs.items()]
    return f"{claim}: {', '.join(amounts)} recall@{k}."
