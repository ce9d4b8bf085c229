"""What learning against a slowly moving copy of a model keeps: the copy, queues, soft targets, hard negatives."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from zoo.distributed import all_rows
from zoo.errors import ZooError
from zoo.freeze import freeze

NOBODY = -100  # the id of a place in a queue that no item has taken yet
Negatives = Literal["sampled", "uniform"]


class EMATwin(nn.Module):
    """A frozen copy of a model that follows it as an exponential moving average, in parameters and buffers.

    From He et al., MoCo, CVPR 2020, https://arxiv.org/abs/1911.05722. The copy is never in training mode, so it drops nothing out and
    its batch norms use the averages that they hold. Numbers that are whole, such as counts, are copied.

    Args:
        model: What is copied, as it is now.
        momentum: What the copy keeps of itself in an update, in 0..1.

    Raises:
        ZooError: If a trained weight has 16 bits, which are too few to move by a small share.
    """

    def __init__(self, model: nn.Module, momentum: float) -> None:
        super().__init__()
        if coarse := [n for n, p in model.named_parameters() if p.requires_grad and p.is_floating_point() and p.itemsize < 4]:
            raise ZooError(
                f"momentum: {', '.join(coarse[:3])} have 16 bits, which round an update of {1 - momentum:g} away: "
                "keep them in float32, as run.precision: bf16 does, or write momentum: null"
            )
        self.momentum = momentum
        self.model = deepcopy(model)
        freeze(self.model)

    def teacher(self) -> Any:
        """The copy, ready to be asked under ``torch.no_grad()``. Whoever trains what holds this puts it in training mode too."""
        if self.model.training:
            self.model.eval()
        return self.model

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards ``model``, of which the copy was made: once, after each step of the optimizer.

        The teacher of a step has thus seen the weights that the step starts with, as where the copy moves first thing in the step.

        Raises:
            ZooError: If the weights are spread over processes, and the copy's are not.
        """
        parameters = dict(model.named_parameters())
        for name, own in self.model.named_parameters():
            refuse_sharded(parameters[name])
            own.lerp_(parameters[name].to(own.dtype), 1 - self.momentum)
        buffers = dict(model.named_buffers())
        for name, held in self.model.named_buffers():
            new = buffers[name]
            if held.is_floating_point():  # of two infinities, as in a mask, the average is no number
                new = torch.where(held == new, held, held.lerp(new.to(held.dtype), 1 - self.momentum))
            held.copy_(new)


def refuse_sharded(weight: Tensor) -> None:
    """Refuse a weight that is spread over processes.

    Raises:
        ZooError: If it is.
    """
    if isinstance(weight, DTensor):
        raise ZooError("run.shard: a momentum twin does not follow weights that are spread over processes: write run.shard: false")


class FeatureQueue(nn.Module):
    """The last K vectors that came, the oldest replaced first; at the start random ones. All processes hold the same.

    From He et al., MoCo, CVPR 2020, https://arxiv.org/abs/1911.05722.

    Args:
        dim: E, the width of a vector.
        size: K.
    """

    features: Tensor  # (E, K), unit columns
    ids: Tensor  # (K,) int64, NOBODY where no item is
    pointer: Tensor  # () int64, the place that is filled next

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.register_buffer("features", F.normalize(torch.randn(dim, size), dim=0))
        self.register_buffer("ids", torch.full((size,), NOBODY))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    def check(self, rows: int) -> None:
        """Whether batches of ``rows``, all processes together, fill the queue evenly.

        Raises:
            ZooError: If they do not, naming a size that they would.
        """
        size = len(self.ids)
        if size % rows:
            below, above = size // rows * rows, (size // rows + 1) * rows
            raise ZooError(
                f"queue: {size} is no multiple of the {rows} vectors that a step brings (run.batch_size, all processes together): "
                f"write queue: {above}{f' or {below}' if below else ''}"
            )

    @torch.no_grad()
    def enqueue(self, keys: Tensor, ids: Tensor | None = None, present: Tensor | None = None) -> None:
        """Put the vectors of a batch, those of all processes, in the place of the oldest.

        Args:
            keys: (B, E), as many in each process; divided by their lengths here.
            ids: (B,) int64 of their items; None: nobody's.
            present: (B,) bool; a row that is not there leaves what stands in its place.

        Raises:
            ZooError: As `check`.
        """
        there = torch.ones(len(keys), dtype=torch.bool, device=keys.device) if present is None else present
        named = torch.full((len(keys),), NOBODY, device=keys.device) if ids is None else ids
        keys, named, there = all_rows(F.normalize(keys.to(self.features.dtype), dim=1)), all_rows(named), all_rows(there)
        self.check(len(keys))
        places = (self.pointer + torch.arange(len(keys), device=keys.device)) % len(self.ids)
        self.features[:, places] = torch.where(there, keys.T, self.features[:, places])
        self.ids[places] = torch.where(there, named, self.ids[places])
        self.pointer.copy_((self.pointer + len(keys)) % len(self.ids))


