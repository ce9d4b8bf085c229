"""Unit vectors that stand for whatever is near them, and follow it: the codebook of a visual tokenizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.distributed import all_rows

ROUNDS = 10  # of k-means
_AT_ONCE = 8192  # points that are compared with all codes


class Codebook(nn.Module):
    """K codes of length 1, moved by averages and not by gradients.

    As in BEiT v2 (Peng et al., 2022, https://arxiv.org/abs/2208.06366): a code becomes the average of itself and of the mean direction
    of the points that took it, of length 1 again; one that nobody took stays where it is. They begin as the means of ten rounds of
    k-means by cosine. There these are made of the first batch before it is looked up; here behind its step, so that a forward pass
    changes nothing, and the first step is made with codes drawn at random. All processes hold the same.

    Args:
        count: K.
        dim: C, the width of a code.
    """

    codes: Tensor  # (K, C), unit rows
    taken: Tensor  # (K,) float32, average of how many points of a step took each code
    begun: Tensor  # () bool, whether they were made of points

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("codes", F.normalize(torch.randn(count, dim), dim=1))
        self.register_buffer("taken", torch.zeros(count))
        self.register_buffer("begun", torch.zeros((), dtype=torch.bool))
        self._begun = False  # the same as a plain value, so that no step waits for the device
        self.register_load_state_dict_post_hook(_look_again)

    def forward(self, points: Tensor) -> Tensor:
        """(..., C) to the number of the nearest code (...) int64; of unit vectors that is the one of the largest cosine."""
        flat = points.reshape(-1, points.shape[-1]).to(self.codes.dtype)
        lengths = self.codes.square().sum(1)  # all 1, up to rounding
        near = [(2 * part @ self.codes.T - lengths).argmax(1) for part in flat.split(_AT_ONCE)]
        return torch.cat(near).view(points.shape[:-1])

    @torch.no_grad()
    def follow(self, points: Tensor, ids: Tensor, decay: float) -> None:
        """Move after one step.

        Args:
            points: (N, C) unit vectors of this process.
            ids: (N,) the codes that they took.
            decay: What a code keeps of itself, in 0..1.
        """
        points = points.to(self.codes.dtype)
        if not self._begun:
            if bool(all_rows(points.new_tensor([len(points)])).any()):
                self._begin(points)
            return
        means, counts = self._means(points, ids)
        self.codes.copy_(F.normalize(decay * self.codes + (1 - decay) * means, dim=1))
        self.taken.lerp_(counts, 1 - decay)

    def _begin(self, points: Tensor) -> None:
        """k-means, from points drawn by torch's own generator, of each process as many."""
        K, N = len(self.codes), len(points)
        drawn = points[torch.randperm(N, device=points.device)[torch.arange(K, device=points.device) % N]] if N else self.codes
        everyone = all_rows(drawn)  # (W K, C)
        self.codes.copy_(everyone[:: len(everyone) // K])
        for _ in range(ROUNDS):
            means, counts = self._means(points, self(points))
            self.codes.copy_(means)
        self.taken.copy_(counts)
        self.begun.fill_(True)
        self._begun = True

    def _means(self, points: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(K, C) mean directions of the points that took each code, the code itself where none did; and how many they are, (K,) float32.

        Of all processes together.
        """
        sums = torch.zeros_like(self.codes).index_add_(0, ids, points)
        counts = torch.zeros_like(self.taken).index_add_(0, ids, torch.ones_like(points[:, 0]))
        sums, counts = all_rows(sums[None]).sum(0), all_rows(counts[None]).sum(0)
        return torch.where(counts[:, None] > 0, F.normalize(sums, dim=1), self.codes), counts  # else k-means would lose those nobody took


def _look_again(codebook: Codebook, _: Any) -> None:
    codebook._begun = bool(codebook.begun)
