"""BLIP equals transformers' BLIP and LAVIS' on the same weights, in outputs and in gradients, and differs where it is made to."""

import copy

import pytest
import torch
from PIL import Image
from timm.layers import resample_abs_pos_embed
from torch.nn import functional as F
from transformers import BlipConfig, BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipForQuestionAnswering
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

from tests.bert_models import (
    LOOKS,
    PATCH,
    PIXELS,
    SIZE,
    WORDS,
    batch_of,
    blip,
    closest,
    gradients_as_theirs,
    loaded,
    rows,
    some_texts,
)
from tests.golden_files import digest, golden
from tools.named_weights import numbers, weight
from zoo.abilities import Asking, Captioning, Matching, Unmasking
from zoo.answers import rank_answers
from zoo.captions import answer
from zoo.collate import stack
from zoo.errors import ZooError
from zoo.hub import save
from zoo.init_from import take_parts
from zoo.models._bert_keys import SPELLINGS, entries, to_theirs
from zoo.models._pictures import CaptionProcessor
from zoo.registry import build
from zoo.stages import Stage
from zoo.types import ModalityInputs, ModelOutput

WITH_ROLES = len(WORDS) + 2
DEC, ENC = len(WORDS), len(WORDS) + 1
CONFIG = {  # transformers' defaults are not BLIP's: 8 heads of texts, and 1e-5 in the norms of pictures
    "vision_config": {
        "hidden_size": LOOKS, "intermediate_size": 4 * LOOKS, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": PIXELS,
        "patch_size": PATCH, "layer_norm_eps": 1e-6,
    },
    "text_config": {
        "vocab_size": WITH_ROLES, "hidden_size": SIZE.width, "encoder_hidden_size": LOOKS, "intermediate_size": SIZE.hidden,
        "num_hidden_layers": SIZE.layers, "num_attention_heads": SIZE.heads, "max_position_embeddings": SIZE.places,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "layer_norm_eps": 1e-12, "label_smoothing": 0.1,
        "bos_token_id": DEC, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0,
    },
    "image_text_hidden_size": SIZE.dim,
}  # fmt: skip


def theirs_of(kind):
    """One of transformers' models on hot weights."""
    made = kind(BlipConfig(**copy.deepcopy(CONFIG))).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(torch.from_numpy(weight(name, parameter.shape)))
    return made


@pytest.fixture
def pair():
    """Pictures (3, 3, 32, 32), and texts of three lengths with their mask."""
    ids, mask = some_texts([9, 4, 12], len(WORDS))
    return torch.randn(3, 3, PIXELS, PIXELS), ids, mask


def retrieval(pair):
    """Both models on the same weights, and ours without what theirs lacks."""
    theirs, ours = theirs_of(BlipForImageTextRetrieval), blip()
    table, missing, _ = loaded(ours, theirs.state_dict())
    assert missing
    assert all(".decode." in name or name.startswith("head.") for name in missing)
    return theirs, ours, table


def same_gradients(ours, table, theirs, relative):
    found = gradients_as_theirs(ours, table)
    compared = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert len(compared) > 100
    largest = max(float(gradient.abs().max()) for gradient in compared.values())
    for name, gradient in compared.items():  # that of a bias of keys is 0 but for rounding
        closest(found[name], gradient, relative, least=1e-2 * largest)


def test_matching_is_that_of_transformers(pair):
    image, ids, mask = pair
    theirs, ours, table = retrieval(pair)
    marked = ids.clone()
    marked[:, 0] = ENC  # which theirs leaves to whoever calls it
    wanted = theirs(marked, image, attention_mask=mask.long()).itm_score
    batch = batch_of(image, ids, mask)
    seen, read = ours.look(batch.inputs["image"]), ours.read(batch.inputs["text"])
    found = ours.match(ours.hold(batch.inputs["text"], read), seen)
    closest(found, wanted, 1e-6)
    along = torch.from_numpy(numbers("along", wanted.shape)).float()
    (found * along).sum().backward()
    (wanted * along).sum().backward()
    same_gradients(ours, table, theirs, 2e-5)
    unmarked = theirs(ids, image, attention_mask=mask.long()).itm_score
    assert (unmarked - wanted).abs().max() > 1e-2, "the first id does not matter, so this shows nothing"


