"""A study: recipes trained and measured again and again, under other seeds, arms and settings, each time in a run folder of its own."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from multiprocessing import connection, get_context
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from zoo.checkpoint import check_same_run
from zoo.errors import Terminated, ZooError
from zoo.files import write_bytes, write_json
from zoo.interrupt import Interruption, stop
from zoo.metric import Metric
from zoo.questions import check_questions, questions
from zoo.recipe import values
from zoo.run import load_data, machine, measure_classic, train_and_measure
from zoo.sections import Retrieve
from zoo.train import identity_of
from zoo.trials import Trial
from zoo.types import Data

logger = logging.getLogger("zoo.study")
State = Literal["new", "begun", "failed", "done"]


class Result(NamedTuple):
    """What a trial came to, as it lies in its folder."""

    state: State
    message: str  # why it failed
    metrics: list[Metric]
    seconds: float  # of training
    parameters: int  # trained ones
    recipe_sha256: str
    data: str  # fingerprint
    questions: Mapping[str, str]  # {"multi/all": digest}: equal ones are the same queries, partners and candidates
    more: Mapping[str, Any]  # of a classifier, as `zoo.questions.Answer` says
    machine: Mapping[str, Any]  # that it was measured on, with versions and commit


def load_all(found: Sequence[Trial], data_root: Path | None) -> dict[str, Data]:
    """The data sets of a study, each once, asked whether they can answer what will be measured.

    Raises:
        ZooError: With the faults of all of them.
    """
    loaded: dict[str, Data] = {}
    faults = []
    for trial in found:
        key = _key(trial)
        if key in loaded:
            continue
        try:
            loaded[key] = load_data(trial.recipe, data_root)
            check_questions(trial.recipe, loaded[key])
        except ZooError as e:
            faults.append(f"{trial.cell}: {e}")
    if faults:
        raise ZooError("\n".join(dict.fromkeys(faults)))
    return loaded


def data_of(trial: Trial, loaded: Mapping[str, Data]) -> Data:
    """The data set of a trial, among those of `load_all`."""
    return loaded[_key(trial)]


def _key(trial: Trial) -> str:
    return json.dumps(values(trial.recipe.data), sort_keys=True)


def states(found: Sequence[Trial], loaded: Mapping[str, Data] | None) -> list[State]:
    """How far each trial has come. Without data, only the recipes are compared with what lies in the folders.

    Raises:
        ZooError: If a folder holds a trial of another recipe or of other data; with all of those.
    """
    out: list[State] = []
    faults = []
    for trial in found:
        try:
            out.append(_state(trial, None if loaded is None else loaded[_key(trial)].fingerprint))
        except ZooError as e:
            faults.append(str(e))
    if faults:
        raise ZooError("\n".join(faults))
    return out


def _state(trial: Trial, fingerprint: str | None) -> State:
    if not (trial.recipe.out / "result.json").is_file():
        return "new"
    there = json.loads((trial.recipe.out / "result.json").read_text(encoding="utf-8"))
    before = there["identity"] | ({"data": None} if fingerprint is None else {})
    check_same_run(f"what lies in {trial.recipe.out}", before, _identity(trial, fingerprint))
    if there["state"] != "done":
        return there["state"]
    if there["evaluate"] != json.loads(json.dumps(_measured(trial))):
        return "begun"
    try:
        with safe_open(trial.recipe.out / "hits.safetensors", "numpy"):
            return "done"
    except (FileNotFoundError, SafetensorError) as e:
        logger.warning("%s is measured again: its hits.safetensors is missing or damaged (%s)", trial.title, e)
        return "begun"


def _identity(trial: Trial, fingerprint: str | None) -> dict[str, Any]:
    """What decides the weights of a trial."""
    decides = {"classic": trial.classic, "data": values(trial.recipe.data)} if trial.classic else identity_of(trial.recipe)
    return {"recipe": decides, "data": fingerprint}


def perform(trial: Trial, data: Data, *, data_root: Path | None = None, fresh: bool = False) -> None:
    """Train and measure one trial, from its last checkpoint on, and write down in its folder what came of it.

    ``result.json`` says ``begun`` until all else is written; ``hits.safetensors`` holds the recall of every query. A trial that
    diverges, or whose recipe proves to be at fault, is written down as failed, and nothing is raised.

    Args:
        trial: What to do.
        data: Its data set.
        data_root: The folder that holds the folders of data sets, for a stage in ``init_from`` on another one.
        fresh: Do it again.

    Raises:
        Terminated: If the training was asked to stop.
    """
    _write(trial, data.fingerprint, "begun")
    try:
        if trial.classic:
            done = measure_classic(trial.classic, data, trial.recipe)
        else:
            done = train_and_measure(trial.recipe, data, data_root=data_root, fresh=fresh)
    except Terminated:
        raise
    except ZooError as e:
        logger.warning("%s failed: %s", trial.title, e)
        _write(trial, data.fingerprint, "failed", str(e))
        return
    queries = {f"queries/{m.protocol}/{m.subset}": m.queries for m in done.metrics}
    hits = {"/".join(_names(m)): np.ascontiguousarray(m.hits) for m in done.metrics}  # of strided arrays, safetensors would save others
    write_bytes(trial.recipe.out / "hits.safetensors", save(queries | hits))
    numbers: dict[str, Any] = {"records": [m.record() for m in done.metrics], "seconds": done.seconds, "parameters": done.parameters}
    _write(
        trial,
        data.fingerprint,
        "done",
        **numbers,
        questions=questions(trial.recipe, data),
        more=dict(done.more),
        machine=machine() | {"commit": commit()},
    )


def _measured(trial: Trial) -> dict[str, Any]:
    """What may change between two measurements of the same weights."""
    asked = {section: values(getattr(trial.recipe, section)) for section in ("evaluate", "classify", "retrieve")}
    return {section: said for section, said in asked.items() if section != "retrieve" or said != values(Retrieve())}


def _write(trial: Trial, fingerprint: str, state: State, message: str = "", **numbers: Any) -> None:
    """``result.json``: what the trial is, how far it has come, and its numbers."""
    identity = _identity(trial, fingerprint)
    about = {
        "state": state,
        "message": message,
        "cell": trial.cell,
        "seed": trial.recipe.seed,
        "identity": identity,
        "recipe_sha256": hashlib.sha256(json.dumps(identity["recipe"], sort_keys=True).encode()).hexdigest(),
        "evaluate": _measured(trial),
    }
    write_json(trial.recipe.out / "result.json", about | numbers)


def _names(metric: Metric) -> tuple[str, ...]:
    return tuple(map(str, metric.key))


def result(trial: Trial) -> Result:
    """What `perform` wrote down."""
    there = json.loads((trial.recipe.out / "result.json").read_text(encoding="utf-8"))
    metrics = []
    if there["state"] == "done":
        arrays = load_file(trial.recipe.out / "hits.safetensors")
        for record in there["records"]:
            queries = arrays[f"queries/{record['protocol']}/{record['subset']}"]
            hits = arrays["/".join(str(record[name]) for name in ("protocol", "subset", "input", "k"))]
            metrics.append(Metric(**{**record, "queries": queries, "hits": hits}))
    return Result(
        there["state"],
        there["message"],
        metrics,
        there.get("seconds", 0.0),
        there.get("parameters", 0),
        there["recipe_sha256"],
        there["identity"]["data"],
        there.get("questions", {}),
        there.get("more", {}),
        there.get("machine", {}),
    )


def perform_all(
    found: Sequence[Trial], loaded: Mapping[str, Data], *, data_root: Path | None = None, jobs: int = 1, fresh: bool = False
) -> None:
    """Perform what is not done yet, and say on the way how far it is and how long it will take.

    Args:
        found: The study.
        loaded: Its data, by `load_all`.
        data_root: For processes of their own, which load their data themselves, and for stages on other data.
        jobs: Trials at a time. Above 1 each has a process of its own and one thread; a script that calls this then guards its own
            top level by ``if __name__ == "__main__":``, as multiprocessing wants it.
        fresh: Do everything again.

    Raises:
        ZooError: As `states`.
        Terminated: If the training was asked to stop.
    """
    if jobs < 1:
        raise ZooError(f"jobs: {jobs} is none: write 1 or more")
    standing: list[State] = ["new"] * len(found) if fresh else states(found, loaded)
    waiting = [trial for trial, state in zip(found, standing, strict=True) if state != "done"]
    if len(waiting) < len(found):
        logger.info("%d of %d trials are done already", len(found) - len(waiting), len(found))
    clock = _Clock(len(found), len(found) - len(waiting), jobs)
    if jobs == 1:
        for trial in waiting:
            clock.begins(trial)
            perform(trial, loaded[_key(trial)], data_root=data_root, fresh=fresh)
            clock.ends(trial)
        return
    _in_processes(waiting, loaded, clock, data_root, jobs, fresh)


class _Clock:
    """Says which trial of how many begins, and how long the rest will take, going by those that this call has finished."""

    def __init__(self, total: int, done: int, jobs: int) -> None:
        self.total, self.begun, self.jobs = total, done, jobs
        self.started: dict[Path, float] = {}
        self.took: list[float] = []

    def begins(self, trial: Trial) -> None:
        self.begun += 1
        self.started[trial.recipe.out] = time.perf_counter()
        left = (self.total - self.begun + 1) * float(np.mean(self.took)) / self.jobs / 60 if self.took else None
        logger.info("%d of %d: %s%s", self.begun, self.total, trial.title, "" if left is None else f"; about {left:.1f} min left")

    def ends(self, trial: Trial) -> None:
        if not trial.classic:
            self.took.append(time.perf_counter() - self.started[trial.recipe.out])


def _in_processes(waiting: list[Trial], loaded: Mapping[str, Data], clock: _Clock, data_root: Path | None, jobs: int, fresh: bool) -> None:
    """Perform trials in processes of their own; one that dies takes nobody along."""
    context = get_context("spawn")  # a forked process would inherit torch's threads as they happen to stand
    running: dict[Any, tuple[SpawnProcess, Trial]] = {}
    with Interruption() as interruption:
        try:
            while (waiting or running) and not interruption.signal:
                while waiting and len(running) < jobs:
                    trial = waiting.pop(0)
                    clock.begins(trial)
                    process = context.Process(target=_alone, args=(trial, data_root, fresh))
                    process.start()
                    running[process.sentinel] = process, trial
                for sentinel in connection.wait(list(running), timeout=1.0):  # a signal alone would not end the wait
                    process, trial = running.pop(sentinel)
                    process.join()
                    clock.ends(trial)
                    if process.exitcode and not interruption.signal:
                        _died(trial, loaded[_key(trial)].fingerprint, process.exitcode)
        finally:
            for process, _ in running.values():
                process.terminate()  # it saves where it stands
            for process, _ in running.values():
                process.join()
    if interruption.signal:
        stop(interruption.signal, "the study was asked to stop: run the same command again to go on")


def _alone(trial: Trial, data_root: Path | None, fresh: bool) -> None:
    """All of a process that performs one trial."""
    torch.set_num_threads(1)
    one = trial._replace(recipe=replace(trial.recipe, run=replace(trial.recipe.run, threads=1)))
    try:
        perform(one, load_data(one.recipe, data_root), data_root=data_root, fresh=fresh)
    except Terminated as e:
        sys.exit(e.code)
    except KeyboardInterrupt:
        sys.exit(130)


def _died(trial: Trial, fingerprint: str, code: int) -> None:
    message = f"its process ended with exit code {code}: run the same command again to go on from its last checkpoint"
    logger.warning("%s failed: %s", trial.title, message)
    _write(trial, fingerprint, "failed", message)


def commit() -> str | None:
    """The commit of the checkout that this code lies in, with ``-dirty`` where files differ from it; None outside of one."""
    home = Path(__file__).resolve().parents[1]
    if not (home / ".git").exists() or shutil.which("git") is None:
        return None
    asked = subprocess.run(
        ["git", "-C", str(home), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    return asked.stdout.strip() or None
