"""Co-click mining equals counting by hand, whatever the settings."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.data import _co_clicks, _mining
from zoo.data._mining import DAY, Mine, mine, mine_file
from zoo.errors import Failure, ZooError

RETAIL = Path(__file__).parents[2] / "shared/data/retail_notes"
WHOLE = Mine(low=0.0, up=1e9, window_days=None, top=1000)


def log(rows: list[tuple[int, Any, float]]) -> pa.Table:
    users, notes, times = zip(*rows, strict=True)
    return pa.table({"user_id": users, "note_id": notes, "timestamp": pa.array(times, pa.float64())})


def by_hand(rows: list[tuple[int, int, float]], rule: Mine) -> list[tuple[int, int, float, float, int, int]]:
    end = max(t for _, _, t in rows)
    begin = -math.inf if rule.window_days is None else end - rule.window_days * DAY
    clicked: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for user, note, t in rows:
        if t >= begin:
            clicked[user][note].append(t)
    score: dict[tuple[int, int], float] = defaultdict(float)
    groups: dict[tuple[int, int], int] = defaultdict(int)
    held: dict[int, int] = defaultdict(int)
    for notes in clicked.values():
        for a in notes:
            held[a] += 1
            for b in notes:
                if a != b and (not rule.directed or min(notes[a]) < max(notes[b])):
                    score[a, b] += 1 / len(notes)
                    groups[a, b] += 1
    out = []
    for a in sorted(held):
        partners = []
        for (x, b), s in score.items():
            if x == a and rule.low <= s <= rule.up and groups[a, b] >= rule.min_groups:
                cosine = groups[a, b] / math.sqrt(held[a] * held[b])
                partners.append((-round(s if rule.rank_by == "score" else cosine, 12), b, s, cosine, groups[a, b]))
        out += [(a, b, s, c, n, rank) for rank, (_, b, s, c, n) in enumerate(sorted(partners)[: rule.top])]
    return out


def same(found: pa.Table, wanted: list[tuple[int, int, float, float, int, int]]) -> None:
    got = list(zip(*(found[c].to_pylist() for c in ("note_a", "note_b", "score", "cosine", "n_groups", "rank")), strict=True))
    assert [(r[0], r[1], r[4], r[5]) for r in got] == [(r[0], r[1], r[4], r[5]) for r in wanted]
    np.testing.assert_allclose([r[2:4] for r in got], [r[2:4] for r in wanted], rtol=0, atol=1e-9)


clicks = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6), st.integers(0, 20).map(lambda d: d * DAY / 2)), min_size=1, max_size=60)
rules = st.builds(
    Mine,
    directed=st.booleans(),
    window_days=st.sampled_from([None, 3.0, 7.0]),
    low=st.sampled_from([0.0, 0.3]),
    up=st.sampled_from([0.8, 30.0]),
    top=st.sampled_from([1, 3, 10]),
    rank_by=st.sampled_from(["score", "cosine"]),
    min_groups=st.sampled_from([1, 2]),
)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(clicks, rules)
def test_equals_counting_by_hand(rows, rule):
    same(mine(log(rows), rule).pairs, by_hand(rows, rule))


def test_the_papers_score_by_hand():
    """User 1 clicks 7, 8, 9 in this order, user 2 clicks 8, 7: s(7, 8) = 1/3, s(8, 7) = 1/2."""
    found, statistics = mine(log([(1, 7, 0), (1, 8, 1), (1, 9, 2), (2, 8, 0), (2, 7, 5)]), WHOLE)
    assert {(a, b): s for a, b, s in zip(*(found[c].to_pylist() for c in ("note_a", "note_b", "score")), strict=True)} == {
        (7, 8): pytest.approx(1 / 3),
        (7, 9): pytest.approx(1 / 3),
        (8, 9): pytest.approx(1 / 3),
        (8, 7): pytest.approx(1 / 2),
    }
    assert statistics == {
        "clicks": 5,
        "clicks_used": 5,
        "notes": 3,
        "groups": 2,
        "groups_sampled": 0,
        "co_clicked": 4,
        "below_low": 0,
        "above_up": 0,
        "few_groups": 0,
        "pairs": 4,
        "query_notes": 2,
    }


def test_a_note_clicked_again_lies_before_and_after():
    found = mine(log([(1, 7, 0), (1, 8, 1), (1, 7, 2), (1, 9, 3)]), WHOLE).pairs
    assert list(zip(found["note_a"].to_pylist(), found["note_b"].to_pylist(), strict=True)) == [(7, 8), (7, 9), (8, 7), (8, 9)]
    assert not len(mine(log([(1, 7, 0), (1, 8, 0)]), WHOLE).pairs)  # at the same moment is not later


@pytest.mark.parametrize("at_once", [700, 60, 2])
@pytest.mark.parametrize("rank_by", ["score", "cosine"])
def test_in_parts_it_is_the_same_and_says_where_it_is(rank_by, at_once, monkeypatch, caplog):
    """With few at once, the clicks of one note are split too."""
    rule = replace(WHOLE, rank_by=rank_by)
    draw = np.random.default_rng(0)
    rows = [
        (int(u), int(n), float(t)) for u, n, t in zip(draw.integers(30, size=400), draw.integers(20, size=400), range(400), strict=True)
    ]
    whole = mine(log(rows), rule)
    assert not caplog.text
    monkeypatch.setattr(_co_clicks, "AT_ONCE", at_once)
    with caplog.at_level(logging.INFO, "zoo.data"):
        parts = mine(log(rows), rule, memory="100MB")
    assert parts.pairs.equals(whole.pairs)
    assert parts.statistics == whole.statistics
    assert "% of the co-clicks" in caplog.text
    assert len(caplog.records) < 10


def test_equal_ones_are_ordered_by_id_and_order_of_the_log_means_nothing():
    rows = [(u, n, float(n)) for u in range(3) for n in range(8)]
    found = mine(log(rows), replace(WHOLE, directed=False, top=3)).pairs
    assert found.filter(pc.equal(found["note_a"], 5))["note_b"].to_pylist() == [0, 1, 2]
    assert mine(log(rows[::-1]), replace(WHOLE, directed=False, top=3)).pairs.equals(found)


def test_time_split_and_notes_that_are_left_out():
    rows = [(1, n, n * DAY) for n in range(6)]
    of = lambda **k: sorted(set(mine(log(rows), WHOLE, **k).pairs["note_a"].to_pylist()))  # noqa: E731
    assert of(until=date(1970, 1, 4)) == [0, 1]
    assert of(since="1970-01-04") == [3, 4]
    assert of(since=datetime(1970, 1, 4, tzinfo=UTC), until=6 * DAY) == [3, 4]
    assert of(queries=pa.array([2])) == [2]
    found = mine(log(rows), WHOLE, leave_out=pa.array([0, 5])).pairs
    assert set(found["score"].to_pylist()) == {0.25}  # N_u counts the four that stay
    with pytest.raises(ZooError, match=r"'soon' is no date: write 2024-05-31"):
        of(until="soon")


def test_of_large_groups_a_sample_counts_with_the_weight_of_the_whole():
    rows = [(u, n, float(n)) for u in range(4) for n in range(10 if u else 3)]
    rule = replace(WHOLE, directed=False, max_notes=4)
    found, statistics = mine(log(rows), rule)
    assert statistics["groups_sampled"] == 3
    np.testing.assert_allclose(pc.sum(found["score"]).as_py(), 3 * 4 * 3 / 10 + 3 * 2 / 3)
    assert found.equals(mine(log(rows), rule).pairs)
    assert not found.equals(mine(log(rows), replace(rule, seed=1)).pairs)


def test_csv_parquet_and_timestamps_are_the_same(tmp_path):
    rows = [(1, 10, 0.0), (1, 9, 60.0), (2, 10, 0.0), (2, 9, DAY)]
    table = log(rows)
    pq.write_table(table, tmp_path / "c.parquet")
    stamped = table.set_column(2, "timestamp", pa.array([datetime.fromtimestamp(t, UTC).replace(tzinfo=None) for *_, t in rows]))
    pyarrow.csv.write_csv(stamped, tmp_path / "c.csv")
    one, other = mine(tmp_path / "c.parquet", WHOLE).pairs, mine(tmp_path / "c.csv", WHOLE).pairs
    assert one["note_a"].to_pylist() == [10]
    assert other["note_a"].to_pylist() == ["10"]  # ids of a CSV stay text
    assert other["score"].to_pylist() == one["score"].to_pylist() == [1.0]


def test_a_file_is_written_whole(tmp_path):
    pq.write_table(log([(1, 7, 0), (1, 8, 1)]), tmp_path / "clicks.parquet")
    statistics = mine_file(tmp_path / "clicks.parquet", tmp_path / "out/pairs.parquet", WHOLE)
    assert statistics["pairs"] == 1
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["pairs.parquet"]
    assert pq.read_table(tmp_path / "out/pairs.parquet").to_pylist() == [
        {"note_a": 7, "note_b": 8, "score": 0.5, "cosine": 1.0, "n_groups": 1, "rank": 0}
    ]


def test_what_cannot_be_mined_is_said_and_nothing_is_written(tmp_path):
    out = tmp_path / "pairs.parquet"

    def says(content: str, match: str, **keywords: Any) -> None:
        (tmp_path / "clicks.csv").write_text(content)
        with pytest.raises(ZooError, match=match):
            mine_file(tmp_path / "clicks.csv", keywords.pop("out", out), **keywords)
        assert not out.exists()

    good = "user_id,note_id,timestamp\n1,a,0\n1,b,1\n"
    says(good, r"(?s)no column named 'session_id'.*have: note_id, timestamp, user_id", rule=Mine(group="session_id"))
    says(
        "user,note,timestamp\n1,2,3\n",
        r"(?s)no column named 'user_id'; did you mean 'user'.*no column named 'note_id'; did you mean 'note'",
    )
    says("user_id,note_id,timestamp\n1,a,noon\n", r"column 'timestamp' is VARCHAR, such as 'noon': write seconds since 1970")
    says("user_id,note_id,timestamp\n", r"clicks.csv: it has no rows")
    says(good, r"no pair is left of 1 co-clicked ones: 1 score less than low=2.0", rule=Mine(low=2.0))
    says(good, r"pairs are written as parquet: name the file pairs.parquet", out=tmp_path / "pairs.csv")
    says(good, r"memory='much' is no size: write '2GB'", memory="much")
    (tmp_path / "file").touch()
    says(good, r"--out .*file/p.parquet cannot be written", out=tmp_path / "file/p.parquet")
    in_splits = "user_id,note_id,timestamp,split\n1,a,0,train\n1,b,1,test\n2,b,1,\n"
    says(in_splits, r"^clicks.csv: no click of split 'nope' \(have: test, train\)$", split="nope")
    (tmp_path / "clicks.csv").write_bytes("user_id,note_id,timestamp\n1,a,0\n1,café,1\n".encode("latin-1"))
    with pytest.raises(ZooError, match=r"clicks.csv: line 3 is not UTF-8: save it again as UTF-8"):
        mine(tmp_path / "clicks.csv")
    (tmp_path / "clicks.parquet").write_bytes(b"no parquet")
    with pytest.raises(ZooError, match=r"clicks.parquet: cannot be read as parquet"):
        mine(tmp_path / "clicks.parquet")
    with pytest.raises(ZooError, match=r"no file .*none.csv: give a .parquet or .csv of clicks"):
        mine(tmp_path / "none.csv")
    (tmp_path / "clicks.json").write_text("{}")
    with pytest.raises(ZooError, match=r"clicks are read from .parquet or .csv, not from .json"):
        mine(tmp_path / "clicks.json")


@pytest.mark.realdata
@pytest.mark.skipif(not RETAIL.is_dir(), reason="retail_notes is not there")
@pytest.mark.parametrize("split, min_groups", [("train", 4), ("val", 3), ("test", 3), ("cold_test", 4)])
def test_equals_the_pairs_that_retail_notes_brings(split, min_groups):
    """By session, undirected; of sessions with more than 100 notes 100 are drawn; cold notes count only for their own split."""
    notes = pq.read_table(RETAIL / "notes.parquet", columns=["note_id", "split"])
    cold = notes.filter(pc.equal(notes["split"], "cold_test"))["note_id"].combine_chunks()
    rule = replace(WHOLE, group="session_id", directed=False, rank_by="cosine", max_notes=100, min_groups=min_groups, top=10)
    which = {"queries": cold} if split == "cold_test" else {"split": split, "leave_out": cold}
    found = mine(RETAIL / "clicks.parquet", rule, **which).pairs
    given_ = pq.read_table(RETAIL / "pairs.parquet", filters=[("split", "==", split), ("rank_cosine", ">=", 0)])
    given_ = given_.sort_by([("note_a", "ascending"), ("rank_cosine", "ascending")])
    for column, theirs in (("note_a", "note_a"), ("note_b", "note_b"), ("n_groups", "n_groups"), ("rank", "rank_cosine")):
        np.testing.assert_array_equal(found[column].to_numpy(), given_[theirs].to_numpy())
    for column in ("score", "cosine"):
        np.testing.assert_allclose(found[column].to_numpy(), given_[column].to_numpy(), rtol=0, atol=1e-9)


CROWD = [(user, note, float(note)) for user in range(40) for note in range(100)]


@pytest.mark.parametrize("memory", ["100KB", "1MB"])
def test_no_room_in_memory(memory):
    with pytest.raises(Failure, match=rf"mining ran out of room \(.*more memory \(memory='{memory}' now\), a larger disk .*TMPDIR"):
        mine(log(CROWD), WHOLE, memory=memory)


def test_no_room_on_the_disk(monkeypatch, tmp_path):
    def full(con, *_):
        raise duckdb.IOException(f'Could not write file "{_one(con)}/duckdb_temp_storage": No space left on device')

    def _one(con):
        return con.execute("select current_setting('temp_directory')").fetchall()[0][0]

    monkeypatch.setattr(_mining, "_collect", full)
    with pytest.raises(Failure, match=r"No space left on device.*TMPDIR"):
        mine(log(CROWD), WHOLE, scratch=tmp_path)


def test_a_window_without_clicks_gives_a_table_without_rows():
    found, statistics = mine(log(CROWD), WHOLE, since=1e6)
    assert found.schema == mine(log(CROWD), WHOLE).pairs.schema
    assert len(found) == statistics["pairs"] == statistics["clicks_used"] == 0