@runtime_checkable
class Enqueueing(Protocol):
    """An objective that may keep something of every batch, of each in one step of the optimizer."""

    @property
    def enqueues(self) -> bool:
        """Whether it does."""


class Drawn(NamedTuple):
    """One candidate for each row."""

    column: Tensor  # (B,) int64, any where none was allowed
    found: Tensor  # (B,) bool, whether one was


@dataclass(frozen=True)
class NegativeSampler:
    """Draws for each row a candidate that it might be mistaken for, by torch's own generator.

    ALBEF's (Li et al., NeurIPS 2021, https://arxiv.org/abs/2107.07651): by the softmax of the row's logits, the matches left out.

    Attributes:
        how: "sampled": so. "uniform": each that is allowed alike.
        eps: Added to each probability before the matches are left out, 1e-4 in BLIP: nobody who is allowed then weighs nothing. With 0 the
            softmax runs over who is allowed, which is the same but for rounding.
    """

    how: Negatives = "sampled"
    eps: float = 0.0

    def weights(self, logits: Tensor, allowed: Tensor) -> Tensor:
        """(B, C) logits and who is allowed (B, C) bool to what each weighs, (B, C), exactly 0 where not allowed."""
        if self.how == "uniform":
            return allowed.to(logits.dtype)
        logits = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
        if self.eps:
            return (logits.softmax(1) + self.eps).masked_fill(~allowed, 0)
        nobody = ~allowed.any(1, keepdim=True)  # the softmax of nothing is no number
        return logits.masked_fill(~(allowed | nobody), -torch.inf).softmax(1).masked_fill(~allowed, 0)

    def __call__(self, logits: Tensor, allowed: Tensor) -> Drawn:
        """One draw for each row."""
        weights, found = self.weights(logits, allowed), allowed.any(1)
        drawable = torch.where(found[:, None], weights, 1)  # a row that weighs nothing at all cannot be drawn from
        return Drawn(torch.multinomial(drawable, 1)[:, 0], found)


class SoftTarget(nn.Module):
    """The share of a target that a teacher has: from 0 up to ``alpha`` in a straight line, ``alpha`` from then on.

    Args:
        alpha: In 0..1; 0.4 in ALBEF and BLIP.
        ramp: Optimizer steps of the line: in ALBEF those of the first epoch, in BLIP of the first two. 0: none.
    """

    steps: Tensor  # () int64, how many were made

    def __init__(self, alpha: float, ramp: int) -> None:
        super().__init__()
        self.alpha, self.ramp = alpha, ramp
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._made = 0  # the same as a number, so that no step waits for the device
        self.register_load_state_dict_post_hook(_count_again)

    @property
    def share(self) -> float:
        """In the step that is made next."""
        return self.alpha * min(1.0, self._made / self.ramp) if self.ramp else self.alpha

    def step(self) -> None:
        """Once after each step of the optimizer."""
        self._made += 1
        self.steps += 1


def _count_again(target: SoftTarget, _: Any) -> None:
    target._made = int(target.steps)
