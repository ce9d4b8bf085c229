"""A stack of routed blocks: text encoders, fusion encoders and decoders are one class, which differ in how it is called."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.attention import Attend, Sight, sight
from zoo.block import Block, Expert, KeysValues, Past, Runs, Shape, expert_of, routed
from zoo.errors import ZooError

__all__ = ["Attend", "Block", "Cache", "Shape", "Trunk"]
Banks = Mapping[str, Sequence[str]]
Route = str | Sequence[tuple[str, int]]


class Cache(NamedTuple):
    """What a trunk keeps between calls, so that a sequence can grow at the cost of its new places alone. ``Cache()`` holds nothing."""

    blocks: tuple[Past, ...] = ()
    mask: Tensor | None = None  # (B, N) bool, which of the places so far are real; None: all
    memory_mask: Tensor | None = None  # (B, M) bool

    @property
    def length(self) -> int:
        """How many places it holds."""
        return int(self.blocks[0].own[0].shape[2]) if self.blocks and self.blocks[0].own is not None else 0

    def rows(self, index: Tensor) -> Cache:
        """The same for the rows ``index`` (B',) int64, in that order; a row may come often, as in beam search."""
        blocks = tuple(Past(_take(past.own, index), _take(past.memory, index)) for past in self.blocks)
        mask, memory_mask = (None if m is None else m[index] for m in (self.mask, self.memory_mask))
        return Cache(blocks, mask, memory_mask)

    def upto(self, length: int) -> Cache:
        """Only the first ``length`` places, as if the later ones had never been."""
        blocks = tuple(Past(None if p.own is None else (p.own[0][:, :, :length], p.own[1][:, :, :length]), p.memory) for p in self.blocks)
        return Cache(blocks, None if self.mask is None else self.mask[:, :length], self.memory_mask)


def _take(kept: KeysValues | None, index: Tensor) -> KeysValues | None:
    return None if kept is None else (kept[0][index], kept[1][index])


class Trunk(nn.Module):
    """Blocks one after the other.

    Parameters are ``blocks.<i>.`` and what `Block` says, ``blocks.3.qkv.text.weight``, and ``norm.`` of the final norm, ``norm.<expert>.``
    where that is a bank. ALBEF's text model is the first half without a memory, its fusion the second half with one; BLIP's encoder and
    decoder are one trunk whose ``norm1``, ``qkv`` and ``out`` are banks of ``encode`` and ``decode``; VLMo's experts stand in ``norm2`` and
    ``ffn`` (Bao et al., 2021, https://arxiv.org/abs/2111.02358), BEiT-3's in all sub-layers (Wang et al., 2022,
    https://arxiv.org/abs/2208.10442).

    Args:
        shape: Of every block.
        layers: How many blocks.
        cross_layers: The blocks that have cross-attention, counted from 0.
        banks: {sub-layer: its experts}, for all blocks or, by block number, for each; ``norm`` is the final norm's, and is looked up
            under the number ``layers``. Sub-layers: `zoo.block.BANKED`.
        experts: (kind of tokens, block number, fused) to the expert that serves them, a plug-in of the joint ``trunk``; None: the
            kind's own.
        final_norm: A norm after the last block, used by a call that runs it.

    Raises:
        ZooError: As of `Block`, and for cross layers that are not there.
    """

    def __init__(
        self,
        shape: Shape,
        layers: int,
        *,
        cross_layers: Collection[int] = (),
        banks: Banks | Callable[[int], Banks] | None = None,
        experts: Callable[[str, int, bool], Expert] | None = None,
        final_norm: bool = False,
    ) -> None:
        super().__init__()
        if wrong := sorted(i for i in cross_layers if not 0 <= i < layers):
            raise ZooError(f"cross-attention in block {wrong[0]}: there are {layers}, 0 to {layers - 1}")
        named = [dict(banks(i) if callable(banks) else banks or {}) for i in range(layers + 1)]
        final = tuple(named[-1].get("norm", ()))
        for bank in named:
            bank.pop("norm", None)
        drops = [shape.drop_path * i / max(layers - 1, 1) for i in range(layers)]
        self.blocks = nn.ModuleList(Block(shape._replace(drop_path=drops[i]), named[i], cross=i in cross_layers) for i in range(layers))
        self.norm: nn.Module | None = None
        if final_norm:
            self.norm = (
                nn.ModuleDict({e: nn.LayerNorm(shape.dim, shape.eps) for e in final}) if final else nn.LayerNorm(shape.dim, shape.eps)
            )
        self.shape, self.layers, self.experts = shape, layers, experts
        self._checkpointed = False
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=shape.init)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        route: Route = "",
        fused: bool = False,
        attend: Attend = "all",
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        layers: slice | None = None,
        cache: Cache | None = None,
        bias: Tensor | Sequence[Tensor] | None = None,
        normed: bool = True,
    ) -> Tensor | tuple[Tensor, Cache]:
        """Tokens through some or all of the blocks.

        Args:
            x: (B, N, D).
            mask: (B, N) bool, True at real tokens; or (B, N, K), which of all K keys each place may see; None: all. A place that
                sees nothing reads zeros.
            route: The kind of all tokens, or of stretches of them in order, ``[("image", 197), ("text", 40)]``; read where there are banks.
            fused: Whether these are tokens that several modalities enter, in one sequence or by a memory: ``experts`` hears it.
            attend: ``all``, ``causal``, or the length of a prefix that all see, the rest being causal.
            memory: (B, M, memory_dim), what blocks with cross-attention read; None: they leave it out.
            memory_mask: (B, M) bool; None: all real.
            layers: The blocks to run; None: all. The final norm comes after the last block alone.
            cache: None, or what an earlier call kept; then x, its mask and route are of the new tokens alone, ``memory`` is not looked at
                again, and the result comes with the new cache. ``Cache()`` begins one.
            bias: (heads, N, K) or (B, heads, N, K) float, added to the scores of self-attention, K being N and what the cache holds; or a
                list of such, one for each block of the trunk.
            normed: Whether the final norm, if there is one, comes after the last block.

        Returns:
            (B, N, D); with a cache, a pair of it and the new cache.

        Raises:
            ZooError: If the route is not as long as x, or names an expert that is not there.
        """
        numbers = range(self.layers)[layers or slice(None)]
        kept = cache or Cache()
        assert len(kept.blocks) in (0, len(numbers)), f"a cache of {len(kept.blocks)} blocks, {len(numbers)} to run"
        reads = any(self.blocks[number].cross is not None for number in numbers)
        assert memory is None or reads, f"none of the blocks {', '.join(map(str, numbers))} reads a memory"
        length, past = x.shape[1], kept.length
        real = mask if mask is not None and mask.ndim == 3 else _joined(kept.mask, mask, x.shape[0], past, length, x.device)
        see = partial(sight, attend, length, past, real, device=x.device)
        same = None if isinstance(bias, Sequence) else see(bias=bias)
        of_memory = kept.memory_mask if any(of.memory is not None for of in kept.blocks) else memory_mask
        memory_seen = sight("all", length, 0, of_memory, None, x.device)
        keeps = []
        for place, number in enumerate(numbers):
            runs, before = self._runs(route, number, length, fused), kept.blocks[place] if kept.blocks else None
            seen = partial(see, bias=bias[number]) if isinstance(bias, Sequence) else same
            x, after = self._run(self.blocks[number], x, runs, seen, memory, memory_seen, before)
            if cache is not None:
                keeps.append(after)
        if normed and self.norm is not None and self.layers - 1 in numbers:
            runs = self._runs(route, self.layers, length, fused)
            x = routed(self.norm, x, [(expert_of(expert, "norm"), n) for expert, n in runs])
        if cache is None:
            return x  # (B, N, D)
        return x, Cache(tuple(keeps), None if mask is not None and mask.ndim == 3 else real, of_memory)

    def checkpoint_gradients(self) -> None:
        """Keep only the input of each block for the backward pass and compute the rest again: less memory, a third more time."""
        self._checkpointed = True

    def _run(self, block: nn.Module, *given: Any) -> tuple[Tensor, Past]:
        if self._checkpointed and self.training and torch.is_grad_enabled():
            return checkpoint(_through, block, *given, use_reentrant=False)
        return _through(block, *given)

    def _runs(self, route: Route, number: int, length: int, fused: bool) -> Runs:
        """The experts of block ``number`` for stretches of ``length`` tokens; neighbours of one expert are one stretch."""
        stretches = [(route, length)] if isinstance(route, str) else [(kind, n) for kind, n in route if n]
        if sum(n for _, n in stretches) != length:
            raise ZooError(f"the route {list(route)} is of {sum(n for _, n in stretches)} tokens, given are {length}")
        runs: list[tuple[Expert, int]] = []
        for kind, n in stretches:
            expert = kind if self.experts is None else self.experts(kind, number, fused)
            if runs and runs[-1][0] == expert:
                runs[-1] = (expert, runs[-1][1] + n)
            else:
                runs.append((expert, n))
        self._check(number, runs)
        return runs

    def _check(self, number: int, runs: Runs) -> None:
        block, final = self.blocks[number] if number < self.layers else None, self.norm
        banks = block.banks if isinstance(block, Block) else {"norm": tuple(final)} if isinstance(final, nn.ModuleDict) else {}
        for name, experts in banks.items():
            if wrong := [at for expert, _ in runs if (at := expert_of(expert, name)) not in experts]:
                where = f"block {number}" if number < self.layers else "the end"
                raise ZooError(f"{name} of {where} has no expert {wrong[0]!r}: route tokens to {', '.join(experts)}")


def _through(block: nn.Module, x: Tensor, runs: Runs, seen: Sight | Callable[[], Sight], *rest: Any) -> tuple[Tensor, Past]:
    """One block; what a bias of its own makes of who sees whom, (B, heads, N, K), is made here, and is gone with the block."""
    found: tuple[Tensor, Past] = block(x, runs, seen if isinstance(seen, Sight) else seen(), *rest)
    return found


def _joined(before: Tensor | None, mask: Tensor | None, rows: int, past: int, length: int, device: torch.device) -> Tensor | None:
    """The masks (B, past) and (B, length), either of which may be None for all real, as one."""
    if before is None and mask is None:
        return None
    old = torch.ones(rows, past, dtype=torch.bool, device=device) if before is None else before
    new = torch.ones(rows, length, dtype=torch.bool, device=device) if mask is None else mask
    return torch.cat([old, new], 1)
