"""How much of an embedding flows from the image, from the text, and through everything else, layer by layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.evaluate._unavailable import Unavailable
from zoo.kernels.contrastive import contrastive_loss
from zoo.types import Attentive, Batch, ModelOutput


class Saliency(NamedTuple):
    """Mean saliency per attention edge of one layer, (B,) each."""

    visual: Tensor  # image tokens to the position that is read
    text: Tensor  # everything else to that position, prompt included
    other: Tensor  # all remaining causal edges


def saliency(attention: Tensor, gradient: Tensor, read: int, image: tuple[int, int]) -> Saliency:
    """The scores S_v, S_t and S_o of NoteLLM-2 (Zhang et al., 2024, https://arxiv.org/abs/2405.16789), as its code has them.

    I = |sum over heads of A * dL/dA|, the heads summed before the absolute value; the paper prints the opposite order. I(i, j) is the
    flow from j to i. The released code takes A after the softmax for Qwen and before it for LLaMA; give it after, for all.

    Args:
        attention: (B, heads, T, T) weights after the softmax.
        gradient: The same shape, of the contrastive loss of the main embedding.
        read: The position where the embedding is read, counted from 0.
        image: First and last position of the image's tokens, both included, before ``read``.

    Raises:
        ZooError: If the image does not lie before ``read``, or nothing else does.
    """
    first, last = image
    size = last - first + 1
    if not 0 <= first <= last < read < attention.shape[-1]:
        raise ZooError(f"image positions {first}..{last} must lie before the position {read} that is read, of {attention.shape[-1]}")
    if size == read:
        raise ZooError(f"nothing but the image stands before position {read}: the share of the text is not defined")
    flow = (attention * gradient).sum(1).abs()[:, : read + 1, : read + 1].tril(-1)  # (B, read + 1, read + 1)
    visual = flow[:, read, first : last + 1].sum(1)
    text = flow[:, read, :read].sum(1) - visual
    other = flow[:, :read].sum((1, 2))
    return Saliency(visual / size, text / (read - size), other / (read * (read - 1) / 2))


def batch_saliency(model: Any, batch: Batch, *, scale: float) -> Tensor:
    """The scores of every layer of the model's backbone, for the contrastive loss of the main embedding alone, as in the released code.

    Unlike there, dropout is off. Weights and gradients of the model stay as they are.

    Args:
        model: Has one `Attentive` backbone, and says in ``ModelOutput.aux`` where it reads and where the image is.
        batch: Of pairs, on the model's device.
        scale: Of the cosines in the loss.

    Returns:
        (layers, R, 3) float64: visual, text, other of the R rows that show an image.

    Raises:
        Unavailable: If the model shows no attention, or no tokens of an image stand in the sequence that its backbone reads.
    """
    backbones = [module for module in model.modules() if isinstance(module, Attentive)]
    if len(backbones) != 1:
        raise Unavailable(f"the scores are those of one backbone that shows its attention, and this model has {len(backbones)}")
    with backbones[0].watch_attention() as attention, torch.enable_grad():
        out: ModelOutput = model(batch)
        places = [out.aux[name].tolist() if name in out.aux else [] for name in ("read", "image_first", "image_last")]
        rows = [
            (i, read, first, last)
            for i, (read, first, last) in enumerate(zip(*places, strict=True))
            if 0 <= first <= last < read and last - first + 1 < read
        ]
        if not rows:
            raise Unavailable("no tokens of an image stand in the sequence that this model's backbone reads")
        gradients = torch.autograd.grad(_main_loss(model.outputs[0], out, batch, scale), attention)
    layers = []
    for weights, gradient in zip(attention, gradients, strict=True):
        flow = weights.detach().double(), gradient.double()
        scores = [saliency(flow[0][i : i + 1], flow[1][i : i + 1], read, (first, last)) for i, read, first, last in rows]
        layers.append(torch.stack([torch.cat(score) for score in scores]))  # (R, 3)
    return torch.stack(layers).cpu()


def _main_loss(main: str, out: ModelOutput, batch: Batch, scale: float) -> Tensor:
    return contrastive_loss(
        out.embeddings[main],
        scale=scale,
        positive=batch.positive,
        ids_x=batch.ids,
        known=batch.known,
        present=out.present.get(main),
        direction="rows",
        normalize=True,
        validate=False,
    )
