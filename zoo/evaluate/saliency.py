"""How much of an embedding flows from the image, from the text, and through everything else, layer by layer."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from zoo.errors import ZooError


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
    other = flow.sum((1, 2)) - visual - text
    return Saliency(visual / size, text / (read - size), other / (read * (read - 1) / 2))
