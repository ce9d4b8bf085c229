"""``zoo validate``: shapes without weights, memory against what a real step takes, rates and lengths, and every shipped recipe."""

import importlib
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from tests.test_cli import TINY
from zoo.collate import PairCollate
from zoo.errors import Absent, ZooError
from zoo.optimizer import make_optimizer
from zoo.recipe import load_recipe, recipes
from zoo.registry import make, names
from zoo.shapes import Kept, memory, running, walk, without_weights
from zoo.train import make_step
from zoo.types import Batch, Loss, ModelOutput, Pair
from zoo.update import Step
from zoo.validate import plain, validate

REAL = [name for name in recipes() if name.startswith("notellm2/m")]
SYSTEMS = ("albef/", "beit_3/", "blip/", "clip/", "coca/", "visual_tokenizer/", "vlmo/")
PICTURES = [n for n in recipes() if n.startswith(SYSTEMS) and "emoji" not in n and "stage" not in n]  # as large as in the papers
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("albef", "blip", "vlmo", "beit_3")]
COUNTS = {"albef": 210e6, "blip": 252e6}  # of ALBEF's paper, 123.7 and 85.8 million; of BLIP's, where all but self-attention is shared
PAPER = {"mqwen_base": ("qwen", 7_098_994_688), "mqwen_bigg": ("qwen", 7_098_994_688), "mtomato_base": ("llama", 6_607_351_808)}


def tiny(*overrides, **sections):
    return load_recipe(TINY | sections, *overrides)


@cache
def data_of(spec):
    """A data set; several recipes have the same. None where it is not here."""
    try:
        return make("data", json.loads(spec), None)
    except Absent:
        return None


def batch_of(recipe, step, pairs=8):
    data = data_of(json.dumps(recipe.data))
    return PairCollate(step.model.processor)([Pair(*(data.notes[int(i)] for i in pair)) for pair in data.pairs("train")[:pairs]])


def hollow(recipe):
    with torch.device("meta"):
        return without_weights(make_step(recipe)).train()


class TestShipped:
    def test_there_are_some(self):
        assert {"notellm2/mqwen_base", "notellm2/mqwen_bigg", "notellm2/mtomato_base"} <= set(REAL)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", REAL)
    def test_of_the_paper(self, name, tmp_path):
        """Real sizes in seconds and without their memory; the recipe says the paper's numbers."""
        recipe = load_recipe(name, "model.fusion=[micl, gated_late]")
        report = validate(recipe, processes=8, cache=tmp_path)
        assert report.faults == []
        stem = name.partition("/")[2]
        parts = {part.name: part for part in report.parts}
        assert parts["backbone"].parameters == pytest.approx(PAPER[stem][1], rel=1e-4)
        assert parts["vision"].trained == 0
        assert all(part.trained == part.parameters for key, part in parts.items() if key != "vision")
        lines = {(line.module, way): named for line in report.shapes for way, named in (("given", line.given), ("gave", line.gave))}
        seen, width = (28, 1664) if stem == "mqwen_bigg" else (28, 768)
        patches = 257 if stem == "mqwen_bigg" else 197
        assert lines["vision", "gave"]["tokens"] == f"({seen}, {patches}, {width}) {'bfloat16' if stem == 'mqwen_bigg' else 'float32'}"
        assert lines["connector", "gave"]["tokens"] == f"({seen}, 16, 4096) bfloat16"
        assert lines["backbone", "given"]["inputs_embeds"].startswith("(32, ")
        assert lines["model", "gave"]["embeddings.note"] == "(32, 64) bfloat16"
        assert lines["loss", "gave"]["total"] == "() float32"
        assert any("counted in bytes" in note for note in report.notes)
        assert any("MADE UP" in note for note in report.notes)
        ways = {way: found.total / 2**30 for way, found in report.memory.items()}
        assert ways["with gradient_checkpointing"] < ways["as the recipe says"] < 80  # an A100

    @pytest.mark.parametrize("name", REAL)
    def test_the_papers_hyper_parameters(self, name):
        recipe = load_recipe(name)
        optimizer, run = recipe.optimizer, recipe.run
        assert (optimizer.lr, optimizer.weight_decay, optimizer.max_grad_norm) == (3e-6, 1e-3, 1.0)
        assert (optimizer.betas, optimizer.eps, optimizer.groups) == ((0.9, 0.999), 1e-8, ())
        assert (optimizer.warmup, optimizer.warmup_shape, optimizer.decay) == (0.1, "log", "linear")
        assert (run.epochs, run.steps, run.batch_size, run.accumulate, run.precision) == (1.0, None, 16, 1, "bf16")
        assert (run.save_every, run.shard, run.gradient_checkpointing, recipe.seed) == (1750, True, False, 42)
        assert recipe.objective == {"name": "pair_infonce", "alpha": 9}
        assert recipe.model["connector"]["num_queries"] == 16
        assert recipe.model["dim"] == 64
        assert (recipe.evaluate.k, recipe.evaluate.main.k) == ((100, 1000, 10000), 100)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", PICTURES)
    def test_of_the_papers_of_pictures_and_texts(self, name, tmp_path):
        report = validate(load_recipe(name), rows=4, processes=8, cache=tmp_path)
        assert report.faults == []
        counted = sum(part.parameters for part in report.parts if part.name != "objective")
        if name.partition("/")[0] in COUNTS and not name.endswith("large"):
            assert counted == pytest.approx(COUNTS[name.partition("/")[0]], rel=0.01)
        assert any("MADE UP" in note for note in report.notes)

    @pytest.mark.parametrize("name", [n for n in recipes() if n not in [*REAL, *PICTURES]])
    def test_small_ones(self, name, tmp_path):
        recipe = load_recipe(name)
        report = validate(recipe, loaded=data_of(json.dumps(recipe.data)), cache=tmp_path)
        assert report.faults == []
        assert report.memory["as the recipe says"].total < 2**30


