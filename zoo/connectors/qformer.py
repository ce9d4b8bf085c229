"""The Q-Former: a few learned queries read an image through a small BERT, and perhaps a text along with it.

Inside, parameters are named as in LAVIS (``query_tokens``, ``Qformer.bert.encoder.layer.0.crossattention.self.query``), so
that its checkpoints load without a map.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from zoo.config import Fraction, Positive
from zoo.connectors._attention import attend
from zoo.errors import ZooError
from zoo.registry import register
from zoo.types import Tokens

Mode = Literal["image", "text", "joint", "prefix"]
EPS = 1e-12  # BERT's


@register(
    "connector", "qformer", paper="Li et al., BLIP-2, 2023, https://arxiv.org/abs/2301.12597", licence="BSD-3-Clause for LAVIS weights"
)
class QFormer(nn.Module):
    """Queries through a Q-Former, then a projector to the width of the language model.

    The defaults are NoteLLM-2's connector (Zhang et al., 2024, https://arxiv.org/abs/2405.16789); BLIP-2's has 32 queries,
    12 layers, a text branch and a linear projector.

    Args:
        dim_in: Width of the image tokens.
        dim_out: Width of the language model.
        num_queries: How many tokens go out.
        layers: Transformer blocks.
        hidden: Width of the Q-Former.
        heads: They divide ``hidden``.
        ffn: Width inside the feed-forward blocks.
        cross_every: Blocks 0, this, twice this, ... have cross-attention to the image.
        dropout: Of hidden states and attention weights.
        query_init: ``normal`` (0.02), as in LAVIS. ``zeros``, as in NoteLLM-2's code, leaves all queries equal until dropout
            tells them apart, and their first gradient is enormous.
        text: Have the text branch: embeddings, and a second feed-forward block in each layer.
        vocab_size: Of the text branch; BERT's 30522 and ``[DEC]``.
        positions: Longest text.
        projector: ``mlp`` is Linear, GELU, Linear; ``linear`` is BLIP-2's.

    Raises:
        ZooError: If the heads do not divide the width.
    """

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        *,
        num_queries: Positive = 16,
        layers: Positive = 6,
        hidden: Positive = 768,
        heads: Positive = 12,
        ffn: Positive = 3072,
        cross_every: Positive = 2,
        dropout: Fraction = 0.1,
        query_init: Literal["normal", "zeros"] = "normal",
        text: bool = False,
        vocab_size: Positive = 30523,
        positions: Positive = 512,
        projector: Literal["linear", "mlp"] = "mlp",
    ) -> None:
        super().__init__()
        if hidden % heads:
            raise ZooError(f"connector 'qformer': {heads} heads do not divide the width {hidden}: write another heads=")
        self.num_tokens: int | None = num_queries
        self._has_text = text
        self.query_tokens = nn.Parameter(torch.zeros(1, num_queries, hidden))
        self.Qformer = _Holder()
        self.Qformer.bert = _Bert(
            [_Layer(hidden, heads, ffn, dropout, dim_in if i % cross_every == 0 else None, text) for i in range(layers)],
            _Embeddings(hidden, dropout, vocab_size if text else 0, positions),
        )
        self.apply(_init)
        if query_init == "normal":
            nn.init.normal_(self.query_tokens, std=0.02)
        head = (
            [nn.Linear(hidden, dim_out)] if projector == "linear" else [nn.Linear(hidden, dim_out), nn.GELU(), nn.Linear(dim_out, dim_out)]
        )
        self.projector = nn.Sequential(*head)

    def forward(self, x: Tokens) -> Tokens:
        """(B, N, dim_in) to (B, num_queries, dim_out), in mode ``image``. A row that is absent, or all masked, gives zeros, masked."""
        queries, _ = self.run("image", image=x)
        assert queries is not None
        valid = (x.present & x.mask.any(1))[:, None]  # (B, 1)
        tokens = torch.where(valid[..., None], self.projector(queries), 0.0)
        return Tokens(tokens, valid.expand(tokens.shape[:2]), None, x.present)

    def run(
        self, mode: Mode, *, image: Tokens | None = None, ids: Tensor | None = None, text_mask: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """One pass through the Q-Former, before the projector.

        Who sees whom (queries also see the image, text never does)::

            mode    query->query  query->text  text->query  text->text   BLIP-2's use
            image   all           -            -            -            contrastive, image side
            text    -             -            -            all          contrastive, text side
            joint   all           all          all          all          matching
            prefix  all           none         all          causal       generation

        Args:
            mode: One of the four.
            image: Tokens (B, N, dim_in); for all modes but ``text``.
            ids: (B, T) int64; for all modes but ``image``.
            text_mask: (B, T) bool, True at real tokens; None: all.

        Returns:
            The states of the queries (B, num_queries, hidden) and of the text (B, T, hidden), None where the mode has none.

        Raises:
            ZooError: If the mode needs an image or a text that is not given, or a text branch that is not there.
        """
        self._check(mode, image, ids)
        B = image.tokens.shape[0] if image is not None and mode != "text" else ids.shape[0]  # type: ignore[union-attr]
        queries = self.query_tokens.expand(B, -1, -1) if mode != "text" else None
        words = ids if mode != "image" else None
        Q, T = 0 if queries is None else queries.shape[1], 0 if words is None else words.shape[1]
        hidden = self.Qformer.bert.embeddings(queries, words)  # (B, Q + T, H)
        visible = None
        if words is not None:
            real = text_mask if text_mask is not None else torch.ones_like(words, dtype=torch.bool)
            visible = _visible(mode, Q, real)  # (B, Q + T, Q + T)
        hidden = self.Qformer.bert(hidden, visible, image if mode != "text" else None, Q)
        return (hidden[:, :Q] if Q else None), (hidden[:, Q:] if T else None)

    def _check(self, mode: Mode, image: Tokens | None, ids: Tensor | None) -> None:
        if mode not in ("image", "text", "joint", "prefix"):
            raise ZooError(f"qformer: no mode {mode!r}: write image, text, joint or prefix")
        if mode != "text" and image is None:
            raise ZooError(f"qformer: mode {mode!r} reads an image: give image=")
        if mode != "image" and ids is None:
            raise ZooError(f"qformer: mode {mode!r} reads a text: give ids=")
        if mode != "image" and not self._has_text:
            raise ZooError(f"qformer: mode {mode!r} needs the text branch: build it with text: true")


def _visible(mode: Mode, queries: int, real: Tensor) -> Tensor:
    """(B, S, S) bool over [queries ; text], which keys each position sees; ``real`` (B, T) masks the padding of the text."""
    B, T = real.shape
    keys = torch.cat([real.new_ones(B, queries), real], 1)[:, None].repeat(1, queries + T, 1)  # (B, S, S)
    if mode == "prefix":
        keys[:, :queries, queries:] = False
        keys[:, queries:, queries:] &= torch.ones(T, T, dtype=torch.bool, device=real.device).tril()
    return keys


class _Holder(nn.Module):
    """A step in a parameter's name."""

    bert: _Bert
    layer: nn.ModuleList
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear


