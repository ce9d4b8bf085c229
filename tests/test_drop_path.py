"""Stochastic depth of the trunk: who is dropped how often, and when."""

import pytest
import torch
from timm.layers import DropPath
from timm.layers.drop import calculate_drop_path_rates
from timm.models.beit import Block as BeitBlock
from torch import nn

from zoo.trunk import Shape, Trunk

D, HEADS, N, M = 8, 2, 3, 4
ADDS = ("out", "ffn.fc2", "cross.out", "cross.ffn.fc2")  # of a block, what makes each thing that it adds


def rates(trunk: Trunk) -> list[list[float]]:
    """Of each block the rates of all places that drop."""
    return [[m.drop_prob for m in block.modules() if isinstance(m, DropPath)] for block in trunk.blocks]


def alone(speaks: str, shape: Shape, layers: int = 1) -> Trunk:
    """A trunk of which one sub-layer alone adds something."""
    trunk = Trunk(shape, layers, cross_layers=range(layers))
    for block in trunk.blocks:
        for name in ADDS:
            layer = block.get_submodule(name)
            nn.init.zeros_(layer.weight)
            nn.init.constant_(layer.bias, 1.0 if name == speaks else 0.0)
    return trunk


@pytest.mark.parametrize("layers", [1, 2, 5, 12])
def test_the_rate_rises_from_nothing_to_what_was_asked_for(layers):
    """As in timm and BEiT: 0, ..., rate, in even steps."""
    found = rates(Trunk(Shape(D, HEADS, drop_path=0.3), layers))
    expected = calculate_drop_path_rates(0.3, layers)
    assert found[0] == []
    assert [each for block in found[1:] for each in block] == pytest.approx(expected[1:])


def test_by_default_nothing_drops_and_nothing_is_drawn():
    trunk = Trunk(Shape(D, HEADS), 3, cross_layers=[1]).train()
    assert rates(trunk) == [[], [], []]
    state = torch.get_rng_state()
    trunk(torch.ones(2, N, D), memory=torch.ones(2, M, D))
    assert torch.equal(torch.get_rng_state(), state)


def test_cross_attention_drops_too():
    assert rates(Trunk(Shape(D, HEADS, drop_path=0.2), 2, cross_layers=[1])) == [[], [0.2, 0.2]]


@pytest.mark.parametrize("speaks", ADDS)
def test_whole_rows_go_without_and_the_mean_stays(speaks):
    """Each of 4000 rows has what the second block adds, over 0.75, or nothing of it; the mean is off by 0.029 on average at most."""
    shape = Shape(D, HEADS, drop_path=0.25, cross_ffn=True)
    trunk = alone(speaks, shape, 2)
    x, memory = torch.zeros(4000, N, D), torch.zeros(4000, M, D)
    added = trunk.train()(x, memory=memory).detach() - 1.0  # the first block adds 1 to every row
    rows = added[:, 0, 0]
    assert torch.equal(added, rows[:, None, None].expand_as(added))
    assert {round(value, 4) for value in rows.unique().tolist()} == {0.0, round(1 / 0.75, 4)}
    assert float(rows.mean()) == pytest.approx(1.0, abs=0.05)  # standard error 0.009
    assert torch.equal(trunk.eval()(x, memory=memory), torch.full_like(x, 2.0))


def test_a_block_draws_what_beits_draws():
    """The same seed drops the same rows of attention and feed-forward in timm's block."""
    theirs = BeitBlock(D, HEADS, qkv_bias=True, init_values=0.1, drop_path=0.5)
    ours = Trunk(Shape(D, HEADS, bias="qv", layer_scale=0.1, drop_path=0.5), 2).blocks[1]
    names = {"norm1": "norm1", "norm2": "norm2", "attn.proj": "out", "mlp.fc1": "ffn.fc1", "mlp.fc2": "ffn.fc2"}
    weights = {"qkv.weight": theirs.attn.qkv.weight, "qkv.q_bias": theirs.attn.q_bias, "qkv.v_bias": theirs.attn.v_bias}
    weights |= {"scale1": theirs.gamma_1, "scale2": theirs.gamma_2}
    for old, new in names.items():
        weights |= {f"{new}.{end}": getattr(theirs.get_submodule(old), end) for end in ("weight", "bias")}
    with torch.no_grad():
        for weight in weights.values():
            weight.normal_()
    ours.load_state_dict({name: weight.detach() for name, weight in weights.items()})
    trunk = Trunk(Shape(D, HEADS), 1)
    trunk.blocks[0] = ours
    x = torch.randn(16, N, D).double()
    torch.manual_seed(5)
    expected = theirs.double().train()(x)
    torch.manual_seed(5)
    torch.testing.assert_close(trunk.double().train()(x), expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(trunk.eval()(x), expected)


def test_recomputed_blocks_drop_the_same_rows():
    trunk = Trunk(Shape(D, HEADS, drop_path=0.5), 3, cross_layers=[2]).train()
    x, memory = torch.randn(8, N, D), torch.randn(8, M, D)
    found = []
    for recomputes in (False, True):
        if recomputes:
            trunk.checkpoint_gradients()
        torch.manual_seed(3)
        out = trunk(x, memory=memory)
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad.clone() for p in trunk.parameters())])
        trunk.zero_grad()
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_names_of_the_weights_are_the_same():
    assert [*Trunk(Shape(D, HEADS, drop_path=0.1), 2).state_dict()] == [*Trunk(Shape(D, HEADS), 2).state_dict()]
