"""What the contrastive loss refuses, and that each message names what is wrong and what would be right."""

import math

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
        (vectors(4)[0], None, {}, r"x must be \(M, D\) and y \(N, D\) or None, not \(5,\) and None: write x\[None\] for one vector"),
        (vectors(4).long(), vectors(4), {}, "x must be float16, bfloat16, float32 or float64, not int64"),
        (vectors(4), vectors(4).bool(), {}, "y must be float16, bfloat16, float32 or float64, not bool"),
        (vectors(4), vectors(4), {"negatives": vectors(4).long()}, "negatives must be float16, bfloat16, float32 or float64, not int64"),
        (vectors(4), vectors(4), {"negatives": vectors(3, 6)}, r"negatives must be \(K, D\) with D=5, not \(3, 6\)"),
        (vectors(4), None, {}, r"one side needs positive=\(M,\), the partner of each row, or groups=\(M,\)"),
        (vectors(4), None, {"positive": partners(2), "ids_y": torch.arange(4)}, "its ids are ids_x"),
        (vectors(4), None, {"positive": partners(2), "present": (torch.ones(4).bool(),) * 2}, "one present, not a pair"),
        (vectors(4), None, {"groups": (torch.arange(4),) * 2}, "one groups, not a pair"),
        (vectors(4), vectors(4), {"ids_x": torch.arange(4)}, "both ids_x and ids_y"),
        (vectors(4), vectors(4), {"positive": torch.arange(4), "groups": torch.arange(4)}, "by positive or by groups, not by both"),
        (vectors(4), vectors(3), {}, r"x has 4 rows and y 3: write positive=\(4,\), -1 for none"),
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
        (vectors(4), vectors(4), {"known": torch.tensor([[0, 4]])}, r"known must name rows 0\.\.3 of x and 0\.\.3 of y"),
        (vectors(4), vectors(4), {"weight": torch.tensor([1, 1, -0.5, 1])}, "weight must be finite and not negative, but holds -0.5"),
        (vectors(4), vectors(4), {"weight": torch.tensor([1, math.nan, 1, 1])}, "weight must be finite and not negative, but holds nan"),
        (vectors(4), vectors(4), {"weight": torch.ones(4, dtype=torch.complex64)}, "weight must be real, not complex64"),
        (vectors(4), vectors(4), {"scale": torch.tensor(-math.inf)}, "scale must be finite, but holds -inf"),
        (vectors(4), vectors(4), {"scale": torch.tensor(math.nan)}, "scale must be finite, but holds nan"),
        (vectors(4), vectors(4), {"scale": torch.tensor(1j)}, "scale must be a real number, not complex64 on cpu"),
        (vectors(4), vectors(4), {"bias": torch.tensor(1.0, device="meta")}, "bias must be a real number, not float32 on meta"),
        (vectors(4), vectors(4), {"negatives": vectors(3).to("meta")}, "negatives lies on meta, x on cpu: move it"),
        (vectors(4), vectors(4), {"soft": (vectors(4), vectors(4).to("meta"))}, r"soft\[1\] lies on meta, x on cpu: move it"),
        (vectors(4), vectors(4), {"groups": (torch.arange(4), torch.arange(4).to("meta"))}, "groups of y lies on meta, x on cpu"),
        (vectors(4).to("meta"), vectors(4).to("meta"), {}, "x lies on meta, where there are no values"),
        (vectors(4).to(torch.float8_e4m3fn), vectors(4), {}, "x must be float16, bfloat16, float32 or float64, not float8_e4m3fn"),
        (vectors(4).to_sparse(), vectors(4), {}, r"x must be dense, not sparse_coo: write x\.to_dense\(\)"),
        (vectors(0), vectors(0), {}, r"the batch is empty, x has no rows: nothing to learn from \(validate=False gives loss 0\)"),
        (
            vectors(1),
            vectors(1),
            {"positive": torch.tensor([-1])},
            "no row of the batch has a positive that is there: nothing to learn from",
        ),
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
        ({"soft": (vectors(4),) * 2, "soft_weight": 1.2}, r"soft_weight=1.2 must lie in 0\.\.1"),
        ({"soft_weight": -1.0}, r"soft_weight=-1.0 must lie in 0\.\.1"),
        ({"scale": 0.0}, "scale=0.0 must be positive and finite"),
        ({"scale": -1}, "scale=-1 must be positive and finite"),
        ({"scale": math.nan}, "scale=nan must be positive and finite"),
        ({"scale": math.inf}, "scale=inf must be positive and finite"),
        ({"group": True}, "group must be a process group .* not True: write dist.group.WORLD"),
        ({"group": "0"}, "group must be a process group .* not '0'"),
        ({"group": 2}, "group must be a process group .* not 2"),
        ({"group": object()}, "group must be a process group that this process is a member of, not <object"),
        ({"soft": (vectors(4),) * 2, "soft_weight": 0.8, "smoothing": 0.3}, r"soft_weight=0.8 must lie .* here 0\.\.0.7"),
        ({"impl": "reference", "group": object()}, "impl='reference' knows one process only"),
    ],
)
def test_settings_that_do_not_fit(given, message):
    with pytest.raises(ValueError, match=message):
        contrastive_loss(vectors(4), vectors(4), **{"scale": 1.0} | given)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"x": None}, "x must be a tensor, not None"),
        ({"x": vectors(4).tolist(), "y": vectors(4).numpy()}, "x must be a tensor, not list; y must be a tensor, not ndarray"),
        ({"positive": [0, 1, 2, 3]}, "positive must be a tensor, not list"),
        ({"ids_x": [0], "ids_y": [0], "weight": 1.0}, "ids_x must be a tensor, not list; ids_y .* not list; weight .* not float"),
        ({"negatives": [1.0], "ids_negatives": [1], "known": [(0, 1)]}, "ids_negatives .*; negatives .*; known must be a tensor, not list"),
        ({"groups": 3}, "groups must be a tensor, not int"),
        ({"groups": (torch.arange(4),)}, r"groups must be a tensor, or a tuple of two: \(groups of x, groups of y\), not a tuple of 1"),
        ({"groups": [torch.arange(4)] * 2}, "groups must be .*, not a list of 2"),
        ({"groups": (torch.arange(4), None)}, "groups of y must be a tensor, not None"),
        ({"present": (torch.ones(4).bool(),) * 3}, "present must be .*, not a tuple of 3"),
        ({"soft": vectors(4)}, "soft must be a tuple of the teacher's tensors, not Tensor"),
        ({"soft": (vectors(4), None)}, r"soft\[1\] must be a tensor, not None"),
        ({"scale": None}, "scale must be a number, not None"),
        ({"scale": "10"}, "scale must be a number, not str"),
        ({"scale": 1j}, "scale must be a number, not complex"),
        ({"bias": "a"}, "bias must be a number, not str"),
        ({"smoothing": "a"}, "smoothing must be a number, not str"),
        ({"soft_weight": None}, "soft_weight must be a number, not None"),
    ],
)
def test_what_is_of_the_wrong_type(given, message):
    with pytest.raises(TypeError, match=message):
        contrastive_loss(**{"x": vectors(4), "y": vectors(4), "scale": 1.0} | given)


def test_all_faults_of_the_tensors_at_once():
    given = {"weight": torch.ones(3), "known": torch.ones(2).long(), "ids_x": torch.arange(5), "ids_y": torch.arange(4)}
    with pytest.raises(ValueError, match=r"ids_x must be \(4,\) int64.*; weight must be \(4,\), not \(3,\).*; known must be \(E, 2\)"):
        contrastive_loss(vectors(4), vectors(4), scale=1.0, **given)
    values = {"positive": torch.tensor([0, 1, 2, 9]), "known": torch.tensor([[0, 4]]), "weight": -torch.ones(4)}
    with pytest.raises(ValueError, match=r"positive must lie.*; known must name.*; weight must be finite and not negative"):
        contrastive_loss(vectors(4), vectors(4), scale=1.0, **values)


def test_values_are_not_looked_at_where_that_is_switched_off():
    loss = contrastive_loss(vectors(4), vectors(4), scale=1.0, weight=-torch.ones(4), reduction="none", validate=False)
    assert bool((loss < 0).all())
