"""CLIP: a picture tower and a text tower that meet in one dot product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from torch import nn

from zoo.config import EncoderSpec, FusionSpec, Positive
from zoo.joints import compose
from zoo.models._bert import remote_words
from zoo.models._pictures import CaptionProcessor, PictureTextModel, PictureTextProcessor
from zoo.models._towers import Activation, Pictures, Texts, TextTower, clip_pictures, looked_and_read, projection, sized, table_of
from zoo.registry import make, register
from zoo.types import Batch, ModalityInputs, ModelOutput, Tokens
from zoo.vocabulary import Vocabulary, make_vocabulary

JOINTS: dict[str, str | None] = {"schedule": "joint"}


class Size(NamedTuple):
    """Of both towers, and what its weights were trained with."""

    pictures: Pictures
    texts: Texts
    dim: int  # of the embeddings
    length: int  # ids of the longest text
    vocabulary: str
    activation: Activation


SIZES = {
    "tiny": Size(Pictures(64, 16, 64, 4, 4), Texts(64, 2, 4, init=0.125), 64, 32, "small", "gelu"),
    "vit_b_32": Size(Pictures(224, 32, 768, 12, 12), Texts(512, 12, 8), 512, 77, "clip", "quick_gelu"),
    "vit_b_16": Size(Pictures(224, 16, 768, 12, 12), Texts(512, 12, 8), 512, 77, "clip", "quick_gelu"),
    "vit_l_14": Size(Pictures(224, 14, 1024, 24, 16), Texts(768, 12, 12), 768, 77, "clip", "quick_gelu"),
    "vit_l_14_336": Size(Pictures(336, 14, 1024, 24, 16), Texts(768, 12, 12), 768, 77, "clip", "quick_gelu"),
    "vit_h_14": Size(Pictures(224, 14, 1280, 32, 16), Texts(1024, 24, 16), 1024, 77, "clip", "gelu"),
}


class Clip(PictureTextModel):
    """The model; `clip` builds it.

    Args:
        vision: Encodes one picture.
        text: Encodes one text.
        vocabulary: Of its texts.
        schedule: How one batch becomes updates.
        processor: Raw row to inputs.
        dim: Width of the embeddings.
    """

    modality_modules: Mapping[str, Sequence[str]] = {"image": ("vision", "image_projection"), "text": ("text", "text_projection")}

    def __init__(
        self, vision: nn.Module, text: TextTower, vocabulary: Vocabulary, schedule: nn.Module, processor: PictureTextProcessor, dim: int
    ) -> None:
        super().__init__(vision, vocabulary, schedule, processor, dim)
        self.text = text
        self.image_projection, self.text_projection = projection(self.vision.dim, dim), projection(text.dim, dim)

    def read(self, text: ModalityInputs) -> Tokens:
        """The text tower's tokens (B, N, D), ``pooled`` where each text ends; of a row without text nothing."""
        return self.there(self.text, text)

    def forward(self, batch: Batch) -> ModelOutput:
        """Picture and text to the embeddings ``image`` and ``text``, (B, dim) each."""
        seen, words = looked_and_read(self, batch)
        vectors = {"image": self.image_projection(seen.pooled), "text": self.text_projection(words.pooled)}  # (B, dim)
        return ModelOutput(vectors, {"image": seen.present, "text": words.present}, tokens={"image": seen, "text": words})


@register(
    "model",
    "clip",
    joints=JOINTS,
    paper="Radford et al., Learning transferable visual models from natural language supervision, 2021, https://arxiv.org/abs/2103.00020",
    licence="of weights that are loaded: see their card",
    remote=remote_words,
)
def clip(
    *,
    size: Literal["tiny", "vit_b_32", "vit_b_16", "vit_l_14", "vit_l_14_336", "vit_h_14"] = "tiny",
    vision: EncoderSpec | None = None,
    image_size: Positive | None = None,
    vocabulary: str | dict[str, Any] | None = None,
    vocab_size: Positive | None = None,
    length: Positive | None = None,
    dim: Positive | None = None,
    activation: Activation | None = None,
    fusion: FusionSpec = "joint",
) -> Clip:
    """CLIP: pictures and texts become vectors of one space, in which the ones that belong together point the same way.

    Train it with the objective ``infonce`` and ``on: [image, text]``, which owns the temperature. Both towers are open_clip's, drawn and
    not pretrained. ``vit_b_32`` to ``vit_l_14_336`` are OpenAI's, ``vit_h_14`` is LAION's (Schuhmann et al., 2022,
    https://arxiv.org/abs/2210.08402), ``tiny`` is for CPUs.

    Args:
        size: Of the towers; the settings below that are None are as it was published.
        vision: Another picture encoder in the place of the picture tower; its ``pooled`` is projected.
        image_size: Side of pictures, a multiple of that of a patch; of the picture tower, so not where ``vision`` names another one.
        vocabulary: ``small``, ``clip``, or a repository or folder of a fast tokenizer with ids that start and end a text.
        vocab_size: Rows of the table of words, at least as many as the vocabulary has; None: as many.
        length: Ids of the longest text, its start and end included.
        dim: Width of the vectors.
        activation: ``quick_gelu`` is OpenAI's, ``gelu``, the exact one, LAION's at any size.
        fusion: A plug-in for the joint schedule.

    Raises:
        ZooError: If a fusion does not fit, the vocabulary cannot be had or lacks what starts and ends a text, the table is too small, or
            pictures are of a side that patches do not fill.
    """
    joints, of = compose(fusion, "clip", JOINTS), SIZES[size]
    words = make_vocabulary(of.vocabulary if vocabulary is None else vocabulary)
    table, longest, act = table_of("clip", words, vocab_size), length or of.length, activation or of.activation
    pictures = sized("clip", of.pictures, image_size, vision)
    looks = make("encoder", vision) if vision is not None else clip_pictures(pictures, act, final_norm=True)
    reads = TextTower(of.texts, table, longest, words.role("end", "clip"), act)
    processor = PictureTextProcessor(looks.processor, CaptionProcessor(words, longest))
    width = dim or of.dim
    return Clip(looks, reads, words, joints.make("schedule", ["image", "text"], width, 0), processor, width)
