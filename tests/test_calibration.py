"""Temperatures: the one of least cross-entropy, found again where it was put in, and fitted on the rows that are there alone."""

import pytest
import torch
from torch.nn import functional as F

from zoo.calibration import Temperatures, fit_temperature
from zoo.fusions.learned import fit_scores
from zoo.joints import Calibrating
from zoo.registry import entry, make, names

K, NAMES = 5, ["audio", "image", "text"]
OF_LOGITS = [n for n in names("fusion") if entry("fusion", n).joints.get("combine", "") is None and "logits" in entry("fusion", n).needs]
every = pytest.mark.parametrize("name", OF_LOGITS)


def honest(rows=2000, seed=0, scale=1.0):
    """Logits (N, K), and classes drawn by their softmax; ``scale`` says how much they know."""
    draw = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, K, generator=draw)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=draw)[:, 0]


def everyone(rows, modalities=NAMES):
    return {name: torch.ones(rows, dtype=torch.bool) for name in modalities}


@pytest.mark.parametrize("factor", [0.5, 1, 3])
def test_what_was_made_too_sure_or_unsure(factor):
    logits, targets = honest(4000)
    found = fit_temperature(factor * logits, targets)
    assert found == pytest.approx(factor, rel=0.1)
    around = [float(F.cross_entropy(factor * logits / t, targets)) for t in (found * 0.97, found, found * 1.03)]
    assert around[1] == min(around)


def test_within_its_bounds():
    """All right: ever smaller would be better, until the loss is 0 in float64; all wrong: ever larger."""
    logits = torch.eye(4).repeat(3, 1)
    assert 0.01 <= fit_temperature(logits, logits.argmax(1)) < 0.03
    assert fit_temperature(logits, 3 - logits.argmax(1)) == pytest.approx(100, rel=1e-3)


def test_it_divides_what_is_there_and_blanks_what_is_not():
    module = Temperatures(["audio", "image"])
    module.logarithms.copy_(torch.tensor([2.0, 0.5]).log())
    there = torch.tensor([True, False])
    out = module({"audio": torch.ones(2, 3), "image": torch.tensor([[1.0] * 3, [torch.nan] * 3])}, {"audio": ~there, "image": there})
    torch.testing.assert_close(out, {"audio": torch.tensor([[0.0] * 3, [0.5] * 3]), "image": torch.tensor([[2.0] * 3, [0.0] * 3])})


def test_the_fusions_of_logits_were_found():
    assert {"late", "uncertainty", "qmf", "learned"} <= set(OF_LOGITS)


class TestEveryFusionOfLogits:
    @every
    def test_temperatures_are_found_on_the_rows_that_have_the_modality(self, name):
        logits, targets = honest()
        there = everyone(len(targets)) | {"image": torch.arange(len(targets)) % 3 > 0}
        given = {"audio": 3 * logits, "image": (0.5 * logits).masked_fill(~there["image"][:, None], torch.nan), "text": logits}
        module = make("fusion", name, NAMES, K)
        assert isinstance(module, Calibrating)
        found = module.calibrate(given, there, targets)
        assert found == {"audio": pytest.approx(3, rel=0.15), "image": pytest.approx(0.5, rel=0.15), "text": pytest.approx(1, rel=0.15)}
        assert found["image"] == fit_temperature(given["image"][there["image"]], targets[there["image"]])
        torch.testing.assert_close(module.temperatures.logarithms.exp(), torch.tensor(list(found.values())))

    @every
    def test_a_modality_that_no_row_has_keeps_its_own(self, name):
        logits, targets = honest(200)
        module = make("fusion", name, NAMES, K)
        found = module.calibrate(dict.fromkeys(NAMES, 2 * logits), everyone(200) | {"text": torch.zeros(200, dtype=torch.bool)}, targets)
        assert list(found) == ["audio", "image"]
        assert module.temperatures.logarithms[2] == 0

    @every
    def test_it_makes_what_is_said_truer_and_goes_into_checkpoints(self, name):
        """One knows little and shouts, the other knows more and speaks low."""
        draw = torch.Generator().manual_seed(0)
        truth = torch.randint(K, (1500,), generator=draw)
        hints = {n: s * F.one_hot(truth, K) + torch.randn(1500, K, generator=draw) for n, s in (("audio", 0.3), ("image", 2.0))}
        given, there = {"audio": 6 * hints["audio"], "image": 0.5 * hints["image"]}, everyone(1500, ["audio", "image"])
        module = make("fusion", name, ["audio", "image"], K)
        before = F.cross_entropy(module(given, there), truth)
        module.calibrate(given, there, truth)
        out = module(given, there)
        assert F.cross_entropy(out, truth) < before - 0.1
        again = make("fusion", name, ["audio", "image"], K)
        again.load_state_dict(module.state_dict())
        assert torch.equal(again(given, there), out)
        assert not list(module.parameters())  # nothing that training would move

    @every
    def test_calibrated_again_is_the_same(self, name):
        """The fit looks at the logits that it is given, not at what was fitted before."""
        logits, targets = honest(300)
        given = {n: (i + 1) * logits for i, n in enumerate(NAMES)}
        module = make("fusion", name, NAMES, K)
        assert module.calibrate(given, everyone(300), targets) == module.calibrate(given, everyone(300), targets)


