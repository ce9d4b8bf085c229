"""A raw note to prompt ids and pixels: cleaning, prompt, truncation, as NoteLLM-2 does it in training and inference alike."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.joints import Arrange, Parts, Segment, Words
from zoo.types import ModalityInputs, Processor, Row, Tokenizer

FIELDS = ("title", "topic", "content")
_HASHTAG = re.compile(r"#\w+#")

LANGUAGES: dict[str, Words] = {
    "zh": Words(
        note="笔记：",
        compress="，压缩为一个词：“",
        close="”。",
        comma="，",
        stop="。",
        keys={"image": "图片", "title": "标题", "topic": "话题", "content": "内容"},
    ),
    # The paper's English strings are not published; these follow the Chinese ones word by word.
    "en": Words(note="Note: ", compress=', compressed into one word: "', close='". ', comma=", ", stop=". ", keys={}),
}

Ask = Literal["category", "topics"]
QUESTIONS: dict[str, dict[Ask, str]] = {  # NoteLLM-1's, which stand behind the compressed word
    "zh": {"category": "生成笔记类目：", "topics": "生成笔记1个话题："},
    "en": {"category": "Generate the note category: ", "topics": "Generate 1 topic of the note: "},
}


def clean(row: Row, words: Words, *, title_length: int, content_length: int, max_topics: int, hashtag_length: int = 16) -> dict[str, str]:
    """The text fields of a note as they stand in the prompt; {} when the note has no text at all.

    Hashtags ``#word#`` of up to ``hashtag_length`` characters, both signs counted, move from the content to the topics,
    every occurrence of them; topics beyond ``max_topics`` are lost, as in the released code. Lengths count characters;
    the paper of NoteLLM-1 says tokens, the code cuts characters.

    Args:
        row: ``title``, ``topic`` (a string or a list of them), ``content``; any may be missing, None or empty.
        words: The language.
        title_length: Characters of the title that stay.
        content_length: Characters of the content that stay.
        max_topics: Topics that stay.
        hashtag_length: A longer hashtag stays in the content.

    Raises:
        ZooError: If a field is no text.
    """
    title, topic, content = (row.get(field) or "" for field in FIELDS)
    topics = list(topic) if isinstance(topic, list | tuple) else [topic]
    for field, text in (("title", title), *(("topic", t) for t in topics), ("content", content)):
        if not isinstance(text, str):
            raise ZooError(f"{field} {text!r} is a {type(text).__name__}, not text: write a string, or leave the key out")
    if not (title or topic or content):
        return {}
    content = content.replace("[话题]", "")
    found = [tag for tag in _HASHTAG.findall(content) if len(tag) <= hashtag_length]
    for tag in found:
        content = content.replace(tag, "")
    topics = [t.strip() for t in [*topics, *(tag[1:-1] for tag in found)] if t.strip()]
    lines = [re.sub(r"\r?\n", words.stop, text) for text in (title, words.comma.join(topics[:max_topics]), content)]
    return dict(zip(FIELDS, (lines[0][:title_length].strip(), lines[1], lines[2][:content_length].strip()), strict=True))


class NoteProcessor:
    """One raw row to the modalities of a batch; small and picklable.

    ``text`` holds the ids of the prompt with one position per medium, and in ``extra`` the ``slots`` where media go, the
    positions ``anchor.<name>`` where embeddings are read (-1: this row has none) and whether the row ``has_text``.
    ``answer``, if anything is asked that the row can answer, holds the ids that stand behind the prompt in training: the compressed
    word, the question and the answer, of which ``extra["said"]`` marks the last.

    Args:
        tokenizer: The backbone's.
        arrange: The plug-in that lays a row out.
        image: The vision encoder's processor; None when the model does not look at images.
        language: Of the prompt.
        absent: ``skip`` leaves an absent modality out of the prompt; ``zeros`` puts what the released code puts: empty
            fields, and a zero image whose tokens stand in the prompt.
        max_tokens: Of the prompt without its last words and without the media.
        title_length: In characters.
        content_length: In characters.
        max_topics: Topics kept.
        ask: What is asked in training. ``category``: the row's ``category``, of which the first two levels, ``a@b``, count; the prompt
            never shows it. ``topics``: the last topic, which is left out of the prompt unless nothing else stands in it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        arrange: Arrange,
        image: Processor | None,
        *,
        language: Literal["zh", "en"],
        absent: Literal["skip", "zeros"],
        max_tokens: int,
        title_length: int,
        content_length: int,
        max_topics: int,
        ask: Ask | None = None,
    ) -> None:
        self.tokenizer, self.arrange, self.image, self.ask = tokenizer, arrange, image, ask
        self.language, self.absent, self.max_tokens = language, absent, max_tokens
        self.limits = {"title_length": title_length, "content_length": content_length, "max_topics": max_topics}

    def config(self) -> dict[str, Any]:
        """What decides its result, for comparison when weights are loaded."""
        image = self.image.config() if self.image is not None else None
        own: dict[str, Any] = {"language": self.language, "absent": self.absent, "max_tokens": self.max_tokens, **self.limits}
        own |= {} if self.ask is None else {"ask": self.ask}
        return {"note": own, "tokenizer": self.tokenizer.config(), "image": image}

    def __call__(self, row: Row) -> dict[str, ModalityInputs]:
        """A row of which the model sees nothing gets the empty prompt, and its embedding is marked absent."""
        words = LANGUAGES[self.language]
        fields, answer = self._held_out(row, clean(row, words, **self.limits))
        looked = self._pixels(row)
        if self.absent == "zeros":
            fields = fields or dict.fromkeys(FIELDS, "")
        media = ("image",) if looked is not None else ()
        text = self._prompt(self.arrange(Parts(fields, media, words)), has_text=bool(fields))
        inputs = {"text": text} if looked is None else {"text": text, "image": looked}
        return {**inputs, "answer": self._answer(answer)} if answer else inputs

    def keys(self) -> tuple[str, ...]:
        """The keys of a row that this model looks at."""
        return FIELDS if self.image is None else (*FIELDS, "image")

    def sees(self, row: Row) -> bool:
        """Whether the row has anything that this model looks at."""
        return any(row.get(field) for field in FIELDS) or (self.image is not None and bool(images(row)))

    def _held_out(self, row: Row, fields: dict[str, str]) -> tuple[dict[str, str], str]:
        """What the prompt shows, and the answer that it does not; "" where there is none."""
        comma = LANGUAGES[self.language].comma
        if self.ask == "category":
            category = row.get("category") or ""
            if not isinstance(category, str):
                raise ZooError(f"category {category!r} is a {type(category).__name__}, not text: write a string, or leave the key out")
            return fields, comma.join(level.strip() for level in category.split("@")[:2])
        if self.ask == "topics":
            rest, _, last = fields.get("topic", "").rpartition(comma)
            left = {**fields, "topic": rest}
            return (left, last) if any(left.values()) else (fields, "")
        return fields, ""

    def _answer(self, answer: str) -> ModalityInputs:
        """The compressed word, the question, and the answer with a stop."""
        words, role = LANGUAGES[self.language], self.tokenizer.roles.get("compressed")
        assert self.ask is not None
        asked = [*([] if role is None else [role]), *self.tokenizer.encode(words.close + QUESTIONS[self.language][self.ask])]
        said = self.tokenizer.encode(answer + words.stop.rstrip())
        ids = torch.tensor([*asked, *said])
        return ModalityInputs(ids, torch.ones_like(ids, dtype=torch.bool), extra={"said": torch.arange(len(ids)) >= len(asked)})

    def _pixels(self, row: Row) -> ModalityInputs | None:
        """As `pixels`; None when nobody looks."""
        if self.image is None:
            return None
        found = pixels(row, self.image)
        return ModalityInputs(self._zero_image()) if found is None and self.absent == "zeros" else found

    def _zero_image(self) -> Tensor:
        from PIL import Image  # the parity mode alone needs it

        assert self.image is not None
        return torch.zeros_like(self.image(Image.new("RGB", (2, 2))).values)

    def _prompt(self, segments: list[Segment], *, has_text: bool) -> ModalityInputs:
        """Tokenise between special tokens, cut the text from the end to ``max_tokens``, note slots and anchors."""
        roles = self.tokenizer.roles
        pieces = [(s, self._ids(s, roles)) for s in _merged(segments, roles)]
        bos = roles.get("bos")
        over = sum(len(ids) for s, ids in pieces[:-1] if s.media is None) + (bos is not None) - self.max_tokens
        ids: list[int] = [] if bos is None else [bos]
        slots: list[int] = [0] * len(ids)
        anchors = dict.fromkeys(self.arrange.anchors, -1)
        for i, (_, piece) in reversed(list(enumerate(pieces))):
            if over > 0 and not pieces[i][0].keep and pieces[i][0].text:
                pieces[i] = (pieces[i][0], piece[: max(len(piece) - over, 0)])
                over -= len(piece) - len(pieces[i][1])
        for segment, piece in pieces:
            ids += piece
            slots += [1 if segment.media is not None else 0] * len(piece)
            if segment.anchor is not None:
                anchors[segment.anchor] = len(ids) - 1
        extra = {"slots": torch.tensor(slots), "has_text": torch.tensor(has_text)}
        extra |= {f"anchor.{name}": torch.tensor(at) for name, at in anchors.items()}
        return ModalityInputs(torch.tensor(ids), torch.ones(len(ids), dtype=torch.bool), extra=extra)

    def _ids(self, segment: Segment, roles: Mapping[str, int | None]) -> list[int]:
        if segment.media is not None:
            return [0]  # a slot: its embedding is replaced
        if segment.role is not None:
            special = roles[segment.role]
            assert special is not None, "dropped by _merged"
            return [special]
        return self.tokenizer.encode(segment.text)


