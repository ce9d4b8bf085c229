"""Item vectors as a file, and the search in it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.config import split_spec
from zoo.data._collection import read_notes
from zoo.errors import ZooError
from zoo.evaluate.modalities import Altered
from zoo.evaluate.retrieval import Input
from zoo.files import check_target
from zoo.hub import load, model_hash
from zoo.questions import HIDDEN, embed
from zoo.recipe import load_recipe
from zoo.run import load_pairs
from zoo.search import Kind, index_file
from zoo.types import Row
from zoo.vectors import models_of, write_vectors

logger = logging.getLogger("zoo.embed")


def embed_notes(
    run: str | Path, out: str | Path, *, notes: str | Path | None = None, data_root: str | Path | None = None, batch_size: int = 256
) -> int:
    """Write ``note_id`` and ``vector`` of every note to a parquet file that is whole or not there, and says which model made it.

    Args:
        run: A run folder.
        out: The file.
        notes: A folder with ``notes.parquet`` or ``notes.csv``; None: the data of the run's recipe.
        data_root: The folder that holds the folders of data sets.
        batch_size: Notes at a time.

    Returns:
        How many vectors were written. A note in which the model sees nothing has the zero vector.

    Raises:
        ZooError: If there is no such run, a fault in the data, or not one note at a time.
    """
    if batch_size < 1:
        raise ZooError(f"batch_size = {batch_size}: write 1 or more")
    check_target(Path(out), "--out")
    made_by = model_hash(run)
    model = load(run)
    recipe = load_recipe(Path(run) / "recipe.yaml")
    rows: Sequence[Row]
    ids: Sequence[Any]
    if notes is not None:
        _, settings = split_spec(recipe.data)
        rows, ids = read_notes(Path(notes), settings.get("columns"))
        inputs: Sequence[Input] = settings.get("inputs") or ()
        if len(inputs) == 1:  # what training hid stays hidden
            rows = Altered(rows, hidden=HIDDEN[inputs[0]])
    else:
        data = load_pairs(recipe, "embedding notes", data_root)
        rows, ids = data.notes, data.note_ids
    vectors = embed(model, rows, batch_size=batch_size)
    write_vectors(Path(out), ids, vectors, {"model": made_by})
    return len(vectors)


def search_notes(
    run: str | Path, embeddings: str | Path, query: Mapping[str, Any], *, note: str | None = None, k: int = 10, kind: Kind = "exact"
) -> list[dict[str, Any]]:
    """The ``k`` notes whose vectors are nearest by cosine, best first.

    Vectors that do not say which model made them are searched, with a warning: another program may have written them.

    Args:
        run: The run folder that made the vectors.
        embeddings: What `embed_notes` wrote, or a folder of such files.
        query: A row with any subset of the modalities; not used when ``note`` is given.
        note: The id of a note in the file, which is then left out of the answer.
        k: At most as many as there are.
        kind: How they are searched, as `zoo.search.Index.build` says.

    Returns:
        ``{"note_id", "score"}`` each.

    Raises:
        ZooError: If the file is no such file, another model made it, the id is not in it, or not exactly one of query and id is given.
    """
    if bool(query) == (note is not None):
        raise ZooError(
            "search needs a new note (--title, --topic, --content, --image) or the id of one in the file (--note), one of the two"
        )
    path = Path(embeddings)
    if not path.exists():
        raise ZooError(f"no embeddings in {path}: write them with: zoo embed {run} --out {path}")
    made = models_of(path)
    _check_model(run, path, made)
    index = index_file(path, kind)
    _tell_nameless(run, made)  # only now: a file without any vectors does not say it either, and is an error
    own = None if note is None else _place(note, index.ids, path)
    x = load(run).encode([query]) if own is None else index.vectors[[own]]
    if x.shape[1] != index.vectors.shape[1]:
        raise ZooError(f"{path} holds vectors of width {index.vectors.shape[1]}, {run} makes {x.shape[1]}: they belong to different runs")
    places, scores = index.search(x, k + (own is not None))
    found = zip(places[0].tolist(), scores[0].tolist(), strict=True)
    hits = [{"note_id": index.ids[i], "score": score} for i, score in found if i not in (own, -1)][:k]
    if len(hits) < (there := min(k, len(index) - (own is not None))):
        logger.warning("%d hits of %d: the graph of %s leads to no more; --index exact finds all", len(hits), there, index.kind)
    return hits


def _check_model(run: str | Path, path: Path, made: Mapping[Path, str | None]) -> None:
    """Vectors of two models have nothing to do with each other, though a search in them gives hits like any other."""
    own = model_hash(run)
    if others := [file for file, model in made.items() if model not in (None, own)]:
        raise ZooError(
            f"{others[0]} was made by another model than the one in {run}: name its run, or write it again: zoo embed {run} --out {path}"
        )


def _tell_nameless(run: str | Path, made: Mapping[Path, str | None]) -> None:
    if unknown := [file for file, model in made.items() if model is None]:
        logger.warning(
            "%d of %d files of vectors, such as %s, do not say which model made them: unless it was the one in %s, the hits mean nothing",
            len(unknown),
            len(made),
            unknown[0],
            run,
        )


def _place(note: str, ids: Sequence[Any], path: Path) -> int:
    for i, other in enumerate(ids):
        if str(other) == note:
            return i
    raise ZooError(f"no note {note!r} in {path}; its first ids are {', '.join(map(str, ids[:5]))}")
