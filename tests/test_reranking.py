"""Recall between pictures and texts, and the second look, against rankings worked out by hand and matches made one by one."""

from math import comb
from typing import ClassVar

import numpy as np
import pytest
import torch

import zoo
from tests.captioned_shapes import shapes
from zoo.caption_questions import Pictures, ask, digests
from zoo.errors import Failure, ZooError
from zoo.evaluate.captioned import Nearest, Search, by_group, chance, check, metrics, nearest, places_of_first, ranks, reranked, searches
from zoo.reranking import Library, match_logits
from zoo.sections import Retrieve


def search(right, queries=3, candidates=4, member=None):
    return Search("image_to_text", "test", np.arange(queries), np.arange(candidates), np.array(right), member or {})


def along(angles):
    """(N, 2) unit vectors at so many degrees."""
    radians = np.deg2rad(angles)
    return np.stack([np.cos(radians), np.sin(radians)], 1).astype(np.float32) * 7  # lengths do not matter


class TestRanks:
    def test_by_hand(self):
        # query 0 at 0 degrees: candidates at 5, 20, 50, 90 are its 1st to 4th; query 1 at 60: 50, 90, 20, 5; query 2 at 90: 90, 50, 20, 5
        some = search([(0, 1), (1, 3), (1, 0), (2, 3)])
        assert ranks(some, along([0, 60, 90]), along([5, 20, 50, 90])).tolist() == [2, 2, 1]

    def test_a_tie_counts_against_the_partner_and_two_partners_do_not_harm_each_other(self):
        some = search([(0, 1), (1, 0), (1, 1), (2, 3)])
        same = along([10, 10, 10, 10])
        assert ranks(some, along([0, 60, 90]), same).tolist() == [4, 3, 4]

    def test_against_sorted_lists(self):
        draw = np.random.default_rng(0)
        queries, candidates = (draw.integers(-1, 2, (n, 3)) for n in (60, 40))  # many ties
        right = np.unique(np.stack([np.arange(120) % 60, draw.integers(40, size=120)], 1), axis=0)
        expected = []
        unit = [np.asarray(x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)) for x in (queries, candidates)]
        for i in range(60):
            mine = set(right[right[:, 0] == i, 1].tolist())
            order = sorted(range(40), key=lambda c: (-np.float32(unit[0][i] @ unit[1][c]), c in mine))
            expected.append(1 + min(order.index(c) for c in mine))
        assert ranks(search(right, 60, 40), queries.astype(float), candidates.astype(float)).tolist() == expected

    def test_vectors_that_are_not_finite(self):
        with pytest.raises(Failure, match="1 of 3 vectors are not finite"):
            ranks(search([(0, 0), (1, 0), (2, 0)]), np.array([[1.0], [np.nan], [1.0]]), np.ones((4, 1)))

    def test_nearest_have_a_partner_last_among_equals(self):
        found = nearest(search([(0, 0), (1, 3), (2, 0)]), along([0, 60, 90]), along([10, 10, 50, 90]), 2)
        assert found.places.tolist() == [[1, 0], [2, 3], [3, 2]]
        assert found.scores[0] == pytest.approx([np.cos(np.deg2rad(10))] * 2)
        assert nearest(search([(0, 1)], 1), along([0]), along([1, 2, 3, 4]), 99).places.tolist() == [[0, 1, 2, 3]]


class TestChance:
    @pytest.mark.parametrize("k", [1, 2, 4])
    def test_of_every_ranking_there_is(self, k):
        from itertools import permutations

        some = search([(0, 1), (1, 0), (1, 2), (2, 3)])
        orders = np.array(list(permutations(range(4))))
        found = [np.mean([bool(mine & set(order[:k].tolist())) for order in orders]) for mine in ({1}, {0, 2}, {3})]
        assert chance(some, k).tolist() == pytest.approx(found)

    def test_one_partner_is_k_of_all(self):
        assert chance(search([(0, 1)], 1, 1000), 10).tolist() == pytest.approx([0.01])
        assert chance(search([(0, i) for i in range(5)], 1, 25000), 1).tolist() == pytest.approx([1 - comb(24995, 1) / 25000])


