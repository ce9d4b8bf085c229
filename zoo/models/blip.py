"""BLIP: a picture encoder and one BERT with three uses: it reads a text alone, a text beside a picture, or writes what a picture shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from zoo.abilities import Captioning
from zoo.config import EncoderSpec, FusionSpec, Positive
from zoo.errors import ZooError
from zoo.joints import Trunk as Plugin
from zoo.joints import banks_of, compose
from zoo.models._answerer import Answerer, following, spoken
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
from zoo.trunk import Cache, Trunk
from zoo.types import Batch, ModalityInputs, ModelOutput, Tokens
from zoo.vocabulary import Vocabulary, make_vocabulary

JOINTS: dict[str, str | None] = {"trunk": "cross_attention", "schedule": "joint"}
GIVES = ("memory",)
BERT = "google-bert/bert-base-uncased"
BANKS = dict.fromkeys(("qkv", "out", "norm1"), ("encode", "decode"))  # reading and writing share all but self-attention
_BASE = Size(768, 12, 12, 30, 512, 256, 0.1, 0.02, BERT, picture_encoder("vit_base_patch16_224", 224))
SIZES = {
    "tiny": Size(64, 4, 4, 24, 64, 64, 0.0, 64**-0.5, "small", {"name": "image_transformer", "arch": "tiny"}),
    "base": _BASE,
    "large": _BASE._replace(vision=picture_encoder("vit_large_patch16_224", 224)),
}


class Blip(PictureTextModel):
    """The model; `blip` builds it.

    Args:
        vision: Encodes one picture.
        size: Of the texts' side.
        rows: Of the table of words.
        joint: Fills the joint trunk: which blocks read the picture, and of which experts of modality the sub-layers are that have none
            of mode.
        vocabulary: Of its texts.
        schedule: How one batch becomes updates.
        processor: Raw row to inputs.
        dim: Width of the embeddings.
        prompt: What captions begin with, "" for nothing.
        answerer: Whether answers to questions have a decoder of their own.

    Raises:
        ZooError: If the vocabulary lacks a special word.
    """

    modality_modules: Mapping[str, Sequence[str]] = {"image": ("vision", "image_projection"), "text": ("text_projection",)}
    asks_without: tuple[str, ...] = (r".*\.decode",)  # self-attention for writing, which is kept so that the trunk stays one
    adds_cosine = True

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
        *,
        prompt: str = "",
        answerer: bool = False,
    ) -> None:
        super().__init__(vision, vocabulary, schedule, processor, dim)
        pad, self._encodes = vocabulary.role("pad", "blip"), vocabulary.role("encode", "blip")
        self.prompt: Sequence[int] = [vocabulary.role("decode", "blip"), *vocabulary.encode(prompt)]
        self.room = size.places
        self.embed = Embedding(rows, size.places, size.width, pad=pad, typed=False, dropout=size.dropout, init=size.init)
        cross = [number for number in range(size.layers) if joint.reads(number)]
        of_modality = banks_of(joint, lambda _: [("text", False), ("text", True)])
        self.trunk = Trunk(
            shape_of(size, self.vision.dim),
            size.layers,
            cross_layers=cross,
            banks=lambda number: {**of_modality(number), **BANKS},
            experts=lambda mode, number, fused: {
                **dict.fromkeys(joint.banks, joint("text", number, fused)),
                **dict.fromkeys(BANKS, mode),
            },
        )
        self.head = WordHead(rows, size.width, size.init)
        self.image_projection = drawn(nn.Linear(self.vision.dim, dim), self.vision.dim**-0.5)
        self.text_projection = drawn(nn.Linear(size.width, dim), size.width**-0.5)
        self.matches = drawn(nn.Linear(size.width, 2), size.init)
        self.answerer = Answerer(rows, size, pad=pad, decode=self.prompt[0]) if answerer else None

    def read(self, text: ModalityInputs) -> Tokens:
        """The text alone: ids (B, N) to tokens (B, N, D), ``pooled`` at the first; of a row without text nothing."""
        return self.there(self._read, text)

    def forward(self, batch: Batch) -> ModelOutput:
        """Picture and text to the embeddings ``image`` and ``text``, (B, dim) each."""
        return aligned(self, batch)

    def hold(self, text: ModalityInputs, read: Tokens) -> Tokens:
        """The embedded ids, of which the first now says that a picture is read, too."""
        ids, present = text.values.clone(), there(text)
        ids[:, 0] = self._encodes
        return Tokens(self.embed(ids), real(text), None, present)

    def match(self, held: Tokens, seen: Tokens) -> Tensor:
        """(B, 2) logits: all blocks read text and picture, 1 says that they belong together."""
        return self.matches(self._fused(held, seen)[:, 0])  # (B, 2)

    def ask(self, question: ModalityInputs, seen: Tokens) -> Tokens:
        """The states of a question (B, N) of which the first id says that a picture is read, too; (B, N, D), ``pooled`` at the first.

        Answers are written from them by `answering`.
        """
        held = self.hold(question, seen)
        x = self._fused(held, seen)  # (B, N, D)
        return held._replace(tokens=x, pooled=x[:, 0])

    @property
    def answering(self) -> Captioning:
        """What writes answers from what `ask` gives: a decoder of its own, as in BLIP's fine-tuning, or without one this model itself.

        Raises:
            ZooError: If it is this model, and pictures are not as wide as texts.
        """
        if self.answerer is not None:
            return self.answerer
        self._check_wide(self.trunk.shape.dim)
        return self

    def caption(self, text: ModalityInputs, out: ModelOutput) -> tuple[Tensor, Tensor]:
        """Logits (B, T, V) of the next words of texts, each given those before it and the picture, and which they are (B, T).

        A prompt stands before the words, and is not counted; nor is a row without a picture.
        """
        return spoken(self.embed, self.trunk, self.head, self.prompt, text, out.tokens["image"])

    def next_words(self, ids: Tensor, seen: Tokens, cache: Cache | None) -> tuple[Tensor, Cache]:
        """Logits (B, V) of the word after ids (B, T), which go on from what the cache holds; and the new cache.

        Raises:
            ZooError: If what is seen is not as wide as pictures are.
        """
        self._check_wide(seen.tokens.shape[-1])
        return following(self.embed, self.trunk, self.head, ids, seen, cache)

    def _check_wide(self, width: int) -> None:
        if width != self.vision.dim:
            raise ZooError(
                f"blip: it writes about what is {self.vision.dim} wide, as its pictures are, and this is {width} wide: answers to "
                "questions need a decoder of their own, answerer: true, or a picture encoder that is as wide as texts"
            )

    def _fused(self, held: Tokens, seen: Tokens) -> Tensor:
        memory = {"memory": seen.tokens, "memory_mask": seen.mask}
        return run(self.trunk, held.tokens, held.mask, route="encode", fused=True, **memory)  # (B, N, D)

    def _read(self, text: ModalityInputs) -> Tokens:
        mask = real(text)
        x = run(self.trunk, self.embed(text.values), mask, route="encode")  # (B, N, D)
        return Tokens(x, mask, x[:, 0], mask.new_ones(len(mask)))


@register(
    "model",
    "blip",
    joints=JOINTS,
    gives=GIVES,
    paper="Li et al., BLIP, 2022, https://arxiv.org/abs/2201.12086",
    remote=remote_words,
)
def blip(
    *,
    size: Literal["tiny", "base", "large"] = "tiny",
    vision: EncoderSpec | None = None,
    vocabulary: str | dict[str, Any] | None = None,
    vocab_size: Positive | None = None,
    layers: Positive | None = None,
    length: Positive | None = None,
    dim: Positive | None = None,
    prompt: str = "",
    answerer: bool = False,
    fusion: FusionSpec = "cross_attention",
) -> Blip:
    """BLIP: vectors of pictures and of texts, matching of both, and captions, by one BERT that shares all but its self-attention.

    Train it with the objective ``together`` of ``itc``, ``itm`` and ``lm``, which owns the temperature and the momentum twin. The first id
    of a text says which use is meant: [CLS] of the text alone, [ENC] beside a picture, [DEC] to write. Re-ranking scores by the logit of
    a match plus the cosine of the vectors.

    Args:
        size: ``base`` and ``large`` are as published, with ViT-B/16 and ViT-L/16, ``tiny`` is for CPUs; the settings below that are None
            are those of this size.
        vision: The picture encoder; all of its tokens are read by cross-attention.
        vocabulary: ``small``, or a repository or folder of a fast tokenizer with BERT's special words, behind which [DEC] and [ENC] stand.
        vocab_size: Rows of the table of words, at least as many as the vocabulary has; None: as many.
        layers: Blocks of text, all with cross-attention, unless ``fusion`` says otherwise.
        length: Ids of the longest text, those at its ends included.
        dim: Width of the vectors.
        prompt: What captions begin with, in training and after; its words are no part of the loss. BLIP fine-tunes to write captions with
            "a picture of".
        answerer: A decoder of their own for answers to questions, as BLIP's fine-tuning for these has it; where pictures are as wide as
            texts, as with ViT-B, the decoder of captions can answer, too.
        fusion: Plug-ins for the joints trunk and schedule; ``from_layer`` of ``cross_attention`` is the first block that reads pictures.

    Raises:
        ZooError: If a fusion does not fit, the vocabulary cannot be had or lacks a special word, the table is too small, or texts and the
            prompt are longer than the model has places.
    """
    of = SIZES[size]
    of = of._replace(layers=layers or of.layers, length=length or of.length, dim=dim or of.dim)
    joints, words = compose(fusion, "blip", JOINTS, GIVES), make_vocabulary(vocabulary or of.vocabulary)
    rows = rows_of_table("blip", words, vocab_size, roles=True)
    said = len(words.encode(prompt))
    if of.length + said > of.places:
        raise ZooError(
            f"blip: length {of.length} and a prompt of {said} ids need more than the {of.places} places of size {size}: shorten one"
        )
    looks = make("encoder", of.vision if vision is None else vision)
    processor = PictureTextProcessor(looks.processor, CaptionProcessor(words, of.length))
    trunk, schedule = joints.make("trunk", of.layers, 0), joints.make("schedule", ["image", "text"], of.dim, 0)
    return Blip(looks, of, rows, trunk, words, schedule, processor, of.dim, prompt=prompt, answerer=answerer)
