"""A trained model as one ONNX file that other programs run without torch, and that was seen to give the same vectors."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.abilities import Tokenizing
from zoo.collate import RowCollate
from zoo.errors import Failure, ZooError
from zoo.files import check_target, write_json
from zoo.models._pictures import PictureTextModel
from zoo.types import Batch, Classifying, ModalityInputs, Row

TOLERANCE = 1e-4  # in each feature of a vector of length 1: float32 sums in another order differ by 1e-7 in small models, 1e-5 in deep ones
_MEANINGS = {
    "text.values": "ids of the prompt, 0 at padding",
    "text.mask": "whether a position is real",
    "text.slots": "where the image goes: 1 at its one position in the prompt, else 0",
    "text.has_text": "whether the row has any text",
    "image.values": "prepared pixels, zeros where the row has no image",
    "image.present": "whether the row has an image",
}


def export_onnx(model: Any, out: str | Path, *, output: str | None = None) -> Path:
    """Write the way from prepared tensors to normalised vectors as ONNX, once onnxruntime is seen to agree with torch.

    One graph holds rows with and without an image, any number of rows and prompts of any length; of several images a row it takes
    one. What turns raw rows into tensors is no part of it: `prepare` does it here, and ``<out>.json`` says what the graph wants.

    Args:
        model: As `zoo.types.Model` says; it is put into eval mode and float32 on the CPU, where onnxruntime knows nothing smaller.
        out: The file. Weights over 2 GB lie in ``<out>.data``.
        output: Which embedding; None: the main one.

    Returns:
        ``out``.

    Raises:
        Failure: If onnxruntime gives other vectors than torch, by more than `TOLERANCE`; nothing is written then.
        ZooError: If the packages are missing, there is no such embedding, or the model cannot be written as a graph.
    """
    runtime = _runtime()
    out, name = Path(out), output if output is not None else model.outputs[0]
    if out.suffix != ".onnx":
        raise ZooError(f"{out} is no name of an ONNX file: write {out.with_suffix('.onnx')}")
    if isinstance(model, Classifying):
        raise ZooError("this model tells classes and gives no vectors of items: there is nothing to export")
    if isinstance(model, Tokenizing):
        raise ZooError("this model tells pictures by visual tokens, and the graph that is written here takes items: nothing is exported")
    if isinstance(model, PictureTextModel):
        raise ZooError(
            "this model reads pictures and texts apart, and the graph that is written here takes items, which may have both: encode with "
            "the model itself"
        )
    if name not in model.outputs:
        raise ZooError(f"this model gives no embedding {name!r} (it gives: {', '.join(model.outputs)})")
    check_target(out, "--out")
    model = model.cpu().float().eval()
    rows = _examples(model)
    feed = _tensors(model, rows)
    program = _program(_Encoder(model, name, list(feed)), feed)
    scratch = out.parent / f".{out.name}.{os.getpid()}.tmp"  # a folder, as a graph names the file of its weights
    scratch.mkdir(parents=True)
    try:
        program.save(scratch / out.name, external_data=_size(model) > 2**31)
        session = runtime.InferenceSession(str(scratch / out.name), providers=["CPUExecutionProvider"])
        worst = _check(model, session, rows, name)
        out.with_name(f"{out.name}.json").unlink(missing_ok=True)  # until the new one is there, nothing describes the file
        for file in sorted(scratch.iterdir(), reverse=True):  # the weights first
            file.replace(out.parent / file.name)
    finally:
        shutil.rmtree(scratch)
    write_json(out.with_name(f"{out.name}.json"), _about(model, feed, name, worst))
    return out


def prepare(model: Any, rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """Raw rows as the inputs of the graph that `export_onnx` wrote: ``session.run(None, prepare(model, rows))``.

    Raises:
        ZooError: If a row cannot be read, or has several images.
    """
    return {name: tensor.numpy() for name, tensor in _tensors(model, rows).items()}


class _Encoder(nn.Module):
    """Flat tensors in the order of ``names`` to one normalised embedding."""

    def __init__(self, model: Any, output: str, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.output, self.names = model, output, names

    def forward(self, *tensors: Tensor) -> Tensor:
        """To (B, D)."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in zip(self.names, tensors, strict=True):
            modality, _, field = name.partition(".")
            found.setdefault(modality, {})[field] = tensor
        inputs = {}
        for modality, fields in found.items():
            values, mask, present = fields.pop("values"), fields.pop("mask", None), fields.pop("present", None)
            inputs[modality] = ModalityInputs(values, mask, present, fields)
        return F.normalize(self.model(Batch(inputs)).embeddings[self.output].float(), dim=-1)


