"""The objectives over several processes, with gradients averaged as in training, equal themselves over one that holds all pairs."""

import math
from datetime import timedelta

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch import multiprocessing as mp

from zoo import ZooError, make
from zoo.collate import Known
from zoo.types import Batch, ModelOutput

B, D = 3, 4
CLOSE = {"rtol": 1e-6, "atol": 1e-7}  # float64, but for the scale and its gradient
CASES = {  # the objective, its settings, and which of all rows lack the second output
    "pair_infonce": ("pair_infonce", {}, []),
    "one process lacks an output": ("pair_infonce", {}, range(2 * B)),
    "all lack an output": ("pair_infonce", {}, range(2 * B * 4)),
    "infonce": ("infonce", {}, [1]),
    "infonce of one output": ("infonce", {"on": ["note"]}, []),
    "siglip": ("siglip", {}, [1, 8]),
    "siglip of one output": ("siglip", {"on": ["note"]}, []),
}
KNOWN = [(0, 7), (1, 9), (6, 4), (3, 10), (2, 0), (5, 8), (11, 22), (19, 2)]  # items: row r of process p holds item 2 B p + r, mostly


class Given(nn.Module):
    """A model whose outputs are its parameters."""

    outputs = ("note", "visual")

    def __init__(self, note: Tensor, visual: Tensor, there: Tensor) -> None:
        super().__init__()
        self.note, self.visual, self.there = nn.Parameter(note), nn.Parameter(visual), there

    def forward(self, batch: Batch) -> ModelOutput:
        return ModelOutput({"note": self.note, "visual": self.visual}, {"visual": self.there})


def outcome(case: str, world: int, rank: int | None) -> dict[str, Tensor]:
    """Loss and gradients of the pairs of one process, None: of all ``world``; the vectors' gradients as (processes, 2, B, D)."""
    name, settings, lacking = CASES[case]
    draw = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, world, 2, B, D, dtype=torch.float64, generator=draw)  # outputs, processes, queries and targets, pairs
    there = torch.tensor([row not in lacking for row in range(2 * B * world)]).view(world, 2, B)
    ids = torch.arange(2 * B * world).view(world, 2, B)
    ids[1, 0, 0] = ids[0, 1, 2]  # one item in both processes
    table, ranks = Known.of(torch.tensor(KNOWN), items=24), list(range(world)) if rank is None else [rank]

    def laid(t: Tensor) -> Tensor:
        """Queries of all, then their targets."""
        return t[ranks].transpose(0, 1).flatten(0, 2)

    rows = 2 * B * len(ranks)
    positive = (torch.arange(rows) + rows // 2) % rows
    objective, model = make("objective", name, **settings), Given(laid(vectors[0]), laid(vectors[1]), laid(there))
    known = table.within(laid(ids)) if rank is None else table.within(laid(ids), ids.flatten(1), rank)
    loss = objective(model, Batch({}, positive=positive, ids=laid(ids), known=known))
    loss.total.backward()
    found = {"total": loss.total.detach(), **loss.parts, **{n: p.grad for n, p in objective.named_parameters()}}
    for output, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[f"gradient of {output}"] = parameter.grad.view(2, len(ranks), B, D).transpose(0, 1)
    return found


def alike() -> Tensor:
    """The loss of vectors that are all the same."""
    same = torch.ones(2 * B, D, dtype=torch.float64)
    positive = (torch.arange(2 * B) + B) % (2 * B)
    return make("objective", "pair_infonce")(
        Given(same, same.clone(), torch.ones(2 * B).bool()), Batch({}, positive=positive)
    ).total.detach()


def work(rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    found = {case: outcome(case, world, rank) for case in CASES} | {"alike": alike()}
    apart = make("objective", "pair_infonce", impl="reference", across_processes=False)
    x = torch.randn(2 * B, D, generator=torch.Generator().manual_seed(rank))
    batch = Batch({}, positive=(torch.arange(2 * B) + B) % (2 * B))
    model = Given(x, x.clone(), torch.ones(2 * B).bool())
    found["apart"] = apart(model, batch).total.detach()
    with pytest.raises(ZooError) as caught:
        make("objective", "pair_infonce", impl="reference")(model, batch)
    found["refused"] = str(caught.value)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def found(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(work, (request.param, str(folder)), request.param)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


@pytest.mark.parametrize("case", CASES)
def test_several_processes_equal_one(case, found):
    """Known pairs lie on two processes too, and some of them on none."""
    world = len(found)
    whole = outcome(case, world, None)
    each = [of_process[case] for of_process in found]
    assert all(f.keys() == whole.keys() for f in each)
    for name, value in whole.items():
        joined = torch.cat([f[name] for f in each]) / world if name.startswith("gradient") else sum(f[name] for f in each) / world
        torch.testing.assert_close(joined, value, **CLOSE, msg=lambda m, name=name: f"{name}: {m}")


def test_all_but_itself_are_candidates(found):
    """Vectors that are all the same: the rows of all processes, less one, are equally likely."""
    mean = sum(of_process["alike"].item() for of_process in found) / len(found)
    assert mean == pytest.approx(math.log(2 * B * len(found) - 1), rel=1e-9)


def test_each_process_may_contrast_alone(found):
    batch = Batch({}, positive=(torch.arange(2 * B) + B) % (2 * B))
    for rank, of_process in enumerate(found):
        x = torch.randn(2 * B, D, generator=torch.Generator().manual_seed(rank))
        alone = make("objective", "pair_infonce")(Given(x, x.clone(), torch.ones(2 * B).bool()), batch).total
        torch.testing.assert_close(of_process["apart"], alone, rtol=1e-5, atol=1e-6)  # float32: dense beside block by block


def test_the_dense_loss_says_what_to_write_instead(found):
    says = (
        f"pair_infonce.impl: 'reference' knows the negatives of one process only, and {len(found)} train together: write impl: chunked, or "
        "across_processes: false"
    )
    assert all(of_process["refused"] == says for of_process in found)
