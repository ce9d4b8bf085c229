"""Low-rank adapters: they start as nothing, learn as the papers say, leave the weights beside them alone, and go into plain weights."""

import copy
import json
import os
import socket
import subprocess
import sys

import open_clip
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import zoo
from zoo.adapters import Adapter, count
from zoo.errors import ZooError
from zoo.files import write_text
from zoo.freeze import freeze
from zoo.lora import adapt, merge, merged_state
from zoo.optimizer import make_optimizer
from zoo.recipe import dump, load_recipe
from zoo.registry import build, make
from zoo.run import train_and_measure
from zoo.train import make_step, train
from zoo.trunk import Shape, Trunk
from zoo.types import ModalityInputs
from zoo.update import Updater

TINY = {
    "name": "notellm2",
    "backbone": {"name": "tiny_lm", "dim": 32, "layers": 2, "heads": 2, "vocab_size": 1024},
    "vision": {"name": "tiny_image", "dim": 32, "layers": 1, "heads": 2, "image_size": 16},
    "connector": "linear",
    "dim": 16,
    "language": "en",
    "content_length": 24,
}
DATA = {"name": "planted_notes", "notes": 160, "users": 1000, "image_size": 16, "mine": {"top": 1}}
LORA, DORA = {"on": "backbone", "rank": 4, "alpha": 8}, {"on": "backbone", "rank": 4, "alpha": 8, "kind": "dora"}
EYES = {"on": "vision", "rank": 2, "alpha": 8}
BOTH = [LORA, EYES]


class Holder(nn.Module):
    """A model that is one module by the name of ``it``."""

    def __init__(self, it):
        super().__init__()
        self.it = it

    def forward(self, x):
        return self.it(x)


class Tower(nn.Module):
    """An encoder that takes pixels and gives tokens alone."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, pixels):
        return self.encoder(ModalityInputs(pixels)).tokens


def tower(name):
    if name == "open_clip":
        return open_clip.transformer.VisionTransformer(16, 8, 32, 2, 2, 4.0, output_dim=8), torch.randn(2, 3, 16, 16)
    if name == "timm":
        return Tower(make("encoder", "timm:test_vit", image_size=32)), torch.randn(2, 3, 32, 32)
    return Tower(make("encoder", "tiny_image", dim=32, heads=2, image_size=16)), torch.randn(2, 3, 16, 16)


TOWERS = ["open_clip", "timm", "tiny_image"]


def adapted(it, **settings):
    model = Holder(it)
    adapt(model, [Adapter(on="it", **{"rank": 4, "alpha": 8.0, **settings})])
    return model


@torch.no_grad()
def stir(model):
    """Adapters as training would leave them: none is 0."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.2)
        if "lora_magnitude" in name:
            parameter.mul_(1.0 + 0.3 * torch.rand_like(parameter))
    return model


def pieces(layer):
    """A, B and the magnitude of a layer."""
    magnitude = dict(layer.lora_magnitude_vector).get("default")
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight, None if magnitude is None else magnitude.weight


# Against the papers' formulas


def test_lora_is_its_formula():
    torch.manual_seed(1)
    plain, x = nn.Sequential(nn.Linear(6, 5)).double(), torch.randn(7, 6).double()
    model = stir(adapted(copy.deepcopy(plain), rank=2, alpha=3.0)).double()
    down, up, _ = pieces(model.it[0])
    weight = plain[0].weight.detach() + up @ down * (3.0 / 2)
    expected = F.linear(x, weight, plain[0].bias.detach())
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-13)
    for ours, wanted in zip(
        torch.autograd.grad(model(x).square().sum(), (down, up)), torch.autograd.grad(expected.square().sum(), (down, up)), strict=True
    ):
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merged_state(model, model.state_dict())["it.0.weight"], weight.detach(), rtol=0, atol=1e-15)


