"""Rows in, vectors out: the ``encode`` of every model that has a processor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from zoo.collate import RowCollate
from zoo.errors import ZooError
from zoo.types import Batch, Row


@torch.no_grad()
def encode(
    model: nn.Module, rows: Sequence[Row], *, output: str, batch_size: int, show_progress: bool | None, normalize: bool
) -> np.ndarray:
    """Vectors of raw rows, in eval mode, in the order given.

    Args:
        model: Its ``processor`` turns a row into inputs, its ``outputs`` name its embeddings.
        rows: Dictionaries with any subset of the modalities' keys; decoded batch by batch, so a lazy sequence stays lazy.
        output: Which embedding.
        batch_size: Rows at a time.
        show_progress: None: a bar when there are many rows and somebody watches.
        normalize: To length 1.

    Returns:
        (N, D) float32.

    Raises:
        ZooError: If the model gives no embedding of this name, or a row is empty.
    """
    if output not in model.outputs:
        raise ZooError(f"this model gives no embedding {output!r} (it gives: {', '.join(model.outputs)})")
    if isinstance(rows, dict | str):
        raise ZooError("encode takes a list of rows: write encode([{...}])")
    device = next(model.parameters()).device
    collate, was_training = RowCollate(model.processor), model.training
    model.eval()
    vectors = []
    try:
        for start in progress(range(0, len(rows), batch_size), "encoding", show_progress):
            some = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
            if empty := [start + i for i, row in enumerate(some) if not model.processor.sees(row)]:
                raise ZooError(
                    f"this model sees nothing of row {', '.join(map(str, empty[:5]))}: give it at least one of {', '.join(model.processor.keys())}"
                )
            batch = to_device(collate(some), device)
            vectors.append(model(batch).embeddings[output].float().cpu())
    finally:
        model.train(was_training)
    if not vectors:
        return np.zeros((0, model.dim), dtype=np.float32)
    x = torch.cat(vectors)
    return (F.normalize(x, dim=-1) if normalize else x).numpy()


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
