"""What objectives over one forward pass of a model hand to each other, and how one of them runs alone."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.errors import ZooError
from zoo.types import Batch, Loss, ModalityInputs, ModelOutput, Tokens


class Likeness(NamedTuple):
    """How alike the rows of one output are to those of another, detached, and not multiplied out before somebody asks."""

    rows: Tensor  # (B, E) unit vectors
    columns: Tensor  # (B, E) unit vectors, what the rows were compared with
    scale: Tensor  # ()

    def logits(self, columns: Tensor | None = None) -> Tensor:
        """(B, B), or (B, C) with further columns (C, E)."""
        return self.rows @ (self.columns if columns is None else columns).T * self.scale


class Shared(NamedTuple):
    """One forward pass of a model, and perhaps of its momentum twin, on one batch."""

    out: ModelOutput
    teacher: ModelOutput | None  # the twin's, without a graph
    twin: Any  # the twin itself, for passes on other inputs; None: there is none
    likeness: dict[str, Likeness]  # filled by the contrast: {"image": of each image to the texts, "text": of each text to the images}


@runtime_checkable
class Term(Protocol):
    """An objective that can share a forward pass with others."""

    @property
    def needs_twin(self) -> bool:
        """Whether it learns from a momentum twin, and cannot without."""

    def bind(self, model: Any) -> None:
        """As `zoo.types.Binding`."""

    def term(self, model: Any, batch: Batch, shared: Shared) -> tuple[Tensor, dict[str, Tensor], Any]:
        """Its () loss, further () parts for the log, and the state of its ``after_step``."""


def alone(objective: Term, model: Any, batch: Batch) -> Loss:
    """An objective without others, over a forward pass of its own."""
    total, parts, state = objective.term(model, batch, Shared(model(batch), None, None, {}))
    return Loss(total, parts, state)


def rows_of(x: Tokens, which: Tensor) -> Tokens:
    """Those rows, in that order: (R,) int64."""
    return Tokens(x.tokens[which], x.mask[which], None if x.pooled is None else x.pooled[which], x.present[which])


def tokens_of(out: ModelOutput, objective: str) -> tuple[Tokens, Tokens]:
    """Those of the pictures and of the texts.

    Raises:
        ZooError: If they are not there, as where a batch passes the model in chunks.
    """
    if missing := [name for name in ("image", "text") if name not in out.tokens]:
        raise ZooError(
            f"{objective} reads the tokens of {' and '.join(missing)}, and there are none: chunks of run.gradcache leave embeddings, so "
            "write run.gradcache: 0; or else take a model that gives them"
        )
    return out.tokens["image"], out.tokens["text"]


def text_of(batch: Batch, read: Tokens) -> ModalityInputs:
    """The texts of a batch; where no row has one, of each a single id that is not there, as ``read`` then has a token."""
    if "text" in batch.inputs:
        return batch.inputs["text"]
    return ModalityInputs(torch.zeros_like(read.mask, dtype=torch.int64), read.mask, read.present)


def both_there(seen: Tokens, read: Tokens) -> Tensor:
    """(B,) bool: the rows that have a picture and a text."""
    return seen.present & read.present


def wide(x: Tensor) -> Tensor:
    """In float32 at least: what autocast leaves in 16 bits is too coarse for a loss."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mean_of(losses: Tensor, counted: Tensor) -> Tensor:
    """() mean of those that count, 0 of none."""
    return torch.where(counted, losses, 0).sum() / counted.sum().clamp(min=1)


def unit(x: Tensor) -> Tensor:
    """Rows divided by their lengths."""
    return F.normalize(wide(x), dim=1)
