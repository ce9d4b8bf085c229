"""Spoken and handwritten digits: who is in which split, what is shown with what, what is noisy, what is missing, what is broken."""

import pickle
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from zoo.errors import Absent, ZooError
from zoo.registry import make
from zoo.types import LabelledData

DATA = Path(__file__).parents[2] / "shared/data"
SPEAKERS = ("ann", "bob", "cid", "dan", "eve", "fay")
CLASSES, TAKES = 3, 4
PICTURES = {"train": 15, "val": 5, "test": 6}  # of each class; test has 8 rows of each, the others fewer than these


def png(level):
    """A grey picture that its own level names."""
    file = BytesIO()
    Image.new("L", (6, 6), level).save(file, "PNG")
    return file.getvalue()


def audio_table():
    """The first sample of a recording names it: 100 * its row number."""
    rows = []
    for speaker in SPEAKERS:
        for take in range(TAKES):
            for label in range(CLASSES):
                samples = np.random.randint(-9000, 9000, 50 + len(rows)).astype("<i2")
                samples[0] = 100 * len(rows)
                rows.append({"clip_id": f"{label}_{speaker}_{take}", "label": label, "speaker": speaker, "pcm16_8khz": samples.tobytes()})
    return pa.Table.from_pylist(rows)


def image_table():
    rows = [{"label": label, "split": split} for split, n in PICTURES.items() for label in range(CLASSES) for _ in range(n)]
    return pa.Table.from_pylist([{**row, "image": png(2 * i)} for i, row in enumerate(rows)])


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "av_digits").mkdir()
    pq.write_table(audio_table(), tmp_path / "av_digits/audio.parquet")
    pq.write_table(image_table(), tmp_path / "av_digits/images.parquet")
    return tmp_path


def digits(root, **settings):
    return make("data", {"name": "av_digits", **settings}, root)


def clip_of(wave):
    return round(float(wave[0]) * 32768 / 100)


def picture_of(picture):
    return picture.getpixel((0, 0)) // 2


def present(data, split):
    """(n, M) bool."""
    return np.array([[m in data.rows[i] for m in data.modalities] for i in data.split(split).tolist()])


def test_it_is_what_classifiers_train_on(folder):
    data = digits(folder)
    assert isinstance(data, LabelledData)
    assert data.modalities == ("audio", "image")
    assert data.classes == ("0", "1", "2")
    assert len(data.rows) == len(data.row_ids) == len(data.labels) == 72
    assert data.labels.dtype == data.split("train").dtype == data.lengths().dtype == np.int64
    assert data.lengths().tolist() == list(range(50, 122))
    assert list(data.broken) == []
    row = data.rows[-1]
    assert row["id"] == 71
    assert row["audio"].dtype == np.float32
    assert row["audio"].shape == (121,)
    assert clip_of(row["audio"]) == 71
    assert row["image"].mode == "L"
    with pytest.raises(IndexError, match="row 72 of 72"):
        data.rows[72]
    with pytest.raises(ZooError, match=r"no split named 'dev' \(have: test, train, val\)"):
        data.split("dev")


@pytest.mark.parametrize(
    "rotation, train, val, test",
    [(0, "ann bob cid", "dan", "eve fay"), (2, "cid dan eve", "fay", "ann bob"), (5, "fay ann bob", "cid", "dan eve")],
)
def test_speakers_rotate_and_meet_in_no_split(folder, rotation, train, val, test):
    data = digits(folder, rotation=rotation)
    for split, speakers in (("train", train), ("val", val), ("test", test)):
        assert {data.row_ids[i].split("_")[1] for i in data.split(split).tolist()} == set(speakers.split())
        assert data.statistics["speakers"][split] == speakers.split()
    assert data.statistics["rows"] == {"train": 36, "val": 12, "test": 24}
    assert sorted(np.concatenate([data.split(s) for s in ("train", "val", "test")])) == list(range(72))