class TestShapes:
    @pytest.mark.parametrize("fusion", [f for f in names("fusion") if f not in ("joint",)])
    def test_are_those_of_a_real_step(self, fusion):
        try:
            recipe = tiny("run.precision=bf16", model=TINY["model"] | {"fusion": fusion})
        except ZooError as e:
            pytest.skip(str(e))
        real, empty = make_step(recipe).train(), hollow(recipe)
        batch = batch_of(recipe, real)
        lines, kept = walk(empty, batch, "bf16", deep=True)
        expected, counted = walk(real, batch, "bf16", deep=True)
        left_out = {"1": "(0,) bfloat16"}  # weights that nn.MultiheadAttention does not give: a real one says None
        assert [line._replace(gave=dict(line.gave.items() - left_out.items())) for line in lines] == expected
        assert kept.saved == pytest.approx(counted.saved, rel=0.01)

    @pytest.mark.parametrize("objective", names("objective"))
    def test_of_every_objective(self, objective):
        try:
            recipe = tiny(objective=objective)
            real = make_step(recipe).train()
            batch = batch_of(recipe, real)
            real(batch)
        except ZooError as e:
            pytest.skip(str(e))
        assert walk(hollow(recipe), batch) == walk(real, batch)

    @pytest.mark.parametrize(
        "vision", ["timm:resnet18", "open_clip:ViT-B-32", {"name": "hf:x", "pretrained": False, "config": {"model_type": "vit"}}]
    )
    def test_of_encoders_from_libraries(self, vision):
        recipe = tiny(model=TINY["model"] | {"vision": vision})
        report = validate(recipe)
        assert report.faults == []
        assert "vision" in [line.module for line in report.shapes]

    def test_nothing_has_a_value_and_weights_that_are_shared_stay_so(self):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3))
        model[1].weight = model[0].weight
        model.register_buffer("left_out", torch.ones(2), persistent=False)
        step = without_weights(Step(model, nn.Identity()))
        assert step.model[1].weight is step.model[0].weight
        assert all(type(p.data).__name__ == "FakeTensor" for p in [*step.parameters(), *step.buffers()])
        assert "model.left_out" not in step.state_dict()
        assert step.model[2].running_mean.shape == (3,)

    def test_deep_names_every_module(self):
        recipe = tiny()
        step = hollow(recipe)
        batch = batch_of(recipe, step)
        shallow, deep = walk(step, batch)[0], walk(step, batch, deep=True)[0]
        assert [line.module for line in shallow][-2:] == ["model", "loss"]
        assert "backbone.model.layers.0.mlp" in [line.module for line in deep]
        assert len(deep) > 2 * len(shallow)
        assert not any(m._forward_hooks for m in step.model.modules())

    def test_a_shape_that_depends_on_weights(self):
        class Choosy(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.randn(4))

            def forward(self, batch):
                return ModelOutput({"note": self.weight[self.weight > 0]})

        class Sum(nn.Module):
            def forward(self, model, batch):
                return Loss(model(batch).embeddings["note"].sum(), {})

        with pytest.raises(ZooError, match="cannot be walked through without its weights: a shape depends on their values"):
            walk(without_weights(Step(Choosy(), Sum())), Batch({}))


