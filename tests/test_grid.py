"""Every combination that `zoo list --matrix` offers is a model: it is built, takes a step, is saved and loaded, and encodes.

A further model joins by registering; its sizes for this test stand in `TINY`.
"""

import math
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from typer.testing import CliRunner

import zoo
from zoo.abilities import Captioning, Matching, Tokenizing, Unmasking
from zoo.checkpoint import Position
from zoo.cli import app
from zoo.collate import Known, PairCollate, stack
from zoo.errors import ZooError
from zoo.hub import load, save
from zoo.matrix import Cell, matrix, table
from zoo.models._pictures import PictureTextModel
from zoo.recipe import Recipe
from zoo.registry import entry, make, names, register
from zoo.types import Batch, Classifying, Pair
from zoo.update import Step, Updater

WIDTH = 24  # of images and of text alike, so that the connector "identity" fits
TINY_IMAGE = {"name": "tiny_image", "dim": WIDTH, "heads": 2, "layers": 1, "image_size": 16}
TINY_TEXT = {"name": "tiny_text", "dim": 16, "heads": 2, "layers": 1, "rows": 100}
TINY: dict[str, dict[str, Any]] = {  # model: settings that make it small, and ``on``, the outputs that are contrasted
    "notellm2": {
        "backbone": {"name": "tiny_lm", "dim": WIDTH, "layers": 1, "heads": 2, "vocab_size": 200},
        "vision": TINY_IMAGE,
        "dim": 8,
        "language": "en",
    },
    "dual_encoder": {"text": TINY_TEXT, "vision": TINY_IMAGE, "dim": 8, "language": "en"},
    "meter": {"text": TINY_TEXT, "vision": TINY_IMAGE, "dim": 8, "layers": 1, "width": 16, "heads": 2, "language": "en"},
    "classifier": {"encoders": {"left": TINY_IMAGE, "right": TINY_IMAGE}, "classes": 3},
    "mla": {"encoders": {"left": TINY_IMAGE, "right": TINY_IMAGE}, "classes": 3},
    "albef": {"vision": TINY_IMAGE, "layers": 2, "dim": 8},
    "blip": {"vision": TINY_IMAGE, "layers": 1, "dim": 8},
    "clip": {"vision": TINY_IMAGE, "dim": 8},
    "coca": {"vision": TINY_IMAGE, "dim": 8, "queries": 3},
    "vlmo": {"layers": 1, "hidden": 16},
    "beit_3": {"layers": 3, "hidden": 16},
    "vqa": {"base": {"name": "blip", "vision": TINY_IMAGE, "layers": 1, "dim": 8}, "classes": 3},
    "visual_tokenizer": {"teacher": TINY_IMAGE, "image_size": 16, "codes": 6},
    "nlvr2": {"base": {"name": "blip", "vision": TINY_IMAGE, "layers": 1, "dim": 8}},
}
TINY_CONNECTOR: dict[str, dict[str, Any]] = {  # those whose own defaults are large
    "attention_pool": {"num_queries": 2},
    "qformer": {"num_queries": 2, "layers": 2, "hidden": WIDTH, "heads": 2, "ffn": 32},
}
CELLS = matrix()
FIT = {(c.model, c.fusion) for c in CELLS if c.refused is None}


def filling(model: str, joint: str) -> list[str]:
    """The fusions that fit ``model`` and fill this joint of it themselves."""
    return [n for n in names("fusion") if (model, n) in FIT and entry("fusion", n).joints.get(joint, "another") is None]


PAIRS = [(m, [a, c]) for m in names("model") for a in filling(m, "arrange") for c in filling(m, "combine")]
SCHEDULED = [
    (m, [s, c]) for m in names("model") if len(filling(m, "schedule")) > 1 for s in filling(m, "schedule") for c in filling(m, "combine")
]


def tiny(model: str, fusion: Any, connector: str | None) -> nn.Module:
    if model not in TINY:
        raise AssertionError(f"model {model!r} has no settings for this test: add it to TINY in tests/test_grid.py, as small as it goes")
    bridge = {} if connector is None else {"connector": {"name": connector, **TINY_CONNECTOR.get(connector, {})}}
    return zoo.build(model, **{**TINY[model], **bridge, "fusion": fusion})


@cache
def notes() -> Any:
    return make("data", {"name": "planted_notes", "notes": 400, "users": 600, "image_size": 16}, None)


@cache
def some_pairs() -> tuple[Pair, ...]:
    """Eight training pairs; among their rows are full ones, some with a short text, without an image and without a text."""
    rows, pairs = notes().notes, notes().pairs("train")
    lacking = [i for i, (q, d) in enumerate(pairs) if any(not {"image", "title"} <= rows[int(n)].keys() for n in (q, d))]
    chosen = [*dict.fromkeys([*lacking[:4], *range(8)])][:8]
    return tuple(Pair(dict(rows[int(q)]), dict(rows[int(d)])) for q, d in pairs[chosen])


@cache
def pictures() -> tuple[Any, ...]:
    return tuple([row["image"] for row in notes().notes if "image" in row][:6])


