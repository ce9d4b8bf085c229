"""Balancing captions: what matches a query, how many it asks for, what is read and written, what is refused."""

import csv
import json
import random
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from zoo import balance as module
from zoo.balance import Limits, _lengths, _matching, balance
from zoo.data._caption_shards import words_of
from zoo.errors import ZooError
from zoo.registry import make


def parquet(folder, rows, name="captions.parquet"):
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / name)
    return folder


def large(folder, rows):
    """As polars writes texts: Arrow's long strings."""
    folder.mkdir(exist_ok=True)
    table = pa.Table.from_pylist(rows)
    fields = [f.with_type(pa.large_string()) if pa.types.is_string(f.type) else f for f in table.schema]
    pq.write_table(table.cast(pa.schema(fields)), folder / "captions.parquet")
    return folder


def jsonl(folder, rows, name="captions.jsonl"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return folder


def read(out):
    """The rows of a folder, in their order."""
    rows = []
    for path in sorted(out.glob("captions*")):
        lines = path.read_text(encoding="utf-8").splitlines() if path.suffix == ".jsonl" else []
        rows += [json.loads(line) for line in lines] if path.suffix == ".jsonl" else pq.read_table(path).to_pylist()
    return rows


def table(out):
    """{query: (pairs, kept)}."""
    with (out / "queries.csv").open(encoding="utf-8", newline="") as file:
        return {row["query"]: (int(row["pairs"]), int(row["kept"])) for row in csv.DictReader(file)}


def animals(dogs=300, cats=40, both=10):
    """Each row has a number that no other has."""
    texts = ["a dog"] * dogs + ["the Cat!"] * cats + ["a dog, and a cat"] * both + ["birds"] * 5
    random.Random(0).shuffle(texts)
    return [{"image": f"{i}.jpg", "text": text, "number": i} for i, text in enumerate(texts)]


@pytest.fixture
def queries(tmp_path):
    path = tmp_path / "queries.txt"
    path.write_text("Dog\ncat\n\nhorse\nA dog and\n", encoding="utf-8")
    return path


class TestMatching:
    @pytest.mark.parametrize(
        ("text", "found"),
        [
            ("The dog.", ["dog"]),
            ("dogs and hotdogs", []),
            ("DOG dog dog", ["dog"]),
            ("a hot-dog stand", ["dog", "hot dog", "dog stand"]),
            ("a hot stand, dog", ["dog"]),
            ("一只小狗在跑", ["小 狗"]),
            ("一只小的狗", []),
            ("", []),
        ],
    )
    def test_whole_words_in_their_order(self, text, found):
        queries = {" ".join(words_of(q)): 0 for q in ("dog", "Hot dog", "小狗", "dog stand")}
        assert _matching(words_of(text), queries, _lengths(queries)) == found

    def test_it_is_substring_matching_on_whole_words(self):
        """As with spaces around both, which is how it is defined."""
        draw = random.Random(0)
        queries = {" ".join(draw.choices("abcd", k=draw.randint(1, 4))): 0 for _ in range(60)}
        for _ in range(300):
            words = draw.choices("abcd", k=draw.randint(0, 9))
            expected = {q for q in queries if f" {q} " in f" {' '.join(words)} "}
            assert set(_matching(words, queries, _lengths(queries))) == expected


class TestLimits:
    def test_each_query_takes_as_many_as_it_may(self):
        draw = np.random.default_rng(0)
        for count, most in ((1, 1), (10, 3), (10, 10), (10, 20), (1000, 100)):
            limits = Limits({"q": count}, most)
            assert sum(limits.ask("q", x) for x in draw.random(count)) == min(count, most)

    def test_every_pair_is_taken_as_often(self):
        """Of 8 three: 3/8 of 4,000 draws, within four standard deviations of a binomial."""
        draw, taken = np.random.default_rng(0), np.zeros(8)
        for _ in range(4000):
            limits = Limits({"q": 8}, 3)
            taken += [limits.ask("q", x) for x in draw.random(8)]
        assert np.abs(taken - 1500).max() < 4 * np.sqrt(4000 * 3 / 8 * 5 / 8)


class TestBalance:
    @pytest.mark.parametrize("write", [parquet, jsonl])
    def test_counts(self, tmp_path, queries, write):
        done = balance(write(tmp_path / "in", animals()), tmp_path / "out", queries=queries, most=50)
        counted = table(tmp_path / "out")
        assert {query: n for query, (n, _) in counted.items()} == {"dog": 310, "cat": 50, "horse": 0, "a dog and": 10}
        assert list(counted) == ["dog", "cat", "a dog and", "horse"]
        rows = read(tmp_path / "out")
        kinds = Counter(row["text"] for row in rows)
        assert kinds["the Cat!"] == 40
        assert kinds["a dog, and a cat"] == 10  # all asked for by cat
        assert 40 <= kinds["a dog"] <= 50
        assert kinds["birds"] == 0
        assert counted["dog"][1] == kinds["a dog"] + 10
        assert counted["cat"][1] == 50
        assert done == (355, len(rows), 5, 0, 4, 1)
        assert json.loads((tmp_path / "out/balance.json").read_text())["most"] == 50

    def test_rows_keep_their_order_and_their_cells(self, tmp_path, queries):
        rows = [{**row, "image": b"bytes"} for row in animals()]
        balance(parquet(tmp_path / "in", rows), tmp_path / "out", queries=queries, most=50)
        kept = read(tmp_path / "out")
        assert [row["number"] for row in kept] == sorted(row["number"] for row in kept)
        assert all(row == rows[row["number"]] for row in kept)
        assert pq.read_schema(tmp_path / "out/captions.parquet") == pq.read_schema(tmp_path / "in/captions.parquet")

    def test_it_is_by_seed(self, tmp_path, queries):
        folder = parquet(tmp_path / "in", animals())
        numbers = []
        for name, settings in {"a": {}, "b": {"batch_size": 7}, "c": {"seed": 1}}.items():
            balance(folder, tmp_path / name, queries=queries, most=50, **settings)
            numbers.append([row["number"] for row in read(tmp_path / name)])
        assert numbers[0] == numbers[1] != numbers[2]

    def test_several_files_share_their_counts(self, tmp_path, queries):
        rows = animals()
        parquet(tmp_path / "in", rows[:200], "captions-0.parquet")
        parquet(tmp_path / "in", rows[200:], "captions-1.parquet")
        balance(tmp_path / "in", tmp_path / "out", queries=queries, most=50)
        assert table(tmp_path / "out")["dog"][0] == 310
        assert table(tmp_path / "out")["dog"][1] <= 60
        assert sorted(p.name for p in (tmp_path / "out").glob("*.parquet")) == ["captions-0.parquet", "captions-1.parquet"]

    @pytest.mark.parametrize("held", [1_000_000, 3])
    def test_words_that_enough_texts_have(self, tmp_path, monkeypatch, held):
        monkeypatch.setattr(module, "HELD", held)
        done = balance(parquet(tmp_path / "in", animals()), tmp_path / "out", most=60, least=10)
        counts = {query: n for query, (n, _) in table(tmp_path / "out").items()}
        assert counts == {"a": 310, "dog": 310, "cat": 50, "the": 40, "and": 10}
        assert done.capped == 2
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["balance.json", "captions.parquet", "queries.csv"]

    def test_other_splits_stay(self, tmp_path, queries):
        rows = [{**row, "split": "test" if i < 100 else "train"} for i, row in enumerate(animals())]
        done = balance(parquet(tmp_path / "in", rows), tmp_path / "out", queries=queries, most=5)
        assert done.others == 100
        assert sum(row["split"] == "test" for row in read(tmp_path / "out")) == 100
        assert table(tmp_path / "out")["dog"][0] == sum("dog" in row["text"] for row in rows[100:])

    def test_several_texts_of_a_row(self, tmp_path, queries):
        rows = [{"text": ["a", "dog and"], "more": "cat", "n": 0}, {"text": ["x"], "more": None, "n": 1}]
        balance(parquet(tmp_path / "in", rows), tmp_path / "out", queries=queries, texts=("text", "more"))
        assert table(tmp_path / "out") == {"cat": (1, 1), "dog": (1, 1), "a dog and": (0, 0), "horse": (0, 0)}
        assert [row["n"] for row in read(tmp_path / "out")] == [0]

    @pytest.mark.parametrize("write", [parquet, large, jsonl])
    def test_what_it_writes_is_a_data_set(self, tmp_path, write):
        rows = animals(20, 10, 5)
        folder = write(tmp_path / "in", [{**row, "split": ("train", "val", "test")[i % 3]} for i, row in enumerate(rows)])
        for i in range(len(rows)):
            Image.new("RGB", (4, 4), (i, 0, 0)).save(folder / f"{i}.jpg")
        balance(folder, tmp_path / "deep/out", most=3, least=2)
        data = make("data", {"name": "captions", "folder": "out"}, tmp_path / "deep")
        kept = read(tmp_path / "deep/out")
        assert sum(len(data.pairs(s)) for s in ("train", "val", "test")) == len(kept)
        assert len(data.pairs("train")) < 14
        assert data.pictures[0]["image"].getpixel((0, 0))[0] == pytest.approx(kept[0]["number"], abs=3)

    def test_an_empty_folder_may_be_written_to(self, tmp_path, queries):
        (tmp_path / "out").mkdir()
        balance(parquet(tmp_path / "in", animals()), tmp_path / "out", queries=queries)
        assert len(read(tmp_path / "out")) == 350

    def test_a_stop_leaves_nothing(self, tmp_path, queries, monkeypatch):
        folder = parquet(tmp_path / "in", animals())

        def stop(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(module, "_tables", stop)
        with pytest.raises(KeyboardInterrupt):
            balance(folder, tmp_path / "out", queries=queries)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "queries.txt"]


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "says"),
        [
            ({"most": 0}, "most=0, least=100, texts=text: write 1 or more of each"),
            ({"texts": ()}, "texts=none: write 1 or more"),
            ({"texts": ("title",)}, r"captions\.parquet: no column named 'title' \(have: image, number, text\)"),
            (
                {"least": 1000},
                r"least=1000: no word is in so many texts \(the most frequent one, 'a', is in 310\): write a",
            ),
            ({"queries": "nowhere"}, "--queries nowhere cannot be read as lines"),
        ],
    )
    def test_arguments(self, tmp_path, settings, says):
        with pytest.raises(ZooError, match=says):
            balance(parquet(tmp_path / "in", animals()), tmp_path / "out", **settings)
        assert not (tmp_path / "out").exists()

    def test_queries(self, tmp_path):
        folder, path = parquet(tmp_path / "in", animals()), tmp_path / "queries.txt"
        path.write_text("\n ?\n")
        with pytest.raises(ZooError, match="has no line with a word: write a query a line"):
            balance(folder, tmp_path / "out", queries=path)
        path.write_text("zebra\n")
        with pytest.raises(ZooError, match="none of 1 queries, such as 'zebra', is in a text"):
            balance(folder, tmp_path / "out", queries=path)

    def test_folders(self, tmp_path):
        with pytest.raises(ZooError, match="no folder"):
            balance(tmp_path / "in", tmp_path / "out")
        folder = parquet(tmp_path / "in", animals())
        with pytest.raises(ZooError, match=r"--out .* is there: write the name of a new folder"):
            balance(folder, folder)

    def test_files(self, tmp_path):
        folder = tmp_path / "in"
        folder.mkdir()
        (folder / "captions.csv").write_text("image,text\n")
        with pytest.raises(ZooError, match="captions are balanced in parquet or JSON lines"):
            balance(folder, tmp_path / "out")
        (folder / "captions.csv").unlink()
        for content, says in (("{", "a line is no JSON"), ("[1]", "a line is no JSON object"), ('{"title": "x"}', "no key named 'text'")):
            (folder / "captions.jsonl").write_text(content + "\n")
            with pytest.raises(ZooError, match=says):
                balance(folder, tmp_path / "out")
        (folder / "captions.jsonl").write_bytes(b"\xff\n")
        with pytest.raises(ZooError, match="is not UTF-8"):
            balance(folder, tmp_path / "out")
        (folder / "captions.jsonl").unlink()
        (folder / "captions.parquet").write_bytes(b"PAR1")
        with pytest.raises(ZooError, match="cannot be read as parquet"):
            balance(folder, tmp_path / "out")


def test_the_command(tmp_path, queries, command):
    folder = parquet(tmp_path / "in", animals())
    code, out, _ = command("balance", folder, "--out", tmp_path / "out", "--queries", queries, "--most", "50")
    assert code == 0
    assert "of 355 pairs in" in out
    assert "1 of 4 queries have more than 50\n5 pairs match no query; 0 rows of other splits stay\n" in out
    code, out, _ = command("balance", folder, "--out", tmp_path / "again", "--queries", queries, "--most", "50", "--json")
    assert json.loads(out)["pairs"] == 355
    code, _, err = command("balance", folder, "--out", tmp_path / "out")
    assert (code, err.startswith("zoo: --out")) == (2, True)
