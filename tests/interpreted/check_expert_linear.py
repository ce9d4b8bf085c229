"""The Triton kernels of expert_linear, interpreted on a CPU; tests/test_expert_linear.py runs this in a process of its own."""

import pytest
import torch
from torch import Tensor

from zoo.kernels import _expert_linear_triton as in_triton
from zoo.kernels.expert_linear import expert_linear

EXPERTS = 3
DIGITS = {torch.float32: 2**-22, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def inputs(lead: tuple[int, ...], d_in: int, d_out: int, dtype: torch.dtype = torch.float32, experts: int = EXPERTS) -> list[Tensor]:
    shapes = ((*lead, d_in), (experts, d_out, d_in), (experts, d_out))
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def outcome(tensors: list[Tensor], upstream: Tensor, **keywords) -> tuple[Tensor, ...]:
    y = expert_linear(*tensors, **keywords)
    return (y.detach(), *torch.autograd.grad(y, tensors, upstream.to(y.dtype)))


def check(tensors: list[Tensor], **keywords) -> None:
    """Against float64: one rounding of the result, in bfloat16 towards zero, for so the interpreter rounds; sums are float32's."""
    upstream = torch.randn(*tensors[0].shape[:-1], tensors[1].shape[1]).to(tensors[0].dtype)
    ours = outcome(tensors, upstream, impl="triton", **keywords)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    theirs = outcome(wide, upstream.double(), impl="reference", **keywords)
    digits = DIGITS[tensors[0].dtype]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == tensors[0].dtype
        torch.testing.assert_close(mine.double(), other, rtol=2 * digits, atol=2**-18)


def test_the_kernels_are_interpreted():
    assert in_triton.INTERPRETED


@pytest.mark.parametrize("dtype", DIGITS)
def test_interleaved_rows(dtype):
    check(inputs((2, 25), 19, 35, dtype), expert=torch.randint(-1, EXPERTS, (2, 25)))


@pytest.mark.parametrize("d_in, d_out", [(1, 1), (16, 32), (33, 17), (64, 48)])
def test_widths(d_in, d_out):
    check(inputs((20,), d_in, d_out), expert=torch.randint(-1, EXPERTS, (20,)))


@pytest.mark.parametrize("expert", [[1] * 33, [-1] * 5, [0], [-1], [], [2] * 16 + [0] * 16, [0, 1, 2] * 11])
def test_experts_without_rows_and_rows_without_experts(expert):
    check(inputs((len(expert),), 16, 16), expert=torch.tensor(expert, dtype=torch.int64))


def test_one_expert_and_many():
    check(inputs((20,), 16, 16, experts=1), expert=torch.zeros(20, dtype=torch.int64))
    check(inputs((20,), 16, 16, experts=9), expert=torch.arange(20) % 9)


def test_runs():
    check(inputs((2, 21), 16, 20), sizes=(4, 0, 17))


def test_more_row_tiles_than_one_group():
    check(inputs((16 * (in_triton.GROUP + 2),), 16, 40), expert=torch.randint(-1, EXPERTS, (16 * (in_triton.GROUP + 2),)))


@pytest.mark.parametrize("strides", ["rows", "columns", "shifted"])
def test_strides(strides):
    x, weights, biases = inputs((20,), 16, 16)
    storage = torch.randn(20, 64)
    x = {"rows": storage[:, :16], "columns": storage[:16].T[:20, :16], "shifted": storage[:, 1:17]}[strides].requires_grad_()
    check([x, weights.detach().transpose(1, 2).requires_grad_(), biases], expert=torch.randint(-1, EXPERTS, (20,)))


@pytest.mark.parametrize("subset", [(0,), (1,), (2,), (1, 2)])
def test_gradients_of_some_inputs_only(subset):
    tensors, expert = inputs((20,), 16, 16), torch.randint(-1, EXPERTS, (20,))
    everything = torch.autograd.grad(expert_linear(*tensors, expert=expert, impl="triton").sum(), tensors)
    some = [t.detach().requires_grad_(i in subset) for i, t in enumerate(tensors)]
    gradients = torch.autograd.grad(expert_linear(*some, expert=expert, impl="triton").sum(), [some[i] for i in subset])
    assert all(torch.equal(everything[i], gradient) for i, gradient in zip(subset, gradients, strict=True))


def test_no_bias():
    x, weights, biases = inputs((20,), 16, 16)
    expert = torch.randint(-1, EXPERTS, (20,))
    torch.testing.assert_close(
        expert_linear(x, weights, expert=expert, impl="triton"),
        expert_linear(x, weights, torch.zeros_like(biases), expert=expert, impl="reference"),
    )


def test_what_lies_around_is_not_read():
    """Rows of other experts, and memory beyond the tensors, hold NaN."""
    surrounded = torch.full((22, 16), torch.nan)
    surrounded[1:21] = torch.randn(20, 16)
    surrounded[3] = torch.nan  # row 2, which has no expert
    x, (_, weights, biases) = surrounded[1:21].requires_grad_(), inputs((20,), 16, 16)
    expert = torch.arange(20) % 2
    expert[2] = -1
    y = expert_linear(x, weights, biases, expert=expert, impl="triton")
    gradients = torch.autograd.grad(y.square().sum(), (x, weights, biases))
    assert all(t.isfinite().all() for t in (y, *gradients))
    assert torch.equal(y[2], torch.zeros(16))
    assert torch.equal(gradients[0][2], torch.zeros(16))


@pytest.mark.parametrize("row", [0, 4])  # what is loaded for rows beyond an expert's last is row 0
def test_nan_stays_with_its_expert(row):
    (x, weights, biases), expert, upstream = inputs((20,), 16, 16), torch.arange(20) % 3, torch.randn(20, 16)
    own = [e == row % 3 for e in range(3)]
    with torch.no_grad():
        x[row] = torch.nan
    y = expert_linear(x, weights, biases, expert=expert, impl="triton")
    _, of_weights, of_biases = torch.autograd.grad(y, (x, weights, biases), upstream)
    assert y.isnan().any(1).nonzero().flatten().tolist() == [row]
    assert of_weights.isnan().flatten(1).any(1).tolist() == own
    assert of_biases.isfinite().all()
    upstream[row] = torch.nan
    x = x.detach().nan_to_num().requires_grad_()
    gradients = torch.autograd.grad(expert_linear(x, weights, biases, expert=expert, impl="triton"), (x, weights, biases), upstream)
    assert gradients[0].isnan().any(1).nonzero().flatten().tolist() == [row]
    assert all(gradient.isnan().flatten(1).any(1).tolist() == own for gradient in gradients[1:])


def test_refuses_a_second_derivative():
    tensors = inputs((4,), 16, 16)
    y = expert_linear(*tensors, expert=torch.zeros(4, dtype=torch.int64), impl="triton")
    (once,) = torch.autograd.grad(y.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        once.sum().backward()