def classifies(model: nn.Module) -> bool:
    return isinstance(model, Classifying)


def describes(model: nn.Module) -> bool:
    return isinstance(model, PictureTextModel)


def tokenizes(model: nn.Module) -> bool:
    return isinstance(model, Tokenizing)


def some_rows(model: nn.Module) -> list[dict[str, Any]]:
    """Raw rows that the model sees, some without one of their modalities."""
    if model.processor.sees({"left": pictures()[0]}):
        return [{"left": pictures()[0]}, {"right": pictures()[1]}, *({"left": p, "right": q} for p, q in pairwise(pictures()))]
    if tokenizes(model):
        return [{"image": picture} for picture in pictures()]
    if classifies(model) or describes(model):
        both = [{"text": text, "image": picture} for text, picture in zip(("a red shoe", "soft", "b"), pictures(), strict=False)]
        if "image_2" in {*model.processor.keys()}:
            both = [{**row, "image_2": picture} for row, picture in zip(both, pictures()[3:], strict=True)] + both
        return [*both, {"text": "a blue bag"}, {"image": pictures()[3]}]
    rows = [{"title": "a red shoe", "content": "soft"}, {**some_pairs()[0].query, "title": "b"}]
    return rows + [row for row in [{"image": pictures()[0]}] if model.processor.sees(row)]


def training(model: nn.Module) -> tuple[nn.Module, Batch]:
    """An objective that fits the model, and a batch."""
    if classifies(model):
        rows = some_rows(model)
        targets = torch.arange(len(rows)) % model.classes
        return make("objective", "cross_entropy"), Batch(stack([model.processor(r) for r in rows]), targets=targets)
    if describes(model):
        rows = some_rows(model)
        fit = {"itm": Matching, "mlm": Unmasking, "lm": Captioning}
        terms = [
            "itc",
            *({"name": name, **({"rate": 0.9} if name == "mlm" else {})} for name, does in fit.items() if isinstance(model, does)),
        ]
        objective = make("objective", {"name": "together", "of": terms, "momentum": 0.9})
        objective.bind(model)
        return objective, Batch(stack([model.processor(r) for r in rows]), ids=torch.arange(len(rows)))
    if tokenizes(model):
        return make("objective", "vq_kd"), Batch(stack([model.processor(row) for row in [*some_rows(model), {"text": "soft"}]]))
    objective = make("objective", "pair_infonce")
    objective.bind(model)
    known = Known.of(torch.from_numpy(notes().pairs("train")), len(notes().notes))
    return objective, PairCollate(model.processor, known)(some_pairs())


def one_step(model: nn.Module) -> None:
    """Collate, and what the training loop makes of one batch; everything that must stay finite is checked."""
    objective, batch = training(model.train())
    step = Step(model, objective)
    parameters = [p for p in step.parameters() if p.requires_grad]
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare_optimizer(torch.optim.AdamW(parameters, lr=1e-3))
    before = [p.detach().clone() for p in parameters]
    said = Updater(accelerator, step, step, optimizer, Recipe(model={}, data={}, objective={}))(iter([batch]), Position())
    assert [name for name, value in said.items() if not math.isfinite(value)] == []
    assert all(value > 0 for name, value in said.items() if name.endswith("loss"))
    assert all(bool(p.isfinite().all()) for p in parameters)
    moved = sum(not torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
    assert moved > 0.9 * len(parameters)


def asked(model: nn.Module) -> np.ndarray:
    """Vectors of length 1, or chances that sum to 1, or visual tokens, of some rows."""
    rows = some_rows(model)
    if tokenizes(model):
        told = model.tell(rows)
        assert told.shape == (len(rows), model.grid[0] * model.grid[1])
        assert told.max() < model.codes
        return told
    if classifies(model):
        chances = model.classify(rows)
        assert chances.shape == (len(rows), model.classes)
        np.testing.assert_allclose(chances.sum(1), 1, rtol=1e-5)
        return chances
    if describes(model):
        looked, read = ([r for r in rows if key in r] for key in ("image", "text"))
        vectors = np.concatenate([model.encode(looked, output="image"), model.encode(read, output="text")])
    else:
        vectors = model.encode(rows)
        assert vectors.shape == (len(rows), model.dim)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    return vectors


def lives(model: nn.Module, folder: Any) -> None:
    """One step, a round trip to the disk, and rows with a missing modality."""
    one_step(model)
    model.trained = True
    vectors = asked(model)
    again = load(save(model, folder))
    kept = again.state_dict()
    assert kept.keys() == model.state_dict().keys()
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())
    np.testing.assert_array_equal(asked(again), vectors)


def test_the_grid_is_not_empty():
    assert CELLS
    assert PAIRS
    assert {m for m, _ in SCHEDULED} == {"classifier", "mla"}
    assert {c.model for c in CELLS} == set(names("model"))
    assert {c.fusion for c in CELLS} == set(names("fusion"))
    assert {c.connector for c in CELLS} - {None} == set(names("connector"))
    rows = [row for pair in some_pairs() for row in pair]
    assert any("image" not in row for row in rows)
    assert any("title" not in row for row in rows)


