"""Run the comparisons of models of pictures and captions, as often as it takes.

    python studies/image_text/study.py --data DIR [--only table momentum capfilt experts stages] [--seeds 3] [--jobs 2] [--steps N]

``DIR`` holds the folder emoji_zh_en. What is finished under ``runs/image_text`` is not done again. Results go beside this file.

table     CLIP, ALBEF, BLIP, CoCa, VLMo and BEiT-3 on as many pairs each, against CLIP
momentum  ALBEF with 0, 20 and 40 % of the captions wrong, with and without soft targets, negatives drawn by likeness or evenly
capfilt   BLIP on noisy captions, then tuned as captioner and as filter on the trusted ones, and trained anew on what they leave
experts   VLMo's feed-forwards by modality against one for all, of equal width or of equally many parameters
stages    VLMo on pictures, then on texts, then on pairs, against pairs from nothing
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import statistics
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from zoo.capfilt import capfilt
from zoo.compare import compare
from zoo.files import write_json, write_text
from zoo.run import machine, run
from zoo.train import train

HERE, OUT = Path(__file__).parent, Path("runs/image_text")
TABLE = ("clip/emoji_en", "albef/emoji_en", "blip/emoji_en", "coca/emoji_en", "vlmo/emoji_en", "beit_3/emoji_en")
PARTS = ["vision", "embed", "trunk", "head", "image_projection", "text_projection", "matches"]
ARMS = ("both", "captioner", "filter")
DIRECTIONS = {"picture to text": "image_to_text", "text to picture": "text_to_image"}


def table(given: argparse.Namespace) -> None:
    """As many pairs for each model: batches of 128, the same number of steps."""
    budget = [f"run.steps={given.steps or 200}", "run.batch_size=128", "run.threads=1", "baselines={}", "floor={}"]
    budget.append("retrieve={splits: [style, test], rerank: 32}")  # the recipes ask for more, each as its model can
    _compare(given, "table", TABLE, budget, against="clip/emoji_en")


def momentum(given: argparse.Namespace) -> None:
    """The arms of ``distillation.yaml``, at each share of wrong captions."""
    budget = [] if given.steps is None else [f"run.steps={given.steps}"]
    grid = {"data.mismatch": [0.0, 0.2, 0.4]}
    _compare(given, "momentum", (str(HERE / "distillation.yaml"),), budget, grid=grid, arms=("all",))


def _compare(given: argparse.Namespace, name: str, recipes: tuple[str, ...], overrides: list[str], **more: Any) -> None:
    settings = {"seeds": given.seeds, "jobs": given.jobs, "data_root": given.data, "out": OUT / name}
    found = compare(recipes, *overrides, **settings, **more)
    for kind in ("json", "md"):
        shutil.copy(found.folder / f"compare.{kind}", HERE / f"{name}.{kind}")
    print(found.table)


def loop(seed: int, data: Path, steps: int) -> dict[str, Any]:
    """CapFilt from the first model to the last, of one seed: what the filter is worth, and recall of each model.

    The last models are trained anew from the start, as in the paper, for as many steps as the first.
    """
    torch.set_num_threads(1)
    home, tuning = OUT / "capfilt" / str(seed), max(steps // 4, 1)
    said = [f"seed={seed}"]
    first = run(HERE / "web.yaml", *said, f"run.steps={steps}", f"out={home / 'web'}", data_root=data)
    stage = f"init_from=[{{folder: {home / 'web'}, parts: {json.dumps(PARTS)}}}]"
    for role in ("captioner", "filter"):
        run(HERE / f"{role}.yaml", *said, stage, f"run.steps={tuning}", f"out={home / role}", data_root=data)
    folder = home / "texts"
    told = capfilt(
        HERE / "web.yaml",
        folder,
        *said,
        captioner=home / "captioner",
        filter=home / "filter",
        data_root=data,
        seed=seed,
        show_progress=False,
    )
    found = {"noisy": first.metrics}
    for arm in ARMS:
        where = [f"data={{name: capfilt, folder: {folder.resolve()}, arm: {arm}}}", "seeded=[]", f"out={home / 'retrained' / arm}"]
        found[arm] = run(HERE / "web.yaml", *said, *where, f"run.steps={steps}", data_root=data).metrics
    return {"statistics": told, "recall": {arm: _recalls(metrics) for arm, metrics in found.items()}}


def _recalls(metrics: Any) -> dict[str, float]:
    """{"style, picture to text, R@1": recall} of the model of a run, by cosine, all groups together."""
    (arm,) = metrics["arms"].values()
    shown = {protocol: name for name, protocol in DIRECTIONS.items()}
    records = [r for r in arm["records"] if r["k"] in (1, 10) and r["input"] == "all"]
    return {f"{r['subset']}, {shown[r['protocol']]}, R@{r['k']}": r["recall"] for r in records}


def bootstrap(given: argparse.Namespace) -> None:
    """The loop of CapFilt under each seed, and its table."""
    steps = given.steps or 200
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(partial(loop, data=given.data, steps=steps), range(given.seeds)))
    write_json(HERE / "capfilt.json", {"steps": steps, "seeds": found, "machine": machine()})
    write_text(HERE / "capfilt.md", written(found, steps))
    print((HERE / "capfilt.md").read_text(encoding="utf-8"))


def written(found: list[dict[str, Any]], steps: int) -> str:
    """The table of `bootstrap`."""
    title = f"Recall, mean ± standard deviation over {len(found)} seeds, {steps} steps of 128 pairs for each model that is evaluated."
    lines = [title, "", *recalls_of(found)]
    lines += ["", "| of the filter | |", "|---|---|"]
    told = [seed["statistics"]["filter"] for seed in found]
    for name in told[0]:
        values = [each[name] for each in told if each[name] is not None]  # no precision where nothing was thrown away
        lines.append(f"| {name.replace('_', ' ')} | {_spread(values) if values else '-'} |")
    for origin in found[0]["statistics"]["texts"]:
        shares = [texts["kept"] / texts["all"] for seed in found if (texts := seed["statistics"]["texts"][origin])["all"]]
        lines.append(f"| {origin} texts kept, share | {_spread(shares) if shares else '-'} |")
    return "\n".join(lines) + "\n"


def recalls_of(found: list[dict[str, Any]]) -> list[str]:
    """The rows of a table of recall: an arm each, over seeds."""
    arms = found[0]["recall"]
    protocols = sorted(next(iter(arms.values())))
    rows = ["| trained on | " + " | ".join(protocols) + " |", "|---|" + "---|" * len(protocols)]
    for arm in arms:
        cells = [_spread([seed["recall"][arm][protocol] for seed in found]) for protocol in protocols]
        rows.append(f"| {arm} | " + " | ".join(cells) + " |")
    return rows


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


def experts(given: argparse.Namespace) -> None:
    """The arms of ``experts.yaml``."""
    budget = [] if given.steps is None else [f"run.steps={given.steps}"]
    _compare(given, "experts", (str(HERE / "experts.yaml"),), budget, arms=("all",))


def three(seed: int, data: Path, steps: int) -> dict[str, Any]:
    """Recall of VLMo after its three stages, and of pairs from nothing, of one seed; each stage has as many steps.

    The tokenizer and the CLIP that teaches it come on top, and are counted for nobody.
    """
    torch.set_num_threads(1)
    home, said = OUT / "stages" / str(seed), [f"seed={seed}", "run.epochs=null", "run.threads=1"]
    train("visual_tokenizer/emoji", *said, f"run.steps={steps}", f"out={home / 'tokens'}", data_root=data)
    image = [f"objective.tokenizer={home / 'tokens'}", f"run.steps={steps}", f"out={home / 'image'}"]
    train("vlmo/stage_image", *said, *image, data_root=data)
    text = f"init_from=[{{folder: {home / 'image'}, parts: [vision, trunk, positions]}}]"
    train("vlmo/stage_text", *said, text, f"run.steps={steps}", f"out={home / 'text'}", data_root=data)
    parts = "vision, embed, kinds, positions, trunk, head"
    stages = [f"init_from=[{{folder: {home / 'text'}, parts: [{parts}]}}]"]
    arms = {"in three stages": (stages, steps), "pairs alone": ([], steps), "pairs alone, three times as long": ([], 3 * steps)}
    found = {}
    for arm, (more, lasts) in arms.items():
        where = home / arm.replace(", ", "_").replace(" ", "_")
        found[arm] = run(HERE / "staged.yaml", f"seed={seed}", *more, f"run.steps={lasts}", f"out={where}", data_root=data).metrics
    return {"recall": {arm: _recalls(metrics) for arm, metrics in found.items()}}


def stages(given: argparse.Namespace) -> None:
    """The three stages under each seed, and their table."""
    steps = given.steps or 80
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(partial(three, data=given.data, steps=steps), range(given.seeds)))
    write_json(HERE / "stages.json", {"steps": steps, "seeds": found, "machine": machine()})
    title = f"Recall, mean ± standard deviation over {len(found)} seeds; a stage is {steps} steps of 128 rows."
    write_text(HERE / "stages.md", "\n".join([title, "", *recalls_of(found)]) + "\n")
    print((HERE / "stages.md").read_text(encoding="utf-8"))


PLANS = {"table": table, "momentum": momentum, "capfilt": bootstrap, "experts": experts, "stages": stages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=PLANS, default=list(PLANS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--steps", type=int, help="of each training, or of each stage; otherwise as the study says")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in given.only:
        PLANS[name](given)


if __name__ == "__main__":
    main()
