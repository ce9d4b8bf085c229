"""Any number of tokens to a fixed few, by one layer of cross-attention with learned queries."""

from __future__ import annotations

import torch
from torch import nn

from zoo.config import Positive
from zoo.connectors._attention import attend
from zoo.errors import ZooError
from zoo.registry import register
from zoo.types import Tokens


@register("connector", "attention_pool", paper="Bai et al., Qwen-VL, 2023, https://arxiv.org/abs/2308.12966")
class AttentionPool(nn.Module):
    """The resampler of Qwen-VL without its positions, which need a square grid of patches.

    A row that is absent, or whose tokens are all masked, gives zeros that are masked too.

    Args:
        dim_in: Width of what comes in.
        dim_out: Width of what goes out.
        num_queries: How many tokens go out.
        heads: They divide ``dim_out``.

    Raises:
        ZooError: If they do not.
    """

    def __init__(self, dim_in: int, dim_out: int, *, num_queries: Positive = 16, heads: Positive = 8) -> None:
        super().__init__()
        if dim_out % heads:
            raise ZooError(f"connector 'attention_pool': {heads} heads do not divide the width {dim_out}: write another heads=")
        self.num_tokens: int | None = num_queries
        self._heads = heads
        self.queries = nn.Parameter(torch.randn(1, num_queries, dim_out) * 0.02)
        self.bring = nn.Linear(dim_in, dim_out, bias=False)
        self.norm_query, self.norm_key, self.norm_out = nn.LayerNorm(dim_out), nn.LayerNorm(dim_out), nn.LayerNorm(dim_out)
        self.query, self.key = nn.Linear(dim_out, dim_out), nn.Linear(dim_out, dim_out, bias=False)  # softmax ignores a bias of keys
        self.value, self.out = nn.Linear(dim_out, dim_out), nn.Linear(dim_out, dim_out)

    def forward(self, x: Tokens) -> Tokens:
        """(B, N, dim_in) to (B, num_queries, dim_out)."""
        media = self.norm_key(self.bring(x.tokens))  # (B, N, D)
        query = self.query(self.norm_query(self.queries)).expand(media.shape[0], -1, -1)  # (B, Q, D)
        read = attend(query, self.key(media), self.value(media), x.mask[:, None], self._heads)
        valid = (x.present & x.mask.any(1))[:, None]  # (B, 1)
        tokens = torch.where(valid[..., None], self.norm_out(self.out(read)), 0.0)
        return Tokens(tokens, valid.expand(tokens.shape[:2]), None, x.present)
