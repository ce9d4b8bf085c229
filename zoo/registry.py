"""Names to parts: which file makes "gated_late", and is every keyword it was given one that it takes?

The folders are the registry. A part of kind "fusion" named "gated_late" stands in ``fusions/gated_late.py`` and marks
its maker with ``@register("fusion", "gated_late")``. A file is imported when its name is asked for, never before.
Other distributions add parts through the entry-point group ``zoo.<kind>``, a notebook by the decorator alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from inspect import getdoc, signature
from pkgutil import iter_modules
from typing import Any, TypeVar

from zoo.errors import ZooError, unknown
from zoo.types import Remote

HOMES = {
    "model": "zoo.models",
    "encoder": "zoo.encoders",
    "backbone": "zoo.backbones",
    "connector": "zoo.connectors",
    "fusion": "zoo.fusions",
    "objective": "zoo.objectives",
    "data": "zoo.data",
}
JOINTS = ("arrange", "trunk", "combine", "schedule")

Maker = TypeVar("Maker", bound=Callable[..., Any])
Remotes = Callable[[Mapping[str, Any]], Sequence[Remote]]


@dataclass(frozen=True)
class Entry:
    """What the zoo knows of one part without making it.

    Attributes:
        joints: A fusion's: the joints it fills, each with the plug-in that it brings for it (None: itself). A model's: the
            joints it has, each with the plug-in that fills it by default.
        needs: A fusion's: what a model must have besides the joints: ``logits`` of each modality, a linear ``head`` that all
            share, rows of known ``classes``, blocks that read a ``memory``, or text and picture in one ``sequence``.
        gives: A model's: what it has of these.
        paper: Where the method comes from.
        licence: Of the weights that it loads, and of code that is not the zoo's; empty where there are none.
        remote: What it reads from a hub under given settings; None if it never does.
    """

    kind: str
    name: str
    maker: Callable[..., Any]
    joints: Mapping[str, str | None]
    needs: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()
    paper: str = ""
    licence: str = ""
    remote: Remotes | None = None

    @property
    def summary(self) -> str:
        return (getdoc(self.maker) or "").partition("\n")[0]


@dataclass
class _Known:
    entries: dict[tuple[str, str], Entry] = field(default_factory=dict)


_known = _Known()


def register(
    kind: str,
    name: str,
    *,
    joints: tuple[str, ...] | Mapping[str, str | None] = (),
    needs: tuple[str, ...] = (),
    gives: tuple[str, ...] = (),
    paper: str = "",
    licence: str = "",
    remote: Remotes | None = None,
) -> Callable[[Maker], Maker]:
    """Mark the function or class that makes the part ``name`` of ``kind``.

    Args:
        kind: One of `HOMES`.
        name: The stem of the file it stands in.
        joints: A fusion's: the joints it fills, ``("combine",)``, or with a plug-in that it brings along,
            ``{"schedule": None, "combine": "uncertainty"}``. A model's: the joints it has and what fills each by default.
        needs: A fusion's, as of `Entry`.
        gives: A model's, as of `Entry`.
        paper: Where the method comes from: authors, year, link.
        licence: Of the weights that it loads, and of code that is not its distribution's.
        remote: All its settings, defaults included, to what it then reads from a hub. It stands beside the code that reads.

    Raises:
        ZooError: If another module already makes this name, or kind or joint do not exist.
    """
    if kind not in HOMES:
        raise ZooError(unknown("kind", kind, HOMES))
    filled = dict(joints) if isinstance(joints, Mapping) else dict.fromkeys(joints)
    for joint in filled:
        if joint not in JOINTS:
            raise ZooError(unknown("joint", joint, JOINTS))
    if kind == "fusion" and not filled:
        raise ZooError(f"fusion {name!r} declares no joint: write joints=(...), of {', '.join(JOINTS)}")

    def mark(maker: Maker) -> Maker:
        known = _known.entries.get((kind, name))
        module = known.maker.__module__ if known is not None else _files(kind).get(name, maker.__module__)
        if module != maker.__module__:
            raise ZooError(f"{kind} {name!r} is made by {module} and again by {maker.__module__}")
        _known.entries[kind, name] = Entry(kind, name, maker, filled, needs, gives, paper, licence, remote)
        return maker

    return mark


@cache
def _files(kind: str) -> dict[str, str]:
    """Name to module for every file in the folder of ``kind``; nothing is imported."""
    home = find_spec(HOMES[kind])
    paths = (home and home.submodule_search_locations) or []
    return {m.name: f"{HOMES[kind]}.{m.name}" for m in iter_modules(paths) if not m.name.startswith("_")}


@cache
def _plugins(kind: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for e in entry_points(group=f"zoo.{kind}"):
        module = e.value.partition(":")[0]
        other = found.get(e.name) or _files(kind).get(e.name)
        if other not in (None, module):
            raise ZooError(f"{kind} {e.name!r} is made by {other} and again by {module}: uninstall one, or rename its entry point")
        found[e.name] = module
    return found


def names(kind: str) -> list[str]:
    """Every name of ``kind`` that `make` understands, sorted.

    Raises:
        ZooError: If there is no such kind.
    """
    if kind not in HOMES:
        raise ZooError(unknown("kind", kind, HOMES))
    return sorted({n for k, n in _known.entries if k == kind} | {*_files(kind)} | {*_plugins(kind)})


def list_models(pattern: str = "*") -> list[str]:
    """Names of the models that match a shell pattern, such as ``"*blip*"``."""
    return [n for n in names("model") if fnmatch(n, pattern)]


def entry(kind: str, name: str) -> Entry:
    """What is known of ``name``, importing its file on first use.

    Raises:
        ZooError: If there is no such name, or its file does not register it.
    """
    if name not in names(kind):
        raise ZooError(unknown(kind, name, names(kind)))
    if (kind, name) not in _known.entries:
        module = _files(kind).get(name) or _plugins(kind)[name]
        import_module(module)
        if (kind, name) not in _known.entries:
            raise ZooError(f"{module} does not register the {kind} {name!r}: a file registers its own name")
    return _known.entries[kind, name]


def lookup(kind: str, name: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The maker of ``name``, and the keywords that the name itself carries: ``timm:resnet18`` carries ``arch``.

    Raises:
        ZooError: If there is no such name, or it takes nothing after a colon, or nothing stands there.
    """
    stem, colon, arch = name.partition(":")
    maker = entry(kind, stem).maker
    if not colon:
        return maker, {}
    if "arch" not in signature(maker).parameters:
        raise ZooError(f"{kind} {stem!r} takes nothing after a colon: write {stem!r}, not {name!r}")
    if not arch:
        raise ZooError(f"{kind} {name!r} names nothing after its colon: write '{stem}:<name>'")
    return maker, {"arch": arch}


