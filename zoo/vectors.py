"""Item vectors in parquet: the one form in which they are written and read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from zoo.errors import ZooError
from zoo.files import write_bytes

INDEX = ".index"  # how the folder ends in which a search keeps an index, beside the vectors
_ABOUT = b"zoo"
_WRITTEN = "name what zoo embed RUN --out FILE wrote"


class Vectors(NamedTuple):
    """What a file holds, or a folder of such files."""

    ids: list[Any]
    vectors: np.ndarray  # (N, D) float32


def write_vectors(path: Path, ids: Sequence[Any], vectors: np.ndarray, about: Mapping[str, Any] | None = None) -> Path:
    """Write columns ``note_id`` and ``vector`` to a file that is whole or not there.

    Args:
        path: A ``.parquet`` file.
        ids: (N,)
        vectors: (N, D) float32.
        about: Plain values kept in the file, for `about_vectors`.
    """
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    table = pa.table({"note_id": pa.array(list(ids)), "vector": column})
    if about is not None:
        table = table.replace_schema_metadata({_ABOUT: json.dumps(about, sort_keys=True)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return write_bytes(path, sink.getvalue().to_pybytes())


def about_vectors(path: Path) -> dict[str, Any]:
    """What `write_vectors` was told about a file; {} if nothing, or if it is no whole file of vectors."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (pa.ArrowException, OSError):
        return {}
    return dict(json.loads(metadata.get(_ABOUT, b"{}")))


def vector_files(path: Path) -> list[Path]:
    """A file of vectors itself, or all files in a folder, sorted by name, without those of an index (``*.index/``) that lies there too."""
    if not path.is_dir():
        return [path]
    return sorted(f for f in path.rglob("*.parquet") if not any(p.endswith(INDEX) for p in f.relative_to(path).parent.parts))


def models_of(path: Path) -> dict[Path, str | None]:
    """The hash of the model that made each of `vector_files`, as of `zoo.hub.model_hash`; None: the file does not say."""
    return {file: about_vectors(file).get("model") for file in vector_files(path)}


def read_vectors(path: Path) -> Vectors:
    """Read what `vector_files` names.

    Raises:
        ZooError: If there is no such file, or it holds no vectors, or those of a folder were made by different models.
    """
    made = {file: model for file, model in models_of(path).items() if model is not None}
    if len(set(made.values())) > 1:
        first = next(iter(made))
        other = next(file for file in made if made[file] != made[first])
        raise ZooError(f"{first} and {other} were made by different models: run zoo embed again, or remove one of them")
    if not path.exists():
        raise ZooError(f"no vectors in {path}, which does not exist: zoo embed RUN --out {path} writes them")
    read = [_read(file) for file in vector_files(path)]
    widths = {x.vectors.shape[1] for x in read if len(x.ids)}
    if len(widths) != 1:
        raise ZooError(
            f"{path} holds no vectors: {_WRITTEN}" if not widths else f"{path} holds vectors of widths {sorted(widths)}: keep one"
        )
    return Vectors([i for x in read for i in x.ids], np.concatenate([x.vectors for x in read if len(x.ids)]))


def _read(path: Path) -> Vectors:
    try:
        table = pq.read_table(path)
    except pa.ArrowException as e:
        raise ZooError(f"{path} cannot be read as parquet ({e}): {_WRITTEN}") from e
    if missing := sorted({"note_id", "vector"} - set(table.column_names)):
        lost = f"column{'s' if len(missing) > 1 else ''} {', '.join(missing)}"
        raise ZooError(f"{path} has no {lost} (it has: {', '.join(table.column_names)})")
    ids, vectors = table["note_id"].to_pylist(), table["vector"].combine_chunks()
    if not isinstance(vectors, pa.FixedSizeListArray):
        raise ZooError(f"{path} holds {len(ids)} vectors of type {vectors.type}: it was not written by zoo embed")
    return Vectors(ids, np.array(vectors.flatten()).reshape(len(ids), vectors.type.list_size))
