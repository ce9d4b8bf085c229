"""A table of pictures and texts as training pairs: your own data, in parquet, CSV or JSON lines."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import duckdb
import numpy as np
import pyarrow as pa
from pydantic import Field

from zoo.data._captioned import Captioned, Pictures, each_once
from zoo.data._labelled import find
from zoo.data._looked import Look, look_at, look_into
from zoo.data._splits import Unit, draw_lists
from zoo.data._tables import literal, quoted, reading
from zoo.errors import ZooError, unknown
from zoo.registry import register

logger = logging.getLogger("zoo.data")
SHARES = {"": (0.9, 0.05, 0.05)}
KNOWN = ("image", "id", "split", "group", "planted")
LAYOUT = """a data set of captions is a folder with
  captions.parquet, .csv or .jsonl, or captions-*.parquet (or .csv, .jsonl) in several files, with the columns
    image    the bytes of a picture, or its path relative to the folder
    text     what it shows; a list of texts, or further columns of texts, are named by the setting texts
    id       perhaps: the picture's own name; rows of one id are of one picture. Else rows of one path, or of the same bytes, are
    split    perhaps: train, val, test or another one; without it, pictures are dealt by seed
    group    perhaps: what kind of picture it is, for reports
    planted  perhaps: true where the text is known to be wrong; training never looks at it"""


@register("data", "captions")
def captions(
    root: Path | None,
    *,
    folder: str,
    texts: tuple[str, ...] = ("text",),
    columns: dict[str, str | None] | None = None,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> Captioned:
    """Pictures and their texts, one row a pair, or one row a picture with several texts.

    What is in the table stays in memory, pictures too where they are bytes; large sets keep paths there.

    Args:
        root: The folder of data folders.
        folder: Below ``root``, or an absolute path.
        texts: Columns of texts, each text of a row being of its picture; empty ones are left out.
        columns: Names of the zoo to names in the files, where they differ: ``{image: file}``; ``{group: null}`` leaves one out.
        seed: Of the splits where no column gives them: 90 % train, 5 % are val and 5 % test, by picture.

    Raises:
        ZooError: If the folder or its table is not there, a column is missing, a picture is in two splits, or none can be used.
    """
    place = find(root, folder, LAYOUT)
    given = columns or {}
    if lost := [repr(name) for name in given if name not in KNOWN]:
        raise ZooError(f"columns: {', '.join(lost)} is none of {', '.join(KNOWN)}; texts are named by the setting texts")
    files = tables_of(place)
    table = _table(files, texts, given)
    names, of = _named(table)
    first = table.take(np.unique(of, return_index=True)[1])  # of each picture the row that shows it
    looks = _looks(first["image"], place)
    split = _splits(place, table, names, of, seed)
    rows, captions, number = _said(table, of, looks)
    faults = [f"{name} {look.fault}" for name, look in zip(names, looks, strict=True) if look.fault]
    if not len(rows):
        why = f": {faults[0]}" if faults else ", for none has a text"
        raise ZooError(f"{place}: not one of {len(names)} pictures can be used{why}\n{LAYOUT}")
    speechless = len(names) - len(np.unique(of[rows])) - len(faults)
    if faults or speechless:
        some = f", such as {faults[0]}" if faults else ""
        logger.warning("%s: %d pictures cannot be used and %d have no text%s", place, len(faults), speechless, some)
    where = {str(name): split[of[rows]] == name for name in sorted({*split[of[rows]].tolist()})}
    pairs, planted = np.stack([of[rows], number], 1), _flags(table)[rows]
    return Captioned(
        Pictures(first["image"], place),
        names,
        captions,
        {name: pairs[there] for name, there in where.items()},
        kinds=[kind or "" for kind in first["group"].to_pylist()] if "group" in table.column_names else None,
        planted={name: planted[there] for name, there in where.items()},
        broken=[name for name, look in zip(names, looks, strict=True) if look.fault],
        statistics={
            "files": len(files),
            "rows": len(table),
            "splits": "of the table" if "split" in table.column_names else f"drawn by seed {seed}",
            "pictures_without_a_text": speechless,
            "faults": faults[:10],
        },
        fingerprint=_fingerprint(files, looks, {"texts": texts, "columns": given, "seed": seed}),
    )


def tables_of(place: Path) -> list[Path]:
    """The table's files, in the order of their names, all of one kind.

    Raises:
        ZooError: If there is none, or more than one table.
    """
    found = sorted(p for kind in ("parquet", "csv", "jsonl") for p in (*place.glob(f"captions.{kind}"), *place.glob(f"captions-*.{kind}")))
    if not found:
        there = sorted(p.name for p in place.iterdir())
        raise ZooError(f"{place}: there is no captions.parquet, .csv or .jsonl; there is: {', '.join(there[:10]) or 'nothing'}\n{LAYOUT}")
    if len({p.suffix for p in found}) > 1 or (len(found) > 1 and any(p.stem == "captions" for p in found)):
        raise ZooError(f"{place}: there are {', '.join(p.name for p in found[:4])}: keep one table")
    return found


def _table(files: Sequence[Path], texts: Sequence[str], given: Mapping[str, str | None]) -> pa.Table:
    """image, text (a list), and those of id, split, group and planted that are there."""
    kind = files[0].suffix[1:]
    how = {"parquet": "read_parquet({})", "csv": "read_csv({}, all_varchar = true)", "jsonl": "read_json({}, format = 'newline_delimited')"}
    source = how[kind].format(f"[{', '.join(literal(p) for p in files)}]")
    with duckdb.connect() as con, reading(files[0]):
        con.execute("set arrow_large_buffer_size = true")  # pictures are soon more than 2 GB
        types = {row[0]: row[1] for row in con.execute(f"describe select * from {source}").fetchall()}
        wanted = {name: column for name in KNOWN if (column := given.get(name, name)) is not None}
        needed = [wanted.get("image", "image"), *texts, *(c for c in given.values() if c is not None)]
        if lost := [column for column in dict.fromkeys(needed) if column not in types]:
            raise ZooError("\n".join(f"{files[0]}: {unknown('column', column, types)}" for column in lost) + f"\n{LAYOUT}")
        image = quoted(needed[0]) + (".bytes" if types[needed[0]].startswith("STRUCT") else "")  # as Hugging Face writes pictures
        said = [f"{quoted(t)}::varchar[]" if types[t].endswith("[]") else f"[{quoted(t)}::varchar]" for t in texts]
        chosen = [f"{image} as image", f"list_filter(flatten([{', '.join(said)}]), lambda x: trim(x) <> '') as text"]
        for name, column in wanted.items():
            if name != "image" and column in types:
                chosen.append(f"{quoted(column)}::{'boolean' if name == 'planted' else 'varchar'} as {quoted(name)}")
        table = con.sql(f"select {', '.join(chosen)} from {source}").to_arrow_table()
    if not len(table):
        raise ZooError(f"{files[0]}: it has no rows\n{LAYOUT}")
    counts = {c: table[c].null_count for c in ("image", "id", "split") if c in table.column_names}
    if any(counts.values()):
        raise ZooError(f"{files[0]}: " + "\n".join(f"column {c!r} has {n} empty cells" for c, n in counts.items() if n))
    return table


def _named(table: pa.Table) -> tuple[list[str], np.ndarray]:
    """The pictures' names, and (n,) int64 which of them each row is of."""
    if "id" in table.column_names:
        return each_once(table["id"].to_pylist())
    if _are_paths(table["image"]):
        return each_once(table["image"].to_pylist())
    names, of = each_once([hashlib.sha256(file.as_py()).hexdigest() for file in table["image"]])
    return [f"picture {i}" for i in range(len(names))], of


