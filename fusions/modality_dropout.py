"""Modalities dropped at random in training, so that a model learns to do without any of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from zoo.config import Fraction
from zoo.joints import Phase
from zoo.registry import register
from zoo.types import Batch


@register(
    "fusion",
    "modality_dropout",
    joints=("schedule",),
    needs=("classes",),
    paper="Neverova et al., ModDrop: adaptive multi-modal gesture recognition, 2014, https://arxiv.org/abs/1501.00102",
)
class ModalityDropout(nn.Module):
    """Joint training in which a row has each of its modalities with probability 1 - ``rate``, and one of them always.

    What is dropped is absent, as where the data lack it, where the paper puts zeros. The draws hang on the random state in which the
    model was built and on how many batches came before, both in one number that goes into checkpoints: a resumed run drops what the
    uninterrupted one does.

    Args:
        names: The modalities.
        dim: Width of the features.
        classes: K.
        rate: Of each modality; at 0.3 about half of the rows that have two lose one.
    """

    multi_phase = False
    next_seed: Tensor  # () int64, of the next draw

    def __init__(self, names: Sequence[str], dim: int, classes: int, *, rate: Fraction = 0.3) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("next_seed", torch.randint(2**62, ()))

    def phases(self, batch: Batch) -> Iterator[Phase]:
        """The batch with less of it."""
        present = self.draw(batch)
        yield Phase("joint", batch._replace(inputs={name: x._replace(present=present[name]) for name, x in batch.inputs.items()}))

    @torch.no_grad()
    def draw(self, batch: Batch) -> dict[str, Tensor]:
        """{modality: (B,) bool} of those that stay: a subset of what is there, and never nothing of a row that has something."""
        if not batch.inputs:
            return {}
        chance = torch.Generator().manual_seed(int(self.next_seed))
        self.next_seed += 1
        there = torch.stack(
            [torch.ones(len(x.values), dtype=torch.bool) if x.present is None else x.present.cpu() for x in batch.inputs.values()]
        )
        luck = torch.rand(there.shape, generator=chance).masked_fill(~there, -1)  # (M, B)
        stays = there & ((luck >= self.rate) | (luck == luck.max(0).values))  # the luckiest one always
        return {name: row.to(x.values.device) for row, (name, x) in zip(stays, batch.inputs.items(), strict=True)}