def _tensors(model: Any, rows: Sequence[Row]) -> dict[str, Tensor]:
    """Every input of the graph, whatever these rows lack: a text always has a mask, a looking model's image always a ``present``."""
    inputs = dict(RowCollate(model.processor)(rows).inputs)
    inputs.pop("answer", None)  # what is asked in training
    text, found = inputs.pop("text"), {}
    found["text.values"] = text.values
    found["text.mask"] = text.mask if text.mask is not None else torch.ones_like(text.values, dtype=torch.bool)
    found |= {f"text.{key}": tensor for key, tensor in text.extra.items()}
    if _looks(model):
        blank = torch.zeros_like(model.processor({"image": _grey()})["image"].values)  # (3, H, W)
        nobody = ModalityInputs(blank.expand(len(rows), *blank.shape), present=torch.zeros(len(rows), dtype=torch.bool))
        image = inputs.pop("image", nobody)
        if image.values.shape[1:] != blank.shape:
            raise ZooError("a row has several images, and the graph takes one: leave the others out, or encode with the model itself")
        found["image.values"] = image.values
        found["image.present"] = image.present if image.present is not None else torch.ones(len(rows), dtype=torch.bool)
    assert not inputs, f"modalities {list(inputs)} have no place in the graph"
    return found


def _program(encoder: _Encoder, feed: Mapping[str, Tensor]) -> Any:
    """The graph, its number of rows and length of prompts left open."""
    rows, length = torch.export.Dim("batch"), torch.export.Dim("length", min=3)  # no prompt is shorter, and torch draws a line at 2
    N = feed["text.values"].shape[1]
    shapes = tuple({0: rows, 1: length} if x.ndim == 2 and x.shape[1] == N else {0: rows} for x in feed.values())
    try:
        with torch.no_grad():
            exported = torch.export.export(encoder, tuple(feed.values()), dynamic_shapes=(shapes,), strict=False)
            return torch.onnx.export(exported, input_names=list(feed), output_names=["vector"], dynamo=True, verbose=False)
    except RuntimeError as e:  # what both raise for an operation that no graph can hold
        reason = " ".join(line.strip() for line in str(e).strip().splitlines()[:2])  # what is wrong, and where
        raise ZooError(f"this model cannot be written as ONNX ({reason}): encode with the model itself, or choose other parts") from e


def _check(model: Any, session: Any, rows: Sequence[Row], output: str) -> float:
    """The largest difference between the graph's vectors and the model's own, over batches of several sizes and lengths."""
    worst, again = 0.0, list(rows)
    batches: list[list[Row]] = [again, again[::-1], again[1:], again + again, *([row] for row in rows)]
    for some in batches:
        (got,) = session.run(None, prepare(model, some))
        worst = max(worst, float(np.abs(got - _own(model, some, output)).max()))
    if not worst <= TOLERANCE:
        raise Failure(f"onnxruntime differs from torch by {worst:.1e}, allowed is {TOLERANCE:.0e}: nothing was written")
    return worst


@torch.no_grad()
def _own(model: Any, rows: Sequence[Row], output: str) -> np.ndarray:
    """The vectors (B, D) of the model itself."""
    return F.normalize(model(RowCollate(model.processor)(rows)).embeddings[output].float(), dim=-1).numpy()


def _examples(model: Any) -> list[Row]:
    """Rows with all that the model reads, and with each modality alone; of different lengths."""
    keys: Sequence[str] = model.processor.keys()
    words = {key: f"{key} of something" for key in keys if key != "image"}
    if not _looks(model):
        return [words, {key: words[key] for key in list(words)[:1]}, {key: 3 * text for key, text in words.items()}]
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    return [words | {"image": Image.fromarray(noise)}, dict(list(words.items())[:1]), {"image": _grey()}]


def _looks(model: Any) -> bool:
    keys: Sequence[str] = model.processor.keys()
    return "image" in keys


def _grey() -> Image.Image:
    return Image.new("RGB", (32, 32), "grey")


def _about(model: Any, feed: Mapping[str, Tensor], output: str, worst: float) -> dict[str, Any]:
    """What a program needs to know that runs the graph."""
    N = feed["text.values"].shape[1]
    return {
        "inputs": {
            name: {
                "type": str(x.dtype).removeprefix("torch."),
                "shape": ["batch", *("length" if x.ndim == 2 and size == N else size for size in x.shape[1:])],
                "meaning": _MEANINGS.get(name, "position in the prompt at which this embedding is read, -1 for none"),
            }
            for name, x in feed.items()
        },
        "output": {"name": "vector", "embedding": output, "type": "float32", "shape": ["batch", model.dim], "length": 1},
        "checked": {"against": f"torch {torch.__version__}", "largest_difference": worst, "tolerance": TOLERANCE},
        "spec": model.spec,
        "preprocessing": model.processor.config(),
    }


def _size(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _runtime() -> Any:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # torch.onnx imports it late, and says less
    except ImportError as e:
        raise ZooError(f"export needs {e.name}: pip install 'multimodal-zoo[onnx]'") from e
    return onnxruntime
