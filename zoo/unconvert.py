"""A model of the zoo as another program reads it: its weights by their names, and the config beside them."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from open_clip.transformer import QuickGELU
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from zoo.checkpoint import FILES, checkpoints
from zoo.encoders._image import CLIP_MEAN, CLIP_STD
from zoo.encoders._open_clip import OpenClipEncoder
from zoo.encoders.timm import TimmEncoder
from zoo.errors import Failure, ZooError, unknown
from zoo.files import open_to_others, room, write_bytes, write_json, write_text
from zoo.hub import load
from zoo.models import _beit3_keys, _bert_keys, _clip_keys, _coca_keys, _vlmo_keys
from zoo.models.beit_3 import Beit3
from zoo.models.blip import Blip
from zoo.models.clip import Clip
from zoo.models.coca import Coca
from zoo.models.vlmo import Vlmo

logger = logging.getLogger("zoo.unconvert")
BEGINS = math.log(1 / 0.07)
_TEMPERATURE = re.compile(r"objective\.(?:of\.\d+\.)?(?:temperature\.)?(log_scale|raw|fixed)")  # in a checkpoint
Written = tuple[dict[str, Tensor], str, dict[str, Any], str]  # weights, their file, the config, its file or "" for none


def write_foreign(run: str | Path, out: Path, to: str, *, logit_scale: float | None = None) -> Path:
    """Write a model folder as another program reads it.

    Args:
        run: A run folder, or what `zoo.convert` wrote.
        out: The folder; it is whole or not there.
        to: The program, of `TARGETS`.
        logit_scale: As of `zoo.convert`.

    Raises:
        Failure: If it cannot be written.
        ZooError: If there is no such program or model, or the program has no model like it.
    """
    if to not in TARGETS:
        raise ZooError(f"--to: {unknown('program to write for', to, TARGETS)}")
    model = load(run)
    if logit_scale is None and isinstance(model, Clip | Coca):
        logit_scale = _logit_scale(Path(run))
    state, weights, config, about = TARGETS[to](model, model.state_dict(), BEGINS if logit_scale is None else logit_scale)
    beside = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        beside.mkdir(parents=True)
        if weights.endswith(".pth"):
            torch.save({"model": state}, buffer := io.BytesIO())
            write_bytes(beside / weights, buffer.getvalue())
        else:
            save_file({name: x.contiguous() for name, x in state.items()}, beside / weights, metadata={"format": "pt"})
            open_to_others(beside / weights)
        if about:
            write_json(beside / about, config)
        if serialized := model.vocabulary.portable().get("serialized"):
            write_text(beside / "tokenizer.json", serialized)
        if out.is_dir():  # empty, as `convert` has made sure
            out.rmdir()
        beside.rename(out)
    except (OSError, SafetensorError) as e:
        raise Failure(f"{out} could not be written ({e}); {room(out)}: make room, and do the same again") from e
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return out


def _logit_scale(run: Path) -> float:
    """That of the weights that the model was converted from, or that it was trained with; else where CLIP begins."""
    file, states = run / "converted.json", checkpoints(run / "checkpoints")
    left = json.loads(file.read_text(encoding="utf-8"))["left"] if file.is_file() else {}
    if "logit_scale" in left:
        return float(left["logit_scale"])
    if states:
        with safe_open(states[-1] / FILES[0], "pt") as state:
            for match in filter(None, map(_TEMPERATURE.fullmatch, state.keys())):
                x = float(state.get_tensor(match[0]))
                return x if match[1] == "log_scale" else -math.log(x)
    logger.warning("nothing in %s says the temperature: logit_scale is written as %.4f; --logit-scale says another", run, BEGINS)
    return BEGINS


def _open_clip(model: Any, state: Mapping[str, Tensor], logit_scale: float) -> Written:
    """open_clip's folder, which it loads as ``local-dir:FOLDER``."""
    if isinstance(model, Coca):
        if model.vision.contrastive is not None:
            raise ZooError("open_clip's CoCa has one pooler, and this one is the paper's, with two: no weights of it fit there")
        return _written_coca(model, state, logit_scale)
    _check(model, Clip, "open_clip", "a CLIP or a CoCa")
    visual = _tower(model.vision)
    text = model.text.model
    cfg = {"embed_dim": model.dim, "quick_gelu": _quick(model), "vision_cfg": _vision_cfg(visual), "text_cfg": _text_cfg(text)}
    found = _clip_keys.to_open_clip(state) | {"logit_scale": torch.tensor(logit_scale)}
    return found, "open_clip_model.safetensors", _about(cfg), "open_clip_config.json"


