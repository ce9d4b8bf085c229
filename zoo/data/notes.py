"""A folder of notes and clicks as training pairs: real data, in parquet or CSV."""

from __future__ import annotations

from datetime import date, datetime
from pathlib import Path
from typing import Literal

from zoo.data._collection import Collection, Input
from zoo.data._folder import find, load
from zoo.data._mining import PAPER, Mine
from zoo.errors import ZooError
from zoo.registry import register

Start = date | datetime | str | float


@register("data", "notes")
def notes(
    root: Path | None,
    *,
    folder: str,
    columns: dict[str, str | None] | None = None,
    pairs: Literal["file", "mine"] | None = None,
    mine: Mine = PAPER,
    val_from: Start | None = None,
    test_from: Start | None = None,
    cold: str | None = "cold_test",
    inputs: list[Input] | None = None,
) -> Collection:
    """Notes (title, topic, content, image) and the pairs that their clicks make.

    The folder holds ``notes.parquet`` or ``.csv`` (``note_id``, and any of ``title``, ``topic``, ``content``, ``image`` as bytes
    or as a path relative to the folder, and ``category``, which models do not read, but may be asked for in training), ``clicks``
    (``user_id``, ``note_id``, ``timestamp``) and perhaps ``pairs`` (``note_a``, ``note_b``, ``split``, and ``rank`` or
    ``rank_score`` and ``rank_cosine``, from 0, of which the first ``mine.top`` are taken).

    Args:
        root: The folder of data folders.
        folder: Below ``root``, or an absolute path.
        columns: Names of the zoo to names in the files, where they differ: ``{title: title_masked}``; ``{topic: null}`` leaves one out.
        pairs: Take them from the file, or mine each split; None: from the file where there is one.
        mine: How they are mined, and which rank of a file is taken.
        val_from: When val begins: a date, or a fraction of the log's time up to 1. None: the clicks' column ``split`` says it,
            or where there is none, 0.8 and 0.9.
        test_from: When test begins.
        cold: The value of the notes' column ``split`` that keeps notes out of all splits but the one of this name.
        inputs: What rows show, ``[image]`` for a run without text; None: both.

    Raises:
        ZooError: If the folder is not there, or with everything that is wrong in it.
    """
    if (val_from is None) != (test_from is None):
        raise ZooError("val_from and test_from go together: give both, or neither")
    columns = columns or {}
    starts = None if val_from is None or test_from is None else (val_from, test_from)
    place, tables = find(root, folder)
    loaded = load(tables, str(place), columns, mine, starts, None if pairs is None else pairs == "file")
    settings = {"columns": columns, "pairs": pairs, "starts": starts}
    shown: list[Input] = ["text", "image"] if inputs is None else inputs
    return Collection(loaded, folder=place, inputs=shown, rule=mine, cold=cold, settings=settings)
