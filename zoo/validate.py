"""Look at a recipe before it costs anything: some rows of its data, its model without weights, and the memory of a step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from zoo.config import hints_of, part_kind, parts_in, settings, split_spec
from zoo.errors import ZooError
from zoo.fetch import hub_cache, located
from zoo.hub import ABOUT
from zoo.init_from import check_parts, stage_recipe
from zoo.models._notes import NoteProcessor
from zoo.models._pictures import CaptionProcessor, PictureTextProcessor
from zoo.models.nlvr2 import TwoPicturesProcessor
from zoo.opened import open_rows
from zoo.recipe import Recipe
from zoo.registry import build, entry, lookup
from zoo.shapes import Kept, Line, Memory, memory, walk, without_weights
from zoo.train import make_step
from zoo.types import Batch, Data, Row
from zoo.update import Step

_UNCUT = 1 << 30  # tokens: longer than any text


class Part(NamedTuple):
    """A child of the model, or the objective, and how many weights it has."""

    name: str
    parameters: int
    trained: int
    adapters: int  # of the trained ones


class Texts(NamedTuple):
    """Lengths of the prompts in tokens, without the tokens of images."""

    median: int
    longest: int
    limit: int | None  # of notes without the last words, which are never cut; None: the model has no such limit
    cut: int  # rows that are shortened


class Contrast(NamedTuple):
    """What a row of the batch can learn from."""

    positives: int  # rows that have one, and both are seen by the model
    negatives: float  # mean over those rows
    fewest: int
    known: int  # pairs of rows that belong together without being each other's positive


class Report(NamedTuple):
    """What `validate` found."""

    rows: int
    data: str  # where they come from
    missing: dict[str, float]  # share of the rows without it
    texts: Texts
    contrast: Contrast | None  # None: the rows have classes
    shapes: list[Line]
    parts: list[Part]
    memory: dict[str, Memory]  # as the recipe says, and in the other ways that there are
    notes: list[str]  # what is not as in training
    faults: list[str]  # why the recipe cannot be trained


def validate(
    recipe: Recipe,
    *,
    data_root: str | Path | None = None,
    loaded: Data | None = None,
    rows: int = 32,
    processes: int = 1,
    deep: bool = False,
    cache: Path | None = None,
) -> Report:
    """Open some rows, build the model without memory, and run them through it.

    The data is loaded as a run loads it, which decodes every image and mines the pairs; what is counted in the report are ``rows``.

    Args:
        recipe: Of the run.
        data_root: The folder that holds the folders of data sets.
        loaded: The recipe's data set, where it is loaded already.
        rows: How many are opened, an even number: two make a pair.
        processes: GPUs that shall train together, for the memory.
        deep: Shapes of every module.
        cache: The hub's cache folder; None: the hub's own. Tokenizers and configurations are looked for there, weights are not.

    Raises:
        ZooError: On a fault of the recipe or of data that is there, if the model cannot be run so, or if a stage has not the parts that it
            shall give; what stages ask for themselves is looked at when they are validated.
    """
    if rows < 2 or rows % 2:
        raise ZooError(f"rows: {rows} rows are no pairs: write 2 or more, even")
    notes: list[str] = []
    cache = hub_cache() if cache is None else cache
    light = replace(recipe, model=without_pretrained("model", recipe.model, cache, notes))
    light = replace(light, run=replace(light.run, gradient_checkpointing=False))
    with torch.device("meta"):
        step = without_weights(make_step(light)).train()
        _check_stages(recipe, step.model, cache)
    opened = open_rows(recipe, data_root, loaded, rows, step.model, notes)
    batch = opened.batch(opened.number)
    lines, once = walk(step, batch, recipe.run.precision, deep=deep)
    alive = -(-recipe.run.gradcache // 2) if recipe.run.gradcache else recipe.run.batch_size  # pairs whose activations are there at once
    in_run = batch if alive == opened.number else opened.batch(alive)
    if in_run is not batch:
        _, once = walk(step, in_run, recipe.run.precision)
    if recipe.run.shard and processes == 1:
        notes.append("run.shard spreads the model over the processes: say how many there are (--processes), the memory here is of one")
    contrast = None if batch.targets is not None else _contrast(batch, [step.model.processor.sees(row) for row in opened.rows])
    faults = [] if contrast is None else _unlearnable(contrast)
    return Report(
        len(opened.rows),
        opened.source,
        _missing(opened.rows, batch, step.model.processor),
        _texts(step.model.processor, opened.rows, batch),
        contrast,
        lines,
        [*(_part(n, m) for n, m in step.model.named_children()), _part("objective", step.objective)],
        _memory(step, once, in_run, recipe, processes),
        notes,
        faults,
    )


def _check_stages(recipe: Recipe, model: nn.Module, cache: Path) -> None:
    """Look whether the stages of a recipe can give their parts; one in a folder that is not there yet is left to the run."""
    for stage in recipe.init_from:
        if stage.folder is None:
            spec = stage_recipe(stage, recipe).model
        elif (stage.folder / ABOUT).is_file():
            spec = json.loads((stage.folder / ABOUT).read_text(encoding="utf-8"))["spec"]
        else:
            continue
        name, given = split_spec(without_pretrained("model", spec, cache, []))
        check_parts(stage, model, build(name, **given))


def _unlearnable(contrast: Contrast) -> list[str]:
    """Why nothing can be learned from these rows."""
    if not contrast.positives:
        return ["no row has a positive that the model sees: nothing can be learned from these rows"]
    if not contrast.negatives:
        return ["no row has a negative: all are the same item or belong together; write a larger run.batch_size, or look at the pairs"]
    return []


def without_pretrained(kind: str, spec: Any, cache: Path, notes: list[str]) -> dict[str, Any]:
    """A part as a recipe writes it, turned into one of the same shape that reads no weights and takes no memory where it can.

    Args:
        kind: Of the part.
        spec: As in a recipe.
        cache: The hub's cache folder, for tokenizers and configurations.
        notes: Gets what then is not as in training.
    """
    name, given = split_spec(spec)
    maker, carried = lookup(kind, name)
    takes, hints, remote = settings(maker), hints_of(maker), entry(kind, name.partition(":")[0]).remote
    chosen = {key: p.default for key, p in takes.items()} | given | carried
    out: dict[str, Any] = {"name": name, **given}
    for each in remote(chosen) if remote is not None else ():
        folder = located(each, cache)
        if kind == "backbone" and each.role == "tokenizer":
            out["tokenizer"] = "bytes" if folder is None else str(folder)
            if folder is None:
                notes.append(
                    f"the tokenizer {each.repo} is not here (zoo fetch): texts are counted in bytes, and are longer than in training"
                )
        if kind == "model" and each.role == "tokenizer":
            out["vocabulary"] = "small" if folder is None else str(folder)
            if folder is None:
                table = "" if chosen.get("vocab_size") else "; the table of words has its size, where the recipe says no vocab_size"
                notes.append(f"the vocabulary {each.repo} is not here (zoo fetch): texts are cut as by the one named small{table}")
        if kind == "backbone" and each.role == "config" and folder is not None:
            out["config"] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    out |= {"device": "meta"} if "device" in takes else {}
    out |= {"pretrained": False} if "pretrained" in takes else {}
    for key, value in chosen.items():
        inner = part_kind(hints.get(key))
        if inner in ("model", "encoder", "backbone"):
            for inside, spec in parts_in(hints.get(key), value).items():
                lean = without_pretrained(inner, spec, cache, notes)
                out[key] = {**out.get(key, {}), inside[0]: lean} if inside else lean
    return out


def _missing(rows: Sequence[Row], batch: Batch, processor: Any) -> dict[str, float]:
    """Of each key that the model reads, and of text as a whole."""
    keys: Sequence[str] = processor.keys()
    out = {key: float(np.mean([_is_empty(row.get(key)) for row in rows])) for key in keys}
    said = [x.extra["has_text"] for x in batch.inputs.values() if "has_text" in x.extra]
    return out | ({"any text": 1 - float(said[0].float().mean())} if said else {})


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | tuple) and not value)


def _texts(processor: Any, rows: Sequence[Row], batch: Batch) -> Texts:
    text = batch.inputs.get("text")
    if text is None:
        return Texts(0, 0, None, 0)
    lengths = text.mask.sum(1) if text.mask is not None else torch.full((len(text.values),), text.values.shape[1])
    found = Texts(int(lengths.median()), int(lengths.max()), None, 0)
    if isinstance(processor, PictureTextProcessor | TwoPicturesProcessor) and isinstance(processor.text, CaptionProcessor):
        reads = copy(processor.text)
        reads.length = _UNCUT
        whole = torch.tensor([len(reads(row["text"]).values) if row.get("text") else 0 for row in rows])
        return found._replace(limit=processor.text.length, cut=int((whole > lengths).sum()))
    if not isinstance(processor, NoteProcessor):
        return found
    uncut = copy(processor)
    uncut.max_tokens = _UNCUT
    whole = torch.tensor([len(uncut(row)["text"].values) for row in rows])  # of the same order as the batch
    return found._replace(limit=processor.max_tokens, cut=int((whole > lengths).sum()))


def _contrast(batch: Batch, seen: Sequence[bool]) -> Contrast:
    assert batch.ids is not None
    there = torch.tensor(seen)
    excluded = batch.ids[:, None] == batch.ids  # (B, B)
    if batch.positive is None:  # of a picture it is its own text
        others = (~excluded & there).sum(1)[there].float()
        return Contrast(len(others), float(others.mean()) if len(others) else 0.0, int(others.min()) if len(others) else 0, 0)
    rows = torch.arange(len(batch.ids))
    has = (batch.positive >= 0) & there & there[batch.positive] & (batch.ids != batch.ids[batch.positive])
    excluded[rows, batch.positive] = True
    before = int(excluded.sum())
    if batch.known is not None:
        excluded[batch.known[:, 0], batch.known[:, 1]] = True
    negatives = (~excluded & there).sum(1)[has].float()
    known = (int(excluded.sum()) - before) // 2
    return Contrast(
        int(has.sum()), float(negatives.mean()) if len(negatives) else 0.0, int(negatives.min()) if len(negatives) else 0, known
    )


def _part(name: str, module: nn.Module) -> Part:
    trained = {n: p.numel() for n, p in module.named_parameters() if p.requires_grad}
    return Part(
        name,
        sum(p.numel() for p in module.parameters()),
        sum(trained.values()),
        sum(count for n, count in trained.items() if "lora_" in n),  # peft's names
    )


def _memory(step: Step, once: Kept, batch: Batch, recipe: Recipe, processes: int) -> dict[str, Memory]:
    """As the recipe says, and what checkpointing of gradients and sharding would change."""
    run = recipe.run
    step.model.checkpoint_gradients()
    _, again = walk(step, batch, run.precision)
    ways = {"as the recipe says": (run.gradient_checkpointing, run.shard)}
    ways |= {"with gradient_checkpointing": (True, run.shard)} if not run.gradient_checkpointing else {}
    ways |= {f"with shard over {processes}": (run.gradient_checkpointing, True)} if processes > 1 and not run.shard else {}
    ways |= {"with both": (True, True)} if processes > 1 and not (run.shard or run.gradient_checkpointing) else {}
    return {
        name: memory(
            step,
            once,
            again,
            checkpointing=checkpointing,
            processes=processes,
            shard=shard,
            moments=1 if recipe.optimizer.name == "sgd" else 2,
        )
        for name, (checkpointing, shard) in ways.items()
    }


def plain(report: Report) -> Mapping[str, Any]:
    """The report as plain values, for JSON."""
    return {
        **report._asdict(),
        "texts": report.texts._asdict(),
        "contrast": None if report.contrast is None else report.contrast._asdict(),
        "shapes": [line._asdict() for line in report.shapes],
        "parts": [part._asdict() for part in report.parts],
        "memory": {name: {**m._asdict(), "total": m.total} for name, m in report.memory.items()},
    }
