"""The tiles that the Triton kernels of the contrastive loss run with: a small table, over which `tuning` lays what it measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

INTERPRETER = 0  # in place of a device's capability


class Configuration(NamedTuple):
    """A tile of ``rows`` x ``columns`` logits, ``depth`` features at a time; ``columns`` divides ``rows`` or the reverse.

    ``group``: tile rows that are walked column by column, for the L2 cache. ``warps``, ``stages``, ``registers`` (a limit, None:
    the compiler's): as Triton takes them. ``split``: 2 takes the gradient's epilogue in halves. ``tma``: operands are loaded by
    the tensor memory accelerator of capability 9.0 and above.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    split: int = 1
    group: int = 8
    registers: int | None = None
    tma: bool = False


class Tiles(NamedTuple):
    """The configurations of the two kernels."""

    forward: Configuration
    gradient: Configuration


class Key(NamedTuple):
    """Where tiles run, and what for."""

    capability: int  # 10 * major + minor of the device, or INTERPRETER
    triton: tuple[int, int]  # its release
    products: str  # "half" for float16 and bfloat16; for float32 "tf32", "3xtf32" or "ieee"
    weight: str  # "plain": softmax, positives by index, nothing else; "masked": ids, presence, known pairs or the diagonal too; "full": all


def _both(rows: int, columns: int, depth: int, warps: int, stages: int, split: int = 1, tma: bool = False) -> Tiles:
    forward = Configuration(rows, columns, depth, warps, stages, tma=tma)
    return Tiles(forward, forward._replace(split=split))


# Tiles that spill no register on the architecture with that release of Triton and later ones; benchmarks/aot.py checks all of them. Larger
# ones do: 256 x 128 by 64 to 1064 bytes. With more relations to look at, a logit needs more registers.
_TABLE: dict[Key, Tiles] = {
    Key(80, (3, 6), "half", "plain"): Tiles(Configuration(128, 128, 64, 8, 3), Configuration(128, 64, 64, 8, 3)),
    Key(80, (3, 8), "half", "plain"): _both(128, 128, 64, 8, 3, split=2),
    Key(80, (3, 6), "half", "masked"): _both(64, 64, 64, 4, 3),
    Key(80, (3, 6), "half", "full"): Tiles(Configuration(64, 64, 64, 8, 3), Configuration(64, 32, 64, 4, 3)),
    Key(80, (3, 8), "half", "full"): Tiles(Configuration(64, 64, 64, 8, 3), Configuration(64, 64, 64, 4, 3)),
    Key(80, (3, 6), "tf32", "plain"): _both(128, 64, 32, 8, 3),
    Key(80, (3, 6), "tf32", "masked"): _both(64, 64, 32, 8, 3),
    Key(80, (3, 6), "tf32", "full"): Tiles(Configuration(64, 64, 32, 8, 3), Configuration(64, 32, 32, 4, 3)),
    Key(80, (3, 8), "tf32", "full"): Tiles(Configuration(64, 64, 32, 8, 3), Configuration(64, 64, 32, 4, 3)),
    Key(80, (3, 6), "3xtf32", "plain"): _both(64, 64, 32, 8, 3),
    Key(80, (3, 6), "3xtf32", "masked"): _both(64, 64, 32, 8, 3),
    Key(80, (3, 6), "3xtf32", "full"): Tiles(Configuration(32, 32, 16, 4, 2), Configuration(64, 32, 32, 8, 2)),
    Key(80, (3, 8), "3xtf32", "full"): _both(64, 32, 32, 8, 2),
    Key(80, (3, 6), "ieee", "plain"): _both(64, 64, 16, 8, 1),
    Key(80, (3, 6), "ieee", "masked"): _both(64, 64, 16, 8, 1),
    Key(80, (3, 6), "ieee", "full"): _both(64, 32, 16, 8, 1),
    Key(90, (3, 6), "half", "plain"): _both(128, 128, 64, 8, 3, split=2, tma=True),
    Key(90, (3, 6), "half", "masked"): _both(128, 64, 64, 8, 3, tma=True),
    Key(90, (3, 6), "half", "full"): _both(64, 64, 64, 8, 3, tma=True),
    Key(90, (3, 6), "tf32", "plain"): _both(128, 128, 32, 8, 3, split=2, tma=True),
    Key(90, (3, 6), "tf32", "masked"): _both(64, 64, 32, 4, 3, tma=True),
    Key(90, (3, 6), "tf32", "full"): _both(64, 64, 32, 8, 3, tma=True),
    Key(90, (3, 6), "3xtf32", "plain"): _both(64, 64, 32, 4, 3, tma=True),
    Key(90, (3, 6), "3xtf32", "masked"): _both(64, 64, 32, 4, 3, tma=True),
    Key(90, (3, 6), "3xtf32", "full"): _both(64, 64, 32, 8, 2, tma=True),
    Key(90, (3, 6), "ieee", "full"): Tiles(Configuration(32, 32, 16, 4, 1), Configuration(64, 32, 16, 8, 1)),
    Key(90, (3, 8), "ieee", "full"): _both(64, 32, 16, 8, 1),
    Key(100, (3, 6), "half", "plain"): _both(128, 64, 64, 8, 3, tma=True),
    Key(100, (3, 8), "half", "plain"): Tiles(
        Configuration(128, 64, 64, 8, 3, tma=True), Configuration(128, 128, 64, 8, 3, split=2, tma=True)
    ),
    Key(100, (3, 6), "half", "masked"): _both(128, 32, 64, 8, 3, tma=True),
    Key(100, (3, 6), "tf32", "plain"): _both(128, 64, 32, 8, 3, tma=True),
    Key(100, (3, 6), "tf32", "masked"): _both(128, 32, 32, 8, 3, tma=True),
    Key(100, (3, 6), "3xtf32", "masked"): _both(64, 32, 32, 8, 3, tma=True),
    Key(100, (3, 6), "3xtf32", "full"): Tiles(Configuration(64, 64, 32, 8, 2, tma=True), Configuration(64, 32, 32, 4, 2, tma=True)),
    Key(100, (3, 8), "3xtf32", "full"): _both(64, 64, 32, 8, 2, tma=True),
}
INTERPRETED = _both(32, 16, 16, 4, 1, split=2)
measured: dict[Key, Tiles] = {}  # by `tuning`, on this device; asked before the table
_watching: list[list[Key]] = []


def find(key: Key) -> Tiles:
    """The tiles for a device: what was measured there, else the table's."""
    for asked in _watching:
        asked.append(key)
    if key in measured:
        return measured[key]
    return INTERPRETED if key.capability == INTERPRETER else stored(key)


def stored(key: Key) -> Tiles:
    """The table's tiles: of the greatest capability and, for this, the latest release of Triton that do not exceed those asked for.

    Raises:
        ValueError: For a release of Triton before those of the table.
    """
    fitting = [k for k in _TABLE if k.capability <= key.capability and k.triton <= key.triton and k[2:] == key[2:]]
    if not fitting:
        raise ValueError(
            f"the kernels need Triton 3.6 or later, not {key.triton[0]}.{key.triton[1]}: update triton, or write impl='chunked'"
        )
    return _TABLE[max(fitting)]


@contextmanager
def watched() -> Iterator[list[Key]]:
    """The keys that are asked for meanwhile, in their order."""
    asked: list[Key] = []
    _watching.append(asked)
    try:
        yield asked
    finally:
        _watching.remove(asked)
