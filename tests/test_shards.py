"""Shards: the same rows, pairs and training as a folder of notes, resumed anywhere, and what is said of a shard that is damaged."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import re
import shutil
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from zoo.data._shard_rows import find_shards
from zoo.data.planted_notes import plant
from zoo.errors import Failure, ZooError
from zoo.recipe import load_recipe
from zoo.registry import make
from zoo.train import train
from zoo.update import Updater

NOTES, SHARDS = 160, 4
TINY = {
    "name": "notellm2",
    "backbone": {"name": "tiny_lm", "dim": 32, "layers": 1, "heads": 2, "vocab_size": 1024},
    "vision": {"name": "tiny_image", "dim": 32, "layers": 1, "heads": 2, "image_size": 16},
    "connector": "linear",
    "dim": 16,
    "language": "en",
    "content_length": 24,
}


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_tar(path: Path, notes: list[dict[str, Any]]) -> None:
    with tarfile.open(path, "w") as tar:
        for note in notes:
            about = {k: v for k, v in note.items() if k not in ("note_id", "image")}
            add(tar, f"{note['note_id']}.json", json.dumps(about).encode())
            if note["image"] is not None:
                add(tar, f"{note['note_id']}.png", note["image"])


def write_parquet(path: Path, notes: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(notes), path, row_group_size=7)


WRITE = {"tar": write_tar, "parquet": write_parquet}


@pytest.fixture(scope="module")
def planted():
    made = plant(notes=NOTES, users=1000, seed=0, language="english", short_share=0.17, image_size=16)
    notes = made.notes.to_pylist()
    return [{**note, "note_id": str(note["note_id"])} for note in notes], made.clicks


@pytest.fixture(scope="module")
def root(planted, tmp_path_factory):
    """The same notes in a folder, in tar shards and in parquet shards."""
    notes, clicks = planted
    root = tmp_path_factory.mktemp("data")
    for name in ("folder", *WRITE):
        (root / name).mkdir()
        pq.write_table(clicks, root / name / "clicks.parquet")
    pq.write_table(pa.Table.from_pylist(notes), root / "folder/notes.parquet")
    for kind, write in WRITE.items():
        for shard in range(SHARDS):
            write(root / kind / f"items-{shard:03d}.{kind}", notes[shard * NOTES // SHARDS : (shard + 1) * NOTES // SHARDS])
    return root


def sharded(root: Path, kind: str, **keywords: Any) -> Any:
    spec = {"name": "shards", "folder": kind, "items": f"items-*.{kind}", "mine": {"top": 1}, **keywords}
    return make("data", spec, root)


@pytest.fixture(params=sorted(WRITE))
def kind(request):
    return request.param


@pytest.fixture
def own(kind, planted, tmp_path):
    """Two small shards of one's own, to break; items-1 begins with note 10."""
    (tmp_path / kind).mkdir()
    pq.write_table(planted[1], tmp_path / kind / "clicks.parquet")
    for shard in range(2):
        WRITE[kind](tmp_path / kind / f"items-{shard}.{kind}", planted[0][shard * 80 : (shard + 1) * 80])
    return tmp_path


def test_shards_give_what_the_folder_gives(root, kind):
    whole = make("data", {"name": "notes", "folder": "folder", "mine": {"top": 1}}, root)
    data = sharded(root, kind)
    assert len(data.notes) == len(whole.notes) == NOTES
    for i in (0, 39, 40, 77, NOTES - 1, -1):
        a, b = whole.notes[i], data.notes[i]
        assert {k: v for k, v in a.items() if k != "image"} == {k: v for k, v in b.items() if k != "image"}
        assert ("image" in a) == ("image" in b)
        assert "image" not in a or a["image"].tobytes() == b["image"].tobytes()
    for split in ("train", "val", "test"):
        assert data.pairs(split).tolist() == whole.pairs(split).tolist()
    assert data.lengths().tolist() == whole.lengths().tolist()
    assert data.texts() == whole.texts()
    assert data.short().tolist() == whole.short().tolist()
    assert {**whole.statistics, "shards": SHARDS, "shards_left_out": 0} == data.statistics


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory):
    """The run folder of a training on the folder of notes."""
    out = tmp_path_factory.mktemp("whole")
    train(recipe(out, {"name": "notes", "folder": "folder", "mine": {"top": 1}}), data_root=root)
    return out


def recipe(out: Path, data: Any, **overrides: Any) -> Any:
    plain = {
        "model": TINY,
        "data": data,
        "objective": "pair_infonce",
        "optimizer": {"lr": 1e-3},
        "run": {"steps": 6, "batch_size": 20, "device": "cpu", "save_every": 3},
        "out": str(out),
    }
    return load_recipe(plain, **overrides)