class TestSecondLook:
    def test_by_hand(self):
        some = search([(0, 1), (1, 3), (2, 0)])
        near = Nearest(np.array([[0, 1], [3, 2], [1, 3]]), np.zeros((3, 2), np.float32))
        before = np.array([2, 1, 4])
        # query 0: its partner is second and now first; 1: first and now second; 2: fourth, not looked at again
        assert reranked(before, some, near, np.array([[0.1, 0.2], [0.3, 0.4], [9.0, 8.0]])).tolist() == [1, 2, 4]
        assert reranked(before, some, near, np.array([[0.1, 0.1], [0.4, 0.3], [9.0, 8.0]])).tolist() == [2, 1, 4]  # a tie

    def test_the_recall_is_a_mean_over_queries(self):
        found = metrics(search([(0, 0), (1, 0), (2, 0)]), np.array([1, 3, 2]), (1, 2), "all", resamples=0, seed=0)
        assert [(m.k, m.recall, m.hits.tolist()) for m in found] == [(1, 1 / 3, [1, 0, 0]), (2, 2 / 3, [1, 0, 1])]
        assert found[0].key == ("image_to_text", "test", "all", 1)

    def test_groups(self):
        member = {"few": np.array([True, False, False]), "rest": np.array([False, True, True]), "none": np.zeros(3, bool)}
        rows = by_group(search([(0, 0), (1, 0), (2, 0)], member=member), np.array([1, 3, 2]), (1, 2), resamples=0, seed=0)
        assert [(r["group"], r["queries"], [c["recall"] for c in r["cells"]]) for r in rows] == [("few", 1, [1, 1]), ("rest", 2, [0, 0.5])]
        assert [c["chance"] for c in rows[0]["cells"]] == pytest.approx([0.25, 0.5])


class TestSearches:
    def test_both_directions(self):
        data = shapes()
        to_text, to_picture = searches(data, "test")
        assert (to_text.direction, to_picture.direction) == ("image_to_text", "text_to_image")
        assert (len(to_text.queries), len(to_text.candidates)) == (12, 4) == (len(to_picture.candidates), len(to_picture.queries))
        assert to_text.partners.tolist() == [1] * 12
        assert to_picture.partners.tolist() == [3] * 4
        for some, q, c in ((to_text, 0, 1), (to_picture, 1, 0)):
            pairs = {(int(some.queries[a]), int(some.candidates[b])) for a, b in some.right}
            assert pairs == {(p[q], p[c]) for p in data.pairs("test").tolist()}
        assert {name: int(there.sum()) for name, there in to_text.member.items()} == {"bar": 3, "circle": 3, "cross": 3, "square": 3}
        assert {name: int(there.sum()) for name, there in to_picture.member.items()} == {"bar": 1, "circle": 1, "cross": 1, "square": 1}

    def test_what_the_data_cannot_answer(self):
        says = r"retrieve\.k: 5, but from picture to text split 'test' has 4 candidates"
        with pytest.raises(ZooError, match=says):
            check(shapes(), Retrieve(k=(1, 5)))
        with pytest.raises(ZooError, match="no split named 'stile'; did you mean 'style'"):
            check(shapes(), Retrieve(splits=("stile",)))

    def test_digests_tell_questions_apart(self):
        settings = Retrieve(splits=("style", "test"))
        same, other = digests(shapes(), settings), digests(shapes(renamed="!"), settings)
        assert set(same) == {"image_to_text/style", "text_to_image/style", "image_to_text/test", "text_to_image/test"}
        assert digests(shapes(), settings) == same
        assert not {*same.values()} & {*other.values()}


@pytest.fixture(scope="module", params=["blip", "albef"])
def model(request):
    """Of weights that make much of their inputs."""
    torch.manual_seed(0)
    found = zoo.build(request.param, size="tiny")
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.mul_(2.0) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.3)
    found.trained = True
    return found.eval()


