"""Raw pictures in, captions out; or raw pictures and questions in, answers out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from zoo.abilities import Answering, Captioning, Matching, check_learned
from zoo.answers import rank_answers
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
    does = {
        Captioning: "writes captions: take a BLIP, a CoCa or a BEiT-3",
        Matching: "tells whether picture and text match: take an ALBEF, a BLIP or a VLMo",
    }
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
def answer(
    model: Any,
    questions: Sequence[Row],
    answers: Sequence[str],
    *,
    k: int = 128,
    smoothing: float = 0.1,
    batch_size: int = 32,
    show_progress: bool | None = None,
) -> list[list[tuple[str, float]]]:
    """Which of a closed list of answers a model would write to questions about pictures, as BLIP ranks them.

    Args:
        model: A BLIP.
        questions: Rows with ``image`` and ``text``, each read once.
        answers: To choose from.
        k: As of `zoo.answers.rank_answers`, how many are read to their end and come back.
        smoothing: As of `zoo.answers.rank_answers`.
        batch_size: Questions at a time.
        show_progress: None: a bar when there are many and somebody watches.

    Returns:
        Of each question the answers, best first, each with the log-probability of its words.

    Raises:
        ZooError: If the model answers no questions, was converted without what it needs for them, a row has no picture or no question, or
            an answer has no words.
    """
    if not isinstance(model, Answering):
        raise ZooError(f"a {type(model).__name__} writes no answers to questions: take a BLIP")
    writes: Any = model
    own = writes.answering
    needs = r"trunk\..*\.decode\.|head\." if own is model else r"answerer\."
    check_learned(model, "answers", rf"embed\.|trunk\..*\.encode\.|{needs}")
    ids = [writes.vocabulary.encode(one) for one in answers]
    end, found = writes.vocabulary.role("end", "an answer"), []
    writes.eval()
    for start in progress(range(0, len(questions), batch_size), "answers", show_progress):
        rows = [questions[i] for i in range(start, min(start + batch_size, len(questions)))]
        if lost := [start + i for i, row in enumerate(rows) if not (row.get("text") and row.get("image") is not None)]:
            raise ZooError(f"row {', '.join(map(str, lost[:5]))}: a question needs a picture and a text")
        inputs = _batch(model, rows, start).inputs
        ranked = rank_answers(own, model.ask(inputs["text"], writes.see(inputs["image"])), ids, end=end, k=k, smoothing=smoothing)
        pairs = zip(ranked.answers.tolist(), ranked.scores.tolist(), strict=True)
        found += [[(answers[i], score) for i, score in zip(*one, strict=True)] for one in pairs]
    return found


@torch.no_grad()
def look(model: Any, pictures: Sequence[Row], first: int = 0) -> Tokens:
    """What a model begins from of raw pictures: its ``see``.

    Raises:
        ZooError: If one cannot be decoded.
    """
    return model.see(_inputs(model, [{"image": row.get("image")} for row in pictures], "image", first))


def _inputs(model: Any, given: Sequence[Row], what: str, first: int) -> Any:
    """(B) rows of which each has ``what``, as the model takes it."""
    if lost := [i for i, row in enumerate(given, first) if not model.processor.sees(row)]:
        raise ZooError(f"row {', '.join(map(str, lost[:5]))}: there is no {what}")
    return _batch(model, given, first).inputs[what]


def _batch(model: Any, given: Sequence[Row], first: int) -> Batch:
    """As the model takes it, on its device."""
    batch = Batch(stack([processed(model.processor, row, i) for i, row in enumerate(given, first)]))
    return to_device(batch, next(model.parameters()).device)
