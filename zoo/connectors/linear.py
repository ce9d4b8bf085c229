"""The simplest connector: one matrix, as in LLaVA."""

from __future__ import annotations

from torch import nn

from zoo.registry import register
from zoo.types import Tokens


@register("connector", "linear", paper="Liu et al., Visual instruction tuning, 2023, https://arxiv.org/abs/2304.08485")
class Linear(nn.Module):
    """The same linear map for every token and for the pooled vector.

    Args:
        dim_in: Width of what comes in.
        dim_out: Width of what goes out.
        bias: Add a bias.
    """

    num_tokens: int | None = None  # as many as come in

    def __init__(self, dim_in: int, dim_out: int, *, bias: bool = True) -> None:
        super().__init__()
        self.map = nn.Linear(dim_in, dim_out, bias=bias)

    def forward(self, x: Tokens) -> Tokens:
        """(B, N, dim_in) to (B, N, dim_out)."""
        return x._replace(tokens=self.map(x.tokens), pooled=None if x.pooled is None else self.map(x.pooled))
