"""Triton kernel of the contrastive loss: what one tile of logits adds to what is known of its rows and columns."""

from __future__ import annotations

import triton
import triton.language as tl

from ._tiles import LOG2E, NOTHING, SIZES, VECTORS, agree, candidates, no_negatives, outside, place, product

LOST = tl.constexpr(1e-18)  # a sum of exponentials below this lost digits to underflow; the tile is flagged and done again


@triton.jit
def _softplus(s):
    """log(1 + exp(s)), to full relative precision where it is small: a sum over many far negatives would lose it all."""
    e = tl.exp2(-tl.abs(s) * LOG2E)
    series = e * (1 - e * (0.5 - e * (0.33333333 - e * (0.25 - e * (0.2 - e * 0.16666667)))))
    return tl.maximum(s, 0.0) + tl.where(e < 0.05, series, tl.log(1 + e))


@triton.jit
def _take_out(t, whole, named, pull, at, size, start, wanted, WIDTH: tl.constexpr, axis: tl.constexpr):
    """Exclude what each row (axis 1) or column (axis 0) names; where that lies in this tile, write down its logit."""
    index = tl.load(named + at, mask=at < size, other=-1) - start
    hit = (index >= 0) & (index < WIDTH)
    if tl.max(hit.to(tl.int32)) > 0:
        its = tl.expand_dims(index, axis) == tl.expand_dims(tl.arange(0, WIDTH), 1 - axis)
        tl.store(pull + at, tl.sum(tl.where(its, whole, 0.0), axis), mask=hit & wanted)
        t = tl.where(its, NOTHING, t)
    return t


@triton.jit
def _write(known, field: tl.constexpr, part, parts, at, size, values):
    tl.store(known + (field * parts + part).to(tl.int64) * size + at, values, mask=at < size)


