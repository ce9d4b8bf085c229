"""One contrastive loss for every objective of the zoo: CLIP, SigLIP, NT-Xent and NoteLLM-2 are each one call of it."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

Direction = Literal["rows", "columns", "both"]
Form = Literal["softmax", "sigmoid"]
Reduction = Literal["none", "sum", "mean"]
Impl = Literal["auto", "reference", "chunked", "triton"]
Precision = Literal["auto", "ieee", "tf32", "3xtf32"]
_CHOICES = {"direction": Direction, "form": Form, "reduction": Reduction, "impl": Impl, "precision": Precision}


def contrastive_loss(
    x: Tensor,
    y: Tensor | None = None,
    *,
    scale: Tensor | float,
    bias: Tensor | float | None = None,
    positive: Tensor | None = None,
    groups: Tensor | tuple[Tensor, Tensor] | None = None,
    ids_x: Tensor | None = None,
    ids_y: Tensor | None = None,
    present: Tensor | tuple[Tensor, Tensor] | None = None,
    soft: tuple[Tensor, Tensor] | None = None,
    smoothing: float = 0.0,
    weight: Tensor | None = None,
    negatives: Tensor | None = None,
    direction: Direction = "both",
    form: Form = "softmax",
    normalize: bool = False,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
    precision: Precision = "auto",
    group: Any = None,
    validate: bool | None = None,
    known: Tensor | None = None,
) -> Tensor:
    """Pull each row to its positive and push it from its negatives.

    The logit of a pair is ``scale * <x_i, y_j> + bias``. In the softmax form (InfoNCE: van den Oord et al., 2018,
    https://arxiv.org/abs/1807.03748) the loss of row i with positive p is ``log(1 + exp(lse_i - logit_ip))``, where
    ``lse_i`` is the log-sum-exp over the negatives alone. That is cross entropy, written so that it keeps its digits where
    the loss is small: the dense form subtracts two nearly equal numbers there. In the sigmoid form (SigLIP: Zhai et al., 2023,
    https://arxiv.org/abs/2303.15343) it is ``softplus(-logit_ip)`` plus ``softplus(logit_ij)`` summed over the negatives.

    A negative of row i is every row of y that is there, is not its positive, has another id and is not known to belong to
    it. A row that is absent or has no positive that is there has weight 0 and is not counted; if no row counts, the loss is
    0 with zero gradients. A row without a negative has softmax loss 0. An absent row is neither anchor nor negative nor positive, and
    what it holds, NaN included, has no influence. A row that is there but has no positive is still a negative of others.

    Args:
        x: (M, D) anchors, float16, bfloat16, float32 or float64; accumulated in float32 at least.
        y: (N, D) candidates. None: the rows of x among themselves, no row with itself. This form is symmetric: where j is
            no negative of i, i is none of j.
        scale: () factor of every inner product; for a learned one hand over ``log_scale.exp()``.
        bias: () added to every logit; it cancels in the softmax form.
        positive: (M,) int64 row of y that belongs to row i, -1 for none. None: row i of y, for two sides only.
        groups: Not there yet: several positives a row, by equal group.
        ids_x: (M,) int64; equal ids are never negatives. With two sides ``ids_y`` is needed too.
        ids_y: (N,) int64.
        present: (M,) bool, which rows of x are there; or, with two sides, a pair (M,), (N,) for the rows of both.
        soft: Not there yet: soft targets from a second pair of embeddings.
        smoothing: Not there yet unless 0: label smoothing.
        weight: (M,) non-negative weight of each row and its positive.
        negatives: Not there yet: further candidates that are nobody's positive, such as a queue.
        direction: "rows": row i against its negatives in y. "columns": the positive of row i against its negatives in
            x. "both": the mean of the two.
        form: "softmax" or "sigmoid".
        normalize: Divide each row by its L2 norm first.
        reduction: "none": (M,), weighted, 0 where not counted. "sum": its sum. "mean": the sum over the sum of the weights that count.
        impl: "reference" holds the (M, N) logits; "auto" picks what fits, today always "reference".
        precision: Not there yet unless "auto": how float32 products are formed.
        group: Not there yet: a process group whose rows are all candidates.
        validate: Look at the values, which on an accelerator would wait for it, and raise. None: on a CPU, outside
            ``torch.compile``.
        known: (E, 2) int64 further pairs (row of x, row of y) that are never negatives; with one side in either order.

    Returns:
        () or, for reduction "none", (M,); float32, or float64 where an input is.

    Raises:
        NotImplementedError: Naming every argument given that is not there yet.
        ValueError: On shapes or choices that do not fit; with ``validate``, also on indices out of range and on a batch in
            which no row counts.
    """
    _check_choices(direction=direction, form=form, reduction=reduction, impl=impl, precision=precision)
    _refuse_missing(groups=groups, soft=soft, smoothing=smoothing, negatives=negatives, impl=impl, precision=precision, group=group)
    _check_shapes(x, y, positive, ids_x, ids_y, present, weight, known)
    one_side = y is None
    candidates = x if y is None else y
    there_x, there_y = _presence(x, y, present)
    if positive is None:
        positive = torch.arange(len(x), device=x.device)
    if validate is None:
        validate = x.device.type == "cpu" and not torch.compiler.is_compiling()
    if validate:
        _check_values(positive, len(candidates), known, one_side)
    pick = positive.clamp(min=0)
    counted = (positive >= 0) & there_x & there_y[pick]  # (M,)
    if validate and not bool(counted.any()):
        raise ValueError("no row of the batch has a positive that is there: nothing to learn from (validate=False gives loss 0)")
    negative = _negatives(positive, ids_x, ids_x if one_side else ids_y, known, there_x, there_y, one_side)  # (M, N)
    with torch.autocast(x.device.type, enabled=False):  # it would form the logits in half precision
        scores = _scores(x, candidates, there_x, there_y, scale, bias, normalize)  # (M, N)
        pull = scores.gather(1, pick[:, None])[:, 0]  # (M,)
        losses = []
        if direction != "columns":
            losses.append(_loss(pull, _push(scores, negative, 1, form), form))
        if direction != "rows":
            losses.append(_loss(pull, _push(scores, negative, 0, form)[pick], form))
        return _reduce(torch.stack(losses).mean(0), counted, weight, reduction)


def _scores(
    x: Tensor, y: Tensor, there_x: Tensor, there_y: Tensor, scale: Tensor | float, bias: Tensor | float | None, normalize: bool
) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    # Absent rows are blanked before the product: masking its result would still let 0 * NaN into the gradient of the others.
    x = x.to(dtype).masked_fill(~there_x[:, None], 0)
    y = y.to(dtype).masked_fill(~there_y[:, None], 0)
    if normalize:
        x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    scores = (x @ y.T) * scale
    return scores if bias is None else scores + bias


def _push(scores: Tensor, negative: Tensor, dim: int, form: Form) -> Tensor:
    """What the negatives of each row (dim 1) or column (dim 0) add up to."""
    if form == "softmax":
        return scores.masked_fill(~negative, -torch.inf).logsumexp(dim)
    return -F.logsigmoid(-scores).masked_fill(~negative, 0).sum(dim)


def _loss(pull: Tensor, push: Tensor, form: Form) -> Tensor:
    # -logsigmoid(-z) is softplus(z), without the cut-off of F.softplus that costs float64 its digits.
    return -F.logsigmoid(pull - push) if form == "softmax" else push - F.logsigmoid(pull)


def _negatives(
    positive: Tensor, ids_x: Tensor | None, ids_y: Tensor | None, known: Tensor | None, there_x: Tensor, there_y: Tensor, one_side: bool
) -> Tensor:
    """(M, N) bool: which row of y is a negative of which row of x."""
    column = torch.arange(len(there_y), device=positive.device)
    excluded = positive[:, None] == column
    if ids_x is not None and ids_y is not None:
        excluded = excluded | (ids_x[:, None] == ids_y)
    if known is not None:
        excluded = excluded.index_put((known[:, 0], known[:, 1]), torch.ones((), dtype=torch.bool, device=known.device))
    if one_side:
        excluded = excluded | excluded.T | (column[:, None] == column)
    return ~excluded & there_x[:, None] & there_y


def _reduce(loss: Tensor, counted: Tensor, weight: Tensor | None, reduction: Reduction) -> Tensor:
    weight = torch.ones_like(loss) if weight is None else weight.to(loss.dtype)
    weight = weight.masked_fill(~counted, 0)
    loss = loss * weight
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    total = weight.sum()
    return loss.sum() / torch.where(total > 0, total, 1)


def _presence(x: Tensor, y: Tensor | None, present: Tensor | tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Who is there of x (M,) and of y (N,)."""
    everyone_x = torch.ones(len(x), dtype=torch.bool, device=x.device)
    if y is None:
        only = everyone_x if present is None else present
        assert isinstance(only, Tensor), "a pair with one side is refused by _check_shapes"
        return only, only
    if isinstance(present, tuple):
        return present
    everyone_y = torch.ones(len(y), dtype=torch.bool, device=y.device)
    return (everyone_x if present is None else present), everyone_y


def _check_choices(**given: str) -> None:
    for name, value in given.items():
        if value not in get_args(_CHOICES[name]):
            raise ValueError(f"{name}={value!r} is no choice: one of {', '.join(get_args(_CHOICES[name]))}")


def _refuse_missing(
    *, groups: object, soft: object, smoothing: float, negatives: object, impl: Impl, precision: Precision, group: object
) -> None:
    given = {"groups": groups, "soft": soft, "negatives": negatives, "group": group}
    missing = [name for name, value in given.items() if value is not None]
    missing += [f"smoothing={smoothing}"] if smoothing else []
    missing += [f"impl={impl!r}"] if impl in ("chunked", "triton") else []
    missing += [f"precision={precision!r}"] if precision != "auto" else []
    if missing:
        raise NotImplementedError(f"contrastive_loss has no {', '.join(missing)} yet: leave out what is named here")


def _check_shapes(
    x: Tensor,
    y: Tensor | None,
    positive: Tensor | None,
    ids_x: Tensor | None,
    ids_y: Tensor | None,
    present: Tensor | tuple[Tensor, Tensor] | None,
    weight: Tensor | None,
    known: Tensor | None,
) -> None:
    """What can be told from the arguments' shapes alone, all faults at once."""
    faults = []
    if x.ndim != 2 or (y is not None and (y.ndim != 2 or y.shape[1] != x.shape[1])):
        raise ValueError(f"x must be (M, D) and y (N, D) or None, not {tuple(x.shape)} and {None if y is None else tuple(y.shape)}")
    M, N = len(x), len(x) if y is None else len(y)
    if y is None:
        faults += ["one side needs positive"] if positive is None else []
        faults += ["one side takes no ids_y: its ids are ids_x"] if ids_y is not None else []
        faults += ["one side takes one present, not a pair"] if isinstance(present, tuple) else []
    else:
        faults += ["two sides need both ids_x and ids_y, or neither"] if (ids_x is None) != (ids_y is None) else []
        faults += [f"positive=None pairs row i with row i, but x has {M} rows and y {N}"] if positive is None and M > N else []
        faults += [f"y has no rows, but x has {M}"] if M and not N else []
    present_x, present_y = present if isinstance(present, tuple) else (present, None)
    rows = {"positive": (positive, M), "ids_x": (ids_x, M), "ids_y": (ids_y, N), "weight": (weight, M)}
    for name, (value, length) in {**rows, "present": (present_x, M), "present of y": (present_y, N)}.items():
        if value is not None and value.shape != (length,):
            faults.append(f"{name} must be ({length},), not {tuple(value.shape)}")
    if known is not None and (known.ndim != 2 or known.shape[1] != 2):
        faults.append(f"known must be (E, 2), not {tuple(known.shape)}")
    if faults:
        raise ValueError("; ".join(faults))


def _check_values(positive: Tensor, candidates: int, known: Tensor | None, one_side: bool) -> None:
    """What can be told from the values alone, all faults at once."""
    faults = []
    if bool(((positive < -1) | (positive >= candidates)).any()):
        faults.append(f"positive must lie in -1..{candidates - 1}, but holds {int(positive.min())}..{int(positive.max())}")
    if one_side and bool((positive == torch.arange(len(positive), device=positive.device)).any()):
        faults.append("positive must not name the row itself")
    if known is not None and known.numel():
        rows = torch.tensor([len(positive), candidates], device=known.device)
        if bool(((known < 0) | (known >= rows)).any()):
            faults.append(f"known must name rows below {len(positive)} of x and below {candidates} of y")
    if faults:
        raise ValueError("; ".join(faults))