def make(kind: str, spec: str | Mapping[str, Any], /, *positional: Any, **given: Any) -> Any:
    """Make a part from its name, or from a mapping with ``name`` and keywords, as a recipe writes it.

    Args:
        kind: One of `HOMES`.
        spec: ``"gated_late"`` or ``{"name": "gated_late", "bias": True}``.
        *positional: What the code around it hands over, such as the widths of a connector.
        **given: Further keywords; they win over those in ``spec``.

    Raises:
        ZooError: On an unknown name or keyword, a value of the wrong type, or a keyword that the code around it hands over.
    """
    from zoo.config import checked, split_spec  # pydantic, only when something is made

    name, keywords = split_spec(dict(spec) if isinstance(spec, Mapping) else spec)
    maker, carried = lookup(kind, name)
    keywords = {**keywords, **carried, **given}
    takes = [key for key, p in signature(maker).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert len(positional) <= len(takes), (kind, name, takes, len(positional))
    handed = dict(zip(takes, positional, strict=False))
    if doubled := sorted(handed.keys() & keywords.keys()):
        raise ZooError(f"{kind} {name!r}: {', '.join(map(repr, doubled))}: not a setting: the model gives it")
    return maker(**checked(maker, {**handed, **keywords}, f"{kind} {name!r}", lookup))


def build(name: str, **keywords: Any) -> Any:
    """Build a whole model: ``zoo.build("notellm2", backbone="qwen")``. It remembers as ``spec`` how it was built.

    Args:
        name: A name of `list_models`.
        **keywords: The settings of its builder, the same as in a recipe's ``model:`` block.

    Raises:
        ZooError: Naming every fault of the keywords at once.
    """
    model = make("model", {**keywords, "name": name})
    model.spec = {"name": name, **keywords}
    return model


def info(name: str, kind: str | None = None) -> dict[str, Any]:
    """What there is to know of a part: summary, paper, licence, settings with their defaults, joints, number of parameters.

    The last is that of the defaults, and None where a setting is required or the part is no model, encoder or backbone.

    Args:
        name: Of any kind.
        kind: Needed only when two kinds share the name; None is the model, where one of them is a model: ``mla`` is a fusion too.

    Raises:
        ZooError: If nothing, or more than one kind, has this name.
    """
    stem = name.partition(":")[0]
    kinds = [k for k in ([kind] if kind else HOMES) if stem in names(k)]
    if not kinds:
        raise ZooError(unknown("part", stem, {n for k in HOMES for n in names(k)}))
    if len(kinds) > 1 and kinds[0] != "model":
        raise ZooError(f"{stem!r} is the name of a {' and of a '.join(kinds)}: say which, as kind=")
    known = entry(kinds[0], stem)
    takes = signature(known.maker).parameters.values()
    return {
        "name": stem,
        "kind": known.kind,
        "summary": known.summary,
        "paper": known.paper,
        "licence": known.licence,
        "joints": dict(known.joints),
        "settings": {p.name: "required" if p.default is p.empty else p.default for p in takes if p.kind is p.KEYWORD_ONLY},
        "module": known.maker.__module__,
        "parameters": _parameters(known),
    }


def _parameters(known: Entry) -> int | None:
    """The number of weights of the part that its defaults make; next to no memory is taken."""
    settings = _allocating_nothing(known)
    if settings is None:
        return None
    import torch  # only for who asks

    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        made = make(known.kind, {"name": known.name, **settings})
    return sum(p.numel() for p in made.parameters()) if isinstance(made, torch.nn.Module) else None


def _allocating_nothing(known: Entry) -> dict[str, Any] | None:
    """The defaults that decide where weights are, its own and those of its parts, set to the meta device; None if it cannot be made so."""
    from zoo.config import hints_of, part_kind, split_spec

    takes = signature(known.maker).parameters.values()
    if known.kind not in ("model", "encoder", "backbone") or any(p.default is p.empty for p in takes):
        return None
    out: dict[str, Any] = {"device": "meta"} if "device" in signature(known.maker).parameters else {}
    hints = hints_of(known.maker)
    for p in takes:
        kind = part_kind(hints.get(p.name))
        if kind in ("encoder", "backbone") and p.default is not None:
            name, given = split_spec(p.default)
            inner = _allocating_nothing(entry(kind, name.partition(":")[0]))
            out[p.name] = {"name": name, **given, **(inner or {})}
    return out
