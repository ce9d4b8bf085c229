"""Splits are fixed lists: drawn by whole groups or by class, the same from any order of rows, hashed, written and read back."""

import json
import wave
from collections import Counter

import pytest
from PIL import Image

from zoo.data._splits import Unit, counts, digest, draw_lists, read_lists, write_lists
from zoo.errors import ZooError

THREE = {"": (0.6, 0.2, 0.2)}


def speakers(number, rows=4):
    return [Unit(f"{s:02d}_{r}", f"class {r % 2}", group=f"{s:02d}") for s in range(number) for r in range(rows)]


@pytest.mark.parametrize(
    "units, shares, expected",
    [
        (91, (0.7, 0.1, 0.2), [64, 9, 18]),
        (5, (0.6, 0.2, 0.2), [3, 1, 1]),
        (3, (0.7, 0.1, 0.2), [1, 1, 1]),
        (2, (0.6, 0.2, 0.2), [1, 1, 0]),
        (1, (0.6, 0.2, 0.2), [1, 0, 0]),
        (1, (0.9, 0.1, 0.0), [1, 0, 0]),
        (4, (0.9, 0.1, 0.0), [3, 1, 0]),
        (750, (0.9, 0.1, 0.0), [675, 75, 0]),
        (7, (0.0, 0.0, 1.0), [0, 0, 7]),
        (0, (0.6, 0.2, 0.2), [0, 0, 0]),
    ],
)
def test_how_many_each_split_gets(units, shares, expected):
    assert counts(units, shares) == expected


@pytest.mark.parametrize("number", [3, 5, 10, 91])
def test_a_speaker_is_in_one_split(number):
    rows = speakers(number)
    of = draw_lists(rows, THREE, seed=0)
    assert len(of) == len(rows)
    splits = {}
    for row in rows:
        splits.setdefault(row.group, set()).add(of[row.name])
    assert all(len(s) == 1 for s in splits.values())
    assert Counter(min(s) for s in splits.values()) == dict(zip(("train", "val", "test"), counts(number, THREE[""]), strict=True))


def test_without_speakers_every_class_is_in_every_split():
    rows = [Unit(str(i), "rare" if i < 10 else "usual") for i in range(100)]
    of = draw_lists(rows, THREE, seed=0)
    assert Counter(of[r.name] for r in rows if r.label == "rare") == {"train": 6, "val": 2, "test": 2}
    assert Counter(of[r.name] for r in rows if r.label == "usual") == {"train": 54, "val": 18, "test": 18}


def test_each_part_has_shares_of_its_own():
    rows = [Unit(f"{part}{i}", "a", part=part) for part in ("train", "test") for i in range(10)]
    of = draw_lists(rows, {"train": (0.9, 0.1, 0.0), "test": (0.0, 0.0, 1.0)}, seed=0)
    assert Counter((r.part, of[r.name]) for r in rows) == {("train", "train"): 9, ("train", "val"): 1, ("test", "test"): 10}


def test_the_seed_alone_decides():
    rows = speakers(20)
    first = draw_lists(rows, THREE, seed=0)
    assert draw_lists(rows[::-1], THREE, seed=0) == first
    assert draw_lists(rows, THREE, seed=1) != first
    classes = [Unit(row.name, row.label) for row in rows]
    assert draw_lists(classes[::-1], THREE, seed=0) == draw_lists(classes, THREE, seed=0)
    assert digest(first) == digest(dict(reversed(first.items()))) != digest(draw_lists(rows, THREE, seed=1))
    assert digest({"b": "test", "a": "train"}) == "88404c031505ef6b2568594b91dc766079d85c6cad572b4500186eff9eb28c74"


def test_too_few_speakers():
    with pytest.raises(ZooError, match=r"2 speakers or sessions \(00, 01\) cannot be dealt to 3 splits: write splits"):
        draw_lists(speakers(2), THREE, seed=0)


@pytest.mark.parametrize("name", ["a.json", "a.csv"])
def test_what_is_written_is_read(name, tmp_path):
    of = draw_lists(speakers(5), THREE, seed=0) | {'odd, "name"': "further"}
    sha256 = write_lists(tmp_path / name, of, {"data": "mine", "seed": 0})
    assert sha256 == digest(of)
    assert read_lists(tmp_path / name) == of
    if name == "a.json":
        said = json.loads((tmp_path / name).read_text())
        assert list(said) == ["data", "seed", "sha256", "splits"]
        assert list(said["splits"]) == ["train", "val", "test", "further"]
        assert said["sha256"] == sha256


