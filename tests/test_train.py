"""Training: it learns, it says what it does, it stops when it must, and it goes on as if it had never been interrupted."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.utils import set_seed
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from zoo.batches import Kept
from zoo.checkpoint import check_same_run
from zoo.errors import Diverged, Failure, ZooError
from zoo.joints import Phase
from zoo.objectives.pair_infonce import PairInfonce
from zoo.recipe import load_recipe
from zoo.registry import make, register
from zoo.train import make_step, train
from zoo.types import Loss
from zoo.update import Updater

TINY = {
    "name": "notellm2",
    "backbone": {"name": "tiny_lm", "dim": 32, "layers": 1, "heads": 2, "vocab_size": 1024},
    "vision": {"name": "tiny_image", "dim": 32, "layers": 1, "heads": 2, "image_size": 16},
    "connector": "linear",
    "dim": 16,
    "language": "en",
    "train_vision": True,
    "content_length": 24,
}
QFORMER = {"name": "qformer", "num_queries": 2, "layers": 1, "hidden": 32, "heads": 2, "ffn": 32}  # has dropout
DATA = {"name": "planted_notes", "notes": 160, "users": 1000, "image_size": 16, "mine": {"top": 1}}
BATCHES = 4  # an epoch: 80 pairs in batches of 20


@pytest.fixture(scope="module")
def data():
    return make("data", DATA)


def written(out, **overrides):
    plain = {
        "model": TINY,
        "data": DATA,
        "objective": "pair_infonce",
        "optimizer": {"lr": 1e-3},
        "run": {"steps": 6, "batch_size": 20, "device": "cpu", "log_every": 1},
        "out": str(out),
    }
    return load_recipe(plain, **overrides)


@pytest.fixture
def recipe(tmp_path):
    return lambda out="run", **overrides: written(tmp_path / out, **overrides)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The folder of a run that nothing interrupted; one for all tests that compare with it."""
    done = {}

    def go(**overrides):
        if (key := repr(sorted(overrides.items()))) not in done:
            done[key] = written(tmp_path_factory.mktemp("whole") / "run", **overrides)
            train(done[key], loaded=data)
        return done[key].out

    return go


class Killed(Exception):
    pass


@pytest.fixture
def killed(monkeypatch):
    """Train until the loss of the n-th batch is known, and no further."""

    def go(recipe, data, batches):
        seen, check = [], Updater._check_loss

        def counting(self, loss, position):
            if len(seen) == batches:
                raise Killed
            seen.append(position.step)
            check(self, loss, position)

        with monkeypatch.context() as patch:
            patch.setattr(Updater, "_check_loss", counting)
            with pytest.raises(Killed):
                train(recipe, loaded=data)
        return recipe

    return go


def left(folder):
    """All that the last checkpoint of a run holds, and the model."""
    last = max((folder / "checkpoints").glob("step_*"))
    training = torch.load(last / "training.pt", weights_only=True)
    flat = {f"{i}.{k}": v for i, state in training["optimizer"]["state"].items() for k, v in state.items()}
    for i, random in enumerate(training["random"]):
        flat[f"random.{i}"] = random["cpu"]
    position = json.loads((last / "manifest.json").read_text())["position"]
    return position, load_file(last / "step.safetensors") | flat | load_file(folder / "model.safetensors")


def assert_same(one, other):
    (position, tensors), (position_, tensors_) = left(one), left(other)
    assert position == position_
    assert tensors.keys() == tensors_.keys()
    assert [k for k in tensors if not torch.equal(tensors[k], tensors_[k])] == []


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def timeless(folder):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines(folder)]


# What a run does and leaves


def test_learns(recipe, data):
    train(recipe(run__steps=24, optimizer__lr=3e-3, optimizer__decay="constant"), loaded=data)
    losses = [line["loss"] for line in lines(recipe().out)]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])


def test_the_run_folder(recipe, data):
    settings = recipe(run__save_every=2, run__keep=2)
    model = train(settings, loaded=data)
    out = settings.out
    assert {p.name for p in out.iterdir()} == {"recipe.yaml", "log.jsonl", "tensorboard", "checkpoints", "model.json", "model.safetensors"}
    assert [p.name for p in sorted((out / "checkpoints").iterdir())] == ["step_00000004", "step_00000006"]
    assert load_recipe(out / "recipe.yaml") == settings
    assert not model.training
    assert model.backbone.trained
    found = lines(out)
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in found] == [0, 0, 0, 0, 1, 1]
    assert set(found[0]) == {"step", "epoch", "seconds", "lr", "grad_norm", "loss", "loss_note", "loss_visual", "scale"}
    assert found[-1]["lr"] < found[1]["lr"] == 1e-3


