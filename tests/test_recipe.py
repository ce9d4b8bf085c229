"""Recipes: what a file may say, and what is said of a file that says something else."""

from pathlib import Path

import pytest
import yaml

import zoo
from zoo.config import FusionSpec, ModelSpec, Positive
from zoo.errors import ZooError
from zoo.recipe import Recipe, arm, build_from, dump, load_recipe, recipes
from zoo.registry import register
from zoo.sections import Evaluate, Group, Headline, Optimizer, Run

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("_parts")
SHIPPED = sorted((ROOT / "recipes").rglob("*.yaml"))
SMALL = {"model": "fake_model", "data": "fake_data", "objective": "fake_loss"}


@pytest.fixture
def _parts(own_registry):
    class Built:
        def __init__(self, **settings):
            self.settings = settings

    def fake_model(*, dim: Positive = 4, inner: ModelSpec = "fake_model", fusion: FusionSpec = "fake_gate"):
        return Built(dim=dim, inner=inner)

    def fake_data(root, *, on: str = "all", since: str = "", noise: float = 0.0): ...

    def fake_loss(*, scale: float = 3.0, on: dict[str, float] | None = None): ...

    def fake_gate(names, dim, *, bias: bool = False): ...

    register("model", "fake_model", joints={"combine": "fake_gate"})(fake_model)
    register("data", "fake_data")(fake_data)
    register("objective", "fake_loss")(fake_loss)
    register("fusion", "fake_gate", joints=("combine",))(fake_gate)
    register("fusion", "fake_sum", joints=("combine",))(fake_gate)
    register("fusion", "fake_order", joints=("arrange",))(lambda: None)


