"""zoo: multimodal models as small parts that fit together.

    model = zoo.build("notellm2", backbone="qwen")

Importing this package imports neither torch nor any model: each name below is fetched on first use.
"""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the same names, spelled out for editors and type checkers
    from zoo.capfilt import capfilt as capfilt
    from zoo.convert import convert as convert
    from zoo.diagnose import diagnose as diagnose
    from zoo.errors import ZooError as ZooError
    from zoo.hub import from_pretrained as from_pretrained
    from zoo.hub import load as load
    from zoo.hub import save as save
    from zoo.recipe import build_from as build_from
    from zoo.recipe import load_recipe as load_recipe
    from zoo.registry import build as build
    from zoo.registry import info as info
    from zoo.registry import list_models as list_models
    from zoo.registry import make as make
    from zoo.registry import names as names
    from zoo.registry import register as register
    from zoo.run import evaluate as evaluate
    from zoo.run import run as run
    from zoo.train import train as train

_HOME = {
    "ZooError": "errors",
    "build": "registry",
    "build_from": "recipe",
    "capfilt": "capfilt",
    "convert": "convert",
    "diagnose": "diagnose",
    "evaluate": "run",
    "from_pretrained": "hub",
    "info": "registry",
    "list_models": "registry",
    "load": "hub",
    "load_recipe": "recipe",
    "make": "registry",
    "names": "registry",
    "register": "registry",
    "run": "run",
    "save": "hub",
    "train": "train",
}
__all__ = [*_HOME]
__version__ = "0.1.0"

for _folder in ("fusions", "kernels", "recipes"):  # a checkout that lost its links: Windows, some archives
    _link, _home = (Path(__file__).resolve().parents[i] / _folder for i in (0, 1))
    if not _link.is_dir() and _home.is_dir():
        _spec = ModuleSpec(f"zoo.{_folder}", None, is_package=True)
        _spec.submodule_search_locations = [str(_home)]
        globals()[_folder] = sys.modules[_spec.name] = module_from_spec(_spec)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'zoo' has no attribute {name!r}")
    return getattr(import_module(f"zoo.{_HOME[name]}"), name)


class _Door(ModuleType):
    """``zoo.train`` is the function: the import system must not put the module of the same name in its place."""

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _HOME or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Door


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
