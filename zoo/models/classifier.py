"""Encoders of their own for each modality, a combination of features or of logits, one linear head: the frame of MLA and its peers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.config import EncoderSpec, FusionSpec, Positive
from zoo.errors import ZooError
from zoo.hub import Hosted
from zoo.joints import compose
from zoo.models._encode import classify
from zoo.registry import entry, make, register
from zoo.types import Batch, ModalityInputs, ModelOutput, Processor, Row, Rows

JOINTS = {"combine": "concat", "schedule": "joint"}
FUSED = "fused"


class RowProcessor:
    """One raw row to its modalities, each by its encoder's processor; small and picklable.

    Args:
        processors: {modality: processor}.
    """

    def __init__(self, processors: Mapping[str, Processor]) -> None:
        self.processors = dict(processors)

    def __call__(self, row: Row) -> dict[str, ModalityInputs]:
        """What the row has."""
        return {name: process(row[name]) for name, process in self.processors.items() if row.get(name) is not None}

    def config(self) -> dict[str, Any]:
        """What decides its result, for comparison when weights are loaded."""
        return {name: process.config() for name, process in self.processors.items()}

    def keys(self) -> tuple[str, ...]:
        """The keys of a row that this model looks at."""
        return tuple(self.processors)

    def sees(self, row: Row) -> bool:
        """Whether the row has anything that this model looks at."""
        return any(row.get(name) is not None for name in self.processors)


class Classifier(Hosted, nn.Module):
    """What `classifier` makes.

    Args:
        encoders: {modality: encoder}.
        widen: {modality: linear map to ``dim``}; of those alone whose width is another.
        combine: Features (B, D), or the logits (B, K) of each modality, to one.
        on_logits: Which of the two ``combine`` takes.
        heads: One linear map D to K, named ``shared``; or one for each modality.
        schedule: How one batch becomes updates.
        dim: D.
    """

    combine: Any
    schedule: Any

    def __init__(
        self,
        encoders: nn.ModuleDict,
        widen: nn.ModuleDict,
        combine: nn.Module,
        heads: nn.ModuleDict,
        schedule: nn.Module,
        *,
        on_logits: bool,
        dim: int,
    ) -> None:
        super().__init__()
        self.encoders, self.widen, self.combine, self.heads, self.schedule = encoders, widen, combine, heads, schedule
        self.on_logits, self.dim = on_logits, dim
        self.classes: int = next(cast("nn.Linear", head).out_features for head in heads.values())
        self.outputs = tuple(encoders)
        self.modality_modules = {name: (f"encoders.{name}", f"widen.{name}", f"heads.{name}") for name in encoders}
        self.processor = RowProcessor({name: cast("Any", encoder).processor for name, encoder in encoders.items()})
        self.trained, self._recomputes = False, False

    @property
    def head(self) -> nn.Linear:
        """The head that all modalities share."""
        return cast("nn.Linear", self.heads["shared"])

    def forward(self, batch: Batch) -> ModelOutput:
        """``logits`` has ``fused`` (B, K), and where logits are combined each modality's (B, K); ``embeddings``: their features."""
        rows = next(len(x.values) for x in batch.inputs.values())
        features, present = {}, {}
        for name in self.encoders:
            features[name], present[name] = self._features(name, batch.inputs.get(name), rows)  # (B, D), (B,)
        if self.on_logits:
            logits = {name: self.heads[name if name in self.heads else "shared"](x) for name, x in features.items()}  # (B, K)
            logits[FUSED] = self.combine(logits, present)
        else:
            logits = {FUSED: self.head(self.combine(features, present))}
        return ModelOutput(features, present=present, logits=logits)

    def _features(self, name: str, x: ModalityInputs | None, rows: int) -> tuple[Tensor, Tensor]:
        """(B, D) of one modality and who has it (B,); only rows that have it are encoded."""
        weight = self.head.weight if "shared" in self.heads else cast("nn.Linear", self.heads[name]).weight
        if x is None or (x.present is not None and not bool(x.present.any())):
            return weight.new_zeros(rows, self.dim), torch.zeros(rows, dtype=torch.bool, device=weight.device)
        there = x.present if x.present is not None else torch.ones(rows, dtype=torch.bool, device=weight.device)
        given = (
            x
            if bool(there.all())
            else ModalityInputs(x.values[there], None if x.mask is None else x.mask[there], None, {k: v[there] for k, v in x.extra.items()})
        )
        encoder = self.encoders[name]
        found = checkpoint(encoder, given, use_reentrant=False) if self._recomputes else encoder(given)
        if found.pooled is None:
            raise ZooError(f"classifier: the encoder of {name!r}, {type(encoder).__name__}, does not pool: name one that does")
        pooled = self.widen[name](found.pooled) if name in self.widen else found.pooled
        return pooled.new_zeros(rows, self.dim).index_put((there,), pooled), there

    def checkpoint_gradients(self) -> None:
        """Recompute the encoders' activations in the backward pass instead of keeping them."""
        self._recomputes = True

    def classify(self, rows: Rows, batch_size: int = 32, show_progress: bool | None = None) -> np.ndarray:
        """Probabilities of the classes of raw rows, in eval mode.

        Args:
            rows: Dictionaries with any subset of the modalities' keys, or a single one; a missing key is a missing modality.
            batch_size: Rows at a time.
            show_progress: None: a bar when there are many rows and somebody watches.

        Returns:
            (N, K) float32, or (K,) of a single row.

        Raises:
            ZooError: If these are no rows, or one is empty or cannot be read.
        """
        return classify(self, rows, batch_size=batch_size, show_progress=show_progress)

    def parts(self) -> Mapping[str, Any]:
        """The setting that names encoders, and what was made of it."""
        return {"encoders": dict(self.encoders.items())}


