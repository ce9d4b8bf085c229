"""The neglect experiment: its data tell what they should, its stages are found again, its recipes run."""

from __future__ import annotations

import json
import logging
import shutil
import signal

import numpy as np
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

import zoo.init_from
from zoo.data.planted_neglect import Planted, planted_neglect
from zoo.encoders.features import Features
from zoo.errors import Terminated, ZooError
from zoo.init_from import take_parts
from zoo.log import Log
from zoo.objectives.next_token import NextToken
from zoo.recipe import dump, load_recipe, recipes
from zoo.registry import build
from zoo.stages import Stage
from zoo.train import train
from zoo.types import Batch, ModalityInputs

FOLDER = "notellm2/neglect/"
STAGES = ("words", "captions")
SMALL = {"train_notes": 3000, "train_pairs": 4000, "pool": 400, "queries": 100, "topics": 8, "styles": 5}
TINY = "{name: planted_neglect, train_notes: 200, train_pairs: 64, pool: 240, queries: 20, topics: 4, styles: 2}"
FEW = ("run.steps=2", "run.batch_size=8", f"data={TINY}", "evaluate.bootstrap=0")


@pytest.fixture(scope="module")
def data() -> Planted:
    return planted_neglect(**SMALL)


def told_by_text(data: Planted, latent: np.ndarray, notes: np.ndarray) -> float:
    """How often naive Bayes over words, learned on the training notes, tells the latent of ``notes``."""
    words = {word: i for i, word in enumerate(sorted({w for text in data.texts() for w in text.split()}))}
    counts = np.zeros((len(data.notes), len(words)))
    for i, text in enumerate(data.texts()):
        np.add.at(counts[i], [words[w] for w in text.split()], 1)
    seen = data.pool("train")
    likely = np.log(np.stack([1 + counts[seen][latent[seen] == c].sum(0) for c in range(latent.max() + 1)]))
    likely -= np.log(np.exp(likely).sum(1, keepdims=True))
    return float((np.argmax(counts[notes] @ likely.T, 1) == latent[notes]).mean())


def told_by_image(data: Planted, latent: np.ndarray, notes: np.ndarray) -> float:
    """How often a linear probe on the first vector, learned on the training notes, tells the latent of ``notes``."""
    first = np.stack([row["image"][0] for row in data.notes])
    first = np.concatenate([first, np.ones((len(first), 1))], 1)
    seen = data.pool("train")
    weights, *_ = np.linalg.lstsq(first[seen], np.eye(latent.max() + 1)[latent[seen]], rcond=None)
    return float((np.argmax(first[notes] @ weights, 1) == latent[notes]).mean())


