"""Blocks of hidden patches: how many, of what shape, and as BEiT's algorithm written down plainly draws them."""

import math
import random

import numpy as np
import pytest
import torch

from zoo import ZooError
from zoo.block_masks import ASPECT, TRIES, _add_block, block_masks


def plainly(height, width, count, least, draw):
    """One mask by Bao et al., 2021, algorithm 1, as their code completes it: a set of places."""
    hidden = set()
    while len(hidden) < count:
        taken = None
        for _ in range(TRIES):
            area = draw.uniform(least, count - len(hidden))
            aspect = math.exp(draw.uniform(math.log(ASPECT), math.log(1 / ASPECT)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if w >= width or h >= height:
                continue
            top, left = draw.randint(0, height - h), draw.randint(0, width - w)
            new = {(top + i, left + j) for i in range(h) for j in range(w)} - hidden
            if 0 < len(new) <= count - len(hidden):
                taken = new
                break
        if taken is None:
            break
        hidden |= taken
    rest = [(i, j) for i in range(height) for j in range(width) if (i, j) not in hidden]
    return hidden | set(draw.sample(rest, count - len(hidden)))


def together(masks):
    """Of pairs of neighbours, one above the other, of which one is hidden at least, the share of which both are."""
    up, down = masks[:, :-1], masks[:, 1:]
    return float((up & down).sum() / (up | down).sum())


@pytest.mark.parametrize(
    ("grid", "count", "least"),
    [
        ((14, 14), 75, 16),
        ((14, 14), 75, 4),
        ((14, 14), 78, 4),
        ((4, 4), 6, 4),
        ((7, 12), 33, 4),
        ((3, 5), 15, 4),
        ((3, 5), 0, 4),
        ((1, 8), 5, 4),
        ((6, 1), 2, 1),
        ((4, 4), 6, 9),
    ],
)
def test_the_count_is_exact(grid, count, least):
    masks = block_masks(50, grid, count, least=least)
    assert masks.shape == (50, grid[0] * grid[1])
    assert masks.dtype is torch.bool
    assert (masks.sum(1) == count).all()


def test_no_rows():
    assert block_masks(0, (4, 4), 6).shape == (0, 16)


def test_are_drawn_from_torchs_generator():
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(block_masks(20, (14, 14), 75))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[0][0], found[0][1])
    own = [block_masks(20, (14, 14), 75, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1)]
    assert torch.equal(*own)
    torch.manual_seed(1)
    torch.randint(2**63 - 1, ())
    expected = torch.rand(3)
    torch.manual_seed(1)
    block_masks(20, (14, 14), 75)
    assert torch.equal(torch.rand(3), expected)  # one number is drawn, for however many rows


@pytest.mark.parametrize("least", [4, 16])
def test_a_block_is_a_rectangle_of_some_aspect(least):
    draw = np.random.default_rng(0)
    areas, aspects = [], []
    for _ in range(500):
        mask = np.zeros((14, 14), dtype=bool)
        new = _add_block(mask, least, 60, draw)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        high, wide = len(rows), len(columns)
        assert (rows[-1] - rows[0], columns[-1] - columns[0]) == (high - 1, wide - 1)
        assert mask.sum() == high * wide == new <= 60
        assert max(high, wide) < 14
        areas.append(new)
        aspects.append(math.log(high / wide))
    assert min(areas) < least + 4  # sides are rounded
    assert max(areas) > 50
    assert abs(np.mean(aspects)) < 0.1
    assert np.quantile(np.abs(aspects), 0.95) == pytest.approx(-math.log(ASPECT) * 0.95, abs=0.2)


@pytest.mark.parametrize(("grid", "count", "least"), [((14, 14), 75, 16), ((14, 14), 78, 4), ((6, 9), 22, 4)])
def test_are_drawn_as_in_the_paper(grid, count, least):
    """Against the plain algorithm: how often each place is hidden, and how often with the one below it."""
    rows = 1500
    torch.manual_seed(0)
    found = block_masks(rows, grid, count, least=least).reshape(rows, *grid).numpy()
    draw, expected = random.Random(0), np.zeros((rows, *grid), dtype=bool)
    for mask in expected:
        for place in plainly(*grid, count, least, draw):
            mask[place] = True
    assert np.abs(found.mean(0) - expected.mean(0)).max() < 5 * math.sqrt(2 * 0.25 / rows)
    assert together(found) == pytest.approx(together(expected), abs=0.01)
    single = np.zeros((rows, grid[0] * grid[1]), dtype=bool)
    for mask in single:
        mask[np.random.default_rng(0).permutation(grid[0] * grid[1])[:count]] = True
    assert together(found) > together(single.reshape(rows, *grid)) + 0.1


@pytest.mark.parametrize(("count", "least"), [(17, 4), (-1, 4), (6, 0)])
def test_refusals(count, least):
    with pytest.raises(ZooError, match=f"blocks of {least} patches and more to hide {count} of 16: write 0 to 16"):
        block_masks(2, (4, 4), count, least=least)
