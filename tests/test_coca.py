"""CoCa against open_clip: vectors, captions, losses and gradients, with its shifted mask of [CLS] and with the right one."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.coca_model import CoCa
from open_clip.loss import CoCaLoss
from open_clip.transformer import AttentionalPooler
from PIL import Image
from torch import nn

from tests.hot_weights import far, heat, looks
from zoo import ZooError, build, make
from zoo.abilities import Captioning
from zoo.collate import RowCollate
from zoo.fusions.cross_attention import CrossAttention
from zoo.fusions.joint import Joint
from zoo.hub import load, save
from zoo.models._coca_keys import from_open_clip, to_open_clip
from zoo.models._pictures import CaptionProcessor, PictureTextProcessor
from zoo.models._towers import Pictures, clip_pictures
from zoo.models.coca import Coca, Decoder, Pooled
from zoo.recipe import load_recipe
from zoo.trunk import Shape
from zoo.types import Batch, ModalityInputs, Tokens
from zoo.vocabulary import make_vocabulary

ROOT = Path(__file__).parents[1]
WORDS, LENGTH, QUERIES = 120, 12, 9
EXACT = 1e-6  # of the largest number in a tensor: roundings of float32
GRADIENTS = {torch.float32: 1e-4, torch.float64: 1e-11}  # likewise; the smallest are sums of numbers a hundred times as large
SIZES = {"vit_b_32": 253_560_065, "vit_l_14": 638_450_177}  # as open_clip counts them, its logit_scale among them
PAPER = {"base": (86e6, 297e6), "large": (303e6, 484e6)}  # table 1 of the paper: encoder, decoder
ITC, LM = {"name": "itc", "start": float(np.exp(-1))}, {"name": "lm", "smoothing": 0.0}  # open_clip's scale is e to the power of 1 here
RED = Image.new("RGB", (20, 30), "red")


def ours(legacy=True, width=64):
    vision = Pooled(clip_pictures(Pictures(32, 8, width, 2, width // 16), "gelu", final_norm=False), "open_clip", 32, QUERIES, 4)
    shape = Shape(32, 4, eps=1e-5, memory_norm=True, cross_ffn=True)
    text = Decoder(shape, 4, 2, CrossAttention(4, 2), words=WORDS, length=LENGTH, legacy_cls_mask=legacy)
    words = make_vocabulary("small")
    processor = PictureTextProcessor(vision.processor, CaptionProcessor(words, LENGTH))
    return Coca(vision, text, words, Joint(["image", "text"], 32, 0), processor, 32).eval()


def theirs(width=64):
    vision = {"layers": 2, "width": width, "head_width": 16, "patch_size": 8, "image_size": 32}
    vision |= {"attentional_pool": True, "attn_pooler_queries": QUERIES, "attn_pooler_heads": 4, "output_tokens": True}
    text = {"context_length": LENGTH, "vocab_size": WORDS, "width": 32, "heads": 4, "layers": 2}
    return CoCa(32, text, text | {"embed_cls": True, "output_tokens": True}, vision)


def batch(dtype=torch.float32):
    """Four pictures, and texts of 12, 7, 5 and 3 ids; padding is 0."""
    generator = torch.Generator().manual_seed(1)
    lengths, places = torch.tensor([LENGTH, 7, 5, 3]), torch.arange(LENGTH)
    ids = torch.randint(1, WORDS, (4, LENGTH), generator=generator).masked_fill(places >= lengths[:, None], 0)
    pixels = torch.randn(4, 3, 32, 32, generator=generator) + 2 * torch.randn(4, 3, 1, 1, generator=generator)  # a colour each
    return Batch({"image": ModalityInputs(pixels.to(dtype)), "text": ModalityInputs(ids, places < lengths[:, None])})


def both(legacy=True, width=64):
    """Our model with the weights of theirs, and theirs."""
    other = heat(theirs(width), matrices=3.0)  # so that the queries of the pooler see different things
    other.text.correct_cls_mask = not legacy
    model = ours(legacy, width)
    model.load_state_dict(from_open_clip(other.state_dict()).state)
    return model, other


def objective(model):
    made = make("objective", {"name": "together", "of": [ITC, LM], "weights": [1.0, 2.0]})
    made.bind(model)
    return made


def losses(other, dtype=torch.float32):
    """Theirs: contrast and twice the caption."""
    given = batch(dtype).inputs
    return CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)(**other(given["image"].values, given["text"].values))


masks = pytest.mark.parametrize("legacy", [True, False], ids=["legacy mask", "right mask"])


class TestParity:
    @masks
    @pytest.mark.parametrize("width", [64, 32])  # of pictures; where it is that of texts, the pooler's matrices are one
    def test_outputs_and_losses(self, legacy, width):
        model, other = both(legacy, width)
        given = batch()
        out = model(given)
        pixels, ids = given.inputs["image"].values, given.inputs["text"].values
        reference = other(pixels, ids)
        vectors = {"image": other.encode_image(pixels, normalize=False), "text": other.encode_text(ids, normalize=False)}
        for name, vector in vectors.items():
            assert looks(vector)
            assert far(out.embeddings[name], vector) < EXACT
        logits, labels = model.caption(given.inputs["text"], out)
        assert looks(reference["logits"].flatten(0, 1))
        assert far(logits, reference["logits"]) < EXACT
        torch.testing.assert_close(labels, reference["labels"].masked_fill(reference["labels"] == 0, -100))
        contrast, caption = (float(x.detach()) for x in losses(other))
        loss = objective(model)(model, given)
        assert loss.parts["loss_itc"].item() == pytest.approx(contrast, rel=EXACT)
        assert 2 * loss.parts["loss_lm"].item() == pytest.approx(caption, rel=EXACT)
        assert float(loss.total.detach()) == pytest.approx(contrast + caption, rel=EXACT)

    @masks
    @pytest.mark.parametrize("dtype", GRADIENTS, ids=str)
    def test_gradients(self, legacy, dtype):
        model, other = (module.to(dtype) for module in both(legacy))
        sum(losses(other, dtype)).backward()
        objective(model).to(dtype)(model, batch(dtype)).total.backward()
        wanted = from_open_clip({name: p.grad for name, p in other.named_parameters()}).state
        got = {name: p.grad for name, p in model.named_parameters()}
        assert wanted.keys() == got.keys()
        for name, reference in wanted.items():
            assert bool(reference.any()), name
            assert far(got[name], reference) < GRADIENTS[dtype], name

    def test_the_two_masks_differ_in_the_vectors_of_texts_alone(self):
        given, found = batch(), []
        for legacy in (True, False):
            model, _ = both(legacy)
            with torch.no_grad():
                out = model(given)
                found.append((out.embeddings, model.caption(given.inputs["text"], out)[0]))
        (old, old_logits), (new, new_logits) = found
        torch.testing.assert_close(old["image"], new["image"], rtol=0, atol=0)
        apart = (old["text"] - new["text"]).abs().amax(1) / new["text"].abs().max()
        assert bool((apart[1:] > 1000 * EXACT).all())
        assert apart[0] < 10 * EXACT  # a text of full length has no padding to see, and [CLS] sees itself
        real = given.inputs["text"].mask[:, 1:]
        torch.testing.assert_close(old_logits[real], new_logits[real], rtol=0, atol=1e-4)

    @pytest.mark.parametrize("fault", ["norms", "memory norm", "query", "positives", "shift"])
    def test_a_fault_is_seen(self, fault):
        model, other = both()
        state, given = model.state_dict(), batch()
        swaps = {"norms": ("blocks.2.norm1", "blocks.2.norm2"), "memory norm": ("blocks.3.cross.norm", "blocks.3.cross.memory_norm")}
        if fault in swaps:
            one, two = (f"text.trunk.{name}.weight" for name in swaps[fault])
            state[one], state[two] = state[two].clone(), state[one].clone()
        elif fault == "query":  # the vector would be the last one's
            state["vision.pooler.query"] = state["vision.pooler.query"].roll(-1, 0)
        model.load_state_dict(state)
        if fault == "positives":
            given.inputs["text"] = given.inputs["text"].rows(torch.tensor([1, 2, 3, 0]))
        contrast, caption = (float(x.detach()) for x in losses(other))
        loss = objective(model)(model, given)
        if fault == "shift":
            logits, labels = model.caption(given.inputs["text"], model(given))
            shifted = 2 * float(nn.functional.cross_entropy(logits[:, 1:].flatten(0, 1), labels[:, :-1].flatten()).detach())
            assert abs(shifted - caption) > 1000 * EXACT
            return
        assert abs(float(loss.total.detach()) - contrast - caption) > 1000 * EXACT

    @pytest.mark.parametrize("width", [64, 32])
    def test_weights_there_and_back(self, width):
        state = heat(theirs(width)).state_dict()
        mapped = from_open_clip(state)
        assert mapped.dropped == {"logit_scale": "the temperature, which the objective has"}
        assert mapped.absent == []
        assert mapped.state.keys() == ours(width=width).state_dict().keys()
        again = to_open_clip(mapped.state)
        assert again.keys() == state.keys() - {"logit_scale"}
        assert all(torch.equal(again[name], state[name]) for name in again)


class TestText:
    @masks
    def test_padding_does_not_matter(self, legacy):
        model, _ = both(legacy)
        text = batch().inputs["text"]
        with torch.no_grad():
            whole = model.read(text)
            for length in (7, 9):
                short = model.read(ModalityInputs(text.values[1:, :length], text.mask[1:, :length]))
                torch.testing.assert_close(short.pooled, whole.pooled[1:], rtol=0, atol=1e-5)
                assert short.tokens.shape == (3, length, 32)
                real = text.mask[1:, :length]
                torch.testing.assert_close(short.tokens[real], whole.tokens[1:, :length][real], rtol=0, atol=1e-5)

    def test_words_one_by_one_are_as_all_at_once(self):
        model, _ = both()
        assert isinstance(model, Captioning)
        given = batch()
        with torch.no_grad():
            out = model(given)
            logits, _ = model.caption(given.inputs["text"], out)
            ids, seen = given.inputs["text"].values[:1].expand(2, -1), out.tokens["image"]
            seen = Tokens(seen.tokens[[0, 1]], seen.mask[[0, 1]], None, seen.present[[0, 1]])
            swapped = model.text.write(out.tokens["text"].tokens[[0, 0], :-1], seen)
            found, cache = model.next_words(ids[:, :3], seen, None)
            torch.testing.assert_close(found, swapped[:, 2], rtol=0, atol=1e-4)
            cache = cache.rows(torch.tensor([1, 0]))  # the second picture's row is now the first
            for place in range(3, LENGTH - 1):
                found, cache = model.next_words(ids[:, place : place + 1], seen, cache)
                torch.testing.assert_close(found, swapped[[1, 0], place], rtol=0, atol=1e-4)
        torch.testing.assert_close(swapped[0], logits[0], rtol=0, atol=1e-5)
        assert float((swapped[0] - swapped[1]).abs().max()) > 0.1  # the picture is looked at

    def test_a_text_that_is_too_long(self):
        model, _ = both()
        with torch.no_grad():
            seen = model.look(batch().inputs["image"])
            _, cache = model.next_words(torch.ones(4, 12, dtype=torch.int64), seen, None)
        with pytest.raises(ZooError, match="coca: a text of 13 ids is too long: its longest is 12, as 'length' says"):
            model.next_words(torch.ones(4, 1, dtype=torch.int64), seen, cache)

    def test_a_word_does_not_see_later_ones(self):
        model, _ = both()
        given = batch()
        text = given.inputs["text"]
        with torch.no_grad():
            before, _ = model.caption(text, model(given))
            changed = ModalityInputs(text.values.clone(), text.mask)
            changed.values[0, 6] = 1 + changed.values[0, 6] % (WORDS - 1)
            given.inputs["text"] = changed
            after, _ = model.caption(changed, model(given))
        torch.testing.assert_close(after[0, :6], before[0, :6], rtol=0, atol=0)
        assert float((after[0, 6] - before[0, 6]).abs().max()) > 0.1


class TestPooling:
    def test_cascade(self):
        """The query of the embedding reads what the queries of the captions read, and nothing of the picture directly."""
        torch.manual_seed(0)
        encoder = clip_pictures(Pictures(32, 8, 64, 1, 4), "gelu", final_norm=True)
        pooled = heat(Pooled(encoder, "paper", 32, 5, 4))
        x = ModalityInputs(torch.randn(2, 3, 32, 32))
        with torch.no_grad():
            found, patches = pooled(x), encoder(x).tokens
            tokens = by_hand(pooled.pooler, patches)
            torch.testing.assert_close(found.tokens, tokens, rtol=0, atol=1e-5)
            torch.testing.assert_close(found.pooled, pooled.norm(by_hand(pooled.contrastive, tokens)[:, 0]), rtol=0, atol=1e-5)
        assert found.tokens.shape == (2, 5, 32)

    def test_one_pooler(self):
        encoder = clip_pictures(Pictures(32, 8, 64, 1, 4), "gelu", final_norm=False)
        pooled = heat(Pooled(encoder, "open_clip", 32, 5, 4))
        x = ModalityInputs(torch.randn(2, 3, 32, 32))
        with torch.no_grad():
            found, all_five = pooled(x), pooled.norm(by_hand(pooled.pooler, encoder(x).tokens))
        torch.testing.assert_close(found.pooled, all_five[:, 0], rtol=0, atol=1e-5)
        torch.testing.assert_close(found.tokens, all_five[:, 1:], rtol=0, atol=1e-5)


def by_hand(pooler: AttentionalPooler, x):
    """Attention of its queries over x (B, N, D), from the matrices."""
    attention = pooler.attn
    D, heads = attention.embed_dim, attention.num_heads
    separate = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
    matrices = separate if attention.in_proj_weight is None else attention.in_proj_weight.chunk(3)
    read = pooler.ln_k(x)
    query, key, value = (
        (given @ m.T + b).unflatten(-1, (heads, D // heads)).transpose(-3, -2)
        for given, m, b in zip((pooler.ln_q(pooler.query), read, read), matrices, attention.in_proj_bias.chunk(3), strict=True)
    )
    weights = (query @ key.transpose(-2, -1) / (D // heads) ** 0.5).softmax(-1)
    return attention.out_proj((weights @ value).transpose(-3, -2).flatten(-2))


ROWS = [{"image": RED, "text": "a red square"}, {"image": RED}, {"text": "only words"}]


class TestModel:
    def test_absent_sides(self):
        model = build("coca").eval()
        given = RowCollate(model.processor)(ROWS)
        with torch.no_grad():
            out = model(given)
            logits, labels = model.caption(given.inputs["text"], out)
        assert {name: x.tolist() for name, x in out.present.items()} == {"image": [True, True, False], "text": [True, False, True]}
        assert not out.embeddings["image"][2].any()
        assert not out.embeddings["text"][1].any()
        assert (labels != -100).any(1).tolist() == [True, False, False]
        assert bool(logits.isfinite().all())

    def test_one_pass_serves_both_losses(self, monkeypatch):
        model, calls = build("coca"), []
        for name in ("vision", "text"):
            part = getattr(model, name)
            monkeypatch.setattr(part, "forward", lambda x, part=part, name=name: calls.append(name) or type(part).forward(part, x))
        loss = objective(model)(model, RowCollate(model.processor)(ROWS[:1] * 2))
        loss.total.backward()
        assert calls == ["vision", "text"]
        assert [name for name, p in model.named_parameters() if p.grad is None] == []

    def test_save_and_load(self, tmp_path):
        model = build("coca", vision={"name": "image_transformer", "arch": "tiny"}, dim=8, queries=3)
        model.trained = True
        again = load(save(model, tmp_path))
        np.testing.assert_array_equal(again.encode(["a red square"]), model.encode(["a red square"]))
        np.testing.assert_array_equal(again.encode([{"image": RED}]), model.encode([{"image": RED}]))

    def test_recomputing_changes_no_gradient(self):
        found = []
        for recomputes in (False, True):
            model, _ = both()
            model.train()
            if recomputes:
                model.checkpoint_gradients()
            objective(model)(model, batch()).total.backward()
            found.append([p.grad for p in model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))

    def test_the_border_of_the_halves(self):
        model = build("coca", fusion={"name": "cross_attention", "from_layer": 1})
        assert [block.cross is not None for block in model.text.trunk.blocks] == [False, True, True, True]
        assert [block.cross is not None for block in build("coca").text.trunk.blocks] == [False, False, True, True]

    @pytest.mark.parametrize(
        "settings, says",
        [
            ({"vocab_size": 100}, r"coca: vocab_size 100 is too small: the vocabulary 'small' has 5\d{3} ids; write that, or more"),
            ({"image_size": 60}, r"coca: image_size 60 is no multiple of 16, the side of a patch"),
            (
                {"fusion": {"name": "cross_attention", "from_layer": 0}},
                r"coca: its lower blocks read the text alone and its upper ones the picture too, by cross-attention; the fusion at the "
                r"joint trunk lets blocks \[0, 1, 2, 3\] of 4 read: write fusion: cross_attention, with a from_layer of 1 or more",
            ),
        ],
    )
    def test_refusals(self, settings, says):
        with pytest.raises(ZooError, match=says):
            build("coca", **settings)


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("size", SIZES)
def test_sizes_of_open_clip(size):
    with torch.device("meta"):
        model = build("coca", size=size)
    assert (model.vocabulary.name, model.processor.text.length) == ("clip", 76)
    assert count(model) + 1 == SIZES[size]


@pytest.mark.parametrize("size", [pytest.param(size, marks=[pytest.mark.slow] * (size == "large")) for size in PAPER])
def test_sizes_of_the_paper(size):
    """Encoder and decoder are as the paper counts them; poolers and projections come on top, which its table does not name."""
    with torch.device("meta"):
        model = build("coca", size=size, vocabulary="small")  # in a table as large as the paper's all the same
    encoder, decoder = PAPER[size]
    assert count(model.vision.encoder) == pytest.approx(encoder, rel=0.01)
    assert count(model.text) == pytest.approx(decoder, rel=0.01)
    assert count(model) - count(model.vision.encoder) - count(model.text) < 0.017 * count(model)


@pytest.mark.slow
def test_size_of_the_largest():
    """The paper says 1B + 1.1B = 2.1B. The encoder is that; the decoder is 0.1B more with two tables of 64,000 words, as base and large
    must have to be as large as the paper says, and 1.14B with one."""
    with torch.device("meta"):
        model = build("coca", size="huge", vocabulary="small")
    table = 64000 * 1408
    assert count(model.text.words) == count(model.text.head) == table
    assert count(model.vision.encoder) == pytest.approx(1.01e9, rel=0.01)
    assert count(model.text) - table == pytest.approx(1.14e9, rel=0.01)
    assert count(model.vision.encoder) + count(model.text) - table == pytest.approx(2.15e9, rel=0.01)


@pytest.mark.parametrize("size", ["base", "large", "huge"])
def test_recipes_of_the_paper(size):
    """The note beside the batch says how many processes make it that of the paper."""
    recipe = load_recipe(f"coca/{size}")
    optimizer, run = recipe.optimizer, recipe.run
    assert (recipe.model["size"], recipe.model["vocab_size"]) == (size, 64000)
    assert recipe.objective["weights"] == [1, 2]
    assert (optimizer.lr, optimizer.weight_decay, optimizer.warmup, optimizer.decay, run.steps) == (8e-4, 0.01, 0.02, "linear", 500_000)
    text = (ROOT / f"recipes/coca/{size}.yaml").read_text(encoding="utf-8")
    assert run.batch_size * int(re.search(r"# x (\d+) processes = 65536 pairs", text)[1]) == 65536
