"""The feature cache among processes: one fills it while the others wait, and one that is killed leaves it to the next."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from zoo.files import write_text
from zoo.recipe import dump, load_recipe

pytestmark = pytest.mark.slow
RECIPE = {
    "model": {
        "name": "notellm2",
        "backbone": {"name": "tiny_lm", "dim": 32, "layers": 1, "heads": 2, "vocab_size": 1024},
        "vision": {"name": "tiny_image", "dim": 32, "layers": 1, "heads": 2, "image_size": 16},
        "connector": {"name": "qformer", "num_queries": 2, "layers": 1, "hidden": 32, "heads": 2, "ffn": 32},  # has dropout
        "dim": 16,
    },
    "data": {"name": "planted_notes", "notes": 160, "users": 1000, "image_size": 16, "mine": {"top": 1}},
    "objective": "pair_infonce",
    "run": {"steps": 6, "batch_size": 10, "device": "cpu", "log_every": 1, "threads": 1},
}
TRAIN = """
import logging, sys
logging.basicConfig(level=logging.INFO)
from zoo import feature_cache
from zoo.train import train
feature_cache.FLUSH_SECONDS = 0.0
if len(sys.argv) > 2:
    import time
    from zoo.columns import Writer
    flush = Writer.flush
    Writer.flush = lambda self: (flush(self), time.sleep(float(sys.argv[2])))
train(sys.argv[1])
"""


def start(log, *arguments, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    with log.open("w") as file:
        return subprocess.Popen([sys.executable, "-c", TRAIN, *map(str, arguments)], stdout=file, stderr=file, env=environment)


def ended(processes, logs):
    try:
        for process, log in zip(processes, logs, strict=True):
            assert process.wait(300) == 0, log.read_text()
    finally:
        for process in processes:
            process.kill()
            process.wait(60)
    return [log.read_text() for log in logs]


def together(folder, recipe):
    """What two processes of one run said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    logs = [folder / f"rank{rank}.txt" for rank in range(2)]
    return ended([start(log, recipe, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank, log in enumerate(logs)], logs)


def written(folder, out, **overrides):
    recipe = load_recipe(RECIPE, out=str(folder / out), **overrides)
    return write_text(folder / f"{out}.yaml", dump(recipe)), folder / out


def left(out):
    losses = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (out / "log.jsonl").read_text().splitlines()]
    return losses, load_file(out / "model.safetensors")


def assert_same(one, other):
    (losses, weights), (losses_, weights_) = left(one), left(other)
    assert losses == losses_
    assert [k for k in weights if not torch.equal(weights[k], weights_[k])] == []


def test_of_two_processes_one_fills_it(tmp_path):
    recipe, plain = written(tmp_path, "plain")
    together(tmp_path, recipe)
    recipe, cached = written(tmp_path, "cached", run__feature_cache=str(tmp_path / "cache"))
    said = together(tmp_path, recipe)
    assert sum("making the feature cache" in text for text in said) == 1
    assert all("are read from" in text for text in said)
    assert_same(plain, cached)


def test_a_killed_build_is_gone_on_from_and_two_runs_share_it(tmp_path):
    cache = tmp_path / "cache"
    recipe, out = written(tmp_path, "killed", run__feature_cache=str(cache))
    log = tmp_path / "killed.txt"
    process = start(log, recipe, 0.3)
    try:
        deadline = time.monotonic() + 120
        while not list(cache.glob(".*.part/progress.json")):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait(60)
    assert [path.name for path in cache.iterdir() if not path.name.startswith(".")] == []

    other, other_out = written(tmp_path, "other", run__feature_cache=str(cache))
    logs = [tmp_path / "one.txt", tmp_path / "other.txt"]
    said = ended([start(log, path) for log, path in zip(logs, (recipe, other), strict=True)], logs)
    assert sum(", of which " in text and "are there" in text for text in said) == 1
    assert len([path for path in cache.iterdir() if not path.name.startswith(".")]) == 1
    recipe, plain = written(tmp_path, "plain")
    ended([start(log, recipe)], [log])
    assert_same(plain, out)
    assert_same(plain, other_out)
