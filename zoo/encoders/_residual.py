"""Residual convolutions, for encoders of pictures and of spectrograms alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zoo.types import Tokens


class Block(nn.Module):
    """Two 3 x 3 convolutions, each with batch norm, and what went in added to what comes out.

    The basic block of He et al., Deep residual learning for image recognition, 2015, https://arxiv.org/abs/1512.03385.

    Args:
        dim_in: Channels.
        dim: Of the result; where it differs, or the stride is not 1, a 1 x 1 convolution goes around.
        stride: Of the first convolution.
    """

    def __init__(self, dim_in: int, dim: int, stride: int) -> None:
        super().__init__()
        self.inside = nn.Sequential(
            nn.Conv2d(dim_in, dim, 3, stride, 1, bias=False),
            nn.BatchNorm2d(dim),
            nn.ReLU(),
            nn.Conv2d(dim, dim, 3, 1, 1, bias=False),
            nn.BatchNorm2d(dim),
        )
        changes = stride != 1 or dim_in != dim
        self.around = nn.Sequential(nn.Conv2d(dim_in, dim, 1, stride, bias=False), nn.BatchNorm2d(dim)) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim_in, H, W) to (B, dim, H / stride, W / stride), rounded up."""
        return torch.relu(self.inside(x) + self.around(x))


def stages(layers: Sequence[int], width: int) -> nn.Sequential:
    """``layers[i]`` blocks of width ``width * 2**i``; each stage but the first halves height and width."""
    blocks: list[nn.Module] = []
    dim = width
    for i, count in enumerate(layers):
        for j in range(count):
            blocks.append(Block(dim, width * 2**i, 2 if i and not j else 1))
            dim = width * 2**i
    return nn.Sequential(*blocks)


def start(module: nn.Module) -> None:
    """Draw every convolution as He et al. do for ReLU, by the number of its outputs."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")


def places(grid: Tensor) -> Tokens:
    """(B, D, H, W) as H W tokens, of which ``pooled`` is the mean."""
    tokens = grid.flatten(2).transpose(1, 2)  # (B, N, D)
    mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    return Tokens(tokens, mask, tokens.mean(1), mask[:, 0])
