"""Whether a sentence is true of two pictures: a model that reads it beside each of them, and a head on what it makes of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.abilities import Asking, Comparing
from zoo.config import FusionSpec, ModelSpec, split_spec
from zoo.errors import ZooError
from zoo.joints import compose
from zoo.models._headed import Base, Headed
from zoo.models._pictures import PictureTextProcessor
from zoo.registry import make, register
from zoo.types import Batch, ModalityInputs, ModelOutput, Row, Tokens

JOINTS: dict[str, str | None] = {"schedule": "joint"}
PICTURES = ("image", "image_2")
CLASSES = 2  # false, true


class TwoPicturesProcessor:
    """One raw row to ``image``, ``image_2`` and ``text``, as far as they are there; small and picklable.

    Args:
        one: Of rows of one picture and a text.
    """

    def __init__(self, one: PictureTextProcessor) -> None:
        self.one, self.text = one, one.text

    def __call__(self, row: Row) -> dict[str, ModalityInputs]:
        """What the row has."""
        second = row.get("image_2")
        return self.one(row) | ({} if second is None else {"image_2": self.one.image(second)})

    def config(self) -> dict[str, Any]:
        """What decides its result, for comparison when weights are loaded."""
        return self.one.config()

    def keys(self) -> tuple[str, ...]:
        """The keys of a row that this model looks at."""
        return (*PICTURES, "text")

    def sees(self, row: Row) -> bool:
        """Whether the row has anything that this model looks at."""
        return row.get("image_2") is not None or self.one.sees(row)


class Nlvr2(Headed):
    """The model; `nlvr2` builds it."""

    def forward(self, batch: Batch) -> ModelOutput:
        """``logits`` has ``fused`` (B, 2), false and true; ``embeddings`` ``fused`` (B, W), what they are told from.

        Beside a picture that is missing the sentence is read alone; without a sentence the pictures are read beside an empty one.
        """
        if not batch.inputs:  # no row shows anything
            return self.blank(batch.targets)
        one = next(iter(batch.inputs.values()))
        seen = [self.seen(batch.inputs.get(key), one, place) for place, key in enumerate(PICTURES)]  # (B, N, Dv) each
        question, there = self.question(batch.inputs.get("text"), one)
        x = _compared(self.inside, question, seen)  # (B, W)
        return self.told(x, seen[0].present | seen[1].present | there)


def _compared(inside: Any, question: ModalityInputs, seen: Sequence[Tokens]) -> Tensor:
    """(B, W): as the model inside compares, or else what it makes of the sentence beside the one picture, then beside the other."""
    if isinstance(inside, Comparing):
        return inside.compare(question, seen)
    return torch.cat([inside.ask(question, picture).pooled for picture in seen], -1)


@register("model", "nlvr2", joints=JOINTS, paper="Suhr et al., NLVR2, 2019, https://arxiv.org/abs/1811.00491")
def nlvr2(*, base: ModelSpec = "albef", normed: bool = False, fusion: FusionSpec = "joint") -> Nlvr2:
    """Whether a sentence is true of two pictures: a model reads it beside each of them, and a head tells false, class 0, or true.

    Train it with the objective ``cross_entropy`` on rows ``{"image": left, "image_2": right, "text": sentence}``. A model that says how it
    compares does so; ALBEF and BLIP read the sentence twice, as VLMo does (Bao et al., 2021, https://arxiv.org/abs/2111.02358), and not by
    two cross-attentions, as their authors fine-tune them. The head, ``answers``, is a layer twice as wide as texts, a norm, GELU and a
    layer. ``init_from`` takes what `vqa` takes.

    Args:
        base: A model that reads a text beside a picture, ``albef``, ``blip``, ``vlmo`` or ``beit_3``, with its settings.
        normed: Whether a norm stands before the head, as in BEiT-3 (Wang et al., 2022, https://arxiv.org/abs/2208.10442).
        fusion: A plug-in for the joint schedule; one for the trunk stands in ``base``.

    Raises:
        ZooError: If the model inside reads no text beside a picture, or a fusion does not fit.
    """
    joints = compose(fusion, "nlvr2", JOINTS)
    inside: Any = make("model", base)
    if not isinstance(inside, Asking | Comparing):
        raise ZooError(f"nlvr2.base: {split_spec(base)[0]!r} reads no text beside a picture: write albef, blip, vlmo or beit_3")
    width = inside.compared_dim if isinstance(inside, Comparing) else 2 * inside.trunk.shape.dim  # type: ignore[attr-defined]
    schedule = joints.make("schedule", [*PICTURES, "text"], width, CLASSES)
    processor = TwoPicturesProcessor(inside.processor)  # type: ignore[union-attr]
    return Nlvr2(Base(inside, base), width, CLASSES, schedule, processor, normed=normed)
