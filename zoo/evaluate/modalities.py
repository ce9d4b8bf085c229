"""What each modality is worth to retrieval: notes with a modality hidden or its images exchanged, and how recall answers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from zoo.collate import RowCollate
from zoo.errors import ZooError
from zoo.evaluate._scorer import Scorer
from zoo.evaluate._subsets import Shown, shapley, subsets
from zoo.models._encode import progress, to_device
from zoo.types import Row

__all__ = ["Altered", "Shown", "exchange", "expected_hits", "modalities", "nothing", "shapley", "subsets", "vectors"]

_CELLS = 1 << 22  # comparisons held at once
_TEXT = ("title", "topic", "content")


def modalities(keys: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The keys of a row by modality: the text fields are one, every other key is one by itself."""
    text = {"text": tuple(key for key in keys if key in _TEXT)}
    return {name: own for name, own in {**text, **{key: (key,) for key in keys if key not in _TEXT}}.items() if own}


class Altered(Sequence[Row]):
    """Notes of which some keys are hidden, or that show the image of another note.

    Args:
        notes: The rows.
        hidden: Keys that are left out.
        image_of: (N,) whose image each note shows; a note without one shows none. None: its own.
    """

    def __init__(self, notes: Sequence[Row], hidden: Collection[str] = (), image_of: np.ndarray | None = None) -> None:
        self.notes, self.hidden, self.image_of = notes, hidden, image_of

    def __len__(self) -> int:
        return len(self.notes)

    def __getitem__(self, index: Any) -> Any:
        row = {key: value for key, value in self.notes[index].items() if key not in self.hidden}
        if self.image_of is not None and row.get("image") is not None:
            row["image"] = self.notes[int(self.image_of[index])]["image"]
        return row


def exchange(notes: int, having: np.ndarray, *, seed: int) -> np.ndarray:
    """(N,) whose image each note shows: one random cycle through the notes that have one, so that none keeps its own.

    Raises:
        ZooError: If fewer than two notes have an image.
    """
    if len(having) < 2:
        raise ZooError(f"images are exchanged between notes, and {len(having)} of them has one")
    image_of = np.arange(notes)
    order = np.random.default_rng(seed).permutation(having)
    image_of[order] = np.roll(order, 1)
    return image_of


@torch.no_grad()
def vectors(model: Any, notes: Sequence[Row], indices: np.ndarray, *, batch_size: int, says: str) -> dict[str, np.ndarray]:
    """Every output of the model: {name: (N, D) float32} of length 1; zeros for notes not in ``indices`` and where the output is absent.

    Args:
        model: In eval mode.
        notes: N rows; those of ``indices`` are read once.
        indices: (n,) which of them.
        batch_size: Rows at a time.
        says: Beside the bar.
    """
    found = {name: np.zeros((len(notes), model.dim), np.float32) for name in model.outputs}
    device = next(model.parameters()).device
    collate = RowCollate(model.processor)
    for start in progress(range(0, len(indices), batch_size), says, None):
        rows = [(int(i), notes[int(i)]) for i in indices[start : start + batch_size]]
        seen = [(i, row) for i, row in rows if model.processor.sees(row)]
        if not seen:
            continue
        out = model(to_device(collate([row for _, row in seen]), device))
        for name in model.outputs:
            x = F.normalize(out.embeddings[name].float(), dim=-1)
            if name in out.present:
                x = x.masked_fill(~out.present[name][:, None], 0)
            found[name][[i for i, _ in seen]] = x.cpu().numpy()
    return found


def expected_hits(scorer: Scorer, pairs: np.ndarray, candidates: np.ndarray, k: int) -> np.ndarray:
    """(Q,) recall@K of each query if candidates that tie lie in random order: what a system that cannot tell them apart deserves.

    Of a system that gives all candidates the same score it is K over their number, so that showing nothing and not looking are worth
    the same. Without ties it is recall@K.

    Args:
        scorer: As for `zoo.evaluate.retrieval.measure`.
        pairs: (P, 2) query and partner, grouped by query in ascending order.
        candidates: (C,) distinct; the query itself is none.
        k: The cut-off.
    """
    queries, row, partners = np.unique(pairs[:, 0], return_inverse=True, return_counts=True)
    size = max(1, _CELLS // (len(candidates) * int(partners.max())))
    hits = np.zeros(len(queries))
    for start in range(0, len(queries), size):
        asked = queries[start : start + size]
        mine = slice(*np.searchsorted(row, [start, start + len(asked)]))
        scores = scorer(asked)[row[mine] - start]  # (p, N)
        sought = np.take_along_axis(scores, pairs[mine, 1:], axis=1)
        others = np.where(candidates == pairs[mine, :1], -np.inf, scores[:, candidates])  # (p, C)
        better, tied = (others > sought).sum(1), (others == sought).sum(1)
        hits += np.bincount(row[mine], weights=np.clip((k - better) / tied, 0, 1), minlength=len(queries))
    return hits / partners


def nothing(notes: int) -> Scorer:
    """The scorer of somebody who is shown nothing."""
    return lambda queries: np.zeros((len(queries), notes), np.float32)
