"""Matching against ALBEF's 3B pairs, written out; negatives are never known positives."""

import pytest
import torch
from torch.nn import functional as F

from tests.picture_text_model import Small, batch_of, model_and_other, unit
from zoo import ZooError, make

EXACT = {"rtol": 1e-8, "atol": 1e-10}  # float64
ROWS = 6
TAU = 0.07


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def as_albef(model, batch, to_texts, to_images, *, rolled=0):
    """The mean cross entropy of B matches, and of 2B pairs whose text or picture is another row's, read anew from the inputs."""
    losses = []
    image, text = batch.inputs["image"], batch.inputs["text"]
    rows = torch.arange(len(to_texts))
    for pictures, texts, label in ((rows, rows.roll(rolled), 1), (to_images, rows, 0), (rows, to_texts, 0)):
        logits = model.judge(*(x.pooled for x in (model.read(text.rows(texts)), model.look(image.rows(pictures)))))
        losses.append(F.cross_entropy(logits, torch.full((len(rows),), label), reduction="none"))
    return torch.cat(losses).mean()


def drawn(model, batch, twin=None):
    """The two draws of ALBEF's code: the softmax over the batch of the contrast's logits, the diagonal put to zero."""
    student, keys = (m(batch).embeddings for m in (model, twin or model))
    found = []
    for one, other in (("image", "text"), ("text", "image")):
        weights = (unit(student[one]) @ unit(keys[other]).T / TAU).softmax(1).fill_diagonal_(0)
        found.append(torch.multinomial(weights, 1)[:, 0])
    return found


class TestAlbef:
    @pytest.mark.parametrize("momentum", [None, 0.9])
    def test_value_and_gradient(self, momentum):
        model, other = model_and_other()
        itc = {"name": "itc", "temperature": "fixed", "start": TAU}
        objective = make("objective", {"name": "together", "of": [itc, "itm"], "momentum": momentum})
        objective.double().bind(model)
        model.load_state_dict(other.state_dict())
        batch = batch_of(ROWS)
        torch.manual_seed(11)
        loss = objective(model, batch)
        (loss.total - itc_of(objective, model, batch)).backward()
        found = gradients(model)
        model.zero_grad()
        torch.manual_seed(11)
        to_texts, to_images = drawn(model, batch, objective.twin and objective.twin.model)
        expected = as_albef(model, batch, to_texts, to_images)
        expected.backward()
        torch.testing.assert_close(loss.parts["loss_itm"], expected.detach(), **EXACT)
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(found[name], gradient, **EXACT, msg=lambda m, name=name: f"{name}: {m}")
        for wrong in (as_albef(model, batch, to_images, to_texts), as_albef(model, batch, to_texts, to_images, rolled=1)):
            assert abs(loss.parts["loss_itm"] - wrong) > 1e-4

    def test_alone_it_draws_by_cosines(self):
        model, _ = model_and_other()
        objective, batch = make("objective", "itm"), batch_of(ROWS)
        objective.bind(model)
        torch.manual_seed(4)
        loss = objective(model, batch)
        torch.manual_seed(4)
        torch.testing.assert_close(loss.total, as_albef(model, batch, *drawn(model, batch)), **EXACT)

    def test_texts_are_held_once_and_matched_in_one_pass(self):
        model, _ = model_and_other()
        make("objective", "itm")(model, batch_of(ROWS))
        assert model.calls == ["forward", "look", "read", "match"]

    def test_the_share_that_is_told_right(self):
        model, _ = model_and_other()
        with torch.no_grad():
            model.judge.weight.zero_()
            model.judge.bias.copy_(torch.tensor([1.0, 0.0]))
        assert make("objective", "itm")(model, batch_of(ROWS)).parts["matched"].item() == pytest.approx(2 / 3)


def itc_of(objective, model, batch):
    """Of the same weights; the total less it is what matching adds."""
    shared = objective._pass(model, batch)
    return objective.of[0].term(model, batch, shared)[0]


class Spy(Small):
    """Writes down which rows are matched; row i's picture and text are marked by their number."""

    def look(self, image):
        seen = super().look(image)
        return seen._replace(tokens=torch.cat([seen.tokens, numbered(seen)], 2))

    def hold(self, text, read):
        return read._replace(tokens=torch.cat([read.tokens, numbered(read)], 2))

    def match(self, held, seen):
        self.pairs = list(zip(seen.tokens[:, 0, -1].int().tolist(), held.tokens[:, 0, -1].int().tolist(), strict=True))
        assert held.present.shape == seen.present.shape == held.mask.shape[:1]
        return self.judge(held.tokens[..., :-1].mean(1), seen.tokens[..., :-1].mean(1))


def numbered(x):
    return torch.arange(len(x.tokens)).to(x.tokens)[:, None, None].expand(*x.tokens.shape[:2], 1)


