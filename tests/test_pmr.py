"""PMR: who is behind by the prototypes learns them, who is ahead is held back while training is young."""

import math

import pytest
import torch

from tests.test_schedules import NAMES, B, D, K, batch, heavy, model, update
from zoo.fusions.pmr import leads
from zoo.joints import Correcting, Phase, Supplementing
from zoo.registry import make
from zoo.types import Batch, Loss, ModelOutput

THREE = [*NAMES, "text"]


def schedule(chances, names=NAMES, **settings):
    """Of two classes, the prototypes so far apart that a feature at the first one's place has it with this probability."""
    made = make("fusion", {"name": "pmr", "decay": 0.5, **settings}, names, 1, 2)
    for m, chance in enumerate(chances):
        made.means[m, 1, 0] = math.log(chance / (1 - chance))
    made.seen.fill_(True)
    return made


def output(names=NAMES, rows=4, present=None):
    """Features at 0, where the first prototype is."""
    features = {name: torch.zeros(rows, 1, requires_grad=True) for name in names}
    return ModelOutput(features, present={name: torch.ones(rows, dtype=torch.bool) for name in names} | (present or {}))


FIRST = torch.zeros(4, dtype=torch.long)


def said(made, out, targets=FIRST):
    return {name: float(term.detach()) for name, term in made.terms(out, targets).items()}


class TestTerms:
    def test_by_hand(self):
        """0.8 against 0.5: one is 1.6 times ahead, the other 0.625, whose 1 / rho - 1 is 0.6 as well."""
        entropy = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2))
        assert said(schedule([0.8, 0.5], alpha=2.0, mu=0.1), output()) == {
            "audio/prototypes": 0,
            "audio/entropy": pytest.approx(-0.1 * 0.6 * entropy),
            "image/prototypes": pytest.approx(2.0 * 0.6 * math.log(2)),
            "image/entropy": 0,
        }

    def test_far_ahead_counts_once(self):
        """Rows of the second class, which has the rest: 0.4 against 0.01."""
        found = said(schedule([0.6, 0.99], mu=1.0), output(), FIRST + 1)
        assert found["image/prototypes"] == pytest.approx(-math.log(0.01), rel=1e-4)
        assert found["audio/entropy"] == pytest.approx(0.6 * math.log(0.6) + 0.4 * math.log(0.4), rel=1e-4)

    def test_in_balance_nothing_is_added(self):
        assert set(said(schedule([0.6] * 3, THREE), output(THREE)).values()) == {0}

    def test_of_three_each_is_compared_with_the_mean_of_the_others(self):
        assert leads({"audio": 0.9, "image": 0.5, "text": 0.1}) == pytest.approx({"audio": 3, "image": 1, "text": 1 / 7})
        assert leads({"audio": 0.9}) == {}

    @pytest.mark.parametrize("missing", ["no row has it", "no prototype of its class"])
    def test_with_nobody_to_compare_nothing_is_added(self, missing):
        made, out = schedule([0.8, 0.5]), output(present={"image": torch.full((4,), missing != "no row has it")})
        if missing != "no row has it":
            made.seen[1, 0] = False
        terms = made.terms(out, FIRST)
        assert {name: float(t.detach()) for name, t in terms.items()} == dict.fromkeys(
            said(schedule([0.8, 0.5]), output()), 0
        )  # the same names
        torch.stack(list(terms.values())).sum().backward()
        assert all(bool(x.grad is None or x.grad.isfinite().all()) for x in out.embeddings.values())

    def test_entropies_end_with_youth(self):
        made = schedule([0.8, 0.5], early=2)
        for entropy in (True, True, False):
            found = said(made, output())
            assert (found["audio/entropy"] < 0) is entropy
            assert found["image/prototypes"] > 0
            made.after_step(None, Phase("joint", Batch({}, targets=FIRST)), {}, Loss(torch.zeros(()), {}, output=output()))
            made.means.copy_(schedule([0.8, 0.5]).means)

    def test_absent_rows_have_no_say(self):
        here = torch.tensor([True, True, False, False])
        one, other = output(present={"image": here}), output(rows=2)
        one.embeddings["image"].data[2:] = torch.nan
        assert said(schedule([0.8, 0.5]), one) == pytest.approx(said(schedule([0.8, 0.5]), other, FIRST[:2]))


