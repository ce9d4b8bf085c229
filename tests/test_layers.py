"""The floors of the house: an import goes down, never up and never sideways."""

import ast
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = (  # from the ground up; a module that no floor names fails
    ("errors", "types", "kernels.*", "recipes"),
    (
        "abilities",
        "bundle",
        "config",
        "distributed",
        "files",
        "foreign",
        "depths",
        "freeze",
        "interrupt",
        "labelled",
        "loading",
        "measure",
        "pictures",
        "attention",
        "block_masks",
        "pixels",
        "thumbnail",
    ),
    (
        "columns",
        "source",
        "registry",
        "checkpoint",
        "adapters",
        "sections",
        "stages",
        "vectors",
        "metric",
        "presence",
        "shown",
        "vocabulary",
        "word_masks",
        "block",
        "positions",
        "relative_positions",
        "arithmetic",
    ),
    ("splice", "trunk", "joints", "momentum", "collate", "gradcache", "lora", "card", "projection", "calibration", "generation"),
    ("hub",),
    ("answers", "batches", "encoders.*", "backbones.*", "connectors.*", "fusions.*", "objectives.*", "data.*"),
    ("models.*", "recipe"),
    (
        "evaluate.*",
        "feature_cache",
        "schema",
        "sampler",
        "optimizer",
        "log",
        "saver",
        "update",
        "matrix",
        "contenders",
        "trials",
        "captions",
        "picture_files",
        "zeroshot",
        "reranking",
        "foreign_settings",
        "joint_settings",
        "unconvert",
    ),
    ("fetch", "balance", "init_from", "opened", "shapes", "search", "export", "convert", "caption_questions"),
    ("train", "report", "bench", "doctor", "examine", "questions"),
    ("run", "validate"),
    ("embed", "embed_shards", "study", "diagnose", "capfilt", "describe"),
    ("compare", "embed_ray"),
    ("__init__",),
    ("commands.*",),
    ("cli",),
    ("__main__",),
)
MODULES = {
    (f"{'zoo.' if folder != 'zoo' else ''}{'.'.join(path.relative_to(ROOT).with_suffix('').parts)}"): path
    for folder in ("zoo", "fusions", "kernels")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not any(p.is_symlink() for p in path.parents if p != ROOT and ROOT in p.parents)
}


def floor(module: str) -> int:
    """The floor that names ``module``; a module of a package brings its package along: ``zoo`` is the door."""
    name = module.removeprefix("zoo.") if module != "zoo" else "__init__"
    found = [i for i, patterns in enumerate(FLOORS) if any(fnmatchcase(name, p) for p in patterns)]
    assert len(found) == 1, f"{module}: name it on one floor, not on {len(found)}"
    return found[0]


def imported(module: str, source: str) -> set[str]:
    """The modules of the zoo that ``source`` imports, at the top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], *([base] if base else [])])
            found |= {known(f"{base}.{a.name}") or base for a in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and isinstance(node.args[0], ast.Constant):
            found.add(node.args[0].value)
    return {name for name in found if name.partition(".")[0] == "zoo"}


def known(name: str) -> str | None:
    """``name`` if it is a module or a folder of them, and not a thing inside a module."""
    return name if name in MODULES or any(m.startswith(f"{name}.") for m in MODULES) else None


def faults(module: str, source: str) -> list[str]:
    """What ``module`` imports although it stands no lower."""
    package = module.rpartition(".")[0]
    own = {name for name in imported(module, source) if name.startswith(f"{package}._") and package != "zoo"}
    return [name for name in sorted(imported(module, source) - own) if floor(name) >= floor(module)]


def test_the_house_was_found():
    assert {"zoo.__init__", "zoo.registry", "zoo.fusions.early", "zoo.kernels.contrastive", "zoo.models.notellm2"} <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    found = faults(module, MODULES[module].read_text(encoding="utf-8"))
    assert not found, f"{module} (floor {floor(module)}) imports {', '.join(f'{f} (floor {floor(f)})' for f in found)}"


@pytest.mark.parametrize(
    "module, source, found",
    [
        ("zoo.config", "from zoo.registry import make", ["zoo.registry"]),
        ("zoo.config", "def f():\n    import zoo.registry", ["zoo.registry"]),
        ("zoo.config", "from zoo import registry", ["zoo.registry"]),
        ("zoo.config", "from . import registry", ["zoo.registry"]),
        ("zoo.config", "import zoo", ["zoo"]),
        ("zoo.config", "from zoo import build", ["zoo"]),
        ("zoo.fusions.early", "from .micl import x", ["zoo.fusions.micl"]),
        ("zoo.fusions.early", "from ..train import x", ["zoo.train"]),
        ("zoo.fusions.early", "from zoo.objectives import infonce", ["zoo.objectives.infonce"]),
        ("zoo.fusions.early", "from importlib import import_module\nimport_module('zoo.train')", ["zoo.train"]),
        ("zoo.fusions.early", "from zoo.fusions._prompt import note", []),
        ("zoo.fusions.early", "from zoo.objectives._two_sides import x", ["zoo.objectives._two_sides"]),
        ("zoo.fusions.early", "from zoo.joints import Parts\nimport torch", []),
        ("zoo.joints", "from zoo.collate import stack", ["zoo.collate"]),
    ],
)
def test_the_check_sees(module, source, found):
    assert faults(module, source) == found


def test_a_module_that_no_floor_names_fails():
    with pytest.raises(AssertionError, match=r"zoo\.helpers: name it on one floor"):
        floor("zoo.helpers")


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("zoo.kernels.")])
def test_a_kernel_can_be_lifted_into_any_project(module):
    allowed = {*sys.stdlib_module_names, "torch", "triton", "einops"}
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level < 2, module
            names = [] if node.level else [node.module]  # a relative import moves along
        assert all(n.partition(".")[0] in allowed for n in names), (module, names)


@pytest.mark.parametrize("module", MODULES)
def test_every_file_says_why_it_exists_and_stays_short(module):
    text = MODULES[module].read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), f"{module}: open the file with one sentence"
    assert len(text.splitlines()) <= 350, f"{module}: {len(text.splitlines())} lines"
