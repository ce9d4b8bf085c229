"""What the Triton kernels of the contrastive loss have in common: where a tile lies, its inner products, and which pairs do not count.

Softmax logits are in units of log 2 inside (``exp2`` is what the hardware has); sigmoid logits are as they are. A relation
between rows and columns (see ``_pairs``) is compiled in only where it is asked for; positives and the diagonal are looked at only in
tiles that they touch. Nothing is summed atomically: a tile writes its share, the host adds the shares up.
"""

from __future__ import annotations

import triton
import triton.language as tl

NOTHING = tl.constexpr(float("-inf"))
LOG2E = tl.constexpr(1.4426950408889634)
# One binary for all sizes, and for vectors that begin anywhere; the operands are padded and aligned, and stay promised to be.
SIZES = ["R", "C", "diagonal"]
VECTORS = ["groups_x", "groups_y", "ids_x", "ids_y", "there_x", "there_y"]


@triton.jit
def place(pid, nm, nn, GROUP: tl.constexpr):
    """Tile row and column: columns of GROUP tiles one after the other, whose operands then stay in the L2 cache."""
    per = GROUP * nn
    first = pid // per * GROUP
    size = min(nm - first, GROUP)
    return first + pid % per % size, pid % per // size


@triton.jit
def product(
    x, y, stride_x, stride_y, row, column, R, C, D,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """(BM, BN) inner products. A load masked along D would end pipelining: the host pads, descriptors read zeros."""
    products = tl.zeros((BM, BN), tl.float32)
    if TMA:
        for k in range(tl.cdiv(D, BK)):
            a, b = x.load([row, k * BK]), y.load([column, k * BK])
            if UP:  # the interpreter multiplies bfloat16 as if it were integers
                a, b = a.to(tl.float32), b.to(tl.float32)
            products = tl.dot(a, b.T, products, input_precision=PRECISION)
    else:
        rows, columns = (row + tl.arange(0, BM)) % R, (column + tl.arange(0, BN)) % C
        a_at = x + rows.to(tl.int64)[:, None] * stride_x + tl.arange(0, BK)[None, :]
        b_at = y + columns.to(tl.int64)[:, None] * stride_y + tl.arange(0, BK)[None, :]
        for _ in range(tl.cdiv(D, BK)):
            a, b = tl.load(a_at), tl.load(b_at)
            if UP:
                a, b = a.to(tl.float32), b.to(tl.float32)
            products = tl.dot(a, b.T, products, input_precision=PRECISION)
            a_at += BK
            b_at += BK
    return products


@triton.jit
def outside(
    t, row, column, rm, rn, R, C, diagonal, there_x, there_y,
    BM: tl.constexpr, BN: tl.constexpr, SELF: tl.constexpr, THERE: tl.constexpr,
):  # fmt: skip
    """Exclude pairs that are not there, and a row with itself."""
    if (row + BM > R) | (column + BN > C):
        t = tl.where((rm < R)[:, None] & (rn < C)[None, :], t, NOTHING)
    if SELF:
        off = row + diagonal - column
        if (off < BN) & (off > -BM):
            t = tl.where((off + tl.arange(0, BM))[:, None] == tl.arange(0, BN)[None, :], NOTHING, t)
    if THERE:
        here = tl.load(there_x + rm, mask=rm < R, other=0) != 0
        there = tl.load(there_y + rn, mask=rn < C, other=0) != 0
        t = tl.where(here[:, None] & there[None, :], t, NOTHING)
    return t


@triton.jit
def agree(left, right, rm, rn, R, C):
    """(BM, BN) bool, where two vectors of numbers agree."""
    a, b = tl.load(left + rm, mask=rm < R, other=0), tl.load(right + rn, mask=rn < C, other=0)
    return a[:, None] == b[None, :]


@triton.jit
def no_negatives(
    t, spared, rm, rn, R, C, ids_x, ids_y, known_row, known_column, first, last,
    GROUPS: tl.constexpr, IDS: tl.constexpr, KNOWN: tl.constexpr,
):  # fmt: skip
    """Exclude pairs of equal ids and known pairs, unless they are ``spared`` as positives of one group."""
    if IDS:
        equal = agree(ids_x, ids_y, rm, rn, R, C)
        if GROUPS:
            equal = equal & (spared == 0)
        t = tl.where(equal, NOTHING, t)
    if KNOWN:
        for e in range(first, last):
            hit = (rm == tl.load(known_row + e))[:, None] & (rn == tl.load(known_column + e))[None, :]
            if GROUPS:
                hit = hit & (spared == 0)
            t = tl.where(hit, NOTHING, t)
    return t


@triton.jit
def candidates(t, named, at, size, start, WIDTH: tl.constexpr, axis: tl.constexpr, POSITIVE: tl.constexpr):
    """(BM, BN) bool, what a row's (axis 1) or column's (axis 0) soft target is spread over: the denominator and its positive."""
    found = t != NOTHING
    if POSITIVE:
        index = tl.load(named + at, mask=at < size, other=-1) - start
        found = found | (tl.expand_dims(index, axis) == tl.expand_dims(tl.arange(0, WIDTH), 1 - axis))
    return found
