"""Rows through their own experts' weights, against every row's product written plainly in float64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from zoo.kernels import expert_linear as module
from zoo.kernels.expert_linear import expert_linear, route

INTERPRETED = Path(__file__).parent / "interpreted"
DOUBLE = torch.float64
EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64: sums of a few dozen products
EXPERTS, D_IN, D_OUT = 3, 5, 7
SIZES = (4, 0, 6)


def truth(x: Tensor, weights: Tensor, biases: Tensor, expert: Tensor) -> Tensor:
    """Each row's own weights, written out row by row."""
    own = expert.clamp(min=0)
    y = torch.einsum("...i,...oi->...o", x, weights[own]) + biases[own]
    return torch.where((expert >= 0)[..., None], y, 0)


def parameters(d_in: int = D_IN, d_out: int = D_OUT, experts: int = EXPERTS, dtype: torch.dtype = DOUBLE) -> tuple[Tensor, Tensor]:
    weights, biases = torch.randn(experts, d_out, d_in, dtype=dtype), torch.randn(experts, d_out, dtype=dtype)
    return weights.requires_grad_(), biases.requires_grad_()


def rows(*lead: int, dtype: torch.dtype = DOUBLE, dim: int = D_IN) -> Tensor:
    return torch.randn(*lead, dim, dtype=dtype, requires_grad=True)


def of_sizes(sizes: tuple[int, ...], *lead: int) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).expand(*lead, sum(sizes))


def check(y: Tensor, expected: Tensor, inputs: tuple[Tensor, ...], tolerance: dict[str, float]) -> None:
    torch.testing.assert_close(y, expected, **tolerance)
    upstream = torch.randn_like(y)
    ours, theirs = torch.autograd.grad(y, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, **tolerance)


