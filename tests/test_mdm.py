"""Masked data modelling: what is hidden of which rows, and the loss against a second derivation from raw rows, one at a time."""

import json
import math

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from tests.captioned_shapes import shapes
from zoo import ZooError, make
from zoo.batches import CaptionedRows
from zoo.block_masks import block_masks
from zoo.collate import stack
from zoo.encoders._image import CLIP_MEAN, CLIP_STD, HALF, ImageProcessor
from zoo.hub import save
from zoo.optimizer import make_optimizer
from zoo.pixels import pixels_of, repainted
from zoo.recipe import load_recipe
from zoo.registry import build, register
from zoo.train import make_step, train
from zoo.types import Batch, CaptionedData, ModalityInputs
from zoo.update import Step
from zoo.validate import validate
from zoo.word_masks import choose, hide, words_in

CODES, PATCHES = 24, 16
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32, and texts of a batch are padded
PARTS = {"loss_words", "loss_patches", "filled", "told", "share_text", "share_image", "share_pair_text", "share_pair_image"}


@pytest.fixture(scope="module")
def rows():
    """Sixty pairs of a picture and its text."""
    pairs = CaptionedRows(shapes(), "train")
    return [pairs[i] for i in range(len(pairs))]


@pytest.fixture(scope="module")
def tokenizer():
    """One whose encoder, to speak of something, was drawn, and whose codes are patches of the shapes."""
    torch.manual_seed(0)
    made = build("visual_tokenizer", codes=CODES, taught=5)
    made.trained = True
    return made.eval()


@pytest.fixture(scope="module")
def folder(tokenizer, rows, tmp_path_factory):
    with torch.no_grad():
        pictures = ModalityInputs(torch.stack([tokenizer.processor(row)["image"].values for row in rows]))
        points = tokenizer._pointed(tokenizer._states(pictures)).flatten(0, 1)
        tokenizer.codebook.follow(points, tokenizer.codebook(points), 0.99)
    return str(save(tokenizer, tmp_path_factory.mktemp("tokenizer") / "model"))


def joint(name="beit_3", **settings):
    torch.manual_seed(1)
    return build(name, **{"layers": 2, "codes": CODES, **settings}).eval()


def objective_of(model, folder, **settings):
    objective = make("objective", "mdm", tokenizer=folder, **settings)
    objective.bind(model)
    return objective


def batch_of(model, rows):
    return Batch(stack([model.processor(row) for row in rows]), ids=torch.arange(len(rows)))


def without(row, *names):
    return {key: value for key, value in row.items() if key not in names}


def mixed(rows):
    """Texts, pictures, pairs and rows of nothing, in turn."""
    kinds = [("image",), ("text",), (), ("image", "text")]
    return [without(row, *kinds[i % 4]) for i, row in enumerate(rows[:21])]