def test_vectors_are_those_of_transformers(pair):
    image, ids, mask = pair
    theirs, ours, table = retrieval(pair)
    wanted = theirs(ids, image, attention_mask=mask.long(), use_itm_head=False)
    out = ours(batch_of(image, ids, mask))
    closest(out.tokens["image"].tokens, wanted.last_hidden_state, 1e-6)
    closest(out.tokens["text"].tokens[mask], wanted.question_embeds[mask], 1e-6)
    found = F.normalize(out.embeddings["image"], dim=-1) @ F.normalize(out.embeddings["text"], dim=-1).T
    closest(found, wanted.itm_score, 1e-6)
    along = torch.from_numpy(numbers("along", found.shape)).float()
    (found * along).sum().backward()
    (wanted.itm_score * along).sum().backward()
    same_gradients(ours, table, theirs, 2e-5)


def test_captions_are_those_of_transformers(pair):
    image, ids, mask = pair
    theirs, ours = theirs_of(BlipForConditionalGeneration), blip()
    table, missing, _ = loaded(ours, theirs.state_dict())
    assert missing
    assert all(".encode." in name or name.split(".")[0] in ("matches", "image_projection", "text_projection") for name in missing)
    spoken = ids.clone()
    spoken[:, 0] = DEC
    wanted = theirs(image, spoken, attention_mask=mask.long(), labels=spoken.masked_fill(~mask, -100))
    batch = batch_of(image, ids, mask)
    logits, labels = ours.caption(batch.inputs["text"], ours(batch))
    assert labels.tolist() == spoken.masked_fill(~mask, -100)[:, 1:].tolist()
    counted = labels != -100
    closest(logits[counted], wanted.logits[:, :-1][counted], 1e-6)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
    closest(loss, wanted.loss, 1e-6)
    loss.backward()
    wanted.loss.backward()
    same_gradients(ours, table, theirs, 2e-5)


@pytest.mark.parametrize("wrong", ["encode", "decode"])
def test_the_other_self_attention_would_be_seen(pair, wrong):
    """A control: with the self-attention of the other mode in its place a mode gives another thing, and the other mode does not."""
    image, ids, mask = pair
    ours = blip()
    with torch.no_grad():
        for name, p in ours.named_parameters():
            p.copy_(torch.from_numpy(weight(name, p.shape)))
    batch = batch_of(image, ids, mask)

    def both():
        out = ours(batch)
        return {"encode": ours.match(ours.hold(batch.inputs["text"], out.tokens["text"]), out.tokens["image"]),
                "decode": ours.caption(batch.inputs["text"], out)[0]}  # fmt: skip

    with torch.no_grad():
        before = both()
        other = {"encode": "decode", "decode": "encode"}[wrong]
        state = ours.state_dict()
        ours.load_state_dict({n: state[n.replace(f".{wrong}.", f".{other}.")] for n in state})
        after = both()
    assert (after[wrong] - before[wrong]).abs().max() > 1e-2
    torch.testing.assert_close(after[other], before[other])


@pytest.mark.parametrize("kind", [BlipForImageTextRetrieval, BlipForConditionalGeneration])
def test_weights_of_transformers_come_back_as_they_were(kind):
    theirs, ours = theirs_of(kind), blip()
    table, _, mapped = loaded(ours, theirs.state_dict())
    assert set(mapped.dropped.values()) <= {"the numbers 0, 1, 2, ..."}
    back = to_theirs(ours.state_dict(), table)
    again = theirs_of(kind)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    lacking, unexpected = again.load_state_dict(back, strict=False)
    assert not unexpected
    assert all(name.endswith("position_ids") for name in lacking)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("case", ["pretrain", "retrieval", "caption"])
