"""VLMo: one transformer whose attention is shared and whose feed-forwards are a modality's own, used as two towers or as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from zoo.config import Fraction, FusionSpec, Positive
from zoo.errors import ZooError
from zoo.joints import Trunk as Plugin
from zoo.joints import compose
from zoo.models._bert import Embedding, any_of, drawn, nothing, remote_words, rows_of_table, unseen
from zoo.models._joint import GIVES, JointModel, Patches, plain
from zoo.models._pictures import CaptionProcessor, PictureTextProcessor
from zoo.registry import register
from zoo.relative_positions import RelativePositions
from zoo.trunk import Shape
from zoo.types import Batch, ModalityInputs, ModelOutput, Tokens
from zoo.vocabulary import Vocabulary, make_vocabulary

JOINTS: dict[str, str | None] = {"trunk": "mome", "schedule": "joint"}
BERT = "google-bert/bert-base-uncased"
EPS = 1e-12  # of the head of words


class Size(NamedTuple):
    """Of a model, and what its weights were trained with."""

    width: int  # D
    layers: int
    heads: int
    first: int  # the block from which on a pair has an expert of its own
    image_size: int
    patch: int
    length: int  # ids of the longest text
    init: float  # standard deviation of the first weights
    relative: int | None  # the longest text of the table of relative positions; None: positions are absolute
    layer_scale: float | None  # where LayerScale begins; None: there is none
    drop_path: float
    vocabulary: str


SIZES = {
    "tiny": Size(64, 4, 4, 3, 32, 8, 24, 64**-0.5, 24, 1.0, 0.0, "small"),  # at 0.1 what is trained from nothing in minutes hardly moves
    "base": Size(768, 12, 12, 10, 224, 16, 40, 0.02, 196, 0.1, 0.1, BERT),
    "large": Size(1024, 24, 16, 21, 224, 16, 40, 0.02, 196, 0.1, 0.1, BERT),
    "base_plus": Size(544, 24, 16, 21, 224, 16, 40, 0.02, None, None, 0.1, BERT),
}


class WordHead(nn.Module):
    """States to logits of words, with a table of its own.

    Args:
        rows: V.
        dim: D.
        init: Standard deviation of the first weights.
    """

    def __init__(self, rows: int, dim: int, init: float) -> None:
        super().__init__()
        self.dense, self.norm, self.words = drawn(nn.Linear(dim, dim), init), nn.LayerNorm(dim, EPS), drawn(nn.Linear(dim, rows), init)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., V)."""
        return self.words(self.norm(nn.functional.gelu(self.dense(x))))


