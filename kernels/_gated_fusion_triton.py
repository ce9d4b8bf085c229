"""The Triton kernels of `gated_fusion`: gate and mix of one tile, and the elementwise half of the backward."""

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
def _add_product(total, x, weight, rows, columns, stride_x, stride_weight, D, BK: tl.constexpr, PRECISION: tl.constexpr, UP: tl.constexpr):
    depth = tl.arange(0, BK)
    x_at = x + rows[:, None] * stride_x + depth[None, :]
    weight_at = weight + columns[None, :] * stride_weight + depth[:, None]
    for _ in range(D // BK):
        left, right = tl.load(x_at).to(weight.dtype.element_ty), tl.load(weight_at)
        if UP:  # the interpreter multiplies bfloat16 as if it were integers
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        x_at += BK
        weight_at += BK
    return total


@triton.jit(do_not_specialize=["M"])
def mix_tile(
    a, b, weight_a, weight_b, bias, y, gate, stride_a, stride_b, stride_wa, stride_wb, M, D,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    KEEP: tl.constexpr, PRECISION: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Gate and mix of BM rows and BN features; D is a multiple of BK."""
    row_tile, column_tile = place(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(D, BN), GROUP)
    rm, rn = row_tile * BM + tl.arange(0, BM), column_tile * BN + tl.arange(0, BN)
    rows, columns = tl.minimum(rm, M - 1).to(tl.int64), tl.minimum(rn, D - 1).to(tl.int64)  # read twice rather than masked
    total = tl.zeros((BM, BN), tl.float32)
    total = _add_product(total, a, weight_a, rows, columns, stride_a, stride_wa, D, BK, PRECISION, UP)
    total = _add_product(total, b, weight_b, rows, columns, stride_b, stride_wb, D, BK, PRECISION, UP)
    total += tl.load(bias + columns).to(tl.float32)[None, :]
    inside = (rm < M)[:, None] & (rn < D)[None, :]
    of_a = tl.load(a + rows[:, None] * stride_a + rn[None, :], mask=inside, other=0).to(tl.float32)
    of_b = tl.load(b + rows[:, None] * stride_b + rn[None, :], mask=inside, other=0).to(tl.float32)
    z = tl.sigmoid(total)
    mixed = z * of_a + (1 - z) * of_b
    at = rows[:, None] * D + rn[None, :]
    tl.store(y + at, mixed.to(y.dtype.element_ty), mask=inside)
    if KEEP:
        tl.store(gate + at, total.to(gate.dtype.element_ty), mask=inside)


@triton.jit
def mix_gradient(dy, gate, a, b, d_gate, da, db, count, BLOCK: tl.constexpr):
    """Element by element: the gradient of the gate's logit, and those of a and b by way of the mix alone."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    upstream = tl.load(dy + at, mask=inside, other=0).to(tl.float32)
    logit = tl.load(gate + at, mask=inside, other=0).to(tl.float32)
    difference = tl.load(a + at, mask=inside, other=0).to(tl.float32) - tl.load(b + at, mask=inside, other=0).to(tl.float32)
    z, rest = tl.sigmoid(logit), tl.sigmoid(-logit)  # 1 - z would lose a gate that is nearly open
    tl.store(d_gate + at, (upstream * difference * z * rest).to(d_gate.dtype.element_ty), mask=inside)
    tl.store(da + at, (upstream * z).to(da.dtype.element_ty), mask=inside)
    tl.store(db + at, (upstream * rest).to(db.dtype.element_ty), mask=inside)


INTERPRETED = not isinstance(mix_tile, triton.JITFunction)
GROUP = 8  # row tiles that pass over the weight together, which then stays in the L2 cache
MULTIPLE = 16 if INTERPRETED else 64  # of the width that `mix_tile` sees
BLOCK = 1024


class Tiles(NamedTuple):
    """Of rows, of features, and of what is summed over."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def _tiles(dtype: torch.dtype, of_weight: torch.dtype, precision: str) -> Tiles:
    if INTERPRETED:
        return Tiles(16, 32, 16, 4, 1)
    if of_weight.itemsize == 4 and precision == "ieee":
        return Tiles(64, 64, 32, 8, 2)
    return Tiles(128, 64, 64 if dtype.itemsize == 2 else 32, 8, 3)  # twice as wide, logits, a and b together spill


def forward(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
    """The mix (M, D) of a and b (M, D), and the logit of the gate (M, D), empty unless it is to be kept."""
    M, D = a.shape
    if a.numel() == 0:
        return torch.empty_like(a), weight.new_empty(a.shape if keep else (0,))
    a, b = padded(a, 1, MULTIPLE), padded(b, 1, MULTIPLE)
    weight_a, weight_b = (padded(half, 2, MULTIPLE) for half in weight.split(D, 1))
    width = a.shape[1]
    bias = weight.new_zeros(width) if bias is None else padded(bias, 1, MULTIPLE)
    y, gate = a.new_empty(M, width), weight.new_empty((M, width) if keep else (0,))
    tf32 = weight.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    precision = "tf32" if tf32 else "ieee"
    tiles = _tiles(a.dtype, weight.dtype, precision)
    mix_tile[(triton.cdiv(M, tiles.rows) * triton.cdiv(width, tiles.columns),)](
        a, b, weight_a, weight_b, bias, y, gate, a.stride(0), b.stride(0), weight_a.stride(0), weight_b.stride(0), M, width,
        tiles.rows, tiles.columns, tiles.depth, GROUP, keep, precision, INTERPRETED,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return y[:, :D].contiguous(), gate[:, :D].contiguous() if keep else gate


def backward(dy: Tensor, gate: Tensor, a: Tensor, b: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of a, b, weight and bias; the last two empty where not needed, the first two then without the gate's share."""
    D, a, b = a.shape[1], a.contiguous(), b.contiguous()
    d_gate, da, db = torch.empty_like(gate), torch.empty_like(dy), torch.empty_like(dy)
    if dy.numel():
        mix_gradient[(triton.cdiv(dy.numel(), BLOCK),)](dy, gate, a, b, d_gate, da, db, dy.numel(), BLOCK, num_warps=4)
    for needed, gradient, half in zip(needs, (da, db), weight.split(D, 1), strict=False):
        if needed:
            _accumulate(gradient, d_gate, half)
    dw, d_bias = weight.new_empty(0), weight.new_empty(0)
    if needs[2]:
        dw = weight.new_empty(D, 2 * D)
        for x, half in zip((a, b), dw.split(D, 1), strict=True):
            torch.mm(d_gate.T, x.to(d_gate.dtype), out=half)
    if needs[3]:
        d_bias = d_gate.sum(0)
    return da, db, dw, d_bias


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:  # autocast: the product is one of halves
        total.add_(left @ right)


def compile_cases(capability: int, triton_version: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """Every configuration that a call may use; the same ones everywhere."""
    bf16, fp16, fp32 = (torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")
    for (dtype, name), (of_weight, name_of_weight), precision, dots in (
        (bf16, bf16, "ieee", "16"),
        (fp16, fp16, "ieee", "16"),
        (fp32, bf16, "ieee", "16"),  # autocast
        (fp32, fp16, "ieee", "16"),
        (fp32, fp32, "tf32", "tf32"),
        (fp32, fp32, "ieee", "ieee"),
    ):
        tiles, about = _tiles(dtype, of_weight, precision), f"{name} with {name_of_weight} {dots}"
        like_a, like_weight, number = f"*{name}:16", f"*{name_of_weight}:16", "i32:16"
        types = dict.fromkeys(("a", "b", "y"), like_a) | dict.fromkeys(("weight_a", "weight_b", "bias", "gate"), like_weight)
        types |= dict.fromkeys(("stride_a", "stride_b", "stride_wa", "stride_wb", "D"), number) | {"M": "i32"}
        fixed = {"BM": tiles.rows, "BN": tiles.columns, "BK": tiles.depth, "GROUP": GROUP, "PRECISION": precision, "UP": False}
        for keep in (True, False):
            label = f"{about}, {'kept' if keep else 'not kept'}"
            yield _case(mix_tile, label, types, fixed | {"KEEP": keep}, tiles.warps, tiles.stages, dots)
        types = dict.fromkeys(("dy", "a", "b", "da", "db"), like_a) | dict.fromkeys(("gate", "d_gate"), like_weight) | {"count": number}
        if precision == "ieee":
            yield _case(mix_gradient, f"{name} with {name_of_weight}", types, {"BLOCK": BLOCK}, 4, 3, "none")


def _case(kernel: Any, label: str, types: dict[str, str], fixed: dict[str, Any], warps: int, stages: int, dots: str) -> dict[str, Any]:
    return {
        "kernel": kernel.__name__,
        "label": label,
        "signature": {a: "constexpr" if a in fixed else types[a] for a in kernel.arg_names},
        "constexprs": {a: fixed[a] for a in kernel.arg_names if a in fixed},
        "num_warps": warps,
        "num_stages": stages,
        "maxnreg": None,
        "dots": dots,
    }
