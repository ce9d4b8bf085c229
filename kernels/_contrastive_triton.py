"""The contrastive statistics by Triton kernels: each tile of logits lives in registers, and its gradient in a bounded buffer."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _configurations as configurations
from ._blocks import Gradient, Side, Teacher
from ._configurations import Configuration, Key
from ._contrastive_forward import forward_tile
from ._contrastive_gradient import gradient_tile
from ._padding import padded
from ._pairs import COUNT, FIELDS, HITS, PULL, PUSH, SOFT, SOFT_LSE, TOTAL, Pairs

INTERPRETED = not isinstance(forward_tile, triton.JITFunction)
_BUFFER = 2**29  # bytes of logits' gradients at a time
_LN2 = math.log(2)
_VERSION = (int(triton.__version__.split(".")[0]), int(triton.__version__.split(".")[1]))


class Tiled:
    """Macro-blocks as large as the buffer of gradients allows, each one launch.

    Args:
        scale: () factor of the inner products, float32.
        bias: () summand, for the sigmoid form.
        form: "softmax" or "sigmoid".
        total: Whether sums of logits are asked for.
        weight: As in `configurations.Key`.
        one_side: Whether x meets itself, so that there are blocks on the diagonal.
        precision: How float32 products are formed: "ieee", "tf32" or "3xtf32".
        operand: Type of the operands.
        D: Their width.
    """

    accumulate = torch.float32
    gives_scale = True

    def __init__(
        self,
        scale: Tensor,
        bias: Tensor | None,
        form: str,
        total: bool,
        weight: str,
        one_side: bool,
        precision: str,
        operand: torch.dtype,
        D: int,
    ) -> None:
        self.scale, self.form, self.total, self.operand = scale.clone(), form, total, operand  # a clone is aligned
        self.bias = torch.zeros_like(self.scale) if bias is None else bias.clone()
        self.precision = {"3xtf32": "tf32x3"}.get(precision, precision) if operand == torch.float32 else "ieee"  # as Triton names them
        products = precision if operand == torch.float32 else "half"
        key = Key(_capability(scale.device), _VERSION, products, weight)
        self.tiles = self.mirrored = configurations.find(key)
        if one_side and weight == "plain":  # blocks on the diagonal are few, and need more registers
            self.mirrored = configurations.find(key._replace(weight="masked"))
        self.rows, self.columns = _macro_block(D, operand.itemsize)
        self.forward_block = _forward_block(self.tiles.forward, FIELDS if weight == "full" else 1)
        self._memory = scale.new_empty(0, dtype=operand)

    def prepare(self, x: Tensor) -> Tensor:
        """Rows as the kernels load them: aligned, and as wide as whole steps of a tile where no descriptor pads."""
        return padded(x, 1, max(16 if c.tma else c.depth for c in (*self.tiles, *self.mirrored)))

    def relate(self, pairs: Pairs) -> Pairs:
        return pairs.ranked()

    def tell(self, side: Side) -> Side:
        """Log-sum-exps in units of log 2."""
        known = side.known.clone()
        for field in (PUSH, SOFT_LSE):
            known[field] = _or_infinite(known[field]) / _LN2
        return Side(known, side.upstream)

    def forward(self, x: Tensor, y: Tensor, teacher: Teacher, pairs: Pairs, columns: bool, mirror: bool) -> tuple[Tensor, Tensor | None]:
        tile = (self.mirrored if mirror else self.tiles).forward
        R, C = len(x), len(y)
        nm, nn = triton.cdiv(R, tile.rows), triton.cdiv(C, tile.columns)
        told = bool(columns or mirror)
        asked = _fields(pairs, teacher, self.total)
        of_rows, of_columns = (_unwritten(x, self.form, asked, parts, n) for parts, n in ((nn, R), (nm if told else 0, C)))
        pull = x.new_zeros(R, dtype=torch.float32)
        pull_y = pull if mirror else x.new_zeros(C, dtype=torch.float32)
        flag = x.new_zeros(nm * nn, dtype=torch.int32)
        relations, switches = self._relations(pairs, tile, R, C)
        operands = self._operands(x, y, teacher, tile)
        switches |= self._switches(tile, teacher, told, mirror)
        sizes = (R, C, x.shape[1], 0 if teacher is None else teacher[0].shape[1], pairs.diagonal or 0)
        for repair in (False,) if self.form == "sigmoid" else (False, True):
            forward_tile[(nm * nn,)](
                *operands, *relations, of_rows, of_columns, pull, pull_y, flag, *sizes, **switches, REPAIR=repair, **_launch(tile)
            )
        indexed = pairs.groups_x is None
        if mirror:
            of_rows = torch.cat([of_rows, of_columns], dim=1)
        known = self._whole(of_rows, pull if indexed else None)
        return known, self._whole(of_columns, pull_y if indexed else None) if columns else None

    def backward(
        self, x: Tensor, y: Tensor, teacher: Teacher, pairs: Pairs, rows: Side, columns: Side | None, mirror: bool, bias: bool
    ) -> Gradient:
        tile = (self.mirrored if mirror else self.tiles).gradient
        R, C = len(x), len(y)
        tiles = triton.cdiv(R, tile.rows) * triton.cdiv(C, tile.columns)
        gradient = self._buffer(R, C)
        width = tile.columns // tile.split
        target = TensorDescriptor.from_tensor(gradient, [tile.rows, width]) if tile.tma else gradient
        of_scale = x.new_zeros(tiles, dtype=torch.float32)
        of_bias = torch.zeros_like(of_scale) if bias else None
        relations, switches = self._relations(pairs, tile, R, C)
        operands = self._operands(x, y, teacher, tile)
        switches |= self._switches(tile, teacher, columns is not None, mirror)
        sizes = (R, C, x.shape[1], 0 if teacher is None else teacher[0].shape[1], pairs.diagonal or 0)
        told = (_told(rows), None if columns is None else _told(columns))
        gradient_tile[(tiles,)](
            *operands, *relations, *told, target, gradient, gradient.stride(0), of_scale, of_bias, *sizes,
            **switches, BIAS=bias, SPLIT=tile.split, **_launch(tile),
        )  # fmt: skip
        return Gradient(gradient[:, :C], of_scale.sum(), None if of_bias is None else of_bias.sum())

    def _buffer(self, R: int, C: int) -> Tensor:
        """(R, C, padded to 16 bytes) of the memory that all blocks share."""
        width = C + -C % (16 // self.operand.itemsize)
        if self._memory.numel() < R * width:
            self._memory = self._memory.new_empty(R * width)
        return self._memory[: R * width].view(R, width)

    def _operands(self, x: Tensor, y: Tensor, teacher: Teacher, tile: Configuration) -> tuple[Any, ...]:
        loaded: list[Any] = [x, y, *(teacher or (None, None))]
        if not tile.tma:
            return *loaded, *(0 if t is None else t.stride(0) for t in loaded), self.scale, self.bias
        heights = (tile.rows, tile.columns) * 2
        blocks = (None if t is None else TensorDescriptor.from_tensor(t, [h, tile.depth]) for t, h in zip(loaded, heights, strict=True))
        return *blocks, 0, 0, 0, 0, self.scale, self.bias

    def _relations(self, pairs: Pairs, tile: Configuration, R: int, C: int) -> tuple[tuple[Tensor | None, ...], dict[str, bool]]:
        """The kernels' arguments from ``positive`` to ``known_start``, and which of them there are."""
        there_x, there_y = pairs.there_x, pairs.there_y
        if there_x is None and there_y is not None:
            there_x = torch.ones(R, dtype=torch.bool, device=there_y.device)
        if there_y is None and there_x is not None:
            there_y = torch.ones(C, dtype=torch.bool, device=there_x.device)
        known = (None, None, None) if pairs.known is None else _by_tile(pairs.known, tile, R, C)
        arguments = (
            _inside(pairs.positive, C), _inside(pairs.positive_y, R), pairs.groups_x, pairs.groups_y, pairs.ids_x, pairs.ids_y,
            there_x, there_y, *known,
        )  # fmt: skip
        touched = pairs.diagonal is not None and -R < pairs.diagonal < C
        named = ("POSITIVE", "POSITIVE_Y", "GROUPS", "", "IDS", "", "THERE", "", "KNOWN")
        arguments = tuple(None if value is None else value.contiguous() for value in arguments)
        present = {name: value is not None for name, value in zip(named, arguments, strict=False) if name}
        return arguments, present | {"SELF": touched}

    def _switches(self, tile: Configuration, teacher: Teacher, columns: bool, mirror: bool) -> dict[str, Any]:
        sizes = {"BM": tile.rows, "BN": tile.columns, "BK": tile.depth, "GROUP": tile.group, "TMA": tile.tma}
        asked = {"COLUMNS": columns, "MIRROR": mirror, "TOTAL": self.total, "SOFT": teacher is not None, "SIGMOID": self.form == "sigmoid"}
        return {**sizes, **asked, "PRECISION": self.precision, "UP": INTERPRETED}

    def _whole(self, parts: Tensor, pull: Tensor | None) -> Tensor:
        """(fields, parts, n) from the tiles to (7, n)."""
        natural = _LN2 if self.form == "softmax" else 1.0
        known = parts.new_zeros(FIELDS, parts.shape[2])
        known[PUSH] = (parts[PUSH] * _LN2).logsumexp(0) if self.form == "softmax" else parts[PUSH].sum(0)
        known[SOFT_LSE] = -torch.inf
        if len(parts) > 1:
            known[PULL], known[TOTAL] = parts[PULL].sum(0) * natural, parts[TOTAL].sum(0) * natural
            known[COUNT], known[HITS] = parts[COUNT].sum(0), parts[HITS].sum(0)
            known[SOFT_LSE] = (parts[SOFT_LSE] * _LN2).logsumexp(0)
            share = (parts[SOFT_LSE] * _LN2 - known[SOFT_LSE]).exp().nan_to_num(nan=0.0)
            known[SOFT] = (parts[SOFT] * share).sum(0) * natural
        if pull is not None:
            known[PULL] = pull * natural
        return known


