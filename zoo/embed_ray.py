"""The vectors of shards on a Ray cluster, for those who outgrow one machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zoo.embed_shards import Done, Embedder, Job, Runner
from zoo.errors import Failure, ZooError


class Actor:
    """One worker of the cluster: it loads the model once, and writes the vectors of the shards that it is given.

    Args:
        job: What to do; its folders are seen by all machines.
    """

    def __init__(self, job: Job) -> None:
        import torch

        torch.set_num_threads(1)
        self.embedder = Embedder(job)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """A batch of Ray Data: names of shards in, what became of them out."""
        done = [self.embedder(Path(path)) for path in batch["shard"].tolist()]
        return {name: [str(one.shard) if name == "shard" else one._asdict()[name] for one in done] for name in Done._fields}


def on_ray(address: str) -> Runner:
    """What `zoo.embed_shards.embed_shards` takes as ``runner``.

    Args:
        address: Of a cluster, ``auto`` for the one that this machine belongs to, or ``local`` for a cluster of this machine alone.

    Raises:
        ZooError: If Ray is not installed, or no cluster is there.
    """
    try:
        import ray
    except ImportError as e:
        raise ZooError("a cluster needs Ray: pip install 'multimodal-zoo[ray]', or leave --ray out") from e

    def run(job: Job, shards: Sequence[Path], workers: int) -> Iterator[Done]:
        try:
            if address == "local":
                ray.init(address="local", num_cpus=workers, include_dashboard=False)
            else:
                ray.init(address=address)
        except (ConnectionError, ValueError) as e:
            raise ZooError(f"no Ray cluster at {address!r} ({e}): start one with ray start --head, or write --ray local") from e
        try:
            data = ray.data.from_items([{"shard": str(path.resolve())} for path in shards], override_num_blocks=len(shards))
            done = data.map_batches(Actor, fn_constructor_args=(job,), concurrency=workers, batch_size=1)
            for row in done.iter_rows():
                yield Done(Path(row["shard"]), int(row["vectors"]), bool(row["new"]), str(row["fault"]))
        except ray.exceptions.RayError as e:
            raise Failure(f"the cluster gave up ({str(e).splitlines()[0]}): run the same command again to go on") from e
        finally:
            ray.shutdown()

    return run
