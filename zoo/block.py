"""One transformer block, each of whose sub-layers may exist once per modality or per mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.attention import Sight, attention, heads_apart
from zoo.errors import ZooError, unknown
from zoo.kernels.expert_linear import expert_linear

BANKED = ("norm1", "qkv", "inner_norm", "out", "norm2", "ffn")
Expert = str | Mapping[str, str]  # of all banks, or {sub-layer: expert} where banks are told apart by different things
Runs = Sequence[tuple[Expert, int]]  # stretches of a sequence: the expert of each, and its length
KeysValues = tuple[Tensor, Tensor]  # (B, heads, K, d) each


class Shape(NamedTuple):
    """What a block is like; the same for all blocks of a trunk.

    The defaults are a block of ViT. BERT, ALBEF and BLIP: ``norm="post", eps=1e-12``. CLIP's text: ``eps=1e-5``, and for OpenAI's weights
    ``activation="quick_gelu"``. open_clip's CoCa decoder: ``eps=1e-5, memory_norm=True, cross_ffn=True``. VLMo: ``bias="qv",
    layer_scale=0.1``. BEiT-3: ``eps=1e-5, inner_norm=True``.
    """

    dim: int  # width D
    heads: int  # they divide it
    hidden: int | None = None  # inside the feed-forward; None: four times the width
    norm: Literal["pre", "post"] = "pre"  # x + f(norm(x)), or norm(x + f(x))
    eps: float = 1e-6  # of the norms
    activation: Literal["gelu", "quick_gelu"] = "gelu"  # exact, or x * sigmoid(1.702 x)
    bias: Literal["all", "qv", "none"] = "all"  # which of query, key and value have one; qv has none for keys
    inner_norm: bool = False  # Magneto's, one on what attention read, one inside the feed-forward
    layer_scale: float | None = None  # where the factors of what each sub-layer adds begin; None: there are none
    memory_dim: int | None = None  # width of what cross-attention reads; None: D
    memory_norm: bool = False  # a norm on what cross-attention reads
    cross_ffn: bool = False  # cross-attention comes after the feed-forward, and has one of its own; else before it, and has none
    dropout: float = 0.0  # of what each sub-layer adds
    attention_dropout: float = 0.0  # of the weights of attention
    drop_path: float = 0.0  # how often a row goes without what a sub-layer adds; of a trunk: in its last block, rising from 0 in its first
    init: float = 0.02  # standard deviation of the first weights; 1 / sqrt(D) for a narrow post-norm block trained from nothing


class Past(NamedTuple):
    """What one block keeps: keys and values of its own sequence, and of what cross-attention reads."""

    own: KeysValues | None = None
    memory: KeysValues | None = None


class Block(nn.Module):
    """Self-attention, perhaps cross-attention, feed-forward; pre- or post-norm.

    Parameters are named plainly; a bank has one more step, the expert's name (``norm1.weight``, ``norm1.text.weight``)::

        norm1, norm2                  of attention and of the feed-forward
        qkv                           weight (3 D, D) and bias: queries, keys, values; with bias="qv" the biases are q_bias and v_bias
        inner_norm, out               on what the heads read
        ffn.fc1, .inner_norm, .fc2    feed-forward
        scale1, scale2                LayerScale, (D,) without a step below
        cross.norm, .memory_norm      of cross-attention, and of what it reads
        cross.q, .kv                  queries (D, D); keys, values (2 D, memory_dim)
        cross.out, .scale             as above
        cross.ffn_norm, .ffn, .ffn_scale    with cross_ffn

    Args:
        shape: What it is like.
        banks: {sub-layer of `BANKED`: its experts}; those that are not named exist once.
        cross: Whether it has cross-attention.

    Raises:
        ZooError: If the heads do not divide the width, or a bank is of no sub-layer.
    """

    norm1: nn.Module
    qkv: nn.Module
    inner_norm: nn.Module
    out: nn.Module
    norm2: nn.Module
    ffn: nn.Module
    cross: Cross | None

    def __init__(self, shape: Shape, banks: Mapping[str, Sequence[str]] | None = None, *, cross: bool = False) -> None:
        super().__init__()
        if shape.dim % shape.heads:
            raise ZooError(f"{shape.heads} heads do not divide the width {shape.dim}: write another number of heads")
        self.banks = {name: tuple(experts) for name, experts in (banks or {}).items()}
        if wrong := [name for name in self.banks if name not in BANKED]:
            raise ZooError(unknown("sub-layer", wrong[0], BANKED))
        D = shape.dim
        makers = {
            "norm1": lambda: nn.LayerNorm(D, shape.eps),
            "qkv": lambda: _NoKeyBias(D) if shape.bias == "qv" else nn.Linear(D, 3 * D, bias=shape.bias == "all"),
            "inner_norm": lambda: nn.LayerNorm(D, shape.eps) if shape.inner_norm else nn.Identity(),
            "out": lambda: nn.Linear(D, D),
            "norm2": lambda: nn.LayerNorm(D, shape.eps),
            "ffn": lambda: FeedForward(shape),
        }
        for name, make in makers.items():
            experts = self.banks.get(name)
            self.add_module(name, make() if experts is None else nn.ModuleDict({expert: make() for expert in experts}))
        self.scale1, self.scale2 = _scale(shape), _scale(shape)
        self.cross = Cross(shape) if cross else None
        self.dropout = _dropout(shape)
        self.shape = shape

    def forward(
        self, x: Tensor, runs: Runs, seen: Sight, memory: Tensor | None = None, memory_seen: Sight | None = None, past: Past | None = None
    ) -> tuple[Tensor, Past]:
        """One block.

        Args:
            x: (B, T, D).
            runs: Experts of stretches of x, whose lengths sum to T; a single one serves all of it, whatever its length says.
            seen: Which keys each place sees, those of ``past`` first.
            memory: (B, M, memory_dim), what cross-attention reads; without it, and without a kept one, cross-attention is left out.
            memory_seen: Which of it each place sees; None: all.
            past: What earlier calls kept.

        Returns:
            (B, T, D), and what to keep.
        """
        past = past or Past()
        read, own = self._attend(x if self.shape.norm == "post" else self._routed("norm1", x, runs), runs, seen, past.own)
        x = self._add("norm1", x, read, self.scale1, runs)
        kept = past.memory
        if self.cross is not None and kept is None and memory is not None:
            kept = self.cross.keep(memory)
        if self.cross is not None and kept is not None and not self.shape.cross_ffn:
            x = self.cross(x, kept, memory_seen)
        widened = self._routed("ffn", x if self.shape.norm == "post" else self._routed("norm2", x, runs), runs)
        x = self._add("norm2", x, widened, self.scale2, runs)
        if self.cross is not None and kept is not None and self.shape.cross_ffn:
            x = self.cross(x, kept, memory_seen)
        return x, Past(own, kept)  # (B, T, D)

    def _attend(self, x: Tensor, runs: Runs, seen: Sight, past: KeysValues | None) -> tuple[Tensor, KeysValues]:
        query, key, value = (heads_apart(part, self.shape.heads) for part in self._routed("qkv", x, runs).chunk(3, -1))  # (B, heads, T, d)
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)  # (B, heads, K, d)
        read = attention(query, key, value, seen, self.shape.attention_dropout if self.training else 0.0)
        return self._routed("out", self._routed("inner_norm", read, runs), runs), (key, value)

    def _add(self, norm: str, x: Tensor, new: Tensor, scale: Tensor | None, runs: Runs) -> Tensor:
        new = self.dropout(new if scale is None else new * scale)
        return x + new if self.shape.norm == "pre" else self._routed(norm, x + new, runs)

    def _routed(self, name: str, x: Tensor, runs: Runs) -> Tensor:
        return routed(getattr(self, name), x, [(expert_of(expert, name), length) for expert, length in runs])


def expert_of(expert: Expert, name: str) -> str:
    """Which expert serves in the sub-layer ``name``."""
    return expert if isinstance(expert, str) else expert.get(name, "")


def routed(part: nn.Module, x: Tensor, runs: Sequence[tuple[str, int]]) -> Tensor:
    """A sub-layer on (B, T, D): each stretch through its expert, if it is a bank."""
    if not isinstance(part, nn.ModuleDict):
        return part(x)
    experts: list[Any] = [part[expert] for expert, _ in runs]
    sizes = [length for _, length in runs]
    if len({expert for expert, _ in runs}) == 1:
        return experts[0](x)
    if all(isinstance(expert, FeedForward) for expert in experts):
        x = experts[0].activated(_linear([expert.fc1 for expert in experts], x, sizes))
        if experts[0].has_norm:
            x = torch.cat([expert.inner_norm(piece) for expert, piece in zip(experts, x.split(sizes, 1), strict=True)], 1)
        return _linear([expert.fc2 for expert in experts], x, sizes)
    return _linear(experts, x, sizes)


def _linear(experts: Sequence[Any], x: Tensor, sizes: list[int]) -> Tensor:
    """Each stretch through its own map; adapters are more than a weight and a bias."""
    if all(type(expert) is nn.Linear for expert in experts):
        biases = [expert.bias for expert in experts]
        return expert_linear(x, [expert.weight for expert in experts], None if biases[0] is None else biases, sizes=sizes)
    return torch.cat([expert(piece) for expert, piece in zip(experts, x.split(sizes, 1), strict=True)], 1)


class Cross(nn.Module):
    """Cross-attention with its residual and norm, and perhaps a feed-forward of its own."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        D, width = shape.dim, shape.memory_dim or shape.dim
        self.norm = nn.LayerNorm(D, shape.eps)
        self.memory_norm = nn.LayerNorm(width, shape.eps) if shape.memory_norm else nn.Identity()
        self.q, self.kv, self.out = nn.Linear(D, D), nn.Linear(width, 2 * D), nn.Linear(D, D)
        self.scale = _scale(shape)
        if shape.cross_ffn:
            self.ffn_norm, self.ffn, self.ffn_scale = nn.LayerNorm(D, shape.eps), FeedForward(shape), _scale(shape)
        self.dropout = _dropout(shape)
        self.shape = shape

    def keep(self, memory: Tensor) -> KeysValues:
        """(B, M, memory_dim) to its keys and values."""
        key, value = self.kv(self.memory_norm(memory)).chunk(2, -1)
        return heads_apart(key, self.shape.heads), heads_apart(value, self.shape.heads)

    def forward(self, x: Tensor, kept: KeysValues, seen: Sight | None) -> Tensor:
        """(B, T, D) that has read what was kept."""
        pre = self.shape.norm == "pre"
        query = heads_apart(self.q(self.norm(x) if pre else x), self.shape.heads)
        read = self.out(attention(query, *kept, seen or Sight(), self.shape.attention_dropout if self.training else 0.0))
        x = x + self.dropout(read if self.scale is None else read * self.scale)
        x = x if pre else self.norm(x)
        if not self.shape.cross_ffn:
            return x
        widened = self.ffn(self.ffn_norm(x) if pre else x)
        x = x + self.dropout(widened if self.ffn_scale is None else widened * self.ffn_scale)
        return x if pre else self.ffn_norm(x)


