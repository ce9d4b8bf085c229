"""BEiT v2's visual tokenizer: ids and loss against the published formulas written down plainly, the codebook by hand, runs, conversion."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import distributed as dist
from torch import multiprocessing as mp

from tests.captioned_shapes import shapes
from tests.hot_weights import heat
from zoo import ZooError, make
from zoo.batches import CaptionedRows
from zoo.collate import stack
from zoo.convert import convert
from zoo.hub import load, save
from zoo.models import beit_3, vlmo
from zoo.models._codebook import Codebook
from zoo.models.visual_tokenizer import SIZES
from zoo.recipe import load_recipe, recipes
from zoo.registry import build, register
from zoo.run import run
from zoo.train import train
from zoo.types import Batch, CaptionedData, ModalityInputs
from zoo.validate import validate

TINY = SIZES["tiny"]
TEACHER = {"name": "tiny_image", "dim": 24, "heads": 2, "layers": 1, "image_size": 32}
CLOSE = {"rtol": 1e-4, "atol": 2e-5}  # float32, sums in another order
EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(scope="module")
def rows():
    pairs = CaptionedRows(shapes(), "train")
    return [pairs[i] for i in range(len(pairs))]


def pictures(model, rows):
    return ModalityInputs(torch.stack([model.processor(row)["image"].values for row in rows]))


def published(codes=40, seed=0):
    """Weights of a tiny tokenizer by the names and shapes of the published ones, all of them far from their first values."""
    draw = torch.Generator().manual_seed(seed)

    def of(*shape, scale=None, around=0.0):
        last = math.prod(shape[1:]) if len(shape) > 1 else 4
        return around + torch.randn(shape, generator=draw) * (scale or 1.2 / last**0.5)

    D, C, side = TINY.width, TINY.code_dim, TINY.image_size // TINY.patch
    state = {}
    for tower, layers, channels, patch in (("encoder", TINY.layers, 3, TINY.patch), ("decoder", 2, C, 1)):
        state[f"{tower}.cls_token"], state[f"{tower}.pos_embed"] = of(1, 1, D, scale=0.5), of(1, side * side + 1, D, scale=0.5)
        state[f"{tower}.patch_embed.proj.weight"], state[f"{tower}.patch_embed.proj.bias"] = of(D, channels, patch, patch), of(D, scale=0.3)
        for i in range(layers):
            stem = f"{tower}.blocks.{i}."
            for norm in ("norm1", "norm2"):
                state[f"{stem}{norm}.weight"], state[f"{stem}{norm}.bias"] = of(D, around=1.0, scale=0.3), of(D, scale=0.3)
            state[f"{stem}attn.qkv.weight"] = of(3 * D, D)
            state[f"{stem}attn.q_bias"], state[f"{stem}attn.v_bias"] = of(D, scale=0.3), of(D, scale=0.3)
            for name, wide, narrow in (("attn.proj", D, D), ("mlp.fc1", 4 * D, D), ("mlp.fc2", D, 4 * D)):
                state[f"{stem}{name}.weight"], state[f"{stem}{name}.bias"] = of(wide, narrow), of(wide, scale=0.3)
        state[f"{tower}.fc_norm.weight"], state[f"{tower}.fc_norm.bias"] = of(D, around=1.0, scale=0.3), of(D, scale=0.3)
    for name, out in (("encode_task_layer", C), ("decode_task_layer", 24)):
        state[f"{name}.0.weight"], state[f"{name}.0.bias"] = of(D, D), of(D, scale=0.3)
        state[f"{name}.2.weight"], state[f"{name}.2.bias"] = of(out, D), of(out, scale=0.3)
    codes = torch.nn.functional.normalize(of(codes, C), dim=1)
    state |= {"quantize.embedding.weight": codes, "quantize.embedding.embed_avg": codes, "quantize.cluster_size": torch.rand(len(codes))}
    state |= {"quantize.embedding.cluster_size": torch.zeros(len(codes)), "quantize.embedding.initted": torch.ones(1)}
    state |= {"teacher_model.visual.conv1.weight": of(4, 3, 2, 2), "scaling_layer.shift": of(1, 3, 1, 1)}
    return state


class Plain:
    """The published tokenizer, one picture and one head at a time, in float64.

    Args:
        state: By the published names.
        heads: Of a block.
    """

    def __init__(self, state, heads=TINY.heads):
        self.state, self.heads = {name: x.double() for name, x in state.items() if x.is_floating_point()}, heads

    def linear(self, name, x):
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, name, x):
        away = x - x.mean(-1, keepdim=True)
        return away / (away.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def tower(self, tower, picture, patch):
        """(channels, H, W) to the patches (P, D)."""
        weight = self.state[f"{tower}.patch_embed.proj.weight"].flatten(1)
        size = picture.shape[1] // patch
        cut = [picture[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch].flatten() for i in range(size) for j in range(size)]
        x = torch.stack([weight @ piece + self.state[f"{tower}.patch_embed.proj.bias"] for piece in cut])
        x = torch.cat([self.state[f"{tower}.cls_token"][0], x]) + self.state[f"{tower}.pos_embed"][0]
        layers = len({name.split(".")[2] for name in self.state if name.startswith(f"{tower}.blocks.")})
        for i in range(layers):
            stem = f"{tower}.blocks.{i}."
            x = x + self.attend(stem, self.norm(f"{stem}norm1", x))
            inner = self.linear(f"{stem}mlp.fc1", self.norm(f"{stem}norm2", x))
            x = x + self.linear(f"{stem}mlp.fc2", 0.5 * inner * (1 + torch.erf(inner / 2**0.5)))
        return self.norm(f"{tower}.fc_norm", x[1:])

    def attend(self, stem, x):
        D = x.shape[1]
        query, key, value = (x @ part.T for part in self.state[f"{stem}attn.qkv.weight"].chunk(3))
        query, value = query + self.state[f"{stem}attn.q_bias"], value + self.state[f"{stem}attn.v_bias"]
        read = []
        for h in range(self.heads):
            part = slice(h * D // self.heads, (h + 1) * D // self.heads)
            weights = (query[:, part] @ key[:, part].T / (D // self.heads) ** 0.5).softmax(1)
            read.append(weights @ value[:, part])
        return self.linear(f"{stem}attn.proj", torch.cat(read, 1))

    def points(self, picture):
        x = self.tower("encoder", picture.double(), TINY.patch)
        x = self.linear("encode_task_layer.2", torch.tanh(self.linear("encode_task_layer.0", x)))
        return x / x.norm(dim=1, keepdim=True)

    def ids(self, points):
        codes = self.state["quantize.embedding.weight"]
        return torch.stack([(point - codes).square().sum(1).argmin() for point in points])

    def told(self, codes):
        side = math.isqrt(len(codes))
        x = self.tower("decoder", codes.T.reshape(-1, side, side), 1)
        return self.linear("decode_task_layer.2", torch.tanh(self.linear("decode_task_layer.0", x)))


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    place = tmp_path_factory.mktemp("converted")
    torch.save({"model": published()}, place / "vqkd.pth")
    return convert(place / "vqkd.pth", place / "model")


class TestConversion:
    def test_ids_are_those_of_the_published_formulas(self, converted, rows):
        model, plain = load(converted.folder), Plain(published())
        image = pictures(model, rows[:12])
        with torch.no_grad():
            points = model._pointed(model._states(image))
        expected = [plain.points(picture) for picture in image.values]
        torch.testing.assert_close(points.double(), torch.stack(expected), **CLOSE)
        ids = torch.stack([plain.ids(each) for each in expected])
        assert torch.equal(model.ids(image), ids)
        assert np.array_equal(model.tell(rows[:12]), ids.numpy())
        assert np.array_equal(model.tell(rows[3]), ids[3].numpy())
        assert len(ids.unique()) >= 10
        rebuilt = model._rebuilt(model.codebook.codes[ids])
        told = torch.stack([plain.told(plain.state["quantize.embedding.weight"][each]) for each in ids])
        torch.testing.assert_close(rebuilt.double(), told, **CLOSE)

    def test_what_became_of_it(self, converted):
        assert (converted.model, converted.program) == ("visual_tokenizer", "beit2")
        about = json.loads((converted.folder / "model.json").read_text())
        assert about["spec"] == {
            "name": "visual_tokenizer", "size": "tiny", "image_size": 32, "patch": 8, "codes": 40, "decoder_layers": 2, "taught": 24,
        }  # fmt: skip
        assert about["trained"]
        assert converted.drawn == []
        assert converted.dropped == {
            "quantize.embedding.cluster_size": "of k-means, which nothing reads after it",
            "quantize.embedding.embed_avg": "of k-means, which nothing reads after it",
            "quantize.embedding.initted": "whether the codes were made of patches, which they were",
            "scaling_layer.shift": "the teacher's colours",
            "teacher_model.visual.conv1.weight": "the teacher, which nothing but training needs",
        }
        assert load(converted.folder).codebook._begun

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda s: s.pop("encoder.blocks.1.norm2.bias"), "the file is not whole"),
            (lambda s: s.pop("decoder.cls_token"), r"has nothing for decoder\.cls_token of the model visual_tokenizer"),
            (lambda s: s.update({"encoder.rel_pos": torch.ones(3)}), r"has encoder\.rel_pos, which the model visual_tokenizer does not"),
            (lambda s: s["quantize.embedding.weight"].mul_(2), "has rows of length 2 to 2, and codes are of length 1"),
            (lambda s: s.update({"encoder.patch_embed.proj.weight": torch.ones(48, 3, 8, 8)}), "and visual_tokenizer has no such size"),
            (lambda s: s.update({"encoder.pos_embed": torch.ones(1, 7, 64)}), "6 positions of patches make no square"),
        ],
    )
    def test_weights_that_do_not_fit(self, tmp_path, change, says):
        state = published()
        change(state)
        torch.save(state, tmp_path / "vqkd.pth")
        with pytest.raises(ZooError, match=says):
            convert(tmp_path / "vqkd.pth", tmp_path / "model")
        assert not (tmp_path / "model").exists()


def tokenizer(seed=0, **settings):
    torch.manual_seed(seed)
    model = build("visual_tokenizer", **{"teacher": TEACHER, "codes": 12, **settings})
    return heat(model)


class TestObjective:
    def test_is_the_published_loss(self, rows):
        model, objective = tokenizer(), make("objective", "vq_kd", commitment=0.7)
        objective.bind(model)
        image = pictures(model, rows[:6])
        loss = objective(model, Batch({"image": image}))
        loss.total.backward()

        points = model._pointed(model._states(image)).detach().requires_grad_()
        distances = (points[:, :, None] - model.codebook.codes).square().sum(3)
        ids = distances.argmin(2)
        codes = model.codebook.codes[ids].clone().requires_grad_()
        told = model._rebuilt(codes)
        mean, std = torch.tensor(0.5), torch.tensor(0.5)
        seen = model.vision(ModalityInputs((image.values * std + mean - 0.5) / 0.5)).tokens
        cosine = (told * seen).sum(2) / told.norm(dim=2) / seen.norm(dim=2)
        features, commitment = (1 - cosine).mean(), (codes.detach() - points).square().mean()
        torch.testing.assert_close(loss.total, features + 0.7 * commitment)
        torch.testing.assert_close(loss.parts["loss_features"], features.detach())
        torch.testing.assert_close(loss.parts["loss_commitment"], commitment.detach())
        counts = torch.bincount(ids.flatten(), minlength=12).double()
        assert loss.parts["used"] == pytest.approx((counts > 0).double().mean())
        shares = counts[counts > 0] / counts.sum()
        assert loss.parts["perplexity"] == pytest.approx(float((-shares * shares.log()).sum().exp()) / 12, rel=1e-5)

        straight = torch.autograd.grad(features, codes)[0] + torch.autograd.grad(0.7 * commitment, points)[0]
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        again = model._pointed(model._states(image))
        wanted = torch.autograd.grad(again, list(model.encoder.parameters()), straight, allow_unused=True)
        for (name, _), gradient in zip(model.encoder.named_parameters(), wanted, strict=True):
            torch.testing.assert_close(found[f"encoder.{name}"], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
        assert not any(p.grad is not None for p in model.vision.parameters())
        assert not any(name.startswith("vision") for name, p in model.named_parameters() if p.requires_grad)

    def test_codes_move_behind_the_step_and_not_before(self, rows):
        model, objective = tokenizer(), make("objective", "vq_kd", decay=0.5)
        before = model.codebook.codes.clone()
        batch = Batch({"image": pictures(model, rows)})
        loss = objective(model.train(), batch)
        assert torch.equal(model.codebook.codes, before)
        objective.after_step(model, loss.state)  # k-means
        begun = model.codebook.codes.clone()
        assert not torch.equal(begun, before)
        loss = objective(model, batch)
        points, ids = (x.clone() for x in loss.state)
        objective.after_step(model, loss.state)
        for k in range(12):
            mean = points[ids == k].sum(0)
            moved = 0.5 * begun[k] + 0.5 * mean / mean.norm() if bool((ids == k).any()) else begun[k]
            torch.testing.assert_close(model.codebook.codes[k], moved / moved.norm())

    def test_rows_without_pictures_do_not_count(self, rows):
        model, objective = tokenizer(), make("objective", "vq_kd")
        some = Batch(stack([model.processor(row if i % 2 else {"text": "a"}) for i, row in enumerate(rows[:6])]))
        full = Batch(stack([model.processor(row) for row in rows[1:6:2]]))
        torch.testing.assert_close(objective(model, some).total, objective(model, full).total)
        for nobody in (Batch({}), some._replace(inputs={"image": some.inputs["image"]._replace(present=torch.zeros(6, dtype=torch.bool))})):
            loss = objective(model, nobody)
            loss.total.backward()
            assert loss.total == 0
            assert {*loss.parts} == {"loss_features", "loss_commitment", "used", "perplexity"}
            before = model.codebook.codes.clone()
            objective.after_step(model, loss.state)
            assert torch.equal(model.codebook.codes, before)
            assert not model.codebook.begun

    def test_refusals(self, rows):
        with pytest.raises(ZooError, match="vq_kd trains a codebook of visual tokens, and this model has none"):
            make("objective", "vq_kd").bind(build("clip"))
        with pytest.raises(ZooError, match=r"vq_kd\.commitment: -1 pushes points away"):
            make("objective", "vq_kd", commitment=-1)
        model = tokenizer(teacher=None)
        with pytest.raises(ZooError, match=r"it learns from the features of a frozen tower, and has none: write model\.teacher"):
            make("objective", "vq_kd")(model, Batch({"image": pictures(model, rows[:2])}))
        model = tokenizer(teacher={**TEACHER, "image_size": 48})
        with pytest.raises(ZooError, match=r"model\.teacher: it sees 36 tokens of a picture, and here are 16 patches"):
            make("objective", "vq_kd")(model, Batch({"image": pictures(model, rows[:2])}))
        model = tokenizer()
        model.trim()
        with pytest.raises(ZooError, match="its decoder was left out"):
            make("objective", "vq_kd")(model, Batch({"image": pictures(model, rows[:2])}))


class TestCodebook:
    def test_by_hand(self):
        book = Codebook(3, 2).double()
        book.load_state_dict({"codes": torch.tensor([[1.0, 0], [0, 1], [-1, 0]]), "taken": torch.ones(3), "begun": torch.tensor(True)})
        points = torch.tensor([[0.6, 0.8], [0.8, 0.6], [0.96, -0.28]], dtype=torch.float64)
        ids = book(points)
        assert ids.tolist() == [1, 0, 0]
        book.follow(points, ids, 0.75)
        mean = torch.tensor([1.76, 0.32], dtype=torch.float64)
        first = 0.75 * torch.tensor([1.0, 0]) + 0.25 * mean / mean.norm()
        second = 0.75 * torch.tensor([0.0, 1]) + 0.25 * points[0]
        expected = torch.stack([first / first.norm(), second / second.norm(), torch.tensor([-1.0, 0]).double()])
        torch.testing.assert_close(book.codes, expected, **EXACT)
        torch.testing.assert_close(book.taken, torch.tensor([1.25, 1.0, 0.75]).double(), **EXACT)

    def test_begins_as_k_means(self):
        draw = torch.Generator().manual_seed(0)
        centres = torch.nn.functional.normalize(torch.eye(4, 6) + 0.1, dim=1)
        noisy = centres.repeat(50, 1) + 0.05 * torch.randn(200, 6, generator=draw)
        points = torch.nn.functional.normalize(noisy, dim=1)
        torch.manual_seed(0)
        book = Codebook(4, 6)
        book.follow(points, book(points), 0.99)
        assert bool(book.begun)
        nearest = (book.codes @ centres.T).max(1)
        assert sorted(nearest.indices.tolist()) == [0, 1, 2, 3]
        assert bool((nearest.values > 0.995).all())
        assert book.taken.tolist() == [50.0] * 4
        for k in range(4):  # a round more changes nothing
            mean = points[book(points) == k].mean(0)
            torch.testing.assert_close(book.codes[k], mean / mean.norm())

    def test_fewer_points_than_codes(self):
        book = Codebook(8, 3)
        points = torch.nn.functional.normalize(torch.randn(3, 3), dim=1)
        book.follow(points, book(points), 0.9)
        torch.testing.assert_close(book.codes.norm(dim=1), torch.ones(8))  # those of which nobody is the nearest among them
        assert (book.taken > 0).sum() == 3

    def test_many_points_at_once(self, monkeypatch):
        book, points = Codebook(5, 4), torch.randn(70, 4)
        expected = (points[:, None] - book.codes).square().sum(2).argmin(1)
        monkeypatch.setattr("zoo.models._codebook._AT_ONCE", 16)
        assert torch.equal(book(points), expected)
        assert book(points.view(7, 10, 4)).shape == (7, 10)


def followed(rank, world):
    """Two steps of the points of one process of several."""
    torch.manual_seed(0)
    book = Codebook(5, 4)
    points = torch.nn.functional.normalize(torch.randn(2, 40, 4, generator=torch.Generator().manual_seed(1)), dim=2)
    for step in points:
        own = step[rank::world] if rank else step[::world][:20]
        book.follow(own, book(own), 0.8)
    return book.state_dict()


def process(rank, place, queue):
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
    queue.put((rank, {name: x.tolist() for name, x in followed(rank, 2).items()}))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_all_processes_hold_the_same_codes(tmp_path):
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(process, (str(tmp_path / "meet"), queue), nprocs=2)
    found = dict(queue.get() for _ in range(2))
    assert found[0] == found[1]
    assert sum(found[0]["taken"]) == pytest.approx(40, rel=1e-5)


class TestModel:
    def test_outputs(self, rows):
        model = tokenizer()
        model.trained = True
        vectors = model.encode(rows[:4], normalize=False)
        with torch.no_grad():
            expected = model.eval()._states(pictures(model, rows[:4])).mean(1)
        np.testing.assert_allclose(vectors, expected.numpy(), rtol=1e-4, atol=1e-5)
        out = model(Batch(stack([model.processor(row) for row in [rows[0], {"text": "a"}, rows[1]]])))
        assert out.present["image"].tolist() == [True, False, True]
        assert not out.embeddings["image"][1].any()
        assert np.array_equal(out.labels["image"][[0, 2]].numpy(), model.tell(rows[:2]))
        assert model(Batch({}, ids=torch.arange(3))).embeddings["image"].shape == (3, 64)
        assert (model.similarity(vectors, vectors).shape, model.similarity_pairwise(vectors, vectors).shape) == ((4, 4), (4,))

    def test_untrained_it_says_so(self, rows):
        with pytest.warns(UserWarning, match="nothing was trained in this model"):
            tokenizer().tell(rows[0])

    def test_rows_that_show_nothing(self, rows):
        model = tokenizer()
        model.trained = True
        with pytest.raises(ZooError, match="this model sees nothing of row 1"):
            model.tell([rows[0], {"text": "a"}])

    @pytest.mark.parametrize(
        ("settings", "says"),
        [
            ({"image_size": 30}, "image_size 30 is no multiple of the patch, 8: write 24"),
            ({"taught": 7}, "taught 7, and the teacher's features are 24 wide: leave it out"),
            ({"fusion": "concat"}, "acts at the joint 'combine', which model 'visual_tokenizer' does not have"),
        ],
    )
    def test_settings(self, settings, says):
        with pytest.raises(ZooError, match=says):
            build("visual_tokenizer", **{"teacher": TEACHER, **settings})

    def test_the_published_size(self):
        with torch.device("meta"):
            model = build("visual_tokenizer", size="base", taught=512)
        assert model.grid == (14, 14)
        assert model.codebook.codes.shape == (8192, 32)
        assert sum(p.numel() for p in model.encoder.parameters()) == 85_798_656 - 12 * 768  # a ViT-B/16 without biases of keys
        assert (len(model.encoder.blocks), len(model.decoder.blocks)) == (12, 3)
        assert model.from_codes[2].out_features == 512

    def test_gradients_of_checkpoints(self, rows):
        model, objective = tokenizer(), make("objective", "vq_kd")
        batch, found = Batch({"image": pictures(model, rows[:3])}), []
        for again in (False, True):
            if again:
                model.checkpoint_gradients()
            model.zero_grad()
            objective(model.train(), batch).total.backward()
            found.append(model.encoder.blocks[0].mlp.fc1.weight.grad.clone())
        torch.testing.assert_close(*found)


class TestRuns:
    @pytest.fixture
    def recipe(self, tmp_path, own_registry):
        @register("data", "shapes")
        def made(root) -> CaptionedData:
            """Of this test."""
            return shapes()

        def of(out, *overrides, **sections):
            return load_recipe(
                {
                    "model": {"name": "visual_tokenizer", "teacher": TEACHER, "codes": 12},
                    "data": "shapes",
                    "objective": "vq_kd",
                    "optimizer": {"lr": 2e-3},
                    "run": {"steps": 40, "batch_size": 15, "log_every": 1, "device": "cpu", "save_every": 1000},
                    "out": str(tmp_path / out),
                    **sections,
                },
                *overrides,
            )

        return of

    def test_it_learns_to_tell_what_the_teacher_sees(self, recipe, rows, tmp_path):
        save(heat(build("clip", vision=TEACHER, dim=8)), tmp_path / "clip")  # one that was just drawn sees the same everywhere
        stage = {"init_from": [{"folder": str(tmp_path / "clip"), "parts": ["vision"]}]}
        slowly = {"objective": {"name": "vq_kd", "decay": 0.9}, "optimizer": {"lr": 5e-4}}
        model = train(recipe("run", "run.steps=60", **stage, **slowly))
        log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
        losses = [line["loss_features"] for line in log if "loss_features" in line]
        assert np.mean(losses[-5:]) < 0.25 * np.mean(losses[:3])
        again = load(tmp_path / "run")
        assert np.array_equal(again.tell(rows), model.tell(rows))
        assert len(np.unique(model.tell(rows))) >= 6

    def test_a_run_that_stops_goes_on(self, recipe, monkeypatch, tmp_path):
        whole = train(recipe("whole", "run.steps=4")).state_dict()
        from zoo.objectives.vq_kd import VqKd

        after, calls = VqKd.after_step, []

        def dies(self, *given):
            calls.append(1)
            if len(calls) == 3:
                raise KeyError
            after(self, *given)

        monkeypatch.setattr(VqKd, "after_step", dies)
        with pytest.raises(KeyError):
            train(recipe("parts", "run.steps=4", "run.save_every=1"))
        monkeypatch.setattr(VqKd, "after_step", after)
        parts = train(recipe("parts", "run.steps=4", "run.save_every=1")).state_dict()
        assert all(torch.equal(whole[name], parts[name]) for name in whole)

    def test_a_teacher_of_another_run(self, recipe, tmp_path):
        clip = build("clip", vision=TEACHER, dim=8)
        save(clip, tmp_path / "clip")
        stage = {"init_from": [{"folder": str(tmp_path / "clip"), "parts": ["vision"]}]}
        train(recipe("run", "run.steps=2", **stage))
        taught, given = load_file(tmp_path / "run" / "model.safetensors"), clip.state_dict()
        names = [name for name in given if name.startswith("vision.")]
        assert names
        assert all(torch.equal(taught[name], given[name]) for name in names)

    def test_a_run_that_would_measure_it_is_refused_before_its_teacher_is_trained(self, recipe, tmp_path):
        with pytest.raises(
            ZooError, match=r"model: visual_tokenizer gives no vectors of text, so .*: zoo train is the command that trains"
        ):
            run(recipe("run", retrieve={"k": [1], "main": {"direction": "text_to_image", "k": 1}}))
        assert not (tmp_path / "run").exists()

    def test_validate(self, recipe):
        report = validate(recipe("run"), rows=8)
        assert report.faults == []
        vision = next(part for part in report.parts if part.name == "vision")
        assert (vision.trained, vision.parameters > 1000) == (0, True)


SIZED = {"vlmo": vlmo.SIZES, "beit_3": beit_3.SIZES, "visual_tokenizer": SIZES}
HIDING = [name for name in recipes() if (load_recipe(name).objective or {}).get("tokenizer")]


def grid(model):
    """Patches at one side, by the settings of a recipe's model."""
    of = SIZED[model["name"]][model["size"]]
    return model.get("image_size", of.image_size) // model.get("patch", of.patch)


def test_some_recipes_hide_patches():
    assert {"beit_3/pretrain", "beit_3/pretrain_giant", "vlmo/stage_image"} <= set(HIDING)


@pytest.mark.parametrize("name", HIDING)
def test_a_recipe_names_a_tokenizer_of_its_own_patches_and_codes(name):
    """What `mdm` would refuse once the tokenizer has been trained for days."""
    recipe = load_recipe(name)
    tokenizer = load_recipe(recipe.objective["tokenizer"].removeprefix("runs/")).model
    assert grid(recipe.model) == grid(tokenizer)
    assert recipe.model["codes"] == tokenizer.get("codes", SIZES[tokenizer["size"]].codes)