class TestValues:
    @pytest.mark.parametrize("impl", ["auto", "reference", "grouped"])
    @pytest.mark.parametrize("lead", [(11,), (2, 10), (2, 3, 4), (0,), (2, 0)])
    def test_interleaved_rows(self, impl, lead):
        x, (weights, biases) = rows(*lead), parameters()
        expert = torch.randint(-1, EXPERTS, lead)
        y = expert_linear(x, weights, biases, expert=expert, impl=impl)
        check(y, truth(x, weights, biases, expert), (x, weights, biases), EXACT)

    @pytest.mark.parametrize("impl", ["auto", "reference", "grouped"])
    @pytest.mark.parametrize("lead", [(), (1,), (2,), (2, 3), (0,)])
    @pytest.mark.parametrize("sizes", [SIZES, (0, 0, 0), (2, 3, 1)])
    def test_runs_of_rows(self, impl, lead, sizes):
        x, (weights, biases) = rows(*lead, sum(sizes)), parameters()
        y = expert_linear(x, weights, biases, sizes=sizes, impl=impl)
        check(y, truth(x, weights, biases, of_sizes(sizes, *lead)), (x, weights, biases), EXACT)

    @pytest.mark.parametrize("impl", ["auto", "reference", "grouped"])
    @pytest.mark.parametrize("where", [{"expert": torch.arange(20).reshape(2, 10) % 4 - 1}, {"sizes": SIZES}])
    def test_experts_as_a_list(self, impl, where):
        x, (weights, biases) = rows(2, 10), parameters()
        y = expert_linear(x, list(weights), tuple(biases), **where, impl=impl)
        check(y, expert_linear(x, weights, biases, **where, impl=impl), (x, weights, biases), EXACT)

    def test_experts_of_a_list_are_not_laid_together(self):
        x, linears = rows(2, 10), [torch.nn.Linear(D_IN, D_OUT, dtype=DOUBLE) for _ in SIZES]
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
            expert_linear(x, [e.weight for e in linears], [e.bias for e in linears], sizes=SIZES)
        own = {e.weight.data_ptr() for e in linears}
        assert {t.data_ptr() for t in kept if D_OUT in t.shape} <= own

    def test_gradcheck(self):
        x, (weights, biases) = rows(2, 10), parameters()
        expert = torch.randint(-1, EXPERTS, (2, 10))
        for where in ({"expert": expert}, {"sizes": SIZES}):
            assert torch.autograd.gradcheck(lambda *t, where=where: expert_linear(*t, **where), (x, weights, biases))

    @pytest.mark.parametrize("where", [{"expert": torch.zeros(2, 10, dtype=torch.int64)}, {"sizes": (10,)}])
    def test_one_expert_is_linear(self, where):
        x, (weights, biases) = rows(2, 10), parameters(experts=1)
        torch.testing.assert_close(
            expert_linear(x, weights, biases, **where), torch.nn.functional.linear(x, weights[0], biases[0]), **EXACT
        )

    @pytest.mark.parametrize("where", [{"expert": torch.arange(20).reshape(2, 10) % 4 - 1}, {"sizes": SIZES}])
    @pytest.mark.parametrize("stride", ["transposed", "strided", "expanded"])
    def test_any_strides_and_no_bias(self, where, stride):
        weights = torch.randn(EXPERTS, D_IN, D_OUT, dtype=DOUBLE).transpose(1, 2)
        x = {
            "transposed": torch.randn(2, D_IN, 10, dtype=DOUBLE).transpose(1, 2),
            "strided": torch.randn(2, 20, 2 * D_IN, dtype=DOUBLE)[:, ::2, ::2],
            "expanded": torch.randn(1, 10, D_IN, dtype=DOUBLE).expand(2, -1, -1),
        }[stride]
        expert = where.get("expert", of_sizes(SIZES, 2))
        expected = truth(x, weights, torch.zeros(EXPERTS, D_OUT, dtype=DOUBLE), expert)
        torch.testing.assert_close(expert_linear(x, weights, **where), expected, **EXACT)

    @pytest.mark.parametrize("subset", [(0,), (1,), (2,), (0, 2), (1, 2)])
    @pytest.mark.parametrize("where", [{"expert": torch.arange(20).reshape(2, 10) % 4 - 1}, {"sizes": SIZES}])
    def test_gradients_of_some_inputs_only(self, where, subset):
        inputs = [t.detach() for t in (rows(2, 10), *parameters())]
        for i in subset:
            inputs[i].requires_grad_()
        wanted = tuple(inputs[i] for i in subset)
        y = expert_linear(*inputs, **where)
        check(y, truth(*inputs, where.get("expert", of_sizes(SIZES, 2))), wanted, EXACT)

    @pytest.mark.parametrize("dtype, digits", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11), (torch.float32, 2**-22)])
    @pytest.mark.parametrize("where", [{"expert": torch.arange(20).reshape(2, 10) % 4 - 1}, {"sizes": SIZES}])
    def test_each_dtype_is_within_its_rounding(self, where, dtype, digits):
        """Products are summed in float32; the result is rounded once, of sums of up to 20 terms of size 1."""
        inputs = tuple(t.detach().to(dtype).requires_grad_() for t in (rows(2, 10), *parameters()))
        wide = tuple(t.detach().double().requires_grad_() for t in inputs)
        y, expected = expert_linear(*inputs, **where), truth(*wide, where.get("expert", of_sizes(SIZES, 2)))
        assert y.dtype == dtype
        upstream = torch.randn_like(y)
        ours, theirs = torch.autograd.grad(y, inputs, upstream), torch.autograd.grad(expected, wide, upstream.double())
        for mine, other in zip((y, *ours), (expected, *theirs), strict=True):
            torch.testing.assert_close(mine.double(), other, rtol=2 * digits, atol=4 * digits)

    @pytest.mark.parametrize("impl", ["grouped", "reference"])
    def test_a_row_never_reaches_another_experts_gradient(self, impl):
        x, (weights, biases) = rows(4), parameters()
        with torch.no_grad():
            x[1], x[3] = torch.nan, torch.inf
        y = expert_linear(x, weights, biases, expert=torch.tensor([0, 1, 2, -1]), impl=impl)
        _, of_weights, of_biases = torch.autograd.grad(y[[0, 2, 3]].sum(), (x, weights, biases))
        assert y[1].isnan().all()
        assert torch.equal(y[3], torch.zeros(D_OUT, dtype=DOUBLE))
        assert of_weights[[0, 2]].isfinite().all()
        assert of_biases.isfinite().all()

    def test_results_repeat_bit_for_bit(self):
        x, (weights, biases) = rows(300, dtype=torch.float32), parameters(dtype=torch.float32)
        expert = torch.randint(-1, EXPERTS, (300,))
        first, second = (
            torch.autograd.grad(expert_linear(x, weights, biases, expert=expert).square().sum(), (x, weights, biases)) for _ in range(2)
        )
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class TestRoute:
    def test_rows_are_sorted_stably_with_those_without_an_expert_last(self):
        _, order, starts = route(torch.tensor([[2, -1, 0], [2, 0, -1]]), 3)
        assert order.tolist() == [2, 4, 0, 3, 1, 5]
        assert starts.tolist() == [0, 2, 2, 4, 6]

    @pytest.mark.parametrize("impl", ["auto", "reference"])
    def test_one_routing_serves_several_layers(self, impl):
        expert = torch.randint(-1, EXPERTS, (2, 10))
        x, (weights, biases), routing = rows(2, 10), parameters(), route(expert, EXPERTS)
        once = expert_linear(x, weights, biases, expert=routing, impl=impl)
        assert torch.equal(once, expert_linear(x, weights, biases, expert=expert, impl=impl))

    def test_an_index_out_of_range_is_told(self):
        with pytest.raises(ValueError, match=r"expert must lie in -1\.\.2, but holds -1\.\.3"):
            route(torch.tensor([-1, 3]), 3)
        with pytest.raises(ValueError, match="holds -2"):
            route(torch.tensor([-2, 0]), 3)

    def test_what_is_no_tensor_of_indices_is_told(self):
        with pytest.raises(TypeError, match="expert must be a tensor, not list"):
            route([0, 1], 3)
        with pytest.raises(ValueError, match="expert must be int64, not int32"):
            route(torch.tensor([0, 1], dtype=torch.int32), 3)


