"""Questions about pictures, answered by a class: a model that reads a text beside a picture, and a head on what it makes of them."""

from __future__ import annotations

from zoo.abilities import Asking
from zoo.config import FusionSpec, ModelSpec, Positive, split_spec
from zoo.errors import ZooError
from zoo.joints import compose
from zoo.models._headed import Base, Headed
from zoo.registry import make, register
from zoo.types import Batch, ModelOutput

JOINTS: dict[str, str | None] = {"schedule": "joint"}


class Vqa(Headed):
    """The model; `vqa` builds it."""

    def forward(self, batch: Batch) -> ModelOutput:
        """``logits`` has ``fused`` (B, K); ``embeddings`` ``fused`` (B, D), what they are told from.

        Without a picture the question is read alone, without a question the picture is read beside an empty one.
        """
        if not batch.inputs:  # no row shows anything
            return self.blank(batch.targets)
        one = next(iter(batch.inputs.values()))
        seen = self.seen(batch.inputs.get("image"), one)  # (B, N, Dv)
        question, there = self.question(batch.inputs.get("text"), one)
        return self.told(self.inside.ask(question, seen).pooled, seen.present | there)


@register("model", "vqa", joints=JOINTS, paper="Goyal et al., VQA v2, 2017, https://arxiv.org/abs/1612.00837")
def vqa(*, classes: Positive, base: ModelSpec = "albef", fusion: FusionSpec = "joint") -> Vqa:
    """An answer from a closed list to a question about a picture: a model reads both, and a head tells the class.

    Train it with the objective ``cross_entropy`` on rows of known answer, or as published with ``binary_cross_entropy`` on what people
    answered. The head, ``answers``, is a layer twice as wide as texts, a norm, GELU and a layer, as VLMo has it (Bao et al., 2021,
    https://arxiv.org/abs/2111.02358), which gives it 20 times the learning rate: a group of ``optimizer.groups``. ``init_from`` takes
    ``vision``, ``embed`` and ``trunk`` of a run of the model inside, of VLMo also ``kinds``, ``positions`` and ``pooler``. BLIP and ALBEF
    themselves write answers; `zoo.answers.rank_answers` ranks a list by a ``blip`` that does.

    Args:
        classes: K, the answers.
        base: A model that reads a text beside a picture, ``albef``, ``blip``, ``vlmo`` or ``beit_3``, with its settings.
        fusion: A plug-in for the joint schedule; one for the trunk stands in ``base``.

    Raises:
        ZooError: If the model inside reads no questions, or a fusion does not fit.
    """
    joints = compose(fusion, "vqa", JOINTS)
    inside = make("model", base)
    if not isinstance(inside, Asking):
        raise ZooError(f"vqa.base: {split_spec(base)[0]!r} reads no text beside a picture: write albef, blip, vlmo or beit_3")
    width: int = inside.trunk.shape.dim  # type: ignore[attr-defined]
    schedule = joints.make("schedule", ["image", "text"], width, classes)
    return Vqa(Base(inside, base), width, classes, schedule, inside.processor)  # type: ignore[attr-defined]
