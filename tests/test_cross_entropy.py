"""The loss of classes: over the rows that show anything, plus what the schedule adds."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from zoo.errors import ZooError
from zoo.registry import make
from zoo.types import Batch, ModelOutput

B, K = 5, 3
TARGETS = torch.tensor([0, 1, 2, 0, 1])


class Model:
    """Gives logits of two modalities, of which rows 1 and 4 have neither."""

    def __init__(self, schedule=None):
        torch.manual_seed(0)
        self.schedule, self.logits = schedule, torch.randn(B, K, requires_grad=True)
        self.present = {"audio": torch.tensor([True, False, False, True, False]), "image": torch.tensor([True, False, True, True, False])}

    def __call__(self, batch):
        x = {name: torch.ones(B, 2, requires_grad=True) for name in self.present}
        return ModelOutput(x, present=self.present, logits={"fused": self.logits})


def loss(model, **settings):
    return make("objective", {"name": "cross_entropy", **settings})(model, Batch({}, targets=TARGETS))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_is_the_mean_over_rows_that_show_anything(smoothing):
    model = Model()
    found = loss(model, label_smoothing=smoothing)
    here = torch.tensor([0, 2, 3])
    torch.testing.assert_close(found.total, F.cross_entropy(model.logits[here], TARGETS[here], label_smoothing=smoothing))
    assert found.parts == {"fused": found.total.detach()}
    found.total.backward()
    assert not model.logits.grad[[1, 4]].any()


def test_nobody_there_is_no_loss_and_a_gradient_of_zeros():
    model = Model()
    model.present = {name: torch.zeros(B, dtype=torch.bool) for name in model.present}
    found = loss(model)
    found.total.backward()
    assert found.total == 0
    assert torch.equal(model.logits.grad, torch.zeros(B, K))


def test_what_a_schedule_adds():
    class Adding(nn.Module):
        def terms(self, output, targets):
            assert torch.equal(targets, TARGETS)
            return {"audio/more": output.embeddings["audio"].sum(), "image/less": -2 * output.embeddings["image"].mean()}

    plain, more = loss(Model()), loss(Model(Adding()))
    assert {name: float(x) for name, x in more.parts.items()} == {"fused": float(plain.total.detach()), "audio/more": 10, "image/less": -2}
    torch.testing.assert_close(more.total, plain.total + 8)


def test_what_it_hands_on_has_no_graph():
    out = loss(Model()).output
    assert not any(x.requires_grad for x in [*out.embeddings.values(), *out.logits.values()])
    assert out.present.keys() == {"audio", "image"}


def test_half_precision_is_summed_in_full():
    model = Model()
    model.logits = model.logits.detach().bfloat16().requires_grad_()
    assert loss(model).total.dtype == torch.float32


def test_rows_without_classes_are_refused():
    with pytest.raises(ZooError, match="cross_entropy needs rows of known class: write a data set of labelled rows"):
        make("objective", "cross_entropy")(SimpleNamespace(), Batch({}))


class TestOfEachClassByItself:
    SHARES = torch.tensor([[1.0, 0.3, 0.0], [0.0, 1.0, 0.0], [0.6, 0.6, 0.0], [0.0, 0.0, 0.9], [0.3, 0.0, 0.0]])

    @staticmethod
    def loss(model, targets):
        return make("objective", "binary_cross_entropy")(model, Batch({}, targets=targets))

    def test_is_the_mean_over_rows_and_classes_times_the_classes(self):
        model = Model()
        found = self.loss(model, self.SHARES)
        here = torch.tensor([0, 2, 3])
        expected = F.binary_cross_entropy_with_logits(model.logits[here], self.SHARES[here]) * K
        torch.testing.assert_close(found.total, expected)
        assert found.parts == {"fused": found.total.detach()}
        found.total.backward()
        assert not model.logits.grad[[1, 4]].any()

    def test_by_hand(self):
        """A logit of 0 costs log 2 whatever the share; ln 3 for a share of 0.3 costs log 4 - 0.3 log 3."""
        model = Model()
        model.logits = torch.zeros(B, K)
        model.logits[0, 1] = math.log(3)
        model.present = {"image": torch.arange(B) == 0}
        found = self.loss(model, self.SHARES).total
        assert found.item() == pytest.approx(2 * math.log(2) + math.log(4) - 0.3 * math.log(3))

    def test_one_class_a_row_is_wrong_of_all_others(self):
        model = Model()
        torch.testing.assert_close(self.loss(model, TARGETS).total, self.loss(model, F.one_hot(TARGETS).float()).total)

    def test_what_a_schedule_adds_goes_by_the_class_that_is_most_right(self):
        class Adding(nn.Module):
            def terms(self, output, targets):
                assert targets.tolist() == [0, 1, 0, 2, 0]
                return {"more": output.embeddings["audio"].sum()}

        torch.testing.assert_close(self.loss(Model(Adding()), self.SHARES).total, self.loss(Model(), self.SHARES).total + 10)

    def test_half_precision_is_summed_in_full(self):
        model = Model()
        model.logits = model.logits.detach().bfloat16().requires_grad_()
        assert self.loss(model, self.SHARES).total.dtype == torch.float32

    def test_what_does_not_fit(self):
        with pytest.raises(ZooError, match="binary_cross_entropy needs rows of known class"):
            make("objective", "binary_cross_entropy")(SimpleNamespace(), Batch({}))
        with pytest.raises(ZooError, match=r"the model tells 3 classes, and the rows say of 2 .*: write model\.classes: 2"):
            self.loss(Model(), self.SHARES[:, :2])
        for wrong in (K, -1):
            with pytest.raises(ZooError, match=rf"a row is of class {wrong}, and the model tells 3, 0 to 2: write as many model\.classes"):
                self.loss(Model(), TARGETS.index_fill(0, torch.tensor([1]), wrong))
        with pytest.raises(ZooError, match=r"cross_entropy needs one right class a row.* write objective: binary_cross_entropy"):
            make("objective", "cross_entropy")(Model(), Batch({}, targets=self.SHARES))
