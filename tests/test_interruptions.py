"""What may happen to a run: it is asked to stop, the disk fills up, a worker dies. It says so, and goes on as if nothing had been."""

import errno
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset

from zoo import checkpoint, saver
from zoo.batches import Kept
from zoo.checkpoint import checkpoints
from zoo.errors import Failure, Terminated, ZooError
from zoo.interrupt import Interruption, in_worker
from zoo.loading import loaded
from zoo.log import Log
from zoo.recipe import load_recipe
from zoo.registry import make
from zoo.train import train

TINY = {
    "name": "notellm2",
    "backbone": {"name": "tiny_lm", "dim": 32, "layers": 1, "heads": 2, "vocab_size": 1024},
    "vision": {"name": "tiny_image", "dim": 32, "layers": 1, "heads": 2, "image_size": 16},
    "connector": {"name": "qformer", "num_queries": 2, "layers": 1, "hidden": 32, "heads": 2, "ffn": 32},  # has dropout
    "dim": 16,
    "language": "en",
    "train_vision": True,
}
DATA = {"name": "planted_notes", "notes": 160, "users": 1000, "image_size": 16, "mine": {"top": 1}}
LORA = [{"on": "backbone", "rank": 2}]


@pytest.fixture(scope="module")
def data():
    return make("data", DATA)


@pytest.fixture
def recipe(tmp_path):
    def of(out="run", **overrides):
        run = {"steps": 5, "batch_size": 20, "device": "cpu", "log_every": 1}
        return load_recipe({"model": TINY, "data": DATA, "objective": "pair_infonce", "run": run, "out": str(tmp_path / out)}, **overrides)

    return of


def steps(folder):
    return [json.loads((path / "manifest.json").read_text())["position"]["step"] for path in checkpoints(folder / "checkpoints")]


@pytest.fixture
def at_step(monkeypatch):
    """Do something when a step has been logged, before the run looks whether to save."""

    def then(step, do):
        write = Log.write

        def written(self, position, values):
            write(self, position, values)
            if position.step == step:
                do()

        monkeypatch.setattr(Log, "write", written)

    return then


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


# Asked to stop


@pytest.mark.parametrize(
    "number, raised, overrides",
    [
        pytest.param(signal.SIGINT, KeyboardInterrupt, {}, id="ctrl-c"),
        pytest.param(signal.SIGTERM, Terminated, {}, id="plain"),
        pytest.param(signal.SIGTERM, Terminated, {"run__workers": 1, "run__gradcache": 7}, id="workers and gradcache"),
        pytest.param(signal.SIGTERM, Terminated, {"adapters": LORA}, id="lora"),
    ],
)
def test_a_signal_saves_and_the_run_goes_on_as_if_it_had_not_come(recipe, data, at_step, monkeypatch, number, raised, overrides):
    train(recipe("whole", **overrides), loaded=data)
    settings = recipe("parts", **overrides)
    at_step(3, lambda: signal.raise_signal(number))
    with pytest.raises(raised, match=r"stopped and saved after step 3; run the same command again"):
        train(settings, loaded=data)
    assert steps(settings.out) == [3]
    assert not (settings.out / "model.json").exists()
    monkeypatch.undo()
    train(settings, loaded=data)
    assert_same(recipe("whole").out, settings.out)


