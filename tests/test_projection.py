"""Steps of a head that leave alone what it is to remember: the algebra of recursive least squares, and of subspaces."""

import pytest
import torch
from torch import nn

from zoo.projection import MeanProjection, OtherClasses, OtherMeans, PreviousMeans


def projection(dim, alpha, vectors):
    made = MeanProjection(dim, alpha).double()
    for h in vectors:
        made.add(h)
    return made


def test_one_vector_by_hand():
    """P = I, h = e1, alpha = 0.1: the gain is e1 / 1.1."""
    made = projection(3, 0.1, torch.eye(3, dtype=torch.float64)[:1])
    torch.testing.assert_close(made.matrix, torch.diag(torch.tensor([0.1 / 1.1, 1, 1], dtype=torch.float64)), rtol=0, atol=1e-15)


@pytest.mark.parametrize("dim, count", [(8, 5), (8, 30), (768, 20)])
@pytest.mark.parametrize("alpha", [0.1, 2.0])
def test_equals_the_closed_form(dim, count, alpha):
    torch.manual_seed(0)
    vectors = torch.randn(count, dim, dtype=torch.float64)
    found = projection(dim, alpha, vectors).matrix
    wanted = alpha * torch.linalg.inv(alpha * torch.eye(dim, dtype=torch.float64) + vectors.T @ vectors)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    assert torch.equal(found, found.T)
    values = torch.linalg.eigvalsh(found)
    assert values.min() > 0
    assert values.max() <= 1 + 1e-12


def test_of_one_vector_so_much_is_left():
    """P h = alpha / (alpha + |h|^2) h."""
    h = torch.tensor([3.0, 4.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(projection(3, 0.5, [h])(h[None]), 0.5 / 25.5 * h[None], rtol=0, atol=1e-15)


@pytest.mark.parametrize("alpha", [0.1, 1e-8])
def test_a_remembered_vector_keeps_its_output(alpha):
    """|step P h| <= sqrt(alpha) |step|, and for a small alpha next to nothing of what the step itself would do."""
    torch.manual_seed(0)
    vectors, step = torch.randn(5, 16, dtype=torch.float64), torch.randn(4, 16, dtype=torch.float64)
    made = projection(16, alpha, vectors)
    moved, raw = made(step) @ vectors.T, step @ vectors.T
    assert (moved.norm(dim=0) <= alpha**0.5 * torch.linalg.matrix_norm(step, 2)).all()
    if alpha == 1e-8:
        assert (moved.norm(dim=0) < 1e-3 * raw.norm(dim=0)).all()


def test_what_is_orthogonal_to_all_of_it_passes():
    vectors = torch.eye(6, dtype=torch.float64)[:3]
    free = torch.eye(6, dtype=torch.float64)[3:]
    torch.testing.assert_close(projection(6, 0.01, vectors)(free), free, rtol=0, atol=1e-15)


def test_a_thousand_vectors_leave_no_graph_and_a_sound_matrix():
    torch.manual_seed(0)
    made = MeanProjection(32, 0.1)
    for _ in range(1000):
        made.add(torch.randn(32, requires_grad=True))
    assert made.matrix.grad_fn is None
    assert not made.matrix.requires_grad
    assert torch.equal(made.matrix, made.matrix.T)
    assert torch.linalg.eigvalsh(made.matrix.double()).min() > -1e-6
    assert list(made.state_dict()) == ["matrix"]


SOURCES = ["audio", "image", "text"]
LABELS = torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize("source", SOURCES)
def test_each_source_is_kept_off_the_others_alone(source):
    torch.manual_seed(0)
    memory = OtherMeans(SOURCES, 8, 1e-6).double()
    x = {name: torch.randn(4, 8, dtype=torch.float64) for name in SOURCES}
    for name in SOURCES:
        memory.remember(name, x[name], LABELS)
    step = torch.randn(3, 8, dtype=torch.float64)
    moved = {name: (memory.protect(source, step) @ x[name].mean(0)).norm() for name in SOURCES}
    assert moved[source] > 0.01
    assert max(m for name, m in moved.items() if name != source) < 1e-3


def test_the_papers_memory_holds_the_sources_own_means_too():
    memory = PreviousMeans(SOURCES, 8, 1e-6).double()
    x = torch.randn(4, 8, dtype=torch.float64)
    assert torch.equal(memory.protect("audio", torch.eye(8, dtype=torch.float64)), torch.eye(8, dtype=torch.float64))
    memory.remember("audio", x, LABELS)
    assert (memory.protect("audio", torch.eye(8, dtype=torch.float64)) @ x.mean(0)).norm() < 1e-3


class TestClasses:
    def memory(self, rank=8, decay=0.0):
        torch.manual_seed(0)
        return OtherClasses(SOURCES, 16, 3, rank, decay).double()

    def test_class_means_of_the_others_keep_their_output(self):
        memory, x = self.memory(), torch.randn(4, 16, dtype=torch.float64)
        memory.remember("audio", x, LABELS)
        means = torch.stack([x[k == LABELS].mean(0) for k in range(3)])
        step = torch.randn(5, 16, dtype=torch.float64)
        torch.testing.assert_close(memory.protect("image", step) @ means.T, torch.zeros(5, 3, dtype=torch.float64), rtol=0, atol=1e-10)
        assert torch.equal(memory.protect("audio", step), step)  # nobody else was seen

    def test_within_the_rank(self):
        memory, x = self.memory(rank=1), torch.randn(4, 16, dtype=torch.float64)
        memory.remember("audio", x, LABELS)
        kept = memory.protect("image", torch.eye(16, dtype=torch.float64))
        assert torch.linalg.matrix_rank(kept) == 15
        torch.testing.assert_close(kept @ kept, kept, rtol=0, atol=1e-10)

    def test_means_run(self):
        memory = self.memory(decay=0.5)
        one, two = torch.ones(1, 16, dtype=torch.float64), 3 * torch.ones(1, 16, dtype=torch.float64)
        memory.remember("image", one, torch.tensor([1]))
        assert torch.equal(memory.means[1, 1], one[0])  # a first one counts whole
        memory.remember("image", two, torch.tensor([1]))
        assert torch.equal(memory.means[1, 1], 2 * one[0])
        assert not memory.means[1, 0].any()


def test_state_round_trip():
    for memory in (PreviousMeans(SOURCES, 8, 0.1), OtherMeans(SOURCES, 8, 0.1), OtherClasses(SOURCES, 8, 3, 2, 0.9)):
        again = type(memory)(*((SOURCES, 8, 3, 2, 0.9) if isinstance(memory, OtherClasses) else (SOURCES, 8, 0.1)))
        memory.remember("text", torch.randn(4, 8), LABELS)
        again.load_state_dict(memory.state_dict())
        step = torch.randn(3, 8)
        assert torch.equal(memory.protect("audio", step), again.protect("audio", step))
        assert isinstance(memory, nn.Module)
