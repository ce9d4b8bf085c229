"""What MLA must keep: steps off what is remembered, modalities that have no part in an update untouched, nothing that grows."""

import copy
import gc
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from tests.test_schedules import NAMES, SOME, B, D, K, batch, heavy, model, update
from zoo.errors import ZooError
from zoo.fusions._phases import only
from zoo.fusions.late import Late
from zoo.hub import load, save
from zoo.joints import Phase
from zoo.projection import MeanProjection
from zoo.registry import build, info, make
from zoo.types import Batch, Loss, ModalityInputs, ModelOutput


def sgd(parameters):
    """Momentum and decay, which pass by a filter of gradients."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-2)


class Head:
    """A shared head alone, in float64, that gets gradients and features from nowhere."""

    def __init__(self, **settings):
        torch.manual_seed(0)
        self.schedule = make("fusion", {"name": "mla", **settings}, NAMES, D, K).double()
        self.model = SimpleNamespace(head=nn.Linear(D, K).double())
        self.optimizer = sgd(self.model.head.parameters())

    def step(self, name, features, gradient):
        targets = torch.arange(len(features)) % K
        loss = Loss(torch.zeros(()), {}, output=ModelOutput({name: features}))
        self.model.head.weight.grad, self.model.head.bias.grad = gradient.clone(), gradient.sum(1)
        previous = {n: p.detach().clone() for n, p in self.schedule.watched(self.model).items()}
        self.optimizer.step()
        self.schedule.after_step(self.model, Phase(name, Batch({}, targets=targets), (name,)), previous, loss)
        self.optimizer.zero_grad()


def drawn(count, rows=B, seed=1):
    """(features, gradient) of ``count`` steps."""
    draw = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(rows, D, generator=draw, dtype=torch.float64) + 1, torch.randn(K, D, generator=draw, dtype=torch.float64))
        for _ in range(count)
    ]


class TestTheStepIsProjected:
    def test_it_is_the_optimizers_own_step_times_p(self):
        """Momentum and decay are inside: W' = W + U P, where U is what the optimizer would have done."""
        head, data = Head(), drawn(6)
        for i, (features, gradient) in enumerate(data):
            free, p = copy.deepcopy((head.model.head, head.optimizer.state_dict())), head.schedule.memory.projection.matrix.clone()
            optimizer = sgd(free[0].parameters())
            optimizer.load_state_dict(copy.deepcopy(free[1]))
            before = head.model.head.weight.detach().clone()
            free[0].weight.grad, free[0].bias.grad = gradient.clone(), gradient.sum(1)
            optimizer.step()
            head.step(NAMES[i % 2], features, gradient)
            torch.testing.assert_close(head.model.head.weight - before, (free[0].weight - before) @ p, rtol=0, atol=1e-12)
            assert torch.equal(head.model.head.bias, free[0].bias)

    def test_outputs_on_what_is_remembered_stay_and_with_filtered_gradients_they_do_not(self):
        """The control is the released code's way: the gradient is filtered, then momentum and decay go where they like."""
        moved = {}
        for way in ("step", "gradient"):
            head = Head(alpha=1e-8)
            data = drawn(4)
            for i, (features, gradient) in enumerate(data):
                if way == "gradient":
                    gradient = gradient @ head.schedule.memory.projection.matrix
                    head.schedule.watched = lambda _: {}
                    memory, head.schedule.memory = head.schedule.memory, None
                    head.step(NAMES[i % 2], features, gradient)
                    head.schedule.memory = memory
                    memory.remember(NAMES[i % 2], features, torch.arange(B) % K)
                else:
                    head.step(NAMES[i % 2], features, gradient)
                if i == 2:
                    means = torch.stack([x.mean(0) for x, _ in data[:3]])
                    before = means @ head.model.head.weight.detach().T
            moved[way] = float((means @ head.model.head.weight.detach().T - before).abs().max())
        assert moved["step"] < 1e-3 * moved["gradient"]
        assert moved["gradient"] > 0.01

    @pytest.mark.parametrize("alpha", [0.1, 1e-8])
    def test_within_the_bound(self, alpha):
        """|step P h| <= sqrt(alpha) |step|, for the means of every earlier batch."""
        head, data = Head(alpha=alpha), drawn(5)
        for i, (features, gradient) in enumerate(data):
            before = head.model.head.weight.detach().clone()
            p = head.schedule.memory.projection.matrix.clone()
            head.step(NAMES[i % 2], features, gradient)
            raw = (head.model.head.weight.detach() - before) @ torch.linalg.inv(p)
            for earlier, _ in data[:i]:
                change = (head.model.head.weight.detach() - before) @ earlier.mean(0)
                assert change.norm() <= alpha**0.5 * torch.linalg.matrix_norm(raw, 2) + 1e-9

    def test_a_protected_bias_is_a_feature_that_is_always_one(self):
        """What the head says of a remembered mean stays, its bias included, though weight and bias both move."""
        head, data = Head(alpha=1e-8, bias="protected"), drawn(2)
        head.step("audio", *data[0])
        mean = data[0][0].mean(0)
        before, bias = head.model.head(mean).detach(), head.model.head.bias.detach().clone()
        head.step("image", *data[1])
        torch.testing.assert_close(head.model.head(mean).detach(), before, rtol=0, atol=1e-6)
        assert (head.model.head.bias - bias).abs().max() > 1e-3


