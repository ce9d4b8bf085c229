"""How the weights of ALBEF and BLIP are named where they come from, and how here: one table, read in both directions."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from zoo.errors import ZooError

Program = Literal[
    "albef", "albef_retrieval", "blip", "blip_retrieval", "blip_captioning", "blip_vqa", "hf_blip_retrieval", "hf_blip_captioning",
    "hf_blip_vqa",
]  # fmt: skip


class Spelling(NamedTuple):
    """How a program names the parts of a model."""

    encoder: str | None  # what the names of the BERT that reads begin with; None: there is none
    decoder: str | None  # of the one that writes
    words: str | None  # of what predicts words
    banked: bool  # reading and writing have a self-attention each
    vision: Literal["timm", "transformers"]  # whose names the picture encoder has
    answerer: str | None = None  # of a whole BERT, beside the one that reads, which writes answers to questions


SPELLINGS: Mapping[Program, Spelling] = {
    "albef": Spelling("text_encoder.bert.", None, "text_encoder.cls.predictions.", False, "timm"),
    "albef_retrieval": Spelling("text_encoder.", None, None, False, "timm"),
    "blip": Spelling("text_encoder.", "text_decoder.bert.", "text_decoder.cls.predictions.", True, "timm"),
    "blip_retrieval": Spelling("text_encoder.", None, None, True, "timm"),
    "blip_captioning": Spelling(None, "text_decoder.bert.", "text_decoder.cls.predictions.", True, "timm"),
    "blip_vqa": Spelling("text_encoder.", None, None, True, "timm", "text_decoder."),
    "hf_blip_retrieval": Spelling("text_encoder.", None, None, True, "transformers"),
    "hf_blip_captioning": Spelling(None, "text_decoder.bert.", "text_decoder.cls.predictions.", True, "transformers"),
    "hf_blip_vqa": Spelling("text_encoder.", None, None, True, "transformers", "text_decoder."),
}
LEFT: Mapping[str, str] = {  # names of which nothing is kept, and why
    r"(visual_encoder|text_encoder|text_decoder|vision_proj|text_proj)_m\.": "the momentum twin of training",
    r"(image|text|idx)_queue$": "a queue of training",
    r"(queue_ptr|ptr_queue)$": "the place in a queue of training",
    r"temp$": "the temperature, which the objective has",
    r"logit_scale$": "the temperature, which the objective has",
    r"(.+\.)?position_ids$": "the numbers 0, 1, 2, ...",
    r"(text_encoder|text_decoder\.bert)\.pooler\.": "a pooler that nothing reads",
}


class Entry(NamedTuple):
    """One parameter."""

    ours: str
    theirs: tuple[tuple[str, ...], ...]  # where it is, each place whole by itself; tensors of one place are joined along their first axis


class Mapped(NamedTuple):
    """What another program's weights are here."""

    state: dict[str, Tensor]  # by our names
    absent: list[str]  # our names, for which there was nothing
    dropped: dict[str, str]  # their names, and why nothing was made of them


def spelling_of(names: Collection[str]) -> Program:
    """Whose names these are.

    Raises:
        ZooError: If nobody's.
    """
    has = names.__contains__
    words = "embeddings.word_embeddings.weight"
    hf = has("vision_model.embeddings.class_embedding")
    if has(f"text_encoder.bert.{words}"):
        return "albef"
    if has(f"text_encoder.{words}"):
        if has(f"text_decoder.bert.{words}") and not has("itm_head.weight"):
            return "hf_blip_vqa" if hf else "blip_vqa"
        if has(f"text_decoder.bert.{words}") and not hf:
            return "blip"
        if not has("text_encoder.encoder.layer.0.crossattention.self.query.weight"):
            return "albef_retrieval"
        return "hf_blip_retrieval" if hf else "blip_retrieval"
    if has(f"text_decoder.bert.{words}"):
        return "hf_blip_captioning" if hf else "blip_captioning"
    raise ZooError(f"neither ALBEF's nor BLIP's weights have names such as {', '.join(sorted(names)[:4])}")


def entries_of(program: Program, names: Iterable[str]) -> list[Entry]:
    """The table for weights of which the names, theirs or ours, are known: how many blocks there are follows from them."""
    names = list(names)
    layers, blocks = (
        _count(names, r"(?:.*\.)?(?:encoder\.layer|trunk\.blocks)\.(\d+)\.", r".*_m\.|vision"),
        _count(names, r"(?:visual_encoder\.blocks|vision_model\.encoder\.layers|vision\.model\.blocks)\.(\d+)\."),
    )
    reads = sorted(_numbers(names, r"(?:.*\.)?(?:encoder\.layer\.(\d+)\.crossattention|trunk\.blocks\.(\d+)\.cross)\.", r".*_m\.|vision"))
    return entries(program, layers=layers, cross_layers=reads, blocks=blocks)


