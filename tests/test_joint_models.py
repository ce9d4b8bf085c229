"""VLMo and BEiT-3: who is served by which expert, what is seen of what is hidden, rows that lack a modality, and captions word by word."""

import pytest
import torch
from PIL import Image

from tests.bert_models import closest, rows
from zoo.abilities import Asking, Captioning, Comparing, Filling, Matching, Unmasking
from zoo.errors import ZooError
from zoo.registry import build, make
from zoo.trunk import Cache
from zoo.types import Batch, ModalityInputs

NAMES = ("vlmo", "beit_3")
TEXTS = ("a red heart", "a blue house under a wide grey sky", "sun")


def tiny(name, **settings):
    """In double precision, with every norm, bias and table that begins at one number moved away from it."""
    torch.manual_seed(0)
    model = build(name, layers=3, **settings).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2 or not parameter.any():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def batch_of(model, *which):
    """Rows of a picture, a text, or both, by the letters that say so."""
    draw = torch.Generator().manual_seed(3)
    size = model.processor.image.size
    given = []
    for i, has in enumerate(which):
        row = {}
        if "i" in has:
            pixels = torch.randint(0, 256, (size, size, 3), generator=draw, dtype=torch.uint8).numpy()
            row["image"] = Image.fromarray(pixels)
        if "t" in has:
            row["text"] = TEXTS[i % len(TEXTS)]
        given.append(row)
    batch = rows(model, *given)
    return Batch({k: x._replace(values=x.values.double()) if k == "image" else x for k, x in batch.inputs.items()})


def longer(text, by=3):
    """The same texts, padded further."""
    pads = torch.zeros(len(text.values), by, dtype=torch.int64)
    return ModalityInputs(torch.cat([text.values, pads], 1), torch.cat([text.mask, pads.bool()], 1), text.present)


def hot(model, loss):
    """The experts that have a gradient: {(block, expert)}."""
    model.zero_grad()
    loss.backward()
    names = [n.split(".") for n, p in model.named_parameters() if ".ffn." in n and p.grad is not None and p.grad.any()]
    return {(int(n[2]), n[4]) for n in names}


class TestAbilities:
    def test_of_vlmo(self):
        model = build("vlmo")
        assert all(isinstance(model, ability) for ability in (Matching, Unmasking, Filling, Asking, Comparing))
        assert not isinstance(model, Captioning)
        assert model.outputs == ("image", "text", "pair_image", "pair_text")

    def test_of_beit_3(self):
        model = build("beit_3")
        assert all(isinstance(model, ability) for ability in (Captioning, Unmasking, Filling, Asking, Comparing))
        assert not isinstance(model, Matching)
        assert model.outputs == ("image", "text")


class TestRouting:
    @pytest.mark.parametrize("name, kind", [(name, kind) for name in NAMES for kind in ("image", "text")])
    def test_a_modality_alone_is_served_by_its_own_experts(self, name, kind):
        model = tiny(name, **({"two_scale": False} if name == "vlmo" else {}))
        out = model(batch_of(model, "it", "it"))
        assert hot(model, out.embeddings[kind].square().sum()) == {(i, kind) for i in range(3)}

    def test_the_second_way_of_vlmo_is_through_the_experts_of_pairs(self):
        model = tiny("vlmo")
        out = model(batch_of(model, "it", "it"))
        assert hot(model, out.embeddings["pair_text"].square().sum()) == {(0, "text"), (1, "text"), (2, "vl")}

    def test_a_pair_is_served_by_both_and_above_by_its_own(self):
        model = tiny("vlmo")
        batch = batch_of(model, "it", "it")
        logits = model.match(model.hold(batch.inputs["text"], model.read(batch.inputs["text"])), model.see(batch.inputs["image"]))
        assert hot(model, logits[:, 1].sum()) == {(0, "text"), (0, "image"), (1, "text"), (1, "image"), (2, "vl")}

    def test_beit_3_has_no_experts_of_pairs(self):
        model = tiny("beit_3")
        batch = batch_of(model, "it", "it")
        asked = model.ask(batch.inputs["text"], model.see(batch.inputs["image"]))
        assert hot(model, asked.tokens.square().sum()) == {(0, "image"), (0, "text"), (1, "image"), (1, "text"), (2, "text")}
        assert hot(model, model.ask(batch.inputs["text"], model.see(batch.inputs["image"])).pooled.sum()) == {
            (0, "image"), (0, "text"), (1, "image"), (1, "text"), (2, "image")
        }  # fmt: skip

    @pytest.mark.parametrize("name", NAMES)
    def test_any_fusion_of_one_sequence(self, name):
        for fusion in ("mome", "multiway", "single_stream"):
            model = tiny(name, fusion=fusion)
            out = model(batch_of(model, "it", "it"))
            assert out.embeddings["image"].shape == (2, 64)
        with pytest.raises(ZooError, match="'cross_attention' needs of a model: blocks that read a picture by cross-attention"):
            build(name, fusion="cross_attention")

    def test_two_scales_need_experts_of_pairs(self):
        with pytest.raises(ZooError, match=r"vlmo: with this fusion pairs have no experts of their own .* write two_scale: false"):
            build("vlmo", fusion="single_stream", two_scale=True)