def test_weights_of_lavis_come_back_as_they_were(case):
    told = golden("blip_lavis", case)
    ours = blip(told.told["vocabulary"])
    state = told.state
    table, missing, mapped = loaded(ours, state)
    back = to_theirs(ours.state_dict(), table)
    assert back.keys() == state.keys() - mapped.dropped.keys()
    assert all(torch.equal(value, state[name]) for name, value in back.items())
    assert "unknown" not in mapped.dropped.values()
    assert not missing or case != "pretrain"


def from_lavis(case, **settings):
    told = golden("blip_lavis", case)
    ours = blip(told.told["vocabulary"], **settings)
    table, _, _ = loaded(ours, told.state)
    given = told.inputs
    return told, ours, table, batch_of(given["image"], given["input_ids"], given["attention_mask"])


def matched(ours, out, text, told):
    """LAVIS' three lots of pairs: those that belong together, each text with another picture, each picture with another text."""
    held, seen = ours.hold(text, out.tokens["text"]), out.tokens["image"]
    own = torch.arange(len(held.tokens))
    texts, pictures = (
        torch.cat(each) for each in ([own, own, told["negative_texts"]], [own, told["negative_images"], own])
    )  # fmt: skip
    pick = lambda x, which: x._replace(tokens=x.tokens[which], mask=x.mask[which], present=x.present[which])  # noqa: E731
    return ours.match(pick(held, texts), pick(seen, pictures))


def same_digests(ours, table, wanted, relative):
    found = gradients_as_theirs(ours, table)
    largest = max(norm for norm, _ in wanted.values())
    names = [name for name in wanted if name in found]
    assert len(names) > 130
    for name in names:
        assert digest(name, found[name]) == pytest.approx(wanted[name], abs=relative * max(largest, 1e-6)), name
    assert {name for name in wanted if name not in found} <= {"temp"}


def test_pretraining_gives_the_numbers_of_lavis():
    told, ours, _, batch = from_lavis("pretrain")
    out = ours(batch)
    closest(out.tokens["image"].tokens, told["image_embeds"], 1e-5)
    real = batch.inputs["text"].mask
    closest(out.tokens["text"].tokens[real], told["text_embeds"][real], 1e-5)
    closest(matched(ours, out, batch.inputs["text"], told), told["itm_logits"], 1e-5)
    logits, labels = ours.caption(batch.inputs["text"], out)
    assert labels.tolist() == told["lm_labels"][:, 1:].tolist()
    counted = labels != -100
    closest(logits[counted], told["lm_logits"][:, :-1][counted], 1e-5)


@pytest.mark.parametrize("part", ["loss_itm", "loss_lm"])
def test_pretraining_gives_the_gradients_of_lavis(part):
    told, ours, table, batch = from_lavis("pretrain")
    out = ours(batch)
    if part == "loss_itm":
        truth = torch.cat([torch.ones(4), torch.zeros(8)]).long()
        loss = F.cross_entropy(matched(ours, out, batch.inputs["text"], told), truth)
    else:
        logits, labels = ours.caption(batch.inputs["text"], out)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
    closest(loss, told[part], 1e-5)
    loss.backward()
    same_digests(ours, table, told.gradients(part), 1e-5)


def test_retrieval_ranks_as_lavis_does():
    told, ours, _, given = from_lavis("retrieval")
    whole = CaptionProcessor(ours.vocabulary, 35)  # LAVIS cuts texts in training alone
    text = stack([{"text": whole(caption)} for caption in told.told["captions"]])["text"]
    batch = given._replace(inputs={**given.inputs, "text": text})
    assert given.inputs["text"].values[:3].tolist() == text.values[:3, :12].tolist()
    with torch.no_grad():
        out = ours(batch)
        seen = out.tokens["image"]
        held = ours.hold(text, out.tokens["text"])
        cosine = F.normalize(out.embeddings["image"], dim=-1) @ F.normalize(out.embeddings["text"], dim=-1).T
        for i in range(4):
            alone = seen._replace(tokens=seen.tokens[i].expand_as(seen.tokens))
            scores = ours.match(held, alone)[:, 1] + cosine[i]
            best = told["reranked_i2t"][i] > -100
            assert best.sum() == 2
            closest(scores[best], told["reranked_i2t"][i][best], 1e-5)
    assert ours.adds_cosine


