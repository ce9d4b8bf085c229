"""Parquet and CSV files as SQL sources: where a column is, of what type it is, and what is wrong with the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pyarrow as pa

from zoo.errors import ZooError, unknown

NUMBERS = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT", "FLOAT", "DOUBLE")
UNREADABLE = (duckdb.InvalidInputException, duckdb.IOException, duckdb.ConversionException, duckdb.SerializationException)
TEXT_IN_CSV = ("user_id", "note_id", "note_a", "note_b", "title", "topic", "content", "image", "split")


def quoted(name: str) -> str:
    """A column name as SQL."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str | Path) -> str:
    """A string as SQL."""
    return "'" + str(text).replace("'", "''") + "'"


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what DuckDB says of an unreadable file into one sentence.

    Raises:
        ZooError: If the file is not UTF-8, or no table at all.
    """
    try:
        yield
    except UNREADABLE as e:
        if path.suffix == ".csv" and (line := _not_utf8(path)):
            raise ZooError(f"{path.name}: line {line} is not UTF-8: save it again as UTF-8, for example: iconv -f LATIN1 -t UTF-8") from e
        raise ZooError(f"{path.name}: cannot be read as {path.suffix[1:]}: {str(e).splitlines()[0]}") from e


def _not_utf8(path: Path) -> int:
    """Number of the first line that is not UTF-8, counted from 1; 0 for none."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 0


class Source:
    """One table, in a file or in memory, under the names that the zoo uses.

    Args:
        con: Where to read it.
        table: A ``.parquet`` or ``.csv`` file, or a table in memory. Ids and texts of a CSV stay text, so that ``007`` is not 7.
        name: What it is, ``clicks``: it stands in messages, and names a table in memory in SQL.
        columns: Names of the zoo to names of the file, where they differ; None for a column to leave out.

    Raises:
        ZooError: If the file is missing or unreadable.
    """

    def __init__(
        self, con: duckdb.DuckDBPyConnection, table: Path | pa.Table, name: str, columns: Mapping[str, str | None] | None = None
    ) -> None:
        self.con, self.columns = con, dict(columns or {})
        self.path = table if isinstance(table, Path) else Path(name)
        if isinstance(table, pa.Table):
            con.register(name, table)
            self.sql = quoted(name)
        elif not table.is_file():
            raise ZooError(f"no file {table}: give a .parquet or .csv of {name}")
        elif table.suffix == ".parquet":
            self.sql = f"read_parquet({literal(table)})"
        elif table.suffix == ".csv":
            self.sql = self._csv(table)
        else:
            raise ZooError(f"{table.name}: {name} are read from .parquet or .csv, not from {table.suffix or 'a file without a suffix'}")
        with reading(self.path):
            self.types = self._describe(self.sql)

    def _describe(self, sql: str) -> dict[str, str]:
        return {row[0]: row[1] for row in self.con.execute(f"describe select * from {sql}").fetchall()}

    def _csv(self, path: Path) -> str:
        plain = f"read_csv({literal(path)}, header = true"
        with reading(path):
            header = self._describe(plain + ")")
        text = {*(self.columns.get(c) or c for c in TEXT_IN_CSV)} & header.keys()
        return plain + (", types = {" + ", ".join(f"{literal(c)}: 'VARCHAR'" for c in sorted(text)) + "})" if text else ")")

    def has(self, column: str) -> bool:
        """Whether the table has what the zoo calls ``column``."""
        return self.columns.get(column, column) in self.types

    def at(self, column: str) -> str:
        """SQL of what the zoo calls ``column``."""
        return quoted(self.columns.get(column) or column)

    def type(self, column: str) -> str:
        """Its SQL type."""
        return self.types[self.columns.get(column) or column]

    def missing(self, *columns: str) -> list[str]:
        """One sentence for every column that is not there."""
        lost = [self.columns.get(c) or c for c in columns if not self.has(c)]
        return [f"{self.path.name}: " + unknown("column", c, self.types) for c in lost]

    def seconds(self, column: str = "timestamp") -> str:
        """SQL of a moment as float64 seconds since 1970 (UTC): numbers are seconds already, dates and timestamps are converted.

        Raises:
            ZooError: If the column is neither.
        """
        kind = self.type(column)
        if kind.startswith(("TIMESTAMP", "DATE")):
            return f"epoch({self.at(column)})"
        if kind in NUMBERS:
            return f"{self.at(column)}::double"
        example = self.con.execute(f"select any_value({self.at(column)}) from {self.sql}").fetchall()[0][0]
        raise ZooError(
            f"{self.path.name}: column {self.columns.get(column) or column!r} is {kind}, such as {example!r}:"
            " write seconds since 1970 as a number, or a timestamp such as 2024-05-31 18:00:00"
        )

    def values(self, column: str) -> list[str]:
        """What stands in ``column``, as text, each once and sorted."""
        with reading(self.path):
            found = self.con.execute(f"select distinct {self.at(column)}::varchar as v from {self.sql} where v is not null order by v")
            return [value for (value,) in found.fetchall()]

    def rows(self) -> int:
        """How many rows it has."""
        with reading(self.path):
            return int(self.con.execute(f"select count(*) from {self.sql}").fetchall()[0][0])