def test_tensorboard_reads_along(recipe, data):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(recipe(run__steps=2), loaded=data)
    board = EventAccumulator(str(recipe().out / "tensorboard")).Reload()
    assert {"loss", "lr", "grad_norm"} <= set(board.Tags()["scalars"])
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(x["step"], pytest.approx(x["loss"])) for x in lines(recipe().out)]


def test_the_recipe_is_there_before_the_first_step(recipe, data, killed):
    settings = killed(recipe(), data, 0)
    assert load_recipe(settings.out / "recipe.yaml") == settings
    assert "weight_decay: 0.01" in (settings.out / "recipe.yaml").read_text()  # resolved: with the defaults


def test_epochs_count_the_batches(recipe, data):
    train(recipe(run__steps=None, run__epochs=1.5), loaded=data)
    assert len(lines(recipe().out)) == BATCHES * 1.5
    train(recipe("accumulated", run__steps=None, run__epochs=1.5, run__accumulate=4), loaded=data)
    assert len(lines(recipe("accumulated").out)) == 2  # the last one reaches into the next epoch


def test_the_same_recipe_gives_the_same_weights(recipe, data, whole):
    train(recipe(), loaded=data)
    assert_same(whole(), recipe().out)
    assert timeless(whole()) == timeless(recipe().out)


def test_the_seed_decides(recipe, data):
    for seed in (0, 1):
        train(recipe(str(seed), seed=seed, run__steps=1), loaded=data)
    assert lines(recipe("0").out)[0]["loss"] != lines(recipe("1").out)[0]["loss"]


# Going on


@pytest.mark.parametrize("after", [2, 4, 5], ids=["inside an epoch", "at its end", "in the second one"])
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"run.buckets": False},
        {"model.connector": QFORMER},
        {"model.connector": QFORMER, "run.workers": 2},
        {"model.connector": QFORMER, "run.accumulate": 2},
    ],
    ids=["plain", "no buckets", "dropout", "dropout and workers", "dropout and accumulation"],
)
def test_an_interruption_changes_nothing(recipe, data, whole, killed, overrides, after):
    overrides = {k.replace(".", "__"): v for k, v in overrides.items()}
    accumulate = overrides.get("run__accumulate", 1)
    settings = recipe(run__save_every=1, **overrides)
    killed(settings, data, batches=(after + 1) * accumulate - 1)  # before the last of a step's batches
    train(settings, loaded=data)
    assert_same(whole(**overrides), settings.out)
    assert timeless(whole(**overrides)) == timeless(settings.out)


def test_steps_since_the_last_checkpoint_are_done_again_and_logged_once(recipe, data, whole, killed):
    settings = killed(recipe(model__connector=QFORMER, run__save_every=3), data, batches=5)
    with (settings.out / "log.jsonl").open("a") as log:
        log.write('{"step": 6, "epo')  # killed while it wrote
    train(settings, loaded=data)
    assert_same(whole(model__connector=QFORMER), settings.out)
    assert timeless(whole(model__connector=QFORMER)) == timeless(settings.out)
    assert [line["seconds"] for line in lines(settings.out)] == sorted(line["seconds"] for line in lines(settings.out))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(recipe, data, whole, workers):
    train(recipe(model__connector=QFORMER, run__workers=workers), loaded=data)
    assert_same(whole(model__connector=QFORMER), recipe().out)


@pytest.mark.parametrize("keep", [3, 10_000])
def test_rows_that_are_kept_change_nothing(recipe, data, whole, keep, monkeypatch):
    processed = []
    sample = Kept.__getitem__
    monkeypatch.setattr(Kept, "__getitem__", lambda self, item: processed.append(item in self.kept) or sample(self, item))
    train(recipe(model__connector=QFORMER, run__keep_rows=keep), loaded=data)
    assert any(processed)
    assert not all(processed)
    assert_same(whole(model__connector=QFORMER), recipe().out)


