"""ALBEF equals timm's ViT and transformers' layers of BERT put together, and LAVIS' ALBEF, in outputs and in gradients."""

from functools import partial

import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BlipTextConfig
from transformers.models.bert.modeling_bert import BertEmbeddings, BertOnlyMLMHead
from transformers.models.blip.modeling_blip_text import BlipTextLayer

from tests.bert_models import (
    LOOKS,
    PATCH,
    PIXELS,
    SIZE,
    WORDS,
    albef,
    batch_of,
    closest,
    gradients_as_theirs,
    loaded,
    rows,
    some_texts,
)
from tests.golden_files import digest, golden
from tools.named_weights import numbers, weight
from zoo.abilities import Captioning, Matching, Unmasking
from zoo.collate import stack
from zoo.errors import ZooError
from zoo.models._bert_keys import to_theirs
from zoo.models._pictures import CaptionProcessor
from zoo.registry import build

FIRST = 2  # of the blocks that read the picture
MASK = 4
NORM = {"layer_norm_eps": 1e-12, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Theirs(nn.Module):
    """ALBEF of timm's and transformers' parts, with the names of its authors' files."""

    def __init__(self):
        super().__init__()
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.visual_encoder = VisionTransformer(PIXELS, PATCH, num_classes=0, embed_dim=LOOKS, depth=3, num_heads=4, norm_layer=norm)
        sizes = {"vocab_size": len(WORDS), "hidden_size": SIZE.width, "intermediate_size": SIZE.hidden}
        bert = BertConfig(**sizes, max_position_embeddings=SIZE.places, **NORM)
        inner = nn.Module()
        inner.embeddings, inner.encoder = BertEmbeddings(bert), nn.Module()
        made = []
        for number in range(SIZE.layers):
            config = BlipTextConfig(
                **sizes, encoder_hidden_size=LOOKS, num_attention_heads=SIZE.heads, is_decoder=number >= FIRST, **NORM
            )  # fmt: skip
            config._attn_implementation = "eager"
            made.append(BlipTextLayer(config, number))
        inner.encoder.layer = nn.ModuleList(made)
        self.text_encoder = nn.Module()
        self.text_encoder.bert, self.text_encoder.cls = inner, BertOnlyMLMHead(bert)
        self.text_encoder.cls.predictions.decoder.weight = inner.embeddings.word_embeddings.weight
        self.text_encoder.cls.predictions.decoder.bias = self.text_encoder.cls.predictions.bias
        self.vision_proj, self.text_proj = nn.Linear(LOOKS, SIZE.dim), nn.Linear(SIZE.width, SIZE.dim)
        self.itm_head = nn.Linear(SIZE.width, 2)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(torch.from_numpy(weight(name, parameter.shape)))
        self.eval()

    def look(self, image):
        return self.visual_encoder.forward_features(image)

    def through(self, x, mask, layers, seen=None):
        added = torch.where(mask[:, None, None], 0.0, -1e30)
        for layer in self.text_encoder.bert.encoder.layer[layers]:
            x = layer(x, attention_mask=added, encoder_hidden_states=seen)
        return x

    def read(self, ids, mask):
        return self.through(self.text_encoder.bert.embeddings(ids), mask, slice(0, FIRST))

    def fuse(self, held, mask, seen):
        return self.through(held, mask, slice(FIRST, None), seen)

    def unmask(self, ids, mask, seen):
        x = self.fuse(self.read(ids, mask), mask, seen)
        return self.text_encoder.cls(x)


@pytest.fixture
def both():
    """Theirs, ours, our table, pictures (3, 3, 32, 32), texts of three lengths, their mask."""
    ids, mask = some_texts([9, 4, 12], len(WORDS))
    theirs, ours = Theirs(), albef()
    table, missing, mapped = loaded(ours, theirs.state_dict())
    assert not missing
    assert set(mapped.dropped.values()) <= {"the numbers 0, 1, 2, ..."}
    return theirs, ours, table, torch.randn(3, 3, PIXELS, PIXELS), ids, mask


def same_gradients(ours, table, theirs, count, relative=2e-5):
    found = gradients_as_theirs(ours, table)
    compared = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert len(compared) > count
    largest = max(float(gradient.abs().max()) for gradient in compared.values())
    for name, gradient in compared.items():  # that of a bias of keys is 0 but for rounding
        closest(found[name], gradient, relative, least=1e-2 * largest)


def backward(found, wanted):
    along = torch.from_numpy(numbers("along", found.shape)).float()
    (found * along).sum().backward()
    (wanted * along).sum().backward()


def test_pictures_texts_and_both_are_those_of_the_parts(both):
    theirs, ours, _, image, ids, mask = both
    batch = batch_of(image, ids, mask)
    out = ours(batch)
    seen, read = theirs.look(image), theirs.read(ids, mask)
    closest(out.tokens["image"].tokens, seen, 1e-6)
    closest(out.tokens["text"].tokens[mask], read[mask], 1e-6)
    closest(out.embeddings["image"], theirs.vision_proj(seen[:, 0]), 1e-6)
    closest(out.embeddings["text"], theirs.text_proj(read[:, 0]), 1e-6)
    held = ours.hold(batch.inputs["text"], out.tokens["text"])
    closest(ours.match(held, out.tokens["image"]), theirs.itm_head(theirs.fuse(read, mask, seen)[:, 0]), 2e-6)


def test_the_gradients_of_vectors_are_those_of_the_parts(both):
    theirs, ours, table, image, ids, mask = both
    out = ours(batch_of(image, ids, mask))
    found = F.normalize(out.embeddings["image"], dim=-1) @ F.normalize(out.embeddings["text"], dim=-1).T
    vectors = theirs.vision_proj(theirs.look(image)[:, 0]), theirs.text_proj(theirs.read(ids, mask)[:, 0])
    wanted = F.normalize(vectors[0], dim=-1) @ F.normalize(vectors[1], dim=-1).T
    closest(found, wanted, 1e-6)
    backward(found, wanted)
    same_gradients(ours, table, theirs, 70)


def test_the_gradients_of_matching_are_those_of_the_parts(both):
    theirs, ours, table, image, ids, mask = both
    batch = batch_of(image, ids, mask)
    found = ours.match(ours.hold(batch.inputs["text"], ours.read(batch.inputs["text"])), ours.look(batch.inputs["image"]))
    wanted = theirs.itm_head(theirs.fuse(theirs.read(ids, mask), mask, theirs.look(image))[:, 0])
    backward(found, wanted)
    same_gradients(ours, table, theirs, 120)


def test_masked_words_and_their_gradients_are_those_of_the_parts(both):
    theirs, ours, table, image, ids, mask = both
    ids = ids.masked_fill(torch.rand(ids.shape).lt(0.3) & (ids > 4), MASK)
    assert (ids == MASK).any()
    batch = batch_of(image, ids, mask)
    found = ours.unmask(batch.inputs["text"], ours.look(batch.inputs["image"]))
    wanted = theirs.unmask(ids, mask, theirs.look(image))
    closest(found[mask], wanted[mask], 2e-6)
    backward(found * mask[..., None], wanted * mask[..., None])
    same_gradients(ours, table, theirs, 120)


@pytest.mark.parametrize(
    "name", ["trunk.blocks.2.cross.norm.weight", "trunk.blocks.3.norm1.bias", "trunk.blocks.1.norm2.bias", "vision.model.norm.weight"]
)
def test_a_wrong_norm_would_be_seen(both, name):
    """A control: one number of one norm off by a tenth is far outside the tolerance."""
    theirs, ours, _, image, ids, mask = both
    with torch.no_grad():
        ours.get_parameter(name)[3] += 0.1
        batch = batch_of(image, ids, mask)
        found = ours.match(ours.hold(batch.inputs["text"], ours.read(batch.inputs["text"])), ours.look(batch.inputs["image"]))
        wanted = theirs.itm_head(theirs.fuse(theirs.read(ids, mask), mask, theirs.look(image))[:, 0])
    assert (found - wanted).abs().max() > 1e-4


def test_text_and_then_both_is_the_whole_from_ids(both):
    """The two halves one after the other are one pass from the ids, which is how masked words are read."""
    _, ours, _, image, ids, mask = both
    batch = batch_of(image, ids, mask)
    text = batch.inputs["text"]
    with torch.no_grad():
        seen, read = ours.look(batch.inputs["image"]), ours.read(text)
        x = ours.trunk(read.tokens, read.mask, memory=seen.tokens, memory_mask=seen.mask, layers=slice(FIRST, None))
        assert torch.equal(ours.head(x, ours.embed.words), ours.unmask(text, seen))


def from_lavis(case):
    told = golden("albef_lavis", case)
    ours = albef(told.told["vocabulary"])
    state = told.state
    table, missing, mapped = loaded(ours, state)
    assert all(name == "embed.kinds.weight" or (case == "retrieval" and name.startswith("head.")) for name in missing)
    assert "unknown" not in mapped.dropped.values()
    given = told.inputs
    return told, state, ours, table, batch_of(given["image"], given["input_ids"], given["attention_mask"])


@pytest.mark.parametrize("case", ["pretrain", "retrieval"])
def test_weights_of_lavis_come_back_as_they_were(case):
    _, state, ours, table, _ = from_lavis(case)
    back = to_theirs(ours.state_dict(), table)
    kinds = {name for name in back if "token_type" in name}
    dropped = {name for name in state if "_m." in name or "queue" in name or name == "temp" or name.endswith("position_ids")}
    assert back.keys() - kinds == state.keys() - dropped
    assert all(torch.equal(value, state[name]) for name, value in back.items() if name not in kinds)


def matched(ours, out, text, told):
    """LAVIS' three lots of pairs: those that belong together, each text with another picture, each picture with another text."""
    held, seen = ours.hold(text, out.tokens["text"]), out.tokens["image"]
    own = torch.arange(len(held.tokens))
    texts, pictures = torch.cat([own, own, told["negative_texts"]]), torch.cat([own, told["negative_images"], own])
    pick = lambda x, which: x._replace(tokens=x.tokens[which], mask=x.mask[which], present=x.present[which])  # noqa: E731
    return ours.match(pick(held, texts), pick(seen, pictures))


def test_pretraining_gives_the_numbers_of_lavis():
    told, _, ours, _, batch = from_lavis("pretrain")
    text = batch.inputs["text"]
    out = ours(batch)
    closest(out.tokens["image"].tokens, told["image_embeds"], 1e-5)
    closest(out.tokens["text"].tokens[text.mask], told["text_embeds"][text.mask], 1e-5)
    closest(matched(ours, out, text, told), told["itm_logits"], 1e-5)
    logits = ours.unmask(text._replace(values=told["mlm_ids"]), out.tokens["image"])
    closest(logits[text.mask], told["mlm_logits"][text.mask], 1e-5)


@pytest.mark.parametrize("part", ["loss_itm", "soft"])
def test_pretraining_gives_the_gradients_of_lavis(part):
    """Of the masked words LAVIS' loss is 0.6 of the cross entropy and 0.4 of the twin's."""
    told, _, ours, table, batch = from_lavis("pretrain")
    text, out = batch.inputs["text"], ours(batch)
    if part == "loss_itm":
        loss = F.cross_entropy(matched(ours, out, text, told), torch.cat([torch.ones(4), torch.zeros(8)]).long())
    else:
        part, labels = "loss_mlm", told["mlm_labels"]
        logits = ours.unmask(text._replace(values=told["mlm_ids"]), out.tokens["image"])[labels != -100]
        soft = told["mlm_logits_m"].softmax(-1)
        loss = 0.6 * F.cross_entropy(logits, labels[labels != -100]) + 0.4 * F.cross_entropy(logits, soft)
    closest(loss, told[part], 1e-5)
    loss.backward()
    wanted, found = told.gradients(part), gradients_as_theirs(ours, table)
    largest = max(norm for norm, _ in wanted.values())
    assert {name for name in wanted if name not in found} == {"temp"}
    for name in wanted.keys() - {"temp"}:
        assert digest(name, found[name]) == pytest.approx(wanted[name], abs=1e-5 * largest), name


def test_retrieval_ranks_as_lavis_does():
    """LAVIS adds the cosine to the logit of a match, ALBEF's authors and we do not."""
    told, _, ours, _, given = from_lavis("retrieval")
    whole = CaptionProcessor(ours.vocabulary, 35)  # LAVIS cuts texts in training alone
    text = stack([{"text": whole(caption)} for caption in told.told["captions"]])["text"]
    assert given.inputs["text"].values[:3].tolist() == text.values[:3, :12].tolist()
    with torch.no_grad():
        out = ours(given._replace(inputs={**given.inputs, "text": text}))
        held, seen = ours.hold(text, out.tokens["text"]), out.tokens["image"]
        cosine = F.normalize(out.embeddings["image"], dim=-1) @ F.normalize(out.embeddings["text"], dim=-1).T
        for i in range(4):
            scores = ours.match(held, seen._replace(tokens=seen.tokens[i].expand_as(seen.tokens)))[:, 1]
            best = told["reranked_i2t"][i] > -100
            assert best.sum() == 2
            closest(scores[best], (told["reranked_i2t"][i] - cosine[i])[best], 1e-5)
    assert not ours.adds_cosine


def test_padding_changes_nothing(both):
    _, ours, _, image, ids, mask = both
    with torch.no_grad():
        one, two = (ours(batch_of(image[1:2], ids[1:2, :N], mask[1:2, :N])) for N in (4, 12))
        closest(two.embeddings["text"], one.embeddings["text"], 1e-6)
        closest(ours.match(two.tokens["text"], two.tokens["image"]), ours.match(one.tokens["text"], one.tokens["image"]), 1e-6)


def test_what_it_can_do():
    made = build("albef")
    assert isinstance(made, Matching)
    assert isinstance(made, Unmasking)
    assert not isinstance(made, Captioning)


def test_rows_that_lack_a_picture_or_a_text():
    made = build("albef").eval()
    red = Image.new("RGB", (40, 40), "red")
    batch = rows(made, {"text": "a red square", "image": red}, {"text": "only words"}, {"image": red})
    out = made(batch)
    assert out.present["image"].tolist() == [True, False, True]
    assert out.present["text"].tolist() == [True, True, False]
    assert not out.embeddings["image"][1].any()
    assert not out.embeddings["text"][2].any()
    logits = made.match(made.hold(batch.inputs["text"], out.tokens["text"]), out.tokens["image"])
    assert logits.isfinite().all()
    assert made.unmask(batch.inputs["text"], out.tokens["image"]).isfinite().all()
    words = made(rows(made, {"text": "only words"}))
    torch.testing.assert_close(words.embeddings["text"][0], out.embeddings["text"][1], rtol=0, atol=1e-5)
    assert not words.present["image"].any()


def test_its_authors_end_no_text():
    ends = build("albef").vocabulary.role("end", "a test")
    for wanted in (True, False):
        ids = build("albef", ends=wanted, length=4).processor({"text": "a cat on the roof"})["text"].values
        assert (ends in ids.tolist()) is wanted
        assert len(ids) == 4


def test_which_blocks_read_the_picture_is_the_fusions_say():
    made = build("albef", fusion={"name": "cross_attention", "from_layer": 1})
    assert [block.cross is not None for block in made.trunk.blocks] == [False, True, True, True]
    assert made.first == 1
    assert build("albef").first == 2


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"vocab_size": 4999}, "albef: vocab_size 4999 is too small: the vocabulary 'small' needs 5000 rows"),
        ({"vocabulary": "clip"}, "albef: the vocabulary 'clip' has no id for 'mask'"),
        ({"fusion": {"name": "cross_attention", "from_layer": 0}}, "albef: with from_layer 0 no block is left to read the text alone"),
    ],
)
def test_what_cannot_be_built_says_so(settings, message):
    with pytest.raises(ZooError, match=message):
        build("albef", **settings)


def test_only_what_blip_adds_has_no_row():
    assert build("albef").embed.words.num_embeddings == 5000
    assert build("albef", vocab_size=5002).embed.words.num_embeddings == 5002