def entries(program: Program | Spelling, *, layers: int, cross_layers: Collection[int], blocks: int) -> list[Entry]:
    """The table.

    Args:
        program: Of `SPELLINGS`, or another spelling.
        layers: Of text.
        cross_layers: Those of them that have cross-attention.
        blocks: Of the picture encoder.
    """
    said = program if isinstance(program, Spelling) else SPELLINGS[program]
    found = [*_vision(said.vision, blocks), *_embeddings(said, typed=not said.banked)]
    for i in range(layers):
        found += _layer(said, i, cross=i in cross_layers)
    if said.answerer is not None:
        found += _answerer(said.answerer, layers)
    elif said.encoder is not None:
        for ours, each in (("image_projection", "vision_proj"), ("text_projection", "text_proj"), ("matches", "itm_head")):
            found += _both(ours, [(each,)])
    return found + _head(said)


def to_ours(theirs: Mapping[str, Tensor], table: Sequence[Entry]) -> Mapped:
    """Weights of another program by our names.

    Raises:
        ZooError: If a parameter that the table knows is there in parts, or in parts of several shapes, is not finite, or is in two places
            with two values: BLIP's encoder and decoder share most of theirs, but of a fine-tuning for questions and answers.
    """
    state: dict[str, Tensor] = {}
    absent: list[str] = []
    used: set[str] = set()
    for entry in table:
        places = [place for place in entry.theirs if any(name in theirs for name in place)]
        if broken := [name for place in places for name in place if name not in theirs]:
            raise ZooError(f"these weights have no {broken[0]}, and others of its layer: the file is not whole")
        used.update(name for place in places for name in place)
        values = [_joined(theirs, place) for place in places]
        if not values:
            absent.append(entry.ours)
            continue
        if not values[0].isfinite().all():
            raise ZooError(f"{places[0][0]} holds numbers that are not finite: these weights diverged, or the file is damaged")
        if differing := [place for place, value in zip(places, values, strict=True) if not torch.equal(value, values[0])]:
            raise ZooError(f"{places[0][0]} and {differing[0][0]} are one parameter in this model, and differ in these weights")
        state[entry.ours] = values[0].contiguous()
    dropped = {name: next((why for left, why in LEFT.items() if re.match(left, name)), "unknown") for name in theirs if name not in used}
    return Mapped(state, absent, dropped)


def _joined(theirs: Mapping[str, Tensor], place: Sequence[str]) -> Tensor:
    """What is in one place, its tensors one after the other.

    Raises:
        ZooError: If they are not of one shape.
    """
    parts = [theirs[name] for name in place]
    if len(parts) == 1:
        return parts[0]
    if not parts[0].ndim or any(part.shape != parts[0].shape for part in parts):
        told = ", ".join(f"{name} {tuple(part.shape)}" for name, part in zip(place, parts, strict=True))
        raise ZooError(f"{told} are read as one weight, and should be of one shape: the file is damaged")
    return torch.cat(parts)


def to_theirs(ours: Mapping[str, Tensor], table: Sequence[Entry]) -> dict[str, Tensor]:
    """Our weights by another program's names; each parameter in every place where that program has it. What it lacks is left out."""
    state: dict[str, Tensor] = {}
    for entry in table:
        for place in entry.theirs:
            state.update(zip(place, (part.clone() for part in ours[entry.ours].chunk(len(place))), strict=True))
    return state


def check_named(ours: Collection[str], table: Sequence[Entry], whose: str) -> None:
    """Refuse weights that the table has no name for.

    Raises:
        ZooError: If there are any.
    """
    known = {entry.ours for entry in table}
    if left := [name for name in ours if name not in known]:
        more = f" and {len(left) - 4} more" if len(left) > 4 else ""
        raise ZooError(f"{whose} has nothing like {', '.join(left[:4])}{more}, which this model has")


def _answerer(prefix: str, layers: int) -> list[Entry]:
    """A BERT that writes, all of whose blocks read."""
    said = Spelling(None, f"{prefix}bert.", f"{prefix}cls.predictions.", False, "timm")
    found = [*_embeddings(said, typed=False), *_head(said)]
    for i in range(layers):
        found += _layer(said, i, cross=True)
    return [entry._replace(ours=f"answerer.{entry.ours}") for entry in found]