def test_what_does_not_decide_the_weights_may_change(recipe, data, whole, killed):
    settings = killed(recipe(run__save_every=2), data, batches=3)
    train(recipe(run__save_every=3, run__workers=1, run__keep=1, run__log_every=2, evaluate__bootstrap=0), loaded=data)
    assert_same(whole(), settings.out)


def test_a_finished_run_is_not_trained_again(recipe, data, monkeypatch):
    train(recipe(), loaded=data)
    before = left(recipe().out)
    with monkeypatch.context() as patch:
        patch.setattr(Updater, "__call__", None)
        model = train(recipe(), loaded=data)
    assert all(torch.equal(v, before[1][k]) for k, v in model.state_dict().items())
    assert len(lines(recipe().out)) == 6


def test_fresh_starts_over(recipe, data):
    train(recipe(), loaded=data)
    (recipe().out / "metrics.json").write_text("{}")
    (recipe().out / "mine.txt").write_text("the user's own")
    settings = recipe(run__steps=2, optimizer__lr=1e-2)
    train(settings, loaded=data, fresh=True)
    assert [line["step"] for line in lines(settings.out)] == [1, 2]
    assert [p.name for p in (settings.out / "checkpoints").iterdir()] == ["step_00000002"]
    assert len(list((settings.out / "tensorboard").iterdir())) == 1
    assert not (settings.out / "metrics.json").exists()
    assert (settings.out / "mine.txt").exists()


def test_fresh_deletes_nothing_in_a_folder_that_is_no_run(recipe, data):
    settings = recipe(run__steps=1)
    (settings.out / "checkpoints").mkdir(parents=True)
    (settings.out / "checkpoints/mine.txt").write_text("precious")
    with pytest.raises(ZooError, match=r"is no run, for it has no recipe\.yaml, and --fresh would delete what it holds"):
        train(settings, loaded=data, fresh=True)
    assert (settings.out / "checkpoints/mine.txt").read_text() == "precious"


def test_a_folder_that_cannot_be_made(recipe, data):
    with pytest.raises(ZooError, match=r"out: the file /proc/zoo/recipe\.yaml cannot be written \(.*\): write a place that can"):
        train(recipe("/proc/zoo", run__steps=1), loaded=data)


def test_others_may_read_the_weights_as_they_may_read_the_rest(recipe, data):
    out = recipe(run__steps=1).out
    train(recipe(run__steps=1), loaded=data)
    modes = {path.stat().st_mode for path in out.rglob("*") if path.is_file()}
    assert len(modes) == 1


def test_a_model_of_another_recipe_is_not_overwritten(recipe, data):
    train(recipe(run__steps=1), loaded=data)
    shutil.rmtree(recipe().out / "checkpoints")
    with pytest.raises(ZooError, match=r"the model in .* belongs to another run") as e:
        train(recipe(run__steps=1, optimizer__lr=0.5), loaded=data)
    assert "recipe.optimizer.lr: 0.001 there, 0.5 here" in str(e.value)
    train(recipe(run__steps=1), loaded=data)
    train(recipe(run__steps=1, optimizer__lr=0.5), loaded=data, fresh=True)


def test_a_model_that_sees_nothing_is_not_trained(recipe):
    settings = recipe(model__fusion="text_only", data__inputs=["image"])
    with pytest.raises(ZooError, match="this model looks at title, topic, content, and no training row shows any of it"):
        train(settings)
    assert not settings.out.exists()


# Checkpoints that cannot be gone on from


@pytest.fixture
def stopped(recipe, data, killed):
    return killed(recipe(run__save_every=2), data, batches=5)


def test_another_recipe(stopped, recipe, data):
    with pytest.raises(ZooError, match="belongs to another run") as e:
        train(recipe(run__save_every=2, optimizer__lr=0.5, run__batch_size=6), loaded=data)
    assert "recipe.optimizer.lr: 0.001 there, 0.5 here" in str(e.value)
    assert "recipe.run.batch_size: 20 there, 6 here" in str(e.value)
    assert "--fresh" in str(e.value)
    assert "save_every" not in str(e.value)
    assert load_recipe(stopped.out / "recipe.yaml") == stopped  # still the one that belongs to the checkpoint


