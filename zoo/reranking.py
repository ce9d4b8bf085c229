"""The second look: pictures and texts that lie near each other are read together, by a model that tells whether they match."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from zoo.abilities import Matching, check_learned
from zoo.collate import processed, stack
from zoo.errors import Failure, ZooError
from zoo.generation import rows
from zoo.models._encode import progress, to_device
from zoo.types import Batch, ModalityInputs, Row, Tokens


class Library:
    """Texts as matching starts from them, each made once and kept on the CPU.

    Args:
        model: In eval mode; has `zoo.abilities.Matching`.
        texts: (T)
        batch_size: Texts at a time.
        show_progress: None: a bar when there are many and somebody watches.

    Raises:
        ZooError: If the model cannot match.
    """

    @torch.no_grad()
    def __init__(self, model: Any, texts: Sequence[str], *, batch_size: int = 256, show_progress: bool | None = None) -> None:
        _check_able(model)
        self.tokens: list[Tensor] = []  # (N, D) of each text
        self.pooled: list[Tensor] | None = []
        for start in progress(range(0, len(texts), batch_size), "texts", show_progress):
            words = _inputs(model, [{"text": text} for text in texts[start : start + batch_size]], "text", start)
            held = model.hold(words, model.read(words))
            self.tokens += [x[there].cpu() for x, there in zip(held.tokens, held.mask, strict=True)]
            self.pooled = None if held.pooled is None or self.pooled is None else [*self.pooled, *held.pooled.cpu()]

    def __len__(self) -> int:
        return len(self.tokens)

    def held(self, which: Sequence[int], device: torch.device) -> Tokens:
        """The texts ``which`` (B) as one batch."""
        some = [self.tokens[i] for i in which]
        lengths = torch.tensor([len(x) for x in some])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        pooled = None if self.pooled is None else torch.stack([self.pooled[i] for i in which]).to(device)
        return Tokens(pad_sequence(some, batch_first=True).to(device), mask.to(device), pooled, torch.ones(len(some), device=device) > 0)


def match_logits(
    model: Any,
    pictures: Sequence[Row],
    library: Library,
    pairs: np.ndarray,
    *,
    batch_size: int = 256,
    show_progress: bool | None = None,
) -> np.ndarray:
    """The logit that each text is true of its picture.

    Args:
        model: In eval mode; the one of the library.
        pictures: (P) rows with ``image``; each that is in a pair is read and looked at once, whatever the number of its texts.
        library: Of (T) texts.
        pairs: (n, 2) int64 picture and text.
        batch_size: Pairs at a time; pictures are looked at by as many as have that many pairs.
        show_progress: None: a bar when there are many and somebody watches.

    Returns:
        (n,) float32.

    Raises:
        Failure: If a logit is not finite.
        ZooError: If the model cannot match, or a picture cannot be decoded.
    """
    return _logits(model, pictures, library, pairs, batch_size, show_progress)[:, 1]


def match_chances(
    model: Any,
    pictures: Sequence[Row],
    library: Library,
    pairs: np.ndarray,
    *,
    batch_size: int = 256,
    show_progress: bool | None = None,
) -> np.ndarray:
    """(n,) float32, the chance that each text is true of its picture, in 0..1; all else as of `match_logits`."""
    logits = _logits(model, pictures, library, pairs, batch_size, show_progress).astype(np.float64)
    return (1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))).astype(np.float32)


@torch.no_grad()
def _logits(model: Any, pictures: Sequence[Row], library: Library, pairs: np.ndarray, batch_size: int, show: bool | None) -> np.ndarray:
    """(n, 2) float32: that a text is not true of its picture, and that it is."""
    _check_able(model)
    order = np.argsort(pairs[:, 0], kind="stable")
    found = np.zeros((len(pairs), 2), dtype=np.float32)
    shown, starts = np.unique(pairs[order, 0], return_index=True)
    ends = np.append(starts[1:], len(pairs))
    together = _together(ends - starts, batch_size)
    for number in progress(range(len(together)), "matching", show):
        first, after = together[number]
        raw = [{"image": pictures[int(i)].get("image")} for i in shown[first:after]]
        seen = model.see(_inputs(model, raw, "image", first))
        for at in range(int(starts[first]), int(ends[after - 1]), batch_size):
            here = order[at : min(at + batch_size, int(ends[after - 1]))]
            which = torch.from_numpy(np.searchsorted(shown[first:after], pairs[here, 0])).to(seen.tokens.device)
            logits = model.match(library.held(pairs[here, 1].tolist(), seen.tokens.device), rows(seen, which))
            found[here] = logits.float().cpu().numpy()
    if wrong := int((~np.isfinite(found)).any(1).sum()):
        raise Failure(f"{wrong} of {len(found)} logits of a match are not finite: the model's weights are at fault")
    return found


def _check_able(model: Any) -> None:
    if not isinstance(model, Matching):
        raise ZooError(f"a {type(model).__name__} does not read pictures and texts together: take an ALBEF, a BLIP or a VLMo")
    check_learned(model, "matches", r"matches\.|.*\.encode\.")


def _inputs(model: Any, given: Sequence[Row], what: str, first: int) -> ModalityInputs:
    """(B) rows of ``what`` alone, as the model takes them."""
    if lost := [i for i, row in enumerate(given, first) if not model.processor.sees(row)]:
        raise ZooError(f"row {', '.join(map(str, lost[:5]))}: there is no {what} to match")
    batch = Batch(stack([processed(model.processor, row, i) for i, row in enumerate(given, first)]))
    return to_device(batch, next(model.parameters()).device).inputs[what]


def _together(counts: np.ndarray, most: int) -> list[tuple[int, int]]:
    """Neighbouring pictures (first, after) that have ``most`` pairs or fewer, or are alone."""
    out, first, total = [], 0, 0
    for i, count in enumerate(counts.tolist()):
        if i > first and total + count > most:
            out.append((first, i))
            first, total = i, 0
        total += count
    return [*out, (first, len(counts))] if len(counts) else []