class TestData:
    def test_the_same_seed_gives_the_same(self, data):
        assert planted_neglect(**SMALL).fingerprint == data.fingerprint
        assert planted_neglect(**SMALL, seed=1).fingerprint != data.fingerprint
        assert planted_neglect(**SMALL, inputs=["text"]).fingerprint != data.fingerprint

    def test_pairs_share_topic_and_style_and_splits_share_nothing(self, data):
        seen: set[int] = set()
        for split, size in {"train": 4000, "val": 100, "test": 100}.items():
            pairs, pool = data.pairs(split), data.pool(split)
            assert pairs.shape == (size, 2)
            assert (pairs[:, 0] != pairs[:, 1]).all()
            assert (data.topic[pairs[:, 0]] == data.topic[pairs[:, 1]]).all()
            assert (data.style[pairs[:, 0]] == data.style[pairs[:, 1]]).all()
            assert np.isin(pairs, pool).all()
            assert not seen & set(pool.tolist())
            seen |= set(pool.tolist())
        assert seen == set(range(len(data.notes)))
        assert len(np.unique(data.pairs("test"))) == 200

    def test_one_in_six_is_short(self, data):
        short, counts = data.short(), np.array([len(text.split()) for text in data.texts()])
        assert 0.14 < short.mean() < 0.2
        assert set(counts[short]) == {0, 1, 2}
        assert set(counts[~short]) == {6, 7, 8, 9, 10}

    def test_text_tells_the_topic_and_less_of_the_style_and_short_text_little(self, data):
        notes = data.pool("test")
        long, short = notes[~data.short()[notes]], notes[data.short()[notes]]
        topic, style = told_by_text(data, data.topic, long), told_by_text(data, data.style, long)
        assert topic > 0.95
        assert 0.5 < style < topic
        assert told_by_text(data, data.topic, short) < 0.6
        assert told_by_text(data, data.style, short) < 0.5

    def test_image_tells_both_whatever_the_text(self, data):
        notes = data.pool("test")
        for here in (notes, notes[data.short()[notes]]):
            assert told_by_image(data, data.topic, here) > 0.6  # of 8; 0.125 by chance
            assert told_by_image(data, data.style, here) > 0.6  # of 5

    def test_uninformative_images_tell_nothing_and_nothing_else_changes(self, data):
        blind = planted_neglect(**SMALL, informative=False)
        notes = blind.pool("test")
        assert told_by_image(blind, blind.topic, notes) < 0.125 + 4 * np.sqrt(0.125 * 0.875 / len(notes))
        assert told_by_image(blind, blind.style, notes) < 0.2 + 4 * np.sqrt(0.2 * 0.8 / len(notes))
        assert blind.texts() == data.texts()
        assert all(np.array_equal(blind.pairs(s), data.pairs(s)) for s in ("train", "val", "test"))
        assert blind.notes[0]["image"].std() == pytest.approx(data.notes[0]["image"].std(), rel=0.5)

    def test_rows_show_what_they_are_asked_for(self):
        text, image = (planted_neglect(**SMALL, inputs=[kind]).notes for kind in ("text", "image"))
        assert {key for row in text for key in row} == {"id", "note_id", "content"}
        assert {key for row in image for key in row} == {"id", "note_id", "image"}
        assert text[-1]["id"] == len(text) - 1
        with pytest.raises(IndexError, match="note 3800 of 3800"):
            text[3800]

    def test_faults(self, data):
        with pytest.raises(ZooError, match="no split named 'tset'"):
            data.pool("tset")
        with pytest.raises(ZooError, match="no two of 2 training notes share"):
            planted_neglect(train_notes=2, pool=4, topics=50, styles=50)


class TestFeatures:
    def test_hands_on_what_it_gets(self):
        encoder = Features(dim=3)
        rows = np.arange(12.0).reshape(4, 3)
        values = encoder.processor(rows).values
        assert values.dtype == torch.float32
        out = encoder(ModalityInputs(values[None]))
        assert torch.equal(out.tokens[0], values)
        assert torch.equal(out.pooled, values[:1])
        assert out.mask.all()
        assert not list(encoder.parameters())

    @pytest.mark.parametrize(
        "thing, seen", [(np.zeros((4, 2)), r"of shape \(4, 2\)"), (np.zeros(3), r"of shape \(3,\)"), ("a.png", "a str")]
    )
    def test_refuses_what_is_no_array_of_its_width(self, thing, seen):
        with pytest.raises(ZooError, match=rf"reads arrays \(tokens, 3\), this is .*{seen}"):
            Features(dim=3).processor(thing)


def small_model(fusion: str = "early"):
    backbone = {"name": "tiny_lm", "dim": 16, "layers": 1, "heads": 2, "vocab_size": 64}
    connector = {"name": "attention_pool", "num_queries": 2, "heads": 2}
    return build(
        "notellm2", backbone=backbone, vision={"name": "features", "dim": 3}, connector=connector, fusion=fusion, dim=8, language="en"
    )


def batch_of(model, *rows) -> Batch:
    from zoo.collate import RowCollate

    return RowCollate(model.processor)(rows)