def test_what_another_number_of_processes_is_told():
    there = {"recipe": {"seed": 0}, "processes": 2}
    with pytest.raises(ZooError) as e:
        check_same_run("checkpoint c", there, there | {"processes": 1})
    assert str(e.value) == (
        "checkpoint c belongs to another run:\n  processes: 2 there, 1 here\nstart it with as many processes as there "
        "(accelerate launch --num_processes 2), write another out=..., or start over with --fresh"
    )
    with pytest.raises(ZooError, match=r"seed: 0 there, 1 here\nwrite another out=\.\.\., or start over with --fresh$"):
        check_same_run("checkpoint c", there, {"recipe": {"seed": 1}, "processes": 1})


def test_other_data(stopped, data):
    class Other:
        fingerprint = "other"

        def __getattr__(self, name):
            return getattr(data, name)

    with pytest.raises(ZooError, match=f"data: '{data.fingerprint}' there, 'other' here"):
        train(stopped, loaded=Other())


def test_another_number_of_processes(stopped, data):
    manifest = stopped.out / "checkpoints/step_00000004/manifest.json"
    manifest.write_text(manifest.read_text().replace('"processes": 1', '"processes": 8'))
    with pytest.raises(ZooError, match="processes: 8 there, 1 here"):
        train(stopped, loaded=data)


@pytest.mark.parametrize("name", ["step.safetensors", "training.pt"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_damaged_checkpoint(stopped, data, name, how):
    file = stopped.out / "checkpoints/step_00000004" / name
    file.write_bytes(file.read_bytes()[:-10])
    if how == "gone":
        file.unlink()
    with pytest.raises(ZooError, match=f"is damaged: {name}") as e:
        train(stopped, loaded=data)
    assert f"remove {file.parent}" in str(e.value)


@pytest.mark.parametrize("text", [None, "", "{}", '{"position": {"step"', "\xff"])
def test_a_checkpoint_without_manifest(stopped, data, text):
    manifest = stopped.out / "checkpoints/step_00000004/manifest.json"
    manifest.unlink()
    if text is not None:
        manifest.write_text(text, encoding="latin-1")
    with pytest.raises(ZooError, match="no readable manifest"):
        train(stopped, loaded=data)


def test_the_advice_for_a_damaged_checkpoint_works(stopped, data, whole):
    shutil.rmtree(stopped.out / "checkpoints/step_00000004")
    train(stopped, loaded=data)
    assert_same(whole(), stopped.out)


def test_what_a_killed_run_left_beside_is_ignored_and_removed(stopped, data):
    beside = stopped.out / "checkpoints/.step_00000006.tmp"
    beside.mkdir()
    (beside / "step.safetensors").write_text("half")
    train(stopped, loaded=data)
    assert [p.name for p in sorted((stopped.out / "checkpoints").iterdir())] == ["step_00000004", "step_00000006"]


def test_what_a_killed_run_left_and_nobody_may_remove(stopped, data, monkeypatch):
    (stopped.out / "checkpoints/.step_00000006.tmp").mkdir()

    def refused(path, *, ignore_errors=False):
        if not ignore_errors:
            raise PermissionError(f"Permission denied: {path.name}")

    monkeypatch.setattr("zoo.checkpoint.shutil.rmtree", refused)
    with pytest.raises(
        Failure, match=r"step_00000006 could not be written \(Permission denied: \.step_00000006\.tmp\); .*step_00000004 stands"
    ):
        train(stopped, loaded=data)


def test_the_name_of_a_checkpoint_is_on_the_disk_when_training_goes_on(recipe, data, monkeypatch):
    synced = []
    monkeypatch.setattr(
        "zoo.checkpoint.sync", lambda path: synced.append((path.name, sorted(p.name for p in recipe().out.rglob("*step_0*"))))
    )
    train(recipe(run__steps=1), loaded=data)
    assert synced[-1] == ("checkpoints", ["step_00000001"])
    assert [name for name, there in synced if there == [".step_00000001.tmp"]] == ["step.safetensors", "training.pt"]


def test_a_checkpoint_of_other_code(stopped, data, monkeypatch):
    """The same recipe, but the objective has grown a parameter since."""

    def grown(self, **given):
        init(self, **given)
        self.more = nn.Parameter(torch.zeros(()))

    init = PairInfonce.__init__
    monkeypatch.setattr(PairInfonce, "__init__", grown)
    with pytest.raises(ZooError, match=r"(?s)written by other code.*objective\.more"):
        train(stopped, loaded=data)


# What moves and what does not


def weights_before(recipe):
    set_seed(recipe.seed)
    return make_step(recipe).model.state_dict()


@pytest.mark.parametrize("prefix", ["vision", "connector", "backbone.model.layers"])
def test_what_is_frozen_moves_by_nothing(recipe, data, prefix):
    settings = recipe(freeze=[prefix], model__connector=QFORMER)
    before, after = weights_before(settings), train(settings, loaded=data).state_dict()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved
    assert not [k for k in moved if k.startswith(prefix)]
    assert {k.partition(".")[0] for k in moved} >= {"vision", "connector", "backbone", "project"} - {prefix}


@pytest.mark.parametrize("frozen", [True, False])
def test_what_is_frozen_does_not_drop_out(recipe, data, frozen, own_registry):
    states = []

    @register("objective", "watching")
    class Watching(PairInfonce):
        def forward(self, model, batch):
            loss = super().forward(model, batch)
            states.extend(m.training for m in model.connector.modules() if isinstance(m, nn.Dropout))
            assert model.backbone.training
            return loss

    train(recipe(objective="watching", model__connector=QFORMER, freeze=["connector"] if frozen else [], run__steps=2), loaded=data)
    assert set(states) == {not frozen}


def test_the_vision_tower_is_frozen_unless_asked_for(recipe, data):
    settings = recipe(model__train_vision=False, run__steps=2)
    before, after = weights_before(settings), train(settings, loaded=data).state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith("vision."))


def test_freezing_what_is_not_there(recipe, data):
    with pytest.raises(ZooError, match=r"freeze: .*'visoin'.*did you mean 'vision'"):
        train(recipe(freeze=["visoin"]), loaded=data)


def test_a_group_of_its_own(recipe, data):
    settings = recipe(optimizer__groups=[{"prefix": "vision", "lr": 0.0}, {"prefix": "objective", "lr": 0.1}])
    before, after = weights_before(settings), train(settings, loaded=data).state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith("vision."))
    scales = [line["scale"] for line in lines(settings.out)]
    assert max(abs(a / b - 1) for a, b in zip(scales[1:], scales, strict=False)) > 0.05
    assert lines(settings.out)[1]["lr"] == 1e-3  # the log shows the optimizer's own


