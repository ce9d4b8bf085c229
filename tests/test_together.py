"""Several objectives over one pass, with a momentum twin: sums, refusals, checkpoints, chunks, processes."""

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed as dist

from tests.picture_text_model import Small, batch_of, stepped
from tests.test_captioned_batches import TINY, colours
from zoo import ZooError, gradcache, make
from zoo.batches import CaptionedRows
from zoo.checkpoint import Position, checkpoints, load_checkpoint, random_state, save_checkpoint
from zoo.collate import stack
from zoo.optimizer import make_optimizer
from zoo.recipe import Recipe, load_recipe
from zoo.registry import build, register
from zoo.sections import Group, Optimizer
from zoo.train import make_step, train
from zoo.types import Batch, CaptionedData
from zoo.update import Step
from zoo.validate import validate

EXACT = {"rtol": 1e-8, "atol": 1e-10}  # float64
ROWS = 4
ALBEF = [{"name": "itc", "temperature": "raw", "queue": 8, "alpha": 0.4, "ramp": 4}, "itm", {"name": "mlm", "alpha": 0.4, "rate": 0.5}]


def together(of=ALBEF, momentum=0.9, **settings):
    return make("objective", {"name": "together", "of": of, "momentum": momentum, **settings})


class TestSum:
    def test_weights_and_parts(self):
        model, batch = Small().double(), batch_of(ROWS)
        of = ["itc", "itm", {"name": "mlm", "rate": 0.5}, "lm"]
        found = []
        for weights in (None, [1, 2, 0.5, 3]):
            objective = together(of, None, weights=weights)
            objective.bind(model)
            torch.manual_seed(1)
            found.append(objective(model, batch))
        names = ("itc", "itm", "mlm", "lm")
        torch.testing.assert_close(found[0].total, sum(found[0].parts[f"loss_{name}"] for name in names), **EXACT)
        torch.testing.assert_close(
            found[1].total, sum(w * found[0].parts[f"loss_{name}"] for name, w in zip(names, (1, 2, 0.5, 3), strict=True)), **EXACT
        )
        assert {*found[0].parts} == {*(f"loss_{name}" for name in names), "itc_scale", "itm_matched", "mlm_filled"}
        assert not any(part.requires_grad for part in found[0].parts.values())

    def test_each_is_what_it_is_alone(self):
        model, batch = Small().double(), batch_of(ROWS)
        objective = together(["itc", "lm"], None)
        parts = objective(model, batch).parts
        for name in ("itc", "lm"):
            torch.testing.assert_close(parts[f"loss_{name}"], make("objective", name)(model, batch).total, **EXACT)

    def test_one_pass_of_the_model_and_one_of_the_twin(self):
        model = Small().double()
        objective = together()
        objective.bind(model)
        objective(model, batch_of(ROWS))
        assert model.calls == ["forward", "look", "read", "match", "unmask"]
        assert objective.twin.model.calls == ["forward", "look", "read", "unmask"]

    def test_two_of_a_kind(self):
        objective = together(["itc", {"name": "itc", "temperature": "fixed", "start": 1.0}], None)
        loss = objective(Small().double(), batch_of(ROWS))
        assert {"loss_itc", "loss_itc_2", "itc_scale", "itc_2_scale"} == {*loss.parts}
        assert loss.parts["itc_2_scale"] == 1


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "says"),
        [
            ({"of": []}, r"together\.of: no objective stands there"),
            ({"of": ["itc", "siglip"]}, "siglip cannot share a forward pass with others: write itc, itm, mlm, lm or mdm"),
            ({"of": ["itm", "itc"]}, "itm draws its negatives by what itc finds alike: write itc before it"),
            ({"of": ["itc"], "weights": [1, 2]}, r"together\.weights: \[1\.0, 2\.0\] for itc: write a number above 0 for each"),
            ({"of": ["itc"], "weights": [0]}, "leave out what shall not count"),
            ({"of": [{"name": "itc", "queue": 8}]}, r"together\.momentum: itc learns from a momentum twin: write 0\.995"),
            ({"of": ["itc", {"name": "mlm", "alpha": 0.4}]}, r"together\.momentum: mlm learns from a momentum twin"),
            (
                {"of": ["itc", {"name": "itm", "negativs": "uniform"}]},
                r"of\.1\.negativs: no keyword named 'negativs'; did you mean 'negatives'",
            ),
            ({"of": ["itc", {"name": "itc", "alpha": 3}]}, r"of\.1\.alpha: 3"),
            ({"of": ["itcc"]}, r"of\.0: .*'itcc'; did you mean 'itc'"),
            ({"of": "itc"}, "of: 'itc'"),
            ({"of": ["itc"], "momentum": 1.5}, "momentum: 1.5"),
        ],
    )
    def test_settings(self, settings, says):
        with pytest.raises(ZooError, match=says):
            make("objective", {"name": "together", **settings})

    def test_a_model_that_lacks_an_ability(self):
        model = Small()
        with pytest.raises(ZooError, match="itm asks the model"):
            together(["itc", "itm"], None).bind(type("Dual", (torch.nn.Module,), {"outputs": ("image", "text"), "dim": 6})())
        together(["itc", "itm"], None).bind(model)

    def test_a_twin_that_was_never_made(self):
        with pytest.raises(ZooError, match="call bind"):
            together()(Small().double(), batch_of(ROWS))


