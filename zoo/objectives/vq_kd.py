"""Visual tokens from a frozen tower: codes are chosen so that its features can be told from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.abilities import Distilling
from zoo.config import Fraction
from zoo.errors import ZooError
from zoo.objectives._shared import wide
from zoo.registry import register
from zoo.types import Batch, Loss


@register("objective", "vq_kd", paper="Peng et al., BEiT v2, 2022, https://arxiv.org/abs/2208.06366")
class VqKd(nn.Module):
    """Mean of 1 - cosine of the features told and those taught, plus the mean square of how far points are from their codes.

    Gradients of the features pass the codes by, to the points. The codes follow the points after each step, as
    `zoo.models._codebook.Codebook` says; where batches are accumulated, those of the last. Rows without a picture do not count.

    Args:
        commitment: What the square is multiplied by: 1 in BEiT v2.
        decay: What a code keeps of itself in a step.

    Raises:
        ZooError: If ``commitment`` is below 0.
    """

    def __init__(self, *, commitment: float = 1.0, decay: Fraction = 0.99) -> None:
        super().__init__()
        if commitment < 0:
            raise ZooError(f"vq_kd.commitment: {commitment:g} pushes points away from their codes: write 1")
        self.commitment, self.decay = commitment, decay

    def bind(self, model: Any) -> None:
        """Check that the model learns codes.

        Raises:
            ZooError: If it does not.
        """
        if not isinstance(model, Distilling):
            raise ZooError("vq_kd trains a codebook of visual tokens, and this model has none: write model: visual_tokenizer")

    def forward(self, model: Any, batch: Batch) -> Loss:
        """The loss.

        Parts: ``loss_features``, ``loss_commitment``; ``used``, the share of the codes that some patch of the batch took, and
        ``perplexity``, the number of codes that would be as many if all were taken alike, as a share, too.
        """
        image = batch.inputs.get("image")
        if image is None or (image.present is not None and not bool(image.present.any())):
            return self._nothing(model)
        if image.present is not None:
            image = image.rows(image.present)
        found = model.distil(image._replace(present=None))
        features = (1 - F.cosine_similarity(wide(found.told), wide(found.taught), dim=-1)).mean()
        commitment = F.mse_loss(wide(found.points), found.codes.detach())
        ids = found.ids.flatten()
        counts = torch.zeros(model.codes, device=ids.device).index_add_(0, ids, torch.ones_like(ids, dtype=torch.float32))
        parts = {"loss_features": features.detach(), "loss_commitment": commitment.detach(), **_usage(counts)}
        return Loss(features + self.commitment * commitment, parts, (found.points.detach().flatten(0, 1), ids))

    def before_step(self, model: Any) -> None:
        """Nothing: the codes move behind the optimizer."""

    def after_step(self, model: Any, state: tuple[Tensor, Tensor]) -> None:
        """Let the codes follow."""
        model.codebook.follow(*state, self.decay)

    def _nothing(self, model: Any) -> Loss:
        """Of a batch without pictures."""
        zero = wide(next(p for p in model.parameters() if p.requires_grad)).flatten()[0] * 0
        parts = dict.fromkeys(("loss_features", "loss_commitment", "used", "perplexity"), zero.detach())
        ids = torch.zeros(0, dtype=torch.int64, device=zero.device)
        return Loss(zero, parts, (model.codebook.codes[ids], ids))  # other processes may have some, and all move the codes together


def _usage(counts: Tensor) -> dict[str, Tensor]:
    """() shares of K codes that were taken (K,) times."""
    shares = counts / counts.sum()
    return {"used": (counts > 0).float().mean(), "perplexity": torch.special.entr(shares).sum().exp() / len(counts)}
