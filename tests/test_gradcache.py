"""Big contrastive batches in chunks: loss and gradient are those of the whole batch, and what would not be is refused."""

import math

import pytest
import torch
from torch import nn

from zoo import gradcache
from zoo.collate import PairCollate
from zoo.errors import ZooError
from zoo.registry import build, make
from zoo.types import Batch, Loss, ModalityInputs, ModelOutput, Pair

EXACT = {"rtol": 0, "atol": 1e-12}  # float64: sums of some thousand terms, in another order
SMALL = {"dim": 32, "layers": 1, "heads": 2}


def note_model(**settings):
    torch.manual_seed(0)
    plain = {
        "backbone": {"name": "tiny_lm", **SMALL, "vocab_size": 512},
        "vision": {"name": "tiny_image", **SMALL, "image_size": 16},
        "connector": "linear",
        "dim": 8,
        "language": "en",
        "train_vision": True,
    }
    return build("notellm2", **{**plain, **settings}).double().train()


@pytest.fixture(scope="module")
def notes():
    return make("data", {"name": "planted_notes", "notes": 160, "users": 1000, "image_size": 16, "mine": {"top": 1}}).notes


@pytest.fixture
def batch(notes):
    def of(model, pairs=5):
        """The third note has no image, the first no text."""
        some = [dict(notes[i]) for i in range(2 * pairs)]
        del some[2]["image"]
        some[0] = {"id": some[0]["id"], "image": some[0]["image"]}
        found = PairCollate(model.processor)([Pair(some[2 * i], some[2 * i + 1]) for i in range(pairs)])
        image = found.inputs["image"]
        return found._replace(inputs={**found.inputs, "image": image._replace(values=image.values.double())})

    return of


def gradients(model, objective):
    named = [*model.named_parameters(), *(("objective." + n, p) for n, p in objective.named_parameters())]
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def one_shot(model, objective, batch):
    model.zero_grad()
    objective.zero_grad()
    loss = objective(model, batch)
    loss.total.backward()
    return loss, gradients(model, objective)


def in_chunks(model, objective, batch, rows):
    model.zero_grad()
    objective.zero_grad()
    loss = gradcache.backward(model, objective, batch, rows, lambda loss: loss.total.backward())
    return loss, gradients(model, objective)