def test_dora_is_its_formula():
    """The length of each row is learned apart from its direction, and the norm counts as a constant (Liu et al., section 4.3)."""
    plain, x = nn.Sequential(nn.Linear(6, 5)).double(), torch.randn(7, 6).double()
    model = stir(adapted(copy.deepcopy(plain), rank=2, alpha=3.0, kind="dora").double())
    down, up, magnitude = pieces(model.it[0])
    direction = plain[0].weight.detach() + up @ down * (3.0 / 2)
    weight = magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True).detach()
    expected = F.linear(x, weight, plain[0].bias.detach())
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-13)
    learned = (down, up, magnitude)
    for ours, wanted in zip(
        torch.autograd.grad(model(x).square().sum(), learned), torch.autograd.grad(expected.square().sum(), learned), strict=True
    ):
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merged_state(model, model.state_dict())["it.0.weight"], weight.detach(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_attention_is_its_formula(mode):
    """In float64 against a plain nn.MultiheadAttention that holds the sums; eval takes torch's fast path."""
    plain, x = nn.MultiheadAttention(8, 2, batch_first=True).double(), torch.randn(2, 3, 8).double()
    wrapped = nn.ModuleDict({"attn": copy.deepcopy(plain)})
    model = stir(adapted(wrapped, rank=2, alpha=3.0)).double()
    layer = model.it["attn"]
    with torch.no_grad():
        for weight, (down, up, _) in ((plain.in_proj_weight, pieces(layer)), (plain.out_proj.weight, pieces(layer.base_layer.out_proj))):
            weight += up @ down * (3.0 / 2)
    getattr(plain, mode)(), getattr(model, mode)()
    with torch.set_grad_enabled(mode == "train"):
        ours, wanted = layer(x, x, x, need_weights=False)[0], plain(x, x, x, need_weights=False)[0]
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-13)
    if mode == "train":
        by_weight = torch.autograd.grad(wanted.square().sum(), (plain.in_proj_weight, plain.out_proj.weight))
        for gradient, (down, up, _) in zip(by_weight, (pieces(layer), pieces(layer.base_layer.out_proj)), strict=True):
            by_factor = torch.autograd.grad(ours.square().sum(), (down, up), retain_graph=True)
            torch.testing.assert_close(by_factor, (up.T @ gradient * 1.5, gradient @ down.T * 1.5), rtol=1e-11, atol=1e-11)


# In models


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", TOWERS)
def test_a_new_adapter_changes_nothing(name, mode):
    built, x = tower(name)
    getattr(built, mode)()
    before = built(x).detach()
    model = adapted(built)
    assert torch.equal(getattr(model, mode)()(x), before)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_new_adapter_changes_nothing_in_a_language_model(kind, dtype):
    backbone = make("backbone", "qwen", size="tiny", dtype=dtype)
    x, real = torch.randn(2, 5, backbone.dim).to(getattr(torch, dtype)), torch.ones(2, 5, dtype=torch.bool)
    there = torch.arange(5).expand(2, 5)
    before = backbone(x, real, there)
    model = adapted(backbone, kind=kind)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert torch.equal(model.it(x, real, there), before)
    stir(model)
    unmerged = model.it(x, real, there)
    assert not torch.equal(unmerged, before)
    merge(model)
    limit = {"float32": 1e-4, "bfloat16": 0.15}[dtype]  # of states of length about 8: bfloat16 rounds each of two layers' sums to 1 / 256
    torch.testing.assert_close(model.it(x, real, there), unmerged, rtol=0, atol=limit)