def _are_paths(files: pa.ChunkedArray) -> bool:
    return bool(pa.types.is_string(files.type) or pa.types.is_large_string(files.type))


def _looks(files: pa.ChunkedArray, place: Path) -> list[Look]:
    """What was seen in each picture."""
    if _are_paths(files):
        paths = [place / file for file in files.to_pylist()]
        found = look_at(paths)
        return [found[path] for path in paths]
    return [look_into(file.as_py()) for file in files]


def _splits(place: Path, table: pa.Table, names: Sequence[str], of: np.ndarray, seed: int) -> np.ndarray:
    """(P,) the split of each picture."""
    if "split" not in table.column_names:
        lists = draw_lists([Unit(name, "") for name in names], SHARES, seed)
        return np.array([lists[name] for name in names], dtype=object)
    split = np.full(len(names), "", dtype=object)
    for row, picture in zip(table["split"].to_pylist(), of.tolist(), strict=True):
        if split[picture] not in ("", row):
            raise ZooError(f"{place}: picture {names[picture]!r} is in split {split[picture]!r} and in split {row!r}")
        split[picture] = row
    return split


def _said(table: pa.Table, of: np.ndarray, looks: Sequence[Look]) -> tuple[np.ndarray, list[str], np.ndarray]:
    """(n,) int64 rows of the table that a pair comes from, the texts without repetitions, and (n,) int64 which of them it has."""
    good = np.array([not look.fault for look in looks])[of]
    found = [(row, text.strip()) for row, said in enumerate(table["text"].to_pylist()) if good[row] for text in said]
    texts, number = each_once([text for _, text in found])
    return np.array([row for row, _ in found], dtype=np.int64), texts, number


def _flags(table: pa.Table) -> np.ndarray:
    """(n,) bool, which rows are known to be wrong."""
    flags = table["planted"].to_pylist() if "planted" in table.column_names else [False] * len(table)
    return np.array([flag is True for flag in flags], dtype=bool)


def _fingerprint(files: Sequence[Path], looks: Sequence[Look], settings: Mapping[str, Any]) -> str:
    total = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in files:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    for look in looks:
        total.update(look.sha256)  # b"" of what is in the table
    return total.hexdigest()
