"""MLA, alternating unimodal adaptation: a `classifier` whose modalities learn in turn through one head and are fused by certainty."""

from __future__ import annotations

from zoo.config import EncoderSpec, FusionSpec, Positive
from zoo.models._classes import GIVES, Classifier, assemble
from zoo.registry import register

JOINTS = {"combine": "uncertainty", "schedule": "mla"}
RESNETS: dict[str, EncoderSpec] = {"audio": "audio_resnet:resnet18", "image": "image_resnet:resnet18"}


@register(
    "model",
    "mla",
    joints=JOINTS,
    gives=GIVES,
    paper="Zhang et al., Multimodal representation learning by alternating unimodal adaptation, 2024, https://arxiv.org/abs/2311.10707",
)
def mla(
    *,
    classes: Positive,
    encoders: dict[str, EncoderSpec] = RESNETS,
    fusion: FusionSpec = "mla",
    dim: Positive | None = None,
) -> Classifier:
    """A class for each row, of encoders that learn in turn through one shared head; what the fusion `mla` says holds here.

    ``fusion="late"`` gives the modalities equal weights, ``fusion={"name": "mla", "remember": None}`` leaves the head's projection out.

    Args:
        classes: K.
        encoders: {modality: its encoder}, two at least. The default is the paper's for sound and pictures, a ResNet-18 each, drawn and not
            pretrained. Its encoders of text, images and sound are ``text_transformer:base``, ``image_transformer:base`` and
            ``audio_transformer:cav_mae``, all 768 wide.
        fusion: Plug-ins for the joints combine, schedule.
        dim: Width of the features; an encoder of another width gets a linear map to it. None: that of the encoders, which is then one.

    Raises:
        ZooError: If there is one modality, if widths differ without ``dim``, or a fusion does not fit.
    """
    return assemble("mla", JOINTS, encoders=encoders, classes=classes, fusion=fusion, dim=dim, shared_head=True)
