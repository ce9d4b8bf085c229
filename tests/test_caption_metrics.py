"""BLEU, CIDEr and the accuracy of answers: against the published program, and by hand."""

import shutil

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider

from zoo.errors import ZooError
from zoo.evaluate.captions import bleu, cider, words
from zoo.evaluate.vqa import CONTRACTIONS, accuracy, normal

WORDS = ("a", "dog", "runs")  # few, so that long n-grams are found again
PLAIN = (
    "A man's dog isn't here, don't you think?",
    "Two well-dressed women -- one in red; one in blue.",
    "It costs $3.50 (about 10%) at 5:30 p.m.",
    "He can't, won't; I'm we're they've",
    "and/or the 1980's style, 3,000 people",
    "O'Neil's café... cannot!",
)


def drawn(count, seed, short=0, long=14):
    """Random captions, each with one to six references of any length."""
    draw = np.random.default_rng(seed)

    def text():
        return draw.choice(WORDS, int(draw.integers(short, long))).tolist()

    return [text() for _ in range(count)], [[text() for _ in range(int(draw.integers(1, 7)))] for _ in range(count)]


def theirs(scorer, candidates, references, **settings):
    given = {i: [" ".join(text) for text in texts] for i, texts in enumerate(references)}
    return scorer.compute_score(given, {i: [" ".join(text)] for i, text in enumerate(candidates)}, **settings)


class TestAgainstThePublishedProgram:
    """1e-9: both compute in float64, in another order of sums."""

    @pytest.mark.parametrize("seed", range(8))
    def test_bleu(self, seed):
        candidates, references = drawn(20, seed)
        whole, each = theirs(Bleu(4), candidates, references, verbose=0)
        ours = bleu(candidates, references)
        for n in range(4):
            assert ours[n].corpus == pytest.approx(whole[n], abs=1e-9)
            np.testing.assert_allclose(ours[n].each, each[n], rtol=0, atol=1e-9)
        assert 1e-4 < ours[3].corpus < ours[0].corpus < 1

    @pytest.mark.parametrize("seed", range(8))
    def test_cider(self, seed):
        candidates, references = drawn(20, seed)
        whole, each = theirs(Cider(), candidates, references)
        ours = cider(candidates, references)
        assert ours.corpus == pytest.approx(whole, abs=1e-9)
        np.testing.assert_allclose(ours.each, each, rtol=0, atol=1e-9)
        assert ours.corpus > 0.05

    def test_captions_that_are_much_shorter_and_much_longer(self):
        for lengths in ((1, 4), (12, 30)):
            candidates, references = drawn(20, 9, *lengths)[0], drawn(20, 10)[1]
            assert bleu(candidates, references)[1].corpus == pytest.approx(
                theirs(Bleu(4), candidates, references, verbose=0)[0][1], abs=1e-9
            )
            assert cider(candidates, references).corpus == pytest.approx(theirs(Cider(), candidates, references)[0], abs=1e-9)

    @pytest.mark.slow
    @pytest.mark.skipif(shutil.which("java") is None, reason="the Penn Treebank tokenizer is a Java program")
    def test_words_of_plain_sentences(self):
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        found = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(PLAIN)})
        assert [" ".join(words(text)) for text in PLAIN] == [texts[0] for texts in found.values()]


