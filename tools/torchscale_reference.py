"""Builds an environment of torchscale 0.2.0 and writes its golden files of BEiT-3: `make golden`.

    python tools/torchscale_reference.py --env .venv-torchscale --out tests/golden

torchscale is small, and asks for packages that its BEiT-3 does not need. torch, timm and what else is BORROWED are those of the interpreter
that runs this. What it computes is in tools/torchscale_cases.py; the tests read the files and need no torchscale.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
from pathlib import Path

CASES = Path(__file__).resolve().with_name("torchscale_cases.py")
PINNED = ("torchscale==0.2.0",)
BORROWED = ("torch", "timm", "numpy", "safetensors", "einops")


def build(env: Path) -> Path:
    """Make the environment, or leave one alone that holds just these packages; its interpreter."""
    python, stamp = env / "bin" / "python", env / ".torchscale"
    wanted = "\n".join((*PINNED, *_borrowed()))
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    if env.is_dir() and any(env.iterdir()) and not stamp.is_file():
        raise SystemExit(f"{env} holds something else: give --env a folder that is not there, such as .venv-torchscale")
    if missing := [name for name in BORROWED if not any(Path(folder, name).is_dir() for folder in _borrowed())]:
        raise SystemExit(
            f"{sys.executable} lacks {', '.join(missing)}, which torchscale borrows: run this with the Python that `make venv` filled"
        )
    print(f"Installing torchscale 0.2.0 into {env}: 2 MB on disk.", flush=True)
    env.mkdir(parents=True, exist_ok=True)
    stamp.write_text("")  # ours, also if what follows is interrupted
    _run([sys.executable, "-m", "venv", "--without-pip", str(env)], f"no environment could be made at {env}")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    _run([*install, *PINNED], "pip could not install torchscale; with what it says above repaired, run this again")
    packages = _run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], "the environment's Python does not run"
    )
    Path(packages.strip(), "borrowed.pth").write_text("\n".join(_borrowed()) + "\n")
    stamp.write_text(wanted)
    return python


def _borrowed() -> list[str]:
    return sorted({sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]})


def _run(command: list[str], otherwise: str) -> str:
    """What a command prints; its errors go to the terminal as they come."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{otherwise} (exit status {done.returncode})")
    return done.stdout


def write(python: Path, out: Path) -> None:
    """Run the cases and say what they wrote."""
    settings = [f"PYTHONPATH={CASES.parents[1]}", "OMP_NUM_THREADS=1", "PYTHONWARNINGS=ignore"]
    done = subprocess.run(["env", *settings, str(python), str(CASES), "--out", str(out)], check=False)
    if done.returncode:
        raise SystemExit(f"torchscale failed, see above; the files in {out} are as before (exit status {done.returncode})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", type=Path, default=Path(".venv-torchscale"), help="the environment's folder, made if it is missing")
    parser.add_argument("--out", type=Path, default=Path("tests/golden"), help="the folder of the golden files")
    given = parser.parse_args()
    write(build(given.env), given.out)


if __name__ == "__main__":
    main()
