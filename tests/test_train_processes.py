"""Training as processes of its own: killed without warning, and two at a time."""

import hashlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from zoo.errors import ZooError
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
        "train_vision": True,
    },
    "data": {"name": "planted_notes", "notes": 160, "users": 1000, "image_size": 16, "mine": {"top": 1}},
    "objective": "pair_infonce",
    "run": {"steps": 40, "batch_size": 10, "device": "cpu", "save_every": 1, "log_every": 1, "threads": 1},
}


def start(folder, *arguments, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    with (folder / f"error{environment.get('RANK', '')}.txt").open("ab") as error:
        return subprocess.Popen([sys.executable, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=error, env=environment)


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


def test_killed_at_any_moment(tmp_path):
    recipe, out = written(tmp_path, "whole")
    assert start(tmp_path, "-m", "zoo", "train", recipe).wait(300) == 0, (tmp_path / "error.txt").read_text()
    recipe, parts = written(tmp_path, "parts")
    checkpoints, draw = parts / "checkpoints", random.Random(0)
    for _ in range(3):
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


def together(folder, recipe):
    """Weights that two processes end with."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    files = [folder / f"rank{rank}.pt" for rank in range(2)]
    processes = [
        start(folder, "-c", TOGETHER, recipe, file, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank, file in enumerate(files)
    ]
    try:
        for rank, process in enumerate(processes):
            assert process.wait(300) == 0, (folder / f"error{rank}.txt").read_text()
    finally:
        for process in processes:
            process.kill()
            process.wait(60)
    return [torch.load(file, weights_only=True) for file in files]


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
