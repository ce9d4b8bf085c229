"""Search in vectors: what is found, what an approximate index misses, and what is refused."""

import builtins
import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest

from zoo.errors import Failure, ZooError
from zoo.search import Index, index_file
from zoo.vectors import read_vectors, write_vectors

KINDS = ("exact", "flat", "hnsw", "ivf")


def unit(n, width=32, seed=0):
    x = np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_vector_finds_itself_first(kind):
    x = unit(500)
    places, scores = Index.build(range(500), x * 3, kind=kind).search(x[:20] * 7, 3)  # lengths do not matter
    assert places[:, 0].tolist() == list(range(20))
    np.testing.assert_allclose(scores[:, 0], 1, atol=1e-5)
    assert (np.diff(scores) <= 0).all()


@pytest.mark.parametrize("kind, at_least", [("exact", 1.0), ("flat", 1.0), ("hnsw", 0.99), ("ivf", 0.5)])
def test_recall_against_exact_on_random_unit_vectors(kind, at_least):
    """Random vectors are the hardest case for lists: neighbours share none. HNSW is at 1.00 here, IVF at 0.60."""
    index = Index.build(range(5000), unit(5000), kind=kind)
    assert at_least <= index.recall(k=10, queries=200) <= 1


def test_lists_find_what_lies_in_heaps():
    heaps = unit(50, seed=1).repeat(100, axis=0) + 0.1 * unit(5000, seed=2)
    assert Index.build(range(5000), heaps, kind="ivf").recall(k=10, queries=200) >= 0.97


def test_recall_counts_equal_vectors_as_found():
    x = np.repeat(unit(10), 20, axis=0)
    assert Index.build(range(200), x, kind="flat").recall(k=5) == 1


@pytest.mark.parametrize("n, kind", [(10, "flat"), (100, "hnsw"), (1000, "ivf")])
def test_faiss_is_chosen_by_size(n, kind, monkeypatch):
    monkeypatch.setattr("zoo.search.SMALL", 100)
    monkeypatch.setattr("zoo.search.LARGE", 1000)
    assert Index.build(range(n), unit(n), kind="faiss").kind == kind


@pytest.mark.parametrize("kind", KINDS)
def test_more_neighbours_than_vectors(kind):
    hits = Index.build("abc", unit(3), kind=kind).search(unit(2, seed=1), 10)
    assert hits.places.shape == hits.scores.shape == (2, 3)
    assert np.isneginf(hits.scores[hits.places < 0]).all()
    assert [sorted(row) for row in hits.places.tolist()] == [[0, 1, 2]] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_neighbours_as_asked_for(kind):
    """Of 3,900 vectors a sixteenth of the 100 lists holds some 240; each query gets what it would get alone."""
    index = Index.build(range(3900), unit(3900), kind=kind)
    asked = unit(4, seed=1)
    for k in (10, 300, 3900):
        hits = index.search(asked, k)
        assert [len(set(row)) for row in hits.places.tolist()] == [k] * 4
        assert hits.places.min() >= 0
        assert np.isfinite(hits.scores).all()
        assert (np.diff(hits.scores) <= 0).all()
        for i in range(4):
            np.testing.assert_array_equal(index.search(asked[i : i + 1], k).places[0], hits.places[i])


@pytest.mark.parametrize("kind", KINDS)
def test_a_zero_vector_is_far_from_everything(kind):
    x = unit(40)
    x[7] = 0
    places, scores = Index.build(range(40), x, kind=kind).search(x[:1], 40)
    assert scores[0][places[0] == 7] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_refused(kind):
    wrong = unit(4)
    wrong[2, 0] = np.nan
    for ids, vectors, says in (
        ([], np.zeros((0, 8)), r"0 ids and vectors of shape \(0, 8\): an index needs as many of both, and at least one"),
        (["a"], unit(2), "1 ids and vectors of shape"),
        (["a", "b", "a", "c"], unit(4), "1 ids stand there more than once, such as 'a'"),
        (["a", "b", "c", "d"], wrong, r"1 of 4 vectors are not finite \(c\): the model diverged"),
    ):
        with pytest.raises(ZooError, match=says):
            Index.build(ids, vectors, kind=kind)
    index = Index.build(range(4), unit(4), kind=kind)
    with pytest.raises(ZooError, match="k = 0 neighbours"):
        index.search(unit(1), 0)
    with pytest.raises(ZooError, match=r"do(es)? not fit vectors of width 32: encode both with one model"):
        index.search(unit(1, 16), 2)
    with pytest.raises(ZooError, match="not finite"):
        index.search(wrong, 2)


