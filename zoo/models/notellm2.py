"""NoteLLM-2: a language model compresses a note, image and text, into one word, whose hidden state is the item's vector."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from zoo.config import BackboneSpec, ConnectorSpec, EncoderSpec, FusionSpec, Positive, split_spec
from zoo.errors import ZooError
from zoo.freeze import freeze
from zoo.hub import Hosted
from zoo.joints import Arrange, compose
from zoo.models._encode import encode, similarity, similarity_pairwise
from zoo.models._notes import Ask, NoteProcessor, continued
from zoo.registry import make, register
from zoo.splice import IGNORE, Layout, Spliced, splice
from zoo.types import Batch, ModalityInputs, ModelOutput, Rows, Tokens

JOINTS: dict[str, str | None] = {"arrange": "early", "combine": None, "schedule": "joint"}


class Seen(NamedTuple):
    """What the vision encoder saw of a batch."""

    tokens: Tokens | None  # (B, L, D) for the prompt; None when none enter it, or nobody has an image
    pooled: Tensor | None  # (B, D_vision) for the late fusion, zeros where absent; None when nobody has an image
    there: Tensor  # (B,) bool: who has an image


class NoteLLM2(Hosted, nn.Module):
    """The model; `notellm2` builds it.

    Args:
        backbone: The language model.
        vision: Encodes one image; None when nobody looks at images.
        connector: Visual tokens to the backbone's width; None when none enter the prompt.
        combine: Mixes the language model's state with the image's vector, late; None for none.
        schedule: How one batch becomes updates.
        arrange: Lays a row out; the embeddings of the model are its anchors.
        processor: Raw row to inputs.
        dim: Width of the embeddings; None: the raw state of the backbone.
    """

    modality_modules: Mapping[str, Sequence[str]] = {"image": ("vision", "connector", "late"), "text": ("backbone",)}
    backbone: Any  # parts whose own attributes are used; nn.Module would type every one of them as a Tensor
    vision: Any
    processor: NoteProcessor

    def __init__(
        self,
        backbone: nn.Module,
        vision: nn.Module | None,
        connector: nn.Module | None,
        combine: nn.Module | None,
        schedule: nn.Module,
        *,
        arrange: Arrange,
        processor: NoteProcessor,
        dim: int | None,
    ) -> None:
        super().__init__()
        self.backbone, self.vision, self.connector, self.combine, self.schedule = backbone, vision, connector, combine, schedule
        width: int = self.backbone.dim
        self.late = nn.Linear(self.vision.dim, width, bias=False) if combine is not None else None
        self.project = nn.Linear(width, dim, bias=False) if dim is not None else nn.Identity()
        self.arrange, self.processor, self.outputs, self.asks = arrange, processor, arrange.anchors, processor.ask
        self.dim = dim if dim is not None else width
        self._warned = False

    @property
    def trained(self) -> bool:
        """False: the language model has random weights that nothing was trained or loaded into."""
        return self.backbone.trained

    @trained.setter
    def trained(self, value: bool) -> None:
        self.backbone.trained = value

    def forward(self, batch: Batch) -> ModelOutput:
        """Prompt and pixels to one embedding (B, dim) for each anchor; in training, logits (W, V) of the words of answers too.

        An embedding is present where its anchor stands in the prompt and something that the model looks at is there. Answers stand
        behind the prompt, so no embedding sees them.
        """
        text, image = batch.inputs["text"], self.look(batch)
        answer = batch.inputs.get("answer") if self.training else None
        text = text if answer is None else continued(text, answer)
        spliced, hidden = self._read(text, image)  # (B, S, D)
        has_text, rows = text.extra["has_text"], torch.arange(hidden.shape[0], device=hidden.device)
        late = self._late(image, hidden)  # (B, D), one for all anchors
        embeddings, present = {}, {}
        for name, at in spliced.anchors.items():
            state = hidden[rows, at.clamp(min=0)].to(late.dtype)  # (B, D)
            there = (at >= 0) & (has_text | image.there if self.arrange.media else has_text)
            if self.combine is not None:
                state = self.combine({"note": state, "image": late}, {"note": there, "image": image.there})  # (B, D)
                there = there | ((at >= 0) & image.there)
            embeddings[name], present[name] = self.project(state), there  # (B, dim)
        media = {} if image.tokens is None else {"image": image.tokens._replace(tokens=image.tokens.tokens.clone())}  # FSDP2 hooks no views
        logits, words = ({}, {}) if answer is None else ({"answer": x} for x in self._predict(spliced, hidden))
        return ModelOutput(embeddings, present, logits, words, tokens=media, aux=self._places(spliced))

    def predict(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (W, V) of every word of the prompts but the first, each given all before it, and which words they are (W,).

        Special tokens that stand in a prompt are among them; images are read and never predicted.
        """
        return self._predict(*self._read(batch.inputs["text"], self.look(batch)))

    def _predict(self, spliced: Spliced, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (W, V) of the labelled words, and the words (W,)."""
        follows = spliced.labels[:, 1:]  # (B, S - 1)
        said = follows != IGNORE
        return self.backbone.predict(hidden[:, :-1][said]), follows[said]

    def _read(self, text: ModalityInputs, image: Seen) -> tuple[Spliced, Tensor]:
        """The prompts with the images in them, and the backbone's hidden states (B, S, D)."""
        spliced = splice(self.layout(text), {} if image.tokens is None else {"image": image.tokens})
        return spliced, self.backbone(spliced.inputs_embeds, spliced.attention_mask, spliced.position_ids)

    def _places(self, spliced: Spliced) -> dict[str, Tensor]:
        """Where the main embedding is read, and the first and the last position of the image, (B,) each, -1 without one.

        As the released code counts them for its saliency: the tags around an image are part of it, and so is mICL's visual note, up
        to the third position after its word; how much of the prompt that is depends on the tokenizer.
        """
        main, *visual = self.outputs
        media, roles = spliced.kind > 0, self.processor.tokenizer.roles  # (B, S)
        there = media.any(1)
        first = media.int().argmax(1) - int(roles.get("image_start") is not None)
        last = media.shape[1] - 1 - media.flip(1).int().argmax(1) + int(roles.get("image_end") is not None)
        for name in visual:
            last = torch.maximum(last, spliced.anchors[name] + 3)
        return {"read": spliced.anchors[main], "image_first": first.where(there, -1), "image_last": last.where(there, -1)}

    def look(self, batch: Batch) -> Seen:
        """Encode the images that are there; a row with several gets the tokens of all of them and their mean vector."""
        x = batch.inputs.get("image")
        if self.vision is None or x is None:
            return Seen(None, None, torch.zeros_like(batch.inputs["text"].extra["has_text"]))
        if torch.compiler.is_exporting():
            return self._look_at_all(x)
        several = x.values.ndim == 5
        pixels = x.values if several else x.values[:, None]  # (B, M, 3, H, W)
        real = x.mask if several and x.mask is not None else torch.ones(pixels.shape[:2], dtype=torch.bool, device=pixels.device)
        if x.present is not None:
            real = real & x.present[:, None]  # (B, M)
        if not bool(real.any()):
            return Seen(None, None, real.any(1))
        encoded: Tokens = self.vision(ModalityInputs(pixels[real]))  # (I, N, D_vision), I real images
        there = real.any(1)
        pooled = None
        if self.late is not None:
            assert encoded.pooled is not None, "late fusion needs an encoder that pools"
            pooled = _spread(encoded.pooled, real).sum(1) / real.sum(1, keepdim=True).clamp(min=1)  # (B, D_vision)
        if self.connector is None:
            return Seen(None, pooled, there)
        visual: Tokens = self.connector(encoded)  # (I, L, D)
        tokens, mask = _spread(visual.tokens, real).flatten(1, 2), _spread(visual.mask, real).flatten(1, 2)  # (B, M * L, D)
        return Seen(Tokens(tokens, mask, None, there), pooled, there)

    def _look_at_all(self, x: ModalityInputs) -> Seen:
        """`look` for a graph, which cannot ask who has an image: it encodes one image of every row, and hides absent ones."""
        encoded: Tokens = self.vision(ModalityInputs(x.values))  # (B, N, D_vision)
        there = x.present if x.present is not None else torch.ones_like(encoded.present)
        pooled = None
        if self.late is not None:
            assert encoded.pooled is not None, "late fusion needs an encoder that pools"
            pooled = encoded.pooled.masked_fill(~there[:, None], 0)  # (B, D_vision)
        if self.connector is None:
            return Seen(None, pooled, there)
        visual: Tokens = self.connector(encoded)  # (B, L, D)
        return Seen(Tokens(visual.tokens, visual.mask & there[:, None], None, there), pooled, there)

    def _late(self, image: Seen, hidden: Tensor) -> Tensor:
        """The image's own vector (B, D); zeros when nobody has one, or nobody asks.

        In the precision of what follows the backbone, whose own weights may be in bfloat16.
        """
        if self.late is not None and image.pooled is not None:
            return self.late(image.pooled)
        follows = self.project if self.late is None else self.late
        precision = next((p.dtype for p in follows.parameters()), hidden.dtype)
        return torch.zeros(hidden.shape[0], hidden.shape[-1], dtype=precision, device=hidden.device)

    def layout(self, text: ModalityInputs) -> Layout:
        """The prompt, embedded, with its slots, its anchors and its words."""
        anchors = {name: text.extra[f"anchor.{name}"] for name in self.arrange.anchors}
        mask = text.mask if text.mask is not None else torch.ones_like(text.values, dtype=torch.bool)
        slots = text.extra["slots"]
        words = text.values.masked_fill(~text.extra.get("said", mask & (slots == 0)), IGNORE)
        return Layout(self.backbone.embed(text.values), mask, slots, anchors, labels=words)

    def encode(
        self,
        rows: Rows,
        batch_size: int = 32,
        show_progress: bool | None = None,
        *,
        output: str | None = None,
        normalize: bool = True,
    ) -> np.ndarray:
        """Vectors of raw notes; the same rows give the same vectors.

        Args:
            rows: Dictionaries with any subset of ``title``, ``topic``, ``content`` and ``image`` (PIL image, path or bytes, or a
                list of them), a missing key being a missing modality; or strings, each a title, cut to ``title_length`` as every
                title is; or a single one of these.
            batch_size: Rows at a time.
            show_progress: None: a bar when there are many rows and somebody watches.
            output: One of ``self.outputs``; None: the first, the note.
            normalize: To length 1.

        Returns:
            (N, dim) float32; (dim,) of a single row.

        Raises:
            ZooError: On a row with nothing in it, or an image that cannot be decoded.
        """
        if not self.trained and not self._warned:
            warnings.warn(
                "this model's language model has random weights that nothing was trained or loaded into: its vectors mean nothing yet; "
                "train it, load a run, or build it with pretrained=...",
                stacklevel=2,
            )
            self._warned = True
        return encode(self, rows, output=output or self.outputs[0], batch_size=batch_size, show_progress=show_progress, normalize=normalize)

    def similarity(self, a: Any, b: Any) -> np.ndarray:
        """Cosine of each vector of ``a`` (N, dim) with each of ``b`` (M, dim): (N, M) float32."""
        return similarity(a, b)

    def similarity_pairwise(self, a: Any, b: Any) -> np.ndarray:
        """Cosine of each vector of ``a`` (N, dim) with the one at the same place in ``b`` (N, dim): (N,) float32."""
        return similarity_pairwise(a, b)

    def checkpoint_gradients(self) -> None:
        """Recompute the backbone's activations in the backward pass instead of keeping them."""
        self.backbone.checkpoint_gradients()

    def parts(self) -> Mapping[str, nn.Module]:
        """The settings of `notellm2` that name parts with weights of their own, and what was made for each."""
        return {"backbone": self.backbone} | ({"vision": self.vision} if self.vision is not None else {})


@register(
    "model",
    "notellm2",
    joints=JOINTS,
    paper="Zhang et al., NoteLLM-2, 2024, https://arxiv.org/abs/2405.16789",
)
def notellm2(
    *,
    backbone: BackboneSpec = "qwen",
    vision: EncoderSpec = "clip_vit_b16",
    connector: ConnectorSpec = "qformer",
    num_visual_tokens: Positive | None = None,
    fusion: FusionSpec = ("micl", "gated_late"),  # type: ignore[assignment]
    dim: Positive | None = 64,
    train_vision: bool = False,
    language: Literal["zh", "en"] = "zh",
    absent: Literal["skip", "zeros"] = "skip",
    max_tokens: Positive = 140,
    title_length: Positive = 20,
    content_length: Positive = 80,
    max_topics: Positive = 10,
    ask: Ask | None = None,
) -> NoteLLM2:
    """NoteLLM-2: item vectors from the hidden state at a compressed word, with mICL and gated late fusion.

    Variants by ``fusion``: Base ``early``; +mICL ``micl``; +late ``[early, gated_late]``; NoteLLM-2 ``[micl, gated_late]``; only
    late ``[text_only, gated_late]``; text baseline ``text_only``. Where paper and released code differ (gate's operand order and
    bias, lengths in characters) the code is followed; its random flip at inference and its zero queries are not.

    Args:
        backbone: The language model.
        vision: The image encoder; its CLS vector goes to the late fusion.
        connector: Visual tokens to the backbone's width.
        num_visual_tokens: Of an image, the ``num_queries`` of a connector that has queries; None: as the connector says.
        fusion: Plug-ins for the joints arrange, combine, schedule.
        dim: Width of the vectors; None: the backbone's own.
        train_vision: False freezes the image encoder, as the paper does.
        language: Of the prompt.
        absent: ``skip``: an absent modality has no place in the prompt and weight 0. ``zeros``: as the released code, for parity.
        max_tokens: Of the prompt without its last words.
        title_length: Characters.
        content_length: Characters.
        max_topics: Topics, hashtags of the content included.
        ask: NoteLLM-1's generation, for objective ``answering``: the row's ``category``, or the last of its topics, which the prompt
            then leaves out in training and later alike.

    Raises:
        ZooError: If a fusion does not fit, or a connector cannot bridge the widths.
    """
    joints = compose(fusion, "notellm2", JOINTS)
    arrange: Arrange = joints.make("arrange")
    language_model = make("backbone", backbone)
    looks = arrange.media or joints.combine is not None
    eyes = make("encoder", vision) if looks else None
    if eyes is not None and not train_vision:
        freeze(eyes)
    bridge = (
        make("connector", _sized(connector, num_visual_tokens), eyes.dim, language_model.dim)
        if eyes is not None and arrange.media
        else None
    )
    combine = joints.make("combine", ["note", "image"], language_model.dim)
    processor = NoteProcessor(
        language_model.tokenizer,
        arrange,
        eyes.processor if eyes is not None else None,
        language=language,
        absent=absent,
        max_tokens=max_tokens,
        title_length=title_length,
        content_length=content_length,
        max_topics=max_topics,
        ask=ask,
    )
    schedule = joints.make("schedule", ["text", "image"], dim or language_model.dim, 0)
    return NoteLLM2(language_model, eyes, bridge, combine, schedule, arrange=arrange, processor=processor, dim=dim)


def _sized(connector: Any, tokens: int | None) -> Any:
    """A connector's spec with so many queries."""
    name, given = split_spec(connector)
    if tokens is None:
        return connector
    if given.get("num_queries", tokens) != tokens:
        raise ZooError(f"num_visual_tokens is {tokens} and connector.num_queries {given['num_queries']}: write one of them")
    return {"name": name, **given, "num_queries": tokens}


def _spread(flat: Tensor, real: Tensor) -> Tensor:
    """(I, ...) of the real images to (B, M, ...), zeros elsewhere."""
    out = flat.new_zeros(*real.shape, *flat.shape[1:])
    out[real] = flat
    return out
