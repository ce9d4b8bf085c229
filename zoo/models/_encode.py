"""Rows in, vectors or classes out: ``encode``, ``similarity`` and ``classify`` of every model that has a processor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from zoo.collate import RowCollate, Sample
from zoo.errors import ZooError
from zoo.types import Batch, ModelOutput, Row, Rows


@torch.no_grad()
def encode(model: Any, rows: Rows, *, output: str, batch_size: int, show_progress: bool | None, normalize: bool) -> np.ndarray:
    """Vectors of raw rows, in eval mode, in the order given.

    Args:
        model: An ``nn.Module``; its ``processor`` turns a row into inputs, its ``outputs`` name its embeddings, ``dim`` wide.
        rows: Dictionaries with any subset of the modalities' keys, or strings, each of which is a title. Those of a list are encoded
            in batches of like length; another sequence may make its rows on access, so it is read batch by batch. Or a single one.
        output: Which embedding.
        batch_size: Rows at a time.
        show_progress: None: a bar when there are many rows and somebody watches.
        normalize: To length 1.

    Returns:
        (N, D) float32; (D,) of a single row.

    Raises:
        ZooError: If the model gives no embedding of this name, or what stands in ``rows`` are no rows, or a row is empty, cannot be
            read, or has no embedding of this name.
    """
    if output not in model.outputs:
        raise ZooError(f"this model gives no embedding {output!r} (it gives: {', '.join(model.outputs)})")
    if isinstance(rows, str | Mapping):
        return encode(model, [rows], output=output, batch_size=batch_size, show_progress=show_progress, normalize=normalize)[0]
    _check_rows_and_size(rows, "encode", batch_size)
    found = np.zeros((len(rows), model.dim), dtype=np.float32)
    for numbers, out in _outputs(model, rows, "encoding", batch_size, show_progress):
        _check_present(out, output, numbers, model.outputs)
        x = out.embeddings[output].float()
        found[numbers] = (F.normalize(x, dim=-1) if normalize else x).cpu().numpy()
    return found


def classify(model: Any, rows: Rows, *, batch_size: int, show_progress: bool | None) -> np.ndarray:
    """Probabilities of the classes of raw rows: (N, K) float32, or (K,) of a single row, each adding up to 1.

    Args:
        model: As of `encode`; it gives the logits ``fused``.
        rows: As of `encode`.
        batch_size: As of `encode`.
        show_progress: As of `encode`.

    Raises:
        ZooError: As `encode`.
    """
    if isinstance(rows, str | Mapping):
        return classify(model, [rows], batch_size=batch_size, show_progress=show_progress)[0]
    _check_rows_and_size(rows, "classify", batch_size)
    found = np.zeros((len(rows), model.classes), dtype=np.float32)
    for numbers, out in _outputs(model, rows, "classifying", batch_size, show_progress):
        found[numbers] = out.logits["fused"].float().softmax(-1).cpu().numpy()
    return found


def tokenized(model: Any, rows: Rows, *, batch_size: int, show_progress: bool | None) -> np.ndarray:
    """Visual tokens of raw rows: (N, P) int64, or (P,) of a single row.

    Args:
        model: As of `encode`; it gives the labels ``image`` (B, P), P patches of its ``grid``.
        rows: As of `encode`.
        batch_size: As of `encode`.
        show_progress: As of `encode`.

    Raises:
        ZooError: As `encode`.
    """
    if isinstance(rows, str | Mapping):
        return tokenized(model, [rows], batch_size=batch_size, show_progress=show_progress)[0]
    _check_rows_and_size(rows, "tell", batch_size)
    found = np.zeros((len(rows), model.grid[0] * model.grid[1]), dtype=np.int64)
    for numbers, out in _outputs(model, rows, "tokenizing", batch_size, show_progress):
        found[numbers] = out.labels["image"].cpu().numpy()
    return found


def _check_rows_and_size(rows: Any, call: str, batch_size: int) -> None:
    if not isinstance(rows, Sequence):
        raise ZooError(f"{call} takes a row or a list of rows, not a {type(rows).__name__}: write {call}([{{...}}])")
    if batch_size < 1:
        raise ZooError(f"batch_size {batch_size} holds nothing: write 1 or more")


def _outputs(
    model: Any, rows: Sequence[Row | str], says: str, batch_size: int, show_progress: bool | None
) -> Iterator[tuple[list[int], ModelOutput]]:
    """What the model makes of each batch, with the numbers of its rows; in eval mode, without gradients."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        steps = progress(range(0, len(rows), batch_size), says, show_progress)
        for _, (numbers, some) in zip(steps, _batches(model, rows, batch_size), strict=True):
            with torch.no_grad():
                out = model(to_device(_batch(model, some, numbers), device))
            yield numbers, out
    finally:
        model.train(was_training)


