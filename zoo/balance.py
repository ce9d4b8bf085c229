"""Balance captions by what they speak of: no more than so many pairs for a query, as CLIP's training set was made."""

from __future__ import annotations

import csv
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa

from zoo.data._caption_shards import Reader, Writer, words_of
from zoo.data.captions import tables_of
from zoo.errors import ZooError
from zoo.files import check_target, sync, write_json

logger = logging.getLogger("zoo.balance")

HELD = 1_000_000  # words that are counted in memory, before the rest goes to the disk


class Balanced(NamedTuple):
    """What came of it."""

    pairs: int  # to choose from
    kept: int
    unmatched: int  # pairs that no query asks for, which are left out
    others: int  # rows of splits other than train, which all stay
    queries: int
    capped: int  # queries with more pairs than they may ask for


class Limits:
    """How many pairs each query may still ask for, of how many that are still to come.

    Algorithm S (Fan et al., 1962; Knuth, The art of computer programming, vol. 2, 3.4.2): each query ends with as many as it may ask for,
    every subset being equally likely, after one look at each pair and without holding any.

    Args:
        counts: {query: pairs that match it}.
        most: That a query asks for.
    """

    def __init__(self, counts: Mapping[str, int], most: int) -> None:
        self.left = dict(counts)
        self.need = {query: min(most, count) for query, count in counts.items()}

    def ask(self, query: str, drawn: float) -> bool:
        """Whether the query takes the next pair that matches it.

        Args:
            query: One that does.
            drawn: A number in [0, 1).
        """
        left, need = self.left[query], self.need[query]
        self.left[query] = left - 1
        if drawn * left >= need:
            return False
        self.need[query] = need - 1
        return True


