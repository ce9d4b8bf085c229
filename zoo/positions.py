"""Learned positions of the patches of a picture, moved to pictures of another size."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.errors import ZooError

PLACES = {  # where models have them, and whether they are resampled with anti-aliasing
    "vision.model.pos_embed": True,
    "vision.model.positional_embedding": True,
    "vision.encoder.model.positional_embedding": True,
    "vision.places.weight": False,  # of VLMo and BEiT-3, whose authors do not
    "encoder.pos_embed": True,  # of a visual tokenizer
    "decoder.pos_embed": True,
}


def resampled(places: Tensor, count: int, *, antialias: bool = True) -> Tensor:
    """Positions of patches of a picture of another size, bicubic.

    With anti-aliasing, as timm and open_clip do it, the cubic is another one (its a is -0.5 and not -0.75), also where a picture grows, and
    where it shrinks all old positions have a weight in the new ones.

    Args:
        places: (1, N, D) or (N, D), a square of patches, perhaps with a class token before it, which stays as it is.
        count: How many there shall be, with the class token if there was one.
        antialias: As `PLACES` says of where they are.

    Returns:
        (1, count, D) or (count, D).

    Raises:
        ZooError: If either number is that of no square.
    """
    N = places.shape[-2]
    first = 0 if round(N**0.5) ** 2 == N else 1
    old, new = _side(N - first), _side(count - first)
    token, grid = places[..., :first, :], places[..., first:, :].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.float(), size=(new, new), mode="bicubic", antialias=antialias).to(places.dtype)
    return torch.cat([token, grid.permute(0, 2, 3, 1).reshape(*places.shape[:-2], new * new, -1)], -2)


def _side(patches: int) -> int:
    side = round(patches**0.5)
    if side * side != patches:
        raise ZooError(f"positions: {patches} positions of patches make no square")
    return side