class FeedForward(nn.Module):
    """Two layers, with a norm between them where the shape has inner ones."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        hidden = shape.hidden or 4 * shape.dim
        self.fc1, self.fc2 = nn.Linear(shape.dim, hidden), nn.Linear(hidden, shape.dim)
        self.inner_norm = nn.LayerNorm(hidden, shape.eps) if shape.inner_norm else nn.Identity()
        self.activation, self.has_norm = shape.activation, shape.inner_norm

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to the same."""
        return self.fc2(self.inner_norm(self.activated(self.fc1(x))))

    def activated(self, x: Tensor) -> Tensor:
        """What lies between the two layers."""
        return F.gelu(x) if self.activation == "gelu" else x * torch.sigmoid(1.702 * x)


class _NoKeyBias(nn.Linear):
    """Queries, keys and values of which keys have no bias: it would add the same to all scores of a place. A linear layer to adapters."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    @property
    def bias(self) -> Tensor:  # type: ignore[override]
        """(3 D,)."""
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])

    def reset_parameters(self) -> None:
        """Draws nothing: a trunk draws its weights itself."""


def _dropout(shape: Shape) -> nn.Module:
    """On what a sub-layer adds: dropout, and by row stochastic depth (Huang et al., 2016, https://arxiv.org/abs/1603.09382)."""
    if not shape.drop_path:
        return nn.Dropout(shape.dropout)
    from timm.layers import DropPath  # takes a second to import

    return nn.Sequential(nn.Dropout(shape.dropout), DropPath(shape.drop_path))


def _scale(shape: Shape) -> nn.Parameter | None:
    return None if shape.layer_scale is None else nn.Parameter(torch.full((shape.dim,), shape.layer_scale))
