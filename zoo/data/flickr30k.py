"""Flickr30k: photographs of people and what they do, with five descriptions each."""

from __future__ import annotations

from pathlib import Path

from zoo.config import Positive
from zoo.data._captioned import Captioned
from zoo.data._karpathy import read
from zoo.registry import register

LAYOUT = """flickr30k is a folder with
  dataset_flickr30k.json  captions and splits of Karpathy and Fei-Fei, https://cs.stanford.edu/people/karpathy/deepimagesent/
  images/                 the pictures; or in another folder, the setting images"""


@register("data", "flickr30k", licence="for research; of each picture its owner's")
def flickr30k(root: Path | None, *, folder: str = "flickr30k", images: str = "images", captions: Positive | None = None) -> Captioned:
    """Flickr30k (Young et al., 2014, https://doi.org/10.1162/tacl_a_00166) in Karpathy's splits (https://arxiv.org/abs/1412.2306).

    29,000 pictures to train on, 1,014 in val, 1,000 in test.

    Args:
        root: The folder of data folders.
        folder: Below ``root``, or an absolute path.
        images: The folder of the pictures, below ``folder`` or absolute.
        captions: The first so many of each picture; None: all five.

    Raises:
        ZooError: If the folder, the file or every picture is missing, or the file is no such JSON.
    """
    return read("flickr30k", root, {k: v for k, v in locals().items() if k != "root"}, LAYOUT)
