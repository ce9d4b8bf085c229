"""Opens a golden file: what another library computed, on weights that both sides draw by the names of its parameters.

    from tests.golden_files import golden

    case = golden("blip_lavis", "pretrain")
    case.state                     # the library's whole state dict, its names, as a checkpoint of it would hold
    case.inputs["image"]           # (4, 3, 32, 32)
    case["lm_logits"]              # what the library made of them
    case.gradients("loss_lm")      # {name: (norm, product with numbers("gradient of " + name))}, of every trained parameter

The files are written by ``make golden``, in an environment of the library; nothing of it is needed to read them.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file

from tools.named_weights import numbers, state

FOLDER = Path(__file__).parent / "golden"


class Golden(NamedTuple):
    """One case of a golden file."""

    told: dict  # of the file: versions, sizes, captions, vocabulary
    case: dict  # of the case: class, settings, names and shapes
    arrays: dict[str, torch.Tensor]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.arrays[name]

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """Student, teacher, queues; shared parameters under each of their names."""
        shapes = dict(self.case["parameters"])
        for twin in self.case["twins"]:
            student = twin.removesuffix("_m") + "."
            shapes |= {f"{twin}.{name.removeprefix(student)}": shape for name, shape in shapes.items() if name.startswith(student)}
        return {name: torch.from_numpy(value) for name, value in state(shapes, self.case["shared"]).items()}

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """``image`` (4, 3, 32, 32), which is drawn by that name, and the texts' ``input_ids`` and ``attention_mask``, (4, N) int64."""
        side = self.told["vision"]["img_size"]
        image = torch.from_numpy(numbers("image", (len(self["input_ids"]), 3, side, side)).astype(np.float32))
        return {"image": image, "input_ids": self["input_ids"], "attention_mask": self["attention_mask"]}

    def gradients(self, loss: str) -> dict[str, tuple[float, float]]:
        """Norm and product of the gradient of each parameter; both are 0 where the loss does not reach it."""
        names = [name for name in self.case["parameters"] if name not in self.case["buffers"]]
        return {name: (float(row[0]), float(row[1])) for name, row in zip(names, self[f"gradients/{loss}"], strict=True)}


def golden(file: str, case: str) -> Golden:
    """One case of ``tests/golden/<file>``."""
    told = json.loads((FOLDER / f"{file}.json").read_text())
    arrays = load_file(FOLDER / f"{file}.safetensors")
    own = {name.removeprefix(f"{case}/"): value for name, value in arrays.items() if name.startswith(f"{case}/")}
    return Golden(told, told["cases"][case], own)


def digest(name: str, gradient: torch.Tensor) -> tuple[float, float]:
    """Of a gradient in the shape and under the name of the library: what `Golden.gradients` holds of it."""
    along = torch.from_numpy(numbers(f"gradient of {name}", tuple(gradient.shape))).to(gradient.dtype)
    return float(gradient.norm()), float((gradient * along).sum())