def test_fine_tuning_for_captions_gives_the_numbers_of_lavis():
    """The prompt is put before the words by the model; LAVIS has it in the text."""
    told, ours, table, batch = from_lavis("caption", prompt="a picture of")
    said = len(ours.prompt) - 1
    text = batch.inputs["text"]
    assert text.values[:, : said + 1].tolist() == [[2, *ours.prompt[1:]]] * 4
    plain = torch.cat([torch.full((4, 1), 2), text.values[:, said + 1 :]], 1)
    mask = text.mask[:, said:]
    given = batch.inputs["text"]._replace(values=plain, mask=mask)
    logits, labels = ours.caption(given, ours(batch))
    assert labels.tolist() == told["lm_labels"][:, 1:].tolist()
    counted = labels != -100
    closest(logits[counted], told["lm_logits"][:, :-1][counted], 1e-5)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
    closest(loss, told["loss"], 1e-5)
    loss.backward()
    same_digests(ours, table, told.gradients("loss"), 1e-5)


def test_a_caption_grows_word_by_word_as_it_is_written_at_once(pair):
    image, ids, _ = pair
    theirs, ours = theirs_of(BlipForConditionalGeneration), blip()
    loaded(ours, theirs.state_dict())
    ids, batch = ids[2:].expand(3, -1).clone(), batch_of(image, ids[2:].expand(3, -1), torch.ones(3, 12))
    with torch.no_grad():
        out = ours(batch)
        whole, _ = ours.caption(batch.inputs["text"], out)
        seen, cache = out.tokens["image"], None
        logits, cache = ours.next_words(torch.tensor(ours.prompt).expand(3, -1), seen, cache)
        torch.testing.assert_close(logits, whole[:, 0], rtol=0, atol=2e-6)
        logits, cache = ours.next_words(ids[:, 1:4], seen, cache)
        torch.testing.assert_close(logits, whole[:, 3], rtol=0, atol=2e-6)
        turned = torch.tensor([2, 0, 0])
        logits, _ = ours.next_words(ids[:, 4:5], seen, cache.rows(turned))
        torch.testing.assert_close(logits, whole[turned, 4], rtol=0, atol=2e-6)


def test_answers_to_questions_are_those_of_transformers(pair):
    """There question and answer have a BERT each; here they share all but self-attention, so theirs is given shared weights.

    The questions have one length: transformers 5.18 drops the mask of what cross-attention reads, and an answer there hears padding.
    """
    image = pair[0]
    ids, mask = some_texts([9, 9, 9], len(WORDS))
    config = copy.deepcopy(CONFIG)
    config["vision_config"] |= {"hidden_size": SIZE.width, "intermediate_size": 4 * SIZE.width}
    config["text_config"]["encoder_hidden_size"] = SIZE.width  # one number for pictures and for questions
    theirs = BlipForQuestionAnswering(BlipConfig(**config)).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            own = ".attention." in name or ".cls." in name
            p.copy_(torch.from_numpy(weight(name if own else name.replace("text_decoder.bert.", "text_encoder."), p.shape)))
    ours = blip(looks=SIZE.width)
    spelling = SPELLINGS["blip"]._replace(vision="transformers")
    table, missing, _ = loaded(ours, theirs.state_dict(), entries(spelling, layers=4, cross_layers=range(4), blocks=3))
    assert {name.split(".")[0] for name in missing} == {"image_projection", "text_projection", "matches"}
    marked, answer = ids.clone(), ids[:, :5].clone()
    marked[:, 0], answer[:, 0] = ENC, DEC
    wanted = theirs(marked, image, decoder_input_ids=answer, attention_mask=mask.long(), labels=answer)
    batch = batch_of(image, ids, mask)
    seen = ours.look(batch.inputs["image"])
    asked = ours.ask(batch.inputs["text"], seen)
    out = ours(batch)._replace(tokens={"image": asked})
    logits, labels = ours.caption(ModalityInputs(ids[:, :5]), out)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
    closest(loss, wanted.loss, 1e-6)
    loss.backward()
    wanted.loss.backward()
    found = gradients_as_theirs(ours, table)
    for name in (
        "text_decoder.bert.encoder.layer.1.attention.self.query.weight",
        "text_encoder.encoder.layer.2.attention.output.dense.weight",
    ):
        closest(found[name], theirs.get_parameter(name).grad, 2e-5)
    both = "encoder.layer.1.crossattention.self.query.weight"
    shared = sum(theirs.get_parameter(f"{side}.{both}").grad for side in ("text_encoder", "text_decoder.bert"))
    closest(found[f"text_encoder.{both}"], shared, 2e-5)
    with torch.no_grad():
        first, _ = ours.next_words(answer[:, :1], asked, None)
    closest(first, logits[:, 0], 1e-6)


