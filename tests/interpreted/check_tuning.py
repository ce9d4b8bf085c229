"""Tiles that are measured, on kernels that are interpreted; tests/test_contrastive_triton.py runs this by itself."""

import json

import pytest
import torch
from triton.runtime.errors import OutOfResources

from zoo.kernels import _configurations as configurations
from zoo.kernels import _contrastive_triton as in_triton
from zoo.kernels import tuning
from zoo.kernels._configurations import INTERPRETER, Configuration, Key, Tiles
from zoo.kernels.contrastive import contrastive_loss

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, on logarithms of 0 that a mask drops
SLOW, FAST = Configuration(16, 32, 16, 4, 1), Configuration(16, 16, 16, 4, 1)


@pytest.fixture(autouse=True)
def from_the_table():
    torch.manual_seed(0)
    yield
    tuning.reset()


@pytest.fixture
def step():
    x, y = torch.randn(2, 20, 8).requires_grad_().unbind()
    return lambda: torch.autograd.grad(contrastive_loss(x, y, scale=2.0, impl="triton"), (x, y))


@pytest.fixture
def clock(monkeypatch):
    """Seconds by the tile that ran last, so that a test knows which is the fastest."""

    def seconds(step):
        step()
        (tiles,) = configurations.measured.values()
        return 1.0 + (tiles.forward == SLOW) + (tiles.gradient == SLOW) - 0.5 * (tiles.forward == FAST) - 0.25 * (tiles.gradient == FAST)

    monkeypatch.setattr(tuning, "_host_clock", seconds)


def measured() -> Tiles:
    (tiles,) = configurations.measured.values()
    return tiles


def test_the_fastest_of_each_kernel_is_used_from_then_on(step, clock, monkeypatch):
    lines = []
    trials = tuning.tune(step, tiles=[SLOW, FAST], rounds=1, say=lines.append)
    assert measured() == Tiles(FAST, FAST)
    own = configurations.INTERPRETED
    assert [trial.tile for trial in trials] == [own.forward, SLOW, FAST, own.gradient, SLOW, FAST]
    assert len(lines) == len(trials)
    assert "half" not in lines[0]
    assert "plain forward: 32x16x16, 4 warps: 1000.000 ms" in lines[0]
    used = []
    real = in_triton.forward_tile.__class__.__getitem__

    def noted(kernel, grid):
        return lambda *arguments, **switches: (used.append((switches["BM"], switches["BN"])), real(kernel, grid)(*arguments, **switches))

    monkeypatch.setattr(in_triton.forward_tile.__class__, "__getitem__", noted)
    step()
    assert set(used) == {(16, 16)}


def test_the_table_stays_where_nothing_is_faster(step, clock):
    tuning.tune(step, tiles=[SLOW], rounds=1)
    assert measured() == configurations.INTERPRETED


def test_what_does_not_fit_the_device_is_told_and_not_used(step, clock, monkeypatch):
    real = in_triton._launch

    def launch(tile):
        if tile == FAST:
            raise OutOfResources(300, 227, "shared memory")
        return real(tile)

    monkeypatch.setattr(in_triton, "_launch", launch)
    trials = tuning.tune(step, tiles=[FAST], rounds=1)
    faults = [trial.fault for trial in trials if trial.tile == FAST]
    assert measured() == configurations.INTERPRETED
    assert all("out of resource: shared memory" in fault for fault in faults)


def test_another_error_leaves_the_tiles_as_they_were(step):
    calls = []

    def failing():
        calls.append(0)
        if len(calls) > 3:
            raise RuntimeError("no more")
        step()

    with pytest.raises(RuntimeError, match="no more"):
        tuning.tune(failing, tiles=[SLOW], rounds=1)
    assert all(tiles == configurations.INTERPRETED for tiles in configurations.measured.values())


def test_one_side_with_the_real_clock_and_own_candidates():
    x = torch.randn(20, 8, requires_grad=True)
    partner = (torch.arange(20) + 10) % 20
    trials = tuning.tune(lambda: contrastive_loss(x, scale=2.0, positive=partner, impl="triton").backward(), rounds=1)
    assert {trial.key.weight for trial in trials} == {"plain", "masked"}  # beside the diagonal, and on it
    assert {trial.kernel for trial in trials} == {"forward", "gradient"}
    assert all(trial.seconds > 0 for trial in trials)


def test_losses_are_the_same_to_rounding(step):
    before = step()
    configurations.measured[Key(INTERPRETER, in_triton._VERSION, "ieee", "plain")] = Tiles(SLOW, FAST)
    for ours, table in zip(step(), before, strict=True):
        torch.testing.assert_close(ours, table, rtol=1e-5, atol=1e-6)


def test_kept_in_a_file(step, clock, tmp_path):
    with pytest.raises(ValueError, match="nothing was measured in this process: call tune first"):
        tuning.save(tmp_path / "tiles.json")
    tuning.tune(step, tiles=[FAST], rounds=1)
    tuning.save(tmp_path / "tiles.json")
    tuning.reset()
    assert not configurations.measured
    tuning.load(tmp_path / "tiles.json")
    assert measured() == Tiles(FAST, FAST)
    assert [p.name for p in tmp_path.iterdir()] == ["tiles.json"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda known: known.update(format=2), "has format 2, this version reads 1"),
        (lambda known: known.update(device="NVIDIA H100"), "was measured on NVIDIA H100, this is interpreter"),
        (lambda known: known.pop("tiles"), "is no file of tiles"),
        (lambda known: known["tiles"][0]["forward"].update(rows="64"), "tiles are made of integers"),
        (lambda known: known["tiles"][0]["forward"].update(height=64), "is no file of tiles"),
        (lambda known: known["tiles"][0]["key"].update(triton=[3]), "is no file of tiles"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(step, clock, tmp_path, change, message):
    tuning.tune(step, tiles=[FAST], rounds=1)
    tuning.save(tmp_path / "tiles.json")
    tuning.reset()
    known = json.loads((tmp_path / "tiles.json").read_text())
    change(known)
    (tmp_path / "tiles.json").write_text(json.dumps(known))
    with pytest.raises(ValueError, match=message):
        tuning.load(tmp_path / "tiles.json")
    assert not configurations.measured


def test_a_file_that_is_no_json(tmp_path):
    (tmp_path / "tiles.json").write_bytes(b"\xff{")
    with pytest.raises(ValueError, match="is no file of tiles"):
        tuning.load(tmp_path / "tiles.json")


def test_a_step_without_the_loss_is_refused():
    with pytest.raises(ValueError, match="the step ran no Triton kernel of contrastive_loss"):
        tuning.tune(lambda: None)
    with pytest.raises(ValueError, match="rounds must be at least 1, not 0"):
        tuning.tune(lambda: None, rounds=0)


def test_candidates_of_a_device():
    for products, capability in (("half", 90), ("tf32", 80), ("ieee", 90), ("3xtf32", 100)):
        forward, gradient = (tuning.candidates(Key(capability, (3, 6), products, "plain"), kernel) for kernel in ("forward", "gradient"))
        assert len(forward) == 12
        assert len(gradient) == 24
        assert len(set(gradient)) == 24
        assert all(tile.tma == (capability >= 90 and products != "ieee") for tile in gradient)
