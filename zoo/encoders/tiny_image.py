"""An image encoder small enough to train from nothing in seconds: convolutions to patches, then a few attention blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zoo.config import Positive
from zoo.encoders._image import HALF, ImageProcessor
from zoo.errors import ZooError
from zoo.registry import register
from zoo.types import ModalityInputs, Tokens

STRIDE = 8  # three convolutions, each halving the side


@register("encoder", "tiny_image")
class TinyImage(nn.Module):
    """Convolutional stem and transformer blocks; ``pooled`` is the mean of the tokens.

    Early convolutions make a small vision transformer train fast and stably (Xiao et al., Early convolutions help
    transformers see better, 2021, https://arxiv.org/abs/2106.14881).

    Args:
        dim: Width of the tokens.
        layers: Attention blocks.
        heads: Of each block; they divide ``dim``.
        image_size: Side of the input, a multiple of 8; it gives (side / 8)² tokens.
    """

    def __init__(self, *, dim: Positive = 64, layers: int = 2, heads: Positive = 4, image_size: Positive = 32) -> None:
        super().__init__()
        if image_size % STRIDE or dim % heads or dim % 4:
            raise ZooError(f"tiny_image: image_size {image_size} must be a multiple of {STRIDE}, dim {dim} one of 4 and of heads {heads}")
        self.dim = dim
        self.processor = ImageProcessor(image_size, mean=HALF, std=HALF)
        self.stem = nn.Sequential(
            nn.Conv2d(3, dim // 4, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(dim // 4, dim // 2, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1),
        )
        self.position = nn.Parameter(torch.randn(1, (image_size // STRIDE) ** 2, dim) * 0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, heads, 4 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: ModalityInputs) -> Tokens:
        """Pixels (B, 3, H, W) to Tokens."""
        grid = self.stem(x.values.to(self.position.dtype))  # (B, D, H / 8, W / 8)
        tokens = grid.flatten(2).transpose(1, 2) + self.position  # (B, N, D)
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.norm(tokens)
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return Tokens(tokens, mask, tokens.mean(1), mask[:, 0])

    def portable(self) -> dict[str, Any]:
        """Nothing: it is always built from its settings alone."""
        return {}
