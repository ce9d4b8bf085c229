"""Vectors of notes in a file: which model made them, and what a search in those of another one says."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from zoo.embed import embed_notes, search_notes
from zoo.errors import ZooError
from zoo.files import write_text
from zoo.hub import load, model_hash, save
from zoo.recipe import dump, load_recipe
from zoo.registry import build
from zoo.search import Hits
from zoo.vectors import about_vectors, read_vectors, write_vectors

MODEL = {
    "backbone": {"name": "tiny_lm", "dim": 32, "layers": 1, "heads": 2, "vocab_size": 1024},
    "vision": {"name": "tiny_image", "dim": 32, "layers": 1, "heads": 2, "image_size": 16},
    "connector": "linear",
    "dim": 16,
    "language": "en",
}
pytestmark = pytest.mark.filterwarnings("ignore:.*trained.*")


def made(folder: Path, seed: int) -> Path:
    """A run folder with random weights."""
    torch.manual_seed(seed)
    model = build("notellm2", **MODEL)
    model.trained = True
    save(model, folder)
    recipe = {"model": {"name": "notellm2", **MODEL}, "data": "planted_notes", "objective": "pair_infonce", "out": str(folder)}
    write_text(folder / "recipe.yaml", dump(load_recipe(recipe)))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return [made(tmp_path_factory.mktemp("run"), seed) for seed in (0, 1)]


@pytest.fixture
def vectors(runs, tmp_path):
    """Those of the first run."""
    (tmp_path / "shop").mkdir()
    pq.write_table(pa.table({"note_id": ["a", "b", "c"], "title": ["lamp", "gown", "desk lamp"]}), tmp_path / "shop/notes.parquet")
    assert embed_notes(runs[0], tmp_path / "v/items.parquet", notes=tmp_path / "shop") == 3
    return tmp_path / "v/items.parquet"


def found(*arguments: object, **keywords: object) -> list[str]:
    return [hit["note_id"] for hit in search_notes(*arguments, **keywords)]


def test_the_file_says_which_model_made_it(runs, vectors):
    assert about_vectors(vectors) == {"model": model_hash(runs[0])}
    assert model_hash(runs[0]) != model_hash(runs[1])


@pytest.mark.parametrize("query", [{"query": {"title": "lamp"}}, {"query": {}, "note": "a"}])
def test_vectors_of_another_model_are_refused(runs, vectors, query, caplog):
    assert set(found(runs[0], vectors, k=2, **query)) < {"a", "b", "c"}
    for path in (vectors, vectors.parent):
        with pytest.raises(ZooError) as e:
            search_notes(runs[1], path, **query)
        says = f"{vectors} was made by another model than the one in {runs[1]}: name its run, or write it again: "
        assert str(e.value) == f"{says}zoo embed {runs[1]} --out {path}"
    assert not caplog.records


def test_vectors_that_do_not_say_which_model_made_them(runs, vectors, caplog):
    write_vectors(vectors.parent / "old.parquet", ["d"], load(runs[1]).encode(["rug"]))
    assert found(runs[0], vectors.parent, {"title": "lamp"})[0] == "a"
    (record,) = (r for r in caplog.records if r.name == "zoo.embed")
    assert record.levelno == logging.WARNING
    assert f"1 of 2 files of vectors, such as {vectors.parent}/old.parquet, do not say which model made them: unless it was" in caplog.text


def test_the_vectors_are_those_of_the_model(runs, vectors):
    read = read_vectors(vectors)
    assert read.ids == ["a", "b", "c"]
    np.testing.assert_allclose(read.vectors, load(runs[0]).encode([{"title": t} for t in ("lamp", "gown", "desk lamp")]), atol=1e-6)


def test_fewer_hits_than_asked_for_are_said(runs, vectors, caplog, monkeypatch):
    assert len(found(runs[0], vectors, {}, note="a", k=5, kind="hnsw")) == 2
    assert "hits" not in caplog.text
    monkeypatch.setattr("zoo.search.Index.search", lambda *_: Hits(np.array([[0, 2, -1]]), np.array([[1, 0.5, -np.inf]])))
    assert found(runs[0], vectors, {}, note="a", k=5, kind="hnsw") == ["c"]
    assert "1 hits of 2: the graph of hnsw leads to no more; --index exact finds all" in caplog.text


def test_no_notes_at_a_time(runs, tmp_path):
    with pytest.raises(ZooError, match="batch_size = 0: write 1 or more"):
        embed_notes(runs[0], tmp_path / "v.parquet", notes=tmp_path, batch_size=0)


@pytest.mark.parametrize(
    "out, says", [(".", r"--out .* is a folder: write the name of a file in it"), ("file/v.parquet", "cannot be written")]
)
def test_where_the_vectors_go_is_looked_at_first(runs, tmp_path, monkeypatch, out, says):
    (tmp_path / "file").touch()
    monkeypatch.setattr("zoo.embed.load", lambda _: pytest.fail("the model is loaded"))
    with pytest.raises(ZooError, match=says):
        embed_notes(runs[0], tmp_path / out)
