"""Emoji: who is in which split, whose text is exchanged, what is refused; on a generated miniature, and on the real set where it is."""

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
from zoo.types import CaptionedData

DATA = Path(__file__).parents[2] / "shared/data"
STYLES = ("noto", "emojione", "fxemoji")
SPLITS = ["train"] * 20 + ["val"] * 5 + ["test"] * 5  # of the emoji


def png(level):
    """A picture whose colour is its number."""
    file = BytesIO()
    Image.new("RGB", (6, 6), (level // 256, level % 256, 0)).save(file, "PNG")
    return file.getvalue()


def concepts_table():
    rows = [
        {
            "concept_id": f"e{k}",
            "group": ("Food & Drink", "Objects")[k % 2],
            "split": split,
            "name_en": f"name {k}",
            "name_zh": f"名字{k}",
            "keywords_en": [f"word {k // 2}", "thing"],  # two emoji share theirs
            "keywords_zh": [f"词{k // 2}", "东西"],
            "text_en": f"name {k}: word {k // 2}, thing",
            "text_zh": f"名字{k}：词{k // 2}、东西",
        }
        for k, split in enumerate(SPLITS)
    ]
    return pa.Table.from_pylist(rows)


def images_table():
    cells = [(k, s) for k in range(len(SPLITS)) for s in STYLES if s != "fxemoji" or k % 2]
    return pa.Table.from_pylist(
        [{"image_id": f"e{k}.{s}", "concept_id": f"e{k}", "style": s, "image": png(i)} for i, (k, s) in enumerate(cells)]
    )


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "emoji_zh_en").mkdir()
    pq.write_table(concepts_table(), tmp_path / "emoji_zh_en/concepts.parquet")
    pq.write_table(images_table(), tmp_path / "emoji_zh_en/images.parquet")
    return tmp_path


def emoji(root, **settings):
    return make("data", {"name": "emoji_zh_en", **settings}, root)


def concepts_of(data, split):
    """The emoji that each picture of a split is of, by its own name."""
    return [int(data.picture_ids[p].partition(".")[0][1:]) for p in data.pairs(split)[:, 0]]


def styles_of(data, split):
    return {data.picture_ids[p].partition(".")[2] for p in data.pairs(split)[:, 0]}


def said(data, split):
    return [data.captions[c] for c in data.pairs(split)[:, 1]]


def test_it_is_what_models_of_pictures_and_texts_train_on(folder):
    data = emoji(folder)
    assert isinstance(data, CaptionedData)
    assert len(data.pictures) == len(data.picture_ids) == len(data.subject) == 75
    assert data.subject.dtype == data.pairs("train").dtype == data.lengths().dtype == np.int64
    assert data.lengths().tolist() == [len(text) for text in data.captions]
    assert list(data.broken) == []
    assert data.statistics["pairs"] == {"train": 50, "val": 12, "test": 13}


def test_a_picture_goes_with_the_text_of_its_emoji(folder):
    data = emoji(folder)
    for split in ("train", "val", "test"):
        assert said(data, split) == [f"name {k}: word {k // 2}, thing" for k in concepts_of(data, split)]
    for i in (0, 37, 74, -1):
        row = data.pictures[i]
        assert row["id"] == i % 75
        assert row["image"].getpixel((0, 0))[:2] == (0, i % 75)


def test_no_emoji_is_in_two_splits(folder):
    data = emoji(folder)
    assert [set(concepts_of(data, s)) for s in ("train", "val", "test")] == [set(range(20)), set(range(20, 25)), set(range(25, 30))]


def test_pictures_of_one_text_have_one_subject(folder):
    data = emoji(folder)
    concept = [int(name.partition(".")[0][1:]) for name in data.picture_ids]
    assert len(set(zip(concept, data.subject.tolist(), strict=True))) == len(set(concept)) == len(set(data.subject.tolist())) == 30
    shared = emoji(folder, text="keywords")
    assert len(set(shared.subject.tolist())) == len(shared.captions) == 15


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("en", "name", "name 3"),
        ("en", "keywords", "word 1, thing"),
        ("en", "both", "name 3: word 1, thing"),
        ("zh", "name", "名字3"),
        ("zh", "keywords", "词1、东西"),
        ("zh", "both", "名字3：词1、东西"),
    ],
)
def test_texts(folder, language, text, expected):
    data = emoji(folder, language=language, text=text)
    assert {t for t, k in zip(said(data, "train"), concepts_of(data, "train"), strict=True) if k == 3} == {expected}


