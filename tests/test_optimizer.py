"""Which parameter learns at which rate, when."""

import math

import pytest
import torch
from torch import nn

from zoo.errors import ZooError
from zoo.optimizer import freeze_all, learning_rate, make_optimizer
from zoo.sections import Group, Optimizer


def house():
    return nn.ModuleDict(
        {
            "model": nn.ModuleDict(
                {"vision": nn.ModuleDict({"stem": nn.Linear(2, 2), "stem_norm": nn.LayerNorm(2)}), "late": nn.Linear(2, 2)}
            )
        }
    )


def rates(module, optimizer, key="lr"):
    of = {id(p): group[key] for group in optimizer.param_groups for p in group["params"]}
    return {name: of[id(p)] for name, p in module.named_parameters() if id(p) in of}


def test_the_longest_prefix_wins():
    module = house()
    groups = (
        Group(prefix="late", lr=1.0),
        Group(prefix="vision.stem", lr=3.0, weight_decay=0.0),
        Group(prefix="vision", lr=2.0),
    )
    optimizer = make_optimizer(module, Optimizer(lr=9.0, weight_decay=0.5, groups=groups))
    found = rates(module, optimizer)
    assert found["model.late.weight"] == 1.0
    assert found["model.vision.stem_norm.weight"] == 2.0  # "stem" is a module's name, not a piece of one
    assert found["model.vision.stem.weight"] == found["model.vision.stem.bias"] == 3.0
    decays = rates(module, optimizer, "weight_decay")
    assert decays["model.vision.stem.weight"] == 0.0
    assert decays["model.late.weight"] == 0.5
    assert rates(module, optimizer, "peak") == found


def test_without_groups_all_learn_alike():
    module = house()
    settings = Optimizer(lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.02)
    optimizer = make_optimizer(module, settings)
    assert set(rates(module, optimizer).values()) == {0.1}
    assert len(rates(module, optimizer)) == len(list(module.parameters()))
    (group,) = optimizer.param_groups
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.95), 1e-6, 0.02)


def test_a_group_may_stand_still():
    module = house()
    optimizer = make_optimizer(module, Optimizer(lr=1.0, groups=(Group(prefix="late", lr=0.0),)))
    before = module["model"]["late"].weight.clone()
    sum(p.sum() for p in module.parameters()).backward()
    optimizer.step()
    assert torch.equal(module["model"]["late"].weight, before)


@pytest.mark.parametrize(
    "prefix, near",
    [
        ("visoin", "did you mean 'vision'"),
        ("objective", "the objective has no parameters: leave this group out"),
        ("vision.ste", "vision.stem"),
    ],
)
def test_an_unknown_prefix(prefix, near):
    with pytest.raises(ZooError, match="groups") as e:
        make_optimizer(house(), Optimizer(groups=(Group(prefix=prefix),)))
    assert repr(prefix) in str(e.value)
    assert near in str(e.value)


def test_a_group_of_what_is_frozen():
    module = house()
    freeze_all(module["model"], ["vision"])
    with pytest.raises(ZooError, match="no trained module named 'vision'"):
        make_optimizer(module, Optimizer(groups=(Group(prefix="vision"),)))


def test_nothing_to_train():
    module = house()
    freeze_all(module, ["model"])
    with pytest.raises(ZooError, match="nothing to train: every parameter is frozen"):
        make_optimizer(module, Optimizer())


def test_freezing_what_is_not_there():
    with pytest.raises(ZooError, match="freeze") as e:
        freeze_all(house(), ["model.visio"])
    assert "model.vision" in str(e.value)


def test_a_frozen_list_of_modules_stays_in_eval():
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Dropout(0.5), nn.Dropout(0.5)])

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    module = Blocks()
    freeze_all(module, ["blocks"])
    module.train()
    x = torch.ones(100)
    assert torch.equal(module(x), x)


# The learning rate


def deepspeed(step, warm, steps):
    """The formula of WarmupDecayLR, whose ``last_batch_iteration`` is the step."""
    if step < max(2, warm):
        return math.log(step + 1) / math.log(max(2, warm))
    return max(0.0, (steps - step) / max(1.0, steps - warm))


@pytest.mark.parametrize("steps, warmup, warm", [(100, 0.1, 10), (1000, 0.1, 100), (50, 7, 7)])
def test_log_warmup_is_deepspeeds(steps, warmup, warm):
    settings = Optimizer(warmup=warmup, warmup_shape="log", decay="linear")
    for step in range(steps):
        assert learning_rate(settings, step, steps) == pytest.approx(deepspeed(step, warm, steps), abs=1e-12)


def test_log_warmup_by_hand():
    settings = Optimizer(warmup=8, warmup_shape="log", decay="constant")
    assert [learning_rate(settings, s, 20) for s in (0, 1, 3, 7, 8, 19)] == pytest.approx([0, 1 / 3, 2 / 3, 1, 1, 1])


def test_linear_warmup_and_decay_by_hand():
    settings = Optimizer(warmup=0.4, warmup_shape="linear", decay="linear")
    assert [learning_rate(settings, s, 10) for s in range(10)] == pytest.approx(
        [1 / 5, 2 / 5, 3 / 5, 4 / 5, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    )


def test_cosine_decay_by_hand():
    settings = Optimizer(warmup=0, decay="cosine")
    assert [learning_rate(settings, s, 4) for s in range(4)] == pytest.approx([1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2])


def test_a_floor_is_where_the_decay_ends():
    settings = Optimizer(warmup=0, decay="cosine", floor=0.1)
    assert [learning_rate(settings, s, 4) for s in (0, 2, 4)] == pytest.approx([1, 0.55, 0.1])
    assert [learning_rate(Optimizer(warmup=0, floor=0.5), s, 4) for s in range(5)] == pytest.approx([1, 0.875, 0.75, 0.625, 0.5])
    assert learning_rate(Optimizer(warmup=4, floor=0.5), 0, 8) == pytest.approx(0.2), "a warm-up begins below it"


def test_exponential_decay_is_that_of_blip():
    """lr = max(min_lr, init_lr * decay_rate ** epoch), with a warm-up in the first epoch."""
    settings = Optimizer(warmup=2, decay="exponential", factor=0.9, floor=0.75)
    rates = [learning_rate(settings, s, 20, epoch=5) for s in range(20)]
    assert rates == pytest.approx([1 / 3, 2 / 3, *[1] * 3, *[0.9] * 5, *[0.81] * 5, *[0.75] * 5])
    assert [learning_rate(settings, s, 20, epoch=2.5) for s in (2, 3, 4, 5)] == pytest.approx([1, 0.9, 0.9, 0.81])


def test_a_warmup_of_one_is_one_step():
    settings = Optimizer(warmup=1.0, decay="constant")
    assert [learning_rate(settings, s, 4) for s in range(4)] == pytest.approx([0.5, 1, 1, 1])


def test_without_warmup_the_first_step_is_at_the_peak():
    assert learning_rate(Optimizer(warmup=0), 0, 100) == 1.0


@pytest.mark.parametrize("shape", ["linear", "log"])
@pytest.mark.parametrize("decay", ["linear", "cosine", "exponential", "constant"])
@pytest.mark.parametrize("steps, warmup", [(1, 0.1), (2, 0.5), (10, 20), (37, 0.1), (37, 0.0)])
def test_always_between_nothing_and_the_peak(shape, decay, steps, warmup):
    settings = Optimizer(warmup=warmup, warmup_shape=shape, decay=decay)
    rates = [learning_rate(settings, s, steps) for s in range(steps)]
    assert all(0.0 <= r <= 1.0 for r in rates)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
