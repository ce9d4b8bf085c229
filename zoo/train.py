"""Train one recipe. Accelerate owns devices, processes and precision; this file owns the loop."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import send_to_device, set_seed
from torch import Tensor
from torch.utils.data import DataLoader

from zoo.batches import batches_of, check_fit, lengths_of, shown_of, training_rows
from zoo.captions import check_asked
from zoo.checkpoint import Position, check_same_run, checkpoints, load_checkpoint
from zoo.config import split_spec
from zoo.distributed import blocks_of, shard, whole
from zoo.errors import Diverged, ZooError
from zoo.evaluate.classification import by_modality
from zoo.feature_cache import feature_cache
from zoo.files import check_target, write_text
from zoo.freeze import freeze_others
from zoo.gradcache import check_rows_stay_apart
from zoo.hub import save
from zoo.init_from import prepare, take_parts
from zoo.interrupt import AGAIN, Interruption, in_worker, stop
from zoo.joints import Calibrating
from zoo.loading import loaded
from zoo.log import Log
from zoo.momentum import Enqueueing
from zoo.optimizer import freeze_all, learning_rate, make_optimizer
from zoo.recipe import Recipe, dump, load_recipe, values
from zoo.registry import build, make
from zoo.sampler import BatchOrder
from zoo.saver import Saver
from zoo.shown import check_shown
from zoo.types import Batch, Binding, Data, LabelledData
from zoo.update import Step, Updater

logger = logging.getLogger("zoo.train")
_FREE = ("out", "evaluate", "classify", "retrieve", "baselines", "floor")  # may differ between a checkpoint and the run that resumes it
_FREE_OF_RUN = (
    "workers",
    "threads",
    "device",
    "feature_cache",
    "keep_rows",
    "log_every",
    "log_gradients",
    "save_every",
    "save_minutes",
    "keep",
)


def train(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *overrides: str,
    data_root: str | Path | None = None,
    loaded: Data | None = None,
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
        KeyboardInterrupt: If Ctrl-C was pressed; what was trained is saved.
        Terminated: Likewise, if SIGTERM came.
    """
    recipe = load_recipe(recipe, *overrides, **keywords)
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    root = Path(data_root) if data_root is not None else None
    data = make("data", recipe.data, root) if loaded is None else loaded
    stages = prepare(recipe, data, root, train=train, identify=identity_of)  # before the seed, since they draw too
    accelerator = make_accelerator(recipe)
    set_seed(recipe.seed)
    step = make_step(recipe, stages).to(accelerator.device)
    set_seed(recipe.seed, device_specific=True)  # the same weights everywhere, but each process drops out its own
    if recipe.run.shard:
        _shard(step, accelerator)
    optimizer = make_optimizer(step, recipe.optimizer)
    order = make_order(recipe, data, accelerator)
    check_fit(step.model, data)
    _check_seen(recipe, step, data)
    _check_calibrates(recipe, step.model, data)
    check_asked(step.model, data, recipe.retrieve)
    epoch = len(order) / recipe.run.accumulate
    passed = math.ceil((recipe.run.epochs or 0) * epoch)
    steps = passed if recipe.run.steps is None else recipe.run.steps
    identity = {"recipe": identity_of(recipe), "data": data.fingerprint, "processes": accelerator.num_processes}
    position = _start(recipe, fresh, step, optimizer, identity, accelerator)
    logger.info("training %s from step %d to %d", recipe.out, position.step, steps)

    wrapped = accelerator.prepare_model(step, evaluation_mode=recipe.run.shard)  # spread weights are no business of DistributedDataParallel
    prepared = accelerator.prepare_optimizer(optimizer)  # not the learning rate: Accelerate would move it once per process
    update = Updater(accelerator, wrapped, step, prepared, recipe)
    save_state = Saver(recipe.out / "checkpoints", step, optimizer, identity, recipe.run, accelerator)
    wrapped.train()
    asked = 0
    settings = {"steps": steps, "every": recipe.run.log_every, "start": position.step, "enabled": accelerator.is_main_process}
    with feature_cache(recipe, data, step.model, accelerator) as seen, Log(recipe.out, **settings) as log, Interruption() as interruption:
        batches = stream(recipe, seen, step, order, position, accelerator)
        while position.step < steps:
            rate = learning_rate(recipe.optimizer, position.step, steps, epoch)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            before = save_state.moment(position)
            try:
                logged = update(batches, position)
            except Diverged as e:
                raise Diverged(f"{e}; {save_state.save_before(before)}") from e
            position.step += 1
            log.write(position, {"lr": recipe.optimizer.lr * rate, **logged})
            asked = save_state(position, interruption, last=position.step == steps)
    step.model.trained = step.model.trained or steps > 0 or bool(stages)
    if recipe.run.calibrate and isinstance(data, LabelledData):
        _calibrate(step.model, data, recipe.run.calibrate)
    _save_model(recipe, step.model, accelerator)
    if asked:
        stop(asked, f"stopped after the last step, with the model in {recipe.out}; {AGAIN}")
    return step.model.eval()


