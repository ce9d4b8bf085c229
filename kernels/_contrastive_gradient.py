"""Triton kernel of the contrastive loss: the gradient of one tile of logits."""

from __future__ import annotations

import triton
import triton.language as tl

from ._tiles import LOG2E, NOTHING, SIZES, VECTORS, agree, candidates, no_negatives, outside, place, product


@triton.jit
def _halves(tile, BM: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr):
    """The left and the right half, worked on one after the other: at once they would need more registers than there are."""
    half, other = tile, tile
    if SPLIT == 2:
        half, other = tl.split(tl.permute(tl.reshape(tile, (BM, 2, WIDTH)), (0, 2, 1)))
    return half, other


@triton.jit
def _share_of(t, told, at, size, same, axis: tl.constexpr, GROUPS: tl.constexpr, TOTAL: tl.constexpr, SIGMOID: tl.constexpr):
    """Gradient of a logit through its row (axis 1) or column (axis 0); ``told`` (6, size): log-sum-exp, upstream of it, of the
    pull, of the total, of the soft mean, and the teacher's log-sum-exp."""
    upstream = tl.expand_dims(tl.load(told + size + at, mask=at < size, other=0.0), axis)
    if SIGMOID:
        share = 1 / (1 + tl.exp2(-t * LOG2E))
        if GROUPS:
            share = tl.where(same, share - 1, share)
    else:
        share = tl.exp2(t - tl.expand_dims(tl.load(told + at, mask=at < size, other=float("inf")), axis))
    gradient = upstream * share
    if TOTAL:
        total = tl.expand_dims(tl.load(told + 3 * size + at, mask=at < size, other=0.0), axis)
        gradient += tl.where(t != NOTHING, total, 0.0)
    if GROUPS:
        gradient += tl.where(same, tl.expand_dims(tl.load(told + 2 * size + at, mask=at < size, other=0.0), axis), 0.0)
    return gradient


@triton.jit
def _share_of_teacher(taught, told, at, size, mask, axis: tl.constexpr):
    upstream = tl.expand_dims(tl.load(told + 4 * size + at, mask=at < size, other=0.0), axis)
    lse = tl.expand_dims(tl.load(told + 5 * size + at, mask=at < size, other=float("inf")), axis)
    return tl.where(mask, upstream * tl.exp2(taught - lse), 0.0)


@triton.jit
def _put_in(gradient, named, told, at, size, start, WIDTH: tl.constexpr, axis: tl.constexpr):
    """Add the upstream of the pull to what each row (axis 1) or column (axis 0) names, before anything is rounded."""
    index = tl.load(named + at, mask=at < size, other=-1) - start
    if tl.max(((index >= 0) & (index < WIDTH)).to(tl.int32)) > 0:
        upstream = tl.load(told + 2 * size + at, mask=at < size, other=0.0)
        its = tl.expand_dims(index, axis) == tl.expand_dims(tl.arange(0, WIDTH), 1 - axis)
        gradient += tl.where(its, tl.expand_dims(upstream, axis), 0.0)
    return gradient


@triton.jit
def _leave_out(t, named, at, size, start, WIDTH: tl.constexpr, axis: tl.constexpr):
    """Exclude what each row (axis 1) or column (axis 0) names."""
    index = tl.load(named + at, mask=at < size, other=-1) - start
    if tl.max(((index >= 0) & (index < WIDTH)).to(tl.int32)) > 0:
        t = tl.where(tl.expand_dims(index, axis) == tl.expand_dims(tl.arange(0, WIDTH), 1 - axis), NOTHING, t)
    return t


