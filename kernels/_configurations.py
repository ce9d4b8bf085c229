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


# (least capability, products) to the configurations of (forward, gradient) in their plain form, and in any other.
# Products: "half" is float16 and bfloat16; float32 by its precision.
_PLAIN: dict[tuple[int, str], tuple[Configuration, Configuration]] = {
    (80, "half"): (Configuration(128, 128, 64, 8, 3), Configuration(128, 128, 64, 8, 3, split=2)),
    (80, "tf32"): (Configuration(128, 128, 32, 8, 3), Configuration(128, 128, 32, 8, 3, split=2)),
    (80, "3xtf32"): (Configuration(64, 64, 32, 4, 3), Configuration(64, 64, 32, 4, 3)),
    (80, "ieee"): (Configuration(64, 64, 16, 4, 2), Configuration(64, 64, 16, 4, 2)),
    (90, "half"): (Configuration(256, 128, 64, 8, 3, tma=True), Configuration(256, 128, 64, 8, 3, split=2, tma=True)),
    (90, "tf32"): (Configuration(128, 128, 32, 8, 3, tma=True), Configuration(128, 128, 32, 8, 3, split=2, tma=True)),
    (90, "3xtf32"): (Configuration(64, 64, 32, 4, 3, tma=True), Configuration(64, 64, 32, 4, 3, tma=True)),
    (90, "ieee"): (Configuration(64, 64, 16, 4, 2), Configuration(64, 64, 16, 4, 2)),
    (100, "half"): (Configuration(128, 64, 64, 8, 3, tma=True), Configuration(128, 64, 64, 8, 3, tma=True)),
}
_FULL: dict[tuple[int, str], tuple[Configuration, Configuration]] = {
    (80, "half"): (Configuration(64, 64, 64, 8, 3), Configuration(64, 64, 64, 8, 3)),
    (80, "tf32"): (Configuration(64, 64, 32, 8, 3), Configuration(64, 64, 32, 8, 3)),
    (80, "3xtf32"): (Configuration(64, 64, 32, 8, 2), Configuration(64, 64, 32, 8, 2)),
    (80, "ieee"): (Configuration(64, 64, 16, 8, 2), Configuration(64, 64, 16, 8, 2)),
}
INTERPRETED = Configuration(32, 16, 16, 4, 1, split=2), Configuration(32, 16, 16, 4, 1, split=2)


def find(capability: int, products: str, plain: bool) -> tuple[Configuration, Configuration]:
    """The configurations of forward and gradient for a device.

    Args:
        capability: 10 * major + minor.
        products: "half", "tf32", "3xtf32" or "ieee".
        plain: Whether of all relations only positives by index, ids, and presence are asked for, in the softmax form.
    """
    table = _PLAIN if plain else _FULL
    return table[max(key for key in table if key[0] <= capability and key[1] == products)]