@pytest.fixture
def file(tmp_path):
    """Write a recipe, give its path."""

    def write(text, name="recipe.yaml"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


def message(recipe, *overrides, **keywords):
    with pytest.raises(ZooError) as e:
        load_recipe(recipe, *overrides, **keywords)
    return str(e.value)


class TestValues:
    def test_defaults(self):
        recipe = load_recipe(SMALL)
        assert recipe == Recipe(model={"name": "fake_model"}, data={"name": "fake_data"}, objective={"name": "fake_loss"})
        assert (recipe.optimizer, recipe.run, recipe.evaluate) == (Optimizer(), Run(), Evaluate())

    def test_sections(self, file):
        recipe = load_recipe(
            file(
                "model: {name: fake_model, dim: 8}\ndata: fake_data\nobjective: fake_loss\n"
                "optimizer:\n  lr: 1e-3\n  groups: [{prefix: model.vision, lr: 0}]\n"
                "run: {steps: 5, precision: bf16}\nevaluate: {k: [1, 5], main: {k: 5}}\nfloor: {recall@5: 0.2}\n"
                "freeze: [model.vision]\nbaselines: {BM25: bm25, wide: {model.dim: 16}}\nseed: 3\nout: runs/x\n"
            )
        )
        assert recipe.model == {"name": "fake_model", "dim": 8}
        assert recipe.optimizer == Optimizer(lr=1e-3, groups=(Group(prefix="model.vision", lr=0.0),))
        assert recipe.run == Run(steps=5, precision="bf16")
        assert recipe.evaluate == Evaluate(k=(1, 5), main=Headline(k=5))
        assert (recipe.floor, recipe.freeze, recipe.seed, recipe.out) == ({"recall@5": 0.2}, ("model.vision",), 3, Path("runs/x"))
        assert recipe.baselines == {"BM25": "bm25", "wide": {"model.dim": 16}}

    def test_an_empty_section_means_its_defaults(self, file):
        assert load_recipe(file("model: fake_model\ndata: fake_data\nobjective: fake_loss\nrun:\n")).run == Run()

    def test_words_stay_words_and_numbers_are_numbers(self, file):
        recipe = load_recipe(
            file(
                "model: fake_model\ndata: {name: fake_data, on: off, since: 2024-03-01, noise: 1e-4}\n"
                "objective: {name: fake_loss, on: {note: 9}}\nrun: {precision: no, device: 010}\n"
            )
        )
        assert recipe.data == {"name": "fake_data", "on": "off", "since": "2024-03-01", "noise": 1e-4}
        assert recipe.objective["on"] == {"note": 9}
        assert (recipe.run.precision, recipe.run.device) == ("no", "010")

    def test_the_given_mapping_stays_as_it_was(self):
        given = {**SMALL, "optimizer": {"lr": 1.0}}
        load_recipe(given, "optimizer.lr=2", "model.dim=3")
        assert given == {**SMALL, "optimizer": {"lr": 1.0}}


class TestOverrides:
    def test_in_the_place_of_the_value(self):
        recipe = load_recipe(SMALL, "optimizer.lr=3e-5", "run.steps=7", "evaluate.k=[10]", "seed=2")
        assert (recipe.optimizer.lr, recipe.run.steps, recipe.evaluate.k, recipe.seed) == (3e-5, 7, (10,), 2)

    def test_a_mapping_is_replaced(self):
        recipe = load_recipe(
            {**SMALL, "model": {"name": "fake_model", "inner": {"name": "fake_model", "dim": 2}}}, "model.inner=fake_model"
        )
        assert recipe.model["inner"] == "fake_model"

    def test_inside_a_part_written_as_a_plain_name(self):
        recipe = load_recipe({**SMALL, "model": {"name": "fake_model", "inner": "fake_model"}}, "model.inner.dim=2", "objective.scale=1")
        assert recipe.model["inner"] == {"name": "fake_model", "dim": 2}
        assert recipe.objective == {"name": "fake_loss", "scale": 1}

    def test_inside_a_list(self):
        recipe = load_recipe({**SMALL, "model": {"name": "fake_model", "fusion": ["fake_gate"]}}, "model.fusion.0.bias=true")
        assert recipe.model["fusion"] == [{"name": "fake_gate", "bias": True}]

    def test_the_last_one_wins(self):
        assert load_recipe(SMALL, "run.steps=1", "run.steps=2").run.steps == 2

    def test_keywords_from_python(self):
        recipe = load_recipe(SMALL, run__steps=4, optimizer={"lr": 0.5}, out=Path("x"))
        assert (recipe.run.steps, recipe.optimizer.lr, recipe.out) == (4, 0.5, Path("x"))

    def test_a_recipe_may_be_changed(self):
        assert load_recipe(load_recipe(SMALL, "seed=1"), "run.steps=2") == load_recipe(SMALL, "seed=1", "run.steps=2")

    @pytest.mark.parametrize(
        "override, says",
        [
            ("optimizer.lr", "override 'optimizer.lr': write key=value"),
            ("run.steps=[1", "override 'run.steps=[1': column 3: not readable as YAML"),
            ("optimizer.lrr=1", "override 'optimizer.lrr=1': optimizer.lrr: no keyword named 'lrr'; did you mean 'lr'?"),
            ("run.steps=fast", "override 'run.steps=fast': run.steps: 'fast': input should be a valid integer"),
            ("seed.x=1", "override 'seed.x=1': seed.x: seed holds no settings"),
            ("model.fusion.3.bias=1", "override 'model.fusion.3.bias=1': model.fusion.3.bias: model.fusion.3 holds no settings"),
            ("model.fusion.3=a", "override 'model.fusion.3=a': model.fusion.3: model.fusion has no entry 3"),
            ("modell.dim=1", "override 'modell.dim=1': modell: no keyword named 'modell'; did you mean 'model'?"),
        ],
    )
    def test_faults_name_the_override(self, override, says):
        given = {**SMALL, "seed": 1, "model": {"name": "fake_model", "fusion": ["fake_gate"]}}
        assert says in message(given, override)

    def test_an_override_takes_the_line_of_the_file_away(self, file):
        path = file("model: fake_model\ndata: fake_data\nobjective: fake_loss\nseed: x\n")
        assert message(path).startswith(f"{path}:4: seed: 'x'")
        assert message(path, "seed=y").startswith("override 'seed=y': seed: 'y'")
        assert load_recipe(path, "seed=1").seed == 1
        inside = file("model: fake_model\ndata: fake_data\nobjective: fake_loss\nrun:\n  steps: 3\n")
        assert message(inside, "run={steps: x}").startswith("override 'run={steps: x}': run.steps: 'x'")


BAD = """\
model:
  name: fake_model
  dimm: 3
data: {name: fake_daat}
optimizer:
  learning_rate: 1e-4
  groups:
    - {prefix: model, lr: -1}
    - {prefx: model}
  lr: 3
  lr: 4
run: {precision: fp8, steps: -1}
evaluate: {main: {k: 7}, protocols: [multi]}
baselines:
  classic: bm52
  late: {model.fusoin: x, optimizer.lr: fast}
  a/b: {}
floor: {recall@11: 0.2, recall@10: 2}
qqq: 1
"""


class TestFaults:
    def test_all_at_once_with_file_line_and_key(self, file):
        path = file(BAD)
        first, *lines = message(path).splitlines()
        expected = [
            ":", "'objective' is missing",
            ":3: model.dimm: no keyword named 'dimm'; did you mean 'dim'? (have: dim, fusion, inner)",
            ":4: data: no data named 'fake_daat'; did you mean 'fake_data'?",
            ":6: optimizer.learning_rate: no keyword named 'learning_rate'; did you mean 'lr'?",
            ":8: optimizer.groups.0.lr: -1: input should be greater than or equal to 0",
            ":9: optimizer.groups.1.prefx: no keyword named 'prefx'; did you mean 'prefix'?",
            ":9: optimizer.groups.1: 'prefix' is missing",
            ":11: optimizer.lr: written twice, on line 10 too: keep one",
            ":12: run.precision: 'fp8': input should be 'no', 'bf16' or 'fp16'",
            ":12: run.steps: -1: input should be greater than or equal to 0",
            ":13: evaluate.main.protocol: no protocol of this recipe named 'one_target' (have: multi)",
            ":13: evaluate.main.k: 7 is none of evaluate.k, [10, 100]",
            ":15: baselines.classic: 'bm52': input should be 'bm25' or 'popularity'",
            ":16: baselines.late.model.fusoin: no keyword named 'fusoin'; did you mean 'fusion'?",
            ":16: baselines.late.optimizer.lr: 'fast': input should be a valid number",
            ":17: baselines.a/b: 'a/b' names a folder of the run: write a word, without a slash",
            ":18: floor.recall@10: 2: input should be less than or equal to 1",
            ":18: floor.recall@11: no metric named 'recall@11'; did you mean 'recall@10'? (have: accuracy, recall@10, recall@100, soft",
            ":19: qqq: no keyword named 'qqq' (have: adapters, baselines, classify, data, evaluate,",
        ]  # fmt: skip
        assert first == f"{path}: {len(lines)} faults"
        for says in expected:
            assert any(line.startswith(str(path)) and says in line for line in lines), (says, lines)
        assert len(lines) == len(expected) - 1

    @pytest.mark.parametrize(
        "text, says",
        [
            ("model: [a\nb: c", ":2: column 2: not readable as YAML: expected ',' or ']'"),
            ("a: 1\n\tb: 2", ":2: column 1: not readable as YAML: found character '\\t'"),
            ("a: 1\n---\nb: 2", "not readable as YAML: but found another document"),
            ("a: \x00", "not readable as YAML: unacceptable character"),
            ("", ": a recipe is a mapping with the keys model, data, objective, optimizer"),
            ("# nothing", ": a recipe is a mapping with the keys"),
            ("- model", ": a recipe is a mapping with the keys"),
            ("model", ": a recipe is a mapping with the keys"),
            ("model: !!python/object/apply:os.system [ls]", ":1: model: "),
            ("seed: !!int x", ":1: seed: 'x' has the tag 'tag:yaml.org,2002:int': write a plain"),
            ("seed: !mine x", ":1: seed: 'x' has the tag '!mine': write a plain number, word, list or mapping"),
            ("run: &a {steps: 1}\nevaluate: *a", ":2: evaluate: an alias (*name) stands here: write the value out"),
            ("run: &a {steps: 1}\nevaluate:\n  <<: *a", ":3: evaluate.<<: an alias (*name) stands here"),
            ("run: &a\n  b: *a", "an alias (*name) stands here"),
            ("? [a]\n: 1\nmodel: x", "line 1: a key is a word, not a list or a mapping"),
            ("run: 3", ":1: run: 3: write a mapping, of steps, epochs, batch_size, shows"),
            ("model: {dim: 3}", ":1: model: {'dim': 3} names no part: write a name, or a mapping with 'name'"),
            ("run: {epochs: null}", ":1: run: neither 'steps' nor 'epochs': write one of them"),
            ("model: {name: fake_model, fusion: fake_order}", "acts at the joint 'arrange', which model 'fake_model' does not have"),
            (
                "model: {name: fake_model, fusion: [fake_gate, fake_sum]}",
                "fusions 'fake_gate' and 'fake_sum' both fill the joint 'combine'",
            ),
        ],
    )
    def test_one_by_one(self, file, text, says):
        path = file(text)
        assert says in message(path)
        assert str(path) in message(path)

    def test_no_such_recipe(self):
        said = message("demoo")
        assert said.startswith("no such file, and no shipped recipe named 'demoo'; did you mean 'demo'?")

    def test_what_is_there_and_no_file(self, tmp_path):
        assert message(tmp_path).startswith(f"{tmp_path} is a folder, and no shipped recipe named ")
        assert message("/dev/null").startswith("/dev/null is no regular file, and no shipped recipe named '/dev/null'")

    @pytest.mark.parametrize("below", ["", "/runs/a"])
    def test_the_run_folder_is_a_file(self, tmp_path, below):
        (tmp_path / "file").touch()
        assert message({**SMALL, "out": f"{tmp_path}/file{below}"}) == f"recipe: out: {tmp_path}/file is a file; write a folder"

    def test_an_override_of_nothing(self):
        assert "override 'run.steps=': nothing stands after the sign: for no value write run.steps=null" in message(SMALL, "run.steps=")

    @pytest.mark.parametrize("written", ["nan", ".nan", "inf", ".inf", "-.inf"])
    @pytest.mark.parametrize("key", ["optimizer.lr", "optimizer.eps"])
    def test_a_number_that_is_none(self, key, written):
        assert message(SMALL, f"{key}={written}").endswith(": write a finite number")

    def test_another_k_needs_another_floor(self):
        said = message({**SMALL, "floor": {"recall@10": 0.2}}, "evaluate.k=[1]", "evaluate.main.k=1")
        assert said.startswith("recipe: floor.recall@10: no metric named 'recall@10'")
        assert said.endswith('(have: accuracy, recall@1, soft_accuracy), or write "floor={}" for none')

    def test_not_a_text_file(self, tmp_path):
        (tmp_path / "r.yaml").write_bytes(b"model: \xff")
        assert message(tmp_path / "r.yaml") == f"{tmp_path}/r.yaml: not a text file: byte 7 is not UTF-8"

    def test_from_a_mapping(self):
        assert message({**SMALL, "sed": 1}).startswith("recipe: sed: no keyword named 'sed'; did you mean 'seed'?")

    def test_an_arm_does_not_repeat_the_faults_of_its_recipe(self):
        assert message({**SMALL, "seed": -1, "baselines": {"x": {"model.dim": 2}}}).count("seed") == 1

    @pytest.mark.parametrize("name", ["", ".", "..", "../x"])
    def test_an_arm_that_is_no_folder_of_the_run(self, name):
        assert f"{name!r} names a folder of the run: write a word, without a slash" in message(
            {**SMALL, "baselines": {name: {"model.dim": 2}}}
        )

    def test_an_arm_that_does_not_fit(self):
        said = message({**SMALL, "baselines": {"x": {"model.fusion": "fake_order", "seed.x": 1}}}, "seed=1")
        assert "baselines.x.model.fusion: fusion 'fake_order' acts at the joint 'arrange'" in said
        assert "baselines.x.seed.x: seed holds no settings" in said


WITH_ARMS = {
    **SMALL,
    "baselines": {"classic": "bm25", "wide": {"model.dim": 16, "run.steps": 3}},
    "floor": {"recall@10": 0.1},
    "out": "runs/a",
}


class TestArms:
    def test_an_arm_is_the_recipe_under_its_overrides(self):
        base = load_recipe(WITH_ARMS)
        wide = arm(base, "wide")
        assert wide == load_recipe({**SMALL, "model": {"name": "fake_model", "dim": 16}, "run": {"steps": 3}, "out": "runs/a/arms/wide"})
        assert arm(load_recipe(WITH_ARMS, "seed=5"), "wide").seed == 5

    def test_an_arm_may_choose_its_folder(self):
        assert arm(load_recipe({**SMALL, "baselines": {"x": {"out": "elsewhere"}}}), "x").out == Path("elsewhere")

    @pytest.mark.parametrize("name", ["classic", "wied"])
    def test_what_is_no_trained_arm(self, name):
        with pytest.raises(ZooError, match=rf"no trained baseline named '{name}'.*\(have: wide\)"):
            arm(load_recipe(WITH_ARMS), name)


class TestDump:
    @pytest.mark.parametrize(
        "more",
        [
            {},
            {"data": {"name": "fake_data", "on": "no", "since": "1e-4", "noise": 1e-30}},
            {"data": {"name": "fake_data", "on": "2024-01-01", "since": "数据: x # y"}},
            {"optimizer": {"groups": [{"prefix": "a", "lr": 1e-5}], "betas": [0.5, 0.9]}, "run": {"steps": 3, "epochs": None}},
            {"baselines": {"a b": "popularity", "c": {"model.fusion": ["fake_gate"]}}, "floor": {"recall@100": 0.5}, "freeze": ["x"]},
        ],
    )
    def test_loads_back_equal(self, file, more):
        recipe = load_recipe({**SMALL, **more})
        assert load_recipe(file(dump(recipe))) == recipe

    def test_writes_the_defaults_out(self):
        written = yaml.safe_load(dump(load_recipe(SMALL)))
        assert list(written) == list(Recipe.__dataclass_fields__)
        assert written["optimizer"]["betas"] == [0.9, 0.999]
        assert written["out"] == "runs/unnamed"


class TestShipped:
    def test_they_were_found(self):
        assert {"demo", "notellm2/retail", "notellm2/mqwen_base", "notellm2/mtomato_base", "notellm2/mqwen_bigg"} <= set(recipes())
        assert recipes() == sorted(f.relative_to(ROOT / "recipes").with_suffix("").as_posix() for f in SHIPPED)

    @pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
    def test_every_one_loads_by_path_and_by_name_and_back(self, file, path):
        recipe = load_recipe(path)
        assert recipe == load_recipe(path.relative_to(ROOT / "recipes").with_suffix("").as_posix())
        assert load_recipe(file(dump(recipe))) == recipe
        for name, baseline in recipe.baselines.items():
            assert isinstance(baseline, str) or arm(recipe, name).model

    def test_a_file_of_that_name_comes_first(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "demo").write_text(dump(load_recipe(SMALL, "seed=77")))
        assert load_recipe("demo").seed == 77

    def test_build_from(self, file):
        path = file("model: {name: fake_model, dim: 9}\ndata: fake_data\nobjective: fake_loss\n")
        assert build_from(str(path)).settings["dim"] == 9
        assert zoo.build_from(str(path), dim=2).spec == {"name": "fake_model", "dim": 2}
        with pytest.raises(ZooError, match="no keyword named 'dimm'"):
            build_from(str(path), dimm=2)
