"""Learning rates that fall towards the input, and weights that do not shrink: against timm's groups, and level by level."""

import re

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn
from transformers import BertConfig, BertModel, CLIPVisionConfig, CLIPVisionModel

import zoo
from zoo.depths import levels_below
from zoo.errors import ZooError
from zoo.models import vlmo
from zoo.models._beit3_keys import entries
from zoo.optimizer import freeze_all, make_optimizer
from zoo.recipe import load_recipe
from zoo.sections import Group, Optimizer

DECAY = 0.65


def found(model: nn.Module, key: str = "peak", **settings) -> dict[str, float]:
    """{name of a parameter of ``model``: what its group says}, at a peak of 1."""
    step = nn.ModuleDict({"model": model})
    optimizer = make_optimizer(step, Optimizer(lr=1.0, **settings))
    of = {id(p): group[key] for group in optimizer.param_groups for p in group["params"]}
    return {name: of[id(p)] for name, p in model.named_parameters() if id(p) in of}


def levels(model: nn.Module) -> dict[str, int]:
    return levels_below([name for name, _ in model.named_parameters()])


@pytest.mark.parametrize("arch", ["test_vit", "test_vit2", "beit_base_patch16_224"])
def test_rates_and_decays_are_timms(arch):
    """timm gives the last norm the rate of the last block, BEiT, which it follows, the full one: as we do."""
    settings = {"depth": 3, "embed_dim": 12, "num_heads": 2} if arch.startswith("beit") else {}
    vit = timm.create_model(arch, num_classes=5, **settings)
    theirs = {id(p): group for group in param_groups_layer_decay(vit, 0.05, layer_decay=DECAY) for p in group["params"]}
    scales = {name: theirs[id(p)]["lr_scale"] for name, p in vit.named_parameters()}
    norms = {name for name in scales if name.startswith("norm.")}
    ours = found(vit, layer_decay=DECAY, weight_decay=0.05, decay_vectors=False)
    assert {name: ours[name] for name in scales.keys() - norms} == pytest.approx({name: scales[name] for name in scales.keys() - norms})
    assert all(ours[name] == 1.0 and scales[name] == pytest.approx(DECAY) for name in norms)
    assert norms or arch != "test_vit"  # the others have one behind their mean, which is a head to both
    assert len({*ours.values()}) == len(vit.blocks) + 2
    shrink = {name: theirs[id(p)]["weight_decay"] for name, p in vit.named_parameters()}
    assert found(vit, "weight_decay", layer_decay=DECAY, weight_decay=0.05, decay_vectors=False) == shrink
    assert {*shrink.values()} == {0.0, 0.05}


def test_transformers_names():
    sizes = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 8}
    bert = levels(BertModel(BertConfig(vocab_size=5, **sizes)))
    clip = levels(CLIPVisionModel(CLIPVisionConfig(image_size=8, patch_size=4, **sizes)))
    for name, level in bert.items():
        expected = 4 if name.startswith("embeddings.") else 0 if name.startswith("pooler.") else 3 - int(name.split(".")[2])
        assert level == expected, name
    for name, level in clip.items():
        steps = name.removeprefix("vision_model.").split(".")
        expected = {"embeddings": 4, "pre_layrnorm": 4, "post_layernorm": 0}.get(steps[0])
        assert level == (3 - int(steps[2]) if expected is None else expected), name
    assert {*bert.values()} == {*clip.values()} == {0, 1, 2, 3, 4}


def test_each_stack_counts_on_its_own():
    model = zoo.build("albef", layers=3)
    blocks = len(model.vision.model.blocks)
    assert blocks != 3
    at = levels(model)
    expected = {
        "vision.model.cls_token": blocks + 1,
        "vision.model.patch_embed.proj.weight": blocks + 1,
        "vision.model.blocks.0.norm1.weight": blocks,
        f"vision.model.blocks.{blocks - 1}.norm1.weight": 1,
        "vision.model.norm.weight": 0,
        "embed.words.weight": 4,
        "embed.norm.bias": 4,
        "trunk.blocks.0.qkv.weight": 3,
        "trunk.blocks.2.ffn.fc1.bias": 1,
        "head.dense.weight": 0,
        "image_projection.weight": 0,
        "matches.bias": 0,
    }
    assert {name: at[name] for name in expected} == expected


