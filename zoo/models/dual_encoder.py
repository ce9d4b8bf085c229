"""CLIP's and SigLIP's two encoders, fine-tuned to tell which items belong together: a vector each, combined to one of the item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import nn
from torch.nn import functional as F

from zoo.config import EncoderSpec, FusionSpec, Positive
from zoo.joints import compose
from zoo.models._items import ItemModel, ItemProcessor
from zoo.registry import make, register
from zoo.types import Batch, ModelOutput

JOINTS: dict[str, str | None] = {"combine": "concat", "schedule": "joint"}


class DualEncoder(ItemModel):
    """The model; `dual_encoder` builds it.

    Args:
        text: Encodes one text.
        vision: Encodes one image.
        combine: Mixes the vectors of text and image, both of length 1.
        schedule: How one batch becomes updates.
        processor: Raw row to inputs.
        dim: Width of the embeddings.
    """

    modality_modules: Mapping[str, Sequence[str]] = {"image": ("vision", "image_projection"), "text": ("text", "text_projection")}
    outputs = ("item", "text", "image")

    def __init__(
        self, text: nn.Module, vision: nn.Module, combine: nn.Module, schedule: nn.Module, processor: ItemProcessor, dim: int
    ) -> None:
        super().__init__(text, vision, schedule, processor, dim)
        self.text_projection = nn.Linear(self.text.dim, dim, bias=False)
        self.image_projection = nn.Linear(self.vision.dim, dim, bias=False)
        self.combine = combine

    def forward(self, batch: Batch) -> ModelOutput:
        """Text and image to the embeddings ``item``, ``text`` and ``image``, (B, dim) each."""
        words = self.read(batch.inputs["text"])
        seen = self.look(batch.inputs.get("image"), words.present)
        vectors = {
            "text": F.normalize(self.text_projection(words.pooled), dim=-1),  # (B, dim)
            "image": F.normalize(self.image_projection(seen.pooled), dim=-1),  # (B, dim)
        }
        present = {"text": words.present, "image": seen.present}
        item = self.combine(vectors, present)  # (B, dim)
        return ModelOutput({"item": item, **vectors}, {"item": words.present | seen.present, **present})


@register(
    "model",
    "dual_encoder",
    joints=JOINTS,
    paper="Radford et al., CLIP, 2021, https://arxiv.org/abs/2103.00020; Zhai et al., SigLIP, 2023, https://arxiv.org/abs/2303.15343",
)
def dual_encoder(
    *,
    text: EncoderSpec = "tiny_text",
    vision: EncoderSpec = "clip_vit_b16",
    fusion: FusionSpec = "concat",
    dim: Positive = 64,
    language: Literal["zh", "en"] = "zh",
    title_length: Positive = 20,
    content_length: Positive = 80,
    max_topics: Positive = 10,
) -> DualEncoder:
    """A text and an image encoder, each with a projection, whose vectors are combined to one of the item.

    The papers contrast the text of an item with its image. Here the items of a pair are contrasted: objective ``infonce`` or ``siglip``
    with ``on: [item]``; with ``on: [text, image]`` they do what the papers do. Both encoders are fine-tuned unless the recipe freezes
    them.

    Args:
        text: The text encoder.
        vision: The image encoder.
        fusion: Plug-ins for the joints combine, schedule.
        dim: Width of the vectors.
        language: Of the marks between title, topics and content.
        title_length: Characters.
        content_length: Characters.
        max_topics: Topics, hashtags of the content included.

    Raises:
        ZooError: If a fusion does not fit.
    """
    joints = compose(fusion, "dual_encoder", JOINTS)
    reads, looks = make("encoder", text), make("encoder", vision)
    limits = {"title_length": title_length, "content_length": content_length, "max_topics": max_topics}
    processor = ItemProcessor(reads.processor, looks.processor, language=language, **limits)
    combine, schedule = joints.make("combine", ["text", "image"], dim), joints.make("schedule", ["text", "image"], dim, 0)
    return DualEncoder(reads, looks, combine, schedule, processor, dim)
