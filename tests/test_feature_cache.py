"""The feature cache: nothing shows that it is there but the time; what it holds is never stale, half or damaged."""

import errno
import json
import logging
import os
import signal
import threading

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from zoo import columns, feature_cache
from zoo.errors import Failure, Terminated, ZooError
from zoo.hub import load
from zoo.models._notes import NoteProcessor
from zoo.models._notes import images as images_of
from zoo.recipe import load_recipe
from zoo.registry import make
from zoo.train import make_accelerator, make_step, train
from zoo.update import Updater

DATA = {"name": "planted_notes", "notes": 100, "users": 600, "image_size": 16, "mine": {"top": 1}}
MODEL = {
    "name": "notellm2",
    "backbone": {"name": "tiny_lm", "dim": 32, "layers": 1, "heads": 2, "vocab_size": 1024},
    "vision": {"name": "tiny_image", "dim": 32, "layers": 1, "heads": 2, "image_size": 16},
    "connector": {"name": "qformer", "num_queries": 2, "layers": 1, "hidden": 32, "heads": 2, "ffn": 32},  # has dropout
    "dim": 16,
    "language": "en",
    "content_length": 24,
}


class Several:
    """Rows of a data set: every third without an image, every fifth with three."""

    def __init__(self, notes):
        self.notes, self.decoded = notes, []

    def __len__(self):
        return len(self.notes)

    def __getitem__(self, i):
        row = dict(self.notes[i])
        self.decoded.append(i)
        picture = row.pop("image", None)
        if i % 3 and picture is not None:
            row["image"] = [picture, picture.rotate(90), picture.rotate(180)] if i % 5 == 0 else picture
        return row


@pytest.fixture(scope="module")
def plain():
    return make("data", DATA)


@pytest.fixture
def data():
    """With rows of none, one and three images."""
    made = make("data", DATA)
    lengths = made.lengths()
    made.notes, made.lengths = Several(made.notes), lambda: lengths
    return made


@pytest.fixture
def recipe(tmp_path):
    def go(out="run", cached=True, **overrides):
        settings = {
            "model": MODEL,
            "data": DATA,
            "objective": "pair_infonce",
            "optimizer": {"lr": 1e-3},
            "run": {"steps": 5, "batch_size": 8, "device": "cpu", "log_every": 1},
            "out": str(tmp_path / out),
        }
        given = {"run__feature_cache": str(tmp_path / "cache")} if cached else {}
        return load_recipe(settings, **given, **overrides)

    return go


def losses(recipe):
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (recipe.out / "log.jsonl").read_text().splitlines()]


def assert_same_run(one, other):
    assert losses(one) == losses(other)
    a, b = (load_file(r.out / "model.safetensors") for r in (one, other))
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []
    assert (one.out / "model.json").read_text() == (other.out / "model.json").read_text()


def entries(recipe):
    return sorted(p for p in recipe.run.feature_cache.iterdir() if not p.name.startswith("."))


def opened(recipe, data, **changes):
    """The cache of a recipe's model, without a training; the encoder counts what it encodes."""
    accelerator = make_accelerator(recipe)
    set_seed(recipe.seed)
    model = make_step(recipe).model
    for name, change in changes.items():
        change(getattr(model, name))
    with feature_cache.feature_cache(recipe, data, model, accelerator) as seen:
        return model, seen


@pytest.fixture
def encoded(monkeypatch):
    """How many images each call of an encoder got."""
    seen, encode = [], feature_cache._Source.encode

    def counting(self, pixels):
        seen.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(feature_cache._Source, "encode", counting)
    return seen


# It shows in nothing


@pytest.mark.parametrize("overrides", [{}, {"run__workers": 1}, {"run__precision": "bf16"}, {"run__gradient_checkpointing": True}], ids=str)
def test_the_same_run_with_and_without(recipe, data, overrides):
    one, other = recipe("one", **overrides), recipe("other", cached=False, **overrides)
    for settings in (one, other):
        train(settings, loaded=data)
    assert_same_run(one, other)


def test_images_are_read_once(recipe, data, encoded):
    train(recipe("one"), loaded=data)
    assert sum(encoded) > 0
    encoded.clear()
    first = len(data.notes.decoded)
    train(recipe("two", objective={"name": "pair_infonce", "alpha": 3.0}), loaded=data)  # another arm shares the entry
    assert len(encoded) == 1  # the first and the last item, to see whether they are what they were
    assert len(entries(recipe())) == 1
    assert first > 0


