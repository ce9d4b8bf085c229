"""Classes by their names alone: a vector for each, averaged over sentences that the name is put into."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from zoo.errors import ZooError

PLACE = "{}"


def classifier(
    model: Any,
    names: Sequence[str],
    templates: Sequence[str] = (PLACE,),
    *,
    batch_size: int = 256,
    show_progress: bool | None = None,
) -> np.ndarray:
    """A vector of each class: its sentences' vectors, each of length 1, are averaged, and the mean is given length 1.

    Radford et al., CLIP, 2021, section 3.1.4, https://arxiv.org/abs/2103.00020.

    Args:
        model: In eval mode; its ``encode`` reads rows with ``text``.
        names: (K) of the classes.
        templates: Sentences with ``{}`` in the place of the name: ``a photo of a {}``.
        batch_size: Sentences at a time.
        show_progress: None: a bar when there are many and somebody watches.

    Returns:
        (K, D) float32.

    Raises:
        ZooError: If there is no class or no template, a name is empty, or a template has not one place for it.
    """
    faults = [f"template {t!r} has no place for the name: write {PLACE} in it, once" for t in templates if t.count(PLACE) != 1]
    faults += [f"class {i} has no name" for i, name in enumerate(names) if not name.strip()]
    if not names or not templates:
        faults.append("a classifier needs a class and a template at least")
    if faults:
        raise ZooError("\n".join(faults))
    sentences = [{"text": template.replace(PLACE, name)} for name in names for template in templates]
    vectors = model.encode(sentences, batch_size, show_progress, output="text").astype(np.float64)  # of length 1
    return _unit(vectors.reshape(len(names), len(templates), -1).mean(1)).astype(np.float32)


def told(vectors: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """The class that each picture is taken for: the one whose vector is nearest by cosine.

    Args:
        vectors: (N, D) of pictures.
        classes: (K, D) by `classifier`.

    Returns:
        (N,) int64.

    Raises:
        ZooError: If the widths differ.
    """
    if vectors.shape[1] != classes.shape[1]:
        raise ZooError(f"pictures of width {vectors.shape[1]} and classes of width {classes.shape[1]} come from different models")
    return (vectors.astype(np.float64) @ classes.T.astype(np.float64)).argmax(1)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), np.finfo(np.float32).tiny)