class TestLoss:
    @pytest.mark.parametrize("name", ["beit_3", "vlmo"])
    def test_is_that_of_each_row_alone(self, name, rows, tokenizer, folder):
        model, given = joint(name), mixed(rows)
        objective, batch = objective_of(model, folder), batch_of(model, given)
        torch.manual_seed(3)
        loss = objective(model, batch)
        loss.total.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()

        torch.manual_seed(3)  # the same draws, and from here on row by row
        words, patches = [], []
        for kind, share_image, share_text in (("text", 0, 0.15), ("image", 0.4, 0), ("pair", 0.4, 0.5)):
            has = {"image", "text"} if kind == "pair" else {kind}
            here = [i for i, row in enumerate(given) if {*row} - {"id"} == has]
            inputs = {key: x.rows(torch.tensor(here))._replace(present=None) for key, x in batch.inputs.items()}
            if share_text:
                chosen = choose(inputs["text"], model.vocabulary, share_text, False)
                hidden_words = hide(inputs["text"].values, chosen, model.vocabulary)
            if share_image:
                hidden = block_masks(len(here), (4, 4), 6)
            for i, row in enumerate(here):
                one = {key: x.rows(slice(i, i + 1)) for key, x in inputs.items()}
                image = one["image"] if share_image else None
                text = one["text"]._replace(values=hidden_words[i : i + 1]) if share_text else None
                told_words, told_patches = model.fill(
                    image, hidden[i : i + 1] if share_image else None, text, chosen[i : i + 1] if share_text else None
                )
                if share_text:
                    right = one["text"].values[0, chosen[i]]
                    words += [-logits.log_softmax(0)[word] for logits, word in zip(told_words, right, strict=True)]
                if share_image:
                    right = torch.from_numpy(tokenizer.tell(given[row]))[hidden[i]]  # of the raw picture
                    patches += [-logits.log_softmax(0)[code] for logits, code in zip(told_patches, right, strict=True)]
        expected = torch.stack(words).mean(), torch.stack(patches).mean()
        sum(expected).backward()
        torch.testing.assert_close(loss.parts["loss_words"], expected[0].detach(), **CLOSE)
        torch.testing.assert_close(loss.parts["loss_patches"], expected[1].detach(), **CLOSE)
        torch.testing.assert_close(loss.total, sum(expected), **CLOSE)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(found[name], parameter.grad, **CLOSE, msg=lambda m, name=name: f"{name}: {m}")
        assert len(patches) == 6 * 10
        assert abs(sum(expected) - (torch.stack(words).sum() + torch.stack(patches).sum()) / len(words + patches)) > 1e-3

    def test_targets_are_not_hidden_from_the_tokenizer_and_move_nothing(self, rows, folder):
        model = joint()
        objective = objective_of(model, folder)
        objective.train()
        before = {name: x.clone() for name, x in objective.state_dict().items()}
        objective(model, batch_of(model, mixed(rows))).total.backward()
        assert before
        assert all(torch.equal(x, before[name]) for name, x in objective.state_dict().items())
        assert not any(p.requires_grad for p in objective.parameters())
        assert objective.tokenizer.vision is None
        assert objective.tokenizer.decoder is None

    def test_the_tokenizer_drops_nothing_out(self, rows, folder):
        model = joint()
        objective, image = objective_of(model, folder), batch_of(model, rows[:8]).inputs["image"]
        wanted = objective._ids(image)
        objective.tokenizer.encoder.blocks[0].mlp.drop1.p = 0.9
        objective.train()
        assert torch.equal(objective._ids(image), wanted)
        objective.tokenizer.train()
        assert not torch.equal(objective.tokenizer.ids(image), wanted), "nothing is dropped out, so this shows nothing"

    def test_it_learns_both(self, rows, folder):
        model = joint().train()
        objective, batch = objective_of(model, folder), batch_of(model, rows[:24])
        optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
        losses = []
        for _ in range(60):
            loss = objective(model, batch)
            losses.append(loss)
            optimizer.zero_grad()
            loss.total.backward()
            optimizer.step()
        for name in ("loss_words", "loss_patches"):
            first, last = (sum(loss.parts[name] for loss in some) / 5 for some in (losses[:5], losses[-5:]))
            assert last < 0.6 * first, name


