"""Spoken and handwritten digits: real recordings and real pictures, of speakers that training never heard."""

from __future__ import annotations

import hashlib
import json
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, Literal

import duckdb
import numpy as np
import pyarrow as pa
from PIL import Image
from pydantic import Field

from zoo.config import Rates
from zoo.data._tables import Source, reading
from zoo.errors import Absent, ZooError, unknown
from zoo.pictures import UNDECODABLE, check_size, why
from zoo.presence import draw_presence
from zoo.registry import register
from zoo.types import Row

Modality = Literal["audio", "image", "audio2"]
Noise = Annotated[float, Field(ge=0)]

SPLITS = ("train", "val", "test")
SPEAKERS = (3, 1, 2)  # of each split
LAYOUT = """av_digits is a folder with
  audio.parquet   clip_id, label, speaker (six of them), pcm16_8khz (little-endian int16 samples at 8 kHz)
  images.parquet  label, split (train, val, test), image (a PNG)
of the Free Spoken Digit Dataset (Jackson et al., https://github.com/Jakobovski/free-spoken-digit-dataset) and of MNIST (LeCun, Cortes).
The folder that holds it is named by --data DIR or ZOO_DATA on the command line, and by data_root= in Python."""
COLUMNS = {
    "audio": ("clip_id::varchar", "label::bigint", "speaker::varchar", "pcm16_8khz::blob"),
    "images": ("label::bigint", "split::varchar", "image::blob"),
}
PAIRING, SECOND, LOSS, NOISE = range(4)  # what is drawn; each has numbers of its own, so that a change of one leaves the others alone
STREAM = {"audio": 0, "image": 1, "audio2": 2}  # of the noise


class Rows(Sequence[Row]):
    """The rows, decoded and made noisy on access.

    Args:
        clips: (N,) bytes of int16 samples, of each row's own recording.
        pictures: (N,) bytes of image files.
        second: (N,) int64, the row whose recording is this one's ``audio2``.
        modalities: What rows show.
        present: (N, M) bool, which row has which of them.
        noise: Standard deviations: of ``image`` on grey values 0..1, of ``audio`` relative to the recording's root mean square.
        seed: Of the noise.
    """

    def __init__(
        self,
        clips: pa.ChunkedArray,
        pictures: pa.ChunkedArray,
        second: np.ndarray,
        modalities: Sequence[str],
        present: np.ndarray,
        noise: Mapping[str, float],
        seed: int,
    ) -> None:
        self.clips, self.pictures, self.second = clips, pictures, second
        self.modalities, self.present, self.noise, self.seed = tuple(modalities), present, dict(noise), seed

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: Any) -> Any:  # an int; Sequence would also have it take slices
        i = operator.index(index)
        i = i + len(self) if i < 0 else i
        if not 0 <= i < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return {"id": i} | {m: self._read(m, i) for m, there in zip(self.modalities, self.present[i], strict=True) if there}

    def _read(self, modality: str, i: int) -> Any:
        draw = np.random.default_rng([self.seed, NOISE, STREAM[modality], i])
        if modality == "image":
            return _picture(self.pictures[i].as_py(), self.noise["image"], draw)
        return _wave(self.clips[i if modality == "audio" else int(self.second[i])].as_py(), self.noise["audio"], draw)


def _wave(samples: bytes, noise: float, draw: np.random.Generator) -> np.ndarray:
    """(T,) float32 in -1..1 at 8 kHz."""
    wave = np.frombuffer(samples, "<i2").astype(np.float32) / 32768
    if noise:
        level = noise * float(np.sqrt(np.mean(wave**2)))
        wave = np.clip(wave + level * draw.standard_normal(len(wave), dtype=np.float32), -1, 1)
    return wave


