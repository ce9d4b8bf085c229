"""What `vqa` and `nlvr2` share: parts of a model that reads a text beside a picture, and a head on what it makes of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.config import split_spec
from zoo.freeze import freeze
from zoo.hub import Hosted
from zoo.models._bert import unseen
from zoo.models._encode import classify
from zoo.types import ModalityInputs, ModelOutput, Rows, Tokens

FUSED = "fused"


class Base:
    """The model inside, as its setting names it.

    Args:
        model: Built.
        spec: As a recipe writes it.
    """

    def __init__(self, model: Any, spec: Mapping[str, Any] | str) -> None:
        self.model = model
        self._spec = split_spec(spec)[1] if isinstance(spec, str) else split_spec(dict(spec))[1]

    def portable(self) -> dict[str, Any]:
        """The settings that rebuild it without a network."""
        found = {}
        for key, part in self.model.parts().items():
            if own := part.portable():
                given = self._spec.get(key) or {"name": part.name}
                name, settings = split_spec(given)
                found[key] = {"name": name, **settings, **own}
        return found


def head(given: int, hidden: int, classes: int, *, normed: bool = False) -> nn.Sequential:
    """Two layers from (B, given) to (B, classes), as VLMo and BEiT-3 have them; weights are drawn as torch draws them.

    Args:
        given: Width of what classes are told from.
        hidden: Width between the layers.
        classes: K.
        normed: Whether a norm stands before the first layer.
    """
    first = [nn.LayerNorm(given)] if normed else []
    return nn.Sequential(*first, nn.Linear(given, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, classes))


class Headed(Hosted, nn.Module):
    """A model that tells classes from a text and pictures; those that are built have a ``forward``.

    Its parts have the names that they have in the model inside, so that `init_from` takes them from where that was trained.

    Args:
        base: Reads texts beside pictures; what it has besides the parts that this takes is left out.
        given: Width of what classes are told from.
        classes: K.
        schedule: How one batch becomes updates.
        processor: Raw row to inputs.
        normed: As of `head`.
    """

    modality_modules: Mapping[str, Sequence[str]] = {"image": ("vision",), "text": ("embed",)}
    outputs: tuple[str, ...] = (FUSED,)

    def __init__(self, base: Base, given: int, classes: int, schedule: nn.Module, processor: Any, *, normed: bool = False) -> None:
        super().__init__()
        inside = base.model
        for name, module in inside.named_children():
            if name in inside.asks_with:
                self.add_module(name, module)
        for name, module in self.named_modules():
            if any(re.fullmatch(pattern, name) for pattern in inside.asks_without):
                freeze(module)
        self.answers = head(given, 2 * inside.trunk.shape.dim, classes, normed=normed)
        self.dim, self.classes, self.schedule, self.processor, self.trained = given, classes, schedule, processor, False
        self._inside = (base,)  # no module of this one: it has the parts that are

    @property
    def inside(self) -> Any:
        """The model inside."""
        return self._inside[0].model

    def classify(self, rows: Rows, batch_size: int = 32, show_progress: bool | None = None) -> np.ndarray:
        """Probabilities of the classes of raw rows, in eval mode.

        Args:
            rows: Dictionaries of any subset of the keys that the processor names, or a single one.
            batch_size: Rows at a time.
            show_progress: None: a bar when there are many rows and somebody watches.

        Returns:
            (N, K) float32, or (K,) of a single row.

        Raises:
            ZooError: If these are no rows, or one is empty or cannot be read.
        """
        return classify(self, rows, batch_size=batch_size, show_progress=show_progress)

    def checkpoint_gradients(self) -> None:
        """As of the model inside."""
        self.inside.checkpoint_gradients()

    def parts(self) -> Mapping[str, Any]:
        """The setting that names the model inside, and what was made of it."""
        return {"base": self._inside[0]}

    def seen(self, image: ModalityInputs | None, one: ModalityInputs, place: int = 0) -> Tokens:
        """What reading begins from of pictures (B, N, D); nothing where there is none.

        Args:
            image: The pictures.
            one: Any modality of the same rows.
            place: 1 for the second picture of a row.
        """
        inside = self.inside
        if image is not None:
            found: Tokens = inside.see(image, place)
            return found
        return unseen(inside, one)

    def question(self, text: ModalityInputs | None, one: ModalityInputs) -> tuple[ModalityInputs, Tensor]:
        """Texts, of which a missing one is the id alone that opens a text; and who has one (B,) bool."""
        B, device = len(one.values), one.values.device
        start = self.processor.text.vocabulary.role("start", "a question")
        if text is None:
            return ModalityInputs(torch.full((B, 1), start, device=device)), torch.zeros(B, dtype=torch.bool, device=device)
        there = torch.ones(B, dtype=torch.bool, device=device) if text.present is None else text.present
        ids, mask = text.values.clone(), torch.ones_like(text.values, dtype=torch.bool) if text.mask is None else text.mask.clone()
        ids[~there, 0], mask[~there, 0] = start, True
        return ModalityInputs(ids, mask), there

    def told(self, x: Tensor, present: Tensor) -> ModelOutput:
        """Logits of what was made of rows (B, D), of which ``present`` (B,) bool show anything."""
        return ModelOutput({FUSED: x}, {FUSED: present}, {FUSED: self.answers(x)})

    def blank(self, targets: Tensor | None) -> ModelOutput:
        """The same of a batch in which no row shows anything."""
        weight = next(self.answers.parameters())
        rows = 0 if targets is None else len(targets)
        return self.told(weight.new_zeros(rows, self.dim), torch.zeros(rows, dtype=torch.bool, device=weight.device))