class TestWhoseMeans:
    def spied(self, net):
        """What P is when each modality's step is projected."""
        seen, protect = [], net.schedule.memory.protect

        def protecting(source, step):
            seen.append((source, net.schedule.memory.projection.matrix.clone()))
            return protect(source, step)

        net.schedule.memory.protect = protecting
        return seen

    def test_p_knows_what_came_before_and_not_the_current_batch(self):
        net, whole = model("mla"), batch()
        means = []
        with torch.no_grad():
            means.append(net(only(whole, "audio")).embeddings["audio"].mean(0))
        seen = self.spied(net)
        update(net, heavy(net), whole)
        assert [name for name, _ in seen] == NAMES
        assert torch.equal(seen[0][1], torch.eye(D))
        wanted = MeanProjection(D, net.schedule.memory.projection.alpha)
        wanted.add(means[0])
        torch.testing.assert_close(seen[1][1], wanted.matrix)

    def test_the_mean_is_over_the_rows_that_have_it(self):
        nets = [model("mla"), model("mla")]
        whole = batch({"image": SOME})
        whole.inputs["image"].values[~SOME] = torch.nan
        few = batch()
        chosen = Batch({"audio": few.inputs["audio"]}, targets=few.targets)
        update(nets[0], heavy(nets[0]), whole)
        two = {"image": ModalityInputs(few.inputs["image"].values[SOME])}
        optimizer = heavy(nets[1])
        update(nets[1], optimizer, chosen)
        update(nets[1], optimizer, Batch(two, targets=few.targets[SOME]))
        for (name, value), other in zip(nets[0].state_dict().items(), nets[1].state_dict().values(), strict=True):
            torch.testing.assert_close(value, other, rtol=0, atol=1e-6, msg=lambda says, name=name: f"{name}: {says}")

    def test_others_leaves_a_modality_its_own_directions(self):
        """Two steps of one modality, then one of the other: only that last one is projected."""
        heads = {kind: Head(remember=kind) for kind in ("others", None)}
        for name, (features, gradient) in zip(("audio", "audio", "image"), drawn(3), strict=True):
            for head in heads.values():
                head.step(name, features, gradient)
            same = torch.allclose(heads["others"].model.head.weight, heads[None].model.head.weight, rtol=0, atol=1e-12)
            assert same is (name == "audio")

    def test_settings_of_classes_arrive(self):
        memory = make("fusion", {"name": "mla", "remember": "classes", "rank": 3, "decay": 0.25}, NAMES, D, K).memory
        assert (memory.rank, memory.decay, memory.means.shape) == (3, 0.25, (len(NAMES), K, D))