def test_beit_3_is_graded_as_its_authors_do():
    """By their names: embeddings are level 0, layer i is i + 1, and whatever else comes after the last."""
    model = zoo.build("beit_3", layers=3, codes=5)
    names = [name for name, _ in model.named_parameters()]
    found = levels_below(names)
    theirs = {entry.ours: name for entry in entries(names, r"trunk\.blocks") for (name, *_) in entry.theirs}
    assert theirs.keys() >= {*names}
    for ours in names:
        layer = re.search(r"layers\.(\d+)\.", theirs[ours])
        embeds = re.search(r"embed|mask_token|cls_token", theirs[ours])
        assert found[ours] == 4 - (int(layer[1]) + 1 if layer else 0 if embeds else 4), ours
    assert {*found.values()} == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("absolute", [False, True])
def test_vlmos_head_of_words_is_no_embedding(absolute, monkeypatch):
    if absolute:
        monkeypatch.setitem(vlmo.SIZES, "tiny", vlmo.SIZES["tiny"]._replace(relative=None))
    found = levels(zoo.build("vlmo", layers=3, codes=5))
    first = {name for name, level in found.items() if level == 4}
    tables = {"vision.places.weight", "embed.places.weight"} if absolute else set()
    own = {"vision.cls", "vision.mask", "vision.embed.proj.weight", "vision.embed.proj.bias", "kinds.weight"}
    assert first == own | tables | {f"embed.{name}" for name in ("words.weight", "kinds.weight", "norm.weight", "norm.bias")}
    blocks = {name: level for name, level in found.items() if name.startswith("trunk.blocks.")}
    assert all(level == 3 - int(name.split(".")[2]) for name, level in blocks.items())
    rest = found.keys() - first - blocks.keys()
    assert rest >= {"head.words.weight", "head.words.bias", "head.dense.weight", "codes_head.weight", "pooler.weight"}
    assert not any(found[name] for name in rest)


def test_the_convolutions_of_a_resnet_are_no_embeddings():
    names = [name for name, _ in timm.create_model("test_resnet").named_parameters()]
    inside = [name for name in names if re.match(r"layer\d\.\d\.conv1\.", name)]
    assert len(inside) == 4
    found = levels_below([*(f"vision.model.{name}" for name in names), "trunk.blocks.0.out.weight"])
    assert not any(found[f"vision.model.{name}"] for name in inside)
    assert levels_below(["conv1.weight", "resblocks.0.weight"])["conv1.weight"] == 2  # as CLIP's transformer begins


def test_what_is_frozen_still_counts_as_a_block():
    model = zoo.build("albef")
    before = found(model, layer_decay=DECAY)
    freeze_all(model, ["trunk.blocks.3", "vision"])
    after = found(model, layer_decay=DECAY)
    assert len(after) < len(before)
    assert after == {name: before[name] for name in after}


def test_a_stage_of_a_pyramid_is_one_level():
    names = ["stem.0.weight", "stages.0.blocks.0.weight", "stages.0.blocks.1.weight", "stages.1.downsample.weight", "head.fc.weight"]
    assert [*levels_below(names).values()] == [3, 2, 2, 1, 0]


def test_embeddings_are_of_the_stack_that_comes_next():
    names = [
        "vision.blocks.0.weight",
        "embed.words.weight",
        "embed.places.weight",
        "kinds.weight",
        "text.blocks.0.weight",
        "text.blocks.1.weight",
    ]
    assert [*levels_below(names).values()] == [1, 3, 3, 3, 2, 1]


