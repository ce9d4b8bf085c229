"""The tiles that the Triton kernels of the contrastive loss run with: a small table per architecture, nothing is tuned by surprise."""

from __future__ import annotations

from typing import NamedTuple


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


def _both(rows: int, columns: int, depth: int, warps: int, stages: int, split: int = 1, tma: bool = False) -> Tiles:
    forward = Configuration(rows, columns, depth, warps, stages, tma=tma)
    return Tiles(forward, forward._replace(split=split))


# (least capability, products, weight) to tiles that spill no register there with Triton 3.6 and 3.8; benchmarks/aot.py checks all of
# them. Larger ones do: 256 x 128 by 64 to 1064 bytes. With more relations to look at, a logit needs more registers.
_TABLE: dict[tuple[int, str, str], Tiles] = {
    (80, "half", "plain"): Tiles(Configuration(128, 128, 64, 8, 3), Configuration(128, 64, 64, 8, 3)),
    (80, "half", "masked"): _both(64, 64, 64, 4, 3),
    (80, "half", "full"): _both(64, 32, 64, 4, 3),
    (80, "tf32", "plain"): _both(128, 64, 32, 8, 3),
    (80, "tf32", "masked"): _both(64, 64, 32, 8, 3),
    (80, "tf32", "full"): _both(64, 32, 32, 4, 3),
    (80, "3xtf32", "plain"): _both(64, 64, 32, 8, 3),
    (80, "3xtf32", "masked"): _both(64, 64, 32, 8, 3),
    (80, "3xtf32", "full"): _both(32, 32, 16, 4, 2),
    (80, "ieee", "plain"): _both(64, 64, 16, 8, 1),
    (80, "ieee", "masked"): _both(64, 64, 16, 8, 1),
    (80, "ieee", "full"): _both(32, 32, 16, 4, 1),
    (90, "half", "plain"): _both(128, 128, 64, 8, 3, split=2, tma=True),
    (90, "half", "masked"): _both(128, 64, 64, 8, 3, tma=True),
    (90, "half", "full"): _both(64, 32, 64, 4, 3, tma=True),
    (90, "tf32", "plain"): _both(128, 64, 32, 8, 3, tma=True),
    (90, "tf32", "masked"): _both(64, 64, 32, 4, 3, tma=True),
    (90, "tf32", "full"): _both(64, 32, 32, 4, 3, tma=True),
    (90, "3xtf32", "plain"): _both(64, 64, 32, 4, 3, tma=True),
    (90, "3xtf32", "masked"): _both(64, 64, 32, 4, 3, tma=True),
    (90, "3xtf32", "full"): _both(64, 32, 32, 4, 2, tma=True),
    (100, "half", "plain"): _both(128, 64, 64, 8, 3, tma=True),
    (100, "half", "masked"): _both(128, 32, 64, 8, 3, tma=True),
    (100, "tf32", "masked"): _both(128, 32, 32, 8, 3, tma=True),
    (100, "3xtf32", "masked"): _both(64, 32, 32, 8, 3, tma=True),
}
INTERPRETED = _both(32, 16, 16, 4, 1, split=2)


def find(capability: int, products: str, weight: str) -> Tiles:
    """The tiles for a device.

    Args:
        capability: 10 * major + minor.
        products: "half" for float16 and bfloat16; for float32 "tf32", "3xtf32" or "ieee".
        weight: "plain": softmax, positives by index and nothing else. "masked": ids, presence, known pairs or the diagonal too.
            "full": groups, totals, soft targets or the sigmoid form.
    """
    return _TABLE[max(key for key in _TABLE if key[0] <= capability and key[1:] == (products, weight))]
