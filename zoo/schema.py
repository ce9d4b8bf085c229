"""The JSON schema of a recipe, for editors: completion, checking and help while one is written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import is_dataclass
from inspect import Parameter, getdoc
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, TypeAdapter
from pydantic.errors import PydanticInvalidForJsonSchema

from zoo.config import Maker, hints_of, maps_parts, part_kind, section_of, settings
from zoo.recipe import Recipe
from zoo.registry import HOMES, entry, names

Schema = dict[str, Any]


def schema() -> Schema:
    """What a recipe may say, from the signatures that check it: every registered part with its settings, every section.

    Every part is imported. In a recipe, ``# yaml-language-server: $schema=recipe.schema.json`` turns it on.
    """
    definitions: dict[str, Schema] = {}
    recipe = _section(Recipe, definitions)
    for kind in HOMES:
        definitions[kind] = _kind(kind, definitions)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "zoo recipe", **recipe, "$defs": definitions}


def _kind(kind: str, definitions: dict[str, Schema]) -> Schema:
    """A part of ``kind``: its name, or a mapping with its name and its settings."""
    short: list[Schema] = []
    long: list[Schema] = []
    for name in names(kind):
        part = entry(kind, name)
        takes = settings(part.maker)
        for called, open_ in _ways(name, takes):
            if not _required(open_):
                short.append({**called, "description": part.summary})
            described = {**_object(part.maker, open_, definitions), "description": part.summary}
            described["properties"] = {"name": called, **described["properties"]}
            described["required"] = ["name", *described.get("required", [])]
            long.append(described)
    return {"anyOf": [*short, *long]} if long else {"not": {}}


def _ways(name: str, takes: Mapping[str, Parameter]) -> list[tuple[Schema, dict[str, Parameter]]]:
    """How a part may be called, each way with the settings that are then open: ``timm:resnet18`` has said its ``arch``."""
    ways: list[tuple[Schema, dict[str, Parameter]]] = [({"const": name}, dict(takes))]
    if "arch" in takes:
        rest = {key: p for key, p in takes.items() if key != "arch"}
        ways.append(({"type": "string", "pattern": f"^{re.escape(name)}:."}, rest))
    return ways


def _section(section: Any, definitions: dict[str, Schema]) -> Schema:
    """A dataclass as an object."""
    return {**_object(section, settings(section), definitions), "description": (getdoc(section) or "").partition("\n")[0]}


def _object(maker: Maker, takes: Mapping[str, Parameter], definitions: dict[str, Schema]) -> Schema:
    hints, help_ = hints_of(maker), _help(maker)
    properties = {}
    for key, parameter in takes.items():
        properties[key] = _value(hints.get(key, Any), definitions)
        if key in help_:
            properties[key]["description"] = help_[key]
        if isinstance(parameter.default, str | int | float | None):
            properties[key]["default"] = parameter.default
    out: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**out, "required": _required(takes)} if _required(takes) else out


def _required(takes: Mapping[str, Parameter]) -> list[str]:
    return [key for key, p in takes.items() if p.default is p.empty]


def _value(hint: Any, definitions: dict[str, Schema]) -> Schema:
    """One setting, by its annotation."""
    if is_dataclass(hint):
        return {"anyOf": [_section(hint, definitions), {"type": "null"}]}
    if (section := section_of(hint)) is not None:
        return {"type": "array", "items": _section(section, definitions)}
    if (kind := part_kind(hint)) is not None:
        part = {"$ref": f"#/$defs/{kind}"}
        if maps_parts(hint):
            return {"type": "object", "additionalProperties": part}
        branches = _branches(hint)
        lists = [get_origin(b) is list for b in branches]
        one = [] if all(lists) else [part]
        also = [{"type": "array", "items": part}] if any(lists) else []
        null = [{"type": "null"}] if type(None) in branches else []
        return {"anyOf": [*one, *also, *null]}
    try:
        made = TypeAdapter(hint, config=_config(hint)).json_schema()
    except PydanticInvalidForJsonSchema:  # a Python object, which no recipe writes
        return {}
    definitions.update(made.pop("$defs", {}))
    return made


def _branches(hint: Any) -> list[Any]:
    """The members of a union, ``Annotated`` taken off."""
    if get_origin(hint) is Annotated:
        return _branches(get_args(hint)[0])
    return [b for arg in get_args(hint) for b in _branches(arg)] if get_origin(hint) in (Union, UnionType) else [hint]


def _config(hint: Any) -> ConfigDict | None:
    return None if isinstance(hint, type) and issubclass(hint, BaseModel) else ConfigDict(arbitrary_types_allowed=True)


def _help(maker: Maker) -> dict[str, str]:
    """The first line that a docstring says of each argument or attribute."""
    return dict(re.findall(r"^    (\w+): (.+)$", getdoc(maker) or "", flags=re.MULTILINE))
