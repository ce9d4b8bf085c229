"""The sections of a recipe that are the same whatever is trained: how, how long, and what is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from zoo.config import Fraction, Positive, Rates

NotNegative = Annotated[int, Field(ge=0)]
Decay = Annotated[float, Field(gt=0.0, le=1.0)]
Above = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
AtLeastZero = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Protocol = Literal["one_target", "multi"]
Inputs = Literal["both", "text", "image"]
Direction = Literal["image_to_text", "text_to_image"]
Shown = Literal["pair", "image", "text"]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters that learn at a rate or with a decay of their own.

    Attributes:
        prefix: Of module names, as in ``freeze``: ``vision``, ``connector``; or ``objective``. The longest prefix wins; one that
            matches nothing is an error.
        lr: Peak; None: the optimizer's.
        weight_decay: None: the optimizer's.
        layer_decay: None: the optimizer's; 1: none.
    """

    prefix: str
    lr: AtLeastZero | None = None
    weight_decay: AtLeastZero | None = None
    layer_decay: Decay | None = None


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW, or SGD with momentum, and its learning-rate schedule.

    Attributes:
        name: ``adamw``; or ``sgd``, for comparisons with papers that use it, its decay then being part of the gradient.
        momentum: Of ``sgd``.
        lr: Peak, after warm-up.
        weight_decay: On every parameter, or with ``decay_vectors: false`` on matrices; of ``adamw`` decoupled from the gradient.
        decay_vectors: Whether biases, norms and what else has one dimension or none decay, too; in most papers they do not.
        layer_decay: The rate of a parameter is multiplied by this for each level that it stands below the end: L - i in block i of L, L + 1
            in embeddings, 0 behind the blocks (BEiT, 0.65 to 0.9). 1: all learn alike. A rate of ``groups`` is multiplied, too.
        betas: Of the two running means of ``adamw``.
        eps: Added to the root of the second one.
        max_grad_norm: Gradients longer than this are scaled down to it; 0: off.
        warmup: Below 1 a share of the steps, from 1 on a number of steps.
        warmup_shape: ``log`` rises with the logarithm of the step from 0, as DeepSpeed's WarmupDecayLR does.
        decay: From the peak to ``floor`` after the last step, or not at all. ``exponential``: by ``factor`` after each epoch, as BLIP does.
        floor: The least rate of a decay, as a share of the peak.
        factor: Of ``exponential``.
        groups: Exceptions by module prefix.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    momentum: Fraction = 0.9
    lr: AtLeastZero = 1e-4
    weight_decay: AtLeastZero = 0.01
    decay_vectors: bool = True
    layer_decay: Decay = 1.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Above = 1e-8
    max_grad_norm: AtLeastZero = 1.0
    warmup: AtLeastZero = 0.1
    warmup_shape: Literal["linear", "log"] = "linear"
    decay: Literal["linear", "cosine", "exponential", "constant"] = "linear"
    floor: Fraction = 0.0
    factor: Fraction = 0.9
    groups: tuple[Group, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Run:
    """How long and on what.

    Attributes:
        steps: Optimizer steps; decides where it is given. 0: the model stays as it was built, to be measured untrained.
        epochs: Passes over the pairs or labelled rows, where ``steps`` is None.
        batch_size: Pairs, or labelled rows, per process.
        shows: Of pictures with texts, what training pairs show, by weight: ``{image: 1}`` the picture alone, ``{text: 1}`` the text alone,
            ``{pair: 1, image: 1, text: 1}`` a third of them each, drawn by seed for all epochs; {}: both. Of training alone.
        accumulate: Batches per optimizer step; each has only its own rows as negatives.
        gradcache: Rows that pass the model at a time, where the loss is that of the whole batch all the same; 0: all at once.
        shard: Spread weights, gradients and optimizer state over the processes.
        calibrate: Split, ``val``, on which a fusion of logits is calibrated after the last step; None: not at all.
        precision: Of the forward pass. A resumed fp16 run starts with a fresh loss scale, so it is not exactly the uninterrupted one.
        gradient_checkpointing: Compute activations again in the backward pass, to save memory.
        workers: Processes that load data; 0: none beside the main one. The result does not depend on it.
        buckets: Batches of pairs of like length.
        log_every: Steps.
        log_gradients: Log the squared gradient norm of each module too, for `zoo.diagnose`.
        save_every: Steps; 0: only at the end, and when the run is asked to stop.
        save_minutes: Minutes since the last checkpoint; 0: off.
        keep: How many checkpoints stay.
        keep_rows: Processed rows that stay in memory, in each process that loads data, for small sets and ``workers: 0``: workers
            begin each epoch anew. The result does not depend on it.
        feature_cache: Folder that keeps what a frozen image encoder gives, for all runs; the result does not depend on it.
        device: ``auto``, ``cpu``, ``cuda``, ``mps``.
        threads: Of torch on the CPU; 0: as torch chooses.
    """

    steps: NotNegative | None = None
    epochs: Above | None = 1.0
    batch_size: Positive = 32
    shows: Mapping[Shown, Above] = field(default_factory=dict)
    accumulate: Positive = 1
    gradcache: NotNegative = 0
    shard: bool = False
    calibrate: str | None = None
    precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    workers: NotNegative = 0
    buckets: bool = True
    log_every: Positive = 10
    log_gradients: bool = False
    save_every: NotNegative = 0
    save_minutes: AtLeastZero = 0.0
    keep: Positive = 2
    keep_rows: NotNegative = 0
    feature_cache: Path | None = None
    device: str = "auto"
    threads: NotNegative = 0


@dataclass(frozen=True, kw_only=True)
class Headline:
    """The one number that a run is judged by: Recall@k under a protocol."""

    protocol: Protocol = "one_target"
    k: Positive = 10


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """What is measured of data that are pairs.

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


@dataclass(frozen=True, kw_only=True)
class Classify:
    """What is measured of data that are labelled rows: accuracy from every subset of the modalities, and what else tells of them.

    Attributes:
        split: Of the data set.
        missing: Shares of the cells (row, modality) that are hidden, or of rows by modality, ``{image: 0.5}``; each has an accuracy of its
            own, and every row keeps one modality at least: of two modalities half of the cells can be hidden and no more.
        bootstrap: Resamplings for the intervals; 0: no intervals.
        batch_size: Rows at once.
    """

    split: str = "test"
    missing: tuple[Rates, ...] = (0.25, 0.5, 0.75)
    bootstrap: NotNegative = 1000
    batch_size: Positive = 256


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How captions are written.

    Attributes:
        method: ``greedy``: the most probable word each time; ``beam``: the most probable caption that ``beams`` of them come upon;
            ``nucleus``: drawn.
        beams: Captions that are written side by side, 256 at most; the cost grows with them, and papers take 3 to 5.
        length_penalty: Captions of beams are compared by log-probability over length to this power: above 0 longer ones gain.
        nucleus: A word is drawn among the fewest that have this share of the probability.
        temperature: Of the draws.
        shortest: Ids at least, the one that ends a caption not counted.
        longest: Ids at most, likewise; a caption that reaches it is cut.
    """

    method: Literal["greedy", "beam", "nucleus"] = "beam"
    beams: Annotated[int, Field(ge=1, le=256)] = 3
    length_penalty: float = 1.0
    nucleus: Fraction = 0.9
    temperature: Above = 1.0
    shortest: NotNegative = 1
    longest: Positive = 20


@dataclass(frozen=True, kw_only=True)
class Zeroshot:
    """Pictures told apart by the names of classes, put into sentences.

    Attributes:
        templates: Sentences with ``{}`` for the name, ``a drawing of {}``; several are averaged. None: nothing is told apart.
        classes: What is told apart: every text of the split (``captions``), or the kinds of pictures (``groups``).
    """

    templates: tuple[str, ...] = ()
    classes: Literal["captions", "groups"] = "captions"


@dataclass(frozen=True, kw_only=True)
class Sought:
    """The one number that a run on captioned pictures is judged by: Recall@k of a direction, on the first of the splits."""

    direction: Direction = "image_to_text"
    k: Positive = 1


@dataclass(frozen=True, kw_only=True)
class Retrieve:
    """What is measured of data that are pictures and their texts: which texts a picture finds, and which pictures a text finds.

    Attributes:
        splits: Of the data set; the first has the headline number.
        k: Recall is reported at each: the share of the queries that find any of their partners within the first k.
        bootstrap: Resamplings for the intervals; 0: no intervals.
        batch_size: Pictures or texts encoded at once, and pairs matched at once.
        examples: Queries of each direction that the report shows with what they find.
        rerank: How many of the nearest are scored again by a model that matches; 0: none.
        captions: Pictures of each split that a model which writes captions describes; or ``all``.
        decode: How captions are written.
        prompt: What each caption goes on from, "a picture of"; it is part of the caption.
        zeroshot: Classes by their names.
        main: The headline number.
    """

    splits: tuple[str, ...] = ("test",)
    k: tuple[Positive, ...] = (1, 5, 10)
    bootstrap: NotNegative = 1000
    batch_size: Positive = 256
    examples: NotNegative = 6
    rerank: NotNegative = 0
    captions: NotNegative | Literal["all"] = 0
    decode: Decoding = Decoding()
    prompt: str = ""
    zeroshot: Zeroshot = Zeroshot()
    main: Sought = Sought()
