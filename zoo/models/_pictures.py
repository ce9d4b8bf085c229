"""What models of pictures and captions share: a raw row to both inputs, towers that never see what is absent, and ``encode``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.abilities import check_learned
from zoo.errors import ZooError
from zoo.hub import Hosted
from zoo.models._encode import encode, similarity, similarity_pairwise
from zoo.trunk import Trunk
from zoo.types import ModalityInputs, Processor, Row, Rows, Tokens
from zoo.vocabulary import Vocabulary


class CaptionProcessor:
    """One caption to ids: what opens a text, its pieces, what ends it; longer ones are cut and still end.

    Args:
        vocabulary: Its words.
        length: Ids of the longest, the ones at both ends included.
        ends: Whether the last id says that the text ends; ALBEF's released weights were trained without.
    """

    def __init__(self, vocabulary: Vocabulary, length: int, *, ends: bool = True) -> None:
        self.vocabulary, self.length = vocabulary, length
        self._start = vocabulary.role("start", "a caption")
        self._end = [vocabulary.role("end", "a caption")] if ends else []
        if length < 2 + len(self._end):
            raise ZooError(f"length: {length} ids hold no word of a caption: write {2 + len(self._end)} or more")

    def __call__(self, thing: Any) -> ModalityInputs:
        """One text.

        Raises:
            ZooError: If it is none, or holds halves of characters.
        """
        if not isinstance(thing, str):
            raise ZooError(f"text: a {type(thing).__name__} is no text: write a string")
        try:
            thing.encode()
        except UnicodeEncodeError as e:  # which JSON lets in, and no tokenizer takes
            raise ZooError(f"text: at place {e.start} of {thing[:40]!a} stands half of a character: leave it out") from e
        pieces = self.vocabulary.encode(thing)[: self.length - 1 - len(self._end)]
        ids = torch.tensor([self._start, *pieces, *self._end])
        return ModalityInputs(ids, torch.ones(len(ids), dtype=torch.bool))

    def config(self) -> dict[str, Any]:
        """What decides its result."""
        return {"vocabulary": self.vocabulary.config(), "length": self.length, "ends": bool(self._end)}


class PictureTextProcessor:
    """One raw row to ``image`` and ``text``, as far as they are there; small and picklable.

    Args:
        image: The picture encoder's.
        text: Of captions.
    """

    def __init__(self, image: Processor, text: Processor) -> None:
        self.image, self.text = image, text

    def __call__(self, row: Row) -> dict[str, ModalityInputs]:
        """What the row has."""
        made = {}
        if row.get("image") is not None:
            made["image"] = self.image(row["image"])
        if row.get("text"):
            made["text"] = self.text(row["text"])
        return made

    def config(self) -> dict[str, Any]:
        """What decides its result, for comparison when weights are loaded."""
        return {"image": self.image.config(), "text": self.text.config()}

    def keys(self) -> tuple[str, ...]:
        """The keys of a row that this model looks at."""
        return ("image", "text")

    def sees(self, row: Row) -> bool:
        """Whether the row has anything that this model looks at."""
        return row.get("image") is not None or bool(row.get("text"))


@runtime_checkable
class ByBlock(Protocol):
    """A tower that may recompute one block at a time."""

    @property
    def by_block(self) -> bool:
        """Whether it can."""

    def checkpoint_gradients(self) -> None:
        """Do so from now on, if it can."""


class PictureTextModel(Hosted, nn.Module):
    """What a model of pictures and captions can do besides ``forward``.

    Args:
        vision: Encodes one picture.
        vocabulary: Of its texts.
        schedule: How one batch becomes updates.
        processor: Raw row to inputs.
        dim: Width of the embeddings.
    """

    vision: Any  # a part whose own attributes are used; nn.Module would type every one of them as a Tensor
    outputs: tuple[str, ...] = ("image", "text")
    drawn: Sequence[str] = ()  # names of weights for which the file that it was converted from had nothing
    asks_with: tuple[str, ...] = ("vision", "embed", "trunk")  # its modules that read a text beside a picture, which a head is put on
    asks_without: tuple[str, ...] = ()  # regular expressions of the names inside them that such reading never comes to

    def __init__(self, vision: nn.Module, vocabulary: Vocabulary, schedule: nn.Module, processor: PictureTextProcessor, dim: int) -> None:
        super().__init__()
        self.vision, self.vocabulary, self.schedule, self.processor, self.dim = vision, vocabulary, schedule, processor, dim
        self.trained, self._warned, self._recomputes = False, False, False

    def look(self, image: ModalityInputs) -> Tokens:
        """The picture encoder's tokens (B, N, D); of a row without a picture nothing."""
        return self.there(self.vision, image)

    def see(self, image: ModalityInputs, place: int = 0) -> Tokens:
        """What matching, questions and captions begin from, (B, N, D); by default what `look` gives.

        Args:
            image: Pictures.
            place: 1 for the second of a pair that one text is about.
        """
        return self.look(image)

    def there(self, part: Callable[[ModalityInputs], Tokens], x: ModalityInputs) -> Tokens:
        """What ``part`` makes of those rows that are there, zeros elsewhere."""
        again = self._recomputes and torch.is_grad_enabled() and not _recomputes_blocks(part)
        run = (lambda given: checkpoint(part, given, use_reentrant=False)) if again else part
        if x.present is None or bool(x.present.all()):
            return run(x._replace(present=None))
        found = run(x.rows(x.present)._replace(present=None))
        tokens, mask, pooled = (None if y is None else _spread(y, x.present) for y in found[:3])
        assert tokens is not None
        assert mask is not None
        return Tokens(tokens, mask, pooled, x.present)

    def encode(
        self,
        rows: Rows,
        batch_size: int = 32,
        show_progress: bool | None = None,
        *,
        output: str | None = None,
        normalize: bool = True,
    ) -> np.ndarray:
        """Vectors of pictures or texts; the same rows give the same vectors.

        Args:
            rows: Dictionaries, ``{"image": PIL image, path or bytes}`` or ``{"text": str}``; or a single one; or strings, each a text.
            batch_size: Rows at a time.
            show_progress: None: a bar when there are many rows and somebody watches.
            output: ``image`` or ``text``; None: the one that the rows have, which is the same for all.
            normalize: To length 1.

        Returns:
            (N, dim) float32; (dim,) of a single row.

        Raises:
            ZooError: On a row without what is asked for, a picture that cannot be decoded, or weights that were converted without those
                that vectors need.
        """
        if not self.trained and not self._warned:
            warnings.warn("nothing was trained in this model: its vectors mean nothing yet; train it, or load a run", stacklevel=2)
            self._warned = True
        given = _titled(rows)
        chosen = output or _of(given)
        check_learned(self, "vectors", rf"{chosen}_projection\.")
        return encode(self, given, output=chosen, batch_size=batch_size, show_progress=show_progress, normalize=normalize)

    def similarity(self, a: Any, b: Any) -> np.ndarray:
        """Cosine of each vector of ``a`` (N, dim) with each of ``b`` (M, dim): (N, M) float32."""
        return similarity(a, b)

    def similarity_pairwise(self, a: Any, b: Any) -> np.ndarray:
        """Cosine of each vector of ``a`` (N, dim) with the one at the same place in ``b`` (N, dim): (N,) float32."""
        return similarity_pairwise(a, b)

    def checkpoint_gradients(self) -> None:
        """Recompute the activations of each block in the backward pass instead of keeping them; of a tower that cannot, of the whole."""
        self._recomputes = True
        for module in self.modules():
            if isinstance(module, Trunk | ByBlock):
                module.checkpoint_gradients()

    def parts(self) -> Mapping[str, Any]:
        """The settings that name parts, and what was made for each."""
        return {"vision": self.vision, "vocabulary": self.vocabulary}


