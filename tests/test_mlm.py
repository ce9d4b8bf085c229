"""Masked words: who is masked, and the loss against BERT's and ALBEF's formulas."""

import pytest
import torch
from torch.nn import functional as F

from tests.picture_text_model import END, MASK, PAD, SPECIALS, START, WORDS, Small, Vocabulary, batch_of, model_and_other
from zoo import ZooError, make
from zoo.types import ModalityInputs
from zoo.word_masks import choose, hide

EXACT = {"rtol": 1e-8, "atol": 1e-10}  # float64
ROWS = 6


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def drawn(batch, rate=0.15, whole_words=False):
    """What the objective draws next."""
    text = batch.inputs["text"]
    chosen = choose(text, Vocabulary(), rate, whole_words)
    return chosen, text._replace(values=hide(text.values, chosen, Vocabulary()))


class TestMasking:
    TEXT = batch_of(4000, length=20).inputs["text"]

    def chosen(self, **settings):
        return choose(self.TEXT, Vocabulary(), **{"rate": 0.15, "whole_words": False, **settings})

    @pytest.mark.parametrize("whole_words", [False, True])
    def test_special_ids_and_padding_are_never_chosen(self, whole_words):
        chosen = self.chosen(rate=1.0, whole_words=whole_words)
        expected = self.TEXT.mask & ~torch.isin(self.TEXT.values, torch.tensor(SPECIALS))
        assert torch.equal(chosen, expected)
        assert not chosen[self.TEXT.values == START].any()
        assert not chosen[self.TEXT.values == END].any()
        padding = ModalityInputs(torch.full((2, 5), 9), torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]).bool())  # though it is a word's id
        assert choose(padding, Vocabulary(), 1.0, whole_words).sum() == 2

    @pytest.mark.parametrize("whole_words", [False, True])
    @pytest.mark.parametrize("rate", [0.15, 0.4])
    def test_the_rate(self, rate, whole_words):
        words = self.chosen(rate=1.0)
        assert self.chosen(rate=rate, whole_words=whole_words).sum() / words.sum() == pytest.approx(rate, abs=0.01)

    def test_80_10_10(self):
        chosen, ids = self.chosen(), self.TEXT.values
        hidden = hide(ids, chosen, Vocabulary())
        assert torch.equal(hidden[~chosen], ids[~chosen])
        count = chosen.sum()
        masked, kept = (hidden[chosen] == MASK).sum() / count, (hidden[chosen] == ids[chosen]).sum() / count
        assert masked == pytest.approx(0.8 + 0.1 / WORDS, abs=0.015)
        assert kept == pytest.approx(0.1 + 0.1 / WORDS, abs=0.015)
        replaced = hidden[chosen][(hidden[chosen] != MASK) & (hidden[chosen] != ids[chosen])]
        counts = torch.bincount(replaced, minlength=WORDS)
        assert len(counts) == WORDS
        assert bool((counts[4:] > 0).all())

    def test_whole_words(self):
        chosen = self.chosen(whole_words=True)
        apart = 0
        for ids, mask, row in zip(self.TEXT.values[:300].tolist(), self.TEXT.mask[:300].tolist(), chosen[:300].tolist(), strict=True):
            places = [i for i, (number, real) in enumerate(zip(ids, mask, strict=True)) if real and number not in SPECIALS]
            words = Vocabulary().words([ids[i] for i in places])
            for word in {*words}:
                pieces = {row[i] for i, w in zip(places, words, strict=True) if w == word}
                assert len(pieces) == 1
            apart += len({*words}) < len(words)
        assert apart > 100  # texts in which a word has several pieces
        single = self.chosen()
        both = single[:, 1:-1] & (self.TEXT.values[:, 1:-1] % 2 == 1) & ~single[:, :-2] & (self.TEXT.values[:, :-2] > MASK)
        assert both.any()  # without the option pieces are chosen apart

    def test_is_drawn_from_torchs_generator(self):
        pair = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            pair.append(hide(self.TEXT.values, self.chosen(), Vocabulary()))
        assert torch.equal(pair[0], pair[1])
        assert not torch.equal(pair[0], pair[2])