class TestNextToken:
    ROWS = ({"content": "one two three", "image": np.ones((4, 3))}, {"content": "four"})

    def test_of_a_model_that_knows_nothing_is_the_logarithm_of_its_vocabulary(self):
        model = small_model()
        torch.nn.init.zeros_(model.backbone.model.embed_tokens.weight)
        loss = NextToken()(model.requires_grad_(False), batch_of(model, *self.ROWS))
        assert float(loss.total) == pytest.approx(np.log(64))

    def test_predicts_every_word_but_the_first_and_no_image(self):
        model = small_model()
        batch = batch_of(model, *self.ROWS)
        text = batch.inputs["text"]
        logits, words = model.predict(batch)
        expected = [ids[(slots == 0) & real][1:] for ids, slots, real in zip(text.values, text.extra["slots"], text.mask, strict=True)]
        assert torch.equal(words, torch.cat(expected))
        assert logits.shape == (len(words), 64)

    def test_a_word_is_predicted_from_what_stands_before_it_an_image_included(self):
        model = small_model().eval()
        given = [{"content": "one two three", "image": np.full((4, 3), x)} for x in (1.0, -1.0)] + [{"content": "one two four"}]
        (first, words), (other, _) = (model.predict(batch_of(model, row)) for row in given[:2])
        assert not torch.allclose(first[-1], other[-1])  # another image
        (plain, _), (changed, _) = (model.predict(batch_of(model, {"content": c})) for c in ("one two three", "one two four"))
        place = next(i for i in range(len(plain)) if not torch.allclose(plain[i], changed[i]))
        assert place > 0  # the words up to "three" are predicted alike
        assert torch.equal(words[:2], words[:2])

    def test_refuses_a_model_that_predicts_nothing(self):
        with pytest.raises(ZooError, match="next_token needs a model that predicts words, and Linear does not"):
            NextToken().bind(torch.nn.Linear(1, 1))


@pytest.fixture
def stage(tmp_path):
    """A recipe with one stage: a function that trains it under overrides, and the folder of its cache."""
    words = tmp_path / "words.yaml"
    words.write_text(dump(load_recipe(FOLDER + "words", *FEW)))
    cache = tmp_path / "stages"
    given = {"recipe": str(words), "parts": ["backbone"], "share": ["data", "model.backbone"], "cache": str(cache)}

    def go(*overrides: str, **changes):
        return train(
            FOLDER + "main", *FEW, f"init_from=[{json.dumps({**given, **changes})}]", f"out={tmp_path / 'run'}", *overrides, fresh=True
        )

    return go, cache


def kept(cache):
    """The stages that a run finds."""
    return [folder for folder in cache.iterdir() if not folder.name.startswith(".")]