def _head(said: Spelling) -> list[Entry]:
    """What predicts words."""
    if said.words is None:
        return []
    found = []
    for ours, each in (("head.dense", "dense"), ("head.norm", "LayerNorm")):
        found += _both(ours, [(f"{said.words}transform.{each}",)])
    return [*found, Entry("head.bias", ((f"{said.words}bias",), (f"{said.words}decoder.bias",)))]


def _both(ours: str, theirs: Sequence[tuple[str, ...]]) -> list[Entry]:
    """Weight and bias of a layer."""
    return [Entry(f"{ours}.{end}", tuple(tuple(f"{name}.{end}" for name in place) for place in theirs)) for end in ("weight", "bias")]


def _embeddings(said: Spelling, *, typed: bool) -> list[Entry]:
    prefixes = [f"{prefix}embeddings." for prefix in (said.encoder, said.decoder) if prefix is not None]
    words = [(f"{prefix}word_embeddings.weight",) for prefix in prefixes]
    if said.words is not None:
        words.append((f"{said.words}decoder.weight",))
    places = tuple((f"{prefix}position_embeddings.weight",) for prefix in prefixes)
    kinds = tuple((f"{prefix}token_type_embeddings.weight",) for prefix in prefixes)
    found = [Entry("embed.words.weight", tuple(words)), Entry("embed.places.weight", places)]
    found += [Entry("embed.kinds.weight", kinds)] if typed else []
    return found + _both("embed.norm", [(f"{prefix}LayerNorm",) for prefix in prefixes])


def _layer(said: Spelling, number: int, *, cross: bool) -> list[Entry]:
    """One layer of BERT; with banks the self-attention of the encoder and of the decoder are two, and the rest is one."""
    ours = f"trunk.blocks.{number}."
    stems = {
        bank: f"{prefix}encoder.layer.{number}."
        for bank, prefix in (("encode", said.encoder), ("decode", said.decoder))
        if prefix is not None
    }
    found = []
    for bank, stem in stems.items():
        end, attention = f".{bank}" if said.banked else "", f"{stem}attention."
        found += _both(f"{ours}qkv{end}", [tuple(f"{attention}self.{each}" for each in ("query", "key", "value"))])
        found += _both(f"{ours}out{end}", [(f"{attention}output.dense",)])
        found += _both(f"{ours}norm1{end}", [(f"{attention}output.LayerNorm",)])
    shared: dict[str, tuple[str, ...]] = {"ffn.fc1": ("intermediate.dense",), "ffn.fc2": ("output.dense",), "norm2": ("output.LayerNorm",)}
    if cross:
        shared |= {
            "cross.q": ("crossattention.self.query",),
            "cross.kv": ("crossattention.self.key", "crossattention.self.value"),
            "cross.out": ("crossattention.output.dense",),
            "cross.norm": ("crossattention.output.LayerNorm",),
        }
    for name, theirs in shared.items():
        found += _both(f"{ours}{name}", [tuple(f"{stem}{each}" for each in theirs) for stem in stems.values()])
    return found


def _vision(style: Literal["timm", "transformers"], blocks: int) -> list[Entry]:
    """The picture encoder, which is timm's here."""
    hf = style == "transformers"
    root = "vision_model." if hf else "visual_encoder."
    theirs = {
        "cls_token": "embeddings.class_embedding",
        "pos_embed": "embeddings.position_embedding",
        "patch_embed.proj": "embeddings.patch_embedding",
        "norm": "post_layernorm",
    }
    inside = {"norm1": "layer_norm1", "attn.qkv": "self_attn.qkv", "attn.proj": "self_attn.projection", "norm2": "layer_norm2"}
    inside |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for i in range(blocks):
        theirs |= {f"blocks.{i}.{own}": f"encoder.layers.{i}.{other}" for own, other in inside.items()}
    found = []
    for own, other in theirs.items():
        ours, place = f"vision.model.{own}", f"{root}{other if hf else own}"
        found += [Entry(ours, ((place,),))] if own in ("cls_token", "pos_embed") else _both(ours, [(place,)])
    return found


def _numbers(names: Iterable[str], pattern: str, but: str = r"$^") -> set[int]:
    """Which numbers stand in the group of ``pattern``, in names that ``but`` does not match."""
    matches = (re.match(pattern, name) for name in names if not re.match(but, name))
    return {int(next(filter(None, match.groups()))) for match in matches if match}


def _count(names: Iterable[str], pattern: str, but: str = r"$^") -> int:
    return len(_numbers(names, pattern, but))
