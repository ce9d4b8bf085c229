"""What a frozen image encoder gives, computed once per image and read back from disk, by every run that would compute the same."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from zoo.columns import Mapped, Unwritten, Writer, as_bytes, discard, read_columns, row_sums, writing
from zoo.config import split_spec
from zoo.errors import Failure, ZooError
from zoo.files import alone
from zoo.interrupt import AGAIN, Interruption, in_worker, stop
from zoo.loading import loaded
from zoo.models._encode import progress
from zoo.models._notes import images
from zoo.recipe import Recipe
from zoo.types import Data, ModalityInputs, PairData, Processor, Row, Seeing, Sparing, Tokens

logger = logging.getLogger("zoo.feature_cache")
FLUSH_SECONDS = 30.0  # of work that a killed build loses
_FORMAT = 1
_SAME = {"no": 1e-3, "bf16": 3e-2, "fp16": 1e-2}  # relative: another device or library rounds in another way, other weights differ by more


@contextmanager
def feature_cache(recipe: Recipe, data: Data, model: Any, accelerator: Accelerator) -> Iterator[Data]:
    """Inside, rows name the places of their images in the cache, and the model's encoder looks them up.

    The encoder stays where it is, with its weights, so checkpoints and the saved model are those of a run without cache; real images
    are still encoded. An entry is named by the hash of weights, settings, preprocessing, precision and data. It is made if missing:
    by one process, while others that need it wait.

    Args:
        recipe: ``run.feature_cache`` is the folder of entries; None: nothing is done.
        data: The data set.
        model: On its device.
        accelerator: Knows the precision.

    Yields:
        The data set to train on, whose images are neither read nor decoded.

    Raises:
        Failure: If an entry cannot be written.
        ZooError: If the data are no pairs of items, the encoder is not frozen, or what it gives depends on more than the image.
    """
    folder = recipe.run.feature_cache
    if folder is None or (isinstance(model, Seeing) and model.vision is None):
        yield data
        return
    _check(recipe, model)
    if not isinstance(data, PairData):
        raise ZooError("run.feature_cache: it keeps the images of pairs of items, and these data are none: leave it out")
    encoder = model.vision
    source = _Source(encoder, encoder.processor, data.notes, recipe, accelerator)
    features = _opened_or_built(folder, _key(recipe, data, model), source)
    notes = _Placed(features.start, data.notes)
    if "image" in model.processor(notes.without_image(0)):
        raise ZooError(
            "run.feature_cache: this model gives a row without an image one of its own: write model.absent: skip, or no feature_cache"
        )
    forward, seen = encoder.forward, copy(data)
    seen.notes = notes
    encoder.forward = lambda x: forward(x) if x.values.is_floating_point() else features(x.values)
    try:
        yield seen
    finally:
        del encoder.forward


class Features:
    """An entry of the cache.

    Args:
        folder: Of the entry.

    Raises:
        Failure: If it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        _, columns = read_columns(folder)
        counts = columns.pop("count").all()
        self.start = np.concatenate([[0], counts.cumsum()])  # (N + 1,): the images of item i are start[i] up to start[i + 1]
        self.sums = columns.pop("sum").all() if "sum" in columns else np.zeros(0, np.int64)
        self.columns: Mapping[str, Mapped] = columns
        self.checked = np.zeros(len(self.sums), bool)

    def __call__(self, places: Tensor) -> Tokens:
        """Places (I, ...) of images to what the encoder gave for them, on the same device.

        Raises:
            Failure: If it is not what was written.
        """
        rows = places.flatten().cpu().numpy()
        self._check(rows)
        found = {name: column[rows].to(places.device) for name, column in self.columns.items()}
        return Tokens(found["tokens"], found["mask"], found.get("pooled"), found["present"])

    def _check(self, rows: np.ndarray) -> None:
        """Each image once, when it is first read: a checksum of all of them at the start would read the whole file."""
        new = rows[~self.checked[rows]]
        if (row_sums([column.bytes[new] for column in self.columns.values()]) != self.sums[new]).any():
            raise Failure(f"{self.folder} is damaged: it is not what was written; remove this folder, and run the same command again")
        self.checked[new] = True