class Vlmo(JointModel):
    """The model; `vlmo` builds it.

    Args:
        vision: Embeds patches.
        embed: Embeds words.
        size: Of the model.
        shape: Of the blocks.
        rows: Of the table of words.
        joint: Fills the joint trunk.
        vocabulary: Of its texts.
        schedule: How one batch becomes updates.
        processor: Raw row to inputs.
        codes: As of `vlmo`.
        two_scale: As of `vlmo`.

    Raises:
        ZooError: As of `JointModel`, and if pairs have no experts of their own that ``two_scale`` needs.
    """

    asks_with: tuple[str, ...] = ("vision", "embed", "kinds", "positions", "trunk", "pooler")
    adds_cosine = True

    def __init__(
        self,
        vision: Patches,
        embed: Embedding,
        size: Size,
        shape: Shape,
        rows: int,
        joint: Plugin,
        vocabulary: Vocabulary,
        schedule: nn.Module,
        processor: PictureTextProcessor,
        codes: int,
        two_scale: bool | None,
    ) -> None:
        super().__init__(vision, embed, shape, size.layers, joint, vocabulary, schedule, processor, codes)
        self.kinds = nn.Embedding(3, shape.dim)  # of the text, of the picture, of the second picture
        nn.init.normal_(self.kinds.weight, std=shape.init)
        self.positions = RelativePositions(vision.grid, size.relative, size.layers, shape.heads) if size.relative else None
        self.pooler, self.matches = drawn(nn.Linear(shape.dim, shape.dim), shape.init), drawn(nn.Linear(shape.dim, 2), shape.init)
        self.head = WordHead(rows, shape.dim, shape.init)
        self.compared_dim = 2 * shape.dim
        own = [number for number in range(size.layers) if joint("text", number, True) != joint("text", number)]
        if two_scale and not own:
            raise ZooError("vlmo: with this fusion pairs have no experts of their own to take a vector through: write two_scale: false")
        self.first, two_scale = own[0] if own else size.layers, bool(own) if two_scale is None else two_scale
        self.two_scale = two_scale
        if two_scale:
            self.outputs = ("image", "text", "pair_image", "pair_text")
            self.pair_image_projection, self.pair_text_projection = plain(shape), plain(shape)

    def forward(self, batch: Batch) -> ModelOutput:
        """Picture and text to the embeddings ``image`` and ``text``, (B, D) each.

        With ``two_scale`` also ``pair_image`` and ``pair_text``: what the upper blocks make of each alone with the experts of pairs.
        """
        weight = self.pooler.weight
        one = any_of(batch, weight.device)
        tokens = {
            "image": self.see(batch.inputs["image"]) if "image" in batch.inputs else unseen(self, one, weight.dtype),
            "text": self._worded(batch.inputs["text"]) if "text" in batch.inputs else nothing(one, self.dim, weight.dtype),
        }
        vectors, present = {}, {}
        for kind, x in tokens.items():
            states = self._of_rows(kind, x) if kind in batch.inputs else [x.tokens[:, 0]] * len(self._ways)
            tokens[kind] = x._replace(pooled=states[0])
            for way, state in zip(self._ways, states, strict=True):
                projected = self.get_submodule(f"{way}{kind}_projection")(state)  # (B, D)
                vectors[f"{way}{kind}"], present[f"{way}{kind}"] = projected.masked_fill(~x.present[:, None], 0), x.present
        return ModelOutput({name: vectors[name] for name in self.outputs}, present, tokens=tokens)

    def match(self, held: Tokens, seen: Tokens) -> Tensor:
        """(B, 2) logits: the trunk reads text and picture, 1 says that they belong together."""
        return self.matches(self._pooled(self._states({"text": held, "image": seen})["text"]))  # (B, 2)

    def ask(self, question: ModalityInputs, seen: Tokens) -> Tokens:
        """The states of ids (B, N) beside the pictures, (B, N, D); ``pooled`` (B, D) of the first."""
        held = self._worded(question)
        x = self._states({"text": held, "image": seen})["text"]
        return held._replace(tokens=x, pooled=self._pooled(x))

    def compare(self, question: ModalityInputs, seen: Sequence[Tokens]) -> Tensor:
        """(B, 2 D): what the head of pairs reads of the sentence beside the first picture, and beside the second."""
        held = self._worded(question)
        return torch.cat([self._pooled(self._states({"text": held, "image": picture})["text"]) for picture in seen], 1)

    @property
    def _ways(self) -> tuple[str, ...]:
        """Through the trunk, by what the names of their vectors begin with."""
        return ("", "pair_") if self.two_scale else ("",)

    def _vectors(self, kind: str, x: Tokens) -> list[Tensor]:
        """(B, D) of the modality's own experts, and with ``two_scale`` that of those of pairs, from the block on that has them."""
        if not self.two_scale:
            return super()._vectors(kind, x)
        below = x._replace(tokens=self._states({kind: x}, layers=slice(self.first))[kind])
        above = [self._states({kind: below}, layers=slice(self.first, None), fused=fused) for fused in (False, True)]
        return [states[kind][:, 0] for states in above]

    def _pooled(self, x: Tensor) -> Tensor:
        return torch.tanh(self.pooler(x[:, 0]))

    def _typed(self, x: Tensor, kind: int) -> Tensor:
        return x + self.kinds.weight[kind]

    def _bias(self, sizes: Mapping[str, int]) -> list[Tensor] | None:
        if self.positions is None:
            return None
        return self.positions(sizes.get("text", 0), "image" in sizes)


