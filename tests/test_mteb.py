"""The adapter is held to mteb's own types, and runs mteb's own evaluation on a task that lies in memory."""

import sys

import mteb
import numpy as np
import pytest
import torch
from datasets import Dataset
from mteb import TaskMetadata
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.models import ModelMeta
from mteb.models.models_protocols import EncoderProtocol
from PIL import Image
from torch.utils.data import DataLoader

from zoo.errors import ZooError
from zoo.evaluate.mteb import MtebEncoder
from zoo.registry import build

TINY = {
    "backbone": {"name": "tiny_lm", "dim": 32, "layers": 1, "heads": 2, "vocab_size": 1024},
    "vision": {"name": "tiny_image", "dim": 32, "layers": 1, "heads": 2, "image_size": 16},
    "connector": {"name": "attention_pool", "num_queries": 2},
    "dim": 16,
    "language": "en",
}
COLOURS = ("red", "green", "blue")
IMAGES = [Image.new("RGB", (16, 16), colour) for colour in COLOURS]


def metadata(modalities, category):
    both = modalities == ["image", "text"]
    return TaskMetadata(
        type="Any2AnyRetrieval" if both else "Retrieval",
        name="Shop",
        description="Three things, each of which is to find itself.",
        dataset={"path": "NA", "revision": "NA"},
        reference="https://example.org",
        category=category,
        modalities=modalities,
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
        date=("2026-01-01", "2026-01-01"),
        domains=[],
        task_subtypes=[],
        license="cc-by-4.0",
        annotations_creators="derived",
        dialect=[],
        sample_creation="found",
        bibtex_citation="",
    )


def things(prefix, *, text, image):
    rows = [{"id": f"{prefix}{i}"} for i in range(3)]
    for i, row in enumerate(rows):
        row |= {"text": f"a {COLOURS[i]} thing"} if text else {}
        row |= {"image": IMAGES[i]} if image else {}
    return Dataset.from_list(rows)


class Shop(AbsTaskRetrieval):
    """Text finds text."""

    metadata = metadata(["text"], "t2t")
    image = False

    def load_data(self, num_proc=None, **_):
        split = RetrievalSplitData(
            queries=things("q", text=True, image=self.image),
            corpus=things("d", text=True, image=self.image),
            relevant_docs={f"q{i}": {f"d{i}": 1} for i in range(3)},
            top_ranked=None,
        )
        self.dataset, self.data_loaded = {"default": {"test": split}}, True


class ShopWithPictures(Shop):
    """Text and image of one item find text and image of one item."""

    metadata = metadata(["image", "text"], "it2it")
    image = True


def make(name="shop/items", **overrides):
    torch.manual_seed(0)
    model = build("notellm2", **{**TINY, **overrides}).eval()
    model.trained = True
    return MtebEncoder(model, name)


def encode(encoder, rows, **given):
    """As mteb does: a loader of columns."""
    columns = DataLoader(rows, batch_size=2, collate_fn=lambda some: {key: [row[key] for row in some] for key in some[0]})
    return encoder.encode(columns, task_metadata=Shop.metadata, hf_split="test", hf_subset="default", **given)


@pytest.fixture(scope="module")
def encoder():
    return make()


def test_it_is_what_the_protocol_says(encoder):
    assert isinstance(encoder, EncoderProtocol)
    meta = encoder.mteb_model_meta
    assert isinstance(meta, ModelMeta)
    assert (meta.name, meta.embed_dim, meta.modalities) == ("shop/items", 16, ["text", "image"])
    assert meta.n_parameters == sum(p.numel() for p in encoder.model.parameters())
    assert meta.experiment_kwargs == {"fusion": "micl+gated_late", "text": "content"}


