"""METER's co-attention for items: two stacks, over the words and over the image, each of whose layers looks at the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from zoo.config import EncoderSpec, FusionSpec, Positive
from zoo.errors import ZooError
from zoo.joints import compose
from zoo.models._items import ItemModel, ItemProcessor
from zoo.registry import make, register
from zoo.types import Batch, ModelOutput, Tokens

JOINTS: dict[str, str | None] = {"combine": "concat", "schedule": "joint"}


class CoAttention(nn.Module):
    """One layer of one stack: attention to its own tokens, attention to the other stack's, and a feed-forward part.

    Args:
        width: Of the tokens.
        heads: Of both attentions; they divide ``width``.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.own_norm, self.cross_norm, self.other_norm, self.last_norm = (nn.LayerNorm(width) for _ in range(4))
        self.own = nn.MultiheadAttention(width, heads, batch_first=True)
        self.cross = nn.MultiheadAttention(width, heads, batch_first=True)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tokens, other: Tokens) -> Tokens:
        """(B, N, D) and (B, M, D) to (B, N, D); a row whose other is absent does not look at it."""
        tokens, query, there = x.tokens, self.own_norm(x.tokens), self.other_norm(other.tokens)
        tokens = tokens + self.own(query, query, query, key_padding_mask=~x.mask, need_weights=False)[0]
        seen = self.cross(self.cross_norm(tokens), there, there, key_padding_mask=~other.mask, need_weights=False)[0]
        tokens = tokens + seen.masked_fill(~other.present[:, None, None], 0)
        return x._replace(tokens=tokens + self.feed_forward(self.last_norm(tokens)))


class Stack(nn.Module):
    """One modality's way through the model: projected tokens behind a class token, layers, and that token's state as the vector.

    Args:
        width_in: Of the encoder's tokens.
        width: Of the layers.
        layers: How many.
        heads: Of each attention.
        dim: Width of the vector.
    """

    def __init__(self, width_in: int, width: int, layers: int, heads: int, dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(width_in, width)
        self.start = nn.Parameter(torch.randn(width) * 0.02)
        self.layers = nn.ModuleList(CoAttention(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.pool = nn.Sequential(nn.Linear(width, dim), nn.Tanh())

    def enter(self, x: Tokens) -> Tokens:
        """(B, N, D_encoder) to (B, 1 + N, D). The class token is always there, so no attention is over nothing."""
        start = self.start.expand(x.tokens.shape[0], 1, -1)  # len would write the number of rows into an exported graph
        mask = torch.cat([torch.ones_like(x.mask[:, :1]), x.mask], 1)
        return Tokens(torch.cat([start, self.project(x.tokens)], 1), mask, None, x.present)

    def leave(self, x: Tokens) -> Tensor:
        """(B, 1 + N, D) to (B, dim)."""
        return self.pool(self.norm(x.tokens[:, 0]))


class Meter(ItemModel):
    """The model; `meter` builds it.

    Args:
        text: Encodes one text.
        vision: Encodes one image.
        text_stack: Layers over the words.
        image_stack: Layers over the image, as many.
        combine: Mixes the vectors of the two stacks.
        schedule: How one batch becomes updates.
        processor: Raw row to inputs.
        dim: Width of the embedding.
    """

    modality_modules: Mapping[str, Sequence[str]] = {"image": ("vision",), "text": ("text",)}  # each stack looks at the other
    outputs = ("item",)

    def __init__(
        self,
        text: nn.Module,
        vision: nn.Module,
        text_stack: Stack,
        image_stack: Stack,
        combine: nn.Module,
        schedule: nn.Module,
        *,
        processor: ItemProcessor,
        dim: int,
    ) -> None:
        super().__init__(text, vision, schedule, processor, dim)
        self.text_stack, self.image_stack, self.combine = text_stack, image_stack, combine

    def forward(self, batch: Batch) -> ModelOutput:
        """Text and image to the embedding ``item``, (B, dim)."""
        words = self.text_stack.enter(self.read(batch.inputs["text"]))  # (B, 1 + N, D)
        seen = self.image_stack.enter(self.look(batch.inputs.get("image"), words.present))  # (B, 1 + M, D)
        for read, look in zip(self.text_stack.layers, self.image_stack.layers, strict=True):
            words, seen = read(words, seen), look(seen, words)  # both from what stood before this layer
        present = {"text": words.present, "image": seen.present}
        item = self.combine({"text": self.text_stack.leave(words), "image": self.image_stack.leave(seen)}, present)  # (B, dim)
        return ModelOutput({"item": item}, {"item": words.present | seen.present})


@register("model", "meter", joints=JOINTS, paper="Dou et al., METER, CVPR 2022, https://arxiv.org/abs/2111.02387")
def meter(
    *,
    text: EncoderSpec = "tiny_text",
    vision: EncoderSpec = "clip_vit_b16",
    fusion: FusionSpec = "concat",
    dim: Positive = 64,
    layers: Positive = 6,
    width: Positive = 768,
    heads: Positive = 12,
    language: Literal["zh", "en"] = "zh",
    title_length: Positive = 20,
    content_length: Positive = 80,
    max_topics: Positive = 10,
) -> Meter:
    """METER as an encoder of items: co-attention over the tokens of a text and an image encoder, whose class tokens are combined.

    Sizes are the paper's. Unlike there, layers begin with their norms, class tokens are our own, since not every encoder has one, and
    the vector that leaves is contrasted between items, where the paper matches texts with images by a classifier.

    Args:
        text: The text encoder.
        vision: The image encoder.
        fusion: Plug-ins for the joints combine, schedule.
        dim: Width of the vectors.
        layers: Of each stack.
        width: Of the layers.
        heads: Of each attention; they divide ``width``.
        language: Of the marks between title, topics and content.
        title_length: Characters.
        content_length: Characters.
        max_topics: Topics, hashtags of the content included.

    Raises:
        ZooError: If a fusion does not fit, or heads do not divide the width.
    """
    if width % heads:
        raise ZooError(f"meter: width {width} is no multiple of heads {heads}")
    joints = compose(fusion, "meter", JOINTS)
    reads, looks = make("encoder", text), make("encoder", vision)
    limits = {"title_length": title_length, "content_length": content_length, "max_topics": max_topics}
    return Meter(
        reads,
        looks,
        Stack(reads.dim, width, layers, heads, dim),
        Stack(looks.dim, width, layers, heads, dim),
        joints.make("combine", ["text", "image"], dim),
        joints.make("schedule", ["text", "image"], dim, 0),
        processor=ItemProcessor(reads.processor, looks.processor, language=language, **limits),
        dim=dim,
    )
