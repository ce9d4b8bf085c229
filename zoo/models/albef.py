"""ALBEF: a picture encoder and one BERT, whose lower half reads the text alone and whose upper half reads the picture, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from zoo.config import EncoderSpec, FusionSpec, Positive
from zoo.errors import ZooError
from zoo.joints import Trunk as Plugin
from zoo.joints import banks_of, compose
from zoo.models._bert import (
    Embedding,
    Size,
    WordHead,
    aligned,
    drawn,
    picture_encoder,
    real,
    remote_words,
    rows_of_table,
    run,
    shape_of,
    there,
)
from zoo.models._pictures import CaptionProcessor, PictureTextModel, PictureTextProcessor
from zoo.registry import make, register
from zoo.trunk import Trunk
from zoo.types import Batch, ModalityInputs, ModelOutput, Tokens
from zoo.vocabulary import Vocabulary, make_vocabulary

JOINTS: dict[str, str | None] = {"trunk": "cross_attention", "schedule": "joint"}
GIVES = ("memory",)
BERT = "google-bert/bert-base-uncased"
SIZES = {
    "tiny": Size(64, 4, 4, 24, 64, 64, 0.0, 64**-0.5, "small", {"name": "image_transformer", "arch": "tiny"}),
    "base": Size(768, 12, 12, 25, 512, 256, 0.1, 0.02, BERT, picture_encoder("vit_base_patch16_224", 256)),
}


class Albef(PictureTextModel):
    """The model; `albef` builds it.

    Args:
        vision: Encodes one picture.
        size: Of the texts' side.
        rows: Of the table of words.
        joint: Fills the joint trunk: which blocks read the picture, and of which experts they are; the text half are those before.
        vocabulary: Of its texts.
        schedule: How one batch becomes updates.
        processor: Raw row to inputs.
        dim: Width of the embeddings.

    Raises:
        ZooError: If no block is left to the text alone, or the vocabulary has no padding.
    """

    modality_modules: Mapping[str, Sequence[str]] = {"image": ("vision", "image_projection"), "text": ("text_projection",)}
    adds_cosine = False

    def __init__(
        self,
        vision: nn.Module,
        size: Size,
        rows: int,
        joint: Plugin,
        vocabulary: Vocabulary,
        schedule: nn.Module,
        processor: PictureTextProcessor,
        dim: int,
    ) -> None:
        super().__init__(vision, vocabulary, schedule, processor, dim)
        cross = [number for number in range(size.layers) if joint.reads(number)]
        self.first = first = cross[0] if cross else size.layers
        if not cross:
            raise ZooError("albef: the fusion lets no block read the picture: write a smaller from_layer")
        if not first:
            raise ZooError("albef: with from_layer 0 no block is left to read the text alone: write 1 or more")
        pad = vocabulary.role("pad", "albef")
        self.embed = Embedding(rows, size.places, size.width, pad=pad, typed=True, dropout=size.dropout, init=size.init)
        banks = banks_of(joint, lambda number: [("text", number >= first)])
        self.trunk = Trunk(shape_of(size, self.vision.dim), size.layers, cross_layers=cross, banks=banks, experts=joint)
        self.head = WordHead(rows, size.width, size.init)
        self.image_projection = drawn(nn.Linear(self.vision.dim, dim), self.vision.dim**-0.5)
        self.text_projection = drawn(nn.Linear(size.width, dim), size.width**-0.5)
        self.matches = drawn(nn.Linear(size.width, 2), size.init)

    def read(self, text: ModalityInputs) -> Tokens:
        """The text half: ids (B, N) to tokens (B, N, D), ``pooled`` at the first; of a row without text nothing."""
        return self.there(self._read, text)

    def forward(self, batch: Batch) -> ModelOutput:
        """Picture and text to the embeddings ``image`` and ``text``, (B, dim) each."""
        return aligned(self, batch)

    def hold(self, text: ModalityInputs, read: Tokens) -> Tokens:
        """What the text half gave."""
        return read

    def match(self, held: Tokens, seen: Tokens) -> Tensor:
        """(B, 2) logits: the upper half reads text and picture, 1 says that they belong together."""
        return self.matches(self._fused(held, seen)[:, 0])  # (B, 2)

    def unmask(self, text: ModalityInputs, seen: Tokens, chosen: Tensor | None = None) -> Tensor:
        """(B, N, V) logits of the word at each place of ids (B, N), some of them masked, given the pictures; or at ``chosen`` alone."""
        x = self.ask(text, seen).tokens  # (B, N, D)
        return self.head(x if chosen is None else x[chosen], self.embed.words)  # (B, N, V) or (n, V)

    def ask(self, question: ModalityInputs, seen: Tokens) -> Tokens:
        """The states of ids (B, N) after both halves, (B, N, D), given the pictures; ``pooled`` at the first."""
        mask = real(question)
        x = run(self.trunk, self.embed(question.values), mask, route="text", layers=slice(0, self.first))
        held = Tokens(x, mask, None, there(question))
        x = self._fused(held, seen)  # (B, N, D)
        return held._replace(tokens=x, pooled=x[:, 0])

    def _read(self, text: ModalityInputs) -> Tokens:
        mask = real(text)
        x = run(self.trunk, self.embed(text.values), mask, route="text", layers=slice(0, self.first))  # (B, N, D)
        return Tokens(x, mask, x[:, 0], mask.new_ones(len(mask)))

    def _fused(self, held: Tokens, seen: Tokens) -> Tensor:
        upper, memory = slice(self.first, None), {"memory": seen.tokens, "memory_mask": seen.mask}
        return run(self.trunk, held.tokens, held.mask, route="text", fused=True, layers=upper, **memory)  # (B, N, D)


@register(
    "model",
    "albef",
    joints=JOINTS,
    gives=GIVES,
    paper="Li et al., Align before fuse, 2021, https://arxiv.org/abs/2107.07651",
    remote=remote_words,
)
def albef(
    *,
    size: Literal["tiny", "base"] = "tiny",
    vision: EncoderSpec | None = None,
    vocabulary: str | dict[str, Any] | None = None,
    vocab_size: Positive | None = None,
    layers: Positive | None = None,
    length: Positive | None = None,
    dim: Positive | None = None,
    ends: bool = True,
    fusion: FusionSpec = "cross_attention",
) -> Albef:
    """ALBEF: vectors of pictures and of texts are aligned before the tokens of both are fused, to match them and to fill in words.

    Train it with the objective ``together`` of ``itc``, ``itm`` and ``mlm``, which owns the temperature and the momentum twin. The
    vectors are read at ``pooled`` of the picture encoder and at the first id of a text. Matching begins where the text half ended, so
    that its states can be kept for many pictures. Re-ranking scores by the logit of a match alone.

    Args:
        size: ``base`` is as published, ``tiny`` for CPUs; the settings below that are None are those of this size.
        vision: The picture encoder; all of its tokens are read by cross-attention.
        vocabulary: ``small``, or a repository or folder of a fast tokenizer with BERT's special words.
        vocab_size: Rows of the table of words, at least as many as the vocabulary has; None: as many.
        layers: Blocks of text, half of them with cross-attention, unless ``fusion`` says otherwise.
        length: Ids of the longest text, those at its ends included.
        dim: Width of the vectors.
        ends: Whether a text ends with [SEP]. The authors' own tokenizer writes none, so weights that they released want ``false``.
        fusion: Plug-ins for the joints trunk and schedule; ``from_layer`` of ``cross_attention`` is the first block that reads pictures.

    Raises:
        ZooError: If a fusion does not fit, the vocabulary cannot be had or lacks a special word, or the table is too small.
    """
    of = SIZES[size]
    of = of._replace(layers=layers or of.layers, length=length or of.length, dim=dim or of.dim)
    joints, words = compose(fusion, "albef", JOINTS, GIVES), make_vocabulary(vocabulary or of.vocabulary)
    rows = rows_of_table("albef", words, vocab_size, roles=False)
    words.role("mask", "albef")
    looks = make("encoder", of.vision if vision is None else vision)
    processor = PictureTextProcessor(looks.processor, CaptionProcessor(words, of.length, ends=ends))
    trunk, schedule = joints.make("trunk", of.layers, of.layers // 2), joints.make("schedule", ["image", "text"], of.dim, 0)
    return Albef(looks, of, rows, trunk, words, schedule, processor, of.dim)
