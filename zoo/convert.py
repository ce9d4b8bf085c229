"""Weights of other programs as a model of the zoo, and back: nothing is lost in silence, and nothing half is written."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.files import check_target, write_json
from zoo.foreign import Foreign, read_foreign
from zoo.foreign_settings import bert_settings, clip_settings, vqkd_settings
from zoo.hub import ABOUT, save
from zoo.joint_settings import joint_program, joint_weights
from zoo.models import _bert_keys, _clip_keys, _coca_keys, _vqkd_keys
from zoo.positions import PLACES, resampled
from zoo.registry import build
from zoo.source import Source

logger = logging.getLogger("zoo.convert")
CONVERTED = "converted.json"  # beside the weights: where they come from
KNOWN = """known are CLIP (of OpenAI, open_clip, transformers), CoCa (of open_clip), BLIP (of Salesforce, and of transformers for
retrieval, captioning and questions), ALBEF (of Salesforce), VLMo, BEiT, BEiT-3 and BEiT v2's visual tokenizers (of unilm)"""
_CLIP = {
    "openai": _clip_keys.from_open_clip,
    "open_clip": _clip_keys.from_open_clip,
    "open_clip_coca": _coca_keys.from_open_clip,
    "hf_clip": _clip_keys.from_hf_clip,
}
TABLE = "positions.table"  # of relative positions
_SHOWN = 8  # names in a message


class Converted(NamedTuple):
    """What became of foreign weights."""

    folder: Path
    model: str
    program: str  # that wrote them
    settings: dict[str, Any]  # of the model
    dropped: dict[str, str]  # names in the file of which nothing was made, and why
    drawn: list[str]  # names in the model for which the file had nothing: they are as in a new one
    resized: str  # how the positions of patches were, "" if they are as they were


