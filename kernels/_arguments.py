"""What a caller of the contrastive loss can get wrong, told all at once."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ._faults import faults_of_devices, faults_of_floats, faults_of_types, named, type_named

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


def check_choices(smoothing: float, soft_weight: float, is_taught: bool, **given: str) -> None:
    """Raise on the first setting that is none of its choices or outside its range: ValueError, or TypeError for what is no number."""
    for name, value in given.items():
        if value not in get_args(CHOICES[name]):
            raise ValueError(f"{name}={value!r} is no choice: one of {', '.join(get_args(CHOICES[name]))}")
    check_numbers(smoothing=smoothing, soft_weight=soft_weight)
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing={smoothing} must lie in 0..1, 1 excluded")
    if not 0 <= soft_weight <= 1:
        raise ValueError(f"soft_weight={soft_weight} must lie in 0..1")
    if is_taught and soft_weight > 1 - smoothing:
        raise ValueError(f"soft_weight={soft_weight} must lie in 0..1 - smoothing, here 0..{1 - smoothing:g}")


def check_numbers(**given: Any) -> None:
    """Raise TypeError on the first that is no real number."""
    for name, value in given.items():
        if not isinstance(value, Real):
            raise TypeError(f"{name} must be a number, not {type_named(value)}")


def check_positive(**given: Any) -> None:
    """Raise on the first that is no number, or not above 0 or not finite; TypeError or ValueError."""
    check_numbers(**given)
    for name, value in given.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value} must be positive and finite")


def check_scalars(scale: Tensor | float, bias: Tensor | float | None) -> None:
    """Raise TypeError or ValueError if ``scale`` or ``bias`` is not one number, or as a number of Python's out of its range."""
    for name, value in {"scale": scale, "bias": bias}.items():
        if isinstance(value, Tensor):
            if value.ndim:
                raise ValueError(f"{name} must be a number or of shape (), not {tuple(value.shape)}")
            if value.is_complex() or value.device.type == "meta":
                raise ValueError(f"{name} must be a real number, not {named(value.dtype)} on {value.device}")
    if not isinstance(scale, Tensor):
        check_positive(scale=scale)
    if not isinstance(bias, Tensor | None):
        check_numbers(bias=bias)


def _check_types(given: Arguments) -> None:
    """Raise TypeError naming all that are no tensors, or no tuples of them, where such are wanted."""
    optional, faults = dict(given._asdict()), []
    wanted = {"x": optional.pop("x")}
    for name in ("groups", "present"):
        value = optional.pop(name)
        if isinstance(value, tuple) and len(value) == 2:
            wanted |= {name: value[0], f"{name} of y": value[1]}
        elif isinstance(value, tuple | list):
            found = f"a {type_named(value)} of {len(value)}"
            faults.append(f"{name} must be a tensor, or a tuple of two: ({name} of x, {name} of y), not {found}")
        else:
            optional[name] = value
    soft = optional.pop("soft")
    if isinstance(soft, tuple):
        wanted |= {f"soft[{i}]": taught for i, taught in enumerate(soft)}
    elif soft is not None:
        faults.append(f"soft must be a tuple of the teacher's tensors, not {type_named(soft)}")
    if faults := faults_of_types(wanted, optional) + faults:
        raise TypeError("; ".join(faults))


def check_shapes(given: Arguments, direction: str, form: str) -> None:
    """Raise on what shapes, dtypes and devices tell, all faults at once: ValueError, or TypeError for what is no tensor."""
    _check_types(given)
    x, y, negatives = given.x, given.y, given.negatives
    if x.ndim != 2 or (y is not None and (y.ndim != 2 or y.shape[1] != x.shape[1])):
        found = f"{tuple(x.shape)} and {None if y is None else tuple(y.shape)}"
        raise ValueError(f"x must be (M, D) and y (N, D) or None, not {found}{': write x[None] for one vector' if x.ndim == 1 else ''}")
    M, N = len(x), len(x) if y is None else len(y)
    K = 0 if negatives is None else len(negatives)
    faults = _faults_of_places(given)
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
        faults.append(f"known must be (E, 2) int64, not {tuple(given.known.shape)} {named(given.known.dtype)}")
    faults += _faults_of_soft(given, M, N, K, form)
    if faults:
        raise ValueError("; ".join(faults))