def test_an_unknown_kind_and_no_faiss(monkeypatch):
    with pytest.raises(ZooError, match="no index named 'hnws'; did you mean 'hnsw'"):
        Index.build("a", unit(1), kind="hnws")
    there = builtins.__import__

    def without(name, *arguments, **keywords):
        if name == "faiss":
            raise ImportError(name)
        return there(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ZooError, match=r"this index needs faiss: pip install 'multimodal-zoo\[faiss\]', or write --index exact"):
        Index.build("a", unit(1), kind="flat")


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(tmp_path, kind):
    index = Index.build([f"n{i}" for i in range(300)], unit(300), kind=kind)
    loaded = Index.load(index.save(tmp_path / "index"))
    assert (loaded.ids, loaded.kind) == (index.ids, kind)
    for one, other in zip(index.search(unit(5, seed=3), 7), loaded.search(unit(5, seed=3), 7), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_damaged_index(tmp_path):
    with pytest.raises(ZooError, match=r"no index in .*: index.json is not there"):
        Index.load(tmp_path)
    Index.build(range(30), unit(30), kind="flat").save(tmp_path)
    whole = (tmp_path / "index.faiss").read_bytes()
    (tmp_path / "index.faiss").write_bytes(whole[:100])
    with pytest.raises(Failure, match=r"index.faiss is damaged \(.*remove the folder"):
        Index.load(tmp_path)
    (tmp_path / "index.faiss").write_bytes(whole)
    write_vectors(tmp_path / "vectors.parquet", range(20), unit(20))
    with pytest.raises(Failure, match="do not belong together"):
        Index.load(tmp_path)


def test_an_index_beside_a_file_is_kept_until_the_vectors_change(tmp_path, caplog):
    file = tmp_path / "v.parquet"

    def built(kind):
        caplog.clear()
        with caplog.at_level(logging.INFO, "zoo.search"):
            index = index_file(file, kind)
        return index.kind, [m.partition(" in ")[0] for m in caplog.messages]

    write_vectors(file, range(100), unit(100))
    assert built("exact") == ("exact", [])
    assert built("faiss") == ("flat", ["flat index of 100 vectors"])
    assert "recall@10 against exact: 1.0000" in caplog.text
    assert built("faiss") == ("flat", [])
    assert built("hnsw") == ("hnsw", ["hnsw index of 100 vectors"])
    write_vectors(file, range(90), unit(90))
    assert built("hnsw") == ("hnsw", ["hnsw index of 90 vectors"])
    assert json.loads((tmp_path / "v.parquet.index/index.json").read_text())["vectors"] == 90


def test_the_code_of_the_page_runs(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[1] / "docs/scale.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    write_vectors(tmp_path / "items.parquet", range(50), unit(50))
    exec(code, {})
    assert capsys.readouterr().out == "1.0\n"


def test_an_index_inside_a_folder_of_vectors_is_none_of_them(tmp_path):
    for n in (1, 2):
        write_vectors(tmp_path / f"v/sub/{n}.parquet", [f"{n}a", f"{n}b"], unit(2, seed=n))
    assert len(index_file(tmp_path / "v/sub/1.parquet", "flat")) == 2
    assert len(index_file(tmp_path / "v/sub", "flat")) == 4
    assert sorted(p.name for p in (tmp_path / "v").rglob("*.index")) == ["1.parquet.index", "sub.index"]
    assert read_vectors(tmp_path / "v").ids == ["1a", "1b", "2a", "2b"]
    assert len(index_file(tmp_path / "v", "flat")) == 4
    assert read_vectors(tmp_path / "v/sub.index").ids == ["1a", "1b", "2a", "2b"]  # when it is asked for


def test_a_folder_of_vectors(tmp_path):
    for n in (2, 1, 3):
        write_vectors(tmp_path / f"v/{n}.parquet", [f"{n}a", f"{n}b"], unit(2, seed=n), {"model": "m"})
    write_vectors(tmp_path / "v/4.parquet", [], np.zeros((0, 32), np.float32), {"model": "m"})
    read = read_vectors(tmp_path / "v")
    assert read.ids == ["1a", "1b", "2a", "2b", "3a", "3b"]
    np.testing.assert_array_equal(read.vectors[:2], unit(2, seed=1))
    assert len(index_file(tmp_path / "v", "flat")) == 6
    write_vectors(tmp_path / "v/5.parquet", ["x"], unit(1), {"model": "other"})
    with pytest.raises(ZooError, match=r"1.parquet and .*5.parquet were made by different models: run zoo embed again"):
        read_vectors(tmp_path / "v")
    write_vectors(tmp_path / "v/0.parquet", ["y"], unit(1))  # says nothing
    with pytest.raises(ZooError, match=r"1.parquet and .*5.parquet were made by different models"):
        read_vectors(tmp_path / "v")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ZooError, match=r"holds no vectors: name what zoo embed RUN --out FILE wrote"):
        read_vectors(tmp_path / "empty")
    (tmp_path / "names.txt").write_text("cat")
    with pytest.raises(ZooError, match=r"names.txt cannot be read as parquet.*: name what zoo embed RUN --out FILE wrote"):
        read_vectors(tmp_path / "names.txt")
    with pytest.raises(ZooError, match=r"no vectors in .*gone, which does not exist: zoo embed RUN --out .*gone writes them"):
        read_vectors(tmp_path / "gone")