def _written_coca(model: Coca, state: Mapping[str, Tensor], logit_scale: float) -> Written:
    visual, text = _tower(model.vision.encoder), model.text
    shape, pooler = text.trunk.shape, model.vision.pooler
    hidden = (shape.hidden or 4 * shape.dim) / shape.dim
    words = {"context_length": text.length, "vocab_size": text.words.num_embeddings, "width": shape.dim, "heads": shape.heads}
    cfg = {
        "embed_dim": model.dim,
        "custom_text": True,
        "vision_cfg": {
            **_vision_cfg(visual),
            "attentional_pool": True,
            "attn_pooler_queries": len(pooler.query),
            "attn_pooler_heads": pooler.attn.num_heads,
            "output_tokens": True,
        },
        "text_cfg": {**words, "layers": text.first, "mlp_ratio": hidden, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**words, "layers": text.trunk.layers - text.first, "mlp_ratio": hidden},
    }
    found = _coca_keys.to_open_clip(state) | {"logit_scale": torch.tensor(logit_scale)}
    return found, "open_clip_model.safetensors", _about(cfg), "open_clip_config.json"


def _about(cfg: Mapping[str, Any]) -> dict[str, Any]:
    return {"model_cfg": dict(cfg), "preprocess_cfg": {"mean": list(CLIP_MEAN), "std": list(CLIP_STD)}}


def _vision_cfg(visual: Any) -> dict[str, Any]:
    block, width = visual.transformer.resblocks[0], visual.conv1.out_channels
    return {
        "image_size": visual.image_size[0],
        "patch_size": visual.patch_size[0],
        "width": width,
        "layers": len(visual.transformer.resblocks),
        "head_width": width // block.attn.num_heads,
        "mlp_ratio": block.mlp.c_fc.out_features / width,
    }


def _text_cfg(text: Any) -> dict[str, Any]:
    block, width = text.transformer.resblocks[0], text.token_embedding.embedding_dim
    return {
        "context_length": len(text.positional_embedding),
        "vocab_size": text.token_embedding.num_embeddings,
        "width": width,
        "heads": block.attn.num_heads,
        "layers": len(text.transformer.resblocks),
        "mlp_ratio": block.mlp.c_fc.out_features / width,
    }


def _hf_clip(model: Any, state: Mapping[str, Tensor], logit_scale: float) -> Written:
    """The folder of transformers' CLIPModel."""
    _check(model, Clip, "hf_clip", "a CLIP")
    see, read = _vision_cfg(_tower(model.vision)), _text_cfg(model.text.model)
    act, roles = "quick_gelu" if _quick(model) else "gelu", model.vocabulary.roles
    shared = {"hidden_act": act, "layer_norm_eps": 1e-5, "projection_dim": model.dim}
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": model.dim,
        "vision_config": {
            **shared,
            **_hf_block(see["width"], see["layers"], see["width"] // see["head_width"], see["mlp_ratio"]),
            "image_size": see["image_size"],
            "patch_size": see["patch_size"],
            "model_type": "clip_vision_model",
        },
        "text_config": {
            **shared,
            **_hf_block(read["width"], read["layers"], read["heads"], read["mlp_ratio"]),
            "vocab_size": read["vocab_size"],
            "max_position_embeddings": read["context_length"],
            "bos_token_id": roles["start"],
            "eos_token_id": roles["end"],
            "pad_token_id": roles["pad"],
            "model_type": "clip_text_model",
        },
    }
    return _clip_keys.to_hf_clip(state) | {"logit_scale": torch.tensor(logit_scale)}, "model.safetensors", config, "config.json"


