"""The MLA paper's data sets in their folders: a miniature of each layout is written and read, whole and broken."""

import inspect
import json
import re
import shutil
import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zoo.data._labelled import SETS, LabelledFolder
from zoo.data._looked import look_at
from zoo.data.mvsa_single import mood_of
from zoo.errors import Absent, Failure, ZooError
from zoo.models.classifier import classifier
from zoo.pictures import frames_in, middles
from zoo.registry import entry, make
from zoo.types import LabelledData


def wav(path, rate=16000, samples=400):
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(np.random.randint(-9000, 9000, samples).astype("<i2").tobytes())


def jpg(path, level=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 20), (level, level, level)).save(path)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def crema_d(place):
    """Ten actors say one sentence in six emotions; frames are numbered 1, 2, ..., 12 and get brighter."""
    for actor in range(1001, 1011):
        for emotion in ("ANG", "DIS", "FEA", "HAP", "NEU", "SAD"):
            clip = f"{actor}_DFA_{emotion}_XX"
            wav(place / f"AudioWAV/{clip}.wav")
            for n in (1, 2, 12):
                jpg(place / f"Image-01-FPS/{clip}/{n}.jpg", 10 * n)


def kinetics_sounds(place):
    """Half of the sounds lie beside the frames."""
    for part, clips in (("train", 6), ("val", 3)):
        for kind in ("blowing nose", "bowling", "tickling"):
            for n in range(clips):
                clip = f"{part}{kind[:2]}{n:05d}_000010_000020"
                wav(place / part / kind / (f"{clip}/{clip}.wav" if n % 2 else f"{clip}.wav"))
                jpg(place / part / kind / clip / "frame_00001.jpg")


def food101(place):
    for part, pictures in (("train", range(6)), ("test", range(6, 9))):
        lines = []
        for kind in ("apple_pie", "baklava"):
            for n in pictures:
                jpg(place / f"images/{part}/{kind}/{kind}_{n}.jpg")
                lines.append(f'{kind}_{n}.jpg,"How to make {kind}, the {n}. time",{kind}\n')
        write(place / f"texts/{part}_titles.csv", "".join(lines))


def mvsa_single(place):
    """Of each mood six posts that agree or are half neutral, and two that contradict."""
    both = ["positive,positive", "neutral,positive", "negative,negative", "negative,neutral", "neutral,neutral", "neutral,neutral"] * 3
    both += ["positive,negative", "negative,positive"]
    write(place / "labelResultAll.txt", "ID\ttext,image\n" + "".join(f"{i}\t{moods}\n" for i, moods in enumerate(both, 1)))
    for i in range(1, len(both) + 1):
        jpg(place / f"data/{i}.jpg")
        write(place / f"data/{i}.txt", f"RT @somebody: post {i}\n")


def iemocap(place):
    for session in range(1, 6):
        where, rated, said = place / f"Session{session}", ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"], []
        dialogue = f"Ses0{session}F_impro01"
        for n, emotion in enumerate(("neu", "ang", "sad", "hap", "exc", "fru", "xxx")):
            name = f"{dialogue}_{'FM'[n % 2]}{n:03d}"
            rated.append(f"[6.2901 - 8.2357]\t{name}\t{emotion}\t[2.5000, 2.5000, 2.5000]\nC-E2:\tNeutral;\t()\n\n")
            said.append(f"{name} [006.2901-008.2357]: Excuse me, number {n}.\n")
            wav(where / f"sentences/wav/{dialogue}/{name}.wav")
            for frame in (1, 2):
                jpg(place / f"Image-01-FPS/{name}/{frame}.jpg")
        write(where / f"dialog/EmoEvaluation/{dialogue}.txt", "".join(rated))
        write(where / f"dialog/transcriptions/{dialogue}.txt", "".join(said))
        (where / f"dialog/EmoEvaluation/._{dialogue}.txt").write_bytes(b"\x00\x05\x16\x07\x00")


MINIATURES = {f.__name__: f for f in (crema_d, food101, iemocap, kinetics_sounds, mvsa_single)}
ROWS = {"crema_d": (42, 6, 12), "food101": (10, 2, 6), "iemocap": (15, 5, 5), "kinetics_sounds": (15, 3, 9), "mvsa_single": (12, 3, 3)}


