"""A recipe: one YAML file, one run. Its keys are the fields below, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from dataclasses import fields as fields_of
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from zoo.adapters import Adapter, overlaps
from zoo.config import DataSpec, Fault, Fraction, ModelSpec, ObjectiveSpec, check, settings, split_spec
from zoo.errors import ZooError, unknown
from zoo.joints import compose
from zoo.registry import build, entry, lookup
from zoo.sections import Classify, Evaluate, NotNegative, Optimizer, Retrieve, Run
from zoo.source import Source, plain, written
from zoo.stages import Stage

Baseline = Literal["bm25", "popularity"] | dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run: what is built, on what it is trained, and how it is judged.

    Attributes:
        model: The keywords of ``zoo.build``, with ``name``.
        data: A data set and its settings, mining included.
        objective: What is minimised.
        optimizer: AdamW and its schedule.
        run: How long and on what.
        evaluate: What is measured of pairs.
        classify: What is measured of labelled rows, in the place of ``evaluate``.
        retrieve: What is measured of captioned pictures, in the place of ``evaluate``.
        baselines: What the model is compared with: a classic one by name, or an arm, trained from this recipe under dotted overrides:
            ``{"early fusion": {"model.fusion": "early"}}``.
        init_from: Earlier runs, each of which gives parts of its model to this one; trained first where a cache does not have them.
        freeze: Modules that are not trained, by name: ``vision``, ``backbone.model.layers.0``.
        train_only: What alone is trained of the model, in the place of ``freeze``: modules and parameters by name, each step of which may
            be a shell pattern, ``trunk.blocks.*.ffn.text``. What the objective has of its own is trained all the same.
        adapters: LoRA or DoRA in the modules that they name, whose own weights are frozen then; the run leaves the merged model.
        floor: ``{"recall@10": 0.2}`` under the protocol of ``evaluate.main``, or of captioned pictures in both directions, or
            ``{"accuracy": 0.8}``, of answers ``{"soft_accuracy": 0.6}``: below this the run has failed.
        seed: Of the weights, of the order of the data, and of all that is drawn.
        seeded: Keys of ``data`` that are always the seed, whatever a file says of them: ``("data.rotation",)``; an override is refused.
        out: The run folder.
    """

    model: ModelSpec
    data: DataSpec
    objective: ObjectiveSpec
    optimizer: Optimizer = field(default_factory=Optimizer)
    run: Run = field(default_factory=Run)
    evaluate: Evaluate = field(default_factory=Evaluate)
    classify: Classify = field(default_factory=Classify)
    retrieve: Retrieve = field(default_factory=Retrieve)
    baselines: Mapping[str, Baseline] = field(default_factory=dict)
    init_from: tuple[Stage, ...] = ()
    freeze: tuple[str, ...] = ()
    train_only: tuple[str, ...] = ()
    adapters: tuple[Adapter, ...] = ()
    floor: Mapping[str, Fraction] = field(default_factory=dict)
    seed: NotNegative = 0
    seeded: tuple[str, ...] = ()
    out: Path = Path("runs/unnamed")


def load_recipe(recipe: str | Path | Mapping[str, Any] | Recipe, *overrides: str, **keywords: Any) -> Recipe:
    """Read and check a recipe, without making anything.

    Args:
        recipe: A YAML file, the name of a shipped recipe (`recipes`), a mapping of the same form, or a recipe.
        *overrides: ``"optimizer.lr=3e-5"``, each in the place of the file's own value, mappings and lists included.
        **keywords: The same from Python, two underscores for the dot: ``optimizer__lr=3e-5``.

    Raises:
        ZooError: Naming the file and every fault in it.
    """
    source = _source(recipe)
    for override in overrides:
        key, equals, text = override.partition("=")
        value = Source.read(f"override {override!r}", text)
        source.faults += [Fault((), f"{value.name}: {f.says}") for f in value.faults]
        if not equals:
            source.faults.append(Fault((), f"{value.name}: write key=value"))
        elif not text.strip():
            source.faults.append(Fault((), f"{value.name}: nothing stands after the sign: for no value write {key}=null"))
        else:
            source.override(key, value.values, value.name)
    for key, value in keywords.items():
        source.override(key.replace("__", "."), plain(value), f"{key}={value!r}")
    _seed(source)
    fields, faults = _check(source.values)
    faults += _check_arms(source.values, faults)
    if source.faults or faults:
        raise ZooError(source.report([*source.faults, *faults]))
    return Recipe(**fields)


