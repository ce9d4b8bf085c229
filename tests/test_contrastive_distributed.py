"""The contrastive loss over several processes equals that of one process which holds everything."""

import json
import os
import subprocess
import sys
import traceback
import warnings
import weakref
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch import multiprocessing as mp

from zoo.kernels._chunked import Chunked
from zoo.kernels.contrastive import ContrastiveLoss, contrastive_loss

DOUBLE = torch.float64
EXACT = {"rtol": 1e-10, "atol": 1e-12}  # float64: sums of a few dozen terms in another order
ROWS, DIM = 5, 3  # odd, so that the halves of a share differ
TWO = ("x", "y", "scale")
CASES: dict[str, tuple[tuple[str, ...], dict]] = {  # the tensors that are used, and the settings
    "plain": (TWO, {}),
    "rows": (TWO, {"direction": "rows", "normalize": True}),
    "columns": (TWO, {"direction": "columns"}),
    "sum": (TWO, {"reduction": "sum"}),
    "none": (TWO, {"reduction": "none"}),
    "index": ((*TWO, "positive", "weight"), {}),
    "fewer rows": ((*TWO, "positive", "ids", "known"), {"rows_of_x": 3}),
    "masks": ((*TWO, "positive", "weight", "ids", "known", "present"), {"normalize": True}),
    "smoothed teacher": ((*TWO, "soft", "known"), {"soft_weight": 0.4, "smoothing": 0.1}),
    "groups": ((*TWO, "groups", "present", "weight"), {}),
    "groups and teacher": ((*TWO, "groups", "ids", "soft"), {"soft_weight": 0.5}),
    "sigmoid": ((*TWO, "bias", "positive", "present"), {"form": "sigmoid"}),
    "sigmoid groups": ((*TWO, "bias", "groups"), {"form": "sigmoid", "smoothing": 0.1}),
    "queue": ((*TWO, "negatives"), {"direction": "rows"}),
    "unused bias": ((*TWO, "bias"), {}),
    "one side": (("x", "scale", "partner"), {}),
    "one side, known": (("x", "scale", "partner", "known"), {}),
    "one side, masks": (("x", "scale", "partner", "ids", "known", "present", "weight"), {"normalize": True}),
    "one side, groups": (("x", "scale", "groups", "present"), {}),
    "one side, teacher": (("x", "scale", "partner", "soft"), {"soft_weight": 0.4, "smoothing": 0.1}),
    "one side, sigmoid": (("x", "scale", "bias", "partner"), {"form": "sigmoid"}),
}
CHECKS = [
    "single rows",
    "again",
    "ddp",
    "compiled",
    "one gradient",
    "memory of the ring",
    "overlap in the ring",
    "unequal",
    "known beyond",
    "subgroup",
    "outsider",
]
NAMES = [f"{case}, {exchange}" for case in CASES for exchange in ("gather", "ring")] + CHECKS


