"""COCO: photographs with five descriptions each, in the splits that everybody compares on."""

from __future__ import annotations

from pathlib import Path

from zoo.config import Positive
from zoo.data._captioned import Captioned
from zoo.data._karpathy import read
from zoo.registry import register

LAYOUT = """coco_captions is a folder with
  dataset_coco.json     captions and splits of Karpathy and Fei-Fei, https://cs.stanford.edu/people/karpathy/deepimagesent/
  train2014/, val2014/  the pictures, COCO_train2014_<number>.jpg, of https://cocodataset.org; or in another folder, the setting images"""


@register("data", "coco_captions", licence="CC BY 4.0 (captions); of each picture its owner's")
def coco_captions(
    root: Path | None, *, folder: str = "coco_captions", images: str = ".", restval: bool = True, captions: Positive | None = None
) -> Captioned:
    """COCO captions (Chen et al., 2015, https://arxiv.org/abs/1504.00325) in Karpathy's splits (https://arxiv.org/abs/1412.2306).

    113,287 pictures to train on, 82,783 of COCO's own train2014 and 30,504 of val2014 which Karpathy calls ``restval``; 5,000 in val and
    5,000 in test. Most pictures have five captions, a few hundred six or seven.

    Args:
        root: The folder of data folders.
        folder: Below ``root``, or an absolute path.
        images: The folder of train2014 and val2014, below ``folder`` or absolute.
        restval: Whether those pictures are trained on too; else they are a split of this name.
        captions: The first so many of each picture; retrieval on 5,000 pictures and 25,000 captions takes 5. None: all.

    Raises:
        ZooError: If the folder, the file or every picture is missing, or the file is no such JSON.
    """
    return read("coco_captions", root, {k: v for k, v in locals().items() if k != "root"}, LAYOUT)