class TestPrototypes:
    def step(self, made, out, targets):
        made.after_step(None, Phase("joint", Batch({}, targets=targets)), {}, Loss(torch.zeros(()), {}, output=out))

    def test_run(self):
        made = make("fusion", {"name": "pmr", "decay": 0.75}, NAMES, 1, 3)
        targets = torch.tensor([0, 0, 1, 1])
        features = {"audio": torch.tensor([[1.0], [3], [7], [torch.nan]]), "image": torch.ones(4, 1)}
        present = {"audio": torch.tensor([True, True, True, False]), "image": torch.ones(4, dtype=torch.bool)}
        self.step(made, ModelOutput(features, present=present), targets)
        assert made.means[0, :, 0].tolist() == [2, 7, 0]  # a first one counts whole
        assert made.seen.tolist() == [[True, True, False]] * 2
        self.step(made, ModelOutput({**features, "audio": torch.full((4, 1), 10.0)}, present=present), torch.zeros(4, dtype=torch.long))
        assert made.means[0, :, 0].tolist() == [4, 7, 0]  # 0.75 * 2 + 0.25 * 10; a class that the batch lacks stays
        assert int(made.steps) == 2

    def test_go_into_checkpoints(self):
        net = model(["late", "pmr"])
        update(net, heavy(net), batch())
        again = model(["late", "pmr"])
        again.load_state_dict(net.state_dict())
        assert bool(net.schedule.seen.all())
        out = net(batch())
        assert said(again.schedule, out, batch().targets) == said(net.schedule, out, batch().targets)


class TestInTraining:
    def test_protocols(self):
        made = make("fusion", "pmr", NAMES, D, K)
        assert isinstance(made, Supplementing)
        assert isinstance(made, Correcting)
        assert not made.multi_phase
        assert made.watched(None) == {}

    @pytest.mark.parametrize("combine", ["late", "concat"])
    def test_the_loss_is_of_all_terms_and_reaches_the_encoder_that_is_behind(self, combine):
        net, whole = model([combine, {"name": "pmr", "mu": 0.0}]), batch()
        plain = model([combine])
        objective = make("objective", "cross_entropy")
        first = objective(net, whole)
        assert first.parts["audio/prototypes"] == first.parts["image/prototypes"] == 0  # nothing is known yet
        net.schedule.means.normal_()
        net.schedule.seen.fill_(True)
        loss, usual = objective(net, whole), objective(plain, whole)
        assert set(loss.parts) == {"fused", *(f"{name}/{kind}" for name in NAMES for kind in ("prototypes", "entropy"))}
        torch.testing.assert_close(loss.total, torch.stack(list(loss.parts.values())).sum())
        assert torch.equal(loss.parts["fused"], usual.total)
        (behind,) = [name for name in NAMES if loss.parts[f"{name}/prototypes"] > 0]
        loss.total.backward()
        usual.total.backward()
        for (name, p), q in zip(net.named_parameters(), plain.parameters(), strict=True):
            if p.grad is not None:
                assert torch.equal(p.grad, q.grad) is (f"encoders.{behind}." not in name), name

    def test_it_brings_features_to_their_prototypes(self):
        """The slow modality's own rows become clearer by its prototypes than without the loss."""
        chances = []
        for alpha in (0.0, 5.0):
            net, whole = model(["late", {"name": "pmr", "alpha": alpha, "mu": 0.0}]), batch(rows=B)
            optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
            for _ in range(15):
                update(net, optimizer, whole)
            with torch.no_grad():
                chances.append(min(float(net.schedule.log_chances(name, net(whole), whole.targets)[1].mean()) for name in NAMES))
        assert chances[1] > chances[0]


def test_the_entropy_is_that_of_the_prototypes():
    made = make("fusion", {"name": "pmr", "mu": 1.0}, NAMES, D, K)
    torch.manual_seed(0)
    made.means.normal_()
    made.seen.fill_(True)
    out = ModelOutput({name: torch.randn(B, D) for name in NAMES}, present={name: torch.ones(B, dtype=torch.bool) for name in NAMES})
    targets = torch.arange(B) % K
    p = {name: (-torch.cdist(out.embeddings[name].double(), made.means[m].double())).softmax(1) for m, name in enumerate(NAMES)}
    rho = float(p["audio"].gather(1, targets[:, None]).mean() / p["image"].gather(1, targets[:, None]).mean())
    ahead, factor = ("audio", rho) if rho > 1 else ("image", 1 / rho)
    entropy = float(-(p[ahead] * p[ahead].log()).sum(1).mean())
    assert said(made, out, targets)[f"{ahead}/entropy"] == pytest.approx(-min(factor - 1, 1) * entropy, rel=1e-4)
    assert factor > 1.01