def test_an_answer_does_not_hear_a_questions_padding(pair):
    image, ids, mask = pair
    ours = blip(looks=SIZE.width)
    with torch.no_grad():
        for name, p in ours.named_parameters():
            p.copy_(torch.from_numpy(weight(name, p.shape)))
        found = []
        for N in (4, 12):
            batch = batch_of(image[1:2], ids[1:2, :N], mask[1:2, :N])
            asked = ours.ask(batch.inputs["text"], ours.look(batch.inputs["image"]))
            found.append(ours.next_words(torch.tensor([ours.prompt]), asked, None)[0])
    closest(found[1], found[0], 1e-6)


def answering(looks):
    """transformers' model of questions and answers, on hot weights, and ours with these.

    One number says there how wide pictures are and how wide what answers read is, the states of questions; where these differ, its decoder
    is made with a number of its own.
    """
    config = copy.deepcopy(CONFIG)
    config["vision_config"] |= {"hidden_size": looks, "intermediate_size": 4 * looks}
    config["text_config"]["encoder_hidden_size"] = looks
    theirs = BlipForQuestionAnswering(BlipConfig(**config))
    if looks != SIZE.width:
        of_decoder = copy.deepcopy(theirs.config.text_config)
        of_decoder.encoder_hidden_size = SIZE.width
        theirs.text_decoder = BlipTextLMHeadModel(of_decoder)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.copy_(torch.from_numpy(weight(name, p.shape)))
    ours = blip(looks=looks, answerer=True)
    table, missing, mapped = loaded(ours, theirs.state_dict())
    assert set(mapped.dropped.values()) <= {"the numbers 0, 1, 2, ..."}
    assert all(".decode." in name or name.split(".")[0] in ("head", "matches", "image_projection", "text_projection") for name in missing)
    return theirs.eval(), ours, table


@pytest.mark.parametrize("looks", [SIZE.width, LOOKS])
def test_a_decoder_of_its_own_answers_as_that_of_transformers(pair, looks):
    """Questions of one length: transformers 5.18 drops the mask of what cross-attention reads, and an answer there hears padding."""
    image = pair[0]
    ids, mask = some_texts([9, 9, 9], len(WORDS))
    theirs, ours, table = answering(looks)
    marked, answer = ids.clone(), ids[:, :5].clone()
    marked[:, 0], answer[:, 0] = ENC, DEC
    wanted = theirs(marked, image, decoder_input_ids=answer, attention_mask=mask.long(), labels=answer)
    batch = batch_of(image, ids, mask)
    asked = ours.ask(batch.inputs["text"], ours.look(batch.inputs["image"]))
    states = theirs.text_encoder(marked, mask.long(), encoder_hidden_states=wanted.last_hidden_state)[0]
    closest(asked.tokens, states, 1e-6)
    logits, labels = ours.answering.caption(ModalityInputs(ids[:, :5]), ModelOutput({}, tokens={"image": asked}))
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
    closest(loss, wanted.loss, 1e-6)
    loss.backward()
    wanted.loss.backward()
    same_gradients(ours, table, theirs, 2e-5)
    with torch.no_grad():
        written = theirs.text_decoder(answer, encoder_hidden_states=states).logits
        closest(logits, written[:, :-1], 1e-6)
        first, cache = ours.answering.next_words(answer[:, :1], asked, None)
        closest(first, written[:, 0], 1e-6)
        fourth, _ = ours.answering.next_words(answer[:, 1:4], asked, cache)
        closest(fourth, written[:, 3], 1e-6)
        if looks == SIZE.width:  # a control: the decoder of captions sees as much, and is another one
            other, _ = ours.next_words(answer[:, :1], asked, None)
            assert (other - first).abs().max() > 1e-2 * first.abs().max()


