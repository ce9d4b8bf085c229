"""Schedules of classification: who moves in which phase, what the head keeps, how gradients become one."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from zoo.errors import ZooError
from zoo.fusions._phases import only
from zoo.fusions.mmpareto import pareto
from zoo.joints import Correcting, Merging, Modulating
from zoo.registry import build, make
from zoo.sections import Run
from zoo.types import Batch, Loss, ModalityInputs, ModelOutput
from zoo.update import Step, Updater

B, D, K = 6, 8, 3
NAMES = ["audio", "image"]
SOME = torch.tensor([True, False, True, True, False, True])


def model(fusion, **settings):
    torch.manual_seed(0)
    encoders = {name: {"name": "tiny_image", "dim": D, "layers": 1, "heads": 2, "image_size": 8} for name in NAMES}
    return build("classifier", encoders=encoders, classes=K, fusion=fusion, **settings).train()


def batch(present=None, rows=B):
    torch.manual_seed(1)
    inputs = {name: ModalityInputs(torch.randn(rows, 3, 8, 8), None, (present or {}).get(name)) for name in NAMES}
    return Batch(inputs, targets=torch.arange(rows) % K, ids=torch.arange(rows))


def update(net, optimizer, whole):
    """What the training loop does with one batch; the names of the phases, and what moved in each."""
    objective, moved, gradients = make("objective", "cross_entropy"), {}, {}
    phases = list(net.schedule.phases(whole))
    for phase in phases:
        loss = objective(net, phase.batch)
        loss.total.backward()
        if isinstance(net.schedule, Merging):
            gradients[phase.name] = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
            optimizer.zero_grad()
            if phase is not phases[-1]:
                continue
            merged = net.schedule.merge(gradients)
            for name, p in net.named_parameters():
                p.grad = merged.get(name)
        if isinstance(net.schedule, Modulating):
            net.schedule.before_step(net, phase, loss)
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        previous = {n: p.detach().clone() for n, p in net.schedule.watched(net).items()} if isinstance(net.schedule, Correcting) else {}
        optimizer.step()
        if isinstance(net.schedule, Correcting):
            net.schedule.after_step(net, phase, previous, loss)
        optimizer.zero_grad()
        moved[phase.name] = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    return moved


def heavy(net, lr=0.1):
    """Momentum and weight decay, which pass by a filter of gradients."""
    return torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=1e-2)


class TestMla:
    def test_one_modality_moves_at_a_time(self):
        net = model("mla")
        optimizer = heavy(net)
        for _ in range(3):
            moved = update(net, optimizer, batch())
            assert list(moved) == NAMES
            for name in NAMES:
                assert {n.split(".")[1] for n in moved[name] if n.startswith("encoders")} == {name}
                assert "heads.shared.weight" in moved[name]

    @pytest.mark.parametrize("remember", ["previous", "others", "classes"])
    @pytest.mark.parametrize("bias", ["free", "protected"])
    def test_the_head_says_of_what_it_remembers_what_it_said(self, remember, bias):
        """Under momentum and decay: it is the step that is projected. The bias is another matter, unless it is protected too."""
        net = model({"name": "mla", "remember": remember, "bias": bias, **({"decay": 0.0} if remember == "classes" else {"alpha": 1e-8})})
        optimizer, whole = heavy(net), batch()
        update(net, optimizer, whole)
        own = only(whole, "audio")
        with torch.no_grad():
            features = net(own).embeddings["audio"]
        kept = (
            features.mean(0, keepdim=True) if remember != "classes" else torch.stack([features[own.targets == k].mean(0) for k in range(K)])
        )
        net.schedule.memory.remember("audio", F.pad(features, (0, 1), value=1.0) if bias == "protected" else features, own.targets)
        before = net.head(kept).detach()
        phases = [p for p in net.schedule.phases(whole) if p.name == "image"]
        net.schedule.phases = lambda _: iter(phases)
        update(net, optimizer, whole)
        after = net.head(kept).detach()
        moved = (after - before).abs().max()
        if bias == "protected":
            assert moved < 2e-5
        else:
            assert moved > 1e-4  # what the bias moved
            torch.testing.assert_close(
                after - before, (after - before)[:1].expand_as(after), rtol=0, atol=2e-5
            )  # is the same wherever it is asked

    def test_without_a_memory_the_head_is_free(self):
        nets = [model({"name": "mla", "remember": remember}) for remember in (None, "previous")]
        for net in nets:
            optimizer = heavy(net)
            update(net, optimizer, batch())
        assert nets[0].schedule.memory is None
        assert not torch.equal(nets[0].head.weight, nets[1].head.weight)

    def test_the_first_step_is_free(self):
        nets = [model({"name": "mla", "remember": remember}) for remember in (None, "previous")]
        for net in nets:
            net.schedule.order = ("audio",)
            update(net, heavy(net), batch())
        torch.testing.assert_close(nets[0].head.weight, nets[1].head.weight, rtol=0, atol=1e-7)

    def test_absent_rows_and_absent_modalities(self):
        net, whole = model("mla"), batch({"image": SOME})
        assert [len(p.batch.targets) for p in net.schedule.phases(whole)] == [B, int(SOME.sum())]
        nobody = batch({"image": torch.zeros(B, dtype=torch.bool)})
        before = {n: p.detach().clone() for n, p in net.named_parameters()}
        moved = update(net, heavy(net), nobody)
        assert list(moved) == ["audio"]
        assert all(torch.equal(p, before[n]) for n, p in net.named_parameters() if n.startswith("encoders.image"))

    def test_separate_heads_are_independent_trainings(self):
        """With a head for each modality nothing couples them: alternating is the ensemble."""
        alone = model("ume", shared_head=False)
        optimizer = heavy(alone)
        update(alone, optimizer, batch())
        for name in NAMES:
            other = model("ume", shared_head=False)
            other.schedule.names = (name,)
            update(other, heavy(other), batch())
            for (n, p), q in zip(alone.named_parameters(), other.parameters(), strict=True):
                if name in n.split("."):
                    torch.testing.assert_close(p, q, rtol=0, atol=1e-6)

    def test_order(self):
        net = model({"name": "mla", "order": ["image", "audio"]})
        assert [p.name for p in net.schedule.phases(batch())] == ["image", "audio"]
        with pytest.raises(ZooError, match=r"order \['image'\] must name each modality once: audio, image"):
            model({"name": "mla", "order": ["image"]})

    def test_the_memory_goes_into_checkpoints(self):
        net = model("mla")
        update(net, heavy(net), batch())
        again = model("mla")
        again.load_state_dict(net.state_dict())
        assert torch.equal(again.schedule.memory.projection.matrix, net.schedule.memory.projection.matrix)
        assert not torch.equal(again.schedule.memory.projection.matrix, torch.eye(D))


class TestPareto:
    def test_by_hand(self):
        """g1 = (1, 0), g2 = (-0.5, 1): 0.5385 of g1 gives (0.3077, 0.4615), as good for both."""
        joint, own = torch.tensor([1.0, 0.0]), torch.tensor([-0.5, 1.0])
        found = pareto(joint, own, 1.5)
        direction = torch.tensor([0.3077, 0.4615])
        torch.testing.assert_close(found / found.norm(), direction / direction.norm(), rtol=1e-3, atol=0)
        torch.testing.assert_close(found @ joint, found @ own)
        torch.testing.assert_close(found.norm(), 1.5 * (joint + own).norm())

    def test_agreement_is_the_sum_as_much_longer(self):
        joint, own = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 1.0])
        assert torch.equal(pareto(joint, own, 1.5), 1.5 * (joint + own))

    def test_opposites_are_finite(self):
        assert torch.equal(pareto(torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 0.0]), 1.5), torch.zeros(2))

    def test_each_gradient_is_its_own(self):
        """Joint and own gradients come from passes of their own: they are not all the same sum."""
        net, whole = model(["late", "mmpareto"]), batch()
        seen = {}
        merge = net.schedule.merge
        net.schedule.merge = lambda gradients: seen.update(gradients) or merge(gradients)
        update(net, heavy(net), whole)
        assert list(seen) == ["joint", *NAMES]
        for phase in ("joint", *NAMES):
            net = model(["late", "mmpareto"])
            make("objective", "cross_entropy")(net, whole if phase == "joint" else only(whole, phase)).total.backward()
            for name, p in net.named_parameters():
                if p.grad is not None:
                    torch.testing.assert_close(seen[phase][name], p.grad, rtol=1e-5, atol=1e-7)
        name = "encoders.audio.stem.0.weight"
        assert F.cosine_similarity(seen["joint"][name].flatten(), seen["audio"][name].flatten(), dim=0) < 0.999

    def test_each_encoder_is_merged_as_a_whole_and_all_else_is_summed(self):
        """The two parameters of one encoder disagree together, though the second alone agrees; the other encoder was not shown alone."""
        audio, image, head = "model.encoders.audio.", "model.encoders.image.x", "model.heads.shared.weight"
        gradients = {
            "joint": {audio + "a": torch.tensor([[2.0]]), audio + "b": torch.ones(1), image: torch.ones(2), head: torch.ones(2)},
            "audio": {audio + "a": torch.tensor([[-3.0]]), audio + "b": torch.ones(1), head: torch.full((2,), -3.0)},
        }
        merged = make("fusion", {"name": "mmpareto", "boost": 4.0}, NAMES, D, K).merge(gradients)
        wanted = pareto(torch.tensor([2.0, 1.0]), torch.tensor([-3.0, 1.0]), 4.0)
        torch.testing.assert_close(merged[audio + "a"], wanted[:1][None])
        torch.testing.assert_close(merged[audio + "b"], wanted[1:])
        assert torch.equal(merged[image], torch.ones(2))
        assert torch.equal(merged[head], torch.full((2,), -2.0))


class TestOgmGe:
    def loss(self, audio, image):
        """Both modalities give the right class these probabilities."""
        targets = torch.zeros(B, dtype=torch.long)
        logits = {n: torch.log(torch.tensor([p, (1 - p) / 2, (1 - p) / 2])).expand(B, K) for n, p in (("audio", audio), ("image", image))}
        present = {name: torch.ones(B, dtype=torch.bool) for name in NAMES}
        return Loss(torch.zeros(()), {}, output=ModelOutput({}, present=present, logits=logits)), targets

    @pytest.mark.parametrize("alpha, wanted", [(0.8, 0.1663), (0.1, 0.8511)])
    def test_by_hand(self, alpha, wanted):
        """rho = 0.6 / 0.4 = 1.5."""
        schedule = make("fusion", {"name": "ogm_ge", "alpha": alpha}, NAMES, D, K)
        found = schedule.coefficients(*self.loss(0.6, 0.4))
        assert found == {"audio": pytest.approx(wanted, abs=1e-4), "image": 1.0}

    def test_balance_leaves_all_alone(self):
        assert make("fusion", "ogm_ge", NAMES, D, K).coefficients(*self.loss(0.5, 0.5)) == {"audio": 1.0, "image": 1.0}

    def test_it_jumps_where_one_begins_to_lead(self):
        """1 - tanh(0.8) at once."""
        schedule = make("fusion", {"name": "ogm_ge", "alpha": 0.8}, NAMES, D, K)
        assert schedule.coefficients(*self.loss(0.5001, 0.5)) == {"audio": pytest.approx(0.336, abs=1e-3), "image": 1.0}

    def test_of_three_each_is_compared_with_the_mean_of_the_others(self):
        def loss(chances):
            found = {n: torch.log(torch.tensor([p, (1 - p) / 2, (1 - p) / 2])).expand(B, K) for n, p in chances.items()}
            present = {name: torch.ones(B, dtype=torch.bool) for name in chances}
            return Loss(torch.zeros(()), {}, output=ModelOutput({}, present=present, logits=found)), torch.zeros(B, dtype=torch.long)

        for count in (2, 3, 4, 7):
            even = dict.fromkeys(map(str, range(count)), 0.6)
            assert make("fusion", "ogm_ge", list(even), D, K).coefficients(*loss(even)) == dict.fromkeys(even, 1.0)
        schedule = make("fusion", {"name": "ogm_ge", "alpha": 0.1}, [*NAMES, "text"], D, K)
        found = schedule.coefficients(*loss({"audio": 0.9, "image": 0.6, "text": 0.3}))
        assert found == {"audio": pytest.approx(1 - math.tanh(0.1 * 2)), "image": 1.0, "text": 1.0}

    def test_who_is_absent_is_not_compared(self):
        schedule = make("fusion", {"name": "ogm_ge", "alpha": 0.8}, NAMES, D, K)
        loss, targets = self.loss(0.6, 0.4)
        loss.output.present["image"][:] = False
        assert schedule.coefficients(loss, targets) == {"audio": 1.0}

    def test_rows_that_lack_it_have_no_say(self):
        schedule = make("fusion", {"name": "ogm_ge", "alpha": 0.8}, NAMES, D, K)
        loss, targets = self.loss(0.6, 0.4)
        logits = {name: x.clone() for name, x in loss.output.logits.items()}
        logits["image"][2] = torch.tensor([1e4, 0.0, 0.0])
        loss.output.present["image"][2] = False
        loss = loss._replace(output=loss.output._replace(logits=logits))
        assert schedule.coefficients(loss, targets) == {"audio": pytest.approx(0.1663, abs=1e-4), "image": 1.0}

    def modulated(self, net, loss, targets):
        """The gradients before, drawn, and after."""
        draw = torch.Generator().manual_seed(0)
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=draw)
        before = {name: p.grad.clone() for name, p in net.named_parameters()}
        net.schedule.before_step(net, next(net.schedule.phases(batch()._replace(targets=targets))), loss)
        return before, {name: p.grad for name, p in net.named_parameters()}

    def test_noise_is_as_wide_as_the_gradient_was_before_it_was_slowed(self):
        """And falls on every encoder, as in the paper."""
        torch.manual_seed(0)
        net = model(["late", {"name": "ogm_ge", "alpha": 0.8}])
        before, after = self.modulated(net, *self.loss(0.6, 0.4))
        for encoder, k in (("audio", 0.1663), ("image", 1.0)):
            wide = [name for name in before if f"encoders.{encoder}." in name and before[name].numel() > 100]
            assert wide
            for name in wide:
                noise = (after[name] - k * before[name]).std() / before[name].std()
                assert 0.7 < noise < 1.3, name
        assert all(torch.equal(after[name], before[name]) for name in before if not name.startswith("encoders."))

    def test_it_ends_where_it_shall(self):
        net = model(["late", {"name": "ogm_ge", "alpha": 0.8, "until": 2}])
        changed = [
            not torch.equal(before["encoders.audio.stem.0.weight"], after["encoders.audio.stem.0.weight"])
            for before, after in (self.modulated(net, *self.loss(0.6, 0.4)) for _ in range(3))
        ]
        assert changed == [True, True, False]
        assert int(net.state_dict()["schedule.steps"]) == 3

    def test_only_the_leaders_encoder_is_slowed(self):
        torch.manual_seed(0)
        net, (loss, targets) = model(["late", {"name": "ogm_ge", "alpha": 0.8, "noise": False}]), self.loss(0.6, 0.4)
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        phase = next(net.schedule.phases(batch()._replace(targets=targets)))
        net.schedule.before_step(net, phase, loss)
        for name, p in net.named_parameters():
            assert torch.allclose(p.grad, torch.full_like(p, 0.1663 if "encoders.audio." in name else 1.0), atol=1e-4)


def test_aux_adds_each_modalitys_own_gradient():
    net, whole = model(["late", {"name": "joint_aux", "weight": 2.0}]), batch()
    seen = {}
    merge = net.schedule.merge
    net.schedule.merge = lambda gradients: seen.setdefault("merged", merge(gradients)) and seen["merged"]
    update(net, heavy(net), whole)
    net = model(["late", "joint_aux"])
    objective = make("objective", "cross_entropy")
    (objective(net, whole).total + 2 * sum(objective(net, only(whole, name)).total for name in NAMES)).backward()
    for name, p in net.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(seen["merged"][name], p.grad, rtol=1e-4, atol=1e-6)


def test_a_batch_of_one_modality_keeps_the_rows_together():
    """Values, mask, whatever else an encoder reads, class and number, each of the rows that have it."""
    rows = torch.arange(B)
    x = ModalityInputs(rows[:, None].float(), rows[:, None] % 2 == 0, SOME, {"sizes": 10 * rows})
    own = only(Batch({"text": x, "image": x}, targets=rows % K, ids=100 + rows), "text")
    here = SOME.nonzero()[:, 0]
    (name, found), *others = own.inputs.items()
    assert (name, others, found.present) == ("text", [], None)
    assert torch.equal(found.values[:, 0], here.float())
    assert torch.equal(found.mask[:, 0], here % 2 == 0)
    assert torch.equal(found.extra["sizes"], 10 * here)
    assert (own.targets.tolist(), own.ids.tolist()) == ((here % K).tolist(), (100 + here).tolist())


@pytest.mark.parametrize("name", ["joint", "mla", "ume", "joint_aux", "mmpareto", "ogm_ge", "pmr", "modality_dropout"])
def test_a_batch_that_shows_nothing_at_all_moves_no_encoder(name):
    net = model(["late", name])
    optimizer = heavy(net)
    update(net, optimizer, batch())  # so that there are momenta that could drift
    moved = update(net, optimizer, Batch({}, targets=torch.arange(B) % K, ids=torch.arange(B)))
    assert not any(parameter.startswith("encoders.") for names in moved.values() for parameter in names)


@pytest.mark.parametrize("fusion", ["mla", "ume", ["concat", "joint_aux"], "ogm_ge", "pmr", ["concat", "mmpareto"]])
def test_schedules_that_go_by_rows_train_in_one_process(fusion):
    step = Step(model(fusion), make("objective", "cross_entropy"))
    Updater(SimpleNamespace(num_processes=1), step, step, None, SimpleNamespace(run=Run()))
    with pytest.raises(ZooError, match="goes by the rows of one process, and 2 train together: start one"):
        Updater(SimpleNamespace(num_processes=2), step, step, None, SimpleNamespace(run=Run()))
