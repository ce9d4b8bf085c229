"""Twins, queues, samplers and soft targets, each against what its paper writes."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.picture_text_model import Small, batch_of
from zoo import ZooError
from zoo.checkpoint import unshared
from zoo.momentum import NOBODY, EMATwin, FeatureQueue, NegativeSampler, SoftTarget

EXACT = {"rtol": 1e-12, "atol": 1e-14}  # float64


class TestTwin:
    def test_starts_as_the_model_and_follows_it(self):
        model = Small().double()
        twin = EMATwin(model, 0.9)
        before = copy.deepcopy(model.state_dict())
        assert all(torch.equal(twin.model.state_dict()[name], value) for name, value in before.items())
        expected = {name: value.clone() for name, value in before.items()}
        for _ in range(3):
            for parameter in model.parameters():
                parameter.data += torch.randn_like(parameter)
            model.average += torch.randn_like(model.average)
            model.passes += 1
            twin.update(model)
            for name, value in model.state_dict().items():
                expected[name] = 0.9 * expected[name] + 0.1 * value if value.is_floating_point() else value
        expected["forbidden"] = model.forbidden
        for name, value in twin.model.state_dict().items():
            torch.testing.assert_close(value, expected[name].to(value.dtype), **EXACT, msg=lambda m, name=name: f"{name}: {m}")
        assert twin.model.passes == 3
        assert torch.equal(twin.model.forbidden, model.forbidden)  # which holds infinities

    def test_what_does_not_move_stays_bit_for_bit(self):
        model = Small()
        twin = EMATwin(model, 0.995)
        for _ in range(5):
            twin.update(model)
        assert all(torch.equal(a, b) for a, b in zip(twin.model.state_dict().values(), model.state_dict().values(), strict=True))

    def test_is_frozen_and_never_in_training_mode(self):
        model = Small(dropout=0.5).double()
        holder = nn.Module()
        holder.twin = EMATwin(model, 0.9)
        holder.train()
        batch = batch_of(4)
        teacher = holder.twin.teacher()
        seen = [teacher.look(batch.inputs["image"]).tokens for _ in range(2)]
        assert torch.equal(*seen)  # a method, which no hook of a forward pass sees
        assert not seen[0].requires_grad
        assert not any(p.requires_grad for p in holder.parameters())
        assert not torch.equal(*(model.look(batch.inputs["image"]).tokens for _ in range(2)))

    def test_weights_that_are_shared_stay_so_and_move_once(self):
        model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        model[1].weight = model[0].weight
        twin = EMATwin(model, 0.5)
        start = model[0].weight.detach().clone()
        model[0].weight.data += 1
        twin.update(model)
        assert twin.model[0].weight is twin.model[1].weight
        torch.testing.assert_close(twin.model[0].weight, start + 0.5)

    def test_16_bits_are_too_few(self):
        with pytest.raises(ZooError, match=r"momentum: weight, bias have 16 bits.*run.precision: bf16"):
            EMATwin(nn.Linear(2, 2).to(torch.bfloat16), 0.995)
        frozen = nn.Linear(2, 2).to(torch.bfloat16).requires_grad_(False)
        EMATwin(nn.Sequential(frozen, nn.Linear(2, 2)), 0.995)


class TestQueue:
    def test_starts_with_random_unit_vectors_of_nobody(self):
        queue = FeatureQueue(6, 8)
        assert queue.features.shape == (6, 8)
        torch.testing.assert_close(queue.features.norm(dim=0), torch.ones(8))
        assert torch.unique(queue.features, dim=1).shape == (6, 8)
        assert queue.ids.tolist() == [NOBODY] * 8
        assert {*queue.state_dict()} == {"features", "ids", "pointer"}

    def test_the_oldest_go_first_and_the_pointer_comes_round(self):
        queue = FeatureQueue(3, 6)
        random = queue.features.clone()
        keys = torch.randn(5, 2, 3)
        for step, two in enumerate(keys):
            queue.enqueue(two, torch.tensor([10 * step, 10 * step + 1]))
            assert queue.pointer == (2 * step + 2) % 6
            if step == 1:
                assert torch.equal(queue.features[:, 4:], random[:, 4:])
        expected = F.normalize(torch.cat([keys[3], keys[4], keys[2]]), dim=1)
        torch.testing.assert_close(queue.features.T, expected)
        assert queue.ids.tolist() == [30, 31, 40, 41, 20, 21]

    def test_who_is_not_there_leaves_what_stands(self):
        queue = FeatureQueue(3, 4)
        random = queue.features.clone()
        keys = torch.tensor([[torch.nan] * 3, [1.0] * 3])
        queue.enqueue(keys, torch.tensor([5, 6]), torch.tensor([False, True]))
        assert torch.equal(queue.features[:, [0, 2, 3]], random[:, [0, 2, 3]])
        assert queue.ids.tolist() == [NOBODY, 6, NOBODY, NOBODY]
        assert queue.pointer == 2

    @pytest.mark.parametrize(("rows", "says"), [(3, "write queue: 12 or 9"), (16, "write queue: 16$"), (4, "write queue: 12 or 8")])
    def test_a_size_that_batches_do_not_fill_evenly(self, rows, says):
        queue = FeatureQueue(2, 10)
        for ask in (lambda: queue.check(rows), lambda: queue.enqueue(torch.randn(rows, 2))):
            with pytest.raises(ZooError, match=rf"10 is no multiple of the {rows} vectors .* {says}"):
                ask()
        queue.check(5)

    def test_no_gradient_comes_in(self):
        queue, keys = FeatureQueue(2, 4), torch.randn(2, 2, requires_grad=True)
        queue.enqueue(keys)
        assert not queue.features.requires_grad


class TestNegatives:
    LOGITS = torch.tensor([[9.0, 1.0, 0.0, 2.0], [0.0, 9.0, 1.0, 3.0], [1.0, 1.0, 5.0, 1.0], [-900.0, -901.0, 0.0, 0.0]])
    ALLOWED = torch.tensor([[0, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]]).bool()

    @pytest.mark.parametrize("how", [{"how": "sampled"}, {"how": "sampled", "eps": 1e-4}, {"how": "uniform"}])
    def test_the_known_weigh_nothing_at_all(self, how):
        weights = NegativeSampler(**how).weights(self.LOGITS, self.ALLOWED)
        assert bool((weights[~self.ALLOWED] == 0).all())
        assert bool(weights.isfinite().all())
        drawn = [NegativeSampler(**how)(self.LOGITS, self.ALLOWED) for _ in range(300)]
        assert all(bool(self.ALLOWED[torch.arange(4), d.column][d.found].all()) for d in drawn)
        assert drawn[0].found.tolist() == [True, True, False, True]

    def test_albef_zeroes_the_softmax_which_is_the_softmax_of_the_rest(self):
        reference = self.LOGITS[:2].softmax(1) * self.ALLOWED[:2]
        weights = NegativeSampler().weights(self.LOGITS[:2], self.ALLOWED[:2])
        torch.testing.assert_close(weights, reference / reference.sum(1, keepdim=True))

    def test_what_a_softmax_of_all_would_round_away_is_still_told_apart(self):
        weights = NegativeSampler().weights(self.LOGITS, self.ALLOWED)
        torch.testing.assert_close(weights[3, :2], torch.tensor([0.0, -1.0]).softmax(0))
        assert self.LOGITS[3].softmax(0)[:2].tolist() == [0, 0]

    def test_blip_adds_before_it_leaves_out(self):
        weights = NegativeSampler(eps=1e-4).weights(self.LOGITS, self.ALLOWED)
        torch.testing.assert_close(weights, (self.LOGITS.softmax(1) + 1e-4) * self.ALLOWED)

    @pytest.mark.parametrize("how", ["sampled", "uniform"])
    def test_is_drawn_as_often_as_it_weighs(self, how):
        torch.manual_seed(3)
        draws, logits = 20_000, torch.tensor([[5.0, 1.0, 0.0, -1.0, 2.0, 0.5]])
        allowed = torch.tensor([[0, 1, 1, 1, 1, 1]]).bool()
        expected = logits[0, 1:].softmax(0) if how == "sampled" else torch.full((5,), 0.2)
        columns = NegativeSampler(how)(logits.expand(draws, -1), allowed.expand(draws, -1)).column
        counts = torch.bincount(columns, minlength=6).double()
        assert counts[0] == 0
        statistic = ((counts[1:] - draws * expected) ** 2 / (draws * expected)).sum()
        assert statistic < 18.5  # the 0.1 % tail of chi-square with 4 degrees of freedom
        wrong = (logits[0, 1:] * 0.9).softmax(0) if how == "sampled" else torch.tensor([0.22, 0.18, 0.2, 0.2, 0.2])
        assert ((counts[1:] - draws * wrong) ** 2 / (draws * wrong)).sum() > 40

    def test_the_same_seed_draws_the_same(self):
        drawn = []
        for _ in range(2):
            torch.manual_seed(5)
            drawn.append(NegativeSampler()(torch.randn(30, 30), ~torch.eye(30).bool()).column)
        assert torch.equal(*drawn)


class TestSoftTarget:
    def test_rises_and_stays(self):
        target, shares = SoftTarget(0.4, 4), []
        for _ in range(6):
            shares.append(target.share)
            target.step()
        assert shares == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.4])  # ALBEF's alpha * min(1, i / len(loader))

    def test_without_a_ramp(self):
        assert SoftTarget(0.4, 0).share == 0.4

    def test_goes_on_where_it_was_saved(self):
        target, other = SoftTarget(0.4, 4), SoftTarget(0.4, 4)
        target.step()
        target.step()
        nn.ModuleDict({"a": other}).load_state_dict(unshared(nn.ModuleDict({"a": target}).state_dict()))
        assert other.share == target.share == pytest.approx(0.2)
        other.step()
        assert other.share == pytest.approx(0.3)
        assert other.steps == 3