@pytest.fixture
def folder(tmp_path):
    def made(name):
        MINIATURES[name](tmp_path / name)
        return tmp_path

    return made


def load(name, root, **settings):
    return make("data", {"name": name, **settings}, root)


def names(data, split):
    return [data.row_ids[i] for i in data.split(split).tolist()]


def test_every_set_has_a_miniature_and_the_same_settings():
    assert tuple(sorted(MINIATURES)) == SETS
    for name in SETS:
        settings = inspect.signature(entry("data", name).maker).parameters
        assert {"folder", "splits", "seed", "modalities", "missing_train", "missing_test"} <= set(settings)


@pytest.mark.parametrize("name", SETS)
def test_it_is_what_classifiers_train_on(name, folder):
    data = load(name, folder(name))
    assert isinstance(data, LabelledData)
    assert tuple(len(data.split(s)) for s in ("train", "val", "test")) == ROWS[name]
    assert data.statistics["rows"] == dict(zip(("train", "val", "test"), ROWS[name], strict=True))
    assert sorted(np.concatenate([data.split(s) for s in ("train", "val", "test")])) == list(range(len(data.rows)))
    assert len(data.row_ids) == len(set(data.row_ids)) == len(data.labels) == len(data.lengths()) == len(data.rows)
    assert data.labels.dtype == data.split("train").dtype == data.lengths().dtype == np.int64
    assert list(data.broken) == data.statistics["faults"] == []
    for i in (0, -1):
        row = data.rows[i]
        assert list(row) == ["id", *data.modalities]
        assert "image" not in row or row["image"].mode == "RGB"
        assert "audio" not in row or Path(row["audio"]).is_file()
        assert "text" not in row or row["text"]
    with pytest.raises(IndexError, match="row 999 of"):
        data.rows[999]
    with pytest.raises(ZooError, match=r"no split named 'dev' \(have: test, train, val\)"):
        data.split("dev")


def test_a_classifier_reads_the_rows(folder):
    data = load("iemocap", folder("iemocap"))
    model = classifier(
        encoders={
            "audio": {"name": "audio_resnet", "layers": [1], "width": 8, "sample_rate": 16000},
            "image": {"name": "image_resnet", "layers": [1], "width": 8},
            "text": {"name": "tiny_text", "dim": 8, "layers": 1, "heads": 1},
        },
        classes=4,
    )
    assert [len(model.processor(data.rows[i])) for i in range(3)] == [3, 3, 3]


@pytest.mark.parametrize(
    "name, row, label",
    [
        ("crema_d", "1003_DFA_FEA_XX", "FEA"),
        ("food101", "baklava_7.jpg", "baklava"),
        ("iemocap", "Ses03F_impro01_F004", "hap"),
        ("kinetics_sounds", "val/bowling/valbo00001_000010_000020", "bowling"),
        ("mvsa_single", "2", "positive"),
    ],
)
def test_a_class_is_what_the_layout_says(name, row, label, folder):
    data = load(name, folder(name))
    assert data.classes[data.labels[list(data.row_ids).index(row)]] == label


def test_what_else_each_set_says(folder):
    assert load("iemocap", folder("iemocap")).statistics["left_out"]["other_emotions"] == 10
    moods = load("mvsa_single", folder("mvsa_single"))
    assert moods.statistics["left_out"]["text_and_picture_contradict"] == 2
    assert moods.statistics["texts_not_utf8"] == 0
    assert moods.rows[0]["text"] == "RT @somebody: post 1"
    assert moods.lengths()[0] == 20
    clips = load("kinetics_sounds", folder("kinetics_sounds"))
    assert all(name.startswith("val/") for name in names(clips, "test"))
    assert all(name.startswith("train/") for split in ("train", "val") for name in names(clips, split))
    assert clips.lengths()[0] == 400
    titles = load("food101", folder("food101"))
    assert titles.rows[0]["text"] == "How to make apple_pie, the 0. time"


def test_mood_of_a_post():
    assert mood_of("neutral", "neutral") == "neutral"
    assert mood_of("neutral", "negative") == mood_of("negative", "neutral") == mood_of("negative", "negative") == "negative"
    assert mood_of("positive", "negative") == ""


