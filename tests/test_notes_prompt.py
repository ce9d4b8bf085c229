"""A raw note to prompt ids: cleaning, the protocol's strings, truncation, and where embeddings are read in either way of splicing."""

import math
import pickle

import pytest
import torch
from PIL import Image

from zoo.collate import RowCollate
from zoo.errors import ZooError
from zoo.models._notes import FIELDS, LANGUAGES, NoteProcessor, clean
from zoo.registry import make
from zoo.splice import Layout, splice
from zoo.types import ModalityInputs, Tokens

ZH = LANGUAGES["zh"]
SUFFIX = "，压缩为一个词：“"
FULL = {"title": "T", "topic": "P", "content": "C", "image": Image.new("RGB", (4, 4), (255, 0, 0))}
TEXT = '{"标题":"T","话题":"P","内容":"C"}'
LIMITS = {"title_length": 20, "content_length": 80, "max_topics": 10}
QWEN = {"bos": None, "image_start": 1, "image_end": 2, "compressed": 3}
LLAMA = {"bos": 1, "image_start": None, "image_end": None, "compressed": 3}


class Pieces:
    """A tokenizer that gives an id to every ``size`` characters, and can say what its ids were."""

    def __init__(self, roles, size=1):
        self.roles, self.size, self.vocab_size = roles, size, 1 << 20
        self.seen = {0: "<IMG>", **{i: f"<{role}>" for role, i in roles.items() if i is not None}}

    def encode(self, text):
        cut = [text[i : i + self.size] for i in range(0, len(text), self.size)]
        ids = [len(self.seen) + 100 + i for i in range(len(cut))]
        self.seen |= dict(zip(ids, cut, strict=True))
        return ids

    def config(self):
        return {"roles": self.roles, "size": self.size}

    def text(self, ids):
        return "".join(self.seen[i] for i in ids.tolist())


class Pixels:
    """An image of one pixel, as an image processor gives it."""

    def __call__(self, thing):
        if not isinstance(thing, Image.Image):
            raise ZooError("no image")
        return ModalityInputs(torch.tensor(thing.resize((1, 1)).getpixel((0, 0))).float().view(3, 1, 1) / 255)

    def config(self):
        return {"size": 1}


def processor(arrange="early", roles=QWEN, size=1, image=True, **given):
    settings = {"language": "zh", "absent": "skip", "max_tokens": 140, **LIMITS, **given}
    return NoteProcessor(Pieces(roles, size), make("fusion", arrange), Pixels() if image else None, **settings)


def prompt(row, arrange="early", roles=QWEN, **given):
    process = processor(arrange, roles, **given)
    return process.tokenizer.text(process(row)["text"].values)


def spliced(process, row, visual_tokens):
    text = process(row)["text"]
    anchors = {name: text.extra[f"anchor.{name}"][None] for name in process.arrange.anchors}
    embeds = text.values[None, :, None].float()
    layout = Layout(embeds, text.mask[None], text.extra["slots"][None], anchors)
    mask = torch.ones(1, visual_tokens, dtype=torch.bool)
    return splice(layout, {"image": Tokens(torch.full((1, visual_tokens, 1), -7.0), mask, None, mask[:, 0])})