def _capability(device: torch.device) -> int:
    if INTERPRETED:
        return configurations.INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    return min(10 * major + minor, 109) if major < 12 else 80  # later chips have other instructions than those of sm_100


def _macro_block(D: int, itemsize: int) -> tuple[int, int]:
    """Rows and columns at a time: rows that fill whole waves of a large device in the products with D columns, as many columns as fit."""
    rows = min(max(1024, 132 * 128 * 256 // max(D, 1) // 1024 * 1024), 16384)
    columns = _BUFFER // itemsize // rows // 1024 * 1024
    return rows, max(columns, 1024)


def _forward_block(tile: Configuration, fields: int) -> tuple[int, int]:
    """Rows and columns at a time on the way forward, where nothing is kept but the tiles' sums: as many as these leave room for."""
    logits = _BUFFER // 2 // (4 * fields) * tile.rows * tile.columns // (tile.rows + tile.columns)
    side = max(math.isqrt(logits) // 1024 * 1024, 1024)
    return side, side


def _fields(pairs: Pairs, teacher: Teacher, total: bool) -> int:
    return FIELDS if total or teacher is not None or pairs.groups_x is not None else 1


def _unwritten(like: Tensor, form: str, fields: int, parts: int, n: int) -> Tensor:
    """What a tile that is never visited leaves: nothing to a log-sum-exp, 0 to a sum."""
    told = like.new_zeros(fields, parts, n, dtype=torch.float32)
    if form == "softmax":
        told[PUSH] = -torch.inf
    if fields > 1:
        told[SOFT_LSE] = -torch.inf
    return told


def _inside(index: Tensor | None, size: int) -> Tensor | None:
    return None if index is None else torch.where((index >= 0) & (index < size), index, -1).to(torch.int32)


def _told(side: Side) -> Tensor:
    """(6, n) as the gradient kernel reads it."""
    known, upstream = side
    return torch.stack([known[PUSH], upstream[PUSH], upstream[PULL], upstream[TOTAL], upstream[SOFT], known[SOFT_LSE]])


def _or_infinite(lse: Tensor) -> Tensor:
    """+inf where a log-sum-exp runs over nothing: then no share of it is anything but 0."""
    return torch.where(lse < torch.finfo(lse.dtype).min / 8, torch.inf, lse)


def _by_tile(known: Tensor, tile: Configuration, R: int, C: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and columns of the pairs, sorted by the tile they lie in, and where each tile's begin; without waiting for the device."""
    nm, nn = triton.cdiv(R, tile.rows), triton.cdiv(C, tile.columns)
    row, column = known.unbind(1)
    inside = (row >= 0) & (row < R) & (column >= 0) & (column < C)
    lies = torch.where(inside, row // tile.rows * nn + column // tile.columns, nm * nn)
    lies, order = lies.sort(stable=True)
    start = torch.searchsorted(lies, torch.arange(nm * nn + 1, device=known.device))
    row, column = known[order].to(torch.int32).unbind(1)
    return row.contiguous(), column.contiguous(), start.to(torch.int32)


def _launch(tile: Configuration) -> dict[str, int]:
    limit = {} if tile.registers is None else {"maxnreg": tile.registers}
    return {"num_warps": tile.warps, "num_stages": tile.stages, **limit}
