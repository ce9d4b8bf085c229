"""A class for each row, of any subset of its modalities: the frame of MLA's peers and baselines."""

from __future__ import annotations

from zoo.config import EncoderSpec, FusionSpec, Positive
from zoo.models._classes import GIVES, Classifier, assemble
from zoo.registry import register

JOINTS = {"combine": "concat", "schedule": "joint"}


@register("model", "classifier", joints=JOINTS, gives=GIVES)
def classifier(
    *,
    encoders: dict[str, EncoderSpec],
    classes: Positive,
    fusion: FusionSpec = "concat",
    dim: Positive | None = None,
    shared_head: bool = True,
) -> Classifier:
    """A class for each row, of any subset of its modalities.

    Plug-ins that combine features (``concat``, ``sum``, ...) stand before the head; those that combine logits (``late``, ``uncertainty``,
    ...) read what the head says of each modality.

    Args:
        encoders: {modality: its encoder}, the key of a row being the modality; two at least.
        classes: K.
        fusion: Plug-ins for the joints combine, schedule.
        dim: Width of the features; an encoder of another width gets a linear map to it. None: that of the encoders, which is then one.
        shared_head: Off, where logits are combined: a head for each modality.

    Raises:
        ZooError: If there is one modality, if widths differ without ``dim``, or a fusion does not fit.
    """
    return assemble("classifier", JOINTS, encoders=encoders, classes=classes, fusion=fusion, dim=dim, shared_head=shared_head)
