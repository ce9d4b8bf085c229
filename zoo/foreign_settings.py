"""What a model of the zoo has to be like to hold the weights of another program, by their shapes and by the config beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from zoo.encoders._image import CLIP_MEAN, CLIP_STD
from zoo.errors import ZooError
from zoo.foreign import Foreign, entry, layers, side
from zoo.models import albef, blip, clip, coca, visual_tokenizer
from zoo.models._bert import picture_encoder
from zoo.models._bert_keys import SPELLINGS, Program
from zoo.models._vqkd_keys import CODES, blocks_in

VITS = {  # width, side of a patch: timm's name, blocks, heads; all widen four times, with norms of eps 1e-6
    (192, 16): ("vit_tiny_patch16_224", 12, 3),
    (384, 16): ("vit_small_patch16_224", 12, 6),
    (768, 16): ("vit_base_patch16_224", 12, 12),
    (1024, 16): ("vit_large_patch16_224", 24, 16),
}
CLIP_WORDS = 49408


class Sight(NamedTuple):
    """A vision transformer, as its weights show it."""

    width: int
    patch: int
    blocks: int
    image_size: int
    hidden: int


def bert_settings(program: Program, foreign: Foreign) -> tuple[str, dict[str, Any]]:
    """The model's name and settings for weights of ALBEF or BLIP.

    Raises:
        ZooError: If no size that the zoo has is like them.
    """
    state, said, where = foreign.state, SPELLINGS[program], foreign.path
    name, sizes = ("blip", blip.SIZES) if said.banked else ("albef", albef.SIZES)
    stem = said.encoder or said.decoder
    rows, width = entry(state, f"{stem}embeddings.word_embeddings.weight", where, 2).shape
    places = len(entry(state, f"{stem}embeddings.position_embeddings.weight", where, 2))
    hidden = len(entry(state, f"{stem}encoder.layer.0.intermediate.dense.weight", where, 2))
    blocks = layers(state, f"{stem}encoder.layer.")
    cross = [i for i in range(blocks) if f"{stem}encoder.layer.{i}.crossattention.self.query.weight" in state]
    sight = _sight(state, said.vision, where)
    fits = {key: of for key, of in sizes.items() if (of.width, of.places, 4 * of.width) == (width, places, hidden)}
    if not fits:
        has = ", ".join(f"{key} {of.width} and {of.places}" for key, of in sizes.items())
        raise ZooError(
            f"{where}: its texts are {width} wide, {hidden} inside, with {places} places, and {name} has no such size (has: {has})"
        )
    vision = _encoder(sight, foreign, where)
    size = next((key for key, of in fits.items() if of.vision.get("arch") == vision["arch"]), next(iter(fits)))
    of = fits[size]
    _same_heads(foreign.config.get("text_config", {}), of.heads, "texts", where)
    settings: dict[str, Any] = {"size": size, "vision": vision, "vocab_size": rows, "layers": blocks}
    if (proj := state.get("vision_proj.weight")) is not None:
        settings["dim"] = len(proj)
    if said.answerer is not None:
        settings["answerer"] = True
    if name == "albef":
        settings["ends"] = False  # as its authors' tokenizer
    settings |= _reads(cross, blocks, name)
    if (where.parent / "tokenizer.json").is_file():
        settings["vocabulary"] = str(where.parent)
    return name, settings


def clip_settings(program: str, foreign: Foreign) -> tuple[str, dict[str, Any]]:
    """The same, of CLIP and CoCa.

    Args:
        program: ``openai``, ``open_clip``, ``open_clip_coca`` or ``hf_clip``.
        foreign: The weights.

    Raises:
        ZooError: As `bert_settings`, or if they want pixels of other colours.
    """
    state, where, name = foreign.state, foreign.path, "coca" if program == "open_clip_coca" else "clip"
    hf, text = program == "hf_clip", "text." if "text.token_embedding.weight" in state else ""
    see, tower = ("vision_model.embeddings.", "text_model.embeddings.") if hf else ("visual.", text)
    width, _, patch, _ = entry(state, see + ("patch_embedding.weight" if hf else "conv1.weight"), where, 4).shape
    seen = see + ("position_embedding.weight" if hf else "positional_embedding")
    grid = side(len(entry(state, seen, where, 2)) - 1, seen, where)
    rows, wide = entry(state, f"{tower}token_embedding.weight", where, 2).shape
    places = len(entry(state, tower + ("position_embedding.weight" if hf else "positional_embedding"), where, 2))
    stems = (
        ("vision_model.encoder.layers.", "text_model.encoder.layers.")
        if hf
        else ("visual.transformer.resblocks.", f"{text}transformer.resblocks.")
    )
    inner = "0.mlp.fc1.weight" if hf else "0.mlp.c_fc.weight"
    shape = (width, patch, layers(state, stems[0]), len(entry(state, stems[0] + inner, where, 2)))
    words = (wide, layers(state, stems[1]), len(entry(state, stems[1] + inner, where, 2)))
    size, pictures, texts = _clip_size(name, shape, words, where)
    dim = len(entry(state, "text_projection.weight", where, 2)) if hf else entry(state, f"{text}text_projection", where, 2).shape[1]
    _same_clip(foreign, hf, pictures.heads, texts.heads)
    settings: dict[str, Any] = {"size": size, "image_size": grid * patch, "vocab_size": rows, "dim": dim}
    if name == "coca":
        queries = len(entry(state, "visual.attn_pool.query", where, 2))
        return name, settings | {"length": places - 1, "queries": queries, "legacy_cls_mask": True}
    settings |= {"length": places, "activation": _activation(program, foreign.config)}
    if rows == CLIP_WORDS:
        settings["vocabulary"] = "clip"
    elif (where.parent / "tokenizer.json").is_file():
        settings["vocabulary"] = str(where.parent)
    return name, settings


def vqkd_settings(foreign: Foreign) -> tuple[str, dict[str, Any]]:
    """The same, of a visual tokenizer of BEiT v2.

    Raises:
        ZooError: As `bert_settings`.
    """
    state, where = foreign.state, foreign.path
    width, _, patch, _ = entry(state, "encoder.patch_embed.proj.weight", where, 4).shape
    codes, code_dim = entry(state, CODES, where, 2).shape
    shape = (width, blocks_in(state, "encoder"), len(entry(state, "encoder.blocks.0.mlp.fc1.weight", where, 2)), code_dim)
    has = {key: (of.width, of.layers, 4 * of.width, of.code_dim) for key, of in visual_tokenizer.SIZES.items()}
    size = next((key for key, own in has.items() if own == shape), None)
    if size is None:
        raise ZooError(
            f"{where}: its encoder and codes are {shape} (width, blocks, width inside, width of a code), and visual_tokenizer has no such "
            f"size (has: {', '.join(f'{key} {own}' for key, own in has.items())})"
        )
    grid = side(entry(state, "encoder.pos_embed", where, 3).shape[1] - 1, "encoder.pos_embed", where)
    taught = len(entry(state, "decode_task_layer.2.weight", where, 2))
    return "visual_tokenizer", {
        "size": size,
        "image_size": grid * patch,
        "patch": patch,
        "codes": codes,
        "decoder_layers": blocks_in(state, "decoder"),
        "taught": taught,
    }


def _clip_size(name: str, shape: tuple[int, ...], words: tuple[int, ...], where: Path) -> tuple[str, Any, Any]:
    """The size of these widths, and both of its towers.

    Raises:
        ZooError: If there is none.
    """
    sizes: Mapping[str, Any] = clip.SIZES if name == "clip" else {key: of for key, of in coca.SIZES.items() if of.form == "open_clip"}
    has = {}
    for key, of in sizes.items():
        see, read = of.pictures, of.texts
        has[key] = (see.width, see.patch, see.layers, see.hidden or 4 * see.width), (read.width, read.layers, read.hidden or 4 * read.width)
        if has[key] == (shape, words):
            return key, see, read
    listed = "\n".join(f"  {key}: pictures {own}, texts {other}" for key, (own, other) in has.items())
    raise ZooError(
        f"{where}: pictures are {shape} (width, side of a patch, blocks, width inside), texts {words} (width, blocks, width inside), and "
        f"{name} has no such size; it has\n{listed}"
    )


def _same_clip(foreign: Foreign, hf: bool, see: int, read: int) -> None:
    """Whether what a config says besides the shapes is as in our models."""
    config, where = foreign.config, foreign.path
    if hf:
        _same_heads(config.get("vision_config", {}), see, "pictures", where)
        _same_heads(config.get("text_config", {}), read, "texts", where)
        return
    cfg, pixels = config.get("model_cfg", {}), config.get("preprocess_cfg", {})
    vision = cfg.get("vision_cfg", {})
    heads = {"num_attention_heads": vision["width"] // vision.get("head_width", 64)} if "width" in vision else {}
    _same_heads(heads, see, "pictures", where)
    _same_heads({"num_attention_heads": cfg["text_cfg"]["heads"]} if "heads" in cfg.get("text_cfg", {}) else {}, read, "texts", where)
    if any(tuple(pixels.get(key, own)) != own for key, own in (("mean", CLIP_MEAN), ("std", CLIP_STD))):
        raise ZooError(f"{where.parent}: pixels have the mean {pixels.get('mean')} and std {pixels.get('std')}, and CLIP's others here")


def _activation(program: str, config: Mapping[str, Any]) -> str:
    """``quick_gelu`` or ``gelu``; where nothing says it, what most weights of this program want."""
    if program == "openai":
        return "quick_gelu"
    if program == "hf_clip":
        return str(config.get("text_config", {}).get("hidden_act", "quick_gelu"))
    return "quick_gelu" if config.get("model_cfg", {}).get("quick_gelu", False) else "gelu"


def _reads(cross: list[int], blocks: int, name: str) -> dict[str, Any]:
    """Which blocks read the picture, if not those that the model would have on its own."""
    first = cross[0] if cross else blocks
    if first == (blocks // 2 if name == "albef" else 0):
        return {}
    return {"fusion": {"name": "cross_attention", "from_layer": first}}


def _sight(state: Mapping[str, Tensor], style: str, where: Path) -> Sight:
    stem, conv, place, blocks, inner = (
        ("vision_model.", "embeddings.patch_embedding.weight", "embeddings.position_embedding", "encoder.layers.", "mlp.fc1.weight")
        if style == "transformers"
        else ("visual_encoder.", "patch_embed.proj.weight", "pos_embed", "blocks.", "mlp.fc1.weight")
    )
    width, _, patch, _ = entry(state, stem + conv, where, 4).shape
    grid = side(entry(state, stem + place, where, 3).shape[1] - 1, stem + place, where)
    return Sight(width, patch, layers(state, stem + blocks), grid * patch, len(entry(state, f"{stem}{blocks}0.{inner}", where, 2)))


def _encoder(sight: Sight, foreign: Foreign, where: Path) -> dict[str, Any]:
    """The picture encoder of timm that is like it.

    Raises:
        ZooError: If there is none.
    """
    found = VITS.get((sight.width, sight.patch))
    if found is None or sight.blocks > found[1] or sight.hidden != 4 * sight.width:
        has = ", ".join(f"{width} wide with patches of {patch} and up to {n} blocks" for (width, patch), (_, n, _) in VITS.items())
        raise ZooError(
            f"{where}: its picture encoder is {sight.width} wide, {sight.hidden} inside, with patches of {sight.patch} and {sight.blocks} "
            f"blocks, and none is known that is so (known: {has})"
        )
    arch, blocks, heads = found
    _same_heads(foreign.config.get("vision_config", {}), heads, "pictures", where)
    return picture_encoder(arch, sight.image_size) | ({} if sight.blocks == blocks else {"layer": sight.blocks - 1})


def _same_heads(config: Mapping[str, Any], heads: int, what: str, where: Path) -> None:
    """Shapes do not tell how many heads there are; a config does."""
    if (said := config.get("num_attention_heads", heads)) != heads:
        raise ZooError(f"the config in {where.parent} says {said} heads for {what}, and models of these widths have {heads} here")