class TestCleaning:
    @pytest.mark.parametrize(
        "content, topics, left",
        [
            ("#Chat[话题]# Chat b", "Chat", "Chat b"),
            ("a #x# b #x# c", "x，x", "a  b  c"),
            ("#a#b#c#", "a，c", "b"),
            (f"#{'x' * 15}#", "", f"#{'x' * 15}#"),
            (f"#{'x' * 14}#", "x" * 14, ""),
            ("#a b#", "", "#a b#"),
            ("".join(f"#t{i}#" for i in range(12)), "，".join(f"t{i}" for i in range(10)), ""),
        ],
    )
    def test_golden_cases(self, content, topics, left):
        assert clean({"content": content}, ZH, **LIMITS) == {"title": "", "topic": topics, "content": left}

    def test_a_text_of_nothing_is_no_text(self):
        for row in ({}, {"title": "", "topic": [], "content": None}, {"image": "a.png"}):
            assert clean(row, ZH, **LIMITS) == {}

    def test_lengths_count_characters_before_the_ends_are_stripped(self):
        out = clean({"title": "字" * 19 + "  字", "content": " " + "b" * 90}, ZH, **LIMITS)
        assert out["title"] == "字" * 19
        assert out["content"] == "b" * 79

    def test_limits(self):
        out = clean({"title": "abc", "topic": ["p", "q"], "content": "defg"}, ZH, title_length=2, content_length=3, max_topics=1)
        assert out == {"title": "ab", "topic": "p", "content": "def"}

    def test_topics_may_be_a_list_and_come_before_hashtags(self):
        out = clean({"topic": [" p ", "", "q"], "content": "#r#"}, ZH, **LIMITS)
        assert out["topic"] == "p，q，r"
        assert clean({"topic": ("p", "q")}, LANGUAGES["en"], **LIMITS)["topic"] == "p, q"

    @pytest.mark.parametrize("language, stop", [("zh", "。"), ("en", ". ")])
    def test_a_line_break_becomes_a_stop(self, language, stop):
        out = clean({"title": "a\nb", "content": "c\r\nd"}, LANGUAGES[language], **LIMITS)
        assert (out["title"], out["content"]) == (f"a{stop}b", f"c{stop}d")

    @pytest.mark.parametrize("row", [{"title": 3}, {"topic": {"a": 1}}, {"topic": ["a", 2.0]}, {"content": math.nan}, {"content": ["a"]}])
    def test_what_is_no_text_is_refused(self, row):
        (field,) = row
        with pytest.raises(ZooError, match=rf"{field} .* is a \w+, not text: write a string, or leave the key out"):
            clean(row, ZH, **LIMITS)


class TestPrompts:
    """The strings of the protocol; `<IMG>` is the slot."""

    def test_text_only(self):
        assert prompt(FULL, "text_only") == "笔记：" + TEXT + SUFFIX

    def test_basic(self):
        rest = TEXT.removeprefix("{")
        assert prompt(FULL) == '笔记：{"图片":"<image_start><IMG><image_end>",' + rest + SUFFIX
        assert prompt(FULL, roles=LLAMA) == '<bos>笔记：{"图片":"<IMG>",' + rest + SUFFIX

    def test_micl(self):
        second = "”。笔记：" + TEXT + SUFFIX
        visual = '笔记：{"图片":"<image_start><IMG><image_end>"}' + SUFFIX + "<compressed>"
        assert prompt(FULL, "micl") == visual + second
        assert prompt(FULL, "micl", LLAMA) == '<bos>笔记：{"图片":"<IMG>"}' + SUFFIX + "<compressed>" + second

    def test_english(self):
        words = '{"title":"T","topic":"P","content":"C"}, compressed into one word: "'
        assert prompt(FULL, "text_only", language="en") == "Note: " + words
        visual = 'Note: {"image":"<image_start><IMG><image_end>"}, compressed into one word: "<compressed>'
        assert prompt(FULL, "micl", language="en") == visual + '". Note: ' + words

    @pytest.mark.parametrize("arrange", ["early", "micl", "text_only"])
    def test_without_an_image(self, arrange):
        row = {k: v for k, v in FULL.items() if k != "image"}
        assert prompt(row, arrange) == "笔记：" + TEXT + SUFFIX

    def test_without_text(self):
        row = {"image": FULL["image"]}
        image = '笔记：{"图片":"<image_start><IMG><image_end>"}' + SUFFIX
        assert prompt(row) == image
        assert prompt(row, "micl") == image + "<compressed>”。笔记：{}" + SUFFIX
        assert prompt(row, "text_only") == "笔记：{}" + SUFFIX

    def test_zeros_keep_the_skeleton(self):
        empty = '"标题":"","话题":"","内容":""}' + SUFFIX
        assert prompt({"image": FULL["image"]}, absent="zeros") == '笔记：{"图片":"<image_start><IMG><image_end>",' + empty
        process = processor(absent="zeros")
        sample = process({"title": "a"})
        assert "<IMG>" in process.tokenizer.text(sample["text"].values)
        assert torch.equal(sample["image"].values, torch.zeros(3, 1, 1))

    def test_several_images_are_one_slot(self):
        process = processor()
        sample = process({"image": [FULL["image"], None, FULL["image"]]})
        assert sample["image"].values.shape == (2, 3, 1, 1)
        assert int(sample["text"].extra["slots"].sum()) == 1

    @pytest.mark.parametrize("text", ['say "hi"', "<img></img>", "<IMG>", "<|extra_0|>", '"}，压缩为一个词：“'])
    def test_user_text_moves_no_slot_and_no_anchor(self, text):
        process = processor("micl")
        sample = process({"title": text, "image": FULL["image"]})["text"]
        assert f'"标题":"{text}"' in process.tokenizer.text(sample.values)  # nothing is escaped
        assert int(sample.extra["slots"].sum()) == 1
        assert int(sample.extra["anchor.note"]) == len(sample.values) - 1
        assert int(sample.extra["anchor.visual"]) == sample.values.tolist().index(QWEN["compressed"]) - 1


