"""Biases of attention by how far apart two tokens are, of a text and a picture in one sequence, learned for every block and head."""

from __future__ import annotations

import numpy as np
import torch
from scipy.interpolate import RectBivariateSpline
from timm.layers import gen_relative_position_index
from torch import Tensor, nn

from zoo.errors import ZooError

CLS = 3  # rows of a table for its first token: what it asks, what asks it, and itself


class RelativePositions(nn.Module):
    """VLMo's table: one row for every distance, one column for every head of every block.

    The rows, in order: offsets of patches, (2 h - 1)(2 w - 1) of them, and three of the picture's class token, as in BEiT (Bao et al.,
    2021, https://arxiv.org/abs/2106.08254); a text that asks a picture, a picture that asks a text; offsets of words, of the key minus
    that of the query, and three of the text's first token. Bao et al., VLMo, 2021, https://arxiv.org/abs/2111.02358: 1,126 rows for
    14 x 14 patches and texts of 196. The text stands before the picture.

    Args:
        window: h, w, how many patches a picture has.
        length: The longest text, 2 and more; shorter ones use the middle of its rows.
        layers: Blocks.
        heads: Of each.

    Raises:
        ZooError: If the text is shorter than 2.
    """

    text: Tensor
    image: Tensor

    def __init__(self, window: tuple[int, int], length: int, layers: int, heads: int) -> None:
        super().__init__()
        if length < 2:
            raise ZooError(f"relative positions of a text of {length}: write 2 or more")
        self.window, self.length, self.layers, self.heads = window, length, layers, heads
        self.patches = offsets(window) + CLS
        self.table = nn.Parameter(torch.zeros(self.patches + 2 + 2 * length - 3 + CLS, layers * heads))
        self.register_buffer("image", gen_relative_position_index(window, class_token=True), persistent=False)  # (1 + h w, 1 + h w)
        self.register_buffer("text", self.patches + 2 + _text_index(length), persistent=False)  # (length, length)

    def forward(self, text: int = 0, image: bool = False) -> list[Tensor]:
        """(heads, N, N) for each block, of ``text`` tokens, or of a picture's, or of both in this order.

        Raises:
            ZooError: If the text is longer than the longest.
        """
        if text > self.length:
            raise ZooError(f"a text of {text} tokens, and the table is of {self.length}: write a smaller length")
        words = self.text[:text, :text]
        if not image:
            index = words
        elif not text:
            index = self.image
        else:
            n = len(self.image)
            asks, asked = words.new_full((text, n), self.patches), words.new_full((n, text), self.patches + 1)
            index = torch.cat([torch.cat([words, asks], 1), torch.cat([asked, self.image], 1)])  # (N, N)
        return list(self.table[index].permute(2, 0, 1).unflatten(0, (self.layers, self.heads)))  # layers of (heads, N, N)

    def of(self, table: Tensor, window: tuple[int, int]) -> Tensor:
        """The table of another model as this one's, `resized` where that looks at smaller pictures, of ``window`` patches.

        Raises:
            ZooError: If it looks at larger ones, or is of texts of another length.
        """
        more = len(table) - offsets(window) - (len(self.table) - offsets(self.window))
        if more:
            length = self.length + more // 2
            raise ZooError(
                f"relative positions of texts of {length} cannot be made those of texts of {self.length}: write length: {length}"
            )
        return resized(table, window, self.window)


def offsets(window: tuple[int, int]) -> int:
    """How many offsets two patches of a picture can have."""
    return (2 * window[0] - 1) * (2 * window[1] - 1)


def _text_index(length: int) -> Tensor:
    """(length, length) int64 from 0: offsets of the words behind the first token, and the three rows of that one."""
    at, last = torch.arange(length - 1), 2 * length - 3
    index = torch.empty(length, length, dtype=torch.int64)
    index[1:, 1:] = at[None, :] - at[:, None] + length - 2  # the key's place minus the query's
    index[0, :], index[:, 0], index[0, 0] = last, last + 1, last + 2
    return index


def resized(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """The table for pictures of another number of patches; rows of class tokens and texts stay as they are.

    As BEiT does it: old offsets are moved apart by steps that grow geometrically until they reach as far as the new ones, near ones thus
    staying near, and a cubic spline is read at the new offsets.

    Args:
        table: (rows, columns), its first rows those of ``offsets(old)``.
        old: Patches that it is of.
        new: Patches that it shall be of, more than before in both directions.

    Returns:
        (rows - offsets(old) + offsets(new), columns), in the type of the table.

    Raises:
        ZooError: If there shall be fewer, for which there is no such progression.
    """
    if old == new:
        return table
    if any(b < a for a, b in zip(old, new, strict=True)):
        raise ZooError(
            f"relative positions of {old[0]} x {old[1]} patches cannot be made those of {new[0]} x {new[1]}: write a larger picture"
        )
    spread = [_spread(a, b) for a, b in zip(old, new, strict=True)]
    wanted = [np.arange(1 - b, b, dtype=float) for b in new]
    grids = table[: offsets(old)].detach().double().cpu().numpy().T.reshape(-1, 2 * old[0] - 1, 2 * old[1] - 1)
    degrees = [min(3, len(places) - 1) for places in spread]
    read = [RectBivariateSpline(*spread, grid, kx=degrees[0], ky=degrees[1])(*wanted).ravel() for grid in grids]
    return torch.cat([torch.from_numpy(np.stack(read, 1)).to(table), table[offsets(old) :]])


def _spread(old: int, new: int) -> np.ndarray:
    """(2 old - 1,) where the offsets of ``old`` places lie among those of ``new``: 1, 1 + q, 1 + q + q^2, ... on both sides of 0."""
    if old == new or old < 3:
        return np.arange(1 - old, old, dtype=float) * ((new - 1) / max(old - 1, 1))
    low, high = 1.0, 2.0
    while (high ** (old - 1) - 1) / (high - 1) < new - 1:
        high *= 2
    for _ in range(60):
        q = (low + high) / 2
        low, high = (low, q) if sum(q**i for i in range(old - 1)) > new - 1 else (q, high)
    steps = np.cumsum(low ** np.arange(old - 1))
    return np.concatenate([-steps[::-1], [0.0], steps])