@pytest.mark.parametrize("name", TOWERS)
def test_gradients_reach_every_adapter_and_no_weight_beside_them(name):
    built, x = tower(name)
    kept = {n: p.detach().clone() for n, p in built.named_parameters()}
    model = stir(adapted(built)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(x).square().sum().backward()
        learned = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert learned
        assert all("lora_" in n and g is not None and bool(g.any()) for n, g in learned.items())
        optimizer.step()
        optimizer.zero_grad()
    plain = {n.removeprefix("it.").replace(".base_layer", ""): p for n, p in model.named_parameters() if "lora_" not in n}
    assert plain.keys() == kept.keys()
    assert all(torch.equal(plain[n], kept[n]) for n in kept)  # peft's own adapter of attention would have moved them by rounding


@pytest.mark.parametrize("name", TOWERS)
def test_merged_is_unmerged(name):
    built, x = tower(name)
    names = list(built.state_dict())
    kept = {n: p.requires_grad for n, p in built.named_parameters()}
    before = built(x)
    model = stir(adapted(built)).eval()
    with torch.no_grad():
        unmerged = model(x)
        assert not torch.allclose(unmerged, before, atol=1e-2)
        torch.testing.assert_close(model.train()(x), unmerged, rtol=1e-4, atol=1e-4)  # no fast path past the adapters in eval mode
        state = merged_state(model, model.state_dict())
        merge(model)
        torch.testing.assert_close(model.eval()(x), unmerged, rtol=1e-4, atol=1e-4)  # float32, a few layers of sums in another order
    assert set(model.it.state_dict()) == set(names) == {n for n, _ in kept.items()} | {n for n, _ in model.it.named_buffers()}
    assert not any(isinstance(m, LoraLayer) or "peft_config" in vars(m) for m in model.modules())
    assert all(torch.equal(value, model.state_dict()[n]) for n, value in state.items())


def test_targets():
    built, _ = tower("timm")
    model = adapted(built, targets=("qkv", "blocks.1.mlp.fc1"))
    found = [n.removeprefix("it.encoder.model.blocks.") for n, m in model.named_modules() if isinstance(m, LoraLayer)]
    assert sorted(found) == sorted(["1.mlp.fc1", *(f"{i}.attn.qkv" for i in range(len(built.encoder.model.blocks)))])


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_queries_without_a_bias_of_keys(kind):
    """As in VLMo: a linear layer like others, whose biases stay as they are."""
    trunk, x = Trunk(Shape(8, 2, bias="qv"), 1).double(), torch.randn(2, 3, 8).double()
    names = {*trunk.state_dict()}
    assert {"blocks.0.qkv.weight", "blocks.0.qkv.q_bias", "blocks.0.qkv.v_bias"} < names
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        before = trunk(x)
    model = adapted(trunk, rank=2, kind=kind)
    found = {n.removeprefix("it.blocks.0.") for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    assert found == {"qkv", "out", "ffn.fc1", "ffn.fc2"}
    close = {"rtol": 0, "atol": 1e-5}  # adapters are of float32
    torch.testing.assert_close(model(x), before, **close)
    unmerged = stir(model)(x)
    assert not torch.allclose(unmerged, before, atol=1e-2)
    merge(model)
    torch.testing.assert_close(model(x), unmerged, **close)
    assert {*trunk.state_dict()} == names


def test_what_freeze_names_inside_gets_none():
    built, _ = tower("timm")
    model = Holder(built)
    freeze(built.encoder.model.blocks[0])
    adapt(model, [Adapter(on="it")], ["it.encoder.model.blocks.0"])
    assert {n.split(".")[4] for n, m in model.named_modules() if isinstance(m, LoraLayer)} == {
        str(i) for i in range(1, len(built.encoder.model.blocks))
    }
    model.train()
    model(torch.randn(1, 3, 32, 32))
    assert not built.encoder.model.blocks[0].training
    assert built.encoder.model.blocks[1].training


def test_dropout_of_an_adapter_in_a_frozen_tower():
    """Freezing keeps a tower in eval mode; its adapters drop out all the same, and what is frozen beside them does not."""
    model = Holder(nn.Sequential(nn.ModuleDict({"a": nn.Linear(8, 8)}), nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), nn.Dropout(0.5)))
    model.it.forward = lambda x: model.it[2](model.it[1](x))
    freeze(model.it)
    adapt(model, [Adapter(on="it.1", dropout=0.5)])
    stir(model).train()
    x = torch.randn(4, 8)
    means = model.it[1][1].running_mean.clone()
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.it[1][1].running_mean, means)
    assert not model.it[2].training
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_without_weights(kind):
    model = adapted(make("backbone", "qwen", size="tiny", device="meta"), kind=kind)
    assert {p.device.type for p in model.parameters()} == {"meta"}


# What cannot be


