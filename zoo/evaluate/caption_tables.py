"""What a run on captioned pictures leaves besides its metrics, as the tables of its page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zoo.metric import DIRECTIONS, measure_name

Arms = Mapping[str, Mapping[str, Any]]


def tables(arms: Arms, written: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the page shows of captioned pictures, as plain values.

    Args:
        arms: As in ``metrics.json``, with what `zoo.caption_questions.ask` says of each.
        written: As in ``captions.json``.
    """
    return {
        "groups": _groups(arms),
        "reranking": [{"arm": arm, **row, **_named(row)} for arm, found in arms.items() for row in found.get("reranking", [])],
        "zeroshot": _zeroshot(arms),
        "captions": _captions(arms),
        "captions_by_group": [{"arm": arm, **row} for arm, found in arms.items() for row in found.get("captions_by_group", [])],
        "written": [entry for entry in written if "image" in entry],
        "left_out": [f"{arm}: {says}" for arm, found in arms.items() for says in found.get("left_out", [])],
    }


def times(value: float, chance: float | None) -> float | None:
    """How many times chance a value is."""
    return value / chance if chance else None


def _named(row: Mapping[str, Any]) -> dict[str, str]:
    return {"label": DIRECTIONS[row["direction"]], "measure": measure_name(row["direction"], row["k"])}


def _groups(arms: Arms) -> list[dict[str, Any]]:
    """A table for each direction and split: a row for each group, columns for each arm and k."""
    out = []
    places = dict.fromkeys((row["direction"], row["split"]) for found in arms.values() for row in found.get("groups", []))
    for direction, split in places:
        rows = {
            arm: {row["group"]: row for row in found.get("groups", []) if (row["direction"], row["split"]) == (direction, split)}
            for arm, found in arms.items()
        }
        ks = list(dict.fromkeys(cell["k"] for by in rows.values() for row in by.values() for cell in row["cells"]))
        columns = [(arm, k) for arm in arms for k in (ks if len(arms) == 1 else dict.fromkeys((ks[0], ks[-1])))]
        names = list(dict.fromkeys(name for by in rows.values() for name in by))
        body = [
            {
                "group": name,
                "queries": next(by[name]["queries"] for by in rows.values() if name in by),
                "cells": [_cell(rows[arm].get(name), k) for arm, k in columns],
            }
            for name in names
        ]
        heads = [measure_name(direction, k) if len(arms) == 1 else f"{arm}, {measure_name(direction, k)}" for arm, k in columns]
        out.append({"label": DIRECTIONS[direction], "split": split, "heads": heads, "rows": body})
    return out


def _cell(row: Mapping[str, Any] | None, k: int) -> dict[str, Any] | None:
    found = next((cell for cell in row["cells"] if cell["k"] == k), None) if row else None
    return found and {**found, "times": times(found["recall"], found["chance"])}


def _zeroshot(arms: Arms) -> list[dict[str, Any]]:
    """A table for each split: a row for each group, all of them first, and a column for each arm."""
    out = []
    for split in dict.fromkeys(row["split"] for found in arms.values() for row in found.get("zeroshot", [])):
        by = {arm: {r["group"]: r for r in found.get("zeroshot", []) if r["split"] == split} for arm, found in arms.items()}
        first = next(rows for rows in by.values() if rows)
        body = [
            {
                "group": name,
                "pictures": row["pictures"],
                "chance": row["chance"],
                "cells": [
                    cell and {**cell, "times": times(cell["accuracy"], cell["chance"])} for cell in (rows.get(name) for rows in by.values())
                ],
            }
            for name, row in first.items()
        ]
        out.append({"split": split, "classes": first["all"]["classes"], "heads": list(by), "rows": body})
    return out


def _told(row: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return {**row, "times": times(row["accuracy"], row["chance"])} if row else None


def _captions(arms: Arms) -> dict[str, Any]:
    """Measures of captions: a row for each split of an arm that writes any."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for arm, values in arms.items():
        for name, value in values.get("captions", {}).items():
            split, _, measure = name.rpartition(", ")
            found.setdefault((arm, split), {})[measure] = value
    columns = list(dict.fromkeys(measure for measures in found.values() for measure in measures))
    rows = [{"arm": arm, "split": split, "cells": [measures.get(c) for c in columns]} for (arm, split), measures in found.items()]
    return {"columns": columns, "rows": rows}
