"""What the golden files of all libraries share: weights by name, gradients in short, and how it is written.

A library computes in float64, so that another machine writes the same files; stored is float32. Needs NumPy, torch and safetensors alone,
for it runs in the environment of an old library.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

from tools.named_weights import fingerprint, numbers, state

Arrays = dict[str, Any]
Case = Callable[[torch.dtype], tuple[dict[str, Any], Arrays]]


def fill(model: Any, precision: torch.dtype) -> dict[str, Any]:
    """Give the model the weights of its names; what `tools.named_weights.state` needs to make them again."""
    entries = model.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    shared = {name: seen for name, value in entries.items() if (seen := first.setdefault(id(value), name)) != name}
    shapes = {name: list(value.shape) for name, value in entries.items() if name not in shared}
    drawn_by_name = state(shapes, shared)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in drawn_by_name.items()})
    model.to(precision).eval()
    of = {name: name.replace("_m.", ".", 1) for name in shapes if name.split(".")[0].endswith("_m")}
    assert all(shapes[name] == shapes[student] for name, student in of.items()), "a twin that has not its student's shapes"
    own = {name: shape for name, shape in shapes.items() if name not in of}
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    buffers = [name for name in own if name not in set(trained)]
    assert trained == [name for name in own if name not in buffers], "the rows of the gradients would not stand in the order of the names"
    twins = sorted({name.split(".")[0] for name in of})
    return {"parameters": own, "buffers": buffers, "twins": twins, "shared": shared, "fingerprint": fingerprint(drawn_by_name)}


def gradients(model: Any, losses: Mapping[str, Any], whole: Callable[[str], bool]) -> Arrays:
    """Of every loss to every trained parameter: its norm and its product with `numbers` of the name.

    Args:
        model: With the parameters.
        losses: By name; those of ``loss`` itself are also kept in whole, or their corner, where
        whole: says so of the name of a parameter.
    """
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    arrays: Arrays = {}
    for title, loss in losses.items():
        found = torch.autograd.grad(loss, list(trained.values()), retain_graph=True, allow_unused=True)
        rows = []
        for (name, value), gradient in zip(trained.items(), found, strict=True):
            gradient = torch.zeros_like(value) if gradient is None else gradient
            along = torch.from_numpy(numbers(f"gradient of {name}", value.shape)).to(value.dtype)
            rows.append([float(gradient.norm()), float((gradient * along).sum())])
            if title == "loss" and whole(name):
                arrays[f"gradient/{name}"] = gradient if gradient.dim() < 2 else gradient[:8, :16]
        arrays[f"gradients/{title}"] = np.array(rows)
    return arrays


def plain(value: Any) -> np.ndarray:
    """What is stored: float32 or int64."""
    array = np.asarray(value.detach() if isinstance(value, torch.Tensor) else value)
    return np.array(array, dtype=np.float32 if array.dtype.kind == "f" else np.int64, order="C")


def apart(exact: Arrays, rough: Arrays) -> float:
    """The largest difference of two runs, relative to 1 or to the value, whichever is larger."""
    assert exact.keys() == rough.keys()
    return max(float((np.abs(exact[name] - rough[name]) / np.maximum(1, np.abs(exact[name]))).max()) for name in exact)


def write(family: str, cases: Mapping[str, Case], about: Mapping[str, Any], versions: tuple[str, ...], out: Path) -> None:
    """Run the cases and write ``out/<family>.json`` and ``.safetensors``.

    Args:
        family: The name of the files.
        cases: Each makes a description and arrays, in a precision.
        about: What else the file tells, behind the versions.
        versions: Of which packages.
        out: A folder.
    """
    arrays: Arrays = {}
    told: dict[str, Any] = {"cases": {}}
    for title, case in cases.items():
        description, exact = case(torch.float64)
        exact = {name: plain(value) for name, value in exact.items()}
        rough = {name: plain(value) for name, value in case(torch.float32)[1].items()}
        told["cases"][title] = {**description, "float32_differs": apart(exact, rough)}
        arrays |= {f"{title}/{name}": value for name, value in exact.items()}
    told |= {"versions": {name: version(name) for name in versions}, **about}
    content = save(arrays)
    out.joinpath(f"{family}.safetensors").write_bytes(content)
    short = re.sub(r"\[\s+([\d,\s]+?)\s+\]", lambda shape: f"[{' '.join(shape[1].split())}]", json.dumps(told, indent=1))
    out.joinpath(f"{family}.json").write_text(short + "\n")
    for title, case in told["cases"].items():
        print(f"{family} {title}: in float32 it is {case['float32_differs']:.1e} away")
    print(f"{family}: {len(arrays)} arrays, {len(content) / 1000:.0f} kB")