ANSWERS = [[5], [6, 7], [6, 8, 9], [10, 5], [11], [5, 5, 5, 5], [12, 6], [8], [9, 9]]


@pytest.mark.parametrize("k", [4, 128])
@pytest.mark.parametrize("looks", [SIZE.width, LOOKS])
def test_answers_are_ranked_as_by_transformers(pair, looks, k):
    """As BLIP's program ranks: the k likeliest first words, then the loss of a whole answer, the label smoothing of training in it."""
    image = pair[0]
    ids, mask = some_texts([9, 9, 9], len(WORDS))
    theirs, ours, _ = answering(looks)
    marked, begin = ids.clone(), torch.full((1, 1), DEC)
    marked[:, 0] = ENC
    batch = batch_of(image, ids, mask)
    with torch.no_grad():
        found = rank_answers(
            ours.answering, ours.ask(batch.inputs["text"], ours.look(batch.inputs["image"])), ANSWERS, end=3, k=k, smoothing=0.1
        )
        states = theirs.text_encoder(marked, mask.long(), encoder_hidden_states=theirs.vision_model(image).last_hidden_state)[0]
        for row in range(3):
            seen = states[row : row + 1]
            firsts = theirs.text_decoder(begin, encoder_hidden_states=seen).logits[0, 0]
            kept = torch.stack([firsts[answer[0]] for answer in ANSWERS]).topk(min(k, len(ANSWERS))).indices.tolist()
            losses = {}
            for i in kept:
                given = torch.tensor([[DEC, *ANSWERS[i], 3]])
                logits = theirs.text_decoder(given, encoder_hidden_states=seen).logits[0, :-1]
                losses[i] = float(F.cross_entropy(logits, given[0, 1:], reduction="sum", label_smoothing=0.1))
            order = sorted(losses, key=losses.__getitem__)
            assert found.answers[row].tolist() == order
            assert found.scores[row] == pytest.approx([-losses[i] for i in order], rel=1e-5)
    assert len({tuple(row) for row in found.answers.tolist()}) > 1, "all questions are answered alike, so this shows nothing"


@pytest.mark.parametrize("settings", [{"answerer": True}, {"vision": {"name": "tiny_image", "dim": 64, "heads": 4, "image_size": 16}}])
def test_raw_questions_are_answered(settings):
    """In words, from rows: the same as by hand, whether answers have a decoder of their own or that of captions writes them."""
    torch.manual_seed(0)
    ours = build("blip", layers=2, **settings).eval()
    words = ["red", "a blue cat", "two"]
    asked = [{"image": Image.new("RGB", (16, 16), colour), "text": f"which {n}"} for n, colour in enumerate(("red", "blue", "lime"))]
    found = answer(ours, asked, words, batch_size=2)
    batch = rows(ours, *asked)
    states = ours.ask(batch.inputs["text"], ours.look(batch.inputs["image"]))
    ids = [ours.vocabulary.encode(one) for one in words]
    by_hand = rank_answers(ours.answering, states, ids, end=ours.vocabulary.roles["end"], smoothing=0.1)
    assert [[word for word, _ in one] for one in found] == [[words[i] for i in one] for one in by_hand.answers.tolist()]
    assert [score for one in found for _, score in one] == pytest.approx(by_hand.scores.flatten().tolist(), rel=1e-5)
    assert [len(one) for one in answer(ours, asked, words, k=1)] == [1, 1, 1]
    ours.drawn = ["answerer.head.bias" if ours.answerer else "trunk.blocks.0.qkv.decode.weight"]
    with pytest.raises(ZooError, match="answers of this model would mean nothing"):
        answer(ours, asked, words)
    ours.drawn = ["matches.weight", *(["head.bias", "trunk.blocks.0.qkv.decode.weight"] if ours.answerer else [])]
    assert [word for word, _ in answer(ours, asked[:1], words)[0]] == [word for word, _ in found[0]]
    with pytest.raises(ZooError, match="row 1: a question needs a picture and a text"):
        answer(ours, [asked[0], {"text": "which"}], words)
    with pytest.raises(ZooError, match="a Clip writes no answers to questions: take a BLIP"):
        answer(build("clip"), asked, words)
    with pytest.raises(ZooError, match="a Beit3 writes no answers to questions: take a BLIP"):  # it writes, and from pictures alone
        answer(build("beit_3"), asked, words)


