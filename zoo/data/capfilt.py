"""What `zoo capfilt` wrote, as a data set: the pictures of another one, with texts of which some were written and some thrown away."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import duckdb
import numpy as np
import pyarrow as pa

from zoo.config import Fraction
from zoo.data._captioned import Captioned, Pictures, linked
from zoo.data._tables import Source, reading
from zoo.errors import Absent, Failure, ZooError
from zoo.registry import make, register

Arm = Literal["both", "captioner", "filter"]
TEXTS, ABOUT = "texts.parquet", "capfilt.json"  # the latter is written last: a folder that has it is whole
COLUMNS = {"picture_id": None, "text": ("VARCHAR",), "origin": ("VARCHAR",), "score": ("FLOAT", "DOUBLE"), "planted": ("BOOLEAN",)}
ORIGINS = ("web", "synthetic", "human")
NEEDS: Mapping[str, tuple[str, ...]] = {"both": ("captioner", "filter"), "captioner": ("captioner",), "filter": ("filter",)}
LAYOUT = f"""A folder of zoo capfilt holds
  {TEXTS}  picture_id, text, origin (web, synthetic, human), score (chance of a match; null where none was asked), planted
  {ABOUT}   which data set the pictures are from, and which models wrote and judged the texts"""


@register(
    "data", "capfilt", paper="Li et al., BLIP, 2022, https://arxiv.org/abs/2201.12086", licence="of the data set that it was made from"
)
def capfilt(root: Path | None, *, folder: str, arm: Arm | None = None, threshold: Fraction = 0.5) -> Captioned:
    """A data set whose training texts `zoo capfilt` has bootstrapped: noisy ones filtered, synthetic ones added, trusted ones as they were.

    The pictures, and every split but ``train``, are those of the data set that it was made from, which has to be there too.
    ``train`` is {texts of the web that the filter kept, texts of the captioner that it kept, trusted texts}. Pictures have one
    ``subject`` where they share a text of people, or, where they have none left, one of the captioner: chains of its texts link nothing,
    since it says the same of many pictures.

    Args:
        root: The folder of data folders.
        folder: Below ``root``, or an absolute path.
        arm: ``captioner``: synthetic texts are added and nothing is filtered. ``filter``: nothing is added. ``both``. None: all that
            was done when the folder was written.
        threshold: Texts are kept whose score is at least that; 0.5 is where the filter's head prefers a match.

    Raises:
        ZooError: If the folder is not there or damaged, the data set it was made from is not there or another one, or the arm needs a
            model that was not asked.
    """
    place = _find(root, folder)
    about = _about(place)
    done = [name for name in ("captioner", "filter") if about[name] is not None]
    chosen: Arm = arm or ("both" if len(done) == 2 else "captioner" if done == ["captioner"] else "filter")
    if lost := [name for name in NEEDS[chosen] if name not in done]:
        raise ZooError(f"capfilt: arm: {chosen}: {place} was written without a {lost[0]}: write arm: {done[0]}, or zoo capfilt --{lost[0]}")
    source = make("data", about["source"], root)
    assert isinstance(source, Captioned), "zoo capfilt takes no other"
    if source.fingerprint != about["fingerprint"]:
        raise ZooError(f"{place} was made from other data than {about['source']} gives now: run zoo capfilt again")
    texts = _read(place, source)
    return _made(source, texts, chosen, threshold, place, about)


def kept(texts: pa.Table, arm: Arm, threshold: float) -> np.ndarray:
    """(n,) bool, which texts an arm trains on."""
    origin = np.array(texts["origin"].to_pylist())
    score = texts["score"].to_numpy().astype(np.float64)
    chosen = np.ones(len(origin), dtype=bool) if arm == "captioner" else np.isnan(score) | (score >= threshold)
    return (chosen | (origin == "human")) & ((origin != "synthetic") | (arm != "filter"))


def _made(source: Captioned, texts: pa.Table, arm: Arm, threshold: float, place: Path, about: Mapping[str, Any]) -> Captioned:
    chosen = texts.filter(pa.array(kept(texts, arm, threshold)))
    if not len(chosen):
        raise ZooError(f"{place}: no text is left for arm {arm!r} with threshold {threshold}: lower the threshold")
    number = {text: i for i, text in enumerate(source.captions)}
    captions = [number.setdefault(text, len(number)) for text in chosen["text"].to_pylist()]
    picture = {name: i for i, name in enumerate(source.picture_ids)}
    pairs = np.array([[picture[name] for name in chosen["picture_id"].to_pylist()], captions], dtype=np.int64).T
    planted = np.array(chosen["planted"].to_pylist(), dtype=bool)
    origin = np.array(chosen["origin"].to_pylist())
    _, first = np.unique(pairs, axis=0, return_index=True)  # the captioner may write what stood there
    first = np.sort(first)
    pairs, planted, origin = pairs[first], planted[first], origin[first]
    splits = {name: pairs if name == "train" else source.pairs(name) for name in source.splits}
    said = [pairs[origin != "synthetic"], *(found for name, found in splits.items() if name != "train")]
    speechless = ~np.isin(pairs[:, 0], np.concatenate(said)[:, 0])
    assert isinstance(source.pictures, Pictures)
    return Captioned(
        source.pictures,
        source.picture_ids,
        list(number),
        splits,
        kinds=source.kinds,
        subject=linked(np.concatenate([*said, pairs[speechless]]), len(source.pictures)),
        planted={"train": planted},
        broken=source.broken,
        statistics={
            "arm": arm,
            "threshold": threshold,
            "origins": dict(sorted(Counter(origin.tolist()).items())),
            "planted_mismatches": int(planted.sum()),
            "source": dict(source.statistics),
            "models": {name: about[name] for name in ("captioner", "filter")},
        },
        fingerprint=_fingerprint(place, arm, threshold),
    )


def _find(root: Path | None, folder: str) -> Path:
    place = Path(folder) if root is None else root / folder
    if root is None and not place.is_absolute():
        raise Absent(f"the data set {folder!r} is looked for in a folder of data folders, and none is given\n{LAYOUT}")
    if not place.is_dir():
        raise Absent(f"no folder {place}\n{LAYOUT}")
    if lost := [name for name in (ABOUT, TEXTS) if not (place / name).is_file()]:
        raise ZooError(f"{place}: there is no {' and no '.join(lost)}: run zoo capfilt again, which goes on where it was stopped\n{LAYOUT}")
    return place


def _about(place: Path) -> dict[str, Any]:
    try:
        about = json.loads((place / ABOUT).read_text(encoding="utf-8"))
        lacks = [key for key in ("source", "fingerprint", "captioner", "filter") if key not in about]
    except (ValueError, TypeError) as e:
        raise Failure(f"{place / ABOUT} is damaged ({e}): run zoo capfilt again") from e
    if lacks:
        raise Failure(f"{place / ABOUT} lacks {', '.join(lacks)}: run zoo capfilt again")
    return dict(about)


def _read(place: Path, source: Captioned) -> pa.Table:
    """The table of texts, all of pictures that the source has."""
    with duckdb.connect() as con:
        table = Source(con, place / TEXTS, "texts")
        if faults := table.missing(*COLUMNS):
            raise ZooError("\n".join(faults))
        odd = [
            f"{TEXTS}: column {c!r} is {table.type(c)}, not {kinds[0]}"
            for c, kinds in COLUMNS.items()
            if kinds and table.type(c) not in kinds
        ]
        if odd:
            raise ZooError("\n".join(odd))
        with reading(table.path):
            texts = con.sql(f"select {', '.join(table.at(c) for c in COLUMNS)} from {table.sql}").to_arrow_table()
    known = set(source.picture_ids)
    faults = [f"column {c!r} has {n} empty cells" for c in COLUMNS if c != "score" and (n := texts[c].null_count)]
    faults += [
        f"{n} picture_id, such as {lost[0]!r}, are not in the data set it was made from"
        for lost in [[i for i in texts["picture_id"].to_pylist() if i is not None and i not in known]]
        if (n := len(lost))
    ]
    faults += [f"origin {o!r} is none of {', '.join(ORIGINS)}" for o in sorted({*texts["origin"].to_pylist()} - {*ORIGINS, None})]
    if faults:
        raise ZooError(f"{place / TEXTS}: " + "\n".join(faults))
    return texts


def _fingerprint(place: Path, arm: str, threshold: float) -> str:
    total = hashlib.sha256(json.dumps([arm, threshold]).encode())
    for name in (ABOUT, TEXTS):
        with (place / name).open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()
