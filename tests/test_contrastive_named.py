"""Every named contrastive objective as one call of the loss, against its paper's formula written plainly in float64."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels.contrastive import contrastive_loss

DOUBLE = torch.float64
EXACT = {"rtol": 1e-10, "atol": 1e-12}  # float64: a few hundred roundings of 1e-16
B, D, K = 6, 5, 9
SCALE = torch.tensor(1 / 0.3, dtype=DOUBLE)
LOG_SCALE = SCALE.log()
DIAGONAL = torch.arange(B)


def vectors(rows: int, seed: int, dim: int = D) -> Tensor:
    return torch.randn(rows, dim, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def units(rows: int, seed: int) -> Tensor:
    return F.normalize(vectors(rows, seed), dim=1)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Of soft targets, the mean over rows."""
    return -(target * logits.log_softmax(1)).sum(1).mean()


@pytest.fixture(params=["reference", "chunked"])
def agree(request):
    """Check a call of the loss against a formula of the same inputs: value and every gradient."""

    def check(ours, plain, *inputs: Tensor) -> None:
        a, b = [x.clone().requires_grad_() for x in inputs], [x.clone().requires_grad_() for x in inputs]
        mine, truth = ours(lambda *x, **settings: contrastive_loss(*x, **settings, impl=request.param), *a), plain(*b)
        torch.testing.assert_close(mine, truth, **EXACT)
        gradients = zip(torch.autograd.grad(mine, a), torch.autograd.grad(truth, b), strict=True)
        for position, (gradient, expected) in enumerate(gradients):
            torch.testing.assert_close(gradient, expected, **EXACT, msg=lambda text, i=position: f"input {i}: {text}")

    return check


def clip(x: Tensor, y: Tensor, log_scale: Tensor) -> Tensor:
    logits = log_scale.exp() * F.normalize(x, dim=1) @ F.normalize(y, dim=1).T
    return (F.cross_entropy(logits, DIAGONAL) + F.cross_entropy(logits.T, DIAGONAL)) / 2


def nt_xent(x: Tensor, scale: Tensor) -> Tensor:
    """Rows i and i + B of 2B belong together."""
    e = F.normalize(x, dim=1)
    logits = (scale * e @ e.T).masked_fill(torch.eye(2 * B, dtype=torch.bool), -torch.inf)
    return F.cross_entropy(logits, (torch.arange(2 * B) + B) % (2 * B))


class TestTwoModalities:
    def test_clip_and_coca(self, agree):
        """CoCa's contrastive part is CLIP's."""

        def ours(loss, x, y, log_scale):
            return loss(x, y, scale=log_scale.exp(), normalize=True)

        agree(ours, clip, vectors(B, 0), vectors(B, 1), LOG_SCALE)

    def test_vlmo(self, agree):
        """Half of CLIP's loss between the modalities' own experts, half behind the joint one, each with a scale of its own."""

        def ours(loss, x, y, log_scale, joint_x, joint_y, joint_log_scale):
            alone = loss(x, y, scale=log_scale.exp(), normalize=True)
            return (alone + loss(joint_x, joint_y, scale=joint_log_scale.exp(), normalize=True)) / 2

        def plain(x, y, log_scale, joint_x, joint_y, joint_log_scale):
            return (clip(x, y, log_scale) + clip(joint_x, joint_y, joint_log_scale)) / 2

        agree(ours, plain, vectors(B, 0), vectors(B, 1), LOG_SCALE, vectors(B, 2), vectors(B, 3), LOG_SCALE / 2)

    def test_siglip(self, agree):
        def ours(loss, x, y, log_scale, bias):
            return loss(x, y, scale=log_scale.exp(), bias=bias, form="sigmoid", normalize=True)

        def plain(x, y, log_scale, bias):
            logits = log_scale.exp() * F.normalize(x, dim=1) @ F.normalize(y, dim=1).T + bias
            return -F.logsigmoid((2 * torch.eye(B, dtype=DOUBLE) - 1) * logits).sum() / B

        agree(ours, plain, vectors(B, 0), vectors(B, 1), LOG_SCALE, torch.tensor(-2.0, dtype=DOUBLE))

    @pytest.mark.parametrize("direction", ["rows", "both"])
    def test_unicl(self, agree, direction):
        """Yang et al., 2022 (https://arxiv.org/abs/2204.03610): images and texts of one label are positives, in both directions."""
        of_x, of_y = torch.tensor([0, 1, 0, 2, 1, 0]), torch.tensor([0, 1, 2, 2, 1, 0])
        target = (of_x[:, None] == of_y).to(DOUBLE)

        def ours(loss, x, y, scale):
            return loss(x, y, scale=scale, groups=(of_x, of_y), direction=direction)

        def plain(x, y, scale):
            logits = scale * x @ y.T
            rows = cross_entropy(logits, target / target.sum(1, keepdim=True))
            columns = cross_entropy(logits.T, target.T / target.T.sum(1, keepdim=True))
            return rows if direction == "rows" else (rows + columns) / 2

        agree(ours, plain, units(B, 0), units(B, 1), SCALE)

    @pytest.mark.parametrize("direction", ["rows", "columns", "both"])
    @pytest.mark.parametrize("smoothing", [0.1, 0.7])
    def test_label_smoothing(self, agree, direction, smoothing):
        """BLIP-2 smooths its contrast by 0.1."""

        def ours(loss, x, y, scale):
            return loss(x, y, scale=scale, smoothing=smoothing, direction=direction)

        def plain(x, y, scale):
            logits = scale * x @ y.T
            each = {"rows": logits, "columns": logits.T}
            chosen = [each[d] for d in each if direction in (d, "both")]
            return sum(F.cross_entropy(c, DIAGONAL, label_smoothing=smoothing) for c in chosen) / len(chosen)

        agree(ours, plain, vectors(B, 0), vectors(B, 1), SCALE / 3)

    def test_label_smoothing_of_the_sigmoid_form(self, agree):
        def ours(loss, x, y, scale, bias):
            return loss(x, y, scale=scale, bias=bias, smoothing=0.2, form="sigmoid")

        def plain(x, y, scale, bias):
            target = 0.8 * torch.eye(B, dtype=DOUBLE) + 0.1
            return F.binary_cross_entropy_with_logits(scale * x @ y.T + bias, target, reduction="sum") / B

        agree(ours, plain, vectors(B, 0), vectors(B, 1), SCALE / 3, torch.tensor(-2.0, dtype=DOUBLE))