def test_groups_are_over_the_pairs_of_a_split(folder):
    data = emoji(folder)
    groups = data.groups("test")
    assert list(groups) == ["Food & Drink", "Objects"]
    assert groups["Objects"].tolist() == [k % 2 == 1 for k in concepts_of(data, "test")]
    assert (groups["Objects"] ^ groups["Food & Drink"]).all()


def test_an_unseen_style_is_in_no_training_and_no_val_pair(folder):
    data = emoji(folder, unseen_style="fxemoji")
    assert styles_of(data, "train") == styles_of(data, "val") == {"noto", "emojione"}
    assert styles_of(data, "style") == {"fxemoji"}
    assert set(concepts_of(data, "style")) == set(range(1, 20, 2))
    assert styles_of(data, "test") == set(STYLES)
    with pytest.raises(ZooError, match="no split named 'style'"):
        emoji(folder).pairs("style")


def test_exchanged_texts(folder):
    clean, data = emoji(folder), emoji(folder, mismatch=0.4)
    wrong = data.planted("train")
    assert wrong.sum() == 20  # of 50
    own = [f"name {k}: word {k // 2}, thing" for k in concepts_of(data, "train")]
    assert [a != b for a, b in zip(said(data, "train"), own, strict=True)] == wrong.tolist()
    train = {*own}
    assert {*said(data, "train")} <= train  # the text of another training emoji
    for split in ("val", "test"):
        assert (data.pairs(split) == clean.pairs(split)).all()
        assert not data.planted(split).any()
    assert data.statistics["planted_mismatches"] == 20


def test_a_smaller_share_of_exchanged_texts_is_among_those_of_a_larger_one(folder):
    few, many = emoji(folder, mismatch=0.2), emoji(folder, mismatch=0.4)
    there = few.planted("train")
    assert many.planted("train")[there].all()
    assert (few.pairs("train")[there] == many.pairs("train")[there]).all()


def test_exchange_is_by_seed(folder):
    first, again, other = emoji(folder, mismatch=0.4), emoji(folder, mismatch=0.4), emoji(folder, mismatch=0.4, seed=1)
    assert (first.pairs("train") == again.pairs("train")).all()
    assert (first.pairs("train") != other.pairs("train")).any()
    assert first.fingerprint == again.fingerprint
    assert len({d.fingerprint for d in (first, other, emoji(folder), emoji(folder, language="zh"))}) == 4


def test_the_subject_of_a_picture_with_a_wrong_text_is_that_of_the_text(folder):
    data = emoji(folder, mismatch=0.4)
    pairs = data.pairs("train")
    by_text = {(int(c), int(data.subject[p])) for p, c in pairs}
    assert len(by_text) == len({c for c, _ in by_text}) == len({s for _, s in by_text})


def test_trusted_pairs_are_clean(folder):
    data = emoji(folder, mismatch=1.0, trusted=0.3)
    assert len(data.pairs("trusted")) == 15
    clean = {tuple(pair) for pair in emoji(folder).pairs("train").tolist()}
    assert {tuple(pair) for pair in data.pairs("trusted").tolist()} <= clean
    assert not data.planted("trusted").any()
    assert data.planted("train").sum() == 35
    assert {tuple(pair) for pair in data.pairs("trusted").tolist()} <= {tuple(pair) for pair in data.pairs("train").tolist()}


def test_the_trusted_pairs_alone_can_be_what_is_learned_from(folder):
    everything, alone = emoji(folder, mismatch=0.5, trusted=0.3), emoji(folder, mismatch=0.5, trusted=0.3, learn="trusted")
    assert (alone.pairs("train") == everything.pairs("trusted")).all()
    assert not alone.planted("train").any()
    with pytest.raises(ZooError, match=r"no training pair is trusted: write the share of those that are, trusted: 0\.2"):
        emoji(folder, learn="trusted")


