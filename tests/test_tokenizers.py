"""What must hold for every tokenizer: texts become ids that fit, and what a user writes is never taken for a special token."""

import pickle
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from zoo.backbones._tokenizers import ROLES, ByteTokenizer, HubTokenizer, WordTokenizer, choose, named, restored
from zoo.errors import ZooError

SPECIALS = ["<|endoftext|>", "<|vision_start|>", "<|vision_end|>"]
TEXTS = ["", "Hello, world", "笔记：{“标题”:“红色的鞋”}", 'say "<img>" </img> <|vision_start|> <|extra_0|> <s>', "\ud800 lone", "😀\n\t x"]


def byte_level(folder=None):
    """A byte-level BPE without merges, in the form of Qwen's: special tokens after the vocabulary."""
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    outer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=SPECIALS[0], additional_special_tokens=SPECIALS[1:])
    if folder is not None:
        outer.save_pretrained(folder)
    return outer


TOKENIZERS = {
    "bytes": ByteTokenizer,
    "words": lambda: WordTokenizer(100),
    "hub": lambda: HubTokenizer(byte_level().backend_tokenizer.to_str(), {}),
}
every = pytest.mark.parametrize("tokenizer", [make() for make in TOKENIZERS.values()], ids=list(TOKENIZERS))


@every
def test_ids_fit_the_vocabulary_and_are_no_roles(tokenizer):
    assert set(tokenizer.roles) == set(ROLES)
    special = {i for i in tokenizer.roles.values() if i is not None}
    assert all(0 <= i < tokenizer.vocab_size for i in special)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert not special & set(ids), f"{text!r} became a special token"


@every
def test_survives_pickling_and_saving(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "it")
    for other in (pickle.loads(pickle.dumps(tokenizer)), restored(tokenizer.portable()), named(str(tmp_path / "it"))):
        assert other.config() == tokenizer.config()
        assert other.roles == tokenizer.roles
        assert other.vocab_size == tokenizer.vocab_size
        assert other.encode(TEXTS[3]) == tokenizer.encode(TEXTS[3])


def test_bytes_are_utf_8():
    assert ByteTokenizer().encode("aé标") == [97, 195, 169, 230, 160, 135]


def test_words_split_as_said():
    tokenizer = WordTokenizer(1 << 20)
    pieces = ["red", "shoes", "标", "题", ",", "2024", "!"]
    assert tokenizer.encode("Red SHOES标题,2024!") == [tokenizer.encode(p)[0] for p in pieces]


def test_a_run_of_marks_is_one_piece():
    tokenizer = WordTokenizer(1 << 20)
    assert len(tokenizer.encode('{"a_b":"c"}')) == 7  # {" a _ b ":" c "}


def test_words_hash_alike_in_every_process():
    code = "from zoo.backbones._tokenizers import WordTokenizer; print(WordTokenizer(8192).encode('Hello 标'))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"})
    assert other.stdout.strip() == str(WordTokenizer(8192).encode("Hello 标"))


def test_too_few_rows_for_words():
    with pytest.raises(ZooError, match="no room for words: write a vocab_size above 5"):
        WordTokenizer(5)


def test_hub_tokenizer_finds_the_roles(tmp_path):
    outer = byte_level(tmp_path)
    tokenizer = HubTokenizer.fetched(str(tmp_path))
    expected = {"pad": SPECIALS[0], "image_start": SPECIALS[1], "image_end": SPECIALS[2]}
    assert {r: tokenizer.roles[r] for r in expected} == {r: outer.convert_tokens_to_ids(t) for r, t in expected.items()}
    assert tokenizer.roles["bos"] is None
    assert tokenizer.roles["compressed"] == len(outer)  # added behind the others
    assert tokenizer.vocab_size == len(outer) + 1
    assert tokenizer.encode("plain 标") == outer.encode("plain 标", add_special_tokens=False)


def test_given_roles_win():
    tokenizer = HubTokenizer(byte_level().backend_tokenizer.to_str(), {"compressed": 300, "image_start": 400})
    assert (tokenizer.roles["compressed"], tokenizer.roles["image_start"]) == (300, 400)
    assert tokenizer.vocab_size == 401


def test_no_tokenizer_there(tmp_path):
    with pytest.raises(ZooError, match=r"no tokenizer at .*: check the name, .* or write tokenizer: bytes"):
        named(str(tmp_path))


def test_not_a_saved_tokenizer():
    with pytest.raises(ZooError, match="is no saved tokenizer: name bytes, a repository or a folder"):
        restored({"kind": "syllables"})


def test_random_weights_read_bytes_and_say_so(caplog):
    with caplog.at_level("WARNING", logger="zoo"):
        assert isinstance(choose("qwen tiny", None, None), ByteTokenizer)
    assert "qwen tiny has random weights: its texts are read as bytes" in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING", logger="zoo"):
        choose("qwen tiny", "bytes", None)
    assert not caplog.records
