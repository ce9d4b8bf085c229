"""Which two sets of vectors a two-sided objective contrasts: two outputs of a model, or the two halves of a batch of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.errors import ZooError, unknown
from zoo.types import Batch, Model, ModelOutput


class Sides(NamedTuple):
    """Row i of x belongs to row i of y. The fields are named as the loss takes them."""

    x: Tensor  # (B, D)
    y: Tensor  # (B, D)
    present: tuple[Tensor, Tensor]  # (B,) bool each
    ids_x: Tensor | None  # (B,)
    ids_y: Tensor | None  # (B,)
    known: Tensor | None  # (E, 2)


def check_sides(objective: str, on: Sequence[str] | None, model: Model) -> None:
    """Check before the first step that `two_sides` will find what it needs.

    Raises:
        ZooError: If ``on`` names what the model does not give, or neither one nor two outputs are named.
    """
    faults = [unknown("output of this model", name, model.outputs) for name in on or () if name not in model.outputs]
    chosen = model.outputs if on is None else on
    if len(chosen) not in (1, 2) or len(set(chosen)) != len(chosen):
        faults.append(f"write two different outputs, or one whose queries and targets are contrasted, not {list(chosen)}")
    if faults:
        raise ZooError("\n".join(f"{objective}.on: {fault}" for fault in faults))


def two_sides(objective: str, on: Sequence[str] | None, model: Model, batch: Batch) -> Sides:
    """Run the model and lay out its two sides.

    Raises:
        ZooError: If one output is contrasted and the batch is not one of pairs.
    """
    return sides_of(objective, model.outputs if on is None else on, model(batch), batch)


def sides_of(objective: str, names: Sequence[str], out: ModelOutput, batch: Batch) -> Sides:
    """Lay out two sides of what a model gave: the two outputs, or the one's queries and targets.

    Raises:
        ZooError: If one output is contrasted and the batch is not one of pairs.
    """
    if len(names) == 2:
        (x, y), (there_x, there_y) = zip(*((out.embeddings[name], _present(out, name)) for name in names), strict=True)
        return Sides(x, y, (there_x, there_y), batch.ids, batch.ids, _together(batch))
    if batch.positive is None:
        raise ZooError(f"{objective} on the one output {names[0]!r} contrasts queries with targets, but this batch is not one of pairs")
    (x, y), (there_x, there_y) = out.embeddings[names[0]].chunk(2), _present(out, names[0]).chunk(2)
    ids_x, ids_y = (None, None) if batch.ids is None else batch.ids.chunk(2)
    return Sides(x, y, (there_x, there_y), ids_x, ids_y, _across(batch.known, len(x)))


def _present(out: ModelOutput, name: str) -> Tensor:
    x = out.embeddings[name]
    return out.present.get(name, torch.ones(len(x), dtype=torch.bool, device=x.device))


def _together(batch: Batch) -> Tensor | None:
    """Pairs of rows, in both orders, whose items belong together: the image of one is no negative for the text of the other."""
    pairs = [] if batch.known is None else [batch.known, batch.known.flip(1)]
    if batch.positive is not None:
        row = torch.arange(len(batch.positive), device=batch.positive.device)
        pairs.append(torch.stack([row, torch.where(batch.positive >= 0, batch.positive, row)], dim=1))
        pairs.append(pairs[-1].flip(1))
    return torch.cat(pairs) if pairs else None


def _across(known: Tensor | None, B: int) -> Tensor | None:
    """Pairs of the 2B rows of a batch as pairs (query, target); those within one half say nothing about two sides.

    Targets count on through the processes, as rows do in ``known``.
    """
    if known is None:
        return None
    row, other = torch.cat([known, known.flip(1)]).unbind(1)
    process, place = other.div(2 * B, rounding_mode="floor"), other.remainder(2 * B)
    across = (row >= 0) & (row < B) & (place >= B)
    return torch.stack([row, process * B + place - B], 1)[across]