class TestLoss:
    def test_is_berts(self):
        model, _ = model_and_other()
        batch, objective = batch_of(ROWS), make("objective", "mlm", rate=0.5)
        objective.bind(model)
        torch.manual_seed(3)
        loss = objective(model, batch)
        loss.total.backward()
        found = gradients(model)
        model.zero_grad()
        torch.manual_seed(3)
        chosen, masked = drawn(batch, 0.5)
        logits = model.unmask(masked, model.look(batch.inputs["image"]))
        expected = F.cross_entropy(logits[chosen], batch.inputs["text"].values[chosen])
        expected.backward()
        torch.testing.assert_close(loss.total, expected, **EXACT)
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(found[name], gradient, **EXACT, msg=lambda m, name=name: f"{name}: {m}")
        right = (logits[chosen].argmax(1) == batch.inputs["text"].values[chosen]).double().mean()
        torch.testing.assert_close(loss.parts["filled"], right)
        assert (
            abs(expected - F.cross_entropy(logits[batch.inputs["text"].mask], batch.inputs["text"].values[batch.inputs["text"].mask]))
            > 1e-3
        )

    @pytest.mark.parametrize(("alpha", "ramp"), [(0.4, 0), (0.4, 4), (1.0, 0)])
    def test_is_albefs_with_a_twin(self, alpha, ramp):
        model, other = model_and_other()
        objective = make(
            "objective", {"name": "together", "of": [{"name": "mlm", "rate": 0.5, "alpha": alpha, "ramp": ramp}], "momentum": 0.9}
        )
        objective.bind(model)
        model.load_state_dict(other.state_dict())
        for _ in range(3 if ramp else 0):
            objective.of[0].after_step(model, None)
        share = alpha * 3 / 4 if ramp else alpha
        batch, teacher = batch_of(ROWS), objective.twin.model
        torch.manual_seed(3)
        loss = objective(model, batch)
        loss.total.backward()
        found = gradients(model)
        model.zero_grad()
        torch.manual_seed(3)
        chosen, masked = drawn(batch, 0.5)
        image, ids = batch.inputs["image"], batch.inputs["text"].values

        def albefs(teacher, pictures, words=masked):
            logits = model.unmask(masked, model.look(image))
            with torch.no_grad():
                taught = teacher.unmask(words, pictures.look(image)).softmax(2)
            soft = -(taught * logits.log_softmax(2)).sum(2)[chosen].mean()
            return (1 - share) * F.cross_entropy(logits[chosen], ids[chosen]) + share * soft

        expected = albefs(teacher, teacher)
        expected.backward()
        torch.testing.assert_close(loss.total, expected, **EXACT)
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(found[name], gradient, **EXACT, msg=lambda m, name=name: f"{name}: {m}")
        assert all(p.grad is None for p in teacher.parameters())
        assert loss.parts["mlm_alpha"].item() == pytest.approx(share)
        for wrong in (albefs(model, model), albefs(teacher, model), albefs(teacher, teacher, batch.inputs["text"])):
            assert abs(wrong - loss.total) > 1e-4

    def test_rows_without_picture_or_text_do_not_count(self):
        model, _ = model_and_other()
        batch = batch_of(4, image_present=torch.tensor([1, 0, 1, 1]).bool(), text_present=torch.tensor([1, 1, 1, 0]).bool())
        torch.manual_seed(3)
        loss = make("objective", "mlm", rate=0.5)(model, batch)
        torch.manual_seed(3)
        chosen = choose(batch.inputs["text"], Vocabulary(), 0.5, False)
        chosen[[1, 3]] = False
        masked = batch.inputs["text"]._replace(values=hide(batch.inputs["text"].values, chosen, Vocabulary()))
        logits = model.unmask(masked, model.look(batch.inputs["image"]))
        torch.testing.assert_close(loss.total, F.cross_entropy(logits[chosen], batch.inputs["text"].values[chosen]), **EXACT)

    def test_nothing_to_fill_in(self):
        model, _ = model_and_other()
        batch = batch_of(2)
        batch.inputs["text"].values.fill_(PAD)
        loss = make("objective", "mlm")(model, batch)
        loss.total.backward()
        assert loss.total.item() == 0
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_alone_it_has_no_twin():
    with pytest.raises(ZooError, match=r"mlm: alpha needs a momentum twin: write objective: \{name: together"):
        make("objective", "mlm", alpha=0.4)(Small().double(), batch_of(ROWS))


@pytest.mark.parametrize("given", [{"rate": 0.0}, {"ramp": -1}])
def test_settings(given):
    with pytest.raises(ZooError, match="ramp is a count and rate above 0"):
        make("objective", "mlm", **given)


def test_models_that_cannot():
    with pytest.raises(ZooError, match="fills in none"):
        make("objective", "mlm").bind(torch.nn.Linear(1, 1))
    model = Small()
    model.vocabulary.roles["mask"] = None
    with pytest.raises(ZooError, match="vocabulary has none"):
        make("objective", "mlm").bind(model)