def test_checkpointing_gradients_changes_no_number(recipe, data):
    for on in (False, True):
        train(recipe(str(on), run__gradient_checkpointing=on, run__steps=3), loaded=data)
    for a, b in zip(timeless(recipe("False").out), timeless(recipe("True").out), strict=True):
        assert a == pytest.approx(b, rel=1e-6)


def test_bf16_runs_and_is_near(recipe, data):
    for precision in ("no", "bf16"):
        train(recipe(precision, run__precision=precision, run__steps=3), loaded=data)
    exact, rough = ([line["loss"] for line in lines(recipe(p).out)] for p in ("no", "bf16"))
    assert rough != exact
    assert rough == pytest.approx(exact, rel=0.02)  # 8 bits of mantissa
    assert {v.dtype for v in load_file(recipe("bf16").out / "model.safetensors").values()} == {torch.float32}


def test_precision_of_one_run_does_not_leak_into_the_next(recipe, data, whole):
    expected = whole()
    train(recipe("rough", run__steps=2, run__precision="bf16"), loaded=data)
    train(recipe("second"), loaded=data)
    assert_same(expected, recipe("second").out)


def test_accumulated_batches_are_averaged(recipe, data, own_registry):
    """Two batches accumulated: the gradient is the mean of theirs, and all of it is in one step."""
    seen = []

    @register("objective", "counting")
    class Counting(PairInfonce):
        def forward(self, model, batch):
            loss = super().forward(model, batch)
            seen.append(float(loss.total.detach()))
            return loss

    train(recipe(objective="counting", run__accumulate=3, run__steps=2), loaded=data)
    assert len(seen) == 6
    assert [line["loss"] for line in lines(recipe().out)] == pytest.approx([sum(seen[:3]) / 3, sum(seen[3:]) / 3])


# What stops a run


def test_pairs_that_fill_no_batch(recipe, data):
    with pytest.raises(ZooError, match=r"run.batch_size: \d+ training pairs do not fill one batch of 5000"):
        train(recipe(run__batch_size=5000), loaded=data)


def test_a_device_that_is_not_there(recipe, data):
    wanted = "mps" if torch.cuda.is_available() else "cuda"
    with pytest.raises(ZooError, match=rf"run.device: this machine trains on '.*', not on '{wanted}'"):
        train(recipe(run__device=wanted), loaded=data)


