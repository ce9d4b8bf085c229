"""Item vectors as a file, and the search in it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zoo.abilities import Matching
from zoo.captions import check_able
from zoo.config import split_spec
from zoo.data._collection import read_notes
from zoo.errors import ZooError
from zoo.evaluate.modalities import Altered
from zoo.evaluate.retrieval import Input
from zoo.files import check_target
from zoo.hub import load, model_hash
from zoo.models._pictures import PictureTextModel
from zoo.picture_files import PictureFiles, find_pictures, read_lines
from zoo.questions import HIDDEN, embed
from zoo.recipe import load_recipe
from zoo.reranking import Library, match_logits
from zoo.run import load_data, load_pairs
from zoo.search import Kind, index_file
from zoo.types import CaptionedData, Row
from zoo.vectors import about_vectors, models_of, vector_files, write_vectors

logger = logging.getLogger("zoo.embed")


def embed_notes(
    run: str | Path,
    out: str | Path,
    *,
    notes: str | Path | None = None,
    data_root: str | Path | None = None,
    batch_size: int = 256,
    skip_broken: bool = False,
) -> int:
    """Write ``note_id`` and ``vector`` of every note to a parquet file that is whole or not there, and says which model made it.

    Of a model of pictures and texts, those of picture files, whose ids are their paths below the folder, or of the lines of a text file,
    whose ids they are themselves.

    Args:
        run: A run folder.
        out: The file.
        notes: A folder with ``notes.parquet`` or ``notes.csv``; of pictures and texts a folder of pictures, or a text file; None:
            the data of the run's recipe, of captioned ones the pictures.
        data_root: The folder that holds the folders of data sets.
        batch_size: Notes at a time.
        skip_broken: Leave out, with a warning, pictures of a folder that cannot be decoded.

    Returns:
        How many vectors were written. A note in which the model sees nothing has the zero vector.

    Raises:
        ZooError: If there is no such run, its model gives no such vectors, a fault in the data, or not one note at a time.
    """
    if batch_size < 1:
        raise ZooError(f"batch_size = {batch_size}: write 1 or more")
    check_target(Path(out), "--out")
    made_by = model_hash(run)
    model = load(run)
    if not reads_captions(model) and "title" not in tuple(model.processor.keys()):
        raise ZooError(
            f"the model in {run} is a {type(model).__name__}, which gives no vectors of notes, nor of pictures and texts: "
            "take a model of notes, or a clip, albef, blip, coca, vlmo or beit_3"
        )
    if skip_broken and not (reads_captions(model) and notes is not None and Path(notes).is_dir()):
        raise ZooError("--skip-broken is for a folder of pictures, which only a model of pictures and texts takes: leave it out")
    if reads_captions(model):
        place = None if notes is None else Path(notes)
        return _embed_captioned(model, Path(run), Path(out), place, data_root, batch_size, made_by, skip_broken=skip_broken)
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


def _embed_captioned(
    model: Any,
    run: Path,
    out: Path,
    place: Path | None,
    data_root: str | Path | None,
    batch_size: int,
    made_by: str,
    *,
    skip_broken: bool,
) -> int:
    """`embed_notes` of a model of pictures and texts."""
    rows: Sequence[Row]
    ids: Sequence[Any]
    about: dict[str, Any] = {"model": made_by, "of": "image"}
    if place is None:
        data = load_data(load_recipe(run / "recipe.yaml"), data_root)
        assert isinstance(data, CaptionedData), "this model was trained on nothing else"
        rows, ids = data.pictures, data.picture_ids
    elif place.is_dir():
        files = find_pictures([place], skip_broken=skip_broken)
        rows, ids, about["folder"] = PictureFiles(files), [file.relative_to(place).as_posix() for file in files], str(place.resolve())
    elif not place.exists():
        raise ZooError(f"no file or folder {place}: name a folder of pictures, or a .txt with a text in each line")
    elif place.suffix == ".txt":
        ids = read_lines(place, "texts")
        rows, about["of"] = [{"text": text} for text in ids], "text"
    else:
        raise ZooError(f"{place} is neither a folder of pictures nor a .txt with a text in each line, and this model reads nothing else")
    vectors = embed(model, rows, batch_size=batch_size)
    write_vectors(out, ids, vectors, about)
    return len(vectors)


def search_notes(
    run: str | Path,
    embeddings: str | Path,
    query: Mapping[str, Any],
    *,
    note: str | None = None,
    k: int = 10,
    kind: Kind = "exact",
    rerank: int | None = None,
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
        rerank: Of a model that reads picture and text together: so many of the nearest are read with the query, and the ``k`` best of
            them given, by the logit of a match, plus the cosine where the model's paper adds it. None: the cosine alone.

    Returns:
        ``{"note_id", "score"}`` each.

    Raises:
        ZooError: If the file is no such file, another model made it, the id is not in it, or not exactly one of query and id is given; or
            if there is nothing to read together.
    """
    if bool(query) == (note is not None):
        raise ZooError(
            "search needs a new note (--title, --topic, --content, --image, --text) or the id of one in the file (--note), one of the two"
        )
    if rerank is not None and rerank < k:
        raise ZooError(f"rerank: of {rerank} that are read, {k} cannot be given: write {k} or more")
    path = Path(embeddings)
    if not path.exists():
        raise ZooError(f"no embeddings in {path}: write them with: zoo embed {run} --out {path}")
    made = models_of(path)
    _check_model(run, path, made)
    index = index_file(path, kind)
    _tell_nameless(run, made)  # only now: a file without any vectors does not say it either, and is an error
    own = None if note is None else _place(note, index.ids, path)
    model = load(run) if own is None or rerank is not None else None
    if own is None:
        _check_query(model, query)
    x = model.encode([query]) if own is None else index.vectors[[own]]  # type: ignore[union-attr]
    if x.shape[1] != index.vectors.shape[1]:
        raise ZooError(f"{path} holds vectors of width {index.vectors.shape[1]}, {run} makes {x.shape[1]}: they belong to different runs")
    wanted = rerank or k
    places, scores = index.search(x, wanted + (own is not None))
    found = zip(places[0].tolist(), scores[0].tolist(), strict=True)
    hits = [{"note_id": index.ids[i], "score": score} for i, score in found if i not in (own, -1)][:wanted]
    if len(hits) < (there := min(wanted, len(index) - (own is not None))):
        logger.warning("%d hits of %d: the graph of %s leads to no more; --index exact finds all", len(hits), there, index.kind)
    return hits if rerank is None else _read_together(model, path, query, hits)[:k]


