"""The README's commands run, in a copy of the checkout, without any data beside it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return [block for kind, block in FENCE.findall(text) if kind == language]


def commands():
    """Every command of the README's sh blocks, continued lines joined; what fetches the code, and the suite itself, are left out."""
    lines = [line.strip() for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith(("#", "git clone", "cd ", "pip install", "make test"))]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme") / "checkout"
    shutil.copytree(ROOT, folder, symlinks=True, ignore=shutil.ignore_patterns(".venv*", ".git", "runs", "__pycache__", ".*_cache"))
    return folder


@pytest.fixture(scope="module")
def environment():
    binaries = Path(sys.executable).parent
    (binaries.parent / ".installed").touch()  # else make would install the copy, which is gone afterwards, in the place of the checkout
    return {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", "VENV": str(binaries.parent), "PYTHONWARNINGS": "default"}


@pytest.mark.slow
def test_every_command_runs(copy, environment):
    """In their order, since a run is evaluated that an earlier command trained."""
    assert commands()
    for command in commands():
        done = subprocess.run(command, shell=True, cwd=copy, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def test_the_python_gives_the_output_that_is_shown(copy, environment):
    """A python block followed by a text block is a script and what it prints."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"^```python\n(.*?)^```\n+```text\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert shown
    for code, output in shown:
        done = subprocess.run([sys.executable, "-c", code], cwd=copy, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == output.strip()
