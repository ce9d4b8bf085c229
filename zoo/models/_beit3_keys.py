"""How the weights of BEiT-3 are named by Microsoft, and how here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor
from torch.nn import functional as F

from zoo.models._bert_keys import Entry, Mapped, check_named, to_ours, to_theirs
from zoo.models._clip_keys import both

EXPERTS = {"image": "A", "text": "B"}  # ours to theirs
OFFSET = 2  # rows of each table of positions that nothing reads, before the first place
LEFT: Mapping[str, str] = {r"logit_scale$": "the temperature, which the objective has"}  # names of which nothing is kept, and why
OPTIONAL = re.compile(r"pooler\.|head\.|codes_head\.|(image|text)_projection\.")  # what a fine-tuning may be without
OPTIONAL_OF_ANSWERS = re.compile(rf"{OPTIONAL.pattern}|trunk\.norm\.")  # that for questions reads before the last norm, and has none
TABLES = tuple(f"beit3.encoder.embed_positions.{expert}.weight" for expert in EXPERTS.values())
HEADS = {"pooler.norm": "pooler.norm", "pooler.dense": "pooler.dense", "head": "mlm_head", "codes_head": "mim_head"}
MATRICES = {
    "vision.cls": "beit3.vision_embed.cls_token",
    "vision.mask": "beit3.vision_embed.mask_token",
    "vision.places.weight": TABLES[0],
    "embed.words.weight": "beit3.text_embed.weight",
    "embed.places.weight": TABLES[1],
    "image_projection.weight": "vision_head.weight",
    "text_projection.weight": "language_head.weight",
}
LAYERS = {  # of each block, and inside each expert
    "norm1": "self_attn_layer_norm.{}",
    "inner_norm": "self_attn.inner_attn_ln.{}",
    "out": "self_attn.out_proj.{}",
    "norm2": "final_layer_norm.{}",
    "ffn": "ffn.{}",
}
INSIDE = {"fc1": "fc1", "inner_norm": "ffn_layernorm", "fc2": "fc2"}


def from_unilm(theirs: Mapping[str, Tensor]) -> Mapped:
    """Weights of BEiT-3 by our names; a table of positions begins with its first place.

    Raises:
        ZooError: If a layer is there in parts, or numbers are not finite.
    """
    state = {name: x[OFFSET:] if name in TABLES else x for name, x in theirs.items()}
    mapped = to_ours(state, entries(state, r"beit3\.encoder\.layers"))
    known = {name: next((why for left, why in LEFT.items() if re.match(left, name)), why) for name, why in mapped.dropped.items()}
    return mapped._replace(dropped=known)


def to_unilm(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights by Microsoft's names, the temperature left out, which the objective has; rows that nothing reads are 0.

    Raises:
        ZooError: If some have no such name.
    """
    table = [entry for entry in entries(ours, r"trunk\.blocks") if entry.ours in ours]
    check_named(ours, table, "a BEiT-3 of unilm")
    state = to_theirs(ours, table)
    for name in TABLES:
        state[name] = F.pad(state[name], (0, 0, OFFSET, 0))
    return state


def entries(names: Iterable[str], stem: str) -> list[Entry]:
    """The table.

    Args:
        names: Of the weights, from which it shows how many blocks there are.
        stem: A regular expression of what stands before their numbers.
    """
    found = [Entry(ours, ((theirs,),)) for ours, theirs in MATRICES.items()] + both("vision.embed.proj", "beit3.vision_embed.proj")
    for ours, theirs in HEADS.items():
        found += both(ours, theirs)
    for number in sorted({int(match[1]) for name in names if (match := re.match(rf"{stem}\.(\d+)\.", name))}):
        for expert, other in EXPERTS.items():
            found += _block(number, expert, other)
    for expert, other in EXPERTS.items():
        found += both(f"trunk.norm.{expert}", f"beit3.encoder.layer_norm.{other}")
    return found


def _block(number: int, expert: str, other: str) -> list[Entry]:
    ours, theirs = f"trunk.blocks.{number}.", f"beit3.encoder.layers.{number}."
    found = both(f"{ours}qkv.{expert}", *(f"{theirs}self_attn.{part}_proj.{other}" for part in "qkv"))
    for own, name in LAYERS.items():
        place = theirs + name.format(other)
        if own != "ffn":
            found += both(f"{ours}{own}.{expert}", place)
            continue
        for layer, same in INSIDE.items():
            found += both(f"{ours}ffn.{expert}.{layer}", f"{place}.{same}")
    return found
