"""Check keywords against a signature: the function that makes a part is also the schema of its settings.

A maker's positional parameters are given by the code around it (``dim_in`` of a connector); its keyword-only parameters
are the settings that a user may write. A parameter annotated with one of the ``*Spec`` types below names a part, one
annotated with a dataclass is a section of settings, and checking goes on inside both.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from zoo.errors import ZooError, unknown

_LOOSE = ConfigDict(arbitrary_types_allowed=True)
Maker = Callable[..., Any]
Lookup = Callable[[str, str], tuple[Maker, dict[str, Any]]]  # (kind, name) -> maker, and the keywords that the name carries


@dataclass(frozen=True)
class PartOf:
    """Marks a parameter that names a part: ``"qformer"`` or ``{"name": "qformer", "layers": 2}``."""

    kind: str


Spec = str | dict[str, Any]
EncoderSpec = Annotated[Spec, PartOf("encoder")]
BackboneSpec = Annotated[Spec, PartOf("backbone")]
ConnectorSpec = Annotated[Spec, PartOf("connector")]
FusionSpec = Annotated[Spec | list[Spec], PartOf("fusion")]
ModelSpec = Annotated[Spec, PartOf("model")]
DataSpec = Annotated[Spec, PartOf("data")]
ObjectiveSpec = Annotated[Spec, PartOf("objective")]

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Rates = Fraction | dict[str, Fraction]  # of missing modalities: of all, or of each by name


class Fault(NamedTuple):
    """One thing that is wrong, and where: the keys that lead to it."""

    path: tuple[str | int, ...]
    says: str


def split_spec(spec: Spec) -> tuple[str, dict[str, Any]]:
    """``"a"`` or ``{"name": "a", **keywords}`` as name and keywords.

    Raises:
        ZooError: If it is neither.
    """
    if isinstance(spec, str):
        return spec, {}
    if isinstance(spec, Mapping) and isinstance(spec.get("name"), str):
        return spec["name"], {k: v for k, v in spec.items() if k != "name"}
    raise ZooError(f"{spec!r} names no part: write a name, or a mapping with 'name' and its keywords")


def hints_of(maker: Maker) -> dict[str, Any]:
    """The annotations of what ``maker`` takes, ``Annotated`` kept."""
    return get_type_hints(maker.__init__ if inspect.isclass(maker) else maker, include_extras=True)


def part_kind(hint: Any) -> str | None:
    """The kind of part that a parameter of this annotation names, or None for a plain value."""
    for part in get_args(hint) if get_origin(hint) is not Annotated else ():  # Optional[EncoderSpec]
        if (kind := part_kind(part)) is not None:
            return kind
    return next((m.kind for m in getattr(hint, "__metadata__", ()) if isinstance(m, PartOf)), None)


def maps_parts(hint: Any) -> bool:
    """Whether a parameter of this annotation is a mapping of names to parts, ``dict[str, EncoderSpec]``."""
    return get_origin(hint) is dict and part_kind(hint) is not None


def parts_in(hint: Any, value: Any) -> dict[tuple[str | int, ...], Spec]:
    """The parts that a setting of this annotation names, one, a list or a mapping of them, by the keys that lead to each inside it."""
    if value is None:
        return {}
    if isinstance(value, list | tuple):
        return {(i,): part for i, part in enumerate(value)}
    if maps_parts(hint):
        return {(key,): part for key, part in value.items()}
    return {(): value}


def settings(maker: Maker) -> dict[str, inspect.Parameter]:
    """The parameters of ``maker`` that a user may write: the keyword-only ones."""
    return {n: p for n, p in inspect.signature(maker).parameters.items() if p.kind is p.KEYWORD_ONLY}


def check(
    maker: Maker, given: Mapping[str, Any], lookup: Lookup, path: tuple[str | int, ...] = (), *, nested: bool = False
) -> tuple[dict[str, Any], list[Fault]]:
    """``given`` with every value turned into the type that ``maker`` declares, and all that is wrong with it.

    YAML hands over ``1e-4`` as a string; a parameter annotated ``float`` makes a number of it here, and nowhere else.

    Args:
        maker: What will be called with the result.
        given: The keywords.
        lookup: Finds the maker of a nested part.
        path: The keys that lead here, for the faults.
        nested: ``given`` stands inside another maker's settings, which will hand over the positional parameters itself.
    """
    takes = {n: p for n, p in inspect.signature(maker).parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    hints = hints_of(maker)
    open_ = settings(maker) if nested else takes
    out: dict[str, Any] = {}
    faults: list[Fault] = []
    for key, value in given.items():
        if key not in open_:
            why = f"{key!r} is not a setting: the model gives it" if key in takes else unknown("keyword", key, open_)
            faults.append(Fault((*path, key), why))
            continue
        out[key], more = _check_value(hints.get(key, Any), value, lookup, (*path, key))
        faults += more
        if not more and (kind := part_kind(hints.get(key))) is not None:
            for inside, part in parts_in(hints.get(key), value).items():
                faults += check_spec(kind, part, lookup, (*path, key, *inside), nested=True)
    missing = [k for k, p in open_.items() if p.default is p.empty and k not in given]
    faults += [Fault(path, f"{key!r} is missing") for key in missing]
    return out, faults


def check_spec(kind: str, spec: Any, lookup: Lookup, path: tuple[str | int, ...] = (), *, nested: bool = False) -> list[Fault]:
    """All that is wrong with one part as a recipe writes it; nothing is made."""
    try:
        name, given = split_spec(spec)
        maker, carried = lookup(kind, name)
    except ZooError as e:
        return [Fault(path, str(e))]
    doubled = [Fault((*path, k), f"{k!r} is already said by the name {name!r}") for k in carried.keys() & given.keys()]
    return doubled + check(maker, {**given, **carried}, lookup, path, nested=nested)[1]


def _check_value(hint: Any, value: Any, lookup: Lookup, path: tuple[str | int, ...]) -> tuple[Any, list[Fault]]:
    if is_dataclass(hint):
        return _check_section(hint, value, lookup, path)
    if (section := section_of(hint)) is not None and isinstance(value, list | tuple):
        each = [_check_section(section, v, lookup, (*path, i)) for i, v in enumerate(value)]
        return tuple(v for v, _ in each), [f for _, faults in each for f in faults]
    fixed = inspect.isclass(hint) and issubclass(hint, BaseModel)  # brings its own configuration
    try:
        return TypeAdapter(hint, config=None if fixed else _LOOSE).validate_python(value), []
    except ValidationError as e:
        return value, [Fault((*path, *_reached(value, f["loc"])), f"{f['input']!r}: {_says(f)}") for f in _one_each(e)]


def _says(fault: Any) -> str:
    """Pydantic's message as ours."""
    message: str = fault["msg"]
    return "write a finite number" if fault["type"] == "finite_number" else f"{message[0].lower()}{message[1:]}"


