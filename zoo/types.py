"""The nouns of the zoo: what flows from the data to the loss.

Shapes: B rows of a batch, N tokens of one modality, D the width of a feature, K classes.
All are NamedTuples: the data loader, DDP and torch.compile see through them, and Accelerate's ``send_to_device`` moves
them, whereas it silently leaves a dataclass behind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Row = Mapping[str, Any]  # one raw item: {"id": 7, "title": str, "image": PIL image, bytes or path}; a missing key is a missing modality
Rows = Sequence[Row | str] | Row | str  # what a model encodes: a string is a title


class Pair(NamedTuple):
    """What a pair data set yields: two raw rows that belong together."""

    query: Row
    target: Row


class ModalityInputs(NamedTuple):
    """One modality of a batch, as its encoder wants it. A processor gives the same without the B dimension."""

    values: Tensor  # (B, N) int64 ids; (B, 3, H, W) or, several images a row, (B, M, 3, H, W) pixels; (B, F, T) log-mel; (B, N, D) features
    mask: Tensor | None = None  # (B, N) bool, for several images (B, M); True where real; None: all real
    present: Tensor | None = None  # (B,) bool; None: every row has this modality
    extra: Mapping[str, Tensor] = {}  # what this kind of input needs besides, such as the anchors of a prompt

    def rows(self, which: Tensor | slice) -> ModalityInputs:
        """Those rows of a batch: (B,) bool, numbers, or a slice."""
        mask, present = (None if x is None else x[which] for x in (self.mask, self.present))
        return ModalityInputs(self.values[which], mask, present, {name: x[which] for name, x in self.extra.items()})


class Batch(NamedTuple):
    """What a data loader yields. A batch of pairs is laid out q1..qB, d1..dB.

    Where several processes train together, the second row of a pair in ``known`` may be another's: rows count on from this one's, B being
    the first of the next process and -1 the last of the one before. Each process names the pairs of its own rows.
    """

    inputs: Mapping[str, ModalityInputs]
    targets: Tensor | None = None  # (B,) int64 classes or (B, K) float
    ids: Tensor | None = None  # (B,) int64 item ids; rows of equal id are never negatives of each other
    positive: Tensor | None = None  # (B,) int64 row index of the row's one positive, -1 for none
    groups: Tensor | None = None  # (B,) int64, for multi-positive losses only
    known: Tensor | None = None  # (E, 2) int64 further row pairs that are never negatives of each other


class Tokens(NamedTuple):
    """What an encoder or a connector gives."""

    tokens: Tensor  # (B, N, D)
    mask: Tensor  # (B, N) bool
    pooled: Tensor | None  # (B, D)
    present: Tensor  # (B,) bool


class ModelOutput(NamedTuple):
    """What a model gives; which names it fills stands in its ``outputs``."""

    embeddings: Mapping[str, Tensor]  # {name: (B, D) or (B, Q, D)}, not normalised
    present: Mapping[str, Tensor] = {}  # {name: (B,) bool}
    logits: Mapping[str, Tensor] = {}  # {name: (..., K)}
    labels: Mapping[str, Tensor] = {}  # {name: (...)}
    tokens: Mapping[str, Tokens] = {}
    aux: Mapping[str, Tensor] = {}  # for diagnosis, positions (B,) in the sequence, -1 where absent: read, image_first, image_last


class Loss(NamedTuple):
    """What an objective gives."""

    total: Tensor  # () float32, the one to differentiate
    parts: Mapping[str, Tensor]  # () scalars, detached, for the log
    state: Any = None  # what the objective keeps for its ``after_step``, such as keys to enqueue
    output: ModelOutput | None = None  # of this batch, detached, for schedules that look at features or logits


@runtime_checkable
class Binding(Protocol):
    """An objective that looks at the model once, before training: to check its outputs, or to build a frozen twin."""

    def bind(self, model: Any) -> None:
        """Called before the first step.

        Raises:
            ZooError: If the model does not give what the objective uses.
        """


@runtime_checkable
class Stepping(Protocol):
    """An objective with a state that moves once per optimizer step: queues, momentum twins."""

    def before_step(self, model: Any) -> None:
        """Called with the clipped gradients in place."""

    def after_step(self, model: Any, state: Any) -> None:
        """Called after the optimizer's step with the ``Loss.state`` of the last batch."""


@runtime_checkable
class Attentive(Protocol):
    """A backbone that can show its attention, for diagnosis."""

    def watch_attention(self) -> AbstractContextManager[list[Tensor]]:
        """Inside, a forward pass appends the attention of each layer, first to last: (B, heads, S, S) after the softmax, in the graph."""