def _recomputes_blocks(part: Any) -> bool:
    """Whether ``part``, a module or what runs the model's trunk, itself recomputes what its blocks keep."""
    inside = part.modules() if isinstance(part, nn.Module) else ()
    return not isinstance(part, nn.Module) or any(isinstance(m, Trunk) or (isinstance(m, ByBlock) and m.by_block) for m in inside)


def _titled(rows: Rows) -> Any:
    """Strings as rows."""
    if isinstance(rows, str):
        return {"text": rows}
    if isinstance(rows, list | tuple) and any(isinstance(row, str) for row in rows):
        return [{"text": row} if isinstance(row, str) else row for row in rows]
    return rows


def _of(rows: Any) -> str:
    """Which embedding rows have, by the first of them."""
    first = rows if isinstance(rows, Mapping) else rows[0] if isinstance(rows, Sequence) and len(rows) else {}  # `encode` refuses the rest
    given = {"image": first.get("image") is not None, "text": bool(first.get("text"))} if isinstance(first, Mapping) else {}
    kinds = [key for key, is_there in given.items() if is_there]  # of an array nobody can say whether it is true
    if len(kinds) == 2:
        raise ZooError("a row has a picture and a text, and each has a vector of its own: write output='image' or output='text'")
    return kinds[0] if kinds else "image"


def _spread(found: Tensor, there: Tensor) -> Tensor:
    """(b, ...) of the rows that are there to (B, ...), zeros elsewhere."""
    out = found.new_zeros(len(there), *found.shape[1:])
    out[there] = found
    return out
