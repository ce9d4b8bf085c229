"""What a VLMo or a BEiT-3 of the zoo has to be like to hold the weights of Microsoft, by their shapes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from zoo.errors import ZooError
from zoo.foreign import Foreign, entry, layers, side
from zoo.models import _beit3_keys, _vlmo_keys, beit_3, vlmo
from zoo.models._bert_keys import Mapped

logger = logging.getLogger("zoo.convert")
_BETWEEN = 2  # rows of VLMo's table between those of pictures, with three of the class token, and twice the longest text of texts
PROGRAMS = ("vlmo", "beit", "beit3")


def joint_program(state: Mapping[str, Tensor]) -> str | None:
    """Which of `PROGRAMS` wrote weights of these names; None: none."""
    if any(name.startswith("transformer.blocks.0.") and "_imag." in name for name in state):
        return "vlmo"
    if any(name.startswith("beit3.") for name in state):
        return "beit3"
    return "beit" if "blocks.0.attn.relative_position_bias_table" in state and "blocks.0.mlp.fc1.weight" in state else None


def joint_weights(program: str, foreign: Foreign) -> tuple[str, dict[str, Any], Mapped]:
    """The model's name, its settings, and the weights by its names.

    Args:
        program: Of `PROGRAMS`; ``beit`` are pictures alone, with which VLMo begins.
        foreign: The weights.

    Raises:
        ZooError: If no size is like them, or something that no such file is without is not there.
    """
    if program == "beit3":
        name, settings = "beit_3", _beit3(foreign)
        mapped, optional = _beit3_keys.from_unilm(foreign.state), _beit3_keys.OPTIONAL
        optional = _beit3_keys.OPTIONAL_OF_ANSWERS if "head.0.weight" in foreign.state else optional
    elif program == "vlmo":
        name, settings = "vlmo", _vlmo(foreign)
        mapped, optional = _vlmo_keys.from_unilm(foreign.state), _vlmo_keys.OPTIONAL
    else:
        name, settings = "vlmo", _beit(foreign)
        words = _BETWEEN + 2 * (vlmo.SIZES[settings["size"]].relative or 0)
        mapped, optional = _vlmo_keys.from_beit(foreign.state, words), _vlmo_keys.OPTIONAL_OF_BEIT
    if kept := _answers(program, foreign.state):
        name, settings, mapped = _headed(name, settings, mapped, kept, foreign)
    if missing := [key for key in mapped.absent if not optional.match(key)]:
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        raise ZooError(f"{foreign.path} has nothing for {', '.join(missing[:8])}{more} of the model {name}: the file is not whole")
    if (foreign.path.parent / "tokenizer.json").is_file():
        settings.get("base", settings)["vocabulary"] = str(foreign.path.parent)
    elif program == "beit3":
        logger.warning(
            "the words of %s are those of beit3.spm, which is not here: the ids that the default vocabulary gives mean others; write "
            "vocabulary=DIR with the folder that transformers' XLMRobertaTokenizerFast saves of it",
            foreign.path,
        )
    return name, settings, mapped


def _answers(program: str, state: Mapping[str, Tensor]) -> dict[str, str]:
    """{ours: theirs} of the layers of a head of classes, none where there is no such head."""
    if program == "vlmo":
        stem = next((stem for stem in ("vqa_classifier", "nlvr2_classifier") if f"{stem}.0.weight" in state), None)
        return {} if stem is None else {f"answers.{i}": f"{stem}.{i}" for i in (0, 1, 3)}
    if program == "beit3" and "head.dense1.weight" in state:
        return {f"answers.{i}": f"head.{layer}" for i, layer in ((0, "norm1"), (1, "dense1"), (2, "norm2"), (4, "dense2"))}
    return {f"answers.{i}": f"head.{i}" for i in (0, 1, 3)} if program == "beit3" and "head.0.weight" in state else {}


def _headed(
    name: str, settings: dict[str, Any], mapped: Mapped, kept: Mapping[str, str], foreign: Foreign
) -> tuple[str, dict[str, Any], Mapped]:
    """The same as a model that tells answers to questions, or whether a sentence is true of two pictures."""
    absolute = "transformer.pos_embed" in foreign.state
    if name == "vlmo":
        parts, table = vlmo.Vlmo.asks_with, _vlmo_keys.entries(foreign.state, "transformer.blocks", absolute=absolute)
    else:
        parts, table = beit_3.Beit3.asks_with, _beit3_keys.entries(foreign.state, r"beit3\.encoder\.layers")
    ends = {f"{ours}.{end}": f"{theirs}.{end}" for ours, theirs in kept.items() for end in ("weight", "bias")}
    state = {key: x for key, x in mapped.state.items() if key.split(".")[0] in parts}
    state |= {ours: entry(foreign.state, theirs, foreign.path) for ours, theirs in ends.items()}
    dropped = {key: why for key, why in mapped.dropped.items() if key not in ends.values()}
    others = [key for of in table if of.ours.split(".")[0] not in parts for place in of.theirs for key in place]
    dropped |= {key: "a head of pre-training, which answers do not read" for key in others if key in foreign.state}
    mapped = mapped._replace(state=state, dropped=dropped)
    base = {"name": name, **settings}
    if "nlvr2_classifier.0.weight" in foreign.state or "head.dense1.weight" in foreign.state:
        return "nlvr2", {"base": base, "normed": name == "beit_3"}, mapped
    return "vqa", {"base": base, "classes": len(entry(foreign.state, f"{kept['answers.3']}.weight", foreign.path, 2))}, mapped


def _vlmo(foreign: Foreign) -> dict[str, Any]:
    state, where = foreign.state, foreign.path
    settings = _trunk(foreign, "transformer.", vlmo.SIZES, entry(state, "transformer.blocks.0.mlp_imag.fc1.weight", where, 2))
    size, depth = vlmo.SIZES[settings["size"]], settings["layers"]
    places = "text_embeddings.position_embeddings.weight"
    settings["length"] = len(entry(state, places, where, 2)) if places in state else size.length
    settings["image_size"] = settings["patch"] * _grid(state, size, settings["length"], depth, where)
    settings["vocab_size"] = len(entry(state, "text_embeddings.word_embeddings.weight", where, 2))
    first = next((i for i in range(depth) if f"transformer.blocks.{i}.norm2_vl.weight" in state), depth)
    if first != max(0, size.first + depth - size.layers):
        settings["fusion"] = {"name": "mome", "from_layer": first}
    return settings | {"two_scale": "itc_vl_text_proj.fc.weight" in state}


def _beit(foreign: Foreign) -> dict[str, Any]:
    state, where = foreign.state, foreign.path
    settings = _trunk(foreign, "", vlmo.SIZES, entry(state, "blocks.0.mlp.fc1.weight", where, 2))
    size, depth, name = vlmo.SIZES[settings["size"]], settings["layers"], "blocks.0.attn.relative_position_bias_table"
    rows, heads = entry(state, name, where, 2).shape
    if heads != size.heads or size.relative is None:
        raise ZooError(f"{where}: {name} is of {heads} heads, and vlmo of this width has {size.heads} and {_kind(size)} positions")
    for number in range(1, depth):
        other = f"blocks.{number}.attn.relative_position_bias_table"
        if entry(state, other, where, 2).shape != (rows, heads):
            raise ZooError(f"{where}: {other} is of shape {tuple(state[other].shape)}, and should be {(rows, heads)} as {name}")
    settings["image_size"] = settings["patch"] * _window(rows - 3, f"{name} of {rows} rows", where)
    return settings | {"fusion": {"name": "mome", "from_layer": depth}, "two_scale": False}


def _beit3(foreign: Foreign) -> dict[str, Any]:
    state, where = foreign.state, foreign.path
    sizes = {name: of for name, of in beit_3.SIZES.items() if of.fusion == "multiway"}
    width, _, patch, _ = entry(state, "beit3.vision_embed.proj.weight", where, 4).shape
    fits = {name: of for name, of in sizes.items() if of.width == width}
    if not fits:
        raise ZooError(_no_size("beit_3", width, {name: of.width for name, of in sizes.items()}, foreign))
    name, of = next(iter(fits.items()))
    hidden = len(entry(state, "beit3.encoder.layers.0.ffn.A.fc1.weight", where, 2))
    places, _ = (len(entry(state, table, where, 2)) - _beit3_keys.OFFSET - 1 for table in _beit3_keys.TABLES)
    settings: dict[str, Any] = {"size": name, "patch": patch, "image_size": patch * side(places, _beit3_keys.TABLES[0], where)}
    settings |= {"layers": layers(state, "beit3.encoder.layers."), "vocab_size": len(entry(state, "beit3.text_embed.weight", where, 2))}
    settings |= {"hidden": hidden} if hidden != of.hidden else {}
    return settings | ({"codes": len(entry(state, "mim_head.weight", where, 2))} if "mim_head.weight" in state else {})


def _trunk(foreign: Foreign, stem: str, sizes: Mapping[str, vlmo.Size], inside: Tensor) -> dict[str, Any]:
    """The size of this width, the side of a patch, and the blocks."""
    width, _, patch, _ = entry(foreign.state, f"{stem}patch_embed.proj.weight", foreign.path, 4).shape
    fits = [name for name, of in sizes.items() if of.width == width]
    if not fits:
        raise ZooError(_no_size("vlmo", width, {name: of.width for name, of in sizes.items()}, foreign))
    settings: dict[str, Any] = {"size": fits[0], "patch": patch, "layers": layers(foreign.state, f"{stem}blocks.")}
    return settings | ({} if len(inside) == 4 * width else {"hidden": len(inside)})


def _grid(state: Mapping[str, Tensor], size: vlmo.Size, length: int, depth: int, where: Any) -> int:
    """How many patches are a side.

    Raises:
        ZooError: If positions are not of the kind, or of the number, that this size has.
    """
    table, absolute = "relative_position_bias_table", "transformer.pos_embed"
    if (size.relative is None) != (table not in state) or (table in state) == (absolute in state):
        raise ZooError(f"{where}: vlmo of this width has {_kind(size)} positions, and these weights have others, or none")
    if absolute in state:
        return side(entry(state, absolute, where, 3).shape[1] - 1, absolute, where)
    assert size.relative is not None
    rows, columns = entry(state, table, where, 2).shape
    if columns != depth * size.heads:
        raise ZooError(f"{where}: its table of relative positions is of {columns} heads, not {depth} times {size.heads}")
    longest = max(size.relative, length)
    told = f"the table of relative positions of {rows} rows, for texts of up to {longest},"
    return _window(rows - 3 - _BETWEEN - 2 * longest, told, where)


def _window(offsets: int, what: str, where: Any) -> int:
    """The side of a square of patches that can be as many offsets apart."""
    found = (round(max(offsets, 0) ** 0.5) + 1) // 2
    if (2 * found - 1) ** 2 != offsets:
        raise ZooError(f"{where}: {what} is of no square of patches")
    return found


def _kind(size: vlmo.Size) -> str:
    return "absolute" if size.relative is None else "relative"


def _no_size(name: str, width: int, sizes: Mapping[str, int], foreign: Foreign) -> str:
    has = ", ".join(f"{size} {wide}" for size, wide in sizes.items())
    return f"{foreign.path}: it is {width} wide, and {name} has no such size (has: {has})"