@register(
    "model",
    "vlmo",
    joints=JOINTS,
    gives=GIVES,
    paper="Bao et al., VLMo, 2021, https://arxiv.org/abs/2111.02358",
    remote=remote_words,
)
def vlmo(
    *,
    size: Literal["tiny", "base", "large", "base_plus"] = "tiny",
    image_size: Positive | None = None,
    patch: Positive | None = None,
    vocabulary: str | dict[str, Any] | None = None,
    vocab_size: Positive | None = None,
    layers: Positive | None = None,
    hidden: Positive | None = None,
    length: Positive | None = None,
    drop_path: Fraction | None = None,
    codes: Annotated[int, Field(ge=0)] = 0,
    two_scale: bool | None = None,
    fusion: FusionSpec = "mome",
) -> Vlmo:
    """VLMo: a transformer of shared attention and one feed-forward per modality, which is two towers for retrieval and one for pairs.

    Train it with the objective ``together`` of two ``itc``, ``itm`` with ``among: global`` and ``mlm`` of weight 0.25. Text and picture
    stand in one sequence, the text first. Re-ranking scores by the logit of a match plus the cosine of the vectors.

    Args:
        size: ``base`` and ``large`` are as published; ``base_plus`` is narrow and deep, with absolute positions and no LayerScale;
            ``tiny`` is for CPUs. The settings below that are None are those of this size.
        image_size: Side of pictures, a multiple of that of a patch.
        patch: Side of a patch.
        vocabulary: ``small``, or a repository or folder of a fast tokenizer with BERT's special words.
        vocab_size: Rows of the table of words, at least as many as the vocabulary has; None: as many.
        layers: Blocks; a pair's own experts begin as far below the last as in the size.
        hidden: Width inside a feed-forward; None: four times the width.
        length: Ids of the longest text, those at its ends included.
        drop_path: How often, in the last block, a row goes without what a sub-layer adds; rarer in those before. As the authors have it,
            also the dropout of embedded words.
        codes: Visual tokens that hidden patches are told from, as BEiT learns them in the first stage; 0: none.
        two_scale: Whether vectors are also taken through the experts of pairs, and contrasted by an ``itc`` of their own; None: where the
            fusion gives pairs their own.
        fusion: Plug-ins for the joints trunk and schedule; ``from_layer`` of ``mome`` is the first block with the expert of pairs.

    Raises:
        ZooError: If a fusion does not fit, the vocabulary cannot be had or lacks a special word, the table is too small, or pictures are
            of a side that patches do not fill.
    """
    of = SIZES[size]
    joints, words = compose(fusion, "vlmo", JOINTS, GIVES), make_vocabulary(vocabulary or of.vocabulary)
    depth, longest = layers or of.layers, length or of.length
    of = of._replace(
        layers=depth,
        first=max(0, of.first + depth - of.layers),
        image_size=image_size or of.image_size,
        patch=patch or of.patch,
        length=longest,
        relative=None if of.relative is None else max(of.relative, longest),
    )
    rows = rows_of_table("vlmo", words, vocab_size, roles=False)
    pad = words.role("pad", "vlmo")
    words.role("mask", "vlmo")
    joint = joints.make("trunk", of.layers, of.first)
    paths = of.drop_path if drop_path is None else drop_path
    shape = Shape(of.width, of.heads, hidden, bias="qv", layer_scale=of.layer_scale, init=of.init, drop_path=paths)
    absolute = of.relative is None
    looks = Patches(of.image_size, of.patch, of.width, places=absolute, dropout=0.0, init=of.init)
    embed = Embedding(rows, longest if absolute else None, of.width, pad=pad, typed=True, dropout=paths, init=of.init)
    processor = PictureTextProcessor(looks.processor, CaptionProcessor(words, longest))
    schedule = joints.make("schedule", ["image", "text"], of.width, 0)
    return Vlmo(looks, embed, of, shape, rows, joint, words, schedule, processor, codes, two_scale)
