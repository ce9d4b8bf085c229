"""How the weights of BEiT v2's visual tokenizers are named where they come from, and how here."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.models._bert_keys import Entry, Mapped, to_ours
from zoo.models._clip_keys import both

CODES = "quantize.embedding.weight"
LEFT: Mapping[str, str] = {  # names of which nothing is kept, and why
    r"teacher_model\.": "the teacher, which nothing but training needs",
    r"scaling_layer\.": "the teacher's colours",
    r"loss": "of training",
    r"quantize\.embedding\.(cluster_size|embed_avg)$": "of k-means, which nothing reads after it",
    r"quantize\.embedding\.initted$": "whether the codes were made of patches, which they were",
}
_BLOCK = ("norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
_BARE = ("attn.qkv.weight", "attn.q_bias", "attn.v_bias")


def is_of_beit2(names: Collection[str]) -> bool:
    """Whether these are the names of such a tokenizer."""
    return CODES in names and "encode_task_layer.0.weight" in names


def from_beit2(theirs: Mapping[str, Tensor]) -> Mapped:
    """Weights of ``vqkd_encoder_base_decoder_3x768x12_clip`` and its siblings by our names, for a model without a teacher.

    Raises:
        ZooError: If a parameter is there in parts, or its codes are none of length 1, of which the nearest is told in another way.
    """
    lengths = theirs[CODES].norm(dim=1)
    if not torch.allclose(lengths, torch.ones_like(lengths), atol=1e-3):
        seen = f"{lengths.min():.3g} to {lengths.max():.3g}"
        raise ZooError(f"{CODES} has rows of length {seen}, and codes are of length 1: take a file that was trained")
    mapped = to_ours(theirs, _entries(theirs))
    state = mapped.state | {"codebook.begun": torch.tensor(True)}
    absent = [name for name in mapped.absent if name != "codebook.taken"]  # which says what training did, and older files lack
    state.setdefault("codebook.taken", torch.zeros(len(theirs[CODES])))
    dropped = {name: next((why for left, why in LEFT.items() if re.match(left, name)), "unknown") for name in mapped.dropped}
    return Mapped(state, absent, dropped)


def blocks_in(names: Collection[str], tower: str) -> int:
    """How many blocks ``encoder`` or ``decoder`` has."""
    return len({match[1] for name in names if (match := re.match(rf"{tower}\.blocks\.(\d+)\.", name))})


def _entries(names: Collection[str]) -> list[Entry]:
    """The table; both transformers are timm's here, whose names are theirs."""
    found = [Entry("codebook.codes", ((CODES,),)), Entry("codebook.taken", (("quantize.cluster_size",),))]
    for ours, theirs in (("to_codes", "encode_task_layer"), ("from_codes", "decode_task_layer")):
        found += [*both(f"{ours}.0", f"{theirs}.0"), *both(f"{ours}.2", f"{theirs}.2")]
    for tower in ("encoder", "decoder"):
        found += [Entry(name, ((name,),)) for name in (f"{tower}.cls_token", f"{tower}.pos_embed")]
        for part in ("patch_embed.proj", "fc_norm"):
            found += both(f"{tower}.{part}", f"{tower}.{part}")
        for i in range(blocks_in(names, tower)):
            stem = f"{tower}.blocks.{i}."
            found += [Entry(stem + name, ((stem + name,),)) for name in _BARE]
            for part in _BLOCK:
                found += both(stem + part, stem + part)
    return found
