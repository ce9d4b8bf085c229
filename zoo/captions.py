"""Raw pictures in, captions out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from zoo.abilities import Captioning, Matching, check_learned
from zoo.collate import processed, stack
from zoo.errors import ZooError
from zoo.generation import check_room, write
from zoo.models._encode import progress, to_device
from zoo.sections import Decoding, Retrieve
from zoo.types import Batch, CaptionedData, Row, Tokens

_NEEDS = {Captioning: ("captions", r"head\.|.*\.decode\."), Matching: ("matches", r"matches\.|.*\.encode\.")}  # names of weights


def check_able(model: Any, ability: Any, name: str) -> None:
    """Whether a model can do what it is asked for.

    Args:
        model: Any.
        ability: A Protocol of `zoo.abilities`.
        name: Of the model, for the message.

    Raises:
        ZooError: If not, or if its weights were converted without those that it needs for it.
    """
    if isinstance(model, ability):
        check_learned(model, *_NEEDS[ability])
        return
    does = {Captioning: "writes captions: take a BLIP or a CoCa", Matching: "tells whether picture and text match: take an ALBEF or a BLIP"}
    raise ZooError(f"{name} is a {type(model).__name__}, which is no model that {does[ability]}")


def check_asked(model: Any, data: Any, settings: Retrieve) -> None:
    """Whether there is room for the captions that a recipe asks for: before the first step, not after the last.

    Args:
        model: Any.
        data: Any; of others than captioned pictures no captions are asked for.
        settings: Of what is measured.

    Raises:
        ZooError: If not.
    """
    if not isinstance(data, CaptionedData) or not settings.captions or not isinstance(model, Captioning):
        return
    words: Any = model
    try:
        check_room(model, settings.decode, words.vocabulary.encode(settings.prompt))
    except ZooError as e:
        raise ZooError(f"retrieve.decode: {e}") from e


def caption(
    model: Any,
    pictures: Sequence[Row],
    how: Decoding,
    *,
    prompt: str = "",
    seed: int = 0,
    first: int = 0,
    batch_size: int = 32,
    show_progress: bool | None = None,
) -> list[str]:
    """What a model writes of each picture.

    Args:
        model: Has `zoo.abilities.Captioning`.
        pictures: Rows with ``image``, each read once.
        how: The way words are chosen.
        prompt: Words that each caption goes on from, and that stand at its beginning.
        seed: Of the draws.
        first: The number of the first picture: number and seed decide what is drawn.
        batch_size: Pictures at a time.
        show_progress: None: a bar when there are many and somebody watches.

    Raises:
        ZooError: If the model writes no captions, or none as long as these may be, or a picture cannot be decoded.
    """
    check_able(model, Captioning, "this model")
    check_room(model, how, model.vocabulary.encode(prompt))
    end, begins, texts = model.vocabulary.role("end", "a caption"), model.vocabulary.encode(prompt), []
    model.eval()
    for start in progress(range(0, len(pictures), batch_size), "captions", show_progress):
        seen = look(model, [pictures[i] for i in range(start, min(start + batch_size, len(pictures)))], start)
        written = write(model, seen, how, end=end, prompt=begins, seed=seed, first=first + start)
        texts += [model.vocabulary.decode([*begins, *ids]) for ids in written.ids]
    return texts


@torch.no_grad()
def look(model: Any, pictures: Sequence[Row], first: int = 0) -> Tokens:
    """What a model makes of raw pictures: its ``look``.

    Raises:
        ZooError: If one cannot be decoded.
    """
    return model.look(_inputs(model, [{"image": row.get("image")} for row in pictures], "image", first))


def _inputs(model: Any, given: Sequence[Row], what: str, first: int) -> Any:
    """(B) rows of which each has ``what``, as the model takes it."""
    if lost := [i for i, row in enumerate(given, first) if not model.processor.sees(row)]:
        raise ZooError(f"row {', '.join(map(str, lost[:5]))}: there is no {what}")
    batch = Batch(stack([processed(model.processor, row, i) for i, row in enumerate(given, first)]))
    return to_device(batch, next(model.parameters()).device).inputs[what]
