"""Two vectors mixed feature by feature through a learned gate, without laying them side by side first."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ._choice import choose
from ._faults import faults_of_devices, faults_of_floats, faults_of_types, named, refuse_forward_mode

Impl = Literal["auto", "reference", "triton"]

_NAME = __name__.replace(".", "_")  # a lifted copy beside this one registers operations of its own


def gated_fusion(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
    """z * a + (1 - z) * b with z = sigmoid(weight [a; b] + bias), as NoteLLM-2 mixes its two vectors.

    Zhang et al., NoteLLM-2, 2024, https://arxiv.org/abs/2405.16789. The halves of the weight are multiplied one after the other; forward
    and backward never hold [a; b]. For the backward, one tensor of the size of a is kept beside the arguments: z, or in triton its
    logit, which loses less where the gate is nearly shut. float32 products are as exact as `torch.set_float32_matmul_precision`
    says. Under autocast the gate is computed as `F.linear` would, the mix in the dtype of a and b. triton is reverse mode only: no jvp,
    vmap or other transforms of `torch.func`.

    Args:
        a: (..., D), of any strides, D from 1; float16, bfloat16, float32 or float64.
        b: (..., D), of the same shape and dtype.
        weight: (D, 2D), as `nn.Linear(2 * D, D)` holds it.
        bias: (D,), or None.
        impl: reference: torch's own operations, differentiable twice; of 16 bits they round the logit once more than a product with [a; b]
            would, for 8 % more error in the gradients. triton: both products, in one sum, and the mix in one kernel; the backward
            in one kernel and library matmuls. auto: triton on CUDA (capability 8.0 or more, not float64), else reference.

    Returns:
        (..., D)

    Raises:
        TypeError: On what is no tensor.
        ValueError: On shapes, dtypes, devices or an ``impl`` that do not fit.
        RuntimeError: On a second derivative of triton's; NotImplementedError on one in forward mode.
    """
    _check(a, b, weight, bias, impl)
    if choose(impl, a.device, a.dtype, "reference") == "reference":
        return _reference(a, b, weight, bias)
    refuse_forward_mode("gated_fusion", (a, b, weight, bias))
    if torch.is_autocast_enabled(a.device.type):
        dtype = torch.get_autocast_dtype(a.device.type)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    given = (a, b, weight, bias)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    rows, D = a.shape[:-1].numel(), a.shape[-1]
    y, _ = _fused(a.reshape(rows, D), b.reshape(rows, D), weight, bias, keep)
    return y.reshape(a.shape)


def _check(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None, impl: str) -> None:
    if impl not in get_args(Impl):
        raise ValueError(f"impl={impl!r} is no choice: one of {', '.join(get_args(Impl))}")
    if faults := faults_of_types({"a": a, "b": b, "weight": weight}, {"bias": bias}):
        raise TypeError("; ".join(faults))
    if a.ndim < 1 or a.shape != b.shape or not a.shape[-1]:
        raise ValueError(f"a and b must both be (..., D), D from 1, not {tuple(a.shape)} and {tuple(b.shape)}")
    tensors, D = {"a": a, "b": b, "weight": weight, "bias": bias}, a.shape[-1]
    faults = faults_of_floats(tensors) + faults_of_devices(tensors)
    if weight.shape != (D, 2 * D):
        faults.append(f"weight must be ({D}, {2 * D}), not {tuple(weight.shape)}")
    if bias is not None and bias.shape != (D,):
        faults.append(f"bias must be ({D},), not {tuple(bias.shape)}")
    dtypes = {t.dtype for t in (a, b, weight, bias) if t is not None}
    if a.dtype != b.dtype or (len(dtypes) > 1 and not torch.is_autocast_enabled(a.device.type)):
        faults.append(f"a, b, weight and bias must have one dtype, not {', '.join(sorted(map(named, dtypes)))}")
    if faults:
        raise ValueError("; ".join(faults))


def _reference(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    D = a.shape[-1]
    weight_a, weight_b = weight.T.split(D)
    of_b = b.reshape(-1, D)  # not by their number: asking for it would fix it in an exported graph
    gate = of_b @ weight_b if bias is None else torch.addmm(bias, of_b, weight_b)
    gate = torch.addmm(gate, a.reshape(-1, D), weight_a)
    return torch.lerp(b, a, torch.sigmoid(gate).to(a.dtype).reshape(a.shape))


@torch.library.custom_op(f"{_NAME}::fused", mutates_args=())
def _fused(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
    """The mix (M, D), and the logit of the gate (M, D), empty unless it is to be kept."""
    from ._gated_fusion_triton import forward  # triton is there on Linux only

    with torch.cuda.device_of(a):  # Triton launches on the current device, whatever the tensors lie on
        return forward(a, b, weight, bias, keep)


@_fused.register_fake
def _(a, b, weight, bias, keep):
    return a.new_empty(a.shape), weight.new_empty(a.shape if keep else (0,))


@torch.library.custom_op(f"{_NAME}::fused_backward", mutates_args=())
def _fused_backward(
    dy: Tensor, gate: Tensor, a: Tensor, b: Tensor, weight: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ._gated_fusion_triton import backward

    with torch.cuda.device_of(a):
        return backward(dy, gate, a, b, weight, needs)


@_fused_backward.register_fake
def _(dy, gate, a, b, weight, needs):
    of_weight = weight.new_empty(weight.shape if needs[2] else (0,))
    return a.new_empty(a.shape), a.new_empty(a.shape), of_weight, weight.new_empty(weight.shape[:1] if needs[3] else (0,))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, b, weight, _, _ = inputs
    ctx.save_for_backward(output[1], a, b, weight)
    ctx.set_materialize_grads(False)  # the logit gets no gradient, and needs no zeros in its place


def _through(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:4])
    gradients = _fused_backward(dy.contiguous(), *ctx.saved_tensors, needs)
    return (*(gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)), None)


def _refuse_twice(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError("gated_fusion has first derivatives only: for second ones, as with create_graph=True, write impl='reference'")


_fused.register_autograd(_through, setup_context=_keep)
_fused_backward.register_autograd(_refuse_twice)