class TestStages:
    def test_is_trained_once_and_found_again(self, stage, caplog):
        go, cache = stage
        caplog.set_level(logging.INFO, logger="zoo.train")
        go()
        (folder,) = kept(cache)
        assert folder.name.startswith("words-")
        written = (folder / "model.safetensors").stat().st_mtime_ns
        assert sum("training the stage" in line for line in caplog.messages) == 1
        go("seed=5", "optimizer.lr=3e-4")  # no business of the stage
        assert [folder] == kept(cache)
        assert (folder / "model.safetensors").stat().st_mtime_ns == written
        assert sum("training the stage" in line for line in caplog.messages) == 1

    def test_gives_its_part_and_no_other(self, stage):
        go, cache = stage
        model = go("optimizer.lr=0", "optimizer.weight_decay=0")
        (folder,) = kept(cache)
        state = load_file(folder / "model.safetensors")
        for name, tensor in model.state_dict().items():
            if name.startswith("backbone."):
                assert torch.equal(tensor, state[name]), name
        assert not torch.equal(model.project.weight, state["project.weight"])

    def test_of_a_folder_gives_what_lies_there(self, stage, tmp_path):
        go, cache = stage
        go()
        (folder,) = kept(cache)
        folder = folder.rename(tmp_path / "words")
        model = go("optimizer.lr=0", "optimizer.weight_decay=0", recipe=None, folder=str(folder))
        assert not kept(cache)  # nothing was trained for it
        state = load_file(folder / "model.safetensors")
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items() if name.startswith("backbone."))

    def test_of_a_folder_says_what_nothing_was_known_of(self, stage, tmp_path, caplog):
        go, cache = stage
        go()
        (folder,) = kept(cache)
        about = json.loads((folder / "model.json").read_text())
        name = next(name for name in load_file(folder / "model.safetensors") if name.startswith("backbone."))
        (folder / "model.json").write_text(json.dumps({**about, "drawn": [name, "project.weight"]}))
        go(recipe=None, folder=str(folder.rename(tmp_path / "words")))
        assert f"words: 1 weights of its 'backbone', such as {name}, were drawn at random" in caplog.text
        other = "model.backbone.layers=1"
        with pytest.raises(
            ZooError, match=r"(?s)its 'backbone' does not fit this model's \(.{1,204}\): write the settings of its model.json"
        ):
            go(other, recipe=None, folder=str(tmp_path / "words"))

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"recipe": None, "folder": "nowhere"}, "init_from: .*nowhere"),
            ({"recipe": None}, "write one of the two"),
            ({"folder": "nowhere"}, "write one of the two"),
        ],
    )
    def test_of_no_folder_or_of_two_things_is_refused(self, stage, changes, said):
        with pytest.raises(ZooError, match=said):
            stage[0](**changes)

    @pytest.mark.parametrize("change", ["data.seed=3", "model.backbone.layers=1"])
    def test_follows_what_it_shares_into_an_entry_of_its_own(self, stage, change):
        go, cache = stage
        go()
        go(change)
        assert len(kept(cache)) == 2

    def test_changed_settings_or_code_make_another_entry(self, stage, tmp_path, monkeypatch):
        go, cache = stage
        go()
        (tmp_path / "words.yaml").write_text(dump(load_recipe(FOLDER + "words", *FEW, "optimizer.lr=1e-3")))
        go()
        assert len(kept(cache)) == 2
        monkeypatch.setattr(zoo.init_from, "CODE", 2)
        go()
        assert len(kept(cache)) == 3

    @pytest.mark.parametrize("name", ["model.safetensors", "stage.json"])
    def test_what_is_damaged_is_trained_again(self, stage, caplog, name):
        go, cache = stage
        go()
        (folder,) = kept(cache)
        whole = (folder / "model.safetensors").read_bytes()
        damaged = bytearray((folder / name).read_bytes())
        damaged[-20] ^= 1
        (folder / name).write_bytes(bytes(damaged))
        go()
        assert "is damaged: it is thrown away and trained again" in caplog.text
        assert (folder / "model.safetensors").read_bytes() == whole

    @pytest.mark.parametrize("step", [1, 2])
    def test_what_was_interrupted_goes_on(self, stage, monkeypatch, step):
        go, cache = stage
        write, seen = Log.write, []

        def written(self, position, values):
            seen.append((self.folder.name.partition("-")[0], position.step))
            write(self, position, values)
            if seen == [(".words", i + 1) for i in range(step)]:
                signal.raise_signal(signal.SIGTERM)

        monkeypatch.setattr(Log, "write", written)
        with pytest.raises(Terminated, match="run the same command again"):
            go()
        assert kept(cache) == []  # under no name that a run would look for
        go()
        assert seen == [(".words", 1), (".words", 2), ("run", 1), ("run", 2)]
        (folder,) = kept(cache)
        once = (folder / "model.safetensors").read_bytes()
        shutil.rmtree(cache)
        go()
        assert once == (folder / "model.safetensors").read_bytes()
        assert {p.name for p in cache.iterdir()} == {folder.name, f".{folder.name}.lock"}
        assert not (folder / "checkpoints").exists()

    def test_two_runs_do_not_train_it_twice(self, stage, monkeypatch, caplog):
        """Another one holds the stage when this one comes, and has made it when it lets go."""
        go, cache = stage
        go()
        (folder,) = kept(cache)
        folder.rename(folder.with_name("elsewhere"))
        caplog.set_level(logging.INFO, logger="zoo")
        caplog.clear()
        asked, lock = [], FileLock(cache / f".{folder.name}.lock", thread_local=False)
        lock.acquire()

        def waits(message):
            asked.append(message)
            folder.with_name("elsewhere").rename(folder)
            lock.release()

        monkeypatch.setattr("zoo.files.logger.info", waits)
        go()
        assert asked == [f"waiting for another process, which trains the stage {folder}"]
        assert not any("training the stage" in line for line in caplog.messages)

    def test_stages_chain(self, stage, tmp_path):
        go, cache = stage
        captions = tmp_path / "captions.yaml"
        inner = f"init_from=[{{recipe: {tmp_path / 'words.yaml'}, parts: [backbone], share: [data, model.backbone], cache: {cache}}}]"
        captions.write_text(dump(load_recipe(FOLDER + "captions", *FEW, inner)))
        model = go("optimizer.lr=0", "optimizer.weight_decay=0", recipe=str(captions), parts=["connector", "backbone"])
        words, told = (load_file(next(cache.glob(f"{name}-*")) / "model.safetensors") for name in STAGES)
        for name, tensor in model.state_dict().items():
            if name.startswith("backbone."):
                assert torch.equal(tensor, words[name])  # captions freezes it
            if name.startswith("connector."):
                assert torch.equal(tensor, told[name])

    @pytest.mark.parametrize(
        "changes, says",
        [
            ({"parts": ["conector"]}, "no part of this model named 'conector'; did you mean 'connector'"),
            ({"parts": ["connector"]}, "no part of its model named 'connector'; did you mean 'project'"),
            ({"share": ["data", "model.eyes"]}, "share names .*'model.eyes'.*missing 'eyes'"),
            ({"recipe": "notellm2/neglect/wrods"}, "no shipped recipe named 'notellm2/neglect/wrods'"),
        ],
    )
    def test_faults(self, stage, changes, says):
        with pytest.raises(ZooError, match=says):
            stage[0](**changes)

    def test_a_circle_is_told(self, stage, tmp_path):
        go, _ = stage
        words = tmp_path / "words.yaml"
        words.write_text(dump(load_recipe(words, f"init_from=[{{recipe: {words}, parts: [backbone]}}]")))
        with pytest.raises(ZooError, match=r"stages in a circle: .*words.yaml <- .*words.yaml: let one of them start from nothing"):
            go()

    def test_several_processes_train_no_stage(self, stage, monkeypatch):
        monkeypatch.setattr("zoo.init_from.PartialState", lambda: type("State", (), {"num_processes": 2})())
        with pytest.raises(ZooError, match="a stage is trained by one process: run this recipe once without a launcher"):
            stage[0]()

    def test_other_shapes_are_told_with_what_to_write(self, stage, tmp_path):
        go, cache = stage
        go()
        (folder,) = kept(cache)
        given = Stage(recipe="words", parts=("backbone",), share=("data",))
        with pytest.raises(ZooError, match=r"its 'backbone' does not fit .*name them in share \(now data\)"):
            take_parts(small_model(), [given], [folder])