class TestLearned:
    def fitted(self, scales, there=None, rows=1500):
        draw = torch.Generator().manual_seed(0)
        truth = torch.randint(K, (rows,), generator=draw)
        given = {n: s * (s * F.one_hot(truth, K) + torch.randn(rows, K, generator=draw)) for n, s in scales.items()}
        module = make("fusion", "learned", list(scales), K)
        present = there or everyone(rows, list(scales))
        module.calibrate(given, present, truth)
        return module, given, present, truth

    def test_the_weaker_one_weighs_less(self):
        module, given, present, _ = self.fitted({"audio": 0.3, "image": 2.0})
        weights = module.shares(given, present)
        assert weights["image"][0, 0] > 0.9
        assert torch.equal(weights["image"], weights["image"][:1, :1].expand_as(weights["image"]))  # of every row and class

    def test_the_weights_that_made_the_classes(self):
        """Drawn by the softmax of 0.2 of one and 0.8 of the other."""
        draw = torch.Generator().manual_seed(0)
        given = {n: 4 * torch.randn(4000, K, generator=draw, dtype=torch.float64) for n in ("audio", "image")}
        targets = torch.multinomial((0.2 * given["audio"] + 0.8 * given["image"]).softmax(1), 1, generator=draw)[:, 0]
        scores = fit_scores(given, everyone(4000, list(given)), targets)
        torch.testing.assert_close(scores.softmax(0), torch.tensor([0.2, 0.8], dtype=torch.float64), rtol=0, atol=0.02)

    def test_rows_of_one_modality_say_nothing_of_weights(self):
        half = torch.arange(100) % 2 == 0
        module, *_ = self.fitted({"audio": 0.3, "image": 2.0}, {"audio": half, "image": ~half}, rows=100)
        assert torch.equal(module.scores, torch.zeros(2))

    def test_they_weigh_what_the_temperatures_left(self):
        """A modality that says the same ten times as loud ends with the same weight."""
        draw = torch.Generator().manual_seed(0)
        truth = torch.randint(K, (1000,), generator=draw)
        given = {n: F.one_hot(truth, K) + torch.randn(1000, K, generator=draw) for n in ("audio", "image")}
        scores = []
        for loud in (1, 10):
            module = make("fusion", "learned", ["audio", "image"], K)
            module.calibrate({"audio": loud * given["audio"], "image": given["image"]}, everyone(1000, list(given)), truth)
            scores.append(module.scores)
        torch.testing.assert_close(*scores, rtol=0, atol=1e-3)

    def test_one_that_only_harms_ends_the_search_too(self):
        logits, targets = honest(300)
        scores = fit_scores({"audio": logits.double(), "image": -logits.double()}, everyone(300, ["audio", "image"]), targets)
        assert scores.abs().max() <= 10
        assert scores.softmax(0)[0] > 0.95

    def test_a_perfect_one_ends_the_search(self):
        truth = torch.arange(60) % K
        given = {"audio": 50.0 * F.one_hot(truth, K), "image": torch.zeros(60, K)}
        module = make("fusion", "learned", ["audio", "image"], K)
        module.calibrate(given, everyone(60, ["audio", "image"]), truth)
        assert bool(module.scores.isfinite().all())
        assert module.scores.abs().max() <= 10
