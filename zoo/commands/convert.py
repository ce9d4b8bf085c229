"""Weights of other programs in, a model folder out; and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from zoo.commands._app import AsJson, app
from zoo.errors import ZooError


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A .pt, .pth or .safetensors, or a folder with one; or RUN.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Of the model, instead of those inferred: activation=gelu vocabulary=DIR"),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option("--to", help="The other way: open_clip, hf_clip, hf_blip_retrieval, hf_blip_captioning, hf_blip_vqa or unilm."),
    ] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Side of pictures: positions are resized to it.")] = None,
    logit_scale: Annotated[float | None, typer.Option(help="With --to: CLIP's, which belongs to the objective here.")] = None,
    as_json: AsJson = False,
) -> None:
    """Read weights of CLIP, CoCa, ALBEF, BLIP, VLMo or BEiT-3 that another program wrote into a model folder; or write one for another.

    CLIP of OpenAI, open_clip and transformers; CoCa of open_clip; BLIP of Salesforce and transformers (retrieval, captioning); ALBEF of
    Salesforce; VLMo, BEiT and BEiT-3 of unilm. Which it is shows in the names, its size in the shapes. Every weight has to fit. What was
    left out, and what the file had nothing for, is printed and stands in converted.json. Pickles and TorchScript archives are not run.
    """
    from zoo.convert import Converted
    from zoo.convert import convert as do

    if to is None and logit_scale is not None:
        raise ZooError("--logit-scale is for --to: here it belongs to the objective")
    done = do(source, out, *(settings or []), to=to, image_size=image_size, logit_scale=logit_scale)
    if not isinstance(done, Converted):
        typer.echo(json.dumps({"folder": str(done), "program": to}) if as_json else f"{done}: weights for {to}")
        return
    if as_json:
        typer.echo(json.dumps({**done._asdict(), "folder": str(done.folder)}, indent=1, ensure_ascii=False, default=str))
        return
    said = ", ".join(f"{key}={value}" for key, value in done.settings.items())
    typer.echo(f"{out}: a {done.model} from weights of {done.program}; {said}")
    reasons: dict[str, list[str]] = {}
    for name, why in done.dropped.items():
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        typer.echo(f"  dropped {len(names)}, {why}: {_some(names)}")
    if done.drawn:
        typer.echo(f"  not in the file, and so as in a model that was never trained, {len(done.drawn)}: {_some(done.drawn)}")
    if done.resized:
        typer.echo(f"  positions resized, {done.resized}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
