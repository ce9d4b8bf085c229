"""BEiT-3: pictures are another language. Every sub-layer is a modality's own, and only the attention map is of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from zoo.config import Fraction, FusionSpec, Positive
from zoo.errors import ZooError
from zoo.joints import Trunk as Plugin
from zoo.joints import compose
from zoo.models._bert import aligned, drawn, places_of, remote_words
from zoo.models._joint import GIVES, JointModel, Patches
from zoo.models._pictures import CaptionProcessor, PictureTextProcessor
from zoo.registry import register
from zoo.trunk import Cache, Shape
from zoo.types import Batch, ModalityInputs, ModelOutput, Tokens
from zoo.vocabulary import Vocabulary, make_vocabulary
from zoo.word_masks import choose_share, hide

JOINTS: dict[str, str | None] = {"trunk": "multiway", "schedule": "joint"}
BERT = "google-bert/bert-base-uncased"
EPS = 1e-5  # of its norms
HIDDEN = 0.7  # the share of a caption's ids that is hidden while it learns to write


class Size(NamedTuple):
    """Of a model, and what its weights were trained with."""

    width: int  # D
    layers: int
    heads: int
    hidden: int  # inside a feed-forward
    image_size: int
    patch: int
    length: int  # ids of the longest text
    places: int  # rows of the table of positions of words
    rows: int | None  # of the table of words; None: as many as the vocabulary has
    init: float  # standard deviation of the first weights
    drop_path: float
    vocabulary: str
    fusion: Any


SIZES = {
    "tiny": Size(64, 4, 4, 256, 32, 8, 24, 64, None, 64**-0.5, 0.0, "small", "multiway"),
    "base": Size(768, 12, 12, 3072, 224, 16, 64, 1022, 64010, 0.02, 0.1, BERT, "multiway"),
    "large": Size(1024, 24, 16, 4096, 224, 16, 64, 1022, 64010, 0.02, 0.1, BERT, "multiway"),
    "giant": Size(1408, 40, 16, 6144, 224, 14, 64, 1022, 64010, 0.02, 0.1, BERT, {"name": "mome", "from_layer": 37}),
}


class Words(nn.Module):
    """Word and place to one vector.

    Args:
        rows: Of the table of words.
        places: Of that of positions.
        dim: D.
        pad: The id whose row is not learned.
    """

    def __init__(self, rows: int, places: int, dim: int, pad: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(rows, dim, padding_idx=pad), nn.Embedding(places, dim)
        nn.init.normal_(self.words.weight, std=dim**-0.5)
        nn.init.normal_(self.places.weight, std=dim**-0.5)
        with torch.no_grad():
            self.words.weight[pad].zero_()

    def forward(self, ids: Tensor, past: int = 0) -> Tensor:
        """(B, N) ids, before which ``past`` others stand, to (B, N, D).

        Raises:
            ZooError: If there are more of them than places.
        """
        return self.words(ids) + places_of(self.places, past, ids.shape[1])


class Pooler(nn.Module):
    """A state to what answers are told from: a norm, a layer, tanh.

    Args:
        shape: Of the blocks.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm, self.dense = nn.LayerNorm(shape.dim, shape.eps), drawn(nn.Linear(shape.dim, shape.dim), shape.init)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) to the same."""
        return torch.tanh(self.dense(self.norm(x)))


class Beit3(JointModel):
    """The model; `beit_3` builds it.

    Args:
        vision: Embeds patches.
        embed: Embeds words.
        shape: Of the blocks.
        layers: How many.
        joint: Fills the joint trunk.
        vocabulary: Of its texts.
        schedule: How one batch becomes updates.
        processor: Raw row to inputs.
        codes: As of `beit_3`.
    """

    order = ("image", "text")

    def __init__(
        self,
        vision: Patches,
        embed: Words,
        shape: Shape,
        layers: int,
        joint: Plugin,
        vocabulary: Vocabulary,
        schedule: nn.Module,
        processor: PictureTextProcessor,
        codes: int,
    ) -> None:
        super().__init__(vision, embed, shape, layers, joint, vocabulary, schedule, processor, codes)
        self.head = drawn(nn.Linear(shape.dim, embed.words.num_embeddings), shape.init)
        self.pooler = Pooler(shape)
        self.prompt = [vocabulary.role("start", "beit_3")]
        self._mask = vocabulary.role("mask", "beit_3")
        self.room = embed.places.num_embeddings - 1  # of which one is for the mask that the next word is read at
        self.compared_dim = 4 * shape.dim

    def forward(self, batch: Batch) -> ModelOutput:
        """Picture and text to the embeddings ``image`` and ``text``, (B, D) each."""
        return aligned(self, batch)

    def ask(self, question: ModalityInputs, seen: Tokens) -> Tokens:
        """The states of ids (B, N) beside the pictures, (B, N, D), before the last norm; ``pooled`` (B, D) of the picture's first."""
        held = self._worded(question)
        states = self._states({"image": seen, "text": held}, normed=False)
        return held._replace(tokens=states["text"], pooled=self.pooler(states["image"][:, 0]))

    def compare(self, question: ModalityInputs, seen: Sequence[Tokens]) -> Tensor:
        """(B, 4 D): the first states of picture and text, of the sentence beside the one picture and beside the other."""
        held = self._worded(question)
        states = [self._states({"image": picture, "text": held}) for picture in seen]
        return torch.cat([of[kind][:, 0] for of in states for kind in ("image", "text")], 1)

    def caption(self, text: ModalityInputs, out: ModelOutput) -> tuple[Tensor, Tensor]:
        """Logits (B, N, V) of the words of each text, some of them hidden, given those before them and the picture; and which were hidden.

        Pictures see pictures alone. 70 % of the ids of each text are hidden, what ends it among them, by torch's own generator.
        """
        chosen = choose_share(text, self.vocabulary, HIDDEN)
        held = self._worded(text._replace(values=hide(text.values, chosen, self.vocabulary)))
        seen = out.tokens["image"]
        states = self._states({"image": seen, "text": held}, attend=seen.tokens.shape[1])["text"]  # (B, N, D)
        return self.head(states), text.values.masked_fill(~(chosen & seen.present[:, None]), -100)

    def next_words(self, ids: Tensor, seen: Tokens, cache: Cache | None) -> tuple[Tensor, Cache]:
        """Logits (B, V) of the word after ids (B, T), which go on from what the cache holds, None at first; and the new cache.

        The word is read at a mask behind them, of which the cache keeps nothing.

        Raises:
            ZooError: If the text becomes longer than the longest.
        """
        N, T = seen.tokens.shape[1], ids.shape[1]
        past = 0 if cache is None else cache.length - N
        x, mask = self.embed(ids, past), torch.ones_like(ids, dtype=torch.bool)
        if cache is None:
            x, mask = torch.cat([seen.tokens, x], 1), torch.cat([seen.mask, mask], 1)
            x, cache = self.trunk(x, mask, route=[("image", N), ("text", T)], fused=True, attend=N, cache=Cache())
        else:
            x, cache = self.trunk(x, mask, route="text", fused=True, attend="causal", cache=cache)
        asked = self.embed(ids.new_full((len(ids), 1), self._mask), past + T)
        x, _ = self.trunk(asked, mask[:, -1:], route="text", fused=True, cache=cache)
        return self.head(x[:, -1]), cache


