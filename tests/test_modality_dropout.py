"""Modality dropout: at its rate, never all of a row, absent and not zero, and the same again after an interruption."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.test_schedules import NAMES, B, D, K, batch
from zoo.errors import ZooError
from zoo.recipe import load_recipe
from zoo.registry import build, make
from zoo.train import train
from zoo.types import Batch, LabelledData, ModalityInputs
from zoo.update import Updater

ROWS = 4000


def schedule(rate=0.3, seed=0):
    torch.manual_seed(seed)
    return make("fusion", {"name": "modality_dropout", "rate": rate}, NAMES, D, K)


def rows(present=None, names=NAMES, count=ROWS):
    return Batch({name: ModalityInputs(torch.ones(count, 1), None, (present or {}).get(name)) for name in names})


def kept(made, whole):
    """(M, B)."""
    (phase,) = made.phases(whole)
    return torch.stack([x.present for x in phase.batch.inputs.values()])


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("names", [["audio", "image"], ["audio", "image", "text"]])
def test_as_many_go_as_the_rate_says_and_one_stays(rate, names):
    """All M would go with probability rate^M; then one, any of them, stays: rate - rate^M / M is lost."""
    found = kept(schedule(rate), rows(names=names))
    assert bool(found.any(0).all())
    lost = 1 - found.float().mean(1)
    wanted = rate - rate ** len(names) / len(names)
    assert lost.tolist() == pytest.approx([wanted] * len(names), abs=0.03)  # 4 times sqrt(0.25 / 4000)


def test_at_a_rate_of_one_each_is_the_one_that_stays_in_turn():
    found = kept(schedule(1.0), rows())
    assert torch.equal(found.sum(0), torch.ones(ROWS, dtype=torch.long))


def test_what_is_absent_stays_absent():
    there = {"audio": torch.arange(ROWS) % 3 > 0, "image": torch.arange(ROWS) % 4 > 0}
    found = kept(schedule(0.9), rows(there))
    known = torch.stack(list(there.values()))
    assert not bool((found & ~known).any())
    assert torch.equal(found.any(0), known.any(0))  # a row that has nothing still has nothing, and no other becomes one
    alone = known.sum(0) == 1
    assert torch.equal(found[:, alone], known[:, alone])


def test_masks_and_nothing_else():
    whole, made = batch({"image": torch.arange(B) % 2 == 0}), schedule(0.5)
    (phase,) = made.phases(whole)
    assert phase.modalities is None
    for name in NAMES:
        assert phase.batch.inputs[name].values is whole.inputs[name].values
    assert phase.batch.targets is whole.targets
    assert whole.inputs["audio"].present is None  # the batch that came in is as it was


def test_the_encoder_does_not_see_what_is_dropped():
    torch.manual_seed(0)
    encoders = {name: {"name": "tiny_image", "dim": D, "layers": 1, "heads": 2, "image_size": 8} for name in NAMES}
    net, seen = build("classifier", encoders=encoders, classes=K, fusion=["late", {"name": "modality_dropout", "rate": 1.0}]), []
    for name in NAMES:
        net.encoders[name].register_forward_hook(lambda _, given, __: seen.append(len(given[0].values)))
    (phase,) = net.schedule.phases(batch())
    net(phase.batch)
    assert sum(seen) == B


def test_each_batch_draws_anew_and_a_checkpoint_goes_on_where_it_was():
    made = schedule(0.5)
    first, kept_state = kept(made, rows()), {k: v.clone() for k, v in made.state_dict().items()}
    second, third = kept(made, rows()), kept(made, rows())
    assert not torch.equal(first, second)
    again = schedule(0.5, seed=7)
    again.load_state_dict(kept_state)
    assert torch.equal(kept(again, rows()), second)
    assert torch.equal(kept(again, rows()), third)


def test_the_seed_of_the_run_decides():
    assert torch.equal(kept(schedule(0.5), rows()), kept(schedule(0.5), rows()))
    assert not torch.equal(kept(schedule(0.5), rows()), kept(schedule(0.5, seed=1), rows()))


def test_nothing_else_that_is_random_moves():
    made = schedule()
    before = torch.get_rng_state()
    kept(made, rows())
    assert torch.equal(torch.get_rng_state(), before)


def test_no_model_without_classes_takes_it():
    with pytest.raises(ZooError, match="'modality_dropout' needs of a model: rows of known class, which 'dual_encoder' does not have"):
        build("dual_encoder", text="tiny_text", vision="tiny_image", fusion="modality_dropout", language="en")


class Digits:
    """Labelled rows, drawn from a seed."""

    def __init__(self):
        draw = np.random.default_rng(0)
        self.rows = [{"id": i, **{name: draw.standard_normal((2, 4)).astype(np.float32) for name in NAMES}} for i in range(40)]
        self.row_ids, self.modalities, self.classes = list(range(40)), tuple(NAMES), ("a", "b", "c")
        self.labels = np.arange(40) % 3
        self.broken, self.statistics, self.fingerprint = [], {}, "drawn"

    def split(self, name):
        return np.arange(30) if name == "train" else np.arange(30, 40)

    def lengths(self):
        return np.ones(40, dtype=np.int64)


class Killed(Exception):
    pass


def test_an_interrupted_run_ends_as_the_uninterrupted_one(tmp_path, monkeypatch):
    data = Digits()
    assert isinstance(data, LabelledData)

    def recipe(out):
        return load_recipe(
            {
                "model": {
                    "name": "classifier",
                    "encoders": {name: {"name": "features", "dim": 4} for name in NAMES},
                    "classes": 3,
                    "fusion": ["late", {"name": "modality_dropout", "rate": 0.5}],
                },
                "data": "av_digits",
                "objective": "cross_entropy",
                "run": {"steps": 7, "batch_size": 8, "device": "cpu", "save_every": 1, "log_every": 1},
                "out": str(tmp_path / out),
            }
        )

    train(recipe("whole"), loaded=data)
    check, seen = Updater._check_loss, []

    def killing(self, loss, position):
        seen.append(position.step)
        if len(seen) == 6:  # the second batch of the second epoch
            raise Killed
        check(self, loss, position)

    with monkeypatch.context() as patch:
        patch.setattr(Updater, "_check_loss", killing)
        with pytest.raises(Killed):
            train(recipe("broken"), loaded=data)
    train(recipe("broken"), loaded=data)
    weights = [load_file(tmp_path / out / "model.safetensors") for out in ("whole", "broken")]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    losses = [[json.loads(line)["loss"] for line in (tmp_path / out / "log.jsonl").read_text().splitlines()] for out in ("whole", "broken")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 7
