"""BEiT v2's visual tokenizer: each patch of a picture becomes one of a closed list of visual tokens, which know what a tower saw there."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from timm.models.beit import Beit
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.abilities import Distilled, check_learned
from zoo.config import EncoderSpec, FusionSpec, Positive
from zoo.encoders._image import HALF, ImageProcessor
from zoo.errors import ZooError
from zoo.freeze import freeze
from zoo.hub import Hosted
from zoo.joints import compose
from zoo.models._classes import RowProcessor
from zoo.models._codebook import Codebook
from zoo.models._encode import encode, similarity, similarity_pairwise, tokenized
from zoo.pixels import Pixels, pixels_of, repainted
from zoo.registry import make, register
from zoo.types import Batch, ModalityInputs, ModelOutput, Rows

JOINTS: dict[str, str | None] = {"schedule": "joint"}
NORM: Any = partial(nn.LayerNorm, eps=1e-6)


class Size(NamedTuple):
    """Of a tokenizer."""

    width: int  # D, of encoder and decoder
    layers: int  # of the encoder
    heads: int
    image_size: int
    patch: int
    codes: int
    code_dim: int  # C
    decoder_layers: int
    init: float  # standard deviation of the first weights between transformers and codes


SIZES = {"tiny": Size(64, 4, 4, 32, 8, 64, 16, 1, 0.125), "base": Size(768, 12, 12, 224, 16, 8192, 32, 3, 0.02)}


class VisualTokenizer(Hosted, nn.Module):
    """The model; `visual_tokenizer` builds it.

    Args:
        size: Of both transformers, and of the codes.
        taught: T, the width of the teacher's features.
        teacher: A tower, which is frozen here; None: it was trained elsewhere.
        schedule: How one batch becomes updates.
        processor: Raw row to pixels.
    """

    modality_modules: Mapping[str, Sequence[str]] = {"image": ("encoder",)}
    outputs: tuple[str, ...] = ("image",)
    drawn: Sequence[str] = ()  # names of weights for which the file that it was converted from had nothing
    vision: Any
    schedule: Any

    def __init__(self, size: Size, taught: int, teacher: Any, schedule: nn.Module, processor: RowProcessor) -> None:
        super().__init__()
        D, side = size.width, size.image_size // size.patch
        self.encoder = transformer(size, size.image_size, size.patch, 3, size.layers)
        self.to_codes = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, size.code_dim))
        self.codebook = Codebook(size.codes, size.code_dim)
        self.decoder: nn.Module | None = transformer(size, side, 1, size.code_dim, size.decoder_layers)
        self.from_codes: nn.Sequential | None = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, taught))
        for layer in (*self.to_codes, *self.from_codes):
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=size.init)
                nn.init.zeros_(layer.bias)
        self.vision = teacher  # named so, as the tower of whoever was trained as a teacher is
        if teacher is not None:
            freeze(self.vision)
        self.schedule, self.processor, self.dim = schedule, processor, D
        self.grid, self.codes, self.trained = (side, side), size.codes, False
        self._warned = False

    def forward(self, batch: Batch) -> ModelOutput:
        """The embedding ``image`` (B, D), the mean of what the encoder makes of the patches, and their tokens, labels ``image`` (B, P).

        Of a row without a picture zeros.
        """
        device, patches = self.codebook.codes.device, self.grid[0] * self.grid[1]
        if "image" not in batch.inputs:  # no row shows anything
            rows = 0 if batch.ids is None else len(batch.ids)
            nobody = torch.zeros(rows, dtype=torch.bool, device=device)
            empty, none = self.codebook.codes.new_zeros(rows, self.dim), torch.zeros(rows, patches, dtype=torch.int64, device=device)
            return ModelOutput({"image": empty}, {"image": nobody}, labels={"image": none})
        image = batch.inputs["image"]
        there = torch.ones(len(image.values), dtype=torch.bool, device=device) if image.present is None else image.present
        states = self._states(image.rows(there))  # (b, P, D)
        ids = self.codebook(self._pointed(states))  # (b, P)
        vectors = states.new_zeros(len(there), self.dim).index_put((there,), states.mean(1))
        tokens = ids.new_zeros(len(there), patches).index_put((there,), ids)
        return ModelOutput({"image": vectors}, {"image": there}, labels={"image": tokens})

    def ids(self, image: ModalityInputs) -> Tensor:
        """(B, P) int64, the visual token of each patch, row by row of the picture."""
        return self.codebook(self._pointed(self._states(image)))

    def distil(self, image: ModalityInputs) -> Distilled:
        """What pictures are told by, and what a decoder makes of it beside what the teacher sees. Each row has a picture.

        Raises:
            ZooError: If there is no teacher, or it does not see as many patches.
        """
        points = self._pointed(self._states(image))  # (B, P, C)
        ids = self.codebook(points)
        codes = self.codebook.codes[ids]
        through = points + (codes - points).detach()  # the codes, whose gradient is the points'
        return Distilled(points, ids, codes, self._rebuilt(through), self._taught(image))

    def tell(self, rows: Rows, batch_size: int = 32, show_progress: bool | None = None) -> np.ndarray:
        """The visual tokens of raw rows, in eval mode.

        Args:
            rows: Dictionaries ``{"image": PIL image, path or bytes}``, or a single one.
            batch_size: Rows at a time.
            show_progress: None: a bar when there are many rows and somebody watches.

        Returns:
            (N, P) int64, or (P,) of a single row.

        Raises:
            ZooError: If these are no rows, or one has no picture, or one that cannot be decoded.
        """
        self._warn()
        check_learned(self, "visual tokens", r"(encoder|to_codes|codebook)\.")
        return tokenized(self, rows, batch_size=batch_size, show_progress=show_progress)

    def encode(
        self,
        rows: Rows,
        batch_size: int = 32,
        show_progress: bool | None = None,
        *,
        output: str | None = None,
        normalize: bool = True,
    ) -> np.ndarray:
        """Vectors of pictures, the mean over the patches of a picture.

        Args:
            rows: As of `tell`.
            batch_size: Rows at a time.
            show_progress: As of `tell`.
            output: ``image``, which None is, too.
            normalize: To length 1.

        Returns:
            (N, D) float32; (D,) of a single row.

        Raises:
            ZooError: As of `tell`.
        """
        self._warn()
        return encode(self, rows, output=output or "image", batch_size=batch_size, show_progress=show_progress, normalize=normalize)

    def similarity(self, a: Any, b: Any) -> np.ndarray:
        """Cosine of each vector of ``a`` (N, D) with each of ``b`` (M, D): (N, M) float32."""
        return similarity(a, b)

    def similarity_pairwise(self, a: Any, b: Any) -> np.ndarray:
        """Cosine of each vector of ``a`` (N, D) with the one at the same place in ``b`` (N, D): (N,) float32."""
        return similarity_pairwise(a, b)

    def trim(self) -> None:
        """Leave out teacher and decoder for good: visual tokens need neither."""
        self.vision = self.decoder = self.from_codes = None

    def checkpoint_gradients(self) -> None:
        """Recompute the activations of each block in the backward pass instead of keeping them."""
        for tower in (self.encoder, self.decoder):
            if isinstance(tower, Beit):
                tower.set_grad_checkpointing()

    def parts(self) -> Mapping[str, Any]:
        """The setting that names a part, and what was made of it."""
        return {} if self.vision is None else {"teacher": self.vision}

    def _warn(self) -> None:
        if not self.trained and not self._warned:
            warnings.warn("nothing was trained in this model: its tokens mean nothing yet; train it, or load a run", stacklevel=3)
            self._warned = True

    def _states(self, image: ModalityInputs) -> Tensor:
        """Pixels (B, 3, H, W) to the patches (B, P, D), the class token left out."""
        return patches_of(self.encoder, image.values.to(self.codebook.codes.dtype))

    def _pointed(self, states: Tensor) -> Tensor:
        """(B, P, D) to unit vectors (B, P, C), of which the nearest code is told; in float32, as near ones differ by little."""
        with torch.autocast(states.device.type, enabled=False):
            return F.normalize(self.to_codes(states.to(self.codebook.codes.dtype)), dim=-1)

    def _rebuilt(self, codes: Tensor) -> Tensor:
        """(B, P, C) to the teacher's features as the codes tell them, (B, P, T)."""
        if self.decoder is None or self.from_codes is None:
            raise ZooError("visual_tokenizer: its decoder was left out, which nothing but training needs: load the model again")
        grid = codes.transpose(1, 2).unflatten(2, self.grid)  # (B, C, R, R)
        return self.from_codes(patches_of(self.decoder, grid))

    def _taught(self, image: ModalityInputs) -> Tensor:
        """(B, P, T), what the teacher sees of the same pixels."""
        if self.vision is None:
            raise ZooError("visual_tokenizer: it learns from the features of a frozen tower, and has none: write model.teacher")
        own, other = self._pixels()
        with torch.no_grad():
            seen = self.vision(image._replace(values=repainted(image.values, own, other))).tokens  # (B, [1 +] P, T)
        patches = self.grid[0] * self.grid[1]
        if seen.shape[1] - patches not in (0, 1):
            raise ZooError(
                f"model.teacher: it sees {seen.shape[1]} tokens of a picture, and here are {patches} patches: write a teacher or an "
                "image_size so that both cut a picture alike, or keep_cls: false where tokens besides a class token stand before patches"
            )
        return seen[:, -patches:]

    def _pixels(self) -> tuple[Pixels, Pixels]:
        """Its own, and the teacher's."""
        return (
            pixels_of(self.processor.config()["image"], "visual_tokenizer"),
            pixels_of(self.vision.processor.config(), "model.teacher"),
        )