def test_rows_that_can_leave_their_images_unread_do(recipe, plain, monkeypatch):
    train(recipe("one"), loaded=plain)
    from zoo.data import _collection

    decoded, decode = [], _collection.decode
    monkeypatch.setattr(_collection, "decode", lambda *a: decoded.append(1) or decode(*a))
    train(recipe("two"), loaded=plain)
    assert len(decoded) == 3  # one to see that the model sees anything, two of the check


def killed(recipe, data, batches, monkeypatch):
    seen, check = [], Updater._check_loss

    def counting(self, loss, position):
        if len(seen) == batches:
            raise KeyboardInterrupt
        seen.append(1)
        check(self, loss, position)

    with monkeypatch.context() as patch:
        patch.setattr(Updater, "_check_loss", counting)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, loaded=data)


@pytest.mark.parametrize("before, after", [(True, True), (True, False), (False, True)])
def test_resumed_in_the_middle_of_an_epoch_with_or_without(recipe, data, monkeypatch, before, after):
    whole = recipe("whole", cached=False)
    train(whole, loaded=data)
    killed(recipe("parts", cached=before, run__save_every=2), data, 3, monkeypatch)
    train(recipe("parts", cached=after), loaded=data)
    assert_same_run(whole, recipe("parts"))


def test_outside_of_training_the_encoder_is_the_real_one(recipe, data):
    model = train(recipe(), loaded=data)
    assert "forward" not in vars(model.vision)
    row = {"title": "a", "image": Image.new("RGB", (16, 16), "red")}
    torch.testing.assert_close(model.encode([row]), load(recipe().out).encode([row]))  # weights elsewhere in memory: other rounding


def test_a_real_image_is_encoded_inside_too(recipe, data):
    settings = recipe()
    set_seed(0)
    model, row = make_step(settings).model, {"title": "a", "image": Image.new("RGB", (16, 16), "red")}
    model.trained = True
    before = model.encode([row])
    with feature_cache.feature_cache(settings, data, model, make_accelerator(settings)):
        assert np.array_equal(model.encode([row]), before)


def test_a_model_without_eyes_has_nothing_to_keep(recipe, data):
    settings = recipe(model__fusion="text_only")
    _, seen = opened(settings, data)
    assert seen is data


def test_the_files_are_safetensors(recipe, data):
    settings = recipe()
    model, seen = opened(settings, data)
    (entry,) = entries(settings)
    read = {p.stem: load_file(p)[p.stem] for p in entry.glob("*.safetensors")}
    counts = [len(images_of(data.notes[i])) for i in range(100)]
    assert set(counts) == {0, 1, 3}
    images, last = sum(counts), max(i for i in range(100) if counts[i] == 1)
    place = sum(counts[:last])
    assert {name: list(x.shape) for name, x in read.items()} == {
        "tokens": [images, 4, 32],
        "mask": [images, 4],
        "pooled": [images, 32],
        "present": [images],
        "sum": [images],
        "count": [100],
    }
    pixels = model.vision.processor(data.notes[last]["image"]).values
    there = feature_cache.Features(entry)(torch.tensor([place]))
    here = model.vision(feature_cache.ModalityInputs(torch.stack([pixels, pixels])))
    assert torch.equal(there.tokens, here.tokens[:1])
    assert torch.equal(there.pooled, here.pooled[:1])
    assert {p.name for p in settings.run.feature_cache.iterdir()} == {entry.name, f".{entry.name}.lock"}
    assert seen.notes[3] == {k: v for k, v in data.notes[3].items() if k != "image"}


# What changes makes another entry


def test_every_change_has_an_entry_of_its_own(recipe, data, plain, monkeypatch):
    settings = recipe()

    def entry_after(settings=settings, data=data, **changes):
        before = set(entries(settings)) if settings.run.feature_cache.is_dir() else set()
        opened(settings, data, **changes)
        return len(set(entries(settings)) - before)

    assert entry_after() == 1
    assert entry_after() == 0
    assert entry_after(vision=lambda v: nn.init.constant_(v.norm.bias, 1e-3)) == 1
    assert entry_after(vision=lambda v: setattr(v.processor, "interpolation", "bilinear")) == 1
    assert entry_after(recipe(run__precision="bf16")) == 1
    other = make("data", {**DATA, "seed": 1})
    assert entry_after(data=other) == 1
    assert entry_after(recipe(model__vision={**MODEL["vision"], "layers": 2})) == 1
    assert entry_after(recipe(model__connector="linear", optimizer__lr=1.0)) == 0