OTHERS = "or targets without it: "
FAULTS = [
    ({"on": "visoin"}, r"adapters\.0\.on: no module named 'visoin'; did you mean 'vision'\? \(have: backbone, combine, connector, late,"),
    ({"on": ""}, r"adapters\.0\.on: no module named ''"),
    ({"on": "late"}, r"adapters\.0\.on: 'late' has no linear layer inside it"),
    ({"on": "vision.stem"}, r"adapters\.0\.on: 'vision\.stem' has no linear layer inside it"),
    (
        {"on": "backbone", "targets": ("q_proj", "v_prj")},
        r"adapters\.0\.targets: no layer to adapt in 'backbone' named 'v_prj'; did you mean 'v_proj'\? \(have: down_proj, gate_proj",
    ),
    (
        {"on": "vision", "kind": "dora"},
        rf"adapters\.0\.kind: vision\.blocks\.0\.self_attn is an nn\.Mult\w+, which has no dora: write lora, {OTHERS}linear1, linear2",
    ),
    (
        {"on": "vision", "dropout": 0.1, "targets": ("self_attn",)},
        rf"adapters\.0\.dropout: vision\.blocks\.0\.self_attn is an nn\.Mult\w+, which has none: write 0, {OTHERS}there are none",
    ),
]


@pytest.mark.parametrize(("settings", "says"), FAULTS)
def test_what_does_not_fit_the_model(settings, says):
    with pytest.raises(ZooError, match=says):
        adapt(build(**TINY), [Adapter(**settings)])


def test_attention_over_other_widths():
    with pytest.raises(ZooError, match=r"adapters\.0\.targets: it\.attn has keys or values of another width"):
        adapted(nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, kdim=4)}))


@pytest.mark.parametrize(
    ("adapters", "says"),
    [
        ([{"on": "backbone", "rank": 0}], "adapters.0.rank: 0: input should be greater than or equal to 1"),
        ([{"on": "backbone", "alpha": 0}], "adapters.0.alpha: 0: input should be greater than 0"),
        ([{"on": "backbone", "dropout": 1}], "adapters.0.dropout: 1: input should be less than 1"),
        ([{"on": "backbone", "kind": "qlora"}], "adapters.0.kind: 'qlora': input should be 'lora' or 'dora'"),
        ([{"on": "backbone", "targets": []}], "adapters.0.targets"),
        ([{"rank": 4}], "adapters.0: 'on' is missing"),
        ([{"on": "backbone", "r": 4}], "adapters.0.r: no keyword named 'r'"),
        (5, "adapters: 5: "),
        ([LORA, {"on": "backbone.model.layers.0"}], "adapters.1.on: 'backbone.model.layers.0' and 'backbone' overlap"),
        ([{"on": "vision"}, LORA, LORA], "adapters.2.on: 'backbone' and 'backbone' overlap"),
    ],
)
def test_faults_of_the_section(adapters, says):
    with pytest.raises(ZooError) as e:
        load_recipe({"model": TINY, "data": DATA, "objective": "pair_infonce", "adapters": adapters})
    assert says in str(e.value)


def test_names_that_begin_alike_do_not_overlap():
    load_recipe({"model": TINY, "data": DATA, "objective": "pair_infonce", "adapters": [{"on": "backbone.a"}, {"on": "backbone.ab"}]})


# In a run


@pytest.fixture(scope="module")
def data():
    return make("data", DATA)


@pytest.fixture
def recipe(tmp_path):
    def written(out="run", **overrides):
        plain = {
            "model": TINY,
            "data": DATA,
            "objective": "pair_infonce",
            "optimizer": {"lr": 1e-2},
            "run": {"steps": 4, "batch_size": 20, "device": "cpu", "log_every": 1},
            "evaluate": {"k": [10], "bootstrap": 0},
            "adapters": BOTH,
            "out": str(tmp_path / out),
        }
        return load_recipe(plain, **overrides)

    return written


def checkpoint(folder):
    return load_file(max((folder / "checkpoints").glob("step_*")) / "step.safetensors")


