"""Where the known data sets come from, whether a copy is the published one, and why none is made again from its source."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from zoo.errors import Absent, Failure, ZooError, unknown


class Origin(NamedTuple):
    """A data set that was made from public files."""

    files: Mapping[str, str]  # sha256 by name
    sources: tuple[str, ...]
    made_by_hand: str  # what no program can make again from the sources


ORIGINS = {
    "retail_notes": Origin(
        {
            "clicks.parquet": "91cda6f665fb68586a05407b98565114873688eadbee5b75c3d5f91b8dc9fbea",
            "notes.parquet": "7be03a86aa66a5a4997ed607bb1d3e7d3977a55285be50e8619f523160079369",
            "pairs.parquet": "d755b90280fca43e5bb071dc7903c67754f1e4d30de75d5a13731d6c948d0c9c",
        },
        (
            "purchases: UCI Online Retail (Chen, Sain, Guo, 2012; https://archive.ics.uci.edu/dataset/352/online+retail, CC BY 4.0), as in"
            " https://github.com/allanvc/onlineretail at 3a77afe42f2650c54221573f9537e45cde646834, data/onlineretail.rda",
            "drawings: https://github.com/googlefonts/noto-emoji (Apache-2.0, OFL-1.1)",
        ),
        "users are renumbered at random, topics and pictures follow word lists that were written by hand",
    ),
    "emoji_zh_en": Origin(
        {
            "concepts.parquet": "872ae333279389d83f8b0c152a2a631964e9ec9628aefd5e11738f10b095d651",
            "images.parquet": "cada1807ef44ad216496ba44c800196b5614fed80e6ab20e38933d57d915b343",
        },
        (
            "names: https://github.com/unicode-org/cldr-json at b08a82b582f1120d630d623f9e5073316741574d (Unicode License v3)",
            "drawings: https://github.com/googlefonts/noto-emoji at b3e3051a088047d19fd4d49b1c3ac42fb8c3aaf8 (OFL-1.1, Apache-2.0)",
            "drawings: https://github.com/iconify/icon-sets at 174ea0808b3b4cdd03a6769baee62d0fc6141c77 (CC BY 4.0, MIT)",
        ),
        "drawings were turned into pixels, and matched to names, by a program that was not published with it",
    ),
    "av_digits": Origin(
        {
            "audio.parquet": "733d9df051bf3dc0bf2d96f9633f21a23315e3edf2c3775b369af89edfb87e23",
            "images.parquet": "fadc3a0e4b3424c3da58dbf8115e626db2479c6f50339155f09dc154254ed690",
        },
        (
            "speech: https://github.com/Jakobovski/free-spoken-digit-dataset at 26eb9aaf76e81b692f806f9140c2d2777410d7a1 (CC BY-SA 4.0)",
            "digits: MNIST's test set, LeCun and Cortes (CC BY-SA 3.0), as in https://github.com/patrick-kidger/equinox at"
            " 9336d820b2ef66b360fc6cb3611b3da5cefbb14d, docs/examples/MNIST",
        ),
        "the program that paired speech and digits was not published with it",
    ),
}

HANDED_OUT = {  # sets that this library has no copy of: where each comes from, and its terms
    "crema_d": "https://github.com/CheyneyComputerScience/CREMA-D (Cao et al., 2014; ODbL 1.0)",
    "food101": "https://visiir.isir.upmc.fr (UPMC Food-101, Wang et al., 2015; pictures and titles are their owners')",
    "iemocap": "https://sail.usc.edu/iemocap (Busso et al., 2008; given out on request, for research)",
    "kinetics_sounds": "videos on YouTube, listed at https://github.com/cvdfoundation/kinetics-dataset (annotations CC BY 4.0)",
    "mvsa_single": "https://mcrlab.net/research/mvsa-sentiment-analysis-on-multi-view-social-data (Niu et al., 2016; for research)",
}
KARPATHY = "captions and splits https://cs.stanford.edu/people/karpathy/deepimagesent/"
PICTURES = {  # the same, of pictures with texts, questions, sentences or names of classes, whose splits are their publishers'
    "coco_captions": f"https://cocodataset.org (captions CC BY 4.0, pictures their owners'), {KARPATHY}",
    "coco_cn": "https://github.com/li-xirong/coco-cn (Li et al., 2019), pictures https://cocodataset.org",
    "flickr30k": f"https://shannon.cs.illinois.edu/DenotationGraph (Young et al., 2014; for research), {KARPATHY}",
    "flickr30k_cn": "https://github.com/li-xirong/cross-lingual-cap (Lan et al., 2017), pictures as flickr30k",
    "flickr8k": f"https://doi.org/10.1613/jair.3994 (Hodosh et al., 2013; for research), {KARPATHY}",
    "flickr8k_cn": "https://github.com/li-xirong/flickr8kcn (Li et al., 2016), pictures as flickr8k",
    "imagenet": "https://www.image-net.org (Russakovsky et al., 2015; given out on request, for research)",
    "nlvr2": "https://github.com/lil-lab/nlvr (Suhr et al., 2019), pictures from its authors on request, for research",
    "vqa_v2": "https://visualqa.org (Goyal et al., 2017; CC BY 4.0), pictures https://cocodataset.org",
}


def prepare(name: str, root: Path | None) -> Path:
    """Check a copy of a known data set against the hashes of the published one.

    Args:
        name: Of the set, and of its folder.
        root: The folder of data folders.

    Returns:
        The folder, whose files are the published ones.

    Raises:
        Absent: If it is not there. It says where the set comes from, and why it cannot be made here.
        Failure: If a file is missing or another one.
        ZooError: If no such set is known, or there are no hashes of it.
    """
    if name in HANDED_OUT:
        raise ZooError(
            f"{name} is fetched by you, from {HANDED_OUT[name]}: no hashes are published, so that no copy can be checked against them."
            f" zoo data split {name} --out FILE checks that every file of yours can be decoded, and says how the folder is to look"
        )
    if name in PICTURES:
        raise ZooError(
            f"{name} is fetched by you, from {PICTURES[name]}: no hashes are published, so that no copy can be checked against them."
            f" Whoever loads it looks at every picture; without a folder, data.name: {name} says how it is to look"
        )
    if name not in ORIGINS:
        known = unknown("data set with a public source", name, [*ORIGINS, *HANDED_OUT, *PICTURES])
        raise ZooError(f"{known}; planted_notes and planted_neglect are drawn when used")
    origin = ORIGINS[name]
    about = f"{name} cannot be made again from its sources: {origin.made_by_hand}. Copy its folder from somebody who has it. Sources:\n" + (
        "\n".join(f"  {source}" for source in origin.sources)
    )
    if root is None:
        raise Absent(f"the data set {name!r} is looked for in a folder of data folders, and none is given: --data DIR or ZOO_DATA\n{about}")
    folder = root / name
    if not folder.is_dir():
        raise Absent(f"no folder {folder}\n{about}")
    faults = [fault for file, sha256 in origin.files.items() if (fault := _fault(folder / file, sha256))]
    if faults:
        raise Failure("\n".join([*faults, about]))
    return folder


def _fault(path: Path, sha256: str) -> str:
    if not path.is_file():
        return f"{path} is missing"
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return "" if found == sha256 else f"{path} is not the published file: its sha256 is {found}, not {sha256}"
