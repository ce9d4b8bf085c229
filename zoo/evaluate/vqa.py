"""How right answers to questions about pictures are, where ten people answered each: the accuracy of the VQA challenge."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from zoo.answers import AnsweredData
from zoo.errors import ZooError
from zoo.metric import ANSWERS

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = ("a", "an", "the")
NUMBERS = {"none": "0"} | {
    word: str(i) for i, word in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))
}
_NOT = "ai are ca could did does do had has have is might must need ought sha should was were wo would"
_ENDINGS = {
    "n't": _NOT,
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'ll": "how it somebody someone something they what who why you",
    "'s": "he how somebody someone that there what when where who why",
    "'re": "there they what why you",
}
_TWICE = {"n't've": "could had might should would", "'d've": "he it she somebody someone something there they we who you"}
_OTHERS = {"maam": "ma'am", "oclock": "o'clock", "twas": "'twas", "yall": "y'all", "yall'll": "y'all'll", "y'allll": "y'all'll"}
_OTHERS |= dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've") | dict.fromkeys(
    ("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at"
)


def _contractions() -> dict[str, str]:
    """What is written without its apostrophe, to how it is written."""
    found = dict(_OTHERS) | {"somebody'd": "somebodyd"}  # the last as the challenge has it
    for ending, words in _ENDINGS.items():
        found |= {word + ending.replace("'", ""): word + ending for word in words.split()}
    for ending, words in _TWICE.items():
        first = ending.index("'")
        without = ending[:first] + ending[first + 1 :], ending[: first + 1] + ending[first + 1 :].replace("'", "")
        found |= {word + short: word + ending for word in words.split() for short in without}
    return found


CONTRACTIONS = _contractions()


def normal(answer: str) -> str:
    """An answer as answers are compared: lower case, no articles, numbers up to ten as digits, apostrophes where they belong.

    A punctuation mark becomes a space, or nothing where it stands beside a space or the answer has a comma between digits; a period goes
    unless a digit follows. Apostrophes and colons stay.
    """
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    thousands = re.search(r"\d,\d", text) is not None
    tidy = text
    for mark in PUNCTUATION:
        tidy = tidy.replace(mark, "" if thousands or f"{mark} " in text or f" {mark}" in text else " ")
    tidy = re.sub(r"\.(?!\d)", "", tidy)
    words = [NUMBERS.get(word, word) for word in tidy.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def accuracy(predicted: Sequence[str], answers: Sequence[Sequence[str]]) -> np.ndarray:
    """The share of right answers, in which three people make an answer right (Antol et al., 2015, https://arxiv.org/abs/1505.00468).

    For each person, a third of the others who gave this answer and 1 at most; averaged over the persons. Of ten, 1 gives 0.3, 2 give 0.6,
    3 give 0.9, 4 give 1. People's answers are made `normal` too, as the challenge says they are; its program does so in part only,
    which tells where they wrote a number as a word, or an article.

    Args:
        predicted: (N) answers.
        answers: (N) what people answered to each, two at least.

    Returns:
        (N,) float64 in 0..1; its mean is the accuracy.

    Raises:
        ZooError: If there are none, or fewer than two people answered one.
    """
    if not predicted or len(predicted) != len(answers):
        raise ZooError(f"{len(predicted)} answers to {len(answers)} questions: give as many of both, one at least")
    if few := [i for i, said in enumerate(answers) if isinstance(said, str) or len(said) < 2]:
        raise ZooError(f"question {few[0]}: fewer than two people answered it: one's answer is measured by the others'")
    return np.array([_soft(normal(mine), [normal(one) for one in said]) for mine, said in zip(predicted, answers, strict=True)])


def _soft(mine: str, said: Sequence[str]) -> float:
    same = sum(one == mine for one in said)
    return sum(min((same - (one == mine)) / 3, 1.0) for one in said) / len(said)


class People:
    """How right guesses at the classes of a data set are by what people answered. It is a `zoo.evaluate.classification.Grading`.

    Args:
        data: Whose classes are answers; one that stands for the rest is right for nobody.
    """

    protocol = ANSWERS

    def __init__(self, data: AnsweredData) -> None:
        self.data = data
        self._names = [None if name in data.rest else normal(name) for name in data.classes]
        self._said: dict[int, list[str]] = {}  # of the rows that were asked about
        self._normal: dict[str, str] = {}  # few answers make up most

    def right(self, rows: np.ndarray, guesses: np.ndarray) -> np.ndarray:
        """`accuracy` of guesses (n,) int64 at classes of the rows (n,) int64: (n,) float64 in 0..1."""
        pairs = zip(rows.tolist(), guesses.tolist(), strict=True)
        named = ((row, self._names[k]) for row, k in pairs)
        return np.array([0.0 if name is None else _soft(name, self._of(row)) for row, name in named])

    def subsets(self, rows: np.ndarray) -> Mapping[str, np.ndarray]:
        """{kind of question: (n,) bool} over the rows (n,) int64, by name."""
        kinds = np.array([self.data.kinds[i] for i in rows.tolist()])
        return {str(kind): kinds == kind for kind in np.unique(kinds) if kind}

    def _of(self, row: int) -> list[str]:
        if row not in self._said:
            said = self.data.answers[row]
            for one in said:
                if one not in self._normal:
                    self._normal[one] = normal(one)
            self._said[row] = [self._normal[one] for one in said]
        return self._said[row]
