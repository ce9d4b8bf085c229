"""Captions, questions and classes in folders: a miniature of each published layout is written and read, whole and broken."""

import inspect
import json
import logging
import pickle
import re
import shutil
from io import BytesIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from zoo.data._caption_lines import lines
from zoo.errors import Absent, ZooError
from zoo.registry import entry, make
from zoo.types import CaptionedData, LabelledData

KARPATHY = {"coco_captions": "coco", "flickr30k": "flickr30k", "flickr8k": "flickr8k"}
CAPTIONED = (*KARPATHY, "coco_cn", "flickr8k_cn", "flickr30k_cn")
LABELLED = ("imagenet", "vqa_v2")


def jpg(path, level=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 20), (level, level, level)).save(path, "JPEG")


def png(level):
    file = BytesIO()
    Image.new("RGB", (6, 6), (level, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")


def coco_name(number, part="train"):
    return f"COCO_{part}2014_{number:012d}"


def karpathy(place, name):
    """Picture n has five captions, the first of which all pictures share; picture 0 has six."""
    images, rests = [], {"coco_captions": ["train", "train", "restval", "val", "test"]}
    for n, split in enumerate(rests.get(name, ["train", "train", "train", "val", "test"])):
        part = {"filepath": f"{'train' if split == 'train' else 'val'}2014"} if name == "coco_captions" else {}
        file = f"{coco_name(n, part['filepath'][:-4])}.jpg" if part else f"{n}.jpg"
        said = ["a square", *(f" number {n}, said {k}\n" for k in range(5 if n == 0 else 4))]
        images.append({**part, "filename": file, "split": split, "imgid": n, "sentids": [], "sentences": [{"raw": s} for s in said]})
        jpg(place / (part["filepath"] if part else "images") / file, 10 * n)
    write(place / f"dataset_{KARPATHY[name]}.json", {"images": images, "dataset": KARPATHY[name]})


def coco_cn(place):
    parts = {"train": [(0, "train"), (1, "val")], "val": [(2, "train")], "test": [(3, "val")]}
    said = []
    for split, pictures in parts.items():
        names = [coco_name(*p) for p in pictures]
        write(place / f"coco-cn_{split}.txt", "".join(f"{name}\n" for name in names))
        said += [f"{name}#{k}\t第{k}句 {name[-1]}。" for name in names for k in range(2)]
        for (number, part), name in zip(pictures, names, strict=True):
            jpg(place / f"{part}2014/{name}.jpg", 10 * number)
    write(place / "imageid.human-written-caption.txt", "\n".join([*said, f"{coco_name(9)}#0\t没有"]) + "\n")
    write(place / "imageid.manually-translated-caption.txt", f"{coco_name(3, 'val')}#0\t翻译\n")


def flickr8k_cn(place):
    for n, split in enumerate(("train", "train", "val", "test")):
        jpg(place / f"images/{n}_ab.jpg", 10 * n)
        with (place / f"flickr8k{split}.txt").open("a", encoding="utf-8") as file:
            file.write(f"{n}_ab\n")
    write(place / "flickr8kzhc.caption.txt", "".join(f"{n}_ab.jpg#zhc#{k} 句子{n}{k}。\n" for n in range(4) for k in range(5)))


def flickr30k_cn(place):
    parts = {"flickr30kzhbbosontrain": [0, 1], "flickr30kzhbbosonval": [2], "flickr30kzhmbosontest": [3]}
    for part, pictures in parts.items():
        kind = "zhm" if part.endswith("test") else "zhb"
        words = "一:m 只:q 狗:n :)" if kind == "zhm" else "一 只  狗"
        write(place / f"{part}/ImageSets/{part}.txt", "".join(f"{n}\n" for n in pictures))
        write(place / f"{part}/TextData/seg.{part}.caption.txt", "".join(f"{n}#{kind}#0 {words} {n}\n" for n in pictures))
        for n in pictures:
            jpg(place / f"images/{n}.jpg", 10 * n)


def imagenet(place):
    for k, wnid in enumerate(("n03", "n01", "n02")):
        for n in range(2):
            jpg(place / f"val/{wnid}/ILSVRC2012_val_{k}{n}.JPEG", 10 * k)
            jpg(place / f"train/{wnid}/{wnid}_{n}.JPEG", 10 * k)
    write(place / "classes.txt", "n01 tench, Tinca tinca\nn02 crane\nn03 great white shark, white shark\nn04 crane\n")


def vqa_v2(place):
    """Twenty pictures a part with a question each; the answer "yes" is frequent, every fifth is of its own."""
    for part, begin in (("train2014", 0), ("val2014", 100)):
        asked, answered = [], []
        for n in range(begin, begin + 20):
            usual = f"rare {n}" if n % 5 == 0 else "yes"
            asked.append({"question_id": 10 * n, "image_id": n, "question": f" Is it {n}? "})
            said = [{"answer": usual if k < 7 else "no", "answer_confidence": "yes", "answer_id": k + 1} for k in range(10)]
            answered.append(
                {"question_id": 10 * n, "image_id": n, "multiple_choice_answer": usual, "answers": said, "answer_type": "yes/no"}
            )
            jpg(place / f"{part}/{coco_name(n, part[:-4])}.jpg", n)
        write(place / f"v2_OpenEnded_mscoco_{part}_questions.json", {"questions": asked})
        write(place / f"v2_mscoco_{part}_annotations.json", {"annotations": answered[::-1]})


MINIATURES = {**{name: lambda place, name=name: karpathy(place, name) for name in KARPATHY}, "coco_cn": coco_cn, "flickr8k_cn": flickr8k_cn}
MINIATURES |= {"flickr30k_cn": flickr30k_cn, "imagenet": imagenet, "vqa_v2": vqa_v2}


@pytest.fixture(scope="module")
def miniatures(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    for name, made in MINIATURES.items():
        (root / name).mkdir()
        made(root / name)
    return root


@pytest.fixture
def copied(miniatures, tmp_path):
    """The same, to be broken."""
    return shutil.copytree(miniatures, tmp_path / "copy")


def load(root, name, **settings):
    if name == "vqa_v2":
        settings = {"least": 5, "val": 0.2} | settings
    return make("data", {"name": name, **settings}, root)


def files_of(root, name):
    """The pictures of a miniature that it shows unless it is asked for more."""
    return sorted((root / name / "val").rglob("*.JPEG") if name == "imagenet" else (root / name).rglob("*.jpg"))


def said(data, split):
    """{name of a picture: its texts}."""
    found = {}
    for picture, caption in data.pairs(split).tolist():
        found.setdefault(data.picture_ids[picture], []).append(data.captions[caption])
    return found


class TestEach:
    @pytest.mark.parametrize("name", CAPTIONED)
    def test_captions(self, miniatures, name):
        data = load(miniatures, name)
        assert isinstance(data, CaptionedData)
        assert all(len(data.pairs(split)) for split in ("train", "val", "test"))
        assert len({*data.captions}) == len(data.captions) == len(data.lengths())
        assert data.pictures[0]["image"].size == (24, 20)
        assert data.groups("test") == {}
        assert pickle.loads(pickle.dumps(data)).pictures[1]["id"] == 1

    @pytest.mark.parametrize("name", LABELLED)
    def test_classes(self, miniatures, name):
        data = load(miniatures, name)
        assert isinstance(data, LabelledData)
        assert len(data.rows) == len(data.labels) == len(data.row_ids) == len(data.lengths())
        assert all(m in data.rows[0] for m in data.modalities)
        with pytest.raises(ZooError, match="no split named 'dev'"):
            data.split("dev")

    @pytest.mark.parametrize("name", MINIATURES)
    def test_the_same_files_have_the_same_fingerprint(self, miniatures, copied, name):
        before = load(miniatures, name).fingerprint
        assert load(copied, name).fingerprint == before
        jpg(files_of(copied, name)[0], 250)
        assert load(copied, name).fingerprint != before

    @pytest.mark.parametrize("name", MINIATURES)
    def test_a_broken_picture_is_left_out_and_named(self, copied, name, caplog):
        whole = load(copied, name)
        path = files_of(copied, name)[0]
        path.write_bytes(b"no picture")
        with caplog.at_level(logging.WARNING, "zoo.data"):
            data = load(copied, name)
        assert len(data.broken) == 1
        assert path.stem in str(data.broken[0])
        assert f"1 pictures of {name} cannot be used, such as {path} is no picture" in caplog.text
        counts = [len(d.pictures) if name in CAPTIONED else len(d.rows) for d in (whole, data)]
        assert counts[1] == counts[0] - 1

    @pytest.mark.parametrize("name", MINIATURES)
    def test_no_picture_at_all(self, copied, name):
        for path in files_of(copied, name):
            path.unlink()
        with pytest.raises(ZooError, match=rf"not one of \d+ pictures can be used.*\n{name} is a folder with|not one of 0 pictures"):
            load(copied, name)

    @pytest.mark.parametrize("name", MINIATURES)
    def test_absent(self, tmp_path, name):
        with pytest.raises(Absent, match=f"no folder .*\n{name} is a folder with"):
            load(tmp_path, name)
        (tmp_path / name).mkdir()
        with pytest.raises(ZooError, match=r"there is no .*; there is: nothing"):
            load(tmp_path, name)

    @pytest.mark.parametrize("name", MINIATURES)
    def test_the_page_says_every_setting(self, name):
        maker = entry("data", name).maker
        text = inspect.getdoc(maker)
        for setting in inspect.signature(maker).parameters:
            assert re.search(rf"^ +{setting}: ", text, re.MULTILINE), setting


class TestKarpathy:
    def test_texts_by_hand(self, miniatures):
        found = said(load(miniatures, "flickr8k"), "train")
        assert found == {f"{n}.jpg": ["a square", *(f"number {n}, said {k}" for k in range(5 if n == 0 else 4))] for n in range(3)}
        assert list(said(load(miniatures, "flickr8k"), "test")) == ["4.jpg"]

    def test_restval(self, miniatures):
        with_rest, without = load(miniatures, "coco_captions"), load(miniatures, "coco_captions", restval=False)
        names = [f"{coco_name(n, part)}.jpg" for n, part in ((0, "train"), (1, "train"), (2, "val"))]
        assert list(said(with_rest, "train")) == names
        assert list(said(without, "train")) == names[:2]
        assert list(said(without, "restval")) == names[2:]
        assert with_rest.fingerprint != without.fingerprint

    def test_so_many_of_each_picture(self, miniatures):
        assert {len(texts) for texts in said(load(miniatures, "flickr30k"), "train").values()} == {5, 6}
        assert {len(texts) for texts in said(load(miniatures, "flickr30k", captions=5), "train").values()} == {5}

    def test_a_shared_caption_links_pictures(self, miniatures):
        assert len(set(load(miniatures, "flickr8k").subject.tolist())) == 1

    def test_pictures_in_another_folder(self, copied):
        before = load(copied, "coco_captions").fingerprint
        for part in ("train2014", "val2014"):
            shutil.move(copied / "coco_captions" / part, copied / "elsewhere" / part)
        assert load(copied, "coco_captions", images=str(copied / "elsewhere")).fingerprint == before

    def test_the_training_pictures_may_be_missing(self, copied):
        for n in range(3):
            (copied / f"flickr8k/images/{n}.jpg").unlink()
        data = load(copied, "flickr8k")
        assert data.pairs("train").shape == (0, 2)
        assert len(data.pairs("test")) == 5
        assert data.broken == ["0.jpg", "1.jpg", "2.jpg"]
        assert data.statistics["faults"][0].endswith("images/0.jpg there is no such file")

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            ("{", "cannot be read as JSON"),
            ([], "there is no list 'images'"),
            ({"images": [{"filename": "a", "split": "train"}]}, "1 of 1 images, such as number 0, lack filename, split or sentences with"),
            ({"images": []}, "no picture was found"),
            ({"images": [{"filename": "a", "split": "train", "sentences": [{"raw": "x"}]}] * 2}, "1 pictures stand there more than once"),
            ({"images": [{"filename": "0.jpg", "split": "train", "sentences": [{"raw": " "}]}]}, "such as: no picture has a text"),
        ],
    )
    def test_another_file(self, copied, content, says):
        write(copied / "flickr8k/dataset_flickr8k.json", content)
        with pytest.raises(ZooError, match=says):
            load(copied, "flickr8k")


class TestChinese:
    def test_coco(self, miniatures):
        data = load(miniatures, "coco_cn")
        assert said(data, "train") == {coco_name(0): ["第0句 0。", "第1句 0。"], coco_name(1, "val"): ["第0句 1。", "第1句 1。"]}
        assert data.statistics["texts_of_pictures_in_no_list"] == 1
        translated = load(miniatures, "coco_cn", texts="imageid.manually-translated-caption.txt")
        assert said(translated, "test") == {coco_name(3, "val"): ["翻译"]}
        assert len(translated.pairs("train")) == 0

    def test_flickr8k(self, miniatures):
        assert said(load(miniatures, "flickr8k_cn"), "val") == {"2_ab": [f"句子2{k}。" for k in range(5)]}

    def test_flickr30k(self, miniatures):
        data = load(miniatures, "flickr30k_cn")
        assert said(data, "train") == {"0": ["一只狗0"], "1": ["一只狗1"]}
        assert said(data, "test") == {"3": ["一只狗:)3"]}

    def test_a_picture_in_two_lists(self, copied):
        with (copied / "flickr8k_cn/flickr8ktest.txt").open("a") as file:
            file.write("0_ab.jpg\n")
        with pytest.raises(ZooError, match="0_ab is in the lists of train and of test"):
            load(copied, "flickr8k_cn")

    def test_lines(self, tmp_path):
        write(tmp_path / "x.txt", "\ufeffa.jpg#0\tone  two \n\nb#enc#3 three\na.jpg#1\t\n")
        assert lines(tmp_path / "x.txt") == {"a": ["one  two ", ""], "b": ["three"]}
        write(tmp_path / "x.txt", "a.jpg#0\tone\na.jpg\ttwo\n")
        with pytest.raises(ZooError, match=r"line 2 is not picture#number and a text, as .*: 'a\.jpg\\ttwo'"):
            lines(tmp_path / "x.txt")
        (tmp_path / "x.txt").write_bytes("é".encode("latin-1"))
        with pytest.raises(ZooError, match="cannot be read as lines in UTF-8"):
            lines(tmp_path / "x.txt")


class TestImageNet:
    def test_classes_are_in_the_order_of_the_file(self, miniatures):
        data = load(miniatures, "imagenet")
        assert data.classes == ("tench", "crane", "great white shark", "crane")
        assert data.labels[data.split("test")].tolist() == [0, 0, 1, 1, 2, 2]
        assert [name.split("/")[1] for name in data.row_ids] == ["n01", "n01", "n02", "n02", "n03", "n03"]
        assert data.statistics["classes_without_a_picture"] == 1
        assert data.statistics["names_of_several_classes"] == ["crane"]
        assert len(data.split("train")) == len(data.split("val")) == 0

    def test_train(self, miniatures):
        data = load(miniatures, "imagenet", train=True)
        assert len(data.split("train")) == len(data.split("test")) == 6

    @pytest.mark.parametrize("names", [{"n01": "a", "n02": "b, c", "n03": "d"}, {"0": ["n01", "a"], "1": ["n02", "b"], "2": ["n03", "d"]}])
    def test_names_in_json(self, copied, names):
        write(copied / "imagenet/x.json", names)
        assert load(copied, "imagenet", names="x.json").classes == ("a", "b", "d")

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("n01 a\n", "2 of the folders are no class in it, such as n02, n03"),
            ("n01 a\nn02\n", "not every line or entry is a wnid and a name"),
            ("n01 a\nn01 b\n", "n01 stands there twice"),
            ("", "not every line or entry is a wnid and a name"),
        ],
    )
    def test_names_that_are_wrong(self, copied, text, says):
        write(copied / "imagenet/classes.txt", text)
        with pytest.raises(ZooError, match=says):
            load(copied, "imagenet")


