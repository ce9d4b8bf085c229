"""NoteLLM-2 as its paper and released code have it: what each embedding may see, what is trained, and what rows it takes."""

import warnings
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

import zoo
from zoo.collate import PairCollate, RowCollate
from zoo.errors import ZooError
from zoo.hub import load, save
from zoo.registry import make
from zoo.types import Pair

TINY = {
    "backbone": {"name": "tiny_lm", "dim": 32, "layers": 2, "heads": 2, "vocab_size": 300},
    "vision": {"name": "tiny_image", "dim": 16, "heads": 2, "layers": 1, "image_size": 16},
    "connector": {"name": "qformer", "num_queries": 3, "layers": 2, "hidden": 24, "heads": 2, "ffn": 32},
    "dim": 8,
}
VARIANTS = {
    "base": "early",
    "micl": "micl",
    "late": ["early", "gated_late"],
    "notellm2": ["micl", "gated_late"],
    "only_late": ["text_only", "gated_late"],
}
variants = pytest.mark.parametrize("fusion", [*VARIANTS.values(), "text_only"], ids=[*VARIANTS, "text"])
RANDOM = "random weights that nothing was trained or loaded into"
# Rows are computed apart in float32; another batch or padding reorders sums, a few units in the last place a layer.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def picture(colour):
    image = Image.new("RGB", (20, 24), colour)
    image.putpixel((3, 5), (0, 255, 0))
    return image


RED, BLUE = picture("red"), picture("blue")
NOTE = {"title": "red shoes", "topic": ["walk"], "content": "they are soft #run#", "image": RED}
ROWS = [
    NOTE,
    {"title": "a"},
    {"image": BLUE},
    {"content": "b c d e f g", "image": [RED, BLUE]},
    {"topic": "x"},
    {"title": "z", "image": BLUE},
]


def build(fusion=("micl", "gated_late"), *, trained=True, **given):
    model = zoo.build("notellm2", **{**TINY, "fusion": list(fusion) if isinstance(fusion, tuple) else fusion, **given})
    model.trained = trained
    return model.eval()


def build_alike(model, **given):
    """Other settings, the same weights."""
    other = zoo.build(**{**model.spec, **given}).eval()
    other.load_state_dict(model.state_dict())
    other.trained = True
    return other


def batch_of(model, rows):
    return RowCollate(model.processor)(rows)


def pairs_of(model, rows=ROWS):
    numbered = [{**row, "id": i} for i, row in enumerate(rows)]
    half = len(rows) // 2
    return PairCollate(model.processor)([Pair(q, d) for q, d in zip(numbered[:half], numbered[half:], strict=True)])


def gradients(model, batch):
    objective = make("objective", "pair_infonce")
    model.zero_grad(set_to_none=True)
    objective(model, batch).total.backward()
    return {name: p.grad for name, p in [*model.named_parameters(), *objective.named_parameters()]}


