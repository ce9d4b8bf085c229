"""VQA v2: questions about photographs of COCO, each answered by ten people."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field

from zoo.config import Fraction, Positive
from zoo.data._captioned import Pictures
from zoo.data._labelled import find
from zoo.data._looked import look_at
from zoo.data._splits import SPLITS, Unit, draw_lists
from zoo.errors import ZooError, unknown
from zoo.registry import register
from zoo.types import Row

logger = logging.getLogger("zoo.data")

OTHER = "(another answer)"  # the class of what is no candidate
KEYS: Mapping[str, Mapping[str, type]] = {  # what each entry of a file has
    "questions": {"question_id": int, "image_id": int, "question": str},
    "annotations": {"question_id": int, "multiple_choice_answer": str, "answers": list},
}
NOUNS: Mapping[type, str] = {int: "whole number", str: "text", list: "list"}
LAYOUT = """vqa_v2 is a folder with
  v2_OpenEnded_mscoco_train2014_questions.json, v2_OpenEnded_mscoco_val2014_questions.json
  v2_mscoco_train2014_annotations.json, v2_mscoco_val2014_annotations.json
of https://visualqa.org, and with
  train2014/, val2014/  the pictures of COCO; or in another folder, the setting images"""


class Question(NamedTuple):
    """A question as the files have it."""

    number: int
    picture: int
    text: str
    answers: tuple[str, ...]  # as ten people wrote them
    usual: str  # the one that most wrote
    kind: str  # yes/no, number or other
    part: str  # train2014 or val2014


class Asking(Sequence[Row]):
    """The questions as raw rows, whose picture is decoded on access."""

    def __init__(self, pictures: Pictures, of: np.ndarray, texts: Sequence[str]) -> None:
        self.pictures, self.of, self.texts = pictures, of, texts

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: Any) -> Any:  # an int; Sequence would also have it take slices
        i = range(len(self))[index]
        return {"id": i, "image": self.pictures[int(self.of[i])]["image"], "text": self.texts[i]}


class Questions:
    """Questions, their pictures and answers. It is a `zoo.answers.AnsweredData`, and `zoo.labelled.Soft`.

    A class is the answer that most people gave. Answers that are too rare to be candidates are of one class, the last, which no row of
    split ``train`` has, so that nothing predicts it: such rows are left out, or where training is told how right each answer is, are of
    the candidate that most of their people gave, and left out where nobody gave one.

    Args:
        rows: As they are read.
        questions: (N,) what each is of.
        split: (N,) of each.
        candidates: Answers to choose from, the most frequent first.
        broken: Names of the pictures that could not be decoded; their questions are left out.
        statistics: For the report.
        fingerprint: Of files and settings.
        soft: Whether training is told how right each answer is.
    """

    modalities: tuple[str, ...] = ("image", "text")

    def __init__(
        self,
        rows: Asking,
        questions: Sequence[Question],
        split: np.ndarray,
        candidates: Sequence[str],
        broken: Sequence[Any],
        statistics: Mapping[str, Any],
        fingerprint: str,
        soft: bool,
    ) -> None:
        self.rows: Sequence[Row] = rows
        self.row_ids: Sequence[Any] = [q.number for q in questions]
        self.candidates = tuple(candidates)
        self.rest: tuple[str, ...] = (OTHER,)
        self.classes: tuple[str, ...] = (*candidates, *self.rest)
        self.answers: Sequence[tuple[str, ...]] = [q.answers for q in questions]
        self.kinds: Sequence[str] = [q.kind for q in questions]
        self.soft = soft
        self._place = place = {answer: i for i, answer in enumerate(candidates)}
        self.labels = np.array([place.get(q.usual, len(candidates)) for q in questions], dtype=np.int64)
        rare = (split == "train") & (self.labels == len(candidates))
        if soft:
            self.labels[rare] = [self._most(questions[int(i)]) for i in np.flatnonzero(rare)]
        self._split = np.where(rare & (self.labels == len(candidates)), "", split)
        self.broken: Sequence[Any] = broken
        self.fingerprint = fingerprint
        self.statistics: Mapping[str, Any] = {
            "questions": {s: len(self.split(s)) for s in SPLITS},
            "candidates": len(candidates),
            "train_left_out_for_rare_answers": int((self._split == "").sum()),
            "test_of_rare_answers": round(float((self.labels[self.split("test")] == len(candidates)).mean()), 4),
            **statistics,
        }

    def split(self, name: str) -> np.ndarray:
        """(n,) int64 rows.

        Raises:
            ZooError: If there is no such split.
        """
        if name not in SPLITS:
            raise ZooError(unknown("split", name, SPLITS))
        return np.flatnonzero(self._split == name)

    def shares(self, rows: np.ndarray) -> np.ndarray:
        """(n, K) float32 in 0..1: of each answer what the accuracy of the VQA challenge gives for it, 0.3 where one of ten people gave it.

        Words are compared as they stand in the files.
        """
        found = np.zeros((len(rows), len(self.classes)), dtype=np.float32)
        for i, row in enumerate(rows.tolist()):
            said = self.answers[row]
            for answer, people in Counter(said).items():
                if answer in self._place:
                    found[i, self._place[answer]] = _share(people, len(said))
        return found

    def _most(self, question: Question) -> int:
        """The candidate that most people gave, or the class of the rest."""
        said = Counter(answer for answer in question.answers if answer in self._place)
        return self._place[said.most_common(1)[0][0]] if said else len(self._place)

    def lengths(self) -> np.ndarray:
        """(N,) int64 characters of each question."""
        return np.array([len(row) for row in self.rows.texts], dtype=np.int64)  # type: ignore[attr-defined]


@register("data", "vqa_v2", licence="CC BY 4.0 (questions and answers); of each picture its owner's")
def vqa_v2(
    root: Path | None,
    *,
    folder: str = "vqa_v2",
    images: str = ".",
    least: Positive = 9,
    val: Annotated[Fraction, Field(gt=0, lt=1)] = 0.05,
    seed: Annotated[int, Field(ge=0)] = 0,
    soft: bool = False,
) -> Questions:
    """VQA v2 (Goyal et al., 2017, https://arxiv.org/abs/1612.00837): 658,111 questions about COCO whose answers are public.

    Split ``test`` is the published val2014, since the answers to the test questions are not public; ``val`` is a share of the pictures of
    train2014, drawn by seed. `zoo.evaluate.vqa` measures answers by the share of people who gave them.

    Args:
        root: The folder of data folders.
        folder: Below ``root``, or an absolute path.
        images: The folder of train2014 and val2014, below ``folder`` or absolute.
        least: How often the training questions must have an answer as their usual one for it to be a candidate; 9 gives about 3,000.
        val: Share of the pictures of train2014 whose questions are val.
        seed: Of val.
        soft: Training is told how right each answer is, by how many people gave it, for the objective ``binary_cross_entropy``, and takes
            every question to which somebody gave a candidate; off: the usual one, and questions whose usual one is a candidate.

    Raises:
        ZooError: If the folder or a file is not there, a file is not as published, or not one picture can be used.
    """
    files = {part: (_file(part, "questions"), _file(part, "annotations")) for part in ("train2014", "val2014")}
    place = find(root, folder, LAYOUT, *(name for pair in files.values() for name in pair))
    asked = [question for part, (questions, answers) in files.items() for question in _read(place / questions, place / answers, part)]
    paths = {q.picture: place / images / q.part / f"COCO_{q.part}_{q.picture:012d}.jpg" for q in asked}
    looks = look_at(list(paths.values()))
    faults = [f"{p} {looks[p].fault}" for p in paths.values() if looks[p].fault]
    kept = [q for q in asked if not looks[paths[q.picture]].fault]
    if not kept:
        raise ZooError(f"{place}: not one of {len(paths)} pictures can be used, such as: {faults[0] if faults else 'none'}\n{LAYOUT}")
    if faults:
        logger.warning("%d pictures of vqa_v2 cannot be used, such as %s", len(faults), faults[0])
    pictures = list(dict.fromkeys(q.picture for q in kept))
    number = {picture: i for i, picture in enumerate(pictures)}
    units = [Unit(str(picture), "", part=q.part) for picture, q in {q.picture: q for q in kept}.items()]
    lists = draw_lists(units, {"train2014": (1 - val, val, 0.0), "val2014": (0.0, 0.0, 1.0)}, seed)
    split = np.array([lists[str(q.picture)] for q in kept])
    usual = Counter(q.usual for q, s in zip(kept, split, strict=True) if s == "train")
    candidates = [answer for answer, n in sorted(usual.items(), key=lambda pair: (-pair[1], pair[0])) if n >= least]
    total = hashlib.sha256(json.dumps([least, val, seed, *(["soft"] if soft else [])]).encode())
    for q in kept:
        total.update(json.dumps(q).encode() + looks[paths[q.picture]].sha256)
    return Questions(
        Asking(
            Pictures([str(paths[p]) for p in pictures]),
            np.array([number[q.picture] for q in kept], dtype=np.int64),
            [q.text for q in kept],
        ),
        kept,
        split,
        candidates,
        [paths[p].name for p in paths if looks[paths[p]].fault],
        {"pictures": len(pictures), "faults": faults[:10]},
        total.hexdigest(),
        soft,
    )


def _share(people: int, of: int) -> float:
    """How right an answer is that so many people of all gave: for each of them a third of the others who gave it, 1 at most; the mean."""
    return (people * min((people - 1) / 3, 1.0) + (of - people) * min(people / 3, 1.0)) / of


def _file(part: str, what: str) -> str:
    return f"v2_OpenEnded_mscoco_{part}_questions.json" if what == "questions" else f"v2_mscoco_{part}_annotations.json"


def _read(questions: Path, annotations: Path, part: str) -> list[Question]:
    """The questions of a part, with their answers.

    Raises:
        ZooError: If a file is no such JSON, or a question has no answers.
    """
    asked = _entries(questions, "questions")
    answered = {a["question_id"]: a for a in _entries(annotations, "annotations")}
    if lost := [q["question_id"] for q in asked if q["question_id"] not in answered]:
        raise ZooError(f"{annotations}: {len(lost)} questions, such as {lost[0]}, have no answers there")
    found = []
    for q in asked:
        a = answered[q["question_id"]]
        said, kind = tuple(one["answer"] for one in a["answers"]), a.get("answer_type", "")
        found.append(Question(q["question_id"], q["image_id"], q["question"].strip(), said, a["multiple_choice_answer"], kind, part))
    return found


def _entries(path: Path, what: str) -> list[dict[str, Any]]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        raise ZooError(f"{path} cannot be read as JSON ({e})\n{LAYOUT}") from e
    entries = value.get(what) if isinstance(value, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ZooError(f"{path}: there is no list {what!r}, or nothing in it\n{LAYOUT}")
    if wrong := {i: fault for i, entry in enumerate(entries) if (fault := _fault(entry, KEYS[what]))}:
        first = min(wrong)
        raise ZooError(f"{path}: {len(wrong)} of {len(entries)} {what}, such as number {first}, {wrong[first]}\n{LAYOUT}")
    return entries


def _fault(entry: Any, keys: Mapping[str, type]) -> str:
    """What is wrong with an entry, "" for nothing."""
    if not isinstance(entry, dict) or not keys.keys() <= entry.keys():
        return f"lack one of {', '.join(keys)}"
    kinds = {**keys, "answer_type": str} if "answer_type" in entry else keys
    for key, kind in kinds.items():
        if not isinstance(entry[key], kind):
            return f"have {key} {entry[key]!r:.60}, which is no {NOUNS[kind]}"
    said = entry.get("answers", [{"answer": ""}] * 2)
    if len(said) < 2 or not all(isinstance(one, dict) and isinstance(one.get("answer"), str) for one in said):
        return f"have answers {said!r:.60}, and not those of two people or more, each {{answer: ...}} with a text"
    return ""
