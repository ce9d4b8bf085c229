"""A recipe: one YAML file, one run. Its keys are the fields below, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from zoo.config import DataSpec, Fraction, ModelSpec, ObjectiveSpec, Positive

NotNegative = Annotated[int, Field(ge=0)]
Above = Annotated[float, Field(gt=0.0)]
AtLeastZero = Annotated[float, Field(ge=0.0)]
Protocol = Literal["one_target", "multi"]
Inputs = Literal["both", "text", "image"]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters that learn at a rate or with a decay of their own.

    Attributes:
        prefix: Of module names: ``model.vision``, ``objective``; the longest prefix wins, one that matches nothing is an error.
        lr: Peak; None: the optimizer's.
        weight_decay: None: the optimizer's.
    """

    prefix: str
    lr: AtLeastZero | None = None
    weight_decay: AtLeastZero | None = None


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW and its learning-rate schedule.

    Attributes:
        lr: Peak, after warm-up.
        weight_decay: Decoupled from the gradient, on every parameter.
        betas: Of the two running means.
        eps: Added to the root of the second one.
        max_grad_norm: Gradients longer than this are scaled down to it; 0: off.
        warmup: Below 1 a share of the steps, from 1 on a number of steps.
        warmup_shape: ``log`` rises with the logarithm of the step from 0, as DeepSpeed's WarmupDecayLR does.
        decay: From the peak to 0 at the last step, or not at all.
        groups: Exceptions by module prefix.
    """

    lr: AtLeastZero = 1e-4
    weight_decay: AtLeastZero = 0.01
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Above = 1e-8
    max_grad_norm: AtLeastZero = 1.0
    warmup: AtLeastZero = 0.1
    warmup_shape: Literal["linear", "log"] = "linear"
    decay: Literal["linear", "cosine", "constant"] = "linear"
    groups: tuple[Group, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Run:
    """How long and on what.

    Attributes:
        steps: Optimizer steps; decides where it is given.
        epochs: Passes over the pairs, where ``steps`` is None.
        batch_size: Pairs per process.
        accumulate: Batches per optimizer step.
        precision: Of the forward pass.
        gradient_checkpointing: Compute activations again in the backward pass, to save memory.
        workers: Processes that load data; 0: none beside the main one. The result does not depend on it.
        buckets: Batches of pairs of like length.
        log_every: Steps.
        save_every: Steps; 0: only at the end.
        keep: How many checkpoints stay.
        device: ``auto``, ``cpu``, ``cuda``, ``mps``.
        threads: Of torch on the CPU; 0: as torch chooses.
    """

    steps: Positive | None = None
    epochs: Above | None = 1.0
    batch_size: Positive = 32
    accumulate: Positive = 1
    precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    workers: NotNegative = 0
    buckets: bool = True
    log_every: Positive = 10
    save_every: NotNegative = 0
    keep: Positive = 2
    device: str = "auto"
    threads: NotNegative = 0


@dataclass(frozen=True, kw_only=True)
class Headline:
    """The one number that a run is judged by: Recall@k under a protocol."""

    protocol: Protocol = "one_target"
    k: Positive = 10


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """What is measured, on what.

    Attributes:
        split: Of the data set.
        protocols: ``one_target``: NoteLLM-2's, a pair is a query and its one target. ``multi``: recall of all partners of a query.
        k: Recall is reported at each.
        inputs: Which modalities of the items are shown to the model.
        subsets: Report pairs with a short query and with a short target too.
        bootstrap: Resamplings for the intervals; 0: no intervals.
        batch_size: Items encoded at once.
        examples: Queries that the report shows with their neighbours.
        main: The headline number.
    """

    split: str = "test"
    protocols: tuple[Protocol, ...] = ("one_target", "multi")
    k: tuple[Positive, ...] = (10, 100)
    inputs: tuple[Inputs, ...] = ("both", "text", "image")
    subsets: bool = True
    bootstrap: NotNegative = 1000
    batch_size: Positive = 256
    examples: NotNegative = 6
    main: Headline = Headline()


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
        evaluate: What is measured.
        baselines: What the model is compared with: a classic one by name, or an arm, trained from this recipe under dotted overrides:
            ``{"early fusion": {"model.fusion": "early"}}``.
        freeze: Module prefixes that are not trained.
        floor: ``{"recall@10": 0.2}``: below this the run has failed; under the protocol of ``evaluate.main``.
        seed: Of the weights, of the order of the data, and of all that is drawn.
        out: The run folder.
    """

    model: ModelSpec
    data: DataSpec
    objective: ObjectiveSpec
    optimizer: Optimizer = field(default_factory=Optimizer)
    run: Run = field(default_factory=Run)
    evaluate: Evaluate = field(default_factory=Evaluate)
    baselines: Mapping[str, Baseline] = field(default_factory=dict)
    freeze: tuple[str, ...] = ()
    floor: Mapping[str, Fraction] = field(default_factory=dict)
    seed: NotNegative = 0
    out: Path = Path("runs/unnamed")


def load_recipe(recipe: str | Path | Mapping[str, Any] | Recipe, *overrides: str, **keywords: Any) -> Recipe:
    """Read and check a recipe, without making anything."""
    raise NotImplementedError


def arm(recipe: Recipe, name: str) -> Recipe:
    """The recipe of the trained baseline ``name``."""
    raise NotImplementedError


def dump(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out; it loads back equal."""
    raise NotImplementedError


def build_from(name: str, **overrides: Any) -> Any:
    """Build the model of a shipped recipe: ``zoo.build_from("notellm2/mqwen_base")``."""
    raise NotImplementedError


def recipes() -> list[str]:
    """The names of the recipes that ship with the zoo."""
    raise NotImplementedError