@pytest.mark.parametrize("kind, workers", [("tar", 0), ("parquet", 0), pytest.param("tar", 2, marks=pytest.mark.slow)])
def test_a_run_on_shards_goes_on_in_the_middle_of_an_epoch_and_ends_as_one_on_the_folder(
    root, trained, kind, workers, tmp_path, monkeypatch
):
    shards = {"name": "shards", "folder": kind, "items": f"items-{{000..003}}.{kind}", "mine": {"top": 1}}
    seen, check = [], Updater._check_loss

    def counting(self: Any, loss: Any, position: Any) -> None:
        seen.append((position.epoch, position.batch))
        if len(seen) == 5:
            raise Killed
        check(self, loss, position)

    with monkeypatch.context() as patch:
        patch.setattr(Updater, "_check_loss", counting)
        with pytest.raises(Killed):
            train(recipe(tmp_path / "run", shards, run__workers=workers), data_root=root)
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000003"]  # of the four batches of epoch 0
    train(recipe(tmp_path / "run", shards, run__workers=workers), data_root=root)
    one, other = load_file(trained / "model.safetensors"), load_file(tmp_path / "run/model.safetensors")
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_shards_travel_to_a_worker(root, kind):
    data = sharded(root, kind)
    data.notes[0]
    sent = pickle.dumps(data.notes)
    assert len(sent) < 2000
    assert pickle.loads(sent)[50]["note_id"] == data.notes[50]["note_id"]


def test_what_rows_show(root, kind):
    whole, read = sharded(root, kind), sharded(root, kind, inputs=["text"])
    assert "image" in whole.notes[0]
    assert "image" not in read.notes[0]
    assert set(whole.notes.without("text")[0]) == {"id", "note_id", "image"}
    assert whole.fingerprint != read.fingerprint
    with pytest.raises(IndexError, match="note 160 of 160"):
        whole.notes[160]


# What is kept of a shard


def test_a_shard_is_indexed_once_and_again_when_it_changes(own, kind, planted, caplog):
    def indexed() -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.INFO, "zoo.data"):
            sharded(own, kind)
        return [m.split(" (")[0] for m in caplog.messages if m.startswith("indexing")]

    assert indexed() == [f"indexing items-0.{kind}", f"indexing items-1.{kind}"]
    before = sharded(own, kind).fingerprint
    assert indexed() == []
    changed = [{**note, "title": "changed"} for note in planted[0][80:]]
    WRITE[kind](own / kind / f"items-1.{kind}", changed)
    assert indexed() == [f"indexing items-1.{kind}"]
    assert sharded(own, kind).notes[100]["title"] == "changed"
    assert sharded(own, kind).fingerprint != before


@pytest.mark.parametrize("kind", ["tar"], indirect=True)
@pytest.mark.parametrize("in_place", [True, False])
def test_a_shard_of_the_same_size_and_time_is_not_the_same(own, planted, in_place):
    path = own / "tar/items-0.tar"
    data, before = sharded(own, "tar"), path.stat()
    with_title = next(i for i in range(80) if "title" in data.notes[i])
    title = data.notes[with_title]["title"]
    notes = [{**note, "title": note["title"] and note["title"][::-1]} for note in planted[0][:80]]
    write_tar(path if in_place else own / "new.tar", notes)
    if not in_place:
        (own / "new.tar").replace(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    again = sharded(own, "tar")
    assert again.notes[with_title]["title"] == title[::-1] != title
    assert again.fingerprint != data.fingerprint


def test_a_shard_that_was_only_copied_is_not_decoded_again(own, kind, monkeypatch, caplog):
    before = sharded(own, kind).fingerprint
    shutil.copytree(own / kind, own / f"copy/{kind}")

    def indexes() -> list[bytes]:
        return [p.read_bytes() for p in sorted((own / f"copy/{kind}/.zoo_index").glob("*.arrow"))]

    there = indexes()
    with caplog.at_level(logging.INFO, "zoo.data"):
        assert sharded(own / "copy", kind).fingerprint == before
    assert "indexing" not in caplog.text
    assert (stamped := indexes()) != there
    monkeypatch.setattr("zoo.data._shard_rows._write_index", None)  # from now on it is known by its stamp
    assert sharded(own / "copy", kind).notes[100] == sharded(own, kind).notes[100]
    assert indexes() == stamped


def test_the_index_may_lie_elsewhere(own, kind, tmp_path):
    (own / kind / ".zoo_index").write_text("in the way")
    with pytest.raises(Failure, match=rf"the index of items-0.{kind} cannot be written .*: name a folder for it with index:"):
        sharded(own, kind)
    assert len(sharded(own, kind, index=str(tmp_path / "index")).notes) == NOTES


@pytest.mark.parametrize("kind", ["tar"], indirect=True)
def test_processes_that_index_at_once_share_the_work(own):
    """One that finds a shard taken goes on with the others, and comes back."""
    sharded(own, "tar")
    index = own / "tar/.zoo_index"
    first, second = sorted(index.glob("*.arrow"))
    first.unlink()
    second.unlink()
    with ThreadPoolExecutor() as pool:
        with FileLock(f"{first}.lock"):
            coming = pool.submit(sharded, own, "tar")
            while not second.is_file():
                assert not coming.done()
                time.sleep(0.01)
        assert len(coming.result().notes) == NOTES
    assert first.is_file()


def test_broken_images_are_counted(own, kind, planted, caplog):
    notes = [{**note, "image": b"no image" if i == 3 else note["image"]} for i, note in enumerate(planted[0][:80])]
    WRITE[kind](own / kind / f"items-0.{kind}", notes)
    data = sharded(own, kind)
    assert data.broken == [notes[3]["note_id"]]
    assert data.statistics["images_broken"] == 1
    assert "image" not in data.notes[3]
    assert (
        f"1 images cannot be decoded, or have more than 67108864 pixels, and count as absent, those of notes {notes[3]['note_id']}"
        in caplog.text
    )


# What is said of shards that are missing, cut or damaged


def cut(path: Path, at: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * at)])


