"""What VLMo and BEiT-3 share: words and patches stand in one sequence, and one trunk reads either of them, or both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

from zoo.encoders._image import HALF, ImageProcessor
from zoo.errors import ZooError
from zoo.joints import Trunk as Plugin
from zoo.joints import banks_of
from zoo.models._bert import drawn, real, run, there
from zoo.models._pictures import PictureTextModel, PictureTextProcessor
from zoo.trunk import Attend, Shape, Trunk
from zoo.types import ModalityInputs, Tokens
from zoo.vocabulary import Vocabulary

KINDS = ("text", "image")
GIVES = ("sequence",)


class Patches(nn.Module):
    """A picture to embedded patches behind a class token; no block has read them yet.

    Args:
        image_size: Side of pictures, a multiple of ``patch``.
        patch: Side of a patch.
        dim: D.
        places: Whether there is a table of positions.
        dropout: Of the result.
        init: Standard deviation of the first tokens and positions.

    Raises:
        ZooError: If patches do not fill a picture.
    """

    def __init__(self, image_size: int, patch: int, dim: int, *, places: bool, dropout: float, init: float) -> None:
        super().__init__()
        if image_size % patch:
            raise ZooError(f"image_size {image_size} is no multiple of the patch, {patch}: write {image_size // patch * patch or patch}")
        self.processor = ImageProcessor(image_size, mean=HALF, std=HALF, squash=True)
        self.embed = PatchEmbed(image_size, patch, 3, dim)
        self.grid = (image_size // patch, image_size // patch)
        self.cls, self.mask = nn.Parameter(torch.empty(1, 1, dim)), nn.Parameter(torch.empty(1, 1, dim))
        self.places = nn.Embedding(1 + self.grid[0] * self.grid[1], dim) if places else None
        self.dropout, self.dim = nn.Dropout(dropout), dim
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.trunc_normal_(parameter, std=init)

    def forward(self, x: ModalityInputs, hidden: Tensor | None = None) -> Tensor:
        """Pixels (B, 3, H, W) to (B, 1 + P, D); at ``hidden`` (B, P) bool the mask token stands in the place of a patch."""
        patches = self.embed(x.values.to(self.cls.dtype))  # (B, P, D)
        if hidden is not None:
            patches = torch.where(hidden[..., None], self.mask.to(patches.dtype), patches)
        patches = torch.cat([self.cls.expand(len(patches), -1, -1).to(patches.dtype), patches], 1)
        return self.dropout(patches if self.places is None else patches + self.places.weight)


class JointModel(PictureTextModel):
    """Words and patches through one trunk, whose sub-layers may be a modality's own.

    What is looked at and read are embedded tokens: the trunk reads a picture or a text alone to make its vector, and both from the start
    to match them, to fill in words and patches, or to be asked.

    Args:
        vision: Embeds patches.
        embed: Embeds ids (B, N) that stand behind ``past`` others.
        shape: Of the blocks.
        layers: How many.
        joint: Fills the joint trunk.
        vocabulary: Of its texts.
        schedule: How one batch becomes updates.
        processor: Raw row to inputs.
        codes: Visual tokens that a patch is told from; 0: it fills in words alone.
    """

    modality_modules: Mapping[str, Sequence[str]] = {"image": ("vision", "image_projection"), "text": ("embed", "text_projection")}
    asks_with: tuple[str, ...] = ("vision", "embed", "trunk", "pooler")
    order: tuple[str, str] = ("text", "image")  # which of them stands first in the sequence
    head: nn.Module

    def __init__(
        self,
        vision: Patches,
        embed: nn.Module,
        shape: Shape,
        layers: int,
        joint: Plugin,
        vocabulary: Vocabulary,
        schedule: nn.Module,
        processor: PictureTextProcessor,
        codes: int,
    ) -> None:
        super().__init__(vision, vocabulary, schedule, processor, shape.dim)
        banks = banks_of(joint, lambda _: [(kind, fused) for kind in KINDS for fused in (False, True)])
        self.embed = embed
        self.trunk = Trunk(shape, layers, banks=banks, experts=joint, final_norm=True)
        self.image_projection, self.text_projection = plain(shape), plain(shape)
        self.codes, self.grid = codes, vision.grid
        self.codes_head = drawn(nn.Linear(shape.dim, codes), shape.init) if codes else None

    def see(self, image: ModalityInputs, place: int = 0) -> Tokens:
        """Embedded patches (B, 1 + P, D), the class token first; of a row without a picture nothing."""
        return self.there(partial(self._seen, place=place), image)

    def look(self, image: ModalityInputs) -> Tokens:
        """The same, and ``pooled`` (B, D), what the trunk makes of the picture alone."""
        return self._alone("image", self.see(image))

    def read(self, text: ModalityInputs) -> Tokens:
        """Embedded words (B, N, D), and ``pooled`` (B, D), what the trunk makes of the text alone; of a row without text nothing."""
        return self._alone("text", self._worded(text))

    def hold(self, text: ModalityInputs, read: Tokens) -> Tokens:
        """The embedded words."""
        return read

    def unmask(self, text: ModalityInputs, seen: Tokens, chosen: Tensor | None = None) -> Tensor:
        """(B, N, V) logits of the word at each place of ids (B, N), some of them masked, given the pictures; or at ``chosen`` alone."""
        x = self._states({"text": self._worded(text), "image": seen})["text"]  # (B, N, D)
        return self.head(x if chosen is None else x[chosen])  # (B, N, V) or (n, V)

    def fill(
        self, image: ModalityInputs | None, hidden: Tensor | None, text: ModalityInputs | None, chosen: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits of words (n, V) at ``chosen`` (B, N), and of visual tokens (m, codes) at ``hidden`` (B, P), as of `zoo.abilities.Filling`.

        Raises:
            ZooError: If patches shall be filled in, and the model knows no visual tokens.
        """
        parts = {}
        if image is not None:
            parts["image"] = self._seen(image, hidden=hidden)
        if text is not None:
            parts["text"] = self._worded(text)
        states = self._states(parts)
        words = None if text is None or chosen is None else self.head(states["text"][chosen])
        if image is None or hidden is None:
            return words, None
        if self.codes_head is None:
            raise ZooError("patches are filled in with visual tokens, and this model was built without: write model.codes, such as 8192")
        return words, self.codes_head(states["image"][:, 1:][hidden])

    def parts(self) -> Mapping[str, Any]:
        """The setting that names a part, and what was made of it."""
        return {"vocabulary": self.vocabulary}

    def _seen(self, image: ModalityInputs, place: int = 0, hidden: Tensor | None = None) -> Tokens:
        """Embedded patches, of which those hidden are the mask token."""
        x = self._typed(self.vision(image, hidden), 1 + place)
        return Tokens(x, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device), None, there(image))

    def _worded(self, text: ModalityInputs) -> Tokens:
        """Embedded words, zeros where there are none."""
        mask = real(text)
        return Tokens(self._typed(self.embed(text.values), 0) * mask[..., None], mask, None, there(text))

    def _typed(self, x: Tensor, kind: int) -> Tensor:
        """(B, N, D) that says what it is: 0 a text, 1 a picture, 2 the second of two pictures. Here nothing is added."""
        return x

    def _alone(self, kind: str, x: Tokens) -> Tokens:
        """The same tokens, with ``pooled``, the first one's state after the trunk alone."""
        return x._replace(pooled=self._of_rows(kind, x)[0])

    def _of_rows(self, kind: str, x: Tokens) -> list[Tensor]:
        """(B, D) each, what `_vectors` makes of those rows that are there, zeros elsewhere."""
        if bool(x.present.all()):
            return self._vectors(kind, x)
        found = self._vectors(kind, Tokens(x.tokens[x.present], x.mask[x.present], None, x.present[x.present]))
        return [vector.new_zeros(len(x.present), self.dim).index_put((x.present,), vector) for vector in found]

    def _vectors(self, kind: str, x: Tokens) -> list[Tensor]:
        """(B, D) each: the first token's state, of the trunk and perhaps of other ways through it."""
        return [self._states({kind: x})[kind][:, 0]]

    def _states(self, parts: Mapping[str, Tokens], *, attend: Attend = "all", layers: slice | None = None, **how: Any) -> dict[str, Tensor]:
        """{kind: (B, N, D)} after the trunk, of tokens of one kind, or of both in one sequence."""
        names = [kind for kind in self.order if kind in parts]
        x = torch.cat([parts[kind].tokens for kind in names], 1)  # (B, T, D)
        mask = None if names == ["image"] else torch.cat([parts[kind].mask for kind in names], 1)
        sizes = [parts[kind].tokens.shape[1] for kind in names]
        how = {"fused": len(names) > 1, "bias": self._bias({kind: parts[kind].tokens.shape[1] for kind in names}), **how}
        x = run(self.trunk, x, mask, route=list(zip(names, sizes, strict=True)), attend=attend, layers=layers, **how)
        return dict(zip(names, x.split(sizes, 1), strict=True))

    def _bias(self, sizes: Mapping[str, int]) -> list[Tensor] | None:
        """What is added to the scores of each block, for as many tokens of each kind; here nothing."""
        return None


def plain(shape: Shape) -> nn.Linear:
    """D to D without bias."""
    layer = nn.Linear(shape.dim, shape.dim, bias=False)
    nn.init.normal_(layer.weight, std=shape.init)
    return layer