@pytest.mark.parametrize("cell", CELLS, ids=lambda c: f"{c.model}-{c.fusion}-{c.connector}")
def test_every_cell_is_a_model_or_a_sentence(cell, tmp_path):
    if cell.refused is None:
        lives(tiny(cell.model, cell.fusion, cell.connector), tmp_path)
        return
    if f"and {cell.fusion!r} combines features" in cell.refused:  # the model's own schedule reads logits
        assert cell.refused.startswith(f"{cell.model}: the schedule")
    else:
        assert f"fusion {cell.fusion!r} acts at the joint" in cell.refused or f"fusion {cell.fusion!r} needs of a model: " in cell.refused
        assert f"which model {cell.model!r} does not have" in cell.refused or f"which {cell.model!r} does not have" in cell.refused
    with pytest.raises(ZooError) as e:
        tiny(cell.model, cell.fusion, cell.connector)
    assert str(e.value) == cell.refused


@pytest.mark.parametrize("model, fusion", PAIRS, ids=lambda v: v if isinstance(v, str) else "+".join(v))
def test_every_arrange_with_every_combine(model, fusion, tmp_path):
    built = tiny(model, fusion, "linear")
    assert built.combine is not None
    lives(built, tmp_path)


@pytest.mark.parametrize("model, fusion", SCHEDULED, ids=lambda v: v if isinstance(v, str) else "+".join(v))
def test_every_schedule_with_every_combine(model, fusion):
    """One that needs logits of each modality says so where features are combined; every other pair trains."""
    needs, gets = (entry("fusion", name).needs for name in fusion)
    if "logits" in needs and "logits" not in gets:
        with pytest.raises(
            ZooError, match=f"the schedule '{fusion[0]}' needs logits of each modality, and '{fusion[1]}' combines features"
        ):
            tiny(model, fusion, None)
    else:
        one_step(tiny(model, fusion, None))


@pytest.mark.parametrize("connector", names("connector"))
def test_unequal_widths_need_more_than_identity(connector):
    settings = {**TINY["notellm2"], "vision": {**TINY["notellm2"]["vision"], "dim": 16}}
    spec = {"name": connector, **TINY_CONNECTOR.get(connector, {})}
    if connector == "identity":
        with pytest.raises(ZooError, match=f"connector 'identity' cannot turn width 16 into {WIDTH}: use linear"):
            zoo.build("notellm2", **{**settings, "connector": spec})
    else:
        assert isinstance(zoo.build("notellm2", **{**settings, "connector": spec}), nn.Module)


def test_a_model_without_settings_says_where_to_add_them():
    with pytest.raises(AssertionError, match=r"model 'newcomer' has no settings for this test: add it to TINY in tests/test_grid.py"):
        tiny("newcomer", "early", None)


class TestMatrix:
    @pytest.fixture(autouse=True)
    def _strangers(self, own_registry):
        @register("fusion", "trunk_of_a_test", joints=("trunk",))
        def trunk():
            """An expert for each modality."""

        @register("model", "model_of_a_test", joints={"trunk": "trunk_of_a_test"})
        def model(*, width: int = 3):
            """A trunk and nothing else."""

    def test_cells(self):
        cells = matrix()
        fits = {(c.model, c.fusion): c.refused is None for c in cells}
        assert fits["notellm2", "gated_late"]
        assert not fits["notellm2", "trunk_of_a_test"]
        assert fits["model_of_a_test", "trunk_of_a_test"]
        assert not fits["model_of_a_test", "gated_late"]
        assert {c.connector for c in cells if c.model == "model_of_a_test"} == {None}

    def test_printed(self):
        result = CliRunner().invoke(app, ["list", "--matrix"])
        assert result.exit_code == 0, result.output
        lines = result.output.splitlines()
        head = lines[0].split()
        assert head == ["fusion", *names("model")]
        rows = {line.split()[0]: dict(zip(head, line.split(), strict=True)) for line in lines[1 : 1 + len(names("fusion"))]}
        assert (rows["trunk_of_a_test"]["model_of_a_test"], rows["trunk_of_a_test"]["notellm2"]) == ("trunk", "-")
        assert (rows["gated_late"]["model_of_a_test"], rows["gated_late"]["notellm2"]) == ("-", "combine")
        assert (rows["micl"]["notellm2"], rows["micl"]["meter"]) == ("arrange", "-")
        assert "connectors of notellm2: " + ", ".join(names("connector")) in lines
        assert "connectors of model_of_a_test: none" in lines
        sentence = (
            "fusion 'trunk_of_a_test' acts at the joint 'trunk', which model 'notellm2' does not have (it has: arrange, combine, schedule)"
        )
        assert sum(line.startswith(sentence) for line in lines[1 + len(rows) :]) == 1

    def test_nothing_refused_prints_no_sentence(self):
        assert table([Cell("m", "gated_late", None, None)]).splitlines() == [
            "fusion      m",
            "gated_late  combine",
            "connectors of m: none",
        ]
