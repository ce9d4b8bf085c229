"""No connector: the encoder's tokens already have the width that is wanted."""

from __future__ import annotations

from torch import nn

from zoo.errors import ZooError
from zoo.registry import register
from zoo.types import Tokens


@register("connector", "identity")
class Identity(nn.Module):
    """Hand the tokens on as they are.

    Args:
        dim_in: Width of what comes in.
        dim_out: The same.

    Raises:
        ZooError: If the two differ.
    """

    num_tokens: int | None = None  # as many as come in

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        if dim_in != dim_out:
            raise ZooError(f"connector 'identity' cannot turn width {dim_in} into {dim_out}: use linear")

    def forward(self, x: Tokens) -> Tokens:
        """(B, N, D) to the same."""
        return x