def test_kinetics_folders_are_the_splits_where_there_are_three(folder):
    root = folder("kinetics_sounds")
    for kind in ("blowing nose", "bowling", "tickling"):
        wav(root / f"kinetics_sounds/test/{kind}/a.wav")
        jpg(root / f"kinetics_sounds/test/{kind}/a/1.jpg")
    data = load("kinetics_sounds", root)
    assert {s: {name.split("/")[0] for name in names(data, s)} for s in ("train", "val", "test")} == {
        s: {s} for s in ("train", "val", "test")
    }


@pytest.mark.parametrize("name, group, of", [("crema_d", "actors", lambda n: n[:4]), ("iemocap", "sessions", lambda n: n[:5])])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_nobody_is_in_two_splits(name, group, of, seed, folder):
    data = load(name, folder(name), seed=seed)
    seen = [{of(n) for n in names(data, s)} for s in ("train", "val", "test")]
    assert all(seen)
    assert len(set.union(*seen)) == sum(map(len, seen))
    assert data.statistics[group] == dict(zip(("train", "val", "test"), map(len, seen), strict=True))
    assert data.statistics[f"{group}_in_two_splits"] == 0


def test_frames_are_in_their_order_and_spread(folder, tmp_path):
    root = folder("crema_d")
    frames = frames_in(root / "crema_d/Image-01-FPS/1001_DFA_ANG_XX")
    assert [p.name for p in frames] == ["1.jpg", "2.jpg", "12.jpg"]
    assert frames_in(tmp_path / "nowhere") == ()
    ten = [Path(str(n)) for n in range(10)]
    assert [ten[i].name for i in middles(10, 1)] == ["5"]
    assert [ten[i].name for i in middles(10, 3)] == ["1", "5", "8"]
    assert middles(2, 3) == [0, 1]
    assert load("crema_d", root).rows[0]["image"].getpixel((3, 3)) == (20, 20, 20)
    several = load("crema_d", root, frames=2)
    assert [p.getpixel((3, 3))[0] for p in several.rows[0]["image"]] == [10, 120]
    (frames[0]).write_bytes(b"no picture")
    left = load("crema_d", root, frames=2)
    assert [p.getpixel((3, 3))[0] for p in left.rows[0]["image"]] == [120], "still a list, of those that are whole"
    assert left.broken == ["1001_DFA_ANG_XX"]


def test_what_is_missing_is_drawn_by_rate(folder):
    data = load("crema_d", folder("crema_d"), missing_train={"image": 0.5}, missing_test=1.0)
    has = {s: np.array([[m in data.rows[i] for m in data.modalities] for i in data.split(s).tolist()]) for s in ("train", "val", "test")}
    assert (~has["train"]).sum(0).tolist() == [0, 21]
    assert has["val"].all()
    assert (has["test"].sum(1) == 1).all()
    assert data.statistics["missing"] == {
        "train": {"audio": 0, "image": 0.5},
        "val": {"audio": 0, "image": 0},
        "test": {"audio": 0.5, "image": 0.5},
    }
    again = load("crema_d", folder("crema_d"), missing_train={"image": 0.5}, missing_test=1.0)
    assert [list(again.rows[i]) for i in range(60)] == [list(data.rows[i]) for i in range(60)]


def test_the_draw_leaves_every_row_something_that_it_has(folder):
    root = folder("crema_d")
    for path in sorted((root / "crema_d/AudioWAV").glob("*_HAP_*")):
        path.unlink()
    data = load("crema_d", root, missing_train={"image": 1.0}, missing_test={"image": 1.0})
    happy = [i for i, name in enumerate(data.row_ids) if "HAP" in name]
    assert len(happy) == 10
    assert all("image" in data.rows[i] for i in happy)
    assert sum("image" in data.rows[i] for s in ("train", "test") for i in data.split(s).tolist()) == 9


def cut(path):
    path.write_bytes(path.read_bytes()[:-300])


