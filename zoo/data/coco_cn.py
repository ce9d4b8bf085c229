"""COCO-CN: photographs of COCO with descriptions that were written in Chinese."""

from __future__ import annotations

from pathlib import Path

from zoo.data._caption_lines import lines, lists_of, read
from zoo.data._captioned import Captioned
from zoo.data._labelled import find
from zoo.registry import register

LAYOUT = """coco_cn is a folder with
  coco-cn_train.txt, coco-cn_val.txt, coco-cn_test.txt  names of pictures, COCO_train2014_<number>
  imageid.human-written-caption.txt                     lines COCO_train2014_<number>#0<tab>text
of https://github.com/li-xirong/coco-cn, version 201805, and with
  train2014/, val2014/                                  the pictures of COCO; or in another folder, the setting images"""


@register("data", "coco_cn", licence="of the texts: see their repository; of each picture its owner's")
def coco_cn(
    root: Path | None, *, folder: str = "coco_cn", images: str = ".", texts: str = "imageid.human-written-caption.txt"
) -> Captioned:
    """COCO-CN (Li et al., 2019, https://arxiv.org/abs/1805.08661): 20,341 pictures with 22,218 sentences written in Chinese.

    18,341 pictures train, 1,000 are val, 1,000 test.

    Args:
        root: The folder of data folders.
        folder: Below ``root``, or an absolute path.
        images: The folder of train2014 and val2014, below ``folder`` or absolute.
        texts: Which file of sentences; ``imageid.manually-translated-caption.txt`` covers the test pictures alone, and splits that it
            does not cover are empty.

    Raises:
        ZooError: If the folder, a file or every picture is missing, or a line is not as it should be.
    """
    place = find(root, folder, LAYOUT, texts, *(f"coco-cn_{split}.txt" for split in ("train", "val", "test")))

    def file(name: str) -> Path:
        return place / images / ("val2014" if name.startswith("COCO_val2014_") else "train2014") / f"{name}.jpg"

    return read("coco_cn", place, LAYOUT, lists_of(place, "coco-cn_{}.txt"), lines(place / texts), file, {"texts": texts})
