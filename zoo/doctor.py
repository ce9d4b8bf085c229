"""What this machine has, what is missing, and what is known to break: one line each, with what to do about it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

from packaging.requirements import Requirement

DISTRIBUTION = "multimodal-zoo"
EXTRAS = {  # what each is for
    "faiss": "approximate search over many vectors",
    "mteb": "the protocol of the MTEB benchmark",
    "onnx": "export of the item encoder to ONNX",
    "ray": "embedding over a cluster of machines",
    "bench": "other libraries' losses, to compare with",
    "test": "the tests",
    "dev": "lint and types",
}
SHOWN = (
    "torch",
    "torchvision",
    "transformers",
    "timm",
    "open_clip_torch",
    "peft",
    "accelerate",
    "huggingface_hub",
    "safetensors",
    "triton",
)
LITTLE_DISK = 8 << 30  # bytes: a CUDA build of torch and one small language model
_IMPORT_SECONDS = 120


class Check(NamedTuple):
    """One line."""

    name: str
    status: Literal["ok", "warn", "bad"]
    says: str
    remedy: str = ""


def examine(*, data_root: Path | None, environment: Mapping[str, str], folder: Path | None = None) -> list[Check]:
    """All checks of this machine, without a network.

    Args:
        data_root: The folder of data folders, as the command line found it.
        environment: Variables of the process; read here are those that other libraries obey.
        folder: Where runs would be written; None: the current one.
    """
    from zoo.fetch import hub_cache

    try:
        required = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        advice = "pip install -e ."
        return [Check("installation", "bad", f"this copy of the zoo is not installed: there is no distribution {DISTRIBUTION}", advice)]
    return [
        Check("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.executable}"),
        *requirements(required),
        *versions(),
        *extras(required),
        *devices(),
        threads(environment, os.cpu_count() or 1),
        *clashes(),
        *places({"runs": folder or Path.cwd(), "hub cache": hub_cache()}),
        *hub(environment),
        data(data_root),
    ]


def requirements(required: list[str]) -> Iterator[Check]:
    """Whether what the zoo cannot do without is there, in a version that fits."""
    for requirement in _needed(required, ""):
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            yield Check(requirement.name, "bad", f"not installed, wanted is {requirement}", f"pip install '{requirement}'")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            yield Check(requirement.name, "bad", f"version {found}, wanted is {requirement}", f"pip install '{requirement}'")


def versions() -> Iterator[Check]:
    """Of the libraries that decide results."""
    said = []
    for name in SHOWN:
        try:
            said.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            said.append(f"no {name}")
    yield Check("versions", "ok", ", ".join(said))


def extras(required: list[str]) -> Iterator[Check]:
    """Which optional extras are installed."""
    for extra, purpose in EXTRAS.items():
        missing = []
        for requirement in _needed(required, extra):
            try:
                version(requirement.name)
            except PackageNotFoundError:
                missing.append(requirement.name)
        says = f"not installed ({', '.join(missing)} missing)" if missing else "installed"
        yield Check(
            f"extra {extra}", "ok", f"{says}; for {purpose}", f"pip install '{DISTRIBUTION}[{extra}]' if you want it" if missing else ""
        )


def devices() -> Iterator[Check]:
    """What can compute, and whether the Triton kernels run on it."""
    import torch

    if not torch.cuda.is_available():
        kind = "an Apple GPU (mps)" if torch.backends.mps.is_available() else f"no GPU; CPU with {os.cpu_count()} cores"
        yield Check("devices", "ok", f"{kind}; torch {torch.__version__}")
        yield Check(
            "triton kernels", "ok", "cannot run without a CUDA device: the contrastive loss runs in its chunked form, which is as exact"
        )
        return
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        yield Check(f"device {i}", "ok", f"{about.name}, {about.total_memory / 2**30:.0f} GiB, capability {about.major}.{about.minor}")
    able = torch.cuda.get_device_capability() >= (8, 0)
    if torch.version.cuda is None or find_spec("triton") is None:
        yield Check(
            "triton kernels", "warn", "cannot run: there is no package triton, or torch is not built for CUDA", "pip install triton"
        )
    elif not able:
        yield Check("triton kernels", "warn", "cannot run: they need a device of capability 8.0", "nothing: the chunked form is used")
    else:
        yield Check("triton kernels", "ok", "can run")


def threads(environment: Mapping[str, str], cores: int) -> Check:
    """More threads than cores slow each other down, and so do many processes that all take every core."""
    import torch

    allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else cores
    says = f"torch uses {torch.get_num_threads()} threads on {allowed} cores"
    says += "".join(f", {name}={environment[name]}" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in environment)
    if torch.get_num_threads() > allowed:
        return Check("threads", "warn", says, f"set OMP_NUM_THREADS={allowed}, or run.threads: {allowed} in the recipe")
    return Check("threads", "ok", says)


def clashes() -> Iterator[Check]:
    """Combinations of packages that are known to break each other. Each is tried in a process of its own, as it may bring it down."""
    found = {name: find_spec(name) is not None for name in ("torchaudio", "torchvision", "peft")}
    if found["torchaudio"]:
        yield _tried(
            "torchaudio beside peft",
            "import torchaudio, peft",
            "torchaudio does not fit this torch, and its mere presence breaks import peft",
            "pip uninstall torchaudio: the zoo does not use it",
        )
    if not found["torchvision"]:
        yield Check(
            "torchvision",
            "bad",
            "not installed: timm and open_clip cannot be imported",
            "pip install torchvision, from the index of your torch",
        )
    else:
        yield _tried(
            "torchvision",
            "import torch, torchvision; torch.ops.torchvision.nms",
            "its operators are not there: it was built for another torch, such as the CUDA build beside a torch for the CPU",
            "install both from one index: pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu",
        )
    yield kernels()


def kernels() -> Check:
    """Hugging Face ships a distribution whose import name is ``kernels``; anything else of that name hides it from transformers."""
    spec = find_spec("kernels")
    if spec is None:
        return Check("package kernels", "ok", "none, and none is needed")
    if spec.origin is None:
        return Check("package kernels", "ok", "a folder of that name lies on the path; it is no package and hides nothing")
    try:
        return Check("package kernels", "ok", f"Hugging Face's, version {version('kernels')}, beside the zoo's own zoo.kernels")
    except PackageNotFoundError:
        return Check(
            "package kernels",
            "bad",
            f"{spec.origin} hides the package that transformers looks for",
            "rename it, or start in another folder",
        )


def places(folders: Mapping[str, Path]) -> Iterator[Check]:
    """Whether there is room, and whether it may be written to."""
    for name, folder in folders.items():
        there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        free = shutil.disk_usage(there).free
        says = f"{folder.absolute()}, {free / 2**30:.0f} GiB free"
        if not os.access(there, os.W_OK | os.X_OK):
            yield Check(name, "bad", f"{says}; {there} may not be written to", "choose another folder, or change its permissions")
        elif free < LITTLE_DISK:
            yield Check(name, "warn", says, f"make room: a run with weights of a hub needs more than {LITTLE_DISK >> 30} GiB")
        else:
            yield Check(name, "ok", says)


def hub(environment: Mapping[str, str]) -> Iterator[Check]:
    """Where the hub's library looks, and whether it may use the network."""
    from huggingface_hub import constants

    flags = [
        f"{name}={environment[name]}"
        for name in ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
        if name in environment
    ]
    offline = "stays offline: only what was fetched before is found" if constants.HF_HUB_OFFLINE else "may use the network"
    cached = sorted(p.name for p in Path(constants.HF_HUB_CACHE).glob("models--*"))
    yield Check(
        "hub", "ok", f"{offline}; {len(cached)} repositories in {constants.HF_HUB_CACHE}" + (f"; {', '.join(flags)}" if flags else "")
    )


