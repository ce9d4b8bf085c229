"""The objectives over a model that hands back the vectors it was given, against plain formulas."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo import ZooError, make
from zoo.types import Batch, ModelOutput


class Stub(nn.Module):
    """A model whose outputs are its parameters."""

    def __init__(self, present: dict[str, Tensor] | None = None, **embeddings: Tensor) -> None:
        super().__init__()
        self.outputs = tuple(embeddings)
        self.embeddings = nn.ParameterDict(embeddings)
        self.present = present or {}

    def forward(self, batch: Batch) -> ModelOutput:
        return ModelOutput(dict(self.embeddings), self.present)


def vectors(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))


def pairs(count: int, **fields: Tensor) -> Batch:
    """A batch of pairs laid out q1..qB, d1..dB."""
    return Batch({}, positive=(torch.arange(2 * count) + count) % (2 * count), **fields)


def note_loss(x: Tensor, scale: float = math.exp(3.0)) -> Tensor:
    """NoteLLM-2's loss, dense, for rows that are all there."""
    e, rows = F.normalize(x.double(), dim=1), torch.arange(len(x))
    logits = (e @ e.T * scale).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, (rows + len(x) // 2) % len(x)).float()


def clip_loss(x: Tensor, y: Tensor, scale: float = 1 / 0.07) -> Tensor:
    logits = F.normalize(x, dim=1) @ F.normalize(y, dim=1).T * scale
    target = torch.arange(len(x))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class TestPairInfonce:
    def test_one_output(self):
        loss = make("objective", "pair_infonce")(Stub(note=vectors(8)), pairs(4))
        torch.testing.assert_close(loss.total, note_loss(vectors(8)))
        assert loss.total.dtype == torch.float32
        assert set(loss.parts) == {"loss_note", "scale"}
        assert loss.parts["scale"].item() == pytest.approx(math.exp(3.0))
        assert not any(part.requires_grad for part in loss.parts.values())

    def test_the_main_output_weighs_alpha_and_the_mean_is_normalised(self):
        loss = make("objective", "pair_infonce")(Stub(note=vectors(8), visual=vectors(8, 1)), pairs(4))
        torch.testing.assert_close(loss.total, (9 * note_loss(vectors(8)) + note_loss(vectors(8, 1))) / 10)
        torch.testing.assert_close(loss.parts["loss_visual"], note_loss(vectors(8, 1)))

    def test_alpha_and_on_set_the_weights(self):
        model = Stub(note=vectors(8), visual=vectors(8, 1))
        note, visual = note_loss(vectors(8)), note_loss(vectors(8, 1))
        for given, expected in (({"alpha": 3}, (3 * note + visual) / 4), ({"on": {"visual": 2, "note": 1}}, (note + 2 * visual) / 3)):
            torch.testing.assert_close(make("objective", "pair_infonce", **given)(model, pairs(4)).total, expected)
        torch.testing.assert_close(make("objective", "pair_infonce", on={"visual": 5})(model, pairs(4)).total, visual)

    def test_rows_that_lack_an_output_leave_its_loss(self):
        there = torch.tensor([1, 0, 1, 1, 1, 1]).bool()  # row 1 has no image: the pairs (0, 3) and (2, 5) remain, 4 is a negative
        visual = vectors(6, 1)
        visual[1] = torch.nan
        model = Stub({"visual": there}, note=vectors(6), visual=visual)
        loss = make("objective", "pair_infonce")(model, pairs(3))
        e = F.normalize(visual[there].double(), dim=1)  # rows 0 2 3 4 5
        logits = (e @ e.T * math.exp(3.0)).fill_diagonal_(-torch.inf)
        expected = F.cross_entropy(logits[[0, 1, 2, 4]], torch.tensor([2, 4, 0, 1])).float()
        torch.testing.assert_close(loss.parts["loss_visual"], expected)
        loss.total.backward()
        assert torch.equal(model.embeddings["visual"].grad[1], torch.zeros(4))
        assert all(p.grad.isfinite().all() for p in model.parameters())

    def test_an_output_that_no_pair_has_leaves_the_mean(self):
        there = torch.tensor([1, 0, 0, 0, 1, 1]).bool()  # somebody is there, but no two that belong together
        model, objective = Stub({"visual": there}, note=vectors(6), visual=vectors(6, 1)), make("objective", "pair_infonce")
        loss = objective(model, pairs(3))
        torch.testing.assert_close(loss.total, note_loss(vectors(6)))
        assert loss.parts["loss_visual"].item() == 0

    def test_nothing_there_at_all_is_a_zero_loss(self):
        model = Stub({"note": torch.zeros(6).bool()}, note=torch.full((6, 4), torch.nan))
        objective = make("objective", "pair_infonce")
        loss = objective(model, pairs(3))
        loss.total.backward()
        assert loss.total.item() == 0
        assert objective.log_scale.grad.item() == 0
        assert torch.equal(model.embeddings["note"].grad, torch.zeros(6, 4))

    def test_the_same_item_and_known_pairs_are_no_negatives(self):
        objective, model, batch = make("objective", "pair_infonce"), Stub(note=vectors(6)), pairs(3)
        plain = objective(model, batch).total
        e = F.normalize(vectors(6), dim=1)
        logits = (e @ e.T * math.exp(3.0)).fill_diagonal_(-torch.inf)
        logits[0, 1] = logits[1, 0] = -torch.inf
        expected = F.cross_entropy(logits, batch.positive)
        assert expected.item() < plain.item()
        for fields in ({"ids": torch.tensor([7, 7, 1, 2, 3, 4])}, {"known": torch.tensor([[0, 1]])}):
            torch.testing.assert_close(objective(model, pairs(3, **fields)).total, expected)

    def test_known_rows_of_other_processes_are_none_of_one_that_is_alone(self):
        objective, model = make("objective", "pair_infonce", across_processes=False), Stub(note=vectors(6))
        elsewhere = torch.tensor([[0, 7], [0, -5], [1, 6], [2, -1]])
        assert torch.equal(objective(model, pairs(3, known=elsewhere)).total, objective(model, pairs(3)).total)

    def test_the_scale_learns(self):
        objective = make("objective", "pair_infonce", log_scale=1.0)
        objective(Stub(note=vectors(8)), pairs(4)).total.backward()
        step = 1e-3
        above, below = (note_loss(vectors(8), math.exp(1.0 + s)).item() for s in (step, -step))
        assert objective.log_scale.grad.item() == pytest.approx((above - below) / (2 * step), rel=1e-3)

    def test_bind_names_what_the_model_does_not_give(self):
        model = Stub(note=vectors(2), visual=vectors(2))
        make("objective", "pair_infonce", on={"visual": 1}).bind(model)
        with pytest.raises(ZooError) as caught:
            make("objective", "pair_infonce", on={"nte": 1, "audio": 2}).bind(model)
        assert "no output of this model named 'nte'; did you mean 'note'? (have: note, visual)" in str(caught.value)
        assert "'audio'" in str(caught.value)

    @pytest.mark.parametrize("given", [{"alpha": 0}, {"on": {"note": -1}}, {"on": {}}])
    def test_weights_are_above_zero(self, given):
        with pytest.raises(ZooError, match="numbers above 0"):
            make("objective", "pair_infonce", **given)

    def test_a_batch_of_single_rows_is_refused(self):
        with pytest.raises(ZooError, match="does not say which rows belong together"):
            make("objective", "pair_infonce")(Stub(note=vectors(4)), Batch({}))


class TestTwoSides:
    """infonce and siglip."""

    def test_infonce_of_two_outputs_is_clip(self):
        image, text = vectors(5), vectors(5, 1)
        for given in ({}, {"on": ["text", "image"]}):
            loss = make("objective", "infonce", **given)(Stub(image=image, text=text), Batch({}))
            torch.testing.assert_close(loss.total, clip_loss(image, text))
        assert loss.parts["scale"].item() == pytest.approx(1 / 0.07)

    def test_infonce_of_one_output_contrasts_queries_with_targets(self):
        x = vectors(8)
        expected = clip_loss(x[:4], x[4:])
        torch.testing.assert_close(make("objective", "infonce")(Stub(note=x), pairs(4)).total, expected)
        two = Stub(note=x, visual=vectors(8, 1))
        torch.testing.assert_close(make("objective", "infonce", on=["note"])(two, pairs(4)).total, expected)

    def test_siglip(self):
        image, text = vectors(5), vectors(5, 1)
        logits = F.normalize(image, dim=1) @ F.normalize(text, dim=1).T * 10 - 10
        expected = F.softplus(-logits * (2 * torch.eye(5) - 1)).sum() / 5
        objective = make("objective", "siglip")
        loss = objective(Stub(image=image, text=text), Batch({}))
        loss.total.backward()
        torch.testing.assert_close(loss.total, expected)
        assert loss.parts["scale"].item() == pytest.approx(10)
        assert loss.parts["bias"].item() == -10
        assert objective.bias.grad.item() != 0

    @pytest.mark.parametrize("known", [[[0, 3]], [[3, 0]], [[0, 3], [3, 0]]])
    def test_known_pairs_between_the_halves(self, known):
        x = vectors(4)
        logits = F.normalize(x[:2], dim=1) @ F.normalize(x[2:], dim=1).T
        logits[0, 1] = -torch.inf
        target = torch.arange(2)
        expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        loss = make("objective", "infonce", log_scale=0)(Stub(note=x), pairs(2, known=torch.tensor(known)))
        torch.testing.assert_close(loss.total, expected)

    def test_known_pairs_within_one_half_say_nothing_about_two_sides(self):
        objective, model = make("objective", "infonce", log_scale=0), Stub(note=vectors(4))
        within = objective(model, pairs(2, known=torch.tensor([[0, 1], [3, 2], [0, -3], [1, 5]]))).total
        assert torch.equal(within, objective(model, pairs(2)).total)

    def test_equal_ids_between_the_halves(self):
        x, ids = vectors(4), torch.tensor([5, 6, 7, 5])
        objective, model = make("objective", "infonce", log_scale=0), Stub(note=x)
        by_ids = objective(model, pairs(2, ids=ids)).total
        torch.testing.assert_close(by_ids, objective(model, pairs(2, known=torch.tensor([[0, 3]]))).total)
        assert by_ids.item() < objective(model, pairs(2)).total.item() - 0.01

    def test_partners_are_no_negatives_across_two_outputs(self):
        image, text = vectors(4), vectors(4, 1)  # rows 0, 2 and rows 1, 3 are pairs
        logits = F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
        together = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 1], [1, 0, 0, 0], [0, 1, 0, 0]]).bool()
        target = torch.arange(4)
        masked = logits.masked_fill(together, -torch.inf)
        expected = (F.cross_entropy(masked, target) + F.cross_entropy(masked.T, target)) / 2
        one_way = Batch({}, positive=torch.tensor([2, 3, -1, -1]))
        for batch in (pairs(2), one_way, Batch({}, known=torch.tensor([[0, 2], [3, 1]]))):
            loss = make("objective", "infonce", log_scale=0)(Stub(image=image, text=text), batch)
            torch.testing.assert_close(loss.total, expected)

    @pytest.mark.parametrize("name", ["infonce", "siglip"])
    def test_a_pair_with_an_absent_side_does_not_count(self, name):
        image, text, there = vectors(4), vectors(4, 1), torch.tensor([1, 0, 1, 1]).bool()
        image[1], text_there = torch.nan, torch.tensor([1, 1, 1, 0]).bool()
        model = Stub({"image": there, "text": text_there}, image=image, text=text)
        loss = make("objective", name)(model, Batch({}))
        loss.total.backward()
        assert loss.total.item() > 0
        assert torch.equal(model.embeddings["image"].grad[1], torch.zeros(4))
        assert torch.equal(model.embeddings["text"].grad[3], torch.zeros(4))
        assert all(p.grad.isfinite().all() for p in model.parameters())

    @pytest.mark.parametrize("name", ["infonce", "siglip"])
    def test_nothing_there_at_all_is_a_zero_loss(self, name):
        model = Stub({"image": torch.zeros(4).bool()}, image=vectors(4), text=vectors(4, 1))
        assert make("objective", name)(model, Batch({})).total.item() == 0

    @pytest.mark.parametrize("name", ["infonce", "siglip"])
    def test_bind_checks_the_outputs(self, name):
        model = Stub(image=vectors(2), text=vectors(2), note=vectors(2))
        make("objective", name, on=["image", "text"]).bind(model)
        with pytest.raises(ZooError, match=rf"{name}.on: no output of this model named 'imag'; did you mean 'image'"):
            make("objective", name, on=["imag", "text"]).bind(model)
        for on in (None, ["image", "image"], []):
            with pytest.raises(ZooError, match="write two different outputs, or one"):
                make("objective", name, on=on).bind(model)

    @pytest.mark.parametrize("name", ["infonce", "siglip"])
    def test_one_output_without_pairs_is_refused(self, name):
        with pytest.raises(ZooError, match=f"{name} on the one output 'note' contrasts queries with targets"):
            make("objective", name)(Stub(note=vectors(4)), Batch({}))


class TestNothingToLearn:
    """A batch whose rows are all partners, or one item, has a loss of 0 whatever the model does."""

    @pytest.mark.parametrize("name", ["pair_infonce", "infonce"])
    @pytest.mark.parametrize("lacking", [{"ids": torch.zeros(4).long()}, {"known": torch.tensor([[0, 1], [0, 3], [1, 2], [2, 3]])}])
    def test_a_batch_without_negatives_is_warned_of(self, name, lacking):
        with pytest.warns(UserWarning, match=rf"{name}: no row of a batch of \d rows has a negative.*write a larger run\.batch_size"):
            assert make("objective", name)(Stub(note=vectors(4)), pairs(2, **lacking)).total.item() == 0

    @pytest.mark.parametrize("name", ["pair_infonce", "infonce"])
    def test_a_loss_of_zero_for_another_reason_is_not(self, name):
        """What was learned so well that it is 0 in float32 has negatives; warnings are errors here."""
        apart = torch.tensor([[1.0, 0], [-1, 0], [1, 0], [-1, 0]])
        assert make("objective", name, log_scale=5.0)(Stub(note=apart), pairs(2)).total.item() == 0
