"""Emoji in several styles of drawing, with what people call them in Chinese and English: real pairs that a CPU learns from in minutes."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
from pydantic import Field

from zoo.config import Fraction
from zoo.data._captioned import SPLITS, Captioned, Pictures, each_once
from zoo.data._collection import decode
from zoo.data._tables import Source, reading
from zoo.errors import Absent, ZooError
from zoo.pictures import UNDECODABLE, why
from zoo.registry import register

Style = Literal["noto", "fluent_hc", "emojione", "fxemoji", "region_flags"]

LAYOUT = """emoji_zh_en is a folder with
  concepts.parquet  concept_id, group, name_en, name_zh, keywords_en, keywords_zh (lists), text_en, text_zh, split (train, val, test)
  images.parquet    image_id, concept_id, style, image (a PNG)
of emoji in the styles noto, fluent_hc, emojione, fxemoji and region_flags, named by Unicode's CLDR.
The folder that holds it is named by --data DIR or ZOO_DATA on the command line, and by data_root= in Python."""
COLUMNS = {"concepts": ("concept_id", "group", "split"), "images": ("image_id", "concept_id", "style", "image")}
TRUSTED, ORDER, WRONG = range(3)  # what is drawn; each has numbers of its own, so that a change of one leaves the others alone
COMMA = {"en": ", ", "zh": "、"}


class _Dealt(NamedTuple):
    """Which pictures each split shows, and what is said of them."""

    shown: Mapping[str, np.ndarray]  # {split: (n,) int64 pictures}
    said: np.ndarray  # (P,) int64 concept whose text each picture has


@register("data", "emoji_zh_en", licence="of each style its own (Apache 2.0, OFL, CC BY 4.0, MIT), names Unicode 3.0")
def emoji_zh_en(
    root: Path | None,
    *,
    folder: str = "emoji_zh_en",
    language: Literal["en", "zh"] = "en",
    text: Literal["name", "keywords", "both"] = "both",
    unseen_style: Style | None = None,
    mismatch: Fraction = 0.0,
    trusted: Fraction = 0.0,
    learn: Literal["all", "trusted"] = "all",
    seed: Annotated[int, Field(ge=0)] = 0,
) -> Captioned:
    """5,407 drawings of 1,900 emoji, each with a text in English or Chinese; no emoji of test or val is in train.

    Splits: ``train``, ``val`` and ``test`` are of different emoji. With ``unseen_style``, ``style`` are the pictures of the training
    emoji in a style that neither train nor val shows; test shows every style. To tune on a style without looking at the one that is
    reported, name another one: ``unseen_style: emojione`` makes ``style`` a split to select on. With ``trusted``, ``trusted`` is that
    share of the training pairs, of which none is exchanged.

    Pictures, names and keywords are real. Where ``mismatch`` is not 0, that share of the training pairs which are not trusted has the
    text of another training emoji, drawn evenly; the pairs of a smaller share are among those of a larger one. Nothing tells
    training which; `planted` does, for measuring. Pictures of one text have one ``subject``, whether the text is true or not.

    Args:
        root: The folder of data folders.
        folder: Below ``root``, or an absolute path.
        language: Of the texts.
        text: The name, which no other emoji has; the keywords, which 16 % of the emoji share with another; or the name, then the keywords.
        unseen_style: Kept out of train and val.
        mismatch: Share of the untrusted training pairs whose text is exchanged.
        trusted: Share of the training pairs that are kept clean, and are a split too.
        learn: Whether split ``train`` is everything there is to learn from, trusted pairs among it, or the trusted pairs alone.
        seed: Of what is trusted, what is exchanged, and for what, each drawn apart from the others.

    Raises:
        ZooError: If the folder or a file is not there, or with the rows that are wrong in it, or if settings contradict each other.
    """
    settings = {k: v for k, v in locals().items() if k not in ("root", "folder")}
    if learn == "trusted" and not trusted:
        raise ZooError("emoji_zh_en: learn: trusted: no training pair is trusted: write the share of those that are, trusted: 0.2")
    place = _find(root, folder)
    column = f"{'text' if text == 'both' else text}_{language}"
    concepts, images = _read(place, "concepts", column), _read(place, "images")
    said = concepts[column].to_pylist()
    captions, caption_of = each_once([COMMA[language].join(x) if isinstance(x, list) else x for x in said])
    of = _joined(place, concepts, images)
    styles = np.array(images["style"].to_pylist())
    dealt = _dealt(np.array(concepts["split"].to_pylist()), of, styles, settings)
    wrong = caption_of[dealt.said] != caption_of[of]  # two emoji may have the same keywords
    pairs = {name: np.stack([shown, caption_of[dealt.said[shown]]], 1) for name, shown in dealt.shown.items()}
    group = np.array(concepts["group"].to_pylist(), dtype=object)[of]
    return Captioned(
        Pictures(images["image"]),
        images["image_id"].to_pylist(),
        captions,
        pairs,
        kinds=group.tolist(),
        planted={"train": wrong[dealt.shown["train"]]},
        statistics=_statistics(dealt.shown, int(wrong[dealt.shown["train"]].sum()), styles, of, settings),
        fingerprint=_fingerprint(place, settings),
    )


def _find(root: Path | None, folder: str) -> Path:
    place = Path(folder) if root is None else root / folder
    if root is None and not place.is_absolute():
        raise Absent(f"the data set {folder!r} is looked for in a folder of data folders, and none is given\n{LAYOUT}")
    if not place.is_dir():
        raise Absent(f"no folder {place}\n{LAYOUT}")
    if lost := [f for f in COLUMNS if not (place / f"{f}.parquet").is_file()]:
        raise Absent(f"{place}: there is no {' and no '.join(f'{f}.parquet' for f in lost)}\n{LAYOUT}")
    return place


def _read(place: Path, name: str, *more: str) -> pa.Table:
    """A table of which every cell is there, every row is named once, and every picture can be decoded."""
    wanted = (*COLUMNS[name], *more)
    with duckdb.connect() as con:
        source = Source(con, place / f"{name}.parquet", name)
        if faults := source.missing(*wanted):
            raise ZooError("\n".join(faults))
        with reading(source.path):
            table = con.sql(f"select {', '.join(source.at(c) for c in wanted)} from {source.sql}").to_arrow_table()
    ids = table[wanted[0]].to_pylist()
    faults = [f"column {c!r} has {n} empty cells" for c in wanted if (n := table[c].null_count)]
    faults = faults or [f"{wanted[0]} {id_} stands there {n} times" for id_, n in Counter(ids).items() if n > 1]
    for column in more:
        faults += [f"{id_} has no {column}" for id_, said in zip(ids, table[column].to_pylist(), strict=True) if not said]
    if name == "concepts" and (odd := sorted({*table["split"].to_pylist()} - {*SPLITS, None})):
        faults.append(f"column 'split' holds {', '.join(map(repr, odd))}: write train, val or test")
    if name == "images" and not faults:
        faults = [f"{id_}: {said}" for id_, file in zip(ids, table["image"], strict=True) if (said := _fault(file.as_py()))]
    if faults:
        more_faults = [f"and {len(faults) - 10} more"] if len(faults) > 10 else []
        raise ZooError(f"{source.path}: " + "\n".join([*faults[:10], *more_faults]))
    return table


def _fault(file: bytes) -> str:
    try:
        decode(file, None)
    except UNDECODABLE as e:
        return f"{len(file)} bytes are no picture that can be decoded ({why(e)})"
    return ""


def _joined(place: Path, concepts: pa.Table, images: pa.Table) -> np.ndarray:
    """(P,) int64 the concept of each picture."""
    number = {name: i for i, name in enumerate(concepts["concept_id"].to_pylist())}
    names = images["concept_id"].to_pylist()
    if lost := [name for name in names if name not in number]:
        raise ZooError(f"{place / 'images.parquet'}: {len(lost)} concept_id, such as {lost[0]!r}, are not in concepts.parquet")
    return np.array([number[name] for name in names], dtype=np.int64)


def _dealt(split: np.ndarray, of: np.ndarray, styles: np.ndarray, settings: Mapping[str, Any]) -> _Dealt:
    """The pictures of each split, and the concept whose text each picture has.

    Args:
        split: (K,) of each concept.
        of: (P,) concept of each picture.
        styles: (P,) of each picture.
        settings: Of the data set.
    """
    style = settings["unseen_style"]
    unseen, mine = styles == style, split[of]
    if style and not (unseen & (mine == "train")).any():
        found = ", ".join(sorted({*styles.tolist()}))
        raise ZooError(f"emoji_zh_en: unseen_style: no training emoji is drawn in the style {style!r} (there is: {found})")
    shown = {name: np.flatnonzero((mine == name) & (~unseen | (name == "test"))) for name in SPLITS}
    train, said = shown["train"], of.copy()

    def drawn(what: int) -> np.random.Generator:
        return np.random.default_rng([settings["seed"], what])

    trusted = drawn(TRUSTED).permutation(train)[: round(settings["trusted"] * len(train))]
    order = drawn(ORDER).permutation(train)
    order = order[~np.isin(order, trusted)]
    exchanged = order[: round(settings["mismatch"] * len(order))]
    others = np.unique(of[train])
    if len(exchanged):
        if len(others) < 2:
            raise ZooError("emoji_zh_en: mismatch: there is one training emoji, and so no other text")
        step = drawn(WRONG).integers(1, len(others), len(of))  # one for every picture, so that what one is given depends on no share
        said[exchanged] = others[(np.searchsorted(others, of[exchanged]) + step[exchanged]) % len(others)]
    if settings["trusted"]:
        shown["trusted"] = np.sort(trusted)
    if settings["learn"] == "trusted":
        shown["train"] = np.sort(trusted)
    if style:
        shown["style"] = np.flatnonzero((mine == "train") & unseen)
    return _Dealt(shown, said)


def _statistics(
    shown: Mapping[str, np.ndarray], wrong: int, styles: np.ndarray, of: np.ndarray, settings: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "concepts": {name: len(np.unique(of[there])) for name, there in shown.items()},
        "styles": {name: dict(sorted(Counter(styles[there].tolist()).items())) for name, there in shown.items()},
        "language": settings["language"],
        "text": settings["text"],
        "planted_mismatches": wrong,
        "real": "pictures, names and keywords",
        "derived": "the order of name and keywords in one text" + (", and which training pairs have a wrong text" if wrong else ""),
    }


def _fingerprint(place: Path, settings: Mapping[str, Any]) -> str:
    total = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name in COLUMNS:
        with (place / f"{name}.parquet").open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()