class TestState:
    def made(self, seed=3):
        torch.manual_seed(seed)
        model = Small(dropout=0.1).double().train()
        objective = together().double()
        objective.bind(model)
        step = Step(model, objective.double())
        return step, make_optimizer(step, Optimizer(lr=0.01, groups=(Group(prefix="objective", lr=0.001),)))

    def run(self, step, optimizer, steps):
        return [stepped(step.objective, step.model, batch_of(ROWS, n, ids=torch.arange(ROWS) + n), optimizer).total.item() for n in steps]

    def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(self, tmp_path):
        whole, optimizer = self.made()
        torch.manual_seed(4)
        losses = self.run(whole, optimizer, range(5))
        parts, optimizer = self.made()
        torch.manual_seed(4)
        self.run(parts, optimizer, range(3))
        path = save_checkpoint(tmp_path, parts.state_dict(), optimizer.state_dict(), Position(3, 0, 3), {}, [random_state()], keep=1)
        resumed, optimizer = self.made(seed=9)
        load_checkpoint(path, resumed, optimizer, {})
        assert self.run(resumed, optimizer, (3, 4)) == losses[3:]
        for name, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), name
        kept = {name.removeprefix("objective.") for name in whole.state_dict() if name.startswith("objective.")}
        assert {"of.0.queues.1.features", "of.0.queues.1.ids", "of.0.queues.0.pointer", "of.0.temperature.raw", "of.0.soft.steps"} <= kept
        assert {"twin.model.vision.weight", "twin.model.average", "twin.model.passes", "of.2.soft.steps"} <= kept

    def test_the_twin_is_not_trained_and_not_of_the_model(self):
        step, optimizer = self.made()
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert not any(id(p) in trained for p in step.objective.twin.parameters())
        assert {id(p) for p in step.model.parameters()} < trained
        assert not any("twin" in name for name in step.model.state_dict())

    def test_each_step_moves_it_once_after_the_optimizer(self):
        step, optimizer = self.made()
        expected = {name: p.clone() for name, p in step.model.named_parameters()}
        for n in range(3):
            self.run(step, optimizer, [n])
            for name, p in step.model.named_parameters():
                expected[name] = 0.9 * expected[name] + 0.1 * p
        for name, p in step.objective.twin.model.named_parameters():
            torch.testing.assert_close(p, expected[name], **EXACT)

    def test_weights_that_are_spread_are_refused_before_they_move(self, tmp_path):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
        try:
            model = Small()
            objective = together(["itc"])
            objective.bind(model)
            fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
            with pytest.raises(ZooError, match=r"run\.shard: a momentum twin does not follow"):
                objective.before_step(model)
        finally:
            dist.destroy_process_group()


class TestChunks:
    def test_the_contrast_in_chunks_is_that_of_the_whole_batch(self):
        found = []
        for rows in (None, 3):
            torch.manual_seed(3)
            model = Small().double()
            objective = together([ALBEF[0]]).double()
            objective.bind(model)
            objective.twin.model.vision.weight.data.mul_(1.5)
            batch = batch_of(ROWS)
            if rows is None:
                loss = objective(model, batch)
                loss.total.backward()
            else:
                loss = gradcache.backward(model, objective, batch, rows, lambda loss: loss.total.backward())
            objective.after_step(model, loss.state)
            found.append(
                [loss.total.detach(), *(p.grad for p in model.parameters() if p.grad is not None), objective.of[0].queues[0].features]
            )
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, **EXACT)

    @pytest.mark.parametrize("of", [["itc", "itm"], ["lm"], ["mlm"]])
    def test_what_needs_more_than_embeddings_is_refused(self, of):
        model, objective = Small().double(), together(of, None)
        with pytest.raises(ZooError, match=r"run\.gradcache: 0"):
            gradcache.backward(model, objective, batch_of(ROWS), 2, lambda loss: loss.total.backward())