class TestVariants:
    @variants
    def test_outputs_and_parts(self, fusion):
        model = build(fusion)
        named = fusion if isinstance(fusion, list) else [fusion]
        assert model.outputs == (("note", "visual") if "micl" in named else ("note",))
        assert (model.combine is not None) == (model.late is not None) == ("gated_late" in named)
        assert (model.connector is None) == ("text_only" in named)
        assert (model.vision is None) == (fusion == "text_only")
        out = model(batch_of(model, ROWS))
        assert out.embeddings.keys() == out.present.keys() == set(model.outputs)
        assert all(x.shape == (len(ROWS), 8) for x in out.embeddings.values())

    @variants
    def test_present_says_who_has_an_embedding(self, fusion):
        model = build(fusion)
        out = model(batch_of(model, ROWS))
        text, image = (torch.tensor([bool(r.keys() & keys) for r in ROWS]) for keys in ({"title", "topic", "content"}, {"image"}))
        assert torch.equal(out.present["note"], text if model.vision is None else text | image)
        if "visual" in model.outputs:
            assert torch.equal(out.present["visual"], image)

    @variants
    def test_nothing_with_a_gradient_is_a_view(self, fusion):
        """FSDP2 hooks what a model returns, and an operation in place on a view would drop the hook."""
        model = build(fusion).train()
        out = model(batch_of(model, ROWS))
        assert [x for x in [*out.embeddings.values(), *(t.tokens for t in out.tokens.values())] if x._base is not None] == []

    def test_without_dim_the_state_itself_is_the_embedding(self):
        model = build("micl", dim=None)
        assert (model.dim, model(batch_of(model, ROWS)).embeddings["note"].shape[1]) == (32, 32)

    def test_only_late_has_no_visual_tokens_and_no_key_for_the_image(self):
        model = build(["text_only", "gated_late"])
        lengths, seen = [], model.backbone.forward
        model.backbone.forward = lambda *inputs: lengths.append(inputs[0].shape[1]) or seen(*inputs)
        batch = batch_of(model, [NOTE])
        out = model(batch)
        assert out.tokens == {}
        assert lengths == [batch.inputs["text"].values.shape[1]]
        assert not batch.inputs["text"].extra["slots"].any()
        texts = []
        model.processor.tokenizer.encode = lambda text: texts.append(text) or [9]
        model.processor(NOTE)
        assert not any("图片" in text for text in texts)
        assert not np.array_equal(*model.encode([NOTE, {**NOTE, "image": BLUE}]))  # it comes in late


class TestWhatAnEmbeddingSees:
    CHANGES = (
        {"title": "blue hats"},
        {"topic": "sea"},
        {"content": "other words, and many more of them " * 3},
        {"title": "", "topic": "", "content": ""},
    )

    @pytest.mark.parametrize("fusion", ["micl", ["micl", "gated_late"]])
    def test_the_visual_word_sees_the_image_alone(self, fusion):
        model = build(fusion)
        rows = [NOTE, *({**NOTE, **change} for change in self.CHANGES)]
        with torch.no_grad():
            outs = [model(batch_of(model, [row])).embeddings for row in rows]
            other = model(batch_of(model, [{**NOTE, "image": BLUE}])).embeddings
        assert all(torch.equal(out["visual"], outs[0]["visual"]) for out in outs)  # bit by bit
        assert not torch.allclose(other["visual"], outs[0]["visual"], **CLOSE)
        for out in [*outs[1:], other]:
            assert not torch.allclose(out["note"], outs[0]["note"], **CLOSE)

    @variants
    def test_neither_padding_nor_neighbours_change_an_embedding(self, fusion):
        model = build(fusion)
        rows = [r for r in ROWS if model.processor.sees(r)]
        for output in model.outputs:
            there = [r for r in rows if output != "visual" or "image" in r]
            alone = np.concatenate([model.encode([r], output=output, normalize=False) for r in there])
            np.testing.assert_allclose(model.encode(there, output=output, normalize=False), alone, **CLOSE)
            np.testing.assert_allclose(model.encode(there[::-1], 2, output=output, normalize=False)[::-1], alone, **CLOSE)

    def test_what_stands_at_padding_has_no_influence(self):
        model = build()
        batch = batch_of(model, ROWS)
        text, image = batch.inputs["text"], batch.inputs["image"]
        junk = text._replace(values=torch.where(text.mask, text.values, 77))
        pixels = image._replace(values=torch.where(image.mask[:, :, None, None, None], image.values, torch.nan))
        again = model(batch._replace(inputs={"text": junk, "image": pixels}))
        for name, x in model(batch).embeddings.items():
            there = again.present[name]
            assert torch.equal(again.embeddings[name][there], x[there])

    def test_zeros_for_what_is_absent_stand_in_the_prompt(self):
        model = build(absent="zeros")
        out = model(batch_of(model, [NOTE, {"title": "a"}, {"image": RED}]))
        assert out.tokens["image"].mask.all()
        assert all(there.all() for there in out.present.values())
        x = model.encode([{"title": "a"}, {"image": RED}, {"image": RED, "title": "", "content": None}])
        np.testing.assert_allclose(x[1], x[2], **CLOSE)
        assert not np.allclose(x[0], build_alike(model, absent="skip").encode([{"title": "a"}])[0], atol=1e-4)

    def test_several_images_are_all_seen(self):
        model = build("early", connector="linear")
        one, two, other = model.encode([{"image": RED}, {"image": [RED, BLUE]}, {"image": [BLUE, RED]}])
        assert not np.allclose(one, two, atol=1e-5)
        assert not np.allclose(two, other, atol=1e-5)  # their order is that of the list
        np.testing.assert_allclose(model.encode([{"image": [RED]}])[0], one, **CLOSE)


