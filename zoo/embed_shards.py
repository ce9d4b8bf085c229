"""Vectors of shards: a file for each, written by several processes, and not written again while model and shard are the same."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from zoo.config import split_spec
from zoo.data._collection import Input
from zoo.data._shard_rows import INDEX, ShardRows, find_shards, index_shard
from zoo.data._shards import format_of
from zoo.errors import Failure, ZooError
from zoo.hub import load, model_hash
from zoo.interrupt import in_worker
from zoo.questions import embed
from zoo.recipe import load_recipe
from zoo.vectors import about_vectors, vector_files, write_vectors

logger = logging.getLogger("zoo.embed")


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a process needs to know to embed shards.

    Attributes:
        run: The run folder.
        model: Hash of what it holds.
        folder: Of the shards.
        index: Where their index lies.
        out: Folder of the vectors.
        columns: Names of the zoo and in the files, of those that differ.
        inputs: What rows show.
        batch_size: Notes at a time.
    """

    run: Path
    model: str
    folder: Path
    index: Path
    out: Path
    columns: tuple[tuple[str, str | None], ...]
    inputs: tuple[Input, ...]
    batch_size: int

    def vectors_of(self, shard: Path) -> Path:
        """The file of a shard's vectors."""
        return (self.out / shard.relative_to(self.folder)).with_suffix(".parquet")


class Done(NamedTuple):
    """What became of a shard."""

    shard: Path
    vectors: int
    new: bool  # False: it was there
    fault: str  # why it could not be done; empty: it was


