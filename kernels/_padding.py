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
    strides = x.stride()[:-1]
    is_apart = all(
        stride >= size for stride, size in zip(strides, x.shape[1:], strict=True)
    )  # expanded rows are one row: no descriptor takes them
    is_aligned = x.stride(-1) == 1 and all(stride % multiple == 0 for stride in strides) and x.data_ptr() % 16 == 0 and is_apart
    if is_aligned and list(x.shape) == shape:
        return x
    copy = x.new_zeros(shape)
    copy[tuple(slice(size) for size in x.shape)] = x
    return copy