def test_weights_of_questions_and_answers_come_back_as_they_were():
    theirs, ours, table = answering(LOOKS)
    back = to_theirs(ours.state_dict(), table)
    state = {name: x for name, x in theirs.state_dict().items() if not name.endswith("position_ids")}
    assert back.keys() == state.keys()
    assert all(torch.equal(x, back[name]) for name, x in state.items())


def test_a_question_is_no_picture_where_widths_differ():
    ours = blip()
    with pytest.raises(ZooError, match=r"as its pictures are, and this is 64 wide: .* need a decoder of their own, answerer: true"):
        ours.answering  # noqa: B018
    text = ModalityInputs(torch.tensor([[2, 6, 3]]))
    asked = ours.ask(text, ours.look(ModalityInputs(torch.randn(1, 3, PIXELS, PIXELS))))
    with pytest.raises(ZooError, match="it writes about what is 48 wide, as its pictures are, and this is 64 wide"):
        ours.next_words(torch.tensor([ours.prompt]), asked, None)


def test_padding_changes_nothing(pair):
    image, ids, mask = pair
    ours = blip()
    loaded(ours, theirs_of(BlipForImageTextRetrieval).state_dict())
    short = batch_of(image[1:2], ids[1:2, :4], mask[1:2, :4])
    long = batch_of(image[1:2], ids[1:2], mask[1:2])
    with torch.no_grad():
        one, two = ours(short), ours(long)
        closest(two.embeddings["text"], one.embeddings["text"], 1e-6)
        held = [ours.hold(b.inputs["text"], o.tokens["text"]) for b, o in ((short, one), (long, two))]
        closest(ours.match(held[1], two.tokens["image"]), ours.match(held[0], one.tokens["image"]), 1e-6)


def test_what_it_can_do():
    made = build("blip")
    assert isinstance(made, Matching)
    assert isinstance(made, Asking)
    assert isinstance(made, Captioning)
    assert not isinstance(made, Unmasking)


def test_rows_that_lack_a_picture_or_a_text():
    made = build("blip").eval()
    red = Image.new("RGB", (40, 40), "red")
    batch = rows(made, {"text": "a red square", "image": red}, {"text": "only words"}, {"image": red})
    out = made(batch)
    assert out.present["image"].tolist() == [True, False, True]
    assert out.present["text"].tolist() == [True, True, False]
    assert not out.embeddings["image"][1].any()
    assert not out.embeddings["text"][2].any()
    _, labels = made.caption(batch.inputs["text"], out)
    assert (labels != -100).any(1).tolist() == [True, False, False]
    logits = made.match(made.hold(batch.inputs["text"], out.tokens["text"]), out.tokens["image"])
    assert logits.isfinite().all()
    words = made(rows(made, {"text": "only words"}))
    torch.testing.assert_close(words.embeddings["text"][0], out.embeddings["text"][1], rtol=0, atol=1e-5)
    assert not words.present["image"].any()


def test_a_prompt_is_part_of_each_caption_and_not_of_the_loss():
    made = build("blip", prompt="picture of")
    said = made.vocabulary.encode("picture of")
    assert made.prompt == [made.vocabulary.role("decode", "a test"), *said]
    batch = rows(made, {"text": "a cat", "image": Image.new("RGB", (40, 40), "red")})
    _, labels = made.caption(batch.inputs["text"], made(batch))
    ends = made.vocabulary.role("end", "a test")
    assert labels.tolist() == [[*[-100] * len(said), *made.vocabulary.encode("a cat"), ends]]