class Blank(Small):
    """Of a row that is absent there is no token, and the mean of none is no number."""

    def look(self, image):
        return blank(super().look(image))

    def read(self, text):
        return blank(super().read(text))


def blank(x):
    there = x.present[:, None]
    return x._replace(tokens=x.tokens.masked_fill(~there[..., None], 0), mask=x.mask & there)


class TestKnown:
    FIELDS = (
        ({"ids": torch.tensor([1, 2, 1, 3, 2, 4])}, {(0, 2), (2, 0), (1, 4), (4, 1)}),
        ({"known": torch.tensor([[0, 1], [3, 2], [0, 9], [4, -2]])}, {(0, 1), (1, 0), (2, 3), (3, 2)}),
        ({"positive": torch.tensor([3, -1, -1, 0, -1, -1])}, {(0, 3), (3, 0)}),
    )

    @pytest.mark.parametrize(("fields", "never"), FIELDS)
    @pytest.mark.parametrize("settings", [{}, {"eps": 1e-4}, {"negatives": "uniform"}, {"among": "global"}])
    def test_are_never_drawn(self, settings, fields, never):
        torch.manual_seed(0)
        model, objective, batch = Spy().double(), make("objective", "itm", **settings), batch_of(ROWS, **fields)
        seen = set()
        for _ in range(150):
            objective(model, batch)
            matches, others = model.pairs[:ROWS], set(model.pairs[ROWS:])
            assert matches == [(i, i) for i in range(ROWS)]
            assert not others & never
            assert not others & set(matches)
            seen |= others
        if settings.get("negatives") == "uniform":
            assert len(seen) == ROWS * (ROWS - 1) - len(never)  # and every other is

    def test_rows_that_lack_a_side_or_a_negative_are_left_out(self):
        model = Small().double()
        there = {"image_present": torch.tensor([1, 0, 1, 1, 1, 1]).bool(), "text_present": torch.tensor([1, 1, 0, 1, 1, 1]).bool()}
        batch, objective = batch_of(ROWS, ids=torch.tensor([5, 5, 5, 5, 5, 9]), **there), make("objective", "itm")
        for side in ("image", "text"):
            batch.inputs[side].values[~there[f"{side}_present"]] = 0
        loss = objective(model, batch)
        loss.total.backward()

        def cost(picture, words, label):
            seen, read = (
                m(batch.inputs[n].rows(torch.tensor([r]))) for m, n, r in ((model.look, "image", picture), (model.read, "text", words))
            )
            return F.cross_entropy(model.judge(read.pooled, seen.pooled), torch.tensor([label])).item()

        sure = [cost(i, i, 1) for i in (0, 3, 4, 5)] + [cost(i, 5, 0) for i in (0, 2, 3, 4)] + [cost(5, i, 0) for i in (0, 1, 3, 4)]
        texts, pictures = [cost(5, i, 0) for i in (0, 1, 3, 4)], [cost(i, 5, 0) for i in (0, 2, 3, 4)]  # one of each is drawn for row 5
        possible = [(sum(sure) + text + picture) / 14 for text in texts for picture in pictures]
        assert min(abs(loss.total.item() - one) for one in possible) < 1e-10
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

    def test_attention_to_nothing_which_is_no_number_stays_out(self):
        there = torch.tensor([1, 0, 1, 1, 1, 1]).bool()
        model = Blank().double()
        loss = make("objective", "itm")(model, batch_of(ROWS, image_present=there, text_present=there.roll(1)))
        loss.total.backward()
        assert loss.total.isfinite()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

    def test_nobody_at_all_can_be_drawn(self):
        model, batch = Small().double(), batch_of(3, ids=torch.tensor([5, 5, 5]))
        loss = make("objective", "itm")(model, batch)
        rows = torch.arange(3)
        out = model(batch)
        expected = F.cross_entropy(model.judge(out.tokens["text"].pooled, out.tokens["image"].pooled), torch.ones_like(rows))
        torch.testing.assert_close(loss.total, expected, **EXACT)

    def test_a_batch_without_pictures_is_a_zero_loss(self):
        loss = make("objective", "itm")(Small().double(), batch_of(3, image_present=torch.zeros(3).bool()))
        assert loss.total.item() == 0


@pytest.mark.parametrize("given", [{"eps": -0.1}, {"temperature": 0.0}])
def test_settings(given):
    with pytest.raises(ZooError, match="eps is 0 or more, temperature above 0"):
        make("objective", "itm", **given)


def test_a_model_that_cannot_match():
    with pytest.raises(ZooError, match=r"pictures and texts belong together, .*: leave itm out, or write albef, blip or vlmo"):
        make("objective", "itm").bind(torch.nn.Linear(1, 1))
