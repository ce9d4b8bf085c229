"""How the weights of CLIP are named by OpenAI, open_clip and transformers, and how here: tables, read in both directions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from zoo.models._bert_keys import Entry, Mapped, to_ours, to_theirs

LEFT: Mapping[str, str] = {  # names of which nothing is kept, and why
    r"logit_(scale|bias)$": "the temperature, which the objective has",
    r"(input_resolution|context_length|vocab_size)$": "a number that the shapes tell",
    r"(.+\.)?(position_ids|attn_mask)$": "what follows from the longest text",
}
_HF = {  # of each layer of a block, whose names are open_clip's here
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TURNED = ("visual.proj", "text_projection", "text.text_projection")  # (D, E) there, (E, D) here


def from_open_clip(theirs: Mapping[str, Tensor]) -> Mapped:
    """Weights of OpenAI's or open_clip's CLIP by our names; of open_clip's own text models, too, which begin with ``text.``.

    Raises:
        ZooError: If a parameter is there in parts.
    """
    state = turned(theirs, _TURNED)
    prefix = "text." if "text.token_embedding.weight" in state else ""
    table = _open_clip_entries(prefix, _count(state, r"visual\.transformer"), _count(state, rf"{re.escape(prefix)}transformer"))
    return explained(to_ours(state, table))


def to_open_clip(ours: Mapping[str, Tensor], *, prefix: str = "") -> dict[str, Tensor]:
    """Our weights by OpenAI's and open_clip's names, ``logit_scale`` left out, which the objective has.

    Args:
        ours: Of a model whose picture encoder is CLIP's own.
        prefix: ``text.`` for open_clip's custom text models.
    """
    table = _open_clip_entries(prefix, _count(ours, r"vision\.model\.transformer"), _count(ours, r"text\.model\.transformer"))
    return turned(to_theirs(ours, table), _TURNED)


def from_hf_clip(theirs: Mapping[str, Tensor]) -> Mapped:
    """Weights of transformers' CLIPModel by our names.

    Raises:
        ZooError: If a parameter is there in parts.
    """
    counts = (_count(theirs, rf"{tower}_model\.encoder", "layers") for tower in ("vision", "text"))
    return explained(to_ours(theirs, _hf_entries(*counts)))


def to_hf_clip(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights by the names of transformers' CLIPModel, ``logit_scale`` left out."""
    counts = (_count(ours, rf"{tower}\.model\.transformer") for tower in ("vision", "text"))
    return to_theirs(ours, _hf_entries(*counts))


def both(ours: str, *theirs: str) -> list[Entry]:
    """Weight and bias of a layer, there perhaps several, joined along their first axis."""
    return [Entry(f"{ours}.{end}", (tuple(f"{name}.{end}" for name in theirs),)) for end in ("weight", "bias")]


def turned(state: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """The same, those matrices the other way round."""
    return {name: x.T.contiguous() if name in names else x for name, x in state.items()}


def explained(mapped: Mapped) -> Mapped:
    """The same, with why a name was dropped, where it is known."""
    known = {name: next((why for left, why in LEFT.items() if re.match(left, name)), why) for name, why in mapped.dropped.items()}
    return mapped._replace(dropped=known)


def picture_entries(ours: str, blocks: int) -> list[Entry]:
    """open_clip's picture tower up to its last block."""
    found = [Entry(f"{ours}{name}", ((f"visual.{name}",),)) for name in ("conv1.weight", "class_embedding", "positional_embedding")]
    return found + both(f"{ours}ln_pre", "visual.ln_pre") + _open_clip_blocks(f"{ours}transformer.", "visual.transformer.", blocks)


def _open_clip_entries(prefix: str, blocks: int, layers: int) -> list[Entry]:
    names = ("token_embedding.weight", "positional_embedding")
    found = [*picture_entries("vision.model.", blocks), *both("vision.model.ln_post", "visual.ln_post")]
    found += [Entry(f"text.model.{name}", ((f"{prefix}{name}",),)) for name in names]
    found += _open_clip_blocks("text.model.transformer.", f"{prefix}transformer.", layers)
    found += both("text.model.ln_final", f"{prefix}ln_final")
    return [
        *found,
        Entry("image_projection.weight", (("visual.proj",),)),
        Entry("text_projection.weight", ((f"{prefix}text_projection",),)),
    ]


def _open_clip_blocks(ours: str, theirs: str, count: int) -> list[Entry]:
    found = []
    for i in range(count):
        own, other = f"{ours}resblocks.{i}.", f"{theirs}resblocks.{i}."
        found += [Entry(f"{own}attn.in_proj_{end}", ((f"{other}attn.in_proj_{end}",),)) for end in ("weight", "bias")]
        for name in _HF:
            found += both(f"{own}{name}", f"{other}{name}")
    return found


def _hf_entries(blocks: int, layers: int) -> list[Entry]:
    single = {
        "vision.model.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "vision.model.class_embedding": "vision_model.embeddings.class_embedding",
        "vision.model.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "text.model.token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "text.model.positional_embedding": "text_model.embeddings.position_embedding.weight",
        "image_projection.weight": "visual_projection.weight",
        "text_projection.weight": "text_projection.weight",
    }
    found = [Entry(ours, ((theirs,),)) for ours, theirs in single.items()]
    found += both("vision.model.ln_pre", "vision_model.pre_layrnorm")  # their spelling
    found += both("vision.model.ln_post", "vision_model.post_layernorm") + both("text.model.ln_final", "text_model.final_layer_norm")
    for tower, count in (("vision", blocks), ("text", layers)):
        for i in range(count):
            own, other = f"{tower}.model.transformer.resblocks.{i}.", f"{tower}_model.encoder.layers.{i}."
            parts = [f"{other}self_attn.{part}_proj" for part in ("q", "k", "v")]
            found += [Entry(f"{own}attn.in_proj_{end}", (tuple(f"{part}.{end}" for part in parts),)) for end in ("weight", "bias")]
            for name, same in _HF.items():
                found += both(f"{own}{name}", f"{other}{same}")
    return found


def _count(names: Iterable[str], stem: str, kind: str = "resblocks") -> int:
    """How many blocks there are."""
    return len({match[1] for name in names if (match := re.match(rf"{stem}\.{kind}\.(\d+)\.", name))})