def continued(text: ModalityInputs, answer: ModalityInputs) -> ModalityInputs:
    """The prompts (B, N) with question and answer (B, A) behind them: (B, N + A), padding between; ``extra["said"]`` marks the answers."""
    assert text.mask is not None, "the processor makes one"
    assert answer.mask is not None, "the processor makes one"
    said = answer.extra["said"]
    extra = {
        **text.extra,
        "slots": torch.cat([text.extra["slots"], torch.zeros_like(answer.values)], 1),
        "said": torch.cat([torch.zeros_like(text.mask), said], 1),
    }
    return ModalityInputs(torch.cat([text.values, answer.values], 1), torch.cat([text.mask, answer.mask], 1), extra=extra)


def pixels(row: Row, image: Processor) -> ModalityInputs | None:
    """(3, H, W), or (M, 3, H, W) of several images; None when there is none. Prepared ones are taken as they are."""
    values = [(x if isinstance(x, ModalityInputs) else image(x)).values for x in images(row)]
    if not values:
        return None
    return ModalityInputs(values[0] if len(values) == 1 else torch.stack(values))


def images(row: Row) -> list[Any]:
    """The images of a row, which holds none, one, or a list of them; one that is prepared already stands in a list."""
    given = row.get("image")
    return [x for x in (given if isinstance(given, list | tuple) else [given]) if x is not None]


def _merged(segments: list[Segment], roles: Mapping[str, int | None]) -> list[Segment]:
    """Join text to text, so that the tokenizer sees whole strings between special tokens; drop roles it does not have."""
    out: list[Segment] = []
    for segment in segments:
        if segment.role is not None and roles.get(segment.role) is None:
            continue
        plain = segment.role is None and segment.media is None and segment.anchor is None
        if plain and out and out[-1].text and out[-1].anchor is None:
            out[-1] = out[-1]._replace(text=out[-1].text + segment.text)
        else:
            out.append(segment)
    return out
