"""Which pairs make up batch b of epoch e: a pure function of the seed, so that a run can go on where it stopped."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_POOL = 50  # batches that are sorted by length together: enough for little padding, few enough to keep the mixture random


class BatchOrder:
    """Batches of pair indices, those of one epoch in an order of its own, and which process takes which.

    Args:
        lengths: (P,) of each pair; with ``buckets`` pairs of like length share a batch.
        batch_size: Pairs per process.
        seed: Of the order.
        buckets: Off: plain random batches.
        processes: Processes that train together; each takes its share of every batch.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, *, seed: int, buckets: bool, processes: int = 1) -> None:
        self.lengths, self.batch_size, self.seed, self.buckets, self.processes = lengths, batch_size, seed, buckets, processes

    def __len__(self) -> int:
        """Batches of one epoch; what does not fill a batch is left for another epoch's order."""
        return len(self.lengths) // (self.batch_size * self.processes)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[np.ndarray]:
        """Batches ``start``, ``start + 1``, ... of ``epoch``: (processes, batch_size), the pairs of each process."""
        random = np.random.default_rng((self.seed, epoch))
        size = self.batch_size * self.processes
        used = len(self) * size  # the rest goes before sorting: else it would be the longest ones in every epoch
        order = random.permutation(len(self.lengths))[:used]
        for i in range(0, used if self.buckets else 0, size * _POOL):
            pool = order[i : i + size * _POOL]
            order[i : i + size * _POOL] = pool[np.argsort(self.lengths[pool], kind="stable")]
        batches = [order[i * size : (i + 1) * size] for i in range(len(self))]
        for b in random.permutation(len(batches))[start:]:
            yield batches[b].reshape(self.batch_size, self.processes).T
