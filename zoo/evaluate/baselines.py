"""What a trained model has to beat: word overlap, popularity, chance. Each is a scorer, evaluated as a model is."""

from __future__ import annotations

import logging
import re

import bm25s
import numpy as np

from zoo.errors import ZooError
from zoo.evaluate._scorer import Scorer
from zoo.types import PairData

_CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_WORD = re.compile(
    rf"[{_CJK}]|[^\W{_CJK}]+"
)  # a Chinese sentence has no spaces: every character is a word, as in Lucene's standard analyser


def bm25(data: PairData, *, k1: float = 1.5, b: float = 0.75) -> Scorer:
    """Okapi BM25 with a note's own text as the query (Robertson and Zaragoza 2009, https://doi.org/10.1561/1500000019).

    Word statistics come from all notes. A word that the query repeats counts as often as it stands there.

    Args:
        data: Its ``texts()`` are searched.
        k1: How slowly repetitions of a word saturate.
        b: How much long notes are held back, 0..1.

    Raises:
        ZooError: If no note has a word.
    """
    words = [_WORD.findall(text.lower()) for text in data.texts()]
    if not any(words):
        raise ZooError(f"none of the {len(words)} notes has a word of text: leave the baseline 'bm25' out")
    index = bm25s.BM25(k1=k1, b=b)
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # on import it sets DEBUG itself, and every handler of the root prints its steps
    index.index(words, show_progress=False)

    def score(queries: np.ndarray) -> np.ndarray:
        out = np.zeros((len(queries), len(words)), np.float32)
        for row, query in zip(out, queries, strict=True):
            if words[query]:
                row[:] = index.get_scores(words[query])
        return out

    return score


def popularity(data: PairData) -> Scorer:
    """Every query gets the notes with the most clicks of the training window."""
    clicks = np.asarray(data.clicks(), np.float64)

    def score(queries: np.ndarray) -> np.ndarray:
        return np.broadcast_to(clicks, (len(queries), len(clicks)))

    return score


def random(data: PairData, *, seed: int = 0) -> Scorer:
    """A fixed random order per query, the same however queries are chunked."""
    notes = len(data.notes)

    def score(queries: np.ndarray) -> np.ndarray:
        return np.stack([np.random.default_rng([seed, int(query)]).random(notes) for query in queries])

    return score
