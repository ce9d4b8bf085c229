"""The weights of the original Qwen, whose files say in other words what Qwen2's say.

Qwen-7B is Qwen2's architecture with one fused matrix for query, key and value.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors.torch import load_file
from torch import Tensor

from zoo.backbones._decoder import not_found
from zoo.errors import ZooError

# Its vocabulary without the special tokens is that of Qwen1.5, which has a tokenizer.json; these are the ids of Qwen's own specials.
TOKENIZER = "Qwen/Qwen1.5-7B-Chat"
ROLES: dict[str, int | None] = {"pad": 151643, "bos": None, "compressed": 151646, "image_start": 151857, "image_end": 151858}
_RENAMED = {
    "ln_1": ("input_layernorm",),
    "ln_2": ("post_attention_layernorm",),
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.c_proj": ("self_attn.o_proj",),
    "mlp.w1": ("mlp.up_proj",),
    "mlp.w2": ("mlp.gate_proj",),
    "mlp.c_proj": ("mlp.down_proj",),
}
_LAYER = re.compile(r"transformer\.h\.(\d+)\.([\w.]+)\.(weight|bias)")
_OTHER = {"transformer.wte.weight": "embed_tokens.weight", "transformer.ln_f.weight": "norm.weight"}


def renamed(key: str, value: Tensor) -> dict[str, Tensor]:
    """One tensor of Qwen as those of Qwen2; {} for the head, the vision tower and what is no weight."""
    if key in _OTHER:
        return {_OTHER[key]: value}
    match = _LAYER.fullmatch(key)
    if match is None or match[2] not in _RENAMED:
        return {}
    names = _RENAMED[match[2]]
    return {f"layers.{match[1]}.{n}.{match[3]}": v for n, v in zip(names, value.chunk(len(names)), strict=True)}


@torch.no_grad()
def fill(model: Any, source: str) -> None:
    """Copy the weights of Qwen, from a repository or a folder of safetensors, into a Qwen2Model.

    Raises:
        ZooError: If they are not there, or not all there.
    """
    state = dict(model.named_parameters())
    left = set(state)
    for file in _files(source):
        for key, value in load_file(file).items():
            for name, part in renamed(key, value).items():
                state[name].copy_(part)
                left.discard(name)
    if left:
        raise ZooError(f"{source} lacks {len(left)} of {len(state)} weights of Qwen, such as {min(left)}: is it a Qwen-7B in safetensors?")


def _files(source: str) -> list[Path]:
    folder = Path(source)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(source, allow_patterns="*.safetensors"))
        except (OSError, HFValidationError) as e:
            raise ZooError(not_found("weights of Qwen", source, e)) from e
    return sorted(folder.glob("*.safetensors"))
