"""An epoch of training with and without the feature cache, in one run: `pytest benchmarks/bench_training.py`."""

import time

import pytest
import torch

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


@pytest.mark.benchmark(timer=time.process_time if DEVICE == "cpu" else time.perf_counter, group="an epoch, frozen ViT-B/16")
@pytest.mark.parametrize("cached", [False, True], ids=["encoded", "cached"])
def test_epoch(benchmark, tmp_path, cached):
    """The second epoch and every later one; what the cache takes to fill, once, is kept beside as ``fill_seconds``."""
    recipe = load_recipe(RECIPE, **({"run__feature_cache": str(tmp_path)} if cached else {}))
    data, accelerator = make("data", recipe.data), make_accelerator(recipe)
    step = make_step(recipe).to(accelerator.device)
    wrapped, optimizer = accelerator.prepare(step, make_optimizer(step, recipe.optimizer))
    update, position = Updater(accelerator, wrapped, step, optimizer, recipe), Position()
    order = make_order(recipe, data, accelerator)
    wrapped.train()
    began = time.perf_counter()
    with feature_cache(recipe, data, step.model, accelerator) as seen:
        filled = time.perf_counter() - began
        batches = stream(recipe, seen, step, order, position, accelerator)

        def epoch():
            for _ in range(len(order)):
                update(batches, position)
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(epoch, rounds=1, warmup_rounds=int(cached))  # the first epoch also checks what it reads
    files = sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    benchmark.extra_info |= {"pairs": len(order) * recipe.run.batch_size, "fill_seconds": filled, "bytes": files}