def transformer(size: Size, side: int, patch: int, channels: int, layers: int) -> Beit:
    """timm's BEiT with learned positions, no bias of keys, and the norm behind it on patches alone."""
    return Beit(side, patch, channels, num_classes=0, embed_dim=size.width, depth=layers, num_heads=size.heads, norm_layer=NORM)


def patches_of(tower: Any, pixels: Tensor) -> Tensor:
    """(B, channels, H, W) to the patches after the norm, (B, P, D)."""
    return tower.fc_norm(tower.forward_features(pixels)[:, 1:])


@register(
    "model",
    "visual_tokenizer",
    joints=JOINTS,
    paper="Peng et al., BEiT v2, 2022, https://arxiv.org/abs/2208.06366",
    licence="of weights that are converted: MIT",
)
def visual_tokenizer(
    *,
    size: Literal["tiny", "base"] = "tiny",
    teacher: EncoderSpec | None = None,
    taught: Positive | None = None,
    image_size: Positive | None = None,
    patch: Positive | None = None,
    codes: Positive | None = None,
    decoder_layers: Positive | None = None,
    fusion: FusionSpec = "joint",
) -> VisualTokenizer:
    """BEiT v2's tokenizer: patches become visual tokens, from which a small decoder tells the features of a frozen tower.

    Train it with the objective ``vq_kd``; ``mdm`` then has hidden patches told by its tokens, ``ids``. Both transformers are timm's. As
    ``vision`` a teacher has the name that towers have in models of pictures and texts, so ``init_from`` takes one that was trained as part
    of such a model. The published teacher is CLIP's ViT-B/16 behind its projection, 512 wide; here it is any encoder, before one.

    Args:
        size: The settings below that are None are those of this size; ``base`` is as published, ``tiny`` for CPUs.
        teacher: The picture encoder whose features are told; as large a grid of patches as here. None: it can tell, and learns no more.
        taught: Width of the features; None: the teacher's, or where there is none that of this size.
        image_size: Side of pictures, a multiple of that of a patch.
        patch: Side of a patch.
        codes: Visual tokens.
        decoder_layers: Blocks of the decoder, which nothing but training needs: 1 in the paper, 3 in the weights that are used most.
        fusion: A plug-in for the joint schedule.

    Raises:
        ZooError: If the fusion does not fit, patches do not fill a picture, or ``taught`` is not the teacher's width.
    """
    joints, of = compose(fusion, "visual_tokenizer", JOINTS), SIZES[size]
    of = of._replace(image_size=image_size or of.image_size, patch=patch or of.patch, codes=codes or of.codes)
    of = of._replace(decoder_layers=decoder_layers or of.decoder_layers)
    if of.image_size % of.patch:
        fits = of.image_size // of.patch * of.patch or of.patch
        raise ZooError(f"visual_tokenizer: image_size {of.image_size} is no multiple of the patch, {of.patch}: write {fits}")
    tower = None if teacher is None else make("encoder", teacher)
    if tower is not None and taught not in (None, tower.dim):
        raise ZooError(f"visual_tokenizer: taught {taught}, and the teacher's features are {tower.dim} wide: leave it out")
    wide = tower.dim if tower is not None else taught or of.width
    processor = RowProcessor({"image": ImageProcessor(of.image_size, mean=HALF, std=HALF)})
    return VisualTokenizer(of, wide, tower, joints.make("schedule", ["image"], of.width, 0), processor)
