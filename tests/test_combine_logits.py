"""Weights of logits, row by row: what entropy and energy make of them by hand, and what has no say in them."""

import math

import pytest
import torch

from zoo.joints import Sharing
from zoo.registry import build, entry, make, names
from zoo.types import Batch, ModalityInputs

B, D, K, NAMES = 6, 8, 6, ["audio", "image"]
OF_LOGITS = [n for n in names("fusion") if entry("fusion", n).joints.get("combine", "") is None and "logits" in entry("fusion", n).needs]
WEIGHING = ["learned", "qmf", "uncertainty"]
every, weighing = pytest.mark.parametrize("name", OF_LOGITS), pytest.mark.parametrize("name", WEIGHING)


def combine(name, modalities=NAMES):
    """Made, and moved off the state in which all weights are equal."""
    module = make("fusion", name, modalities, K)
    if name == "learned":
        module.scores.copy_(torch.tensor([0.5, -0.5, 1.0])[: len(modalities)])
    return module


def logits(rows=B, modalities=NAMES, scale=3.0):
    torch.manual_seed(1)
    return {name: scale * torch.randn(rows, K) for name in modalities}


def everyone(rows=B, modalities=NAMES):
    return {name: torch.ones(rows, dtype=torch.bool) for name in modalities}


def weights(module, x, present):
    """(M, B), the same for every class."""
    shares = torch.stack(list(module.shares(x, present).values()))
    assert torch.equal(shares, shares[:, :, :1].expand_as(shares))
    return shares[:, :, 0]


def test_the_lists_are_whole():
    assert sorted(OF_LOGITS) == sorted(["late", *WEIGHING])


