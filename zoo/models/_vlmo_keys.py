"""How the weights of VLMo, and of the BEiT that it begins from, are named by Microsoft, and how here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from zoo.models._bert_keys import Entry, Mapped, check_named, to_ours, to_theirs
from zoo.models._clip_keys import both

EXPERTS = {"text": "text", "image": "imag", "vl": "vl"}  # ours to theirs
LEFT: Mapping[str, str] = {  # names of which nothing is kept, and why
    r"logit_(vl_)?scale$": "the temperature, which the objective has",
    r"(.*\.)?(text_|text_imag_)?relative_position_index$": "what follows from the sizes of pictures and texts",
    r"text_embeddings\.position_ids$": "the numbers 0, 1, 2, ...",
    r"text_embeddings\.position_embeddings\.weight$": "positions that nothing reads, for attention knows how far apart words are",
}
OPTIONAL = re.compile(
    r"vision\.mask$|pooler\.|matches\.|head\.|(pair_)?(image|text)_projection\."
)  # what a stage or a fine-tuning may be without
OPTIONAL_OF_BEIT = re.compile(rf"{OPTIONAL.pattern}|(embed|kinds|trunk\.norm)\.|trunk\.blocks\.\d+\.(norm2|ffn)\.text\.")
HEADS = {  # of what a layer is a part: ours to theirs
    "pooler": "pooler.dense",
    "matches": "itm_score.fc",
    "head.dense": "mlm_score.transform.dense",
    "head.norm": "mlm_score.transform.LayerNorm",
}
MATRICES = {
    "head.words.weight": "mlm_score.decoder.weight",
    "head.words.bias": "mlm_score.bias",
    "image_projection.weight": "itc_image_proj.fc.weight",
    "text_projection.weight": "itc_text_proj.fc.weight",
    "pair_image_projection.weight": "itc_vl_image_proj.fc.weight",
    "pair_text_projection.weight": "itc_vl_text_proj.fc.weight",
    "embed.words.weight": "text_embeddings.word_embeddings.weight",
    "embed.kinds.weight": "text_embeddings.token_type_embeddings.weight",
    "kinds.weight": "token_type_embeddings.weight",
}


def from_unilm(theirs: Mapping[str, Tensor]) -> Mapped:
    """Weights of VLMo by our names.

    Where pictures come alone, the token type of a second one is that of the first, with which its authors begin it.

    Raises:
        ZooError: If numbers are not finite.
    """
    state = dict(theirs)
    absolute = "transformer.pos_embed" in state
    kinds = state.get("token_type_embeddings.weight")
    if kinds is not None and kinds.ndim == 2 and len(kinds) == 2:
        state["token_type_embeddings.weight"] = torch.cat([kinds, kinds[1:]])
    if absolute:
        state["transformer.pos_embed"] = state["transformer.pos_embed"].squeeze(0)  # (1, 1 + P, D)
    return _explained(to_ours(state, entries(theirs, "transformer.blocks", absolute=absolute)))


def from_beit(theirs: Mapping[str, Tensor], words: int) -> Mapped:
    """Weights of a BEiT of pictures as those of a VLMo in its first stage: they are the image's experts, and all that is shared.

    Args:
        theirs: By the names of BEiT; each block has a table of relative positions.
        words: How many rows our table has behind those of pictures: they begin at 0.
    """
    state: dict[str, Tensor] = {}
    tables: dict[int, Tensor] = {}
    for name, x in theirs.items():
        if match := re.match(r"blocks\.(\d+)\.attn\.relative_position_bias_table$", name):
            tables[int(match[1])] = x
        else:
            state["transformer." + re.sub(r"\.(mlp|norm2)\.", r".\1_imag.", name)] = x
    joined = torch.cat([tables[number] for number in sorted(tables)], 1)  # (rows of pictures, blocks * heads)
    state["relative_position_bias_table"] = torch.cat([joined, joined.new_zeros(words, joined.shape[1])])
    mapped = to_ours(state, entries(state, "transformer.blocks", absolute=False))
    dropped = {name.removeprefix("transformer."): why for name, why in mapped.dropped.items()}
    left = {name: "a head that VLMo has not" for name in dropped if re.match(r"(fc_norm|head|lm_head)\.", name)}
    return _explained(mapped._replace(dropped={**dropped, **left}))


def to_unilm(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights by Microsoft's names, left out the two temperatures, which the objective has, and what hides a patch.

    Raises:
        ZooError: If some have no such name.
    """
    ours = {name: x for name, x in ours.items() if name != "vision.mask"}
    absolute = "vision.places.weight" in ours
    table = [entry for entry in entries(ours, r"trunk\.blocks", absolute=absolute) if entry.ours in ours]
    check_named(ours, table, "a VLMo of unilm")
    state = to_theirs(ours, table)
    if absolute:
        state["transformer.pos_embed"] = state["transformer.pos_embed"][None]
    return state


def entries(names: Iterable[str], stem: str, *, absolute: bool) -> list[Entry]:
    """The table.

    Args:
        names: Of the weights, from which it shows how many blocks there are.
        stem: A regular expression of what stands before their numbers.
        absolute: Whether positions are absolute, and there are no factors of sub-layers.
    """
    names = list(names)
    numbers = sorted({int(match[1]) for name in names if (match := re.match(rf"{stem}\.(\d+)\.", name))})
    paired = {int(match[1]) for name in names if (match := re.match(rf"{stem}\.(\d+)\.(?:norm2_vl|norm2\.vl)\.", name))}
    single = {"vision.cls": "transformer.cls_token", "vision.mask": "transformer.mask_token", **MATRICES}
    if absolute:
        single |= {"vision.places.weight": "transformer.pos_embed", "embed.places.weight": "text_embeddings.position_embeddings.weight"}
    else:
        single["positions.table"] = "relative_position_bias_table"
    found = [Entry(ours, ((theirs,),)) for ours, theirs in single.items()]
    found += both("vision.embed.proj", "transformer.patch_embed.proj") + both("embed.norm", "text_embeddings.LayerNorm")
    for ours, theirs in HEADS.items():
        found += both(ours, theirs)
    for number in numbers:
        found += _block(number, paired=number in paired, scaled=not absolute)
    return found + both("trunk.norm", "transformer.norm")


def _block(number: int, *, paired: bool, scaled: bool) -> list[Entry]:
    ours, theirs = f"trunk.blocks.{number}.", f"transformer.blocks.{number}."
    single = {"qkv.weight": "attn.qkv.weight", "qkv.q_bias": "attn.q_bias", "qkv.v_bias": "attn.v_bias"}
    single |= {"scale1": "gamma_1", "scale2": "gamma_2"} if scaled else {}
    found = [Entry(f"{ours}{own}", ((f"{theirs}{other}",),)) for own, other in single.items()]
    found += both(f"{ours}norm1", f"{theirs}norm1") + both(f"{ours}out", f"{theirs}attn.proj")
    for expert, other in EXPERTS.items():
        if expert != "vl" or paired:
            found += both(f"{ours}norm2.{expert}", f"{theirs}norm2_{other}")
            for layer in ("fc1", "fc2"):
                found += both(f"{ours}ffn.{expert}.{layer}", f"{theirs}mlp_{other}.{layer}")
    return found


def _explained(mapped: Mapped) -> Mapped:
    known = {name: next((why for left, why in LEFT.items() if re.match(left, name)), why) for name, why in mapped.dropped.items()}
    return mapped._replace(dropped=known)
