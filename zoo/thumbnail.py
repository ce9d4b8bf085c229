"""A picture small enough to lie inside a report."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image

LONGER = 112  # pixels of the longer side; shown at half of it or a little more


def thumbnail(image: Any) -> str | None:
    """A raw picture, the first of several, as a small PNG in base64; None for none.

    Args:
        image: A PIL image, the bytes of a file, its path, a list of these, or None.
    """
    if isinstance(image, list | tuple):
        image = image[0] if image else None
    if isinstance(image, bytes):
        image = Image.open(io.BytesIO(image))
    elif isinstance(image, str | Path):
        image = Image.open(image)
    if image is None:
        return None
    image = image.convert("RGB")
    image.thumbnail((LONGER, LONGER))
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