@pytest.mark.parametrize(
    "name, file, row, spoil, says, lost",
    [
        ("crema_d", "AudioWAV/1001_DFA_ANG_XX.wav", "1001_DFA_ANG_XX", cut, r"holds 250 of the 400 samples that it says", "audio"),
        (
            "crema_d",
            "AudioWAV/1001_DFA_ANG_XX.wav",
            "1001_DFA_ANG_XX",
            lambda p: wav(p, 8000),
            r"has 8000 Hz, and most others have 16000",
            "audio",
        ),
        ("crema_d", "AudioWAV/1001_DFA_ANG_XX.wav", "1001_DFA_ANG_XX", Path.unlink, r"ANG_XX\.wav there is no such file", "audio"),
        ("crema_d", "AudioWAV/1001_DFA_ANG_XX.wav", "1001_DFA_ANG_XX", lambda p: p.write_bytes(b"OggS"), "is no WAV file", "audio"),
        ("crema_d", "AudioWAV/1001_DFA_ANG_XX.wav", "1001_DFA_ANG_XX", lambda p: wav(p, samples=0), "holds 0 of the 0 samples", "audio"),
        ("crema_d", "Image-01-FPS/1001_DFA_ANG_XX/2.jpg", "1001_DFA_ANG_XX", cut, "2.jpg is no picture that can be decoded", "image"),
        ("food101", "images/train/apple_pie/apple_pie_0.jpg", "apple_pie_0.jpg", cut, "no picture that can be decoded", "image"),
        ("food101", "images/train/apple_pie/apple_pie_0.jpg", "apple_pie_0.jpg", Path.unlink, "there is no such file", "image"),
        ("mvsa_single", "data/1.txt", "1", Path.unlink, "1 has no text", "text"),
        ("mvsa_single", "data/1.txt", "1", lambda p: p.write_text(" \n"), "1 has no text", "text"),
        ("mvsa_single", "data/1.jpg", "1", Path.unlink, r"data/1\.jpg there is no such file", "image"),
        (
            "iemocap",
            "Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav",
            "Ses01F_impro01_F000",
            Path.unlink,
            "there is no such file",
            "audio",
        ),
    ],
)
def test_a_row_loses_what_is_broken_or_gone_and_says_so(name, file, row, spoil, says, lost, folder, caplog):
    root = folder(name)
    whole = load(name, root)
    spoil(root / name / file)
    data = load(name, root)
    assert data.broken == [row]
    assert data.statistics["rows_with_faults"] == 1
    assert np.array_equal(whole.labels, data.labels)
    assert f"1 rows of {name} lack something that they should have" in caplog.text
    assert re.search(says, data.statistics["faults"][0])
    found = data.rows[list(data.row_ids).index(row)]
    assert [m for m in data.modalities if m not in found] == [lost]
    assert data.fingerprint != whole.fingerprint
    assert data.statistics["splits_sha256"] == whole.statistics["splits_sha256"], "lists are of what there should be"


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_picture_that_ends_too_early_is_broken_though_it_opens(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.random.randint(0, 255, (96, 128, 3)).astype(np.uint8)).save(path)
    assert look_at([path])[path].fault == ""
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with Image.open(path) as opened:
        assert opened.size == (128, 96)
    assert "is no picture that can be decoded" in look_at([path])[path].fault


def test_a_row_that_lost_everything_is_left_out(folder):
    root = folder("crema_d")
    (root / "crema_d/AudioWAV/1001_DFA_ANG_XX.wav").write_bytes(b"")
    for frame in (root / "crema_d/Image-01-FPS/1001_DFA_ANG_XX").glob("*.jpg"):
        frame.write_bytes(b"")
    (root / "crema_d/AudioWAV/readme.wav").write_bytes(b"")
    data = load("crema_d", root)
    assert len(data.rows) == 59
    assert "1001_DFA_ANG_XX" not in data.row_ids
    assert data.broken == ["1001_DFA_ANG_XX"]
    assert all(data.lists[name] == s for s in ("train", "val", "test") for name in names(data, s))
    assert data.statistics["left_out"] == {"names_not_understood": 1, "not_in_splits": 0, "nothing_usable": 1, "listed_and_not_found": 0}
    assert [row["id"] for row in (data.rows[0], data.rows[58])] == [0, 58]


def test_a_file_that_goes_while_training_is_named(folder):
    root = folder("crema_d")
    data = load("crema_d", root)
    (root / "crema_d/Image-01-FPS/1001_DFA_ANG_XX/2.jpg").unlink()
    with pytest.raises(Failure, match=r"1001_DFA_ANG_XX/2\.jpg: was decoded when the data set was loaded, and cannot be any more"):
        data.rows[0]


def test_texts_that_are_not_utf8_are_read_and_counted(folder):
    root = folder("mvsa_single")
    (root / "mvsa_single/data/1.txt").write_bytes("Caf\u00e9".encode("latin-1"))
    data = load("mvsa_single", root)
    assert data.rows[0]["text"] == "Caf\u00e9"
    assert data.statistics["texts_not_utf8"] == 1