def _hf_blip(program: _bert_keys.Program, architecture: str) -> Callable[[Any, Mapping[str, Tensor], float], Written]:
    def write(model: Any, state: Mapping[str, Tensor], _: float) -> Written:
        _check(model, Blip, program, "a BLIP")
        vision, shape, roles = model.vision, model.trunk.shape, model.vocabulary.roles
        if program == "hf_blip_vqa" and (model.answerer is None or vision.dim != shape.dim):
            raise ZooError(
                f"{program}: there answers have a decoder of their own, and pictures are as wide as texts; this model has "
                f"{'none' if model.answerer is None else 'one'}, pictures {vision.dim} wide and texts {shape.dim}"
            )
        table = _bert_keys.entries_of(program, state)
        known, own = ({name for name in names if name.startswith("vision.")} for names in ((entry.ours for entry in table), state))
        if not isinstance(vision, TimmEncoder) or known != own:
            raise ZooError(
                f"{program}: BLIP looks through a plain vision transformer of timm, and this model through another picture encoder"
            )
        visual: Any = vision.model
        block, width = visual.blocks[0], visual.embed_dim
        config = {
            "architectures": [architecture],
            "model_type": "blip",
            "projection_dim": model.dim,
            "image_text_hidden_size": model.dim,
            "vision_config": {
                **_hf_block(width, len(visual.blocks), block.attn.num_heads, block.mlp.fc1.out_features / width),
                "image_size": visual.patch_embed.img_size[0],
                "patch_size": visual.patch_embed.patch_size[0],
                "layer_norm_eps": block.norm1.eps,
                "model_type": "blip_vision_model",
            },
            "text_config": {
                **_hf_block(shape.dim, model.trunk.layers, shape.heads, (shape.hidden or 4 * shape.dim) / shape.dim),
                "encoder_hidden_size": width,
                "vocab_size": model.embed.words.num_embeddings,
                "max_position_embeddings": model.embed.places.num_embeddings,
                "layer_norm_eps": shape.eps,
                "bos_token_id": roles["decode"],
                "eos_token_id": roles["end"],
                "sep_token_id": roles["end"],
                "pad_token_id": roles["pad"],
                "model_type": "blip_text_model",
            },
        }
        return _bert_keys.to_theirs(state, table), "model.safetensors", config, "config.json"

    return write


def _unilm(model: Any, state: Mapping[str, Tensor], _: float) -> Written:
    """The file of Microsoft's VLMo or BEiT-3, whose programs are told its size by an argument."""
    if isinstance(model, Beit3):
        return _beit3_keys.to_unilm(state), "beit3.pth", {}, ""
    _check(model, Vlmo, "unilm", "a VLMo or a BEiT-3")
    found = _vlmo_keys.to_unilm(state)
    if model.positions is not None:  # nothing reads them there, but they tell how long a text is
        found["text_embeddings.position_embeddings.weight"] = torch.zeros(model.processor.text.length, model.dim)
    return found, "vlmo.pth", {}, ""


TARGETS: Mapping[str, Callable[[Any, Mapping[str, Tensor], float], Written]] = {
    "open_clip": _open_clip,
    "hf_clip": _hf_clip,
    "hf_blip_retrieval": _hf_blip("hf_blip_retrieval", "BlipForImageTextRetrieval"),
    "hf_blip_captioning": _hf_blip("hf_blip_captioning", "BlipForConditionalGeneration"),
    "hf_blip_vqa": _hf_blip("hf_blip_vqa", "BlipForQuestionAnswering"),
    "unilm": _unilm,
}


def _hf_block(width: int, layers: int, heads: int, ratio: float) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": round(ratio * width),
    }


def _tower(vision: Any) -> Any:
    """CLIP's own picture tower.

    Raises:
        ZooError: If the model looks through another one.
    """
    if not isinstance(vision, OpenClipEncoder):
        raise ZooError(f"CLIP's own picture tower can be written for other programs, and this model looks through {type(vision).__name__}")
    return vision.model


def _quick(model: Any) -> bool:
    return isinstance(model.text.model.transformer.resblocks[0].mlp.gelu, QuickGELU)


def _check(model: Any, wanted: type, to: str, says: str) -> None:
    if not isinstance(model, wanted):
        raise ZooError(f"{to} takes {says}, and this is a {type(model).__name__}")
