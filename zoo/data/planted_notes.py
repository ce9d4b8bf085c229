"""Notes with a known structure, drawn and written from a seed, so that a run and its diagnosis can be checked without any download."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw
from pydantic import Field

from zoo.config import Fraction, Positive
from zoo.data._collection import Collection, Input
from zoo.data._folder import Tables, load
from zoo.data._mining import DAY, PAPER, Mine
from zoo.data._planted_words import COMMON, SHORT, STYLES, TOPICS
from zoo.registry import register

Language = Literal["english", "chinese"]
TOPIC_COUNT, STYLE_COUNT = 8, 5
COLOURS = ("#8a5a2b", "#3a3a3a", "#d6202f", "#2e8b3d", "#8f7be0")  # one a style
MONDAY = 1704067200.0  # 2024-01-01 00:00 UTC
SPLITS = ("train", "val", "test")  # a week each
SHARES = (0.5, 0.25, 0.25)  # of the notes: every note lives in one week, so that no test note was seen in training
LOYALTY = 0.85  # share of clicks on what the user likes
ONLY_ONE = 0.03  # share of the notes without an image, and of the notes without text


class Planted(NamedTuple):
    """The tables, and the truth behind them."""

    notes: pa.Table  # note_id, title, topic, content, image
    clicks: pa.Table  # user_id, note_id, timestamp, split
    topic: np.ndarray  # (N,) int64 below TOPIC_COUNT
    style: np.ndarray  # (N,) int64 below STYLE_COUNT


@register("data", "planted_notes")
def planted_notes(
    root: Path | None = None,
    *,
    notes: Annotated[int, Field(ge=100)] = 2000,
    users: Positive = 3000,
    seed: int = 0,
    language: Language = "english",
    short_share: Fraction = 0.17,
    image_size: Annotated[int, Field(ge=16)] = 40,
    mine: Mine = PAPER,
    inputs: list[Input] | None = None,
) -> Collection:
    """Procedural notes whose pairs share a topic and a style: the words tell both, the picture shows both.

    Each user likes two combinations of topic and style and clicks them for three weeks, each with its own notes:
    train, val, test. Mining finds the combinations again. In the notes with short texts only the picture tells.

    Args:
        root: Not used: nothing is read.
        notes: Under about 1000 there are fewer good partners than ``mine.top`` in a week.
        users: Who click.
        seed: Of everything.
        language: Of the texts.
        short_share: Share of the notes whose text says nothing; of these a few have no text at all.
        image_size: Side of the pictures in pixels.
        mine: How pairs are mined.
        inputs: What rows show, ``[image]`` for a run without text; None: both.
    """
    planted = plant(notes=notes, users=users, seed=seed, language=language, short_share=short_share, image_size=image_size)
    loaded = load(Tables(planted.notes, planted.clicks, None), "planted_notes", {}, mine, None, False)
    shown: list[Input] = ["text", "image"] if inputs is None else inputs
    return Collection(loaded, folder=None, inputs=shown, rule=mine, cold=None, settings={})


def plant(*, notes: int, users: int, seed: int, language: Language, short_share: float, image_size: int) -> Planted:
    """Draw the notes and let the users click; the same arguments give the same bytes."""
    draw = np.random.default_rng(seed)
    week = draw.permutation(np.repeat(np.arange(3), np.diff([0, *(np.cumsum(SHARES) * notes).round().astype(int)])))  # (N,)
    latent, rest = np.empty(notes, np.int64), np.empty(notes)
    for here in (np.flatnonzero(week == w) for w in range(3)):  # the same shares in every week
        latent[here] = draw.permutation(np.arange(len(here)) % (TOPIC_COUNT * STYLE_COUNT))  # topic and style as one number
        rest[here] = draw.permutation((np.arange(len(here)) + 0.5) / len(here))
    topic, style = np.divmod(latent, STYLE_COUNT)
    short, silent, blind = rest < short_share, rest < min(short_share, ONLY_ONE), rest > max(short_share, 1 - ONLY_ONE)
    written = [_write(draw, int(a), int(b), language, bool(s)) for a, b, s in zip(topic, style, short, strict=True)]
    images = [_draw(draw, int(a), int(b), image_size) for a, b in zip(topic, style, strict=True)]
    columns = {
        "note_id": pa.array(range(notes)),
        **{
            f: pa.array([None if q else w[i] for w, q in zip(written, silent, strict=True)])
            for i, f in enumerate(("title", "topic", "content"))
        },
        "image": pa.array([None if b else image for image, b in zip(images, blind, strict=True)], pa.binary()),
    }
    return Planted(pa.table(columns), _click(draw, latent, week, users), topic, style)


def _write(draw: np.random.Generator, topic: int, style: int, language: Language, short: bool) -> tuple[str, str | None, str | None]:
    """Title, topic and content."""
    if short:
        return str(draw.choice(SHORT[language])), None, None
    name, about = list(TOPICS[language].items())[topic]
    manner, how = list(STYLES[language].items())[style]
    lists = [about.split(), how.split(), COMMON[language].split()]
    kinds = draw.choice(3, size=int(draw.integers(10, 25)), p=[0.45, 0.2, 0.35])
    words = [lists[kind][int(draw.integers(len(lists[kind])))] for kind in kinds]
    gap = " " if language == "english" else ""
    return gap.join([manner, lists[0][int(draw.integers(len(lists[0])))]]), name, gap.join(words)


def _draw(draw: np.random.Generator, topic: int, style: int, size: int) -> bytes:
    """A PNG: the shape is the topic, the colour is the style; place, size and paper are chance."""
    paper = tuple(int(x) for x in draw.integers(215, 256, size=3))
    image = Image.new("RGB", (size, size), paper)
    pen = ImageDraw.Draw(image)
    radius = size * draw.uniform(0.25, 0.4)
    x, y = (draw.uniform(radius, size - radius) for _ in range(2))
    box, ink, wide = (x - radius, y - radius, x + radius, y + radius), COLOURS[style], max(2, size // 8)
    if topic == 0:
        pen.ellipse(box, fill=ink)
    elif topic == 1:
        pen.rectangle(box, fill=ink)
    elif topic == 2:
        pen.regular_polygon((x, y, radius), 3, fill=ink)
    elif topic == 3:
        pen.ellipse(box, outline=ink, width=wide)
    elif topic == 4:
        pen.rectangle(box, outline=ink, width=wide)
    elif topic == 5:
        pen.line((x - radius, y, x + radius, y), fill=ink, width=wide)
        pen.line((x, y - radius, x, y + radius), fill=ink, width=wide)
    elif topic == 6:
        for at in (y - radius, y, y + radius):
            pen.line((x - radius, at, x + radius, at), fill=ink, width=wide // 2 + 1)
    else:
        pen.line((x - radius, y - radius, x + radius, y + radius), fill=ink, width=wide)
        pen.line((x - radius, y + radius, x + radius, y - radius), fill=ink, width=wide)
    file = BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _click(draw: np.random.Generator, latent: np.ndarray, week: np.ndarray, users: int) -> pa.Table:
    """Clicks in the order of time: each user likes two combinations, and in each week clicks about twelve notes of that week."""
    combinations = TOPIC_COUNT * STYLE_COUNT
    likes = np.stack([draw.permutation(combinations)[:2] for _ in range(users)])  # (U, 2)
    user, note, at = [], [], []
    for w in range(3):
        who = np.repeat(np.arange(users), 2 + draw.poisson(10, size=users))  # (C,)
        wanted = likes[who, draw.integers(2, size=len(who))]
        wanted = np.where(draw.random(len(who)) < LOYALTY, wanted, draw.integers(combinations, size=len(who)))
        here = np.flatnonzero(week == w)
        here = here[np.argsort(latent[here], kind="stable")]
        first = np.searchsorted(latent[here], wanted)
        many = np.searchsorted(latent[here], wanted, side="right") - first
        chosen = here[np.minimum(first + (draw.random(len(who)) * many).astype(np.int64), len(here) - 1)]
        user.append(who[many > 0])  # with few notes, a combination may have none in a week
        note.append(chosen[many > 0])
        at.append(MONDAY + (w + draw.random(len(who))[many > 0]) * 7 * DAY)
    time = np.concatenate(at)
    order = np.argsort(time, kind="stable")
    split = np.repeat(np.array(SPLITS, dtype=object), [len(x) for x in at])
    whole = {"user_id": np.concatenate(user), "note_id": np.concatenate(note), "timestamp": time, "split": split}
    return pa.table({name: pa.array(values[order]) for name, values in whole.items()})