def test_a_missing_shard(own, kind):
    with pytest.raises(Failure, match=rf"no file .*items-2.{kind}\nunreadable: skip leaves such shards out"):
        sharded(own, kind, items=f"items-{{0..2}}.{kind}")
    data = sharded(own, kind, items=f"items-{{0..2}}.{kind}", unreadable="skip")
    assert (data.statistics["shards"], data.statistics["shards_left_out"]) == (2, 1)
    with pytest.raises(ZooError, match=rf"no shards none-\*.tar in .* \(there: clicks.parquet, items-0.{kind}"):
        sharded(own, kind, items="none-*.tar")
    with pytest.raises(Failure, match="no shard is left that can be read"):
        sharded(own, kind, items=f"items-{{3..4}}.{kind}", unreadable="skip")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_cut_shard(own, kind, share, caplog):
    cut(own / kind / f"items-1.{kind}", share)
    where = "byte" if kind == "tar" else "cannot be read as parquet"
    with pytest.raises(Failure, match=rf"items-1.{kind}: .*{where}"):
        sharded(own, kind)
    data = sharded(own, kind, unreadable="skip")
    assert len(data.notes) == 80
    assert data.statistics["shards_left_out"] == 1
    assert f"items-1.{kind}" in caplog.text


@pytest.mark.parametrize("kind", ["tar"], indirect=True)
def test_a_tar_that_was_cut_between_two_files_or_damaged_in_a_header(own, planted):
    path = own / "tar/items-1.tar"
    with tarfile.open(path) as tar:
        member = tar.getmembers()[20]
    whole = path.read_bytes()
    for damaged in (whole[: member.offset], whole[: member.offset] + b"x" * 512 + whole[member.offset + 512 :]):
        path.write_bytes(damaged)
        with pytest.raises(Failure, match=f"neither a file nor the end of the archive at byte {member.offset}"):
            sharded(own, "tar")


@pytest.mark.parametrize("kind", ["parquet"], indirect=True)
def test_a_row_group_that_is_damaged_is_named_with_its_byte(own):
    path = own / "parquet/items-1.parquet"
    group = pq.ParquetFile(path).metadata.row_group(2)
    at = group.column(0).dictionary_page_offset or group.column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[at : at + 40] = bytes(40)
    path.write_bytes(content)
    with pytest.raises(Failure, match=rf"items-1.parquet: row group 2, from byte {at} on, cannot be read"):
        sharded(own, "parquet")


def test_a_shard_that_is_cut_while_it_is_read(own, kind):
    data = sharded(own, kind)
    last = max(i for i in range(NOTES) if data.notes.table["image"][i].is_valid)
    cut(own / kind / f"items-1.{kind}", 0.5)
    fresh = pickle.loads(pickle.dumps(data.notes))
    with pytest.raises(Failure, match=rf"items-1.{kind}: (ends before byte|cannot be read)"):
        fresh[last]
    assert fresh[0]["note_id"]
    (own / kind / f"items-1.{kind}").unlink()
    with pytest.raises(Failure, match=rf"items-1.{kind}: .*cannot be read .*No such file"):
        fresh[last]


@pytest.mark.parametrize("kind", ["tar"], indirect=True)
def test_an_image_that_changes_after_it_was_indexed(own, planted):
    path = own / "tar/items-0.tar"
    data = sharded(own, "tar")
    first = next(i for i in range(80) if data.notes.table["image"][i].is_valid)
    place = data.notes.table["image"][first].as_py()
    content = bytearray(path.read_bytes())
    content[place["at"] : place["at"] + place["size"]] = bytes(place["size"])
    path.write_bytes(content)
    with pytest.raises(Failure, match=rf"items-0.tar: note '\w+' at .*'at': {place['at']}.* was whole when the shard was indexed"):
        data.notes[first]


