"""An epoch in length buckets beside one of plain random batches, on texts of uneven lengths. Target: 1.3 times the rate.

``pytest benchmarks/bench_buckets.py``.
"""

import csv
import time

import numpy as np
import pytest
import torch

from benchmarks.beside import beside, keep
from zoo.checkpoint import Position
from zoo.optimizer import make_optimizer
from zoo.recipe import load_recipe
from zoo.registry import make
from zoo.train import make_accelerator, make_order, make_step, stream
from zoo.update import Updater

NOTES = 512
RECIPE = {
    "model": {"name": "notellm2", "backbone": "tiny_lm", "fusion": "text_only", "max_tokens": 512, "content_length": 4000},
    "data": {"name": "notes", "folder": "uneven"},
    "objective": "pair_infonce",
    "run": {"batch_size": 16, "steps": 1, "device": "cpu"},
}


def write_notes(folder):
    """Notes whose lengths spread as those of real ones do, every two of them a pair of like length, and no more."""
    draw = np.random.default_rng(0)
    words = [f"word{i}" for i in range(2000)]
    lengths = np.clip(draw.lognormal(3.5, 0.9, NOTES // 2), 2, 400).astype(int).repeat(2)
    folder.mkdir()
    tables: dict[str, list[tuple]] = {
        "notes": [("note_id", "title", "content"), *((i, f"note {i}", " ".join(draw.choice(words, n))) for i, n in enumerate(lengths))],
        "pairs": [("note_a", "note_b", "split"), *((i, i + 1, "train") for i in range(0, NOTES, 2))],
        "clicks": [("user_id", "note_id", "timestamp", "split"), *((i // 2, i, i, "train") for i in range(NOTES))],
    }
    for name, rows in tables.items():
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)


def make_epoch(root, buckets):
    """A call that trains an epoch, and gives how many tokens the batches held, padding included."""
    recipe = load_recipe(RECIPE, run__buckets=buckets)
    data, accelerator = make("data", recipe.data, root), make_accelerator(recipe)
    step = make_step(recipe)
    wrapped, optimizer = accelerator.prepare(step, make_optimizer(step, recipe.optimizer))
    update, order = Updater(accelerator, wrapped, step, optimizer, recipe), make_order(recipe, data, accelerator)

    def epoch():
        tokens = 0

        def counted(batches):
            nonlocal tokens
            for batch in batches:
                tokens += batch.inputs["text"].values.numel()
                yield batch

        position = Position()
        batches = counted(stream(recipe, data, step, order, position, accelerator))
        for _ in range(len(order)):
            update(batches, position)
        return tokens

    return epoch


@pytest.mark.benchmark(timer=time.process_time, group="an epoch of uneven texts")
def test_buckets(benchmark, tmp_path):
    """The same pairs in both, once each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    write_notes(tmp_path / "uneven")
    bucketed, padded = (make_epoch(tmp_path, buckets) for buckets in (True, False))
    tokens = {"tokens_bucketed": bucketed(), "tokens_padded": padded()}
    found = beside(benchmark, bucketed, padded, rounds=3)
    keep(benchmark, "length buckets", found, target=1.3, packages=("torch",), pairs=NOTES // 2, **tokens)
    torch.set_num_threads(threads)
