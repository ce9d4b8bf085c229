"""The contrast of pictures and texts against CLIP's and ALBEF's formulas, written out densely, and the order in which its state moves."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.picture_text_model import Small, batch_of, model_and_other, stepped, unit
from zoo import ZooError, make
from zoo.objectives._temperature import Temperature

EXACT = {"rtol": 1e-8, "atol": 1e-10}  # float64
ROWS, QUEUE = 4, 12
TAU = torch.tensor(0.07).item()  # as float32 has it


def clip(image, text, scale):
    logits = unit(image) @ unit(text).T * scale
    target = torch.arange(len(image))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def albef(student, teacher, queues, tau, alpha, *, roll=0):
    """ALBEF's loss in ALBEF's names, of student's and teacher's (image, text) vectors (B, E) and the two queues (E, K)."""
    losses = []
    for side in (0, 1):
        candidates = torch.cat([unit(teacher[1 - side]), queues[1 - side].T]).detach()
        sim = unit(student[side]) @ candidates.T / tau
        sim_m = (unit(teacher[side]) @ candidates.T / tau).detach()
        onehot = torch.eye(*sim.shape, dtype=sim.dtype).roll(roll, 1)
        target = alpha * sim_m.softmax(1) + (1 - alpha) * onehot
        losses.append(-(sim.log_softmax(1) * target).sum(1).mean())
    return (losses[0] + losses[1]) / 2


def bound(model, **settings):
    """Of ALBEF, beside a twin of the model."""
    plain = {"name": "itc", "temperature": "raw", "queue": QUEUE, "alpha": 0.4}
    objective = make("objective", {"name": "together", "of": [{**plain, **settings}], "momentum": 0.9})
    objective.bind(model)
    for queue in objective.double().of[0].queues:
        queue.features = F.normalize(queue.features, dim=0)  # what float32 left of their lengths is not what is tested
    return objective.train()


def vectors(model, batch):
    out = model(batch).embeddings
    return out["image"], out["text"]


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class TestClip:
    def test_is_the_mean_of_both_directions(self):
        model, _ = model_and_other()
        batch, objective = batch_of(ROWS), make("objective", "itc")
        objective.bind(model)
        loss = objective(model, batch)
        loss.total.backward()
        found = gradients(model)
        model.zero_grad()
        scale = torch.tensor(-math.log(0.07), requires_grad=True)
        expected = clip(*vectors(model, batch), scale.exp())
        expected.backward()
        torch.testing.assert_close(loss.total, expected, **EXACT)
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(found[name], gradient, **EXACT, msg=lambda m, name=name: f"{name}: {m}")
        torch.testing.assert_close(objective.temperature.log_scale.grad, scale.grad, rtol=1e-5, atol=1e-7)
        assert loss.parts["scale"].item() == pytest.approx(1 / 0.07)
        assert loss.state is None

    def test_it_is_infonce_inside_the_bounds(self):
        model, _ = model_and_other()
        batch = batch_of(
            ROWS, ids=torch.tensor([3, 4, 3, 5]), known=torch.tensor([[0, 3]]), image_present=torch.tensor([1, 1, 0, 1]).bool()
        )
        found, expected = (make("objective", name)(model, batch).total for name in ("itc", "infonce"))
        torch.testing.assert_close(found, expected, **EXACT)

    @pytest.mark.parametrize("on", [["image"], ["image", "image"], ["image", "sound"], ["image", "text", "image"]])
    def test_two_outputs_are_contrasted(self, on):
        with pytest.raises(ZooError, match=r"itc\.on: "):
            make("objective", "itc", on=on).bind(Small())

    def test_an_output_that_only_some_settings_give(self):
        with pytest.raises(ZooError, match=r"'pair_text'.*; a model's settings and fusion decide what it gives: .*leave this itc out"):
            make("objective", "itc", on=["pair_image", "pair_text"]).bind(Small())


class TestTemperature:
    @pytest.mark.parametrize(
        ("kind", "stored", "scale"),
        [
            ("log_scale", math.log(250), 100.0),
            ("log_scale", math.log(50), 50.0),
            ("log_scale", -1.0, 1.0),
            ("raw", 0.07, 1 / 0.07),
            ("raw", 0.0001, 1000.0),
            ("raw", 2.0, 2.0),
        ],
    )
    def test_is_bounded_before_use(self, kind, stored, scale):
        temperature = Temperature(kind, 0.07, clamp=True).double()
        parameter = next(iter(temperature.parameters()))
        parameter.data.fill_(stored)
        assert temperature.scale.item() == pytest.approx(scale, rel=1e-6)
        temperature.scale.backward()
        assert parameter.grad.item() == pytest.approx(scale if kind == "log_scale" else -(scale**2), rel=1e-6)  # never 0: it can come back
        temperature.bound()
        assert (parameter.exp() if kind == "log_scale" else 1 / parameter).item() == pytest.approx(scale, rel=1e-6)

    def test_no_clamp(self):
        temperature = Temperature("raw", 2.0, clamp=False)
        temperature.bound()
        assert temperature.scale.item() == 0.5

    def test_fixed_learns_nothing_and_is_saved(self):
        temperature = Temperature("fixed", 0.05, clamp=True)
        assert list(temperature.parameters()) == []
        assert temperature.scale.item() == pytest.approx(20)
        assert {*temperature.state_dict()} == {"fixed"}

    @pytest.mark.parametrize("start", [0.0, -1.0, math.inf, math.nan])
    def test_is_above_zero(self, start):
        with pytest.raises(ZooError, match=r"above 0 and finite.*write 0\.07"):
            make("objective", "itc", start=start)


class TestAlbef:
    def both(self, alpha=0.4, **fields):
        """The loss of a student that has left its teacher, and all that the formula needs."""
        model, other = model_and_other()
        objective = bound(model, alpha=alpha)
        model.load_state_dict(other.state_dict())
        batch = batch_of(ROWS, **fields)
        queues = [queue.features for queue in objective.of[0].queues]
        return model, objective, batch, queues

    @pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
    def test_value_and_gradient(self, alpha):
        model, objective, batch, queues = self.both(alpha)
        loss = objective(model, batch)
        loss.total.backward()
        found = gradients(model)
        model.zero_grad()
        teacher = vectors(objective.twin.model, batch)
        tau = objective.of[0].temperature.raw.detach().clone().requires_grad_()
        expected = albef(vectors(model, batch), teacher, queues, tau, alpha)
        expected.backward()
        torch.testing.assert_close(loss.total, expected, **EXACT)
        assert found.keys() == gradients(model).keys()
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(found[name], gradient, **EXACT, msg=lambda m, name=name: f"{name}: {m}")
        torch.testing.assert_close(objective.of[0].temperature.raw.grad, tau.grad, **EXACT)
        assert all(p.grad is None for p in objective.twin.parameters())

    def test_controls_are_off(self):
        model, objective, batch, queues = self.both()
        found = objective(model, batch).total.item()
        student, teacher = vectors(model, batch), vectors(objective.twin.model, batch)
        right = albef(student, teacher, queues, TAU, 0.4).item()
        assert abs(found - right) < 1e-5
        for name, wrong in {
            "the student as teacher": albef(student, student, queues, TAU, 0.4),
            "teachers swapped": albef(student, teacher[::-1], queues, TAU, 0.4),
            "positives rolled by one": albef(student, teacher, queues, TAU, 0.4, roll=1),
            "queues swapped": albef(student, teacher, queues[::-1], TAU, 0.4),
            "without soft targets": albef(student, teacher, queues, TAU, 0.0),
        }.items():
            assert abs(found - wrong.item()) > 1e-3, name

    def test_one_subject_and_who_is_absent(self):
        ids = torch.tensor([7, 8, 7, 9])
        there = (torch.tensor([1, 1, 1, 0]).bool(), torch.tensor([1, 1, 1, 1]).bool())
        model, objective, batch, queues = self.both(ids=ids, image_present=there[0])
        for side, queue in enumerate(objective.of[0].queues):
            queue.ids[3 + side], queue.ids[9] = 8, 9
        found = objective(model, batch).total
        student, teacher = vectors(model, batch), vectors(objective.twin.model, batch)
        numbers = [torch.cat([ids, queue.ids]) for queue in objective.of[0].queues]
        one, two = (among_others(side, student, teacher, queues, numbers[1 - side], there) for side in (0, 1))
        torch.testing.assert_close(found, (one + two) / 2, **EXACT)
        swapped = [among_others(side, student, teacher, queues, numbers[side], there) for side in (0, 1)]
        assert abs(found - sum(swapped) / 2) > 1e-3
        assert abs(found - albef(student, teacher, queues, TAU, 0.4)) > 1e-3

    def test_a_twin_without_queue_or_soft_targets_still_is_what_is_searched(self):
        model, other = model_and_other()
        objective = bound(model, queue=0, alpha=0.0)
        model.load_state_dict(other.state_dict())
        batch = batch_of(ROWS)
        empty = [torch.zeros(6, 0, dtype=torch.float64)] * 2
        expected = albef(vectors(model, batch), vectors(objective.twin.model, batch), empty, TAU, 0.0)
        torch.testing.assert_close(objective(model, batch).total, expected, **EXACT)


def among_others(side, student, teacher, queues, numbers, there):
    """One direction, row by row: those that are there with their partners, among candidates that are there and of another subject."""
    candidates = torch.cat([unit(teacher[1 - side]), queues[1 - side].T])
    present = torch.cat([there[1 - side], torch.ones(QUEUE).bool()])
    losses = []
    for i in range(ROWS):
        if there[0][i] and there[1][i]:
            keep = [j for j in range(ROWS + QUEUE) if j == i or (numbers[j] != numbers[i] and present[j])]
            logits, taught = (candidates[keep] @ unit(x[side])[i] / TAU for x in (student, teacher))
            onehot = torch.tensor([float(j == i) for j in keep], dtype=torch.float64)
            losses.append(-((0.4 * taught.softmax(0) + 0.6 * onehot) * logits.log_softmax(0)).sum())
    return torch.stack(losses).mean()


class TestOrder:
    """Steps of training against a loop that is written as ALBEF's code is ordered."""

    STEPS = 5

    def ours(self):
        torch.manual_seed(1)
        model = Small().double()
        objective = bound(model, ramp=3)
        start = copy.deepcopy((model, [q.features.clone() for q in objective.of[0].queues]))
        optimizer = torch.optim.SGD([*model.parameters(), *objective.of.parameters()], lr=0.5)
        losses = [stepped(objective, model, batch_of(ROWS, step), optimizer).total.item() for step in range(self.STEPS)]
        return losses, start, model, objective

    def albefs(self, model, queues, *, twin_late=False, enqueue_early=False):
        twin, tau, pointer, losses = copy.deepcopy(model), nn.Parameter(torch.tensor(TAU).double()), 0, []
        optimizer = torch.optim.SGD([*model.parameters(), tau], lr=0.5)
        for step in range(self.STEPS):
            batch, alpha = batch_of(ROWS, step), 0.4 * min(1, step / 3)
            with torch.no_grad():
                tau.clamp_(0.001, 0.5)

            if not twin_late:
                follow(twin, model)
            with torch.no_grad():
                teacher = vectors(twin, batch)
            if twin_late:
                follow(twin, model)
            keys = [(queue[:, pointer : pointer + ROWS], unit(vectors).T) for queue, vectors in zip(queues, teacher, strict=True)]
            if enqueue_early:
                enqueue(keys)
            loss = albef(vectors(model, batch), teacher, [queue.clone() for queue in queues], tau, alpha)
            if not enqueue_early:
                enqueue(keys)
            pointer = (pointer + ROWS) % QUEUE
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, twin, queues

    def test_is_albefs(self):
        losses, (model, queues), trained, objective = self.ours()
        expected, _, held = self.albefs(copy.deepcopy(model), [q.clone() for q in queues])
        assert losses == pytest.approx(expected, abs=1e-6)
        for queue, features in zip(objective.of[0].queues, held, strict=True):
            torch.testing.assert_close(queue.features, features, rtol=1e-5, atol=1e-6)
        assert objective.of[0].queues[0].pointer == self.STEPS * ROWS % QUEUE
        assert not torch.allclose(trained.vision.weight, model.vision.weight, atol=1e-2)

    @pytest.mark.parametrize("wrong", ["twin_late", "enqueue_early"])
    def test_another_order_is_off(self, wrong):
        losses, (model, queues), *_ = self.ours()
        expected, *_ = self.albefs(copy.deepcopy(model), [q.clone() for q in queues], **{wrong: True})
        assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) > 1e-4

    def test_nothing_moves_in_a_forward_pass(self):
        model = Small().double()
        objective = bound(model)
        before = copy.deepcopy(objective.state_dict())
        objective(model, batch_of(ROWS)).total.backward()
        assert all(torch.equal(value, before[name]) for name, value in objective.state_dict().items())

    def test_the_temperature_comes_back_inside_its_bounds(self):
        model = Small().double()
        objective = bound(model)
        objective.of[0].temperature.raw.data.fill_(3.0)
        stepped(objective, model, batch_of(ROWS))
        assert objective.of[0].temperature.raw.item() == 0.5

    def test_subjects_and_absent_rows_enter_the_queue(self):
        model = Small().double()
        objective = bound(model)
        random = objective.of[0].queues[0].features.clone()
        batch = batch_of(ROWS, ids=torch.tensor([5, 6, 7, 8]), image_present=torch.tensor([1, 0, 1, 1]).bool())
        stepped(objective, model, batch)
        images, texts = objective.of[0].queues
        assert images.ids[:6].tolist() == [5, -100, 7, 8, -100, -100]
        assert texts.ids[:5].tolist() == [5, 6, 7, 8, -100]
        assert torch.equal(images.features[:, 1], random[:, 1])
        assert not torch.equal(images.features[:, 0], random[:, 0])