def test_a_picture_is_of_its_rows_class_and_split_and_shown_once_while_they_last(folder):
    data, pictures = digits(folder), image_table()
    seen = {s: [picture_of(data.rows[i]["image"]) for i in data.split(s).tolist()] for s in PICTURES}
    for split, shown in seen.items():
        assert {pictures["split"][p].as_py() for p in shown} == {split}
        assert [pictures["label"][p].as_py() for p in shown] == data.labels[data.split(split)].tolist()
    assert len(set(seen["train"])) == 36
    assert len(set(seen["val"])) == 12
    assert len(set(seen["test"])) == 18, "all of them before any again"
    assert data.statistics["pictures_shown_again"] == {"train": 0, "val": 0, "test": 6}
    redrawn = digits(folder, seed=1).rows
    other = [picture_of(redrawn[i]["image"]) for i in data.split("train").tolist()]
    assert sum(a == b for a, b in zip(other, seen["train"], strict=True)) < 12


def test_noise_is_drawn_once_a_row_and_leaves_the_pairing_alone(folder):
    plain, noisy = digits(folder), digits(folder, image_noise=0.2, audio_noise=0.5)
    far = [i for i in range(72) if 60 < plain.rows[i]["image"].getpixel((0, 0)) < 195]  # little of their noise is cut
    off = np.stack([(np.asarray(noisy.rows[i]["image"]) - np.float64(plain.rows[i]["image"])) / 255 for i in far])
    assert off.std() == pytest.approx(0.2, rel=0.1)
    assert np.abs(off[0] - off[1]).max() > 0.1, "each row has noise of its own"
    first, again = noisy.rows[7], pickle.loads(pickle.dumps(noisy.rows))[7]
    assert first["image"].tobytes() == again["image"].tobytes()
    assert np.array_equal(first["audio"], again["audio"])
    for i in range(72):
        before, after = plain.rows[i]["audio"], noisy.rows[i]["audio"]
        assert after.dtype == np.float32
        assert np.std(after - before) == pytest.approx(0.5 * np.sqrt(np.mean(before**2)), rel=0.4)
        assert np.abs(after).max() <= 1
    assert not np.array_equal(first["audio"], digits(folder, audio_noise=0.5, seed=1).rows[7]["audio"])
    loud = digits(folder, audio_noise=50.0)
    assert max(np.abs(loud.rows[i]["audio"]).max() for i in range(72)) == 1


def test_a_second_recording_is_of_the_class_and_of_another_speaker(folder):
    data = digits(folder, modalities=["audio", "image", "audio2"])
    ids = [i.split("_") for i in data.row_ids]
    for split in ("train", "val", "test"):
        rows = data.split(split).tolist()
        second = [clip_of(data.rows[i]["audio2"]) for i in rows]
        assert sorted(second) == rows, "each of the split once"
        for i, j in zip(rows, second, strict=True):
            assert ids[i][0] == ids[j][0]
            assert i != j
            assert (ids[i][1] != ids[j][1]) == (split != "val")
    assert data.statistics["audio2_of_another_speaker"] == {"train": 1, "val": 0, "test": 1}
    assert "second recording" in data.statistics["derived"]
    first = digits(folder)
    assert all(picture_of(a["image"]) == picture_of(b["image"]) for a, b in zip(first.rows, data.rows, strict=True))


def test_a_modality_that_is_missing_has_no_key(folder):
    data = digits(folder, missing_train={"image": 0.5}, missing_test={"audio": 0.75, "image": 0.25})
    assert (~present(data, "train")).sum(0).tolist() == [0, 18]
    assert present(data, "val").all()
    assert (~present(data, "test")).sum(0).tolist() == [18, 6]
    assert present(data, "test").any(1).all()
    assert data.statistics["missing"] == {
        "train": {"audio": 0, "image": 0.5},
        "val": {"audio": 0, "image": 0},
        "test": {"audio": 0.75, "image": 0.25},
    }
    assert (present(data, "test") == present(digits(folder, missing_test={"audio": 0.75, "image": 0.25}), "test")).all()
    assert (~present(digits(folder, missing_test=0.25), "test")).sum(0).tolist() == [6, 6]


