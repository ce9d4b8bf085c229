"""Flickr8k-CN: the photographs of Flickr8k with descriptions in Chinese."""

from __future__ import annotations

from pathlib import Path

from zoo.data._caption_lines import lines, lists_of, read
from zoo.data._captioned import Captioned
from zoo.data._labelled import find
from zoo.registry import register

LAYOUT = """flickr8k_cn is a folder with
  flickr8ktrain.txt, flickr8kval.txt, flickr8ktest.txt  names of pictures
  flickr8kzhc.caption.txt                               lines <picture>.jpg#zhc#0 text
of https://github.com/li-xirong/flickr8kcn, folder data, and with
  images/                                               the pictures; or in another folder, the setting images"""


@register("data", "flickr8k_cn", licence="of the texts: see their repository; of each picture its owner's")
def flickr8k_cn(
    root: Path | None, *, folder: str = "flickr8k_cn", images: str = "images", texts: str = "flickr8kzhc.caption.txt"
) -> Captioned:
    """Flickr8k-CN (Li et al., 2016, https://doi.org/10.1145/2911996.2912049): 8,000 pictures with sentences in Chinese.

    6,000 pictures train, 1,000 are val, 1,000 test.

    Args:
        root: The folder of data folders.
        folder: Below ``root``, or an absolute path.
        images: The folder of the pictures, below ``folder`` or absolute.
        texts: Which file of sentences: ``flickr8kzhc.caption.txt`` was written by people, ``flickr8kzhb.caption.txt`` and
            ``flickr8kzhg.caption.txt`` are machines' translations, ``flickr8kzhmtest.captions.txt`` is people's, of the test pictures
            alone; splits that it does not cover are empty.

    Raises:
        ZooError: If the folder, a file or every picture is missing, or a line is not as it should be.
    """
    place = find(root, folder, LAYOUT, texts, *(f"flickr8k{split}.txt" for split in ("train", "val", "test")))

    def file(name: str) -> Path:
        return place / images / f"{name}.jpg"

    return read("flickr8k_cn", place, LAYOUT, lists_of(place, "flickr8k{}.txt"), lines(place / texts), file, {"texts": texts})
