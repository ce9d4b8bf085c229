"""NoteLLM-2 trained for a few steps: how its loss is computed does not show in the curve."""

import json
import os
import subprocess
import sys

import pytest

from zoo.errors import ZooError
from zoo.files import write_text
from zoo.recipe import dump, load_recipe
from zoo.registry import make
from zoo.train import train

DATA = {"name": "planted_notes", "notes": 160, "users": 1000, "image_size": 16, "mine": {"top": 1}}
RECIPE = {
    "model": {
        "name": "notellm2",
        "backbone": {"name": "tiny_lm", "dim": 32, "layers": 1, "heads": 2, "vocab_size": 1024},
        "vision": {"name": "tiny_image", "dim": 32, "layers": 1, "heads": 2, "image_size": 16},
        "connector": "linear",
        "dim": 16,
        "train_vision": True,
    },
    "data": DATA,
    "optimizer": {"lr": 1e-3},
    "run": {"steps": 6, "batch_size": 10, "device": "cpu", "log_every": 1, "threads": 1},
}
# Sums of a few dozen float32 terms in another order differ by 2^-23 of them or so; Adam divides a gradient by its own size, so that
# an element near 0 steps another way. Seen: 4e-7 of the loss after 6 steps, 2e-6 after 12 of thrice the rate.
CLOSE = {"rel": 1e-5}


def recipe(out, impl, objective="pair_infonce"):
    return load_recipe({**RECIPE, "objective": {"name": objective, "impl": impl}, "out": str(out)})


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def data():
    return make("data", DATA)


@pytest.fixture(scope="module")
def dense(data, tmp_path_factory):
    """The curve of the loss that holds all logits."""
    out = tmp_path_factory.mktemp("dense")
    train(recipe(out, "reference"), loaded=data)
    return losses(out)


def test_the_curve_feels_the_steps(dense, data, tmp_path):
    train(load_recipe(recipe(tmp_path, "reference"), optimizer__lr=1e-5), loaded=data)
    assert len(dense) == 6
    assert losses(tmp_path)[1:] != pytest.approx(dense[1:], rel=1e-3)


@pytest.mark.parametrize("impl", ["chunked", "auto"])
def test_block_by_block(impl, dense, data, tmp_path):
    train(recipe(tmp_path, impl), loaded=data)
    assert losses(tmp_path) == pytest.approx(dense, **CLOSE)


@pytest.mark.slow
def test_in_triton(dense, tmp_path):
    """In the interpreter, in a process of its own."""
    pytest.importorskip("triton")
    file = write_text(tmp_path / "recipe.yaml", dump(recipe(tmp_path / "run", "triton")))
    command = [sys.executable, "-m", "zoo", "train", str(file)]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == pytest.approx(dense, **CLOSE)


@pytest.mark.parametrize("objective", ["pair_infonce", "infonce", "siglip"])
def test_what_cannot_run_here_is_said(objective, data, tmp_path):
    with pytest.raises(ZooError, match=rf"{objective}: impl='triton' needs a CUDA device of capability 8\.0 .* write impl='chunked'"):
        train(load_recipe(recipe(tmp_path, "triton", objective), model__fusion="early"), loaded=data)


def test_what_is_no_choice_is_said(tmp_path):
    with pytest.raises(ZooError, match=r"objective\.impl: .*'reference', 'chunked'"):
        recipe(tmp_path, "fused")