def data(root: Path | None) -> Check:
    """The folder of data folders."""
    if root is None:
        return Check("data", "ok", "no folder of data sets is named", "zoo ... --data DIR, or ZOO_DATA=DIR, for recipes that read one")
    if not root.is_dir():
        return Check("data", "bad", f"{root} is no folder", "correct --data or ZOO_DATA")
    sets = sorted(p.name for p in root.iterdir() if p.is_dir() and any((p / f"notes.{kind}").is_file() for kind in ("parquet", "csv")))
    return Check("data", "ok", f"{root} holds {', '.join(sets) or 'no data set of the zoo'}")


def _needed(required: list[str], extra: str) -> list[Requirement]:
    """The requirements of an extra, or with "" those of the zoo itself, that hold on this platform."""
    found = [Requirement(text) for text in required]
    marked = [r for r in found if (r.marker is not None and "extra" in str(r.marker)) == bool(extra)]
    return [r for r in marked if r.marker is None or r.marker.evaluate({"extra": extra})]


def _tried(name: str, code: str, broken: str, remedy: str) -> Check:
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=_IMPORT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return Check(name, "warn", f"could not be imported within {_IMPORT_SECONDS} s", "run zoo doctor again on an idle machine")
    if done.returncode == 0:
        return Check(name, "ok", "fit this torch")
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return Check(name, "bad", f"{broken} ({last})", remedy)
