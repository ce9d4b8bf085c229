"""The contrastive loss over several processes, set against one process with everything.

On one machine with 8 GPUs (NCCL), on two such machines, and on a machine without any (gloo)::

    torchrun --standalone --nproc-per-node 8 examples/contrastive_distributed.py --rows 4096 --dim 1024
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 examples/contrastive_distributed.py
    torchrun --standalone --nproc-per-node 2 examples/contrastive_distributed.py
"""

import argparse
import os

import torch
from torch import Tensor
from torch import distributed as dist

from zoo.kernels.contrastive import contrastive_loss

TOLERANCE = 1e-4  # float32 sums of the same terms in another order; relative to the largest element


def main() -> None:
    parser = argparse.ArgumentParser(description="The contrastive loss over several processes, set against one process with everything.")
    parser.add_argument("--rows", type=int, default=256, help="rows of each process")
    parser.add_argument("--dim", type=int, default=64)
    options = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun, which makes the processes: torchrun --standalone --nproc-per-node 2 " + parser.prog)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        compare(options.rows, options.dim, device)
    finally:
        dist.destroy_process_group()


def compare(rows: int, dim: int, device: torch.device) -> None:
    """Print, for both kinds of exchange, how far value and gradients are from those of one process."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    draw = torch.Generator().manual_seed(0)  # all processes draw everything, and use their share of it
    x, y = (torch.randn(processes * rows, dim, generator=draw).to(device) for _ in range(2))
    own = slice(rank * rows, (rank + 1) * rows)
    alone = outcome(x, y, group=None, exchange="gather")
    for exchange in ("gather", "ring"):
        value, scale, dx, dy = outcome(x[own], y[own], group=dist.group.WORLD, exchange=exchange)
        for scalar in (value, scale):  # as DistributedDataParallel averages the gradients of parameters
            dist.all_reduce(scalar)
            scalar /= processes
        together = (value, scale, dx / processes, dy / processes)  # those of features are averaged on their way into the parameters
        expected = (alone[0], alone[1], alone[2][own], alone[3][own])
        errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(together, expected, strict=True)]
        if max(errors) > TOLERANCE:
            raise SystemExit(f"{exchange}: process {rank} is off by {errors}")
        if rank == 0:
            print(f"{exchange}: {processes} processes give {float(value):.6f}, one gives {float(alone[0]):.6f}; errors {errors}")


def outcome(x: Tensor, y: Tensor, **where) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss and its gradients with respect to the scale, x and y."""
    scale = torch.tensor(20.0, device=x.device)
    leaves = [t.detach().clone().requires_grad_() for t in (scale, x, y)]
    loss = contrastive_loss(leaves[1], leaves[2], scale=leaves[0], normalize=True, **where)
    scale, dx, dy = torch.autograd.grad(loss, leaves)
    return loss.detach(), scale, dx, dy


if __name__ == "__main__":
    main()