def test_which_blocks_read_the_picture_is_the_fusions_say():
    made = build("blip", fusion={"name": "cross_attention", "from_layer": 2})
    assert [block.cross is not None for block in made.trunk.blocks] == [False, False, True, True]
    assert all(block.cross is not None for block in build("blip").trunk.blocks)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"vocab_size": 5001}, "blip: vocab_size 5001 is too small: the vocabulary 'small' needs 5002 rows"),
        ({"vocabulary": "clip"}, "blip: the vocabulary 'clip' has no id for 'encode'"),
        ({"length": 60, "prompt": "a picture of one"}, "blip: length 60 and a prompt of . ids need more than the 64 places of size tiny"),
        ({"fusion": {"name": "cross_attention", "from_layer": 4}}, "from_layer 4 is none of the 4 blocks"),
    ],
)
def test_what_cannot_be_built_says_so(settings, message):
    with pytest.raises(ZooError, match=message):
        build("blip", **settings)


def test_a_file_of_two_models_that_do_not_share_is_refused():
    told = golden("blip_lavis", "pretrain")
    state = told.state
    name = "text_decoder.bert.encoder.layer.0.intermediate.dense.weight"
    state[name] = state[name] + 1
    with pytest.raises(ZooError, match=r"text_encoder\.encoder\.layer\.0.* are one parameter in this model, and differ"):
        loaded(blip(told.told["vocabulary"]), state)
    state = told.state
    del state["text_encoder.encoder.layer.1.attention.self.key.bias"]
    with pytest.raises(ZooError, match=r"no text_encoder\.encoder\.layer\.1\.attention\.self\.key\.bias, and others of its layer"):
        loaded(blip(told.told["vocabulary"]), state)


def step(made, batch):
    """Bytes that wait for the backward pass, and the gradients."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = made(batch)
        matched = made.match(made.hold(batch.inputs["text"], out.tokens["text"]), out.tokens["image"])
        logits, labels = made.caption(batch.inputs["text"], out)
    made.zero_grad()
    (matched[:, 1].sum() + F.cross_entropy(logits.flatten(0, 1), labels.flatten())).backward()
    return sum(kept.values()), {name: p.grad for name, p in made.named_parameters() if p.grad is not None}


def test_checkpointing_keeps_less_and_changes_no_gradient():
    made = build("blip", vocab_size=5002, length=60).train()
    batch = rows(made, *({"text": text, "image": Image.new("RGB", (40, 40), "red")} for text in ("red " * 50, "blue " * 9, "green")))
    weights = sum(p.nbytes for p in made.parameters())
    whole, plain = step(made, batch)
    made.checkpoint_gradients()
    less, same = step(made, batch)
    assert less - weights < 0.5 * (whole - weights)
    assert plain.keys() == same.keys()
    assert all(torch.equal(same[name], gradient) for name, gradient in plain.items())


def test_a_stage_gives_its_pictures_positions_to_larger_pictures(tmp_path):
    """Fine-tuning looks at larger pictures; timm's own resampling is the reference."""
    small, large = (build("blip", layers=1, vision={"name": "image_transformer", "arch": "tiny", "image_size": size}) for size in (32, 64))
    save(small, tmp_path)
    take_parts(large, [Stage(recipe="pretrain", parts=("vision", "trunk"))], [tmp_path])
    tokens = small.state_dict()["vision.model.pos_embed"].shape[1]
    prefix = tokens - int(tokens**0.5) ** 2
    grid = int(large.state_dict()["vision.model.pos_embed"].shape[1] ** 0.5)
    theirs = resample_abs_pos_embed(small.state_dict()["vision.model.pos_embed"], [grid, grid], num_prefix_tokens=prefix)
    torch.testing.assert_close(large.state_dict()["vision.model.pos_embed"], theirs)
    assert torch.equal(large.trunk.blocks[0].cross.kv.weight, small.trunk.blocks[0].cross.kv.weight)
    assert not torch.equal(large.embed.words.weight, small.embed.words.weight)