class TestWithTorch:
    @pytest.mark.parametrize("where", [{"expert": torch.arange(20).reshape(2, 10) % 4 - 1}, {"sizes": SIZES}])
    def test_compiles_as_one_graph(self, where):
        inputs = (rows(2, 10), *parameters())
        compiled = torch.compile(expert_linear, fullgraph=True, backend="aot_eager")
        check(compiled(*inputs, **where), expert_linear(*inputs, **where), inputs, EXACT)

    def test_compiles_once_for_many_lengths(self):
        graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(lambda *t, expert: expert_linear(*t, expert=expert), fullgraph=True, backend=graphs, dynamic=True)
        weights, biases = parameters()
        for length in (9, 12, 17):
            x, expert = rows(2, length), torch.randint(-1, EXPERTS, (2, length))
            check(compiled(x, weights, biases, expert=expert), truth(x, weights, biases, expert), (x, weights, biases), EXACT)
        assert graphs.frame_count == 1

    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck looks at it
    def test_operations_keep_the_rules_of_custom_ones(self):
        x, (weights, biases), (_, order, starts) = rows(10), parameters(), route(torch.arange(10) % 4 - 1, EXPERTS)
        opcheck(module._rows, (x, weights, biases, order, starts, "grouped"))
        opcheck(module._rows, (x, weights, None, order, starts, "grouped"))
        x, weights = x.detach(), weights.detach()
        opcheck(module._rows_backward, (torch.randn(10, D_OUT, dtype=DOUBLE), x, weights, order, starts, [True, False, True], "grouped"))

    def test_a_second_derivative_is_refused_but_by_the_reference(self):
        x, (weights, biases), where = rows(2, 10), parameters(), {"expert": torch.arange(20).reshape(2, 10) % 4 - 1}
        (once,) = torch.autograd.grad(expert_linear(x, weights, biases, **where).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match=r"expert_linear has first derivatives only.*write impl='reference'"):
            once.sum().backward()
        assert torch.autograd.gradgradcheck(lambda *t: expert_linear(*t, **where, impl="reference"), (x, weights, biases))
        assert torch.autograd.gradgradcheck(lambda *t: expert_linear(*t, sizes=SIZES), (x, weights, biases))

    @pytest.mark.parametrize("where", [{"expert": torch.arange(20).reshape(2, 10) % 4 - 1}, {"sizes": SIZES}])
    def test_autocast_casts_as_for_a_linear_layer(self, where):
        x, (weights, biases) = rows(2, 10, dtype=torch.float32), parameters(dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            y = expert_linear(x, weights, biases, **where)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, expert_linear(x.bfloat16(), weights.bfloat16(), biases.bfloat16(), **where))
        y.sum().backward()
        assert {t.grad.dtype for t in (x, weights, biases)} == {torch.float32}