def balance(
    source: str | Path,
    out: str | Path,
    *,
    queries: str | Path | None = None,
    most: int = 20_000,
    least: int = 100,
    texts: Sequence[str] = ("text",),
    seed: int = 0,
    batch_size: int = 10_000,
) -> Balanced:
    """Write a data set of captions in which no query asks for more than ``most`` pairs.

    As CLIP's training set was made (Radford et al., 2021, https://arxiv.org/abs/2103.00020: 500,000 queries, 20,000 pairs each), in the
    way that MetaCLIP found out (Xu et al., 2023, https://arxiv.org/abs/2309.16671): a pair matches each query that is in its text, words
    being whole ones in lower case; queries with more matches ask for a part of them, drawn evenly; a pair stays if any query asks for it.
    So a query may end with more than ``most`` pairs, namely those that others asked for. Where MetaCLIP draws for each pair by itself, a
    query here asks for exactly as many as it may.

    The files are read twice, row by row; what is held are the queries with their counts. The folder is whole or not there.

    Args:
        source: A folder as of the data set ``captions``, in parquet or JSON lines. Where there is a column ``split``, rows of other splits
            than train stay as they are. Relative paths of pictures are written anew.
        out: A folder that is not there, or empty. Besides the data it gets ``queries.csv`` (query, pairs, kept) and ``balance.json``.
        queries: A file with a query a line, such as titles of Wikipedia; None: every word that ``least`` texts have, or more.
        most: Pairs that a query asks for.
        least: Texts that have a word, for it to be a query where no file names them.
        texts: Columns of texts; the texts of a row are matched together.
        seed: Of the draw.
        batch_size: Rows at a time.

    Raises:
        ZooError: On a fault of the arguments or the files, if no pair matches a query, or ``out`` holds something.
    """
    source, out = Path(source), Path(out)
    settings = {"most": most, "least": None if queries is not None else least, "texts": list(texts), "seed": seed}
    if most < 1 or least < 1 or not texts:
        raise ZooError(f"most={most}, least={least}, texts={', '.join(texts) or 'none'}: write 1 or more of each")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ZooError(f"--out {out} is there: write the name of a new folder")
    if not source.is_dir():
        raise ZooError(f"no folder {source}: name one with captions.parquet or .jsonl, or captions-*.parquet")
    files = tables_of(source)
    if files[0].suffix == ".csv":
        raise ZooError(f"{files[0]}: captions are balanced in parquet or JSON lines: save it as one of them")
    check_target(out.with_name(f"{out.name}.part.json"), "--out")  # makes the folder that out is in
    beside = out.with_name(f".{out.name}.{os.getpid()}.part")
    beside.mkdir()
    try:
        reader = Reader(files, tuple(texts), batch_size)
        counts = _frequent(reader, least, beside) if queries is None else _counted(reader, _listed(queries))
        prefix = os.path.relpath(source.resolve(), out.absolute().parent.resolve() / out.name)
        done, kept = _written(reader, counts, most, seed, beside, prefix)
        about = {"source": str(source), "queries_of": None if queries is None else str(queries)}
        _tables(beside, counts, kept, done, about | settings)
        if out.is_dir():
            out.rmdir()
        beside.rename(out)
        sync(out.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return done


def _listed(path: str | Path) -> dict[str, int]:
    """{query: 0} of a file."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ZooError(f"--queries {path} cannot be read as lines in UTF-8 ({e})") from e
    found = {" ".join(words_of(line)): 0 for line in lines}
    found.pop("", None)
    if not found:
        raise ZooError(f"--queries {path} has no line with a word: write a query a line")
    return found


def _train(reader: Reader) -> Iterator[list[str]]:
    """The words of each pair to choose from."""
    for path in reader.files:
        for batch in reader.batches(path, whole=False):
            yield from (words for words in reader.rows(path, batch) if words is not None)


def _frequent(reader: Reader, least: int, beside: Path) -> dict[str, int]:
    """{word: texts that have it} of those that enough have; what does not fit into memory is counted on the disk."""
    place = beside / "words.duckdb"
    with duckdb.connect(str(place), config={"memory_limit": "1GB"}) as con:
        con.execute("create table found (word varchar, n bigint)")
        here: Counter[str] = Counter()

        def put() -> None:
            batch = pa.table({"word": pa.array(here.keys(), pa.string()), "n": pa.array(here.values(), pa.int64())})
            con.register("batch", batch)
            con.execute("insert into found select * from batch where word <> ''")
            here.clear()

        for words in _train(reader):
            here.update({*words})
            if len(here) > HELD:
                put()
        put()
        every = "select word, sum(n)::bigint as texts from found group by word"
        counts = dict(con.execute(f"{every} having texts >= ? order by word", [least]).fetchall())
        most = con.execute(f"{every} order by texts desc, word limit 1").fetchall()
    place.unlink()
    if not counts:
        said = f"the most frequent one, {most[0][0]!r}, is in {most[0][1]}" if most else "there is none"
        raise ZooError(f"least={least}: no word is in so many texts ({said}): write a smaller --least, or --queries FILE")
    return counts


def _counted(reader: Reader, counts: dict[str, int]) -> dict[str, int]:
    """How many pairs match each query."""
    lengths = _lengths(counts)
    for words in _train(reader):
        for query in _matching(words, counts, lengths):
            counts[query] += 1
    if not any(counts.values()):
        raise ZooError(f"none of {len(counts)} queries, such as {next(iter(counts))!r}, is in a text: look at the language and at --text")
    return counts


def _lengths(queries: Mapping[str, int]) -> list[int]:
    """Of queries in words, each length once."""
    return sorted({query.count(" ") + 1 for query in queries})


def _matching(words: Sequence[str], queries: Mapping[str, int], lengths: Sequence[int]) -> list[str]:
    """The queries that are in a text, each once, in the order in which they come."""
    grams = (" ".join(words[i : i + n]) for n in lengths for i in range(len(words) - n + 1))
    return [gram for gram in dict.fromkeys(grams) if gram in queries]


def _written(reader: Reader, counts: Mapping[str, int], most: int, seed: int, beside: Path, prefix: str) -> tuple[Balanced, Counter[str]]:
    """Write what stays of each file; and how many of the pairs that stay match each query."""
    limits, lengths, kept = Limits(counts, most), _lengths(counts), Counter[str]()
    pairs = unmatched = others = stay = 0
    last = time.monotonic()
    for number, path in enumerate(reader.files):
        draw = np.random.default_rng([seed, number])
        with Writer(beside / path.name, prefix) as writer:
            for batch in reader.batches(path, whole=True):
                rows = reader.rows(path, batch)
                mask = np.ones(len(rows), dtype=bool)
                for i, words in enumerate(rows):
                    if words is None:
                        others += 1
                        continue
                    found = _matching(words, counts, lengths)
                    asked = [limits.ask(query, x) for query, x in zip(found, draw.random(len(found)).tolist(), strict=True)]
                    mask[i] = any(asked)
                    pairs, unmatched, stay = pairs + 1, unmatched + (not found), stay + int(mask[i])
                    if mask[i]:
                        kept.update(found)
                writer.write(batch, mask)
                if time.monotonic() - last > 10:
                    last = time.monotonic()
                    logger.info("balancing: %d pairs read, %d stay", pairs, stay)
    capped = sum(count > most for count in counts.values())
    return Balanced(pairs, stay, unmatched, others, len(counts), capped), kept


def _tables(beside: Path, counts: Mapping[str, int], kept: Mapping[str, int], done: Balanced, about: Mapping[str, Any]) -> None:
    with (beside / "queries.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("query", "pairs", "kept"))
        writer.writerows((query, n, kept[query]) for query, n in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))
    write_json(beside / "balance.json", {**done._asdict(), **about})
