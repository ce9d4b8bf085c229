"""What a training step of each model of pictures and captions costs beside one of CLIP, and a query beside the size of its pool.

``pytest benchmarks/bench_captioned.py``. The recipes are the tiny ones on emoji, in one thread.
"""

import re
import time
from collections import Counter
from itertools import repeat

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.beside import beside, keep
from zoo.checkpoint import Position
from zoo.collate import stack
from zoo.optimizer import make_optimizer
from zoo.recipe import load_recipe
from zoo.registry import build
from zoo.shapes import walk
from zoo.train import make_accelerator, make_step
from zoo.types import Batch, ModalityInputs
from zoo.update import Updater

ROWS, SHOWN, TOP = 64, 8, 16
BLOCK = re.compile(r"blocks\.\d+$")  # of zoo.trunk and of open_clip
MODELS = ("albef", "blip", "coca", "vlmo", "beit_3")
POOLS = (256, 1024, 4096)
WORDS = ["person", "face", "flag", "cat", "red", "smiling", "hand", "of", "with", "dark", "skin", "tone", "tree", "food"]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_rows(number):
    random = np.random.default_rng(0)
    pictures = [Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(SHOWN)]
    texts = [" ".join(random.choice(WORDS, 7)) for _ in range(number)]
    return [{"id": i, "image": pictures[i % SHOWN], "text": text} for i, text in enumerate(texts)]


def make_training(name):
    """A training step of the shipped recipe, the batch that it gets, and a call that makes an update."""
    torch.manual_seed(0)
    recipe = load_recipe(f"{name}/emoji_en", "run.device=cpu", "run.steps=1", f"run.batch_size={ROWS}")
    accelerator, step = make_accelerator(recipe), make_step(recipe)
    wrapped, optimizer = accelerator.prepare(step.train(), make_optimizer(step, recipe.optimizer))
    update = Updater(accelerator, wrapped, step, optimizer, recipe)
    batch = Batch(stack([step.model.processor(row) for row in make_rows(ROWS)]), ids=torch.arange(ROWS))
    update(repeat(batch), Position())
    return step, batch, lambda: update(repeat(batch), Position())


def count_passes(step, batch):
    """How often a row passes the picture tower, and all blocks of the other side, half of them counting half: in the model, in its twin."""
    twin = getattr(step.objective, "twin", None)
    rows: Counter[str] = Counter()

    def counting(name, share):
        def hook(module, given, out):
            rows[name] += share * len(given[0].values if isinstance(given[0], ModalityInputs) else given[0])

        return hook

    handles = []
    for whose, model in ({"": step.model} | ({} if twin is None else {" of the twin": twin.model})).items():
        blocks = [m for n, m in model.named_modules() if BLOCK.search(n) and not n.startswith("vision.")]
        handles.append(model.vision.register_forward_hook(counting(f"picture tower{whose}", 1)))
        handles += [block.register_forward_hook(counting(f"blocks{whose}", 1 / len(blocks))) for block in blocks]
    with torch.no_grad():
        step(batch)
    for handle in handles:
        handle.remove()
    return {name: round(count / ROWS, 3) for name, count in rows.items()}


@pytest.mark.benchmark(timer=time.process_time, group="a training step")
@pytest.mark.parametrize("name", MODELS)
def test_step(benchmark, name):
    """The same batch of 64 pairs, with forward, backward and update."""
    step, batch, ours = make_training(name)
    clip, clip_batch, theirs = make_training("clip")
    found = beside(benchmark, ours, theirs, rounds=7)
    kept, kept_of_clip = (walk(s, b, "no")[1].saved for s, b in ((step, batch), (clip, clip_batch)))
    keep(
        benchmark,
        f"a training step of {name}, of one of clip",
        found,
        target=None,
        packages=("torch",),
        activations=kept / kept_of_clip,
        parameters=sum(p.numel() for p in step.parameters()) / sum(p.numel() for p in clip.parameters()),
        passes=count_passes(step, batch),
        passes_of_clip=count_passes(clip, clip_batch),
    )


@pytest.mark.benchmark(timer=time.process_time, group="a query")
@pytest.mark.parametrize("pool", POOLS)
def test_query(benchmark, pool):
    """One picture that seeks its text: by vectors alone, with the first 16 read beside it, and with every text of the pool so read."""
    torch.manual_seed(0)
    model = build("albef", size="tiny").eval()
    inputs = stack([model.processor(row) for row in make_rows(pool)])
    with torch.no_grad():
        read = model.read(inputs["text"])
        held = model.hold(inputs["text"], read)
        vectors = torch.nn.functional.normalize(model.text_projection(read.pooled), dim=-1)
    query = torch.nn.functional.normalize(torch.randn(model.dim), dim=0)
    seen = model.look(inputs["image"].rows(slice(0, 1)))._replace(present=torch.ones(1, dtype=torch.bool))

    def matched(rows):
        with torch.no_grad():
            some = type(held)(held.tokens[rows], held.mask[rows], held.pooled, held.present[rows])
            n = len(rows)
            shown = type(seen)(seen.tokens.expand(n, -1, -1), seen.mask.expand(n, -1), seen.pooled, seen.present.expand(n))
            return model.match(some, shown)[:, 1]

    def by_vectors():
        return (vectors @ query).topk(TOP).indices

    def reranked():
        return matched(by_vectors()).argmax()

    def fused():
        return torch.cat([matched(torch.arange(start, min(start + 256, pool))) for start in range(0, pool, 256)]).argmax()

    seconds = {}
    for name, call in (("vectors", by_vectors), ("re-ranked", reranked), ("full fusion", fused)):
        call()
        took = []
        for _ in range(5):
            start = time.process_time()
            call()
            took.append(time.process_time() - start)
        seconds[name] = sorted(took)[2]
    found = beside(benchmark, reranked, fused, rounds=5)
    ratios = {f"{name} / vectors": seconds[name] / seconds["vectors"] for name in seconds}
    keep(
        benchmark,
        f"a re-ranked query in a pool of {pool}, of full fusion",
        found,
        target=None,
        packages=("torch",),
        pool=pool,
        top=TOP,
        **ratios,
    )
