"""Widths and strides that a Triton kernel can load without masks: a mask along a width ends pipelining, and odd strides spill."""

from __future__ import annotations

from torch import Tensor


def padded(x: Tensor, widths: int, multiple: int) -> Tensor:
    """``x``, or an aligned copy of it whose last dimensions are filled up with zeros.

    Args:
        x: Any tensor.
        widths: How many of the last dimensions must have a size that ``multiple`` divides.
        multiple: A multiple of 16; it divides all strides of the result but the last, which is 1.
    """
    shape = [*x.shape[:-widths], *(size + -size % multiple for size in x.shape[-widths:])]
    is_aligned = x.stride(-1) == 1 and all(stride % multiple == 0 for stride in x.stride()[:-1]) and x.data_ptr() % 16 == 0
    if is_aligned and list(x.shape) == shape:
        return x
    copy = x.new_zeros(shape)
    copy[tuple(slice(size) for size in x.shape)] = x
    return copy
