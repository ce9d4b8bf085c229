"""Who sees whom, worked by hand, and attention against its formula in float64."""

import pytest
import torch
from torch import Tensor

from zoo.attention import HIDDEN, Sight, attention, sight

CPU = torch.device("cpu")


def visible(seen: Sight, places: int, keys: int) -> list[str]:
    """Rows of the first row's mask, ``x`` where a place sees a key."""
    assert not seen.is_causal
    added = torch.zeros(1, 1, places, keys) if seen.added is None else seen.added.expand(-1, -1, places, keys)
    assert set(added.unique().tolist()) <= {0.0, HIDDEN}
    return ["".join("x" if number == 0 else "." for number in row) for row in added[0, 0].tolist()]


def real(rows: list[str]) -> Tensor:
    return torch.tensor([[letter == "x" for letter in row] for row in rows])


def test_without_anything_to_hide_there_is_no_mask():
    assert sight("all", 3, 0, None, None, CPU) == Sight()
    assert sight("causal", 3, 0, None, None, CPU) == Sight(is_causal=True)
    assert sight("causal", 1, 7, None, None, CPU) == Sight()
    assert sight(4, 1, 7, None, None, CPU) == Sight()


@pytest.mark.parametrize(
    "attend, places, past, mask, expected",
    [
        ("all", 3, 0, ["xx."], ["xx.", "xx.", "xx."]),
        ("causal", 3, 0, ["xxx"], ["x..", "xx.", "xxx"]),
        ("causal", 3, 0, [".xx"], ["...", ".x.", ".xx"]),
        ("causal", 2, 2, None, ["xxx.", "xxxx"]),
        ("causal", 2, 2, [".xxx"], [".xx.", ".xxx"]),
        ("causal", 1, 3, ["x.xx"], ["x.xx"]),
        (0, 3, 0, None, ["x..", "xx.", "xxx"]),
        (2, 4, 0, None, ["xx..", "xx..", "xxx.", "xxxx"]),  # the picture sees itself; words see it and those before them
        (2, 4, 0, ["xxx."], ["xx..", "xx..", "xxx.", "xxx."]),
        (4, 4, 0, None, ["xxxx"] * 4),
        (2, 2, 2, None, ["xxx.", "xxxx"]),
    ],
)
def test_who_sees_whom(attend, places, past, mask, expected):
    seen = sight(attend, places, past, None if mask is None else real(mask), None, CPU)
    assert visible(seen, places, places + past) == expected
    blind = ["x" not in row for row in expected]
    assert seen.blind.expand(1, 1, places, 1).flatten().tolist() == blind


def test_a_mask_may_differ_from_place_to_place():
    rows = ["xx.", "..x", "..."]
    seen = sight("all", 3, 0, real(rows)[None], None, CPU)
    assert visible(seen, 3, 3) == rows
    assert visible(sight("causal", 3, 0, real(rows)[None], None, CPU), 3, 3) == ["x..", "...", "..."]
    assert seen.blind.flatten().tolist() == [False, False, True]


@pytest.mark.parametrize("shape", [(2, 3, 3), (4, 2, 3, 3)])
def test_a_bias_is_added_where_a_place_sees(shape):
    bias = torch.randn(shape)
    whole = bias.expand(4, 2, 3, 3)
    assert torch.equal(sight("all", 3, 0, None, bias, CPU).added.expand(4, 2, 3, 3), whole)
    lower = torch.ones(3, 3).tril().bool()
    assert torch.equal(sight("causal", 3, 0, None, bias, CPU).added.expand(4, 2, 3, 3), whole.where(lower, HIDDEN))
    mask = real(["xxx", "x..", "...", ".xx"])
    assert torch.equal(sight("all", 3, 0, mask, bias, CPU).added, whole.where(mask[:, None, None], HIDDEN))


def by_hand(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, bias: Tensor) -> Tensor:
    """The formula, with places that see nothing reading zeros."""
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) / query.shape[-1] ** 0.5 + bias
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0)
    return torch.einsum("bhqk,bhkd->bqhd", weights, value).flatten(2)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("attend", ["all", "causal", 2])
def test_the_formula(attend, biased):
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = real(["xxxxx", "..xxx", "xxx.."])
    bias = torch.randn(2, 5, 5, dtype=torch.float64) if biased else None
    allowed = mask[:, None, None]
    if attend != "all":
        i = torch.arange(5)
        allowed = allowed & ((i <= i[:, None]) | (i < (0 if attend == "causal" else attend)))
    expected = by_hand(query, key, value, allowed, torch.zeros(()) if bias is None else bias)
    read = attention(query, key, value, sight(attend, 5, 0, mask, bias, CPU))
    torch.testing.assert_close(read, expected, rtol=0, atol=1e-14)
    weight = torch.randn_like(read)
    ours, theirs = (torch.autograd.grad((out * weight).sum(), (query, key, value)) for out in (read, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_places_that_see_nothing_read_zeros_in_every_precision(dtype):
    torch.manual_seed(0)
    query, key, value = ((30 * torch.randn(2, 2, 3, 8)).to(dtype).requires_grad_() for _ in range(3))
    for bias in (None, torch.full((2, 3, 3), -1e3)):
        read = attention(query, key, value, sight("causal", 3, 0, real(["...", ".xx"]), bias, CPU))
        assert torch.equal(read[0], torch.zeros_like(read[0]))
        assert torch.equal(read[1, 0], torch.zeros_like(read[1, 0]))
        assert bool(read[1, 1:].any())
        for gradient in torch.autograd.grad(read.float().square().sum(), (query, key, value)):
            assert bool(gradient.isfinite().all())
            assert not gradient[0].any()


def test_dropout_is_of_the_weights():
    torch.manual_seed(0)
    query, key, value = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 10_000, 4), torch.ones(1, 1, 10_000, 4)
    assert float(attention(query, key, value, Sight())[0, 0, 0]) == pytest.approx(1)
    mean = float(attention(query, key, value, Sight(), 0.5)[0, 0, 0])
    assert mean != 1
    assert mean == pytest.approx(1, abs=0.05)  # five standard deviations of 1 / sqrt(10 000)
