"""Saliency scores by hand."""

import pytest
import torch

from zoo.errors import ZooError
from zoo.evaluate.saliency import saliency


def test_uniform_flow_gives_a_third_each():
    ones = torch.ones(2, 3, 7, 7, dtype=torch.float64)
    scores = saliency(ones, ones * 0.25, read=5, image=(1, 3))
    shares = torch.stack(scores) / torch.stack(scores).sum(0)
    torch.testing.assert_close(shares, torch.full((3, 2), 1 / 3, dtype=torch.float64))
    torch.testing.assert_close(scores.visual, torch.full((2,), 0.75, dtype=torch.float64))


def test_heads_are_summed_before_the_absolute_value():
    attention = torch.ones(1, 2, 4, 4)
    gradient = torch.stack([torch.ones(4, 4), -torch.ones(4, 4)])[None]
    assert all(float(score) == 0 for score in saliency(attention, gradient, read=3, image=(0, 1)))


def test_each_edge_counts_where_it_belongs():
    gradient = torch.zeros(1, 1, 5, 5)
    gradient[0, 0, 3, 1], gradient[0, 0, 3, 0], gradient[0, 0, 2, 1] = 4.0, 6.0, 9.0
    gradient[0, 0, 3, 3], gradient[0, 0, 4, 0], gradient[0, 0, 0, 4] = 100.0, 100.0, 100.0  # the diagonal, later rows, the future
    scores = saliency(torch.ones(1, 1, 5, 5), gradient, read=3, image=(1, 2))
    assert [float(s) for s in scores] == [4 / 2, 6 / 1, 9 / 3]


@pytest.mark.parametrize("image", [(0, 2), (1, 3), (2, 1)])
def test_what_is_not_defined(image):
    with pytest.raises(ZooError, match="position"):
        saliency(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4), read=3, image=image)
