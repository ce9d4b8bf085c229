"""Settings as someone wrote them: values, the line of each key, and what was said over them on the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from zoo.config import Fault

Keys = tuple[str | int, ...]  # the keys that lead to a value
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain values: ``no`` and ``on`` are words, ``1e-4`` is a number, a date stays a string."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's way to give them)


class _Dumper(yaml.SafeDumper):
    """Quotes every string that a reader of YAML 1.1 or of 1.2 would take for something else."""


_NUMBER = r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", _NUMBER, "-+.0123456789"),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"{_TAG}{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def written(values: Any) -> str:
    """Plain values as YAML, in the order given; `Source.read` reads the same back."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class Source:
    """A tree of plain values that knows where each of them was written.

    Attributes:
        name: Of the file, for the messages.
        values: What it says.
        faults: What was wrong with the writing itself.
    """

    def __init__(self, name: str, values: Any) -> None:
        self.name, self.values = name, values
        self.faults: list[Fault] = []
        self._line: dict[Keys, int] = {}
        self._override: dict[Keys, str] = {}

    @classmethod
    def read(cls, name: str, text: str) -> Source:
        """Parse YAML. What cannot be read at all gives one fault; the values are then None."""
        source = cls(name, None)
        try:
            loader = _Loader(text)
            node = loader.get_single_node()
            if node is not None:
                source.values = source._take(loader, node, (), set())
        except yaml.MarkedYAMLError as e:
            mark = e.problem_mark or e.context_mark
            assert mark is not None  # what parses and composes text knows where it is
            source._line[()] = mark.line + 1
            source.faults.append(Fault((), f"column {mark.column + 1}: not readable as YAML: {e.problem or e.context}"))
        except yaml.YAMLError as e:
            source.faults.append(Fault((), f"not readable as YAML: {e}".replace("\n", " ")))
        return source

    def _take(self, loader: _Loader, node: yaml.Node, path: Keys, seen: set[int]) -> Any:
        """The value of ``node``; lines and faults are kept on the way."""
        if id(node) in seen:
            self.faults.append(Fault(path, "an alias (*name) stands here: write the value out"))
            return None
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                self._line[(*path, i)] = item.start_mark.line + 1
            return [self._take(loader, item, (*path, i), seen) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self._take_mapping(loader, node, path, seen)
        try:
            if node.tag.removeprefix(_TAG) not in ("null", "bool", "int", "float", "str"):
                raise ValueError
            return loader.construct_object(node)
        except ValueError:
            self.faults.append(Fault(path, f"{node.value!r} has the tag {node.tag!r}: write a plain number, word, list or mapping"))
            return None

    def _take_mapping(self, loader: _Loader, node: yaml.MappingNode, path: Keys, seen: set[int]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self.faults.append(Fault(path, f"line {key.start_mark.line + 1}: a key is a word, not a list or a mapping"))
                continue
            here, line = (*path, key.value), key.start_mark.line + 1
            if key.value in out:
                self.faults.append(Fault(here, f"written twice, on line {self._line[here]} too: keep one"))
            self._line[here] = line
            out[key.value] = self._take(loader, value, here, seen)
        return out

    def override(self, dotted: str, value: Any, says: str) -> None:
        """Put ``value`` in the place of what stands at ``dotted``.

        A plain word on the way is taken for the name of a part: over ``backbone: qwen``, ``backbone.size`` gives
        ``{name: qwen, size: ...}``. A number is an index into a list.

        Args:
            dotted: ``optimizer.lr``.
            value: The value.
            says: How the messages call it: ``override 'optimizer.lr=3e-5'``.
        """
        keys = tuple(int(k) if k.isdecimal() else k for k in dotted.split("."))
        fault = _put(self.values, keys, value)
        if fault is not None:
            self.faults.append(Fault(keys, fault))
        for places in (self._line, self._override):
            for path in [p for p in places if p[: len(keys)] == keys]:
                del places[path]
        self._override[keys] = says

    def overridden(self, dotted: str) -> tuple[str, Any] | None:
        """How the override is called that gave the value at ``dotted``, and that value; None if there is no such value or override."""
        keys, value = dotted.split("."), self.values
        for key in keys:
            if not isinstance(value, dict) or key not in value:
                return None
            value = value[key]
        says = next((self._override[place] for n in range(len(keys), 0, -1) if (place := tuple(keys[:n])) in self._override), None)
        return None if says is None else (says, value)

    def report(self, faults: list[Fault]) -> str:
        """One line a fault: file, line, keys, what is wrong."""
        lines = [text for _, text in sorted((self._said(f) for f in dict.fromkeys(faults)), key=lambda x: x[0])]
        return lines[0] if len(lines) == 1 else "\n".join([f"{self.name}: {len(lines)} faults", *lines])

    def _said(self, fault: Fault) -> tuple[int, str]:
        """Line and text of one fault; the innermost key that has a place decides, and an override for what it alone brought in."""
        key = ".".join(map(str, fault.path))
        says = f"{key}: {fault.says}" if key else fault.says
        for end in range(len(fault.path), -1, -1):
            if (override := self._override.get(fault.path[:end])) is not None:
                return 1_000_000_000, f"{override}: {says}"
            if (line := self._line.get(fault.path[:end])) is not None:
                return line, f"{self.name}:{line}: {says}"
        brought = (o for path, o in self._override.items() if fault.path and path[: len(fault.path)] == fault.path)
        return 0, f"{next(brought, self.name)}: {says}"


def _put(node: Any, keys: Keys, value: Any) -> str | None:
    """Set ``value`` inside nested mappings and lists; what was wrong, or None."""
    for depth, key in enumerate(keys[:-1]):
        inner = node.get(key) if isinstance(node, dict) else node[key] if _indexes(node, key) else None
        if isinstance(inner, str):
            inner = {"name": inner}
        elif inner is None and isinstance(node, dict):
            inner = {}
        elif not isinstance(inner, dict | list):
            return f"{'.'.join(map(str, keys[: depth + 1]))} holds no settings"
        node[key] = inner
        node = inner
    if not isinstance(node, dict) and not _indexes(node, keys[-1]):
        return f"{'.'.join(map(str, keys[:-1]))} has no entry {keys[-1]!r}"
    node[keys[-1]] = value
    return None


def _indexes(node: Any, key: str | int) -> bool:
    return isinstance(node, list) and isinstance(key, int) and key < len(node)


def plain(value: Any) -> Any:
    """Mappings and lists copied as dict and list, all the way down, so that an override touches nobody else's."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value