def test_code_that_changed_is_noticed(recipe, data, encoded, monkeypatch, caplog):
    """A library that resizes in another way: no hash shows it."""
    settings = recipe()
    opened(settings, data)
    processed = feature_cache._Pictures.__getitem__

    def darker(self, item):
        found, count = processed(self, item)
        return [x - 0.5 for x in found], count

    monkeypatch.setattr(feature_cache._Pictures, "__getitem__", darker)
    encoded.clear()
    opened(settings, data)
    assert "was made by other code, and differs by" in caplog.text
    assert sum(encoded) > 40
    caplog.clear()
    opened(settings, data)
    assert "made by other code" not in caplog.text


# Damage, interruption, company


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda e: (e / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda e: (e / "manifest.json").unlink(), "manifest.json cannot be read"),
        (lambda e: (e / "tokens.safetensors").unlink(), "tokens.safetensors is not as long"),
        (
            lambda e: (e / "pooled.safetensors").write_bytes((e / "pooled.safetensors").read_bytes()[:-1]),
            "pooled.safetensors is not as long",
        ),
        (lambda e: overwrite(e / "tokens.safetensors", columns.HEADER), "is not what was written"),
    ],
)
def test_a_damaged_entry_is_made_again(recipe, data, caplog, damage, says):
    settings = recipe()
    opened(settings, data)
    (entry,) = entries(settings)
    whole = (entry / "tokens.safetensors").read_bytes()
    damage(entry)
    opened(settings, data)
    assert f"making the feature cache again: {entry}" in caplog.text
    assert says in caplog.text
    assert (entry / "tokens.safetensors").read_bytes() == whole


def overwrite(path, at):
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


def test_damage_in_the_middle_is_found_when_it_is_read(recipe, data):
    settings = recipe()
    opened(settings, data)
    (entry,) = entries(settings)
    overwrite(entry / "tokens.safetensors", columns.HEADER + 20 * 4 * 32 * 4 + 7)
    features = feature_cache.Features(entry)
    features(torch.tensor([19, 21]))
    with pytest.raises(Failure, match=r"is damaged: it is not what was written; remove this folder, and run the same command again"):
        features(torch.tensor([19, 20]))