class TestQueues:
    """Negatives, or soft targets, of a momentum encoder."""

    def test_moco_with_the_queue_alone(self, agree):
        """Ids that are all equal leave no negative in the batch."""
        same = torch.zeros(B, dtype=torch.int64)

        def ours(loss, x, keys, queue, scale):
            return loss(x, keys, scale=scale, negatives=queue, ids_x=same, ids_y=same, direction="rows", normalize=True)

        def plain(x, keys, queue, scale):
            x, keys, queue = (F.normalize(t, dim=1) for t in (x, keys, queue))
            logits = scale * torch.cat([(x * keys).sum(1, keepdim=True), x @ queue.T], dim=1)
            return F.cross_entropy(logits, torch.zeros(B, dtype=torch.int64))

        agree(ours, plain, vectors(B, 0), vectors(B, 1), vectors(K, 2), SCALE)

    def test_batch_and_queue(self, agree):
        def ours(loss, x, keys, queue, scale):
            return loss(x, keys, scale=scale, negatives=queue, direction="rows")

        def plain(x, keys, queue, scale):
            return F.cross_entropy(scale * x @ torch.cat([keys, queue]).T, DIAGONAL)

        agree(ours, plain, units(B, 0), units(B, 1), units(K, 2), SCALE)

    def test_brivl(self, agree):
        """MoCo both ways, a queue for each, and their sum."""
        same = torch.zeros(B, dtype=torch.int64)
        keys_x, keys_y, queue_x, queue_y = units(B, 2), units(B, 3), units(K, 4), units(K, 5)

        def ours(loss, x, y, scale):
            call = {"scale": scale, "ids_x": same, "ids_y": same, "direction": "rows"}
            return loss(x, keys_y, negatives=queue_y, **call) + loss(y, keys_x, negatives=queue_x, **call)

        def plain(x, y, scale):
            first = torch.cat([(x * keys_y).sum(1, keepdim=True), x @ queue_y.T], dim=1)
            second = torch.cat([(y * keys_x).sum(1, keepdim=True), y @ queue_x.T], dim=1)
            return sum(F.cross_entropy(scale * logits, torch.zeros(B, dtype=torch.int64)) for logits in (first, second))

        agree(ours, plain, units(B, 0), units(B, 1), SCALE)

    @pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
    def test_albef_and_blip(self, agree, alpha):
        """Momentum distillation, one call a direction: BLIP's alpha grows to ALBEF's 0.4."""
        keys_x, keys_y, queue_x, queue_y = units(B, 2), units(B, 3), units(K, 4), units(K, 5)

        def ours(loss, x, y, temperature):
            call = {"scale": 1 / temperature, "soft_weight": alpha, "direction": "rows"}
            of_x = loss(x, keys_y, negatives=queue_y, soft=(keys_x, keys_y, queue_y), **call)
            return (of_x + loss(y, keys_x, negatives=queue_x, soft=(keys_y, keys_x, queue_x), **call)) / 2

        def plain(x, y, temperature):
            losses = []
            for student, teacher, keys, queue in ((x, keys_x, keys_y, queue_y), (y, keys_y, keys_x, queue_x)):
                candidates = torch.cat([keys, queue]).T
                with torch.no_grad():
                    soft = (teacher @ candidates / temperature).softmax(1)
                    target = alpha * soft + (1 - alpha) * torch.eye(B, B + K, dtype=DOUBLE)
                losses.append(cross_entropy(student @ candidates / temperature, target))
            return sum(losses) / 2

        agree(ours, plain, units(B, 0), units(B, 1), 1 / SCALE)

    def test_distillation_within_a_batch_in_both_directions(self, agree):
        teacher_x, teacher_y = vectors(B, 2, dim=3), vectors(B, 3, dim=3)

        def ours(loss, x, y, scale):
            return loss(x, y, scale=scale, soft=(teacher_x, teacher_y), soft_weight=0.3)

        def plain(x, y, scale):
            logits, taught = scale * x @ y.T, (scale * teacher_x @ teacher_y.T).detach()
            mixed = [0.3 * t.softmax(1) + 0.7 * torch.eye(B, dtype=DOUBLE) for t in (taught, taught.T)]
            return (cross_entropy(logits, mixed[0]) + cross_entropy(logits.T, mixed[1])) / 2

        agree(ours, plain, units(B, 0), units(B, 1), SCALE)

    def test_albef_retrieval_spreads_the_target_over_equal_items_also_in_the_queue(self, agree):
        queue, ids, ids_queue = units(K, 2), torch.tensor([0, 1, 2, 0, 3, 4]), torch.tensor([5, 0, 1, -100, -100, 2, 0, 6, 7])
        ids_all = torch.cat([ids, ids_queue])
        same = (ids[:, None] == ids_all).to(DOUBLE)

        def ours(loss, x, keys, scale):
            return loss(x, torch.cat([keys, queue]), scale=scale, groups=(ids, ids_all), direction="rows")

        def plain(x, keys, scale):
            return cross_entropy(scale * x @ torch.cat([keys, queue]).T, same / same.sum(1, keepdim=True))

        agree(ours, plain, units(B, 0), units(B, 1), SCALE)


