"""How close written captions are to those that people wrote: BLEU and CIDEr, the numbers that papers on COCO report."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from zoo.errors import ZooError

SMALL, TINY = 1e-9, 1e-15  # of the published program, which divides by counts that may be 0
CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uac00-\ud7af"
WORD = re.compile(
    rf"[{CJK}]"  # each for itself: they are written without spaces
    r"|\d+(?:[.,:]\d+)*"  # 3.50, 3,000, 5:30
    r"|(?:[^\W\d_]\.){2,}"  # p.m., u.s.
    rf"|[^\W_{CJK}]+(?:[-/'][^\W_{CJK}]+)*"  # t-shirt, and/or, o'neil
    r"|'(?:s|m|d|re|ve|ll)\b"  # of 1980's
    r"|[^\s\w]"
)
ENDINGS = re.compile(r"(?<=.)(n't|'(?:s|m|d|re|ve|ll))$")
DROPPED = frozenset(".,?!:;-'\"`…‘’“”。，？！：；、—–")
WRITTEN = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
TWO_WORDS = {"cannot": ["can", "not"], "gonna": ["gon", "na"], "gotta": ["got", "ta"], "wanna": ["wan", "na"]}
Grams = Mapping[tuple[str, ...], int]


class Score(NamedTuple):
    """A measure of captions."""

    corpus: float  # of all together
    each: np.ndarray  # (N,) float64, of each alone


def words(text: str) -> list[str]:
    """A text in lower case as words, without punctuation.

    Published numbers come from Stanford's tokenizer of the Penn Treebank, a program in Java. On plain English sentences these are its
    words: ``a man's`` and ``isn't`` are two words each, ``well-dressed`` is one, ``(`` is written ``-lrb-``. Abbreviations with one period,
    addresses and the like differ, and Chinese and Japanese are told apart by character here, where it leaves them whole. So numbers are
    comparable with each other, and with published ones as far as captions are plain.
    """
    found: list[str] = []
    for word in WORD.findall(text.lower().replace("’", "'")):
        if word in DROPPED:
            continue
        ending = ENDINGS.search(word)
        found += [word[: ending.start()], ending[0]] if ending else TWO_WORDS.get(word, [WRITTEN.get(word, word)])
    return found


def bleu(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]], longest: int = 4) -> list[Score]:
    """BLEU-1 to BLEU-4 (Papineni et al., 2002, https://doi.org/10.3115/1073083.1073135), as COCO's evaluation computes them.

    Of several references the one of the nearest length, the shorter one of two, decides how much brevity costs. A corpus has its own
    counts, so that its BLEU is no mean of those of its texts.

    Args:
        candidates: (N) captions as `words`.
        references: (N) the captions that people wrote for each, one at least.
        longest: Of the n-grams.

    Returns:
        Of n-grams up to 1, 2, ..., ``longest``, in 0..1.

    Raises:
        ZooError: If there are none, or one has no reference.
    """
    _check(candidates, references)
    right, guessed = np.zeros((len(candidates), longest)), np.zeros((len(candidates), longest))
    own, asked = np.zeros(len(candidates)), np.zeros(len(candidates))  # lengths
    for i, (candidate, texts) in enumerate(zip(candidates, references, strict=True)):
        most: Counter[tuple[str, ...]] = Counter()
        for text in texts:
            most |= grams(text, longest)
        for gram, count in grams(candidate, longest).items():
            right[i, len(gram) - 1] += min(count, most[gram])
        guessed[i] = [max(0, len(candidate) - n) for n in range(longest)]
        own[i] = len(candidate)
        asked[i] = min((abs(len(text) - len(candidate)), len(text)) for text in texts)[1]
    each = _bleu(right, guessed, own, asked)  # (N, longest)
    whole = _bleu(right.sum(0)[None], guessed.sum(0)[None], own.sum()[None], asked.sum()[None])[0]
    return [Score(float(whole[n]), each[:, n]) for n in range(longest)]


def _bleu(right: np.ndarray, guessed: np.ndarray, own: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """(N, n) from (N, n) counts and (N,) lengths."""
    precision = np.cumprod((right + TINY) / (guessed + SMALL), axis=1) ** (1 / np.arange(1, right.shape[1] + 1))
    ratio = (own + TINY) / (asked + SMALL)
    penalty = np.exp(np.minimum(0.0, 1 - 1 / ratio))
    return np.asarray(precision * penalty[:, None])


def cider(
    candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]], longest: int = 4, sigma: float = 6.0
) -> Score:
    """CIDEr-D (Vedantam et al., 2015, https://arxiv.org/abs/1411.5726), as COCO's evaluation computes it under the name CIDEr.

    The cosine of tf-idf vectors of n-grams, with counts clipped to the reference's and a Gaussian of the difference in length, averaged
    over references and n, times 10. How rare an n-gram is, is counted over the pictures at hand: with one picture all is 0.

    Args:
        candidates: (N) captions as `words`.
        references: (N) the captions that people wrote for each, one at least.
        longest: Of the n-grams.
        sigma: Of the Gaussian.

    Returns:
        In 0..10, which papers print times 100.

    Raises:
        ZooError: If there are none, or one has no reference.
    """
    _check(candidates, references)
    pictures = Counter(gram for texts in references for gram in {gram for text in texts for gram in grams(text, longest)})
    everything = math.log(len(candidates))

    def vector(counts: Grams) -> list[dict[tuple[str, ...], float]]:
        made: list[dict[tuple[str, ...], float]] = [{} for _ in range(longest)]
        for gram, count in counts.items():
            made[len(gram) - 1][gram] = count * (everything - math.log(max(1, pictures[gram])))
        return made

    each = []
    for candidate, texts in zip(candidates, references, strict=True):
        mine, found = vector(grams(candidate, longest)), 0.0
        for text in texts:
            alike = sum(_cosine(a, b) for a, b in zip(mine, vector(grams(text, longest)), strict=True))
            found += alike * math.exp(-((len(candidate) - len(text)) ** 2) / (2 * sigma**2))
        each.append(10 * found / longest / len(texts))
    return Score(float(np.mean(each)), np.array(each))


def _cosine(mine: Mapping[tuple[str, ...], float], theirs: Mapping[tuple[str, ...], float]) -> float:
    lengths = math.sqrt(sum(x * x for x in mine.values())) * math.sqrt(sum(x * x for x in theirs.values()))
    return sum(min(x, theirs.get(gram, 0.0)) * theirs.get(gram, 0.0) for gram, x in mine.items()) / lengths if lengths else 0.0


def grams(text: Sequence[str], longest: int) -> Counter[tuple[str, ...]]:
    """How often each sequence of up to ``longest`` words is in a text."""
    return Counter(tuple(text[i : i + n]) for n in range(1, longest + 1) for i in range(len(text) - n + 1))


def _check(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> None:
    if not candidates or len(candidates) != len(references):
        raise ZooError(f"{len(candidates)} captions and references of {len(references)} pictures: give as many of both, one at least")
    if bare := [i for i, texts in enumerate(references) if not texts]:
        raise ZooError(f"{len(bare)} captions, such as number {bare[0]}, have no reference")
    if any(isinstance(text, str) for text in (*candidates, *(t for texts in references for t in texts))):
        raise ZooError("a caption is a list of words: give words(text)")
