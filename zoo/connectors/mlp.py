"""Two linear maps with a GELU between them: the ``mlp2x_gelu`` of LLaVA-1.5."""

from __future__ import annotations

from torch import nn

from zoo.config import Positive
from zoo.registry import register
from zoo.types import Tokens


@register("connector", "mlp", paper="Liu et al., Improved baselines with visual instruction tuning, 2023, https://arxiv.org/abs/2310.03744")
class Mlp(nn.Module):
    """The same two-layer perceptron for every token and for the pooled vector.

    Args:
        dim_in: Width of what comes in.
        dim_out: Width of what goes out.
        hidden: Width between the two maps; None: ``dim_out``.
    """

    num_tokens: int | None = None  # as many as come in

    def __init__(self, dim_in: int, dim_out: int, *, hidden: Positive | None = None) -> None:
        super().__init__()
        width = dim_out if hidden is None else hidden
        self.map = nn.Sequential(nn.Linear(dim_in, width), nn.GELU(), nn.Linear(width, dim_out))

    def forward(self, x: Tokens) -> Tokens:
        """(B, N, dim_in) to (B, N, dim_out)."""
        return x._replace(tokens=self.map(x.tokens), pooled=None if x.pooled is None else self.map(x.pooled))