@triton.jit
def _write_sums(
    known, part, parts, at, size, t, same,
    axis: tl.constexpr, GROUPS: tl.constexpr, TOTAL: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    if GROUPS:
        _write(known, 1, part, parts, at, size, tl.sum(tl.where(same, t, 0.0), axis))
        _write(known, 4, part, parts, at, size, tl.sum(same.to(tl.float32), axis))
    if TOTAL:
        _write(known, 2, part, parts, at, size, tl.sum(tl.where(t != NOTHING, t, 0.0), axis))
        _write(known, 3, part, parts, at, size, tl.sum((t != NOTHING).to(tl.float32), axis))
    if SIGMOID:
        binary = t
        if GROUPS:
            binary = tl.where(same, -t, t)
        _write(known, 0, part, parts, at, size, tl.sum(tl.where(t != NOTHING, _softplus(binary), 0.0), axis))


@triton.jit
def _write_soft(known, part, parts, at, size, whole, taught, mask, axis: tl.constexpr):
    """The mean logit under the teacher's shares in this tile, and the log-sum-exp that weighs it among tiles."""
    taught = tl.where(mask, taught, NOTHING)
    top = tl.max(taught, axis)
    top = tl.where(top == NOTHING, 0.0, top)
    share = tl.exp2(taught - tl.expand_dims(top, axis))
    amount = tl.sum(share, axis)
    mean = tl.sum(tl.where(mask, share * whole, 0.0), axis) / tl.where(amount > 0, amount, 1.0)
    _write(known, 5, part, parts, at, size, mean)
    _write(known, 6, part, parts, at, size, top + tl.log2(amount))


@triton.jit
def _write_push(known, part, parts, at, size, t, axis: tl.constexpr):
    top = tl.max(t, axis)
    top = tl.where(top == NOTHING, 0.0, top)
    _write(known, 0, part, parts, at, size, top + tl.log2(tl.sum(tl.exp2(t - tl.expand_dims(top, axis)), axis)))


@triton.jit
def _write_push_at_once(known, part, parts, at, size, share, top, there, axis: tl.constexpr, THERE: tl.constexpr):
    """As `_write_push`, from exponentials that rows and columns have in common; 1 if one of the sums is lost."""
    amount = tl.sum(share, axis)
    _write(known, 0, part, parts, at, size, top + tl.log2(amount))
    lost = (at < size) & (amount < LOST)
    if THERE:  # an absent one has nothing to lose
        lost = lost & (tl.load(there + at, mask=at < size, other=0) != 0)
    return tl.max(lost.to(tl.int32))


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=VECTORS)
def forward_tile(
    x, y, taught_x, taught_y, stride_x, stride_y, stride_tx, stride_ty, scale, bias,
    positive, positive_y, groups_x, groups_y, ids_x, ids_y, there_x, there_y, known_row, known_column, known_start,
    of_rows, of_columns, pull, pull_y, flag, R, C, D, DT, diagonal,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, UP: tl.constexpr,
    COLUMNS: tl.constexpr, MIRROR: tl.constexpr, SELF: tl.constexpr, POSITIVE: tl.constexpr, POSITIVE_Y: tl.constexpr, GROUPS: tl.constexpr,
    IDS: tl.constexpr, THERE: tl.constexpr, KNOWN: tl.constexpr, TOTAL: tl.constexpr, SOFT: tl.constexpr, SIGMOID: tl.constexpr,
    REPAIR: tl.constexpr,
):  # fmt: skip
    """The share of one tile in what is known of its rows, (fields, tile columns, R), and of its columns, (fields, tile rows, C)."""
    pid = tl.program_id(0)
    nm, nn = tl.cdiv(R, BM), tl.cdiv(C, BN)
    pm, pn = place(pid, nm, nn, GROUP)
    row, column = pm * BM, pn * BN
    asked, beyond = True, True
    if REPAIR:
        asked = tl.load(flag + pid) != 0
    if MIRROR:  # x is y: what lies below the diagonal is told by the columns of what lies above it
        asked, beyond = asked & (column + BN > row), column >= row + BM
    if asked:
        products = product(x, y, stride_x, stride_y, row, column, R, C, D, BM, BN, BK, TMA, PRECISION, UP)
        rm, rn = row + tl.arange(0, BM), column + tl.arange(0, BN)
        if SIGMOID:
            whole = products * tl.load(scale) + tl.load(bias)
        else:
            whole = products * (tl.load(scale) * LOG2E)
        t = outside(whole, row, column, rm, rn, R, C, diagonal, there_x, there_y, BM, BN, SELF, THERE)
        source = whole
        if not (IDS or THERE or KNOWN or POSITIVE_Y or SOFT):
            source = t  # the positive is still in it, and one copy of the tile in registers is enough
        same, first, last = 0, 0, 0
        if GROUPS:
            same = agree(groups_x, groups_y, rm, rn, R, C) & (t != NOTHING)
        if KNOWN:
            first, last = tl.load(known_start + pm * nn + pn), tl.load(known_start + pm * nn + pn + 1)
        t = no_negatives(t, same, rm, rn, R, C, ids_x, ids_y, known_row, known_column, first, last, GROUPS, IDS, KNOWN)
        if POSITIVE:
            t = _take_out(t, source, positive, pull, rm, R, column, True, BN, 1)
        if POSITIVE_Y:
            t = _take_out(t, source, positive_y, pull_y, rn, C, row, beyond & COLUMNS, BM, 0)
        _write_sums(of_rows, pn, nn, rm, R, t, same, 1, GROUPS, TOTAL, SIGMOID)
        if SOFT:
            taught = product(taught_x, taught_y, stride_tx, stride_ty, row, column, R, C, DT, BM, BN, BK, TMA, PRECISION, UP)
            taught *= tl.load(scale) * LOG2E
            of_row = candidates(t, positive, rm, R, column, BN, 1, POSITIVE)
            _write_soft(of_rows, pn, nn, rm, R, whole, taught, of_row, 1)
        if COLUMNS:
            if beyond:
                _write_sums(of_columns, pm, nm, rn, C, t, same, 0, GROUPS, TOTAL, SIGMOID)
                if SOFT:
                    of_column = of_row
                    if POSITIVE_Y:
                        of_column = candidates(t, positive_y, rn, C, row, BM, 0, True)
                    _write_soft(of_columns, pm, nm, rn, C, whole, taught, of_column, 0)
        if REPAIR:
            _write_push(of_rows, pn, nn, rm, R, t, 1)
            if COLUMNS:
                if beyond:
                    _write_push(of_columns, pm, nm, rn, C, t, 0)
        elif not SIGMOID:  # one exponential serves row and column, shifted by the maximum of the tile
            top = tl.max(t)
            top = tl.where(top == NOTHING, 0.0, top)
            share = tl.exp2(t - top)
            bad = _write_push_at_once(of_rows, pn, nn, rm, R, share, top, there_x, 1, THERE)
            if COLUMNS:
                if beyond:
                    bad |= _write_push_at_once(of_columns, pm, nm, rn, C, share, top, there_y, 0, THERE)
            tl.store(flag + pid, bad)