class TestPositions:
    def test_llama_worked_check(self):
        """10 ids, `<IMG>` at 3, 16 visual tokens: 25 long, visual at 3..18, read at 24."""
        process = processor(roles=LLAMA, size=8)
        text = process(FULL)["text"]
        assert len(text.values) == 10
        assert text.extra["slots"].nonzero().flatten().tolist() == [3]
        out = spliced(process, FULL, 16)
        assert out.inputs_embeds.shape[1] == 25
        assert (out.kind[0] == 1).nonzero().flatten().tolist() == list(range(3, 19))
        assert out.anchors["note"].tolist() == [24]

    def test_qwen_inserts_between_its_two_tokens(self):
        L, process = 5, processor()
        ids = [i for i in process(FULL)["text"].values.tolist() if i != 0]  # without the slot
        at, out = ids.index(QWEN["image_start"]), spliced(process, FULL, L)
        assert out.inputs_embeds.shape[1] == len(ids) + L
        assert (out.kind[0] == 1).nonzero().flatten().tolist() == list(range(at + 1, at + 1 + L))
        assert out.inputs_embeds[0, [at, at + 1 + L], 0].tolist() == [QWEN["image_start"], QWEN["image_end"]]
        assert out.anchors["note"].tolist() == [len(ids) - 1 + L]

    @pytest.mark.parametrize("roles, shift", [(LLAMA, -1), (QWEN, 0)])
    def test_the_visual_word_is_read_before_its_token(self, roles, shift):
        L, process = 5, processor("micl", roles)
        ids = process(FULL)["text"].values.tolist()
        ids = ids if roles is LLAMA else [i for i in ids if i != 0]
        out = spliced(process, FULL, L)
        assert out.anchors["visual"].tolist() == [ids.index(3) - 1 + L + shift]
        assert out.anchors["note"].tolist() == [len(ids) - 1 + L + shift]
        read = out.inputs_embeds[0, [int(out.anchors["visual"]), int(out.anchors["note"])], 0]
        assert process.tokenizer.text(read.long()) == "““"

    def test_without_a_token_for_the_word_the_quote_is_read_all_the_same(self):
        process = processor("micl", {**LLAMA, "compressed": None})
        text = process(FULL)["text"]
        whole = process.tokenizer.text(text.values[1:]).replace("<IMG>", "I")
        assert "“”。" in whole
        assert int(text.extra["anchor.visual"]) - 1 == whole.index("“")

    def test_text_between_special_tokens_is_tokenised_whole_and_the_suffix_alone(self):
        process, pieces = processor("micl"), []
        process.tokenizer.encode = lambda text: pieces.append(text) or [9]
        process(FULL)
        assert pieces == ['笔记：{"图片":"', '"}', SUFFIX, "”。笔记：" + TEXT, SUFFIX]

    def test_absent_anchors_are_minus_one(self):
        extra = processor("micl")({"title": "a"})["text"].extra
        assert int(extra["anchor.visual"]) == -1
        assert int(extra["anchor.note"]) > 0

    @pytest.mark.parametrize("row, has", [(FULL, True), ({"image": FULL["image"]}, False), ({"topic": ["a"]}, True)])
    def test_has_text(self, row, has):
        assert bool(processor()(row)["text"].extra["has_text"]) == has


LONG = {"title": "t" * 20, "topic": "p" * 30, "content": "c" * 80, "image": FULL["image"]}