@register(
    "model",
    "beit_3",
    joints=JOINTS,
    gives=GIVES,
    paper="Wang et al., BEiT-3, 2022, https://arxiv.org/abs/2208.10442",
    remote=remote_words,
)
def beit_3(
    *,
    size: Literal["tiny", "base", "large", "giant"] = "tiny",
    image_size: Positive | None = None,
    patch: Positive | None = None,
    vocabulary: str | dict[str, Any] | None = None,
    vocab_size: Positive | None = None,
    layers: Positive | None = None,
    hidden: Positive | None = None,
    length: Positive | None = None,
    drop_path: Fraction | None = None,
    codes: Annotated[int, Field(ge=0)] = 0,
    fusion: FusionSpec | None = None,
) -> Beit3:
    """BEiT-3: one set of weights that is two towers, reads pairs, and writes captions, learned from masked words and masked patches.

    Train it with the objective ``mdm``, then with ``itc`` to retrieve, or with ``lm`` to write captions: the words of a caption are
    hidden, and each is told from those before it. Text and picture stand in one sequence, the picture first. ``base`` and ``large`` are
    the released ones, all of whose sub-layers exist twice; ``giant`` is the paper's, of shared attention, whose code was not released.

    Args:
        size: The settings below that are None are those of this size; ``tiny`` is for CPUs.
        image_size: Side of pictures, a multiple of that of a patch.
        patch: Side of a patch.
        vocabulary: ``small``, or a repository or folder of a fast tokenizer. The authors' own, of SentencePiece with 64,010 rows, is
            released as ``beit3.spm``, which transformers' ``XLMRobertaTokenizerFast`` reads and saves as a folder; by default BERT's words
            stand in for it.
        vocab_size: Rows of the table of words, at least as many as the vocabulary has; None: as many, or as the published one where that
            is more.
        layers: Blocks.
        hidden: Width inside a feed-forward.
        length: Ids of the longest text, those at its ends included.
        drop_path: How often, in the last block, a row goes without what a sub-layer adds; rarer in those before.
        codes: Visual tokens that hidden patches are told from, 8,192 in the paper; 0: none.
        fusion: Plug-ins for the joints trunk and schedule; None: ``multiway``, of ``giant`` ``mome`` with pairs' own experts in the top
            three blocks.

    Raises:
        ZooError: If a fusion does not fit, the vocabulary cannot be had or lacks a special word, the table is too small, or pictures are
            of a side that patches do not fill.
    """
    of = SIZES[size]
    joints = compose(of.fusion if fusion is None else fusion, "beit_3", JOINTS, GIVES)
    words, depth, longest = make_vocabulary(vocabulary or of.vocabulary), layers or of.layers, length or of.length
    rows = vocab_size or max(words.own, of.rows or 0)
    if rows < words.own:
        raise ZooError(f"beit_3: vocab_size {rows} is too small: the vocabulary {words.name!r} needs {words.own} rows; write that, or more")
    if longest > of.places:
        raise ZooError(f"beit_3: length {longest} needs more than the {of.places} places of size {size}: write a smaller one")
    paths = of.drop_path if drop_path is None else drop_path
    shape = Shape(of.width, of.heads, hidden or of.hidden, eps=EPS, inner_norm=True, init=of.init, drop_path=paths)
    looks = Patches(image_size or of.image_size, patch or of.patch, of.width, places=True, dropout=0.0, init=of.init)
    embed = Words(rows, of.places, of.width, words.role("pad", "beit_3"))
    processor = PictureTextProcessor(looks.processor, CaptionProcessor(words, longest))
    joint, schedule = joints.make("trunk", depth, depth), joints.make("schedule", ["image", "text"], of.width, 0)
    return Beit3(looks, embed, shape, depth, joint, words, schedule, processor, codes)