def _init(module: nn.Module) -> None:
    """BERT's."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


class _Embeddings(nn.Module):
    """Queries as they are, words with their positions, which start at 0 whatever stands before them; one norm over both."""

    def __init__(self, hidden: int, dropout: float, vocab_size: int, positions: int) -> None:
        super().__init__()
        if vocab_size:
            self.word_embeddings = nn.Embedding(vocab_size, hidden)
            self.position_embeddings = nn.Embedding(positions, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, eps=EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: Tensor | None, ids: Tensor | None) -> Tensor:
        both = [] if queries is None else [queries]
        if ids is not None:
            both.append(self.word_embeddings(ids) + self.position_embeddings.weight[: ids.shape[1]])
        return self.dropout(self.LayerNorm(torch.cat(both, 1)))


class _Bert(nn.Module):
    def __init__(self, layers: list[_Layer], embeddings: _Embeddings) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.encoder = _Holder()
        self.encoder.layer = nn.ModuleList(layers)

    def forward(self, hidden: Tensor, visible: Tensor | None, image: Tokens | None, queries: int) -> Tensor:
        for layer in self.encoder.layer:
            hidden = layer(hidden, visible, image, queries)
        return hidden


class _Layer(nn.Module):
    """Shared self-attention; then the queries read the image and have one feed-forward block, the text has the other."""

    def __init__(self, hidden: int, heads: int, ffn: int, dropout: float, cross: int | None, text: bool) -> None:
        super().__init__()
        self.attention = _Attention(hidden, heads, dropout, hidden)
        self.crossattention = None if cross is None else _Attention(hidden, heads, dropout, cross)
        self.intermediate_query, self.output_query = _Dense(hidden, ffn), _Output(ffn, hidden, dropout)
        if text:
            self.intermediate, self.output = _Dense(hidden, ffn), _Output(ffn, hidden, dropout)

    def forward(self, hidden: Tensor, visible: Tensor | None, image: Tokens | None, queries: int) -> Tensor:
        hidden = self.attention(hidden, hidden, visible)
        out = []
        if queries:
            asking = hidden[:, :queries]
            if self.crossattention is not None:
                assert image is not None, "a pass with queries comes without an image"
                asking = self.crossattention(asking, image.tokens, image.mask[:, None])
            out.append(self.output_query(nn.functional.gelu(self.intermediate_query(asking)), asking))
        if queries < hidden.shape[1]:
            text = hidden[:, queries:]
            out.append(self.output(nn.functional.gelu(self.intermediate(text)), text))
        return torch.cat(out, 1)


class _Attention(nn.Module):
    """BERT's attention block, post-norm."""

    def __init__(self, hidden: int, heads: int, dropout: float, width: int) -> None:
        super().__init__()
        self.self = _Holder()  # LAVIS' name
        self.self.query, self.self.key, self.self.value = nn.Linear(hidden, hidden), nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.output = _Output(hidden, hidden, dropout)
        self._heads, self._dropout = heads, dropout

    def forward(self, asking: Tensor, read: Tensor, visible: Tensor | None) -> Tensor:
        own = self.self
        dropout = self._dropout if self.training else 0.0
        seen = attend(own.query(asking), own.key(read), own.value(read), visible, self._heads, dropout)
        return self.output(seen, asking)


class _Dense(nn.Module):
    def __init__(self, width: int, ffn: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, ffn)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x)


class _Output(nn.Module):
    """Linear, dropout, residual, norm."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(width, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, eps=EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)
