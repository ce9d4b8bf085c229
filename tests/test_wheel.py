"""The wheel holds everything, and lives beside Hugging Face's distribution ``kernels``."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SITE = Path(sysconfig.get_path("purelib"))
pytestmark = pytest.mark.slow


def run(*command, cwd):
    """Run ``command`` where neither this checkout nor a PYTHONPATH is in sight."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, for setuptools leaves a build folder behind, and would pack what an older one held."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in ("zoo", "fusions", "kernels", "recipes"):
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, cwd=source)
    (made,) = out.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def clean(tmp_path_factory, wheel):
    """The Python of a new environment with the wheel in it.

    What the wheel needs is not downloaded again: a .pth file shows the packages of this environment, though not its editable
    install, since a .pth file inside a folder that a .pth file names is not read.
    """
    home = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    python = home / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home))
    (site / "installed_before.pth").write_text(f"{SITE}\n")
    install(python, "--no-deps", "--no-index", "--force-reinstall", wheel)
    return python


def install(python, *what):
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check", *what, cwd=python.parent)


def test_holds_the_parts_and_nothing_else(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = [f for folder in ("zoo", "fusions", "kernels", "recipes") for f in (ROOT / folder).rglob("*")]
    files = [f for f in files if f.is_file() and f.suffix in (".py", ".yaml", ".html", ".typed", ".md", ".txt")]
    expected = {f.relative_to(ROOT).as_posix() for f in files}
    assert held == {name if name.startswith("zoo/") else f"zoo/{name}" for name in expected}


def test_says_its_licence_and_command(wheel):
    archive = zipfile.ZipFile(wheel)
    names = {Path(n).name: n for n in archive.namelist() if ".dist-info/" in n}
    assert b"License-Expression: Apache-2.0" in archive.read(names["METADATA"])
    assert b"zoo = zoo.cli:main" in archive.read(names["entry_points.txt"])
    assert "LICENSE" in names


BUILD = """
import zoo
from zoo.recipe import load_recipe, recipes
model = zoo.build("notellm2", backbone="tiny_lm", vision="tiny_image", connector="linear", fusion=["micl", "gated_late"])
vectors = model.encode([{"title": "a"}])
assert all(load_recipe(name).model for name in recipes())
print(zoo.__file__, len(vectors), ",".join(recipes()))
"""


def test_in_a_clean_environment_beside_kernels(clean, tmp_path):
    def works():
        file, rows, shipped = run(clean, "-W", "ignore", "-c", BUILD, cwd=tmp_path).splitlines()[-1].split()
        assert Path(file).is_relative_to(clean.parents[1])
        assert rows == "1"
        assert "demo" in shipped.split(",")

    works()
    assert "Usage" in run(clean.parent / "zoo", "--help", cwd=tmp_path)
    assert run(clean, "-c", "import importlib.util as u; print(u.find_spec('kernels'))", cwd=tmp_path) == "None"
    assert run(clean, "-c", "import transformers; print('imported')", cwd=ROOT) == "imported"

    install(clean, "kernels>=0.17,<0.18")
    theirs = "import kernels, transformers, transformers.integrations.hub_kernels; print(kernels.get_kernel.__module__, kernels.__file__)"
    for cwd in (tmp_path, ROOT):  # in the root, our folder of that name lies in the current folder
        module, file = run(clean, "-c", theirs, cwd=cwd).split()
        assert module.startswith("kernels.")
        assert Path(file).is_relative_to(clean.parents[1])
    works()
