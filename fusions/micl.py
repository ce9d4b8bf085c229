"""The visual note first, with a compressed word of its own, then the text note."""

from __future__ import annotations

from zoo.fusions._prompt import compress, note
from zoo.joints import Parts, Segment
from zoo.registry import register


@register("fusion", "micl", joints=("arrange",), paper="Zhang et al., 2024, https://arxiv.org/abs/2405.16789")
class InContext:
    """mICL, multimodal in-context learning: by causality the first word sees the image alone, the second sees everything.

    A row without media has the text note only, and no ``visual`` anchor.
    """

    anchors = ("note", "visual")
    media = True

    def __call__(self, parts: Parts) -> list[Segment]:
        """``note: {image}, compress: <word>. note: {title, topic, content}, compress:``"""
        words = parts.words
        visual = []
        if parts.media:
            visual = [*note(words, parts.media, {}), compress(words, "visual"), Segment(role="compressed"), Segment(words.close)]
        return [*visual, *note(words, (), parts.fields), compress(words, "note")]