class TestOnAndOff:
    def test_on_the_second_step_differs_and_off_it_is_plain_alternation(self):
        nets = {kind: model({"name": "mla", "remember": kind}) for kind in ("previous", None)}
        plain = model("uncertainty")
        optimizers = {kind: heavy(net) for kind, net in nets.items()}
        by_hand, whole, objective = heavy(plain), batch(), make("objective", "cross_entropy")
        for kind, net in nets.items():
            update(net, optimizers[kind], whole)
        for name in NAMES:
            objective(plain, only(whole, name)).total.backward()
            by_hand.step()
            by_hand.zero_grad()
        assert torch.equal(nets[None].head.weight, plain.head.weight)
        assert all(torch.equal(p, q) for p, q in zip(nets[None].parameters(), plain.parameters(), strict=True))
        with torch.no_grad():
            assert (nets["previous"].head.weight - plain.head.weight).norm() / plain.head.weight.norm() > 1e-3
        assert not torch.equal(nets["previous"].schedule.memory.projection.matrix, torch.eye(D))


def live_tensors():
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("remember", ["previous", *(pytest.param(what, marks=pytest.mark.slow) for what in ("others", "classes"))])
def test_a_thousand_steps_leave_nothing_behind(remember):
    head, data = Head(remember=remember), drawn(50)
    live = []
    for i in range(1000):
        features, gradient = data[i % len(data)]
        head.step(NAMES[i % 2], features.clone().requires_grad_(), gradient)
        if i in (100, 999):
            live.append(live_tensors())
    assert live[0] == live[1]
    buffers = dict(head.schedule.named_buffers())
    assert buffers
    assert all(b.grad_fn is None and not b.requires_grad and bool(b.isfinite().all()) for b in buffers.values())
    assert buffers.keys() == head.schedule.state_dict().keys()
    for name, p in buffers.items():
        if name.endswith("matrix"):
            assert torch.equal(p, p.T)
            assert torch.linalg.eigvalsh(p).min() > -1e-12


@pytest.mark.parametrize("remember", ["previous", "others", "classes"])
def test_what_was_loaded_makes_the_same_next_step(remember):
    one, data = Head(remember=remember), drawn(5)
    for i in range(4):
        one.step(NAMES[i % 2], *data[i])
    other = Head(remember=remember)
    other.schedule.load_state_dict(one.schedule.state_dict())
    other.model.head.load_state_dict(one.model.head.state_dict())
    other.optimizer.load_state_dict(copy.deepcopy(one.optimizer.state_dict()))
    for head in (one, other):
        head.step("audio", *data[4])
    assert torch.equal(one.model.head.weight, other.model.head.weight)


class TestMissing:
    def net(self):
        torch.manual_seed(0)
        encoders = {name: {"name": "image_resnet", "layers": [1], "width": D, "image_size": 8} for name in NAMES}
        return build("classifier", encoders=encoders, classes=K, fusion="mla").train()

    @pytest.mark.parametrize("how", ["no key", "present nowhere"])
    def test_a_modality_that_no_row_has_is_left_as_it_was(self, how):
        """Parameters, the statistics of its batch norms, what the optimizer keeps of it; and the head makes no step for it."""
        net = self.net()
        optimizer = heavy(net)
        update(net, optimizer, batch())  # so that there are momenta that could drift
        kept = [copy.deepcopy(optimizer.state[p]) for p in net.encoders["image"].parameters()]
        before = {n: v.clone() for n, v in net.encoders["image"].state_dict().items()}
        assert any("running_mean" in n and bool(v.any()) for n, v in before.items())
        gone = batch({"image": torch.zeros(B, dtype=torch.bool)})
        if how == "no key":
            gone = gone._replace(inputs={"audio": gone.inputs["audio"]})
        moved = update(net, optimizer, gone)
        assert list(moved) == ["audio"]
        assert all(torch.equal(v, before[n]) for n, v in net.encoders["image"].state_dict().items())
        for p, state in zip(net.encoders["image"].parameters(), kept, strict=True):
            assert torch.equal(optimizer.state[p]["momentum_buffer"], state["momentum_buffer"])

    def test_while_one_moves_the_other_is_still(self):
        net = self.net()
        optimizer, whole = heavy(net), batch()
        update(net, optimizer, whole)
        phases = list(net.schedule.phases(whole))
        for phase in phases:
            other = next(name for name in NAMES if name != phase.name)
            before = {n: v.clone() for n, v in net.encoders[other].state_dict().items()}
            net.schedule.phases = lambda _, phase=phase: iter([phase])
            moved = update(net, optimizer, whole)[phase.name]
            assert all(torch.equal(v, before[n]) for n, v in net.encoders[other].state_dict().items())
            assert any(n.startswith(f"encoders.{phase.name}.") for n in moved)

    def test_rows_of_one_modality_each_need_no_partners(self):
        """Unpaired data: no row has both."""
        first = torch.arange(B) < 4
        phases = list(model("mla").schedule.phases(batch({"audio": first, "image": ~first})))
        assert [(p.name, p.batch.targets.tolist(), p.batch.ids.tolist()) for p in phases] == [
            ("audio", [0, 1, 2, 0], [0, 1, 2, 3]),
            ("image", [1, 2], [4, 5]),
        ]

    def test_a_row_without_anything_teaches_nothing(self):
        nobody = torch.zeros(B, dtype=torch.bool)
        net = model("mla")
        assert update(net, heavy(net), batch(dict.fromkeys(NAMES, nobody))) == {}


