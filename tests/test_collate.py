"""Rows to batches: padding, absence, and which rows belong together."""

import pickle

import pytest
import torch

from zoo.collate import Known, PairCollate, RowCollate, stack
from zoo.types import ModalityInputs, Pair


def words(*ids):
    return ModalityInputs(
        torch.tensor(ids), extra={"anchor": torch.tensor(len(ids) - 1), "slots": torch.zeros(len(ids), dtype=torch.int64)}
    )


def picture(value, *more):
    return ModalityInputs(torch.full((*more, 3, 2, 2), float(value)))


class TestStack:
    def test_shorter_sequences_are_filled_up_at_the_end(self):
        text = stack([{"text": words(1, 2, 3)}, {"text": words(4)}])["text"]
        assert text.values.tolist() == [[1, 2, 3], [4, 0, 0]]
        assert text.mask.tolist() == [[True] * 3, [True, False, False]]
        assert text.present is None
        assert text.extra["anchor"].tolist() == [2, 0]
        assert text.extra["slots"].shape == (2, 3)

    def test_sequences_of_one_length_need_no_mask(self):
        assert stack([{"text": words(1, 2)}, {"text": words(3, 4)}])["text"].mask is None

    def test_a_mask_of_the_row_stays(self):
        row = ModalityInputs(torch.tensor([1, 2]), mask=torch.tensor([True, False]))
        assert stack([{"t": row}, {"t": ModalityInputs(torch.tensor([3, 4, 5]))}])["t"].mask.tolist() == [
            [True, False, False],
            [True, True, True],
        ]

    def test_an_absent_modality_is_zeros_and_said_to_be_absent(self):
        out = stack([{"text": words(1, 2)}, {"text": words(3), "image": picture(7)}, {"image": picture(8)}])
        assert out["image"].present.tolist() == [False, True, True]
        assert out["image"].values[:, 0, 0, 0].tolist() == [0, 7, 8]
        assert out["text"].present.tolist() == [True, True, False]
        assert out["text"].mask.tolist() == [[True, True], [True, False], [False, False]]
        assert out["text"].extra["anchor"].tolist() == [1, 0, -1]  # a place that does not exist

    def test_one_image_among_rows_of_several_is_a_row_of_one(self):
        image = stack([{"image": picture(1)}, {"image": picture(2, 3)}, {}])["image"]
        assert image.values.shape == (3, 3, 3, 2, 2)
        assert image.mask.tolist() == [[True, False, False], [True] * 3, [False] * 3]
        assert image.present.tolist() == [True, True, False]

    def test_a_modality_that_nobody_has_is_not_there(self):
        assert list(stack([{"text": words(1)}, {"text": words(2)}])) == ["text"]
        assert stack([{}, {}]) == {}

    def test_types_stay(self):
        assert stack([{"x": ModalityInputs(torch.zeros(2, 4, dtype=torch.float16))}, {}])["x"].values.dtype == torch.float16


class TestKnown:
    def test_finds_the_pairs_among_the_rows_in_both_directions(self):
        known = Known.of(torch.tensor([[0, 3], [3, 0], [1, 4], [2, 2]]), items=6)
        found = {tuple(p) for p in known.within(torch.tensor([3, 5, 0, 1])).tolist()}
        assert found == {(0, 2), (2, 0)}

    def test_an_item_that_stands_twice_meets_its_partner_twice(self):
        known = Known.of(torch.tensor([[0, 1]]), items=2)
        assert {tuple(p) for p in known.within(torch.tensor([0, 1, 0])).tolist()} == {(0, 1), (1, 0), (2, 1), (1, 2)}

    def test_equals_the_plain_loop(self):
        pairs = torch.randint(0, 20, (30, 2))
        both = {tuple(p) for p in pairs.tolist()} | {(b, a) for a, b in pairs.tolist()}
        ids = torch.randint(0, 20, (16,))
        expected = {(i, j) for i, a in enumerate(ids.tolist()) for j, b in enumerate(ids.tolist()) if (a, b) in both}
        found = Known.of(pairs, items=20).within(ids).tolist()
        assert len(found) == len(expected)
        assert {tuple(p) for p in found} == expected

    def test_without_pairs(self):
        assert Known.of(torch.zeros(0, 2, dtype=torch.int64), items=3).within(torch.tensor([0, 2])).shape == (0, 2)


def process(row):
    """What a model's processor does, in small; at the top of the module, as a worker needs it."""
    return {"text": words(*row["text"])} if "text" in row else {}


class TestCollate:
    pairs = (Pair({"id": 5, "text": [1, 2]}, {"id": 6, "text": [3]}), Pair({"id": 7}, {"id": 5, "text": [1, 2]}))

    def test_queries_first_then_their_targets(self):
        batch = PairCollate(process)(self.pairs)
        assert batch.ids.tolist() == [5, 7, 6, 5]
        assert batch.positive.tolist() == [2, 3, 0, 1]
        assert batch.inputs["text"].present.tolist() == [True, False, True, True]
        assert batch.known is None

    def test_known_pairs_of_the_batch(self):
        batch = PairCollate(process, Known.of(torch.tensor([[7, 6]]), items=8))(self.pairs)
        assert {tuple(p) for p in batch.known.tolist()} == {(1, 2), (2, 1)}

    @pytest.mark.parametrize("process_, expected", [(0, {(1, 2), (2, 1), (2, 7)}), (1, {(3, -2)})])
    def test_known_pairs_of_all_processes(self, process_, expected):
        """Rows count on from a process's own: [5, 7, 6, 5] here, [1, 2, 3, 7] in the other."""
        other = (Pair({"id": 1}, {"id": 3, "text": [4]}), Pair({"id": 2}, {"id": 7}))
        together = torch.tensor([[5, 7, 6, 5], [1, 2, 3, 7]])
        batch = PairCollate(process, Known.of(torch.tensor([[7, 6]]), items=8))((self.pairs, other)[process_], together, process_)
        assert {tuple(p) for p in batch.known.tolist()} == expected

    def test_rows(self):
        batch = RowCollate(process)([{"text": [1]}, {"text": [2, 3]}])
        assert batch.inputs["text"].values.tolist() == [[1, 0], [2, 3]]
        assert batch.ids is None

    @pytest.mark.parametrize("collate", [PairCollate(process, Known.of(torch.tensor([[0, 1]]), items=2)), RowCollate(process)])
    def test_travels_to_a_worker(self, collate):
        assert type(pickle.loads(pickle.dumps(collate))) is type(collate)
