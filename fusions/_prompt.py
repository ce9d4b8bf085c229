"""The JSON-like note that every arrangement of NoteLLM-2 writes, with the tokens of media inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from zoo.joints import Segment, Words


def note(words: Words, media: Sequence[str], fields: Mapping[str, str]) -> list[Segment]:
    """``{"image":"<tokens>","title":"...","topic":"..."}`` after the words that open a note."""
    segments = [Segment(words.note + "{")]
    for i, medium in enumerate(media):
        comma = "," if i else ""
        segments += [
            Segment(f'{comma}"{words.keys.get(medium, medium)}":"'),
            Segment(role=f"{medium}_start"),
            Segment(media=medium),
            Segment(role=f"{medium}_end"),
            Segment('"'),
        ]
    members = ",".join(f'"{words.keys.get(key, key)}":"{value}"' for key, value in fields.items())
    comma = "," if media and members else ""
    return [*segments, Segment(comma + members + "}")]


def compress(words: Words, anchor: str) -> Segment:
    """The words that ask for one word; they end with the quote where the embedding is read."""
    return Segment(words.compress, anchor=anchor, keep=True)