class TestRows:
    @pytest.mark.parametrize("name", NAMES)
    def test_what_is_absent_changes_nothing(self, name):
        model = tiny(name)
        mixed = model(batch_of(model, "it", "t", "i", "it"))
        alone = model(batch_of(model, "it", "t", "i", "it")._replace(inputs={"text": batch_of(model, "it", "t", "i", "it").inputs["text"]}))
        assert mixed.present["image"].tolist() == [True, False, True, True]
        assert mixed.present["text"].tolist() == [True, True, False, True]
        assert not mixed.embeddings["image"][1].any()
        assert not mixed.embeddings["text"][2].any()
        closest(alone.embeddings["text"], mixed.embeddings["text"], 1e-12)
        assert not alone.present["image"].any()
        assert not alone.embeddings["image"].any()

    @pytest.mark.parametrize("name", NAMES)
    def test_padding_changes_nothing(self, name):
        model = tiny(name)
        batch = batch_of(model, "it", "it", "it")
        text = batch.inputs["text"]
        more = longer(text)
        seen = model.see(batch.inputs["image"])
        closest(model.read(more).pooled, model.read(text).pooled, 1e-12)
        closest(model.ask(more, seen).pooled, model.ask(text, seen).pooled, 1e-12)
        closest(model.unmask(more, seen)[:, : text.values.shape[1]][text.mask], model.unmask(text, seen)[text.mask], 1e-12)

    @pytest.mark.parametrize("name", NAMES)
    def test_words_that_are_asked_for_alone(self, name):
        model = tiny(name)
        batch = batch_of(model, "it", "it", "it")
        text, seen = batch.inputs["text"], model.see(batch.inputs["image"])
        chosen = text.mask & (torch.arange(text.values.shape[1]) % 2 == 1)
        closest(model.unmask(text, seen, chosen), model.unmask(text, seen)[chosen], 1e-12)

    def test_the_second_picture_is_told_from_the_first(self):
        model = tiny("vlmo")
        image = batch_of(model, "it", "it").inputs["image"]
        assert not torch.allclose(model.see(image, 0).tokens, model.see(image, 1).tokens)
        text = batch_of(model, "it", "it").inputs["text"]
        both = model.compare(text, [model.see(image, 0), model.see(image, 1)])
        assert both.shape == (2, model.compared_dim) == (2, 128)
        closest(both[:, :64], model.ask(text, model.see(image)).pooled, 1e-12)


class TestDropout:
    def test_words_of_vlmo_drop_out_as_often_as_paths(self):
        """As the authors have it; pictures do not."""
        for given, rate in (({}, 0.0), ({"drop_path": 0.3}, 0.3)):
            model = build("vlmo", layers=2, **given)
            assert (model.embed.dropout.p, model.vision.dropout.p) == (rate, 0)