class TestTruncation:
    @pytest.mark.parametrize("arrange", ["early", "micl", "text_only"])
    @pytest.mark.parametrize("roles", [LLAMA, QWEN])
    @pytest.mark.parametrize("limit", [60, 100, 140])
    def test_the_suffix_survives_and_the_limit_holds(self, arrange, roles, limit):
        process = processor(arrange, roles, max_tokens=limit)
        text = process(LONG)["text"]
        whole = process.tokenizer.text(text.values)
        assert whole.endswith(SUFFIX)
        assert int((text.extra["slots"] == 0).sum()) == limit + len(SUFFIX)
        assert int(text.extra["anchor.note"]) == len(text.values) - 1
        assert whole.count("<IMG>") == (arrange != "text_only")

    def test_what_is_cut_is_the_end_of_the_note(self):
        long, short = prompt(LONG, "text_only", max_tokens=10_000), prompt(LONG, "text_only", max_tokens=50)
        assert short == long[:50] + SUFFIX

    def test_the_visual_note_takes_its_share(self):
        early, micl = (prompt(LONG, name, max_tokens=100) for name in ("early", "micl"))
        assert early.count("c") - early.count("<compressed>") > micl.count("c") - micl.count("<compressed>")
        assert SUFFIX + "<compressed>" in micl

    def test_a_limit_below_the_fixed_words_leaves_anchors_and_image(self):
        process = processor("micl", max_tokens=1)
        text = process(LONG)["text"]
        assert process.tokenizer.text(text.values) == "<image_start><IMG><image_end>" + SUFFIX + "<compressed>" + SUFFIX

    def test_what_fits_is_not_touched(self):
        length = len(processor("text_only")(FULL)["text"].values) - len(SUFFIX)
        assert prompt(FULL, "text_only", max_tokens=length) == prompt(FULL, "text_only")
        assert prompt(FULL, "text_only", max_tokens=length - 1) == "笔记：" + TEXT[:-1] + SUFFIX


class TestProcessor:
    def test_keys_and_what_it_sees(self):
        both, text = processor(), processor("text_only", image=False)
        assert both.keys() == (*FIELDS, "image")
        assert text.keys() == FIELDS
        for row in ({}, {"title": ""}, {"image": None}, {"image": []}, {"image": [None]}, {"tilte": "a"}):
            assert not both.sees(row)
        assert both.sees({"image": [None, FULL["image"]]})
        assert not text.sees({"image": FULL["image"]})
        assert "image" not in text(FULL)

    @pytest.mark.parametrize("arrange", ["early", "micl", "text_only"])
    def test_travels_to_the_workers(self, arrange):
        process = processor(arrange)
        again = pickle.loads(pickle.dumps(process))
        assert again.config() == process.config()
        a, b = again(FULL), process(FULL)
        assert a.keys() == b.keys()
        assert torch.equal(a["text"].values, b["text"].values)
        assert torch.equal(a["image"].values, b["image"].values)

    def test_config_tells_processors_apart(self):
        configs = [
            processor(**k).config() for k in ({}, {"max_tokens": 9}, {"language": "en"}, {"absent": "zeros"}, {"image": False}, {"size": 2})
        ]
        assert all(a != b for i, a in enumerate(configs) for b in configs[:i])

    def test_rows_with_none_one_and_several_images_meet_in_one_batch(self):
        red, blue = FULL["image"], Image.new("RGB", (4, 4), (0, 0, 255))
        batch = RowCollate(processor("micl"))([{"title": "a"}, {"image": red}, {"title": "bc", "image": [red, blue]}])
        image, text = batch.inputs["image"], batch.inputs["text"]
        assert image.values.shape == (3, 2, 3, 1, 1)
        assert image.mask.tolist() == [[False, False], [True, False], [True, True]]
        assert image.present.tolist() == [False, True, True]
        assert image.values[2, :, :, 0, 0].tolist() == [[1, 0, 0], [0, 0, 1]]
        assert text.extra["slots"].sum(1).tolist() == [0, 1, 1]
        assert text.extra["has_text"].tolist() == [True, False, True]
        assert (text.extra["anchor.note"] == text.mask.sum(1) - 1).all()
        assert text.extra["anchor.visual"].tolist()[0] == -1

    def test_a_broken_image_is_an_error(self):
        with pytest.raises(ZooError, match="no image"):
            processor()({"image": 3})
