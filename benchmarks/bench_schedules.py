"""A batch under each schedule beside one of joint training, and what MLA's projection of the head adds: at most 5 % is the target.

``pytest benchmarks/bench_schedules.py``.
"""

import time
from functools import partial
from itertools import repeat
from unittest.mock import patch

import pytest
import torch

from benchmarks.beside import beside, keep
from zoo.checkpoint import Position
from zoo.fusions.mla import Mla
from zoo.optimizer import make_optimizer
from zoo.recipe import load_recipe
from zoo.train import make_accelerator, make_step
from zoo.types import Batch, ModalityInputs
from zoo.update import Updater

ROWS, CLASSES, STEPS = 32, 101, 4
SCHEDULES = {  # those that read logits of each modality stand beside a joint training that has them too
    "mla": ({"name": "mla", "remember": None}, "late"),
    "joint_aux": (["late", "joint_aux"], "late"),
    "ume": ("ume", "late"),
    "ogm_ge": ("ogm_ge", "late"),
    "pmr": (["late", "pmr"], "late"),
    "mmpareto": (["late", "mmpareto"], "late"),
    "modality_dropout": (["late", "modality_dropout"], "late"),
}


def share_of_projection(steps):
    """Of the CPU time of ``steps`` what MLA spends behind each step of the head: less than the spread of two runs side by side."""
    spent, project = 0.0, Mla.after_step

    def timed(*given):
        nonlocal spent
        start = time.process_time()
        project(*given)
        spent += time.process_time() - start

    with patch.object(Mla, "after_step", timed):
        start = time.process_time()
        steps()
        return spent / (time.process_time() - start)


def make_steps(fusion, encoder, size):
    """A call that makes a few updates of a classifier of two encoders, on tensors that are there already."""
    torch.manual_seed(0)
    recipe = load_recipe(
        {
            "model": {"name": "classifier", "classes": CLASSES, "encoders": {"left": encoder, "right": encoder}, "fusion": fusion},
            "data": "av_digits",
            "objective": "cross_entropy",
            "optimizer": {"name": "sgd"},
            "run": {"device": "cpu", "steps": 1},
        }
    )
    accelerator, step = make_accelerator(recipe), make_step(recipe)
    wrapped, optimizer = accelerator.prepare(step.train(), make_optimizer(step, recipe.optimizer))
    update = Updater(accelerator, wrapped, step, optimizer, recipe)
    inputs = {name: ModalityInputs(torch.randn(ROWS, 3, size, size)) for name in ("left", "right")}
    batches = repeat(Batch(inputs, targets=torch.arange(ROWS) % CLASSES, ids=torch.arange(ROWS)))

    def steps():
        for _ in range(STEPS):
            update(batches, Position())

    steps()
    return steps


@pytest.mark.benchmark(timer=time.process_time, group="a batch under a schedule")
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule(benchmark, name):
    """The same batch; the encoders have the size of the recipes on digits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    make = partial(make_steps, encoder={"name": "image_resnet", "arch": "tiny", "width": 8}, size=28)
    schedule, joint = SCHEDULES[name]
    found = beside(benchmark, make(schedule), make(joint), rounds=7)
    torch.set_num_threads(threads)
    keep(benchmark, f"a batch under {name}, of joint training", found, target=None, packages=("torch",))


@pytest.mark.benchmark(timer=time.process_time, group="projection of the head's step")
def test_projection(benchmark):
    """MLA with and without it, at the head width of the papers' transformers; the encoders are two blocks deep in the place of twelve."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    make = partial(make_steps, encoder={"name": "tiny_image", "dim": 768, "layers": 2, "heads": 12, "image_size": 32}, size=32)
    steps = make("mla")
    found = beside(benchmark, steps, make({"name": "mla", "remember": None}), rounds=7)
    share = share_of_projection(steps)
    torch.set_num_threads(threads)
    keep(benchmark, "projection of the head's step at width 768", found, target=1 / 1.05, packages=("torch",), share_of_a_step=share)