class TestUncertainty:
    def test_by_hand(self):
        """Six equal classes, entropy log 6, beside a sure one, entropy 0: 1/7 and 6/7."""
        x = {"audio": torch.zeros(1, K), "image": torch.tensor([[200.0, 0, 0, 0, 0, 0]])}
        found = weights(make("fusion", "uncertainty", NAMES, K), x, everyone(1))
        torch.testing.assert_close(found[:, 0], torch.tensor([1 / 7, 6 / 7]))

    def test_are_the_softmax_of_minus_the_entropies(self):
        x = logits()
        p = {name: v.double().softmax(1) for name, v in x.items()}
        entropies = torch.stack([-(v * v.log()).sum(1) for v in p.values()])
        found = weights(make("fusion", "uncertainty", NAMES, K), x, everyone())
        torch.testing.assert_close(found.double(), (-entropies).softmax(0), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("scale", [0.01, 1, 100])
    def test_no_modality_outweighs_another_by_more_than_the_classes(self, scale):
        found = weights(make("fusion", "uncertainty", NAMES, K), logits(200, scale=scale), everyone(200))
        assert (found.max(0).values / found.min(0).values).max() <= K * (1 + 1e-5)

    def test_calibrated_logits_are_what_is_weighed(self):
        module, x = make("fusion", "uncertainty", NAMES, K), logits()
        module.temperatures.logarithms.copy_(torch.tensor([4.0, 0.5]).log())
        plain = make("fusion", "uncertainty", NAMES, K)
        torch.testing.assert_close(module(x, everyone()), plain({"audio": x["audio"] / 4, "image": x["image"] * 2}, everyone()))


class TestQmf:
    def test_by_hand(self):
        """-E of equal logits is log 6; of (10 log 6, 0, ...), less their mean, log(6^10 + 5) - 10/6 log 6."""
        x = {"audio": torch.zeros(1, K), "image": torch.tensor([[10 * math.log(6), 0, 0, 0, 0, 0]])}
        energy = [math.log(6), math.log(6**10 + 5) - 10 / 6 * math.log(6)]
        found = weights(make("fusion", "qmf", NAMES, K), x, everyone(1))
        torch.testing.assert_close(found[:, 0], torch.tensor(energy) / sum(energy))

    def test_what_is_added_to_all_logits_of_a_row_has_no_say(self):
        module, x = make("fusion", "qmf", NAMES, K), logits()
        moved = {"audio": x["audio"] - 40 * torch.arange(B)[:, None], "image": x["image"]}
        torch.testing.assert_close(weights(module, moved, everyone()), weights(module, x, everyone()), rtol=1e-4, atol=1e-5)

    def test_the_surer_of_two_that_agree_weighs_more(self):
        x = logits()
        found = weights(make("fusion", "qmf", NAMES, K), {"audio": x["audio"], "image": 2 * x["audio"]}, everyone())
        assert (found[1] > found[0]).all()


class TestAll:
    @weighing
    def test_sum_to_one_and_leave_out_who_is_absent(self, name):
        modalities = [*NAMES, "text"]
        module, x = combine(name, modalities), logits(8, modalities)
        present = {m: (torch.arange(8) >> i) % 2 == 0 for i, m in enumerate(modalities)}
        assert isinstance(module, Sharing)
        found = weights(module, x, present)
        there = torch.stack(list(present.values()))
        assert torch.equal(found == 0, ~there)
        torch.testing.assert_close(found.sum(0), there.any(0).float())
        full = weights(module, x, everyone(8, modalities))
        kept = full * there
        torch.testing.assert_close(found[:, :7], (kept / kept.sum(0))[:, :7])  # the same weights, brought to 1 again; row 7 has nothing

    @every
    def test_huge_logits_stay_numbers(self, name):
        torch.manual_seed(0)
        x = {m: torch.where(torch.rand(B, K) > 0.5, 1e4, -1e4).requires_grad_() for m in NAMES}
        out = combine(name)(x, everyone())
        out.sum().backward()
        assert bool(out.isfinite().all())
        assert all(bool(v.grad.isfinite().all()) for v in x.values())

    @every
    def test_a_rows_result_does_not_hang_on_its_company(self, name):
        module, x, present = combine(name), logits(), {"audio": torch.arange(B) != 2, "image": torch.arange(B) != 4}
        whole = module(x, present)
        order = torch.tensor([4, 0, 5, 2, 3, 1])
        for rows in (order, torch.tensor([3]), torch.tensor([1, 1, 1, 4])):
            own = module({m: v[rows] for m, v in x.items()}, {m: v[rows] for m, v in present.items()})
            torch.testing.assert_close(own, whole[rows], rtol=0, atol=1e-6)

    @every
    def test_alone_a_modality_says_what_it_says(self, name):
        x = logits()
        out = combine(name)(x, everyone() | {"audio": torch.zeros(B, dtype=torch.bool)})
        torch.testing.assert_close(out, x["image"])

    @every
    def test_two_that_say_the_same_are_as_sure_as_one(self, name):
        x = logits()["audio"]
        torch.testing.assert_close(combine(name)({"audio": x, "image": x}, everyone()), x)


class TestInAModel:
    """A classifier whose rows lack modalities, with whatever rubbish in their place."""

    def model(self, fusion):
        torch.manual_seed(0)
        encoders = {name: {"name": "tiny_image", "dim": D, "layers": 1, "heads": 2, "image_size": 8} for name in NAMES}
        return build("classifier", encoders=encoders, classes=K, fusion=fusion).eval()

    def batch(self, rubbish=0.0):
        torch.manual_seed(1)
        present = {"audio": torch.tensor([1, 1, 0, 1, 1, 0]).bool(), "image": torch.tensor([1, 0, 1, 0, 1, 0]).bool()}
        values = {name: torch.randn(B, 3, 8, 8).masked_fill(~there[:, None, None, None], rubbish) for name, there in present.items()}
        return Batch({name: ModalityInputs(values[name], None, present[name]) for name in NAMES})

    @torch.no_grad()
    @every
    def test_rubbish_where_nothing_is_changes_nothing(self, name):
        net = self.model(name)
        wanted = net(self.batch()).logits["fused"]
        assert bool(wanted.isfinite().all())
        for rubbish in (1e9, torch.inf, torch.nan):
            assert torch.equal(net(self.batch(rubbish)).logits["fused"], wanted)

    @torch.no_grad()
    @every
    def test_a_row_that_shows_nothing_gives_every_class_the_same(self, name):
        assert torch.equal(self.model(name)(self.batch()).logits["fused"][5], torch.zeros(K))

    @torch.no_grad()
    @every
    @pytest.mark.parametrize("missing", ["without the key", "nobody has it"])
    def test_an_encoder_that_no_row_needs_is_not_called(self, name, missing, monkeypatch):
        net, whole = self.model(name), self.batch()
        x = whole.inputs["audio"]
        nobody = {} if missing == "without the key" else {"image": x._replace(present=torch.zeros(B, dtype=torch.bool))}
        monkeypatch.setattr(net.encoders["image"], "forward", None)
        out = net(Batch({"audio": x._replace(present=None), **nobody}))
        torch.testing.assert_close(out.logits["fused"], out.logits["audio"])

    @torch.no_grad()
    @weighing
    def test_the_weights_are_what_the_result_is_made_of(self, name):
        net = self.model(name)
        out = net(self.batch())
        shares = net.combine.shares({m: out.logits[m] for m in NAMES}, out.present)
        torch.testing.assert_close(sum(shares[m] * out.logits[m] for m in NAMES), out.logits["fused"])