class TestByHand:
    def test_bleu(self):
        """Of 4 words 3 are right, of 3 pairs 1, no triple; the nearest reference has 5 words."""
        one, two, three, _ = bleu([["a", "dog", "the", "cat"]], [[["a", "dog", "and", "the", "bird"], ["cat"] * 9]])
        penalty = np.exp(1 - 5 / 4)
        assert one.corpus == pytest.approx(penalty * 1.0, abs=1e-6)  # cat is in the other reference
        assert two.corpus == pytest.approx(penalty * np.sqrt(1 / 3), abs=1e-6)
        assert three.corpus == pytest.approx(0, abs=1e-4)

    def test_of_two_lengths_as_near_the_shorter_one_counts(self):
        assert bleu([["a"] * 4], [[["a"] * 3, ["a"] * 5]])[0].corpus == pytest.approx(1)

    def test_a_word_counts_as_often_as_a_reference_has_it(self):
        assert bleu([["the"] * 4], [[["the", "cat", "the", "mat"]]])[0].corpus == pytest.approx(0.5)

    def test_cider_of_the_reference_itself(self):
        texts = [["a", "red", "dog", "runs"], ["two", "cats", "sit", "there"]]
        assert cider(texts, [[t] for t in texts]).each.tolist() == pytest.approx([10, 10])

    def test_one_picture_says_nothing_about_rarity(self):
        assert cider([["a"]], [[["a"]]]).corpus == 0

    def test_clipping_and_length(self):
        """Of words alone: 3 of ln 2 each against 1, clipped; two words apart is e^(-2^2 / 72)."""
        score = cider([["dog", "dog", "dog"], ["cat"]], [[["dog"]], [["cat"]]], longest=2)
        one = 1 / 3  # the clipped product over both lengths
        assert score.each[0] == pytest.approx(10 * one / 2 * np.exp(-4 / 72))

    def test_words(self):
        assert " ".join(words("Two well-dressed men’s dogs, it’s  (fun)!")) == "two well-dressed men 's dogs it 's -lrb- fun -rrb-"
        assert words("一只狗，2只猫。") == ["一", "只", "狗", "2", "只", "猫"]
        assert words("") == words(" ... ") == []


class TestRefusals:
    @pytest.mark.parametrize("measure", [bleu, cider])
    @pytest.mark.parametrize(
        ("candidates", "references", "says"),
        [
            ([], [], "0 captions and references of 0 pictures"),
            ([["a"]], [], "1 captions and references of 0 pictures: give as many of both"),
            ([["a"], ["b"]], [[["a"]], []], "1 captions, such as number 1, have no reference"),
            (["a dog"], [[["a", "dog"]]], r"a caption is a list of words: give words\(text\)"),
            ([["a", "dog"]], [["a dog"]], r"a caption is a list of words: give words\(text\)"),
        ],
    )
    def test_captions(self, measure, candidates, references, says):
        with pytest.raises(ZooError, match=says):
            measure(candidates, references)

    @pytest.mark.parametrize(
        ("predicted", "answers", "says"),
        [
            ([], [], "0 answers to 0 questions"),
            (["a"], [], "1 answers to 0 questions: give as many of both"),
            (["a"], [["a"]], "question 0: fewer than two people answered it"),
            (["a"], ["yes"], "question 0: fewer than two people answered it"),
        ],
    )
    def test_answers(self, predicted, answers, says):
        with pytest.raises(ZooError, match=says):
            accuracy(predicted, answers)


class TestAnswers:
    @pytest.mark.parametrize(("same", "share"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
    def test_of_ten(self, same, share):
        """With k of ten, each of them sees k - 1 others and the rest see k: (k * min((k-1)/3, 1) + (10-k) * min(k/3, 1)) / 10."""
        found = accuracy(["yes"], [["Yes."] * same + ["no"] * (10 - same)])
        assert found.tolist() == pytest.approx([share])

    def test_answers_are_compared_as_the_challenge_does(self):
        assert accuracy(["two dogs", "cant"], [["2 dogs"] * 9 + ["dogs"], ["can't"] * 5 + ["no"] * 5]).tolist() == [1, 1]

    @pytest.mark.parametrize(
        ("answer", "expected"),
        [
            ("The  Dog.", "dog"),
            ("two", "2"),
            ("None", "0"),
            ("an apple, a pear", "apple pear"),
            ("black/white", "black white"),
            ("black / white", "black white"),
            ("1,000", "1000"),  # a comma between digits: no space instead of any mark
            ("1,000-2", "10002"),
            ("5.5", "5.5"),
            ("u.s.", "us"),
            ("dont know", "don't know"),
            ("shouldntve", "shouldntve"),
            ("shouldn'tve", "shouldn't've"),
            ("dogs' bowl 5:30", "dogs' bowl 5:30"),
            ("yes\n", "yes"),
            ("what?!", "what"),
            ("?!", ""),
        ],
    )
    def test_normal(self, answer, expected):
        assert normal(answer) == expected

    def test_contractions(self):
        assert {"arent": "aren't", "hed": "he'd", "wheres": "where's", "youre": "you're", "yall": "y'all"}.items() <= CONTRACTIONS.items()
        assert not {"well", "were", "ill", "shell", "its", "lets", "wed", "id"} & CONTRACTIONS.keys()  # words of their own
        assert all(key.replace("'", "") == value.replace("'", "") for key, value in CONTRACTIONS.items())
