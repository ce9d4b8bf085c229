"""The contrastive loss's Triton kernels over two processes, interpreted; tests/test_contrastive_triton.py runs this by itself."""

import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from zoo.kernels.contrastive import contrastive_loss

ROWS = 10  # of each process; a width of 8 is padded for the kernels


def outcome(x, y, ids, impl, **given):
    scale = torch.tensor(2.0, dtype=x.dtype, requires_grad=True)
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    loss = contrastive_loss(x, y, scale=scale, ids_x=ids, ids_y=ids, impl=impl, validate=False, **given)
    return [loss.detach(), *torch.autograd.grad(loss, (x, y, scale))]


def in_a_process(rank: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    (x, y), ids = torch.randn(2, 2 * ROWS, 8), torch.randint(100, 106, (2 * ROWS,))
    own = slice(rank * ROWS, (rank + 1) * ROWS)
    known = torch.tensor([[1, 2], [3, ROWS + 4], [ROWS + 4, 3], [5, 9 * ROWS]])  # the last names nobody
    here = known[(known[:, 0] >= own.start) & (known[:, 0] < own.stop)] - own.start  # rows of y count on from the own ones
    loss, dx, dy, dscale = outcome(x.double(), y.double(), ids, "reference", known=known)
    for exchange in ("gather", "ring"):
        ours = outcome(x[own], y[own], ids[own], "triton", known=here, group=dist.group.WORLD, exchange=exchange)
        means = torch.stack([ours[0], ours[3]])
        dist.all_reduce(means)
        for found, truth in ((means, torch.stack([loss, dscale]) * 2), (ours[1], dx[own] * 2), (ours[2], dy[own] * 2)):
            torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=2e-6)
    dist.destroy_process_group()


def test_two_processes_equal_one():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(in_a_process, (port,), nprocs=2)