def _batches(model: Any, rows: Sequence[Row | str], batch_size: int) -> Iterator[tuple[list[int], list[Row]]]:
    """The numbers of the rows of each batch, and the rows; of a list the longest first, where what does not fit in memory fails at once."""
    pool = max(len(rows), 1) if isinstance(rows, list | tuple) else batch_size
    for first in range(0, len(rows), pool):
        numbers = range(first, min(first + pool, len(rows)))
        some = [_row(model, rows[i]) for i in numbers]
        _check_rows(model, some, first)
        order = sorted(range(len(some)), key=lambda i: -_length(some[i]))
        for at in range(0, len(order), batch_size):
            chosen = order[at : at + batch_size]
            yield [numbers[i] for i in chosen], [some[i] for i in chosen]


def _length(row: Row) -> int:
    """Characters of its texts, or of the path of its image: an estimate of what the model will read."""
    return sum(len(value) for value in row.values() if isinstance(value, str))


def similarity(a: Any, b: Any) -> np.ndarray:
    """Cosine of every vector of ``a`` with every vector of ``b``.

    Args:
        a: (N, D), or (D,) for one; an array or a tensor on the CPU, of any length.
        b: (M, D), or (D,).

    Returns:
        (N, M) float32 in -1..1; 0 where a vector is zeros.

    Raises:
        ZooError: If the widths differ, or these are no vectors.
    """
    x, y = _vectors(a), _vectors(b)
    _check_widths(x, y)
    return x @ y.T


def similarity_pairwise(a: Any, b: Any) -> np.ndarray:
    """Cosine of each vector of ``a`` with the one at the same place in ``b``: (N, D) and (N, D) to (N,), as `similarity`.

    Raises:
        ZooError: If the widths or numbers differ, or these are no vectors.
    """
    x, y = _vectors(a), _vectors(b)
    _check_widths(x, y)
    if len(x) != len(y):
        raise ZooError(f"{len(x)} vectors and {len(y)} make no pairs: give as many, or write similarity for each with each")
    return (x * y).sum(1)


def _vectors(given: Any) -> np.ndarray:
    """(N, D) float32 of length 1, or 0."""
    x = np.atleast_2d(np.asarray(given, dtype=np.float32))
    if x.ndim != 2:
        raise ZooError(f"vectors are (N, D) or (D,), not {x.shape}")
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def _check_widths(x: np.ndarray, y: np.ndarray) -> None:
    if x.shape[1] != y.shape[1]:
        raise ZooError(f"vectors of width {x.shape[1]} and {y.shape[1]} cannot be compared: they come from different models or outputs")


def _row(model: Any, given: Row | str) -> Row:
    """A string is a title."""
    if not isinstance(given, str):
        return given
    keys: Sequence[str] = model.processor.keys()
    if "title" not in keys:
        raise ZooError(f"this model reads no title, so a string means nothing to it: write {{...}} with any of {', '.join(keys)}")
    return {"title": given}


def _check_rows(model: Any, rows: Sequence[Row], start: int) -> None:
    keys = ", ".join(model.processor.keys())
    for i, row in enumerate(rows, start):
        if not isinstance(row, Mapping):
            raise ZooError(f"row {i} is a {type(row).__name__}, not a dictionary: write {{...}} with any of {keys}")
    if empty := [i for i, row in enumerate(rows, start) if not model.processor.sees(row)]:
        raise ZooError(f"this model sees nothing of row {', '.join(map(str, empty[:5]))}: give it at least one of {keys}")


def _batch(model: Any, rows: Sequence[Row], numbers: Sequence[int]) -> Batch:
    """The rows as a batch; what is wrong with one names it."""
    names = iter(numbers)

    def process(row: Row) -> Sample:
        number = next(names)
        try:
            return model.processor(row)
        except ZooError as e:
            raise ZooError(f"row {number}: {e}") from e

    return RowCollate(process)(rows)


def _check_present(out: ModelOutput, output: str, numbers: Sequence[int], outputs: Sequence[str]) -> None:
    if output in out.present and not out.present[output].all():
        absent = [numbers[i] for i in (~out.present[output]).nonzero().flatten().tolist()]
        raise ZooError(
            f"row {', '.join(map(str, absent[:5]))} has no embedding {output!r}: nothing of what it is read from is there: leave it out, "
            f"or encode such rows apart, with another output (there are: {', '.join(outputs)})"
        )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch's tensors on ``device``."""
    from accelerate.utils import send_to_device

    return batch if device.type == "cpu" else send_to_device(batch, device)


def progress(steps: range, says: str, show: bool | None) -> Iterable[int]:
    """``steps`` behind a bar on the terminal; with None only when there are many and somebody watches."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    if show or (show is None and len(steps) >= 20 and console.is_terminal):
        return track(steps, says, console=console)
    return steps
