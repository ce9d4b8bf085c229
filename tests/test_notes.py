"""A folder of notes: what rows hold, how the log is split, and what is said of a folder that is wrong."""

from __future__ import annotations

import logging
import pickle
from datetime import date
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from zoo.encoders._image import ImageProcessor
from zoo.errors import ZooError
from zoo.pictures import MOST_PIXELS
from zoo.registry import make
from zoo.train import train

DATA = Path(__file__).parents[2] / "shared/data"
DAY = 86400


def png(colour: Any = "red", mode: str = "RGB", size: tuple[int, int] = (4, 4)) -> bytes:
    file = BytesIO()
    Image.new(mode, size, colour).save(file, "PNG")
    return file.getvalue()


def notes_table(**columns: Any) -> pa.Table:
    """Six notes: 3 has no text, 4 no image."""
    return pa.table(
        {
            "note_id": [f"n{i}" for i in range(6)],
            "title": ["cat", " dog ", "a longer title", "", "tea", "rain"],
            "topic": ["pets", "pets", None, " ", "food", "sky"],
            "content": ["soft", None, "and a long content", None, "green", "wet"],
            "image": pa.array([png(), png("blue"), png(), png(), None, png()], pa.binary()),
        }
        | columns
    )


def clicks_table(**columns: Any) -> pa.Table:
    """Two users; days 0 to 5, one note a day."""
    return pa.table(
        {
            "user_id": [1, 2] * 6,
            "note_id": [f"n{i}" for i in range(6) for _ in range(2)],
            "timestamp": [i * DAY for i in range(6) for _ in range(2)],
        }
        | columns
    )


def folder(place: Path, **tables: pa.Table) -> Path:
    (place / "set").mkdir(exist_ok=True)
    for name, table in {"notes": notes_table(), "clicks": clicks_table(), **tables}.items():
        pq.write_table(table, place / "set" / f"{name}.parquet")
    return place


def notes(root: Path | None, **keywords: Any) -> Any:
    return make("data", {"name": "notes", "folder": "set", **keywords}, root)


def test_rows_hold_what_the_note_has_and_no_more(tmp_path):
    data = notes(folder(tmp_path))
    assert len(data.notes) == 6
    first = data.notes[0]
    assert {k: first[k] for k in ("id", "note_id", "title", "topic", "content")} == {
        "id": 0,
        "note_id": "n0",
        "title": "cat",
        "topic": "pets",
        "content": "soft",
    }
    assert first["image"].mode == "RGB"
    assert first["image"].getpixel((0, 0)) == (255, 0, 0)
    assert data.notes[1]["title"] == "dog"
    assert set(data.notes[3]) == {"id", "note_id", "image"}
    assert set(data.notes[4]) == {"id", "note_id", "title", "topic", "content"}
    assert data.notes[-1]["id"] == data.notes[np.int64(5)]["id"] == 5
    with pytest.raises(IndexError):
        data.notes[6]
    assert [r["id"] for r in data.notes] == list(range(6))
    assert data.note_ids == [f"n{i}" for i in range(6)]
    assert data.texts()[:4] == ["cat pets soft", "dog pets", "a longer title and a long content", ""]
    assert data.lengths().tolist() == [7, 3, 32, 0, 8, 7]


def test_inputs_leave_a_modality_out_of_the_rows_and_nothing_else(tmp_path):
    both, seen, read = (notes(folder(tmp_path), **k) for k in ({}, {"inputs": ["image"]}, {"inputs": ["text"]}))
    assert set(seen.notes[0]) == {"id", "note_id", "image"}
    assert set(read.notes[0]) == {"id", "note_id", "title", "topic", "content"}
    assert seen.lengths().tolist() == both.lengths().tolist()
    assert seen.texts() == both.texts()
    assert len({both.fingerprint, seen.fingerprint, read.fingerprint}) == 3


def test_broken_images_are_found_listed_and_absent(tmp_path, caplog):
    cut = png()[:40]
    table = notes_table(image=pa.array([png(), b"nonsense", cut, None, b"", png()], pa.binary()))
    with caplog.at_level(logging.WARNING, "zoo.data"):
        data = notes(folder(tmp_path, notes=table))
    assert data.broken == ["n1", "n2", "n4"]
    assert [r.getMessage() for r in caplog.records] == [
        "3 images cannot be decoded, or have more than 67108864 pixels, and count as absent, those of notes n1, n2, n4"
    ]
    assert ["image" in r for r in data.notes] == [True, False, False, False, False, True]
    assert data.statistics["images"] == 2
    assert data.statistics["images_broken"] == 3