@runtime_checkable
class Seeing(Protocol):
    """A model that looks at images through one encoder and nothing else, so that a frozen one's outputs can be kept."""

    vision: Any  # Encoder | None


@runtime_checkable
class Sparing(Protocol):
    """Rows that can leave a modality unread, because another part of the program has what is needed of it."""

    def without(self, modality: str) -> Sequence[Row]:
        """The same rows, without the key ``image``, or without those of ``text``."""


@runtime_checkable
class Divided(Protocol):
    """A model of which some modules serve one modality alone, for diagnosis."""

    modality_modules: Mapping[str, Sequence[str]]  # {"image": ("vision", "connector")}: children of the model; those not named are shared


@runtime_checkable
class Predicting(Protocol):
    """A model that predicts words, for objectives of language modelling."""

    def predict(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (W, V) of the words of a batch, each given what stands before it, and which words they are (W,) int64."""


@runtime_checkable
class Classifying(Protocol):
    """A model that tells classes."""

    classes: int  # how many

    def classify(self, rows: Rows, batch_size: int = 32, show_progress: bool | None = None) -> np.ndarray:
        """(N, K) float32 probabilities of raw rows, (K,) of a single one."""


@runtime_checkable
class Asked(Protocol):
    """A model that may be asked about its rows while it trains; ``logits`` and ``labels`` then have ``answer``, where a row has one."""

    asks: str | None  # what; None: nothing


class Processor(Protocol):
    """Raw thing to tensors, for one row; small and picklable, because it runs in the data loader's workers."""

    def __call__(self, thing: Any) -> ModalityInputs:
        """One raw thing (a string, a PIL image) as tensors without the B dimension."""

    def config(self) -> dict[str, Any]:
        """All that decides its result, as plain values: it is written beside the weights and compared when they are loaded."""


class Remote(NamedTuple):
    """What a part reads from the Hugging Face hub, or from a folder of the hub's layout, when it is made."""

    role: str  # weights, config, tokenizer or processor
    repo: str  # "org/name", or a folder
    files: tuple[str, ...]  # shell patterns, the preferred one first: files that match any one of them are enough


class Encoder(Protocol):
    """One modality to tokens."""

    dim: int  # width of the tokens and of pooled
    processor: Processor

    def __call__(self, x: ModalityInputs) -> Tokens:
        """Encode every row; the caller leaves out absent ones."""

    def portable(self) -> dict[str, Any]:
        """The settings that rebuild it without a network, for weights that come from elsewhere; ``{}`` if it fetches nothing."""


class Connector(Protocol):
    """Tokens of one width to tokens of another, perhaps fewer."""

    def __call__(self, x: Tokens) -> Tokens:
        """(B, N, dim_in) to (B, L, dim_out)."""


class Tokenizer(Protocol):
    """Text to ids, with the special tokens that prompts need under fixed role names."""

    vocab_size: int
    roles: Mapping[str, int | None]  # pad, bos, image_start, image_end, compressed; None: this tokenizer has none

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` alone: no special tokens added, and none recognised inside it."""

    def config(self) -> dict[str, Any]:
        """Plain values that tell two tokenizers apart."""


class Backbone(Protocol):
    """A language model, read at its last hidden state."""

    dim: int
    tokenizer: Tokenizer
    trained: bool  # False: random weights that nothing was loaded into

    def embed(self, ids: Tensor) -> Tensor:
        """(B, N) ids to (B, N, D)."""

    def __call__(self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        """(B, S, D) to the hidden state after the final norm (B, S, D)."""

    def predict(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) to the logits (..., V) of the next id."""

    def checkpoint_gradients(self) -> None:
        """Compute activations again in the backward pass instead of keeping them."""

    def portable(self) -> dict[str, Any]:
        """As `Encoder.portable`; the tokenizer is part of it."""


class Model(Protocol):
    """What is trained, saved and asked for vectors: an ``nn.Module`` that says which embeddings it gives."""

    outputs: tuple[str, ...]  # names of the embeddings, the main one first
    dim: int  # width of each of them
    processor: (
        Any  # raw row to its inputs; ``config()`` as of `Processor`, ``keys()`` of a row that it reads, ``sees(row)`` whether one is there
    )
    schedule: Any  # how one batch becomes updates, as `zoo.joints.Schedule` says
    spec: Mapping[str, Any]  # name and settings that `zoo.build` was given; it sets them
    trained: bool  # False: weights that nothing was trained or loaded into; `encode` warns then

    def __call__(self, batch: Batch) -> ModelOutput:
        """A batch to embeddings, or whatever else this model fills in."""

    def encode(
        self,
        rows: Rows,
        batch_size: int = 32,
        show_progress: bool | None = None,
        *,
        output: str | None = None,
        normalize: bool = True,
    ) -> np.ndarray:
        """(N, dim) float32 vectors of raw rows, from the embedding ``output``, by default the main one; (dim,) of a single row."""

    def similarity(self, a: Any, b: Any) -> np.ndarray:
        """Cosine of each of (N, dim) vectors with each of (M, dim): (N, M)."""

    def similarity_pairwise(self, a: Any, b: Any) -> np.ndarray:
        """Cosine of each of (N, dim) vectors with the one at the same place: (N,)."""

    def parts(self) -> Mapping[str, Any]:
        """The settings that name encoders or backbones, and what was made for each; {key: part} where the setting is a mapping of parts."""

    def checkpoint_gradients(self) -> None:
        """Compute activations again in the backward pass instead of keeping them."""


@runtime_checkable
class PairData(Protocol):
    """A data set of items and of pairs of items that belong together. Made with ``(root,)``, the folder of data folders."""

    notes: Sequence[Row]  # every item; notes[i]["id"] == i, so that a row id is an index; rows are decoded on access
    note_ids: Sequence[Any]  # the items' own names, for files and reports
    broken: Sequence[Any]  # note_ids of items whose image could not be decoded
    statistics: Mapping[str, Any]  # of notes, clicks and mining, for the log and the report
    fingerprint: str  # changes when the data does; a checkpoint is refused on other data

    def pairs(self, split: str) -> np.ndarray:
        """(P, 2) int64 query and target indices of split ``train``, ``val``, ``test`` or a further one of this set."""

    def pool(self, split: str) -> np.ndarray:
        """(C,) int64 indices of the candidates that retrieval on ``split`` searches."""

    def lengths(self) -> np.ndarray:
        """(N,) int64 characters of title and content, for length buckets and short-text subsets."""

    def short(self) -> np.ndarray:
        """(N,) bool, items with little text; the threshold is fixed on the training items."""

    def texts(self) -> list[str]:
        """(N,) all text of each item, for lexical baselines."""

    def clicks(self) -> np.ndarray:
        """(N,) float64 clicks per item in the training window, for the popularity baseline."""


@runtime_checkable
class LabelledData(Protocol):
    """A data set of rows of known class. Made with ``(root,)``, the folder of data folders."""

    rows: Sequence[Row]  # rows[i]["id"] == i; a modality's key holds its raw thing, and an absent modality has no key; decoded on access
    row_ids: Sequence[Any]  # their own names, for files and reports
    modalities: tuple[str, ...]  # the keys, in the order of tables: ("audio", "image")
    classes: tuple[str, ...]  # names
    labels: np.ndarray  # (N,) int64 places in ``classes``
    broken: Sequence[Any]  # row_ids of which something could not be decoded
    statistics: Mapping[str, Any]  # for the log and the report
    fingerprint: str  # changes when the data does; a checkpoint is refused on other data

    def split(self, name: str) -> np.ndarray:
        """(n,) int64 rows of split ``train``, ``val``, ``test`` or a further one of this set."""

    def lengths(self) -> np.ndarray:
        """(N,) int64, what makes a row long, for length buckets."""


@runtime_checkable
class CaptionedData(Protocol):
    """A data set of pictures and of texts that say what they show. Made with ``(root,)``, the folder of data folders."""

    pictures: Sequence[Row]  # pictures[i] is {"id": i, "image": ...}; decoded on access
    picture_ids: Sequence[Any]  # their own names, for files and reports
    captions: Sequence[str]  # every text once, though several pictures may have it
    subject: np.ndarray  # (P,) int64; pictures of one number are linked by captions, so that one's caption may be true of the other
    broken: Sequence[Any]  # picture_ids of which the image could not be decoded
    statistics: Mapping[str, Any]  # for the log and the report
    fingerprint: str  # changes when the data does; a checkpoint is refused on other data

    def pairs(self, split: str) -> np.ndarray:
        """(n, 2) int64 picture and caption indices of split ``train``, ``val``, ``test`` or a further one of this set."""

    def groups(self, split: str) -> Mapping[str, np.ndarray]:
        """{name: (n,) bool} over ``pairs(split)``, the kinds of pictures that reports tell apart; {} for none."""

    def lengths(self) -> np.ndarray:
        """(C,) int64 characters of each caption, for length buckets."""


Data = PairData | LabelledData | CaptionedData  # what a recipe may train on
