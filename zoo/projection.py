"""A linear head that learns from one source without moving what it says of others: what is remembered, and steps projected away from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


class Memory(Protocol):
    """What a head remembers of the vectors of several sources, as an ``nn.Module`` whose state are buffers."""

    def remember(self, source: str, x: Tensor, labels: Tensor) -> None:
        """Vectors (B, D) of a source, of known class (B,); B is at least 1."""

    def protect(self, source: str, step: Tensor) -> Tensor:
        """A step (K, D) of the head's weight that was learned from ``source``, without what would move the head on what is remembered."""


class MeanProjection(nn.Module):
    """P = a (a I + sum h h^T)^-1 over the vectors h that it was told of, by recursive least squares.

    Orthogonal weight modification (Zeng et al., Continual learning of context-dependent processing in neural networks, 2019,
    https://arxiv.org/abs/1810.01256) of one linear layer: a step of its weight is multiplied by P from the right. Then the output on a
    remembered h moves by at most sqrt(a) times the length of the step, for |P h|^2 <= h^T P h < a.

    Args:
        dim: D, width of the vectors.
        alpha: a, positive; smaller projects harder.
    """

    matrix: Tensor  # (D, D) float32, symmetric, eigenvalues in (0, 1]

    def __init__(self, dim: int, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.register_buffer("matrix", torch.eye(dim))

    @torch.no_grad()
    def add(self, h: Tensor) -> None:
        """A vector (D,) that later steps shall leave alone."""
        h = h.to(self.matrix.dtype)
        told = self.matrix @ h  # (D,)
        self.matrix -= torch.outer(told, told) / (self.alpha + h @ told)  # P (h^T P) of a symmetric P, hence symmetric to the last bit

    def forward(self, step: Tensor) -> Tensor:
        """(K, D) to (K, D)."""
        return step @ self.matrix.to(step.dtype)


class PreviousMeans(nn.Module):
    """One projection for all sources, of the means of every batch before this step, as MLA's paper has it. The source's own are among them.

    Args:
        sources: Their names.
        dim: D, width of the vectors.
        alpha: As of `MeanProjection`.
    """

    def __init__(self, sources: Sequence[str], dim: int, alpha: float) -> None:
        super().__init__()
        self.projection = MeanProjection(dim, alpha)

    def remember(self, source: str, x: Tensor, labels: Tensor) -> None:
        """As `Memory.remember`: the mean of the batch."""
        self.projection.add(x.mean(0))

    def protect(self, source: str, step: Tensor) -> Tensor:
        """As `Memory.protect`."""
        return self.projection(step)


class OtherMeans(nn.Module):
    """A projection for each source, of the means of the other sources' batches.

    Args:
        sources: Their names.
        dim: D, width of the vectors.
        alpha: As of `MeanProjection`.
    """

    def __init__(self, sources: Sequence[str], dim: int, alpha: float) -> None:
        super().__init__()
        self.projections = nn.ModuleDict({source: MeanProjection(dim, alpha) for source in sources})

    def remember(self, source: str, x: Tensor, labels: Tensor) -> None:
        """As `Memory.remember`: the mean of the batch, told to the projections of all others."""
        h = x.mean(0)
        for name, projection in self.projections.items():
            if name != source:
                assert isinstance(projection, MeanProjection), projection
                projection.add(h)

    def protect(self, source: str, step: Tensor) -> Tensor:
        """As `Memory.protect`."""
        protected: Tensor = self.projections[source](step)
        return protected


class OtherClasses(nn.Module):
    """I - V V^T, where V spans the leading directions of the running class means of the other sources.

    A mean a source protects what the head says on average, not the boundaries between classes. Not in MLA's paper; the idea is gradient
    projection memory's (Saha et al., 2021, https://arxiv.org/abs/2103.09762).

    Args:
        sources: Their names.
        dim: D, width of the vectors.
        classes: K.
        rank: Directions that are left alone, at most.
        decay: Of the running means, in [0, 1).
    """

    means: Tensor  # (M, K, D) float32, zeros for a class that was not seen

    def __init__(self, sources: Sequence[str], dim: int, classes: int, rank: int, decay: float) -> None:
        super().__init__()
        self.sources, self.rank, self.decay = list(sources), rank, decay
        self.register_buffer("means", torch.zeros(len(self.sources), classes, dim))

    @torch.no_grad()
    def remember(self, source: str, x: Tensor, labels: Tensor) -> None:
        """As `Memory.remember`: the mean of each class that the batch has."""
        old = self.means[self.sources.index(source)]  # (K, D)
        count = torch.bincount(labels, minlength=len(old))[:, None]  # (K, 1)
        new = torch.zeros_like(old).index_add_(0, labels, x.to(old.dtype)) / count.clamp(min=1)
        decay = torch.where(old.any(1, keepdim=True), self.decay, 0.0)
        old.copy_(torch.where(count > 0, decay * old + (1 - decay) * new, old))

    @torch.no_grad()
    def protect(self, source: str, step: Tensor) -> Tensor:
        """As `Memory.protect`."""
        others = [i for i, name in enumerate(self.sources) if name != source]
        _, strength, directions = torch.linalg.svd(self.means[others].flatten(0, 1), full_matrices=False)
        basis = directions[: self.rank][strength[: self.rank] > 1e-6 * strength[0].clamp(min=1e-12)].to(step.dtype)  # (r, D)
        return step - (step @ basis.T) @ basis
