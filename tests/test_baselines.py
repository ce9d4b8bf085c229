"""The classic baselines, by hand on small data and against published numbers on real notes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest

from zoo.errors import ZooError
from zoo.evaluate.baselines import bm25, popularity, random
from zoo.evaluate.retrieval import measure

RETAIL = Path(__file__).parents[2] / "shared/data/retail_notes"


class Toy(NamedTuple):
    """As much of a PairData as the baselines and `measure` look at."""

    notes: list[str]
    seen: np.ndarray
    found: np.ndarray

    def texts(self) -> list[str]:
        return self.notes

    def clicks(self) -> np.ndarray:
        return self.seen

    def pairs(self, split: str) -> np.ndarray:
        return self.found

    def pool(self, split: str) -> np.ndarray:
        return np.arange(len(self.notes))

    def short(self) -> np.ndarray:
        return np.zeros(len(self.notes), bool)


def toy(notes: list[str]) -> Any:
    return Toy(notes, np.arange(len(notes), dtype=np.float64), np.zeros((0, 2), np.int64))


def test_bm25_by_hand() -> None:
    notes = ["Red mug", "red RED plate", "", "blue plate big"]
    scores = bm25(toy(notes))(np.array([1, 2]))
    words = [n.lower().split() for n in notes]
    mean = sum(map(len, words)) / 4

    def expected(query: list[str], document: list[str]) -> float:
        total = 0.0
        for word in query:
            holds = sum(word in d for d in words)
            idf = math.log(1 + (4 - holds + 0.5) / (holds + 0.5))
            times = document.count(word)
            total += idf * times / (times + 1.5 * (1 - 0.75 + 0.75 * len(document) / mean))
        return total

    np.testing.assert_allclose(scores[0], [expected(words[1], d) for d in words], rtol=1e-5)
    assert (scores[1] == 0).all()  # an empty query finds nothing


def test_bm25_reads_chinese_by_the_character() -> None:
    scores = bm25(toy(["红色杯子 cup", "蓝色杯子", "plate", "cups"]))(np.array([0]))[0]
    assert scores[0] > scores[1] > 0
    assert scores[2] == scores[3] == 0


def test_bm25_is_silent(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    bm25(toy(["a b", "b c"]))(np.array([0, 1]))
    assert capfd.readouterr() == ("", "")
    assert not caplog.records  # what handlers of the root would print


@pytest.mark.parametrize("notes", [["", " !"], []])
def test_bm25_needs_words(notes: list[str]) -> None:
    with pytest.raises(ZooError, match=f"none of the {len(notes)} notes has a word of text: leave the baseline 'bm25' out"):
        bm25(toy(notes))


def test_popularity_is_the_same_for_every_query() -> None:
    scores = popularity(toy(["a", "b", "c"]))(np.array([2, 0]))
    assert scores.tolist() == [[0.0, 1.0, 2.0]] * 2


def test_random_is_seeded_and_does_not_depend_on_chunks() -> None:
    scorer = random(toy(["a"] * 50), seed=3)
    whole = scorer(np.array([4, 9]))
    np.testing.assert_array_equal(whole[1:], scorer(np.array([9])))
    assert (whole[0] != whole[1]).all()
    assert (random(toy(["a"] * 50), seed=4)(np.array([4])) != whole[0]).all()


@pytest.mark.realdata
@pytest.mark.skipif(not RETAIL.is_dir(), reason="the retail_notes data set is not there")
def test_popularity_and_words_on_real_notes() -> None:
    """The data set's own baselines: popularity .017; TF-IDF of title, topic and content .235, which BM25 has to be near."""
    notes = pq.read_table(RETAIL / "notes.parquet", columns=["note_id", "title", "topic", "content"]).to_pandas()
    place = {note: i for i, note in enumerate(notes.note_id)}
    pairs = pq.read_table(RETAIL / "pairs.parquet").to_pandas()
    pairs = pairs[(pairs.split == "test") & (pairs.rank_cosine >= 0)]
    clicks = pq.read_table(RETAIL / "clicks.parquet", columns=["note_id", "split"]).to_pandas()
    seen = np.bincount(clicks[clicks.split == "train"].note_id.map(place), minlength=len(notes)).astype(float)
    texts = (notes.title + " " + notes.topic + " " + notes.content).tolist()
    data: Any = Toy(texts, seen, np.stack([pairs.note_a.map(place), pairs.note_b.map(place)], axis=1))
    recall = {
        name: measure(make(data), data, ks=(10,), resamples=10)[0].recall for name, make in (("popularity", popularity), ("bm25", bm25))
    }
    assert recall["popularity"] == pytest.approx(0.017, abs=0.0006)
    assert recall["bm25"] == pytest.approx(0.235, abs=0.02)
