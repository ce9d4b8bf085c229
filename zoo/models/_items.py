"""What models of a text and an image encoder share: a raw item to both inputs, encoders that never see what is absent, and ``encode``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.hub import Hosted
from zoo.models._encode import encode, similarity, similarity_pairwise
from zoo.models._notes import FIELDS, LANGUAGES, clean, images, pixels
from zoo.types import ModalityInputs, Processor, Row, Rows, Tokens


class ItemProcessor:
    """One raw row to ``text``, its fields one after the other, and ``image``; small and picklable.

    Every row has ``text``, so that a batch always has a length; ``extra["has_text"]`` says whether it is one.

    Args:
        text: The text encoder's processor.
        image: The image encoder's.
        language: Of the marks between the fields.
        title_length: In characters.
        content_length: In characters.
        max_topics: Topics kept.
    """

    def __init__(
        self,
        text: Processor,
        image: Processor,
        *,
        language: Literal["zh", "en"],
        title_length: int,
        content_length: int,
        max_topics: int,
    ) -> None:
        self.text, self.image, self.language = text, image, language
        self.limits = {"title_length": title_length, "content_length": content_length, "max_topics": max_topics}

    def config(self) -> dict[str, Any]:
        """What decides its result, for comparison when weights are loaded."""
        return {"item": {"language": self.language, **self.limits}, "text": self.text.config(), "image": self.image.config()}

    def __call__(self, row: Row) -> dict[str, ModalityInputs]:
        """``title. topic. content``, as far as they are there, and the pixels."""
        words = LANGUAGES[self.language]
        fields = clean(row, words, **self.limits)
        said = self.text(words.stop.join(filter(None, fields.values())))
        mask = said.mask if said.mask is not None else torch.ones(len(said.values), dtype=torch.bool)
        inputs = {"text": said._replace(mask=mask, extra={**said.extra, "has_text": torch.tensor(bool(fields))})}
        looked = pixels(row, self.image)
        return inputs if looked is None else {**inputs, "image": looked}

    def keys(self) -> tuple[str, ...]:
        """The keys of a row that this model looks at."""
        return (*FIELDS, "image")

    def sees(self, row: Row) -> bool:
        """Whether the row has anything that this model looks at."""
        return any(row.get(field) for field in FIELDS) or bool(images(row))


class ItemModel(Hosted, nn.Module):
    """What an item model of two encoders can do besides ``forward``.

    Args:
        text: Encodes one text.
        vision: Encodes one image.
        schedule: How one batch becomes updates.
        processor: Raw row to inputs.
        dim: Width of the embeddings.
    """

    text: Any  # parts whose own attributes are used; nn.Module would type every one of them as a Tensor
    vision: Any
    outputs: tuple[str, ...]

    def __init__(self, text: nn.Module, vision: nn.Module, schedule: nn.Module, processor: ItemProcessor, dim: int) -> None:
        super().__init__()
        self.text, self.vision, self.schedule, self.processor, self.dim = text, vision, schedule, processor, dim
        self.trained, self._warned, self._recomputes = False, False, False

    def read(self, text: ModalityInputs) -> Tokens:
        """The text encoder's tokens (B, N, D); of a row without text nothing."""
        return self._encoded(self.text, text, text.extra["has_text"])

    def look(self, image: ModalityInputs | None, rows: Tensor) -> Tokens:
        """The image encoder's tokens (B, N, D), those of all images of a row, whose ``pooled`` is their mean; of one without nothing.

        Args:
            image: None when nobody has one.
            rows: (B, ...), for their number.
        """
        if image is None:
            return _nothing(rows, self.vision.dim)
        there = image.present if image.present is not None else torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        return self._encoded(self.vision, image, there)

    def _encoded(self, encoder: Any, x: ModalityInputs, there: Tensor) -> Tokens:
        """Encode what is there (B,), of each row one thing, or several images."""
        if torch.compiler.is_exporting():  # a graph cannot ask who is there
            found: Tokens = encoder(x)
            assert found.pooled is not None, "item models need encoders that pool"
            return Tokens(found.tokens, found.mask & there[:, None], found.pooled.masked_fill(~there[:, None], 0), there)
        several = x.values.ndim == 5
        values = x.values if several else x.values[:, None]  # (B, M, ...)
        real = x.mask if several and x.mask is not None else torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
        real = real & there[:, None]  # (B, M)
        if not bool(real.any()):
            return _nothing(there, encoder.dim)
        given = ModalityInputs(values[real], None if several or x.mask is None else x.mask[:, None][real])
        found = checkpoint(encoder, given, use_reentrant=False) if self._recomputes else encoder(given)  # (I, N, D)
        assert found.pooled is not None, "item models need encoders that pool"
        pooled = _spread(found.pooled, real).sum(1) / real.sum(1, keepdim=True).clamp(min=1)  # (B, D)
        return Tokens(_spread(found.tokens, real).flatten(1, 2), _spread(found.mask, real).flatten(1, 2), pooled, real.any(1))

    def encode(
        self,
        rows: Rows,
        batch_size: int = 32,
        show_progress: bool | None = None,
        *,
        output: str | None = None,
        normalize: bool = True,
    ) -> np.ndarray:
        """Vectors of raw items; the same rows give the same vectors.

        Args:
            rows: Dictionaries with any subset of ``title``, ``topic``, ``content`` and ``image`` (PIL image, path or bytes, or a
                list of them), a missing key being a missing modality; or strings, each a title; or a single one of these.
            batch_size: Rows at a time.
            show_progress: None: a bar when there are many rows and somebody watches.
            output: One of ``self.outputs``; None: the first, the item.
            normalize: To length 1.

        Returns:
            (N, dim) float32; (dim,) of a single row.

        Raises:
            ZooError: On a row with nothing in it, or an image that cannot be decoded.
        """
        if not self.trained and not self._warned:
            warnings.warn("nothing was trained in this model: its vectors mean nothing yet; train it, or load a run", stacklevel=2)
            self._warned = True
        return encode(self, rows, output=output or self.outputs[0], batch_size=batch_size, show_progress=show_progress, normalize=normalize)

    def similarity(self, a: Any, b: Any) -> np.ndarray:
        """Cosine of each vector of ``a`` (N, dim) with each of ``b`` (M, dim): (N, M) float32."""
        return similarity(a, b)

    def similarity_pairwise(self, a: Any, b: Any) -> np.ndarray:
        """Cosine of each vector of ``a`` (N, dim) with the one at the same place in ``b`` (N, dim): (N,) float32."""
        return similarity_pairwise(a, b)

    def checkpoint_gradients(self) -> None:
        """Recompute the encoders' activations in the backward pass instead of keeping them."""
        self._recomputes = True

    def parts(self) -> Mapping[str, nn.Module]:
        """The settings that name encoders, and what was made for each."""
        return {"text": self.text, "vision": self.vision}


def _nothing(rows: Tensor, dim: int) -> Tokens:
    """Of each row (B, ...) one token that is not there."""
    zeros = torch.zeros(len(rows), 1, dim, device=rows.device)
    nobody = torch.zeros(len(rows), 1, dtype=torch.bool, device=rows.device)
    return Tokens(zeros, nobody, zeros[:, 0], nobody[:, 0])


def _spread(flat: Tensor, real: Tensor) -> Tensor:
    """(I, ...) of what is there to (B, M, ...), zeros elsewhere."""
    out = flat.new_zeros(*real.shape, *flat.shape[1:])
    out[real] = flat
    return out