def _picture(file: bytes, noise: float, draw: np.random.Generator) -> Image.Image:
    """In grey; noisy values are cut to black and white."""
    with Image.open(BytesIO(file)) as opened:
        check_size(opened)
        picture = opened.convert("L")
    if noise:
        grey = np.asarray(picture) / 255 + noise * draw.standard_normal((picture.height, picture.width))
        picture = Image.fromarray(np.rint(255 * grey.clip(0, 1)).astype(np.uint8))
    return picture


class Digits:
    """The rows, their classes and splits, and what is known of them. It is a `LabelledData`.

    Args:
        rows: As they are read.
        ids: (N,) names of the recordings.
        labels: (N,) int64 digits.
        split: (N,) the split of each row.
        statistics: For the report.
        fingerprint: Of files and settings.
    """

    def __init__(
        self, rows: Rows, ids: Sequence[str], labels: np.ndarray, split: np.ndarray, statistics: Mapping[str, Any], fingerprint: str
    ) -> None:
        self.rows: Sequence[Row] = rows
        self.row_ids: Sequence[Any] = ids
        self.modalities: tuple[str, ...] = rows.modalities
        digits, self.labels = np.unique(labels, return_inverse=True)
        self.classes: tuple[str, ...] = tuple(map(str, digits))
        self.broken: Sequence[Any] = []
        self.statistics, self.fingerprint = statistics, fingerprint
        self._split, self._lengths = split, np.array([len(clip.as_py()) // 2 for clip in rows.clips], dtype=np.int64)

    def split(self, name: str) -> np.ndarray:
        """(n,) int64 rows, in the order of the file.

        Raises:
            ZooError: If there is no such split.
        """
        if name not in SPLITS:
            raise ZooError(unknown("split", name, SPLITS))
        return np.flatnonzero(self._split == name)

    def lengths(self) -> np.ndarray:
        """(N,) int64 samples of the recording."""
        return self._lengths.copy()


@register("data", "av_digits", licence="CC BY-SA 4.0 (recordings), CC BY-SA 3.0 (pictures)")
def av_digits(
    root: Path | None,
    *,
    folder: str = "av_digits",
    rotation: Annotated[int, Field(ge=0, le=5)] = 0,
    seed: Annotated[int, Field(ge=0)] = 0,
    image_noise: Noise = 0.0,
    audio_noise: Noise = 0.0,
    modalities: tuple[Modality, ...] = ("audio", "image"),
    missing_train: Rates = 0.0,
    missing_test: Rates = 0.0,
    unpaired: bool = False,
) -> Digits:
    """Spoken digits, each with a handwritten picture of the same digit, as in AV-MNIST; speakers of test and val are not in train.

    Recordings, pictures and classes are real; which picture goes with which recording is drawn: among the pictures of the same
    class in the file's split of the same name, each at most once in a split as long as they last. So no run trains on a picture
    that any other run tests on. Missing modalities have no key; a row keeps one at least, and val rows keep all, so that
    selection does not depend on what is lost.

    Args:
        root: The folder of data folders.
        folder: Below ``root``, or an absolute path.
        rotation: Of the six speakers in alphabetical order, train has three from here on, then val one, then test two, around the circle.
        seed: Of pairing, noise and loss, each drawn apart from the others.
        image_noise: Standard deviation of Gaussian noise on grey values 0..1, drawn once for each row; what leaves 0..1 is cut.
        audio_noise: The same on samples -1..1, relative to the root mean square of the recording.
        modalities: What rows show. ``audio2`` is another recording of the digit by another speaker of the split, or where the split
            has too few others, as val, by the same.
        missing_train: Share of the training rows that lose each modality, ``{image: 0.5}``; a number is the share of all cells,
            as `draw_presence` says.
        missing_test: The same of the test rows.
        unpaired: Each training row keeps one modality, all kept equally often, and no recording occurs twice, as audio2 either.

    Raises:
        ZooError: If the folder or a file is not there, or with the rows that are wrong in it, or if settings contradict each other.
    """
    settings = {k: v for k, v in locals().items() if k not in ("root", "folder")}
    _check(modalities, missing_train, unpaired)
    place = _find(root, folder)
    clips, pictures = _read(place, "audio"), _read(place, "images")
    labels = clips["label"].to_numpy()
    speakers = np.array(clips["speaker"].to_pylist())
    heard = _rotated(speakers, rotation)
    split = np.select([np.isin(speakers, heard[s]) for s in SPLITS], SPLITS, "")
    shown = _deal(np.random.default_rng([seed, PAIRING]), labels, split, pictures)
    second = _second(np.random.default_rng([seed, SECOND]), labels, split, speakers) if "audio2" in modalities else np.arange(len(labels))
    if unpaired:
        missing_train = 1.0  # of all cells: one modality is left
        second = np.where(split == "train", np.arange(len(labels)), second)
    present = np.ones((len(labels), len(modalities)), dtype=bool)
    for number, (name, rates) in enumerate((("train", missing_train), ("test", missing_test))):
        present[split == name] = draw_presence(rates, int((split == name).sum()), modalities, [seed, LOSS, number])
    rows = Rows(
        clips["pcm16_8khz"], pictures["image"].take(shown), second, modalities, present, {"image": image_noise, "audio": audio_noise}, seed
    )
    statistics = _statistics(rows, split, heard, shown, speakers)
    return Digits(rows, clips["clip_id"].to_pylist(), labels, split, statistics, _fingerprint(place, settings))


def _check(modalities: Sequence[str], missing_train: Any, unpaired: bool) -> None:
    if not modalities or len(set(modalities)) < len(modalities):
        raise ZooError(f"av_digits: modalities {', '.join(modalities) or 'none'}: write one or more of audio, image, audio2, each once")
    if unpaired and len(modalities) < 2:
        raise ZooError(f"av_digits: unpaired: rows show {modalities[0]} alone: write two modalities or more")
    if unpaired and missing_train != 0:
        raise ZooError("av_digits: unpaired: a training row keeps one modality as it is: leave missing_train out")


def _find(root: Path | None, folder: str) -> Path:
    place = Path(folder) if root is None else root / folder
    if root is None and not place.is_absolute():
        raise Absent(f"the data set {folder!r} is looked for in a folder of data folders, and none is given\n{LAYOUT}")
    if not place.is_dir():
        raise Absent(f"no folder {place}\n{LAYOUT}")
    if lost := [f for f in ("audio.parquet", "images.parquet") if not (place / f).is_file()]:
        raise Absent(f"{place}: there is no {' and no '.join(lost)}\n{LAYOUT}")
    return place


def _read(place: Path, name: str) -> pa.Table:
    """A table of which every cell is there and every recording or picture can be decoded."""
    wanted = {c.partition("::")[0]: c for c in COLUMNS[name]}
    with duckdb.connect() as con:
        source = Source(con, place / f"{name}.parquet", name)
        if faults := source.missing(*wanted):
            raise ZooError("\n".join(faults))
        with reading(source.path):
            table = con.sql(f"select {', '.join(f'{sql} as {c}' for c, sql in wanted.items())} from {source.sql}").to_arrow_table()
    faults = [f"column {c!r} has {n} empty cells" for c in wanted if (n := table[c].null_count)]
    if not faults:
        ids = table["clip_id"].to_pylist() if name == "audio" else [""] * len(table)
        faults = [f"clip_id {id_} stands there {n} times" for id_, n in Counter(ids).items() if n > 1 and id_]
        things = table["pcm16_8khz" if name == "audio" else "image"]
        wrong = _clip_fault if name == "audio" else _picture_fault
        faults += [
            f"row {i}{f' ({id_})' if id_ else ''}: {said}"
            for i, (id_, thing) in enumerate(zip(ids, things, strict=True))
            if (said := wrong(thing.as_py()))
        ]
    if faults:
        more = [f"and {len(faults) - 10} more"] if len(faults) > 10 else []
        raise ZooError(f"{source.path}: " + "\n".join([*faults[:10], *more]))
    return table


def _clip_fault(samples: bytes) -> str:
    return "" if samples and len(samples) % 2 == 0 else f"{len(samples)} bytes are no int16 samples"


def _picture_fault(file: bytes) -> str:
    try:
        _picture(file, 0.0, np.random.default_rng(0))
    except UNDECODABLE as e:
        return f"{len(file)} bytes are no picture that can be decoded ({why(e)})"
    return ""


def _rotated(speakers: np.ndarray, rotation: int) -> dict[str, list[str]]:
    """The speakers of each split."""
    names = sorted(set(speakers.tolist()))
    if len(names) != sum(SPEAKERS):
        raise ZooError(f"audio.parquet: {len(names)} speakers ({', '.join(names)}): {sum(SPEAKERS)} are rotated, 3 train, 1 val, 2 test")
    turned = names[rotation:] + names[:rotation]
    ends = np.cumsum(SPEAKERS)
    return {s: turned[end - n : end] for s, n, end in zip(SPLITS, SPEAKERS, ends.tolist(), strict=True)}


def _deal(draw: np.random.Generator, labels: np.ndarray, split: np.ndarray, pictures: pa.Table) -> np.ndarray:
    """(N,) a picture for every row, of its class and split, none twice before all were shown."""
    classes, of = pictures["label"].to_numpy(), np.array(pictures["split"].to_pylist())
    shown = np.full(len(labels), -1)
    faults = []
    for s in SPLITS:
        for k in np.unique(labels):
            rows, found = (np.flatnonzero((a == k) & (b == s)) for a, b in ((labels, split), (classes, of)))
            if not len(rows) or not len(found):
                faults.append(f"split {s!r} has no {'picture' if len(rows) else 'recording'} of class {k}")
            else:
                shown[rows] = np.resize(draw.permutation(found), len(rows))
    if faults:
        raise ZooError("av_digits: " + "\n".join(faults))
    return shown


def _second(draw: np.random.Generator, labels: np.ndarray, split: np.ndarray, speakers: np.ndarray) -> np.ndarray:
    """(N,) the row of another recording of the same class and split, by another speaker if none has more than half of them; each once."""
    second = np.arange(len(labels))
    for s in SPLITS:
        for k in np.unique(labels):
            rows = draw.permutation(np.flatnonzero((labels == k) & (split == s)))
            if len(rows) < 2:
                raise ZooError(f"av_digits: audio2: split {s!r} has one recording of class {k}, and no other to go with it")
            rows = rows[np.argsort(speakers[rows], kind="stable")]
            most = int(np.unique(speakers[rows], return_counts=True)[1].max())
            most = most if 2 * most <= len(rows) else 1
            second[rows] = np.roll(rows, draw.integers(most, len(rows) - most, endpoint=True))  # leaves no speaker beside itself
    return second


def _statistics(
    rows: Rows, split: np.ndarray, heard: Mapping[str, Sequence[str]], shown: np.ndarray, speakers: np.ndarray
) -> dict[str, Any]:
    of = {s: np.flatnonzero(split == s) for s in SPLITS}
    twice = "audio2" in rows.modalities
    out: dict[str, Any] = {
        "rows": {s: len(there) for s, there in of.items()},
        "speakers": dict(heard),
        "missing": {
            s: dict(zip(rows.modalities, (~rows.present[there]).mean(0).round(4).tolist(), strict=True)) for s, there in of.items()
        },
        "pictures_shown_again": {s: len(there) - len(np.unique(shown[there])) for s, there in of.items()},
        "real": "recordings, pictures and their classes",
        "derived": "which picture goes with which recording, by class" + (", and which second recording" if twice else ""),
    }
    if twice:
        other = speakers[rows.second] != speakers
        out["audio2_of_another_speaker"] = {s: round(float(other[there].mean()), 4) for s, there in of.items()}
    return out


def _fingerprint(place: Path, settings: Mapping[str, Any]) -> str:
    total = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name in COLUMNS:
        with (place / f"{name}.parquet").open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()
