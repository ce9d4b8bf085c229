"""Attention with a mask that may hide everything from a row, without NaN and in any precision."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F


def attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, heads: int, dropout: float = 0.0) -> Tensor:
    """Scaled dot-product attention.

    Args:
        query: (B, Q, D)
        key: (B, K, D)
        value: (B, K, D)
        visible: (B or 1, Q or 1, K) bool, which keys a query sees; None: all. One that sees none gets the mean of all values.
        heads: They divide D.
        dropout: Of the attention weights, already 0 outside training.

    Returns:
        (B, Q, D)
    """
    q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (query, key, value))
    mask = None
    if visible is not None:
        # The lowest finite number of the dtype at hand: float32's would round to -inf under bf16 autocast, and a row of -inf is NaN.
        mask = torch.zeros_like(visible, dtype=q.dtype).masked_fill(~visible, torch.finfo(q.dtype).min)[:, None]
        mask = mask.expand(q.shape[0], 1, q.shape[2], k.shape[2])
    return rearrange(F.scaled_dot_product_attention(q, k, v, mask, dropout), "b h n d -> b n (h d)")