class _Source(NamedTuple):
    """All that an entry is made of."""

    encoder: Any
    processor: Processor
    notes: Sequence[Row]
    recipe: Recipe
    accelerator: Accelerator

    def encode(self, pixels: Tensor) -> Tokens:
        """Pixels (I, 3, H, W) as training would encode them: gradients on, since kernels are chosen by that too, and never one alone.

        One row is multiplied in another way than several, and rounded in another way.

        Raises:
            ZooError: If the encoder draws dropout in training.
        """
        alone = len(pixels) == 1
        pixels = (torch.cat([pixels, pixels]) if alone else pixels).to(self.accelerator.device)
        self.encoder.train()  # as the loop does it; what is frozen stays in eval mode all the same
        with self.accelerator.autocast():
            out: Tokens = self.encoder(ModalityInputs(pixels))
        if any(module.training for module in self.encoder.modules()):
            raise ZooError(
                "run.feature_cache: the image encoder leaves eval mode when the model trains: freeze all of it by freeze: [vision]"
            )
        return Tokens(*(None if x is None else x[:1] if alone else x for x in out))  # type: ignore[arg-type]

    def loader(self, items: Sequence[int], workers: int = 0) -> DataLoader[Any]:
        """Batches of pixels (I, 3, H, W) and of the number of images of each item (B,)."""
        return DataLoader(
            _Pictures(self.notes, self.processor),
            batch_size=2 * self.recipe.run.batch_size,  # rows of a training batch: what fits there fits here
            sampler=items,
            collate_fn=_together,
            num_workers=workers,
            worker_init_fn=in_worker,
            generator=torch.Generator(),  # else it would draw from the numbers that training uses
        )


class _Pictures(Dataset[tuple[list[Tensor], int]]):
    """The pixels of an item's images."""

    def __init__(self, notes: Sequence[Row], processor: Processor) -> None:
        self.notes, self.processor = notes, processor

    def __getitem__(self, item: int) -> tuple[list[Tensor], int]:
        try:
            found = [self.processor(image).values for image in images(self.notes[item])]
        except (ZooError, OSError) as e:
            raise ZooError(f"item {item}: {e}") from e
        return found, len(found)


def _together(items: Sequence[tuple[list[Tensor], int]]) -> tuple[Tensor, Tensor]:
    pixels = [image for found, _ in items for image in found]
    return torch.stack(pixels) if pixels else torch.empty(0), torch.tensor([count for _, count in items])


class _Placed(Sequence[Row]):
    """Rows whose images are places in a cache.

    Args:
        start: (N + 1,) of `Features`.
        notes: The rows; if they can, they leave the image unread.
    """

    def __init__(self, start: np.ndarray, notes: Sequence[Row]) -> None:
        self.start = start
        self.notes: Sequence[Row] = notes.without("image") if isinstance(notes, Sparing) else notes

    def __len__(self) -> int:
        return len(self.notes)

    def __getitem__(self, item: Any) -> Any:
        row = self.without_image(item)
        places = range(int(self.start[row["id"]]), int(self.start[row["id"] + 1]))
        return {**row, "image": [ModalityInputs(torch.full((1, 1, 1), place)) for place in places]} if places else row

    def without_image(self, item: int) -> Row:
        """The row as a model without eyes gets it."""
        return {key: value for key, value in self.notes[item].items() if key != "image"}


def _check(recipe: Recipe, model: Any) -> None:
    """Raise a ZooError unless what the encoder gives is the same in every step."""
    if not isinstance(model, Seeing):
        raise ZooError(f"run.feature_cache: {split_spec(recipe.model)[0]!r} is no model with one image encoder: leave it out")
    trained = [name for name, p in model.vision.named_parameters() if p.requires_grad]
    if trained:
        raise ZooError(
            f"run.feature_cache: the image encoder is trained ({trained[0]} and {len(trained) - 1} more), so what it gives changes: "
            "freeze all of it (model.train_vision: false, freeze: [vision], no adapters in it), or leave feature_cache out"
        )
    if recipe.run.shard:
        raise ZooError("run.feature_cache: a sharded encoder cannot run in the one process that fills the cache: write run.shard: false")


def _key(recipe: Recipe, data: PairData, model: Any) -> dict[str, Any]:
    """All that decides what an entry holds, as far as it can be known without looking; `_differs` looks."""
    spec = model.spec.get("vision")
    return {
        "format": _FORMAT,
        "weights": _digest(model.vision),
        "settings": None if spec is None else split_spec(spec),
        "preprocessing": model.vision.processor.config(),
        "precision": recipe.run.precision,
        "data": data.fingerprint,
    }


def _digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(as_bytes(tensor.reshape(1, -1)).data)
    return digest.hexdigest()