@triton.jit(do_not_specialize=[*SIZES, "stride_g"], do_not_specialize_on_alignment=VECTORS)
def gradient_tile(
    x, y, taught_x, taught_y, stride_x, stride_y, stride_tx, stride_ty, scale, bias,
    positive, positive_y, groups_x, groups_y, ids_x, ids_y, there_x, there_y, known_row, known_column, known_start,
    told_x, told_y, gradient, gradient_at, stride_g, of_scale, of_bias, R, C, D, DT, diagonal,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, UP: tl.constexpr,
    COLUMNS: tl.constexpr, MIRROR: tl.constexpr, SELF: tl.constexpr, POSITIVE: tl.constexpr, POSITIVE_Y: tl.constexpr, GROUPS: tl.constexpr,
    IDS: tl.constexpr, THERE: tl.constexpr, KNOWN: tl.constexpr, TOTAL: tl.constexpr, SOFT: tl.constexpr, SIGMOID: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile's logits, written once in the operands' type, and its share in those of scale and bias."""
    pid = tl.program_id(0)
    nm, nn = tl.cdiv(R, BM), tl.cdiv(C, BN)
    pm, pn = place(pid, nm, nn, GROUP)
    row, column = pm * BM, pn * BN
    asked, beyond = True, False
    if MIRROR:  # x is y: a tile above the diagonal is written a second time, turned, below it
        asked, beyond = column + BN > row, column >= row + BM
    if asked:
        products = product(x, y, stride_x, stride_y, row, column, R, C, D, BM, BN, BK, TMA, PRECISION, UP)
        if SOFT:
            taught = product(taught_x, taught_y, stride_tx, stride_ty, row, column, R, C, DT, BM, BN, BK, TMA, PRECISION, UP)
            taught *= tl.load(scale) * LOG2E
        first, last = 0, 0
        if KNOWN:
            first, last = tl.load(known_start + pm * nn + pn), tl.load(known_start + pm * nn + pn + 1)
        WIDTH: tl.constexpr = BN // SPLIT
        half, other = _halves(products, BM, WIDTH, SPLIT)
        if SOFT:
            taught_half, taught_other = _halves(taught, BM, WIDTH, SPLIT)
        sum_scale, sum_bias = 0.0, 0.0
        for h in tl.static_range(SPLIT):
            start = column + h * WIDTH
            rm, rn = row + tl.arange(0, BM), start + tl.arange(0, WIDTH)
            part = half if h == 0 else other
            if SIGMOID:
                t = part * tl.load(scale) + tl.load(bias)
            else:
                t = part * (tl.load(scale) * LOG2E)
            t = outside(t, row, start, rm, rn, R, C, diagonal, there_x, there_y, BM, WIDTH, SELF, THERE)
            same = 0
            if GROUPS:
                same = agree(groups_x, groups_y, rm, rn, R, C) & (t != NOTHING)
            t = no_negatives(t, same, rm, rn, R, C, ids_x, ids_y, known_row, known_column, first, last, GROUPS, IDS, KNOWN)
            if POSITIVE:
                t = _leave_out(t, positive, rm, R, start, WIDTH, 1)
            if POSITIVE_Y:
                t = _leave_out(t, positive_y, rn, C, row, BM, 0)
            g = _share_of(t, told_x, rm, R, same, 1, GROUPS, TOTAL, SIGMOID)
            if COLUMNS:
                g += _share_of(t, told_y, rn, C, same, 0, GROUPS, TOTAL, SIGMOID)
            if SOFT:
                of_row = candidates(t, positive, rm, R, start, WIDTH, 1, POSITIVE)
                g += _share_of_teacher(taught_half if h == 0 else taught_other, told_x, rm, R, of_row, 1)
                if COLUMNS:
                    of_column = of_row
                    if POSITIVE_Y:
                        of_column = candidates(t, positive_y, rn, C, row, BM, 0, True)
                    g += _share_of_teacher(taught_half if h == 0 else taught_other, told_y, rn, C, of_column, 0)
            if POSITIVE:
                g = _put_in(g, positive, told_x, rm, R, start, WIDTH, 1)
            if POSITIVE_Y:
                if COLUMNS:
                    g = _put_in(g, positive_y, told_y, rn, C, row, BM, 0)
            kept = g.to(gradient_at.dtype.element_ty)
            if TMA:
                gradient.store([row, start], kept)
            else:
                at = gradient_at + rm[:, None].to(tl.int64) * stride_g + rn[None, :]
                tl.store(at, kept, mask=(rm < R)[:, None] & (rn < C)[None, :])
            if MIRROR:
                turned = gradient_at + rn[:, None].to(tl.int64) * stride_g + rm[None, :]
                tl.store(turned, tl.trans(kept), mask=(rn < C)[:, None] & (rm < R)[None, :] & beyond)
            sum_scale += tl.sum(g * part)
            if BIAS:
                sum_bias += tl.sum(g)
        if MIRROR:  # a tile on the diagonal holds each pair twice
            sum_scale = tl.where(beyond, sum_scale, sum_scale / 2)
            sum_bias = tl.where(beyond, sum_bias, sum_bias / 2)
        tl.store(of_scale + pid, sum_scale)
        if BIAS:
            tl.store(of_bias + pid, sum_bias)
