"""The objectives over two processes, with gradients averaged as in training, equal themselves over one that holds all pairs."""

import math
from datetime import timedelta

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch import multiprocessing as mp

from zoo import ZooError, make
from zoo.types import Batch, ModelOutput

WORLD, B, D = 2, 3, 4
CLOSE = {"rtol": 1e-6, "atol": 1e-7}  # float64, but for the scale and its gradient
CASES = {  # the objective, its settings, and which of the 2 W B rows lack the second output
    "pair_infonce": ("pair_infonce", {}, []),
    "one process lacks an output": ("pair_infonce", {}, range(2 * B)),
    "all lack an output": ("pair_infonce", {}, range(2 * B * WORLD)),
    "infonce": ("infonce", {}, [1]),
    "infonce of one output": ("infonce", {"on": ["note"]}, []),
    "siglip": ("siglip", {}, [1, 8]),
}


class Given(nn.Module):
    """A model whose outputs are its parameters."""

    outputs = ("note", "visual")

    def __init__(self, note: Tensor, visual: Tensor, there: Tensor) -> None:
        super().__init__()
        self.note, self.visual, self.there = nn.Parameter(note), nn.Parameter(visual), there

    def forward(self, batch: Batch) -> ModelOutput:
        return ModelOutput({"note": self.note, "visual": self.visual}, {"visual": self.there})


def outcome(case: str, ranks: list[int]) -> dict[str, Tensor]:
    """Loss and gradients of the pairs that these processes hold; the vectors' gradients as (processes, 2, B, D)."""
    name, settings, lacking = CASES[case]
    draw = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, WORLD, 2, B, D, dtype=torch.float64, generator=draw)  # outputs, processes, queries and targets, pairs
    there = torch.tensor([row not in lacking for row in range(2 * B * WORLD)]).view(WORLD, 2, B)
    ids = torch.arange(2 * B * WORLD).view(WORLD, 2, B)
    ids[1, 0, 0] = ids[0, 1, 2]  # one item in both processes

    def laid(t: Tensor) -> Tensor:
        """Queries of all, then their targets."""
        return t[ranks].transpose(0, 1).flatten(0, 2)

    rows = 2 * B * len(ranks)
    positive = (torch.arange(rows) + rows // 2) % rows
    objective, model = make("objective", name, **settings), Given(laid(vectors[0]), laid(vectors[1]), laid(there))
    loss = objective(model, Batch({}, positive=positive, ids=laid(ids)))
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


def work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    found = {case: outcome(case, [rank]) for case in CASES} | {"alike": alike()}
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


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(work, (str(folder),), WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(case, found):
    whole = outcome(case, list(range(WORLD)))
    each = [of_process[case] for of_process in found]
    assert all(f.keys() == whole.keys() for f in each)
    for name, value in whole.items():
        joined = torch.cat([f[name] for f in each]) / WORLD if name.startswith("gradient") else sum(f[name] for f in each) / WORLD
        torch.testing.assert_close(joined, value, **CLOSE, msg=lambda m, name=name: f"{name}: {m}")


def test_all_but_itself_are_candidates(found):
    """Vectors that are all the same: the rows of both processes, less one, are equally likely."""
    mean = sum(of_process["alike"].item() for of_process in found) / WORLD
    assert mean == pytest.approx(math.log(2 * B * WORLD - 1), rel=1e-9)


def test_each_process_may_contrast_alone(found):
    batch = Batch({}, positive=(torch.arange(2 * B) + B) % (2 * B))
    for rank, of_process in enumerate(found):
        x = torch.randn(2 * B, D, generator=torch.Generator().manual_seed(rank))
        alone = make("objective", "pair_infonce")(Given(x, x.clone(), torch.ones(2 * B).bool()), batch).total
        torch.testing.assert_close(of_process["apart"], alone, rtol=1e-5, atol=1e-6)  # float32: dense beside block by block


def test_the_dense_loss_says_what_to_write_instead(found):
    says = (
        "pair_infonce.impl: 'reference' knows the negatives of one process only, and 2 train together: write impl: chunked, or across_pro"
    )
    assert all(of_process["refused"].startswith(says) for of_process in found)
