"""A small model with every ability of pictures and texts, of real layers, for the tests of objectives."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.types import Batch, ModalityInputs, ModelOutput, Tokens

PAD, START, END, MASK = 0, 1, 2, 3
SPECIALS = (PAD, START, END, MASK)
WORDS = 40  # ids 4..39; an odd one goes on with the word of the one before it


class Vocabulary:
    """Ids without words."""

    size = own = WORDS

    def __init__(self) -> None:
        self.roles = {"pad": PAD, "start": START, "end": END, "mask": MASK, "encode": None, "decode": None}

    def words(self, ids: list[int]) -> list[int]:
        words, number = [], -1
        for place, each in enumerate(ids):
            number += place == 0 or each % 2 == 0
            words.append(number)
        return words


class Small(nn.Module):
    """Pictures are (B, 5, 7) features; texts are ids. Matching, unmasking and captioning mix words with what is seen."""

    outputs = ("image", "text")
    adds_cosine = False
    prompt, room = (START,), 64

    def __init__(self, dim: int = 6, width: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.dim, self.vocabulary = dim, Vocabulary()
        self.vision, self.words = nn.Linear(7, width), nn.Embedding(WORDS, width)
        self.image, self.text = nn.Linear(width, dim), nn.Linear(width, dim)
        self.judge, self.fill = nn.Bilinear(width, width, 2), nn.Linear(width, WORDS)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("forbidden", torch.full((3, 3), -torch.inf).triu(1))
        self.register_buffer("average", torch.zeros(width))
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.calls: list[str] = []

    def look(self, image: ModalityInputs) -> Tokens:
        self.calls.append("look")
        tokens = torch.tanh(self.vision(self.dropout(image.values)))
        return self._tokens(tokens, image)

    def read(self, text: ModalityInputs) -> Tokens:
        self.calls.append("read")
        return self._tokens(torch.tanh(self.dropout(self.words(text.values))), text)

    def forward(self, batch: Batch) -> ModelOutput:
        self.calls.append("forward")
        seen, read = self.look(batch.inputs["image"]), self.read(batch.inputs["text"])
        embeddings = {"image": self.image(seen.pooled), "text": self.text(read.pooled)}
        return ModelOutput(embeddings, {"image": seen.present, "text": read.present}, tokens={"image": seen, "text": read})

    def hold(self, text: ModalityInputs, read: Tokens) -> Tokens:
        return read

    def match(self, held: Tokens, seen: Tokens) -> Tensor:
        self.calls.append("match")
        return self.judge(mean(held), mean(seen))

    def unmask(self, text: ModalityInputs, seen: Tokens, chosen: Tensor | None = None) -> Tensor:
        self.calls.append("unmask")
        words = torch.tanh(self.dropout(self.words(text.values)))
        logits = self.fill(words * mean(seen)[:, None] + mean(self._tokens(words, text))[:, None])
        return logits if chosen is None else logits[chosen]

    def caption(self, text: ModalityInputs, out: ModelOutput) -> tuple[Tensor, Tensor]:
        words = out.tokens["text"].tokens
        before = words.cumsum(1) / torch.arange(1, words.shape[1] + 1)[None, :, None]
        labels = text.values[:, 1:].masked_fill(~text.mask[:, 1:], -100)
        return self.fill(before[:, :-1] * mean(out.tokens["image"])[:, None]), labels

    def next_words(self, ids, seen, cache):
        raise NotImplementedError

    def _tokens(self, tokens: Tensor, given: ModalityInputs) -> Tokens:
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool) if given.mask is None else given.mask
        present = torch.ones(len(tokens), dtype=torch.bool) if given.present is None else given.present
        made = Tokens(tokens, mask, None, present)
        return made._replace(pooled=mean(made) * present[:, None])


def mean(x: Tokens) -> Tensor:
    """(B, D) of the real tokens."""
    return (x.tokens * x.mask[..., None]).sum(1) / x.mask.sum(1, keepdim=True)


def batch_of(rows: int, seed: int = 0, length: int = 9, dtype=torch.float64, **fields) -> Batch:
    """Rows of different length: [START] words [END] padding."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, WORDS, (rows, length), generator=draw)
    mask = torch.arange(length) < torch.randint(4, length + 1, (rows, 1), generator=draw)
    ids[:, 0] = START
    ids[torch.arange(rows), mask.sum(1) - 1] = END
    image = torch.randn(rows, 5, 7, generator=draw, dtype=torch.float64).to(dtype)
    there = {name: fields.pop(f"{name}_present", None) for name in ("image", "text")}
    inputs = {
        "image": ModalityInputs(image, present=there["image"]),
        "text": ModalityInputs(ids.masked_fill(~mask, PAD), mask, there["text"]),
    }
    return Batch(inputs, **fields)


def model_and_other(dtype=torch.float64, **settings) -> tuple[Small, Small]:
    """Two models of different weights."""
    torch.manual_seed(7)
    return Small(**settings).to(dtype), Small(**settings).to(dtype)


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=1)


def stepped(objective: nn.Module, model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer | None = None):
    """One step as the training loop makes it."""
    loss = objective(model, batch)
    loss.total.backward()
    objective.before_step(model)
    if optimizer is not None:
        optimizer.step()
    objective.after_step(model, loss.state)
    for parameter in [*model.parameters(), *objective.parameters()]:
        parameter.grad = None
    return loss
