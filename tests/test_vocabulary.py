"""Captions to ids and back: the shipped words, CLIP's, and those of a folder."""

import pickle

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

from zoo.errors import ZooError
from zoo.types import ModalityInputs
from zoo.vocabulary import is_shipped, make_vocabulary
from zoo.word_masks import choose, words_in

SENTENCES = ["a smiling cat", "flag of micronesia", "百 慕 大 国 旗", "hot - dog, 3 times!"]


@pytest.mark.parametrize("name", ["small", "clip"])
def test_shipped_words_survive_pickling(name):
    made = make_vocabulary(name)
    again = pickle.loads(pickle.dumps(made))
    assert [again.encode(s) for s in SENTENCES] == [made.encode(s) for s in SENTENCES]
    assert again.config() == made.config()
    assert is_shipped(name)


@pytest.mark.parametrize("text", ["a smiling cat", "flag of canada", "国 旗"])
@pytest.mark.parametrize("name", ["small", "clip"])
def test_what_is_encoded_can_be_decoded(name, text):
    made = make_vocabulary(name)
    assert made.decode(made.encode(text)) == text


def test_small_cuts_as_bert_does(tmp_path):
    made = make_vocabulary("small")
    with open("zoo/small_vocabulary.txt", encoding="utf-8") as file:
        (tmp_path / "vocab.txt").write_text(file.read(), encoding="utf-8")
    theirs = BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"))
    for text in SENTENCES:
        assert made.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]


def test_clip_cuts_as_open_clip_does():
    from open_clip.tokenizer import SimpleTokenizer

    made, theirs = make_vocabulary("clip"), SimpleTokenizer()
    for text in ("a photo of a Cat!", "  many   spaces ", "naïve café"):
        ids = theirs(text)[0].tolist()
        ends = ids.index(theirs.eot_token_id)
        assert [made.role("start", "a test"), *made.encode(text), made.role("end", "a test")] == ids[: ends + 1]


def test_roles_are_no_words_that_a_text_can_write():
    made = make_vocabulary("small")
    for text in ("[MASK]", "[CLS] [SEP]", "[DEC]"):
        assert not set(made.encode(text)) & {i for role, i in made.roles.items() if role != "unk"}
    clip = make_vocabulary("clip")
    for text in ("a<end_of_text>b", "<END_OF_TEXT> b", "&lt;start_of_text&gt; b", "<start_of<end_of_text>_text> b"):
        assert clip.encode(text)[-1] == clip.encode("b")[-1]
        assert not set(clip.encode(text)) & {49406, 49407}


def test_roles_of_the_small_one():
    made = make_vocabulary("small")
    assert {**made.roles} == {"pad": 0, "unk": 1, "start": 2, "end": 3, "mask": 4, "decode": 5000, "encode": 5001}
    assert make_vocabulary("clip").roles["unk"] is None
    assert (made.own, made.size) == (5000, 5002)
    assert made.decode([2, *made.encode("cat"), 5001, 3, 0, 0]) == "cat"


def test_pieces_know_their_word():
    made = make_vocabulary("small")
    ids = made.encode("flag of micronesia")
    words = made.words(ids)
    assert words[:3] == [0, 1, 2]
    assert words[-1] == 2
    assert len(ids) > 3, "micronesia is one piece, so this shows nothing"
    clip = make_vocabulary("clip")
    assert clip.words(clip.encode("micronesia smiles")) == [0, 0, 0, 1]


def test_pieces_of_sentencepiece_know_their_word():
    """A piece that begins a word is written with U+2581 before it, and a few others begin with ##, as in XLM-R's list."""
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "\u2581a", "\u2581flag", "\u2581of", "\u2581micro", "n", "esia", "##", ".", "<mask>"]
    inner = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=3))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made = make_vocabulary({"name": "a test", "serialized": inner.to_str()})
    ids = made.encode("a flag of micronesia.")
    assert [pieces[i] for i in ids] == ["\u2581a", "\u2581flag", "\u2581of", "\u2581micro", "n", "esia", "."]
    assert made.words(ids) == [0, 1, 2, 3, 3, 3, 3]
    assert (made.roles["unk"], made.roles["mask"]) == (3, 12)
    torch.manual_seed(0)
    text = ModalityInputs(torch.tensor([[0, *ids, 2]] * 200), torch.ones(200, len(ids) + 2, dtype=torch.bool))
    chosen = choose(text, made, 0.5, whole_words=True)[:, 1:-1]
    assert (chosen[:, 3:] == chosen[:, 3:4]).all()
    assert 60 < chosen[:, 3].sum() < 140


def test_letters_that_a_vocabulary_lacks_are_no_words():
    made = make_vocabulary("small")
    ids = torch.tensor([[2, *made.encode("a red \u0b95 heart"), 3, 0]])
    text = ModalityInputs(ids, ids != 0)
    assert (ids == made.roles["unk"]).sum() == 1
    assert words_in(text, made).tolist() == [[False, True, True, False, True, False, False]]
    for whole_words in (False, True):
        assert torch.equal(choose(text, made, 1.0, whole_words), words_in(text, made))


def test_a_role_that_is_missing_is_named():
    with pytest.raises(ZooError, match=r"masked words: the vocabulary 'clip' has no id for 'mask'.*write vocabulary: small"):
        make_vocabulary("clip").role("mask", "masked words")


def test_a_folder_of_bert_gets_the_two_ids_of_blip(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    made = make_vocabulary(str(tmp_path))
    assert made.encode("Cats cat") == [5, 6, 5]
    assert (made.roles["decode"], made.roles["encode"], made.size) == (7, 8, 9)
    again = make_vocabulary({"name": str(tmp_path), **made.portable()})
    assert again.config() == made.config()
    assert again.encode("cats") == [5, 6]


def test_what_cannot_be_had_is_said(tmp_path):
    with pytest.raises(ZooError, match=r"vocabulary '.*nowhere' could not be loaded.*small or clip"):
        make_vocabulary(str(tmp_path / "nowhere"))
    inner = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(tmp_path)
    with pytest.raises(ZooError, match=r"none of its words is \[PAD\] or <pad>"):
        make_vocabulary(str(tmp_path))
