"""Weights that follow from the names of the parameters, so that two libraries can be given the same ones without a file of them.

    from tools.named_weights import numbers, state

The numbers are raw draws of Philox, which NumPy promises never to change, scaled in exact steps: they are the same in every version, on
every machine. They are *hot*: biases and the weights of norms are random too, so that a swapped or forgotten norm shows in the outputs.
Needs NumPy alone, for it also runs in the environment of an old library.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np

Array = np.ndarray
Shapes = Mapping[str, Sequence[int]]


def numbers(name: str, shape: Sequence[int]) -> Array:
    """Uniform numbers of mean 0 and variance 1 that follow from ``name``.

    Args:
        name: Any text; another name means other numbers.
        shape: Of the array; the numbers are filled in row by row, and of two shapes the smaller is a beginning of the larger.

    Returns:
        float64 of ``shape``, between -sqrt(3) and sqrt(3).
    """
    key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest(), "little")
    raw = np.random.Philox(key=key).random_raw(math.prod(shape))
    return (((raw >> 11) * 2.0**-52 - 1) * math.sqrt(3)).reshape(tuple(shape))


def weight(name: str, shape: Sequence[int]) -> Array:
    """The value of one entry of a state dict: float32, or int64 where the entry counts.

    Matrices, convolutions and embeddings have variance 1 / fan-in, weights of norms lie about 1, biases about 0, a scalar (a temperature)
    between 0.05 and 0.15. The columns of a queue of features are unit vectors. ``position_ids`` count up, a pointer is 0, the ids of an
    empty queue are -100.
    """
    if name.endswith("position_ids"):
        return np.arange(math.prod(shape), dtype=np.int64).reshape(tuple(shape))
    if name.endswith("queue_ptr"):
        return np.zeros(tuple(shape), dtype=np.int64)
    if name.endswith("idx_queue"):
        return np.full(tuple(shape), -100, dtype=np.int64)
    drawn = numbers(name, shape)
    if name.endswith("_queue"):
        drawn = drawn / np.sqrt([math.fsum(column) for column in (drawn**2).T])
    elif len(shape) == 0:
        drawn = 0.1 + drawn * 0.05 / math.sqrt(3)
    elif len(shape) == 1:
        drawn = drawn / 4 + (1 if name.endswith("weight") else 0)
    else:
        drawn = drawn / math.sqrt(shape[-1] if shape[0] == 1 else math.prod(shape[1:]))
    return np.asarray(drawn, dtype=np.float32)


def state(shapes: Shapes, shared: Mapping[str, str] | None = None) -> dict[str, Array]:
    """A whole state dict.

    Args:
        shapes: Of every entry that has a value of its own, by name.
        shared: Further names, each with the one of ``shapes`` whose value it has: parameters that a model holds twice.
    """
    own = {name: weight(name, shape) for name, shape in shapes.items()}
    return own | {name: own[same] for name, same in (shared or {}).items()}


def fingerprint(values: Mapping[str, Array]) -> str:
    """32 hexadecimal digits that change with any name, type, shape or number of a state dict."""
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(values):
        found.update(f"{name} {values[name].dtype.str} {values[name].shape} ".encode())
        found.update(values[name].tobytes())
    return found.hexdigest()