NAMES = [name.removeprefix(FOLDER) for name in recipes() if name.startswith(FOLDER)]


class TestRecipes:
    def test_they_are_all_there(self):
        assert NAMES == ["aligned", "blind", "captions", "connector_rate", "main", "pooled", "untaught", "words"]

    @pytest.mark.parametrize("name", [n for n in NAMES if n not in STAGES])
    def test_differ_from_the_main_one_in_one_thing(self, name):
        changed = {
            "aligned": "init_from",
            "untaught": "init_from",
            "blind": "data",
            "connector_rate": "optimizer",
            "pooled": "model",
            "main": None,
        }[name]
        main, own = load_recipe(FOLDER + "main"), load_recipe(FOLDER + name)
        same = {"model", "data", "objective", "optimizer", "run", "evaluate", "init_from", "freeze", "seed"} - {changed}
        assert all(getattr(main, key) == getattr(own, key) for key in same)
        assert changed is None or getattr(main, changed) != getattr(own, changed)
        assert own.baselines["base"] == main.baselines["base"]

    @pytest.mark.parametrize("name", NAMES)
    def test_trains_two_steps(self, name, stage, tmp_path):
        go, cache = stage
        go()  # the stage that is taken in the place of the long ones
        recipe = load_recipe(FOLDER + name, *FEW)
        if recipe.init_from:
            words = f"{{recipe: {tmp_path / 'words.yaml'}, parts: [backbone], share: [data, model.backbone], cache: {cache}}}"
            recipe = load_recipe(recipe, f"init_from=[{words}]")
        model = train(recipe, f"out={tmp_path / name}")
        assert model.encode([{"content": "dabu debu", "image": np.zeros((17, 32))}]).shape == (1, 32)
