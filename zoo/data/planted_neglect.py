"""Notes whose text mostly says enough and whose image always says all: the data on which a model may learn to neglect images."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field

from zoo.config import Fraction, Positive
from zoo.data._collection import Input
from zoo.errors import ZooError, unknown
from zoo.registry import register
from zoo.types import Row

SPLITS = ("train", "val", "test")
WORDS_OF_EACH = 8  # of a topic, and of a style
FILLERS = 64
KINDS = (0.45, 0.2, 0.35)  # of the words of a text: of the topic, of the style, said of anything
LONG, SHORT = (6, 10), 2  # words of a long text from, to; the most of a short one
CODE = 8  # numbers that stand for a topic before the map to an image, and for a style
HIDDEN = 32  # width inside that map
JITTER = 0.5  # of the latents of one image, and of each number of it


class World(NamedTuple):
    """What does not change from note to note: the codebook of words and the map from latents to images."""

    words: np.ndarray  # (topics + styles + 1, WORDS_OF_EACH or FILLERS) object: the last row holds the fillers
    codes: tuple[np.ndarray, np.ndarray]  # (topics, CODE) and (styles, CODE)
    weights: tuple[np.ndarray, np.ndarray]  # (tokens, 2 CODE, HIDDEN) and (tokens, HIDDEN, width)


class Rows(Sequence[Row]):
    """The notes as raw rows, made on access.

    Args:
        texts: (N,) content; empty where a note has no text.
        images: (N, tokens, width) float32.
        inputs: What a row shows; the rest is absent.
    """

    def __init__(self, texts: list[str], images: np.ndarray, inputs: Sequence[Input]) -> None:
        self.texts, self.images, self.inputs = texts, images, tuple(inputs)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: Any) -> Any:  # an int; Sequence would also have it take slices
        i = operator.index(index)
        i = i + len(self) if i < 0 else i
        if not 0 <= i < len(self):
            raise IndexError(f"note {index} of {len(self)}")
        row: dict[str, Any] = {"id": i, "note_id": i}
        if "text" in self.inputs and self.texts[i]:
            row["content"] = self.texts[i]
        if "image" in self.inputs:
            row["image"] = self.images[i]
        return row


class Planted:
    """The notes, their pairs, and the truth behind them. It is a `PairData`.

    Args:
        notes: Of each split, in the order of `SPLITS`.
        pairs: Of each split.
        topic: (N,) int64.
        style: (N,) int64.
        texts: (N,) content.
        images: (N, tokens, width) float32.
        inputs: What rows show. Lengths, short texts and lexical baselines are the same whatever they show.
    """

    def __init__(
        self,
        notes: Mapping[str, np.ndarray],
        pairs: Mapping[str, np.ndarray],
        topic: np.ndarray,
        style: np.ndarray,
        texts: list[str],
        images: np.ndarray,
        inputs: Sequence[Input],
    ) -> None:
        self.topic, self.style = topic, style
        self.notes: Sequence[Row] = Rows(texts, images, inputs)
        self.note_ids: Sequence[Any] = list(range(len(texts)))
        self.broken: Sequence[Any] = []
        self._notes, self._pairs, self._texts = dict(notes), dict(pairs), texts
        self.statistics: Mapping[str, Any] = {
            "notes": {split: len(of) for split, of in self._notes.items()},
            "pairs": {split: len(of) for split, of in self._pairs.items()},
            "short": int(self.short().sum()),
        }
        digest = hashlib.sha256("\n".join([*texts, *inputs]).encode())
        for array in (images, *(self._pairs[split] for split in SPLITS)):
            digest.update(np.ascontiguousarray(array).tobytes())
        self.fingerprint: str = digest.hexdigest()

    def pairs(self, split: str) -> np.ndarray:
        """(P, 2) int64 query and target indices.

        Raises:
            ZooError: If there is no such split.
        """
        if split not in self._pairs:
            raise ZooError(unknown("split", split, self._pairs))
        return self._pairs[split]

    def pool(self, split: str) -> np.ndarray:
        """(C,) int64 indices of the candidates: the notes of the split, which no other split has.

        Raises:
            ZooError: If there is no such split.
        """
        self.pairs(split)
        return self._notes[split]

    def lengths(self) -> np.ndarray:
        """(N,) int64 characters of the content."""
        return np.array([len(text) for text in self._texts], dtype=np.int64)

    def short(self) -> np.ndarray:
        """(N,) bool, notes of at most two words; all others have eight or more."""
        return np.array([len(text.split()) <= SHORT for text in self._texts])

    def texts(self) -> list[str]:
        """(N,) the content of each note."""
        return list(self._texts)

    def clicks(self) -> np.ndarray:
        """(N,) float64 zeros: nobody clicks here."""
        return np.zeros(len(self._texts))


@register("data", "planted_neglect")
def planted_neglect(
    root: Path | None = None,
    *,
    train_notes: Positive = 8000,
    train_pairs: Positive = 10000,
    pool: Positive = 5000,
    queries: Positive = 1500,
    topics: Annotated[int, Field(ge=2)] = 48,
    styles: Annotated[int, Field(ge=2)] = 16,
    patches: Positive = 16,
    width: Positive = 32,
    short_share: Fraction = 0.17,
    informative: bool = True,
    seed: int = 0,
    inputs: list[Input] | None = None,
) -> Planted:
    """Notes with a topic and a style, both shared by the notes of a pair: text tells the one well and the other weakly, images tell both.

    After the proposal to study visual neglect in NoteLLM-2 (Zhang et al., 2024, https://arxiv.org/abs/2405.16789). A text is words
    from a codebook: of the topic, fewer of the style, and some said of anything; about one in six has two words or fewer. An image
    is what a frozen vision encoder would give: vectors under a fixed random non-linear map of topic and style, one for the whole
    and one for each patch, in a basis that has nothing to do with the words'.

    Args:
        root: Not used: nothing is read.
        train_notes: Notes of the split train.
        train_pairs: Drawn among them with replacement; twenty thousand and more are possible.
        pool: Notes of val, and of test; no split shares a note with another.
        queries: Pairs of val, and of test, no note in two of them; fewer where the pool does not hold so many.
        topics: How many.
        styles: How many.
        patches: Vectors of an image besides the one for the whole, which comes first.
        width: Of each vector.
        short_share: Share of the notes with little text; a third of them have none.
        informative: False: images show a topic and a style that have nothing to do with the note's, else drawn alike.
        seed: Of everything.
        inputs: What rows show, ``[image]`` for a run without text; None: both.

    Raises:
        ZooError: If no two training notes share a topic and a style.
    """
    draw = np.random.default_rng(seed)
    world = _world(draw, topics, styles, patches + 1, width)
    sizes = {"train": train_notes, "val": pool, "test": pool}
    total = sum(sizes.values())
    topic, style = draw.integers(topics, size=total), draw.integers(styles, size=total)
    texts = [_write(draw, world, int(a), topics + int(b), short_share) for a, b in zip(topic, style, strict=True)]
    others = draw.integers(topics, size=total), draw.integers(styles, size=total)  # drawn always: texts and pairs stay the same
    images = _draw(draw, world, *((topic, style) if informative else others))
    starts = np.cumsum([0, *sizes.values()])
    notes = {split: np.arange(start, start + sizes[split]) for split, start in zip(SPLITS, starts[:-1], strict=True)}
    both = topic * styles + style
    pairs = {split: _pair(draw, both[of], None if split == "train" else queries) + of[0] for split, of in notes.items()}
    if not len(pairs["train"]):
        raise ZooError(f"planted_neglect: no two of {train_notes} training notes share a topic and a style: write more train_notes")
    pairs["train"] = pairs["train"][draw.integers(len(pairs["train"]), size=train_pairs)]
    shown: list[Input] = ["text", "image"] if inputs is None else inputs
    return Planted(notes, pairs, topic, style, texts, images, shown)


def _world(draw: np.random.Generator, topics: int, styles: int, tokens: int, width: int) -> World:
    order = draw.permutation(_vocabulary((topics + styles) * WORDS_OF_EACH + FILLERS))
    lists = np.empty(topics + styles + 1, dtype=object)
    for i in range(topics + styles):
        lists[i] = order[i * WORDS_OF_EACH : (i + 1) * WORDS_OF_EACH]
    lists[-1] = order[-FILLERS:]
    codes = draw.standard_normal((topics, CODE)), draw.standard_normal((styles, CODE))
    inward = draw.standard_normal((tokens, 2 * CODE, HIDDEN)) / np.sqrt(2 * CODE)
    inward[1:] *= draw.random((tokens - 1, 2 * CODE, 1)) < 0.5  # a patch shows a part
    return World(lists, codes, (inward, draw.standard_normal((tokens, HIDDEN, width)) / np.sqrt(HIDDEN)))


def _vocabulary(size: int) -> np.ndarray:
    """``size`` different words of two or three syllables."""
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    n = len(syllables)
    return np.array([syllables[i % n] + syllables[i // n % n] + (syllables[i // n**2] if i >= n**2 else "") for i in range(size)])


def _write(draw: np.random.Generator, world: World, topic: int, style: int, short_share: float) -> str:
    """Words of the lists ``topic`` and ``style``, and fillers."""
    count = int(draw.integers(SHORT + 1)) if draw.random() < short_share else int(draw.integers(LONG[0], LONG[1] + 1))
    kinds = draw.choice(3, size=count, p=KINDS)
    lists = world.words[[topic, style, -1]]
    return " ".join(str(lists[kind][int(draw.integers(len(lists[kind])))]) for kind in kinds)


def _draw(draw: np.random.Generator, world: World, topic: np.ndarray, style: np.ndarray) -> np.ndarray:
    """(N, tokens, width) float32."""
    latent = np.concatenate([world.codes[0][topic], world.codes[1][style]], 1)  # (N, 2 CODE)
    latent = latent + JITTER * draw.standard_normal(latent.shape)
    inward, outward = world.weights
    inside = np.tanh(2.0 * np.einsum("nc,tch->tnh", latent, inward, optimize=True))  # (tokens, N, HIDDEN)
    image = np.einsum("tnh,thw->ntw", inside, outward, optimize=True)
    return (image + JITTER * draw.standard_normal(image.shape)).astype(np.float32)


def _pair(draw: np.random.Generator, both: np.ndarray, queries: int | None) -> np.ndarray:
    """Pairs of equal ``both``: each note with every other, or ``queries`` pairs no two of which share a note."""
    order = draw.permutation(len(both))
    order = order[np.argsort(both[order], kind="stable")]
    groups = np.split(order, np.flatnonzero(np.diff(both[order])) + 1)
    if queries is None:
        found = [np.stack(np.nonzero(~np.eye(len(g), dtype=bool)), 1) for g in groups]
        return np.concatenate([g[at] for g, at in zip(groups, found, strict=True)]).astype(np.int64)
    disjoint = np.concatenate([g[: len(g) // 2 * 2].reshape(-1, 2) for g in groups]).astype(np.int64)
    return disjoint[draw.permutation(len(disjoint))[:queries]]