# What a tar may hold


def one_tar(folder: Path, members: dict[str, bytes], name: str = "a.tar") -> Path:
    (folder / "set").mkdir(exist_ok=True)
    with tarfile.open(folder / "set" / name, "w") as tar:
        for member, content in members.items():
            add(tar, member, content)
    pq.write_table(pa.table({"note_a": ["x/1"], "note_b": ["x/2"]}), folder / "set/pairs.parquet")
    return folder


def tars(root: Path, **keywords: Any) -> Any:
    return make("data", {"name": "shards", "folder": "set", "items": "*.tar", **keywords}, root)


def test_text_files_and_keys(tmp_path):
    members = {"x/1.json": b'{"title": " T ", "topic": ["a", "b"], "n": 3}', "x/1.txt": b"words", "x/1.seg.npy": b"?", "x/2.txt": b"more"}
    data = tars(one_tar(tmp_path, members))
    assert data.notes[0] == {"id": 0, "note_id": "x/1", "title": "T", "topic": "a, b", "content": "words"}
    assert data.notes[1] == {"id": 1, "note_id": "x/2", "content": "more"}
    assert data.pairs("train").tolist() == [[0, 1]]
    assert tars(tmp_path, columns={"title": "txt", "content": "n"}).notes[0]["title"] == "words"
    assert tars(tmp_path, columns={"title": "txt", "content": "n"}).notes[0]["content"] == "3"


@pytest.mark.parametrize(
    "members, says",
    [
        ({"x/1.json": b"{"}, r"a.tar: x/1.json at byte 512: it is no JSON"),
        ({"x/1.json": b"[]"}, r"a.tar: x/1.json at byte 512: it is a list, write an object with any of title, topic, content"),
        ({"x/1.txt": b"\xff"}, r"a.tar: x/1.txt at byte 512: it is not UTF-8"),
    ],
)
def test_what_is_no_note(tmp_path, members, says):
    with pytest.raises(ZooError, match=says):
        tars(one_tar(tmp_path, members))


def test_ids_that_stand_in_two_shards(tmp_path):
    for name in ("a.tar", "b.tar"):
        one_tar(tmp_path, {"x/1.txt": b"a", "x/2.txt": b"b"}, name)
    with pytest.raises(ZooError, match=r"2 note_ids stand there more than once, such as 'x/1', 'x/2'"):
        tars(tmp_path)


def test_files_that_are_no_shards(tmp_path):
    one_tar(tmp_path, {"x/1.txt": b"a"}, "a.tar.gz")
    with pytest.raises(ZooError, match=r"shards are .tar.gz: unpack them, because no single image can be read from a compressed tar"):
        tars(tmp_path, items="*.gz")
    with pytest.raises(ZooError, match=r"shards are .parquet, .tar.gz: "):
        tars(tmp_path, items=["*.gz", "*.parquet"])
    with pytest.raises(ZooError, match="and none is given: --data DIR"):
        tars(None)


@pytest.mark.parametrize("kind", ["parquet"], indirect=True)
def test_a_row_group_too_large_to_read_for_one_image(own, planted, monkeypatch):
    monkeypatch.setattr("zoo.data._shards.LARGEST", 100)
    with pytest.raises(ZooError, match=r"items-0.parquet: row group 0 has 0 MB of images, all of which are read for one of them"):
        sharded(own, "parquet")


def test_the_names_of_shards(tmp_path):
    for name in ("b-1.tar", "a-1.tar", "a-2.tar"):
        (tmp_path / name).touch()
    names = [p.name for p in find_shards(tmp_path, ["b-*.tar", "?-1.tar", "c-{08..10}-{0..1}.tar"])]
    assert names == ["b-1.tar", "a-1.tar", "c-08-0.tar", "c-08-1.tar", "c-09-0.tar", "c-09-1.tar", "c-10-0.tar", "c-10-1.tar"]


@pytest.mark.parametrize("items", ["../a-*.tar", "/data/a-*.tar", "/data/a-0.tar", "sub/../../a-{0..1}.tar", "", "."])
def test_names_that_lead_out_of_the_folder(tmp_path, items):
    (tmp_path / "set").mkdir()
    (tmp_path / "a-0.tar").touch()
    says = rf"shards {re.escape(repr(items))}: names are below their folder, here .*/set: name another folder, and items-\*.tar in it"
    with pytest.raises(ZooError, match=says):
        find_shards(tmp_path / "set", ["*.tar", items])


def test_a_shard_may_be_a_link_to_elsewhere(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "blob").touch()
    (tmp_path / "set/a-0.tar").symlink_to(tmp_path / "blob")
    assert find_shards(tmp_path / "set", "a-*.tar") == [tmp_path / "set/a-0.tar"]
