"""encode puts rows of like length into one batch, and the vectors back where their rows were."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from zoo.errors import ZooError
from zoo.models._encode import encode
from zoo.types import ModalityInputs, ModelOutput

LENGTHS = [3, 40, 5, 38, 4, 41, 2]


class Characters:
    """Characters to numbers."""

    def __call__(self, row):
        if row["title"].startswith("!"):
            raise ZooError("cannot be read")
        return {"text": ModalityInputs(torch.tensor([ord(c) for c in row["title"]]))}

    def keys(self):
        return ("title",)

    def sees(self, row):
        return bool(row.get("title"))


class Reader(torch.nn.Module):
    """The sum and the count of a row's numbers, and the shapes that came by."""

    outputs, dim = ("text",), 2

    def __init__(self):
        super().__init__()
        self.weight, self.processor, self.shapes = torch.nn.Parameter(torch.ones(())), Characters(), []

    def forward(self, batch):
        x = batch.inputs["text"].values
        self.shapes.append(tuple(x.shape))
        return ModelOutput({"text": torch.stack([x.sum(1), (x > 0).sum(1)], 1) * self.weight})


def texts():
    return [chr(97 + i) * length for i, length in enumerate(LENGTHS)]


def vectors(reader, rows, batch_size=2):
    return encode(reader, rows, output="text", batch_size=batch_size, show_progress=False, normalize=False)


def expected():
    return np.array([[(97 + i) * length, length] for i, length in enumerate(LENGTHS)], dtype=np.float32)


@pytest.mark.parametrize("rows", [texts(), tuple(texts()), [{"title": text} for text in texts()]], ids=["list", "tuple", "dictionaries"])
def test_a_list_is_batched_by_length_the_longest_first(rows):
    reader = Reader()
    np.testing.assert_array_equal(vectors(reader, rows), expected())
    assert reader.shapes == [(2, 41), (2, 38), (2, 4), (1, 2)]


def test_another_sequence_is_read_batch_by_batch():
    read = []

    class Lazy(Sequence):
        def __len__(self):
            return len(LENGTHS)

        def __getitem__(self, i):
            read.append(i)
            return texts()[i]

    class Watching(Reader):
        def forward(self, batch):
            read.append("batch")
            return super().forward(batch)

    reader = Watching()
    np.testing.assert_array_equal(vectors(reader, Lazy()), expected())
    assert read == [0, 1, "batch", 2, 3, "batch", 4, 5, "batch", 6, "batch"]


@pytest.mark.parametrize("change, says", [({3: {}}, "nothing of row 3"), ({2: "!no"}, "row 2: cannot be read")])
def test_a_fault_names_the_row_as_it_was_given(change, says):
    rows = [change.get(i, text) for i, text in enumerate(texts())]
    with pytest.raises(ZooError, match=says):
        vectors(Reader(), rows)


def test_no_rows_give_no_vectors():
    assert vectors(Reader(), []).shape == (0, 2)
