"""Notes in many tar or parquet files as training pairs: data that is larger than memory."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import numpy as np

from zoo.data._collection import Collection, Input, tell_broken
from zoo.data._folder import Indexed, Tables, check_ids, load, table_of
from zoo.data._mining import PAPER, Mine, Moment
from zoo.data._shard_rows import ShardRows, find_shards, index_shards
from zoo.errors import Absent, ZooError
from zoo.registry import register


@register("data", "shards")
def shards(
    root: Path | None,
    *,
    folder: str,
    items: str | list[str],
    columns: dict[str, str | None] | None = None,
    pairs: Literal["file", "mine"] | None = None,
    mine: Mine = PAPER,
    val_from: Moment | None = None,
    test_from: Moment | None = None,
    cold: str | None = "cold_test",
    inputs: list[Input] | None = None,
    unreadable: Literal["refuse", "skip"] = "refuse",
    index: str | None = None,
) -> Collection:
    """Notes in shards, tar in WebDataset's layout or parquet, and the pairs that their clicks make.

    An index of texts and of the places of images is made once, beside the shards, and mapped into memory: then any note can be read
    from its shard at any time. So batches, resumption, workers and processes are those of every other data set.

    Args:
        root: The folder of data folders.
        folder: Below ``root``, or an absolute path; it also holds ``clicks`` and perhaps ``pairs``, as of ``notes``.
        items: The shards: ``notes-*.tar``, or ``notes-{000..127}.tar``, which also says that none may be missing.
        columns: Names of the zoo to names in the files, where they differ; the text of a ``.txt`` is called ``txt``.
        pairs: Take them from the file, or mine each split; None: from the file where there is one.
        mine: How they are mined, and which rank of a file is taken.
        val_from: When val begins, as of ``notes``.
        test_from: When test begins.
        cold: The value of the notes' ``split`` that keeps notes out of all splits but the one of this name.
        inputs: What rows show, ``[image]`` for a run without text; None: both.
        unreadable: What happens to a shard that is missing, cut or damaged: nothing goes on, or it is left out, and counted.
        index: A folder for the index, where the shards' own cannot be written.

    Raises:
        Failure: If a shard cannot be read, or the index not be written.
        ZooError: If there are no shards, or with everything that is wrong in them.
    """
    if (val_from is None) != (test_from is None):
        raise ZooError("val_from and test_from go together: give both, or neither")
    if root is None and not Path(folder).is_absolute():
        raise Absent(f"the data set {folder!r} is looked for in a folder of data folders, and none is given: --data DIR, or data_root=")
    place, columns = Path(folder) if root is None else root / folder, columns or {}
    skip = unreadable == "skip"
    found, faults = index_shards(place, find_shards(place, items), columns, index=None if index is None else Path(index), skip=skip)
    rows = ShardRows(found, columns, ["text", "image"] if inputs is None else inputs)
    check_ids(rows.table, str(place))
    broken = np.flatnonzero(rows.table["broken"].to_numpy()).tolist()
    if broken:
        tell_broken([rows.table["note_id"][i].as_py() for i in broken])
    digest = hashlib.sha256("".join(shard.sha256 for shard in found).encode()).hexdigest()
    twice: list[str] = []
    tables = Tables(Indexed(rows.table, digest), table_of(place, "clicks", twice), table_of(place, "pairs", twice))
    if twice:
        raise ZooError(f"{place}: " + "\n".join(twice))
    starts = None if val_from is None or test_from is None else (val_from, test_from)
    from_file = None if pairs is None else pairs == "file"
    loaded = load(tables, str(place), columns, mine, starts, from_file)
    loaded.counts.update(shards=len(found), shards_left_out=len(faults))
    settings = {"columns": columns, "pairs": pairs, "starts": starts}
    return Collection(loaded, folder=None, inputs=rows.inputs, rule=mine, cold=cold, settings=settings, checked=(rows, broken))
