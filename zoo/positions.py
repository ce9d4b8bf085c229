"""Learned positions of the patches of a picture, moved to pictures of another size."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.errors import ZooError

PLACES = (
    "vision.model.pos_embed",
    "vision.model.positional_embedding",
    "vision.encoder.model.positional_embedding",
    "vision.places.weight",
)  # where models have them


def resampled(places: Tensor, count: int) -> Tensor:
    """Positions of patches of a picture of another size, bicubic, each with its weight in all that it now stands for.

    Args:
        places: (1, N, D) or (N, D), a square of patches, perhaps with a class token before it, which stays as it is.
        count: How many there shall be, with the class token if there was one.

    Returns:
        (1, count, D) or (count, D).

    Raises:
        ZooError: If either number is that of no square.
    """
    N = places.shape[-2]
    first = 0 if round(N**0.5) ** 2 == N else 1
    old, new = _side(N - first), _side(count - first)
    token, grid = places[..., :first, :], places[..., first:, :].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.float(), size=(new, new), mode="bicubic", antialias=True).to(places.dtype)
    return torch.cat([token, grid.permute(0, 2, 3, 1).reshape(*places.shape[:-2], new * new, -1)], -2)


def _side(patches: int) -> int:
    side = round(patches**0.5)
    if side * side != patches:
        raise ZooError(f"positions: {patches} positions of patches make no square")
    return side