@pytest.mark.parametrize("adapters", [BOTH, [DORA]], ids=["lora", "dora"])
def test_a_run_moves_adapters_and_what_is_free_and_leaves_a_plain_model(recipe, data, adapters):
    settings = recipe(adapters=adapters)
    torch.manual_seed(settings.seed)
    before = {n.replace(".base_layer", ""): p for n, p in make_step(settings).state_dict().items()}
    model = train(settings, loaded=data)
    after = {n.replace(".base_layer", ""): p for n, p in checkpoint(settings.out).items()}
    assert before.keys() == after.keys()
    still = {n for n in before if torch.equal(before[n], after[n])}
    frozen = {f"model.{n}" for n, _ in build(**TINY).named_parameters() if n.startswith(("backbone.", "vision."))}
    assert frozen <= still
    moved = before.keys() - still
    assert {n for n in before if "lora_B" in n} <= moved
    assert {"model.connector.map.weight", "model.project.weight", "model.late.weight"} <= moved

    loaded = zoo.load(settings.out)
    assert set(loaded.state_dict()) == set(build(**TINY).state_dict()) == set(model.state_dict())
    rows = [data.notes[i] for i in range(8)]
    assert (loaded.encode(rows) == model.encode(rows)).all()  # what is measured is what is saved


def test_save_merges_and_leaves_the_model_as_it_is(recipe, tmp_path, data):
    step = make_step(recipe())
    stir(step.model).eval()
    before = {n: v.clone() for n, v in step.model.state_dict().items()}
    step.model.trained = True
    zoo.save(step.model, tmp_path / "saved")
    assert all(torch.equal(v, before[n]) for n, v in step.model.state_dict().items())
    rows = [data.notes[i] for i in range(8)]
    ours, merged = step.model.encode(rows), zoo.load(tmp_path / "saved").encode(rows)
    assert abs(ours - merged).max() < 1e-5
    assert set(load_file(tmp_path / "saved/model.safetensors")) == set(build(**TINY).state_dict())


@pytest.mark.parametrize("adapters", [BOTH, [{**DORA, "dropout": 0.2}]], ids=["lora", "dora and dropout"])
def test_an_interruption_changes_nothing(recipe, data, monkeypatch, adapters):
    whole, parts = recipe("whole", adapters=adapters), recipe("parts", adapters=adapters, run__save_every=1)
    train(whole, loaded=data)
    update = Updater.__call__

    def stopping(self, batches, position):
        if position.step == 2:
            raise KeyboardInterrupt
        return update(self, batches, position)

    with monkeypatch.context() as patch:
        patch.setattr(Updater, "__call__", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(parts, loaded=data)
    train(parts, loaded=data)
    for found in (checkpoint, lambda out: load_file(out / "model.safetensors")):
        one, other = found(whole.out), found(parts.out)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[n], other[n]) for n in one)


def test_a_finished_run_gives_the_same_model_again(recipe, data):
    first, again = train(recipe(), loaded=data), train(recipe(), loaded=data)
    assert all(torch.equal(v, again.state_dict()[n]) for n, v in first.state_dict().items())


def losses(settings):
    return [json.loads(line)["loss"] for line in (settings.out / "log.jsonl").read_text().splitlines()]


def test_gradient_checkpointing_changes_no_loss(recipe, data, monkeypatch):
    train(recipe("kept"), loaded=data)
    seen = []
    real = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr("transformers.modeling_utils.checkpoint", lambda *a, **k: seen.append(1) or real(*a, **k))
    train(recipe("again", run__gradient_checkpointing=True, freeze=["backbone"]), loaded=data)
    assert losses(recipe("again")) == losses(recipe("kept"))
    assert len(seen) == 4 * 2  # steps times layers: freezing, which keeps a module in eval mode, would turn it off


def test_gradcache_gives_the_same_losses(recipe, data):
    train(recipe("whole"), loaded=data)
    train(recipe("chunks", run__gradcache=8), loaded=data)
    assert losses(recipe("chunks")) == pytest.approx(losses(recipe("whole")), rel=1e-4)