class TestLateFusion:
    def test_a_gate_of_zeros_gives_the_mean(self):
        model = build()
        for gate in model.combine.gates:
            torch.nn.init.zeros_(gate.weight)
        plain = build("micl")
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith(("combine", "late"))})
        batch = batch_of(model, [NOTE, {**NOTE, "image": BLUE}])
        out, without, image = model(batch).embeddings, plain(batch).embeddings, model.look(batch)
        for name in model.outputs:
            torch.testing.assert_close(out[name], (without[name] + model.project(model.late(image.pooled))) / 2, **CLOSE)

    def test_swapping_the_operands_is_swapping_the_halves_and_the_sign(self):
        model = build()
        batch, gate = batch_of(model, ROWS), model.combine.gates[0]
        before = model(batch).embeddings
        with torch.no_grad():
            gate.weight.copy_(-torch.cat(gate.weight.chunk(2, dim=1)[::-1], dim=1))
        model.combine.names = ["image", "note"]
        for name, x in model(batch).embeddings.items():
            torch.testing.assert_close(x, before[name], **CLOSE)

    def test_both_embeddings_pass_one_gate_and_one_projection_with_one_vector(self):
        model = build()
        calls = {"combine": [], "project": [], "late": []}
        for name, seen in calls.items():
            model.get_submodule(name).register_forward_hook(lambda _, inputs, out, seen=seen: seen.append(inputs[0]))
        model(batch_of(model, ROWS))
        assert {name: len(seen) for name, seen in calls.items()} == {"combine": 2, "project": 2, "late": 1}
        assert calls["combine"][0]["image"] is calls["combine"][1]["image"]

    def test_who_has_no_image_passes_the_gate_unchanged(self):
        model, plain = build(["text_only", "gated_late"]), build("text_only")
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith(("combine", "late", "vision"))})
        np.testing.assert_allclose(model.encode([{"title": "a"}, NOTE])[:1], plain.encode([{"title": "a"}]), **CLOSE)

    def test_who_has_no_text_gives_the_image_alone(self):
        model = build(["text_only", "gated_late"])
        batch = batch_of(model, [{"image": RED}, NOTE])
        expected = model.project(model.late(model.look(batch).pooled))
        torch.testing.assert_close(model(batch).embeddings["note"][0], expected[0], **CLOSE)


