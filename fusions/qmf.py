"""QMF: logits of the modalities weighted by their energy, row by row."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from zoo.fusions._weights import Weighted
from zoo.registry import register


@register(
    "fusion",
    "qmf",
    joints=("combine",),
    needs=("logits",),
    paper="Zhang et al., Provable dynamic fusion for low-quality multimodal data, 2023, https://arxiv.org/abs/2306.02050",
)
def qmf(names: Sequence[str], dim: int) -> Weighted:
    """sum_m w_m l_m with w_m in proportion to -E_m = log sum exp l_m over the modalities that a row has.

    Where it differs from the paper:

    - An energy hangs on what is added to all of a row's logits, which no loss of classes sets, and may have either sign. Here the logits
      have mean 0 over the classes first: the same classes at the same probability, and -E is at least log K, what equal logits have.
    - The weights are divided by their sum, which changes no row's class, and leaves a row of one modality as sure as that modality is.
    - The paper's losses beside that of the fused logits: the modalities' own come with the schedule ``joint_aux``; its ranking loss, which
      asks of every training row's confidence that it follow the row's loss over the epochs so far, is left out. In its place stand
      temperatures, which `calibrate` fits on validation rows.

    Args:
        names: The modalities.
        dim: K, the classes; 2 at least.
    """
    return Weighted(names, log_energy)


def log_energy(logits: Tensor) -> Tensor:
    """(B, K) to log(-E) (B,), at least log log K."""
    return (logits - logits.mean(-1, keepdim=True)).logsumexp(-1).log()