def share(rank: int, used: tuple[str, ...], M: int = ROWS, N: int = ROWS) -> dict:
    """What one process hands over, all indices its own but in ``known``, which also names rows of both neighbours."""
    draw = torch.Generator().manual_seed(100 + rank)
    one_side = "y" not in used
    x, y, taught, taught_y = (torch.randn(n, DIM, dtype=DOUBLE, generator=draw) for n in (M, N, M, N))
    if rank % 2:
        x, y = x.T.contiguous().T, y.T.contiguous().T  # strided, with the same values
    positive = torch.randperm(N, generator=draw)[:M]
    positive[0] = -1
    partner = torch.arange(M).roll(1)
    partner[M // 2] = -1
    ids = torch.randint(0, 6, (M,), generator=draw), torch.randint(0, 6, (N,), generator=draw)
    groups, there = torch.randint(0, 4, (M,), generator=draw), torch.rand(M, generator=draw) > 0.2 + 0.2 * rank  # unequal counts
    whole = {
        "x": x,
        "y": y,
        "positive": positive,
        "weight": torch.rand(M, dtype=DOUBLE, generator=draw),
        "known": torch.tensor([[0, 1], [2, 0], [1, N + 2], [2, 1 - N]]),  # the last two are each other's other order
        "groups": groups,
        "present": there if one_side else (there, torch.rand(N, generator=draw) > 0.2),
        "soft": (taught,) if one_side else (taught, taught_y),
    }
    given = {name: value for name, value in whole.items() if name in used}
    if "partner" in used:
        given["positive"] = partner
    if "ids" in used:
        given |= {"ids_x": ids[0]} if one_side else {"ids_x": ids[0], "ids_y": ids[1]}
    return given


def joined(shares: list[dict]) -> dict:
    """What one process with everything hands over."""
    whole, N = {}, len(shares[0].get("y", shares[0]["x"]))
    for name, first in shares[0].items():
        parts = [given[name] for given in shares]
        if name == "positive":
            parts = [torch.where(p >= 0, p + rank * N, -1) for rank, p in enumerate(parts)]
        if name == "known":
            parts = [p + rank * torch.tensor([len(shares[0]["x"]), N]) for rank, p in enumerate(parts)]
        whole[name] = tuple(map(torch.cat, zip(*parts, strict=True))) if isinstance(first, tuple) else torch.cat(parts)
    return whole


def outcome(given: dict, used: tuple[str, ...], settings: dict, loss=contrastive_loss) -> dict[str, Tensor]:
    """The value and the gradients."""
    given = {**given, "scale": torch.tensor(2.0, dtype=DOUBLE)}
    if "bias" in used:
        given["bias"] = torch.tensor(-1.0, dtype=DOUBLE)
    leaves = {name: given[name].detach().clone().requires_grad_() for name in ("x", "y", "scale", "bias") if name in given}
    if "negatives" in used:  # the same queue in every process
        given["negatives"] = torch.randn(4, DIM, dtype=DOUBLE, generator=torch.Generator().manual_seed(7))
    value = loss(**{**given, **leaves}, validate=False, **settings)
    value.sum().backward()
    return {"value": value.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def check(used: tuple[str, ...], settings: dict, exchange: str, M: int = ROWS, N: int = ROWS, group=None) -> None:
    group = group or dist.group.WORLD
    rank, size = group.rank(), group.size()
    shares = [share(r, used, M, N) for r in range(size)]
    expected = outcome(joined(shares), used, {**settings, "impl": "reference"})
    found = outcome(shares[rank], used, {**settings, "exchange": exchange, "group": group})
    over = size if settings.get("reduction", "mean") == "mean" else 1
    for name, value in found.items():
        if value.ndim == 0:
            dist.all_reduce(value, group=group)
        truth = expected[name] if value.ndim == 0 else expected[name].unflatten(0, (size, -1))[rank]
        torch.testing.assert_close(value / over, truth, **EXACT, msg=lambda said, name=name: f"{name}: {said}")


def check_single_rows() -> None:
    for exchange in ("gather", "ring"):
        check(TWO, {}, exchange, 1, 1)


def check_again() -> None:
    given = share(dist.get_rank(), TWO)
    for exchange in ("gather", "ring"):
        first, second = (outcome(given, TWO, {"exchange": exchange, "group": dist.group.WORLD}) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


class TwoTowers(nn.Module):
    def __init__(self, **settings) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(DIM, 4), nn.Linear(DIM, 4)
        self.loss = ContrastiveLoss(scale=2.0, bias=-1.0, form="sigmoid", **settings)
        self.to(DOUBLE)

    def forward(self, x: Tensor, y: Tensor, **tensors: Tensor) -> Tensor:
        return self.loss(self.left(x), self.right(y), **tensors)


def check_ddp() -> None:
    used = ("x", "y", "positive", "weight", "present")
    shares = [share(rank, used) for rank in range(dist.get_world_size())]
    alone = TwoTowers(impl="reference")
    alone(**joined(shares)).backward()
    for exchange in ("gather", "ring"):
        together = nn.parallel.DistributedDataParallel(TwoTowers(group=dist.group.WORLD, exchange=exchange))
        together(**shares[dist.get_rank()]).backward()
        for a, b in zip(together.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, **EXACT)


def check_compiled() -> None:
    compiled = torch.compile(contrastive_loss, fullgraph=True, backend="aot_eager")
    used, settings = (*TWO, "positive"), {"exchange": "ring", "group": dist.group.WORLD}
    given = share(dist.get_rank(), used)
    found, expected = outcome(given, used, settings, compiled), outcome(given, used, settings)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], **EXACT)


def check_one_gradient() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    whole = joined([share(r, TWO) for r in range(size)])
    for name in ("x", "y", "scale"):
        for exchange in ("gather", "ring"):
            gradients = []
            for given, setting in (
                (share(rank, TWO), {"group": dist.group.WORLD, "exchange": exchange}),
                (whole, {"impl": "reference"}),
            ):
                tensors = {**given, "scale": torch.tensor(2.0, dtype=DOUBLE)}
                tensors[name] = tensors[name].clone().requires_grad_()
                gradients += torch.autograd.grad(contrastive_loss(**tensors, **setting), tensors[name])
            found, expected = gradients
            if name == "scale":
                dist.all_reduce(found)
            else:
                expected = expected.unflatten(0, (size, -1))[rank]
            torch.testing.assert_close(found / size, expected, **EXACT)


def check_memory_of_the_ring() -> None:
    """Of y, and of its gradients, no more arrives than one share before it is let go."""
    N, pass_on, arrived, most = 6, dist.batch_isend_irecv, [], {0: 0, 2: 0}  # by tag: y and its gradient

    def recorded(operations):
        arrived.extend((op.tag, weakref.ref(op.tensor)) for op in operations if op.op is dist.irecv)
        for tag in most:
            alive = {id(t): t.numel() for t in (found() for of, found in arrived if of == tag) if t is not None}
            most[tag] = max(most[tag], sum(alive.values()))
        return pass_on(operations)

    with mock.patch.object(dist, "batch_isend_irecv", recorded):
        outcome(share(dist.get_rank(), TWO, N, N), TWO, {"group": dist.group.WORLD, "exchange": "ring"})
    assert 0 < most[0] <= N * DIM
    assert 0 < most[2] <= N * DIM


def check_overlap_in_the_ring() -> None:
    """The next piece is under way before the present one is used, and is waited for after."""
    pass_on, compute, events = dist.batch_isend_irecv, Chunked.forward, []

    class Logged:
        def __init__(self, works):
            self.works = works

        def wait(self):
            events.append("wait")
            for work in self.works:
                work.wait()

    def started(operations):
        events.append("start")
        return [Logged(pass_on(operations))]

    def computed(*arguments, **settings):
        events.append("compute")
        return compute(*arguments, **settings)

    with mock.patch.object(dist, "batch_isend_irecv", started), mock.patch.object(Chunked, "forward", computed):
        contrastive_loss(**share(dist.get_rank(), TWO), scale=2.0, group=dist.group.WORLD, exchange="ring")
    assert events == [*["start", "compute", "wait"] * (dist.get_world_size() - 1), "compute"] * 2


def check_unequal() -> None:
    """All are told, where they would wait for each other or take what came for something else."""
    rank = dist.get_rank()
    plain, there = share(rank, TWO), torch.ones(ROWS, dtype=torch.bool)
    narrow = {name: value[:, : DIM - rank % 2] for name, value in plain.items()}
    for given, told in (
        (share(rank, TWO, ROWS + rank, ROWS + rank), r"rows of x: 5, 6.*; rows of y: 5, 6"),
        (narrow, r"not D: 3, 2"),
        ({name: value.to((torch.float32, torch.float64)[rank % 2]) for name, value in plain.items()}, "not bits of a number: 32, 64"),
        ({**plain, **({"ids_x": torch.arange(ROWS), "ids_y": torch.arange(ROWS)} if rank % 2 else {})}, "not ids given: 0, 1"),
        ({**plain, **({"present": (there, there)} if rank % 2 else {})}, "not present given: 0, 1"),
        ({**plain, **({"groups": torch.arange(ROWS)} if rank % 2 else {})}, "not positive given: 1, 0.*; groups given: 0, 1"),
        ({**plain, **({"soft": (plain["x"], plain["y"])} if rank % 2 else {})}, "not D' of soft: 0, 3"),
        ({"x": plain["x"], "positive": torch.arange(ROWS).roll(1), **({"y": plain["y"]} if rank % 2 else {})}, "not y given: 0, 1"),
    ):
        with pytest.raises(ValueError, match=told):
            contrastive_loss(**given, scale=2.0, group=dist.group.WORLD)


def check_known_beyond() -> None:
    """A row of y that no process holds; those that one holds are told from the place of this one."""
    rank, size = dist.get_rank(), dist.get_world_size()
    for column in (-rank * ROWS - 1, (size - rank) * ROWS):
        with pytest.raises(ValueError, match=rf"rows 0\.\.4 of x and {-5 * rank}\.\.{5 * (size - rank) - 1} of y"):
            contrastive_loss(**share(rank, TWO), scale=2.0, group=dist.group.WORLD, known=torch.tensor([[0, column]]))


def check_outsider() -> None:
    group = dist.new_group([0])
    if dist.get_rank():
        with pytest.raises(ValueError, match="group must be a process group that this process is a member of"):
            contrastive_loss(**share(dist.get_rank(), TWO), scale=2.0, group=group)


def check_subgroup() -> None:
    """Of the last two processes: their ranks in it are not those in the world."""
    size = dist.get_world_size()
    group = dist.new_group([size - 2, size - 1])
    if dist.get_rank() >= size - 2:
        for exchange in ("gather", "ring"):
            check(TWO, {}, exchange, group=group)


def work(rank: int, size: int, folder: str) -> None:
    """All checks in one process of a group; what went wrong, by name, goes to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size, timeout=timedelta(seconds=60))
    said = {}
    for name in NAMES:
        case, _, exchange = name.rpartition(", ")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                if name in CHECKS:
                    globals()[f"check_{name.replace(' ', '_')}"]()
                else:
                    used, settings = CASES[case]
                    M = settings.get("rows_of_x", ROWS)
                    check(used, {k: v for k, v in settings.items() if k != "rows_of_x"}, exchange, M)
            said[name] = ""
        except Exception:
            said[name] = traceback.format_exc()
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(said, file)
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def said(request, tmp_path_factory):
    """What went wrong in each process: starting them costs seconds, so all checks run in the same ones."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(work, (request.param, str(folder)), request.param)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(request.param)]


@pytest.mark.parametrize("name", NAMES)
def test_equals_one_process(name, said):
    assert not any(of_process[name] for of_process in said), "\n".join(of_process[name] for of_process in said)


@pytest.mark.slow
def test_example(tmp_path):
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command += [str(root / "examples/contrastive_distributed.py"), "--rows", "24", "--dim", "8"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [line.partition(" processes")[0] for line in done.stdout.splitlines()] == ["gather: 2", "ring: 2"]


def test_example_without_torchrun_says_how_to_start_it():
    environment = {name: value for name, value in os.environ.items() if name != "RANK"} | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, str(Path(__file__).parents[1] / "examples/contrastive_distributed.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "start it with torchrun, which makes the processes: torchrun --standalone --nproc-per-node 2" in done.stderr
