"""Lists of what alone is trained: nothing else moves by a bit, and what cannot be meant is said."""

import hashlib

import pytest
import torch
from accelerate.utils import set_seed
from torch import nn

import zoo
from tests.captioned_shapes import shapes
from zoo.errors import ZooError
from zoo.freeze import freeze, freeze_others
from zoo.optimizer import make_optimizer
from zoo.recipe import load_recipe
from zoo.registry import register
from zoo.sections import Optimizer
from zoo.train import make_step, train
from zoo.types import CaptionedData

ALBEF_TEXT = ["embed", "trunk.blocks.*.norm2.text", "trunk.blocks.*.ffn.text", "head"]
TOGETHER = {"name": "together", "of": [{"name": "itc", "queue": 0, "alpha": 0.4}, "itm", {"name": "mlm", "alpha": 0.4}], "momentum": 0.9}
ALBEF = {
    "model": {"name": "albef", "size": "tiny", "fusion": "mome"},
    "data": "shapes",
    "objective": TOGETHER,
    "optimizer": {"lr": 2e-3, "warmup": 0},
    "run": {"steps": 3, "batch_size": 12, "device": "cpu"},
}


@pytest.fixture(autouse=True)
def _shapes(own_registry):
    @register("data", "shapes")
    def made(root) -> CaptionedData:
        """Of this test."""
        return shapes()


def hashes(model: nn.Module) -> dict[str, str]:
    return {name: hashlib.sha256(p.detach().contiguous().numpy().tobytes()).hexdigest() for name, p in model.named_parameters()}


def moved(tmp_path, **settings) -> tuple[set[str], set[str]]:
    """The parameters of a model, and those that a few steps of real training move."""
    recipe = load_recipe(ALBEF | settings | {"out": str(tmp_path / "run")})
    set_seed(recipe.seed)
    before, after = hashes(make_step(recipe).model), hashes(train(recipe))
    assert before.keys() == after.keys()
    return {*before}, {name for name in before if before[name] != after[name]}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_what_is_named_moves(tmp_path, checkpointing):
    names, changed = moved(tmp_path, train_only=ALBEF_TEXT, run=ALBEF["run"] | {"gradient_checkpointing": checkpointing})
    first = 2  # from here on blocks read pictures, and texts go through the expert of pairs
    listed = {n for n in names if n.startswith(("embed.", "head.")) or ".norm2.text." in n or ".ffn.text." in n}
    assert changed <= listed
    assert {n for n in listed if n.startswith("trunk.")} == {n for n in changed if n.startswith("trunk.")}
    assert {int(n.split(".")[2]) for n in changed if n.startswith("trunk.")} == {*range(first)}
    assert any(n.startswith("head.") for n in changed)
    assert "embed.words.weight" in changed


def test_what_no_objective_reads_is_nothing_to_learn(tmp_path):
    recipe = load_recipe(ALBEF | {"objective": "mlm", "train_only": ["text_projection"], "out": str(tmp_path / "run")})
    says = "objective: what is trained is text_projection, and mlm reads none of it, so there is nothing to learn: .*, of vision, embed, "
    with pytest.raises(ZooError, match=says):
        train(recipe)


VLMO = {
    "model": {"name": "vlmo", "size": "tiny"},
    "objective": {"name": "mdm", "text": 0.5, "image": 0, "pair_text": 0, "pair_image": 0},
    "run": ALBEF["run"] | {"shows": {"text": 1}},
}


def test_the_text_stage_of_vlmo(tmp_path):
    """What the authors' run.py trains moves, all of it; attention, LayerScale and the experts of pictures and pairs stand, bit for bit."""
    names, changed = moved(tmp_path, train_only=load_recipe("vlmo/stage_text").train_only, **VLMO)
    begin, inside = ("embed.", "kinds.", "positions.", "head.", "trunk.norm."), (".norm2.text.", ".ffn.text.")
    assert changed == {n for n in names if n.startswith(begin) or any(part in n for part in inside)}
    assert {int(n.split(".")[2]) for n in changed if ".ffn." in n} == {0, 1, 2, 3}
    for part in (".qkv.", ".out.", ".norm1.", ".scale1", ".scale2", ".norm2.image.", ".ffn.image.", ".ffn.vl.", "vision.", "pooler."):
        assert any(part in n for n in names - changed), part


