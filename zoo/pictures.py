"""How large a picture may be, and what a broken one raises: data sets and encoders agree, so that none is found only in training."""

from __future__ import annotations

import struct

from PIL import Image

MOST_PIXELS = 1 << 26  # a picture of 8192 x 8192: more is a mistake or an attack, and 200 MB of memory in every worker
TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)  # Pillow's own limits are higher, the warning's by a third
UNDECODABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, *TOO_LARGE)  # what Pillow raises on bad files


def check_size(picture: Image.Image) -> None:
    """Whether a picture that was opened, and not yet decoded, may be.

    Raises:
        Image.DecompressionBombError: If it has more than `MOST_PIXELS` pixels.
    """
    if picture.width * picture.height > MOST_PIXELS:
        raise Image.DecompressionBombError(f"{picture.width} x {picture.height}")