def test_the_fingerprint_tells_data_apart(folder):
    root = folder("crema_d")
    settings = [{}, {"seed": 1}, {"modalities": ["audio"]}, {"frames": 2}, {"missing_train": 0.1}, {"missing_test": {"image": 0.1}}]
    marks = [load("crema_d", root, **s).fingerprint for s in settings]
    assert len(set(marks)) == len(marks)
    assert load("crema_d", root).fingerprint == marks[0]
    assert load("crema_d", None, folder=str(root / "crema_d")).fingerprint == marks[0], "wherever it lies"
    wav(root / "crema_d/AudioWAV/1001_DFA_ANG_XX.wav")
    assert load("crema_d", root).fingerprint != marks[0]


def lists(path, data, **changed):
    """The splits of ``data``, some rows in others."""
    of = {**data.lists, **changed}
    path.write_text(json.dumps({"splits": {s: [n for n, at in of.items() if at == s] for s in set(of.values())}}))
    return str(path)


def test_lists_from_a_file(folder, tmp_path, caplog):
    root = folder("crema_d")
    drawn = load("crema_d", root)
    same = load("crema_d", root, splits=lists(tmp_path / "a.json", drawn))
    assert {s: names(same, s) for s in ("train", "val", "test")} == {s: names(drawn, s) for s in ("train", "val", "test")}
    assert same.statistics["splits"] == str(tmp_path / "a.json")
    assert same.fingerprint == drawn.fingerprint
    assert not caplog.records
    row = names(drawn, "train")[0]
    moved = load("crema_d", root, splits=lists(tmp_path / "b.json", drawn, **{row: "test", "1099_gone": "test"}))
    assert row in names(moved, "test")
    assert moved.fingerprint != drawn.fingerprint
    assert moved.statistics["splits_sha256"] != drawn.statistics["splits_sha256"]
    assert moved.statistics["actors_in_two_splits"] == 1
    assert moved.statistics["left_out"]["listed_and_not_found"] == 1
    assert "crema_d: 1 of 10 actors are in more than one split" in caplog.text
    fewer = load("crema_d", root, splits=lists(tmp_path / "c.json", drawn, **{row: "unused"}))
    assert names(fewer, "unused") == [row]


def test_rows_that_no_list_names_are_left_out(folder, tmp_path):
    root = folder("mvsa_single")
    drawn = load("mvsa_single", root)
    row = names(drawn, "train")[0]
    path = tmp_path / "some.csv"
    path.write_text("id,split\n" + "".join(f"{n},{s}\n" for n, s in drawn.lists.items() if n != row))
    some = load("mvsa_single", root, splits=str(path))
    assert row not in some.row_ids
    assert some.statistics["left_out"]["not_in_splits"] == 1
    assert len(some.rows) == len(drawn.rows) - 1


def strip(name):
    """What makes a folder a wrong one."""

    def done(place):
        path = place / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return done


def emptied(name, pattern):
    def done(place):
        for path in (place / name).glob(pattern):
            path.unlink()

    return done