def follow(twin, model):
    for slow, fast in zip(twin.parameters(), model.parameters(), strict=True):
        slow.data = 0.9 * slow.data + 0.1 * fast.data


def enqueue(keys):
    for place, vectors in keys:
        place.copy_(vectors)


def test_in_16_bits_it_stays_close():
    """Autocast leaves vectors in 16 bits; the queue and the loss stay in 32."""
    model, _ = model_and_other(torch.float32)
    objective = make("objective", {"name": "together", "of": [{"name": "itc", "queue": QUEUE, "alpha": 0.4}], "momentum": 0.9})
    objective.bind(model)
    batch = batch_of(ROWS, dtype=torch.float32)
    exact = objective(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(model, batch)
    assert loss.total.dtype == torch.float32
    torch.testing.assert_close(loss.total, exact.total, rtol=0.05, atol=0.02)
    objective.after_step(model, loss.state)
    assert objective.of[0].queues[0].features.dtype == torch.float32


@pytest.mark.parametrize("settings", [{"queue": 8}, {"alpha": 0.4}])
def test_alone_it_has_no_twin(settings):
    with pytest.raises(ZooError, match=r"itc: queue and alpha need a momentum twin: write objective: \{name: together"):
        make("objective", "itc", **settings)(Small().double(), batch_of(ROWS))


def test_a_queue_that_the_batch_does_not_divide():
    model = Small().double()
    with pytest.raises(ZooError, match=r"queue: 12 is no multiple of the 5 vectors"):
        bound(model)(model, batch_of(5))


def test_subjects_as_positives_want_to_be_known():
    with pytest.raises(ZooError, match=r"itc\.same: this batch does not say which rows are of one subject"):
        make("objective", "itc", same="positive")(Small().double(), batch_of(ROWS))


def test_subjects_as_positives_without_a_twin():
    model, ids = Small().double(), torch.tensor([3, 4, 3, 5])
    image, text = vectors(model, batch_of(ROWS))
    logits, target = unit(image) @ unit(text).T / TAU, (ids[:, None] == ids).double()
    target = target / target.sum(1, keepdim=True)
    expected = -sum((z.log_softmax(1) * target).sum(1).mean() for z in (logits, logits.T)) / 2
    found = make("objective", "itc", same="positive", temperature="raw")(model, batch_of(ROWS, ids=ids)).total
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("settings", [{"queue": -1}, {"ramp": -3}])
def test_counts(settings):
    with pytest.raises(ZooError, match="queue and ramp are counts"):
        make("objective", "itc", **settings)


def test_a_batch_that_lacks_all_of_one_side_is_a_zero_loss():
    model = Small().double()
    objective = bound(model)
    loss = objective(model, batch_of(ROWS, text_present=torch.zeros(ROWS).bool()))
    loss.total.backward()
    assert loss.total.item() == 0
