"""The contrastive loss as a module: its learned scale and bias, its settings, copies and stored weights."""

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor

from zoo.kernels.contrastive import ContrastiveLoss, contrastive_loss

DOUBLE = torch.float64
EXACT = {"rtol": 1e-10, "atol": 1e-12}  # float64: a few hundred roundings of 1e-16
IDS = torch.tensor([0, 1, 2, 0, 3, 4])


def vectors(rows: int, dim: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(rows, dim, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


class TestModule:
    @pytest.mark.parametrize("kind", ["log", "raw", "fixed"])
    def test_each_kind_of_scale_is_the_loss_at_that_scale(self, kind):
        x, y = vectors(6).requires_grad_(), vectors(6, seed=1)
        loss = ContrastiveLoss(scale=7.0, scale_kind=kind).double()
        value = loss(x, y)
        scale = torch.tensor(7.0, dtype=DOUBLE, requires_grad=True)
        plain = contrastive_loss(x, y, scale=scale, normalize=True)
        torch.testing.assert_close(value, plain, rtol=1e-6, atol=0)  # the module's log is stored in float32
        by_x, by_scale = torch.autograd.grad(plain, (x, scale))
        value.backward()
        torch.testing.assert_close(x.grad, by_x, rtol=1e-5, atol=1e-8)
        expected = {"log": {"log_scale": 7.0 * by_scale}, "raw": {"raw_scale": by_scale}, "fixed": {}}[kind]
        assert {name for name, _ in loss.named_parameters()} == set(expected)
        for name, gradient in expected.items():
            torch.testing.assert_close(loss.get_parameter(name).grad, gradient, rtol=1e-5, atol=0)

    @pytest.mark.parametrize("kind, stored, gradient", [("log", math.log(500), 100.0), ("raw", 500.0, 1.0)])
    def test_a_scale_beyond_its_bound_is_used_at_the_bound_and_finds_back(self, kind, stored, gradient):
        loss = ContrastiveLoss(scale_kind=kind, max_scale=100.0)
        (parameter,) = loss.parameters()
        with torch.no_grad():
            parameter.fill_(stored)
        assert loss.scale.item() == pytest.approx(100.0, rel=1e-6)
        (found,) = torch.autograd.grad(loss.scale, parameter)
        assert found.item() == pytest.approx(gradient, rel=1e-6)

    @pytest.mark.parametrize("kind", ["log", "raw", "fixed"])
    def test_a_scale_below_its_bound_is_itself(self, kind):
        assert ContrastiveLoss(scale=20.0, scale_kind=kind, max_scale=100.0).scale.item() == pytest.approx(20.0, rel=1e-6)
        assert ContrastiveLoss(scale=20.0, scale_kind=kind, max_scale=10.0).scale.item() == pytest.approx(10.0, rel=1e-6)

    def test_siglip_learns_its_bias(self):
        x, y = vectors(6), vectors(6, seed=1)
        loss = ContrastiveLoss(scale=10.0, bias=-10.0, form="sigmoid").double()
        value = loss(x, y)
        bias = torch.tensor(-10.0, dtype=DOUBLE, requires_grad=True)
        plain = contrastive_loss(x, y, scale=loss.scale.detach(), bias=bias, form="sigmoid", normalize=True)
        torch.testing.assert_close(value, plain, **EXACT)
        value.backward()
        torch.testing.assert_close(loss.bias.grad, torch.autograd.grad(plain, bias)[0], **EXACT)

    def test_settings_and_tensors_arrive(self):
        x, y, queue = vectors(6), vectors(6, seed=1), vectors(3, seed=2)
        tensors = {
            "ids_x": IDS,
            "ids_y": IDS,
            "ids_negatives": torch.tensor([0, 9, 2]),
            "present": torch.arange(6) != 1,
            "soft": (y, x, queue),
            "weight": torch.arange(6) + 1.0,
            "negatives": queue,
            "known": torch.tensor([[0, 4]]),
        }
        settings = {"direction": "rows", "normalize": False, "smoothing": 0.1, "soft_weight": 0.5, "reduction": "sum", "impl": "reference"}
        found = ContrastiveLoss(scale=2.0, scale_kind="fixed", **settings)(x, y, **tensors)
        torch.testing.assert_close(found, contrastive_loss(x, y, scale=2.0, **tensors, **settings), **EXACT)
        groups, nobody = torch.tensor([0, 1, 0, 1, 2, 2]), torch.full((6,), -1)
        one_side = ContrastiveLoss(scale=2.0, scale_kind="fixed")
        torch.testing.assert_close(one_side(x, groups=groups), contrastive_loss(x, scale=2.0, groups=groups, normalize=True), **EXACT)
        assert one_side(x, positive=nobody, validate=False).item() == 0

    @pytest.mark.parametrize("kind", ["log", "raw", "fixed"])
    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"])
    def test_copies_are_equal_and_apart(self, kind, copied):
        loss = ContrastiveLoss(scale=5.0, scale_kind=kind, bias=-3.0, form="sigmoid", max_scale=100.0)
        twin, x, y = copied(loss), vectors(6), vectors(6, seed=1)
        assert torch.equal(twin(x, y), loss(x, y))
        with torch.no_grad():
            twin.bias.fill_(0.0)
        assert loss.bias.item() == -3.0

    @pytest.mark.parametrize("kind", ["log", "raw", "fixed"])
    def test_weights_go_round(self, kind):
        loss, other = (ContrastiveLoss(scale=scale, scale_kind=kind, bias=-scale) for scale in (5.0, 9.0))
        other.load_state_dict(loss.state_dict())
        assert {name: t.item() for name, t in other.state_dict().items()} == {name: t.item() for name, t in loss.state_dict().items()}
        assert other.scale.item() == pytest.approx(5.0, rel=1e-6)

    def test_weights_of_one_kind_do_not_load_as_another(self):
        with pytest.raises(RuntimeError, match="raw_scale"):
            ContrastiveLoss(scale_kind="raw").load_state_dict(ContrastiveLoss(scale_kind="log").state_dict())

    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"scale": 0.0}, "scale=0.0 must be positive and finite"),
            ({"scale": math.inf}, "scale=inf must be positive and finite"),
            ({"max_scale": math.inf}, "max_scale=inf must be positive and finite"),
            ({"soft_weight": -1.0}, r"soft_weight=-1.0 must lie in 0\.\.1"),
            ({"scale": math.nan}, "scale=nan must be positive"),
            ({"max_scale": -1.0}, "max_scale=-1.0 must be positive"),
            ({"scale_kind": "exp"}, "scale_kind='exp' is no choice: one of log, raw, fixed"),
            ({"form": "hinge"}, "form='hinge' is no choice: one of softmax, sigmoid"),
            ({"smoothing": 1.0}, "smoothing=1.0 must lie in 0..1, 1 excluded"),
        ],
    )
    def test_refusals(self, settings, message):
        with pytest.raises(ValueError, match=message):
            ContrastiveLoss(**settings)

    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"scale": "10"}, "scale must be a number, not str"),
            ({"max_scale": "100"}, "max_scale must be a number, not str"),
            ({"bias": 1j}, "bias must be a number, not complex"),
        ],
    )
    def test_what_is_no_number(self, settings, message):
        with pytest.raises(TypeError, match=message):
            ContrastiveLoss(**settings)

    def test_says_its_settings(self):
        said = repr(ContrastiveLoss(max_scale=100, direction="rows", smoothing=0.1))
        assert said.startswith(
            "ContrastiveLoss(scale_kind='log', max_scale=100, direction='rows', form='softmax', normalize=True, smoothing=0.1"
        )
        assert said.endswith("impl='auto', precision='auto', exchange='gather')")