def test_images_that_are_not_there_are_told_apart_from_broken_ones(tmp_path, caplog):
    root = folder(tmp_path, notes=notes_table(image=["a.png", "gone.png", "cut.png", None, "images", "far/b.png"]))
    (tmp_path / "set/images").mkdir()
    (tmp_path / "set/a.png").write_bytes(png())
    (tmp_path / "set/cut.png").write_bytes(png()[:40])
    with caplog.at_level(logging.WARNING, "zoo.data"):
        assert notes(root).broken == ["n1", "n2", "n4", "n5"]
    lost = f"3 images are not found, such as {tmp_path}/set/gone.png, and count as absent, those of notes n1, n4, n5"
    assert caplog.messages == [
        lost,
        "1 images cannot be decoded, or have more than 67108864 pixels, and count as absent, those of notes n2",
    ]


@pytest.mark.parametrize(
    "images, says",
    [
        (["a.png"] * 5 + [None], "NOT ONE of the 5 images can be used, and models learn from text alone: their paths begin in {}: is that"),
        ([b"x"] * 6, "NOT ONE of the 6 images can be used, and models learn from text alone: does column 'image' hold image files?"),
    ],
)
def test_a_data_set_whose_images_are_all_unusable(tmp_path, caplog, images, says):
    with caplog.at_level(logging.ERROR, "zoo.data"):
        notes(folder(tmp_path, notes=notes_table(image=images)))
    (record,) = (r for r in caplog.records if r.levelno == logging.ERROR)
    assert record.getMessage().startswith(says.format(tmp_path / "set"))


def test_images_too_large_for_an_encoder_are_absent_before_they_are_decoded(tmp_path, monkeypatch):
    table = notes_table(image=[None] * 5 + ["../large.png"])
    root = folder(tmp_path, notes=table)
    (tmp_path / "large.png").write_bytes(png(0, "1", (8500, 8500)))  # between the encoders' limit and Pillow's
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("it was decoded"))
    assert notes(root).broken == ["n5"]
    with pytest.raises(ZooError, match=rf"large.png: more than {MOST_PIXELS} pixels: make the image smaller \(8500 x 8500\)"):
        ImageProcessor(16)(tmp_path / "large.png")


def test_training_goes_past_images_that_are_too_large(tmp_path):
    images = [png(0, "1", (8500, 8500)), *[png()] * 5]
    pairs = pa.table({"note_a": ["n0", "n2"], "note_b": ["n1", "n3"], "split": ["train"] * 2})
    root = folder(tmp_path, notes=notes_table(image=pa.array(images, pa.binary())), pairs=pairs)
    model = {
        "name": "dual_encoder",
        "text": {"name": "tiny_text", "dim": 8, "layers": 1, "heads": 2, "rows": 32},
        "vision": {"name": "tiny_image", "dim": 8, "layers": 1, "heads": 2, "image_size": 8},
        "dim": 4,
        "language": "en",
    }
    recipe = {
        "model": model,
        "data": {"name": "notes", "folder": "set"},
        "objective": {"name": "infonce", "on": ["item"]},
        "run": {"epochs": 1, "batch_size": 2, "device": "cpu"},
        "out": str(tmp_path / "run"),
    }
    assert train(recipe, data_root=root).trained