def _opened_or_built(folder: Path, key: Mapping[str, Any], source: _Source) -> Features:
    """The entry of ``key``; whoever holds its lock makes it, all others wait."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:32]
    entry = folder / name
    if (found := _opened(entry, source)) is not None:
        return found
    try:
        with ExitStack() as held:
            with writing():
                held.enter_context(alone(folder / f".{name}.lock", f"waiting for another process, which makes the feature cache {entry}"))
            if (found := _opened(entry, source)) is None:
                discard(entry)
                _build(entry, key, source)
                found = _opened(entry, source)
    except Unwritten as e:
        discard(folder / f".{name}.part")
        raise Failure(f"run.feature_cache: {entry} cannot be written ({e}), none of it is kept: make room, or name another folder") from e
    if found is None:
        discard(entry)
        raise Failure(f"run.feature_cache: {entry} was begun by other code, and is removed now: run the same command again")
    return found


def _opened(entry: Path, source: _Source) -> Features | None:
    """The entry, if it is there, whole, and what this encoder gives."""
    if not entry.is_dir():
        return None
    try:
        features = Features(entry)
        stale = _differs(features, source)
    except Failure as e:
        logger.warning("making the feature cache again: %s", e)
        return None
    if stale:
        logger.warning("making the feature cache again: %s was made by other code, and differs by %.2g", entry, stale)
        return None
    logger.info("features of %d images of %d items are read from %s", len(features.sums), len(features.start) - 1, entry)
    return features


def _differs(features: Features, source: _Source) -> float:
    """How far the first and the last image are from what the encoder gives now; 0.0: no farther than rounding.

    A library that computes or resizes in another way since the entry was made shows in no hash of ours.
    """
    if not len(features.sums):
        return 0.0
    ends = [0, len(features.sums) - 1]
    items = np.searchsorted(features.start, ends, side="right") - 1
    ((pixels, _),) = source.loader(items.tolist())
    if len(pixels) != int(np.diff(features.start)[items].sum()):
        return float("inf")
    here = source.encode(pixels)
    there = features(torch.from_numpy(np.concatenate([np.arange(features.start[i], features.start[i + 1]) for i in items])))
    return _beyond_rounding(there, here, source.recipe.run.precision)


def _beyond_rounding(there: Tokens, here: Tokens, precision: str) -> float:
    """The relative difference between two encodings of the same images; 0.0 where rounding explains it."""
    a, b = ((x.tokens if x.pooled is None else torch.cat([x.tokens, x.pooled[:, None]], 1)).float().cpu() for x in (there, here))
    differs = float((a - b).norm() / b.norm().clamp(min=1e-12)) if a.shape == b.shape else float("inf")
    return differs if differs > _SAME[precision] else 0.0


def _build(entry: Path, key: Mapping[str, Any], source: _Source) -> None:
    """Encode every image of the data set, going on from where a killed process left.

    Raises:
        KeyboardInterrupt: If Ctrl-C was pressed; what was encoded is kept.
        Terminated: Likewise, if SIGTERM came.
    """
    part, total = entry.with_name(f".{entry.name}.part"), len(source.notes)
    _check_repeats(source)
    with Writer(part) as writer, Interruption() as interruption:
        done = writer.rows("count")
        logger.info("making the feature cache %s: %d items%s", entry, total, f", of which {done} are there" if done else "")
        loader, flushed = source.loader(range(done, total), source.recipe.run.workers), time.monotonic()
        numbers = progress(range(len(loader)), "encoding images once", None)
        for number, (pixels, counts) in zip(numbers, loaded(loader), strict=True):
            if len(pixels):
                out = {name: x for name, x in source.encode(pixels)._asdict().items() if x is not None}
                out["sum"] = torch.from_numpy(row_sums([as_bytes(x) for x in out.values()]))
                for name, x in out.items():
                    writer.append(name, x)
            writer.append("count", counts)
            if number == 0:
                size = sum(column.bytes for column in writer.columns.values()) * total / writer.rows("count")
                logger.info("it will take about %.2f GiB", size / 2**30)
            if interruption.signal or time.monotonic() - flushed > FLUSH_SECONDS:
                writer.flush()
                flushed = time.monotonic()
            if interruption.signal:
                stop(interruption.signal, f"stopped with {writer.rows('count')} of {total} items in the feature cache; {AGAIN}")
        writer.finish(entry, {"key": key})


def _check_repeats(source: _Source) -> None:
    """Whether the first images, prepared and encoded twice, give the same twice.

    Raises:
        ZooError: If they do not.
    """
    items = range(min(len(source.notes), 32))
    once, twice = ([pixels for pixels, _ in source.loader(items) if len(pixels)] for _ in range(2))
    if any(not torch.equal(a, b) for a, b in zip(once, twice, strict=True)):
        raise ZooError("run.feature_cache: the image processor is random, and would be frozen in one draw: leave feature_cache out")
    if once and _beyond_rounding(source.encode(once[0]), source.encode(once[0]), source.recipe.run.precision):
        raise ZooError("run.feature_cache: the image encoder gives something else each time: leave feature_cache out")
