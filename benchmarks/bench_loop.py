"""Items a second of training beside a plain loop in the manner of open_clip, all else equal. Target: at least its rate.

``pytest benchmarks/bench_loop.py``. Both ways prepare raw pictures and captions and take a step on them, with the same towers, batch,
loss and optimizer; the loop is written from open_clip's public interface.
"""

import copy
import time

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from benchmarks.beside import beside, keep
from zoo.checkpoint import Position
from zoo.collate import RowCollate
from zoo.encoders._open_clip import processor_of
from zoo.joints import compose
from zoo.objectives.infonce import Infonce
from zoo.optimizer import make_optimizer
from zoo.recipe import load_recipe
from zoo.train import make_accelerator
from zoo.types import Batch, ModalityInputs, ModelOutput
from zoo.update import Step, Updater

pytestmark = pytest.mark.filterwarnings("default")  # of rivals, whose warnings are not ours to mend
BATCH, BATCHES = 32, 2
VISION = open_clip.CLIPVisionCfg(layers=6, width=384, head_width=64, patch_size=32, image_size=224)
TEXT = open_clip.CLIPTextCfg(context_length=77, vocab_size=49408, width=256, heads=4, layers=6)
RECIPE = {
    "model": {"name": "notellm2"},  # not built: the recipe gives the rest
    "data": "planted_notes",
    "objective": "infonce",
    "optimizer": {"lr": 5e-4, "weight_decay": 0.2, "betas": [0.9, 0.98], "eps": 1e-6, "max_grad_norm": 1.0},
    "run": {"steps": 1, "device": "cpu"},
}


class ClipProcessor:
    """A row's picture and caption as the towers want them."""

    def __init__(self, clip, tokenize):
        self.pixels, self.tokenize = processor_of(clip.visual), tokenize

    def __call__(self, row):
        return {"image": self.pixels(row["image"]), "text": ModalityInputs(self.tokenize(row["title"])[0])}


class Towers(torch.nn.Module):
    """open_clip's towers as a model of the zoo."""

    outputs = ("image", "text")

    def __init__(self, clip, tokenize):
        super().__init__()
        self.visual, self.clip, self.processor = clip.visual, clip, ClipProcessor(clip, tokenize)
        self.schedule = compose([], "towers", {"schedule": "joint"}).make("schedule")

    def forward(self, batch: Batch) -> ModelOutput:
        return ModelOutput(
            {
                "image": self.clip.encode_image(batch.inputs["image"].values),
                "text": self.clip.encode_text(batch.inputs["text"].values),
            }
        )


def draw_rows():
    """Pictures of noise in 256 x 320, and captions."""
    draw = np.random.default_rng(0)
    return [
        {"image": Image.fromarray(draw.integers(0, 256, (256, 320, 3), dtype=np.uint8)), "title": f"a picture with the number {i} in it"}
        for i in range(BATCH * BATCHES)
    ]


def our_epoch(clip, tokenize, rows):
    """A call that trains one epoch and gives its losses."""
    recipe = load_recipe(RECIPE)
    accelerator, step = make_accelerator(recipe), Step(Towers(clip, tokenize), Infonce())
    clip.logit_scale.requires_grad_(False)  # the objective has its own
    optimizer = make_optimizer(step, recipe.optimizer)
    update, position = (
        Updater(accelerator, accelerator.prepare_model(step), step, accelerator.prepare_optimizer(optimizer), recipe),
        Position(),
    )
    collate = RowCollate(step.model.processor)

    def epoch():
        batches = iter(torch.utils.data.DataLoader(rows, BATCH, collate_fn=collate))
        return [update(batches, position)["loss"] for _ in range(BATCHES)]

    return epoch


def their_epoch(clip, tokenize, rows):
    """The same, written out."""
    transform = open_clip.image_transform(VISION.image_size, is_train=False)
    loss_of = open_clip.ClipLoss()
    groups = [p for p in clip.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(groups, lr=5e-4, weight_decay=0.2, betas=(0.9, 0.98), eps=1e-6)

    def collate(some):
        return torch.stack([transform(row["image"]) for row in some]), tokenize([row["title"] for row in some])

    def epoch():
        losses = []
        for images, texts in torch.utils.data.DataLoader(rows, BATCH, collate_fn=collate):
            optimizer.zero_grad()
            loss = loss_of(*clip(images, texts))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        return losses

    return epoch


@pytest.mark.benchmark(timer=time.process_time, group="training two towers")
def test_loop(benchmark):
    """The loss of the first step is equal before anything is timed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    clip, tokenize, rows = open_clip.CLIP(256, VISION, TEXT), open_clip.SimpleTokenizer(), draw_rows()
    clip.visual.preprocess_cfg = {"size": 224, "mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    clip.visual.preprocess_cfg |= {"resize_mode": "shortest", "interpolation": "bicubic"}
    ours, theirs = our_epoch(copy.deepcopy(clip), tokenize, rows), their_epoch(clip, tokenize, rows)
    np.testing.assert_allclose(ours()[0], theirs()[0], rtol=1e-4)
    found = beside(benchmark, ours, theirs, rounds=5)
    items = BATCH * BATCHES
    keep(
        benchmark,
        "training two towers",
        found,
        target=1.0,
        packages=("open_clip_torch", "torch"),
        items=items,
        items_per_second=items / found.ours,
    )
    torch.set_num_threads(threads)