def test_lists_that_were_changed_are_noticed(tmp_path):
    path = tmp_path / "a.json"
    write_lists(path, {"a": "train", "b": "val", "c": "test"}, {})
    said = json.loads(path.read_text())
    said["splits"]["train"].append(said["splits"]["test"].pop())
    path.write_text(json.dumps(said))
    with pytest.raises(ZooError, match=r"a\.json was changed after it was written: .* If that is meant, remove the key sha256"):
        read_lists(path)
    del said["sha256"]
    path.write_text(json.dumps(said))
    assert read_lists(path) == {"a": "train", "b": "val", "c": "train"}


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("a.txt", "", r"lists are in a \.json or a \.csv, not in \.txt"),
        ("a", "", "not in a file without a suffix"),
        ("a.json", "{", r"a\.json is no JSON"),
        ("a.json", "[]", r'write \{"splits": \{"train": \["name of a row"'),
        ("a.json", '{"splits": {"train": "a"}}', r'write \{"splits"'),
        ("a.json", '{"splits": {"train": ["a"], "val": ["a"]}}', "'a' stands there twice: a row is in one split"),
        ("a.json", '{"splits": {"val": ["a"]}}', "no row is in split 'train'"),
        ("a.csv", "name,split\na,train\n", "its columns are name, split: write id and split"),
        ("a.csv", "", "its columns are none: write id and split"),
        ("a.csv", "id,split\na,train\nb,\n", "line 3 has no id or no split"),
        ("a.csv", "id,split\na,train\na,val\n", "'a' stands there twice"),
    ],
)
def test_files_that_are_no_lists(name, content, says, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ZooError, match=says):
        read_lists(tmp_path / name)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ZooError, match=r"b\.json cannot be read .*; zoo data split SET --out .*b\.json writes such a file"):
        read_lists(tmp_path / "b.json")


@pytest.fixture
def clips(tmp_path):
    """CREMA-D in small: five actors, six emotions."""
    for actor in range(5):
        for emotion in ("ANG", "DIS", "FEA", "HAP", "NEU", "SAD"):
            name = f"100{actor}_DFA_{emotion}_XX"
            (tmp_path / "crema_d/Image-01-FPS" / name).mkdir(parents=True)
            (tmp_path / "crema_d/AudioWAV").mkdir(exist_ok=True)
            Image.new("RGB", (8, 8)).save(tmp_path / "crema_d/Image-01-FPS" / name / "1.jpg")
            with wave.open(str(tmp_path / f"crema_d/AudioWAV/{name}.wav"), "wb") as file:
                file.setparams((1, 2, 16000, 0, "NONE", ""))
                file.writeframes(b"ab" * 50)
    return tmp_path


def test_the_command_writes_what_the_loader_reads(command, clips, tmp_path):
    from zoo.registry import make

    out = tmp_path / "lists.json"
    code, said, err = command("data", "split", "crema_d", "--data", clips, "--out", out, "--seed", 3)
    drawn = make("data", {"name": "crema_d", "seed": 3}, clips)
    assert (code, err) == (0, "")
    assert said == f"{out}: train 18, val 6, test 6; sha256 {digest(read_lists(out))}\n"
    assert read_lists(out) == drawn.lists
    assert json.loads(out.read_text())["seed"] == 3
    assert make("data", {"name": "crema_d", "splits": str(out)}, clips).statistics["splits_sha256"] == digest(drawn.lists)
    (clips / "crema_d").rename(clips / "CREMA-D")
    again = command("data", "split", "crema_d", "--data", clips, "--folder", "CREMA-D", "--out", tmp_path / "again.json", "--seed", 3)
    assert again == (0, said.replace("lists.json", "again.json"), "")
    assert (tmp_path / "again.json").read_bytes() == out.read_bytes()


def test_the_command_names_broken_files_and_lists_their_rows_all_the_same(command, clips, tmp_path):
    whole = command("data", "split", "crema_d", "--data", clips, "--out", tmp_path / "a.csv")[1]
    (clips / "crema_d/AudioWAV/1000_DFA_ANG_XX.wav").unlink()
    code, said, err = command("data", "split", "crema_d", "--data", clips, "--out", tmp_path / "b.csv")
    assert code == 0
    assert said.rpartition("sha256")[2] == whole.rpartition("sha256")[2]
    assert "AudioWAV/1000_DFA_ANG_XX.wav there is no such file" in err


def test_what_the_command_refuses(command, clips, tmp_path):
    for arguments, says in (
        (
            ("av_digits", "--data", clips, "--out", tmp_path / "a.json"),
            "no data set whose splits are lists named 'av_digits' (have: crema_d,",
        ),
        (("crema_d", "--out", tmp_path / "a.json"), f"write: zoo data split crema_d --out {tmp_path / 'a.json'} --data DIR\n"),
        (("crema_d", "--data", clips, "--out", tmp_path / "a.txt"), "lists are in a .json or a .csv"),
        (("crema_d", "--data", clips, "--out", tmp_path), "is a folder: write the name of a file in it"),
    ):
        code, out, err = command("data", "split", *arguments)
        assert (code, out) == (2, "")
        assert says in err
    assert not (tmp_path / "a.json").exists()