@register(
    "model",
    "classifier",
    joints=JOINTS,
    gives=("logits", "head", "classes"),
    paper="Zhang et al., Multimodal representation learning by alternating unimodal adaptation, 2024, https://arxiv.org/abs/2311.10707",
)
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
    if len(encoders) < 2:
        raise ZooError(f"classifier: encoders has {', '.join(encoders) or 'no modality'}: write two modalities or more")
    joints = compose(fusion, "classifier", JOINTS, ("logits", "head", "classes"))
    made = {name: make("encoder", spec) for name, spec in encoders.items()}
    if dim is None and len({encoder.dim for encoder in made.values()}) > 1:
        widths = ", ".join(f"{name} {encoder.dim}" for name, encoder in made.items())
        raise ZooError(f"classifier: the encoders have unequal widths ({widths}): write dim, to which each is mapped, or make them equal")
    width = dim or next(encoder.dim for encoder in made.values())
    assert joints.combine is not None, "the model has a default"
    on_logits = "logits" in entry("fusion", joints.combine[0]).needs
    if not shared_head and not on_logits:
        raise ZooError(f"classifier: shared_head: false goes with fusions of logits; {joints.combine[0]!r} combines features")
    assert joints.schedule is not None, "the model has a default"
    _check_schedule(joints.schedule[0], joints.combine[0], on_logits, shared_head)
    names = list(made)
    heads = nn.ModuleDict({name: nn.Linear(width, classes) for name in (["shared"] if shared_head else names)})
    widen = nn.ModuleDict({name: nn.Linear(encoder.dim, width) for name, encoder in made.items() if encoder.dim != width})
    combine = joints.make("combine", names, classes if on_logits else width)
    schedule = joints.make("schedule", names, width, classes)
    return Classifier(nn.ModuleDict(made), widen, combine, heads, schedule, on_logits=on_logits, dim=width)


def _check_schedule(schedule: str, combine: str, on_logits: bool, shared_head: bool) -> None:
    """What the model can give in general, it may lack under these settings.

    Raises:
        ZooError: If the schedule needs it.
    """
    needs = entry("fusion", schedule).needs
    if "logits" in needs and not on_logits:
        raise ZooError(
            f"classifier: the schedule {schedule!r} needs logits of each modality, and {combine!r} combines features: name a fusion of "
            "logits, such as late"
        )
    if "head" in needs and not shared_head:
        raise ZooError(f"classifier: the schedule {schedule!r} needs the head that all modalities share: leave out shared_head: false")
