"""What a model of pictures and texts may be able to do besides giving vectors: match, fill in words, write captions, be asked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from zoo.errors import ZooError
from zoo.types import ModalityInputs, ModelOutput, Tokens

if TYPE_CHECKING:
    from torch import Tensor


@runtime_checkable
class Matching(Protocol):
    """A model that tells whether a text is true of a picture by reading both at once."""

    adds_cosine: bool  # whether re-ranking scores by the logit of a match plus the cosine of the two vectors, or by the logit alone

    def hold(self, text: ModalityInputs, read: Tokens) -> Tokens:
        """What `match` starts from, which can be kept for many pictures; ``read`` is the model's own `read` of the same texts."""

    def match(self, held: Tokens, seen: Tokens) -> Tensor:
        """(B, 2) logits of texts held and pictures looked at, row by row: 0 they do not belong together, 1 they do."""


@runtime_checkable
class Unmasking(Protocol):
    """A model that fills in words that are masked, given the picture."""

    def unmask(self, text: ModalityInputs, seen: Tokens, chosen: Tensor | None = None) -> Tensor:
        """(B, N, V) logits of the word at each place; or (n, V), at the n places of ``chosen`` (B, N) bool alone, row by row."""


@runtime_checkable
class Captioning(Protocol):
    """A model that writes what a picture shows."""

    prompt: Sequence[int]  # the ids that each caption begins with
    room: int  # how many ids, those included, the next word can be asked of

    def caption(self, text: ModalityInputs, out: ModelOutput) -> tuple[Tensor, Tensor]:
        """Logits (B, T, V) of the words of each text, given those before them and the picture, and which they are (B, T), -100 for none.

        ``out`` is what the model gives for the same rows.
        """

    def next_words(self, ids: Tensor, seen: Tokens, cache: Any) -> tuple[Tensor, Any]:
        """Logits (B, V) of the word after ``ids`` (B, T), which go on from what ``cache`` holds, None at first; and the new cache.

        A cache has ``rows(index)``, the same for the rows (B',) of it.
        """


@runtime_checkable
class Asking(Protocol):
    """A model that reads a question beside a picture; what it makes of them is what an answer is told from, or written from."""

    def ask(self, question: ModalityInputs, seen: Tokens) -> Tokens:
        """The states of a question (B, N, D) that were read beside what `see` gave; ``pooled`` (B, D) is what answers are told from."""


@runtime_checkable
class Answering(Asking, Protocol):
    """A model that writes answers to questions about pictures."""

    @property
    def answering(self) -> Captioning:
        """What writes them: its `next_words` and `caption` go on from what `ask` gives as from a picture."""


@runtime_checkable
class Filling(Protocol):
    """A model that fills in what is masked of a text, of a picture, or of both beside each other."""

    grid: tuple[int, int]  # rows and columns of the patches of a picture
    codes: int  # visual tokens that a patch is told from; 0: it fills in words alone

    def fill(
        self, image: ModalityInputs | None, hidden: Tensor | None, text: ModalityInputs | None, chosen: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits of words (n, V) at ``chosen`` (B, N) bool, and of visual tokens (m, codes) at ``hidden`` (B, rows * columns) bool.

        Both in the order of their places, row by row; None of what is not given. Each row has each modality that is given. The model hides
        the patches; the words of ``text`` are hidden already.
        """


@runtime_checkable
class Tokenizing(Protocol):
    """A model that tells each patch of a picture by one of a closed list of visual tokens."""

    grid: tuple[int, int]  # rows and columns of the patches of a picture
    codes: int  # how many visual tokens there are
    processor: Any  # raw row to its inputs
    trained: bool

    def ids(self, image: ModalityInputs) -> Tensor:
        """(B, rows * columns) int64, row by row of the picture."""

    def trim(self) -> None:
        """Leave out for good what `ids` does not need."""


class Distilled(NamedTuple):
    """Pictures told by codes, and the features of a teacher told from the codes."""

    points: Tensor  # (B, P, C) of length 1, what a code was looked up for
    ids: Tensor  # (B, P) int64, the nearest code of each
    codes: Tensor  # (B, P, C), these codes
    told: Tensor  # (B, P, T), features told from the codes; their gradient reaches the points
    taught: Tensor  # (B, P, T), the teacher's, without a graph


@runtime_checkable
class Distilling(Protocol):
    """A model that learns visual tokens from the features of a frozen tower."""

    codes: int
    codebook: Any  # ``follow(points (N, C), ids (N,), decay)`` moves it after a step

    def distil(self, image: ModalityInputs) -> Distilled:
        """Pictures and what is told of them. Each row has one."""


@runtime_checkable
class Comparing(Protocol):
    """A model that reads a sentence beside each of two pictures."""

    compared_dim: int  # W

    def compare(self, question: ModalityInputs, seen: Sequence[Tokens]) -> Tensor:
        """(B, W) of what it makes of a sentence beside the pictures of ``see(image, 0)`` and ``see(image, 1)``."""


@runtime_checkable
class Converted(Protocol):
    """A model whose weights may be from a file of another program."""

    drawn: Sequence[str]  # names of weights for which the file had nothing


def check_learned(model: Any, what: str, parts: str) -> None:
    """Whether all that a model does something with was learned, where its weights are from a file of another program.

    Args:
        model: Any.
        what: It does, for the message.
        parts: A regular expression that the names of the weights begin with.

    Raises:
        ZooError: If the file had nothing for some of them.
    """
    if isinstance(model, Converted) and (drawn := [name for name in model.drawn if re.match(parts, name)]):
        more = f" and {len(drawn) - 3} more" if len(drawn) > 3 else ""
        raise ZooError(
            f"{what} of this model would mean nothing: the file that it was converted from had nothing for {', '.join(drawn[:3])}{more}, "
            "which are as in a model that was never trained: convert a file that has them, or train the model"
        )
