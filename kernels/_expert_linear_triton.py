"""Grouped matmuls of `expert_linear` in Triton: tiles of one expert each, whose rows are gathered as they are loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._padding import padded
from ._tiles import place


@triton.jit
def _locate(starts, tile, E, BM: tl.constexpr, SLOTS: tl.constexpr):
    """Expert of a row tile, and where in the sorted rows it begins and its expert ends; a tile beyond the last one is empty.

    Expert E stands for the rows without one. How many tiles each has is known on the device alone: the host launches as many as there may
    be at most.
    """
    slots = tl.arange(0, SLOTS)
    first = tl.load(starts + slots, mask=slots <= E, other=0).to(tl.int32)
    stop = tl.load(starts + slots + 1, mask=slots <= E, other=0).to(tl.int32)
    tiles = tl.cdiv(stop - first, BM)
    ends = tl.cumsum(tiles, 0)
    e = tl.sum((ends <= tile).to(tl.int32), 0)
    begin = tl.sum(tl.where(slots == e, first + (tile - ends + tiles) * BM, 0), 0)
    return e, begin, tl.sum(tl.where(slots == e, stop, 0), 0)


@triton.jit(do_not_specialize=["E", "row_tiles"])
def times_weights(
    x, weights, biases, y, order, starts, stride_x, stride_e, stride_n, stride_k, E, N, K, row_tiles,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, SLOTS: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """y[row, n] = sum over k of x[row, k] weights[expert of row, n, k]; the strides say which of the weights' sides is n."""
    row_tile, column_tile = place(tl.program_id(0), row_tiles, tl.cdiv(N, BN), GROUP)
    e, begin, stop = _locate(starts, row_tile, E, BM, SLOTS)
    at = begin + tl.arange(0, BM)
    rows = tl.load(order + at, mask=at < stop, other=0)
    rn = column_tile * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    own = weights + tl.minimum(e, E - 1).to(tl.int64) * stride_e
    x_at = x + rows[:, None] * stride_x + rk[None, :]
    w_at = own + rn.to(tl.int64)[None, :] * stride_n + rk[:, None] * stride_k
    steps = tl.where((e < E) & (begin < stop), K // BK, 0)  # no branch around the loop: it would not be pipelined
    total = tl.zeros((BM, BN), tl.float32)
    for _ in range(steps):
        a, b = tl.load(x_at), tl.load(w_at, mask=rn[None, :] < N, other=0)
        if UP:  # the interpreter multiplies bfloat16 as if it were integers
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        x_at += BK
        w_at += BK * stride_k
    if BIAS:
        total += tl.load(biases + e * N + rn, mask=(rn < N) & (e < E), other=0).to(tl.float32)[None, :]
    y_at = y + rows[:, None] * N + rn[None, :]
    tl.store(y_at, total.to(y.dtype.element_ty), mask=(at < stop)[:, None] & (rn < N)[None, :])


@triton.jit
def sum_over_rows(
    dy, x, dw, db, order, starts, stride_dy, stride_x, N, K,
    BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, GROUP: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """dw[e, n, k] = sum over the rows of e of dy[row, n] x[row, k]; one more column of tiles sums dy alone, for the biases."""
    e = tl.program_id(1)
    k_tiles = tl.cdiv(K, BK)
    n_tile, k_tile = place(tl.program_id(0), tl.cdiv(N, BN), k_tiles + BIAS, GROUP)
    first, stop = tl.load(starts + e).to(tl.int32), tl.load(starts + e + 1).to(tl.int32)
    rn, rk = n_tile * BN + tl.arange(0, BN), k_tile * BK + tl.arange(0, BK)
    if k_tile < k_tiles:
        total = tl.zeros((BN, BK), tl.float32)
        for begin in range(first, stop, BM):
            at = begin + tl.arange(0, BM)
            rows = tl.load(order + at, mask=at < stop, other=0)
            a = tl.load(dy + rows[None, :] * stride_dy + rn[:, None], mask=(at < stop)[None, :] & (rn < N)[:, None], other=0)
            b = tl.load(x + rows[:, None] * stride_x + rk[None, :], mask=(at < stop)[:, None] & (rk < K)[None, :], other=0)
            if UP:
                a, b = a.to(tl.float32), b.to(tl.float32)
            total = tl.dot(a, b, total, input_precision=PRECISION)
        dw_at = dw + e.to(tl.int64) * N * K + rn.to(tl.int64)[:, None] * K + rk[None, :]
        tl.store(dw_at, total.to(dw.dtype.element_ty), mask=(rn < N)[:, None] & (rk < K)[None, :])
    else:
        sums = tl.zeros((BN,), tl.float32)
        for begin in range(first, stop, BM):
            at = begin + tl.arange(0, BM)
            rows = tl.load(order + at, mask=at < stop, other=0)
            a = tl.load(dy + rows[:, None] * stride_dy + rn[None, :], mask=(at < stop)[:, None] & (rn < N)[None, :], other=0)
            sums += tl.sum(a.to(tl.float32), 0)
        tl.store(db + e * N + rn, sums.to(db.dtype.element_ty), mask=rn < N)


INTERPRETED = not isinstance(times_weights, triton.JITFunction)
SLOTS = 32  # for the experts and one more; room for more costs next to nothing, a power of its own for each number a compile
GROUP = 8  # row tiles that pass over the weights together, which then stay in the L2 cache
MULTIPLE = 16 if INTERPRETED else 64  # of the widths that the kernels see


class Tiles(NamedTuple):
    """Of rows, of the result's columns and of what is summed over; for the gradient of the weights the rows are what is summed over."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def _tiles(dtype: torch.dtype, precision: str) -> Tiles:
    if INTERPRETED:
        return Tiles(16, 32, 16, 4, 1)
    if dtype.itemsize == 2:
        return Tiles(128, 128, 64, 8, 3)
    return Tiles(128, 128, 32, 8, 3) if precision == "tf32" else Tiles(64, 64, 32, 8, 2)


def _precision(dtype: torch.dtype) -> str:
    """As torch's own matmuls; of no effect on halves."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def forward(x: Tensor, weights: Tensor, biases: Tensor | None, order: Tensor, starts: Tensor) -> Tensor:
    """(M, D_out) from x (M, D_in); order and starts as in `Routing`."""
    y = _times(padded(x, 1, MULTIPLE), padded(weights, 2, MULTIPLE), None if biases is None else padded(biases, 1, MULTIPLE), order, starts)
    return y[:, : weights.shape[1]].contiguous()


def backward(dy: Tensor, x: Tensor, weights: Tensor, order: Tensor, starts: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weights and biases; empty where not needed."""
    E, N, K = weights.shape
    dy, dx, dw, db = padded(dy, 1, MULTIPLE), x.new_empty(0), x.new_empty(0), x.new_empty(0)
    if needs[0]:
        dx = _times(dy, padded(weights, 2, MULTIPLE).transpose(1, 2), None, order, starts)[:, :K].contiguous()
    if needs[1] or needs[2]:
        dw, db = _sum(dy, padded(x, 1, MULTIPLE), order, starts, E, needs[2])
        dw, db = dw[:, :N, :K].contiguous(), db[:, :N].contiguous()
    return dx, dw, db


def _times(x: Tensor, weights: Tensor, biases: Tensor | None, order: Tensor, starts: Tensor) -> Tensor:
    M, (E, N, K) = len(x), weights.shape
    y = x.new_empty(M, N)
    if M == 0:
        return y
    precision = _precision(x.dtype)
    tiles = _tiles(x.dtype, precision)
    row_tiles = triton.cdiv(M, tiles.rows) + E  # each expert's last tile may be a short one
    times_weights[(row_tiles * triton.cdiv(N, tiles.columns),)](
        x, weights, biases, y, order, starts, x.stride(0), *weights.stride(), E, N, K, row_tiles,
        tiles.rows, tiles.columns, tiles.depth, GROUP, max(SLOTS, triton.next_power_of_2(E + 1)),
        biases is not None, precision, INTERPRETED, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return y


def _sum(dy: Tensor, x: Tensor, order: Tensor, starts: Tensor, E: int, bias: bool) -> tuple[Tensor, Tensor]:
    N, K = dy.shape[1], x.shape[1]
    dw, db = x.new_empty(E, N, K), x.new_empty(E, N if bias else 0)
    precision = _precision(x.dtype)
    tiles = _tiles(x.dtype, precision)
    columns = triton.cdiv(K, tiles.columns) + bias
    sum_over_rows[(triton.cdiv(N, tiles.rows) * columns, E)](
        dy, x, dw, db, order, starts, dy.stride(0), x.stride(0), N, K, tiles.rows, tiles.columns, tiles.depth, GROUP,
        bias, precision, INTERPRETED, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return dw, db


def compile_cases(capability: int, triton_version: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """Every configuration that a call may use; the same ones everywhere."""
    numbers = ("stride_x", "stride_e", "stride_n", "stride_k", "stride_dy", "N", "K")
    types = dict.fromkeys(numbers, "i32:16") | {"E": "i32", "row_tiles": "i32", "order": "*i64:16", "starts": "*i64:16"}
    for dtype, name, precision, dots in (
        (torch.bfloat16, "bf16", "ieee", "16"),
        (torch.float16, "fp16", "ieee", "16"),
        (torch.float32, "fp32", "tf32", "tf32"),
        (torch.float32, "fp32", "ieee", "ieee"),
    ):
        tiles = _tiles(dtype, precision)
        rows, columns, depth, *_ = tiles
        shared: dict[str, Any] = {"GROUP": GROUP, "PRECISION": precision, "UP": False}
        times = shared | {"BM": rows, "BN": columns, "BK": depth, "SLOTS": SLOTS}
        sums = shared | {"BN": rows, "BK": columns, "BM": depth}
        no_bias = {"biases": None, "BIAS": False}
        for kernel, what, fixed in (
            (times_weights, "forward with bias", times | {"stride_k": 1, "BIAS": True}),
            (times_weights, "forward", times | {"stride_k": 1} | no_bias),
            (times_weights, "gradient of x", times | {"stride_n": 1} | no_bias),
            (sum_over_rows, "with bias", sums | {"BIAS": True}),
            (sum_over_rows, "without bias", sums | {"BIAS": False}),
        ):
            yield {
                "kernel": kernel.__name__,
                "label": f"{what}, {name} {dots}",
                "signature": {a: "constexpr" if a in fixed else types.get(a, f"*{name}:16") for a in kernel.arg_names},
                "constexprs": {a: fixed[a] for a in kernel.arg_names if a in fixed},
                "num_warps": tiles.warps,
                "num_stages": tiles.stages,
                "maxnreg": None,
                "dots": dots,
            }