class TestShares:
    def shares(self, rows, folder, **settings):
        model = joint(image_size=32)
        torch.manual_seed(0)
        return model, objective_of(model, folder, **settings)(model, batch_of(model, rows)).parts

    def test_are_beit_3s(self, rows, folder):
        some = [without(row, ("image", "text")[i % 2]) if i % 3 else row for i, row in enumerate(rows * 12)]
        model, parts = self.shares(some, folder)
        text = batch_of(model, some).inputs["text"]
        many = dict.fromkeys(("text", "pair"), 0)
        for row, count in zip(some, words_in(text, model.vocabulary).sum(1).tolist(), strict=True):
            many["pair" if "image" in row else "text"] += count if "text" in row else 0
        for name, wanted in (("text", 0.15), ("pair_text", 0.5)):
            deviation = math.sqrt(wanted * (1 - wanted) / many[name.partition("_")[0]])
            assert abs(parts[f"share_{name}"] - wanted) < 4 * deviation, name
            assert deviation < 0.025
        assert parts["share_image"] == parts["share_pair_image"] == 6 / PATCHES  # 40 % of 16 is 6.4
        assert {*parts} == PARTS

    def test_others(self, rows, folder):
        texts = [without(row, "image") for row in rows * 12]
        _, parts = self.shares(texts, folder, text=0.10)
        assert parts["share_text"] == pytest.approx(0.10, abs=0.02)
        _, parts = self.shares(rows, folder, pair_text=0, pair_image=0.75)
        assert (parts["share_pair_text"], parts["share_pair_image"]) == (0, 12 / PATCHES)
        assert parts["loss_words"] == 0
        _, parts = self.shares(rows, folder, pair_text=1.0, pair_image=0)
        assert (parts["share_pair_text"], parts["share_pair_image"], parts["loss_patches"]) == (1, 0, 0)

    def test_a_picture_of_196_patches(self, rows, tokenizer, tmp_path):
        large = build("visual_tokenizer", codes=CODES, image_size=112, patch=8)
        large.trained = True
        model = joint(image_size=112)
        objective = objective_of(model, str(save(large, tmp_path / "large")))
        parts = objective(model, batch_of(model, [without(row, "text") for row in rows[:3]])).parts
        assert parts["share_image"] == pytest.approx(78 / 196)


class TestWhatIsMissing:
    @pytest.mark.parametrize("lacks", [("image",), ("text",), ()])
    def test_a_batch_of_one_kind(self, rows, folder, lacks):
        model = joint()
        loss = objective_of(model, folder)(model, batch_of(model, [without(row, *lacks) for row in rows[:9]]))
        loss.total.backward()
        assert {*loss.parts} == PARTS
        told = {("image",): ("text",), ("text",): ("image",), (): ("pair_text", "pair_image")}[lacks]
        assert all((loss.parts[name] > 0) == (name.removeprefix("share_") in told) for name in PARTS if name.startswith("share_"))
        assert loss.total > 0

    def test_a_batch_of_nothing(self, folder):
        model = joint()
        objective = objective_of(model, folder)
        for batch in (Batch({}), batch_of(model, [{"text": "a"}])._replace(inputs={})):
            loss = objective(model, batch)
            loss.total.backward()
            assert loss.total == 0
            assert {*loss.parts} == PARTS
            assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)

    def test_a_share_of_0_leaves_a_kind_out(self, rows, folder, monkeypatch):
        model, calls = joint(), []
        fill = model.fill
        monkeypatch.setattr(model, "fill", lambda *given: calls.append([x is not None for x in given]) or fill(*given))
        objective_of(model, folder, text=0, pair_text=0)(model, batch_of(model, mixed(rows)))
        assert calls == [[True, True, False, False], [True, True, True, False]]
        calls.clear()
        objective = make("objective", "mdm", image=0, pair_image=0)
        objective.bind(joint(codes=0))
        objective(model, batch_of(model, mixed(rows)))
        assert calls == [[False, False, True, True], [True, False, True, True]]


class TestPixels:
    def test_other_colours(self, rows):
        one, other = ImageProcessor(32, mean=HALF, std=HALF), ImageProcessor(32, mean=CLIP_MEAN, std=CLIP_STD)
        pictures = [torch.stack([process(row["image"]).values for row in rows[:5]]) for process in (one, other)]
        given, wanted = pixels_of(one.config(), "one"), pixels_of(other.config(), "other")
        torch.testing.assert_close(repainted(pictures[0], given, wanted), pictures[1], rtol=0, atol=1e-5)
        assert repainted(pictures[0], given, given) is pictures[0]
        assert (repainted(pictures[0], wanted, given) - pictures[1]).abs().max() > 0.1

    def test_another_size(self, rows):
        one, other = ImageProcessor(64, mean=HALF, std=HALF), ImageProcessor(32, mean=HALF, std=HALF)
        pictures = [torch.stack([process(row["image"]).values for row in rows[:5]]) for process in (one, other)]
        found = repainted(pictures[0], pixels_of(one.config(), "one"), pixels_of(other.config(), "other"))
        assert found.shape == pictures[1].shape
        assert (found - pictures[1]).abs().mean() < 0.01  # PIL rounds to whole numbers

    def test_no_square(self):
        with pytest.raises(
            ZooError, match=r"an encoder: its pixels cannot be made into those of another .*, as its processor says no mean, std"
        ):
            pixels_of({"size": 3}, "an encoder")

    def test_the_model_may_see_larger_pictures_than_the_tokenizer(self, rows, tokenizer, folder):
        model = joint(image_size=64, patch=16)
        objective = objective_of(model, folder)
        image = batch_of(model, rows[:8]).inputs["image"]
        same = (objective._ids(image).numpy() == tokenizer.tell(rows[:8])).mean()
        assert same > 0.9