def convert(
    source: str | Path,
    out: str | Path,
    *overrides: str,
    to: str | None = None,
    image_size: int | None = None,
    logit_scale: float | None = None,
) -> Converted | Path:
    """Read weights of another program into a model folder; or, with ``to``, write a model folder as another program reads it.

    Read are CLIP of OpenAI, open_clip and transformers, CoCa of open_clip, BLIP of Salesforce and of transformers (retrieval,
    captioning, questions and answers), ALBEF of Salesforce; of unilm VLMo, the BEiT of pictures that it begins from, BEiT-3, and BEiT v2's
    visual tokenizers. Which it is shows in the names of the weights, the size in their shapes.

    Args:
        source: A file, or a folder with one, perhaps beside its ``config.json``; with ``to``, a run folder.
        out: A folder that does not exist yet.
        *overrides: Settings of the model in the place of those that were inferred: ``"activation=gelu"``, ``"vocabulary=DIR"``.
        to: ``open_clip``, ``hf_clip``, ``hf_blip_retrieval``, ``hf_blip_captioning``, ``hf_blip_vqa`` or ``unilm``.
        image_size: The side of pictures, a multiple of that of a patch: positions are resized to it by bicubic interpolation, tables
            of relative ones by a geometric progression. None: as the weights have it.
        logit_scale: With ``to``, the logarithm that CLIP multiplies cosines by, which here belongs to the objective; None: that of
            the weights that the model was converted from, or that its run learned (its last checkpoint knows it); where there is neither,
            ln(1 / 0.07).

    Returns:
        What became of the weights; with ``to``, the folder.

    Raises:
        Failure: If a file is damaged, or none can be written.
        ZooError: If there are no such weights, no model that is like them, names or shapes that do not fit, or ``out`` exists.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ZooError(f"{out} is there already: name a new folder")
    if not out.exists():
        check_target(out, "the folder")
    if to is not None:
        from zoo.unconvert import write_foreign  # what each direction imports takes seconds

        if overrides or image_size is not None:
            raise ZooError("with --to nothing but --logit-scale can be set: the model is as it is in its folder")
        return write_foreign(source, out, to, logit_scale=logit_scale)
    place = Path(source)
    if ((place if place.is_dir() else place.parent) / ABOUT).is_file():
        raise ZooError(f"{source} is of a model folder of the zoo, which needs no conversion; to write it for another program, add --to")
    foreign = read_foreign(source)
    program, name, settings, mapped = _mapped(foreign)
    given = _overridden(overrides)
    if program == "open_clip" and not foreign.config and "activation" not in given:
        logger.warning("%s does not say its activation: gelu is assumed; of OpenAI's weights, write activation=quick_gelu", source)
    inside = settings.get("base", settings)  # what a model of answers reads with, which the settings are of
    seen = inside.get("image_size", 0) // inside.get("patch", 1)  # patches that are a side in the file, of what has relative positions
    inside |= given
    if image_size is not None:
        inside |= _sized(inside, image_size, mapped.state, foreign.path)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # what the file has nothing for is the same every time
        model = build(name, **settings)
    mapped = mapped._replace(absent=[key for key in mapped.absent if key in model.state_dict()])
    resized = _fit(model, mapped, foreign.path, (seen, seen))
    model.trained, model.drawn = True, mapped.absent
    left = {key: float(x) for key in mapped.dropped if (x := foreign.state[key]).numel() == 1 and x.is_floating_point()}
    done = Converted(out, name, program, settings, dict(sorted(mapped.dropped.items())), mapped.absent, resized)
    _written(model, out, {**done._asdict(), "folder": None, "source": str(foreign.path), "left": left})
    return done


def _mapped(foreign: Foreign) -> tuple[str, str, dict[str, Any], _bert_keys.Mapped]:
    """The program that wrote the weights, the model's name and settings, and the weights by its names.

    Raises:
        ZooError: If they are of no model that is known, or some are not known.
    """
    state = foreign.state
    if other := _relative(state):
        raise ZooError(f"{foreign.path} holds {other}; {KNOWN}")
    program = _clip_program(state)
    if program is not None:
        name, settings = clip_settings(program, foreign)
        mapped = _CLIP[program](state)
        if mapped.absent:
            raise ZooError(f"{foreign.path} has nothing for {_some(mapped.absent)} of the model {name}: the file is not whole")
    elif _vqkd_keys.is_of_beit2(state):
        program, (name, settings), mapped = "beit2", vqkd_settings(foreign), _vqkd_keys.from_beit2(state)
        if mapped.absent:
            raise ZooError(f"{foreign.path} has nothing for {_some(mapped.absent)} of the model {name}: the file is not whole")
    elif (joint := joint_program(state)) is not None:
        program, (name, settings, mapped) = joint, joint_weights(joint, foreign)
    else:
        program, name, settings, mapped = _bert(foreign)
    if unexpected := [key for key, why in mapped.dropped.items() if why == "unknown"]:
        raise ZooError(
            f"{foreign.path} has {_some(unexpected)}, which the model {name} does not: it is another one, or a fine-tuning with more parts"
        )
    return program, name, settings, mapped


def _clip_program(state: Mapping[str, Tensor]) -> str | None:
    """Which program's CLIP or CoCa this is, by its names; None: nobody's."""
    if "visual.conv1.weight" in state and ("token_embedding.weight" in state or "text.token_embedding.weight" in state):
        if any(name.startswith("text_decoder.") for name in state):
            return "open_clip_coca"
        return "openai" if "input_resolution" in state else "open_clip"
    return "hf_clip" if "visual_projection.weight" in state and "text_model.final_layer_norm.weight" in state else None


def _bert(foreign: Foreign) -> tuple[str, str, dict[str, Any], _bert_keys.Mapped]:
    """`_mapped` of ALBEF and BLIP."""
    state = foreign.state
    try:
        program = _bert_keys.spelling_of(state)
    except ZooError as e:
        raise ZooError(f"{foreign.path}: its names, such as {', '.join(sorted(state)[:4])}, are of no model that is known; {KNOWN}") from e
    name, settings = bert_settings(program, foreign)
    table = _bert_keys.entries_of(program, state)
    mapped = _bert_keys.to_ours(state, table)
    if mapped.absent:
        raise ZooError(f"{foreign.path} has nothing for {_some(mapped.absent)} of the model {name}: the file is not whole")
    known = {entry.ours for entry in table}
    whole = _bert_keys.entries_of("blip" if name == "blip" else "albef", [*state, *known])
    return program, name, settings, mapped._replace(absent=sorted({entry.ours for entry in whole} - known))


def _relative(state: Mapping[str, Tensor]) -> str:
    """What else these weights are, if they look like those of a known model and are not."""
    if "visual.layer1.0.conv1.weight" in state:
        return "a CLIP that looks through a ResNet: take one with a vision transformer"
    if any(name.startswith("visual.trunk.") for name in state):
        return "an open_clip model that looks through a tower of timm: take one whose tower is open_clip's own"
    if any(name.startswith("vision_model.head.") for name in state):
        return "a SigLIP"
    if any(name.startswith("cls_head.") for name in state):
        return "a model with a head of classes, fine-tuned for one task: take the one that it was made from"
    reads = "text_encoder.encoder.layer.0.crossattention.self.query.weight" in state  # of BLIP all blocks do
    sides = all(any(name.startswith(side) for name in state) for side in ("text_encoder.", "text_decoder."))
    if "itm_head.weight" not in state and sides and not reads:
        return "an ALBEF of questions and answers, fine-tuned for that: take the one that it was made from"
    return ""


def _fit(model: Any, mapped: _bert_keys.Mapped, where: Path, window: tuple[int, int]) -> str:
    """Put the weights into the model, positions of patches resized to its own; what they were, in words.

    Args:
        model: Built.
        mapped: The weights.
        where: They were read.
        window: Patches of a picture there; of relative positions.

    Raises:
        ZooError: If a name is missing that is not known to be, or shapes differ.
    """
    own, state, resized = model.state_dict(), dict(mapped.state), ""
    for name, antialias in PLACES.items():
        if name in own and name in state and own[name].ndim == state[name].ndim and own[name].shape != state[name].shape:
            resized = f"{tuple(state[name].shape)} to {tuple(own[name].shape)}"
            state[name] = resampled(state[name], own[name].shape[-2], antialias=antialias)
    if TABLE in own and TABLE in state:
        table = model.positions.of(state[TABLE], window)
        resized = "" if table is state[TABLE] else f"{tuple(state[TABLE].shape)} to {tuple(table.shape)}"
        state[TABLE] = table
    missing = sorted(set(own) - set(state) - set(mapped.absent))
    unexpected = sorted(set(state) - set(own))
    wrong = [f"{n} {tuple(state[n].shape)}, not {tuple(own[n].shape)}" for n in state if n in own and state[n].shape != own[n].shape]
    faults = [f"missing: {_some(missing)}"] if missing else []
    faults += [f"not known: {_some(unexpected)}"] if unexpected else []
    faults += [f"of another shape: {_some(wrong)}"] if wrong else []
    if faults:
        raise ZooError(f"{where} does not fit the model {model.spec['name']}:\n" + "\n".join(faults))
    model.load_state_dict(own | state)
    return resized


def _sized(settings: Mapping[str, Any], image_size: int, state: Mapping[str, Tensor], where: Path) -> dict[str, Any]:
    """The setting that says how large pictures are.

    Raises:
        ZooError: If no whole number of patches is a side.
    """
    patch = next(len(x[0, 0]) for name, x in state.items() if name.endswith(("embed.proj.weight", "conv1.weight")))
    if image_size < 1 or image_size % patch:
        raise ZooError(
            f"{where}: image_size: {image_size} is no multiple of the {patch} of a patch: write {max(1, image_size // patch) * patch}"
        )
    if isinstance(settings.get("vision"), Mapping):
        return {"vision": {**settings["vision"], "image_size": image_size}}
    return {"image_size": image_size}


def _written(model: Any, out: Path, about: Mapping[str, Any]) -> None:
    """Write the folder, which is whole or not there."""
    beside = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        save(model, beside)
        write_json(beside / CONVERTED, dict(about))
        if out.is_dir():  # empty, as `convert` has made sure
            out.rmdir()
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _overridden(overrides: tuple[str, ...]) -> dict[str, Any]:
    """``key=value`` each.

    Raises:
        ZooError: If one is not so.
    """
    given, faults = {}, []
    for override in overrides:
        key, equals, text = override.partition("=")
        source = Source.read(f"setting {override!r}", text)
        faults += [source.report(source.faults)] if source.faults else []
        faults += [] if equals and text.strip() else [f"{source.name}: write key=value"]
        given[key] = source.values
    if faults:
        raise ZooError("\n".join(faults))
    return given


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
