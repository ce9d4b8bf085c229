"""What a model says of pictures in files: which of some classes they show, by the names alone, or a caption of each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zoo.abilities import Captioning
from zoo.captions import caption, check_able
from zoo.errors import ZooError
from zoo.hub import load
from zoo.models._pictures import PictureTextModel
from zoo.picture_files import PictureFiles
from zoo.questions import embed
from zoo.sections import Decoding
from zoo.zeroshot import PLACE, classifier


def zeroshot_files(
    run: str | Path,
    files: Sequence[Path],
    names: Sequence[str],
    *,
    templates: Sequence[str] = (PLACE,),
    top: int = 1,
    batch_size: int = 64,
    show_progress: bool | None = None,
) -> list[dict[str, Any]]:
    """The classes of pictures, none of which the model was trained to tell.

    Args:
        run: A run folder of a model of pictures and texts.
        files: Of pictures.
        names: (K) of the classes.
        templates: Sentences with ``{}`` in the place of the name, as `zoo.zeroshot.classifier` takes them.
        top: How many classes of each picture, the nearest first.
        batch_size: Pictures, or sentences, at a time.
        show_progress: None: a bar when there are many and somebody watches.

    Returns:
        ``{"file", "rank", "class", "cosine"}`` each, ``top`` of every file.

    Raises:
        ZooError: If the model reads no texts or sees no pictures, a picture cannot be decoded, or names or templates are at fault.
    """
    model = pictures_and_texts(run)
    if not 1 <= top <= len(names):
        raise ZooError(f"--top {top}: there are {len(names)} classes: write 1 to {len(names)}")
    classes = classifier(model, names, templates, batch_size=batch_size, show_progress=show_progress)  # (K, D)
    vectors = embed(model, PictureFiles(files), batch_size=batch_size, show_progress=show_progress)  # (N, D)
    cosines = vectors.astype(np.float64) @ classes.T.astype(np.float64)
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :top]
    return [
        {"file": str(file), "rank": rank, "class": names[k], "cosine": round(float(cosines[i, k]), 6)}
        for i, file in enumerate(files)
        for rank, k in enumerate(nearest[i].tolist(), 1)
    ]


def caption_files(
    run: str | Path,
    files: Sequence[Path],
    how: Decoding,
    *,
    prompt: str = "",
    seed: int = 0,
    batch_size: int = 32,
    show_progress: bool | None = None,
) -> list[dict[str, Any]]:
    """A caption of each picture.

    Args:
        run: A run folder of a model that writes captions.
        files: Of pictures.
        how: The way words are chosen.
        prompt: Words that each caption begins with.
        seed: Of the draws.
        batch_size: Pictures at a time.
        show_progress: None: a bar when there are many and somebody watches.

    Returns:
        ``{"file", "caption"}`` each.

    Raises:
        ZooError: If the model writes no captions, or a picture cannot be decoded.
    """
    model = load(run)
    check_able(model, Captioning, f"the model in {run}")
    texts = caption(model, PictureFiles(files), how, prompt=prompt, seed=seed, batch_size=batch_size, show_progress=show_progress)
    return [{"file": str(file), "caption": text} for file, text in zip(files, texts, strict=True)]


def pictures_and_texts(run: str | Path) -> Any:
    """The model of a run folder, in eval mode.

    Raises:
        ZooError: If it does not give vectors of pictures and of texts.
    """
    model = load(run)
    if not isinstance(model, PictureTextModel):
        raise ZooError(
            f"the model in {run} is a {type(model).__name__}, which gives no vectors of pictures and texts: "
            "take a clip, albef, blip, coca, vlmo or beit_3"
        )
    return model
