"""zeroshot, caption, and embed and search of pictures and texts, on a small model: what they print and write, and what they refuse."""

import csv
import json
import shutil
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageDraw

import zoo as library
from zoo import cli
from zoo.captions import caption
from zoo.data._collection import decode
from zoo.describe import caption_files, zeroshot_files
from zoo.embed import embed_notes, search_notes
from zoo.errors import ZooError
from zoo.picture_files import find_pictures, read_lines, write_table
from zoo.sections import Decoding
from zoo.vectors import about_vectors, read_vectors

COLOURS = ("red", "green", "blue", "gold", "black", "white")
TEXTS = ("a red square", "a green house", "blue", "gold and silver", "a black cat in the night")
NAMES = ("b/deep/gold.png", "b/green.png", "black.jpg", "blue.webp", "red.PNG", "white.gif")  # sorted by path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folders ``blip`` and ``clip`` with models without training, and ``pictures``."""
    place = tmp_path_factory.mktemp("place")
    small = {"vision": {"name": "tiny_image", "dim": 32, "layers": 1, "image_size": 16}}
    for seed, (name, settings) in enumerate({"blip": {"layers": 2, "dim": 16, **small}, "clip": {"dim": 16, **small}}.items()):
        torch.manual_seed(seed)
        model = library.build(name, **settings)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(3)  # else every picture has nearly the same vector
            if name == "blip":
                model.matches.weight.mul_(20)  # else a match says less than the cosine
        model.trained = True
        library.save(model, place / name)
    (place / "pictures/b/deep").mkdir(parents=True)
    for i, name in enumerate(NAMES):
        colour = next(c for c in COLOURS if c in name.lower())
        picture = Image.new("RGB", (24, 20), colour)
        ImageDraw.Draw(picture).ellipse((2 * i, 2, 12 + 2 * i, 12), fill=COLOURS[(i + 3) % 6])
        picture.save(place / "pictures" / name)
    (place / "pictures/notes.txt").write_text("no picture")
    (place / "pictures/.hidden.png").write_text("no picture")
    (place / "classes.txt").write_text("\n".join(COLOURS) + "\n")
    (place / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    return place


@pytest.fixture
def zoo(monkeypatch, capsys, place):
    monkeypatch.chdir(place)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["zoo", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return stop.value.code, out, err

    return call


def rows_of(place):
    return [{"image": decode(str(place / "pictures" / name), None)} for name in NAMES]


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


class TestZeroshot:
    def test_the_nearest_class_of_each_picture(self, place, zoo):
        code, out, err = zoo("zeroshot", "blip", "pictures", "--classes", "classes.txt")
        assert (code, err) == (0, "")
        model = library.load(place / "blip")
        cosines = model.encode(rows_of(place)) @ model.encode([{"text": name} for name in COLOURS]).T
        best = cosines.argmax(1)
        assert len(set(best.tolist())) > 1
        wanted = [
            [f"pictures/{name}", "1", COLOURS[k], f"{cosines[i, k]:.4f}"] for i, (name, k) in enumerate(zip(NAMES, best, strict=True))
        ]
        found = [line.split() for line in out.splitlines()]
        assert [row[:3] for row in found] == [row[:3] for row in wanted]
        assert [float(row[3]) for row in found] == pytest.approx([float(row[3]) for row in wanted], abs=1.1e-4)

    def test_sentences_are_averaged(self, place):
        sentences = ("a photo of a {}", "{} colour")
        files = find_pictures([place / "pictures"])
        found = zeroshot_files(place / "blip", files, COLOURS, templates=sentences, top=6)
        model = library.load(place / "blip")
        each = model.encode([{"text": s.replace("{}", name)} for name in COLOURS for s in sentences]).reshape(6, 2, -1)
        cosines = model.encode(rows_of(place)) @ unit(each.mean(1)).T
        assert [r["rank"] for r in found] == [1, 2, 3, 4, 5, 6] * 6
        for i in range(6):
            mine = found[6 * i : 6 * i + 6]
            assert [r["class"] for r in mine] == [COLOURS[k] for k in np.argsort(-cosines[i])]
            assert [r["cosine"] for r in mine] == pytest.approx(sorted(cosines[i].tolist(), reverse=True), abs=2e-6)

    def test_tables(self, place, zoo, tmp_path):
        (tmp_path / "templates.txt").write_text("a {}\n\na photo of a {}\n")
        asked = (
            "zeroshot",
            "clip",
            "pictures/red.PNG",
            "pictures/b",
            "--classes",
            "classes.txt",
            "--templates",
            tmp_path / "templates.txt",
            "--top",
            2,
        )
        _, printed, _ = zoo(*asked, "--json")
        records = json.loads(printed)
        assert [r["file"] for r in records] == ["pictures/red.PNG"] * 2 + ["pictures/b/deep/gold.png"] * 2 + ["pictures/b/green.png"] * 2
        for suffix in ("csv", "parquet", "json"):
            file = tmp_path / f"deep/er/found.{suffix}"
            code, out, err = zoo(*asked, "--out", file)
            assert (code, out, err) == (0, f"6 rows in {file}\n", "")
            assert read_table(file) == records
            assert [p.name for p in file.parent.iterdir() if suffix in p.suffix] == [f"found.{suffix}"]

    @pytest.mark.parametrize(
        "more, says",
        [
            (["--classes", "nowhere.txt"], "no file nowhere.txt: name a text file with one of the names of classes in a line"),
            (["--classes", "empty.txt"], "empty.txt is empty: write one of the names of classes in each line"),
            (["--classes", "twice.txt"], "twice.txt: 'red' stands there 2 times: keep one"),
            (["--classes", "latin.txt"], "latin.txt is not UTF-8 (invalid start byte at byte 1): save it again as UTF-8"),
            (["--classes", "classes.txt", "--templates", "classes.txt"], "template 'red' has no place for the name: write {} in it, once"),
            (["--classes", "classes.txt", "--top", "7"], "--top 7: there are 6 classes: write 1 to 6"),
            (["--classes", "classes.txt", "--out", "found.xls"], "what form is .xls? write a name that ends in .csv, .parquet, .json"),
            (["--classes", "classes.txt", "--out", "found"], "what form is a file without a suffix?"),
            (["--classes", "classes.txt", "--out", "blip.csv/x.csv"], "--out blip.csv/x.csv cannot be written"),
            (["--classes", "classes.txt", "broken"], "broken/bad.png is no picture that can be decoded (of no known format): take it away"),
            (["--classes", "classes.txt", "--skip-broken", "broken/bad.png", "nowhere"], "no file or folder nowhere"),
            (["--classes", "classes.txt", "bare"], "no pictures in bare: files that end in .jpg, .jpeg,"),
        ],
    )
    def test_what_is_refused(self, place, zoo, more, says):
        (place / "empty.txt").write_text("\n \n")
        (place / "twice.txt").write_text("red\nblue\nred")
        (place / "latin.txt").write_bytes("gün".encode("latin-1"))
        (place / "blip.csv").write_text("")
        (place / "broken").mkdir(exist_ok=True)
        (place / "broken/bad.png").write_text("no picture")
        (place / "bare").mkdir(exist_ok=True)
        code, out, err = zoo("zeroshot", "blip", "pictures", *more)
        assert (code, out) == (2, "")
        assert says in err

    def test_broken_pictures_are_left_out_aloud(self, place, zoo, tmp_path, caplog):
        shutil.copytree(place / "pictures", tmp_path / "mixed")
        (tmp_path / "mixed/bad.png").write_text("no picture")
        code, out, _ = zoo("zeroshot", "blip", tmp_path / "mixed", "--classes", "classes.txt", "--skip-broken")
        assert (code, len(out.splitlines())) == (0, 6)
        assert f"1 of 7 pictures cannot be decoded and are left out, such as {tmp_path / 'mixed/bad.png'}" in caplog.text
        with pytest.raises(ZooError, match="none of 1 pictures can be decoded"):
            find_pictures([tmp_path / "mixed/bad.png"], skip_broken=True)

    def test_a_model_of_items_is_refused(self, place):
        small = {"backbone": {"name": "tiny_lm", "dim": 32, "layers": 1, "heads": 2, "vocab_size": 1024}, "language": "en", "dim": 16}
        library.save(
            library.build("notellm2", vision={"name": "tiny_image", "dim": 32, "layers": 1, "image_size": 16}, connector="linear", **small),
            place / "items",
        )
        with pytest.raises(ZooError, match=r"is a NoteLLM2, which gives no vectors of pictures and texts: take a clip, .* vlmo or beit_3"):
            zeroshot_files(place / "items", find_pictures([place / "pictures"]), COLOURS)


def read_table(file):
    if file.suffix == ".json":
        return json.loads(file.read_text())
    if file.suffix == ".parquet":
        return pq.read_table(file).to_pylist()
    with file.open(newline="") as lines:
        return [{**row, "rank": int(row["rank"]), "cosine": float(row["cosine"])} for row in csv.DictReader(lines)]


class TestCaption:
    def test_it_writes_what_the_model_writes(self, place, zoo):
        code, out, err = zoo("caption", "blip", "pictures", "--method", "beam", "--beams", 2, "--longest", 5, "--json")
        assert (code, err) == (0, "")
        records = json.loads(out)
        assert [r["file"] for r in records] == [f"pictures/{name}" for name in NAMES]
        model = library.load(place / "blip")
        wanted = caption(model, rows_of(place), Decoding(method="beam", beams=2, longest=5), batch_size=6)
        assert [r["caption"] for r in records] == wanted
        assert len(set(wanted)) > 1

    def test_the_batch_size_changes_nothing(self, place):
        files = find_pictures([place / "pictures"])
        for how in (Decoding(method="nucleus", longest=6), Decoding(method="greedy", longest=6)):
            one, other = (caption_files(place / "blip", files, how, batch_size=size, seed=3) for size in (1, 4))
            assert one == other
        assert caption_files(place / "blip", files, Decoding(method="nucleus", longest=6), seed=4) != one

    def test_a_prompt_stands_before_it(self, place, zoo):
        _, out, _ = zoo("caption", "blip", "pictures/red.PNG", "--prompt", "a picture of", "--method", "greedy", "--longest", 3)
        assert out.startswith("pictures/red.PNG  a picture of ")

    def test_what_is_refused(self, place, zoo):
        def refused(says, *arguments):
            code, out, err = zoo("caption", *arguments)
            assert (code, out) == (2, "")
            assert says in err

        refused("the model in clip is a Clip, which is no model that writes captions: take a BLIP, a CoCa or a BEiT-3", "clip", "pictures")
        refused("method: 'best': input should be 'greedy', 'beam' or 'nucleus'", "blip", "pictures", "--method", "best")
        refused("shortest: 9 ids at least and 4 at most", "blip", "pictures", "--shortest", 9, "--longest", 4)
        refused("no model in nowhere", "nowhere", "pictures")
        refused("no file or folder nothing", "blip", "nothing")


def one_by_one(model, rows):
    """(P, T) cosines of pictures and texts, and the logits that they match."""
    cosines, logits = np.zeros((2, len(rows), len(TEXTS)))
    for i, row in enumerate(rows):
        for k, text in enumerate(TEXTS):
            batch = library.collate.RowCollate(model.processor)([{**row, "text": text}])
            with torch.no_grad():
                out = model(batch)
                logits[i, k] = model.match(model.hold(batch.inputs["text"], out.tokens["text"]), out.tokens["image"])[0, 1]
            cosines[i, k] = unit(out.embeddings["image"].numpy())[0] @ unit(out.embeddings["text"].numpy())[0]
    return cosines, logits


@pytest.fixture(scope="module")
def vectors(place):
    """Files of vectors: of the pictures, and of the texts."""
    assert embed_notes(place / "blip", place / "pictures.parquet", notes=place / "pictures") == 6
    assert embed_notes(place / "blip", place / "texts.parquet", notes=place / "texts.txt") == 5
    return place / "pictures.parquet", place / "texts.parquet"


class TestEmbedAndSearch:
    def test_ids_and_vectors(self, place, vectors):
        model = library.load(place / "blip")
        for file, ids, rows in zip(vectors, (NAMES, TEXTS), (rows_of(place), [{"text": t} for t in TEXTS]), strict=True):
            found = read_vectors(file)
            assert tuple(found.ids) == ids
            assert np.allclose(found.vectors, model.encode(rows), rtol=0, atol=1e-6)
        assert about_vectors(vectors[0])["of"] == "image"
        assert about_vectors(vectors[1])["of"] == "text"

    def test_the_commands(self, place, zoo, tmp_path):
        code, out, err = zoo("embed", "blip", "pictures", "--out", tmp_path / "v.parquet", "--batch-size", 4)
        assert (code, out, err) == (0, f"6 vectors in {tmp_path / 'v.parquet'}\n", "")
        code, out, err = zoo("search", "blip", tmp_path / "v.parquet", "--text", "a red square", "--top", 3)
        assert (code, err) == (0, "")
        model = library.load(place / "blip")
        cosines = model.encode(rows_of(place)) @ model.encode("a red square")
        best = np.argsort(-cosines)[:3]
        assert [line.split()[1] for line in out.splitlines()] == [NAMES[i] for i in best]
        assert [float(line.split()[0]) for line in out.splitlines()] == pytest.approx(cosines[best].tolist(), abs=1e-4)

    def test_what_is_broken_is_left_out_where_that_is_asked(self, place, zoo, tmp_path):
        shutil.copytree(place / "pictures", tmp_path / "mixed")
        (tmp_path / "mixed/bad.png").write_text("no picture")
        embed = ("embed", "blip", tmp_path / "mixed", "--out", tmp_path / "v.parquet")
        code, _, err = zoo(*embed)
        assert (code, "bad.png is no picture that can be decoded" in err, "or write --skip-broken" in err) == (2, True, True)
        assert not (tmp_path / "v.parquet").exists()
        assert zoo(*embed, "--skip-broken")[:2] == (0, f"6 vectors in {tmp_path / 'v.parquet'}\n")
        assert tuple(read_vectors(tmp_path / "v.parquet").ids) == NAMES

    def test_pictures_find_texts(self, place, vectors):
        model = library.load(place / "blip")
        cosines = model.encode([{"text": t} for t in TEXTS]) @ model.encode(rows_of(place)[1])
        found = search_notes(place / "blip", vectors[1], {"image": place / "pictures" / NAMES[1]}, k=5)
        assert [hit["note_id"] for hit in found] == [TEXTS[i] for i in np.argsort(-cosines)]

    @pytest.mark.parametrize("name", ["vqa", "nlvr2", "visual_tokenizer"])
    def test_a_model_without_vectors_of_both_is_refused(self, place, tmp_path, name):
        base = {"base": {"name": "beit_3", "layers": 2, "image_size": 16}}
        teacher = {"teacher": {"name": "tiny_image", "dim": 24, "heads": 2, "layers": 1, "image_size": 32}}
        settings = {"vqa": {"classes": 3, **base}, "nlvr2": base, "visual_tokenizer": teacher}
        library.save(library.build(name, **settings[name]), tmp_path / name)
        for notes in (place / "pictures", None):
            with pytest.raises(ZooError, match=r"which gives no vectors of notes, nor of pictures and texts: take .* vlmo or beit_3"):
                embed_notes(tmp_path / name, tmp_path / "v.parquet", notes=notes)
        with pytest.raises(ZooError, match=r"which gives no vectors of pictures and texts: take a clip, .* vlmo or beit_3"):
            zeroshot_files(tmp_path / name, find_pictures([place / "pictures"]), COLOURS)

    @pytest.mark.parametrize("side", ["text", "image"])
    def test_what_is_near_is_read_again(self, place, vectors, side):
        cosines, logits = one_by_one(library.load(place / "blip"), rows_of(place))  # (6, 5) pictures and texts
        if side == "text":
            file, ids, asked, cosines, logits = vectors[0], NAMES, [{"text": text} for text in TEXTS], cosines.T, logits.T
        else:
            file, ids, asked = vectors[1], TEXTS, [{"image": place / "pictures" / name} for name in NAMES]
        changed = 0
        for query, near, match in zip(asked, cosines, logits, strict=True):
            first = np.argsort(-near)[:4]
            best = first[np.argsort(-(near + match)[first])][:2]
            found = search_notes(place / "blip", file, query, k=2, rerank=4)
            assert [hit["note_id"] for hit in found] == [ids[i] for i in best]
            assert [hit["score"] for hit in found] == pytest.approx((near + match)[best].tolist(), rel=1e-4)
            changed += best.tolist() != first[:2].tolist()
        assert changed

    def test_what_is_refused(self, place, vectors, zoo, tmp_path):
        def refused(says, *arguments):
            code, out, err = zoo(*arguments)
            assert (code, out) == (2, "")
            assert says in err

        search = ("search", "blip", "pictures.parquet")
        refused("search needs a new note (--title, --topic, --content, --image, --text)", *search)
        refused("rerank: of 4 that are read, 10 cannot be given: write 10 or more", *search, "--text", "red", "--rerank", 4)
        refused(
            "and the query is image: a picture is read with a text, so write --text", *search, "--image", "pictures/red.PNG", "--rerank", 10
        )
        refused("and the query is one of the file's own", *search, "--note", "red.PNG", "--rerank", 10)
        refused("is asked with --text or --image, one of the two, and not with --title", *search, "--title", "red")
        refused("the text of the query is empty: write what is sought", *search, "--text", " ")
        refused("and not with --image, --text", *search, "--text", "red", "--image", "pictures/red.PNG")
        refused("and not with --topic, --text", *search, "--text", "red", "--topic", "colours")
        refused(
            "no file or folder nowhere: name a folder of pictures, or a .txt", "embed", "blip", "nowhere", "--out", tmp_path / "v.parquet"
        )
        refused("--skip-broken is for a folder of pictures", "embed", "blip", "texts.txt", "--skip-broken", "--out", tmp_path / "v.parquet")
        refused(
            "pictures/red.PNG is neither a folder of pictures nor a .txt with a text in each line",
            "embed",
            "blip",
            "pictures/red.PNG",
            "--out",
            tmp_path / "v.parquet",
        )
        embed_notes(place / "clip", tmp_path / "clip.parquet", notes=place / "pictures")
        refused(
            "this model is a Clip, which is no model that tells whether picture and text match",
            "search",
            "clip",
            tmp_path / "clip.parquet",
            "--text",
            "red",
            "--rerank",
            10,
        )
        refused("was made by another model than the one in blip", "search", "blip", tmp_path / "clip.parquet", "--text", "red")
        shutil.copytree(place / "pictures", tmp_path / "gone")
        embed_notes(place / "blip", tmp_path / "gone.parquet", notes=tmp_path / "gone")
        (tmp_path / "gone/red.PNG").unlink()
        refused(
            "1 of 6 pictures are not there any more, such as", "search", "blip", tmp_path / "gone.parquet", "--text", "red", "--rerank", 10
        )

    def test_a_run_without_a_recipe_says_what_it_embeds(self, place, zoo, tmp_path):
        code, out, err = zoo("embed", "blip", "--out", tmp_path / "v.parquet")
        assert (code, out) == (2, "")
        assert "recipe.yaml" in err


def test_lines_and_tables(tmp_path):
    (tmp_path / "bom.txt").write_bytes("\ufeff一\n  二  \n".encode())
    assert read_lines(tmp_path / "bom.txt", "words") == ["一", "二"]
    records = [{"file": 'a, "b"', "caption": "line\nline"}, {"file": "二", "caption": ""}]
    write_table(records, tmp_path / "x.csv")
    with (tmp_path / "x.csv").open(newline="", encoding="utf-8") as lines:
        assert list(csv.DictReader(lines)) == records
