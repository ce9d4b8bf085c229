"""The miner's query for Spark: it gives what the miner gives, and the page shows the query that the code writes."""

import re
from pathlib import Path

import duckdb
import pytest

from zoo.data._mining import PAPER, Mine, mine
from zoo.data._mining_sql import mining_sql
from zoo.data.planted_notes import plant
from zoo.errors import ZooError

PAGE = Path(__file__).parents[1] / "docs/scale.md"
RULES = (
    PAPER,
    Mine(window_days=None, directed=False, low=0.0, top=3),
    Mine(rank_by="cosine", min_groups=2, window_days=14.5, low=0.0),
    Mine(low=0.05, up=0.4, window_days=None),
)


@pytest.fixture(scope="module")
def clicks():
    return plant(notes=200, users=400, seed=0, language="english", short_share=0.2, image_size=16).clicks


@pytest.mark.parametrize("rule", RULES)
def test_the_query_gives_what_the_miner_gives(clicks, rule):
    with duckdb.connect() as con:
        con.register("clicks", clicks)
        found = con.sql(mining_sql(rule)).to_arrow_table()
    expected = mine(clicks, rule).pairs
    assert len(expected) > 20
    assert found.column_names == expected.column_names
    assert found.to_pylist() == expected.to_pylist()


def test_what_another_engine_cannot_do():
    with pytest.raises(ZooError, match="max_notes: which notes are drawn of a group is a matter of this program"):
        mining_sql(Mine(max_notes=10))
    with pytest.raises(ZooError, match="group: 'user id' is quoted differently by Spark"):
        mining_sql(Mine(group="user id"))


def test_the_page_shows_the_query():
    (shown,) = re.findall(r"^```sql\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert shown == mining_sql(PAPER)


def test_the_command_prints_it(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert command("mine", "clicks.parquet", "top=3", "--sql") == (0, mining_sql(Mine(top=3)), "")
    assert list(tmp_path.iterdir()) == []
