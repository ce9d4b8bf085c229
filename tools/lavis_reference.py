"""Builds an environment of salesforce-lavis 1.0.2 and writes its golden files: `make golden`.

    python tools/lavis_reference.py --env .venv-lavis --out tests/golden

LAVIS pins libraries of 2022 and its ``import lavis`` asks for forty more, so it stands alone: an environment of 110 MB, made once, of the
packages that its ALBEF and BLIP need and that the zoo has not, or not in its versions. torch and what else is BORROWED are those of the
interpreter that runs this. What LAVIS computes is in tools/lavis_cases.py; the tests read the files and need no LAVIS.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

CASES = Path(__file__).resolve().with_name("lavis_cases.py")
PINNED = (
    "salesforce-lavis==1.0.2",
    "transformers==4.26.1",
    "tokenizers==0.13.3",  # the last that 4.26 takes; its wheels end with Python 3.11
    "huggingface_hub==0.20.3",
    "timm==0.6.13",
    "fairscale==0.4.4",
    "omegaconf==2.3.0",
    "antlr4-python3-runtime==4.9.3",
    "iopath==0.1.10",
    "portalocker",
)
BORROWED = ("torch", "torchvision", "numpy", "pandas", "safetensors", "requests", "yaml", "tqdm", "packaging", "filelock", "regex")


def build(env: Path) -> Path:
    """Make the environment, or leave one alone that holds just these packages; its interpreter."""
    python, stamp = env / "bin" / "python", env / ".lavis"
    wanted = "\n".join((*PINNED, *_borrowed()))
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    if sys.version_info[:2] != (3, 11):
        raise SystemExit(
            f"LAVIS' tokenizers has wheels up to Python 3.11, and this is {sys.version.split()[0]}: run this with a Python 3.11"
        )
    if env.is_dir() and any(env.iterdir()) and not stamp.is_file():
        raise SystemExit(f"{env} holds something else: give --env a folder that is not there, such as .venv-lavis")
    if missing := [name for name in BORROWED if not _stands(name)]:
        raise SystemExit(
            f"{sys.executable} lacks {', '.join(missing)}, which LAVIS borrows: run this with the Python that `make venv` filled"
        )
    print(f"Installing salesforce-lavis 1.0.2 into {env}: 110 MB on disk.", flush=True)
    env.mkdir(parents=True, exist_ok=True)
    stamp.write_text("")  # ours, also if what follows is interrupted
    _run([sys.executable, "-m", "venv", "--without-pip", str(env)], f"no environment could be made at {env}")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    _run([*install, *PINNED], "pip could not install LAVIS' packages; with what it says above repaired, run this again")
    packages = _run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], "the environment's Python does not run"
    )
    Path(packages.strip(), "borrowed.pth").write_text("\n".join(_borrowed()) + "\n")  # after its own packages: 4.26 wins over ours
    stamp.write_text(wanted)
    return python


def _borrowed() -> list[str]:
    return sorted({sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]})


def _stands(name: str) -> bool:
    return any(Path(folder, name).is_dir() for folder in _borrowed())


def _run(command: list[str], otherwise: str) -> str:
    """What a command prints; its errors go to the terminal as they come."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{otherwise} (exit status {done.returncode})")
    return done.stdout


def write(python: Path, out: Path) -> None:
    """Run the cases with one thread, offline, and say what they wrote."""
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(CASES.parents[1])}
    done = subprocess.run([str(python), str(CASES), "--out", str(out)], env={**os.environ, **settings}, check=False)
    if done.returncode:
        raise SystemExit(f"LAVIS failed, see above; the files in {out} are as before, or partly new (exit status {done.returncode})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", type=Path, default=Path(".venv-lavis"), help="the environment's folder, made if it is missing")
    parser.add_argument("--out", type=Path, default=Path("tests/golden"), help="the folder of the golden files")
    given = parser.parse_args()
    write(build(given.env), given.out)


if __name__ == "__main__":
    main()
