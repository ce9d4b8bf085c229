"""Read the tables of a notes data set, and say everything that is wrong with them at once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeAlias

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from zoo.data._mining import DAY, Mine, Moment, seconds
from zoo.data._tables import Source, quoted, reading
from zoo.errors import Absent, ZooError

KNOWN = {
    "retail_notes": "3,659 products of a British gift shop with drawn pictures and a year of real purchases, made from UCI 'Online Retail'"
    " (Chen, Sain, Guo, 2012; https://archive.ics.uci.edu/dataset/352/online+retail, CC BY 4.0)",
}
LAYOUT = """A notes data set is a folder with
  notes.parquet or .csv   note_id, and any of title, topic, content, image (bytes, or a path relative to the folder)
  clicks.parquet or .csv  user_id, note_id, timestamp (seconds since 1970, or a date and time), perhaps split (train, val, test)
  pairs.parquet or .csv   note_a, note_b, perhaps split; without this file, pairs are mined from the clicks
The folder that holds it is named by --data DIR or ZOO_DATA on the command line, and by data_root= in Python."""
FIELDS = ("title", "topic", "content")
SAID = (*FIELDS, "category")  # the last is for objectives, and no model reads it
Table: TypeAlias = Path | pa.Table


class Indexed(NamedTuple):
    """Notes that were read and tidied before."""

    notes: pa.Table  # as those of `Loaded`; an image may be the place where it lies
    digest: str  # of the content


class Tables(NamedTuple):
    """A data set as it lies in files or in memory."""

    notes: Table | Indexed
    clicks: Table | None
    pairs: Table | None


class Loaded(NamedTuple):
    """A data set whose ids are row numbers, without the rows that name nothing."""

    notes: pa.Table  # note_id, title, topic, content, image, split: null where absent, also as a whole
    clicks: pa.Table | None  # group, note (row number), timestamp (float64 seconds), split
    pairs: pa.Table | None  # a, b (row numbers), split; in the order of the file
    counts: dict[str, int]
    digest: str  # of the content


def find(root: Path | None, folder: str) -> tuple[Path, Tables]:
    """The folder of a data set, and its files.

    Args:
        root: The folder of data folders.
        folder: Below ``root``, or an absolute path.

    Raises:
        Absent: If it is not there. It says how such a folder looks.
        ZooError: If a file is missing or there twice.
    """
    place = Path(folder) if root is None else root / folder
    about = f"{folder} is: {KNOWN[Path(folder).name]}\n" if Path(folder).name in KNOWN else ""
    if root is None and not place.is_absolute():
        raise Absent(f"the data set {folder!r} is looked for in a folder of data folders, and none is given\n{about}{LAYOUT}")
    if not place.is_dir():
        raise Absent(f"no folder {place}\n{about}{LAYOUT}")
    faults: list[str] = []
    found = {name: table_of(place, name, faults) for name in Tables._fields}
    if found["notes"] is None:
        faults.append(
            f"there is no notes.parquet or notes.csv; there is: {', '.join(sorted(p.name for p in place.iterdir())) or 'nothing'}"
        )
    if faults:
        raise ZooError(f"{place}: " + "\n".join(faults) + f"\n{about}{LAYOUT}")
    return place, Tables(**found)


def table_of(place: Path, name: str, faults: list[str]) -> Path | None:
    """The file of a table, parquet or CSV; two of them are a fault."""
    files = [p for p in (place / f"{name}.parquet", place / f"{name}.csv") if p.is_file()]
    if len(files) > 1:
        faults.append(f"there are {files[0].name} and {files[1].name}: keep one")
    return files[0] if files else None


def load(
    tables: Tables, where: str, columns: Mapping[str, str | None], rule: Mine, starts: tuple[Moment, Moment] | None, from_file: bool | None
) -> Loaded:
    """Read, check, and turn ids into row numbers.

    Args:
        tables: The data set.
        where: Its name, for messages.
        columns: Names of the zoo to names of the files, where they differ; None leaves the column out.
        rule: Its ``group`` is needed in the clicks, its ``rank_by`` and ``top`` choose among ranked pairs of a file.
        starts: When val and test begin, as moments or as fractions of the log's time; None: the clicks' column ``split``,
            or where there is none, the last fifth, in halves.
        from_file: Pairs come from the file; else from the clicks; None: from the file where there is one.

    Raises:
        ZooError: With every fault of the data set.
    """
    faults: list[str] = []
    con = duckdb.connect()
    try:
        if from_file and tables.pairs is None:
            faults.append("pairs: file, but there is no pairs.parquet or pairs.csv: write pairs: mine")
        file = tables.pairs if from_file is not False else None
        if file is None and tables.clicks is None:
            faults.append("there are neither clicks to mine nor pairs: write clicks.parquet, or pairs.parquet")
        counts: dict[str, int] = {}
        known = tables.notes
        notes = known.notes if isinstance(known, Indexed) else _try(faults, lambda: read_table(con, known, columns))
        ids = notes["note_id"].cast(pa.string()).combine_chunks() if notes is not None else None
        clicks = _try(faults, lambda: _clicks(con, tables.clicks, columns, rule, starts, ids, counts, mined=file is None))
        pairs = _try(faults, lambda: _pairs(con, file, columns, rule, ids, counts))
    finally:
        con.close()
    if faults or notes is None:
        raise ZooError(f"{where}: {faults[0]}" if len(faults) == 1 else f"{where}: {len(faults)} faults\n" + "\n".join(faults))
    return Loaded(notes, clicks, pairs, {"notes": len(notes), **counts}, _digest(tables))


def _try(faults: list[str], read: Callable[[], pa.Table | None]) -> pa.Table | None:
    try:
        return read()
    except ZooError as e:
        faults += str(e).splitlines()
        return None


def _raise(faults: list[str]) -> None:
    if faults:
        raise ZooError("\n".join(faults))


def read_table(con: duckdb.DuckDBPyConnection, table: Table, columns: Mapping[str, str | None]) -> pa.Table:
    """The notes: note_id, title, topic, content, category, image, split; null where there is nothing.

    Raises:
        ZooError: With everything that is wrong in the table.
    """
    source = Source(con, table, "notes", columns)
    name = source.path.name
    asked = [c for c in (*SAID, "image", "split") if columns.get(c) is not None]  # a mapping that leads nowhere is an error
    faults = source.missing("note_id", *asked)
    there = [c for c in (*FIELDS, "image") if source.has(c) and columns.get(c, c) is not None]
    if not there and not faults:
        faults.append(f"{name}: none of the columns title, topic, content, image is there (have: {', '.join(source.types)})")
    if "image" in there and source.type("image") not in ("BLOB", "VARCHAR"):
        faults.append(f"{name}: column 'image' is {source.type('image')}: write the bytes of an image file, or its path")
    _raise(faults)
    also = [c for c in ("category", "split") if source.has(c)]
    text = {c: _text(source, c) if c in (*there, *also) else "null::varchar" for c in (*SAID, "split")}
    image = source.at("image") if "image" in there else "null::blob"
    wanted = [f"{source.at('note_id')} as note_id", f"{image} as image", *(f"{sql} as {c}" for c, sql in text.items())]
    with reading(source.path):
        notes = con.sql(f"select {', '.join(wanted)} from {source.sql}").to_arrow_table()
    if not len(notes):
        raise ZooError(f"{name}: it has no rows")
    check_ids(notes, name)
    return tidied(notes)


def check_ids(notes: pa.Table, name: str) -> None:
    """Whether every note has an id of its own.

    Raises:
        ZooError: If not. It names some that stand there twice.
    """
    nameless = notes["note_id"].null_count
    faults = [f"{name}: {nameless} rows have no note_id"] if nameless else []
    counted = notes["note_id"].value_counts()
    twice = counted.filter(pc.greater(counted.field("counts"), 1)).field("values").drop_null()
    if len(twice):
        faults.append(f"{name}: {len(twice)} note_ids stand there more than once, such as {', '.join(map(repr, twice[:5].to_pylist()))}")
    _raise(faults)


def tidied(notes: pa.Table) -> pa.Table:
    """The notes without white space around their texts; a text of nothing else is null."""
    for field in FIELDS:
        trimmed = pc.utf8_trim_whitespace(notes[field])
        notes = notes.set_column(notes.column_names.index(field), field, pc.if_else(pc.equal(trimmed, ""), None, trimmed))
    return notes


def _text(source: Source, column: str) -> str:
    """A list of words becomes one text, a number its digits."""
    at = source.at(column)
    return f"array_to_string({at}, ', ')" if source.type(column).endswith("[]") else f"{at}::varchar"


def _clicks(
    con: duckdb.DuckDBPyConnection,
    table: Table | None,
    columns: Mapping[str, str | None],
    rule: Mine,
    starts: tuple[Moment, Moment] | None,
    ids: pa.Array | None,
    counts: dict[str, int],
    *,
    mined: bool,
) -> pa.Table | None:
    if table is None:
        return None
    source = Source(con, table, "clicks", columns)
    _raise(source.missing(*([rule.group] if mined else []), "note_id", "timestamp"))
    at = source.seconds()
    group = source.at(rule.group) if mined else "0"
    complete = f"{group} is not null and {source.at('note_id')} is not null and {at} is not null"
    with reading(source.path):
        split = _split(con, source, at, starts)
        rows = con.sql(
            f"select {group} as {quoted(rule.group)}, {source.at('note_id')}::varchar as note_id, {at} as timestamp, {split} as split"
            f" from {source.sql} where {complete}"
        ).to_arrow_table()
        counts["clicks"] = source.rows()
    if not len(rows):
        raise ZooError(f"{source.path.name}: it has no complete rows")
    counts["clicks_incomplete"] = counts["clicks"] - len(rows)
    if ids is None:
        return None
    known, counts["clicks_unknown"] = _indexed(rows, {"note_id": "note"}, ids, source.path.name)
    return known


def _split(con: duckdb.DuckDBPyConnection, source: Source, at: str, starts: tuple[Moment, Moment] | None) -> str:
    if starts is None and source.has("split"):
        return f"{source.at('split')}::varchar"
    first, last = con.execute(f"select min({at}), max({at}) from {source.sql}").fetchall()[0]
    if first is None:
        return "null::varchar"
    val, test = ((first + x * (last - first)) if isinstance(x, float) and x <= 1 else seconds(x) for x in starts or (0.8, 0.9))
    if val >= test:
        raise ZooError(f"val begins {(val - test) / DAY:.1f} days after test: test_from must lie after val_from")
    return f"case when {at} < {val!r} then 'train' when {at} < {test!r} then 'val' else 'test' end"


def _pairs(
    con: duckdb.DuckDBPyConnection,
    table: Table | None,
    columns: Mapping[str, str | None],
    rule: Mine,
    ids: pa.Array | None,
    counts: dict[str, int],
) -> pa.Table | None:
    if table is None:
        return None
    source = Source(con, table, "pairs", columns)
    _raise(source.missing("note_a", "note_b"))
    split = f"{source.at('split')}::varchar" if source.has("split") else "'train'"
    ranked = next((c for c in (f"rank_{rule.rank_by}", "rank") if source.has(c)), None)
    kept = f"where {source.at(ranked)} between 0 and {rule.top - 1}" if ranked else ""
    with reading(source.path):
        rows = con.sql(
            f"select {source.at('note_a')}::varchar as note_a, {source.at('note_b')}::varchar as note_b, {split} as split"
            f" from {source.sql} {kept}"
        ).to_arrow_table()
    if not len(rows):
        raise ZooError(f"{source.path.name}: it has no rows" + (f" with {ranked} between 0 and {rule.top - 1}" if ranked else ""))
    if ids is None:
        return None
    known, counts["pairs_unknown"] = _indexed(rows, {"note_a": "a", "note_b": "b"}, ids, source.path.name)
    return known


def _indexed(rows: pa.Table, names: Mapping[str, str], ids: pa.Array, file: str) -> tuple[pa.Table, int]:
    """``rows`` with the note ids in the columns ``names`` as row numbers under their new names, and how many rows were dropped."""
    out = rows
    for old, new in names.items():
        out = out.set_column(out.column_names.index(old), new, pc.index_in(rows[old], ids).cast(pa.int64()))
    for new in names.values():
        out = out.filter(pc.is_valid(out[new]))
    if not len(out):
        seen = ", ".join(repr(v) for v in rows[next(iter(names))][:3].to_pylist())
        raise ZooError(f"{file}: no note_id is one of the notes': there {seen}, in the notes {', '.join(map(repr, ids[:3].to_pylist()))}")
    return out, len(rows) - len(out)


def _digest(tables: Tables) -> str:
    total = hashlib.sha256()
    for name, table in zip(tables._fields, tables, strict=True):
        total.update(name.encode())
        if isinstance(table, Path):
            with table.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        elif isinstance(table, Indexed):
            total.update(table.digest.encode())
        elif table is not None:
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table)
            total.update(sink.getvalue())
    return total.hexdigest()