def test_fp16_on_a_cpu(recipe, data):
    with pytest.raises(ZooError, match="fp16 needs a GPU: write bf16"):
        train(recipe(run__precision="fp16"), loaded=data)


@pytest.mark.parametrize("what", ["the loss", "the gradient"])
def test_numbers_that_are_none_stop_the_run(recipe, data, own_registry, what):
    calls = []

    @register("objective", "souring")
    class Souring(PairInfonce):
        def forward(self, model, batch):
            loss = super().forward(model, batch)
            calls.append(1)
            if len(calls) < 6:
                return loss
            bad = loss.total * torch.nan if what == "the loss" else loss.total + (self.log_scale * 0).sqrt()  # 0, of infinite slope
            return loss._replace(total=bad)

    settings = recipe(objective="souring", run__save_every=2)
    with pytest.raises(ZooError, match=f"{what} is nan in step 6") as e:
        train(settings, loaded=data)
    assert "epoch 1, batch 1" in str(e.value)
    assert ("loss_note" if what == "the loss" else "objective.log_scale") in str(e.value)
    assert str(e.value).endswith(
        "start over with a lower optimizer.lr, a longer warmup, or precision: bf16 in place of fp16; "
        f"step 5, the last whole one, is saved in {settings.out / 'checkpoints'}"
    )
    assert [p.name for p in sorted((settings.out / "checkpoints").iterdir())] == ["step_00000004", "step_00000005"]
    assert [line["step"] for line in lines(settings.out)] == [1, 2, 3, 4, 5]
    assert not (settings.out / "model.json").exists()


@pytest.mark.parametrize("save_every", [0, 1])
@pytest.mark.parametrize("what", ["the loss", "the gradient"])
def test_after_numbers_that_were_none_a_mended_run_goes_on_as_if_they_had_not_been(recipe, data, own_registry, what, save_every):
    sour = []

    @register("objective", "counting")
    class Counting(PairInfonce):
        """Counts in a buffer, as a batch norm does, and draws."""

        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, model, batch):
            self.seen += 1
            loss = super().forward(model, batch)
            loss = loss._replace(total=loss.total * (1 + 0.01 * self.seen * torch.rand(())))
            if len(sour) == 1 and self.seen == 8:  # the second batch of the fourth step
                sour.append(1)
                return loss._replace(total=loss.total * torch.nan if what == "the loss" else loss.total + (self.log_scale * 0).sqrt())
            return loss

    overrides = {"objective": "counting", "run__accumulate": 2, "run__save_every": save_every}
    train(recipe("whole", **overrides), loaded=data)
    sour.append(1)
    with pytest.raises(Diverged, match="is nan in step 4"):
        train(recipe("parts", **overrides), loaded=data)
    assert [p.name for p in sorted((recipe("parts").out / "checkpoints").iterdir())][-1] == "step_00000003"
    train(recipe("parts", **overrides), loaded=data)
    assert_same(recipe("whole").out, recipe("parts").out)


def test_numbers_that_are_none_in_the_first_step(recipe, data):
    with pytest.raises(Diverged, match="no step before it, so nothing is saved"):
        train(recipe(objective={"name": "pair_infonce", "log_scale": 1000.0}), loaded=data)


# Schedules and objectives with a say in the update


class Alternating(nn.Module):
    """Two phases a batch; writes down what is called when."""

    multi_phase = True

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def phases(self, batch):
        self.calls.append("phases")
        for name in ("a", "b"):
            yield Phase(name, batch)

    def before_step(self, model, phase, loss):
        assert bool(loss.total.isfinite())
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        assert 0 < norm <= 0.01 * 1.0001  # clipped already
        self.calls.append(f"before {phase.name}")

    def after_step(self, model, phase, previous, loss):
        assert bool(loss.total.isfinite())
        assert previous.keys() == {"project.weight"}
        assert not torch.equal(previous["project.weight"], model.project.weight)
        assert model.project.weight.grad is not None
        self.calls.append(f"after {phase.name}")

    def watched(self, model):
        return {"project.weight": model.project.weight}


class Merging(Alternating):
    """One update of both phases."""

    def merge(self, gradients):
        self.calls.append(f"merge {'+'.join(gradients)}")
        return {name: (gradients["a"][name] + gradients["b"][name]) / 2 for name in gradients["a"]}


