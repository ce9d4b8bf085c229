"""The parts of a diagnosis: each measures one way in which a trained model may use the image, or fail to."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zoo.collate import Known, PairCollate
from zoo.errors import ZooError
from zoo.evaluate._unavailable import Unavailable
from zoo.evaluate.gates import gate_shares
from zoo.evaluate.gradients import gradient_shares
from zoo.evaluate.modalities import Altered, Shown, exchange, expected_hits, modalities, nothing, shapley, subsets, vectors
from zoo.evaluate.retrieval import Task, embedding_scorer, paired_difference, recalls, tasks
from zoo.evaluate.saliency import batch_saliency
from zoo.models._encode import progress, to_device
from zoo.recipe import Recipe
from zoo.types import Batch, Pair, PairData

logger = logging.getLogger("zoo.diagnose")
WHAT = ("saliency", "gates", "permutation", "shapley", "outputs", "gradients")
_SCALE = math.exp(3)  # where NoteLLM-2's starts, for a run whose log names none


class Subject:
    """A model, its data, and the recalls that several parts of a diagnosis share.

    Args:
        folder: Of the run, for its log.
        model: In eval mode.
        recipe: Says on which split, by which protocol and at which k.
        data: Its data set.
        batches: As for `zoo.diagnose`.
        permutations: As for `zoo.diagnose`.
        seed: As for `zoo.diagnose`.

    Raises:
        ZooError: If the model does not look at images, or no note shows one, or the data cannot answer.
    """

    def __init__(self, folder: Path, model: Any, recipe: Recipe, data: PairData, *, batches: int, permutations: int, seed: int) -> None:
        self.folder, self.model, self.recipe, self.data = folder, model, recipe, data
        self.batches, self.permutations, self.seed = batches, permutations, seed
        self.main, self.split = recipe.evaluate.main, recipe.evaluate.split
        self.k = self.main.k
        keys = model.processor.keys()
        if "image" not in keys:
            raise ZooError(f"this model does not look at images, only at {', '.join(keys)}: there is nothing to diagnose")
        asked = tasks(data, split=self.split, protocol=self.main.protocol, ks=[self.k])
        self.tasks: dict[str, Task] = {name: task for name, task in asked.items() if recipe.evaluate.subsets or name == "all"}
        every = [array for task in self.tasks.values() for array in (task.pairs.ravel(), task.candidates)]
        self.notes = np.unique(np.concatenate(every))  # (n,) the notes that take part
        rows = (data.notes[int(i)] for i in self.notes)
        shown = [{key for key in keys if _shows(row.get(key))} for row in rows]
        self.with_image = self.notes[[("image" in some) for some in shown]]
        if not len(self.with_image):
            raise ZooError(f"none of the {len(self.notes)} notes of split {self.split!r} shows an image: there is nothing to diagnose")
        self.modalities = {name: own for name, own in modalities(keys).items() if any(set(own) & some for some in shown)}
        self._vectors: dict[Shown, dict[str, np.ndarray]] = {}

    def examine(self, what: Sequence[str]) -> dict[str, Any]:
        """Every part that is asked for, and what is not available."""
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "saliency": self.saliency,
            "gates": self.gates,
            "permutation": self.permutation,
            "shapley": self.shapley,
            "outputs": self.outputs,
            "gradients": self.gradients,
        }
        found: dict[str, Any] = {}
        missing, seconds = {}, {}
        for name in what:
            start = time.perf_counter()
            try:
                found[name] = parts[name]()
            except Unavailable as e:
                missing[name] = str(e)
                logger.info("%s is not available: %s", name, e)
            seconds[name] = round(time.perf_counter() - start, 1)
        queries = len(np.unique(self.tasks["all"].pairs[:, 0]))
        metric = {"protocol": self.main.protocol, "k": self.k, "queries": queries, "candidates": len(self.tasks["all"].candidates)}
        return {"metric": metric, **found, "not_available": missing, "seconds": seconds}

    def saliency(self) -> dict[str, Any]:
        """Scores and shares of every layer, with the scatter of the shares between batches."""
        scale = next((line["scale"] for line in reversed(self._log()) if "scale" in line), _SCALE)
        scores = [batch_saliency(self.model, batch, scale=scale) for batch in self._batches("saliency")]  # (layers, R, 3) each
        means = torch.cat(scores, dim=1).mean(1)  # (layers, 3)
        shares = torch.stack([_shares(score.mean(1)) for score in scores])  # (batches, layers, 3)
        spread = shares.std(0) if len(shares) > 1 else torch.full_like(means, torch.nan)
        names = ("visual", "text", "other")
        layers = [
            {
                "layer": i,
                **{name: float(means[i, j]) for j, name in enumerate(names)},
                "shares": {name: _finite(_shares(means)[i, j]) for j, name in enumerate(names)},
                "spread": {name: _finite(spread[i, j]) for j, name in enumerate(names)},
            }
            for i in range(len(means))
        ]
        return {"layers": layers, "notes": sum(s.shape[1] for s in scores), "batches": len(scores), "scale": float(scale)}

    def gates(self) -> dict[str, Any]:
        """Shares of the combined vector."""
        return {"records": gate_shares(self.model, self._batches("gates"))}

    def permutation(self) -> dict[str, Any]:
        """Recall with every image at another note, and what that costs, on each subset of the queries."""
        if len(self.with_image) < 2:
            raise Unavailable("one note alone shows an image: there is none to exchange it with")
        whole = self._hits(self._shown(frozenset(self.modalities)))
        exchanged = []
        for number in range(self.permutations):
            image_of = exchange(len(self.data.notes), self.with_image, seed=self.seed + number)
            exchanged.append(self._hits(self._embed(Altered(self.data.notes, (), image_of), f"permutation {number + 1}")))
        records = []
        for name, hits in whole.items():
            permuted = np.stack([other[name] for other in exchanged])  # (P, Q)
            record = {"subset": name, "recall": float(hits.mean()), "permuted": float(permuted.mean())}
            spread = float(permuted.mean(1).std(ddof=1)) if len(permuted) > 1 else None
            records.append(
                {**record, "between_permutations": spread, "drop": self._difference(hits, permuted.mean(0)), "queries": len(hits)}
            )
        return {"records": records, "permutations": self.permutations, "notes_with_image": len(self.with_image)}

    def shapley(self) -> dict[str, Any]:
        """Recall under every subset of modalities, what hiding the others costs, and each modality's Shapley value."""
        shown = subsets(self.modalities)
        recalls_of = {some: self._hits(self._shown(some)) for some in shown if some}
        expected = {some: self._expected(some) for some in shown}
        missing, values = [], []
        for name in self.tasks:
            hits = {some: recalls_of[some][name] if some else expected[some][name] for some in shown}
            for some in shown:
                cost = self._difference(hits[shown[0]], hits[some])
                missing.append({"subset": name, "shown": self._named(some), "recall": float(hits[some].mean()), "cost": cost})
            value = {some: expected[some][name] for some in shown}
            for modality, mine in shapley(value, self.modalities).items():
                values.append({"subset": name, "modality": modality, **self._difference(mine, np.zeros_like(mine))})
        return {
            "missing": missing,
            "values": values,
            "empty": "chance: K over the number of candidates; tied candidates count by chance in the values, as better in the recalls",
        }

    def outputs(self) -> dict[str, Any]:
        """Image-only recall of every embedding that the model gives."""
        found = self._shown(frozenset({"image"}))
        records = []
        for output in self.model.outputs:
            there = bool(found[output].any())
            hits = self._hits(found, output)["all"] if there else np.zeros(1)
            why = {} if there else {"not_available": "this embedding is absent when only the image is shown"}
            records.append({"output": output, **({"recall": float(hits.mean())} | self._interval(hits) if there else why)})
        return {"records": records, "chance": float(self._expected(frozenset())["all"].mean())}

    def gradients(self) -> dict[str, Any]:
        """Shares of the squared gradient norm over the training."""
        return gradient_shares(self.model, self._log())

    def _batches(self, says: str) -> Iterator[Batch]:
        """Batches of distinct pairs, drawn by the seed."""
        pairs = self.data.pairs(self.split)
        order = np.random.default_rng(self.seed).permutation(len(pairs))
        size = min(self.recipe.run.batch_size, len(pairs))
        collate = PairCollate(self.model.processor, Known.of(torch.from_numpy(pairs), len(self.data.notes)))
        device = next(self.model.parameters()).device
        for number in progress(range(min(self.batches, len(pairs) // size)), says, None):
            chosen = pairs[order[number * size : (number + 1) * size]]
            yield to_device(collate([Pair(self.data.notes[int(q)], self.data.notes[int(t)]) for q, t in chosen]), device)

    def _shown(self, some: Shown) -> dict[str, np.ndarray]:
        """Vectors of the notes of which only ``some`` modalities are shown."""
        if some not in self._vectors:
            hidden = [key for name, own in self.modalities.items() if name not in some for key in own]
            self._vectors[some] = self._embed(Altered(self.data.notes, hidden), f"shown: {', '.join(self._named(some))}")
        return self._vectors[some]

    def _embed(self, notes: Altered, says: str) -> dict[str, np.ndarray]:
        return vectors(self.model, notes, self.notes, batch_size=self.recipe.evaluate.batch_size, says=says)

    def _hits(self, found: Mapping[str, np.ndarray], output: str | None = None) -> dict[str, np.ndarray]:
        """Recall of every query (Q,) on each subset of the queries, as `zoo eval` counts it."""
        scorer = embedding_scorer(found[output or self.model.outputs[0]])
        hits = recalls(scorer, list(self.tasks.values()), [self.k])
        return {name: h[:, 0] for name, h in zip(self.tasks, hits, strict=True)}

    def _expected(self, some: Shown) -> dict[str, np.ndarray]:
        """The same with ties by chance."""
        notes = len(self.data.notes)
        scorer = embedding_scorer(self._shown(some)[self.model.outputs[0]]) if some else nothing(notes)
        return {name: expected_hits(scorer, task.pairs, task.candidates, self.k) for name, task in self.tasks.items()}

    def _named(self, some: Shown) -> list[str]:
        return [name for name in self.modalities if name in some]

    def _difference(self, a: np.ndarray, b: np.ndarray) -> dict[str, float]:
        return paired_difference(a, b, resamples=self.recipe.evaluate.bootstrap, seed=self.seed)._asdict()

    def _interval(self, hits: np.ndarray) -> dict[str, float]:
        found = self._difference(hits, np.zeros_like(hits))
        return {"low": found["low"], "high": found["high"]}

    def _log(self) -> list[dict[str, Any]]:
        """The lines of the training log; none if there is no log."""
        file = self.folder / "log.jsonl"
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def _shows(value: Any) -> bool:
    """Whether a value of a row holds anything; arrays always do."""
    return value is not None and not (isinstance(value, str | list | tuple) and not value)


def _shares(scores: torch.Tensor) -> torch.Tensor:
    """(..., 3) that sum to 1; NaN where nothing flows."""
    return scores / scores.sum(-1, keepdim=True)


def _finite(value: torch.Tensor) -> float | None:
    return float(value) if bool(value.isfinite()) else None
