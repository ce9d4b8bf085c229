"""Two vectors mixed through a gate, against the formula written plainly in float64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels import gated_fusion as module
from zoo.kernels.gated_fusion import gated_fusion

INTERPRETED = Path(__file__).parent / "interpreted"
DOUBLE = torch.float64
EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64: sums of a few dozen products
DIM = 6


def truth(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    z = torch.sigmoid(F.linear(torch.cat([a, b], dim=-1), weight, bias))
    return z * a + (1 - z) * b


def inputs(*lead: int, dim: int = DIM, dtype: torch.dtype = DOUBLE) -> list[Tensor]:
    shapes = ((*lead, dim), (*lead, dim), (dim, 2 * dim), (dim,))
    return [torch.randn(shape, dtype=DOUBLE).to(dtype).requires_grad_() for shape in shapes]


def outcome(function, tensors: list[Tensor], upstream: Tensor) -> tuple[Tensor, ...]:
    y = function(*tensors)
    return (y.detach(), *torch.autograd.grad(y, tensors, upstream))


class TestValues:
    @pytest.mark.parametrize("lead", [(), (4,), (2, 3), (0,), (1, 0)])
    @pytest.mark.parametrize("count", [3, 4])
    def test_value_and_every_gradient(self, lead, count):
        tensors, upstream = inputs(*lead)[:count], torch.randn(*lead, DIM, dtype=DOUBLE)
        for ours, theirs in zip(outcome(gated_fusion, tensors, upstream), outcome(truth, tensors, upstream), strict=True):
            torch.testing.assert_close(ours, theirs, **EXACT)

    def test_gradcheck_of_both_derivatives(self):
        assert torch.autograd.gradcheck(gated_fusion, inputs(3))
        assert torch.autograd.gradgradcheck(gated_fusion, inputs(3))

    def test_any_strides(self):
        a, b = torch.randn(DIM, 4, dtype=DOUBLE).T, torch.randn(4, 2 * DIM, dtype=DOUBLE)[:, ::2]
        weight = torch.randn(2 * DIM, DIM, dtype=DOUBLE).T
        torch.testing.assert_close(gated_fusion(a, b, weight), truth(a, b, weight), **EXACT)

    @pytest.mark.parametrize("gate, index", [(1e4, 0), (-1e4, 1)])
    def test_an_open_gate_is_the_identity(self, gate, index):
        a, b, weight, _ = inputs(4, dtype=torch.float32)
        bias = torch.full((DIM,), gate)
        assert torch.equal(gated_fusion(a, b, weight, bias), (a, b)[index])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_errs_little_more_than_the_plain_form(self, dtype):
        """Root mean square errors, at most 1.14 times the plain form's over 20 seeds, and 1.6 times in the 32 numbers of the bias.

        Halves round the logit once more, between the two products: 8 % more error in their gradients, on average. At a width of 8 or
        less the library multiplies a half by another kernel than the whole, in float32 half as exactly; hence 32.
        """
        tensors, upstream = inputs(1000, dim=32, dtype=dtype), torch.randn(1000, 32).to(dtype)
        exact = outcome(truth, [t.detach().double().requires_grad_() for t in tensors], upstream.double())
        ours, plain = outcome(gated_fusion, tensors, upstream), outcome(truth, tensors, upstream)
        for mine, theirs, right, times in zip(ours, plain, exact, (1.2, 1.2, 1.2, 1.2, 2), strict=True):
            assert mine.dtype == dtype
            error, of_plain = ((t.double() - right).square().mean().sqrt() for t in (mine, theirs))
            assert error <= times * of_plain

    def test_keeps_one_tensor_beside_its_arguments(self):
        tensors, kept = inputs(50), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            gated_fusion(*tensors)
        others = {t.untyped_storage().data_ptr() for t in kept} - {t.untyped_storage().data_ptr() for t in tensors}
        assert len(others) == 1


class TestWithTorch:
    def test_compiles_as_one_graph(self):
        tensors, upstream = inputs(2, 3), torch.randn(2, 3, DIM, dtype=DOUBLE)
        compiled = torch.compile(gated_fusion, fullgraph=True, backend="aot_eager", dynamic=True)
        for ours, theirs in zip(outcome(compiled, tensors, upstream), outcome(truth, tensors, upstream), strict=True):
            torch.testing.assert_close(ours, theirs, **EXACT)

    def test_autocast_mixes_in_the_dtype_of_its_arguments(self):
        tensors = inputs(4, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            ours, plain = gated_fusion(*tensors), truth(*tensors)
        assert ours.dtype == plain.dtype == torch.float32
        torch.testing.assert_close(ours, plain, rtol=0, atol=0.05)  # the gate in bfloat16: 2**-8 of a logit of size 3, of a - b of size 3
        ours.sum().backward()
        assert {t.grad.dtype for t in tensors} == {torch.float32}


class TestErrors:
    @pytest.mark.parametrize(
        "changed, told",
        [
            ({"b": torch.randn(5, 6)}, r"a and b must both be \(\.\.\., D\), D from 1, not \(4, 6\) and \(5, 6\)"),
            ({"a": torch.randn(4, 0), "b": torch.randn(4, 0), "weight": torch.randn(0, 0)}, r"D from 1, not \(4, 0\) and \(4, 0\)"),
            ({"a": torch.ones(4, 6).long()}, "a must be float16, bfloat16, float32 or float64, not int64"),
            ({"b": torch.randn(4, 6).to_sparse()}, r"b must be dense, not sparse_coo: write b\.to_dense\(\)"),
            ({"weight": torch.randn(6, 12, device="meta")}, "weight lies on meta, a on cpu: move it"),
            ({"weight": torch.randn(6, 6)}, r"weight must be \(6, 12\), not \(6, 6\)"),
            ({"bias": torch.randn(12)}, r"bias must be \(6,\), not \(12,\)"),
            ({"weight": torch.randn(6, 12).double()}, "one dtype, not float32, float64"),
            ({"impl": "grouped"}, "impl='grouped' is no choice: one of auto, reference, triton"),
            (
                {"impl": "triton"},
                r"impl='triton' needs a CUDA device of capability 8\.0 .* but the tensors are on cpu: write impl='reference'",
            ),
        ],
    )
    def test_what_a_caller_can_get_wrong(self, changed, told):
        good = {"a": torch.randn(4, 6), "b": torch.randn(4, 6), "weight": torch.randn(6, 12)}
        with pytest.raises(ValueError, match=told):
            gated_fusion(**(good | changed))

    @pytest.mark.parametrize(
        "changed, told",
        [
            ({"b": [1.0]}, "b must be a tensor, not list"),
            ({"a": None, "bias": 0.0}, "a must be a tensor, not None; bias must be a tensor, not float"),
            ({"weight": torch.nn.Linear(12, 6)}, "weight must be a tensor, not Linear"),
        ],
    )
    def test_what_is_no_tensor(self, changed, told):
        good = {"a": torch.randn(4, 6), "b": torch.randn(4, 6), "weight": torch.randn(6, 12)}
        with pytest.raises(TypeError, match=told):
            gated_fusion(**(good | changed))

    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch itself, when it first meets forward mode
    def test_triton_refuses_forward_mode(self, monkeypatch):
        """The registered operation would give a tangent of 0. The reference has the right one."""
        tensors, direction = inputs(4, dtype=torch.float32), torch.ones(4, DIM)
        tangent = torch.func.jvp(lambda a: gated_fusion(a, *tensors[1:]), (tensors[0],), (direction,))[1]
        torch.testing.assert_close(tangent, torch.func.jvp(lambda a: truth(a, *tensors[1:]), (tensors[0],), (direction,))[1])
        monkeypatch.setattr(module, "choose", lambda *_: "triton")
        with pytest.raises(NotImplementedError, match=r"gated_fusion has no forward-mode derivatives .*write impl='reference'"):
            torch.func.jvp(lambda a: gated_fusion(a, *tensors[1:]), (tensors[0],), (direction,))

    def test_triton_refuses_float64(self):
        with pytest.raises(ValueError, match=r"not in float64: write impl='reference'"):
            gated_fusion(*inputs(4), impl="triton")


@pytest.mark.slow
def test_triton_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(INTERPRETED / "check_gated_fusion.py")]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
