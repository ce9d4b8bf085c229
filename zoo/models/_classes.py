"""Encoders of their own for each modality, a combination of features or of logits, linear heads: the module of `classifier` and `mla`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.config import EncoderSpec, FusionSpec
from zoo.errors import ZooError
from zoo.hub import Hosted
from zoo.joints import compose
from zoo.models._encode import classify
from zoo.registry import entry, make
from zoo.types import Batch, ModalityInputs, ModelOutput, Processor, Row, Rows

GIVES = ("logits", "head", "classes")
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
    """What `classifier` and `mla` make.

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
        nobody = 0 if batch.targets is None else len(batch.targets)  # rows that show nothing leave no inputs
        rows = next((len(x.values) for x in batch.inputs.values()), nobody)
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
        given = x if bool(there.all()) else x.rows(there)._replace(present=None)
        encoder = self.encoders[name]
        found = checkpoint(encoder, given, use_reentrant=False) if self._recomputes else encoder(given)
        if found.pooled is None:
            raise ZooError(f"classifier: the encoder of {name!r}, {type(encoder).__name__}, does not pool: name one that does")
        pooled = self.widen[name](found.pooled) if name in self.widen else found.pooled
        return pooled.new_zeros(rows, self.dim).index_put((there,), pooled), there

    def checkpoint_gradients(self) -> None:
        """Recompute the encoders' activations in the backward pass instead of keeping them; batch norms then count a batch twice."""
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


def assemble(
    name: str,
    defaults: Mapping[str, str],
    *,
    encoders: Mapping[str, EncoderSpec],
    classes: int,
    fusion: FusionSpec,
    dim: int | None,
    shared_head: bool,
) -> Classifier:
    """The model of that name, whose joints are filled by ``defaults`` where ``fusion`` leaves them open; the rest as of `classifier`.

    Raises:
        ZooError: If there is one modality, if widths differ without ``dim``, or a fusion does not fit.
    """
    if len(encoders) < 2:
        raise ZooError(f"{name}: encoders has {', '.join(encoders) or 'no modality'}: write two modalities or more")
    joints = compose(fusion, name, defaults, GIVES)
    made = {modality: make("encoder", spec) for modality, spec in encoders.items()}
    if dim is None and len({encoder.dim for encoder in made.values()}) > 1:
        widths = ", ".join(f"{modality} {encoder.dim}" for modality, encoder in made.items())
        raise ZooError(f"{name}: the encoders have unequal widths ({widths}): write dim, to which each is mapped, or make them equal")
    width = dim or next(encoder.dim for encoder in made.values())
    assert joints.combine is not None, "the model has a default"
    assert joints.schedule is not None, "the model has a default"
    on_logits = "logits" in entry("fusion", joints.combine[0]).needs
    if not shared_head and not on_logits:
        raise ZooError(f"{name}: shared_head: false goes with fusions of logits; {joints.combine[0]!r} combines features")
    if not shared_head and "head" in entry("fusion", joints.schedule[0]).needs:
        schedule = joints.schedule[0]
        raise ZooError(f"{name}: the schedule {schedule!r} needs the head that all modalities share: leave out shared_head: false")
    names = list(made)
    heads = nn.ModuleDict({head: nn.Linear(width, classes) for head in (["shared"] if shared_head else names)})
    widen = nn.ModuleDict({modality: nn.Linear(encoder.dim, width) for modality, encoder in made.items() if encoder.dim != width})
    combine = joints.make("combine", names, classes if on_logits else width)
    updates = joints.make("schedule", names, width, classes)
    return Classifier(nn.ModuleDict(made), widen, combine, heads, updates, on_logits=on_logits, dim=width)