class TestTraining:
    @variants
    def test_everything_but_the_tower_gets_a_gradient(self, fusion):
        model = build(fusion).train()
        got = gradients(model, pairs_of(model))
        lacking = {name for name, g in got.items() if g is None or not bool(g.any())}
        assert lacking == {name for name, _ in model.named_parameters() if name.startswith("vision.")}
        assert all(g is None for name, g in got.items() if name.startswith("vision."))

    def test_the_frozen_tower_stays_in_eval_mode(self):
        model = build().train()
        model.vision.blocks.append(torch.nn.Dropout(0.9))
        batch = batch_of(model, ROWS)
        assert torch.equal(model.look(batch).pooled, model.look(batch).pooled)
        assert not any(m.training for m in model.vision.modules())
        assert model.backbone.training

    def test_the_tower_trains_when_asked(self):
        model = build(train_vision=True).train()
        got = gradients(model, pairs_of(model))
        assert all(g is not None and bool(g.isfinite().all()) for name, g in got.items() if name.startswith("vision."))

    @pytest.mark.parametrize("keys", [("title", "content"), ("image",)], ids=["nobody has an image", "nobody has text"])
    @variants
    def test_batches_without_a_modality(self, fusion, keys):
        model = build(fusion).train()
        rows = [
            {k: NOTE[k] for k in keys} | {"title" if "title" in keys else "image": x}
            for x in (("a", "b") if "title" in keys else (RED, BLUE))
        ]
        batch = pairs_of(model, rows * 2)
        loss = make("objective", "pair_infonce")(model, batch)
        loss.total.backward()
        assert bool(loss.total.isfinite())
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
        out = model(batch)
        assert bool(out.present["note"].all()) == ("title" in keys or model.vision is not None)
        if "visual" in model.outputs:
            assert bool(out.present["visual"].all()) == ("image" in keys)

    def test_checkpointed_gradients_are_equal(self):
        model = build(connector={**TINY["connector"], "dropout": 0.0}).train()
        batch = pairs_of(model)
        plain = gradients(model, batch)
        model.checkpoint_gradients()
        for name, g in gradients(model, batch).items():
            torch.testing.assert_close(g, plain[name], msg=lambda m, name=name: f"{name}: {m}")

    def test_bfloat16_autocast(self):
        model = build()
        batch = batch_of(model, ROWS)
        exact = model(batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(batch)
        for name, x in out.embeddings.items():
            there = out.present[name]
            torch.testing.assert_close(x.float()[there], exact.embeddings[name][there], rtol=0.05, atol=0.05)  # 2^-8 a rounding

    @variants
    def test_a_backbone_in_bfloat16(self, fusion):
        model = build(fusion, backbone={"name": "qwen", "size": "tiny", "dtype": "bfloat16"})
        text = [{"title": "a"}, {"content": "b"}]
        for rows in (text, [NOTE, *text]):
            out = model(batch_of(model, rows)).embeddings["note"]
            assert (out.dtype, bool(out.isfinite().all())) == (torch.float32, True)

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, where it breaks the graph
    def test_compiled(self):
        torch.compiler.reset()
        model = build()
        batch = batch_of(model, ROWS)
        out = torch.compile(model, backend="aot_eager")(batch)
        for name, x in model(batch).embeddings.items():
            torch.testing.assert_close(out.embeddings[name], x, **CLOSE)


class TestEncode:
    @pytest.mark.parametrize("keys", [(k,) for k in NOTE] + [("title", "image"), ("topic", "content"), tuple(NOTE)])
    def test_any_subset_of_keys(self, keys):
        x = build().encode([{k: NOTE[k] for k in keys}])
        assert (x.shape, x.dtype) == ((1, 8), np.float32)
        assert np.linalg.norm(x) == pytest.approx(1)

    def test_deterministic_and_in_order(self):
        model = build().train()
        x = model.encode(ROWS, batch_size=4)
        np.testing.assert_array_equal(model.encode(ROWS, batch_size=4), x)
        np.testing.assert_allclose(model.encode(ROWS[::-1], batch_size=4)[::-1], x, **CLOSE)
        assert model.training

    def test_images_in_any_form(self, tmp_path):
        RED.save(tmp_path / "red.png")
        content = (tmp_path / "red.png").read_bytes()
        x = build().encode(
            [{"image": i} for i in (RED, content, tmp_path / "red.png", str(tmp_path / "red.png"), [Image.open(BytesIO(content))])]
        )
        np.testing.assert_allclose(x, np.repeat(x[:1], 5, 0), **CLOSE)

    def test_outputs_by_name(self):
        model = build()
        np.testing.assert_array_equal(model.encode([NOTE]), model.encode([NOTE], output="note"))
        assert not np.allclose(model.encode([NOTE]), model.encode([NOTE], output="visual"))
        with pytest.raises(ZooError, match=r"no embedding 'text' \(it gives: note, visual\)"):
            model.encode([NOTE], output="text")

    def test_an_output_that_a_row_does_not_have(self):
        with pytest.raises(ZooError, match=r"row 3, 4 has no embedding 'visual': .* leave it out, or encode such rows apart"):
            build(("micl",)).encode([NOTE, NOTE, NOTE, {"title": "a"}, {"title": "b"}], output="visual", batch_size=3)

    def test_lengths_stay_when_asked(self):
        model = build()
        raw = model.encode(ROWS, normalize=False)
        np.testing.assert_allclose(raw / np.linalg.norm(raw, axis=1, keepdims=True), model.encode(ROWS), **CLOSE)

    def test_no_rows(self):
        assert build().encode([]).shape == (0, 8)

    @pytest.mark.parametrize(
        "fusion, rows, says",
        [
            ("micl", [{"title": "a"}, {}], "this model sees nothing of row 1: give it at least one of title, topic, content, image"),
            ("micl", [{"tilte": "a"}, {"image": None}], "nothing of row 0, 1"),
            ("text_only", [{"image": RED}], "nothing of row 0: give it at least one of title, topic, content$"),
            ("micl", ({"title": "a"} for _ in range(2)), r"a list of rows, not a generator: write encode\(\[\{\.\.\.\}\]\)"),
            ("micl", {1: {"title": "a"}}.values(), "a list of rows, not a dict_values"),
            ("micl", [3], "row 0 is a int, not a dictionary"),
            ("micl", [{"title": 3}], "row 0: title 3 is a int, not text"),
            ("micl", [{"title": "a"}, {"image": "nowhere.png"}], "row 1: .*nowhere.png"),
            ("micl", [{"image": b"abc"}], "3 bytes that start with b'abc'"),
        ],
    )
    def test_what_it_refuses(self, fusion, rows, says):
        with pytest.raises(ZooError, match=says):
            build(fusion).encode(rows)

    def test_batches_of_nothing_are_refused(self):
        with pytest.raises(ZooError, match="batch_size 0 holds nothing: write 1 or more"):
            build().encode([NOTE], batch_size=0)

    def test_a_bar_when_asked_and_only_then(self, capfd):
        model = build()
        for show, seen in ((None, False), (False, False), (True, True)):
            model.encode(ROWS, show_progress=show)
            out, err = capfd.readouterr()
            assert (out == "", "encoding" in err) == (True, seen)

    def test_random_weights_warn_once(self):
        model = build(trained=False)
        with pytest.warns(UserWarning, match=RANDOM) as seen:
            model.encode([NOTE])
        assert len(seen) == 1
        assert seen[0].filename == __file__
        model.encode([NOTE])  # a second warning would be an error

    def test_trained_and_loaded_weights_do_not_warn(self, tmp_path):
        model = build(trained=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            x = model.encode(ROWS)
            again = load(save(model, tmp_path)).encode(ROWS)
        np.testing.assert_array_equal(again, x)


class TestBuild:
    def test_visual_tokens_that_contradict_the_connector(self):
        with pytest.raises(ZooError, match=r"num_visual_tokens is 4 and connector\.num_queries 3: write one of them"):
            build(num_visual_tokens=4)

    def test_visual_tokens_of_a_connector_without_queries(self):
        with pytest.raises(ZooError, match="num_queries"):
            build(num_visual_tokens=4, connector="linear")

    def test_a_connector_that_cannot_bridge(self):
        with pytest.raises(ZooError, match="connector 'identity' cannot turn width 16 into 32: use linear"):
            build("early", connector="identity")

    def test_every_fault_at_once(self):
        with pytest.raises(ZooError) as e:
            zoo.build("notellm2", backbone="qwne", dim=0, fusions="early", connector={"name": "qformer", "hiden": 3})
        assert all(word in str(e.value) for word in ("'qwne'", "dim", "'fusions'", "did you mean 'fusion'", "hiden"))

    @pytest.mark.parametrize(
        "fusion, says",
        [(["early", "micl"], "'early' and 'micl' both fill the joint 'arrange'"), (["gated_late", "sum"], "both fill the joint 'combine'")],
    )
    def test_two_of_a_kind(self, fusion, says):
        with pytest.raises(ZooError, match=says):
            build(fusion)


@pytest.mark.parametrize("count", [1, 5])
def test_visual_tokens_by_number(count):
    connector = {k: v for k, v in TINY["connector"].items() if k != "num_queries"}
    model = build(connector=connector, num_visual_tokens=count)
    image = model.look(RowCollate(model.processor)([NOTE]))
    assert image.tokens.tokens.shape[1] == count
    assert model.spec["num_visual_tokens"] == count
