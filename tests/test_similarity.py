"""What users of sentence-transformers know: strings, single rows and lists in, vectors out, cosines between them."""

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.errors import ZooError
from zoo.models._encode import similarity, similarity_pairwise
from zoo.registry import build

TINY = {
    "backbone": {"name": "tiny_lm", "dim": 32, "layers": 1, "heads": 2, "vocab_size": 1024},
    "vision": {"name": "tiny_image", "dim": 32, "layers": 1, "heads": 2, "image_size": 16},
    "connector": {"name": "attention_pool", "num_queries": 2},
    "dim": 16,
    "language": "en",
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = build("notellm2", **TINY).eval()
    made.trained = True
    return made


def test_a_string_is_a_title(model):
    assert np.array_equal(model.encode(["a red cup", {"title": "b"}]), model.encode([{"title": "a red cup"}, "b"]))


@pytest.mark.parametrize("row", ["a red cup", {"title": "a red cup"}, {"image": Image.new("RGB", (8, 8), "red")}])
def test_a_single_row_gives_a_single_vector(model, row):
    vector = model.encode(row)
    assert vector.shape == (16,)
    assert np.array_equal(vector, model.encode([row])[0])


def test_what_are_no_rows(model):
    with pytest.raises(ZooError, match=r"encode takes a row or a list of rows, not a int: write encode\(\[\{\.\.\.\}\]\)"):
        model.encode(7)
    with pytest.raises(ZooError, match="row 1 is a float, not a dictionary"):
        model.encode(["a", 0.5])
    with pytest.raises(ZooError, match="sees nothing of row 0"):
        model.encode("")


@pytest.mark.parametrize("name", ["clip", "vlmo", "beit_3"])
def test_what_are_no_rows_of_pictures_and_texts(name):
    made = build(name, vision=TINY["vision"], dim=16) if name == "clip" else build(name, size="tiny")
    made.trained = True
    for given, kind in ((None, "NoneType"), (({"text": text} for text in "ab"), "generator")):
        with pytest.raises(ZooError, match=f"encode takes a row or a list of rows, not a {kind}"):
            made.encode(given)


def test_a_string_for_a_model_that_reads_no_title(model, monkeypatch):
    monkeypatch.setattr(model.processor, "keys", lambda: ("question", "image"))
    with pytest.raises(ZooError, match=r"reads no title, so a string means nothing to it: write \{\.\.\.\} with any of question, image"):
        model.encode("what?")


def test_cosines_by_hand():
    a, b = [[3.0, 4.0], [0.0, 0.0]], [[3.0, 4.0], [4.0, -3.0], [1.0, 0.0]]
    assert similarity(a, b) == pytest.approx(np.array([[1, 0, 0.6], [0, 0, 0]]), abs=1e-6)
    assert similarity(a, b).dtype == np.float32
    assert similarity(a[0], b) == pytest.approx(np.array([[1, 0, 0.6]]), abs=1e-6)
    assert similarity_pairwise(a, b[1:]) == pytest.approx([0, 0], abs=1e-6)
    assert similarity_pairwise(torch.tensor(b), np.array(b)) == pytest.approx([1, 1, 1])
    assert similarity_pairwise(a[0], b[2]) == pytest.approx([0.6])


def test_the_models_own(model):
    vectors = model.encode(["a", "b", {"image": Image.new("RGB", (8, 8), "red")}])
    assert model.similarity(vectors, vectors) == pytest.approx(vectors @ vectors.T, abs=1e-6)
    assert model.similarity_pairwise(vectors, vectors) == pytest.approx([1, 1, 1])


@pytest.mark.parametrize("compare", [similarity, similarity_pairwise])
def test_widths_that_differ(compare):
    with pytest.raises(ZooError, match="vectors of width 2 and 3 cannot be compared"):
        compare(np.ones((1, 2)), np.ones((1, 3)))
    with pytest.raises(ZooError, match=r"vectors are \(N, D\) or \(D,\), not \(1, 1, 2\)"):
        compare(np.ones((1, 1, 2)), np.ones((1, 2)))


def test_numbers_that_differ():
    with pytest.raises(ZooError, match="1 vectors and 2 make no pairs"):
        similarity_pairwise(np.ones((1, 2)), np.ones((2, 2)))