def _calibrate(model: Any, data: LabelledData, split: str) -> None:
    """Fit what a fusion of logits weighs the modalities by, on rows that no weight was trained on."""
    seen = by_modality(model.eval(), data, data.split(split))
    fitted = model.combine.calibrate(seen.logits, seen.present, seen.labels)
    logger.info("calibrated on %s: temperature %s", split, ", ".join(f"{name} {value:.3f}" for name, value in fitted.items()))


def _check_calibrates(recipe: Recipe, model: Any, data: Data) -> None:
    """Asked before the first step, not after the last."""
    if not recipe.run.calibrate:
        return
    if not isinstance(data, LabelledData) or not isinstance(model.combine, Calibrating):
        raise ZooError("run.calibrate: this model combines no logits of modalities, so there is nothing to calibrate: write null")
    if recipe.run.calibrate in ("train", "test"):
        raise ZooError(
            f"run.calibrate: what is fitted is fitted on neither training nor test rows, not on {recipe.run.calibrate!r}: write val"
        )
    if not len(data.split(recipe.run.calibrate)):
        raise ZooError(f"run.calibrate: split {recipe.run.calibrate!r} has no rows: name another one, or write null")


def _save_model(recipe: Recipe, model: Any, accelerator: Accelerator) -> None:
    """Write the model that the run folder is from now on."""
    state = whole(model.state_dict())
    if recipe.adapters:
        state = _merged(recipe, model, state, accelerator)
    if accelerator.is_main_process:
        save(model, recipe.out, state)


def _merged(recipe: Recipe, model: Any, state: Mapping[str, Tensor], accelerator: Accelerator) -> Mapping[str, Tensor]:
    """The state of ``model`` with its adapters in its weights, which the model itself gets too unless it is spread over processes."""
    from zoo.lora import merge, merged_state, save_adapters

    if accelerator.is_main_process:
        save_adapters(model, state, recipe.adapters, recipe.out)
    merged = merged_state(model, state)
    if not recipe.run.shard:
        merge(model)
    return merged


def _start(
    recipe: Recipe, fresh: bool, step: Step, optimizer: torch.optim.Optimizer, identity: Mapping[str, Any], accelerator: Accelerator
) -> Position:
    """Make the run folder ready, and go on from its last checkpoint if there is one."""
    if not fresh:
        _check_folder(recipe)
    if accelerator.is_main_process:
        _prepare_folder(recipe, fresh)
    accelerator.wait_for_everyone()
    position = Position()
    if found := checkpoints(recipe.out / "checkpoints"):
        position = load_checkpoint(found[-1], step, optimizer, identity, process=accelerator.process_index)
    if accelerator.is_main_process:
        write_text(recipe.out / "recipe.yaml", dump(recipe))
    return position


def _shard(step: Step, accelerator: Accelerator) -> None:
    """Spread the model over the processes; the objective, a scalar or two, stays whole.

    Raises:
        ZooError: If there is one process only.
    """
    if accelerator.num_processes == 1:
        raise ZooError("run.shard: one process has nobody to share with: start several (accelerate launch), or write run.shard: false")
    always = [part for kind, part in step.model.parts().items() if kind == "backbone"]  # others may have nothing to do in some process
    shard(step.model, [block for part in always for block in blocks_of(part)])


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


