"""One step of pre-training, and of fine-tuning for retrieval, is LAVIS' on the same weights: losses, gradients, queues, negatives."""

import pytest
import torch

from tests.bert_models import albef, batch_of, blip, closest, gradients_as_theirs, loaded
from tests.golden_files import digest, golden
from zoo import make
from zoo.momentum import Drawn
from zoo.objectives import mlm
from zoo.types import Batch

ITC = {"name": "itc", "temperature": "raw", "queue": 64, "alpha": 0.4}
PRETRAINED = {
    "albef_lavis": [ITC, "itm", {"name": "mlm", "alpha": 0.4}],
    "blip_lavis": [ITC, {"name": "itm", "eps": 1e-4}, "lm"],
}


class Told:
    """Draws what LAVIS drew, and keeps the weights that it would have drawn from."""

    def __init__(self, sampler, told):
        self.sampler, self.told, self.weighed = sampler, told, []

    def __call__(self, logits, allowed):
        self.weighed.append(self.sampler.weights(logits, allowed))
        return Drawn(self.told["negative_texts" if len(self.weighed) == 1 else "negative_images"], allowed.any(1))


def as_lavis(file, case, of, monkeypatch):
    """The objective, bound, where LAVIS stands before a step; the model, the batch, and what LAVIS tells."""
    told = golden(file, case)
    make_model = albef if file == "albef_lavis" else blip
    student, teacher, state = make_model(told.told["vocabulary"]), make_model(told.told["vocabulary"]), told.state
    table, _, _ = loaded(student, state)
    twins = {name.replace("_m.", ".", 1): value for name, value in state.items() if name.partition(".")[0] in told.case["twins"]}
    loaded(teacher, twins)
    objective = make("objective", {"name": "together", "of": of, "momentum": 0.995})
    objective.bind(student)
    missing = objective.twin.model.load_state_dict(teacher.state_dict())
    assert not missing.missing_keys
    itc, itm = objective.of[:2]
    with torch.no_grad():
        itc.temperature.raw.copy_(state["temp"])
        for queue, name in zip(itc.queues, ("image", "text"), strict=True):
            queue.features.copy_(state[f"{name}_queue"])
    objective.twin.update(student)  # as after the step before
    itm.draw = Told(itm.draw, told)
    given = told.inputs
    batch = batch_of(given["image"], given["input_ids"], given["attention_mask"])
    if "mlm_ids" in told.arrays:
        monkeypatch.setattr(mlm, "choose", lambda text, *_: told["mlm_labels"] != -100)
        monkeypatch.setattr(mlm, "hide", lambda *_: told["mlm_ids"])
    return objective, student, batch, told, table


@pytest.mark.parametrize("file", PRETRAINED)
class TestPretraining:
    def test_losses(self, file, monkeypatch):
        objective, model, batch, told, _ = as_lavis(file, "pretrain", PRETRAINED[file], monkeypatch)
        loss = objective(model, batch)
        for name in objective.names:
            closest(loss.parts[f"loss_{name}"], told[f"loss_{name}"], 1e-5)
        closest(loss.total, told["loss"], 1e-5)

    def test_a_student_as_its_own_teacher_is_off(self, file, monkeypatch):
        objective, model, batch, told, _ = as_lavis(file, "pretrain", PRETRAINED[file], monkeypatch)
        objective.twin.model.load_state_dict(model.state_dict())
        parts = objective(model, batch).parts
        for name in {"itc", "mlm"} & {*objective.names}:
            assert abs(parts[f"loss_{name}"] - told[f"loss_{name}"]) > 1e-2

    def test_a_twin_that_moved_too_late_is_off(self, file, monkeypatch):
        objective, model, batch, told, _ = as_lavis(file, "pretrain", PRETRAINED[file], monkeypatch)
        moved = objective.twin.model
        for own, new in zip(moved.parameters(), model.parameters(), strict=True):
            own.data = (own.data - 0.005 * new.data) / 0.995  # back to before the update
        assert abs(objective(model, batch).parts["loss_itc"] - told["loss_itc"]) > 2e-5 * told["loss_itc"]

    def test_gradients(self, file, monkeypatch):
        objective, model, batch, told, table = as_lavis(file, "pretrain", PRETRAINED[file], monkeypatch)
        objective(model, batch).total.backward()
        wanted, found = told.gradients("loss"), gradients_as_theirs(model, table)
        found["temp"] = objective.of[0].temperature.raw.grad
        largest = max(norm for norm, _ in wanted.values())
        assert len(wanted) > 130
        assert wanted.keys() <= found.keys()
        for name, expected in wanted.items():
            assert digest(name, found[name]) == pytest.approx(expected, abs=1e-5 * largest), name

    def test_the_queues_after_it(self, file, monkeypatch):
        objective, model, batch, told, _ = as_lavis(file, "pretrain", PRETRAINED[file], monkeypatch)
        objective.after_step(model, objective(model, batch).state)
        for queue, name in zip(objective.of[0].queues, ("image", "text"), strict=True):
            closest(queue.features[:, :4], told[f"{name}_queue_after"], 1e-5)
            assert queue.pointer == told["queue_ptr_after"]

    def test_how_likely_each_negative_was(self, file, monkeypatch):
        objective, model, batch, told, _ = as_lavis(file, "pretrain", PRETRAINED[file], monkeypatch)
        objective(model, batch)
        for weights, name in zip(objective.of[1].draw.weighed, ("texts", "images"), strict=True):
            wanted = told[f"weights_of_{name}"]
            closest(weights / weights.sum(1, keepdim=True), wanted / wanted.sum(1, keepdim=True), 2e-5)


@pytest.mark.parametrize("file", PRETRAINED)
def test_fine_tuning_for_retrieval(file, monkeypatch):
    of = [{**ITC, "same": "positive"}, PRETRAINED[file][1]]
    objective, model, batch, told, _ = as_lavis(file, "retrieval", of, monkeypatch)
    batch = Batch(batch.inputs, ids=told["image_ids"])
    loss = objective(model, batch)
    for name in ("itc", "itm"):
        closest(loss.parts[f"loss_{name}"], told[f"loss_{name}"], 1e-5)
    closest(loss.total, told["loss"], 1e-5)
    objective.after_step(model, loss.state)  # nothing moved the weights; now the batch's subjects stand in the queue
    objective.of[1].draw.weighed.clear()
    closest(objective(model, batch).parts["loss_itc"], told["again_loss_itc"], 1e-5)
