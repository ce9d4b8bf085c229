"""Which implementation of an operation runs where."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from ._faults import named

CAPABILITY = (8, 0)  # Ampere: the first with bfloat16 in its matrix instructions


def choose(impl: str, device: torch.device, dtype: torch.dtype, otherwise: str) -> str:
    """``impl``, or for "auto" the fastest there: "triton" if it can run, else ``otherwise``.

    Raises:
        ValueError: If "triton" is asked for where it cannot run.
    """
    if impl not in ("auto", "triton"):
        return impl
    possible = _runs_triton(device)
    if impl == "auto":
        return "triton" if possible and dtype.itemsize <= 4 else otherwise
    if dtype.itemsize > 4:
        raise ValueError(f"impl='triton' computes in float32, float16 or bfloat16, not in {named(dtype)}: write impl={otherwise!r}")
    if not possible and not _interprets_triton():
        raise ValueError(
            f"impl='triton' needs a CUDA device of capability 8.0 or more and the package triton, but the tensors are on {device}: "
            f"write impl={otherwise!r}, or set TRITON_INTERPRET=1 before Python starts, to try the kernels out on a CPU"
        )
    return "triton"


@torch.compiler.assume_constant_result
def precision_of_torch() -> str:
    """How torch's own products of float32 are formed now."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@torch.compiler.assume_constant_result
def _runs_triton(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.cuda is None or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= CAPABILITY


@torch.compiler.assume_constant_result
def _interprets_triton() -> bool:
    if find_spec("triton") is None:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)
