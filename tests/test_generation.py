"""Captions word by word: every way of writing against all captions there are, counted out one by one."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from zoo.abilities import Captioning
from zoo.errors import Failure, ZooError
from zoo.generation import likelihoods, nucleus, rows, write
from zoo.sections import Decoding
from zoo.trunk import Cache, Shape, Trunk
from zoo.types import Tokens

WORDS, END, LONGEST = 4, 3, 3  # 3 words and the id that ends a caption


class Writer(nn.Module):
    """A decoder of four words that looks at pictures."""

    def __init__(self, words=WORDS, prompt=(0,), seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.prompt, self.room = list(prompt), 32
        self.words, self.places = nn.Embedding(words, 16), nn.Embedding(32, 16)
        self.trunk = Trunk(Shape(dim=16, heads=2, memory_dim=8, init=0.6), 2, cross_layers=(0, 1), final_norm=True)
        self.head = nn.Linear(16, words)
        with torch.no_grad():
            self.head.weight.mul_(2.0)
        self.eval()
        self.calls = []

    def next_words(self, ids, seen, cache):
        self.calls.append(tuple(ids.shape))
        past = 0 if cache is None else cache.length
        x = self.words(ids) + self.places(torch.arange(past, past + ids.shape[1]))
        x, cache = self.trunk(x, attend="causal", memory=seen.tokens, memory_mask=seen.mask, cache=cache or Cache())
        return self.head(x[:, -1]), cache

    def caption(self, text, out):
        raise NotImplementedError


class Everything(list):
    """All ids so far, in the place of a cache."""

    def rows(self, index):
        return Everything([self[i] for i in index.tolist()])


class Anew(Writer):
    """The same, which keeps nothing and reads every caption from its beginning."""

    def next_words(self, ids, seen, cache):
        everything = [[*old, *new] for old, new in zip(cache or [[] for _ in ids], ids.tolist(), strict=True)]
        return super().next_words(torch.tensor(everything), seen, None)[0], Everything(everything)


def pictures(count, seed=1):
    draw = torch.Generator().manual_seed(seed)
    mask = torch.ones(count, 5, dtype=torch.bool)
    mask[::2, 3:] = False
    return Tokens(torch.randn(count, 5, 8, generator=draw) * 2, mask, None, torch.ones(count, dtype=torch.bool))


KNOWN = {}


@torch.no_grad()
def chances(model, seen, picture, words):
    """(V,) log-probabilities of what comes after ``words``, from the beginning."""
    key = (id(model), float(seen.tokens[picture, 0, 0]), tuple(words))
    if key not in KNOWN:
        one = rows(seen, torch.tensor([picture]))
        KNOWN[key] = model.next_words(torch.tensor([[*model.prompt, *words]]), one, None)[0][0].float().log_softmax(-1)
    return KNOWN[key]


def every_caption(model, seen, picture, how):
    """{caption: score} of all that can be written."""
    found = {}
    others = [word for word in range(WORDS) if word != END]
    for length in range(how.longest + 1):
        for words in product(others, repeat=length):
            total = sum(float(chances(model, seen, picture, words[:i])[word]) for i, word in enumerate(words))
            if length < how.longest:
                if length < how.shortest:
                    continue
                total += float(chances(model, seen, picture, words)[END])
            found[words] = total / min(length + 1, how.longest) ** how.length_penalty
    return found


def by_beams(model, seen, picture, how):
    """The same search as a list of tuples, which goes on to the end whatever it has found."""
    going, ended = [((), 0.0)], []
    for length in range(how.longest):
        found = [((*ids, w), total + float(p)) for ids, total in going for w, p in enumerate(chances(model, seen, picture, ids))]
        found = sorted((x for x in found if x[0][-1] != END or length >= how.shortest), key=lambda x: -x[1])
        ended += [(ids[:-1], total / (length + 1) ** how.length_penalty) for ids, total in found[: how.beams] if ids[-1] == END]
        going = [x for x in found if x[0][-1] != END][: how.beams]
    ended += [(ids, total / how.longest**how.length_penalty) for ids, total in going]
    return max(ended, key=lambda x: x[1])


@pytest.fixture(scope="module")
def model():
    found = Writer()
    assert isinstance(found, Captioning)
    return found


class TestBeams:
    @pytest.mark.parametrize("penalty", [0.0, 1.0, -1.0, 3.0])
    @pytest.mark.parametrize("shortest", [0, 1, 2])
    def test_as_many_as_there_are_captions_find_the_best(self, model, penalty, shortest):
        how = Decoding(beams=WORDS**LONGEST, longest=LONGEST, shortest=shortest, length_penalty=penalty)
        seen = pictures(6)
        found = write(model, seen, how, end=END)
        best = [max(every_caption(model, seen, i, how).items(), key=lambda item: item[1]) for i in range(6)]
        assert [tuple(ids) for ids in found.ids] == [words for words, _ in best]
        assert found.scores == pytest.approx([score for _, score in best], abs=1e-5)

    def test_the_best_differ_with_penalty_and_picture(self, model):
        # or the test above would compare one caption with itself
        best = {
            max(found, key=found.get)
            for penalty in (-1.0, 3.0)
            for i in range(6)
            if (found := every_caption(model, pictures(6), i, Decoding(longest=LONGEST, shortest=0, length_penalty=penalty)))
        }
        assert len(best) > 2
        assert len({len(words) for words in best}) > 1

    @pytest.mark.parametrize("penalty", [0.0, 1.0, -0.5])
    @pytest.mark.parametrize("width", [1, 2, 3])
    def test_few_of_them_find_what_beams_find(self, model, width, penalty):
        seen, how = pictures(8), Decoding(beams=width, longest=5, shortest=0, length_penalty=penalty)
        found = write(model, seen, how, end=END)
        expected = [by_beams(model, seen, i, how) for i in range(8)]
        assert [tuple(ids) for ids in found.ids] == [ids for ids, _ in expected]
        assert found.scores == pytest.approx([score for _, score in expected], abs=1e-4)

    def test_more_of_them_are_not_worse(self, model):
        seen = pictures(12)
        scores = [write(model, seen, Decoding(beams=width, longest=6, length_penalty=0.0), end=END).scores for width in (1, 3, 1000)]
        assert np.all(np.diff(np.array(scores)[[0, 2]], axis=0) >= -1e-5)
        assert np.mean(scores[0]) < np.mean(scores[1]) < np.mean(scores[2])

    def test_one_of_them_is_greedy(self, model):
        seen = pictures(8)
        by = [write(model, seen, Decoding(method=m, beams=1, longest=6, length_penalty=0.0), end=END) for m in ("beam", "greedy")]
        same = [a == b for a, b in zip(by[0].ids, by[1].ids, strict=True)]
        assert all(same)
        assert by[0].scores == pytest.approx(by[1].scores, abs=1e-5)

    def test_a_picture_is_not_changed_by_its_neighbours(self, model):
        seen, how = pictures(7), Decoding(longest=5)
        together = write(model, seen, how, end=END)
        alone = [write(model, rows(seen, torch.tensor([i])), how, end=END) for i in range(7)]
        assert together.ids == [found.ids[0] for found in alone]

    def test_no_more_is_written_than_needed(self, model):
        # 2 pictures, 2 beams: the prompt once for each picture, then one id for each beam
        fresh = Writer()
        write(fresh, pictures(2), Decoding(beams=2, longest=3, shortest=3), end=END)
        assert fresh.calls == [(2, 1), (4, 1), (4, 1)]


class TestGreedy:
    def test_the_most_probable_word_each_time(self, model):
        seen = pictures(5)
        found = write(model, seen, Decoding(method="greedy", longest=5, shortest=0), end=END)
        for i in range(5):
            words, total = [], 0.0
            for _ in range(5):
                said = chances(model, seen, i, words)
                word = int(said.argmax())
                total += float(said[word])
                if word == END:
                    break
                words.append(word)
            assert found.ids[i] == words
            assert found.scores[i] == pytest.approx(total, abs=1e-5)

    def test_lengths(self, model):
        seen = pictures(20)
        free = write(model, seen, Decoding(method="greedy", longest=9, shortest=0), end=END).ids
        held = write(model, seen, Decoding(method="greedy", longest=9, shortest=4), end=END).ids
        assert min(map(len, free)) < 4 <= min(map(len, held))
        assert max(map(len, held)) == 9
        assert not any(END in ids for ids in held)


class TestNucleus:
    @pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
    def test_what_is_drawn_lies_inside(self, share):
        logits = torch.tensor([[3.0, 1.0, 2.0, 0.0, -1.0]]).log_softmax(-1)
        chances = logits.exp()[0]
        count, total = 0, 0.0
        for word in chances.argsort(descending=True).tolist():
            count, total = count + 1, total + float(chances[word])
            if total >= share:
                break
        inside = set(chances.argsort(descending=True)[:count].tolist())
        draws = torch.linspace(0, 1, 1001)
        found = nucleus(logits.expand(1001, 5), draws, share)
        assert set(found.tolist()) == inside
        for word in inside:  # as often as its share says
            expected = float(chances[word] / sum(chances[w] for w in inside))
            assert float((found == word).float().mean()) == pytest.approx(expected, abs=2e-3)

    def test_a_temperature_near_zero_is_greedy(self):
        logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(0))
        assert torch.equal(nucleus(logits, torch.rand(50), 1.0, 1e-4), logits.argmax(-1))

    def test_the_seed_and_the_number_of_the_picture_decide(self, model):
        seen, how = pictures(9), Decoding(method="nucleus", longest=6)
        found = write(model, seen, how, end=END, seed=5)
        assert found == write(model, seen, how, end=END, seed=5)
        assert found.ids != write(model, seen, how, end=END, seed=6).ids
        later = write(model, rows(seen, torch.arange(4, 9)), how, end=END, seed=5, first=4)
        assert later.ids == found.ids[4:]

    def test_over_many_draws_captions_come_as_often_as_they_are_probable(self, model):
        seen, how = pictures(1), Decoding(method="nucleus", nucleus=1.0, longest=2, shortest=0)
        drawn = [tuple(ids) for ids in write(model, rows(seen, torch.zeros(600, dtype=torch.int64)), how, end=END).ids]
        scores = every_caption(model, seen, 0, Decoding(longest=2, shortest=0, length_penalty=0.0))
        for words, score in scores.items():
            share, expected = drawn.count(words) / 600, float(np.exp(score))
            assert abs(share - expected) < 4 * (expected / 600) ** 0.5 + 1e-3  # four standard errors
        assert sum(np.exp(list(scores.values()))) == pytest.approx(1, abs=1e-5)


class TestCache:
    @pytest.mark.parametrize("how", [Decoding(longest=6), Decoding(method="greedy", longest=6), Decoding(method="nucleus", longest=6)])
    def test_it_changes_nothing(self, model, how):
        seen = pictures(9)
        kept, anew = write(model, seen, how, end=END, seed=2), write(Anew(), seen, how, end=END, seed=2)
        assert kept.ids == anew.ids
        assert kept.scores == pytest.approx(anew.scores, abs=1e-5)

    def test_only_the_pictures_that_go_on_are_looked_at(self):
        model = Writer()
        found = write(model, pictures(20), Decoding(method="greedy", longest=9, shortest=0), end=END)
        lengths = [len(ids) for ids in found.ids]
        assert model.calls == [(sum(length >= step for length in lengths), 1) for step in range(min(max(lengths) + 1, 9))]


class TestPrompt:
    def test_it_comes_first_and_is_not_written(self, model):
        seen, how = pictures(4), Decoding(method="greedy", longest=4, shortest=4)
        begun = Writer(prompt=(0, 2, 1))
        begun.load_state_dict(model.state_dict())
        assert write(model, seen, how, end=END, prompt=(2, 1)) == write(begun, seen, how, end=END)
        assert write(model, seen, how, end=END, prompt=(2, 1)).ids != write(model, seen, how, end=END).ids

    def test_none(self):
        with pytest.raises(ZooError, match="a caption needs an id to begin with, and this model has no prompt"):
            write(Writer(prompt=()), pictures(1), Decoding(), end=END)


class TestLikelihoods:
    def test_word_by_word(self, model):
        seen, texts = pictures(4), [[0, 1, END], [2, END], [1], [0, 0, 0, 0]]
        expected = [sum(float(chances(model, seen, i, text[:n])[w]) for n, w in enumerate(text)) for i, text in enumerate(texts)]
        assert likelihoods(model, seen, texts).tolist() == pytest.approx(expected, abs=1e-5)

    def test_smoothing_is_torchs(self, model):
        seen, text = pictures(1), [2, 0, END]
        logits = torch.stack([chances(model, seen, 0, text[:n]) for n in range(3)])
        loss = nn.functional.cross_entropy(logits, torch.tensor(text), label_smoothing=0.1, reduction="sum")
        assert likelihoods(model, seen, [text], smoothing=0.1).item() == pytest.approx(-loss.item(), abs=1e-5)

    def test_of_what_was_written(self, model):
        seen = pictures(6)
        found = write(model, seen, Decoding(method="greedy", longest=5), end=END)
        texts = [[*ids, END] if len(ids) < 5 else ids for ids in found.ids]
        assert likelihoods(model, seen, texts).tolist() == pytest.approx(found.scores, abs=1e-5)


class TestRefusals:
    def test_lengths(self, model):
        with pytest.raises(ZooError, match="shortest: 5 ids at least and 2 at most: write shortest=2 or less"):
            write(model, pictures(1), Decoding(shortest=5, longest=2), end=END)

    @pytest.mark.parametrize("method", ["greedy", "beam", "nucleus"])
    def test_captions_for_which_there_is_no_room(self, method):
        """Whether or not one of them gets so long; the last word that is written is not read, so it needs no place."""
        model = Writer()
        assert write(model, pictures(1), Decoding(method=method, longest=31, shortest=31), end=END, prompt=[1]).ids[0]
        with pytest.raises(ZooError, match="longest: 32 ids behind the 2 that a caption begins with are too many for this model's 32"):
            write(model, pictures(1), Decoding(method=method, longest=32), end=END, prompt=[1])
        with pytest.raises(ZooError, match=r"longest: 1 ids behind the 33 .* write a shorter prompt"):
            write(model, pictures(1), Decoding(method=method, longest=1), end=END, prompt=[1] * 32)
        assert max(rows for _, rows in model.calls) <= 2

    @pytest.mark.parametrize("method", ["greedy", "beam", "nucleus"])
    def test_weights_that_are_not_numbers(self, method):
        broken = Writer()
        broken.head.bias.data[1] = float("nan")
        with pytest.raises(Failure, match="logits of words that are NaN"):
            write(broken, pictures(2), Decoding(method=method), end=END)

    @pytest.mark.parametrize("method", ["greedy", "beam", "nucleus"])
    def test_no_pictures(self, model, method):
        assert write(model, pictures(0), Decoding(method=method), end=END) == ([], [])
