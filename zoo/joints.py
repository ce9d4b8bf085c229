"""The four joints at which a fusion acts, and the one place where plug-ins and models are matched.

arrange   how the modalities of a row are laid into one sequence, and where embeddings are read
trunk     how a block treats tokens of different modality
combine   how vectors or logits of the modalities become one
schedule  how one batch becomes updates
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from zoo.config import split_spec
from zoo.errors import ZooError
from zoo.registry import JOINTS, entry, make, names

if TYPE_CHECKING:
    from torch import Tensor

    from zoo.types import Batch, Loss, ModelOutput


class Words(NamedTuple):
    """The fixed strings of a prompt in one language."""

    note: str  # opens a note
    compress: str  # asks for the one word; ends where the embedding is read
    close: str  # closes the compressed word
    comma: str  # between topics
    stop: str  # stands for a line break
    keys: Mapping[str, str]  # the key of each field and medium: {"title": "标题", "image": "图片"}


class Parts(NamedTuple):
    """One row, as an arrange plug-in sees it. What is absent stands in neither mapping."""

    fields: Mapping[str, str]  # text fields, cleaned, in the order of the prompt; empty ones of a present text included
    media: Sequence[str]  # the media that the row has, in order: ("image",)
    words: Words


class Segment(NamedTuple):
    """A stretch of the sequence: a piece of text, the tokens of a medium, or a special token."""

    text: str = ""
    media: str | None = None  # the tokens of this medium stand here
    role: str | None = None  # a special token of the tokenizer stands here
    anchor: str | None = None  # the embedding of this name is read at the last token of this segment
    keep: bool = False  # truncation never shortens it


class Arrange(Protocol):
    """Joint ``arrange``: pure text, run in the data loader's workers."""

    anchors: tuple[str, ...]  # the main one first
    media: bool  # whether tokens of media enter the sequence

    def __call__(self, parts: Parts) -> list[Segment]:
        """The sequence of one row."""


class Trunk(Protocol):
    """Joint ``trunk``: made with ``(layers, first)``, how many blocks there are, and from which on the model's paper fuses modalities."""

    banks: tuple[str, ...]  # the sub-layers that exist once per expert, of `zoo.block.BANKED`, and "norm", the one behind all blocks

    def __call__(self, kind: str, layer: int, fused: bool = False) -> str:
        """Which expert serves tokens of modality ``kind`` in block ``layer``, counted from 0; ``layers`` is the norm behind all blocks.

        ``fused``: the tokens of another modality are in the same sequence, or are read by cross-attention.
        """

    def reads(self, layer: int) -> bool:
        """Whether block ``layer`` reads the tokens of another modality by cross-attention."""


def banks_of(trunk: Trunk, serves: Callable[[int], Iterable[tuple[str, bool]]]) -> Callable[[int], dict[str, tuple[str, ...]]]:
    """{sub-layer: its experts} of each block, which ``serves`` these kinds of tokens, each with whether they are fused there."""

    def banks(layer: int) -> dict[str, tuple[str, ...]]:
        return dict.fromkeys(trunk.banks, tuple(dict.fromkeys(trunk(kind, layer, fused) for kind, fused in serves(layer))))

    return banks


