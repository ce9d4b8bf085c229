"""What the contrastive loss refuses, and that each message names what is wrong and what would be right."""

import pytest
import torch

from zoo.kernels.contrastive import contrastive_loss


def vectors(rows: int, dim: int = 5) -> torch.Tensor:
    return torch.randn(rows, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def partners(pairs: int) -> torch.Tensor:
    """Rows q1..qB, d1..dB."""
    return (torch.arange(2 * pairs) + pairs) % (2 * pairs)


@pytest.mark.parametrize(
    "x, y, given, message",
    [
        (vectors(4), vectors(4, 6), {}, r"x must be \(M, D\) and y \(N, D\) or None, not \(4, 5\) and \(4, 6\)"),
        (vectors(4)[0], None, {}, r"x must be \(M, D\) and y \(N, D\) or None, not \(5,\) and None"),
        (vectors(4).long(), vectors(4), {}, "x must be floating point, not int64"),
        (vectors(4), vectors(4).bool(), {}, "y must be floating point, not bool"),
        (vectors(4), vectors(4), {"negatives": vectors(4).long()}, "negatives must be floating point, not int64"),
        (vectors(4), vectors(4), {"negatives": vectors(3, 6)}, r"negatives must be \(K, D\) with D=5, not \(3, 6\)"),
        (vectors(4), None, {}, "one side needs positive or groups"),
        (vectors(4), None, {"positive": partners(2), "ids_y": torch.arange(4)}, "its ids are ids_x"),
        (vectors(4), None, {"positive": partners(2), "present": (torch.ones(4).bool(),) * 2}, "one present, not a pair"),
        (vectors(4), None, {"groups": (torch.arange(4),) * 2}, "one groups, not a pair"),
        (vectors(4), vectors(4), {"ids_x": torch.arange(4)}, "both ids_x and ids_y"),
        (vectors(4), vectors(4), {"positive": torch.arange(4), "groups": torch.arange(4)}, "by positive or by groups, not by both"),
        (vectors(4), vectors(3), {}, "x has 4 rows and y 3"),
        (vectors(2), vectors(0), {"positive": torch.tensor([-1, -1])}, "y has no rows, but x has 2"),
        (vectors(4), vectors(3), {"groups": torch.arange(4)}, r"x has 4 rows and y 3: groups must be a pair \(4,\), \(3,\)"),
        (vectors(4), vectors(3), {"groups": (torch.arange(4), torch.arange(3))}, "needs as many rows of x .4. as of y .3.: write"),
        (vectors(4), vectors(4), {"negatives": vectors(2), "ids_negatives": torch.arange(2)}, "needs ids_x and negatives"),
        (
            vectors(4),
            None,
            {"positive": partners(2), "ids_x": torch.arange(4), "ids_negatives": torch.arange(2)},
            "needs ids_x and neg",
        ),
        (vectors(4), vectors(4), {"present": (torch.ones(4).bool(), torch.ones(3).bool())}, r"present of y must be \(4,\) bool"),
        (vectors(4), vectors(4), {"groups": (torch.arange(4), torch.arange(3))}, r"groups of y must be \(4,\) int64, not \(3,\) int64"),
        (vectors(4), vectors(4), {"positive": torch.arange(4.0)}, r"positive must be \(4,\) int64, not \(4,\) float32"),
        (vectors(4), vectors(4), {"present": torch.ones(4)}, r"present must be \(4,\) bool, not \(4,\) float32"),
        (vectors(4), vectors(4), {"known": torch.ones(2, 2)}, r"known must be \(E, 2\) int64, not \(2, 2\) float32"),
        (vectors(4), vectors(4), {"soft": (vectors(4), vectors(4)), "form": "sigmoid"}, "soft targets.*form='softmax' only"),
        (
            vectors(4),
            vectors(4),
            {"soft": (vectors(4),)},
            r"soft must be \(the teacher's x \(4, D'\), the teacher's y \(4, D'\)\), not",
        ),
        (vectors(4), vectors(4), {"soft": (vectors(4), vectors(4, 6))}, r"not shapes \(4, 5\), \(4, 6\)"),
        (vectors(4), vectors(4), {"soft": (vectors(4),) * 2, "negatives": vectors(2)}, r"the teacher's negatives \(2, D'\)"),
        (vectors(4), vectors(4), {"scale": torch.ones(1)}, r"scale must be a number or of shape \(\), not \(1,\)"),
        (vectors(4), vectors(4), {"bias": torch.ones(4)}, r"bias must be a number or of shape \(\), not \(4,\)"),
        (vectors(4), vectors(4), {"positive": torch.tensor([0, 1, 2, 4])}, r"positive must lie in -1\.\.3, but holds 0\.\.4"),
        (vectors(4), vectors(4), {"positive": torch.tensor([0, 1, -2, 3])}, r"positive must lie in -1\.\.3, but holds -2\.\.3"),
        (vectors(4), None, {"positive": torch.tensor([0, 3, 0, 1])}, "positive must not name the row itself"),
        (vectors(4), vectors(4), {"known": torch.tensor([[0, 4]])}, "known must name rows below 4 of x and below 4 of y"),
        (vectors(4), vectors(4), {"weight": torch.tensor([1, 1, -0.5, 1])}, "weight must not be negative, but holds -0.5"),
        (vectors(4), vectors(4), {"positive": torch.tensor([0, 1, 1, 2]), "smoothing": 0.1}, "needs? a row of its own for each column"),
    ],
)
def test_tensors_that_do_not_fit(x, y, given, message):
    with pytest.raises(ValueError, match=message):
        contrastive_loss(x, y, **{"scale": 1.0} | given)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"direction": "sideways"}, "direction='sideways' is no choice: one of rows, columns, both"),
        ({"form": "hinge"}, "form='hinge' is no choice: one of softmax, sigmoid"),
        ({"reduction": "max"}, "reduction='max' is no choice: one of none, sum, mean"),
        ({"impl": "dense"}, "impl='dense' is no choice: one of auto, reference, chunked, triton"),
        ({"precision": "bf16"}, "precision='bf16' is no choice: one of auto, ieee, tf32, 3xtf32"),
        ({"exchange": "tree"}, "exchange='tree' is no choice: one of gather, ring"),
        ({"smoothing": -0.1}, r"smoothing=-0.1 must lie in 0\.\.1, 1 excluded"),
        ({"smoothing": 1.0}, r"smoothing=1.0 must lie in 0\.\.1, 1 excluded"),
        ({"soft": (vectors(4),) * 2, "soft_weight": 1.2}, r"soft_weight=1.2 must lie in 0\.\.1 - smoothing, here 0\.\.1"),
        ({"soft": (vectors(4),) * 2, "soft_weight": 0.8, "smoothing": 0.3}, r"soft_weight=0.8 must lie .* here 0\.\.0.7"),
        ({"impl": "reference", "group": object()}, "impl='reference' knows one process only"),
    ],
)
def test_settings_that_do_not_fit(given, message):
    with pytest.raises(ValueError, match=message):
        contrastive_loss(vectors(4), vectors(4), scale=1.0, **given)


def test_all_faults_of_the_tensors_at_once():
    given = {"weight": torch.ones(3), "known": torch.ones(2).long(), "ids_x": torch.arange(5), "ids_y": torch.arange(4)}
    with pytest.raises(ValueError, match=r"ids_x must be \(4,\) int64.*; weight must be \(4,\), not \(3,\).*; known must be \(E, 2\)"):
        contrastive_loss(vectors(4), vectors(4), scale=1.0, **given)
    values = {"positive": torch.tensor([0, 1, 2, 9]), "known": torch.tensor([[0, 4]]), "weight": -torch.ones(4)}
    with pytest.raises(ValueError, match=r"positive must lie.*; known must name.*; weight must not be negative"):
        contrastive_loss(vectors(4), vectors(4), scale=1.0, **values)


def test_values_are_not_looked_at_where_that_is_switched_off():
    loss = contrastive_loss(vectors(4), vectors(4), scale=1.0, weight=-torch.ones(4), reduction="none", validate=False)
    assert bool((loss < 0).all())
