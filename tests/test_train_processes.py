"""Training as processes of its own: killed without warning, and two at a time."""

import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from itertools import islice, permutations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from zoo.errors import ZooError
from zoo.files import write_text
from zoo.recipe import dump, load_recipe
from zoo.registry import make
from zoo.sampler import BatchOrder

pytestmark = pytest.mark.slow
RECIPE = {
    "model": {
        "name": "notellm2",
        "backbone": {"name": "tiny_lm", "dim": 32, "layers": 1, "heads": 2, "vocab_size": 1024},
        "vision": {"name": "tiny_image", "dim": 32, "layers": 1, "heads": 2, "image_size": 16},
        "connector": {"name": "qformer", "num_queries": 2, "layers": 1, "hidden": 32, "heads": 2, "ffn": 32},  # has dropout
        "dim": 16,
        "train_vision": True,
    },
    "data": {"name": "planted_notes", "notes": 160, "users": 1000, "image_size": 16, "mine": {"top": 1}},
    "objective": "pair_infonce",
    "run": {"steps": 40, "batch_size": 10, "device": "cpu", "save_every": 1, "log_every": 1, "threads": 1},
}


def start(folder, *arguments, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    with (folder / f"error{environment.get('RANK', '')}.txt").open("ab") as error:
        return subprocess.Popen(
            [sys.executable, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=error, env=environment, start_new_session=True
        )


def written(folder, out, **overrides):
    recipe = load_recipe(RECIPE, out=str(folder / out), **overrides)
    return write_text(folder / f"{out}.yaml", dump(recipe)), folder / out


def whole(checkpoint):
    """Every file is there, and is what the manifest says."""
    hashes = json.loads((checkpoint / "manifest.json").read_text())["sha256"]
    return len(hashes) == 2 and all(hashlib.sha256((checkpoint / n).read_bytes()).hexdigest() == h for n, h in hashes.items())


def watched(process, checkpoints, until):
    """Look on until a moment; what goes by the name of a checkpoint has all three files, or is gone while one looks."""
    while process.poll() is None and not until():
        for found in checkpoints.glob("step_*"):
            seen = sum((found / name).exists() for name in ("manifest.json", "step.safetensors", "training.pt"))
            assert seen == 3 or not found.exists()
        time.sleep(0.001)


EVERYTHING = {"run__workers": 1, "run__gradcache": 6, "adapters": [{"on": "backbone", "rank": 2}]}


@pytest.mark.parametrize("times, overrides", [(10, {}), (3, EVERYTHING)], ids=["plain", "workers, gradcache and lora"])
def test_killed_at_any_moment(tmp_path, times, overrides):
    recipe, out = written(tmp_path, "whole", **overrides)
    assert start(tmp_path, "-m", "zoo", "train", recipe).wait(300) == 0, (tmp_path / "error.txt").read_text()
    recipe, parts = written(tmp_path, "parts", **overrides)
    checkpoints, draw = parts / "checkpoints", random.Random(0)
    for _ in range(times):
        before = {p.name for p in checkpoints.glob("step_*")}
        process = start(tmp_path, "-m", "zoo", "train", recipe)
        try:
            watched(process, checkpoints, lambda before=before: {p.name for p in checkpoints.glob("step_*")} - before)
            moment = time.monotonic() + draw.uniform(0.0, 0.3)
            watched(process, checkpoints, lambda moment=moment: time.monotonic() > moment)
            assert process.poll() is None, (tmp_path / "error.txt").read_text()
        finally:
            process.kill()
            process.wait(60)
        found = sorted(checkpoints.glob("step_*"))
        assert found
        assert all(whole(p) for p in found)
        assert not (parts / "model.json").exists()
    assert start(tmp_path, "-m", "zoo", "train", recipe).wait(300) == 0, (tmp_path / "error.txt").read_text()
    one, other = (load_file(folder / "model.safetensors") for folder in (out, parts))
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert [json.loads(line)["step"] for line in (parts / "log.jsonl").read_text().splitlines()] == list(range(1, 41))
    assert [p.name for p in sorted(checkpoints.iterdir())] == ["step_00000039", "step_00000040"]


TOGETHER = """
import sys, torch
from zoo.train import train
torch.save(train(sys.argv[1]).state_dict(), sys.argv[2])
"""


def launched(folder, recipe, count):
    """Processes that train together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    return [
        start(folder, "-c", TOGETHER, recipe, folder / f"rank{rank}.pt", RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank in range(count)
    ]


def together(folder, recipe, count=2):
    """Weights that several processes end with."""
    processes = launched(folder, recipe, count)
    try:
        for rank, process in enumerate(processes):
            assert process.wait(300) == 0, (folder / f"error{rank}.txt").read_text()
    finally:
        for process in processes:
            process.kill()
            process.wait(60)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(count)]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_two_processes_agree_and_go_on(tmp_path):
    recipe, out = written(tmp_path, "run", run__steps=3)
    first, second = together(tmp_path, recipe)
    assert same(first, second)
    assert same(first, load_file(out / "model.safetensors"))
    manifest = json.loads((out / "checkpoints/step_00000003/manifest.json").read_text())
    assert manifest["identity"]["processes"] == 2
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()] == [1, 2, 3]

    shutil.rmtree(out / "checkpoints/step_00000003")  # the last step is done again, each process drawing what it drew
    again, _ = together(tmp_path, recipe)
    assert same(first, again)

    from zoo.train import train

    with pytest.raises(ZooError, match="processes: 2 there, 1 here"):
        train(load_recipe(out / "recipe.yaml"))


# One process against several

ALONE = """
import sys, torch
from zoo.distributed import whole
from zoo.train import train
model = train(sys.argv[1])
vectors = model.encode([{"title": "a lamp", "content": "green"}, {"title": "b"}])  # all processes together, where weights are spread
torch.save(whole(model.state_dict()) | {"vectors": torch.from_numpy(vectors)}, sys.argv[2])
"""


def alone(folder, recipe):
    assert start(folder, "-c", ALONE, recipe, folder / "alone.pt").wait(300) == 0, (folder / "error.txt").read_text()
    return torch.load(folder / "alone.pt", weights_only=True)


def met_across(recipe, processes):
    """How many pairs of rows of different processes, which would be negatives, are known in the first batches."""
    pairs = make("data", recipe.data).pairs("train")
    known = {frozenset(pair) for pair in pairs.tolist()}
    order = BatchOrder(np.zeros(len(pairs)), recipe.run.batch_size // processes, seed=recipe.seed, buckets=False, processes=processes)
    batches = islice(order.epoch(0), recipe.run.steps)
    return sum(
        {q, t} in known for shares in batches for one, other in permutations(pairs[shares], 2) for q in one[:, 0] for t in other[:, 1]
    )


@pytest.mark.parametrize(
    "processes, overrides",
    [
        pytest.param(2, {}, id="plain"),
        pytest.param(4, {}, id="four"),
        pytest.param(2, {"objective": "infonce", "run__workers": 1}, id="infonce, workers"),
        pytest.param(4, {"objective": "infonce"}, id="infonce, four"),
        pytest.param(2, {"run__gradcache": 3}, id="gradcache"),
        pytest.param(2, {"run__shard": True}, id="shard"),
        pytest.param(2, {"run__shard": True, "run__gradcache": 3}, id="shard and gradcache"),
    ],
)
def test_several_processes_train_as_one_with_all_rows(tmp_path, monkeypatch, processes, overrides):
    """Where known pairs meet across processes; also the vectors that a model with spread weights gives, and the folder that it leaves.

    Clipping, like Adam, takes a common factor out of all gradients: without it their norm tells whether they are averaged or summed.
    """
    monkeypatch.setattr(sys.modules[__name__], "TOGETHER", ALONE)
    settings = {"model__connector": "linear", "run__steps": 3, "run__buckets": False, "optimizer__eps": 1e-3}  # eps: Adam blows up rounding
    settings |= {"data": {**RECIPE["data"], "mine": {"top": 3}}, "objective": overrides.get("objective", "pair_infonce")}
    settings["optimizer__max_grad_norm"] = 0
    recipe, base = written(tmp_path, "one", **settings, run__batch_size=12)
    assert met_across(load_recipe(recipe), processes)
    one = alone(tmp_path, recipe)
    recipe, out = written(tmp_path, "several", **settings | overrides, run__batch_size=12 // processes)
    first, *others = together(tmp_path, recipe, processes)
    assert all(same(first, other) for other in others)
    for name, value in one.items():
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")  # float32
    left = load_file(out / "model.safetensors")
    assert all(torch.equal(left[name], first[name]) for name in left)
    norms, expected = ([json.loads(line)["grad_norm"] for line in (f / "log.jsonl").read_text().splitlines()] for f in (out, base))
    assert norms == pytest.approx(expected, rel=1e-4)
    assert min(norms) > 1.0  # clipping would have hidden a factor


POISONED = """
import os, sys
from zoo.objectives.pair_infonce import PairInfonce
from zoo.train import train
forward, calls = PairInfonce.forward, []
def poisoned(self, model, batch):
    loss = forward(self, model, batch)
    calls.append(1)
    return loss._replace(total=loss.total * float("nan")) if len(calls) == 3 and os.environ["RANK"] == "1" else loss
PairInfonce.forward = poisoned
train(sys.argv[1])
"""


@pytest.mark.parametrize("overrides", [{}, {"run__shard": True}], ids=["plain", "shard"])
def test_a_loss_of_one_process_that_is_none_stops_and_saves_all(tmp_path, monkeypatch, overrides):
    monkeypatch.setattr(sys.modules[__name__], "TOGETHER", POISONED)
    recipe, out = written(tmp_path, "run", run__steps=5, run__save_every=0, **overrides)
    processes = launched(tmp_path, recipe, 2)
    try:
        for rank, process in enumerate(processes):
            assert process.wait(120) == 1
            assert "Diverged: the loss is nan in step 3" in (tmp_path / f"error{rank}.txt").read_text()
    finally:
        for process in processes:
            process.kill()
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step_00000002"]


def test_a_sharded_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "TOGETHER", ALONE)
    recipe, out = written(tmp_path, "run", run__steps=3, run__shard=True)
    first, _ = together(tmp_path, recipe)
    shutil.rmtree(out / "checkpoints/step_00000003")
    again, _ = together(tmp_path, recipe)
    assert same(first, again)
    assert "returned a view tensor" not in (tmp_path / "error0.txt").read_text()


def test_shard_needs_company(tmp_path):
    from zoo.train import train

    with pytest.raises(ZooError, match=r"run\.shard: one process has nobody to share with"):
        train(load_recipe(written(tmp_path, "run", run__shard=True)[0]))


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
@pytest.mark.parametrize("to", [os.kill, os.killpg], ids=["alone", "with its workers"])
def test_a_signal_ends_the_command_with_its_code(tmp_path, number, code, to):
    recipe, out = written(tmp_path, "run", run__steps=100000, run__workers=1, run__save_every=0)
    process = start(tmp_path, "-m", "zoo", "train", recipe)
    try:
        watched(process, out / "checkpoints", lambda: (out / "log.jsonl").is_file() and (out / "log.jsonl").stat().st_size)
        to(process.pid, number)
        assert process.wait(60) == code, (tmp_path / "error.txt").read_text()
    finally:
        process.kill()
    error = (tmp_path / "error.txt").read_text()
    assert "stopped and saved after step" in error
    assert "Traceback" not in error
    assert len(list((out / "checkpoints").glob("step_*"))) == 1


def test_a_signal_to_one_process_stops_and_saves_all(tmp_path):
    recipe, out = written(tmp_path, "run", run__steps=100000, run__save_every=0)
    processes = launched(tmp_path, recipe, 2)
    try:
        watched(processes[0], out / "checkpoints", lambda: (out / "log.jsonl").is_file() and (out / "log.jsonl").stat().st_size)
        processes[1].send_signal(signal.SIGTERM)
        for rank, process in enumerate(processes):
            assert process.wait(60) == 1, (tmp_path / f"error{rank}.txt").read_text()  # python: an exception that nobody caught
            assert "Terminated: stopped and saved after step" in (tmp_path / f"error{rank}.txt").read_text()
    finally:
        for process in processes:
            process.kill()
    assert len(list((out / "checkpoints").glob("step_*"))) == 1