def test_bfloat16(recipe, data):
    train(recipe(run__precision="bf16", optimizer__lr=1e-3), loaded=data)
    train(recipe("precise", optimizer__lr=1e-3), loaded=data)
    ours, precise = losses(recipe()), losses(recipe("precise"))
    assert ours != precise
    assert ours == pytest.approx(precise, rel=0.01)  # a part in 256 a rounding


def test_groups_match_by_the_same_names(recipe):
    settings = recipe(optimizer__groups=[{"prefix": "backbone", "lr": 1.0}, {"prefix": "vision.blocks.0.self_attn", "lr": 2.0}])
    step = make_step(settings)
    groups = {g["peak"]: g["params"] for g in make_optimizer(step, settings.optimizer).param_groups}
    of = {id(p): n for n, p in step.model.named_parameters()}
    assert {of[id(p)].split(".")[0] for p in groups[1.0]} == {"backbone"}
    assert all("lora_" in of[id(p)] for p in groups[1.0] + groups[2.0])
    assert len(groups[2.0]) == 4  # A and B of the attention and of its output projection


def test_the_number_of_trained_parameters(recipe, data):
    settings = recipe()
    step = make_step(settings)
    wanted = sum(p.numel() for p in step.model.parameters() if p.requires_grad)
    assert train_and_measure(settings, data).parameters == wanted
    adapters = sum(p.numel() for n, p in step.model.named_parameters() if "lora_" in n)
    assert count(settings.out) == adapters > 0
    train(recipe(adapters=[], freeze=["backbone"]), loaded=data, fresh=True)
    assert count(settings.out) == 0


@pytest.mark.parametrize("adapters", [[LORA], [DORA]], ids=["lora", "dora"])
def test_peft_loads_the_adapters_alone(recipe, data, adapters):
    settings = recipe(adapters=adapters)
    trained = train(settings, loaded=data)
    torch.manual_seed(settings.seed)
    plain = build(**TINY).backbone
    loaded = PeftModel.from_pretrained(plain, settings.out / "adapters/backbone").merge_and_unload()
    wanted = trained.backbone.state_dict()
    assert wanted.keys() == loaded.state_dict().keys()
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6)


# Over processes

TOGETHER = """
import sys, torch
from zoo.train import train
model = train(sys.argv[1])
torch.save(dict(model.state_dict()) if "shard" not in sys.argv else {}, sys.argv[2])
"""


def together(folder, settings, *how):
    """The weights that two processes end with."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    recipe = write_text(folder / f"{settings.out.name}.yaml", dump(settings))
    files = [folder / f"rank{rank}.pt" for rank in range(2)]
    processes = []
    try:
        for rank, file in enumerate(files):
            own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
            with file.with_suffix(".txt").open("wb") as said:
                command = [sys.executable, "-c", TOGETHER, str(recipe), str(file), *how]
                processes.append(subprocess.Popen(command, stdout=said, stderr=said, env=own))
        for process, file in zip(processes, files, strict=True):
            assert process.wait(300) == 0, file.with_suffix(".txt").read_text()
    finally:
        for process in processes:
            process.kill()
            process.wait(60)
    return [torch.load(file, weights_only=True) for file in files]


@pytest.mark.slow
def test_two_processes_agree_and_sharded_ones_learn_the_same(recipe, tmp_path):
    settings = recipe("pair", run__batch_size=10, run__threads=1)
    first, second = together(tmp_path, settings)
    saved = load_file(settings.out / "model.safetensors")
    assert first.keys() == second.keys() == saved.keys()
    assert all(torch.equal(first[n], second[n]) and torch.equal(first[n], saved[n]) for n in saved)

    sharded = recipe("sharded", run__batch_size=10, run__threads=1, run__shard=True)
    together(tmp_path, sharded, "shard")
    there = load_file(sharded.out / "model.safetensors")
    assert there.keys() == saved.keys()
    for name in saved:
        torch.testing.assert_close(there[name], saved[name], rtol=1e-3, atol=1e-4, msg=name)
    assert count(sharded.out) == count(settings.out) > 0