@pytest.mark.parametrize("number, raised", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_a_build_that_is_asked_to_stop_keeps_all_it_has(recipe, data, monkeypatch, caplog, number, raised):
    caplog.set_level(logging.INFO, "zoo.feature_cache")
    append, counts = columns.Writer.append, []

    def asked(self, name, rows):
        append(self, name, rows)
        if name == "tokens":  # the batch is not whole yet
            counts.append(rows)
        if len(counts) == 2:
            counts.append(rows)
            signal.raise_signal(number)

    monkeypatch.setattr(columns.Writer, "append", asked)
    with pytest.raises(
        raised, match=r"^stopped with 32 of 100 items in the feature cache; run the same command again to go on from there$"
    ):
        opened(recipe(), data)
    opened(recipe(), data)
    assert "of which 32 are there" in caplog.text
    whole = recipe(run__feature_cache=str(recipe().out / "whole"), cached=False)
    opened(whole, data)
    for one, other in zip(sorted(entries(recipe())[0].iterdir()), sorted(entries(whole)[0].iterdir()), strict=True):
        assert one.read_bytes() == other.read_bytes()


class Killed(Exception):
    pass


@pytest.mark.parametrize("flushed", [True, False])
def test_an_interrupted_build_leaves_nothing_that_is_used_and_goes_on(recipe, data, encoded, monkeypatch, caplog, flushed):
    caplog.set_level(logging.INFO, "zoo.feature_cache")
    settings = recipe()
    append, appended = columns.Writer.append, []

    def dying(self, name, rows):
        appended.append(name)
        if appended.count("pooled") == 3:
            raise Killed
        append(self, name, rows)

    monkeypatch.setattr(feature_cache, "FLUSH_SECONDS", 0.0 if flushed else 1e9)
    with monkeypatch.context() as patch:
        patch.setattr(columns.Writer, "append", dying)
        with pytest.raises(Killed):
            opened(settings, data)
    assert entries(settings) == []
    encoded.clear()
    opened(settings, data)
    assert ("of which 32 are there" in caplog.text) is flushed
    whole = recipe(run__feature_cache=str(settings.out / "whole"), cached=False)
    opened(whole, data)
    for one, other in zip(sorted(entries(settings)[0].iterdir()), sorted(entries(whole)[0].iterdir()), strict=True):
        assert one.name == other.name
        assert one.read_bytes() == other.read_bytes()


def test_a_build_that_other_code_began_is_not_used(recipe, data, monkeypatch):
    settings, finish = recipe(), columns.Writer.finish

    def stale(self, final, about):
        self._files["tokens"].seek(columns.HEADER)
        first = torch.ones(4, 32)
        self._files["tokens"].write(first.numpy().data)
        pooled = (self.folder / "pooled.safetensors").read_bytes()[columns.HEADER :][:128]
        rest = [np.frombuffer(pooled, np.uint8)[None], np.ones((1, 1), np.uint8)]
        rest.insert(1 if list(self.columns).index("pooled") == 0 else 0, np.ones((1, 4), np.uint8))
        self._files["sum"].seek(columns.HEADER)
        self._files["sum"].write(columns.row_sums([columns.as_bytes(first.view(1, -1)), *rest]).data)
        finish(self, final, about)

    monkeypatch.setattr(columns.Writer, "finish", stale)
    with pytest.raises(Failure, match="was begun by other code, and is removed now: run the same command again"):
        opened(settings, data)
    assert entries(settings) == []


def test_two_at_once_make_one(recipe, data, caplog):
    caplog.set_level(logging.INFO, "zoo.feature_cache")
    settings, faults = recipe(), []
    accelerator = make_accelerator(settings)
    models = []
    for _ in range(2):
        set_seed(0)
        models.append(make_step(settings).model)

    def go(model):
        try:
            with feature_cache.feature_cache(settings, data, model, accelerator) as seen:
                assert len(seen.notes) == 100
        except BaseException as e:
            faults.append(e)

    threads = [threading.Thread(target=go, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert len(entries(settings)) == 1
    assert caplog.text.count(": 100 items\n") == 1  # one of them made it


def test_a_full_disk(recipe, data, monkeypatch):
    settings = recipe()
    append = columns.Writer.append

    class Full:
        def write(self, content):
            raise OSError(errno.ENOSPC, "No space left on device")

        close = flush = lambda self: self.write(b"")  # what it holds back is tried again

    def filling(self, name, rows):
        if name == "sum" and self.rows("sum") > 20:
            self._files["sum"] = Full()
            self._held.callback(self._files["sum"].close)
        append(self, name, rows)

    monkeypatch.setattr(columns.Writer, "append", filling)
    with pytest.raises(Failure, match=r"cannot be written \(.*No space left on device\), none of it is kept: make room, or name another"):
        opened(settings, data)
    assert [p for p in settings.run.feature_cache.iterdir() if p.suffix != ".lock"] == []


def test_a_folder_that_cannot_be_made(recipe, data, tmp_path):
    (tmp_path / "cache").write_text("no folder")
    with pytest.raises(Failure, match=r"cannot be written .*name another folder"):
        opened(recipe(), data)


def test_what_cannot_be_read_is_no_full_disk_and_keeps_what_is_there(recipe, data, monkeypatch):
    encode, calls = feature_cache._Source.encode, []

    def failing(self, pixels):
        calls.append(pixels)
        if len(calls) == 5:  # two calls look whether it repeats itself
            raise ConnectionResetError("the encoder is on another machine")
        return encode(self, pixels)

    monkeypatch.setattr(feature_cache._Source, "encode", failing)
    monkeypatch.setattr(feature_cache, "FLUSH_SECONDS", 0)
    with pytest.raises(ConnectionResetError):
        opened(recipe(), data)
    (part,) = recipe().run.feature_cache.glob(".*.part")
    with columns.Writer(part) as writer:
        assert writer.rows("count") == 32


# What cannot be kept


@pytest.mark.parametrize(
    "overrides, says",
    [
        ({"model__train_vision": True}, r"the image encoder is trained \(.* and \d+ more\).*train_vision: false, freeze: \[vision\]"),
        ({"model__train_vision": True, "freeze": ["vision.blocks"]}, "the image encoder is trained"),
        ({"run__shard": True}, "write run.shard: false"),
        ({"model__absent": "zeros"}, "write model.absent: skip"),
    ],
)
def test_refused(recipe, data, overrides, says):
    with pytest.raises(ZooError, match=rf"^run\.feature_cache: .*{says}"):
        opened(recipe(**overrides), data)


def test_frozen_by_its_prefix(recipe, data):
    opened(recipe(model__train_vision=True, freeze=["vision"]), data)


def test_an_encoder_that_draws_is_refused(recipe, data):
    def thaw(vision):
        vision.requires_grad_(False)
        vision._forward_pre_hooks.clear()

    with pytest.raises(ZooError, match="leaves eval mode when the model trains"):
        opened(recipe(), data, vision=thaw)

    def noise(vision):
        vision.register_forward_hook(lambda _, __, out: out._replace(tokens=out.tokens + torch.randn_like(out.tokens)))

    with pytest.raises(ZooError, match="gives something else each time"):
        opened(recipe(), data, vision=noise)


def test_a_random_processor_is_refused(recipe, data, monkeypatch):
    from zoo.encoders._image import ImageProcessor

    call = ImageProcessor.__call__
    monkeypatch.setattr(ImageProcessor, "__call__", lambda self, x: call(self, x)._replace(values=torch.rand(3, 16, 16)))
    with pytest.raises(ZooError, match="the image processor is random"):
        opened(recipe(), data)


def test_another_kind_of_model_is_refused(recipe, data):
    settings = recipe()
    with (
        pytest.raises(ZooError, match="'notellm2' is no model with one image encoder"),
        feature_cache.feature_cache(settings, data, nn.Linear(1, 1), make_accelerator(settings)),
    ):
        pass


class Spoilt(Several):
    """Rows in one of which something happens."""

    def __init__(self, notes, at, happens):
        super().__init__(notes)
        self.at, self.happens = at, happens

    def __getitem__(self, i):
        return self.happens(super().__getitem__(i)) if i == self.at else super().__getitem__(i)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("at", [7, 70])
def test_an_image_that_cannot_be_read_names_its_item(recipe, plain, data, at, workers):
    data.notes = Spoilt(plain.notes, at, lambda row: {**row, "image": b"x"})
    with pytest.raises(ZooError, match=rf"^item {at}: 1 bytes that start with b'x': no image that can be decoded \(.*\)$"):
        opened(recipe(run__workers=workers), data)


def test_a_worker_that_is_killed(recipe, plain, data):
    data.notes = Spoilt(plain.notes, 70, lambda row: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(Failure, match=r"a process that loads data ended by itself \(.*\): most often the machine has run out of memory"):
        opened(recipe(run__workers=1), data)


def test_prepared_images_pass_the_processor(recipe):
    model = make_step(recipe()).model
    assert isinstance(model.processor, NoteProcessor)
    place = feature_cache.ModalityInputs(torch.full((1, 1, 1), 7))
    assert torch.equal(model.processor({"image": [place]})["image"].values, place.values)
    assert model.processor({"image": [place, place]})["image"].values.shape == (2, 1, 1, 1)


# The columns by themselves


def test_columns_refuse_rows_of_another_kind(tmp_path):
    with columns.Writer(tmp_path / "part") as writer:
        writer.append("x", torch.zeros(2, 3))
        with pytest.raises(Failure, match=r"x is F32 \[3\] for some rows, F32 \[4\] for others"):
            writer.append("x", torch.zeros(2, 4))
        with pytest.raises(Failure, match=r"BF16 \[3\] for others"):
            writer.append("x", torch.zeros(2, 3, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", columns._NAMES, ids=str)
def test_columns_give_back_what_they_got(tmp_path, dtype):
    rows = (torch.randn(7, 2, 3) * 4).to(dtype)
    with columns.Writer(tmp_path / "part") as writer:
        writer.append("x", rows[:4])
        writer.append("x", rows[4:])
        writer.finish(tmp_path / "whole", {"a": 1})
    about, found = columns.read_columns(tmp_path / "whole")
    assert about == {"a": 1}
    assert torch.equal(found["x"][np.array([6, 0, 0])], rows[[6, 0, 0]])
    assert torch.equal(load_file(tmp_path / "whole/x.safetensors")["x"], rows)
