"""Which patches of a picture are hidden: rectangles rather than single patches, so that no neighbour gives a hidden one away."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from zoo.errors import ZooError

ASPECT = 0.3  # a block is at most this much higher than wide, or wider than high
TRIES = 10  # blocks that are drawn before the rest is made up of single patches


def block_masks(rows: int, grid: tuple[int, int], count: int, *, least: int = 4, generator: torch.Generator | None = None) -> Tensor:
    """(rows, R * C) bool, True at hidden patches: ``count`` of each picture, in blocks.

    From Bao et al., BEiT, 2021, https://arxiv.org/abs/2106.08254, algorithm 1: the area of a block is drawn evenly between ``least`` and
    what is left to hide, the logarithm of its aspect ratio between ln 0.3 and -ln 0.3, its place evenly; it is taken if it hides anything
    new and not too much. As in the authors' code no block is as high or as wide as the picture, and where none fits after ten draws, single
    patches fill up to the count. On the CPU; one number of torch's generator seeds all draws.

    Args:
        rows: Pictures.
        grid: R rows and C columns of patches.
        count: Hidden patches of each picture, exactly: 75 of 196 in BEiT v2.
        least: Area of the smallest block in patches: 16 in BEiT, 4 in its later code.
        generator: Of the seed; None: torch's own.

    Raises:
        ZooError: If there are not as many patches, or ``least`` is below 1.
    """
    patches = grid[0] * grid[1]
    if not 0 <= count <= patches or least < 1:
        raise ZooError(f"blocks of {least} patches and more to hide {count} of {patches}: write 0 to {patches}, of blocks of 1 or more")
    random = np.random.default_rng(int(torch.randint(2**63 - 1, (), generator=generator, device="cpu")))
    masks = np.zeros((rows, *grid), dtype=bool)
    for mask in masks:
        left = count
        while left and (new := _add_block(mask, least, left, random)):
            left -= new
        if left:
            mask.reshape(-1)[random.choice(np.flatnonzero(~mask), left, replace=False)] = True
    return torch.from_numpy(masks.reshape(rows, patches))


def _add_block(mask: np.ndarray, least: int, left: int, random: np.random.Generator) -> int:
    """Hide one more block in ``mask`` (R, C); how many patches that hides which were not hidden, ``left`` at most, 0 for no block."""
    height, width = mask.shape
    for _ in range(TRIES):
        area, aspect = least + (left - least) * random.random(), math.exp(random.uniform(math.log(ASPECT), -math.log(ASPECT)))
        high, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < high < height and 0 < wide < width):
            continue
        top, first = random.integers(height - high + 1), random.integers(width - wide + 1)
        block = mask[top : top + high, first : first + wide]
        new = block.size - int(block.sum())
        if 0 < new <= left:
            block[:] = True
            return new
    return 0