def section_of(hint: Any) -> Any:
    """The dataclass of a ``tuple[Section, ...]``, or None."""
    inner = get_args(hint)
    return inner[0] if get_origin(hint) is tuple and inner[1:] == (...,) and is_dataclass(inner[0]) else None


def _check_section(section: Any, value: Any, lookup: Lookup, path: tuple[str | int, ...]) -> tuple[Any, list[Fault]]:
    """A mapping as the dataclass ``section``; nothing written means its defaults."""
    if isinstance(value, section):
        return value, []
    if not isinstance(value, Mapping | None):
        return value, [Fault(path, f"{value!r}: write a mapping, of {', '.join(settings(section))}")]
    out, faults = check(section, value or {}, lookup, path)
    return (value, faults) if faults else (section(**out), [])


def _one_each(error: ValidationError) -> list[Any]:
    """Pydantic reports every branch of a union; the user wrote one value."""
    seen: dict[str, Any] = {}
    for fault in error.errors():
        seen.setdefault(repr(fault["input"]), fault)
    return list(seen.values())


def _reached(value: Any, location: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """The keys in pydantic's location of a fault; the rest names branches of a union, which nobody wrote."""
    keys: list[str | int] = []
    for part in location:
        entries = value if isinstance(value, Mapping) else dict(enumerate(value)) if isinstance(value, list | tuple) else {}
        if part in entries:
            keys.append(part)
            value = entries[part]
    return tuple(keys)


def described(faults: list[Fault]) -> str:
    """One line a fault, its key first."""
    return "\n".join(f"{'.'.join(map(str, f.path))}: {f.says}" if f.path else f.says for f in faults)


def checked(maker: Maker, given: Mapping[str, Any], where: str, lookup: Lookup) -> dict[str, Any]:
    """`check`, raising.

    Raises:
        ZooError: Naming every keyword that is unknown, missing or of the wrong type, all at once.
    """
    out, faults = check(maker, given, lookup)
    if faults:
        text = described(faults)
        raise ZooError(f"{where}: {text}" if len(faults) == 1 else f"{where}: {len(faults)} faults\n{text}")
    return out
