"""Search in item vectors: exact, or by faiss, with the recall that this costs."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from zoo.errors import Failure, ZooError, unknown
from zoo.evaluate.retrieval import topk
from zoo.files import write_bytes, write_json
from zoo.vectors import INDEX, read_vectors, vector_files, write_vectors

logger = logging.getLogger("zoo.search")
Kind = Literal["exact", "faiss", "flat", "hnsw", "ivf"]
SMALL, LARGE = 50_000, 1_000_000  # notes: below the one faiss compares with all, from the other on with some lists of them
_LINKS, _BUILD, _BREADTH, _PROBED = 32, 200, 128, 1 / 16  # HNSW: of a note, while building, while searching; IVF: share of the lists


class Hits(NamedTuple):
    """What a search gives, best first."""

    places: np.ndarray  # (Q, k) int64 row numbers; -1 where a graph led to no more
    scores: np.ndarray  # (Q, k) float32 cosine; -inf there


class Index:
    """Vectors that are searched by cosine; made by `Index.build` or `Index.load`.

    Args:
        ids: (N,)
        vectors: (N, D) float32 of length 1, or 0.
        kind: ``exact``, ``flat``, ``hnsw`` or ``ivf``.
        engine: The index of faiss; None for ``exact``.
    """

    def __init__(self, ids: Sequence[Any], vectors: np.ndarray, kind: Kind, engine: Any) -> None:
        self.ids, self.vectors, self.kind, self.engine = list(ids), vectors, kind, engine

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def build(cls, ids: Sequence[Any], vectors: np.ndarray, *, kind: Kind = "exact") -> Index:
        """Index vectors.

        Args:
            ids: (N,) all different.
            vectors: (N, D)
            kind: ``exact``: in torch, in float64. ``flat``: all of them, by faiss. ``hnsw``: a graph (Malkov and Yashunin, 2016,
                https://arxiv.org/abs/1603.09320). ``ivf``: lists around centres, of which one in 16 is looked at. ``faiss``: one of
                these three, by the number of vectors.

        Raises:
            ZooError: If there are no vectors, an id stands there twice, a value is not finite, or faiss is not installed.
        """
        if kind not in get_args(Kind):
            raise ZooError(unknown("index", kind, get_args(Kind)))
        _check(ids, vectors)
        length = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit = np.ascontiguousarray(vectors / np.where(length == 0, 1, length), dtype=np.float32)
        if kind == "faiss":
            kind = "flat" if len(unit) < SMALL else "hnsw" if len(unit) < LARGE else "ivf"
        return cls(ids, unit, kind, None if kind == "exact" else _engine(kind, unit))

    def search(self, queries: np.ndarray, k: int) -> Hits:
        """The nearest vectors of each query.

        Args:
            queries: (Q, D)
            k: At most as many as there are.

        Raises:
            ZooError: If k is below 1, the widths differ, or a value is not finite.
        """
        if k < 1:
            raise ZooError(f"k = {k} neighbours: write 1 or more")
        k = min(k, len(self))
        if self.engine is None:
            return Hits(*topk(self.vectors, queries, k))
        x = np.ascontiguousarray(queries, dtype=np.float32)
        if x.ndim != 2 or x.shape[1] != self.vectors.shape[1]:
            raise ZooError(f"queries of shape {x.shape} do not fit vectors of width {self.vectors.shape[1]}: encode both with one model")
        if not np.isfinite(x).all():
            raise ZooError("a query is not finite: the model diverged")
        length = np.linalg.norm(x, axis=1, keepdims=True)
        scores, places = self._found(x / np.where(length == 0, 1, length), k)
        return Hits(places, np.where(places < 0, -np.inf, scores).astype(np.float32))

    def recall(self, *, k: int = 10, queries: int = 1000, seed: int = 0) -> float:
        """The share of the exact ``k`` nearest that this index finds, over some of its own vectors as queries.

        A vector found in the place of another of the same score counts as found.
        """
        drawn = np.random.default_rng(seed).permutation(len(self))[:queries]
        asked, k = self.vectors[drawn], min(k, len(self))
        border = topk(self.vectors, asked, k)[1][:, -1:]
        return float((self.search(asked, k).scores >= border - 1e-5).mean())

    def save(self, folder: Path, about: str = "") -> Path:
        """Write the index to a folder; ``about`` is any text that `load` is to compare."""
        (folder / "index.json").unlink(missing_ok=True)  # until the new one is there, the folder is no index
        write_vectors(folder / "vectors.parquet", self.ids, self.vectors)
        if self.engine is not None:
            write_bytes(folder / "index.faiss", _faiss().serialize_index(self.engine).tobytes())
        write_json(folder / "index.json", {"kind": self.kind, "about": about, "vectors": len(self)})
        return folder

    @classmethod
    def load(cls, folder: Path) -> Index:
        """What `save` wrote.

        Raises:
            Failure: If it is damaged.
            ZooError: If it is no index, or faiss is not installed.
        """
        if not (folder / "index.json").is_file():
            raise ZooError(f"no index in {folder}: index.json is not there")
        kind = json.loads((folder / "index.json").read_text(encoding="utf-8"))["kind"]
        ids, vectors = read_vectors(folder / "vectors.parquet")
        if kind == "exact":
            return cls(ids, vectors, kind, None)
        faiss = _faiss()
        try:
            engine = faiss.deserialize_index(np.fromfile(folder / "index.faiss", dtype=np.uint8))
        except (RuntimeError, OSError) as e:
            raise Failure(f"{folder / 'index.faiss'} is damaged ({e}): remove the folder and build it again") from e
        if engine.ntotal != len(ids) or engine.d != vectors.shape[1]:
            raise Failure(f"{folder}: index.faiss and vectors.parquet do not belong together: remove the folder and build it again")
        return cls(ids, vectors, kind, engine)

    def _found(self, x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and places, both (Q, k). Lists are looked at until they hold k, by each query for itself: no other changes its hits."""
        if self.kind == "flat":
            return tuple(self.engine.search(x, k))
        if self.kind == "hnsw":
            return tuple(self.engine.search(x, k, params=_faiss().SearchParametersHNSW(efSearch=max(_BREADTH, 2 * k))))
        probed = max(1, round(self.engine.nlist * _PROBED))
        scores, places = self.engine.search(x, k, params=_faiss().SearchParametersIVF(nprobe=probed))
        while probed < self.engine.nlist and len(short := np.flatnonzero((places < 0).any(axis=1))):
            probed = min(2 * probed, self.engine.nlist)
            scores[short], places[short] = self.engine.search(x[short], k, params=_faiss().SearchParametersIVF(nprobe=probed))
        return scores, places


def index_file(embeddings: Path, kind: Kind) -> Index:
    """The index of a file or folder of vectors; one of faiss is kept beside it, and made again when the vectors change.

    Raises:
        ZooError: As `read_vectors` and `Index.build`.
    """
    if kind == "exact":
        return Index.build(*read_vectors(embeddings))
    files = vector_files(embeddings)
    about = json.dumps([kind, *((str(f.relative_to(embeddings.parent)), f.stat().st_size, f.stat().st_mtime_ns) for f in files)])
    folder = embeddings.with_name(f"{embeddings.name}{INDEX}")
    known = folder / "index.json"
    if known.is_file() and json.loads(known.read_text(encoding="utf-8"))["about"] == about:
        return Index.load(folder)
    index = Index.build(*read_vectors(embeddings), kind=kind)
    logger.info("%s index of %d vectors in %s, recall@10 against exact: %.4f", index.kind, len(index), folder, index.recall())
    index.save(folder, about)
    return index


def _check(ids: Sequence[Any], vectors: np.ndarray) -> None:
    if not len(ids) or vectors.ndim != 2 or len(vectors) != len(ids):
        raise ZooError(f"{len(ids)} ids and vectors of shape {vectors.shape}: an index needs as many of both, and at least one")
    wrong = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(wrong):
        raise ZooError(
            f"{len(wrong)} of {len(ids)} vectors are not finite ({', '.join(str(ids[i]) for i in wrong[:5])}): the model diverged"
        )
    twice = [i for i, n in Counter(ids).items() if n > 1]
    if twice:
        raise ZooError(f"{len(twice)} ids stand there more than once, such as {', '.join(map(repr, twice[:5]))}: a hit would not say which")


def _engine(kind: Kind, unit: np.ndarray) -> Any:
    """An index of faiss that holds ``unit``."""
    faiss = _faiss()
    width = unit.shape[1]
    engine: Any
    if kind == "flat":
        engine = faiss.IndexFlatIP(width)
    elif kind == "hnsw":
        engine = faiss.IndexHNSWFlat(width, _LINKS, faiss.METRIC_INNER_PRODUCT)
        engine.hnsw.efConstruction = _BUILD
    else:
        lists = max(1, min(round(4 * len(unit) ** 0.5), len(unit) // 39))  # faiss asks for 39 vectors a centre
        engine = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
        engine.train(unit)
    engine.add(unit)
    return engine


def _faiss() -> Any:
    try:
        import faiss  # an extra
    except ImportError as e:
        raise ZooError("this index needs faiss: pip install 'multimodal-zoo[faiss]', or write --index exact") from e
    return faiss
