"""An epoch of training with and without the feature cache, in one run: `pytest benchmarks/bench_training.py`."""

import time
from contextlib import ExitStack

import pytest
import torch

from benchmarks.beside import beside, keep
from zoo.checkpoint import Position
from zoo.feature_cache import feature_cache
from zoo.optimizer import make_optimizer
from zoo.recipe import load_recipe
from zoo.registry import make
from zoo.train import make_accelerator, make_order, make_step, stream
from zoo.update import Updater

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RECIPE = {
    "model": {
        "name": "notellm2",
        "backbone": "tiny_lm",
        "vision": {"name": "timm", "arch": "vit_base_patch16_224"},  # random weights: they cost what others cost
        "connector": "qformer",
    },
    "data": {"name": "planted_notes", "notes": 100, "users": 600, "image_size": 64, "mine": {"top": 1}},
    "objective": "pair_infonce",
    "run": {"batch_size": 4, "device": DEVICE},
}


class Epochs:
    """Training that can be asked for one epoch more."""

    def __init__(self, stack: ExitStack, **overrides: str) -> None:
        self.recipe = load_recipe(RECIPE, **overrides)
        data, accelerator = make("data", self.recipe.data), make_accelerator(self.recipe)
        step = make_step(self.recipe).to(accelerator.device)
        wrapped, optimizer = accelerator.prepare(step, make_optimizer(step, self.recipe.optimizer))
        self.update, self.position = Updater(accelerator, wrapped, step, optimizer, self.recipe), Position()
        self.order = make_order(self.recipe, data, accelerator)
        wrapped.train()
        began = time.perf_counter()
        seen = stack.enter_context(feature_cache(self.recipe, data, step.model, accelerator))
        self.filled = time.perf_counter() - began
        self.batches = stream(self.recipe, seen, step, self.order, self.position, accelerator)

    def __call__(self) -> None:
        for _ in range(len(self.order)):
            self.update(self.batches, self.position)
        if DEVICE == "cuda":
            torch.cuda.synchronize()


TIMER = time.process_time if DEVICE == "cpu" else time.perf_counter


@pytest.mark.benchmark(timer=TIMER, group="an epoch, frozen ViT-B/16")
def test_epoch(benchmark, tmp_path):
    """The second epoch and later ones; what the cache takes to fill, once, is kept beside as ``fill_seconds``."""
    with ExitStack() as stack:
        cached, encoded = Epochs(stack, run__feature_cache=str(tmp_path)), Epochs(stack)
        cached()  # the first epoch also checks what it reads
        found = beside(benchmark, cached, encoded, rounds=2, timer=TIMER)
    stored = sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    pairs = len(cached.order) * cached.recipe.run.batch_size
    keep(benchmark, "epoch, feature cache", found, target=3.0, packages=("timm",), pairs=pairs, fill_seconds=cached.filled, bytes=stored)