def test_with_shared_keywords_an_exchange_for_the_same_text_is_none(folder):
    data = emoji(folder, text="keywords", mismatch=1.0)
    own = [f"word {k // 2}, thing" for k in concepts_of(data, "train")]
    assert data.planted("train").tolist() == [a != b for a, b in zip(said(data, "train"), own, strict=True)]


def test_it_goes_to_a_worker(folder):
    data = pickle.loads(pickle.dumps(emoji(folder)))
    assert data.pictures[3]["image"].size == (6, 6)
    with pytest.raises(IndexError):
        data.pictures[75]


class TestRefusals:
    def test_no_root_and_no_folder(self, tmp_path):
        with pytest.raises(Absent, match=r"looked for in a folder of data folders, and none is given\nemoji_zh_en is a folder with"):
            emoji(None)
        with pytest.raises(Absent, match="no folder"):
            emoji(tmp_path)

    def test_a_lost_file(self, folder):
        (folder / "emoji_zh_en/images.parquet").unlink()
        with pytest.raises(Absent, match=r"there is no images.parquet"):
            emoji(folder)

    def test_a_style_that_is_not_there(self, folder):
        with pytest.raises(ZooError, match=r"drawn in the style 'region_flags' \(there is: emojione, fxemoji, noto\)"):
            emoji(folder, unseen_style="region_flags")

    @pytest.mark.parametrize(
        ("table", "change", "says"),
        [
            ("images", {"image": b"none"}, r"e0\.noto: 4 bytes are no picture that can be decoded \(of no known format\)"),
            ("images", {"concept_id": "x"}, r"1 concept_id, such as 'x', are not in concepts.parquet"),
            ("images", {"image_id": "e1.noto"}, "image_id e1.noto stands there 2 times"),
            ("concepts", {"split": "dev"}, "column 'split' holds 'dev': write train, val or test"),
            ("concepts", {"text_en": ""}, "e0 has no text_en"),
            ("concepts", {"group": None}, "column 'group' has 1 empty cells"),
        ],
    )
    def test_rows_that_are_wrong(self, folder, table, change, says):
        path = folder / f"emoji_zh_en/{table}.parquet"
        rows = pq.read_table(path).to_pylist()
        rows[0] |= change
        pq.write_table(pa.Table.from_pylist(rows), path)
        with pytest.raises(ZooError, match=says):
            emoji(folder)

    def test_a_lost_column(self, folder):
        path = folder / "emoji_zh_en/concepts.parquet"
        pq.write_table(pq.read_table(path).drop(["name_zh"]), path)
        emoji(folder)
        with pytest.raises(ZooError, match=r"concepts.parquet: no column named 'name_zh'; did you mean 'name_en'"):
            emoji(folder, language="zh", text="name")


@pytest.mark.realdata
@pytest.mark.skipif(not (DATA / "emoji_zh_en").is_dir(), reason="the shared data are not here")
class TestReal:
    """The counts are those of the set's README."""

    def test_counts(self):
        data = emoji(DATA)
        assert data.statistics["concepts"] == {"train": 1516, "val": 150, "test": 234}
        assert data.statistics["pairs"] == {"train": 4291, "val": 430, "test": 686}
        assert len(data.pictures) == 5407
        assert len(data.captions) == len(set(data.subject.tolist())) == 1900
        assert len(data.groups("train")) == 9
        assert data.pictures[0]["image"].size == (64, 64)

    def test_unseen_style(self):
        data = emoji(DATA, language="zh", text="name", unseen_style="fxemoji")
        assert data.statistics["pairs"] == {"train": 3837, "val": 385, "test": 686, "style": 454}
        assert len({c for _, c in data.pairs("style").tolist()}) == 454  # chance of R@1 is 1 in 454
        assert {c for _, c in data.pairs("style").tolist()} <= {c for _, c in data.pairs("train").tolist()}
