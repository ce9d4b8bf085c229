"""Train one recipe. Accelerate owns devices, processes and precision; this file owns the loop."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import gather_object, send_to_device, set_seed
from torch.utils.data import DataLoader, Dataset

from zoo.checkpoint import Position, check_same_run, checkpoints, load_checkpoint, random_state, save_checkpoint
from zoo.collate import Known, PairCollate
from zoo.config import split_spec
from zoo.errors import ZooError
from zoo.files import write_text
from zoo.hub import save
from zoo.log import Log
from zoo.optimizer import freeze_all, learning_rate, make_optimizer
from zoo.recipe import Recipe, dump, load_recipe, values
from zoo.registry import build, make
from zoo.sampler import BatchOrder
from zoo.types import Batch, Binding, Pair, PairData
from zoo.update import Step, Updater

logger = logging.getLogger("zoo.train")
_FREE = ("out", "evaluate", "baselines", "floor")  # may differ between a checkpoint and the run that resumes it
_FREE_OF_RUN = ("workers", "log_every", "save_every", "keep", "threads", "device")


class Pairs(Dataset[Pair]):
    """The training pairs of a data set as raw rows."""

    def __init__(self, data: PairData, split: str = "train") -> None:
        self.notes, self.pairs = data.notes, data.pairs(split)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> Pair:
        query, target = self.pairs[i]
        return Pair(self.notes[int(query)], self.notes[int(target)])


def train(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *overrides: str,
    data_root: str | Path | None = None,
    loaded: PairData | None = None,
    fresh: bool = False,
    **keywords: Any,
) -> Any:
    """Run a recipe to its last step, going on from its last checkpoint if there is one.

    The run folder gets ``recipe.yaml`` (resolved) before step 1, ``log.jsonl`` and ``tensorboard/`` along the way,
    ``checkpoints/``, and at the end the model itself, so that ``zoo.load(folder)`` gives it back.

    Args:
        recipe: A file, the name of a shipped recipe, a mapping or a `Recipe`.
        *overrides: ``"optimizer.lr=3e-5"``.
        data_root: The folder that holds the folders of data sets.
        loaded: The recipe's data set, where it is loaded already.
        fresh: Throw away what the run folder holds of an earlier run.
        **keywords: Overrides from Python, ``optimizer__lr=3e-5``.

    Returns:
        The trained model.

    Raises:
        ZooError: On a fault of the recipe or the data, on a loss that is not finite, or when the folder holds another run.
    """
    recipe = load_recipe(recipe, *overrides, **keywords)
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    data = make("data", recipe.data, Path(data_root) if data_root is not None else None) if loaded is None else loaded
    accelerator = make_accelerator(recipe)
    set_seed(recipe.seed)
    step = make_step(recipe)
    set_seed(recipe.seed, device_specific=True)  # the same weights everywhere, but each process drops out its own
    optimizer = make_optimizer(step, recipe.optimizer)
    order = make_order(recipe, data, accelerator)
    _check_seen(step, data)
    steps = recipe.run.steps or math.ceil((recipe.run.epochs or 0) * len(order) / recipe.run.accumulate)
    identity = {"recipe": identity_of(recipe), "data": data.fingerprint, "processes": accelerator.num_processes}

    folder = recipe.out / "checkpoints"
    position = Position()
    if not fresh:
        _check_folder(recipe)
    if accelerator.is_main_process:
        _prepare_folder(recipe, fresh)
    accelerator.wait_for_everyone()
    step.to(accelerator.device)  # before the optimizer's state is loaded, which follows its parameters
    if found := checkpoints(folder):
        position = load_checkpoint(found[-1], step, optimizer, identity, process=accelerator.process_index)
        logger.info("resuming %s at step %d of %d", recipe.out, position.step, steps)
    if accelerator.is_main_process:
        write_text(recipe.out / "recipe.yaml", dump(recipe))

    wrapped, prepared = accelerator.prepare(step, optimizer)  # not the learning rate: Accelerate would move it once per process
    update = Updater(accelerator, wrapped, step, prepared, recipe)
    batches = stream(recipe, data, step, order, position, accelerator.device)
    wrapped.train()
    with Log(recipe.out, steps=steps, every=recipe.run.log_every, start=position.step, enabled=accelerator.is_main_process) as log:
        while position.step < steps:
            rate = learning_rate(recipe.optimizer, position.step, steps)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            logged = update(batches, position)
            position.step += 1
            log.write(position, {"lr": recipe.optimizer.lr * rate, **logged})
            due = recipe.run.save_every and position.step % recipe.run.save_every == 0
            if due or position.step == steps:
                random = gather_object([random_state()])
                if accelerator.is_main_process:
                    save_checkpoint(folder, step, optimizer, position, identity, random, keep=recipe.run.keep)
    step.model.trained = True
    if accelerator.is_main_process:
        save(step.model, recipe.out)
    return step.model.eval()


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Devices, processes and precision of a run.

    Raises:
        ZooError: If this machine does not have the device that the recipe asks for, or the device not the precision.
    """
    AcceleratorState._reset_state(reset_partial_state=True)  # it would keep device and precision of this process's first run for all others
    device = PartialState(cpu=recipe.run.device == "cpu").device.type
    if recipe.run.device not in ("auto", device):
        raise ZooError(f"run.device: this machine trains on {device!r}, not on {recipe.run.device!r}: write {device} or auto")
    if recipe.run.precision == "fp16" and device == "cpu":
        raise ZooError("run.precision: fp16 needs a GPU: write bf16 or 'no'")
    return Accelerator(
        mixed_precision=recipe.run.precision,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],  # a batch may lack a modality altogether
    )


