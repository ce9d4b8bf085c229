"""One contrastive loss for every objective of the zoo: CLIP, SigLIP, SupCon, NT-Xent, MoCo and NoteLLM-2 are each one call of it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import _arguments as arguments
from ._arguments import Arguments, Direction, Exchange, Form, Impl, Precision, Reduction, ScaleKind
from ._faults import refuse_forward_mode
from ._operator import Setting, known_of_rows, resolve
from ._pairs import HITS, PULL, Pairs, merge
from ._targets import Targets, reduce


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
    soft: tuple[Tensor, ...] | None = None,
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
    ids_negatives: Tensor | None = None,
    soft_weight: float = 1.0,
    exchange: Exchange = "gather",
) -> Tensor:
    """Pull each row to its positive and push it from its negatives, without ever holding the (M, N) logits.

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
        x: (M, D) anchors, float16, bfloat16, float32 or float64; accumulated in float32 at least. Any M and D, 0 and 1 included.
        y: (N, D) candidates. None: the rows of x among themselves, no row with itself. This form is symmetric: where j is
            no negative of i, i is none of j; it costs half.
        scale: () factor of every inner product: a positive number or any finite tensor; for a learned one ``log_scale.exp()``.
        bias: () added to every logit; it cancels in the softmax form.
        positive: (M,) int64 row of y that belongs to row i, -1 for none. None: row i of y, for two sides without groups.
        groups: (M,) int64; rows of one group are each other's positives (SupCon's L_out: Khosla et al., 2020,
            https://arxiv.org/abs/2004.11362): the mean over the positives of their cross entropies, all candidates in each
            denominator. With two sides one for both, or a pair (M,), (N,). In the columns' direction the rows of y are the
            anchors. Equal ids and known pairs of one group stay positives.
        ids_x: (M,) int64; equal ids are never negatives. With two sides ``ids_y`` is needed too.
        ids_y: (N,) int64.
        present: (M,) bool, which rows of x are there; or, with two sides, a pair (M,), (N,) for the rows of both.
        soft: Soft targets from the teacher's embeddings of x, y and negatives, those that are given: (M, D'), (N, D'),
            (K, D'). The target is the softmax over the candidates of the teacher's inner products times the same scale, without a
            gradient (ALBEF's momentum distillation: Li et al., 2021, https://arxiv.org/abs/2107.07651); a teacher with a scale of its own
            multiplies it into its x. Softmax form only.
        smoothing: Share of the target that is spread evenly over the candidates, in 0..1 (Szegedy et al., 2016,
            https://arxiv.org/abs/1512.00567); in the sigmoid form over the two answers.
        weight: (M,) non-negative weight of each row and its positive.
        negatives: (K, D) further candidates of the rows of x that are nobody's positive, such as a queue (MoCo: He et al., 2020,
            https://arxiv.org/abs/1911.05722) or mined hard ones. They have no loss in the columns' direction.
        direction: "rows": row i against its negatives in y. "columns": the positive of row i against its negatives in
            x. "both": the mean of the two.
        form: "softmax" or "sigmoid".
        normalize: Divide each row of x, y and negatives by its L2 norm first.
        reduction: "none": (M,), weighted, 0 where not counted. "sum": its sum. "mean": the sum over the sum of the weights that count.
        impl: "reference" holds the (M, N) logits and is twice differentiable; "chunked" is plain torch with bounded memory on
            any device; "triton" needs CUDA, capability 8.0 or more, and at most float32. "auto": triton where it runs, else chunked.
        precision: How triton forms float32 logits: "ieee", "tf32" or "3xtf32" (three tf32 products, nearly exact). "auto":
            "ieee" where ``torch.get_float32_matmul_precision()`` is "highest", as torch's own products, else "tf32".
        group: A ``torch.distributed`` process group: the rows of all its processes, equally many in each, are candidates; indices
            stay local, but those of ``known``. The mean over the processes of what each returns is the loss of one process with
            everything, and so with gradients averaged as DistributedDataParallel does: an embedding gets as many times the gradient of
            that mean as there are processes. Of a sum or of single losses it is the sum. ``negatives`` stay local. None: this process
            alone, which ``dist.group.WORLD`` means too before ``init_process_group``.
        validate: Look at the values, which on an accelerator would wait for it, and raise. None: on a CPU, outside
            ``torch.compile``. Indices that nobody looks at must be right, but in ``known``: else torch fails, or the loss is undefined.
        known: (E, 2) int64 further pairs (row of x, row of y) that are never negatives; with one side in either order. With ``group`` rows
            of y count on through the processes, N the next one's first, -1 the previous one's last; each names all pairs of its rows of x.
        ids_negatives: (K,) int64. None: no row of x has the id of one of the negatives.
        soft_weight: Share of the target that is ``soft``; the rest is the positive's. 0.4 in ALBEF.
        exchange: With ``group``: "gather" holds all rows of y; "ring" passes them on, computes meanwhile, holds one remote share at most.

    Returns:
        () or, for reduction "none", (M,); float32, or float64 where x or y is. Reverse mode only: no jvp, vmap or other
        transforms of ``torch.func``, but with "reference".

    Raises:
        TypeError: On what is no tensor, or no number.
        ValueError: On shapes, dtypes, devices, choices or an ``impl`` that do not fit; with ``validate``, on indices out of range, on
            weights below 0, on weights or a scale not finite, and, without ``group``, on a batch in which no row counts.
        NotImplementedError: On a forward-mode derivative, but with "reference".
    """
    given = Arguments(x, y, positive, groups, ids_x, ids_y, ids_negatives, present, soft, weight, negatives, known)
    choices = {"direction": direction, "form": form, "reduction": reduction, "impl": impl, "precision": precision, "exchange": exchange}
    arguments.check_choices(smoothing, soft_weight, soft is not None, **choices)
    arguments.check_scalars(scale, bias)
    arguments.check_shapes(given, direction, form)
    if validate is None:
        validate = x.device.type == "cpu" and not torch.compiler.is_compiling()
    setting = resolve(impl, precision, group, exchange, x, y, form, direction, total=smoothing > 0)
    if validate:
        arguments.check_values(given, scale, smoothing, direction, group)
    if setting.impl != "reference":
        refuse_forward_mode("contrastive_loss", (x, y, negatives, *(t for t in (scale, bias) if isinstance(t, Tensor))))
    targets = Targets(form, groups is not None, smoothing, 0.0 if soft is None else soft_weight)
    with torch.autocast(x.device.type, enabled=False):  # it would form the logits in half precision
        rows, columns, counted, counted_columns = _known_of_both(given, scale, bias, normalize, setting)
        losses = []
        if direction != "columns":
            loss = targets.loss(rows, rows[PULL])
            losses.append(reduce(loss, counted, weight, reduction, setting.group))
        if direction != "rows":
            loss = targets.loss(columns, columns[PULL] if groups is not None else rows[PULL])
            losses.append(reduce(loss, counted_columns, weight, reduction, setting.group))
        if validate and not bool(counted.any()) and group is None:
            lacking = "no row of the batch has a positive that is there" if len(x) else "the batch is empty, x has no rows"
            raise ValueError(f"{lacking}: nothing to learn from (validate=False gives loss 0)")
        return torch.stack(losses).mean(0)


def _known_of_both(
    given: Arguments, scale: Tensor | float, bias: Tensor | float | None, normalize: bool, setting: Setting
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is known of each row's candidates, (7, M), and of its positive's, (7, M); and which of the two count, (M,) bool each."""
    x, y, one_side = given.x, given.y, given.y is None
    M, N = len(x), len(x) if y is None else len(y)
    there_x, there_y = given.present if isinstance(given.present, tuple) else (given.present, given.present if one_side else None)
    groups_x, groups_y = given.groups if isinstance(given.groups, tuple) else (given.groups, given.groups)
    positive = given.positive
    if positive is None and groups_x is None:
        positive = torch.arange(M, device=x.device)
    known = given.known
    if known is not None and one_side:
        known = torch.cat([known, known.flip(1)])
    pairs = Pairs(
        positive=positive,
        positive_y=positive if one_side else None,
        groups_x=groups_x,
        groups_y=groups_y,
        ids_x=given.ids_x,
        ids_y=given.ids_x if one_side else given.ids_y,
        there_x=there_x,
        there_y=there_y,
        known=known,
        diagonal=0 if one_side else None,
    )
    x = _prepared(x, there_x, normalize, setting)
    y = None if y is None else _prepared(y, there_y, normalize, setting)
    teacher = None if given.soft is None else _taught(given.soft, 1 if one_side else 2, (there_x, there_y), setting)
    scale = _number(scale, x, setting)
    used = None
    if bias is not None:
        bias = _number(bias, x, setting)
        used = bias if setting.form == "sigmoid" else None
    rows, columns = known_of_rows(x, y, scale, used, teacher, pairs, setting)
    if one_side:
        columns = rows
    if positive is not None and setting.columns and N:
        columns = columns[:, positive.clamp(min=0)]
    if given.negatives is not None:
        rows = merge(rows, _known_of_negatives(given, x, scale, used, groups_x, normalize, setting), setting.form)
    if bias is not None and used is None:
        rows = rows + 0 * bias  # it cancels; its gradient is zero, not missing
    if positive is None:
        return rows, columns, rows[HITS].detach() > 0, columns[HITS].detach() > 0
    counted = positive >= 0
    if there_x is not None:
        counted = counted & there_x
    if there_y is not None:
        counted = counted & there_y[positive.clamp(min=0)]
    return rows, columns, counted, counted


def _number(value: Tensor | float, x: Tensor, setting: Setting) -> Tensor:
    """() on the device of x; a number is written there rather than copied, which would wait for the device."""
    if isinstance(value, Tensor):
        return value.to(x.device, setting.accumulate)
    return torch.full((), value, dtype=setting.accumulate, device=x.device)


def _known_of_negatives(
    given: Arguments, x: Tensor, scale: Tensor, bias: Tensor | None, groups_x: Tensor | None, normalize: bool, setting: Setting
) -> Tensor:
    """(7, M), what the negatives that are nobody's positive add to what is known of the rows of x."""
    assert given.negatives is not None
    y, K = _prepared(given.negatives, None, normalize, setting), len(given.negatives)
    there_x = given.present[0] if isinstance(given.present, tuple) else given.present
    nobodys = None if groups_x is None else (groups_x.min() - 1).expand(K) if len(groups_x) else groups_x.new_zeros(K)
    has_ids = given.ids_negatives is not None
    pairs = Pairs(
        groups_x=groups_x,
        groups_y=nobodys,
        ids_x=given.ids_x if has_ids else None,
        ids_y=given.ids_negatives,
        there_x=there_x,
    )
    teacher = None
    if given.soft is not None:
        teacher = (_taught(given.soft, 1, (there_x,), setting)[0], _prepared(given.soft[-1].detach(), None, False, setting))
    alone = setting._replace(columns=False, group="")
    return known_of_rows(x, y, scale, bias, teacher, pairs, alone)[0]


def _prepared(x: Tensor, there: Tensor | None, normalize: bool, setting: Setting) -> Tensor:
    """The rows as they enter the products, absent ones blanked: masking a product still lets 0 * NaN into the gradient of the others."""
    if there is not None:
        x = x.masked_fill(~there[:, None], 0)
    if normalize:
        x = F.normalize(x.to(setting.accumulate), dim=1)
    return x.to(setting.operand)


def _taught(soft: tuple[Tensor, ...], sides: int, there: tuple[Tensor | None, ...], setting: Setting) -> tuple[Tensor, Tensor]:
    """The teacher's embeddings of the two sides, or twice of the one."""
    blanked = [_prepared(t.detach(), here, False, setting) for t, here in zip(soft[:sides], there[:sides], strict=True)]
    return blanked[0], blanked[-1]


class ContrastiveLoss(nn.Module):
    """``contrastive_loss`` with its settings kept, and with a scale and a bias that may be learned.

    Args:
        scale: Positive; where the scale starts. The default is CLIP's temperature of 0.07 (Radford et al., 2021,
            https://arxiv.org/abs/2103.00020).
        scale_kind: What is learned. "log": the scale's logarithm (CLIP). "raw": the scale itself. "fixed": nothing.
        max_scale: Positive; bound of the scale in use, 100 in CLIP. A learned scale beyond it gets the gradient at the bound
            and so can come back, which that of a clamp, 0, would never let it.
        bias: Where the learned bias of the sigmoid form starts, -10 in SigLIP. None: there is none.
        direction: This and all that follow as in ``contrastive_loss``; only ``normalize`` is on unless switched off. ``group`` is
            taken as it is now: make the module after ``init_process_group``, before which ``dist.group.WORLD`` is None.

    Raises:
        TypeError: On what is no number.
        ValueError: On a setting that is no choice or outside its range.
    """

    log_scale: nn.Parameter
    raw_scale: nn.Parameter
    fixed_scale: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        *,
        scale: float = 1 / 0.07,
        scale_kind: ScaleKind = "log",
        max_scale: float | None = None,
        bias: float | None = None,
        direction: Direction = "both",
        form: Form = "softmax",
        normalize: bool = True,
        smoothing: float = 0.0,
        soft_weight: float = 1.0,
        reduction: Reduction = "mean",
        impl: Impl = "auto",
        precision: Precision = "auto",
        group: Any = None,
        exchange: Exchange = "gather",
    ) -> None:
        super().__init__()
        choices = {"direction": direction, "form": form, "reduction": reduction, "impl": impl, "precision": precision, "exchange": exchange}
        arguments.check_choices(smoothing, soft_weight, False, **choices, scale_kind=scale_kind)
        arguments.check_positive(scale=scale, **({} if max_scale is None else {"max_scale": max_scale}))
        arguments.check_numbers(**({} if bias is None else {"bias": bias}))
        self.scale_kind, self.max_scale = scale_kind, max_scale
        value = torch.tensor(math.log(scale) if scale_kind == "log" else float(scale))
        if scale_kind == "fixed":
            self.register_buffer("fixed_scale", value)
        else:  # the name tells the kind, so that weights of the one do not load as the other
            self.register_parameter(f"{scale_kind}_scale", nn.Parameter(value))
        self.register_parameter("bias", None if bias is None else nn.Parameter(torch.tensor(float(bias))))
        self.direction, self.form, self.normalize, self.reduction = direction, form, normalize, reduction
        self.smoothing, self.soft_weight = smoothing, soft_weight
        self.impl, self.precision, self.group, self.exchange = impl, precision, group, exchange

    def extra_repr(self) -> str:
        """The settings, for print."""
        kept = ("scale_kind", "max_scale", "direction", "form", "normalize", "smoothing", "soft_weight", "reduction")
        return ", ".join(f"{name}={vars(self)[name]!r}" for name in (*kept, "impl", "precision", "exchange"))

    @property
    def scale(self) -> Tensor:
        """() the factor in use."""
        if self.scale_kind == "fixed":
            return self.fixed_scale if self.max_scale is None else self.fixed_scale.clamp(max=self.max_scale)
        is_log = self.scale_kind == "log"
        stored: Tensor = self.log_scale if is_log else self.raw_scale
        if self.max_scale is not None:
            bound = math.log(self.max_scale) if is_log else self.max_scale
            stored = stored.detach().clamp(max=bound) + (stored - stored.detach())
        return stored.exp() if is_log else stored

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        positive: Tensor | None = None,
        groups: Tensor | tuple[Tensor, Tensor] | None = None,
        ids_x: Tensor | None = None,
        ids_y: Tensor | None = None,
        present: Tensor | tuple[Tensor, Tensor] | None = None,
        soft: tuple[Tensor, ...] | None = None,
        weight: Tensor | None = None,
        negatives: Tensor | None = None,
        validate: bool | None = None,
        known: Tensor | None = None,
        ids_negatives: Tensor | None = None,
    ) -> Tensor:
        """The loss, () or, for reduction "none", (M,); all tensors as in ``contrastive_loss``."""
        tensors = Arguments(x, y, positive, groups, ids_x, ids_y, ids_negatives, present, soft, weight, negatives, known)
        return contrastive_loss(
            **tensors._asdict(),
            scale=self.scale,
            bias=self.bias,
            smoothing=self.smoothing,
            soft_weight=self.soft_weight,
            direction=self.direction,
            form=self.form,
            normalize=self.normalize,
            reduction=self.reduction,
            impl=self.impl,
            precision=self.precision,
            group=self.group,
            exchange=self.exchange,
            validate=validate,
        )
