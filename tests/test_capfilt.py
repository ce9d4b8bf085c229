"""CapFilt on a generated miniature: what is written, judged, kept and read back, and what an interruption leaves."""

import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import zoo
from zoo import capfilt as module_of_the_name
from zoo import cli
from zoo.compare import compare
from zoo.data.capfilt import ABOUT, TEXTS, kept
from zoo.errors import Absent, Failure, ZooError
from zoo.registry import make
from zoo.sections import Decoding

capfilt = sys.modules["zoo.capfilt"]
STYLES = ("noto", "emojione", "fxemoji")
SPLITS = ["train"] * 20 + ["val"] * 3 + ["test"] * 3  # of the emoji
DATA = {"name": "emoji_zh_en", "unseen_style": "fxemoji", "mismatch": 0.4, "trusted": 0.2}
RECIPE = {"model": "blip", "data": DATA, "objective": "itc"}
WEB, HUMAN = 32, 8  # of the 40 training pairs


def png(level):
    file = io.BytesIO()
    Image.new("RGB", (6, 6), (level, 255 - level, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder of data folders with a miniature of the emoji, and two models without training."""
    root = tmp_path_factory.mktemp("data")
    names = [
        f"{colour} {thing}"
        for colour in ("red", "blue", "green", "big", "small")
        for thing in ("cat", "dog", "house", "car", "tree", "sun")
    ]
    concepts = [
        {"concept_id": f"e{k}", "group": ("Food", "Objects")[k % 2], "split": split, "text_en": names[k]} for k, split in enumerate(SPLITS)
    ]
    cells = [(k, style) for k in range(len(SPLITS)) for style in STYLES]
    images = [{"image_id": f"e{k}.{s}", "concept_id": f"e{k}", "style": s, "image": png(3 * i)} for i, (k, s) in enumerate(cells)]
    (root / "emoji_zh_en").mkdir()
    pq.write_table(pa.Table.from_pylist(concepts), root / "emoji_zh_en/concepts.parquet")
    pq.write_table(pa.Table.from_pylist(images), root / "emoji_zh_en/images.parquet")
    for seed, name in enumerate(("captioner", "filter")):
        torch.manual_seed(seed)
        model = zoo.build("blip", layers=1, dim=8, vision={"name": "tiny_image", "dim": 32, "layers": 1, "image_size": 16})
        model.trained = True
        zoo.save(model, root / name)
    return root


@pytest.fixture(scope="module")
def written(root):
    """The folder that both models left, and what was said of it."""
    said = run(root, "texts")
    return root / "texts", said


def run(root, out, models=("captioner", "filter"), **more):
    given = {name: root / name if name in models else None for name in ("captioner", "filter")}
    how = Decoding(method="nucleus", longest=4)
    return zoo.capfilt(RECIPE, root / out, data_root=root, **{"how": how, **given, **more})


def read(root, folder="texts", **settings):
    return make("data", {"name": "capfilt", "folder": folder, **settings}, root)


def source_of(root, **settings):
    return make("data", DATA | settings, root)


def pairs_of(data, split="train"):
    return {(data.picture_ids[p], data.captions[c]) for p, c in data.pairs(split).tolist()}


def test_the_door_leads_to_the_function():
    assert callable(zoo.capfilt)
    assert module_of_the_name is zoo.capfilt


def test_every_text_is_there_with_what_is_known_of_it(root, written):
    folder, said = written
    texts = pq.read_table(folder / TEXTS)
    rows, source = texts.to_pylist(), source_of(root)
    assert said["texts"]["web"]["all"] == WEB
    assert said["texts"]["human"] == {"all": HUMAN, "kept": HUMAN}
    of = {origin: {(row["picture_id"], row["text"]) for row in rows if row["origin"] == origin} for origin in ("web", "synthetic", "human")}
    assert of["human"] == pairs_of(source, "trusted")
    assert of["web"] | of["human"] == pairs_of(source)
    assert {picture for picture, _ in of["synthetic"]} <= {picture for picture, _ in of["web"]}
    assert said["texts"]["synthetic"]["all"] == len(of["synthetic"]) > 20
    assert all(text for _, text in of["synthetic"])
    assert all((row["score"] is None) == (row["origin"] == "human") for row in rows)
    assert all(0 <= row["score"] <= 1 for row in rows if row["score"] is not None)
    planted = {
        (source.picture_ids[p], source.captions[c])
        for (p, c), wrong in zip(source.pairs("train").tolist(), source.planted("train"), strict=True)
        if wrong
    }
    assert {(row["picture_id"], row["text"]) for row in rows if row["planted"]} == planted
    assert sorted(path.name for path in folder.iterdir()) == [ABOUT, TEXTS]


def test_scores_are_those_of_the_filter(root, written):
    rows = [row for row in pq.read_table(written[0] / TEXTS).to_pylist() if row["origin"] != "human"][::9]
    model, source = zoo.load(root / "filter"), source_of(root)
    place = {name: i for i, name in enumerate(source.picture_ids)}
    for row in rows:
        batch = zoo.collate.RowCollate(model.processor)(
            [{"image": source.pictures[place[row["picture_id"]]]["image"], "text": row["text"]}]
        )
        with torch.no_grad():
            text, seen = batch.inputs["text"], model.look(batch.inputs["image"])
            logits = model.match(model.hold(text, model.read(text)), seen)
        assert row["score"] == pytest.approx(logits.softmax(-1)[0, 1].item(), abs=1e-6)


def test_the_data_set_is_the_union(root, written):
    source, table = source_of(root), pq.read_table(written[0] / TEXTS)
    middle = float(np.nanmedian(table["score"].to_numpy()))
    data = read(root, threshold=middle)
    rows = table.to_pylist()
    wanted = {(r["picture_id"], r["text"]) for r in rows if r["origin"] == "human" or r["score"] >= middle}
    assert pairs_of(data) == wanted
    assert len(data.pairs("train")) == len(wanted) < len(rows)
    assert data.splits == source.splits
    for split in ("val", "test", "style", "trusted"):
        assert np.array_equal(data.pairs(split), source.pairs(split))
        assert {k: x.tolist() for k, x in data.groups(split).items()} == {k: x.tolist() for k, x in source.groups(split).items()}
    assert list(data.picture_ids) == list(source.picture_ids)
    assert len(set(data.captions)) == len(data.captions)
    planted = {(r["picture_id"], r["text"]) for r in rows if r["planted"]}
    assert {pair for pair, wrong in zip(_named(data), data.planted("train"), strict=True) if wrong} == planted & wanted
    assert data.statistics["planted_mismatches"] == len(planted & wanted)
    assert sum(data.statistics["origins"].values()) == len(wanted)


def _named(data):
    return [(data.picture_ids[p], data.captions[c]) for p, c in data.pairs("train").tolist()]


def test_arms_of_one_folder(root, written):
    rows = pq.read_table(written[0] / TEXTS).to_pylist()
    middle = float(np.nanmedian([r["score"] for r in rows if r["score"] is not None]))
    alone = {arm: pairs_of(read(root, arm=arm, threshold=middle)) for arm in ("captioner", "filter", "both")}
    assert alone["captioner"] == {(r["picture_id"], r["text"]) for r in rows}
    human_or_good = [r for r in rows if r["origin"] == "human" or r["score"] >= middle]
    assert alone["filter"] == {(r["picture_id"], r["text"]) for r in human_or_good if r["origin"] != "synthetic"}
    assert alone["filter"] < alone["both"] < alone["captioner"]
    prints = [
        read(root, arm=arm, threshold=x).fingerprint for arm, x in (("captioner", 0.5), ("filter", 0.5), ("both", 0.5), ("both", middle))
    ]
    assert len(set(prints)) == 4


@pytest.mark.parametrize("alone, other", [("captioner", "filter"), ("filter", "captioner")])
def test_one_model_alone(root, alone, other):
    said = run(root, alone + " alone", models=[alone])
    assert said["arm"] == alone
    assert said["texts"]["synthetic"]["all"] == (0 if alone == "filter" else said["texts"]["synthetic"]["kept"])
    data = read(root, alone + " alone")
    assert data.statistics["arm"] == alone
    if alone == "captioner":
        assert "filter" not in said
        assert pairs_of(source_of(root)) < pairs_of(data)
    for arm in (other, "both"):
        with pytest.raises(ZooError, match=f"was written without a {other}: write arm: {alone}, or zoo capfilt --{other}"):
            read(root, alone + " alone", arm=arm)


def test_what_stays_by_hand():
    texts = pa.table({"origin": ["web", "web", "synthetic", "synthetic", "human"], "score": [0.5, 0.49, 0.9, 0.1, None]})
    assert kept(texts, "both", 0.5).tolist() == [True, False, True, False, True]
    assert kept(texts, "filter", 0.5).tolist() == [True, False, False, False, True]
    assert kept(texts, "captioner", 0.5).tolist() == [True] * 5


def test_statistics_by_hand():
    table = pa.table(
        {
            "origin": ["web"] * 6 + ["synthetic"] * 2 + ["human"],
            "score": [0.1, 0.2, 0.3, 0.8, 0.9, 0.7, 0.1, 0.6, None],
            "planted": [True, True, False, True, False, False, False, False, False],
        }
    )
    said = capfilt._statistics(table, 6, 0.5, {"captioner": "a", "filter": "b"})
    assert said["texts"] == {"web": {"all": 6, "kept": 3}, "synthetic": {"all": 2, "kept": 1}, "human": {"all": 1, "kept": 1}}
    third = pytest.approx(1 / 3)  # of the three that stay, one is wrong
    two_of_three = pytest.approx(2 / 3)
    assert said["filter"] == {"planted": 3, "precision": two_of_three, "recall": two_of_three, "wrong_before": 0.5, "wrong_after": third}


def test_a_filter_that_knows_finds_all_that_was_planted(root, monkeypatch):
    source = source_of(root)
    wrong = {pair for pair, is_wrong in zip(_named(source), source.planted("train"), strict=True) if is_wrong}
    web = source.pairs("train")[[pair not in pairs_of(source, "trusted") for pair in _named(source)]]
    order = [source.picture_ids[i] for i in np.unique(web[:, 0])]
    assert len(order) == WEB

    def knows(model, pictures, texts, pairs, **_):
        assert len(pictures) == WEB
        return np.array([(order[p], texts[t]) not in wrong for p, t in pairs.tolist()], dtype=float)

    monkeypatch.setattr(capfilt, "Library", lambda model, texts, **_: texts)
    monkeypatch.setattr(capfilt, "match_chances", knows)
    said = run(root, "known", models=["filter"])
    assert said["filter"]["precision"] == said["filter"]["recall"] == 1.0
    assert (said["filter"]["planted"], said["filter"]["wrong_after"]) == (13, 0.0)  # 40 % of 32
    assert read(root, "known").planted("train").sum() == 0


def test_texts_of_the_captioner_link_no_chains(root, monkeypatch):
    monkeypatch.setattr(capfilt, "caption", lambda model, pictures, how, **_: ["the same"] * len(pictures))
    run(root, "same", models=["captioner"])
    data, source = read(root, "same"), source_of(root)
    assert len(data.pairs("train")) == WEB + HUMAN + WEB
    assert np.array_equal(data.subject, source.subject)
    monkeypatch.setattr(capfilt, "Library", lambda model, texts, **_: np.array(texts) == "the same")
    monkeypatch.setattr(capfilt, "match_chances", lambda model, pictures, same, pairs, **_: same[pairs[:, 1]].astype(float))
    run(root, "same judged")
    data = read(root, "same judged")
    left = {p for p, c in data.pairs("train").tolist() if data.captions[c] == "the same"}
    assert len(left) == WEB
    alone = {int(data.subject[p]) for p in left if p not in source.pairs("trusted")[:, 0]}
    assert len(alone) == 1  # of pictures that nothing else is said of, the text links


def test_the_same_call_does_nothing_again_and_another_is_refused(root, written, monkeypatch):
    folder, said = written
    before = (folder / TEXTS).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(capfilt, "load", None)
        assert run(root, "texts") == said
        assert run(root, "texts", threshold=1.0)["texts"]["web"]["kept"] == 0
    assert (folder / TEXTS).read_bytes() == before
    with pytest.raises(ZooError, match="holds texts that differ in seed: name another folder, or write --fresh"):
        run(root, "texts", seed=1)
    shutil.copytree(folder, root / "copy")
    assert run(root, "copy", seed=1, fresh=True)["texts"]["web"]["all"] == WEB
    assert (root / "copy" / TEXTS).read_bytes() != before


def test_an_interruption_costs_one_piece(root, written, monkeypatch):
    monkeypatch.setattr(capfilt, "_STEP", 10)
    calls, writes = [], capfilt.caption

    def counted(model, pictures, how, **keywords):
        calls.append(keywords["first"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return writes(model, pictures, how, **keywords)

    monkeypatch.setattr(capfilt, "caption", counted)
    with pytest.raises(KeyboardInterrupt):
        run(root, "stopped")
    assert calls == [0, 10, 20]
    with pytest.raises(ZooError, match="run zoo capfilt again, which goes on where it was stopped"):
        read(root, "stopped")
    run(root, "stopped")
    assert calls == [0, 10, 20, 20, 30]
    one, other = (pq.read_table(folder / TEXTS).to_pylist() for folder in (written[0], root / "stopped"))
    assert [r | {"score": 0} for r in one] == [r | {"score": 0} for r in other]
    scores = [np.array([r["score"] or 0 for r in rows]) for rows in (one, other)]
    assert np.allclose(*scores, rtol=0, atol=1e-6)  # batches are cut elsewhere


def test_what_is_refused(root, tmp_path):
    def refused(says, recipe=RECIPE, out="refused", kind=ZooError, **more):
        with pytest.raises(kind) as fault:
            zoo.capfilt(recipe, root / out, **{"captioner": root / "captioner", "filter": root / "filter", "data_root": root, **more})
        assert says in str(fault.value)
        assert not (root / "refused" / ABOUT).exists()

    refused("capfilt needs a captioner, a filter, or both: name their run folders", captioner=None, filter=None)
    refused("batch_size = 0: write 1 or more", batch_size=0)
    refused("no model in", filter=root / "nowhere")
    refused(
        "all 8 training pairs are in the split 'trusted', so none is noisy: write data.learn=all",
        {**RECIPE, "data": {**DATA, "learn": "trusted"}},
    )
    refused("trusted: no split named 'trustd'; did you mean 'trusted'? (have: ", trusted="trustd")
    refused("trusted: split 'test' is there to measure on, and what is trusted is trained on: name another one", trusted="test")
    refused("trusted: split 'style' is there to", {**RECIPE, "retrieve": {"splits": ["style"], "k": [1]}}, trusted="style")
    refused("training pairs are in the split 'train', so none is noisy: name another split", trusted="train")
    refused(
        "and planted_notes is none: name a recipe of a data set that is",
        {"model": "notellm2", "data": {"name": "planted_notes", "notes": 300, "users": 300, "image_size": 16}, "objective": "pair_infonce"},
    )
    (root / "file").write_text("mine")
    refused("file is a file: name a folder", out="file")
    refused("holds captioner, and no texts of capfilt: name another folder", out=".")
    clip = zoo.build("clip")
    clip.trained = True
    zoo.save(clip, root / "clip")
    refused("the captioner is a Clip, which is no model that writes captions: take a BLIP, a CoCa or a BEiT-3", captioner=root / "clip")
    refused(
        "the filter is a Clip, which is no model that tells whether picture and text match: take an ALBEF, a BLIP or a VLMo",
        filter=root / "clip",
    )


def test_folders_that_are_broken(root, written, tmp_path):
    with pytest.raises(Absent, match="A folder of zoo capfilt holds"):
        read(None)
    with pytest.raises(Absent, match="no folder"):
        read(root, "nowhere")

    def broken(says, change, kind=ZooError):
        folder = shutil.copytree(written[0], tmp_path / f"{len(list(tmp_path.iterdir()))}")
        change(folder)
        with pytest.raises(kind) as fault:
            read(root, str(folder))
        assert says in str(fault.value)

    def about(**changes):
        def change(folder):
            said = json.loads((folder / ABOUT).read_text())
            (folder / ABOUT).write_text(json.dumps({key: value for key, value in (said | changes).items() if value != "gone"}))

        return change

    def texts(column, values):
        def change(folder):
            table = pq.read_table(folder / TEXTS)
            place = table.column_names.index(column)
            table = (
                table.remove_column(place)
                if values is None
                else table.set_column(place, column, pa.array([*values, *table[column].to_pylist()[len(values) :]]))
            )
            pq.write_table(table, folder / TEXTS)

        return change

    broken("is damaged", lambda folder: (folder / ABOUT).write_text("{"), Failure)
    broken("lacks fingerprint", about(fingerprint="gone"), Failure)
    broken("was made from other data than", about(fingerprint="other"))
    broken("no column named 'score'", texts("score", None))
    broken("column 'text' is BIGINT, not VARCHAR", _numbers)
    broken("1 picture_id, such as 'e99', are not in the data set", texts("picture_id", ["e99"]))
    broken("origin 'robot' is none of web, synthetic, human", texts("origin", ["robot"]))
    broken("column 'text' has 1 empty cells", texts("text", [None]))
    broken("cannot be read as parquet", lambda folder: (folder / TEXTS).write_bytes(b"PAR1"))


def _numbers(folder):
    table = pq.read_table(folder / TEXTS)
    pq.write_table(table.set_column(1, "text", pa.array(range(len(table)))), folder / TEXTS)


def test_nothing_left(root, written):
    texts = pq.read_table(written[0] / TEXTS)
    folder = shutil.copytree(written[0], root / "strict")
    pq.write_table(texts.filter(pa.array([origin != "human" for origin in texts["origin"].to_pylist()])), folder / TEXTS)
    with pytest.raises(ZooError, match=r"no text is left for arm 'both' with threshold 1\.0: lower the threshold"):
        read(root, "strict", threshold=1.0)


def compared(recipe, data_root):
    compare([recipe], seeds=1, data_root=data_root, out=Path(recipe["out"]).with_name("study"))
    (folder,) = Path(recipe["out"]).with_name("study").glob("*/seed_0")
    assert json.loads((folder / "result.json").read_text())["state"] == "done"
    return folder.rename(recipe["out"])


@pytest.mark.parametrize("go", [zoo.train, zoo.run, compared])
def test_stages_chain_over_captioned_data(root, written, tmp_path, go):
    """A captioner learns from the clean pairs; what it has learned begins the model of the bootstrapped ones."""
    small = {"name": "blip", "layers": 1, "dim": 8, "vision": {"name": "tiny_image", "dim": 32, "layers": 1, "image_size": 16}}
    run = {"steps": 2, "batch_size": 8, "device": "cpu"}
    clean = {
        "model": small,
        "data": {**DATA, "learn": "trusted"},
        "objective": "lm",
        "run": run,
        "out": str(tmp_path / "unused"),
        "seed": 3,
    }
    (tmp_path / "captioner.yaml").write_text(json.dumps(clean))
    parts = ("vision", "trunk", "embed", "head")
    recipe = {
        "model": small,
        "data": {"name": "capfilt", "folder": "texts", "threshold": 0.0},
        "objective": {"name": "together", "of": [{"name": "itc", "queue": 0}, "lm"]},
        "optimizer": {"lr": 0.0, "weight_decay": 0.0},  # what the stage gave stays as it was
        "run": run,
        "init_from": [{"recipe": str(tmp_path / "captioner.yaml"), "parts": parts, "share": [], "cache": str(tmp_path / "stages")}],
        "retrieve": {"k": [1], "main": {"k": 1}, "bootstrap": 0, "examples": 0},
        "seed": 0,
        "out": str(tmp_path / "trained"),
    }
    go(recipe, data_root=root)
    (stage,) = [folder for folder in (tmp_path / "stages").iterdir() if folder.is_dir()]
    given, began = zoo.load(stage).state_dict(), zoo.build(**small).state_dict()
    for name, x in zoo.load(tmp_path / "trained").state_dict().items():
        assert torch.equal(x, given[name]) == (name.partition(".")[0] in parts or torch.equal(given[name], began[name])), name
    assert json.loads((stage / "model.json").read_text())["trained"]


@pytest.fixture
def command(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["zoo", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, *capsys.readouterr()

    return call


def test_the_command(root, tmp_path, command):
    recipe = tmp_path / "source.yaml"
    recipe.write_text(json.dumps(RECIPE))
    models = ("--captioner", root / "captioner", "--filter", root / "filter")
    code, out, err = command("capfilt", recipe, "data.mismatch=0.5", *models, "--data", root, "--out", tmp_path / "made", "--longest", 4)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["web", "synthetic", "human"]
    assert lines[3].startswith("of 16 wrong texts of the web the filter found ")
    assert lines[4].startswith("wrong texts among those of the web: 0.500 before, ")
    assert f"data={{name: capfilt, folder: {tmp_path / 'made'}}}" in lines[5]
    assert read(root, str(tmp_path / "made")).statistics["source"]["planted_mismatches"] == 16
    code, out, err = command("capfilt", recipe, "--filter", root / "filter", "--data", root, "--out", tmp_path / "json", "--json")
    assert json.loads(out)["arm"] == "filter"
    code, out, err = command("capfilt", recipe, *models, "--data", root, "--out", tmp_path / "made")
    assert (code, out) == (2, "")
    assert "holds texts that differ in source, fingerprint, how: name another folder" in err
    code, out, err = command("capfilt", recipe, *models, "--out", tmp_path / "x")
    assert err.startswith(f"zoo: write: zoo capfilt {recipe} --data DIR")
    code, out, err = command("capfilt", recipe, *models, "--data", root, "--out", tmp_path / "x", "--method", "best")
    assert code == 2
    assert "'greedy', 'beam' or 'nucleus'" in err
