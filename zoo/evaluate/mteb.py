"""A model of the zoo as the benchmark MTEB wants it, so that its retrieval tasks run on item vectors of text, images, or both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

import numpy as np

from zoo.errors import ZooError
from zoo.registry import entry
from zoo.types import Row

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models import ModelMeta
    from mteb.types import BatchedInput, PromptType
    from torch.utils.data import DataLoader

_READ = {
    "id",
    "text",
    "title",
    "body",
    "image",
    "query",
    "instruction",
    "conversation",
}  # columns of a batch; text has the last three in it


class MtebEncoder:
    """What ``mteb.evaluate`` takes: MTEB's EncoderProtocol (Muennighoff et al., MTEB, 2022, https://arxiv.org/abs/2210.07316).

    How the modalities of one item become one vector is recorded with the results, as ``fusion``. Prompts of tasks are not used:
    the model has a prompt of its own.

    Args:
        model: As `zoo.types.Model` says.
        name: ``org/name``, for the results.
        revision: For the results; None: ``no_revision_available``, as MTEB writes it.
        text: The key of a row that a text without a title becomes; a title with a body become ``title`` and this. Each is cut to the
            length that the model's settings give it.
        training_datasets: Names of MTEB's tasks whose data the model was trained on; None: unknown.

    Raises:
        ZooError: If mteb is missing, or the model does not read this key.
    """

    def __init__(
        self,
        model: Any,
        name: str,
        revision: str | None = None,
        *,
        text: str = "content",
        training_datasets: Iterable[str] | None = None,
    ) -> None:
        keys: Sequence[str] = model.processor.keys()
        if text not in keys:
            raise ZooError(f"this model reads no {text!r}: write text= with one of {', '.join(key for key in keys if key != 'image')}")
        self.model, self._text, self._keys = model, text, keys
        self.mteb_model_meta = _meta(model, name, revision, text, None if training_datasets is None else set(training_datasets))

    def encode(
        self,
        inputs: DataLoader[BatchedInput],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        precision: str = "float32",
    ) -> np.ndarray:
        """(N, D) float32 of length 1; a row of which the model sees nothing has the zero vector.

        Args:
            inputs: Batches of columns: ``text``, ``title``, ``body``, ``image``.
            task_metadata: Not used, as are the next three.
            hf_split: See above.
            hf_subset: See above.
            prompt_type: See above.
            batch_size: Rows at a time, at most those of a batch.
            show_progress_bar: Not used: a batch is encoded at once.
            precision: Only ``float32``.

        Raises:
            ZooError: On another precision, a modality that the model does not have, columns that make no row, or a row that cannot be
                read.
        """
        if precision != "float32":
            raise ZooError(f"precision {precision!r}: vectors of the zoo are float32")
        found = []
        for batch in inputs:
            rows = self._rows(batch)
            assert len(rows) == len(next(iter(batch.values()))), f"{len(rows)} rows of columns {', '.join(batch)}"
            found.append(self._encode(rows, batch_size))
        return np.concatenate(found) if found else np.zeros((0, self.model.dim), dtype=np.float32)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """Cosine of each with each: (N, D) and (M, D) to (N, M)."""
        return self.model.similarity(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """Cosine of each with the one at the same place: (N, D) and (N, D) to (N,)."""
        return self.model.similarity_pairwise(embeddings1, embeddings2)

    def _encode(self, rows: Sequence[Row], batch_size: int) -> np.ndarray:
        seen = [i for i, row in enumerate(rows) if self.model.processor.sees(row)]
        vectors = np.zeros((len(rows), self.model.dim), dtype=np.float32)
        vectors[seen] = self.model.encode([rows[i] for i in seen], batch_size, show_progress=False)
        return vectors

    def _rows(self, batch: Mapping[str, Sequence[Any]]) -> list[Row]:
        """Columns to rows; a title that the model reads stays one."""
        if unread := [column for column in batch if column not in _READ or (column == "image" and "image" not in self._keys)]:
            raise ZooError(f"this model does not read {', '.join(unread)} (it reads: {', '.join(self._keys)})")
        apart = {"title", "body"} <= batch.keys() and "title" in self._keys and self._text != "title"
        columns = {"title": batch["title"], self._text: batch["body"]} if apart else {self._text: batch["text"]} if "text" in batch else {}
        if "image" in batch:
            columns["image"] = batch["image"]
        if not columns:
            raise ZooError(f"a batch has columns {', '.join(batch)}, and of them none that makes a row: text, title with body, or image")
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _meta(model: Any, name: str, revision: str | None, text: str, training_datasets: set[str] | None) -> ModelMeta:
    """What MTEB writes beside the results; what the zoo cannot know is None."""
    try:
        from mteb.models import ModelMeta
        from mteb.models.model_meta import ScoringFunction
    except ImportError as e:
        raise ZooError(f"this needs {e.name}: pip install 'multimodal-zoo[mteb]'") from e
    keys: Sequence[str] = model.processor.keys()
    parameters = list(model.parameters())
    return ModelMeta(
        loader=None,
        name=name,
        revision=revision if revision is not None else "no_revision_available",
        release_date=None,
        languages=None,
        n_parameters=sum(p.numel() for p in parameters),
        memory_usage_mb=sum(p.numel() * p.element_size() for p in parameters) / 2**20,
        max_tokens=None,
        embed_dim=model.dim,
        license=None,
        open_weights=None,
        public_training_code=None,
        public_training_data=None,
        framework=["PyTorch"],
        similarity_fn_name=ScoringFunction.COSINE,
        use_instructions=False,
        training_datasets=training_datasets,
        modalities=["text", "image"] if "image" in keys else ["text"],
        experiment_kwargs={"fusion": _fusion(model.spec), "text": text},
    )


def _fusion(spec: Mapping[str, Any]) -> str:
    """The plug-ins that the model names, or those of its defaults: ``micl+gated_late``."""
    takes = signature(entry("model", spec["name"]).maker).parameters
    given = spec.get("fusion", takes["fusion"].default if "fusion" in takes else None)
    specs = given if isinstance(given, list | tuple) else [] if given is None else [given]
    return "+".join(s if isinstance(s, str) else s["name"] for s in specs) or "none"