class TestOneSide:
    """Rows among themselves."""

    @pytest.mark.parametrize("direction", ["rows", "both"])
    def test_nt_xent(self, agree, direction):
        """SimCLR: Chen et al., 2020 (https://arxiv.org/abs/2002.05709)."""
        partner = (torch.arange(2 * B) + B) % (2 * B)

        def ours(loss, x, scale):
            return loss(x, scale=scale, positive=partner, direction=direction, normalize=True)

        agree(ours, nt_xent, vectors(2 * B, 0), SCALE)

    def test_notellm2_contrasts_two_embeddings_of_each_note(self, agree):
        """The visual and the multimodal embedding, weighted 1 and alpha, with one learned log-scale."""
        partner = (torch.arange(2 * B) + B) % (2 * B)

        def ours(loss, visual, multimodal, log_scale):
            call = {"scale": log_scale.exp(), "positive": partner, "direction": "rows", "normalize": True}
            return (loss(visual, **call) + 9 * loss(multimodal, **call)) / 10

        def plain(visual, multimodal, log_scale):
            return (nt_xent(visual, log_scale.exp()) + 9 * nt_xent(multimodal, log_scale.exp())) / 10

        agree(ours, plain, vectors(2 * B, 0), vectors(2 * B, 1), torch.tensor(3.0, dtype=DOUBLE))

    def test_supcon(self, agree):
        """L_out: the mean over the positives stands outside the logarithm; a row alone in its group does not count."""
        labels = torch.tensor([0, 1, 0, 2, 1, 0, 3, 1])
        others = ~torch.eye(8, dtype=torch.bool)

        def ours(loss, x, scale):
            return loss(x, scale=scale, groups=labels, direction="rows", normalize=True)

        def plain(x, scale):
            e = F.normalize(x, dim=1)
            logits = scale * e @ e.T
            losses = []
            for i in range(8):
                positives = [p for p in range(8) if p != i and labels[p] == labels[i]]
                if positives:
                    denominator = logits[i][others[i]].exp().sum()
                    losses.append(-sum((logits[i, p].exp() / denominator).log() for p in positives) / len(positives))
            return sum(losses) / len(losses)

        agree(ours, plain, vectors(8, 0), SCALE)

    def test_hard_negatives_of_a_mined_set(self, agree):
        """Each query against its own document, the others' and everybody's mined ones."""
        weight = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 1.0], dtype=DOUBLE)

        def ours(loss, queries, documents, mined, scale):
            return loss(queries, documents, scale=scale, negatives=mined, direction="rows", weight=weight)

        def plain(queries, documents, mined, scale):
            logits = scale * queries @ torch.cat([documents, mined]).T
            return (weight * F.cross_entropy(logits, DIAGONAL, reduction="none")).sum() / weight.sum()

        agree(ours, plain, units(B, 0), units(B, 1), units(K, 2), SCALE)


def test_small_losses_keep_digits_that_float64_cross_entropy_loses():
    """Orthonormal pairs at scale 100: dense cross entropy is 0 there even in float64."""
    x = torch.eye(B, dtype=DOUBLE)
    exact = math.log1p((B - 1) * math.exp(-100))  # 1.9e-43
    assert F.cross_entropy(100 * x @ x.T, DIAGONAL).item() == 0
    for impl in ("reference", "chunked"):
        assert contrastive_loss(x, x, scale=100.0, impl=impl).item() == pytest.approx(exact, rel=1e-12)
