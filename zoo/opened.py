"""Some training rows, to look at a recipe before it costs anything: drawn from its data, or made up where the data is not here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from zoo.batches import CaptionedRows, check_fit, shown_of, targets_of
from zoo.collate import Known, PairCollate, stack
from zoo.config import split_spec
from zoo.errors import Absent, ZooError
from zoo.recipe import Recipe
from zoo.registry import make
from zoo.shown import draw_shown, only_shown
from zoo.types import Batch, CaptionedData, Classifying, Data, LabelledData, Pair, PairData, Row

_TITLES = ("red shoes", "a grey coat for cold days", "garden", "红色的鞋", "blue cup and plate, hand made")


class Opened(NamedTuple):
    """Raw rows, and what makes a batch of them."""

    rows: list[Row]
    number: int  # of pairs of items, or of rows that have a class or a text
    batch: Callable[[int], Batch]  # of so many of them, over and over if there are fewer
    source: str  # where they come from


def open_rows(recipe: Recipe, root: str | Path | None, loaded: Data | None, wanted: int, model: Any, notes: list[str]) -> Opened:
    """Training rows.

    Args:
        recipe: Of the run.
        root: The folder that holds the folders of data sets.
        loaded: The data set, where it is loaded already.
        wanted: How many, an even number.
        model: That the recipe names.
        notes: Gets what then is not as in training.

    Raises:
        ZooError: On a fault of data that is there, or if it does not fit the model.
    """
    try:
        data: Data = make("data", recipe.data, Path(root) if root is not None else None) if loaded is None else loaded
    except Absent as e:
        notes.append(f"the data is not here ({str(e).partition(chr(10))[0]}): the rows are MADE UP, and so are lengths and missing rates")
        random, process = np.random.default_rng(recipe.seed), model.processor
        if isinstance(model, Classifying):
            rows = [_made_up_things(i, process, random) for i in range(wanted)]
            return _labelled(rows, torch.arange(wanted) % model.classes, process, "made up")
        if {*process.keys()} <= {"image", "text"}:
            shown = draw_shown(wanted, recipe.run.shows or {"pair": 1.0}, recipe.seed)
            return _captioned([only_shown(_made_up_caption(i, random), shown[i]) for i in range(wanted)], process, "made up")
        return _paired(_made_up_pairs(recipe, wanted // 2, process, random), None, process, "made up")
    check_fit(model, data)
    train = data.split("train") if isinstance(data, LabelledData) else data.pairs("train")
    count = wanted // 2 if isinstance(data, PairData) else wanted
    chosen = np.random.default_rng(recipe.seed).choice(len(train), min(count, len(train)), replace=False)
    if len(chosen) < count:
        notes.append(f"the data has {len(train)} training {'rows' if isinstance(data, LabelledData) else 'pairs'}, fewer than {count}")
    if isinstance(data, LabelledData):
        source = f"{len(data.rows)} rows of {len(data.classes)} classes, {len(train)} of them to train on"
        drawn = train[chosen]
        return _labelled([data.rows[int(i)] for i in drawn], targets_of(data, drawn), model.processor, source)
    if isinstance(data, CaptionedData):
        every = CaptionedRows(data, "train", shown_of(data, recipe.run.shows, recipe.seed))
        source = f"{len(data.pictures)} pictures, {len(data.captions)} texts, {len(train)} training pairs"
        return _captioned([every[int(i)] for i in chosen], model.processor, source)
    pairs = [Pair(*(data.notes[int(i)] for i in pair)) for pair in train[chosen]]
    known = Known.of(torch.from_numpy(train), len(data.notes))
    return _paired(pairs, known, model.processor, f"{len(data.notes)} items, {len(train)} training pairs")


def _paired(pairs: list[Pair], known: Known | None, process: Any, source: str) -> Opened:
    collate = PairCollate(process, known)
    rows = [row for side in zip(*pairs, strict=True) for row in side]
    return Opened(rows, len(pairs), lambda count: collate([pairs[i % len(pairs)] for i in range(count)]), source)


def _labelled(rows: list[Row], targets: torch.Tensor, process: Any, source: str) -> Opened:
    samples = [process(row) for row in rows]

    def batch(count: int) -> Batch:
        chosen = [i % len(rows) for i in range(count)]
        return Batch(stack([samples[i] for i in chosen]), targets=targets[chosen], ids=torch.tensor(chosen))

    return Opened(rows, len(rows), batch, source)


def _captioned(rows: list[Row], process: Any, source: str) -> Opened:
    samples, ids = [process(row) for row in rows], [row["id"] for row in rows]

    def batch(count: int) -> Batch:
        chosen = [i % len(rows) for i in range(count)]
        return Batch(stack([samples[i] for i in chosen]), ids=torch.tensor([ids[i] for i in chosen]))

    return Opened(rows, len(rows), batch, source)


def _made_up_caption(i: int, random: np.random.Generator) -> Row:
    """A picture and its text, of one to six words; one in eight says what another says."""
    words = " ".join(_TITLES).split()
    said = " ".join(random.choice(words, int(random.integers(1, 7))).tolist()) if i % 8 else _TITLES[0]
    return {"id": i if i % 8 else 0, "image": _picture(random), "text": said}


def _made_up_pairs(recipe: Recipe, wanted: int, processor: Any, random: np.random.Generator) -> list[Pair]:
    """Rows of the right form: one in eight without a picture, one in eight without text, as far as the data shows either."""
    shown = split_spec(recipe.data)[1].get("inputs") or ["text", "image"]

    def row(i: int) -> Row:
        made: dict[str, Any] = {"id": i}
        if "text" in shown and i % 8 != 1:
            title = _TITLES[i % len(_TITLES)]
            made |= {"title": title, "topic": "home", "content": f"{title}. " * int(random.integers(1, 12))}
        if "image" in shown and i % 8 != 2:
            made["image"] = _picture(random)
        return made

    rows = [row(i) for i in range(2 * wanted)]
    if not any(processor.sees(r) for r in rows):
        raise ZooError(
            f"this model looks at {', '.join(processor.keys())}, of which no rows can be made up: name the data, with --data DIR"
        )
    return [Pair(rows[i], rows[i + wanted]) for i in range(wanted)]


def _made_up_things(i: int, processor: Any, random: np.random.Generator) -> Row:
    """For each modality what its encoder reads: a picture, frames, a sentence or a sound; one row in eight lacks the first."""
    things: list[Any] = [_picture(random), [_picture(random)] * 3, _TITLES[i % len(_TITLES)], np.zeros(8000, np.float32)]
    row: dict[str, Any] = {"id": i}
    keys: tuple[str, ...] = processor.keys()
    for key in keys[1:] if i % 8 == 1 else keys:
        fitting = next((thing for thing in things if _reads(processor, {key: thing})), None)
        if fitting is None:
            raise ZooError(f"nothing can be made up that the encoder of {key!r} reads: name the data, with --data DIR")
        row[key] = fitting
    return row


def _reads(processor: Any, row: Row) -> bool:
    try:
        processor(row)
    except ZooError:
        return False
    return True


def _picture(random: np.random.Generator) -> Image.Image:
    return Image.fromarray(random.integers(0, 256, (48, 64, 3), dtype=np.uint8))