class TestQuestions:
    def test_questions_and_answers(self, miniatures):
        data = load(miniatures, "vqa_v2")
        i = data.row_ids.index(1010)
        assert i in data.split("test")
        assert data.rows[i].keys() == {"id", "image", "text"}
        assert data.rows[i]["text"] == "Is it 101?"
        assert data.rows[i]["image"].getpixel((0, 0))[0] == pytest.approx(101, abs=3)
        assert data.answers[i] == ("yes",) * 7 + ("no",) * 3
        assert data.kinds[i] == "yes/no"

    def test_rare_answers(self, miniatures):
        data = load(miniatures, "vqa_v2")
        assert data.candidates == ("yes",)
        assert data.classes == ("yes", "(another answer)")
        assert {data.classes[k] for k in data.labels[data.split("train")]} == {"yes"}
        assert data.labels[data.split("test")].tolist() == [int(n % 5 == 0) for n in range(100, 120)]
        assert data.statistics["test_of_rare_answers"] == 0.2
        assert len(data.split("train")) + len(data.split("val")) + data.statistics["train_left_out_for_rare_answers"] == 20

    def test_val_is_by_picture_and_by_seed(self, miniatures):
        first, second = load(miniatures, "vqa_v2"), load(miniatures, "vqa_v2", seed=1)
        assert len(first.split("val")) == len(second.split("val")) == 4
        assert first.split("val").tolist() != second.split("val").tolist()
        assert first.fingerprint != second.fingerprint

    @pytest.mark.parametrize(
        ("file", "content", "says"),
        [
            ("v2_OpenEnded_mscoco_val2014_questions.json", {"questions": []}, "there is no list 'questions', or nothing in it"),
            ("v2_OpenEnded_mscoco_val2014_questions.json", {"questions": [{"question_id": 1}]}, "1 of 1 questions, such as number 0, lack"),
            (
                "v2_OpenEnded_mscoco_val2014_questions.json",
                {"questions": [{"question_id": 1, "image_id": 100, "question": "?"}]},
                "1 questions, such as 1, have no answers there",
            ),
            ("v2_mscoco_val2014_annotations.json", "[", "cannot be read as JSON"),
        ],
    )
    def test_files_that_are_wrong(self, copied, file, content, says):
        write(copied / "vqa_v2" / file, content)
        with pytest.raises(ZooError, match=says):
            load(copied, "vqa_v2")