def arm(recipe: Recipe, name: str) -> Recipe:
    """The recipe of the trained baseline ``name``: this one under the arm's overrides, in the folder ``arms/<name>`` of its run.

    Raises:
        ZooError: If ``name`` is no trained baseline of this recipe.
    """
    arms = {n: overrides for n, overrides in recipe.baselines.items() if not isinstance(overrides, str)}
    if name not in arms:
        raise ZooError(unknown("trained baseline", name, arms))
    return load_recipe(_arm(values(recipe), name, arms[name]).values)


def dump(recipe: Recipe) -> str:
    """The recipe as YAML with every default of its sections written out; it loads back equal."""
    return written(values(recipe))


def build_from(name: str, **overrides: Any) -> Any:
    """Build the model of a shipped recipe: ``zoo.build_from("notellm2/mqwen_base")``.

    Args:
        name: Of `recipes`, or a YAML file.
        **overrides: Keywords of ``zoo.build``, in the place of the recipe's own.

    Raises:
        ZooError: On a fault of the recipe or of the keywords.
    """
    model, keywords = split_spec(load_recipe(name).model)
    return build(model, **{**keywords, **overrides})


def recipes() -> list[str]:
    """The names of the recipes that ship with the zoo, sorted: ``demo``, ``notellm2/mqwen_base``."""
    home = _home()
    return sorted(file.relative_to(home).with_suffix("").as_posix() for file in home.rglob("*.yaml"))


def _home() -> Path:
    return Path(next(iter(import_module("zoo.recipes").__path__)))


