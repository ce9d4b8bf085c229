"""CoCa: one pass that contrasts pictures with texts and writes the texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from open_clip.transformer import AttentionalPooler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from zoo.config import EncoderSpec, FusionSpec, Positive
from zoo.errors import ZooError
from zoo.joints import Trunk as Plugin
from zoo.joints import banks_of, compose
from zoo.models._bert import remote_words
from zoo.models._pictures import CaptionProcessor, PictureTextModel, PictureTextProcessor
from zoo.models._towers import Pictures, Texts, clip_pictures, looked_and_read, plain_pictures, projection, sized, table_of
from zoo.registry import make, register
from zoo.trunk import Cache, Shape, Trunk
from zoo.types import Batch, ModalityInputs, ModelOutput, Tokens
from zoo.vocabulary import Vocabulary, make_vocabulary

JOINTS: dict[str, str | None] = {"trunk": "cross_attention", "schedule": "joint"}
GIVES = ("memory",)
Form = Literal["paper", "open_clip"]


class Size(NamedTuple):
    """Of all parts, and what its weights were trained with."""

    form: Form
    pictures: Pictures
    texts: Texts  # its layers are those of the half that reads the text alone
    captions: int  # layers of the half that reads the picture too
    dim: int  # of the embeddings
    queries: int  # of the pooler whose tokens captions read
    pooler_heads: int
    length: int  # ids of the longest text
    vocabulary: str
    vocab_size: int | None = None


SIZES = {
    "tiny": Size("paper", Pictures(64, 16, 64, 4, 4), Texts(64, 2, 4, init=0.125), 2, 64, 16, 4, 32, "small"),
    "vit_b_32": Size("open_clip", Pictures(224, 32, 768, 12, 12), Texts(512, 12, 8), 12, 512, 256, 8, 76, "clip"),
    "vit_l_14": Size("open_clip", Pictures(224, 14, 1024, 24, 16), Texts(768, 12, 12), 12, 768, 256, 8, 76, "clip"),
    "base": Size("paper", Pictures(288, 18, 768, 12, 12), Texts(768, 12, 12), 12, 768, 256, 12, 64, "clip", 64000),
    "large": Size("paper", Pictures(288, 18, 1024, 24, 16), Texts(1024, 12, 16), 12, 1024, 256, 16, 64, "clip", 64000),
    "huge": Size("paper", Pictures(288, 18, 1408, 40, 16, 6144), Texts(1408, 18, 16, 6144), 18, 1408, 256, 16, 64, "clip", 64000),
}


class Pooled(nn.Module):
    """A picture encoder and the attention of learned queries that pools its tokens.

    Args:
        encoder: Encodes one picture.
        form: ``paper``: the tokens are what all queries read, and one more query reads those for the embedding. ``open_clip``: the first
            query is the embedding, the others are the tokens.
        dim: Width of what the queries read.
        queries: How many.
        heads: Of the attention.
    """

    def __init__(self, encoder: Any, form: Form, dim: int, queries: int, heads: int) -> None:
        super().__init__()
        self.encoder, self.processor, self.dim = encoder, encoder.processor, dim
        self.pooler = AttentionalPooler(dim, encoder.dim, heads, queries)
        self.contrastive = AttentionalPooler(dim, dim, heads, 1) if form == "paper" else None
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: ModalityInputs) -> Tokens:
        """Pixels to Tokens (B, queries, D), one fewer in the form ``open_clip``."""
        seen = self.encoder(x)
        tokens = self.pooler(seen.tokens)  # (B, Q, D)
        if self.contrastive is None:
            pooled, tokens = (tokens := self.norm(tokens))[:, 0], tokens[:, 1:]
        else:
            pooled = self.norm(self.contrastive(tokens)[:, 0])
        return Tokens(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device), pooled, seen.present)

    def portable(self) -> dict[str, Any]:
        """The encoder's."""
        return dict(self.encoder.portable())


class Written(NamedTuple):
    """What stays of a caption between words."""

    lower: Cache
    upper: Cache

    def rows(self, index: Tensor) -> Written:
        """The same for the rows ``index`` (B',) int64."""
        return Written(self.lower.rows(index), self.upper.rows(index))