def make_step(recipe: Recipe, stages: Sequence[Path] | None = None) -> Step:
    """Model and objective of a recipe, frozen and bound as it says.

    Args:
        recipe: Of the run.
        stages: The run folder of each stage in ``init_from``; None: the model keeps the weights that it was built with.

    Raises:
        ZooError: If what is to be frozen or trained is not there, the objective does not fit the model or what is shown, or accumulation
            the schedule.
    """
    name, keywords = split_spec(recipe.model)
    model, objective = build(name, **keywords), make("objective", recipe.objective)
    check_shown(objective, recipe.run.shows)
    if stages is not None:
        take_parts(model, recipe.init_from, stages)
    freeze_all(model, recipe.freeze)
    if recipe.train_only:
        freeze_others(model, recipe.train_only)
    if recipe.adapters:
        from zoo.lora import adapt  # peft takes seconds to import

        adapt(model, recipe.adapters, recipe.freeze)
    if isinstance(objective, Binding):
        objective.bind(model)
    if recipe.run.accumulate > 1 and isinstance(objective, Enqueueing) and objective.enqueues:
        raise ZooError(
            f"run.accumulate: of {recipe.run.accumulate} batches a step, a queue would get the vectors of the last alone: write 1 and a "
            "larger run.batch_size, or queue: 0"
        )
    if recipe.run.accumulate > 1 and model.schedule.multi_phase:
        raise ZooError(f"run.accumulate: {recipe.run.accumulate} batches cannot be accumulated under a schedule of several phases; write 1")
    if recipe.run.gradient_checkpointing:
        model.checkpoint_gradients()
    if recipe.run.gradcache:
        check_rows_stay_apart(model)
    return Step(model, objective)


def make_order(recipe: Recipe, data: Data, accelerator: Accelerator) -> BatchOrder:
    """Which pairs, of items or of a picture and its text, or labelled rows, make up which batch.

    Raises:
        ZooError: If they do not fill one batch.
    """
    lengths, of = lengths_of(data), "rows" if isinstance(data, LabelledData) else "pairs"
    order = BatchOrder(
        lengths,
        recipe.run.batch_size,
        seed=recipe.seed,
        buckets=recipe.run.buckets,
        processes=accelerator.num_processes,
    )
    if not len(order):
        raise ZooError(
            f"run.batch_size: {len(lengths)} training {of} do not fill one batch of {recipe.run.batch_size}; write a smaller one"
        )
    return order


def stream(recipe: Recipe, data: Data, step: Step, order: BatchOrder, position: Position, accelerator: Accelerator) -> Iterator[Batch]:
    """This process's batches from ``position`` on, epoch after epoch; ``position`` moves with them."""
    shown = shown_of(data, recipe.run.shows, recipe.seed)
    batches = batches_of(data, accelerator.process_index, step.model.processor, recipe.run.keep_rows, shown)
    while True:
        loader = DataLoader(
            batches,
            sampler=list(order.epoch(position.epoch, position.batch)),
            batch_size=None,  # it is one already
            num_workers=recipe.run.workers,
            worker_init_fn=in_worker,
            generator=torch.Generator(),  # else every start of a loader draws from the numbers that dropout uses, and a resumed run differs
        )
        for batch in loaded(loader):
            position.batch += 1
            yield send_to_device(batch, accelerator.device)
        position.epoch, position.batch = position.epoch + 1, 0


def _check_seen(recipe: Recipe, step: Step, data: Data) -> None:
    """Whether there is anything to learn from; the walk ends at the first row that shows the model something."""
    processor = step.model.processor
    if not any(processor.sees(row) for row in training_rows(data, shown_of(data, recipe.run.shows, recipe.seed))):
        raise ZooError(
            f"this model looks at {', '.join(processor.keys())}, and no training row shows any of it: "
            "write another model.fusion, other data.inputs or run.shows"
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
        if recipe.out.is_dir() and any(recipe.out.iterdir()) and not (recipe.out / "recipe.yaml").is_file():
            raise ZooError(
                f"{recipe.out} is no run, for it has no recipe.yaml, and --fresh would delete what it holds: write another out=..."
            )
        for name in ("checkpoints", "tensorboard", "adapters"):
            if (recipe.out / name).is_dir():
                shutil.rmtree(recipe.out / name)
        left = "log.jsonl model.json model.safetensors metrics.json examples.json captions.json diagnosis.json report.html"
        for name in left.split():
            (recipe.out / name).unlink(missing_ok=True)
    check_target(recipe.out / "recipe.yaml", "out: the file")
