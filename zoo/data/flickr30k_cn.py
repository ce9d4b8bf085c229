"""Flickr30k-CN: the photographs of Flickr30k with descriptions in Chinese, translated by machine to train on and by people to test on."""

from __future__ import annotations

import re
from pathlib import Path

from zoo.data._caption_lines import lines, read
from zoo.data._captioned import Captioned
from zoo.data._labelled import find
from zoo.registry import register

PARTS = {"train": "flickr30kzhbbosontrain", "val": "flickr30kzhbbosonval", "test": "flickr30kzhmbosontest"}
LAYOUT = """flickr30k_cn is a folder with
  flickr30kzhbbosontrain/, flickr30kzhbbosonval/, flickr30kzhmbosontest/, and in each
    ImageSets/<folder>.txt             names of pictures
    TextData/seg.<folder>.caption.txt  lines <picture>#zhb#0 words
of https://github.com/li-xirong/cross-lingual-cap, and with
  images/                              the pictures; or in another folder, the setting images"""
KIND = re.compile(r":[A-Za-z]+$")  # of a word, which the files of test say of each


@register("data", "flickr30k_cn", licence="of the texts: see their repository; of each picture its owner's")
def flickr30k_cn(root: Path | None, *, folder: str = "flickr30k_cn", images: str = "images") -> Captioned:
    """Flickr30k-CN (Lan et al., 2017, https://arxiv.org/abs/1708.04390): Flickr30k with five sentences in Chinese a picture.

    29,783 pictures train and 1,000 are val, with Baidu's translations; 1,000 are test, translated by people. The files hold words with
    spaces between them, in test with the kind of each word; the words are joined, and the kinds left out.

    Args:
        root: The folder of data folders.
        folder: Below ``root``, or an absolute path.
        images: The folder of the pictures, below ``folder`` or absolute.

    Raises:
        ZooError: If the folder, a file or every picture is missing, or a line is not as it should be.
    """
    lists = {split: f"{part}/ImageSets/{part}.txt" for split, part in PARTS.items()}
    texts = [f"{part}/TextData/seg.{part}.caption.txt" for part in PARTS.values()]
    place = find(root, folder, LAYOUT, *lists.values(), *texts)
    said: dict[str, list[str]] = {}
    for file in texts:
        said |= lines(place / file, _joined)
    return read(
        "flickr30k_cn",
        place,
        LAYOUT,
        {split: place / file for split, file in lists.items()},
        said,
        lambda name: place / images / f"{name}.jpg",
        {},
    )


def _joined(text: str) -> str:
    return "".join(KIND.sub("", word) for word in text.split())