class TestTogether:
    def test_beside_others(self, rows, folder):
        model = joint()
        settings = {"name": "together", "of": ["itc", {"name": "mdm", "tokenizer": folder}], "weights": [1, 2]}
        for momentum in (None, 0.9):
            objective = make("objective", {**settings, "momentum": momentum})
            objective.bind(model)
            batch = batch_of(model, mixed(rows))
            loss = objective(model, batch)
            loss.total.backward()
            torch.testing.assert_close(loss.total.detach(), loss.parts["loss_itc"] + 2 * loss.parts["loss_mdm"])
            assert {f"mdm_{name}" for name in PARTS} <= {*loss.parts}
            objective.before_step(model)
            objective.after_step(model, loss.state)


class TestRefusals:
    def test_nothing_to_hide(self):
        with pytest.raises(ZooError, match="mdm: nothing is hidden, so nothing is learned"):
            make("objective", "mdm", text=0, image=0, pair_text=0, pair_image=0)

    def test_no_tokenizer(self):
        with pytest.raises(ZooError, match=r"mdm\.tokenizer: hidden patches are told from visual tokens: name the folder"):
            make("objective", "mdm")

    def test_not_bound(self, rows, folder):
        model = joint()
        with pytest.raises(ZooError, match=r"mdm\.tokenizer: it is not read yet: call bind\(model\)"):
            make("objective", "mdm", tokenizer=folder)(model, batch_of(model, rows[:2]))

    def test_models_that_do_not_fit(self, folder):
        with pytest.raises(ZooError, match="this one fills in none: write vlmo or beit_3"):
            objective_of(build("clip"), folder)
        with pytest.raises(ZooError, match=r"tells 24 visual tokens apart, and the model 0: write model\.codes: 24"):
            objective_of(joint(codes=0), folder)
        with pytest.raises(ZooError, match=r"cuts a picture into 4 x 4 patches, and the model into 8 x 8: write a model\.image_size"):
            objective_of(joint(image_size=64), folder)
        model = joint()
        model.vocabulary.roles["mask"] = None
        with pytest.raises(ZooError, match="this model's vocabulary has none"):
            objective_of(model, folder)

    def test_folders_that_hold_no_tokenizer(self, tmp_path):
        with pytest.raises(ZooError, match=r"mdm\.tokenizer: no model in .*nowhere, which does not exist"):
            objective_of(joint(), str(tmp_path / "nowhere"))
        for folder, recipe in (("runs/visual_tokenizer/none", "visual_tokenizer/none"), (str(tmp_path), "visual_tokenizer/emoji")):
            with pytest.raises(ZooError, match=f"; train one first: zoo train {recipe}$"):
                objective_of(joint(), folder)
        with pytest.raises(ZooError, match="holds a Clip, and patches are told by a visual_tokenizer"):
            objective_of(joint(), str(save(build("clip"), tmp_path / "clip")))
        with pytest.raises(ZooError, match=r"nothing was trained in .*untrained: its ids would mean nothing"):
            objective_of(joint(), str(save(build("visual_tokenizer", codes=CODES), tmp_path / "untrained")))

    @pytest.mark.parametrize("given", [{"text": 1.5}, {"least": 0}])
    def test_settings(self, given, folder):
        with pytest.raises(ZooError, match=next(iter(given))):
            make("objective", "mdm", tokenizer=folder, **given)