def _read_together(model: Any, path: Path, query: Mapping[str, Any], hits: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Hits by what a model says that reads each with the query, best first.

    Raises:
        ZooError: If it reads none together, the query is of the same kind as what was found, or pictures are not where they were.
    """
    check_able(model, Matching, "this model")
    about, ids = about_vectors(vector_files(path)[0]), [hit["note_id"] for hit in hits]
    kind, other = about.get("of"), "text" if about.get("of") == "image" else "image"
    if set(query) != {other}:
        given = f"the query is {' and '.join(sorted(query))}" if query else "the query is one of the file's own"
        raise ZooError(f"rerank: {path} holds vectors of kind {kind}, and {given}: a picture is read with a text, so write --{other}")
    if kind == "text":
        logits = match_logits(model, [query], Library(model, ids), np.array([[0, i] for i in range(len(ids))]))
    elif "folder" not in about:
        raise ZooError(f"rerank: {path} does not say where its pictures lie: write it from a folder of pictures, zoo embed RUN FOLDER")
    else:
        files = [Path(about["folder"]) / name for name in ids]
        if lost := [file for file in files if not file.is_file()]:
            raise ZooError(f"rerank: {len(lost)} of {len(files)} pictures are not there any more, such as {lost[0]}: run zoo embed again")
        logits = match_logits(model, PictureFiles(files), Library(model, [query["text"]]), np.array([[i, 0] for i in range(len(ids))]))
    scored = [{**hit, "score": float(logit) + model.adds_cosine * hit["score"]} for hit, logit in zip(hits, logits, strict=True)]
    return sorted(scored, key=lambda hit: -hit["score"])


def reads_captions(model: Any) -> bool:
    """Whether a model is one of pictures and texts, each of which has a vector."""
    return isinstance(model, PictureTextModel)


def _check_query(model: Any, query: Mapping[str, Any]) -> None:
    """Whether the model reads all that is asked with: what it does not read would be left out of the answer."""
    asked = ", ".join(f"--{key}" for key in query)
    if reads_captions(model) and set(query) not in ({"text"}, {"image"}):
        raise ZooError(f"a model of pictures and texts is asked with --text or --image, one of the two, and not with {asked}")
    if reads_captions(model) and isinstance(text := query.get("text"), str) and not text.strip():
        raise ZooError("the text of the query is empty: write what is sought, --text 'a red house'")
    if not reads_captions(model) and "text" in query:
        raise ZooError(f"a model of items is asked with --title, --topic, --content and --image, and not with {asked}")


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