def same(found, expected, **tolerance):
    (loss, of), (loss_, of_) = found, expected
    torch.testing.assert_close(loss.total, loss_.total, **(tolerance or EXACT))
    assert loss.parts.keys() == loss_.parts.keys()
    assert of.keys() == of_.keys()
    for name in of:
        torch.testing.assert_close(of[name], of_[name], **(tolerance or EXACT), msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("rows", [1, 3, 10, 100])
@pytest.mark.parametrize("objective", ["pair_infonce", "infonce", "siglip"])
def test_gradients_are_those_of_the_whole_batch(batch, objective, rows):
    model, criterion = note_model(), make("objective", objective, **({"on": ["note"]} if objective != "pair_infonce" else {})).double()
    expected = one_shot(model, criterion, batch(model))
    assert any(value.abs().max() > 1e-6 for value in expected[1].values())
    same(in_chunks(model, criterion, batch(model), rows), expected)


@pytest.mark.parametrize("fusion", ["early", "gated_late", "micl"])
def test_every_way_of_fusing(batch, fusion):
    model, criterion = note_model(fusion=fusion), make("objective", "pair_infonce").double()
    same(in_chunks(model, criterion, batch(model), 3), one_shot(model, criterion, batch(model)))


def test_float32(batch):
    model, criterion = note_model().float(), make("objective", "pair_infonce")
    of = batch(model)
    image = of.inputs["image"]
    of = of._replace(inputs={**of.inputs, "image": image._replace(values=image.values.float())})
    same(in_chunks(model, criterion, of, 3), one_shot(model, criterion, of), rtol=1e-4, atol=1e-5)  # float32: some hundred roundings


def test_with_gradient_checkpointing(batch):
    model, criterion = note_model(), make("objective", "pair_infonce").double()
    expected = one_shot(model, criterion, batch(model))
    model.checkpoint_gradients()
    same(in_chunks(model, criterion, batch(model), 4), expected)


def test_in_bfloat16(batch):
    model, criterion = note_model().float(), make("objective", "pair_infonce")
    of = batch(model)
    image = of.inputs["image"]
    of = of._replace(inputs={**of.inputs, "image": image._replace(values=image.values.float())})
    with torch.autocast("cpu", torch.bfloat16):
        same(in_chunks(model, criterion, of, 3), one_shot(model, criterion, of), rtol=0.05, atol=0.05)  # bfloat16: 2 ** -8 a rounding


def test_a_frozen_part_gets_no_gradient(batch):
    model, criterion = note_model(), make("objective", "pair_infonce").double()
    model.backbone.requires_grad_(False)
    _, of = in_chunks(model, criterion, batch(model), 3)
    assert of
    assert not any(name.startswith("backbone") for name in of)


class Dropping(nn.Module):
    """Drops out, and remembers what it gave."""

    outputs, dim = ("item",), 6

    def __init__(self):
        super().__init__()
        self.project, self.drop, self.gave = nn.Linear(6, 6).double(), nn.Dropout(0.5), []

    def forward(self, batch: Batch) -> ModelOutput:
        vectors = self.drop(self.project(batch.inputs["x"].values))
        self.gave.append(vectors.detach())
        return ModelOutput({"item": vectors})


def features(rows=8):
    x = torch.randn(rows, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return Batch({"x": ModalityInputs(x)}, positive=(torch.arange(rows) + rows // 2) % rows)


def test_both_passes_drop_the_same_and_the_next_batch_drops_anew():
    model, criterion = Dropping(), make("objective", "pair_infonce").double()
    torch.manual_seed(0)
    in_chunks(model, criterion, features(), 3)
    first, second = model.gave[:3], model.gave[3:]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    in_chunks(model, criterion, features(), 3)
    assert not torch.equal(model.gave[6], first[0])


def test_the_loss_is_differentiated_by_who_calls():
    model, criterion = Dropping().eval(), make("objective", "pair_infonce").double()
    _, whole = in_chunks(model, criterion, features(), 3)
    model.zero_grad()
    criterion.zero_grad()
    gradcache.backward(model, criterion, features(), 3, lambda loss: (loss.total / 4).backward())
    for name, value in gradients(model, criterion).items():
        torch.testing.assert_close(value * 4, whole[name], **EXACT)


def test_activations_are_those_of_a_chunk():
    """What autograd keeps at a time shrinks with the chunk, whatever the batch."""

    class Deep(Dropping):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(*[nn.Sequential(nn.Linear(6, 256), nn.Tanh(), nn.Linear(256, 6)) for _ in range(4)]).double()

        def forward(self, batch):
            return ModelOutput({"item": self.layers(batch.inputs["x"].values)})

    model, criterion = Deep(), make("objective", "pair_infonce").double()
    kept = {}
    for rows in (64, 8):
        live, most = 0, 0

        class Held:
            def __init__(self, tensor):
                nonlocal live, most
                self.tensor, self.size = tensor, tensor.numel()
                live += self.size
                most = max(most, live)

            def __del__(self):
                nonlocal live
                live -= self.size

        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            in_chunks(model, criterion, features(64), rows)
        kept[rows] = most
    assert kept[8] < 0.4 * kept[64]


class TestRefusals:
    def refused(self, model, objective, message, rows=3):
        with pytest.raises(ZooError, match=message):
            in_chunks(model, objective, features(), rows)

    def test_further_inputs(self):
        class Again(nn.Module):
            def forward(self, model, batch):
                return Loss(model(batch._replace(positive=None)).embeddings["item"].sum(), {})

        self.refused(Dropping(), Again(), r"run\.gradcache: this objective runs the model on further inputs")

    def test_more_than_embeddings(self):
        class Nosy(nn.Module):
            def forward(self, model, batch):
                return Loss(model.project.weight.sum(), {})

        self.refused(Dropping(), Nosy(), r"run\.gradcache: this objective uses model\.project")

    def test_logits(self):
        class Classifying(Dropping):
            def forward(self, batch):
                return ModelOutput({"item": batch.inputs["x"].values}, logits={"words": torch.zeros(1)})

        self.refused(Classifying(), make("objective", "pair_infonce"), r"run\.gradcache: this model gives logits \(words\)")

    def test_batch_norm(self):
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        with pytest.raises(ZooError, match=r"run\.gradcache: 1 is a batch norm in training, which mixes the rows"):
            gradcache.check_rows_stay_apart(model)
        gradcache.check_rows_stay_apart(model.requires_grad_(False))


def test_nothing_but_the_inputs_goes_into_a_chunk():
    chunks = list(gradcache.split(features(8), 3))
    assert [len(chunk.inputs["x"].values) for chunk in chunks] == [3, 3, 2]
    assert all(chunk.positive is None for chunk in chunks)
    assert math.isclose(float(sum(chunk.inputs["x"].values.sum() for chunk in chunks)), float(features(8).inputs["x"].values.sum()))
