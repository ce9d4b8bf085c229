"""Vectors that a vision encoder gave elsewhere, in the place of pictures: nothing is computed, and nothing learns."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from zoo.config import Positive
from zoo.errors import ZooError
from zoo.registry import register
from zoo.types import ModalityInputs, Tokens


class FeatureProcessor:
    """An array (N, dim) as it is, in float32."""

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def __call__(self, thing: Any) -> ModalityInputs:
        """One item.

        Raises:
            ZooError: If it is no array of this width, is empty, or holds others than finite numbers.
        """
        if not isinstance(thing, np.ndarray) or thing.ndim != 2 or thing.shape[1] != self.dim:
            seen = f"an array of shape {thing.shape}" if isinstance(thing, np.ndarray) else f"a {type(thing).__name__}"
            raise ZooError(f"encoder 'features' reads arrays (tokens, {self.dim}), this is {seen}: write another dim, or another encoder")
        if not len(thing):
            raise ZooError(f"encoder 'features': an array of shape {thing.shape} holds no vector: leave the key out of the row")
        values = np.ascontiguousarray(thing, dtype=np.float32)
        if lost := values.size - int(np.isfinite(values).sum()):
            raise ZooError(f"encoder 'features': {lost} of {thing.size} values of an array of shape {thing.shape} are NaN or infinite")
        return ModalityInputs(torch.from_numpy(values))

    def config(self) -> dict[str, Any]:
        """What decides its result."""
        return {"kind": "features", "dim": self.dim}


@register("encoder", "features")
class Features(nn.Module):
    """Hands on what it is given; ``pooled`` is the first vector, where vision transformers have their CLS.

    Args:
        dim: Width of the vectors.
    """

    like: torch.Tensor

    def __init__(self, *, dim: Positive = 32) -> None:
        super().__init__()
        self.dim = dim
        self.processor = FeatureProcessor(dim)
        self.register_buffer("like", torch.zeros(()), persistent=False)  # it has no weights that would tell the precision of the model

    def forward(self, x: ModalityInputs) -> Tokens:
        """(B, N, dim) to Tokens."""
        mask = x.mask if x.mask is not None else torch.ones(x.values.shape[:2], dtype=torch.bool, device=x.values.device)
        values = x.values.to(self.like.dtype)
        return Tokens(values, mask, values[:, 0], mask[:, 0])

    def portable(self) -> dict[str, Any]:
        """Nothing: it is always built from its settings alone."""
        return {}
