"""PMR: the modality that is behind gets a loss of its own, drawn towards the prototypes of its classes; the one ahead is held back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from zoo.config import Fraction
from zoo.joints import Phase
from zoo.registry import register
from zoo.types import Batch, Loss, ModelOutput

NotNegative = Annotated[float, Field(ge=0)]


@register(
    "fusion",
    "pmr",
    joints=("schedule",),
    needs=("classes",),
    paper="Fan et al., PMR: prototypical modal rebalance for multimodal learning, 2023, https://arxiv.org/abs/2211.07089",
)
class Pmr(nn.Module):
    """Joint training with a loss of prototypes for each modality.

    p_m is the softmax over the classes of minus the distance of a modality's feature to the mean feature of each class. A modality of
    rho times the others' mean p_m[right class] gets clip(1 / rho - 1, 0, 1) times the cross-entropy of p_m, where it is behind, and,
    where it is ahead and training is young, minus clip(rho - 1, 0, 1) times the entropy of p_m. It asks for features alone, so that it
    goes with every way of combining them.

    The paper has two modalities, for which this is its rule, and takes prototypes anew in each epoch; here they are running means over
    batches. Its released code sets the first factor to 1 and leaves the entropy out.

    Args:
        names: The modalities.
        dim: D, width of the features.
        classes: K.
        alpha: Of the cross-entropies.
        mu: Of the entropies.
        early: Steps in which entropies count.
        decay: Of the running means.
    """

    multi_phase = False
    means: Tensor  # (M, K, D) float32
    seen: Tensor  # (M, K) bool, which of them are of any row
    steps: Tensor  # () int64, made so far

    def __init__(
        self,
        names: Sequence[str],
        dim: int,
        classes: int,
        *,
        alpha: NotNegative = 1.0,
        mu: NotNegative = 0.1,
        early: Annotated[int, Field(ge=0)] = 500,
        decay: Fraction = 0.9,
    ) -> None:
        super().__init__()
        self.names, self.alpha, self.mu, self.early, self.decay = tuple(names), alpha, mu, early, decay
        self.register_buffer("means", torch.zeros(len(self.names), classes, dim))
        self.register_buffer("seen", torch.zeros(len(self.names), classes, dtype=torch.bool))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def phases(self, batch: Batch) -> Iterator[Phase]:
        """The batch as it is."""
        yield Phase("joint", batch)

    def terms(self, output: ModelOutput, targets: Tensor) -> dict[str, Tensor]:
        """As `zoo.joints.Supplementing`: two for each modality, 0 where nothing is to be said, so that all processes log the same."""
        log_p = {name: self.log_chances(name, output, targets) for name in self.names}
        ahead = leads({name: float(own.detach().exp().mean()) for name, (_, own) in log_p.items() if len(own)})
        young = int(self.steps) < self.early
        found = {}
        for name, (every, own) in log_p.items():
            rho, rows = ahead.get(name, 1.0), max(len(own), 1)
            found[f"{name}/prototypes"] = -self.alpha * min(max(1 / rho - 1, 0), 1) * own.sum() / rows
            found[f"{name}/entropy"] = self.mu * young * min(max(rho - 1, 0), 1) * (every.exp() * every).sum() / rows
        return found

    def log_chances(self, name: str, output: ModelOutput, targets: Tensor) -> tuple[Tensor, Tensor]:
        """log p_m of the b rows that have the modality and whose class has a prototype: (b, seen classes), and of the right class (b,)."""
        m = self.names.index(name)
        rows = output.present[name] & self.seen[m][targets]  # (B,)
        prototypes, places = self.means[m][self.seen[m]], self.seen[m].cumsum(0) - 1
        apart = torch.cdist(output.embeddings[name][rows].float(), prototypes, compute_mode="donot_use_mm_for_euclid_dist")
        log_p = (-apart).log_softmax(-1)
        return log_p, log_p.gather(1, places[targets[rows]][:, None])[:, 0]

    def watched(self, model: Any) -> Mapping[str, Tensor]:
        """Nothing: steps stay as they are."""
        return {}

    @torch.no_grad()
    def after_step(self, model: Any, phase: Phase, previous: Mapping[str, Tensor], loss: Loss) -> None:
        """Move the prototypes towards the features that the step was made from."""
        self.steps += 1
        out, targets = loss.output, phase.batch.targets
        assert out is not None, "the objective hands over the model's output"
        assert targets is not None, "rows of known class"
        for m, name in enumerate(self.names):
            rows = out.present[name]
            count = torch.bincount(targets[rows], minlength=self.seen.shape[1])  # (K,)
            new = torch.zeros_like(self.means[m]).index_add_(0, targets[rows], out.embeddings[name][rows].to(self.means.dtype))
            new /= count.clamp(min=1)[:, None]
            kept = torch.where(self.seen[m], self.decay, 0.0)[:, None]
            self.means[m] = torch.where(count[:, None] > 0, kept * self.means[m] + (1 - kept) * new, self.means[m])
            self.seen[m] |= count > 0


def leads(sure: Mapping[str, float]) -> dict[str, float]:
    """How many times as sure of the right class each modality is as the others are on average; {} of fewer than two."""
    if len(sure) < 2:
        return {}
    return {name: max(s, 1e-8) * (len(sure) - 1) / max(sum(sure.values()) - s, 1e-8) for name, s in sure.items()}