class Decoder(nn.Module):
    """Both halves of the text side: a causal trunk whose upper blocks read the picture; [CLS] stands behind the text, in the lower ones.

    Args:
        shape: Of a block.
        layers: Of both halves.
        first: The first block of the upper half.
        joint: Fills the joint trunk, as `zoo.joints.Trunk`: of which experts the blocks are.
        words: Rows of the table of embeddings.
        length: Ids of the longest text.
        legacy_cls_mask: As of `coca`.
    """

    def __init__(self, shape: Shape, layers: int, first: int, joint: Plugin, *, words: int, length: int, legacy_cls_mask: bool) -> None:
        super().__init__()
        self.dim, self.length, self.first, self._legacy = shape.dim, length, first, legacy_cls_mask
        self.words = nn.Embedding(words, shape.dim)
        self.positions = nn.Parameter(torch.empty(length + 1, shape.dim))  # the last is that of [CLS]
        self.cls = nn.Parameter(torch.empty(shape.dim))
        banks = banks_of(joint, lambda number: [("text", number >= first)])
        self.trunk = Trunk(shape, layers, cross_layers=range(first, layers), banks=banks, experts=joint, final_norm=True)
        self.norm = nn.LayerNorm(shape.dim, shape.eps)  # of [CLS]
        self.head = nn.Linear(shape.dim, words, bias=False)
        nn.init.normal_(self.words.weight, std=shape.init)
        nn.init.normal_(self.positions, std=shape.init / 2)
        nn.init.normal_(self.cls, std=shape.init / 2)
        nn.init.normal_(self.head.weight, std=shape.dim**-0.5)

    def forward(self, text: ModalityInputs) -> Tokens:
        """Ids (B, N) to the lower half's states (B, N, D), not normed, and of [CLS] the normed one as ``pooled``."""
        ids, N = text.values, text.values.shape[1]
        real = torch.ones_like(ids, dtype=torch.bool) if text.mask is None else text.mask
        keys = torch.cat([real, real.new_ones(len(ids), 1)], 1)  # (B, N + 1), [CLS] is the last
        if self._legacy:  # moved by one place: [CLS] sees one of padding, and itself only behind a text of full length
            ids, real = (ids, real) if self.length == N else (F.pad(ids, (0, 1)), F.pad(real, (0, 1)))
            keys = torch.cat([real.new_ones(len(ids), 1), real], 1)
        x = self.words(ids) + self.positions[: ids.shape[1]]
        x = torch.cat([x, (self.cls + self.positions[-1]).expand(len(x), 1, -1)], 1)  # (B, N + 1, D)
        hidden = self.trunk(x, keys, route="text", attend="causal", layers=slice(self.first))
        return Tokens(hidden[:, :N], real[:, :N], self.norm(hidden[:, -1]), real.new_ones(len(real)))

    def write(self, hidden: Tensor, seen: Tokens) -> Tensor:
        """States of the lower half (B, T, D) to the logits (B, T, V) of the word after each."""
        return self.head(self.trunk(hidden, route="text", fused=True, attend="causal", memory=seen.tokens, layers=slice(self.first, None)))

    def grow(self, ids: Tensor, seen: Tokens, kept: Written | None) -> tuple[Tensor, Written]:
        """Further ids (B, T) to the logits (B, V) of the word after the last."""
        lower, upper = kept or Written(Cache(), Cache())
        start = lower.length
        if start + ids.shape[1] > self.length:
            raise ZooError(f"coca: a text of {start + ids.shape[1]} ids is too long: its longest is {self.length}, as 'length' says")
        x = self.words(ids) + self.positions[start : start + ids.shape[1]]
        x, lower = self.trunk(x, route="text", attend="causal", layers=slice(self.first), cache=lower)
        above = slice(self.first, None)
        x, upper = self.trunk(x, route="text", fused=True, attend="causal", memory=seen.tokens, layers=above, cache=upper)
        return self.head(x[:, -1]), Written(lower, upper)


class Coca(PictureTextModel):
    """The model; `coca` builds it.

    Args:
        vision: Encodes one picture.
        text: Reads texts, and writes them.
        vocabulary: Of its texts.
        schedule: How one batch becomes updates.
        processor: Raw row to inputs.
        dim: Width of the embeddings.
    """

    modality_modules: Mapping[str, Sequence[str]] = {"image": ("vision", "image_projection"), "text": ("text", "text_projection")}

    def __init__(
        self, vision: Pooled, text: Decoder, vocabulary: Vocabulary, schedule: nn.Module, processor: PictureTextProcessor, dim: int
    ) -> None:
        super().__init__(vision, vocabulary, schedule, processor, dim)
        self.text, self.prompt, self.room = text, [vocabulary.role("start", "coca")], text.length
        self.image_projection, self.text_projection = projection(vision.dim, dim), projection(text.dim, dim)

    def read(self, text: ModalityInputs) -> Tokens:
        """States of the half that reads the text alone (B, N, D), ``pooled`` at its [CLS]; of a row without text nothing."""
        return self.there(self.text, text)

    def forward(self, batch: Batch) -> ModelOutput:
        """Picture and text to the embeddings ``image`` and ``text``, (B, dim) each, and to the tokens that captions are written from."""
        seen, words = looked_and_read(self, batch)
        vectors = {"image": self.image_projection(seen.pooled), "text": self.text_projection(words.pooled)}  # (B, dim)
        return ModelOutput(vectors, {"image": seen.present, "text": words.present}, tokens={"image": seen, "text": words})

    def caption(self, text: ModalityInputs, out: ModelOutput) -> tuple[Tensor, Tensor]:
        """Logits (B, N - 1, V) of the words of each text, given those before them and the picture, and which they are, -100 for none.

        Args:
            text: Of N ids.
            out: What the model gives for the same rows: nothing of it is computed again.
        """
        seen, words = out.tokens["image"], out.tokens["text"]
        both = (seen.present & words.present)[:, None]
        labels = text.values[:, 1:].masked_fill(~(words.mask[:, 1:] & both), -100)
        given = (words.tokens[:, :-1], seen)
        again = self._recomputes and torch.is_grad_enabled()
        return checkpoint(self.text.write, *given, use_reentrant=False) if again else self.text.write(*given), labels

    def next_words(self, ids: Tensor, seen: Tokens, cache: Written | None) -> tuple[Tensor, Written]:
        """Logits (B, V) of the word after ``ids`` (B, T), which go on from what ``cache`` holds, None at first; and the new cache.

        Raises:
            ZooError: If the text becomes longer than the longest.
        """
        return self.text.grow(ids, seen, cache)


