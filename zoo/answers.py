"""Which of a closed list of answers a model gives to a question: ranked by how probable it is that it would write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from zoo.abilities import Captioning
from zoo.errors import Failure, ZooError
from zoo.generation import likelihoods, rows
from zoo.types import LabelledData, Tokens


@runtime_checkable
class AnsweredData(LabelledData, Protocol):
    """Questions that several people answered; a class is an answer, and one row's right class the usual one among them."""

    answers: Sequence[Sequence[str]]  # (N) what people said, two of them at least
    kinds: Sequence[str]  # (N) what reports tell apart, "yes/no"; "" for no kind
    rest: tuple[str, ...]  # classes that stand for all other answers, which no row of split ``train`` has


class Ranked(NamedTuple):
    """The answers that were read to their end, of each question."""

    answers: np.ndarray  # (B, k) int64 places in the list, best first
    scores: np.ndarray  # (B, k) float32


@torch.no_grad()
def rank_answers(
    model: Captioning,
    seen: Tokens,
    answers: Sequence[Sequence[int]],
    *,
    end: int,
    k: int = 128,
    first_word_twice: bool = False,
    smoothing: float = 0.0,
    prompt: Sequence[int] = (),
    batch_size: int = 1024,
) -> Ranked:
    """The k answers whose first word is most probable, by the log-probability of all their words and of the id that ends them.

    As BLIP ranks (Li et al., 2022, https://arxiv.org/abs/2201.12086), whose published numbers have ``smoothing`` 0.1 in it, the label
    smoothing of its loss. With ``first_word_twice`` as ALBEF does (Li et al., 2021, https://arxiv.org/abs/2107.07651), which adds the
    log-probability of the first word again.

    Args:
        model: In eval mode; it goes on from what it sees word by word.
        seen: (B, N, D), what it sees: of answers to questions the states of picture and question.
        answers: (A) the ids of each, without the one that ends it; none is empty.
        end: The id that ends an answer.
        k: Answers that are read to their end; more than there are means all.
        first_word_twice: Whether the first word counts once more.
        smoothing: Share of the target that lies evenly on all words.
        prompt: Ids that answers go on from, after the model's own.
        batch_size: Answers at a time.

    Raises:
        Failure: If the model's logits are not numbers.
        ZooError: If there is no answer, one has no words, or k is not positive.
    """
    if not answers or k < 1:
        raise ZooError(f"{len(answers)} answers, the best {k} of which are wanted: give one or more, and k=1 or more")
    if empty := [i for i, answer in enumerate(answers) if not answer]:
        raise ZooError(f"answer {', '.join(map(str, empty[:5]))} has no words: leave it out")
    first = _first_words(model, seen, prompt)[:, torch.tensor([answer[0] for answer in answers])]  # (B, A)
    kept = first.topk(min(k, len(answers)))  # (B, k)
    count, each = len(seen.tokens), kept.indices.shape[1]
    chosen = kept.indices.flatten().tolist()
    asked = torch.arange(count).repeat_interleave(each).to(seen.tokens.device)
    scores = torch.zeros(len(chosen))
    for at in range(0, len(chosen), batch_size):
        texts = [[*answers[i], end] for i in chosen[at : at + batch_size]]
        own = rows(seen, asked[at : at + batch_size])
        scores[at : at + batch_size] = likelihoods(model, own, texts, prompt=prompt, smoothing=smoothing).cpu()
    total = scores.reshape(count, each) + (kept.values if first_word_twice else 0.0)
    order = total.argsort(dim=1, descending=True, stable=True)
    return Ranked(kept.indices.gather(1, order).numpy(), total.gather(1, order).numpy())


def _first_words(model: Captioning, seen: Tokens, prompt: Sequence[int]) -> Tensor:
    """(B, V) log-probabilities, on the CPU."""
    begins = torch.tensor([[*model.prompt, *prompt]] * len(seen.tokens), device=seen.tokens.device)
    logits, _ = model.next_words(begins, seen, None)
    if logits.isnan().any():
        raise Failure("the model gives logits of words that are NaN: its weights are at fault")
    return logits.float().log_softmax(-1).cpu()
