"""Vectors that are not there must not count: every combine plug-in starts by blanking them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor


def blanked(x: Mapping[str, Tensor], present: Mapping[str, Tensor], names: Sequence[str]) -> list[Tensor]:
    """The vectors (B, D) of ``names``, in that order, zeros where absent.

    Filling, where a product with 0 would keep a NaN, cuts the absent vector out of the gradient as well.
    """
    return [blank(x[name], present[name]) for name in names]


def blank(x: Tensor, there: Tensor) -> Tensor:
    """(B, D) with zeros in the rows that are not there (B,)."""
    return x.masked_fill(~there[:, None], 0)
