"""Attention with masks that may hide everything from a place, biases of positions, and keys that are kept between calls."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Attend = Literal["all", "causal"] | int
HIDDEN = -65504.0  # of scores; the lowest of float16: a lower number would round to -inf in another precision, and a place of -inf is NaN


class Sight(NamedTuple):
    """Who sees whom, made once for all layers."""

    added: Tensor | None = None  # (B or 1, heads or 1, T or 1, K) float, added to the scores
    blind: Tensor | None = None  # (B or 1, 1, T or 1, 1) bool, the places that see nothing
    is_causal: bool = False  # place i sees 0..i, and ``added`` is None


def sight(attend: Attend, places: int, past: int, mask: Tensor | None, bias: Tensor | None, device: torch.device) -> Sight:
    """What each of the last ``places`` of ``past + places`` = K keys sees.

    Args:
        attend: ``all``; ``causal``, what stands before it and itself; a number n, as BEiT-3's captioner does (Wang et al., 2022,
            https://arxiv.org/abs/2208.10442): the first n places are seen by all and see each other alone, the rest is causal.
        places: How many places ask.
        past: How many keys stand before them.
        mask: (B, K) bool, real keys; or (B, places, K), those that each place may see; None: all.
        bias: (heads, places, K) or (B, heads, places, K) float, added to the scores; None: nothing.
        device: Of the result.
    """
    if attend == "causal" and past == 0 and mask is None and bias is None:
        return Sight(is_causal=True)
    visible = None if mask is None else (mask[:, None, None] if mask.ndim == 2 else mask[:, None])  # (B, 1, 1 or T, K)
    if attend != "all" and places > 1:  # the last place alone sees all before it
        asks = torch.arange(places, device=device)[:, None] + past
        keys = torch.arange(past + places, device=device)
        before = keys <= asks  # (T, K)
        before = before if attend == "causal" else before | (keys < attend)
        visible = before[None, None] if visible is None else visible & before
    if visible is None:
        return Sight(None if bias is None else (bias if bias.ndim == 4 else bias[None]))
    scores = torch.zeros((), device=device) if bias is None else bias if bias.ndim == 4 else bias[None]
    return Sight(torch.where(visible, scores, HIDDEN), ~visible.any(-1, keepdim=True))


def attention(query: Tensor, key: Tensor, value: Tensor, seen: Sight, dropout: float = 0.0) -> Tensor:
    """Scaled dot-product attention (Vaswani et al., Attention is all you need, 2017, https://arxiv.org/abs/1706.03762).

    Args:
        query: (B, heads, T, d).
        key: (B, heads, K, d).
        value: (B, heads, K, d).
        seen: Who sees whom.
        dropout: Of the weights.

    Returns:
        (B, T, heads * d); zeros at places that see nothing.
    """
    added = None if seen.added is None else seen.added.to(query.dtype)
    read = F.scaled_dot_product_attention(query, key, value, added, dropout, is_causal=seen.is_causal)
    if seen.blind is not None:
        read = read.masked_fill(seen.blind, 0)
    return read.transpose(1, 2).flatten(2)


def heads_apart(x: Tensor, heads: int) -> Tensor:
    """(B, N, D) to (B, heads, N, D / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
