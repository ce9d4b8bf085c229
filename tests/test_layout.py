"""Where things lie, and what importing them costs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def python(*arguments, cwd=ROOT, path=ROOT):
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env={**os.environ, "PYTHONPATH": str(path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


HEAVY = "[m for m in ('torch', 'transformers', 'pydantic', 'timm', 'open_clip', 'accelerate', 'duckdb') if m in sys.modules]"


def test_importing_the_door_imports_nothing_heavy():
    assert python("-c", f"import sys, zoo; zoo.names; dir(zoo); print({HEAVY})") == "[]"


def test_help_imports_nothing_heavy():
    code = (
        "import sys, runpy; sys.argv = ['zoo', '--help']\n"
        "try: runpy.run_module('zoo', run_name='__main__')\n"
        f"except SystemExit as e: assert not e.code\nprint({HEAVY})"
    )
    assert python("-c", code).splitlines()[-1] == "[]"


def test_every_name_of_the_door_opens():
    code = "import zoo; print([n for n in zoo.__all__ if not callable(getattr(zoo, n))])"
    assert python("-c", code) == "[]"


def test_a_function_is_not_hidden_by_the_module_of_its_name():
    code = "import zoo, zoo.train, zoo.run; from zoo.train import train; print(zoo.train is train, callable(zoo.run))"
    assert python("-c", code) == "True True"


def test_the_door_has_no_other_names():
    code = "import zoo\ntry: zoo.bild\nexcept AttributeError as e: print(e)"
    assert python("-c", code) == "module 'zoo' has no attribute 'bild'"


@pytest.mark.parametrize("folder", ["fusions", "kernels", "recipes", "tests"])
def test_folders_outside_are_no_packages(folder):
    """A kernels/__init__.py in the current folder would be what transformers imports in the place of Hugging Face's."""
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("folder", ["fusions", "kernels", "recipes"])
def test_links_lead_outside(folder):
    assert (ROOT / "zoo" / folder).resolve() == ROOT / folder


def test_transformers_imports_from_the_root():
    assert python("-c", "import transformers; print(transformers.__name__)", path="") == "transformers"


def test_a_checkout_that_lost_its_links(tmp_path):
    for folder in ("zoo", "fusions", "kernels", "recipes"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "fusions", "kernels", "recipes"))
    assert not (tmp_path / "zoo" / "fusions").exists()
    code = (
        "import zoo, zoo.fusions.early, zoo.kernels.contrastive; from zoo.recipe import recipes\n"
        "print(zoo.__file__, zoo.fusions.early.__file__, 'early' in zoo.names('fusion'), recipes())"
    )
    told = python("-c", code, cwd=tmp_path, path=tmp_path)
    whole = python("-c", "from zoo.recipe import recipes; print(recipes())")
    assert told == f"{tmp_path}/zoo/__init__.py {tmp_path}/fusions/early.py True {whole}"


def test_a_link_that_became_a_text_file(tmp_path):
    """Git on Windows writes a link as a file that holds its target."""
    shutil.copytree(ROOT / "zoo", tmp_path / "zoo", ignore=shutil.ignore_patterns("__pycache__", "fusions", "kernels", "recipes"))
    shutil.copytree(ROOT / "fusions", tmp_path / "fusions")
    (tmp_path / "zoo" / "fusions").write_text("../fusions")
    assert python("-c", "import zoo; print('early' in zoo.names('fusion'))", cwd=tmp_path, path=tmp_path) == "True"


def test_every_package_and_every_recipe_folder_is_in_the_wheel():
    import tomllib

    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = set(tool["packages"])
    folders = {p.parent.relative_to(ROOT) for p in (ROOT / "zoo").rglob("*.py")} | {Path("zoo/fusions"), Path("zoo/kernels")}
    shipped = {p.parent for p in (ROOT / "recipes").rglob("*.yaml")}
    folders |= {Path("zoo") / p.relative_to(ROOT) for p in shipped}
    assert shipped
    assert packages == {".".join(f.parts) for f in folders} | {"zoo.recipes"}
    assert all("*.yaml" in tool["package-data"][".".join(("zoo", *p.relative_to(ROOT).parts))] for p in shipped)