def test_what_the_description_says_of_other_models():
    meta = make(fusion="text_only").mteb_model_meta
    assert meta.modalities == ["text"]
    assert meta.experiment_kwargs["fusion"] == "text_only"
    fused = make(fusion=["early", {"name": "gated_late", "bias": True}]).mteb_model_meta
    assert fused.experiment_kwargs["fusion"] == "early+gated_late"


@pytest.mark.parametrize("task", [Shop, ShopWithPictures])
def test_a_task_runs_offline(encoder, task, tmp_path):
    found = mteb.evaluate(encoder, task(), cache=None, show_progress_bar=False, encode_kwargs={"batch_size": 2})
    (scores,) = found.task_results[0].scores["test"]
    assert scores["recall_at_1"] == 1.0  # query and document are the same item


@pytest.mark.parametrize(
    "batch, rows",
    [
        ([{"text": "a"}, {"text": "b"}, {"text": "c"}], [{"content": "a"}, {"content": "b"}, {"content": "c"}]),
        ([{"id": "1", "text": "t b", "title": "t", "body": "b"}], [{"title": "t", "content": "b"}]),
        ([{"text": "do: a", "query": "a", "instruction": "do"}], [{"content": "do: a"}]),
        ([{"image": IMAGES[0]}], [{"image": IMAGES[0]}]),
        ([{"text": "a", "image": IMAGES[1]}], [{"content": "a", "image": IMAGES[1]}]),
    ],
    ids=["text", "title and body", "query", "image", "both"],
)
def test_columns_become_rows(encoder, batch, rows):
    assert encode(encoder, batch) == pytest.approx(encoder.model.encode(rows), abs=1e-6)


def test_text_as_title(encoder):
    titles = MtebEncoder(encoder.model, "shop/items", text="title")
    assert encode(titles, [{"text": "t b", "title": "t", "body": "b"}]) == pytest.approx(encoder.model.encode([{"title": "t b"}]), abs=1e-6)


def test_a_row_of_nothing_is_the_zero_vector(encoder):
    vectors = encode(encoder, [{"text": "a"}, {"text": ""}, {"text": ""}])
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 0, 0], abs=1e-6)
    assert encode(encoder, []).shape == (0, 16)


def test_similarities_are_cosines(encoder):
    a = np.array([[3.0, 4.0]])
    assert encoder.similarity(a, a) == pytest.approx(np.ones((1, 1)))
    assert encoder.similarity_pairwise(a, a) == pytest.approx([1])


# What is refused


@pytest.mark.parametrize(
    "overrides, row, says",
    [
        ({}, {"audio": 0}, r"this model does not read audio \(it reads: title, topic, content, image\)"),
        ({"fusion": "text_only"}, {"text": "a", "image": IMAGES[0]}, r"does not read image \(it reads: title, topic, content\)"),
    ],
)
def test_a_modality_that_the_model_lacks(overrides, row, says):
    with pytest.raises(ZooError, match=says):
        encode(make(**overrides), [row])


@pytest.mark.parametrize("row", [{"id": "a"}, {"title": "t"}, {"id": "a", "title": "t", "query": "q"}], ids=", ".join)
def test_columns_that_make_no_row(encoder, row):
    with pytest.raises(ZooError, match=rf"a batch has columns {', '.join(row)}, and of them none that makes a row: text, title with body"):
        encode(encoder, [row, row])


def test_another_precision(encoder):
    with pytest.raises(ZooError, match="precision 'int8': vectors of the zoo are float32"):
        encode(encoder, [{"text": "a"}], precision="int8")


def test_a_key_that_the_model_does_not_read(encoder):
    with pytest.raises(ZooError, match=r"reads no 'body': write text= with one of title, topic, content$"):
        MtebEncoder(encoder.model, "shop/items", text="body")


def test_the_extra_is_named(encoder, monkeypatch):
    monkeypatch.setitem(sys.modules, "mteb.models", None)
    with pytest.raises(ZooError, match=r"pip install 'multimodal-zoo\[mteb\]'"):
        MtebEncoder(encoder.model, "shop/items")
