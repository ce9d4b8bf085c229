"""Batches of one modality, for schedules that let modalities learn apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from zoo.joints import Phase
from zoo.types import Batch


def only(batch: Batch, name: str) -> Batch | None:
    """The rows of a labelled batch that have the modality ``name``, with nothing else of them; None if none has it."""
    x = batch.inputs.get(name)
    if x is None or (x.present is not None and not bool(x.present.any())):
        return None
    if x.present is None:
        return batch._replace(inputs={name: x})
    here = x.present.nonzero()[:, 0]
    targets, ids = (None if known is None else known[here] for known in (batch.targets, batch.ids))
    return Batch({name: x.rows(here)._replace(present=None)}, targets, ids)


def alone(batch: Batch, names: Iterable[str]) -> Iterator[Phase]:
    """A phase for each modality that any row has, of those rows with nothing else of them."""
    for name in names:
        if (own := only(batch, name)) is not None:
            yield Phase(name, own, (name,))


def summed(gradients: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Gradients by parameter, added up; a parameter that one of them lacks has the others'."""
    total: dict[str, Tensor] = {}
    for some in gradients:
        for name, gradient in some.items():
            total[name] = total[name] + gradient if name in total else gradient
    return total
