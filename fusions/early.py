"""Visual tokens spliced into the prompt, before the text of the note."""

from __future__ import annotations

from zoo.fusions._prompt import compress, note
from zoo.joints import Parts, Segment
from zoo.registry import register


@register("fusion", "early", joints=("arrange",), paper="Zhang et al., 2024, https://arxiv.org/abs/2405.16789")
class Early:
    """Basic multimodal prompt of NoteLLM-2: one note that holds the image and the text, read once at its end."""

    anchors = ("note",)
    media = True

    def __call__(self, parts: Parts) -> list[Segment]:
        """``note: {image, title, topic, content}, compress:``"""
        return [*note(parts.words, parts.media, parts.fields), compress(parts.words, "note")]