ROWS = [
    {"image": png(n), "id": f"p{n}", "text": [f"text {n}", "shared"] if n % 2 else [f"text {n}", " "], "split": split, "group": kind}
    for n, (split, kind) in enumerate([("train", "a"), ("train", "b"), ("val", "a"), ("test", "b"), ("extra", None)])
]


class TestTable:
    def table(self, tmp_path, rows, name="captions.parquet"):
        place = tmp_path / "mine"
        place.mkdir(exist_ok=True)
        if name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(rows), place / name)
        elif name.endswith(".jsonl"):
            write(place / name, "\n".join(json.dumps(row) for row in rows))
        else:
            keys = list(rows[0])
            write(place / name, "\n".join(",".join(str(row[k]) for k in keys) for row in [dict(zip(keys, keys, strict=True)), *rows]))
        return place

    def load(self, place, **settings):
        return make("data", {"name": "captions", "folder": str(place), **settings}, None)

    def paths(self, tmp_path, count=20):
        for n in range(count):
            jpg(tmp_path / f"mine/pictures/{n}.jpg", 10 * n)
        return [{"image": f"pictures/{n}.jpg", "text": f"text {n}", "other": f"other {n}"} for n in range(count)]

    def test_bytes(self, tmp_path):
        data = self.load(self.table(tmp_path, ROWS))
        assert isinstance(data, CaptionedData)
        assert said(data, "train") == {"p0": ["text 0"], "p1": ["text 1", "shared"]}
        assert said(data, "extra") == {"p4": ["text 4"]}
        assert {k: v.tolist() for k, v in data.groups("train").items()} == {"a": [True, False, False], "b": [False, True, True]}
        assert data.groups("extra") == {}
        assert data.subject[1] == data.subject[3] != data.subject[0]
        assert data.pictures[3]["image"].getpixel((0, 0)) == (3, 0, 0)
        assert pickle.loads(pickle.dumps(data)).pictures[3]["image"].size == (6, 6)

    def test_pictures_as_hugging_face_writes_them(self, tmp_path):
        rows = [{**row, "image": {"bytes": row["image"], "path": "x.png"}} for row in ROWS]
        assert said(self.load(self.table(tmp_path, rows)), "train") == {"p0": ["text 0"], "p1": ["text 1", "shared"]}

    @pytest.mark.parametrize("name", ["captions.csv", "captions.jsonl", "captions.parquet"])
    def test_paths_and_several_texts(self, tmp_path, name):
        rows = self.paths(tmp_path)
        data = self.load(self.table(tmp_path, rows, name), texts=("text", "other"))
        assert [len(data.pairs(s)) for s in ("train", "val", "test")] == [36, 2, 2]
        for split in ("train", "val", "test"):
            for picture, texts in said(data, split).items():
                n = int(picture.removeprefix("pictures/").removesuffix(".jpg"))
                assert texts == [f"text {n}", f"other {n}"]
                assert data.pictures[data.picture_ids.index(picture)]["image"].getpixel((0, 0))[0] == pytest.approx(10 * n, abs=3)

    def test_several_files_are_one_table(self, tmp_path):
        self.table(tmp_path, ROWS[:2], "captions-00.parquet")
        data = self.load(self.table(tmp_path, ROWS[2:], "captions-01.parquet"))
        assert data.picture_ids == ["p0", "p1", "p2", "p3", "p4"]
        assert data.statistics["files"] == 2

    def test_rows_of_one_picture(self, tmp_path):
        rows = [{"image": png(n // 2), "text": f"text {n}", "split": ("train", "val", "test")[n // 2]} for n in range(6)]
        data = self.load(self.table(tmp_path, rows))
        assert said(data, "val") == {"picture 1": ["text 2", "text 3"]}
        assert len(data.pictures) == 3
        rows[3]["split"] = "test"
        with pytest.raises(ZooError, match="picture 'picture 1' is in split 'val' and in split 'test'"):
            self.load(self.table(tmp_path, rows))

    def test_splits_by_seed_are_of_pictures(self, tmp_path):
        rows = [{"image": png(n // 2), "text": f"text {n}"} for n in range(80)]
        data = self.load(self.table(tmp_path, rows))
        assert [len(data.pairs(s)) for s in ("train", "val", "test")] == [72, 4, 4]
        assert not {p for p, _ in data.pairs("train").tolist()} & {p for p, _ in data.pairs("test").tolist()}
        other = self.load(self.table(tmp_path, rows), seed=1)
        assert said(other, "test").keys() != said(data, "test").keys()
        assert other.fingerprint != data.fingerprint

    def test_what_is_known_to_be_wrong(self, tmp_path):
        rows = [{**row, "planted": wrong} for row, wrong in zip(ROWS, [False, True, None, False, False], strict=True)]
        data = self.load(self.table(tmp_path, rows))
        assert data.planted("train").tolist() == [False, True, True]
        assert data.planted("val").tolist() == [False]
        assert self.load(self.table(tmp_path, rows), columns={"planted": None}).planted("train").tolist() == [False] * 3

    def test_names_of_columns(self, tmp_path):
        rows = [{"file": row["image"], "title": row["text"][0], "part": row["split"]} for row in ROWS]
        place = self.table(tmp_path, rows)
        data = self.load(place, texts=("title",), columns={"image": "file", "split": "part"})
        assert len(data.pairs("train")) == 2
        with pytest.raises(ZooError, match=r"no column named 'image' \(have: file, part, title\)\n.*no column named 'text'"):
            self.load(place)
        with pytest.raises(ZooError, match="columns: 'text' is none of image, id, split, group, planted; texts are named by"):
            self.load(place, columns={"text": "title"})

    def test_broken_pictures(self, tmp_path, caplog):
        rows = [dict(row) for row in ROWS]
        rows[1]["image"] = b"none"
        data = self.load(self.table(tmp_path, rows))
        assert data.broken == ["p1"]
        assert "1 pictures cannot be used and 0 have no text, such as p1 is no picture that can be decoded" in caplog.text
        assert said(data, "train") == {"p0": ["text 0"]}
        assert data.statistics["faults"] == ["p1 is no picture that can be decoded (of no known format)"]
        with pytest.raises(ZooError, match="not one of 1 pictures can be used: p1 is no picture"):
            self.load(self.table(tmp_path, rows[1:2]))

    def test_pictures_without_a_text(self, tmp_path, caplog):
        self.load(self.table(tmp_path, ROWS))
        assert not caplog.text
        rows = [dict(row) for row in ROWS]
        rows[1]["text"] = [" "]
        data = self.load(self.table(tmp_path, rows))
        assert (data.broken, data.statistics["pictures_without_a_text"]) == ([], 1)
        assert "0 pictures cannot be used and 1 have no text\n" in caplog.text

    def test_a_picture_that_changed_changes_the_fingerprint(self, tmp_path):
        place = self.table(tmp_path, self.paths(tmp_path))
        before = self.load(place).fingerprint
        assert self.load(place).fingerprint == before
        jpg(place / "pictures/3.jpg", 200)
        assert self.load(place).fingerprint != before

    def test_tables_that_are_wrong(self, tmp_path):
        with pytest.raises(Absent, match="no folder"):
            self.load(tmp_path / "none")
        (tmp_path / "mine").mkdir()
        with pytest.raises(ZooError, match=r"there is no captions\.parquet, \.csv or \.jsonl; there is: nothing\na data set"):
            self.load(tmp_path / "mine")
        place = self.table(tmp_path, [{"image": b"", "text": "x", "split": None}])
        with pytest.raises(ZooError, match=r"captions\.parquet: column 'split' has 1 empty cells"):
            self.load(place)
        self.table(tmp_path, ROWS[:1], "captions-00.parquet")
        with pytest.raises(ZooError, match=r"there are captions-00\.parquet, captions\.parquet: keep one table"):
            self.load(place)
        (place / "captions-00.parquet").unlink()
        (place / "captions.parquet").write_bytes(b"PAR1")
        with pytest.raises(ZooError, match=r"captions\.parquet: cannot be read as parquet"):
            self.load(place)


def test_labels_are_int64(miniatures):
    for name in LABELLED:
        assert load(miniatures, name).labels.dtype == np.int64