class TestErrors:
    @pytest.mark.parametrize(
        "changed, told",
        [
            ({"x": torch.randn(2, 10, 4)}, r"x must be \(\.\.\., D_in\) and weights \(E, D_out, D_in\), not \(2, 10, 4\) and \(3, 7, 5\)"),
            ({"biases": torch.randn(7)}, r"biases must be \(3, 7\), not \(7,\)"),
            ({"sizes": SIZES}, "by expert or by sizes, by one of the two"),
            ({"expert": None}, "by expert or by sizes, by one of the two"),
            ({"expert": None, "sizes": (5, 5)}, r"sizes must be 3 numbers from 0 that sum to N=10, not \[5, 5\]"),
            ({"expert": None, "sizes": (12, -2, 0)}, "sizes must be 3 numbers from 0"),
            ({"expert": torch.zeros(10)}, r"expert must be \(2, 10\) int64, not \(10,\) float32"),
            ({"expert": torch.full((2, 10), 3)}, r"expert must lie in -1\.\.2"),
            ({"expert": route(torch.zeros(2, 10).long(), 2)}, r"one of \(2, 10\) rows and 2 experts, but here are \(2, 10\) and 3"),
            ({"biases": torch.randn(3, 7).double()}, "one dtype, not float32, float64"),
            ({"x": torch.ones(2, 10, 5).long()}, "x must be float16, bfloat16, float32 or float64, not int64"),
            ({"weights": torch.randn(3, 7, 5, device="meta")}, "weights lies on meta, x on cpu: move it"),
            ({"expert": torch.zeros(2, 10, device="meta").long()}, "expert lies on meta, x on cpu: move it"),
            ({"expert": route(torch.zeros(2, 10, device="meta").long(), 3)}, "expert lies on meta, x on cpu: move it"),
            (
                {
                    name: t.to("meta")
                    for name, t in {"x": rows(2, 10), "weights": parameters()[0], "expert": torch.zeros(2, 10).long()}.items()
                },
                "x lies on meta, where there are no values",
            ),
            ({"weights": [torch.randn(7, 5), torch.randn(7, 4)]}, r"of one shape, not \(7, 4\), \(7, 5\)"),
            ({"weights": []}, "of one shape, not empty"),
            ({"weights": [*torch.randn(2, 7, 5), torch.randn(7, 5).double()]}, "one dtype, not float32, float64"),
            ({"impl": "fast"}, "impl='fast' is no choice: one of auto, reference, grouped, triton"),
            (
                {"impl": "triton"},
                r"impl='triton' needs a CUDA device of capability 8\.0 .* but the tensors are on cpu: write impl='grouped'",
            ),
        ],
    )
    def test_what_a_caller_can_get_wrong(self, changed, told):
        good = {"x": torch.randn(2, 10, 5), "weights": torch.randn(3, 7, 5), "expert": torch.zeros(2, 10).long()}
        with pytest.raises(ValueError, match=told):
            expert_linear(**(good | changed))

    @pytest.mark.parametrize(
        "changed, told",
        [
            ({"x": [1.0]}, "x must be a tensor, not list"),
            ({"weights": torch.nn.Linear(5, 7), "biases": 0.0}, "weights must be a tensor, not Linear; biases must be a tensor, not float"),
            ({"expert": [0, 1]}, "expert must be a tensor, not list"),
            ({"expert": None, "sizes": 10}, "sizes must be a sequence of whole numbers, not int"),
            ({"expert": None, "sizes": "460"}, "sizes must be a sequence of whole numbers, not str"),
            ({"expert": None, "sizes": (4.0, 6.0, 0.0)}, "sizes must be whole numbers, not float"),
        ],
    )
    def test_what_is_of_the_wrong_type(self, changed, told):
        good = {"x": torch.randn(2, 10, 5), "weights": torch.randn(3, 7, 5), "expert": torch.zeros(2, 10).long()}
        with pytest.raises(TypeError, match=told):
            expert_linear(**(good | changed))

    @pytest.mark.parametrize("impl", ["grouped", "reference"])
    @pytest.mark.parametrize("number", [3, -2])
    def test_an_expert_that_is_not_there_is_told_by_each_implementation(self, impl, number):
        with pytest.raises(ValueError, match=r"expert must lie in -1\.\.2"):
            expert_linear(rows(4), *parameters(), expert=torch.tensor([0, 1, number, -1]), impl=impl)

    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch itself, when it first meets forward mode
    def test_forward_mode_is_refused_but_by_the_reference(self):
        x, (weights, biases), expert = rows(10).detach(), parameters(), torch.arange(10) % 4 - 1

        def tangent(**where: object) -> Tensor:
            return torch.func.jvp(lambda x: expert_linear(x, weights, biases, **where), (x,), (torch.ones_like(x),))[1]

        for where in ({"expert": expert, "impl": "reference"}, {"sizes": SIZES}):
            expected = truth(torch.ones_like(x), weights, torch.zeros_like(biases), where.get("expert", of_sizes(SIZES)))
            torch.testing.assert_close(tangent(**where), expected, **EXACT)
        with pytest.raises(NotImplementedError, match=r"expert_linear has no forward-mode derivatives .*write impl='reference'"):
            tangent(expert=expert, impl="grouped")

    def test_triton_refuses_float64(self):
        with pytest.raises(ValueError, match=r"not in float64: write impl='grouped'"):
            expert_linear(rows(4), *parameters(), expert=torch.zeros(4).long(), impl="triton")


@pytest.mark.slow
def test_triton_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(INTERPRETED / "check_expert_linear.py")]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
