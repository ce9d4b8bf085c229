"""Captioning against BLIP's loss, written out."""

import pytest
import torch
from torch.nn import functional as F

from tests.picture_text_model import WORDS, batch_of, model_and_other
from zoo import ZooError, make

EXACT = {"rtol": 1e-8, "atol": 1e-10}  # float64


def blips(model, batch, smoothing, rows):
    """(1 - s) of the next word's cross entropy, s of the mean over the vocabulary, averaged over the words of ``rows``."""
    out, costs = model(batch), []
    logits, labels = model.caption(batch.inputs["text"], out)
    for row in rows:
        for place, word in enumerate(labels[row].tolist()):
            if word != -100:
                told = logits[row, place].log_softmax(0)
                costs.append(-(1 - smoothing) * told[word] - smoothing / WORDS * told.sum())
    return torch.stack(costs).mean()


@pytest.mark.parametrize(("settings", "smoothing"), [({}, 0.1), ({"smoothing": 0.0}, 0.0)])
def test_is_blips(settings, smoothing):
    model, _ = model_and_other()
    batch, objective = batch_of(5), make("objective", "lm", **settings)
    objective.bind(model)
    loss = objective(model, batch)
    loss.total.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected = blips(model, batch, smoothing, range(5))
    expected.backward()
    torch.testing.assert_close(loss.total, expected, **EXACT)
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, **EXACT, msg=lambda m, name=name: f"{name}: {m}")
    logits, labels = model.caption(batch.inputs["text"], model(batch))
    assert abs(loss.total - F.cross_entropy(logits.flatten(0, 1), labels.roll(1, 1).flatten(), ignore_index=-100)) > 1e-3


def test_pairs_that_lack_a_side_do_not_count():
    model, _ = model_and_other()
    batch = batch_of(4, image_present=torch.tensor([1, 0, 1, 1]).bool(), text_present=torch.tensor([1, 1, 1, 0]).bool())
    torch.testing.assert_close(make("objective", "lm")(model, batch).total, blips(model, batch, 0.1, (0, 2)), **EXACT)
    nothing = make("objective", "lm")(model, batch_of(4, image_present=torch.zeros(4).bool())).total
    assert nothing.item() == 0


def test_a_model_that_writes_nothing():
    with pytest.raises(
        ZooError, match="lm learns to write captions, and this model writes none: leave lm out, or write blip, coca or beit_3"
    ):
        make("objective", "lm").bind(torch.nn.Linear(1, 1))
