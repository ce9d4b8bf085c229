"""What the adapters to vision libraries share: which layer is read, which tokens are kept, and weights that cannot be had."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.types import Tokens

WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")  # files of weights as transformers looks for them, the preferred ones first

Pool = Literal["cls", "mean"]


def depth_of(layer: int, layers: int, name: str) -> int:
    """How many layers to run so that ``layer`` is the last: -1 all of them, 0 the first alone.

    Raises:
        ZooError: If there is no such layer.
    """
    if not -layers <= layer < layers:
        raise ZooError(f"{name}: no layer {layer}: it has {layers}, write {-layers} to {layers - 1} (-1 is the last)")
    return layer % layers + 1


def read(prefix: Tensor | None, patches: Tensor, *, has_cls: bool, keep_cls: bool, pool: Pool = "cls") -> Tokens:
    """The tokens of a vision transformer.

    Args:
        prefix: (B, P, D) what stands before the patches, the class token first; None for none.
        patches: (B, N, D)
        has_cls: The first of ``prefix`` is a class token.
        keep_cls: Keep the whole prefix among the tokens.
        pool: What ``pooled`` is. ``cls``: the class token, or where there is none the mean of the patches; ``mean``: that of the tokens.
    """
    tokens = torch.cat([prefix, patches], 1) if prefix is not None and keep_cls else patches
    if pool == "mean":
        pooled = tokens.mean(1)
    else:
        pooled = prefix[:, 0] if prefix is not None and has_cls else patches.mean(1)
    B, N, _ = tokens.shape
    mask = torch.ones(B, N, dtype=torch.bool, device=tokens.device)
    return Tokens(tokens, mask, pooled, mask.new_ones(B))


@contextmanager
def fetching(what: str) -> Iterator[None]:
    """Turn a library's complaint that weights cannot be had into one sentence.

    Raises:
        ZooError: Saying what to do about it.
    """
    try:
        yield
    except ZooError:
        raise
    except (OSError, ValueError, RuntimeError) as e:  # the three that timm, open_clip and transformers use for it
        reason = str(e).strip().partition("\n")[0]
        raise ZooError(
            f"{what} could not be loaded ({reason}): check the name, fetch it once with a network,"
            " name a local folder or file that has it, or write pretrained: false for random weights"
        ) from e