class Embedder:
    """Writes the vectors of one shard after the other; the model is loaded once, for the first shard that is not done.

    Args:
        job: What to do.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.model: Any = None

    def __call__(self, path: Path) -> Done:
        """Embed one shard, unless its vectors are there and of this model and of this shard. Faults come back in the answer."""
        try:
            return self._embed(path)
        except ZooError as e:
            return Done(path, 0, False, str(e))

    def _embed(self, path: Path) -> Done:
        job = self.job
        shard = index_shard(path, dict(job.columns), job.index / path.relative_to(job.folder).parent)
        rows = ShardRows([shard], dict(job.columns), job.inputs)
        about = {"model": job.model, "shard": shard.sha256, "columns": [list(pair) for pair in job.columns], "inputs": list(job.inputs)}
        out = job.vectors_of(path)
        if about_vectors(out) == about:
            return Done(path, len(rows), False, "")
        self.model = self.model or load(job.run)
        vectors = embed(self.model, rows, batch_size=job.batch_size, show_progress=False)
        write_vectors(out, rows.table["note_id"].to_pylist(), vectors, about)
        return Done(path, len(rows), True, "")


Runner = Callable[[Job, Sequence[Path], int], Iterator[Done]]


def embed_shards(
    run: str | Path,
    out: str | Path,
    *,
    folder: str | Path | None = None,
    items: str | Sequence[str] | None = None,
    data_root: str | Path | None = None,
    index: str | Path | None = None,
    workers: int = 1,
    batch_size: int = 256,
    runner: Runner | None = None,
) -> int:
    """Write the vectors of each shard to ``out/<shard>.parquet``, which is whole or not there.

    The same call again does what is missing, and what was made from another model or another content of the shard.

    Args:
        run: A run folder.
        out: A folder.
        folder: Of the shards; None: of the data of the run's recipe.
        items: Which shards, as of the data set ``shards``; None: as the recipe says.
        data_root: The folder that holds the folders of data sets.
        index: A folder for the index of the shards; None: beside them.
        workers: Processes, one thread each; 1: this one, with the threads that it has.
        batch_size: Notes at a time.
        runner: What goes through the shards; None: processes of this machine.

    Returns:
        How many vectors there are.

    Raises:
        Failure: With every shard that could not be done, after all others were.
        ZooError: If there is no such run, no shards, not one worker or note at a time, or vectors would lie in the place of a shard.
    """
    for name, number in (("workers", workers), ("batch_size", batch_size)):
        if number < 1:
            raise ZooError(f"{name} = {number}: write 1 or more")
    data, said = _trained_on(Path(run))
    if data != "shards" and (folder is None or items is None):
        raise ZooError(f"{run} was trained on {data!r}, not on shards: name their folder, and --shards 'items-*.tar'")
    root = Path(data_root) if data_root is not None else Path()
    place = (Path(folder) if folder is not None else root / said["folder"]).resolve()  # a process elsewhere may stand in another folder
    found = find_shards(place, items if items is not None else said["items"])
    job = Job(
        run=Path(run).resolve(),
        model=model_hash(run),
        folder=place,
        index=Path(index or said.get("index") or place / INDEX).resolve(),
        out=_checked_out(Path(out).resolve(), place),
        columns=tuple(sorted((said.get("columns") or {}).items())),
        inputs=tuple(said.get("inputs") or ("text", "image")),
        batch_size=batch_size,
    )
    _keep_apart(job, found)
    _tell_strangers(job, found)
    done = []
    for number, one in enumerate((runner or run_here)(job, found, workers), 1):
        logger.info(
            "%s: %s (%d/%d)", one.shard.name, one.fault or f"{one.vectors} vectors{'' if one.new else ', were there'}", number, len(found)
        )
        done.append(one)
    if faults := [one.fault for one in done if one.fault]:
        raise Failure(f"{len(faults)} of {len(found)} shards have no vectors, all others have:\n" + "\n".join(sorted(faults)))
    return sum(one.vectors for one in done)


def has_shards(run: str | Path) -> bool:
    """Whether a run was trained on shards."""
    return _trained_on(Path(run))[0] == "shards"


def run_here(job: Job, shards: Sequence[Path], workers: int) -> Iterator[Done]:
    """Go through shards with ``workers`` processes of this machine, in the order in which they are done.

    Raises:
        Failure: If one of the processes was killed.
    """
    if workers == 1:
        yield from map(Embedder(job), shards)
        return
    with ProcessPoolExecutor(min(workers, len(shards)), get_context("spawn"), in_worker, (0,)) as pool:
        waiting = [pool.submit(_in_process, job, path) for path in shards]
        try:
            for future in as_completed(waiting):
                yield future.result()
        except BrokenProcessPool as e:
            raise Failure(
                "a process that embeds shards ended by itself: most often the machine has run out of memory; lower --workers or"
                " --batch-size, and run the same command again to go on"
            ) from e
        finally:
            pool.shutdown(cancel_futures=True)


def _in_process(job: Job, path: Path) -> Done:
    return _embedder(job)(path)


@cache
def _embedder(job: Job) -> Embedder:
    """The one of this process."""
    torch.set_num_threads(1)
    return Embedder(job)


def _trained_on(run: Path) -> tuple[str, dict[str, Any]]:
    """The data set of a run, and its settings."""
    if not (run / "recipe.yaml").is_file():
        load(run)  # says what is missing, most often
        return "nothing known", {}
    name, settings = split_spec(load_recipe(run / "recipe.yaml").data)
    return name, dict(settings)


def _checked_out(out: Path, shards: Path) -> Path:
    if out.suffix == ".parquet" or out.is_file():
        raise ZooError(f"{out}: the vectors of shards are a file for each: name a folder, --out {out.with_suffix('')}")
    if out.resolve() == shards.resolve():
        raise ZooError(f"{out}: the shards lie there, and would be overwritten: name another folder")
    return out


def _keep_apart(job: Job, shards: Sequence[Path]) -> None:
    """Refuse to write vectors over a shard, or those of two shards to one file."""
    format_of(shards, dict(job.columns))  # all of one kind, else a.tar and a.parquet would share a file
    sources = {path.resolve() for path in shards}
    for path in shards:
        if job.vectors_of(path).resolve() in sources:
            raise ZooError(f"{path}: its vectors would overwrite the shard {job.vectors_of(path)}: name another folder than {job.out}")


def _tell_strangers(job: Job, shards: Sequence[Path]) -> None:
    """Name files of vectors that belong to no shard, since a search in the folder finds them too."""
    own = {job.vectors_of(path) for path in shards}
    strangers = sorted(set(vector_files(job.out)) - own) if job.out.is_dir() else []
    if strangers:
        logger.warning(
            "%d files in %s are of none of these shards, such as %s: remove them if they are old", len(strangers), job.out, strangers[0]
        )