def _source(recipe: str | Path | Mapping[str, Any] | Recipe) -> Source:
    """What was written, as a tree whose top is a mapping."""
    if isinstance(recipe, Recipe):
        return Source("recipe", values(recipe))
    if isinstance(recipe, Mapping):
        return Source("recipe", plain(recipe))
    file = Path(recipe)
    if not file.is_file():
        if str(recipe) not in recipes():
            seen = f"{file} is a folder" if file.is_dir() else f"{file} is no regular file" if file.exists() else "no such file"
            raise ZooError(f"{seen}, and {unknown('shipped recipe', str(recipe), recipes())}")
        file = _home() / f"{recipe}.yaml"
    try:
        source = Source.read(str(file), file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as e:
        raise ZooError(f"{file}: not a text file: byte {e.start} is not UTF-8") from e
    if not source.faults and not isinstance(source.values, dict):
        source.faults.append(Fault((), f"a recipe is a mapping with the keys {', '.join(settings(Recipe))}"))
    if not isinstance(source.values, dict):
        raise ZooError(source.report(source.faults))
    return source


def _seed(source: Source) -> None:
    """Give the keys that follow the seed its number."""
    keys, seed = source.values.get("seeded", ()), source.values.get("seed", Recipe.seed)
    for key in keys if isinstance(keys, list | tuple) else ():
        if not isinstance(key, str) or not key.startswith("data."):
            source.faults.append(Fault(("seeded",), f"{key!r} is no setting of the data: write a key such as data.seed"))
        elif (said := source.overridden(key)) is not None and said[1] != seed:
            source.faults.append(Fault(tuple(key.split(".")), f"it follows the seed, which is {seed}: write seed={said[1]}, or seeded=[]"))
        else:
            source.override(key, seed, f"seed={seed}")


def _check(values: dict[str, Any]) -> tuple[dict[str, Any], list[Fault]]:
    """The fields of a recipe, and all that is wrong with them."""
    named = {k: {"name": v} if k in ("model", "data", "objective") and isinstance(v, str) else v for k, v in values.items()}
    fields, faults = check(Recipe, named, lookup)
    if not any(f.path[:1] == ("model",) for f in faults) and "model" in fields:
        faults += _check_joints(fields["model"])
    return fields, faults + _contradictions(fields)


def _check_joints(model: dict[str, Any]) -> list[Fault]:
    """Whether the fusions fit the model, asked before anything is built."""
    if "fusion" not in model:
        return []
    try:
        found = entry("model", model["name"])
        compose(model["fusion"], model["name"], found.joints, found.gives)
    except ZooError as e:
        return [Fault(("model", "fusion"), str(e))]
    return []


def _contradictions(fields: Mapping[str, Any]) -> list[Fault]:
    """What no single value tells."""
    faults = overlaps(fields.get("adapters", ()))
    run, evaluate = fields.get("run", Run()), fields.get("evaluate", Evaluate())
    if isinstance(run, Run) and run.steps is None and run.epochs is None:
        faults.append(Fault(("run",), "neither 'steps' nor 'epochs': write one of them"))
    if fields.get("train_only") and (other := next((key for key in ("freeze", "adapters") if fields.get(key)), None)):
        faults.append(Fault(("train_only",), f"it says all that is trained, and {other} says it in another way: write one of the two"))
    for i, stage in enumerate(fields.get("init_from", ())):
        if isinstance(stage, Stage) and (stage.recipe is None) == (stage.folder is None):
            says = "a stage is a recipe, which is trained, or the folder of a model that is there: write one of the two"
            faults.append(Fault(("init_from", i), says))
    out = fields.get("out", Recipe.out)
    if isinstance(out, Path) and (file := next((place for place in (out, *out.parents) if os.path.isfile(place)), None)) is not None:
        faults.append(Fault(("out",), f"{file} is a file; write a folder"))
    retrieve = fields.get("retrieve", Retrieve())
    if isinstance(retrieve, Retrieve):
        faults += _contradictions_of_captions(retrieve)
    if not isinstance(evaluate, Evaluate) or not isinstance(retrieve, Retrieve):
        return faults
    if evaluate.main.protocol not in evaluate.protocols:
        faults.append(
            Fault(("evaluate", "main", "protocol"), unknown("protocol of this recipe", evaluate.main.protocol, evaluate.protocols))
        )
    if evaluate.main.k not in evaluate.k:
        faults.append(Fault(("evaluate", "main", "k"), f"{evaluate.main.k} is none of evaluate.k, {list(evaluate.k)}"))
    ks = retrieve.k if retrieve != Retrieve() else (*evaluate.k, *(k for k in retrieve.k if evaluate == Evaluate()))
    floors = [*dict.fromkeys(f"recall@{k}" for k in ks), "accuracy", "soft_accuracy"]
    lost = [key for key in fields.get("floor", {}) if key not in floors]
    return faults + [Fault(("floor", key), f'{unknown("metric", key, floors)}, or write "floor={{}}" for none') for key in lost]


def _contradictions_of_captions(retrieve: Retrieve) -> list[Fault]:
    """What no single value of the section ``retrieve`` tells."""
    faults = []
    if not retrieve.splits:
        faults.append(Fault(("retrieve", "splits"), "it names no split: write at least one, such as [test]"))
    if len(set(retrieve.splits)) < len(retrieve.splits):
        faults.append(Fault(("retrieve", "splits"), f"{list(retrieve.splits)}: write each split once"))
    if retrieve.main.k not in retrieve.k:
        faults.append(Fault(("retrieve", "main", "k"), f"{retrieve.main.k} is none of retrieve.k, {list(retrieve.k)}"))
    for template in retrieve.zeroshot.templates:
        if template.count("{}") != 1:
            faults.append(Fault(("retrieve", "zeroshot", "templates"), f"{template!r} has no place for the name: write {{}} in it, once"))
    if retrieve.decode.shortest > retrieve.decode.longest:
        says = f"{retrieve.decode.shortest} is more than retrieve.decode.longest, {retrieve.decode.longest}"
        faults.append(Fault(("retrieve", "decode", "shortest"), says))
    return faults


def _check_arms(values: dict[str, Any], known: list[Fault]) -> list[Fault]:
    """What is wrong with the recipe under each arm's overrides, and was not wrong before."""
    baselines = values.get("baselines")
    faults = []
    for name, overrides in baselines.items() if isinstance(baselines, dict) else ():
        if not isinstance(overrides, dict):
            continue  # a classic baseline, which the signature checks
        if name in ("", "..") or Path(name).name != name:
            faults.append(Fault(("baselines", name), f"{name!r} names a folder of the run: write a word, without a slash"))
        source = _arm(values, name, overrides)
        _seed(source)
        found = source.faults + [f for f in _check(source.values)[1] if f not in known]
        for fault in found:
            dotted = ".".join(map(str, fault.path))
            key = max((k for k in overrides if f"{dotted}.".startswith(f"{k}.")), key=len, default=None)
            says = fault.says if key == dotted else f"{dotted}: {fault.says}"
            faults.append(Fault(("baselines", name, *([] if key is None else [key])), says))
    return faults


def _arm(values: dict[str, Any], name: str, overrides: Mapping[str, Any]) -> Source:
    """The tree of an arm: no baselines and no floor of its own."""
    kept = {k: v for k, v in plain(values).items() if k not in ("baselines", "floor")}
    kept["out"] = (Path(str(kept.get("out", Recipe.out))) / "arms" / name).as_posix()
    source = Source(f"arm {name!r}", kept)
    for key, value in overrides.items():
        source.override(key, plain(value), f"{key}={value!r}")
    return source


def values(value: Any) -> Any:
    """A recipe, or a section of one, as the plain values that YAML would hold."""
    if is_dataclass(value):
        return {f.name: values(getattr(value, f.name)) for f in fields_of(value)}
    if isinstance(value, tuple):
        return [values(v) for v in value]
    return value.as_posix() if isinstance(value, Path) else plain(value)