@pytest.mark.parametrize("number, raised", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_a_signal_in_the_last_step_stops_what_comes_after_the_training(recipe, data, at_step, number, raised):
    at_step(5, lambda: signal.raise_signal(number))
    says = rf"^stopped after the last step, with the model in {recipe().out}; run the same command again to go on from there$"
    with pytest.raises(raised, match=says):
        train(recipe(), loaded=data)
    assert (recipe().out / "model.json").is_file()
    train(recipe(), loaded=data)


def test_a_second_ctrl_c_stops_at_once(recipe, data, at_step):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    at_step(3, twice)
    with pytest.raises(KeyboardInterrupt):
        train(recipe(), loaded=data)
    assert steps(recipe().out) == []


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Interruption() as interruption:
        signal.raise_signal(signal.SIGTERM)
        assert interruption.signal == signal.SIGTERM
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_in_another_thread_signals_are_left_alone(recipe, data):
    found = []
    thread = threading.Thread(target=lambda: found.append(train(recipe(), loaded=data)))
    thread.start()
    thread.join()
    assert found[0].trained


def test_workers_leave_signals_to_the_run():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        in_worker(0)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# Saved by the clock


def test_saves_every_so_many_minutes(recipe, data, monkeypatch):
    clock = iter(range(0, 10**6, 50))  # seconds: each look takes 50
    monkeypatch.setattr(saver.time, "monotonic", lambda: next(clock))
    train(recipe(run__save_minutes=1.5, run__keep=9), loaded=data)
    assert steps(recipe().out) == [2, 4, 5]


def test_minutes_may_differ_when_a_run_is_resumed(recipe, data, at_step, monkeypatch):
    at_step(3, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Terminated):
        train(recipe(), loaded=data)
    monkeypatch.undo()
    train(recipe(run__save_minutes=5, run__save_every=2), loaded=data)


# A full disk


@pytest.mark.parametrize(
    "library, error",
    [
        ("save_file", OSError(errno.ENOSPC, "No space left on device")),
        ("save_file", SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")),
        ("torch.save", RuntimeError("PytorchStreamWriter failed writing file data.pkl: file write failed")),
    ],
)
def test_a_full_disk_leaves_no_half_a_checkpoint(recipe, data, monkeypatch, library, error):
    def full(*_):
        raise error

    owner = torch if library == "torch.save" else checkpoint
    monkeypatch.setattr(owner, library.rpartition(".")[2], full)
    settings = recipe(run__save_every=2)
    with pytest.raises(
        Failure, match=r"checkpoint .*step_00000002 could not be written \(.*\); there is no earlier one; the disk has .* GiB left"
    ):
        train(settings, loaded=data)
    assert list((settings.out / "checkpoints").iterdir()) == []


def test_a_disk_that_fills_up_later(recipe, data, monkeypatch):
    settings, write = recipe(run__save_every=2), checkpoint.save_file

    def full(state, path):
        if "step_00000004" in str(path):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(state, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(Failure, match=r"step_00000002 stands, so the same command goes on from there; the disk has .* GiB left: make room"):
        train(settings, loaded=data)
    assert [p.name for p in (settings.out / "checkpoints").iterdir()] == ["step_00000002"]
    monkeypatch.undo()
    train(settings, loaded=data)
    train(recipe("whole", run__save_every=2), loaded=data)
    assert_same(recipe("whole").out, settings.out)


# Workers


@pytest.fixture
def trained_on(recipe, data, monkeypatch):
    """Train with a worker in which something is done with each row that it reads."""

    def go(do):
        begin = Kept.__init__
        monkeypatch.setattr(Kept, "__init__", lambda self, rows, process, keep: begin(self, rows, lambda row: process(do(row)), keep))
        train(recipe(run__workers=1), loaded=data)

    return go


def test_a_worker_that_is_killed(trained_on):
    with pytest.raises(Failure, match=r"a process that loads data ended by itself \(.*\): most often the machine has run out of memory"):
        trained_on(lambda row: os.kill(os.getpid(), signal.SIGKILL))


class Deadly(Dataset):
    """Whoever reads its last row is killed."""

    def __getitem__(self, item):
        if item == 3:
            time.sleep(0.5)  # until what came before is sent
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    def __len__(self):
        return 4


def test_of_a_dead_worker_nothing_is_said_until_a_batch_is_asked_for(monkeypatch):
    """Torch would raise for it wherever the program then is, and again when another process ends."""
    monkeypatch.setattr("torch.utils.data._utils.signal_handling._SIGCHLD_handler_set", False)  # a loader of an earlier test
    given = signal.getsignal(signal.SIGCHLD)
    try:
        others = multiprocessing.active_children()  # of earlier tests
        batches = loaded(DataLoader(Deadly(), batch_size=None, num_workers=1, prefetch_factor=4))
        assert int(next(batches)) == 0
        (worker,) = set(multiprocessing.active_children()) - set(others)
        worker.join()
        subprocess.run([sys.executable, "-c", ""], check=True)
        assert signal.getsignal(signal.SIGCHLD) == given
        with pytest.raises(Failure, match="a process that loads data ended by itself"):
            list(batches)
        subprocess.run([sys.executable, "-c", ""], check=True)
    finally:
        signal.signal(signal.SIGCHLD, given)


@pytest.mark.parametrize("error", [ZooError, Failure])
def test_what_a_worker_says_is_told_without_its_traceback(trained_on, error):
    def broken(row):
        raise error("this image cannot be decoded")

    with pytest.raises(error, match=r"^(row \d+: )?this image cannot be decoded$"):
        trained_on(broken)


def test_an_image_of_huge_dimensions(trained_on):
    file = io.BytesIO()
    Image.new("1", (20000, 20000)).save(file, "PNG")  # 50 kB that would be 1.2 GB of pixels
    with pytest.raises(ZooError, match=r"more than 67108864 pixels: make the image smaller"):
        trained_on(lambda row: {**row, "image": file.getvalue()})
