"""How the weights of CoCa are named by open_clip, and how here: one table, read in both directions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from zoo.models._bert_keys import Entry, Mapped, to_ours, to_theirs
from zoo.models._clip_keys import both, explained, picture_entries, turned

_TURNED = ("visual.proj", "text.text_projection", "text_decoder.text_projection")  # (D, E) there, (E, D) here
_ENDS = ("weight", "bias")
_CROSS = re.compile(r"(text_decoder\.cross_attn\.\d+\.attn\.)in_proj_(weight|bias)$")
_BLOCK = {"norm1": "ln_1", "out": "attn.out_proj", "norm2": "ln_2", "ffn.fc1": "mlp.c_fc", "ffn.fc2": "mlp.c_proj"}
_READS = {
    "cross.norm": "ln_1",
    "cross.memory_norm": "ln_1_kv",
    "cross.q": "attn.q",
    "cross.kv": "attn.kv",
    "cross.out": "attn.out_proj",
    "cross.ffn_norm": "ln_2",
    "cross.ffn.fc1": "mlp.c_fc",
    "cross.ffn.fc2": "mlp.c_proj",
}


def from_open_clip(theirs: Mapping[str, Tensor]) -> Mapped:
    """Weights of open_clip's CoCa by our names, for a model of its form (``size: vit_b_32`` or ``vit_l_14``).

    Raises:
        ZooError: If a parameter is there in parts.
    """
    state: dict[str, Tensor] = {}
    for name, x in turned(theirs, _TURNED).items():
        if match := _CROSS.match(name):  # queries are a layer of their own here
            D = len(x) // 3
            state |= {f"{match[1]}q.{match[2]}": x[:D], f"{match[1]}kv.{match[2]}": x[D:]}
        else:
            state[name] = x
    pooler = [name.removeprefix("visual.attn_pool.") for name in state if name.startswith("visual.attn_pool.")]
    lower, upper = _count(state, r"text\.transformer\.resblocks\."), _count(state, r"text_decoder\.resblocks\.")
    return explained(to_ours(state, _entries(_count(state, r"visual\.transformer\.resblocks\."), lower, upper, pooler)))


def to_open_clip(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights by open_clip's names, ``logit_scale`` left out, which the objective has.

    Args:
        ours: Of a model of open_clip's form whose picture encoder is CLIP's own.
    """
    upper = _count([name for name in ours if ".cross." in name], r"text\.trunk\.blocks\.")
    lower = _count(ours, r"text\.trunk\.blocks\.") - upper
    pooler = [name.removeprefix("vision.pooler.") for name in ours if name.startswith("vision.pooler.")]
    state = to_theirs(ours, _entries(_count(ours, r"vision\.encoder\.model\.transformer\.resblocks\."), lower, upper, pooler))
    for i in range(upper):
        stem = f"text_decoder.cross_attn.{i}.attn."
        state |= {f"{stem}in_proj_{end}": torch.cat([state.pop(f"{stem}q.{end}"), state.pop(f"{stem}kv.{end}")]) for end in _ENDS}
    return turned(state, _TURNED)


def _entries(blocks: int, lower: int, upper: int, pooler: Iterable[str]) -> list[Entry]:
    """The table.

    Args:
        blocks: Of the picture tower.
        lower: Blocks of text that read no picture.
        upper: Those that do.
        pooler: Names inside the pooler; queries, keys and values are one matrix where all are of one width.
    """
    single = {
        "image_projection.weight": "visual.proj",
        "text_projection.weight": "text.text_projection",
        "text.words.weight": "text.token_embedding.weight",
        "text.positions": "text.positional_embedding",
        "text.cls": "text.cls_emb",
        "text.head.weight": "text_decoder.text_projection",
    }
    single |= {f"vision.pooler.{name}": f"visual.attn_pool.{name}" for name in pooler}
    found = [*picture_entries("vision.encoder.model.", blocks), *(Entry(ours, ((theirs,),)) for ours, theirs in single.items())]
    for ours, theirs in {"vision.norm": "visual.ln_post", "text.norm": "text.ln_final", "text.trunk.norm": "text_decoder.ln_final"}.items():
        found += both(ours, theirs)
    for i in range(lower):
        found += _block(i, f"text.transformer.resblocks.{i}.")
    for i in range(upper):
        found += _block(lower + i, f"text_decoder.resblocks.{i}.")
        for ours, theirs in _READS.items():
            found += both(f"text.trunk.blocks.{lower + i}.{ours}", f"text_decoder.cross_attn.{i}.{theirs}")
    return found


def _block(number: int, stem: str) -> list[Entry]:
    ours = f"text.trunk.blocks.{number}."
    found = [Entry(f"{ours}qkv.{end}", ((f"{stem}attn.in_proj_{end}",),)) for end in _ENDS]
    for own, other in _BLOCK.items():
        found += both(f"{ours}{own}", f"{stem}{other}")
    return found


def _count(names: Iterable[str], stem: str) -> int:
    """How many blocks there are."""
    return len({match[1] for name in names if (match := re.match(rf"{stem}(\d+)\.", name))})
