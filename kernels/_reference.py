"""The contrastive statistics spelled out densely: the truth that the other implementations are held against, twice differentiable."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ._pairs import Masks, Pairs, masks


def known_of_all(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, teacher: tuple[Tensor, Tensor] | None, pairs: Pairs, form: str
) -> tuple[Tensor, Tensor]:
    """What is known of each row of x, (7, M), and of each row of y, (7, N); see ``_pairs``. Holds (M, N) tensors.

    Args:
        x: (M, D), float32 or float64.
        y: (N, D).
        scale: () factor of the inner products.
        bias: () summand, for the sigmoid form.
        teacher: (M, D'), (N, D') embeddings whose products, with the same scale, are the teacher's logits.
        pairs: Who is what to whom.
        form: "softmax" or "sigmoid".
    """
    logits = (x @ y.T) * scale
    if bias is not None:
        logits = logits + bias
    taught = None if teacher is None else (teacher[0] @ teacher[1].T * scale).detach()
    who = masks(pairs, len(x), len(y), x.device)
    return _known(logits, taught, who, form), _known(logits.T, None if taught is None else taught.T, _turned(who), form)


def known_of_block(logits: Tensor, taught: Tensor | None, who: Masks, form: str, columns: bool) -> tuple[Tensor, Tensor | None]:
    """(R, C) logits, and the teacher's, to (7, R) and, if asked for, (7, C)."""
    of_columns = _known(logits.T, None if taught is None else taught.T, _turned(who), form) if columns else None
    return _known(logits, taught, who, form), of_columns


def _turned(who: Masks) -> Masks:
    return Masks(who.denominator.T, who.positive_y.T, who.positive.T)


def _known(logits: Tensor, taught: Tensor | None, who: Masks, form: str) -> Tensor:
    """(M, N) to (7, M)."""
    denominator, positive = who.denominator, who.positive
    if form == "softmax":
        push = logits.masked_fill(~denominator, -torch.inf).logsumexp(1)
    else:
        binary = -F.logsigmoid(torch.where(positive, logits, -logits))  # each pair on its own: partners or not
        push = binary.masked_fill(~denominator, 0).sum(1)
    pull = logits.masked_fill(~positive, 0).sum(1)
    total = logits.masked_fill(~denominator, 0).sum(1)
    count, hits = denominator.sum(1).to(logits.dtype), positive.sum(1).to(logits.dtype)
    if taught is None:
        soft, soft_lse = torch.zeros_like(pull), torch.full_like(pull, -torch.inf)
    else:
        candidates = denominator | positive
        soft_lse = taught.masked_fill(~candidates, -torch.inf).logsumexp(1)
        share = (taught - soft_lse[:, None]).exp().masked_fill(~candidates, 0)
        soft = (logits.masked_fill(~candidates, 0) * share).sum(1)
    return torch.stack([push, pull, total, count, hits, soft, soft_lse])
