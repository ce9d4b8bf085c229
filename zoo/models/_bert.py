"""What ALBEF and BLIP have of BERT besides its blocks: ids to vectors, vectors to words, and which rows are there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.abilities import Filling
from zoo.errors import ZooError
from zoo.trunk import Shape, Trunk
from zoo.types import Batch, ModalityInputs, ModelOutput, Remote, Tokens
from zoo.vocabulary import Vocabulary, is_shipped

EPS = 1e-12  # of BERT's norms


class Size(NamedTuple):
    """Of a model, and what its weights were trained with."""

    width: int  # D, of texts
    layers: int
    heads: int
    length: int  # ids of the longest text
    places: int  # rows of the table of positions
    dim: int  # of the embeddings
    dropout: float
    init: float  # standard deviation of the first weights
    vocabulary: str
    vision: Mapping[str, Any]
    hidden: int | None = None  # inside the feed-forward; None: four times the width


def picture_encoder(arch: str, image_size: int) -> dict[str, Any]:
    """A ViT of timm as Salesforce uses it: tokens after the last norm, the class token as ``pooled``, CLIP's colours."""
    return {"name": "timm", "arch": arch, "image_size": image_size, "final_norm": True, "colours": "clip", "squash": True}


class Embedding(nn.Module):
    """Word and place, and perhaps kind of text, to one vector (Devlin et al., BERT, 2018, https://arxiv.org/abs/1810.04805).

    Args:
        rows: Of the table of words.
        places: Of the table of positions; None: there is none, as where attention knows how far apart words are.
        dim: Width.
        pad: The id whose row is not learned here.
        typed: Whether there is a table of the two kinds of text that BERT knows, of which the first is used.
        dropout: Of the result.
        init: Standard deviation of the tables.
    """

    def __init__(self, rows: int, places: int | None, dim: int, *, pad: int, typed: bool, dropout: float, init: float) -> None:
        super().__init__()
        self.words = nn.Embedding(rows, dim, padding_idx=pad)
        self.places = None if places is None else nn.Embedding(places, dim)
        self.kinds = nn.Embedding(2, dim) if typed else None
        self.norm, self.dropout = nn.LayerNorm(dim, EPS), nn.Dropout(dropout)
        for table in (self.words, self.places, self.kinds):
            if table is not None:
                nn.init.normal_(table.weight, std=init)

    def forward(self, ids: Tensor, past: int = 0) -> Tensor:
        """(B, N) ids, before which ``past`` others stand, to (B, N, D).

        Raises:
            ZooError: If there are more of them than places.
        """
        x = self.words(ids)
        if self.places is not None:
            x = x + places_of(self.places, past, ids.shape[1])
        return self.dropout(self.norm(x if self.kinds is None else x + self.kinds.weight[0]))


def places_of(table: nn.Embedding, past: int, length: int) -> Tensor:
    """(length, D), those behind ``past`` others.

    Raises:
        ZooError: If there are not as many.
    """
    N = past + length
    if table.num_embeddings < N:
        raise ZooError(f"a text of {N} ids, and there are {table.num_embeddings} places: write a smaller length, or a shorter prompt")
    return table.weight[past:N]


class WordHead(nn.Module):
    """Hidden states to logits of words, by the table that words are embedded with, as BERT predicts masked ones.

    Args:
        rows: Of that table.
        dim: Width.
        init: Standard deviation of the first weights.
    """

    def __init__(self, rows: int, dim: int, init: float) -> None:
        super().__init__()
        self.dense, self.norm, self.bias = nn.Linear(dim, dim), nn.LayerNorm(dim, EPS), nn.Parameter(torch.zeros(rows))
        drawn(self.dense, init)

    def forward(self, hidden: Tensor, table: nn.Embedding) -> Tensor:
        """(..., D) to (..., V)."""
        return F.linear(self.norm(F.gelu(self.dense(hidden))), table.weight, self.bias)


def drawn(layer: nn.Linear, init: float) -> nn.Linear:
    """The layer, with weights drawn as BERT's and no bias."""
    nn.init.normal_(layer.weight, std=init)
    nn.init.zeros_(layer.bias)
    return layer