class TestHeads:
    def runs(self, fusion, shared, alone=None, steps=3):
        """A net that saw three batches; ``alone``: of one modality only."""
        net = model(fusion, shared_head=shared)
        optimizer = heavy(net)
        for seed in range(steps):
            whole = batch()
            shuffled = torch.randperm(B, generator=torch.Generator().manual_seed(seed))
            whole = whole._replace(targets=whole.targets[shuffled])
            update(net, optimizer, whole if alone is None else only(whole, alone))
        return net.eval()

    def test_with_heads_of_their_own_nothing_couples_them(self):
        together, whole = self.runs("ume", False), batch()
        for name in NAMES:
            alone = self.runs("ume", False, alone=name)
            torch.testing.assert_close(together(whole).logits[name], alone(whole).logits[name], rtol=0, atol=1e-6)

    def test_a_shared_head_couples_them(self):
        fusion = {"name": "mla", "remember": None}
        together, whole = self.runs(fusion, True), batch()
        for name in NAMES:
            alone = self.runs(fusion, True, alone=name)
            assert (together(whole).logits[name] - alone(whole).logits[name]).abs().max() > 1e-3
            weight = f"encoders.{name}.stem.0.weight"
            assert not torch.equal(together.get_parameter(weight), alone.get_parameter(weight))

    def test_what_the_settings_take_away_is_named(self):
        with pytest.raises(ZooError, match="the schedule 'mla' needs the head that all modalities share: leave out shared_head: false"):
            model("mla", shared_head=False)
        with pytest.raises(ZooError, match=r"the schedule 'ogm_ge' needs logits of each modality, and 'concat' combines features: .* late"):
            model(["ogm_ge", "concat"])


class TestModel:
    """``zoo.build("mla")``: the same module as a classifier with the fusion."""

    def test_it_is_a_classifier_with_the_fusion(self):
        encoders = {name: {"name": "image_resnet", "layers": [1], "width": D, "image_size": 8} for name in NAMES}
        made = []
        for name, settings in (("mla", {}), ("classifier", {"fusion": "mla"})):
            torch.manual_seed(0)
            made.append(build(name, encoders=encoders, classes=K, **settings).eval())
        own, same = made
        assert own.state_dict().keys() == same.state_dict().keys()
        assert torch.equal(own(batch()).logits["fused"], same(batch()).logits["fused"])
        assert type(build("mla", encoders=encoders, classes=K, fusion="late").combine) is Late

    def test_by_default_two_resnets_of_18_layers_that_a_folder_gives_back(self, tmp_path):
        net = build("mla", classes=6)
        assert net.head.weight.shape == (6, 512)
        again = load(save(net, tmp_path / "model"))
        assert all(torch.equal(v, again.state_dict()[n]) for n, v in net.state_dict().items())

    def test_of_the_two_parts_of_this_name_info_tells_of_the_model(self):
        assert (info("mla")["kind"], info("mla", kind="fusion")["kind"]) == ("model", "fusion")