class TestFilling:
    @pytest.mark.parametrize("name", NAMES)
    def test_hidden_patches_are_not_seen(self, name):
        model = tiny(name, codes=11)
        batch = batch_of(model, "it", "it")
        image, text = batch.inputs["image"], batch.inputs["text"]
        rows_, columns = model.grid
        hidden = torch.zeros(2, rows_ * columns, dtype=torch.bool)
        hidden[:, 5:9] = True
        chosen = text.mask & (torch.arange(text.values.shape[1]) == 1)
        other = image.values.clone().unflatten(2, (rows_, -1)).unflatten(4, (columns, -1))  # (B, 3, rows, p, columns, p)
        for place in range(5, 9):
            other[:, :, place // columns, :, place % columns] += 3
        changed = image._replace(values=other.flatten(4, 5).flatten(2, 3))
        words, codes = model.fill(image, hidden, text, chosen)
        assert words.shape == (2, model.vocabulary.own)
        assert codes.shape == (8, 11)
        for found, wanted in zip(model.fill(changed, hidden, text, chosen), (words, codes), strict=True):
            closest(found, wanted, 1e-12)
        assert not torch.allclose(model.fill(changed, hidden & (torch.arange(16) != 5), text, chosen)[0], words)  # one of them is seen

    @pytest.mark.parametrize("name", NAMES)
    def test_one_modality_alone(self, name):
        model = tiny(name, codes=11)
        batch = batch_of(model, "it", "it")
        text = batch.inputs["text"]
        hidden = torch.zeros(2, 16, dtype=torch.bool)
        hidden[0, 3] = True
        words, codes = model.fill(None, None, text, text.mask)
        assert codes is None
        assert words.shape == (int(text.mask.sum()), model.vocabulary.own)
        words, codes = model.fill(batch.inputs["image"], hidden, None, None)
        assert words is None
        assert codes.shape == (1, 11)

    def test_without_visual_tokens(self):
        model = tiny("beit_3")
        image = batch_of(model, "it").inputs["image"]
        with pytest.raises(ZooError, match=r"this model was built without: write model\.codes, such as 8192"):
            model.fill(image, torch.ones(1, 16, dtype=torch.bool), None, None)


class TestCaptions:
    def test_word_by_word_is_as_at_once(self):
        """What the trunk makes of picture, words and one mask behind them, under the mask of prefix and triangle, computed at once."""
        model = tiny("beit_3")
        batch = batch_of(model, "it", "it")
        seen, ids = model.see(batch.inputs["image"]), torch.randint(5, 90, (2, 6))
        cache = None
        for until in range(1, 7):
            step, cache = model.next_words(ids[:, until - 1 : until], seen, cache)
            asked = torch.cat([ids[:, :until], torch.full((2, 1), model.vocabulary.roles["mask"])], 1)
            x = torch.cat([seen.tokens, model.embed(asked)], 1)
            N = seen.tokens.shape[1]
            whole = model.trunk(x, route=[("image", N), ("text", until + 1)], fused=True, attend=N)
            closest(step, model.head(whole[:, -1]), 1e-12)
        assert isinstance(cache, Cache)
        assert cache.length == N + 6  # no mask stays behind

    def test_several_words_at_once_are_as_one_by_one(self):
        model = tiny("beit_3")
        seen, ids = model.see(batch_of(model, "it", "it").inputs["image"]), torch.randint(5, 90, (2, 6))
        at_once, _ = model.next_words(ids, seen, None)
        _, cache = model.next_words(ids[:, :2], seen, None)
        closest(model.next_words(ids[:, 2:], seen, cache)[0], at_once, 1e-12)

    def test_what_is_hidden_and_asked(self):
        model = tiny("beit_3")
        batch = batch_of(model, "it", "it", "t")
        text = batch.inputs["text"]
        torch.manual_seed(1)
        logits, labels = model.caption(text, model(batch))
        assert logits.shape == (*text.values.shape, model.vocabulary.own)
        assert (labels[:, 0] == -100).all()
        assert (labels[2] == -100).all()  # no picture
        counted = labels[:2] != -100
        assert counted.sum(1).tolist() == [min(int(n * 0.7 + 0.5), n - 1) for n in text.mask.sum(1)[:2].tolist()]
        assert not (counted & ~text.mask[:2]).any()
        assert torch.equal(labels[:2][counted], text.values[:2][counted])

    def test_a_word_knows_nothing_of_those_behind_it(self):
        model = tiny("beit_3")
        batch = batch_of(model, "it", "it")
        text, out = batch.inputs["text"], model(batch)
        other = text.values.clone()
        other[:, 3] = 77
        logits = []
        for ids in (text.values, other):
            torch.manual_seed(1)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("zoo.models.beit_3.hide", lambda ids, chosen, vocabulary: ids)
                logits.append(model.caption(text._replace(values=ids), out)[0])
        closest(logits[0][:, :3], logits[1][:, :3], 1e-12)
        assert not torch.allclose(logits[0][:, 3], logits[1][:, 3])


class TestTraining:
    @pytest.mark.parametrize("name", NAMES)
    def test_a_step_reaches_every_part(self, name):
        model = build(name, layers=3).train()
        batch = rows(
            model, *({"image": Image.new("RGB", (8, 8), c), "text": t} for c, t in zip(("red", "blue", "gold"), TEXTS, strict=True))
        )
        batch = batch._replace(ids=torch.arange(3))
        two = [{"name": "itc", "on": ["image", "text"]}, {"name": "itc", "on": ["pair_image", "pair_text"]}]
        terms = {"vlmo": [*two, "itm", {"name": "mlm", "rate": 1}], "beit_3": ["itc", "lm"]}
        objective = make("objective", {"name": "together", "of": terms[name]})
        objective.bind(model)
        loss = objective(model, batch)
        assert torch.isfinite(loss.total)
        loss.total.backward()
        unused = {n for n, p in model.named_parameters() if p.grad is None}
        pooler = {f"pooler.{name}" for name in ("norm.weight", "norm.bias", "dense.weight", "dense.bias")}
        assert unused == {"vision.mask"} | (pooler if name == "beit_3" else set())


def size_of(name, *without, **settings):
    """Parameters, without those of some children."""
    return sum(count for child, count in counts_of(name, **settings).items() if child not in without)


def counts_of(name, **settings):
    """{child: its parameters}."""
    with torch.device("meta"):
        model = build(name, vocabulary="small", **settings)
    return {child: sum(p.numel() for p in module.parameters()) for child, module in model.named_children() if [*module.parameters()]}


class TestSizes:
    """Beside what the authors' own modules count, or else their papers."""

    def test_vlmo(self):
        own = {"size": "base", "vocab_size": 30522}
        assert size_of("vlmo", **own) == pytest.approx(202.4e6, rel=2e-3)
        assert size_of("vlmo", "head", **own) == pytest.approx(178.4e6, rel=2e-3)

    @pytest.mark.parametrize("size, D, layers, pairs, heads", [("base", 768, 12, 2, 12), ("large", 1024, 24, 3, 16)])
    def test_each_part_of_vlmo(self, size, D, layers, pairs, heads):
        """To the last number; the paper's 562 million of ``large`` is rounded up."""
        words, offsets, expert = 30522, 27 * 27, 2 * D + 8 * D * D + 5 * D
        parts = {
            "vision": 3 * 16 * 16 * D + D + 2 * D,  # the class and the mask token
            "embed": (words + 2) * D + 2 * D,
            "kinds": 3 * D,
            "positions": (offsets + 3 + 2 + 2 * 196) * layers * heads,
            "trunk": layers * (2 * D + 3 * D * D + 2 * D + D * D + D + 2 * D + 2 * expert) + pairs * expert + 2 * D,
            "pooler": D * D + D,
            "matches": 2 * D + 2,
            "head": D * D + D + 2 * D + words * D + words,
            **dict.fromkeys(("image_projection", "text_projection", "pair_image_projection", "pair_text_projection"), D * D),
        }
        assert counts_of("vlmo", size=size, vocab_size=words) == parts

    def test_beit_3(self):
        own = {"size": "base", "vocab_size": 64010}
        heads = ("head", "pooler", "image_projection", "text_projection")
        assert size_of("beit_3", "head", "pooler", **own) == pytest.approx(222.2e6, rel=2e-3)  # to retrieve
        assert size_of("beit_3", *heads[1:], image_size=480, **own) == pytest.approx(270.8e6, rel=2e-3)  # to write captions
        answers = 768 * 1536 + 1536 + 2 * 1536 + 1536 * 3129 + 3129
        asked = size_of("beit_3", "head", *heads[2:], image_size=480, **own) + answers
        assert asked == pytest.approx(228.1e6, rel=2e-3)
        assert size_of("beit_3", *heads, size="giant", vocab_size=64010) == pytest.approx(1.9e9, rel=0.05)

    @pytest.mark.parametrize(
        "size, D, H, layers, patch, experts",
        [("base", 768, 3072, 12, 16, None), ("large", 1024, 4096, 24, 16, None), ("giant", 1408, 6144, 40, 14, 83)],
    )
    def test_each_part_of_beit_3(self, size, D, H, layers, patch, experts):
        """To the last number: all sub-layers twice; of the giant feed-forwards alone, and those of pairs in three blocks."""
        words, attention, feed = 64010, 2 * D + 3 * D * D + 3 * D + 2 * D + D * D + D, 2 * D + D * H + H + 2 * H + H * D + D
        twice = layers * 2 * (attention + feed) + 2 * 2 * D
        parts = {
            "vision": 3 * patch**2 * D + D + 2 * D + (1 + (224 // patch) ** 2) * D,
            "embed": (words + 1022) * D,
            "trunk": twice if experts is None else layers * attention + experts * feed + 2 * D,
            "head": words * D + words,
            "pooler": 2 * D + D * D + D,
            "image_projection": D * D,
            "text_projection": D * D,
        }
        assert counts_of("beit_3", size=size, vocab_size=words) == parts

    def test_names_of_sizes_that_do_not_fit(self):
        with pytest.raises(ZooError, match="image_size 30 is no multiple of the patch, 8: write 24"):
            build("vlmo", image_size=30)
        with pytest.raises(ZooError, match="beit_3: vocab_size 7 is too small"):
            build("beit_3", vocab_size=7)
        with pytest.raises(ZooError, match="beit_3: length 65 needs more than the 64 places of size tiny"):
            build("beit_3", length=65)
