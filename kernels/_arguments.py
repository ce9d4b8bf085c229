"""What a caller of the contrastive loss can get wrong, told all at once."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Direction = Literal["rows", "columns", "both"]
Form = Literal["softmax", "sigmoid"]
Reduction = Literal["none", "sum", "mean"]
Impl = Literal["auto", "reference", "chunked", "triton"]
Precision = Literal["auto", "ieee", "tf32", "3xtf32"]
Exchange = Literal["gather", "ring"]
ScaleKind = Literal["log", "raw", "fixed"]
CHOICES = {
    "direction": Direction,
    "form": Form,
    "reduction": Reduction,
    "impl": Impl,
    "precision": Precision,
    "exchange": Exchange,
    "scale_kind": ScaleKind,
}


class Arguments(NamedTuple):
    """The tensors of one call, as given."""

    x: Tensor
    y: Tensor | None
    positive: Tensor | None
    groups: Tensor | tuple[Tensor, Tensor] | None
    ids_x: Tensor | None
    ids_y: Tensor | None
    ids_negatives: Tensor | None
    present: Tensor | tuple[Tensor, Tensor] | None
    soft: tuple[Tensor, ...] | None
    weight: Tensor | None
    negatives: Tensor | None
    known: Tensor | None


def check_choices(smoothing: float, soft_weight: float | None, **given: str) -> None:
    """Raise ValueError on the first setting that is none of its choices or outside its range."""
    for name, value in given.items():
        if value not in get_args(CHOICES[name]):
            raise ValueError(f"{name}={value!r} is no choice: one of {', '.join(get_args(CHOICES[name]))}")
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing={smoothing} must lie in 0..1, 1 excluded")
    if soft_weight is not None and not 0 <= soft_weight <= 1 - smoothing:
        raise ValueError(f"soft_weight={soft_weight} must lie in 0..1 - smoothing, here 0..{1 - smoothing:g}")


def check_scalars(**given: Tensor | float | None) -> None:
    """Raise ValueError on the first that is more than one number."""
    for name, value in given.items():
        if isinstance(value, Tensor) and value.ndim:
            raise ValueError(f"{name} must be a number or of shape (), not {tuple(value.shape)}")


def check_positive(**given: float | None) -> None:
    """Raise ValueError on the first that is not above 0."""
    for name, value in given.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value} must be positive")


def check_shapes(given: Arguments, direction: str, form: str) -> None:
    """Raise ValueError on what the shapes and types alone tell, all faults at once."""
    x, y, negatives = given.x, given.y, given.negatives
    if x.ndim != 2 or (y is not None and (y.ndim != 2 or y.shape[1] != x.shape[1])):
        raise ValueError(f"x must be (M, D) and y (N, D) or None, not {tuple(x.shape)} and {None if y is None else tuple(y.shape)}")
    M, N = len(x), len(x) if y is None else len(y)
    K = 0 if negatives is None else len(negatives)
    faults = [
        f"{name} must be floating point, not {_named(value.dtype)}"
        for name, value in {"x": x, "y": y, "negatives": negatives}.items()
        if value is not None and not value.is_floating_point()
    ]
    if negatives is not None and (negatives.ndim != 2 or negatives.shape[1] != x.shape[1]):
        faults.append(f"negatives must be (K, D) with D={x.shape[1]}, not {tuple(negatives.shape)}")
    faults += _faults_of_sides(given, M, N, direction)
    present_x, present_y = given.present if isinstance(given.present, tuple) else (given.present, None)
    groups_x, groups_y = given.groups if isinstance(given.groups, tuple) else (given.groups, None)
    faults += _faults_of_rows(M, torch.int64, {"positive": given.positive, "ids_x": given.ids_x, "groups": groups_x})
    faults += _faults_of_rows(N, torch.int64, {"ids_y": given.ids_y, "groups of y": groups_y})
    faults += _faults_of_rows(K, torch.int64, {"ids_negatives": given.ids_negatives})
    faults += _faults_of_rows(M, torch.bool, {"present": present_x})
    faults += _faults_of_rows(N, torch.bool, {"present of y": present_y})
    faults += _faults_of_rows(M, None, {"weight": given.weight})
    if given.known is not None and (given.known.ndim != 2 or given.known.shape[1] != 2 or given.known.dtype != torch.int64):
        faults.append(f"known must be (E, 2) int64, not {tuple(given.known.shape)} {_named(given.known.dtype)}")
    faults += _faults_of_soft(given, M, N, K, form)
    if faults:
        raise ValueError("; ".join(faults))


def _faults_of_rows(length: int, dtype: torch.dtype | None, given: dict[str, Tensor | None]) -> list[str]:
    """What is not one value a row, or not of the type that is wanted; None: any."""
    return [
        f"{name} must be ({length},){'' if dtype is None else f' {_named(dtype)}'}, not {tuple(value.shape)} {_named(value.dtype)}"
        for name, value in given.items()
        if value is not None and (value.shape != (length,) or (dtype is not None and value.dtype != dtype))
    ]


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _faults_of_sides(given: Arguments, M: int, N: int, direction: str) -> list[str]:
    """What belongs to two sides or to one, but not to both."""
    faults = []
    if given.groups is not None and given.positive is not None:
        faults.append("positives are named by positive or by groups, not by both")
    if given.y is None:
        faults += ["one side needs positive or groups"] if given.positive is None and given.groups is None else []
        faults += ["one side takes no ids_y: its ids are ids_x"] if given.ids_y is not None else []
        faults += ["one side takes one present, not a pair"] if isinstance(given.present, tuple) else []
        faults += ["one side takes one groups, not a pair"] if isinstance(given.groups, tuple) else []
    else:
        faults += ["two sides need both ids_x and ids_y, or neither"] if (given.ids_x is None) != (given.ids_y is None) else []
        if given.groups is None:
            too_many = given.positive is None and M > N
            faults += [f"positive=None pairs row i with row i, but x has {M} rows and y {N}"] if too_many else []
            faults += [f"y has no rows, but x has {M}"] if M and not N else []
        elif M != N and not isinstance(given.groups, tuple):
            faults.append(f"x has {M} rows and y {N}: groups must be a pair ({M},), ({N},)")
        elif M != N and direction != "rows":
            faults.append(f"with groups, direction={direction!r} needs as many rows of x ({M}) as of y ({N}): write direction='rows'")
    if given.ids_negatives is not None and (given.ids_x is None or given.negatives is None):
        faults.append("ids_negatives needs ids_x and negatives")
    return faults


def _faults_of_soft(given: Arguments, M: int, N: int, K: int, form: str) -> list[str]:
    if given.soft is None:
        return []
    wanted = [("x", M)] + ([] if given.y is None else [("y", N)]) + ([] if given.negatives is None else [("negatives", K)])
    shapes = [tuple(t.shape) for t in given.soft]
    faults = ["soft targets are distributions over the candidates: form='softmax' only"] if form != "softmax" else []
    if [s[0] for s in shapes if s] != [rows for _, rows in wanted] or len({s[1:] for s in shapes}) != 1 or len(shapes[0]) != 2:
        names = ", ".join(f"the teacher's {name} ({rows}, D')" for name, rows in wanted)
        faults.append(f"soft must be ({names}), not shapes {', '.join(map(str, shapes))}")
    return faults


def check_values(given: Arguments, spread: bool) -> None:
    """Raise ValueError on what the values alone tell, all faults at once. Waits for the device.

    Args:
        given: The call's tensors, of shapes that fit.
        spread: Whether targets are spread over a column's rows (soft or smoothed), so that each column needs a row of its own.
    """
    faults, positive = [], given.positive
    M, N = len(given.x), len(given.x) if given.y is None else len(given.y)
    if positive is not None and M:
        if bool(((positive < -1) | (positive >= N)).any()):
            faults.append(f"positive must lie in -1..{N - 1}, but holds {int(positive.min())}..{int(positive.max())}")
        if given.y is None and bool((positive == torch.arange(M, device=positive.device)).any()):
            faults.append("positive must not name the row itself")
        if spread and len(named := positive[positive >= 0]) > len(named.unique()):
            faults.append("soft or smoothed targets over columns need a row of its own for each column, but positive names one twice")
    if given.known is not None and bool(((given.known < 0) | (given.known >= given.known.new_tensor([M, N]))).any()):
        faults.append(f"known must name rows below {M} of x and below {N} of y")
    if given.weight is not None and bool((given.weight < 0).any()):
        faults.append(f"weight must not be negative, but holds {float(given.weight.min()):g}")
    if faults:
        raise ValueError("; ".join(faults))