@register(
    "model",
    "coca",
    joints=JOINTS,
    gives=GIVES,
    paper="Yu et al., CoCa: Contrastive captioners are image-text foundation models, 2022, https://arxiv.org/abs/2205.01917",
    licence="of weights that are loaded: see their card",
    remote=remote_words,
)
def coca(
    *,
    size: Literal["tiny", "vit_b_32", "vit_l_14", "base", "large", "huge"] = "tiny",
    vision: EncoderSpec | None = None,
    image_size: Positive | None = None,
    vocabulary: str | dict[str, Any] | None = None,
    vocab_size: Positive | None = None,
    length: Positive | None = None,
    dim: Positive | None = None,
    queries: Positive | None = None,
    legacy_cls_mask: bool = False,
    fusion: FusionSpec = "cross_attention",
) -> Coca:
    """CoCa: the vectors of CLIP and a writer of captions in one pass, for the lower half of the text side serves both.

    Train it with the objectives ``itc`` and ``lm`` under ``together``, weights 1 and 2. ``base``, ``large`` and ``huge`` are the paper's:
    a transformer without class token, a pooler of 256 queries for captions, and one of a single query that reads it for the embedding.
    ``vit_b_32`` and ``vit_l_14`` are open_clip's (Ilharco et al., 2021, https://github.com/mlfoundations/open_clip), which has one
    pooler, of whose queries the first is the embedding, and blocks with two feed-forwards in the upper half. ``tiny`` is the paper's form,
    for CPUs. The paper does not say how its norms lie: poolers norm what they read, and so do blocks that read the picture.

    Args:
        size: Of all parts; the settings below that are None are as it was published.
        vision: Another picture encoder in the place of the picture tower; its tokens are pooled.
        image_size: Side of pictures, a multiple of that of a patch; of the picture tower, so not where ``vision`` names another one.
        vocabulary: ``small``, ``clip``, or a repository or folder of a fast tokenizer with ids that start and end a text. The paper's own
            was not released.
        vocab_size: Rows of the table of words, at least as many as the vocabulary has; None: as many, or as the paper's where that is
            more.
        length: Ids of the longest text, its start and end included, without [CLS].
        dim: Width of the vectors.
        queries: Of the pooler.
        legacy_cls_mask: Whether [CLS] sees one place of padding and not itself, as in open_clip 3.3, whose weights want it so.
        fusion: Plug-ins for the joints trunk, schedule. ``from_layer`` of ``cross_attention`` moves the border of the halves.

    Raises:
        ZooError: If a fusion does not fit, the vocabulary cannot be had or lacks what starts and ends a text, the table is too small, or
            pictures are of a side that patches do not fill.
    """
    joints, of = compose(fusion, "coca", JOINTS, GIVES), SIZES[size]
    layers, paper = of.texts.layers + of.captions, of.form == "paper"
    joint = joints.make("trunk", layers, of.texts.layers)
    first = _border(joint, layers)
    words, longest, width = make_vocabulary(of.vocabulary if vocabulary is None else vocabulary), length or of.length, dim or of.dim
    table = table_of("coca", words, vocab_size or max(words.size, of.vocab_size or 0))
    pictures = sized("coca", of.pictures, image_size, vision)
    tower = plain_pictures(pictures) if paper else clip_pictures(pictures, "gelu", final_norm=False)
    looks = Pooled(tower if vision is None else make("encoder", vision), of.form, of.texts.width, queries or of.queries, of.pooler_heads)
    shape = Shape(
        of.texts.width,
        of.texts.heads,
        of.texts.hidden,
        eps=1e-5,
        memory_norm=True,
        cross_ffn=not paper,
        init=of.texts.init,
    )
    reads = Decoder(shape, layers, first, joint, words=table, length=longest, legacy_cls_mask=legacy_cls_mask)
    processor = PictureTextProcessor(looks.processor, CaptionProcessor(words, longest))
    return Coca(looks, reads, words, joints.make("schedule", ["image", "text"], width, 0), processor, width)


def _border(plugin: Plugin, layers: int) -> int:
    """The first block that reads the picture; all after it do.

    Raises:
        ZooError: If a plug-in wants anything else.
    """
    reading = [i for i in range(layers) if plugin.reads(i)]
    if not reading or reading != list(range(reading[0], layers)) or reading[0] == 0:
        raise ZooError(
            f"coca: its lower blocks read the text alone and its upper ones the picture too, by cross-attention; the fusion at the joint "
            f"trunk lets blocks {reading or 'none'} of {layers} read: write fusion: cross_attention, with a from_layer of 1 or more"
        )
    return reading[0]
