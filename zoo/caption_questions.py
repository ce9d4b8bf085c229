"""What a recipe asks of a model of pictures and texts: retrieval both ways, a second look, captions, classes by their names."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from zoo.abilities import Captioning, Matching
from zoo.captions import caption
from zoo.errors import ZooError
from zoo.evaluate._bootstrap import interval, paired_difference
from zoo.evaluate.captioned import Nearest, Search, by_group, chance, metrics, nearest, ranks, reranked, searches
from zoo.evaluate.captions import bleu, cider, words
from zoo.metric import DIRECTIONS, RERANKED, Metric, place_name
from zoo.reranking import Library, match_logits
from zoo.sections import Retrieve
from zoo.thumbnail import thumbnail
from zoo.types import CaptionedData, Row
from zoo.zeroshot import classifier, told

logger = logging.getLogger("zoo.caption_questions")
_SHOWN = 5  # of what a query finds, in the examples


class Answered(NamedTuple):
    """How a model did."""

    metrics: list[Metric]
    more: dict[str, Any]  # plain values besides, as `ask` says
    files: dict[str, Any]  # by name, what a run leaves beside ``metrics.json``


class Pictures(Sequence[Row]):
    """Some of the pictures of a data set, decoded on access.

    Args:
        data: Whose they are.
        which: (n,) int64.
    """

    def __init__(self, data: CaptionedData, which: np.ndarray) -> None:
        self.pictures, self.which = data.pictures, which

    def __len__(self) -> int:
        return len(self.which)

    def __getitem__(self, index: Any) -> Any:  # an int; Sequence would also have it take slices
        return self.pictures[int(self.which[index])]


def ask(model: Any, data: CaptionedData, settings: Retrieve, *, seed: int) -> Answered:
    """All that the section ``retrieve`` asks.

    Args:
        model: In eval mode, with the embeddings ``image`` and ``text``.
        data: Of pictures and texts that it was not trained on, among others.
        settings: Of what is measured.
        seed: Of the intervals, and of all that is drawn.

    Returns:
        Metrics whose protocol is the direction and whose subset is the split, each for the cosine of the vectors and, where the model
        matches, for the second look. ``more``: ``chance``, of a random ranking; ``groups``, recall by kind of picture; ``reranking``, the
        second look minus the first on the same queries; ``captions``, their measures; ``zeroshot``; and ``left_out``, what the recipe asks
        and this model cannot do, in words. ``files``: ``examples.json`` and ``captions.json``.

    Raises:
        Failure: If vectors or logits are not finite.
        ZooError: If the model lacks an embedding, or a picture cannot be decoded.
    """
    model.eval()
    if left_out := _left_out(model, settings):
        logger.warning("not measured: %s", "; ".join(left_out))
    answered = Answered([], {"chance": {}, "groups": []} | ({"left_out": left_out} if left_out else {}), {"examples.json": []})
    for split in settings.splits:
        _ask_split(model, data, split, settings, seed, answered)
    return answered


def _ask_split(model: Any, data: CaptionedData, split: str, settings: Retrieve, seed: int, out: Answered) -> None:
    """All of one split, added to ``out``."""
    both = searches(data, split)
    vectors = _vectors(model, data, both[0], settings)
    sides = [vectors, vectors[::-1]]
    before = [ranks(search, *side) for search, side in zip(both, sides, strict=True)]
    for search, side, places in zip(both, sides, before, strict=True):
        out.metrics.extend(metrics(search, places, settings.k, "all", resamples=settings.bootstrap, seed=seed))
        out.more["chance"] |= {place_name(search.direction, split, k): float(chance(search, k).mean()) for k in settings.k}
        out.more["groups"] += by_group(search, places, settings.k, resamples=settings.bootstrap, seed=seed)
        if settings.examples:
            out.files["examples.json"] += _examples(data, search, nearest(search, *side, _SHOWN), settings.examples, seed)
    if settings.rerank and isinstance(model, Matching):
        near = [nearest(search, *side, settings.rerank) for search, side in zip(both, sides, strict=True)]
        again = _second_look(model, data, both, near, settings)
        for search, places, some, scores in zip(both, before, near, again, strict=True):
            after = reranked(places, search, some, scores)
            out.metrics.extend(metrics(search, after, settings.k, RERANKED, resamples=settings.bootstrap, seed=seed))
            out.more.setdefault("reranking", []).extend(_gained(search, places, after, some.places.shape[1], settings, seed))
    if settings.zeroshot.templates:
        out.more.setdefault("zeroshot", []).extend(_zeroshot(model, data, both[0], vectors[0], settings, seed))
    if settings.captions and isinstance(model, Captioning):
        written = _captions(model, data, both[0], settings, seed)
        judged, by_kind = _judged(written, split, settings, seed)
        out.files.setdefault("captions.json", []).extend(written)
        out.more.setdefault("captions", {}).update(judged)
        out.more.setdefault("captions_by_group", []).extend(by_kind)


def digests(data: CaptionedData, settings: Retrieve) -> dict[str, str]:
    """{"image_to_text/test": digest}: what is sought among what."""
    out: dict[str, str] = {}
    for split in settings.splits:
        digest = hashlib.sha256(json.dumps([list(data.picture_ids), list(data.captions)], default=str).encode())
        digest.update(np.unique(data.pairs(split), axis=0).tobytes())
        out |= {f"{direction}/{split}": digest.hexdigest() for direction in DIRECTIONS}
    return out


def _left_out(model: Any, settings: Retrieve) -> list[str]:
    """What the recipe asks and this model cannot do, in words."""
    said = []
    if settings.rerank and not isinstance(model, Matching):
        said.append("re-ranking: this model does not read pictures and texts together")
    if settings.captions and not isinstance(model, Captioning):
        said.append("captions: this model writes none")
    return said


def _vectors(model: Any, data: CaptionedData, search: Search, settings: Retrieve) -> tuple[np.ndarray, np.ndarray]:
    """Of the pictures (P, D) and the texts (T, D) of a search from picture to text."""
    if lost := [name for name in ("image", "text") if name not in model.outputs]:
        raise ZooError(f"retrieve: this model gives no embedding {lost[0]!r} (it gives: {', '.join(model.outputs)})")
    texts = [{"text": data.captions[int(i)]} for i in search.candidates]
    size = settings.batch_size
    return model.encode(Pictures(data, search.queries), size, output="image"), model.encode(texts, size, output="text")


def _second_look(model: Any, data: CaptionedData, both: Sequence[Search], near: Sequence[Nearest], settings: Retrieve) -> list[np.ndarray]:
    """The scores (Q, n) of the nearest of both directions, by a model that matches; a pair that both found is read once."""
    of_text, of_picture = near[0].places, near[1].places
    pairs = np.concatenate(
        [
            np.stack([np.repeat(np.arange(len(of_text)), of_text.shape[1]), of_text.ravel()], 1),
            np.stack([of_picture.ravel(), np.repeat(np.arange(len(of_picture)), of_picture.shape[1])], 1),
        ]
    )
    once, where = np.unique(pairs, axis=0, return_inverse=True)
    library = Library(model, [data.captions[int(i)] for i in both[0].candidates], batch_size=settings.batch_size)
    logits = match_logits(model, Pictures(data, both[0].queries), library, once, batch_size=settings.batch_size)[where.ravel()]
    scores = [logits[: of_text.size].reshape(of_text.shape), logits[of_text.size :].reshape(of_picture.shape)]
    return [found + some.scores if model.adds_cosine else found for found, some in zip(scores, near, strict=True)]


def _gained(search: Search, before: np.ndarray, after: np.ndarray, count: int, settings: Retrieve, seed: int) -> list[dict[str, Any]]:
    """The second look minus the first at each k, on the same queries."""
    out = []
    for k in settings.k:
        first, second = (found <= k for found in (before, after))
        difference = paired_difference(second.astype(float), first.astype(float), resamples=settings.bootstrap, seed=seed)
        measured = {"dual": float(first.mean()), "reranked": float(second.mean()), **difference._asdict()}
        out.append({"direction": search.direction, "split": search.split, "k": int(k), "nearest": count, **measured})
    return out


def _zeroshot(model: Any, data: CaptionedData, search: Search, pictures: np.ndarray, settings: Retrieve, seed: int) -> list[dict[str, Any]]:
    """Accuracy of classes by their names, of all pictures of the split and of each group."""
    asked = settings.zeroshot
    if asked.classes == "groups":
        names, right = list(search.member), np.stack(list(search.member.values()), 1)  # (Q, K)
    else:
        names, right = [data.captions[int(i)] for i in search.candidates], search.is_right(0, len(search.queries))
    guesses = told(pictures, classifier(model, names, asked.templates, batch_size=settings.batch_size))
    hits = right[np.arange(len(guesses)), guesses].astype(float)
    rows = []
    for name, there in {"all": np.ones(len(hits), dtype=bool), **search.member}.items():
        if there.any():
            low, high = interval(hits[there], resamples=settings.bootstrap, seed=seed)
            values = {"accuracy": float(hits[there].mean()), "low": float(low), "high": float(high), "chance": float(right[there].mean())}
            rows.append({"split": search.split, "group": name, "pictures": int(there.sum()), "classes": len(names), **values})
    return rows


def _captions(model: Any, data: CaptionedData, search: Search, settings: Retrieve, seed: int) -> list[dict[str, Any]]:
    """What is written of some pictures, drawn, or of all, beside what is said of them; the first have a small picture."""
    count = len(search.queries) if settings.captions == "all" else min(int(settings.captions), len(search.queries))
    drawn = np.random.default_rng([seed, count]).choice(len(search.queries), count, replace=False)
    shown, places = set(drawn[: settings.examples].tolist()), np.sort(drawn)
    pictures = search.queries[places]
    texts = caption(model, Pictures(data, pictures), settings.decode, prompt=settings.prompt, seed=seed, batch_size=settings.batch_size)
    out = []
    for place, picture, text in zip(places.tolist(), pictures.tolist(), texts, strict=True):
        said = [data.captions[int(search.candidates[i])] for i in search.right[search.right[:, 0] == place, 1]]
        kinds = [name for name, there in search.member.items() if there[place]]
        entry = {"split": search.split, "picture": str(data.picture_ids[picture]), "groups": kinds, "written": text, "said": said}
        out.append(entry | ({"image": thumbnail(data.pictures[picture]["image"])} if place in shown else {}))
    return out


def _judged(written: Sequence[dict[str, Any]], split: str, settings: Retrieve, seed: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Measures of the captions of a split against what is said of their pictures; and CIDEr of each group.

    ``exact`` is the share of the captions that are said word for word.
    """
    mine, theirs = [words(entry["written"]) for entry in written], [[words(text) for text in entry["said"]] for entry in written]
    each = cider(mine, theirs)
    exact = np.array([text in said for text, said in zip(mine, theirs, strict=True)], dtype=float)
    shares = {f"BLEU-{n}": found.corpus for n, found in enumerate(bleu(mine, theirs), 1)}
    total = {f"{split}, {name}": float(value) for name, value in {**shares, "CIDEr": each.corpus, "exact": exact.mean()}.items()}
    rows = []
    for group in sorted({name for entry in written for name in entry["groups"]}):
        there = np.array([group in entry["groups"] for entry in written])
        low, high = interval(each.each[there], resamples=settings.bootstrap, seed=seed)
        values = {"cider": float(each.each[there].mean()), "low": float(low), "high": float(high), "exact": float(exact[there].mean())}
        rows.append({"split": split, "group": group, "pictures": int(there.sum()), **values})
    return total, rows


def _examples(data: CaptionedData, search: Search, near: Nearest, count: int, seed: int) -> list[dict[str, Any]]:
    """Queries, drawn, with what they find first."""
    drawn = np.random.default_rng([seed, len(search.queries)]).choice(len(search.queries), min(count, len(search.queries)), replace=False)
    right = {place: set(search.right[search.right[:, 0] == place, 1].tolist()) for place in drawn.tolist()}
    asks, finds = ("image", "text") if search.direction == "image_to_text" else ("text", "image")

    def card(what: str, number: int) -> dict[str, Any]:
        if what == "text":
            return {"text": data.captions[number], "image": None}
        return {"text": str(data.picture_ids[number]), "image": thumbnail(data.pictures[number]["image"])}

    entries = []
    for place in drawn.tolist():
        found = [
            {**card(finds, int(search.candidates[at])), "hit": int(at) in right[place], "score": float(score)}
            for at, score in zip(near.places[place], near.scores[place], strict=True)
        ]
        partners = [data.captions[int(search.candidates[at])] for at in sorted(right[place])] if finds == "text" else []
        query = {**card(asks, int(search.queries[place])), "said": partners}
        entries.append({"direction": search.direction, "split": search.split, "query": query, "neighbours": found})
    return entries
