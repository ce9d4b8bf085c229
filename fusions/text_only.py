"""No visual tokens in the sequence: the text baseline, and with a combine plug-in the "only late fusion" variant."""

from __future__ import annotations

from zoo.fusions._prompt import compress, note
from zoo.joints import Parts, Segment
from zoo.registry import register


@register("fusion", "text_only", joints=("arrange",), paper="Zhang et al., 2024, https://arxiv.org/abs/2405.16789")
class TextOnly:
    """The prompt without the image's key; media reach the embedding through the combine joint or not at all."""

    anchors = ("note",)
    media = False

    def __call__(self, parts: Parts) -> list[Segment]:
        """``note: {title, topic, content}, compress:``"""
        return [*note(parts.words, (), parts.fields), compress(parts.words, "note")]
