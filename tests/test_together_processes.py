"""Contrast with a twin and queues, and matching, over two processes equal themselves over one that holds all rows."""

from datetime import timedelta

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.nn import functional as F

from tests.picture_text_model import Small, batch_of
from zoo import ZooError, make
from zoo.distributed import all_rows, longest, processes
from zoo.momentum import Drawn
from zoo.objectives.itm import _gathered
from zoo.types import Batch, ModalityInputs, Tokens

EXACT = {"rtol": 1e-8, "atol": 1e-10}  # float64
ROWS, WORLD = 4, 2
ITC = {"name": "itc", "temperature": "raw", "queue": 8, "alpha": 0.4, "ramp": 4}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def bound(settings):
    torch.manual_seed(5)
    model = Small().double()
    objective = make("objective", {"name": "together", "of": [{**ITC, **settings}], "momentum": 0.9})
    objective.bind(model)
    return model, objective.double()


def contrasted(rank):
    """Two steps of the rows of one process, None: of all: losses and gradients, and the queues behind them."""
    model, objective = bound({})
    objective.twin.model.vision.weight.data.mul_(1.5)
    found = {}
    for n in range(2):
        whole = batch_of(ROWS, n, ids=torch.arange(ROWS) + 2 * n)
        share = slice(None) if rank is None else slice(rank * ROWS // WORLD, (rank + 1) * ROWS // WORLD)
        batch = whole._replace(inputs={name: x.rows(share) for name, x in whole.inputs.items()}, ids=whole.ids[share])
        loss = objective(model, batch)
        model.zero_grad()
        loss.total.backward()
        objective.after_step(model, loss.state)
        found |= {f"{n} {name}": gradient for name, gradient in gradients(model).items()} | {f"{n}": loss.total.detach()}
    return found, {f"{i} {name}": value for i, q in enumerate(objective.of[0].queues) for name, value in q.state_dict().items()}


class Closest:
    """Takes the allowed candidate that is most alike, since a draw would differ between one process and several."""

    def __call__(self, logits, allowed):
        return Drawn(logits.masked_fill(~allowed, -torch.inf).argmax(1), allowed.any(1))


def shares():
    """A batch for each process, with texts of different length, and both as one; one subject is in both."""
    parts = [batch_of(3, seed, length=6 + seed, ids=torch.tensor([3 * seed, 100, 3 * seed + 2])) for seed in range(WORLD)]
    parts[0] = parts[0]._replace(known=torch.tensor([[0, 3]]))  # the first row of the other process
    parts[1] = parts[1]._replace(known=torch.tensor([[0, -3]]))
    length = max(p.inputs["text"].values.shape[1] for p in parts)
    padded = [[F.pad(x, (0, length - x.shape[1])) for x in p.inputs["text"][:2]] for p in parts]
    text = ModalityInputs(*(torch.cat(each) for each in zip(*padded, strict=True)))
    image = ModalityInputs(torch.cat([p.inputs["image"].values for p in parts]))
    return parts, Batch({"image": image, "text": text}, ids=torch.cat([p.ids for p in parts]), known=torch.tensor([[0, 3]]))


def matched(batch, among="global"):
    torch.manual_seed(7)
    model, objective = Small().double(), make("objective", "itm", among=among)
    objective.bind(model)
    objective.draw = Closest()
    loss = objective(model, batch)
    loss.total.backward()
    return {"total": loss.total.detach(), **gradients(model)}


def gathered(rank):
    """A gradient comes back from every process: each weighs the rows by its own numbers."""
    x = torch.tensor([[1.0], [2.0]]) + 10 * rank
    x.requires_grad_()
    rows = all_rows(x)
    (rows * (rank + 1) * torch.arange(1, 5)[:, None]).sum().backward()
    return rows.detach(), x.grad, all_rows(torch.tensor([rank == 0])), longest(3 + rank, x.device)


def lacked(rank):
    """Only the first process has pictures, and a gradient for them: it comes back from the other, too."""
    x = torch.ones(2, 3 - rank, 4, requires_grad=rank == 0)
    there = torch.full((2,), rank == 0)
    rows = _gathered(Tokens(x, there[:, None].expand(x.shape[:2]), None, there))
    (rows.tokens * (rank + 1)).sum().backward()
    return torch.zeros(()) if x.grad is None else x.grad, rows.mask


def refused(rank):
    for settings, says in (
        ({"queue": 6}, "queue: 6 is no multiple of the 4 vectors"),
        ({"same": "positive"}, r"itc\.same: positive: the queue of each process would count"),
    ):
        model, objective = bound(settings)
        with pytest.raises(ZooError, match=says):
            objective(model, batch_of(2, ids=torch.arange(2)))


def work(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    assert processes() == WORLD
    part = shares()[0][rank]
    torch.save([contrasted(rank), matched(part), matched(part, "local"), gathered(rank), lacked(rank)], f"{folder}/{rank}.pt")
    refused(rank)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(work, (str(folder),), WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def averaged(each, whole):
    """As DistributedDataParallel averages."""
    assert all(of.keys() == whole.keys() for of in each)
    for name, value in whole.items():
        torch.testing.assert_close(sum(of[name] for of in each) / WORLD, value, **EXACT, msg=lambda m, name=name: f"{name}: {m}")


def test_contrast_and_queues(found):
    whole, queues = contrasted(None)
    averaged([of[0][0] for of in found], whole)
    for _, held in (of[0] for of in found):
        for name, value in queues.items():
            torch.testing.assert_close(held[name], value, **EXACT, msg=lambda m, name=name: f"{name}: {m}")


def test_matching_among_all(found):
    whole = matched(shares()[1])
    averaged([of[1] for of in found], whole)
    assert abs(sum(of[2]["total"] for of in found) / WORLD - whole["total"]) > 1e-4  # so the other process' rows were drawn


def test_matching_among_its_own(found):
    for part, of in zip(shares()[0], found, strict=True):
        torch.testing.assert_close(of[2]["total"], matched(part)["total"], **EXACT)


def test_rows_of_all(found):
    for rank, (rows, gradient, claims, length) in enumerate(of[3] for of in found):
        assert rows.flatten().tolist() == [1, 2, 11, 12]
        assert gradient.flatten().tolist() == [3 * (2 * rank + 1), 3 * (2 * rank + 2)]
        assert claims.tolist() == [True, False]
        assert length == 4


def test_a_process_without_pictures_takes_part(found):
    (gradient, mask), (nothing, _) = (of[4] for of in found)
    assert gradient.unique().tolist() == [3]
    assert nothing == 0
    assert mask.tolist() == [[True] * 3] * 2 + [[False] * 3] * 2