class TestRuns:
    @pytest.fixture
    def recipe(self, tmp_path, own_registry):
        @register("data", "shapes")
        def made(root) -> CaptionedData:
            """Of this test."""
            return shapes()

        def of(tokenizer, **run):
            return load_recipe(
                {
                    "model": {"name": "beit_3", "layers": 1, "codes": CODES},
                    "data": "shapes",
                    "objective": {"name": "mdm", "tokenizer": tokenizer},
                    "run": {"steps": 2, "batch_size": 8, "log_every": 1, "device": "cpu", **run},
                    "out": str(tmp_path / "run"),
                }
            )

        return of

    def test_the_log_tells_the_shares_of_a_run(self, recipe, folder, tmp_path):
        """Rows of a third each, whose texts have three words at least: 12 steps hide of some 300 words each way."""
        train(recipe(folder, steps=12, batch_size=24, shows={"image": 1, "text": 1, "pair": 1}))
        lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
        assert len(lines) == 12
        for name in ("share_image", "share_pair_image"):
            assert {line[name] for line in lines} == {6 / PATCHES}
        for name, wanted in (("share_text", 0.15), ("share_pair_text", 0.5)):
            found = sum(line[name] for line in lines) / len(lines)
            assert abs(found - wanted) < 4 * math.sqrt(wanted * (1 - wanted) / 300), name

    def test_what_is_not_shown_is_not_hidden(self, recipe, folder, tmp_path):
        train(recipe(folder, shows={"text": 1}))
        lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
        assert all((line["share_image"], line["share_pair_text"], line["share_pair_image"]) == (0, 0, 0) for line in lines)
        assert all(line["share_text"] > 0 for line in lines)

    def test_no_step_moves_the_tokenizer(self, recipe, folder):
        step = make_step(recipe(folder))
        moved = {id(p) for group in make_optimizer(step, recipe(folder).optimizer).param_groups for p in group["params"]}
        assert moved == {id(p) for p in step.model.parameters()}
        assert moved.isdisjoint(id(p) for p in step.objective.tokenizer.parameters())

    def test_chunks(self, recipe, folder):
        with pytest.raises(ZooError, match=r"run\.gradcache: 0|write gradcache: 0"):
            train(recipe(folder, gradcache=4))

    def test_validate_with_and_without_the_tokenizer(self, recipe, folder, tmp_path, caplog):
        there = validate(recipe(folder), rows=8)
        assert there.faults == []
        assert next(part for part in there.parts if part.name == "objective").parameters > 1000
        absent = validate(recipe(str(tmp_path / "nowhere")), rows=8)
        assert absent.faults == []
        assert "mdm.tokenizer: there is no" in caplog.text
        with pytest.raises(ZooError, match="which does not exist"):
            make_step(recipe(str(tmp_path / "nowhere")))


def processed(rank, place, folder, queue):
    """One process of two, of which one has texts alone, the other pictures alone."""
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
    model = joint()
    pairs = CaptionedRows(shapes(), "train")
    step = DistributedDataParallel(Step(model, objective_of(model, folder)), find_unused_parameters=True)
    torch.manual_seed(rank)
    batch = batch_of(model, [without(pairs[i], ("image", "text")[rank]) for i in range(6)])
    loss = step(batch)
    loss.total.backward()
    sums = {name: float(p.grad.abs().sum()) for name, p in model.named_parameters() if p.grad is not None}
    queue.put((rank, sorted(loss.parts), sums))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_processes_may_have_rows_of_different_kinds(folder, tmp_path):
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(processed, (str(tmp_path / "meet"), folder, queue), nprocs=2)
    (_, parts, sums), (_, others, same) = (queue.get() for _ in range(2))
    assert parts == others == sorted(PARTS)
    assert sums == pytest.approx(same, rel=1e-6)
    assert all(sums[name] > 0 for name in ("head.weight", "codes_head.weight", "vision.mask"))