def test_a_table_that_all_blocks_share_learns_at_the_full_rate():
    assert levels_below(["positions.table", "embed.words.weight", "trunk.blocks.0.out.weight"])["positions.table"] == 0


def test_groups_have_rates_and_decays_of_their_own():
    model = zoo.build("albef")
    depth = len(model.vision.model.blocks)
    groups = (
        Group(prefix="vision", lr=0.5, layer_decay=0.9),
        Group(prefix="embed", layer_decay=1.0),
        Group(prefix="trunk.blocks.3", lr=2.0),
        Group(prefix="matches", lr=20.0),
    )
    rates = found(model, layer_decay=DECAY, groups=groups)
    assert rates["vision.model.pos_embed"] == pytest.approx(0.5 * 0.9 ** (depth + 1))
    assert rates["vision.model.blocks.0.mlp.fc1.weight"] == pytest.approx(0.5 * 0.9**depth)
    assert rates["embed.words.weight"] == 1.0
    assert rates["trunk.blocks.0.out.weight"] == pytest.approx(DECAY**4)
    assert rates["trunk.blocks.3.out.weight"] == pytest.approx(2.0 * DECAY)
    assert rates["matches.weight"] == 20.0


def test_vectors_shrink_unless_told_not_to():
    model = zoo.build("albef")
    assert {*found(model, "weight_decay", weight_decay=0.1).values()} == {0.1}
    groups = (Group(prefix="vision", weight_decay=0.2),)
    spared = found(model, "weight_decay", weight_decay=0.1, decay_vectors=False, groups=groups)
    for name, parameter in model.named_parameters():
        assert spared[name] == (0.0 if parameter.ndim < 2 else 0.2 if name.startswith("vision.") else 0.1), name


def test_a_vector_that_does_not_shrink_stands_still_without_a_gradient():
    module = nn.ModuleDict({"model": nn.Linear(3, 3)})
    nn.init.ones_(module["model"].bias)
    optimizer = make_optimizer(module, Optimizer(lr=0.1, weight_decay=0.5, decay_vectors=False))
    before = module["model"].weight.detach().clone()
    (0.0 * sum(p.sum() for p in module.parameters())).backward()
    optimizer.step()
    torch.testing.assert_close(module["model"].weight.detach(), before * 0.95)
    assert torch.equal(module["model"].bias.detach(), torch.ones(3))


@pytest.mark.parametrize("settings", [{}, {"layer_decay": DECAY}])
def test_sgd_takes_them_too(settings):
    model = zoo.build("albef")
    rates = found(model, name="sgd", **settings)
    assert (len({*rates.values()}) > 1) == bool(settings)


def test_without_numbered_blocks():
    model = nn.ModuleDict({"stem": nn.Linear(2, 2), "late": nn.Linear(2, 2)})
    with pytest.raises(ZooError, match=r"optimizer.layer_decay: nothing that is trained there stands in numbered blocks .* leave it out"):
        found(model, layer_decay=DECAY)
    assert {*found(model, layer_decay=1.0).values()} == {1.0}


def test_a_group_without_numbered_blocks():
    groups = (Group(prefix="matches", layer_decay=0.5),)
    with pytest.raises(ZooError, match=r"optimizer.groups: layer_decay of 'matches': nothing that is trained there"):
        found(zoo.build("albef"), groups=groups)


@pytest.mark.parametrize("decay, said", [(0.0, "greater than 0"), (1.01, "less than or equal to 1"), (-0.5, "greater than 0")])
def test_decays_that_are_none(decay, said):
    with pytest.raises(ZooError, match=rf"optimizer.layer_decay: .*{said}"):
        load_recipe("albef/emoji_en", f"optimizer.layer_decay={decay}")
    with pytest.raises(ZooError, match=rf"optimizer.groups.0.layer_decay: .*{said}"):
        load_recipe("albef/emoji_en", f"optimizer.groups=[{{prefix: vision, layer_decay: {decay}}}]")
