"""Questions about pictures, answered by a class: a model that reads a text beside a picture, and a head on what it makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from zoo.abilities import Asking
from zoo.config import FusionSpec, ModelSpec, Positive, split_spec
from zoo.errors import ZooError
from zoo.freeze import freeze
from zoo.hub import Hosted
from zoo.joints import compose
from zoo.models._bert import nothing
from zoo.models._encode import classify
from zoo.registry import make, register
from zoo.types import Batch, ModalityInputs, ModelOutput, Rows

JOINTS: dict[str, str | None] = {"schedule": "joint"}
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


class Vqa(Hosted, nn.Module):
    """The model; `vqa` builds it.

    Its parts have the names that they have in the model inside, so that `init_from` takes them from where that was trained.

    Args:
        base: Reads questions beside pictures; what it has besides is left out.
        classes: K.
        schedule: How one batch becomes updates.
    """

    modality_modules: Mapping[str, Sequence[str]] = {"image": ("vision",), "text": ("embed",)}
    outputs: tuple[str, ...] = (FUSED,)

    def __init__(self, base: Base, classes: int, schedule: nn.Module) -> None:
        super().__init__()
        inside = base.model
        self.vision, self.embed, self.trunk = inside.vision, inside.embed, inside.trunk
        for name, module in self.trunk.named_modules():
            if name.endswith(".decode"):  # BLIP's self-attention for writing, which is kept so that its trunk stays one
                freeze(module)
        self.dim: int = inside.trunk.shape.dim
        wide = 2 * self.dim
        self.answers = nn.Sequential(nn.Linear(self.dim, wide), nn.LayerNorm(wide), nn.GELU(), nn.Linear(wide, classes))
        self.classes, self.schedule, self.processor, self.trained = classes, schedule, inside.processor, False
        self._inside = (base,)  # no module of this one: it has the parts that are

    def forward(self, batch: Batch) -> ModelOutput:
        """``logits`` has ``fused`` (B, K); ``embeddings`` ``fused`` (B, D), what they are told from.

        Without a picture the question is read alone, without a question the picture is read beside an empty one.
        """
        base = self._inside[0].model
        if not batch.inputs:  # no row shows anything
            return self._blank(0 if batch.targets is None else len(batch.targets))
        one = next(iter(batch.inputs.values()))
        seen = base.look(batch.inputs["image"]) if "image" in batch.inputs else nothing(one, self.vision.dim)  # (B, N, Dv)
        question, there = self._question(batch.inputs.get("text"), one)
        asked = base.ask(question, seen)  # (B, N, D)
        return ModelOutput({FUSED: asked.pooled}, {FUSED: seen.present | there}, {FUSED: self.answers(asked.pooled)})

    def classify(self, rows: Rows, batch_size: int = 32, show_progress: bool | None = None) -> np.ndarray:
        """Probabilities of the answers to raw rows, in eval mode.

        Args:
            rows: Dictionaries ``{"image": picture, "text": question}``, either of which may be missing, or a single one.
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
        self._inside[0].model.checkpoint_gradients()

    def parts(self) -> Mapping[str, Any]:
        """The setting that names the model inside, and what was made of it."""
        return {"base": self._inside[0]}

    def _question(self, text: ModalityInputs | None, one: ModalityInputs) -> tuple[ModalityInputs, torch.Tensor]:
        """Questions, of which a missing one is the id alone that opens a text; and who has one."""
        B, device = len(one.values), one.values.device
        start = self.processor.text.vocabulary.role("start", "vqa")
        if text is None:
            return ModalityInputs(torch.full((B, 1), start, device=device)), torch.zeros(B, dtype=torch.bool, device=device)
        there = torch.ones(B, dtype=torch.bool, device=device) if text.present is None else text.present
        ids, mask = text.values.clone(), torch.ones_like(text.values, dtype=torch.bool) if text.mask is None else text.mask.clone()
        ids[~there, 0], mask[~there, 0] = start, True
        return ModalityInputs(ids, mask), there

    def _blank(self, rows: int) -> ModelOutput:
        weight: torch.Tensor = self.embed.words.weight
        pooled = weight.new_zeros(rows, self.dim)
        return ModelOutput(
            {FUSED: pooled}, {FUSED: torch.zeros(rows, dtype=torch.bool, device=weight.device)}, {FUSED: self.answers(pooled)}
        )


@register("model", "vqa", joints=JOINTS, paper="Goyal et al., VQA v2, 2017, https://arxiv.org/abs/1612.00837")
def vqa(*, classes: Positive, base: ModelSpec = "albef", fusion: FusionSpec = "joint") -> Vqa:
    """An answer from a closed list to a question about a picture: ALBEF or BLIP reads both, and a head tells the class.

    Train it with the objective ``cross_entropy`` on rows of known answer. The head is a layer twice as wide as texts, a norm, GELU and a
    layer, as VLMo has it (Bao et al., 2021, https://arxiv.org/abs/2111.02358). ``init_from`` takes ``vision``, ``embed`` and ``trunk`` of a
    run of the model inside. BLIP and ALBEF themselves write answers; `zoo.answers.rank_answers` ranks a list by a ``blip`` that does.

    Args:
        classes: K, the answers.
        base: A model that reads a text beside a picture, ``albef`` or ``blip``, with its settings.
        fusion: A plug-in for the joint schedule; one for the trunk stands in ``base``.

    Raises:
        ZooError: If the model inside reads no questions, or a fusion does not fit.
    """
    joints = compose(fusion, "vqa", JOINTS)
    inside = make("model", base)
    if not isinstance(inside, Asking):
        raise ZooError(f"vqa.base: {split_spec(base)[0]!r} reads no text beside a picture: write albef or blip")
    schedule = joints.make("schedule", ["image", "text"], inside.trunk.shape.dim, classes)  # type: ignore[attr-defined]
    return Vqa(Base(inside, base), classes, schedule)