# In a run


@pytest.fixture
def recipe(tmp_path, own_registry):
    @register("data", "colours")
    def made(root, *, train: int = 12) -> CaptionedData:
        """Of this test."""
        return colours(train)

    def of(out="run", *overrides, objective=ALBEF, model="albef", **run) -> Recipe:
        built = {
            "model": {"name": model, "vision": TINY, "layers": 2, "dim": 16},
            "data": "colours",
            "objective": {"name": "together", "of": objective, "momentum": 0.9},
            "optimizer": {"lr": 1e-3},
            "run": {"steps": 6, "batch_size": 4, "log_every": 1, "device": "cpu", "save_every": 2, **run},
            "out": str(tmp_path / out),
        }
        return load_recipe(built, *overrides)

    return of


class Killed(Exception):
    pass


@pytest.mark.parametrize("model, objective", [("albef", ALBEF), ("blip", [ALBEF[0], {"name": "itm", "eps": 1e-4}, "lm"])])
def test_a_run_that_is_killed_goes_on_as_if_it_had_not_been(recipe, monkeypatch, model, objective):
    train(recipe("whole", model=model, objective=objective))
    from zoo.objectives.together import Together

    after, calls = Together.after_step, []

    def dies(self, *given):
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        after(self, *given)

    monkeypatch.setattr(Together, "after_step", dies)
    with pytest.raises(Killed):
        train(recipe("parts", model=model, objective=objective))
    monkeypatch.setattr(Together, "after_step", after)
    train(recipe("parts", model=model, objective=objective))
    whole, parts = (load_file(checkpoints(recipe(out).out / "checkpoints")[-1] / "step.safetensors") for out in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    twin = {name.removeprefix("objective.twin."): value for name, value in whole.items() if name.startswith("objective.twin.")}
    assert {*twin} == {name for name in whole if name.startswith("model.")}
    assert not all(torch.equal(twin[name], whole[name]) for name in twin)
    queue = whole["objective.of.0.queues.0.ids"]
    assert bool((queue >= 0).all())
    saved = load_file(recipe("whole").out / "model.safetensors")
    assert not any("twin" in name or "queue" in name for name in saved)


@pytest.mark.parametrize("lacks", [("image",), ("text",), ("image", "text")], ids=" and ".join)
@pytest.mark.parametrize("model", ["albef", "blip", "coca", "vlmo", "beit_3"])
def test_a_batch_that_lacks_all_of_one_side_is_a_zero_loss(model, lacks):
    of = {
        "albef": ALBEF,
        "blip": [ALBEF[0], "itm", "lm"],
        "coca": ["itc", {"name": "lm", "smoothing": 0}],
        "vlmo": [ALBEF[0], {"name": "itc", "on": ["pair_image", "pair_text"]}, "itm", ALBEF[2]],
        "beit_3": ["itc", "lm"],
    }[model]
    settings = {} if model in ("vlmo", "beit_3") else {"vision": TINY, "dim": 16}
    model, objective = build(model, size="tiny", **settings, **({} if model == "coca" else {"layers": 2})), together(of)
    objective.bind(model)
    rows = [{name: x for name, x in row.items() if name not in lacks} for row in CaptionedRows(colours(8), "train")]
    loss = objective(model, Batch(stack([model.processor(row) for row in rows[:ROWS]]), ids=torch.arange(ROWS)))
    loss.total.backward()
    objective.after_step(model, loss.state)
    assert loss.total.item() == 0
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
    assert {f"loss_{name}" for name in objective.names} <= {*loss.parts}


def test_accumulation_would_starve_a_queue(recipe):
    with pytest.raises(ZooError, match=r"run\.accumulate: of 2 batches a step, a queue would get the vectors of the last alone"):
        make_step(recipe(accumulate=2))
    step = make_step(recipe(accumulate=2, objective=[{"name": "itc", "alpha": 0.4}]))
    assert not step.objective.enqueues


def test_a_batch_that_does_not_divide_the_queue_stops_before_the_first_step(recipe):
    with pytest.raises(ZooError, match="queue: 8 is no multiple of the 3 vectors"):
        train(recipe(batch_size=3))


def test_validate_walks_through_it(recipe):
    whole_words = [ALBEF[0], "itm", {"name": "mlm", "alpha": 0.4, "whole_words": True}]
    report = validate(recipe(objective=whole_words), rows=8)
    assert report.faults == []
    objective = next(part for part in report.parts if part.name == "objective")
    assert objective.trained == 1
    assert objective.parameters > 1000  # the twin's