def test_unpaired_rows_hold_one_modality_and_share_no_recording(folder):
    data = digits(folder, modalities=["audio", "image", "audio2"], unpaired=True)
    assert present(data, "train").sum(0).tolist() == [12, 12, 12]
    assert (present(data, "train").sum(1) == 1).all()
    assert present(data, "val").all()
    assert present(data, "test").all()
    rows = [data.rows[i] for i in data.split("train").tolist()]
    heard = [clip_of(row[m]) for row in rows for m in ("audio", "audio2") if m in row]
    assert len(set(heard)) == len(heard) == 24
    assert data.statistics["missing"]["train"]["audio"] == pytest.approx(2 / 3, abs=1e-4)


def test_the_fingerprint_tells_data_apart(folder):
    settings = [{}, {"rotation": 1}, {"seed": 1}, {"image_noise": 0.1}, {"audio_noise": 0.1}, {"missing_test": 0.1}, {"unpaired": True}]
    marks = [digits(folder, **s).fingerprint for s in settings]
    assert len(set(marks)) == len(marks)
    assert digits(folder, folder="./av_digits").fingerprint == marks[0]
    pq.write_table(image_table().slice(0, 77), folder / "av_digits/images.parquet")
    assert digits(folder).fingerprint != marks[0]


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"rotation": 6}, r"rotation: 6: input should be less than or equal to 5"),
        ({"modalities": ["audio", "video"]}, r"modalities\.1: 'video': input should be 'audio', 'image' or 'audio2'"),
        ({"modalities": ["audio", "audio"]}, "modalities audio, audio: write one or more of audio, image, audio2, each once"),
        ({"modalities": []}, "modalities none: write one or more"),
        ({"missing_train": {"image": 1.5}}, r"1\.5: input should be less than or equal to 1"),
        ({"missing_train": {"audio2": 0.5}}, "no modality to lose named 'audio2'"),
        ({"missing_test": {"audio": 0.75, "image": 0.75}}, "leave some row nothing"),
        ({"image_noise": -1}, "image_noise: -1: input should be greater than or equal to 0"),
        ({"unpaired": True, "missing_train": 0.2}, "unpaired: a training row keeps one modality as it is: leave missing_train out"),
        ({"unpaired": True, "modalities": ["audio"]}, "unpaired: rows show audio alone: write two modalities or more"),
    ],
)
def test_settings_that_cannot_be(folder, settings, says):
    with pytest.raises(ZooError, match=says):
        digits(folder, **settings)


def test_what_is_not_there_is_named(folder, tmp_path):
    with pytest.raises(Absent, match=r"(?s)'av_digits' is looked for in a folder of data folders, and none is given.*audio\.parquet"):
        digits(None)
    with pytest.raises(Absent, match=r"(?s)no folder .*elsewhere.*--data DIR or ZOO_DATA"):
        digits(folder, folder="elsewhere")
    (folder / "av_digits/images.parquet").unlink()
    with pytest.raises(Absent, match=r"there is no images\.parquet"):
        digits(folder)


def broken(table, column, row, value):
    cells = table[column].to_pylist()
    cells[row] = value
    return table.set_column(table.column_names.index(column), column, pa.array(cells))