@pytest.fixture(scope="module")
def one_by_one(model):
    """(15, 15) the logit of each picture of split style with each text, nothing kept."""
    data = shapes()
    found = searches(data, "style")[0]
    out = np.zeros((15, 15), np.float32)
    with torch.no_grad():
        for i, picture in enumerate(found.queries.tolist()):
            for j, text in enumerate(found.candidates.tolist()):
                inputs = model.processor({"image": data.pictures[picture]["image"], "text": data.captions[text]})
                image, words = (x._replace(values=x.values[None], mask=None if x.mask is None else x.mask[None]) for x in inputs.values())
                out[i, j] = model.match(model.hold(words, model.read(words)), model.look(image))[0, 1]
    assert out.std() > 0.05, "a test of constants"
    return out


class TestMatching:
    def test_texts_that_are_kept_give_what_texts_read_anew_give(self, model, one_by_one):
        data = shapes()
        some = searches(data, "style")[0]
        library = Library(model, [data.captions[i] for i in some.candidates], batch_size=4)
        pairs = np.array([(i, j) for j in range(15) for i in range(15)])
        found = match_logits(model, Pictures(data, some.queries), library, pairs, batch_size=16)
        # padding and batches change the order of sums: 1e-5 is ten times what was seen
        np.testing.assert_allclose(found, one_by_one[pairs[:, 0], pairs[:, 1]], atol=2e-5)

    @pytest.mark.parametrize("batch_size", [1, 5, 1000])
    def test_each_picture_is_read_once(self, model, one_by_one, batch_size):
        data = shapes()
        some = searches(data, "style")[0]

        class Counted(Pictures):
            read: ClassVar[list[int]] = []

            def __getitem__(self, index):
                self.read.append(index)
                return super().__getitem__(index)

        pictures = Counted(data, some.queries)
        pictures.read.clear()
        pairs = np.array([(3, 1), (7, 0), (3, 0), (7, 5), (3, 9), (11, 2)])
        found = match_logits(model, pictures, Library(model, [data.captions[i] for i in some.candidates]), pairs, batch_size=batch_size)
        np.testing.assert_allclose(found, one_by_one[pairs[:, 0], pairs[:, 1]], atol=2e-5)
        assert sorted(pictures.read) == [3, 7, 11]

    def test_the_second_look_at_all_is_full_fusion(self, model, one_by_one):
        data = shapes()
        some = searches(data, "style")[0]
        settings = Retrieve(splits=("style",), k=(1, 3), bootstrap=0, rerank=1000, examples=0)
        found = {m.key: m for m in ask(model, data, settings, seed=0).metrics}
        texts = model.encode([{"text": data.captions[i]} for i in some.candidates], output="text")
        cosine = model.encode([data.pictures[int(i)] for i in some.queries], output="image") @ texts.T
        scores = one_by_one + cosine if model.adds_cosine else one_by_one
        right = some.is_right(0, 15)
        for direction, matrix, which in (("image_to_text", scores, right), ("text_to_image", scores.T, right.T)):
            place = places_of_first(matrix, which)
            for k in (1, 3):
                assert found[direction, "style", "reranked", k].hits.tolist() == (place <= k).tolist()

    def test_the_second_look_at_one_changes_nothing(self, model):
        settings = Retrieve(splits=("style",), k=(1, 3), bootstrap=20, rerank=1, examples=0)
        found = ask(model, shapes(), settings, seed=0)
        by = {m.key: m.hits.tolist() for m in found.metrics}
        for direction in ("image_to_text", "text_to_image"):
            for k in (1, 3):
                assert by[direction, "style", "reranked", k] == by[direction, "style", "all", k]
        assert [(r["mean"], r["low"], r["high"], r["nearest"]) for r in found.more["reranking"]] == [(0, 0, 0, 1)] * 4

    def test_one_that_cannot(self):
        with pytest.raises(ZooError, match="a Linear does not read pictures and texts together: take an ALBEF, a BLIP or a VLMo"):
            Library(torch.nn.Linear(1, 1), ["a"])

    def test_an_empty_text(self, model):
        with pytest.raises(ZooError, match="row 1: there is no text to match"):
            Library(model, ["a", ""])

    def test_logits_that_are_not_finite(self, model):
        weights = model.matches.bias.data
        kept = weights.clone()
        weights[1] = float("nan")
        try:
            with pytest.raises(Failure, match="2 of 2 logits of a match are not finite"):
                match_logits(model, shapes().pictures, Library(model, ["a"]), np.array([(0, 0), (1, 0)]))
        finally:
            weights.copy_(kept)
