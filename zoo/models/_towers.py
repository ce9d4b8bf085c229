"""The towers that CLIP and CoCa are made of, taken from open_clip and timm, in the sizes that were published."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import timm
import torch
from open_clip.transformer import QuickGELU, TextTransformer, VisionTransformer
from torch import nn

from zoo.encoders._image import HALF, ImageProcessor
from zoo.encoders._open_clip import OpenClipEncoder
from zoo.encoders.timm import TimmEncoder
from zoo.errors import ZooError
from zoo.models._bert import any_of, nothing
from zoo.types import Batch, ModalityInputs, Tokens
from zoo.vocabulary import Vocabulary

Activation = Literal["gelu", "quick_gelu"]


class Pictures(NamedTuple):
    """A vision transformer."""

    image_size: int
    patch: int
    width: int
    layers: int
    heads: int
    hidden: int | None = None  # inside the feed-forward; None: four times the width


class Texts(NamedTuple):
    """A causal transformer of words."""

    width: int
    layers: int
    heads: int
    hidden: int | None = None  # as above
    init: float = 0.02  # standard deviation of the first embeddings; 1 / sqrt(width) for a narrow one, which learns nothing from smaller


class TextTower(nn.Module):
    """CLIP's text tower, a causal transformer read where the text ends.

    Padding is not masked: it stands behind the end, which never sees it.

    Args:
        size: Its width and depth.
        words: Rows of the table of embeddings.
        length: Ids of the longest text.
        end: The id that ends a text.
        activation: ``quick_gelu`` for OpenAI's weights, ``gelu``, the exact one, for LAION's.
    """

    by_block = True  # activations can be recomputed so

    def __init__(self, size: Texts, words: int, length: int, end: int, activation: Activation) -> None:
        super().__init__()
        self.model = TextTransformer(
            context_length=length,
            vocab_size=words,
            width=size.width,
            heads=size.heads,
            layers=size.layers,
            mlp_ratio=(size.hidden or 4 * size.width) / size.width,
            proj_type="none",
            act_layer=QuickGELU if activation == "quick_gelu" else nn.GELU,
        )
        nn.init.normal_(self.model.token_embedding.weight, std=size.init)
        nn.init.normal_(self.model.positional_embedding, std=size.init / 2)
        self.dim, self._end = size.width, end

    def checkpoint_gradients(self) -> None:
        """Recompute the activations of each block in the backward pass instead of keeping them."""
        self.model.set_grad_checkpointing()

    def forward(self, x: ModalityInputs) -> Tokens:
        """Ids (B, N) to Tokens, ``pooled`` at the first end of each text."""
        ids, model = x.values, self.model
        N = ids.shape[1]
        hidden = model.token_embedding(ids) + model.positional_embedding[:N]
        hidden = model.ln_final(model.transformer(hidden, attn_mask=model.attn_mask[:N, :N]))  # (B, N, D)
        ends = (ids == self._end).int().argmax(1)
        mask = torch.ones_like(ids, dtype=torch.bool) if x.mask is None else x.mask
        return Tokens(hidden, mask, hidden[torch.arange(len(ids), device=ids.device), ends], mask.new_ones(len(ids)))


def clip_pictures(size: Pictures, activation: Activation, *, final_norm: bool) -> OpenClipEncoder:
    """CLIP's picture tower: class token, norms before and after the blocks, no projection; drawn, not pretrained.

    Args:
        size: Its shape.
        activation: As of `TextTower`.
        final_norm: Whether the tokens have gone through the last norm.
    """
    visual = VisionTransformer(
        size.image_size,
        size.patch,
        size.width,
        size.layers,
        size.heads,
        (size.hidden or 4 * size.width) / size.width,
        act_layer=QuickGELU if activation == "quick_gelu" else nn.GELU,
    )
    pixels = ImageProcessor(size.image_size)
    return OpenClipEncoder(visual, "the picture tower", pixels, layer=-1, keep_cls=True, final_norm=final_norm, portable={})


def plain_pictures(size: Pictures) -> TimmEncoder:
    """A vision transformer without class token, read after its last norm; drawn, not pretrained."""
    visual: Any = timm.models.vision_transformer.VisionTransformer(
        img_size=size.image_size,
        patch_size=size.patch,
        embed_dim=size.width,
        depth=size.layers,
        num_heads=size.heads,
        mlp_ratio=(size.hidden or 4 * size.width) / size.width,
        num_classes=0,
        class_token=False,
        global_pool="",
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )
    pixels = ImageProcessor(size.image_size, mean=HALF, std=HALF)
    return TimmEncoder(visual, "the picture tower", pixels, layer=-1, keep_cls=True, final_norm=True, pool="mean", portable={})


def sized(model: str, size: Pictures, image_size: int | None, vision: Any) -> Pictures:
    """A picture tower for pictures of another size.

    Raises:
        ZooError: If patches do not fill it, or another encoder is named.
    """
    if image_size is not None and vision is not None:
        raise ZooError(f"{model}: image_size is of the model's own picture tower: write it inside vision, as its setting")
    if image_size is not None and image_size % size.patch:
        raise ZooError(f"{model}: image_size {image_size} is no multiple of {size.patch}, the side of a patch")
    return size._replace(image_size=image_size or size.image_size)


def projection(width: int, dim: int) -> nn.Linear:
    """Without bias, drawn as CLIP's."""
    made = nn.Linear(width, dim, bias=False)
    nn.init.normal_(made.weight, std=width**-0.5)
    return made


def table_of(model: str, words: Vocabulary, vocab_size: int | None) -> int:
    """Rows of a table of words; by default as many as there are.

    Raises:
        ZooError: If the vocabulary does not fit into it.
    """
    if vocab_size is not None and vocab_size < words.size:
        raise ZooError(
            f"{model}: vocab_size {vocab_size} is too small: the vocabulary {words.name!r} has {words.size} ids; write that, or more"
        )
    return vocab_size or words.size


def looked_and_read(model: Any, batch: Batch) -> tuple[Tokens, Tokens]:
    """What a model makes of the pictures and of the texts of a batch; of a side that no row has, nothing."""
    one = any_of(batch, next(model.parameters()).device)
    looked = model.look(batch.inputs["image"]) if "image" in batch.inputs else nothing(one, model.vision.dim)
    return looked, model.read(batch.inputs["text"]) if "text" in batch.inputs else nothing(one, model.text.dim)