def make_step(recipe: Recipe) -> Step:
    """Model and objective of a recipe, frozen and bound as it says.

    Raises:
        ZooError: If a frozen prefix names nothing, the objective does not fit the model, or accumulation the schedule.
    """
    name, keywords = split_spec(recipe.model)
    model, objective = build(name, **keywords), make("objective", recipe.objective)
    freeze_all(model, recipe.freeze)
    if isinstance(objective, Binding):
        objective.bind(model)
    if recipe.run.accumulate > 1 and model.schedule.multi_phase:
        raise ZooError(f"run.accumulate: {recipe.run.accumulate} batches cannot be accumulated under a schedule of several phases; write 1")
    if recipe.run.gradient_checkpointing:
        model.checkpoint_gradients()
    return Step(model, objective)


def make_order(recipe: Recipe, data: PairData, accelerator: Accelerator) -> BatchOrder:
    """Which pairs make up which batch.

    Raises:
        ZooError: If the training pairs do not fill one batch.
    """
    pairs, lengths = data.pairs("train"), data.lengths()
    order = BatchOrder(
        lengths[pairs].max(1),
        recipe.run.batch_size,
        seed=recipe.seed,
        buckets=recipe.run.buckets,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
    )
    if not len(order):
        raise ZooError(f"run.batch_size: {len(pairs)} training pairs do not fill one batch of {recipe.run.batch_size}; write a smaller one")
    return order


def stream(recipe: Recipe, data: PairData, step: Step, order: BatchOrder, position: Position, device: torch.device) -> Iterator[Batch]:
    """Batches from ``position`` on, epoch after epoch; ``position`` moves with them."""
    collate = PairCollate(step.model.processor, Known.of(torch.from_numpy(data.pairs("train")), len(data.notes)))
    pairs = Pairs(data)
    while True:
        batches = list(order.epoch(position.epoch, position.batch))
        loader = DataLoader(
            pairs,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=recipe.run.workers,
            generator=torch.Generator(),  # else every start of a loader draws from the numbers that dropout uses, and a resumed run differs
        )
        for batch in loader:
            position.batch += 1
            yield send_to_device(batch, device)
        position.epoch, position.batch = position.epoch + 1, 0


def _check_seen(step: Step, data: PairData) -> None:
    """Whether there is anything to learn from; the walk ends at the first row that shows the model something."""
    processor = step.model.processor
    if not any(processor.sees(data.notes[int(i)]) for i in np.unique(data.pairs("train"))):
        raise ZooError(
            f"this model looks at {', '.join(processor.keys())}, and no training row shows any of it: "
            "write another model.fusion, or other data.inputs"
        )


def _check_folder(recipe: Recipe) -> None:
    """A finished model without checkpoints is not overwritten by one of another recipe."""
    written = recipe.out / "recipe.yaml"
    if (recipe.out / "model.json").is_file() and written.is_file() and not checkpoints(recipe.out / "checkpoints"):
        there, here = identity_of(load_recipe(written)), identity_of(recipe)
        check_same_run(f"the model in {recipe.out}", {"recipe": there}, {"recipe": here})


def identity_of(recipe: Recipe) -> dict[str, Any]:
    """All of a recipe that decides the weights: a checkpoint that differs in any of it is refused."""
    tree = {k: v for k, v in values(recipe).items() if k not in _FREE}
    return tree | {"run": {k: v for k, v in tree["run"].items() if k not in _FREE_OF_RUN}}


def _prepare_folder(recipe: Recipe, fresh: bool) -> None:
    if fresh:
        for name in ("checkpoints", "tensorboard"):
            shutil.rmtree(recipe.out / name, ignore_errors=True)
        for name in ("log.jsonl", "model.json", "model.safetensors", "metrics.json", "examples.json", "report.html"):
            (recipe.out / name).unlink(missing_ok=True)
    recipe.out.mkdir(parents=True, exist_ok=True)