@pytest.mark.parametrize(
    "name, spoil, says",
    [
        ("crema_d", strip("AudioWAV"), r"there is no AudioWAV; there is: Image-01-FPS\ncrema_d is a folder with"),
        ("crema_d", strip("Image-01-FPS"), r"there is no Image-01-FPS; there is: AudioWAV\n"),
        (
            "crema_d",
            emptied("Image-01-FPS", "*/*.jpg"),
            r"not one of 60 rows has image that can be used, such as: 1001_DFA_ANG_XX has no image\n",
        ),
        ("crema_d", emptied("AudioWAV", "*.wav"), r"not one of 60 rows has audio .*AudioWAV/1001_DFA_ANG_XX\.wav there is no such file"),
        (
            "crema_d",
            lambda p: (
                [strip(f"Image-01-FPS/{c.name}")(p) or c for c in (p / "Image-01-FPS").iterdir() if c.name > "1003"]
                and emptied("AudioWAV", "10[01][3-90]*")(p)
            ),
            r"2 speakers or sessions \(1001, 1002\) cannot be dealt to 3 splits: write splits",
        ),
        ("kinetics_sounds", strip("val"), "there is neither val nor test beside train"),
        ("kinetics_sounds", strip("train"), "there is no train; there is: val"),
        ("food101", strip("texts/test_titles.csv"), r"there is no texts/test_titles\.csv; there is: images, texts"),
        (
            "food101",
            lambda p: write(p / "texts/train_titles.csv", "image,label\n"),
            r"train_titles\.csv: 1 lines, such as number 1, are not name",
        ),
        ("food101", lambda p: (p / "texts/train_titles.csv").write_bytes(b"a,\xff,b\n"), "no CSV in UTF-8"),
        (
            "food101",
            lambda p: jpg(p / "images/test/baklava/apple_pie_0.jpg"),
            "1 names of rows stand there more than once, such as apple_pie_0.jpg",
        ),
        ("mvsa_single", strip("labelResultAll.txt"), r"there is no labelResultAll\.txt; there is: data"),
        ("mvsa_single", lambda p: write(p / "labelResultAll.txt", "ID\ttext,image\n"), r"no row was found\nmvsa_single is a folder"),
        (
            "mvsa_single",
            lambda p: write(p / "labelResultAll.txt", "ID\n1\thappy,sad\n"),
            r"1 lines, such as number 2, are not id, tab, mood",
        ),
        (
            "mvsa_single",
            lambda p: write(p / "labelResultAll.txt", "ID\n1\tneutral,neutral\n1\tneutral,neutral\n"),
            "an id stands there twice",
        ),
        (
            "mvsa_single",
            lambda p: write(p / "labelResultAll.txt", "ID\n1\tpositive,negative\n"),
            "1 rows were left out: text and picture contradict",
        ),
        (
            "mvsa_single",
            lambda p: write(p / "labelResultAll.txt", "ID\n" + "".join(f"{i}\tneutral,neutral\n" for i in range(1, 9))),
            r"split 'train' has no row of class 'negative'\nsplit 'train' has no row of class 'positive'",
        ),
        ("iemocap", lambda p: [strip(f"Session{i}")(p) for i in range(1, 6)], "there is no Session1; there is: Image-01-FPS"),
        (
            "iemocap",
            lambda p: [strip(f"Session{i}/dialog/EmoEvaluation")(p) for i in range(1, 6)],
            r"no row was found\niemocap is a folder",
        ),
        ("iemocap", lambda p: [strip(f"Session{i}/dialog/transcriptions")(p) for i in range(1, 6)], "not one of 25 rows has text"),
    ],
)
def test_a_wrong_folder_says_what_was_expected_and_what_was_found(name, spoil, says, folder):
    root = folder(name)
    spoil(root / name)
    with pytest.raises(ZooError, match=f"(?s){says}"):
        load(name, root)


@pytest.mark.parametrize("name", SETS)
def test_an_empty_or_absent_folder(name, tmp_path):
    with pytest.raises(
        Absent, match=rf"(?s)'{name}' is looked for in a folder of data folders, and none is given\n{name} is a folder with.*--data"
    ):
        load(name, None)
    with pytest.raises(Absent, match=rf"no folder {tmp_path / name}\n{name} is a folder with"):
        load(name, tmp_path)
    (tmp_path / name).mkdir()
    with pytest.raises(ZooError, match=rf"(?s)there is no .*; there is: nothing\n{name} is a folder with"):
        load(name, tmp_path)


def test_settings_that_cannot_be(folder):
    root = folder("crema_d")
    for settings, says in (
        ({"modalities": []}, "crema_d: modalities none: write one or more, each once"),
        ({"modalities": ["audio", "audio"]}, "modalities audio, audio: write one or more, each once"),
        ({"modalities": ["text"]}, r"modalities\.0: 'text': input should be 'audio' or 'image'"),
        ({"missing_train": {"text": 0.1}}, "no modality to lose named 'text'"),
        ({"splits": "nowhere.json"}, r"splits: nowhere\.json cannot be read"),
    ):
        with pytest.raises(ZooError, match=says):
            load("crema_d", root, **settings)


def test_one_modality_needs_only_its_own_folder(folder):
    root = folder("crema_d")
    strip("Image-01-FPS")(root / "crema_d")
    data = load("crema_d", root, modalities=["audio"])
    assert isinstance(data, LabelledFolder)
    assert list(data.rows[0]) == ["id", "audio"]