class Combine(Protocol):
    """Joint ``combine``: made with ``(names, dim)``."""

    def __call__(self, x: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """Vectors {name: (B, D)} and who is there {name: (B,) bool} to (B, D). Absent vectors weigh nothing."""


@runtime_checkable
class Sharing(Protocol):
    """A combine plug-in that can say what its result is made of, for diagnosis."""

    def shares(self, x: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{name: (B, D)} in 0..1: the weight of each vector in each feature of the result; 0 where absent, else they sum to 1."""


@runtime_checkable
class Calibrating(Protocol):
    """A combine plug-in of logits that fits something on validation rows, after training."""

    def calibrate(self, logits: Mapping[str, Tensor], present: Mapping[str, Tensor], targets: Tensor) -> dict[str, float]:
        """Fit it, and say {modality: temperature} of those that any row has.

        Args:
            logits: {modality: (N, K)} as the model gives them; finite where present.
            present: {modality: (N,) bool}.
            targets: (N,) int64 classes.
        """


class Phase(NamedTuple):
    """One update that a schedule makes of a batch."""

    name: str
    batch: Batch
    modalities: tuple[str, ...] | None = None  # only these take part; None: all


class Schedule(Protocol):
    """Joint ``schedule``: an ``nn.Module``, its state are buffers. Made with ``(names, dim, classes)``: the modalities, the width of their
    features, and how many classes there are, 0 where nothing is classified.

    For each phase the loop runs forward, backward, unscale, clip, optimizer step, zero_grad; a schedule may be some of the four below, too.
    """

    multi_phase: bool  # more than one phase a batch: gradient accumulation is refused

    def phases(self, batch: Batch) -> Iterator[Phase]:
        """The updates of one batch, in order."""


@runtime_checkable
class Supplementing(Protocol):
    """A schedule with losses of its own. Objectives of classes ask for them."""

    def terms(self, output: ModelOutput, targets: Tensor) -> dict[str, Tensor]:
        """() float32 each, to be added to the loss of a batch, by name; in the graph of what the model gave for it."""


@runtime_checkable
class Merging(Protocol):
    """A schedule whose phases are one update: forward and backward for each, then this, and the rest once, under the last phase."""

    def merge(self, gradients: Mapping[str, Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """The gradient to step with, by parameter name, from {phase: {parameter: gradient}}."""


@runtime_checkable
class Modulating(Protocol):
    """A schedule that changes gradients."""

    def before_step(self, model: Any, phase: Phase, loss: Loss) -> None:
        """Called with the clipped gradients in place, and the loss that they are of."""


@runtime_checkable
class Correcting(Protocol):
    """A schedule that changes steps."""

    def watched(self, model: Any) -> Mapping[str, Tensor]:
        """The parameters that `after_step` wants to have seen before the step, by name; {} for none."""

    def after_step(self, model: Any, phase: Phase, previous: Mapping[str, Tensor], loss: Loss) -> None:
        """Called after the optimizer moved the parameters away from ``previous``, and not where fp16 scaling skipped the step."""


_NEEDS = {
    "logits": "logits of each modality",
    "head": "one linear head that all modalities share",
    "classes": "rows of known class",
    "memory": "blocks that read a picture by cross-attention",
    "sequence": "text and picture in one sequence",
}
Filling = tuple[str, dict[str, Any]]  # plug-in name, its keywords


class Composed(NamedTuple):
    """What fills each joint, None where nothing does."""

    arrange: Filling | None = None
    trunk: Filling | None = None
    combine: Filling | None = None
    schedule: Filling | None = None

    def make(self, joint: str, *positional: Any) -> Any:
        """Make the plug-in of ``joint``, or None where nothing fills it."""
        chosen = getattr(self, joint)
        return None if chosen is None else make("fusion", {"name": chosen[0], **chosen[1]}, *positional)


def compose(fusion: Any, model: str, offers: Mapping[str, str | None], gives: Collection[str] = ()) -> Composed:
    """Match the plug-ins that a user named with the joints that a model has.

    A plug-in that fills two joints is unfolded first; a plug-in named for a joint wins over one that came along; the order
    in the list means nothing; a joint that nobody fills takes the model's default.

    Args:
        fusion: A name, a mapping with ``name`` and keywords, or a list of them; [] or None for the model's defaults.
        model: The model's name, for the message.
        offers: The model's joints, each with its default plug-in or None.
        gives: What else the model has, of what plug-ins may need: ``logits`` of each modality, a shared ``head``, ``classes``, blocks
            that read a ``memory``, text and picture in one ``sequence``.

    Raises:
        ZooError: If a plug-in fills a joint or needs a thing that the model does not have, two named or two brought along fill the same,
            or the schedule needs logits of each modality where features are combined.
    """
    specs = [] if fusion is None else list(fusion) if isinstance(fusion, list | tuple) else [fusion]
    filled: dict[bool, dict[str, list[Filling]]] = {True: {}, False: {}}  # named by the user, or brought along by another
    faults = []
    for spec in specs:
        name, keywords = split_spec(spec)
        if lacking := [thing for thing in entry("fusion", name).needs if thing not in gives]:
            faults.append(_lacks(name, lacking, model, offers, gives))
        for joint, brings in entry("fusion", name).joints.items():
            if joint not in offers:
                faults.append(_no_joint(name, joint, model, offers, gives))
            filling = (name, keywords) if brings is None else (brings, {})
            filled[brings is None].setdefault(joint, []).append(filling)
    named, implied = filled[True], filled[False]
    for joint, fillings in {**implied, **named}.items():
        if len(fillings) > 1 and (joint in named or any(f != fillings[0] for f in fillings)):
            both = " and ".join(repr(name) for name, _ in fillings)
            faults.append(f"fusions {both} both fill the joint {joint!r}: name one of them")
    if faults:
        raise ZooError("\n".join(faults))
    defaults: dict[str, list[Filling]] = {joint: [(default, {})] for joint, default in offers.items() if default is not None}
    composed = Composed(**{joint: fillings[0] for joint, fillings in {**defaults, **implied, **named}.items()})
    if composed.schedule and composed.combine and _reads_logits(composed.schedule) and not _reads_logits(composed.combine):
        raise ZooError(
            f"{model}: the schedule {composed.schedule[0]!r} needs logits of each modality, and {composed.combine[0]!r} combines features:"
            " name a fusion of logits, such as late"
        )
    return composed


def _reads_logits(filling: Filling) -> bool:
    return "logits" in entry("fusion", filling[0]).needs


def _lacks(name: str, lacking: Sequence[str], model: str, offers: Mapping[str, str | None], gives: Collection[str]) -> str:
    return (
        f"fusion {name!r} needs of a model: {', '.join(_NEEDS[thing] for thing in lacking)}, which {model!r} does not have;"
        f" fusions that fit it: {', '.join(_fit(offers, gives)) or 'none'}"
    )


def _fit(offers: Mapping[str, str | None], gives: Collection[str]) -> list[str]:
    entries = [entry("fusion", name) for name in names("fusion")]
    return [e.name for e in entries if set(e.joints) <= set(offers) and set(e.needs) <= set(gives)]


def _no_joint(name: str, joint: str, model: str, offers: Mapping[str, str | None], gives: Collection[str]) -> str:
    return (
        f"fusion {name!r} acts at the joint {joint!r}, which model {model!r} does not have"
        f" (it has: {', '.join(j for j in JOINTS if j in offers) or 'none'});"
        f" fusions that fit it: {', '.join(_fit(offers, gives)) or 'none'}"
    )
