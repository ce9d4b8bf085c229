"""Clicks to pairs: which notes are clicked by the same users, counted in steps that leave the disk, not the memory, to hold the log."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from zoo.config import Positive
from zoo.data._co_clicks import UNIT, Events, Pairs, best, counted, gathered, table
from zoo.data._tables import Source, literal, reading
from zoo.errors import Failure, ZooError
from zoo.files import check_target, write_bytes

logger = logging.getLogger("zoo.data")

Moment = str | date | datetime | float  # ISO text, a date, or seconds since 1970; without a time zone it is UTC
DAY = 86400.0


@dataclass(frozen=True, kw_only=True)
class Mine:
    """How clicks become pairs; the defaults are those of NoteLLM (Zhang et al., 2024, https://arxiv.org/abs/2403.01744).

    s(A -> B) is the sum, over the users who clicked A and later B, of 1 / N_u, where N_u is the number of different notes
    that the user clicked in the window: a user who clicks everything says little about any pair.

    Attributes:
        group: The column whose equal values tie clicks together: ``user_id``, or a session.
        directed: Count A -> B only where the first click on A came before the last one on B; else wherever both were clicked.
        window_days: Only the last so many days of the log count; None: all of it.
        low: Pairs that score less are dropped as chance.
        up: Pairs that score more are dropped as outliers.
        top: Partners kept for each note.
        rank_by: ``score``, or ``cosine`` = n_ab / sqrt(n_a n_b), counted in groups, which keeps popularity out.
            Equal ones are ordered by the id of the partner.
        min_groups: Groups that a pair must be found in.
        min_groups_held_out: The same for the splits after the training window, which are shorter; None: ``min_groups``.
        max_notes: Of a group with more notes, so many are drawn at random; N_u stays. The work grows with the square of it. None: all.
        seed: Of that draw.
    """

    group: str = "user_id"
    directed: bool = True
    window_days: Annotated[float, Field(gt=0)] | None = 7.0
    low: Annotated[float, Field(ge=0)] = 0.01
    up: Annotated[float, Field(ge=0)] = 30.0
    top: Positive = 10
    rank_by: Literal["score", "cosine"] = "score"
    min_groups: Positive = 1
    min_groups_held_out: Positive | None = None
    max_notes: Annotated[int, Field(ge=2)] | None = None
    seed: int = 0


PAPER = Mine()


class Mined(NamedTuple):
    """What mining gives."""

    pairs: pa.Table  # note_a, note_b, score, cosine, n_groups, rank (from 0), sorted by note_a and rank
    statistics: dict[str, Any]


def mine(
    clicks: Path | pa.Table,
    rule: Mine = PAPER,
    *,
    split: str | None = None,
    since: Moment | None = None,
    until: Moment | None = None,
    leave_out: pa.Array | None = None,
    queries: pa.Array | None = None,
    memory: str | None = None,
    scratch: Path | None = None,
) -> Mined:
    """Mine the pairs of notes that the same users click.

    Args:
        clicks: Columns ``note_id``, ``timestamp`` and ``rule.group``; a ``.parquet`` or ``.csv`` file, or a table.
        rule: What counts as a pair.
        split: Only clicks with this value in the column ``split``.
        since: Only clicks at this moment or later.
        until: Only clicks before this moment.
        leave_out: Notes whose clicks do not count, not even for N_u.
        queries: The only notes that get partners; None: all.
        memory: How much DuckDB may hold before it writes to disk, ``"2GB"``; None: four fifths of the machine's. The sorted clicks
            take about 100 bytes each beside it.
        scratch: Folder for what it writes then; None: the system's temporary folder.

    Raises:
        Failure: If memory or disk run out.
        ZooError: If a column is missing or of the wrong type, a file cannot be read, or the log is empty.
    """
    with tempfile.TemporaryDirectory(prefix="zoo_mine_", dir=scratch) as folder:
        con = duckdb.connect()
        try:
            if _one(con, "select current_setting('enable_progress_bar')")[
                0
            ]:  # asked first: in Jupyter without ipywidgets it may not be set
                con.execute("set enable_progress_bar = false")
            con.execute(f"set temp_directory = {literal(folder)}")
            if memory is not None:
                _limit(con, memory)
            with _room(folder, memory):
                source = _checked(Source(con, clicks, "clicks"), rule, split)
                with reading(source.path), _room(folder, memory):  # inside too: a full disk is no fault of the file that is read
                    window = _window(con, source, rule, split, since, until)
                    events, names, statistics = _collect(con, source, rule, split, window, leave_out)
        finally:
            con.close()
    found = _pair_up(events, names, rule, queries)
    return Mined(found.pairs, statistics | found.statistics)


def mine_file(
    clicks: Path,
    out: Path,
    rule: Mine = PAPER,
    *,
    split: str | None = None,
    since: Moment | None = None,
    until: Moment | None = None,
    memory: str | None = None,
    scratch: Path | None = None,
) -> dict[str, Any]:
    """`mine` a file into a parquet file, which is whole or not there.

    Returns:
        The statistics.

    Raises:
        ZooError: As `mine`; and if ``out`` is no ``.parquet`` or cannot be written, or no pair is left.
    """
    if out.suffix != ".parquet":
        raise ZooError(f"{out.name}: pairs are written as parquet: name the file {out.stem}.parquet")
    check_target(out, "--out")
    pairs, statistics = mine(clicks, rule, split=split, since=since, until=until, memory=memory, scratch=scratch)
    if not statistics["pairs"]:
        raise ZooError(f"{clicks.name}: {none_left(rule, statistics)}")
    content = BytesIO()
    pq.write_table(pairs, content)
    write_bytes(out, content.getvalue())
    return statistics


def none_left(rule: Mine, statistics: dict[str, Any]) -> str:
    """Why mining gave no pair, and what would."""
    return (
        f"no pair is left of {statistics['co_clicked']} co-clicked ones: {statistics['below_low']} score less than low={rule.low},"
        f" {statistics['above_up']} more than up={rule.up}, {statistics['few_groups']} are found in fewer than {rule.min_groups} groups"
        f" (of {statistics['groups']} groups by {rule.group!r}): lower them, widen window_days={rule.window_days}, or choose another group"
    )


def seconds(moment: Moment) -> float:
    """A moment as seconds since 1970.

    Raises:
        ZooError: If text is no ISO date.
    """
    if isinstance(moment, str):
        try:
            moment = datetime.fromisoformat(moment)
        except ValueError as e:
            raise ZooError(f"{moment!r} is no date: write 2024-05-31, or 2024-05-31T18:00:00") from e
    if isinstance(moment, date) and not isinstance(moment, datetime):
        moment = datetime(moment.year, moment.month, moment.day)
    if isinstance(moment, datetime):
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    return float(moment)


@contextmanager
def _room(folder: str, memory: str | None) -> Iterator[None]:
    """Say what to do when DuckDB finds no more room in memory, or on the disk of ``folder``."""
    try:
        yield
    except (duckdb.OutOfMemoryException, duckdb.IOException) as e:
        if isinstance(e, duckdb.IOException) and folder not in str(e):  # of the file that is read
            raise
        raise Failure(
            f"mining ran out of room ({str(e).splitlines()[0]}): give DuckDB more memory (memory={memory!r} now), a larger disk than"
            f" that of {folder} (scratch=, or the environment variable TMPDIR), or less to do (window_days, max_notes)"
        ) from e


def _limit(con: duckdb.DuckDBPyConnection, memory: str) -> None:
    try:
        con.execute(f"set memory_limit = {literal(memory)}")
    except duckdb.Error as e:
        raise ZooError(f"memory={memory!r} is no size: write '2GB' or '500MB'") from e


def _checked(source: Source, rule: Mine, split: str | None) -> Source:
    faults = source.missing(rule.group, "note_id", "timestamp", *(["split"] if split is not None else []))
    if faults:
        raise ZooError("\n".join(faults))
    if not source.rows():
        raise ZooError(f"{source.path.name}: it has no rows")
    if split is not None and split not in (have := source.values("split")):
        raise ZooError(f"{source.path.name}: no click of split {split!r} (have: {', '.join(have) or 'none'})")
    source.seconds()
    return source


def _window(
    con: duckdb.DuckDBPyConnection, source: Source, rule: Mine, split: str | None, since: Moment | None, until: Moment | None
) -> str:
    """The clicks that count, as an SQL condition."""
    conditions = [f"{source.at(c)} is not null" for c in (rule.group, "note_id", "timestamp")]
    conditions += [f"{source.at('split')}::varchar = {literal(split)}"] if split is not None else []
    conditions += [f"{source.seconds()} < {seconds(until)!r}"] if until is not None else []
    end = seconds(until) if until is not None else None
    if rule.window_days is not None:
        if end is None:
            (end,) = _one(con, f"select max({source.seconds()}) from {source.sql} where {' and '.join(conditions)}")
        starts = [] if end is None else [end - rule.window_days * DAY]
    else:
        starts = []
    starts += [seconds(since)] if since is not None else []
    conditions += [f"{source.seconds()} >= {max(starts)!r}"] if starts else []
    return " and ".join(conditions)


def _collect(
    con: duckdb.DuckDBPyConnection, source: Source, rule: Mine, split: str | None, window: str, leave_out: pa.Array | None
) -> tuple[Events, pa.ChunkedArray, dict[str, Any]]:
    """Which group clicked which note; the notes' names in order; and how many there are of each."""
    note, group, at = source.at("note_id"), source.at(rule.group), source.seconds()
    if leave_out is not None:
        con.register("left_out", pa.table({"n": leave_out}))
        window += f" and {note} not in (select n from left_out)"
    con.execute(
        "create table held as select n, (row_number() over (order by n) - 1)::integer as number"
        f" from (select distinct {note} as n from {source.sql} where {window})"
    )
    names = con.sql("select n from held order by number").to_arrow_table()["n"]
    clicks = con.sql(
        f"select {group} as g, number, {at} as at from {source.sql} join held on {note} = n where {window} order by g, number"
    ).to_arrow_table()
    events = gathered(
        clicks["g"], clicks["number"].to_numpy(), clicks["at"].to_numpy(), notes=len(names), most=rule.max_notes, seed=rule.seed
    )
    groups = {"groups": len(events.weight), "groups_sampled": int((events.size > rule.max_notes).sum()) if rule.max_notes else 0}
    return events, names, {"clicks": source.rows(), "clicks_used": len(clicks), "notes": len(names), **groups}


def _pair_up(events: Events, names: pa.ChunkedArray, rule: Mine, queries: pa.Array | None) -> Mined:
    """The best partners of the query notes, a share of the notes at a time, so that memory is bounded and a long run shows where it is."""
    asked = np.ones(len(names), bool) if queries is None else pc.is_in(names, value_set=queries).to_numpy()
    counts = dict.fromkeys(("co_clicked", "below_low", "above_up", "few_groups"), 0)
    columns, told = [], 0.0
    for pairs, done in counted(events, asked, directed=rule.directed):
        score = pairs.total / UNIT
        low, up, few = score < rule.low, score > rule.up, pairs.groups < rule.min_groups
        counts = {name: counts[name] + int(n) for name, n in zip(counts, (len(score), low.sum(), up.sum(), few.sum()), strict=True)}
        kept = np.flatnonzero(~(low | up | few))
        pairs, score = Pairs(*(column[kept] for column in pairs)), score[kept]
        cosine = pairs.groups / np.sqrt(events.groups[pairs.a] * events.groups[pairs.b])
        order, rank = best(pairs, pairs.total if rule.rank_by == "score" else cosine, rule.top)
        columns.append((pairs.a[order], pairs.b[order], score[order], cosine[order], pairs.groups[order], rank))
        if told + 0.1 <= done < 1:
            logger.info("mining: %.0f %% of the co-clicks", 100 * done)
            told = done
    found = table(columns, names)
    return Mined(found, {**counts, "pairs": len(found), "query_notes": len(found["note_a"].unique())})


def _one(con: duckdb.DuckDBPyConnection, sql: str) -> tuple[Any, ...]:
    return con.execute(sql).fetchall()[0]
