"""Put the tokens of media into a sequence of text, row by row, whatever is absent and however long each is.

Each row of the input marks with a slot where a medium goes. Every token, of text or of a medium, gets a sort key from
its place; sorting the keys lays the row out, and everything that belongs to a token travels with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from zoo.types import Tokens

IGNORE = -100  # a label that no loss counts, as torch's cross entropy has it


class Layout(NamedTuple):
    """Rows of text with slots for media, padded to one length. B rows, N positions, of which a slot takes one."""

    embeds: Tensor  # (B, N, D) text embeddings; what stands at a slot is ignored
    mask: Tensor  # (B, N) bool, True at text and slots
    slots: Tensor  # (B, N) int64: 0 text, k the k-th medium (from 1)
    anchors: Mapping[str, Tensor]  # {name: (B,) position of a text token, -1 where the row has no such anchor}
    labels: Tensor | None = None  # (B, N) int64, IGNORE where nothing is predicted
    keep: Tensor | None = None  # (B, N) bool: never cut
    shared: Tensor | None = None  # (B, N) bool: this slot's tokens share one position id (CogVLM's image)


class Spliced(NamedTuple):
    """One sequence a row. S is the longest, in an exported graph the longest there can be.

    Every field but ``anchors`` has these two dimensions first.
    """

    inputs_embeds: Tensor  # (B, S, D)
    attention_mask: Tensor  # (B, S) bool
    position_ids: Tensor  # (B, S) int64, from 0 at the row's first token, 0 at padding
    labels: Tensor  # (B, S) int64, IGNORE at media and padding
    kind: Tensor  # (B, S) int64: 0 text, k the k-th medium, -1 padding
    expert: Tensor  # (B, S) bool: tokens of a medium, for experts that are routed by modality
    anchors: Mapping[str, Tensor]  # {name: (B,) index into S, -1 where absent}


def splice(
    layout: Layout, media: Mapping[str, Tokens], *, padding: Literal["right", "left"] = "right", max_length: int | None = None
) -> Spliced:
    """Replace each slot by the tokens of its medium.

    Args:
        layout: The text. A row whose medium is absent must have no slot for it.
        media: In the order of the slot numbers. A row's masked tokens are left out.
        padding: The side on which shorter rows are filled up.
        max_length: Rows longer than this after expansion lose text from the end, never a medium and never ``keep``.

    Returns:
        The rows, with the anchors moved along.
    """
    B, N = layout.mask.shape
    device = layout.mask.device
    stride = 1 + sum(m.tokens.shape[1] for m in media.values())
    place = torch.arange(N, device=device).expand(B, N)
    is_text = layout.mask & (layout.slots == 0)
    embeds, valid, keys = [layout.embeds], [is_text], [place * stride]
    kind, shared = [torch.zeros_like(layout.slots)], [torch.zeros_like(is_text)]
    for k, x in enumerate(media.values(), start=1):
        L = x.tokens.shape[1]
        here = layout.mask & (layout.slots == k)  # (B, N), at most one slot a row
        slot = (place * here).sum(1, keepdim=True)  # (B, 1)
        embeds.append(x.tokens.to(layout.embeds.dtype))
        valid.append(x.mask & here.any(1, keepdim=True))
        keys.append(slot * stride + torch.arange(L, device=device))
        kind.append(torch.full((B, L), k, device=device))
        same = layout.shared if layout.shared is not None else torch.zeros_like(here)
        shared.append((here & same).any(1, keepdim=True).expand(B, L))

    total = torch.cat(valid, 1)  # (B, T): all tokens there may be
    key, kinds = torch.cat(keys, 1), torch.cat(kind, 1)
    if max_length is not None:
        total = _cut(total, layout, max_length)
    length = total.sum(1)
    S = total.shape[1] if torch.compiler.is_exporting() else int(length.max()) if B else 0  # a graph's shapes cannot hang on its values
    end = torch.iinfo(torch.int64).max if padding == "right" else -1
    order = key.masked_fill(~total, end).argsort(dim=1)  # (B, T): padding at one end; no two real tokens have one key
    order = order[:, :S] if padding == "right" else order[:, order.shape[1] - S :]

    mask = total.gather(1, order)
    sequence = torch.cat(embeds, 1).gather(1, order[..., None].expand(-1, -1, layout.embeds.shape[-1]))
    follows = torch.cat(shared, 1).gather(1, order) & mask
    kinds = kinds.gather(1, order).masked_fill(~mask, -1)
    return Spliced(
        sequence.masked_fill(~mask[..., None], 0),  # not a product: what stands at a slot may be nan
        mask,
        _positions(mask, follows, kinds),
        _labels(layout, total, order, mask),
        kinds,
        kinds > 0,
        {name: _moved(a, total, order) for name, a in layout.anchors.items()},
    )


def _cut(total: Tensor, layout: Layout, max_length: int) -> Tensor:
    """Drop each row's last droppable text until it fits."""
    N = layout.mask.shape[1]
    keep = layout.keep if layout.keep is not None else torch.zeros_like(layout.mask)
    droppable = total[:, :N] & ~keep
    over = (total.sum(1, keepdim=True) - max_length).clamp(min=0)  # (B, 1)
    from_end = droppable.flip(1).cumsum(1).flip(1)  # 1 at the last droppable token
    text = total[:, :N] & ~(droppable & (from_end <= over))
    return torch.cat([text, total[:, N:]], 1)


def _positions(mask: Tensor, follows: Tensor, kind: Tensor) -> Tensor:
    """0, 1, 2, ... over the real tokens; a token that shares its position repeats the one of its neighbour before."""
    before = torch.cat([torch.full_like(kind[:, :1], -1), kind[:, :-1]], 1)
    step = mask & ~(follows & (before == kind))
    return (step.cumsum(1) - 1).clamp(min=0) * mask


def _labels(layout: Layout, total: Tensor, order: Tensor, mask: Tensor) -> Tensor:
    labels = torch.full(total.shape, IGNORE, dtype=torch.int64, device=mask.device)
    if layout.labels is not None:
        labels[:, : layout.labels.shape[1]] = layout.labels
    return labels.gather(1, order).masked_fill(~mask, IGNORE)


def _moved(anchor: Tensor, total: Tensor, order: Tensor) -> Tensor:
    """Where the token at ``anchor`` went; -1 where the row has no such anchor or it was cut."""
    index = anchor.clamp(min=0)[:, None]
    hit = order == index  # (B, S)
    there = (anchor >= 0) & total.gather(1, index)[:, 0] & hit.any(1)
    return torch.where(there, hit.int().argmax(1), -1)
