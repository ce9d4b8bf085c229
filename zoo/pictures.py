"""How large a picture may be, what a broken one raises, and which frames of a video are seen: data sets and encoders agree on it."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

MOST_PIXELS = 1 << 26  # a picture of 8192 x 8192: more is a mistake or an attack, and 200 MB of memory in every worker
TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)  # Pillow's own limits are higher, the warning's by a third
UNDECODABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, *TOO_LARGE)  # what Pillow raises on bad files


def check_size(picture: Image.Image) -> None:
    """Whether a picture that was opened, and not yet decoded, may be.

    Raises:
        Image.DecompressionBombError: If it has more than `MOST_PIXELS` pixels.
        ValueError: If it has none.
    """
    if not picture.width * picture.height:
        raise ValueError(f"{picture.width} x {picture.height} pixels are none")
    if picture.width * picture.height > MOST_PIXELS:
        raise Image.DecompressionBombError(f"{picture.width} x {picture.height}")


def in_colours(picture: Image.Image) -> Image.Image:
    """The picture in RGB: what is transparent becomes white, and of 16 bits of grey the higher 8 stay, where Pillow would cut to white."""
    if picture.has_transparency_data:
        above = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", above.size, "white"), above).convert("RGB")
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    return picture.convert("RGB")


def why(error: Exception) -> str:
    """What was wrong with a picture: one of `UNDECODABLE` in words that are the same in every run, where Pillow says a place in memory."""
    return "of no known format" if isinstance(error, UnidentifiedImageError) else str(error)


def frames_in(folder: Path) -> tuple[Path, ...]:
    """The pictures of a folder in the order of the numbers in their names, frame 10 after frame 9; () if there is no such folder."""
    if not folder.is_dir():
        return ()
    frames = [p for p in folder.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png") and not p.name.startswith(".")]
    return tuple(sorted(frames, key=lambda p: ([int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", p.stem)], p.name)))


def middles(many: int, few: int) -> list[int]:
    """Places of ``few`` frames among ``many``, each in the middle of one of as many equal stretches; of all, if there are no more.

    As Wang et al. at test time, Temporal segment networks, 2016, https://arxiv.org/abs/1608.00859.
    """
    few = min(few, many)
    return [(2 * i + 1) * many // (2 * few) for i in range(few)]