@pytest.mark.parametrize(
    "name, spoil, says",
    [
        ("audio", lambda t: broken(t, "pcm16_8khz", 5, b"abc"), r"audio\.parquet: row 5 \(2_ann_1\): 3 bytes are no int16 samples"),
        ("audio", lambda t: broken(t, "pcm16_8khz", 0, b""), r"row 0 \(0_ann_0\): 0 bytes are no int16 samples"),
        ("audio", lambda t: broken(t, "label", 3, None), r"audio\.parquet: column 'label' has 1 empty cells"),
        ("audio", lambda t: t.drop_columns("speaker"), r"audio\.parquet: no column named 'speaker'"),
        ("audio", lambda t: t.slice(0, 60), r"5 speakers \(ann, bob, cid, dan, eve\): 6 are rotated, 3 train, 1 val, 2 test"),
        (
            "audio",
            lambda t: t.filter(pa.array([not i.startswith("2_d") for i in t["clip_id"].to_pylist()])),
            "'val' has no recording of class 2",
        ),
        ("audio", lambda t: broken(t, "clip_id", 1, "0_ann_0"), "clip_id 0_ann_0 stands there 2 times"),
        (
            "images",
            lambda t: broken(t, "image", 4, b"GIF89a no"),
            r"images\.parquet: row 4: 9 bytes are no picture that can be decoded \(of no known format\)",
        ),
        ("images", lambda t: broken(t, "image", 2, png(0)[:45]), r"row 2: 45 bytes are no picture"),
        ("images", lambda t: t.slice(15), "split 'train' has no picture of class 0"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(folder, name, spoil, says):
    path = folder / f"av_digits/{name}.parquet"
    pq.write_table(spoil(pq.read_table(path)), path)
    with pytest.raises(ZooError, match=says):
        digits(folder)


def test_of_many_wrong_rows_ten_are_named_and_the_rest_counted(folder):
    path = folder / "av_digits/audio.parquet"
    table = audio_table()
    pq.write_table(table.set_column(3, "pcm16_8khz", pa.array([b"x"] * len(table))), path)
    with pytest.raises(ZooError, match=r"(?s)row 9 \(0_ann_3\): 1 bytes are no int16 samples\nand 62 more$"):
        digits(folder)
    path.write_bytes(b"no parquet")
    with pytest.raises(ZooError, match=r"audio\.parquet: cannot be read as parquet"):
        digits(folder)


@pytest.mark.realdata
@pytest.mark.skipif(not (DATA / "av_digits").is_dir(), reason="av_digits is not there")
def test_the_real_digits():
    data = digits(DATA, rotation=3, modalities=["audio", "image", "audio2"], missing_test={"image": 0.5})
    assert data.statistics["rows"] == {"train": 1500, "val": 500, "test": 1000}
    assert data.statistics["speakers"] == {"train": ["nicolas", "theo", "yweweler"], "val": ["george"], "test": ["jackson", "lucas"]}
    assert data.statistics["missing"]["test"] == {"audio": 0, "image": 0.5, "audio2": 0}
    assert data.statistics["pictures_shown_again"] == {"train": 0, "val": 0, "test": 19}
    assert data.classes == tuple("0123456789")
    assert all((np.bincount(data.labels[data.split(s)]) == n).all() for s, n in (("train", 150), ("val", 50), ("test", 100)))
    assert 8000 * 1312 < data.lengths().sum() < 8000 * 1313  # 22 minutes
    row = data.rows[0]
    assert row["image"].size == (28, 28)
    assert 0.01 < row["audio"].std() < 1


@pytest.mark.realdata
@pytest.mark.skipif(not (DATA / "av_digits").is_dir(), reason="av_digits is not there")
def test_the_second_recording_of_real_digits():
    """A real one, of the same digit and split, never the row's own, and each of a split once."""
    data = digits(DATA, rotation=4, modalities=["audio", "audio2"])
    assert data.statistics["audio2_of_another_speaker"] == {"train": 1, "val": 0, "test": 1}
    said = {data.rows[i]["audio"].tobytes(): i for i in range(3000)}
    assert len(said) == 3000, "no two recordings are the same"
    for split in ("train", "val", "test"):
        rows = data.split(split)
        second = np.array([said[data.rows[i]["audio2"].tobytes()] for i in rows.tolist()])
        assert sorted(second) == rows.tolist()
        assert (second != rows).all()
        assert (data.labels[second] == data.labels[rows]).all()
