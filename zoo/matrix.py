"""Which fusion and which connector fit which model: every cell, and for a cell that does not fit the sentence that says why."""

from __future__ import annotations

from typing import NamedTuple

from zoo.config import hints_of, part_kind
from zoo.errors import ZooError
from zoo.joints import compose
from zoo.registry import entry, names


class Cell(NamedTuple):
    """One combination. ``refused`` is None where it fits."""

    model: str
    fusion: str
    connector: str | None  # None: this model has no connector
    refused: str | None


def matrix() -> list[Cell]:
    """Every model with every fusion and every connector that the registry knows; all parts are imported, none is made."""
    return [
        Cell(model, fusion, connector, _refused(model, fusion))
        for model in names("model")
        for fusion in names("fusion")
        for connector in (names("connector") if _has_connector(model) else [None])
    ]


def table(cells: list[Cell]) -> str:
    """The cells as text: a row for each fusion, a column for each model, the joints it fills or a dash; then the connectors."""
    models = sorted({c.model for c in cells})
    fusions = sorted({c.fusion for c in cells})
    rows = [["fusion", *models]]
    for fusion in fusions:
        fits = {c.model for c in cells if c.fusion == fusion and c.refused is None}
        rows.append([fusion, *("+".join(entry("fusion", fusion).joints) if m in fits else "-" for m in models)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    for model in models:
        connectors = sorted({c.connector for c in cells if c.model == model and c.connector is not None})
        lines.append(f"connectors of {model}: {', '.join(connectors) or 'none'}")
    refused = sorted({c.refused for c in cells if c.refused is not None})
    return "\n".join([*lines, *refused])


def _refused(model: str, fusion: str) -> str | None:
    try:
        compose(fusion, model, entry("model", model).joints, entry("model", model).gives)
    except ZooError as e:
        return str(e)
    return None


def _has_connector(model: str) -> bool:
    return any(part_kind(hint) == "connector" for hint in hints_of(entry("model", model).maker).values())
