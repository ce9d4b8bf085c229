"""CLIP against transformers and open_clip: vectors, loss and gradients, on weights that make every sub-layer count."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.loss import ClipLoss
from open_clip.model import CLIP
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from tests.hot_weights import far, heat, looks
from zoo import ZooError, build, make
from zoo.collate import RowCollate
from zoo.fusions.joint import Joint
from zoo.hub import load, save
from zoo.models._clip_keys import from_hf_clip, from_open_clip, to_hf_clip, to_open_clip
from zoo.models._pictures import CaptionProcessor, PictureTextProcessor
from zoo.models._towers import Pictures, Texts, TextTower, clip_pictures
from zoo.models.clip import Clip
from zoo.recipe import load_recipe
from zoo.types import Batch, ModalityInputs
from zoo.vocabulary import make_vocabulary

ROOT = Path(__file__).parents[1]
WORDS, LENGTH, END, DIM = 120, 16, 119, 32
VECTORS, LOSS, GRADIENTS = 1e-6, 1e-6, 1e-5  # of the largest number in a tensor: roundings of float32, added up over blocks in gradients
SIZES = {  # parameters as open_clip counts them, its logit_scale among them
    "vit_b_32": 151_277_313,
    "vit_b_16": 149_620_737,
    "vit_l_14": 427_616_513,
    "vit_l_14_336": 427_944_193,
    "vit_h_14": 986_109_441,
}


def ours(activation="quick_gelu"):
    vision = clip_pictures(Pictures(32, 8, 64, 2, 4, hidden=128), activation, final_norm=True)
    text = TextTower(Texts(64, 2, 4, hidden=128), WORDS, LENGTH, END, activation)
    words = make_vocabulary("small")
    processor = PictureTextProcessor(vision.processor, CaptionProcessor(words, LENGTH))
    return Clip(vision, text, words, Joint(["image", "text"], DIM, 0), processor, DIM).eval()


def open_clip(quick_gelu=True):
    vision = {"layers": 2, "width": 64, "head_width": 16, "mlp_ratio": 2.0, "patch_size": 8, "image_size": 32}
    text = {"context_length": LENGTH, "vocab_size": WORDS, "width": 64, "heads": 4, "layers": 2, "mlp_ratio": 2.0}
    return CLIP(DIM, vision, text, quick_gelu=quick_gelu)


def transformers():
    side = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_act": "quick_gelu"}
    text = {"vocab_size": WORDS, "max_position_embeddings": LENGTH, "bos_token_id": 1, "eos_token_id": END, "pad_token_id": 0}
    return CLIPModel(CLIPConfig(text_config=side | text, vision_config=side | {"image_size": 32, "patch_size": 8}, projection_dim=DIM))


def batch(length=LENGTH):
    """Four pictures, and texts of 16, 9, 4 and 2 ids, the first and the last included; padding is 0."""
    generator = torch.Generator().manual_seed(1)
    ids, lengths = torch.randint(2, END, (4, length), generator=generator), torch.tensor([length, 9, 4, 2])
    places = torch.arange(length)
    ids = torch.where(places == lengths[:, None] - 1, END, ids).masked_fill(places >= lengths[:, None], 0)
    pixels = torch.randn(4, 3, 32, 32, generator=generator)
    return Batch({"image": ModalityInputs(pixels), "text": ModalityInputs(ids, places < lengths[:, None])})


def infonce(model, start=1.0):
    objective = make("objective", {"name": "infonce", "on": ["image", "text"], "log_scale": start})
    objective.bind(model)
    return objective


def theirs_of(program):
    """A model of theirs, our model with its weights, and what theirs makes of the batch: vectors and loss."""
    given, model = batch().inputs, ours()
    pixels, ids = given["image"].values, given["text"].values
    if program == "open_clip":
        other = heat(open_clip())
        model.load_state_dict(from_open_clip(other.state_dict()).state)
        vectors = other.encode_image(pixels), other.encode_text(ids)
        loss = ClipLoss()(*(F.normalize(x, dim=-1) for x in vectors), other.logit_scale.exp())
        return other, model, vectors, loss
    other = heat(transformers())
    model.load_state_dict(from_hf_clip(other.state_dict()).state)
    out = other(input_ids=ids, pixel_values=pixels, attention_mask=given["text"].mask, return_loss=True)
    seen = other.visual_projection(other.vision_model(pixels).pooler_output)
    read = other.text_projection(other.text_model(ids).pooler_output)
    return other, model, (seen, read), out.loss


@pytest.mark.parametrize("program", ["open_clip", "transformers"])
class TestParity:
    def test_vectors_and_loss(self, program):
        _, model, vectors, loss = theirs_of(program)
        out = model(batch())
        for name, reference in zip(("image", "text"), vectors, strict=True):
            assert looks(reference)
            assert far(out.embeddings[name], reference) < VECTORS
        assert infonce(model)(model, batch()).total.detach().item() == pytest.approx(loss.detach().item(), rel=LOSS)

    def test_gradients(self, program):
        other, model, _, loss = theirs_of(program)
        loss.backward()
        objective = infonce(model)
        objective(model, batch()).total.backward()
        read = from_open_clip if program == "open_clip" else from_hf_clip
        wanted = read({name: p.grad for name, p in other.named_parameters()}).state
        got = {name: p.grad for name, p in model.named_parameters()}
        assert wanted.keys() == got.keys()
        for name, reference in wanted.items():
            if "k_proj" not in name:
                assert bool(reference.any()), name
            assert far(got[name], reference) < GRADIENTS, name
        assert objective.log_scale.grad.item() == pytest.approx(other.logit_scale.grad.item(), rel=GRADIENTS)

    @pytest.mark.parametrize("fault", ["activation", "norms", "queries", "end", "positives"])
    def test_a_fault_is_seen(self, program, fault):
        _, model, vectors, loss = theirs_of(program)
        given, state = batch(), model.state_dict()
        if fault == "activation":
            model = ours("gelu")
            model.load_state_dict(state)
        elif fault == "norms":
            one, other = (f"text.model.transformer.resblocks.1.ln_{i}.weight" for i in (1, 2))
            state[one], state[other] = state[other].clone(), state[one].clone()
        elif fault == "queries":
            name = "vision.model.transformer.resblocks.0.attn.in_proj_weight"
            query, key, value = state[name].clone().chunk(3)
            state[name] = torch.cat([key, query, value])
        elif fault == "end":
            model.text._end = 0  # padding, or where there is none the first id
        model.load_state_dict(state)
        if fault == "positives":
            given.inputs["text"] = given.inputs["text"].rows(torch.tensor([1, 2, 3, 0]))
            assert float((infonce(model)(model, given).total - loss).detach().abs()) > 1000 * LOSS
            return
        out = model(given).embeddings
        assert max(far(out[name], reference) for name, reference in zip(("image", "text"), vectors, strict=True)) > 1000 * VECTORS

    def test_weights_there_and_back(self, program):
        other = open_clip() if program == "open_clip" else transformers()
        read, write = (from_open_clip, to_open_clip) if program == "open_clip" else (from_hf_clip, to_hf_clip)
        state = heat(other).state_dict()
        mapped = read(state)
        assert mapped.dropped == {"logit_scale": "the temperature, which the objective has"}
        assert mapped.absent == []
        assert mapped.state.keys() == ours().state_dict().keys()
        again = write(mapped.state)
        assert again.keys() == state.keys() - {"logit_scale"}
        assert all(torch.equal(again[name], state[name]) for name in again)


def test_exact_gelu_is_that_of_open_clip():
    other, model, given = heat(open_clip(quick_gelu=False)), ours("gelu"), batch()
    model.load_state_dict(from_open_clip(other.state_dict()).state)
    assert far(model(given).embeddings["text"], other.encode_text(given.inputs["text"].values)) < VECTORS


def test_names_of_openai_and_of_custom_text_models():
    state = heat(open_clip()).state_dict()
    known = from_open_clip(state).state
    custom = {name if name.startswith("visual.") or name == "logit_scale" else f"text.{name}": x for name, x in state.items()}
    assert all(torch.equal(x, known[name]) for name, x in from_open_clip(custom).state.items())
    assert to_open_clip(known, prefix="text.").keys() == custom.keys() - {"logit_scale"}
    numbers = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(16), "vocab_size": torch.tensor(120)}
    mapped = from_open_clip({**state, **numbers, "visual.odd": torch.zeros(1)})
    assert mapped.dropped.keys() == {"logit_scale", "visual.odd", *numbers}
    assert mapped.dropped["visual.odd"] == "unknown"
    lacking = from_open_clip({name: x for name, x in state.items() if name != "visual.proj"})
    assert lacking.absent == ["image_projection.weight"]


def test_padding_does_not_matter():
    model, given = heat_ours(), batch()
    with torch.no_grad():
        vectors = model(given).embeddings["text"]
        text = given.inputs["text"]
        short = model(Batch({"text": ModalityInputs(text.values[1:, :9], text.mask[1:, :9])})).embeddings["text"]
        noise = text.values.masked_fill(~text.mask, 7)
        noisy = model(Batch({"text": ModalityInputs(noise, text.mask)})).embeddings["text"]
    torch.testing.assert_close(short, vectors[1:], rtol=0, atol=1e-5)
    torch.testing.assert_close(noisy, vectors, rtol=0, atol=1e-5)


def heat_ours():
    model = ours()
    model.load_state_dict(from_open_clip(heat(open_clip()).state_dict()).state)
    return model


RED = Image.new("RGB", (20, 30), "red")
ROWS = [{"image": RED, "text": "a red square"}, {"image": RED}, {"text": "only words"}]


class TestModel:
    def test_absent_sides_are_zeros(self):
        model = build("clip").eval()
        with torch.no_grad():
            out = model(RowCollate(model.processor)(ROWS))
        assert {name: x.tolist() for name, x in out.present.items()} == {"image": [True, True, False], "text": [True, False, True]}
        assert not out.embeddings["image"][2].any()
        assert not out.embeddings["text"][1].any()
        assert out.embeddings["image"][:2].any(1).all()
        for name, rows in (("image", ROWS[:2]), ("text", ROWS[2:])):  # a batch of one side alone
            other = "text" if name == "image" else "image"
            with torch.no_grad():
                alone = model(RowCollate(model.processor)([{name: row[name]} for row in rows]))
            assert alone.embeddings[other].shape == (len(rows), 64)
            assert not alone.present[other].any()

    def test_save_and_load(self, tmp_path):
        model = build("clip", vision={"name": "image_transformer", "arch": "tiny"}, dim=8)
        model.trained = True
        again = load(save(model, tmp_path))
        np.testing.assert_array_equal(again.encode(["a red square"]), model.encode(["a red square"]))
        np.testing.assert_array_equal(again.encode([{"image": RED}]), model.encode([{"image": RED}]))
        assert again.similarity(again.encode(["a", "b"]), again.encode([{"image": RED}])).shape == (2, 1)

    @pytest.mark.parametrize("thing", [np.zeros((9, 9, 3), np.uint8), b""])
    def test_what_is_no_picture(self, thing):
        model = build("clip")
        model.trained = True
        with pytest.raises(ZooError, match=r"row 0: (ndarray is no image: give a PIL image|0 bytes .* no image that can be decoded)"):
            model.encode([{"image": thing}])

    def test_half_of_a_character_is_no_text(self):
        model = build("clip")
        model.trained = True
        with pytest.raises(ZooError, match=r"row 0: text: at place 2 of 'a \\ud83d' stands half of a character"):
            model.encode([{"text": "a \ud83d"}])

    def test_learns_from_wide_embeddings(self):
        std = build("clip").text.model.token_embedding.weight.std()
        assert std.item() == pytest.approx(64**-0.5, rel=0.05)

    def test_recomputing_changes_no_gradient(self):
        found = []
        for recomputes in (False, True):
            model = heat_ours().train()
            if recomputes:
                model.checkpoint_gradients()
            infonce(model)(model, batch()).total.backward()
            found.append([p.grad for p in model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))

    @pytest.mark.parametrize(
        "settings, says",
        [
            ({"vocab_size": 100}, r"clip: vocab_size 100 is too small: the vocabulary 'small' has 5\d{3} ids; write that, or more"),
            ({"image_size": 60}, r"clip: image_size 60 is no multiple of 16, the side of a patch"),
            (
                {"image_size": 64, "vision": "tiny_image"},
                r"clip: image_size is of the model's own picture tower: write it inside vision, as its setting",
            ),
            ({"length": 2}, r"length: 2 ids hold no word of a caption: write 3 or more"),
            ({"fusion": "concat"}, r"fusion 'concat' acts at the joint 'combine', which model 'clip' does not have"),
        ],
    )
    def test_refusals(self, settings, says):
        with pytest.raises(ZooError, match=says):
            build("clip", **settings)

    def test_a_larger_table_and_another_size(self):
        model = build("clip", vocab_size=6000, image_size=96)
        model.trained = True
        assert model.text.model.token_embedding.num_embeddings == 6000
        assert model.vision.model.positional_embedding.shape == (37, 64)
        assert model.encode([{"image": RED}]).shape == (1, 64)


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes(size):
    with torch.device("meta"):
        model = build("clip", size=size)
    assert sum(p.numel() for p in model.parameters()) + 1 == SIZES[size]
    assert model.vocabulary.name == "clip"
    assert model.processor.text.length == 77


@pytest.mark.parametrize("size, lr", [("vit_b_32", 5e-4), ("vit_b_16", 5e-4), ("vit_l_14", 4e-4), ("vit_l_14_336", 2e-5)])
def test_recipes_of_the_paper(size, lr):
    """The note beside the batch says how many processes make it that of the paper."""
    recipe = load_recipe(f"clip/{size}")
    optimizer, run = recipe.optimizer, recipe.run
    assert (recipe.model["size"], recipe.model["vocabulary"]) == (size, "clip")
    assert (optimizer.lr, optimizer.betas, optimizer.eps, optimizer.weight_decay) == (lr, (0.9, 0.98), 1e-6, 0.2)
    assert (optimizer.decay, optimizer.warmup, run.epochs) == ("cosine", *((0, 1) if size == "vit_l_14_336" else (2000, 32)))
    assert [(group.prefix, group.weight_decay) for group in optimizer.groups] == [("objective", 0)]  # the scale does not shrink
    text = (ROOT / f"recipes/clip/{size}.yaml").read_text(encoding="utf-8")
    assert run.batch_size * int(re.search(r"# x (\d+) processes = 32768 pairs", text)[1]) == 32768