class TestMemory:
    @pytest.fixture(params=["no", "bf16"])
    def both(self, request):
        """A recipe, its step with weights and without, and a batch."""
        recipe = tiny(f"run.precision={request.param}", model=TINY["model"] | {"train_vision": False})
        real = make_step(recipe).train()
        return recipe, real, hollow(recipe), batch_of(recipe, real, 16)

    def test_weights_gradients_and_optimizer_are_exact(self, both):
        recipe, real, empty, batch = both
        optimizer = make_optimizer(real, recipe.optimizer)
        real(batch).total.backward()
        optimizer.step()
        found = memory(empty, Kept(0, 0, ()), Kept(0, 0, ()), checkpointing=False, processes=1, shard=False)
        assert found.weights == sum(x.nbytes for x in [*real.parameters(), *real.buffers()])
        assert found.gradients == sum(p.grad.nbytes for p in real.parameters() if p.grad is not None)
        assert found.optimizer == sum(x.nbytes for state in optimizer.state.values() for x in state.values())

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_activations_are_those_that_a_real_pass_keeps(self, both, checkpointing):
        recipe, real, empty, batch = both
        if checkpointing:
            real.model.checkpoint_gradients()
            empty.model.checkpoint_gradients()
        weights, held = {p.untyped_storage().data_ptr() for p in real.parameters()}, {}
        with running(recipe.run.precision), saved_tensors_hooks(lambda x: held.setdefault(id(x), x), lambda x: x):
            real(batch)
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held.values()}
        estimated = walk(empty, batch, recipe.run.precision)[1]
        assert estimated.saved == pytest.approx(sum(size for at, size in storages.items() if at not in weights), rel=0.01)
        assert sum(estimated.calls) > 0

    def test_casts_are_those_of_trained_weights(self, both):
        recipe, real, _, batch = both
        found = walk(real, batch, recipe.run.precision)[1].casts
        matrices = sum(p.numel() for p in real.parameters() if p.requires_grad and p.ndim == 2) * 2
        assert found == 0 if recipe.run.precision == "no" else 0 < found < 1.1 * matrices

    def test_checkpointing_keeps_less(self):
        deep = TINY["model"]["backbone"] | {"layers": 6}
        recipe = tiny(model=TINY["model"] | {"backbone": deep})
        found = validate(recipe).memory
        assert found["with gradient_checkpointing"].activations < 0.6 * found["as the recipe says"].activations
        assert list(validate(tiny("run.gradient_checkpointing=true")).memory) == ["as the recipe says"]

    @pytest.mark.parametrize("name", ["clip", "coca", *SLOW])
    def test_checkpointing_of_pictures_and_texts_is_by_block(self, name, monkeypatch):
        """What is told is what stays, and of one block, and not of a whole tower, what is computed again."""
        models = importlib.import_module(f"zoo.models.{name}")
        tiny = models.SIZES["tiny"]
        deep = {
            "pictures": lambda: {"pictures": tiny.pictures._replace(layers=12)},
            "vision": lambda: {"vision": {"name": "timm:vit_tiny_patch16_224", "image_size": 64}},
            "layers": lambda: {"layers": 12},
        }
        tower = next(kind for kind in deep if hasattr(tiny, kind))
        monkeypatch.setitem(models.SIZES, "tiny", tiny._replace(**deep[tower]()))
        with_text = {} if name in ("clip", "coca") else {"layers": 12}
        recipe = load_recipe(f"{name}/emoji_en", f"model={json.dumps({'name': name} | with_text)}", "run.batch_size=64")
        memory = validate(recipe, rows=16).memory
        whole, less = (memory[way].activations for way in ("as the recipe says", "with gradient_checkpointing"))
        assert less < 0.5 * whole

    def test_the_ways_to_share(self, both):
        *_, empty, _ = both
        once, again = Kept(1000, 0, (300, 200, 700)), Kept(100, 50, (0, 0, 60))

        def of(**how):
            return memory(empty, once, again, **({"checkpointing": False, "processes": 1, "shard": False} | how))

        whole = of()
        assert whole.activations == 1000
        assert of(checkpointing=True).activations == 100 + 300
        assert memory(empty, once, again._replace(casts=500), checkpointing=True, processes=1, shard=False).activations == 600
        assert of(processes=2) == whole._replace(gradients=2 * whole.gradients)
        shared = of(processes=4, shard=True)
        block = sum(p.nbytes for p in empty.model.backbone.model.layers[0].parameters())
        assert (shared.gradients, shared.optimizer) == (-(-whole.gradients // 4), -(-whole.optimizer // 4))
        assert shared.weights == -(-whole.weights // 4) + 2 * block
        assert whole.total == sum(whole)

    def test_one_process_shares_with_nobody(self):
        assert [note for note in validate(tiny("run.shard=true")).notes if "--processes" in note]
        assert validate(tiny("run.shard=true"), processes=2).notes == []

    def test_gradcache_keeps_one_chunk(self):
        found = [validate(tiny(f"run.gradcache={rows}")).memory["as the recipe says"].activations for rows in (0, 4)]
        assert found[1] < 0.5 * found[0]


class TestRows:
    def test_rates_lengths_and_negatives(self):
        recipe = tiny()
        report = validate(recipe)
        assert report.rows == 32
        assert report.data.startswith("300 items, ")
        assert set(report.missing) == {"title", "topic", "content", "image", "any text"}
        assert all(0 <= share <= 0.5 for share in report.missing.values())
        assert 0 < report.texts.median <= report.texts.longest
        assert (report.texts.limit, report.texts.cut) == (140, 0)
        assert report.contrast.positives == 32
        assert 0 < report.contrast.fewest <= report.contrast.negatives <= 30

    def test_texts_that_are_cut(self):
        report = validate(tiny(model=TINY["model"] | {"max_tokens": 20}))
        assert report.texts.limit == 20
        assert 0 < report.texts.cut <= 32

    @pytest.mark.parametrize("length, cut", [(4, 2), (7, 1), (8, 1), (9, 0), (32, 0)])
    def test_captions_that_are_cut(self, length, cut, monkeypatch):
        said = ["red shoes", "a grey coat", "", "blue cup and plate red coat"]  # the last one of 9 ids
        rows = iter([{"id": i, "image": Image.new("RGB", (9, 9)), "text": text} for i, text in enumerate(said)])
        monkeypatch.setattr("zoo.opened._made_up_caption", lambda i, random: next(rows))
        recipe = load_recipe("clip/emoji_en", f"model.length={length}")
        texts = validate(recipe, rows=4).texts
        assert (texts.limit, texts.cut, texts.longest) == (length, cut, min(length, 9))

    def test_a_model_without_eyes(self):
        report = validate(tiny(model=TINY["model"] | {"fusion": "text_only"}))
        assert "image" not in report.missing
        assert "vision" not in [part.name for part in report.parts]

    def test_known_pairs_are_no_negatives(self, monkeypatch):
        """Two items that are each other's partners and nothing else: no row has a negative."""
        data = make("data", tiny().data, None)
        monkeypatch.setattr(type(data), "pairs", lambda self, split: np.array([[0, 1], [1, 0]]))
        report = validate(tiny(), rows=4)
        assert report.contrast.negatives == 0
        assert report.faults == [
            "no row has a negative: all are the same item or belong together; write a larger run.batch_size, or look at the pairs"
        ]
        assert validate(tiny()).notes == ["the data has 2 training pairs, fewer than 16"]

    def test_items_paired_with_themselves_teach_nothing(self, monkeypatch):
        data = make("data", tiny().data, None)
        monkeypatch.setattr(type(data), "pairs", lambda self, split: np.array([[0, 0], [1, 1]]))
        assert validate(tiny(), rows=4).faults == ["no row has a positive that the model sees: nothing can be learned from these rows"]

    @pytest.mark.parametrize("rows", [0, 3, -2])
    def test_rows_are_pairs(self, rows):
        with pytest.raises(ZooError, match=f"rows: {rows} rows are no pairs: write 2 or more, even"):
            validate(tiny(), rows=rows)

    def test_without_data_rows_are_made_up_and_marked(self):
        report = validate(tiny(data={"name": "notes", "folder": "nowhere"}))
        assert report.data == "made up"
        assert len(report.notes) == 1
        assert report.notes[0].startswith("the data is not here (the data set 'nowhere' is looked for in a folder of data folders")
        assert report.notes[0].endswith("the rows are MADE UP, and so are lengths and missing rates")
        assert (report.missing["image"], report.missing["any text"]) == (0.125, 0.125)
        pictures = validate(tiny(data={"name": "notes", "folder": "nowhere", "inputs": ["image"]}))
        assert pictures.missing["any text"] == 1

    def test_data_that_is_there_and_wrong_is_an_error(self, tmp_path):
        (tmp_path / "mine").mkdir()
        with pytest.raises(ZooError, match=r"there is no notes\.parquet or notes\.csv"):
            validate(tiny(data={"name": "notes", "folder": "mine"}), data_root=tmp_path)

    def test_adapters_are_counted(self):
        adapters = [{"on": "backbone", "rank": 2}]
        parts = {p.name: p for p in validate(tiny(adapters=adapters)).parts}
        assert 0 < parts["backbone"].adapters == parts["backbone"].trained < parts["backbone"].parameters
        assert parts["project"].adapters == 0


class TestTokenizers:
    def test_a_tokenizer_that_is_here_is_used(self, tmp_path):
        from tests.test_tokenizers import byte_level

        folder = tmp_path / "models--someone--words/snapshots/1"
        folder.mkdir(parents=True)
        (tmp_path / "models--someone--words/refs").mkdir()
        (tmp_path / "models--someone--words/refs/main").write_text("1")
        byte_level(folder)
        config = {"model_type": "qwen2", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        (folder / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 2, "vocab_size": 1000}))
        recipe = tiny(model=TINY["model"] | {"backbone": {"name": "qwen", "size": "tiny", "pretrained": "someone/words"}})
        report = validate(recipe, cache=tmp_path)
        assert report.notes == []
        assert next(p.parameters for p in report.parts if p.name == "backbone") < 200_000
        assert validate(recipe, cache=tmp_path / "empty").notes == [
            "the tokenizer someone/words is not here (zoo fetch): texts are counted in bytes, and are longer than in training"
        ]


class TestCommand:
    @pytest.fixture(autouse=True)
    def own_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("ZOO_DATA", raising=False)
        Path("tiny.yaml").write_text(yaml.safe_dump(TINY))

    def test_prints_all_of_it(self, command):
        code, out, err = command("validate", "tiny.yaml", "run.precision=bf16", "--processes", "2")
        assert (code, err) == (0, "")
        for says in ("rows      32 (300 items, ", "missing   title ", "tokens; at most 140, ", "contrast  32 rows with a positive"):
            assert says in out
        lines = [line.split() for line in out.splitlines()]
        assert ["connector", "<-", "x.tokens"] in [line[:3] for line in lines]
        assert ["module", "parameters", "trained", "frozen", "adapters"] in lines
        assert [line[0] for line in lines if line[:1] == ["total"]] == ["total"]
        assert "with both  " in out
        assert "MiB on one GPU" in out

    def test_the_help_says_that_data_is_read_whole_and_how_it_is_not(self, command, tmp_path):
        help_ = " ".join(command("validate", "--help")[1].split())
        assert "Data that is there is loaded whole, as at the start of a run: every image is decoded once, and pairs are mined." in help_
        assert "--data of an empty folder makes them up too" in help_
        said = command("validate", "notellm2/retail", "--data", tmp_path)[1]
        assert said.startswith("NOTE the data is not here")

    def test_json(self, command):
        code, out, _ = command("validate", "tiny.yaml", "--json")
        assert code == 0
        found = json.loads(out)
        assert found == json.loads(json.dumps(plain(validate(load_recipe("tiny.yaml")))))
        memory = found["memory"]["as the recipe says"]
        assert memory["total"] == sum(v for k, v in memory.items() if k != "total")

    def test_made_up_rows_are_said_first(self, command):
        code, out, _ = command("validate", "tiny.yaml", "data={name: notes, folder: nowhere}")
        assert code == 0
        assert out.startswith("NOTE the data is not here")

    @pytest.mark.parametrize(
        "arguments, says",
        [
            (["optimiser.lr=1"], "no keyword named 'optimiser'; did you mean 'optimizer'?"),
            (["freeze=[nose]"], "freeze: no module named 'nose'"),
            (["--rows", "3"], "rows: 3 rows are no pairs"),
        ],
    )
    def test_faults_are_two(self, command, arguments, says):
        code, out, err = command("validate", "tiny.yaml", *arguments)
        assert (code, out) == (2, "")
        assert says in err

    def test_a_batch_without_a_loss_is_two(self, command, monkeypatch):
        data = make("data", tiny().data, None)
        monkeypatch.setattr(type(data), "pairs", lambda self, split: np.array([[0, 0], [1, 1]]))
        code, out, err = command("validate", "tiny.yaml")
        assert code == 2
        assert "0 rows with a positive" in out
        assert err.endswith("nothing can be learned from these rows\n")