def _faults_of_places(given: Arguments) -> list[str]:
    """What cannot be multiplied, or lies on another device than x."""
    soft = {f"soft[{i}]": taught for i, taught in enumerate(given.soft or ())}
    floats = {"x": given.x, "y": given.y, "negatives": given.negatives, **soft}
    tensors = {**floats, **{name: value for name, value in given._asdict().items() if isinstance(value, Tensor)}}
    for name, value in (("groups", given.groups), ("present", given.present)):
        tensors |= {name: value[0], f"{name} of y": value[1]} if isinstance(value, tuple) else {}
    faults = faults_of_floats(floats) + faults_of_devices(tensors)
    if given.x.device.type == "meta":
        faults.append("x lies on meta, where there are no values: move it to a device")
    if given.weight is not None and given.weight.is_complex():
        faults.append(f"weight must be real, not {named(given.weight.dtype)}")
    return faults


def _faults_of_rows(length: int, dtype: torch.dtype | None, given: dict[str, Tensor | None]) -> list[str]:
    """What is not one value a row, or not of the type that is wanted; None: any."""
    return [
        f"{name} must be ({length},){'' if dtype is None else f' {named(dtype)}'}, not {tuple(value.shape)} {named(value.dtype)}"
        for name, value in given.items()
        if value is not None and (value.shape != (length,) or (dtype is not None and value.dtype != dtype))
    ]


def _faults_of_sides(given: Arguments, M: int, N: int, direction: str) -> list[str]:
    """What belongs to two sides or to one, but not to both."""
    faults = []
    if given.groups is not None and given.positive is not None:
        faults.append("positives are named by positive or by groups, not by both")
    if given.y is None:
        if given.positive is None and given.groups is None:
            faults.append("one side needs positive=(M,), the partner of each row, or groups=(M,)")
        faults += ["one side takes no ids_y: its ids are ids_x"] if given.ids_y is not None else []
        faults += ["one side takes one present, not a pair"] if isinstance(given.present, tuple) else []
        faults += ["one side takes one groups, not a pair"] if isinstance(given.groups, tuple) else []
    else:
        faults += ["two sides need both ids_x and ids_y, or neither"] if (given.ids_x is None) != (given.ids_y is None) else []
        if given.groups is None:
            if given.positive is None and M > N:
                faults.append(f"positive=None pairs row i with row i, but x has {M} rows and y {N}: write positive=({M},), -1 for none")
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


def check_values(given: Arguments, scale: Tensor | float, smoothing: float, direction: str, group: Any) -> None:
    """Raise ValueError on what the values alone tell, all faults at once. Waits for the device.

    Args:
        given: The call's tensors, of shapes that fit.
        scale: The factor of the logits.
        smoothing: Share of the target that is spread evenly.
        direction: Where targets are spread (soft or smoothed) and columns are anchors, each column needs a row of its own.
        group: The processes whose rows ``known`` may name; None: this one alone.
    """
    faults, positive = [], given.positive
    M, N = len(given.x), len(given.x) if given.y is None else len(given.y)
    spread = (given.soft is not None or smoothing > 0) and direction != "rows" and given.y is not None
    if positive is not None and M:
        if bool(((positive < -1) | (positive >= N)).any()):
            faults.append(f"positive must lie in -1..{N - 1}, but holds {int(positive.min())}..{int(positive.max())}")
        if given.y is None and bool((positive == torch.arange(M, device=positive.device)).any()):
            faults.append("positive must not name the row itself")
        if spread and len(chosen := positive[positive >= 0]) > len(chosen.unique()):
            faults.append("soft or smoothed targets over columns need a row of its own for each column, but positive names one twice")
    if given.known is not None:
        rank, size = (0, 1) if group is None else (group.rank(), group.size())
        low, high = given.known.new_tensor([[0, -rank * N], [M - 1, (size - rank) * N - 1]])
        if bool(((given.known < low) | (given.known > high)).any()):
            faults.append(f"known must name rows 0..{M - 1} of x and {-rank * N}..{(size - rank) * N - 1} of y")
    if given.weight is not None and len(wrong := given.weight[~((given.weight >= 0) & given.weight.isfinite())]):
        faults.append(f"weight must be finite and not negative, but holds {float(wrong[0]):g}")
    if isinstance(scale, Tensor) and scale.device.type == "cpu" and not math.isfinite(scale.item()):
        faults.append(f"scale must be finite, but holds {scale.item():g}")
    if faults:
        raise ValueError("; ".join(faults))