def test_images_by_path_and_transparent_ones(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a.png").write_bytes(png((0, 0, 0, 0), "RGBA"))
    table = notes_table(image=["a.png", "gone.png", None, None, None, None])
    data = notes(folder(tmp_path, notes=table))
    assert data.notes[0]["image"].getpixel((0, 0)) == (255, 255, 255)
    assert data.broken == ["n1"]
    (tmp_path / "set/a.png").write_bytes(png("green"))
    assert notes(folder(tmp_path, notes=table)).fingerprint != data.fingerprint


def test_a_data_set_travels_to_a_worker(tmp_path):
    data = notes(folder(tmp_path))
    other = pickle.loads(pickle.dumps(data))
    assert other.notes[2]["title"] == "a longer title"
    assert other.pairs("train").tolist() == data.pairs("train").tolist()


@pytest.mark.parametrize("starts", [("1970-01-04", "1970-01-05"), (date(1970, 1, 4), date(1970, 1, 5)), (0.6, 0.8)])
def test_time_split_by_dates_and_by_fractions(tmp_path, starts):
    data = notes(folder(tmp_path), val_from=starts[0], test_from=starts[1])
    assert data.clicks().tolist() == [2, 2, 2, 0, 0, 0]
    assert sorted(data.pairs("train").tolist()) == [[0, 1], [0, 2], [1, 2]]
    assert data.pairs("val").tolist() == []
    assert data.pairs("test").tolist() == [[4, 5]]
    assert data.pool("test").tolist() == list(range(6))
    assert data.statistics["pairs"] == {"train": 3, "val": 0, "test": 1}
    assert data.statistics["mining"]["train"]["groups"] == 2
    with pytest.raises(ZooError, match=r"no split named 'tset'; did you mean 'test'"):
        data.pairs("tset")


def test_without_dates_the_column_split_decides_else_the_last_fifth(tmp_path):
    split = ["train"] * 8 + ["val"] * 4
    assert notes(folder(tmp_path, clicks=clicks_table(split=split))).pairs("val").tolist() == [[4, 5]]
    assert notes(folder(tmp_path)).clicks().tolist() == [2, 2, 2, 2, 0, 0]


def test_later_splits_may_need_fewer_groups(tmp_path):
    log = clicks_table(user_id=[1, 2] * 5 + [1, 3], split=["train"] * 8 + ["val"] * 4)
    place = folder(tmp_path, clicks=log)
    assert len(notes(place, mine={"min_groups": 2}).pairs("val")) == 0
    data = notes(place, mine={"min_groups": 2, "min_groups_held_out": 1})
    assert len(data.pairs("val")) == 1
    assert set(data.pairs("train").ravel().tolist()) == {0, 1, 2, 3}


def test_cold_notes_are_kept_out_of_all_splits_but_their_own(tmp_path):
    data = notes(
        folder(tmp_path, notes=notes_table(split=["warm", "cold_test", *["warm"] * 4])), val_from="1970-01-05", test_from="1970-01-06"
    )
    assert sorted(data.pairs("train").tolist()) == [[0, 2], [0, 3], [2, 3]]
    assert sorted(data.pairs("cold_test").tolist()) == [[1, 2], [1, 3], [1, 4], [1, 5]]
    assert data.statistics["cold"] == 1


def test_short_is_the_shortest_sixth_of_what_training_sees(tmp_path):
    count = 60
    table = pa.table({"note_id": range(count), "title": ["x" * (i + 1) for i in range(count)]})
    log = pa.table({"user_id": [1] * 30, "note_id": range(30, 60), "timestamp": range(30), "split": ["train"] * 30})
    data = notes(folder(tmp_path, notes=table, clicks=log))
    assert data.short().tolist() == [True] * 35 + [False] * 25  # of 31..60 characters the shortest sixth has up to 35


def test_pairs_of_a_file_keep_their_order_and_the_first_ranks(tmp_path):
    table = pa.table(
        {
            "note_a": ["n3", "n0", "n0", "n1", "nx"],
            "note_b": ["n2", "n1", "n2", "n0", "n1"],
            "rank_score": [0, 0, 1, -1, 0],
            "rank_cosine": [-1, -1, 0, 0, 0],
            "split": ["train", "train", "train", "val", "train"],
        }
    )
    place = folder(tmp_path, pairs=table)
    data = notes(place)
    assert data.pairs("train").tolist() == [[3, 2], [0, 1], [0, 2]]
    assert data.statistics["pairs_unknown"] == 1
    assert notes(place, mine={"top": 1}).pairs("train").tolist() == [[3, 2], [0, 1]]
    cosine = notes(place, mine={"rank_by": "cosine"})
    assert cosine.pairs("train").tolist() == [[0, 2]]
    assert cosine.pairs("val").tolist() == [[1, 0]]
    assert len(notes(place, pairs="mine").pairs("train")) == 6  # of the first four days


def test_columns_map_names_and_leave_out(tmp_path):
    place = folder(tmp_path, notes=notes_table(name=["x", "y", "z", "u", "v", "w"]))
    data = notes(place, columns={"title": "name", "topic": None})
    assert data.notes[0]["title"] == "x"
    assert "topic" not in data.notes[0]
    assert data.texts()[0] == "x soft"


def test_csv_ids_stay_text_and_meet_numbers(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/notes.csv").write_text("note_id,title\n007,first\n8,\n9,笔记\n", encoding="utf-8")
    pq.write_table(
        pa.table({"user_id": [1, 1], "note_id": [8, 9], "timestamp": [0, 1], "split": ["train"] * 2}), tmp_path / "set/clicks.parquet"
    )
    data = notes(tmp_path)
    assert data.note_ids == ["007", "8", "9"]
    assert data.pairs("train").tolist() == [[1, 2]]
    assert [r.get("title") for r in data.notes] == ["first", None, "笔记"]


def test_the_fingerprint_follows_content_and_settings_and_not_the_place(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    one, other = (notes(folder(tmp_path / n)).fingerprint for n in ("a", "b"))
    assert one == other
    assert notes(tmp_path / "a", mine={"top": 3}).fingerprint != one
    assert notes(folder(tmp_path / "b", clicks=clicks_table(user_id=[1, 3] * 6))).fingerprint != one


def test_a_folder_that_is_not_there_says_how_it_looks(tmp_path):
    with pytest.raises(ZooError, match=r"(?s)no folder .*set.*notes.parquet or .csv.*--data DIR or ZOO_DATA.*data_root="):
        notes(tmp_path)
    with pytest.raises(ZooError, match=r"(?s)'retail_notes' is looked for.*UCI 'Online Retail'.*A notes data set is a folder"):
        notes(None, folder="retail_notes")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/readme.txt").write_text("")
    with pytest.raises(ZooError, match=r"there is no notes.parquet or notes.csv; there is: readme.txt"):
        notes(tmp_path)
    folder(tmp_path)
    (tmp_path / "set/notes.csv").write_text("note_id\n")
    with pytest.raises(ZooError, match=r"there are notes.parquet and notes.csv: keep one"):
        notes(tmp_path)
    assert len(notes(None, folder=str(folder(_fresh(tmp_path)) / "set")).notes) == 6  # an absolute path needs no root


def _fresh(place: Path) -> Path:
    (place / "other").mkdir()
    return place / "other"


def test_all_faults_of_a_folder_come_at_once(tmp_path):
    table = notes_table(note_id=["n0", "n1", "n1", "n2", "n2", "n2"])
    log = clicks_table(timestamp=["noon"] * 12)
    pairs = pa.table({"note_a": ["n0"], "target": ["n1"]})
    with pytest.raises(ZooError) as e:
        notes(folder(tmp_path, notes=table, clicks=log, pairs=pairs))
    said = str(e.value).splitlines()
    assert said[0].endswith("3 faults")
    assert said[1] == "notes.parquet: 2 note_ids stand there more than once, such as 'n1', 'n2'"
    assert said[2].startswith("clicks.parquet: column 'timestamp' is VARCHAR, such as 'noon': write seconds")
    assert said[3] == "pairs.parquet: no column named 'note_b'; did you mean 'note_a'? (have: note_a, target)"


@pytest.mark.parametrize(
    "tables, keywords, match",
    [
        (
            {"notes": notes_table().rename_columns(["id", "a", "b", "c", "d"])},
            {},
            r"notes.parquet: no column named 'note_id'.*have: a, b, c, d, id",
        ),
        (
            {"notes": pa.table({"note_id": [1], "x": [2]})},
            {},
            r"none of the columns title, topic, content, image is there \(have: note_id, x\)",
        ),
        ({"notes": notes_table().slice(0, 0)}, {}, r"notes.parquet: it has no rows"),
        ({"notes": notes_table(note_id=["n0", None, None, "n3", "n4", "n5"])}, {}, r"2 rows have no note_id"),
        ({"notes": notes_table(image=[1, 2, 3, 4, 5, 6])}, {}, r"column 'image' is BIGINT: write the bytes of an image file, or its path"),
        ({}, {"columns": {"title": "titel"}}, r"no column named 'titel'; did you mean 'title'"),
        ({"clicks": clicks_table().slice(0, 0)}, {}, r"clicks.parquet: it has no complete rows"),
        (
            {"clicks": clicks_table(note_id=range(12))},
            {},
            r"clicks.parquet: no note_id is one of the notes': there '0', '1', '2', in the notes 'n0'",
        ),
        ({}, {"pairs": "file"}, r"pairs: file, but there is no pairs.parquet or pairs.csv: write pairs: mine"),
        ({}, {"val_from": 0.9, "test_from": 0.5}, r"val begins 2.0 days after test: test_from must lie after val_from"),
        ({}, {"val_from": 0.9}, r"val_from and test_from go together"),
        ({}, {"mine": {"min_groups": 9}}, r"no training pair is left: no pair is left of 6 co-clicked.*6 are found in fewer than 9 groups"),
        (
            {"pairs": pa.table({"note_a": ["n0"], "note_b": ["n1"], "rank": [12]})},
            {},
            r"pairs.parquet: it has no rows with rank between 0 and 9",
        ),
        ({"pairs": pa.table({"note_a": ["n0"], "note_b": ["n1"], "split": ["val"]})}, {}, r"no split named 'train'.*have: val"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, tables, keywords, match):
    with pytest.raises(ZooError, match=f"(?s){match}"):
        notes(folder(tmp_path, **tables), **keywords)


def test_unknown_ids_and_incomplete_clicks_are_counted(tmp_path):
    log = clicks_table(note_id=["gone", None, *[f"n{i}" for i in range(1, 6) for _ in range(2)]])
    statistics = notes(folder(tmp_path, clicks=log)).statistics
    assert (statistics["clicks"], statistics["clicks_incomplete"], statistics["clicks_unknown"]) == (12, 1, 1)


def test_neither_clicks_nor_pairs(tmp_path):
    (folder(tmp_path) / "set/clicks.parquet").unlink()
    with pytest.raises(ZooError, match=r"there are neither clicks to mine nor pairs: write clicks.parquet, or pairs.parquet"):
        notes(tmp_path)
    pq.write_table(pa.table({"note_a": ["n0"], "note_b": ["n1"]}), tmp_path / "set/pairs.parquet")
    data = notes(tmp_path)
    assert data.pairs("train").tolist() == [[0, 1]]
    assert data.clicks().tolist() == [0] * 6


def test_a_csv_in_another_encoding(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/notes.csv").write_bytes("note_id,title\n1,tea\n2,café\n".encode("latin-1"))
    pq.write_table(clicks_table(), tmp_path / "set/clicks.parquet")
    with pytest.raises(ZooError, match=r"notes.csv: line 3 is not UTF-8"):
        notes(tmp_path)


@pytest.mark.realdata
@pytest.mark.skipif(not (DATA / "retail_notes").is_dir(), reason="retail_notes is not there")
def test_retail_notes():
    data = notes(DATA, folder="retail_notes", columns={"title": "title_masked"}, mine={"rank_by": "cosine"})
    assert {s: len(data.pairs(s)) for s in ("train", "val", "test", "cold_test")} == data.statistics["pairs"]
    assert data.statistics["pairs"] == {"train": 21523, "val": 13513, "test": 16554, "cold_test": 2469}
    assert data.broken == []
    assert data.notes[5]["image"].size == (72, 72)
    assert data.notes[5]["title"] == "army camo bookcover tape"
    assert 0.15 < data.short().mean() < 0.2
    popular = np.argsort(-data.clicks(), kind="stable")[:11]
    wanted: dict[int, set[int]] = {}
    for a, b in data.pairs("val").tolist():
        wanted.setdefault(a, set()).add(b)
    recall = np.mean([len({p for p in popular.tolist() if p != a} & b) / len(b) for a, b in wanted.items()])
    assert recall == pytest.approx(0.023, abs=0.003)  # the table of its README: popularity@10 on val


@pytest.mark.slow
@pytest.mark.realdata
@pytest.mark.skipif(not (DATA / "retail_notes").is_dir(), reason="retail_notes is not there")
def test_retail_notes_mined_by_these_settings_are_the_pairs_that_it_brings():
    rule = {"group": "session_id", "directed": False, "window_days": None, "low": 0.0, "up": 1e9, "rank_by": "cosine"}
    rule |= {"min_groups": 4, "min_groups_held_out": 3, "max_notes": 100}
    mined, brought = (notes(DATA, folder="retail_notes", pairs=p, mine=rule) for p in ("mine", "file"))
    for split in ("train", "val", "test", "cold_test"):
        assert sorted(mined.pairs(split).tolist()) == sorted(brought.pairs(split).tolist())