@pytest.fixture
def calls(own_registry):
    found = []

    @register("fusion", "alternating", joints=("schedule",))
    def alternating(names, dim, classes):
        return Alternating(found)

    @register("fusion", "merging", joints=("schedule",))
    def merging(names, dim, classes):
        return Merging(found)

    @register("objective", "stepping")
    class Stepper(PairInfonce):
        def bind(self, model):
            super().bind(model)
            found.append("bind")

        def forward(self, model, batch):
            assert not any(p.grad is not None for p in model.parameters()) or "accumulate" in found
            found.append("forward")
            loss = super().forward(model, batch)
            return Loss(loss.total, loss.parts, state=found.count("forward"))

        def before_step(self, model):
            found.append("objective before")

        def after_step(self, model, state):
            found.append(f"objective after {state}")

    return found


def scheduled(recipe, name, **overrides):
    return recipe(name, model__fusion=["early", name], objective="stepping", optimizer__max_grad_norm=0.01, **overrides)


def test_a_schedule_of_two_phases(recipe, data, calls):
    train(scheduled(recipe, "alternating", run__steps=2), loaded=data)
    batch = "phases, forward, before a, objective before, after a, objective after {}, "
    batch += "forward, before b, objective before, after b, objective after {}"
    assert ", ".join(calls) == ", ".join(["bind", batch.format(1, 2), batch.format(3, 4)])
    first = lines(recipe("alternating").out)[0]
    assert {"a/loss", "b/loss", "a/scale", "b/scale", "grad_norm"} <= set(first)
    assert first["grad_norm"] > 0.01  # as it was before clipping
    assert first["a/loss"] != first["b/loss"]  # the weights moved between


def test_a_schedule_that_merges(recipe, data, calls):
    train(scheduled(recipe, "merging", run__steps=1), loaded=data)
    assert ", ".join(calls) == "bind, phases, forward, forward, merge a+b, before b, objective before, after b, objective after 2"
    first = lines(recipe("merging").out)[0]
    assert first["a/loss"] == first["b/loss"]


def test_merging_equal_gradients_is_ordinary_training(recipe, data, calls):
    train(scheduled(recipe, "merging"), loaded=data)
    train(recipe("joint", model__fusion=["early"], optimizer__max_grad_norm=0.01), loaded=data)
    merged, joint = (load_file(recipe(out).out / "model.safetensors") for out in ("merging", "joint"))
    assert all(torch.equal(merged[k], joint[k]) for k in joint)


@pytest.mark.parametrize("name", ["alternating", "merging"])
def test_several_phases_refuse_accumulation(recipe, data, calls, name):
    with pytest.raises(ZooError, match=r"run.accumulate: 2 .* write 1"):
        train(scheduled(recipe, name, run__accumulate=2), loaded=data)


def test_an_objective_steps_once_for_all_accumulated_batches(recipe, data, calls):
    calls.append("accumulate")
    train(recipe(objective="stepping", run__accumulate=3, run__steps=2), loaded=data)
    step = ["forward"] * 3 + ["objective before", "objective after {}"]
    assert calls == ["accumulate", "bind", *[c.format(3) for c in step], *[c.format(6) for c in step]]


def test_an_objective_that_does_not_fit_is_refused_before_the_first_step(recipe, data):
    with pytest.raises(ZooError, match=r"pair_infonce.on: .*'nota'"):
        train(recipe(objective={"name": "pair_infonce", "on": {"nota": 1.0}}), loaded=data)
    assert not (Path(recipe().out) / "log.jsonl").exists()


def test_buffers_of_an_objective_are_resumed(recipe, data, killed, own_registry):
    @register("objective", "queueing")
    class Queueing(PairInfonce):
        def __init__(self):
            super().__init__()
            self.register_buffer("queue", torch.zeros(16))

        def forward(self, model, batch):
            loss = super().forward(model, batch)
            return loss._replace(total=loss.total + F.mse_loss(self.queue, torch.ones(16)), state=loss.total.detach())

        def before_step(self, model):
            pass

        def after_step(self, model, state):
            self.queue.mul_(0.5).add_(state)

    train(recipe("whole", objective="queueing"), loaded=data)
    train(killed(recipe("parts", objective="queueing", run__save_every=2), data, batches=3), loaded=data)
    assert_same(recipe("whole").out, recipe("parts").out)
    assert "queue" not in load_file(recipe("parts").out / "model.safetensors")