def shape_of(size: Size, vision_dim: int) -> Shape:
    """BERT's blocks, with cross-attention to tokens of a picture encoder."""
    return Shape(
        size.width,
        size.heads,
        size.hidden,
        norm="post",
        eps=EPS,
        memory_dim=vision_dim,
        dropout=size.dropout,
        attention_dropout=size.dropout,
        init=size.init,
    )


def rows_of_table(model: str, words: Vocabulary, vocab_size: int | None, *, roles: bool) -> int:
    """Rows of the table of words; by default as many as there are.

    Args:
        model: For the message.
        words: The vocabulary.
        vocab_size: As the user wrote it.
        roles: Whether the ids that BLIP adds behind BERT's words are used.

    Raises:
        ZooError: If the words do not fit into it.
    """
    needed = words.size if roles else words.own
    if vocab_size is not None and vocab_size < needed:
        raise ZooError(
            f"{model}: vocab_size {vocab_size} is too small: the vocabulary {words.name!r} needs {needed} rows; write that, or more"
        )
    return vocab_size or needed


def aligned(model: Any, batch: Batch) -> ModelOutput:
    """Picture and text to the embeddings ``image`` and ``text``, (B, dim) each, zeros where they are absent."""
    weight = model.image_projection.weight
    one, of = any_of(batch, weight.device), weight.dtype
    seen = model.look(batch.inputs["image"]) if "image" in batch.inputs else unseen(model, one, of)  # (B, N, D)
    words = model.read(batch.inputs["text"]) if "text" in batch.inputs else nothing(one, model.trunk.shape.dim, of)
    vectors = {"image": model.image_projection(seen.pooled), "text": model.text_projection(words.pooled)}  # (B, dim)
    tokens = {"image": seen, "text": words}
    present = {name: x.present for name, x in tokens.items()}
    return ModelOutput({name: x.masked_fill(~present[name][:, None], 0) for name, x in vectors.items()}, present, tokens=tokens)


def real(text: ModalityInputs) -> Tensor:
    """(B, N) bool: which ids are there; of an absent text none."""
    mask = torch.ones_like(text.values, dtype=torch.bool) if text.mask is None else text.mask
    return mask if text.present is None else mask & text.present[:, None]


def there(text: ModalityInputs) -> Tensor:
    """(B,) bool."""
    return torch.ones(len(text.values), dtype=torch.bool, device=text.values.device) if text.present is None else text.present


def any_of(batch: Batch, device: torch.device) -> ModalityInputs:
    """One of the modalities of a batch; where no row shows anything, of each row that ``batch.ids`` counts a text that is not there."""
    if batch.inputs:
        return next(iter(batch.inputs.values()))
    ids = torch.zeros(0 if batch.ids is None else len(batch.ids), 1, dtype=torch.int64, device=device)
    return ModalityInputs(ids, torch.zeros_like(ids, dtype=torch.bool), torch.zeros(len(ids), dtype=torch.bool, device=device))


def unseen(model: Any, of: ModalityInputs, dtype: torch.dtype = torch.float32) -> Tokens:
    """What stands for the pictures (B, N, D) of rows that have none, of which ``of`` is one modality.

    Where text and picture stand in one sequence there are as many places as of a picture: positions hang on its length.
    """
    return nothing(of, model.vision.dim, dtype, 1 + model.grid[0] * model.grid[1] if isinstance(model, Filling) else 1)


def nothing(of: ModalityInputs, dim: int, dtype: torch.dtype = torch.float32, length: int = 1) -> Tokens:
    """Of each row of a batch, of which ``of`` is one modality, ``length`` tokens that are not there."""
    x = torch.zeros(len(of.values), length, dim, dtype=dtype, device=of.values.device)
    mask = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    return Tokens(x, mask, x[:, 0], mask[:, 0])


def run(trunk: Trunk, x: Tensor, mask: Tensor | None, **how: Any) -> Tensor:
    """A trunk without a cache."""
    found = trunk(x, mask, **how)
    assert isinstance(found, Tensor)
    return found


def remote_words(settings: Mapping[str, Any]) -> list[Remote]:
    """The tokenizer that the setting ``vocabulary`` names, unless it ships with the zoo."""
    spec = settings["vocabulary"]
    return [Remote("tokenizer", spec, ("tokenizer.json",))] if isinstance(spec, str) and not is_shipped(spec) else []
