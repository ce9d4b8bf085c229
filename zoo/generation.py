"""Words after words: captions written by the most probable word, by beams, or by draws, and how probable given ones are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from zoo.abilities import Captioning
from zoo.errors import Failure, ZooError
from zoo.sections import Decoding
from zoo.types import Tokens


class Written(NamedTuple):
    """What was written of each picture."""

    ids: list[list[int]]  # (B) captions without what they begin with and without the id that ends them
    scores: list[float]  # (B) log-probability of the ids, the one that ends them included; of beams over length ** penalty


@torch.no_grad()
def write(
    model: Captioning, seen: Tokens, how: Decoding, *, end: int, prompt: Sequence[int] = (), seed: int = 0, first: int = 0
) -> Written:
    """A caption of each picture.

    Args:
        model: In eval mode.
        seen: (B, N, D), what it looks at: its ``look`` of B pictures.
        how: The way words are chosen.
        end: The id that ends a caption.
        prompt: Ids that every caption goes on from, after the model's own; they are not part of what is written.
        seed: Of the draws of ``nucleus``.
        first: The number of the first picture: number and seed decide what is drawn of a picture, whatever is written beside it.

    Raises:
        ZooError: As `check_room`.
    """
    check_room(model, how, prompt)
    begins = [*model.prompt, *prompt]
    start = torch.tensor([begins] * len(seen.tokens), dtype=torch.int64, device=seen.tokens.device).reshape(len(seen.tokens), len(begins))
    if not len(start):
        return Written([], [])
    if how.method == "beam":
        return _beams(model, seen, start, how, end)
    return _one_by_one(model, seen, start, how, end, _uniform(seed, first, len(start), how.longest))


def check_room(model: Captioning, how: Decoding, prompt: Sequence[int] = ()) -> None:
    """Whether captions as long as ``how`` lets them be can be written: asked before the work, not where one of them happens to be long.

    Args:
        model: Any that writes captions.
        how: The way words are chosen.
        prompt: Ids that every caption goes on from, after the model's own.

    Raises:
        ZooError: If the model has no id to begin with, ``how`` asks for more ids at least than at most, or the model has too few places.
    """
    begins = len(model.prompt) + len(prompt)
    if not begins:
        raise ZooError("a caption needs an id to begin with, and this model has no prompt")
    if how.shortest > how.longest:
        raise ZooError(f"shortest: {how.shortest} ids at least and {how.longest} at most: write shortest={how.longest} or less")
    left = model.room - begins + 1  # the last word that is written is not read
    if how.longest > left:
        says = f"longest: {how.longest} ids behind the {begins} that a caption begins with are too many for this model's {model.room}"
        raise ZooError(f"{says}: write {f'longest={left} or less' if left > 0 else 'a shorter prompt'}")


def rows(seen: Tokens, which: Tensor) -> Tokens:
    """The rows ``which`` (B',) int64 of B; a row may come often."""
    pooled = None if seen.pooled is None else seen.pooled[which]
    return Tokens(seen.tokens[which], seen.mask[which], pooled, seen.present[which])


def _uniform(seed: int, first: int, count: int, steps: int) -> np.ndarray:
    """(count, steps) float64 in 0..1, the row of a picture from a generator of its own."""
    drawn = [np.random.default_rng([seed, first + i]).random(steps) for i in range(count)]
    return np.array(drawn).reshape(count, steps)


def _one_by_one(model: Captioning, seen: Tokens, ids: Tensor, how: Decoding, end: int, uniform: np.ndarray) -> Written:
    """A word for each picture at a time, by ``greedy`` or ``nucleus``; a picture whose caption has ended is not looked at any more."""
    written: list[list[int]] = [[] for _ in ids]
    scores = torch.zeros(len(ids), dtype=torch.float64)
    alive = torch.arange(len(ids))
    cache: Any = None
    for step in range(how.longest):
        if not len(alive):
            break
        logits, cache = _next_words(model, ids, seen, cache)  # (b, V)
        allowed = _without(logits, end) if step < how.shortest else logits
        if how.method == "greedy":
            words = allowed.argmax(-1)
        else:
            words = nucleus(allowed, torch.from_numpy(uniform[alive.numpy(), step]).to(logits), how.nucleus, how.temperature)
        scores[alive] += logits.log_softmax(-1).gather(1, words[:, None])[:, 0].cpu()
        for row, word in zip(alive.tolist(), words.tolist(), strict=True):
            if word != end:
                written[row].append(word)
        going = (words != end).nonzero()[:, 0]
        ids = words[going, None]
        if len(going) < len(alive):
            alive, seen, cache = alive[going.cpu()], rows(seen, going), cache.rows(going)
    return Written(written, scores.tolist())


def _next_words(model: Captioning, ids: Tensor, seen: Tokens, cache: Any) -> tuple[Tensor, Any]:
    """As of the model, in float32.

    Raises:
        Failure: If they are not numbers.
    """
    logits, cache = model.next_words(ids, seen, cache)
    if logits.isnan().any():
        raise Failure("the model gives logits of words that are NaN: its weights are at fault")
    return logits.float(), cache


def nucleus(logits: Tensor, draws: Tensor, share: float, temperature: float = 1.0) -> Tensor:
    """One word for each row, drawn among the fewest that have at least ``share`` of the probability.

    Holtzman et al., The curious case of neural text degeneration, 2020, https://arxiv.org/abs/1904.09751.

    Args:
        logits: (B, V).
        draws: (B,) in 0..1, evenly drawn.
        share: In 0..1; 0 is the most probable word, 1 draws among all.
        temperature: Positive; logits are divided by it.

    Returns:
        (B,) int64.
    """
    chances, order = (logits / temperature).softmax(-1).sort(descending=True, stable=True)  # (B, V)
    before = chances.cumsum(-1) - chances  # what the more probable words have
    kept = chances * ((before < share) | (torch.arange(chances.shape[1], device=chances.device) == 0))
    upto = kept.cumsum(-1)
    places = (upto <= draws[:, None] * upto[:, -1:]).sum(-1, keepdim=True)
    places = torch.minimum(places, (kept > 0).sum(-1, keepdim=True) - 1)  # a draw of 1 less one bit, times a sum that was rounded
    return order.gather(1, places)[:, 0]


class _Beams:
    """The captions of B pictures, W of each, that are being written, and the best one of each that has ended."""

    def __init__(self, pictures: int, how: Decoding, device: torch.device) -> None:
        self.how = how
        self.ended: list[tuple[list[int], float]] = [([], -np.inf) for _ in range(pictures)]
        self.alive = list(range(pictures))
        self.scores = torch.full((pictures, how.beams), -torch.inf, device=device)
        self.scores[:, 0] = 0.0  # one beginning, not W equal ones
        self.ids: list[list[list[int]]] = [[[] for _ in range(how.beams)] for _ in range(pictures)]

    def over(self, score: float, length: int) -> float:
        """What a caption of ``length`` ids is compared by."""
        return score / max(length, 1) ** self.how.length_penalty

    def end(self, place: int, ids: list[int], score: float) -> None:
        """A caption of the picture at ``place`` that has come to its end, compared by ``score``."""
        row = self.alive[place]
        if score > self.ended[row][1]:
            self.ended[row] = ids, score

    def hopeless(self, place: int, length: int) -> bool:
        """Whether no caption that goes on from ``length`` ids can be better than the best that has ended.

        Log-probabilities only fall; what they are divided by is at most that of the longest caption, and at least that of the next.
        """
        best = float(self.scores[place, 0])
        reach = max(self.over(best, length + 1), self.over(best, self.how.longest))
        return reach <= self.ended[self.alive[place]][1]

    def cut(self) -> None:
        """What is as long as may be ends here, without the id that says so."""
        for place in range(len(self.alive)):
            for ids, score in zip(self.ids[place], self.scores[place].tolist(), strict=True):
                self.end(place, ids, self.over(score, self.how.longest))


def _beams(model: Captioning, seen: Tokens, ids: Tensor, how: Decoding, end: int) -> Written:
    """The best caption that W beams of each picture come upon; what ends outside the W best candidates of a step is dropped."""
    beams, width = _Beams(len(ids), how, ids.device), how.beams
    cache: Any = None
    for length in range(how.longest):
        logits, cache = _next_words(model, ids, seen, cache)  # (b, V) at first, (b * W, V) later
        chances = logits.log_softmax(-1)
        if length < how.shortest:
            chances = _without(chances, end)
        if length == 0:
            each = torch.arange(len(ids), device=ids.device).repeat_interleave(width)
            chances, seen, cache = chances[each], rows(seen, each), cache.rows(each)
        chosen, places, parents = _advance(beams, chances, length, end)
        if not places:
            break
        index = torch.tensor([p * width + b for p, some in zip(places, parents, strict=True) for b in some], device=logits.device)
        ids = torch.tensor(chosen, device=logits.device).reshape(-1, 1)
        seen, cache = rows(seen, index), cache.rows(index)
    beams.cut()
    return Written([found for found, _ in beams.ended], [score for _, score in beams.ended])


def _advance(beams: _Beams, chances: Tensor, length: int, end: int) -> tuple[list[list[int]], list[int], list[list[int]]]:
    """Each picture's captions by one word: the words, and which pictures go on, and from which of their captions.

    Args:
        beams: Of b pictures, ``length`` ids each; it is moved on.
        chances: (b * W, V) log-probabilities of the next word.
        length: Ids so far.
        end: The id that ends a caption.
    """
    width, words = beams.how.beams, chances.shape[1]
    total = (beams.scores[:, :, None] + chances.reshape(-1, width, words)).flatten(1)  # (b, W * V)
    best = total.topk(min(2 * width, total.shape[1]))  # each caption ends once: W of 2 W go on
    chosen, places, parents, kept, texts = [], [], [], [], []
    for place, (scores, at) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
        goes: list[tuple[float, int, int]] = []
        for rank, (score, cell) in enumerate(zip(scores, at, strict=True)):
            parent, word = divmod(cell, words)
            if word != end:
                goes.append((score, parent, word))
            elif rank < width and score > -np.inf:
                beams.end(place, beams.ids[place][parent], beams.over(score, length + 1))
        goes = (goes + [(-np.inf, 0, end)] * width)[:width]  # of a vocabulary smaller than W
        beams.scores[place] = torch.tensor([score for score, _, _ in goes])
        if goes[0][0] > -np.inf and not beams.hopeless(place, length + 1):
            places.append(place)
            chosen.append([word for _, _, word in goes])
            parents.append([parent for _, parent, _ in goes])
            texts.append([[*beams.ids[place][parent], word] for _, parent, word in goes])
            kept.append(beams.scores[place])
    beams.alive = [beams.alive[place] for place in places]
    beams.ids = texts
    beams.scores = torch.stack(kept) if kept else beams.scores[:0]
    return chosen, places, parents


def _without(scores: Tensor, word: int) -> Tensor:
    """(B, V) with -inf for one word."""
    scores = scores.clone()
    scores[:, word] = -torch.inf
    return scores


@torch.no_grad()
def likelihoods(
    model: Captioning, seen: Tokens, texts: Sequence[Sequence[int]], *, prompt: Sequence[int] = (), smoothing: float = 0.0
) -> Tensor:
    """The log-probability of each text, one for each picture, word by word given those before it.

    Args:
        model: In eval mode.
        seen: (B, N, D).
        texts: (B) ids of each, the one that ends it included, if it is to count; none is empty.
        prompt: Ids before them, after the model's own, which do not count.
        smoothing: Share of the target that lies evenly on all words, as losses with label smoothing have it.

    Returns:
        (B,) float32.
    """
    if not texts:
        return torch.zeros(0)
    device = seen.tokens.device
    longest = max(map(len, texts))
    padded = torch.tensor([[*text, *([text[-1]] * (longest - len(text)))] for text in texts], device=device)  # (B, T)
    lengths = torch.tensor([len(text) for text in texts], device=device)
    ids = torch.tensor([[*model.prompt, *prompt]] * len(texts), device=device)
    total = torch.zeros(len(texts), device=device)
    cache: Any = None
    for step in range(longest):
        logits, cache = _next_words(model, ids, seen, cache)
        chances = logits.log_softmax(-1)
        ids = padded[:, step, None]
        own = chances.gather(1, ids)[:, 0]
        found = own if not smoothing else (1 - smoothing) * own + smoothing * chances.mean(-1)
        total += torch.where(step < lengths, found, 0.0)
    return total
