"""Answers from a closed list, ranked as BLIP and as ALBEF rank them, against losses that torch computes of every answer."""

import pytest
import torch
from torch.nn import functional as F

import zoo
from zoo.answers import rank_answers
from zoo.errors import Failure, ZooError
from zoo.types import Tokens

END = 3
ANSWERS = [[5], [6, 7], [6, 8, 9], [10, 5], [11], [5, 5, 5, 5], [12, 6]]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    found = zoo.build("blip", size="tiny", layers=2)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.mul_(2.0) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.3)
    return found.eval()


@pytest.fixture(scope="module")
def seen(model):
    torch.manual_seed(1)
    return Tokens(torch.randn(3, 7, 64), torch.ones(3, 7, dtype=torch.bool), None, torch.ones(3, dtype=torch.bool))


@pytest.fixture(scope="module")
def logits(model, seen):
    """[row][answer] (T, V) of the words of each answer, none kept from the one before."""
    found = []
    with torch.no_grad():
        for row in range(len(seen.tokens)):
            one = Tokens(seen.tokens[row : row + 1], seen.mask[row : row + 1], None, seen.present[row : row + 1])
            ids = [[*model.prompt, *answer, END] for answer in ANSWERS]
            steps = [[model.next_words(torch.tensor([x[:n]]), one, None)[0][0] for n in range(1, len(x))] for x in ids]
            found.append([torch.stack(x) for x in steps])
    assert len(model.prompt) == 1
    return found


def by_losses(logits, *, k, twice, smoothing):
    """Each question's answers as the papers' programs rank them: the k likeliest first words, then a loss of whole sequences."""
    found = []
    for row in logits:
        firsts = [float(x[0].log_softmax(-1)[answer[0]]) for x, answer in zip(row, ANSWERS, strict=True)]
        targets = [torch.tensor([*answer, END]) for answer in ANSWERS]
        losses = [float(F.cross_entropy(x, t, reduction="sum", label_smoothing=smoothing)) for x, t in zip(row, targets, strict=True)]
        kept = sorted(range(len(ANSWERS)), key=lambda i: -firsts[i])[:k]
        scores = {i: (firsts[i] if twice else 0.0) - losses[i] for i in kept}
        found.append(sorted(scores.items(), key=lambda item: -item[1]))
    return found


@pytest.mark.parametrize("k", [1, 3, 5, 99])
@pytest.mark.parametrize("twice, smoothing", [(False, 0.1), (True, 0.0), (False, 0.0)])
def test_as_blip_and_as_albef(model, seen, logits, k, twice, smoothing):
    found = rank_answers(model, seen, ANSWERS, end=END, k=k, first_word_twice=twice, smoothing=smoothing)
    expected = by_losses(logits, k=k, twice=twice, smoothing=smoothing)
    assert found.answers.tolist() == [[i for i, _ in row] for row in expected]
    scores = torch.tensor([[score for _, score in row] for row in expected])
    torch.testing.assert_close(torch.from_numpy(found.scores), scores, atol=1e-3, rtol=1e-4)  # sums of several tens, in float32


def test_the_two_ways_differ(model, seen):
    ways = [rank_answers(model, seen, ANSWERS, end=END, first_word_twice=twice).answers.tolist() for twice in (False, True)]
    assert ways[0] != ways[1]


def test_batches_change_nothing(model, seen):
    small, large = (rank_answers(model, seen, ANSWERS, end=END, batch_size=size) for size in (2, 1000))
    assert small.answers.tolist() == large.answers.tolist()


def test_a_prompt(model, seen):
    plain, begun = (rank_answers(model, seen, ANSWERS, end=END, prompt=prompt).scores for prompt in ((), (7, 8)))
    assert abs(plain - begun).max() > 0.1


@pytest.mark.parametrize(
    "answers, k, says",
    [
        ([], 1, "0 answers, the best 1 of which are wanted: give one or more"),
        ([[5]], 0, "1 answers, the best 0 of which are wanted"),
        ([[5], [], []], 1, "answer 1, 2 has no words: leave it out"),
    ],
)
def test_refusals(model, seen, answers, k, says):
    with pytest.raises(ZooError, match=says):
        rank_answers(model, seen, answers, end=END, k=k)


def test_weights_that_are_not_numbers(seen):
    class Broken:
        prompt = (1,)

        def next_words(self, ids, seen, cache):
            return torch.full((len(ids), 9), float("nan")), None

    with pytest.raises(Failure, match="logits of words that are NaN"):
        rank_answers(Broken(), seen, [[5]], end=END)