def test_without_the_list_the_attention_of_vlmo_moves(tmp_path):
    _, changed = moved(tmp_path, **VLMO)
    parts = (".qkv.", ".scale2", ".ffn.text.", ".ffn.image.")
    assert [any(part in name for name in changed) for part in parts] == [True, True, True, False]


def test_without_a_list_all_of_it_moves(tmp_path):
    names, changed = moved(tmp_path)
    assert {n.split(".")[0] for n in changed} == {n.split(".")[0] for n in names}
    assert any(".qkv." in n for n in changed)


def test_a_bare_parameter_and_a_module_around_others(tmp_path):
    names, changed = moved(tmp_path, train_only=["vision.model.cls_token", "trunk.blocks.[01]"])
    assert changed == {n for n in names if n == "vision.model.cls_token" or n.startswith(("trunk.blocks.0.", "trunk.blocks.1."))}


class Halves(nn.Module):
    """Two parts that drop out, of which the second one's weight is the first one's, too."""

    def __init__(self):
        super().__init__()
        self.one = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
        self.two = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), "b": nn.Linear(4, 4)})
        self.scale = nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.two["b"](self.two["a"](self.one(x)))) * self.scale


def needing(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}


@pytest.mark.parametrize(
    "patterns, left",
    [
        (["one"], {"one.0.weight", "one.0.bias"}),
        (["two.*.bias"], {"two.b.bias"}),
        (["*.*.bias"], {"one.0.bias", "two.b.bias"}),
        (["scale", "two.a"], {"scale", "two.a.0.weight", "two.a.0.bias"}),
        (["two.[!b]"], {"two.a.0.weight", "two.a.0.bias"}),
        (["*"], {"one.0.weight", "one.0.bias", "two.a.0.weight", "two.a.0.bias", "two.b.weight", "two.b.bias", "scale"}),
    ],
)
def test_a_star_is_one_step_of_a_name(patterns, left):
    module = Halves()
    freeze_others(module, patterns)
    assert needing(module) == left


def test_tied_weights_go_by_all_of_their_names():
    module = Halves()
    module.two["b"].weight = module.one[0].weight
    freeze_others(module, ["two.b.weight"])
    assert needing(module) == {"one.0.weight", "two.b.weight"}


def test_dropout_acts_where_something_learns():
    """Of a module that learns nothing it is off, as with ``freeze``; what stands beside something that learns stays on."""
    module = Halves()
    freeze_others(module, ["two.a.0.bias"])
    module.train()
    module(torch.ones(1, 4))
    assert not module.one[1].training
    assert module.two["a"][1].training
    assert module.dropout.training


def test_the_optimizer_gets_nothing_else():
    model = zoo.build("albef", fusion="mome")
    freeze_others(model, ALBEF_TEXT)
    optimizer = make_optimizer(nn.ModuleDict({"model": model}), Optimizer(layer_decay=0.5))
    given = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert given == {id(p) for p in model.parameters() if p.requires_grad}
    assert 0 < len(given) < len([*model.parameters()])


@pytest.mark.parametrize(
    "patterns, said",
    [
        (
            ["embed", "trunk.blocks.*.ffn.txt"],
            r"no module or parameter named 'trunk.blocks.\*.ffn.txt'; did you mean 'trunk.blocks.\*.ffn.text'\?",
        ),
        (["visoin"], "'visoin'; did you mean 'vision'"),
        (["trunk.blocks.9"], r"no module or parameter named 'trunk.blocks.9'"),
        (["trunk.*.ffn"], r"no module or parameter named 'trunk.\*.ffn'"),
        ([""], "no module or parameter named ''"),
    ],
)
def test_what_names_nothing(patterns, said):
    with pytest.raises(ZooError, match=f"train_only: .*{said}"):
        freeze_others(zoo.build("albef", fusion="mome"), patterns)


def test_what_the_model_itself_keeps_frozen():
    model = zoo.build("albef")
    freeze(model.vision)
    with pytest.raises(ZooError, match=r"train_only: 'vision\.model\.blocks' is never trained, as the model's own settings say"):
        freeze_others(model, ["embed", "vision.model.blocks"])


@pytest.mark.parametrize("other", [{"freeze": ["vision"]}, {"adapters": [{"on": "vision"}]}])
def test_with_another_word_on_it(other):
    (key,) = other
    with pytest.raises(ZooError, match=f"train_only: it says all that is trained, and {key} says it in another way: write one"):
        load_recipe(ALBEF | other | {"train_only": ["embed"]})
