"""Masked data modelling: words of texts and patches of pictures are hidden, alone or beside each other, and the model fills them in."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.abilities import Filling, Tokenizing
from zoo.block_masks import block_masks
from zoo.config import Fraction, Positive
from zoo.errors import ZooError
from zoo.freeze import freeze
from zoo.hub import ABOUT, load
from zoo.objectives._shared import Shared, wide
from zoo.pixels import Pixels, pixels_of, repainted
from zoo.registry import register
from zoo.shown import Kind, Needs
from zoo.types import Batch, Loss, ModalityInputs, ModelOutput
from zoo.word_masks import choose, hide, words_in

logger = logging.getLogger("zoo.objectives")
KINDS: dict[
    Kind, tuple[bool, bool]
] = {  # of rows, in the order in which it is drawn what they hide: whether there is a picture, and a text
    "text": (False, True),
    "image": (True, False),
    "pair": (True, True),
}


class _Told(NamedTuple):
    """What was hidden of rows of one kind, of words or of patches."""

    logits: Tensor  # (n, V) or (n, codes)
    right: Tensor  # (n,) int64
    share: Tensor  # () of all that could have been hidden


@register("objective", "mdm", paper="Wang et al., BEiT-3, 2022, https://arxiv.org/abs/2208.10442")
class Mdm(nn.Module):
    """Mean cross entropy of hidden words plus mean cross entropy of hidden patches, over texts, pictures and pairs in one batch.

    Rows are told apart by what they have. Words are hidden as in `mlm`, each on its own with the share below; patches in blocks, as
    `zoo.block_masks.block_masks` says, the share rounded to a count. A word is told from the vocabulary, a patch from the ids that a frozen
    visual tokenizer gives it (Peng et al., BEiT v2, 2022, https://arxiv.org/abs/2208.06366), which sees the whole picture with the
    model's own pixels, of the size and colours that it was trained with. The code of BEiT-3's pre-training is not released: that both
    means weigh the same, and are of all kinds of rows together, is decided here.

    Args:
        text: Share of the words of a text without a picture; 0 leaves out such rows.
        image: Share of the patches of a picture without a text; likewise.
        pair_text: Share of the words of a pair.
        pair_image: Share of the patches of a pair.
        whole_words: All pieces of a word are chosen together.
        least: Area of the smallest block, in patches: 4, or 16 as BEiT wrote.
        tokenizer: The folder of a trained model ``visual_tokenizer``; needed where patches are hidden.

    Raises:
        ZooError: If nothing is hidden, or patches and nobody says what they are told from.
    """

    tokenizer: Any  # nn.Module alone says nothing of what it has

    def __init__(
        self,
        *,
        text: Fraction = 0.15,
        image: Fraction = 0.4,
        pair_text: Fraction = 0.5,
        pair_image: Fraction = 0.4,
        whole_words: bool = False,
        least: Positive = 4,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__()
        self.rates: dict[Kind, tuple[float, float]] = {  # of patches, of words
            "text": (0.0, text),
            "image": (image, 0.0),
            "pair": (pair_image, pair_text),
        }
        if not any(max(rates) for rates in self.rates.values()):
            raise ZooError("mdm: nothing is hidden, so nothing is learned: write a share above 0, such as text: 0.15")
        if self._sees and tokenizer is None:
            raise ZooError(
                "mdm.tokenizer: hidden patches are told from visual tokens: name the folder of a trained one, as zoo train "
                "visual_tokenizer/emoji leaves it, or write image: 0, pair_image: 0"
            )
        self.whole_words, self.least, self.folder = whole_words, least, tokenizer
        self.register_module("tokenizer", None)
        self.pixels: tuple[Pixels, Pixels] | None = None  # the model's, the tokenizer's

    @property
    def needs_twin(self) -> bool:
        """It needs none."""
        return False

    @property
    def learns_from(self) -> Needs:
        """Rows of which something is hidden."""
        return {"mdm": tuple(kind for kind, rates in self.rates.items() if max(rates))}

    @property
    def _sees(self) -> bool:
        """Whether patches are hidden."""
        return any(patches for patches, _ in self.rates.values())

    def bind(self, model: Any) -> None:
        """Check that the model fills in what will be hidden, and read the tokenizer.

        Raises:
            ZooError: If it does not, its vocabulary has no mask, or the tokenizer is none or does not fit it.
        """
        if not isinstance(model, Filling):
            raise ZooError("mdm hides words and patches for the model to fill in, and this one fills in none: write vlmo or beit_3")
        if any(words for _, words in self.rates.values()) and model.vocabulary.roles["mask"] is None:  # type: ignore[attr-defined]
            raise ZooError("mdm hides words behind a mask, and this model's vocabulary has none: write another model.vocabulary")
        if not self._sees:
            return
        tokenizer = self._read()
        if tokenizer is None:
            self.tokenizer = _Nobody(model.grid)
            return
        if model.codes != tokenizer.codes:
            raise ZooError(
                f"mdm.tokenizer: {self.folder} tells {tokenizer.codes} visual tokens apart, and the model {model.codes}: write "
                f"model.codes: {tokenizer.codes}"
            )
        if tuple(model.grid) != tuple(tokenizer.grid):
            raise ZooError(
                f"mdm.tokenizer: {self.folder} cuts a picture into {_times(tokenizer.grid)} patches, and the model into "
                f"{_times(model.grid)}: write a model.image_size that gives as many, or train a tokenizer that does"
            )
        self.pixels = (
            pixels_of(model.processor.config()["image"], "mdm: the model"),  # type: ignore[attr-defined]
            pixels_of(tokenizer.processor.config()["image"], f"mdm.tokenizer: {self.folder}"),
        )
        tokenizer.trim()
        self.tokenizer = tokenizer
        freeze(self.tokenizer)

    def forward(self, model: Any, batch: Batch) -> Loss:
        """The loss; parts as of `term`.

        Raises:
            ZooError: If patches are hidden and it was bound to no model.
        """
        total, parts, state = self.term(model, batch, Shared(ModelOutput({}), None, None, {}))  # no pass without masks is needed
        return Loss(total, parts, state)

    def term(self, model: Any, batch: Batch, shared: Shared) -> tuple[Tensor, dict[str, Tensor], Any]:
        """As `zoo.objectives._shared.Term`.

        Parts: ``loss_words`` and ``loss_patches``; ``filled`` and ``told``, the shares of hidden words and patches that were found; and
        ``share_text``, ``share_image``, ``share_pair_text``, ``share_pair_image``, of what there was how much was hidden, 0 of nothing.

        Raises:
            ZooError: If patches are hidden and it was bound to no model.
        """
        if self._sees and self.tokenizer is None:
            raise ZooError("mdm.tokenizer: it is not read yet: call bind(model) before the first batch")
        like = next(p for p in model.parameters() if p.requires_grad)
        words: dict[str, _Told] = {}
        patches: dict[str, _Told] = {}
        for kind, which in _rows(batch).items():
            if max(self.rates[kind]) and bool(which.any()):
                inputs = {name: x.rows(which)._replace(present=None) for name, x in batch.inputs.items()}
                self._ask(model, kind, inputs, words, patches)
        of_words, filled = _mean([*words.values()], like)
        of_patches, told = _mean([*patches.values()], like)
        parts = {"loss_words": of_words.detach(), "loss_patches": of_patches.detach(), "filled": filled, "told": told}
        for name, found in {
            "text": words.get("text"),
            "image": patches.get("image"),
            "pair_text": words.get("pair"),
            "pair_image": patches.get("pair"),
        }.items():
            parts[f"share_{name}"] = of_words.new_zeros(()) if found is None else found.share
        return of_words + of_patches, parts, None

    def before_step(self, model: Any) -> None:
        """Nothing: it has no state that moves."""

    def after_step(self, model: Any, state: Any) -> None:
        """Nothing, likewise."""

    def _read(self) -> Tokenizing | None:
        """The tokenizer; None where it is not there, and nothing else has weights either."""
        assert self.folder is not None
        if torch.get_default_device().type == "meta" and not Path(self.folder).exists():
            logger.warning("mdm.tokenizer: there is no %s yet: shapes and memory here are without it", self.folder)
            return None
        try:
            with torch.device("cpu"):  # it has weights whatever is done with those of the model
                found = load(self.folder)
        except ZooError as e:
            if (Path(self.folder) / ABOUT).exists():
                raise type(e)(f"mdm.tokenizer: {e}") from e
            of = Path(self.folder).parts  # runs/visual_tokenizer/emoji is what visual_tokenizer/emoji leaves
            recipe = f"visual_tokenizer/{of[2]}" if of[:2] == ("runs", "visual_tokenizer") and len(of) == 3 else "visual_tokenizer/emoji"
            raise type(e)(f"mdm.tokenizer: {e}; train one first: zoo train {recipe}") from e
        if not isinstance(found, Tokenizing):
            raise ZooError(f"mdm.tokenizer: {self.folder} holds a {type(found).__name__}, and patches are told by a visual_tokenizer")
        if not found.trained:
            raise ZooError(f"mdm.tokenizer: nothing was trained in {self.folder}: its ids would mean nothing")
        return found

    def _ask(
        self, model: Any, kind: Kind, inputs: Mapping[str, ModalityInputs], words: dict[str, _Told], patches: dict[str, _Told]
    ) -> None:
        """Hide something of rows of one kind, and put what the model says of it into ``words`` and ``patches``."""
        hides_patches, hides_words = self.rates[kind]
        has_image, has_text = KINDS[kind]
        image, text = inputs["image"] if has_image else None, inputs["text"] if has_text else None
        chosen, hidden, masked = None, None, text
        if text is not None and hides_words:
            chosen = choose(text, model.vocabulary, hides_words, self.whole_words)
            masked = text._replace(values=hide(text.values, chosen, model.vocabulary))
        if image is not None and hides_patches:
            many = model.grid[0] * model.grid[1]
            count = max(1, int(hides_patches * many + 0.5))
            hidden = block_masks(len(image.values), model.grid, count, least=self.least).to(image.values.device)
        of_words, of_patches = model.fill(image, hidden, masked, chosen)
        if text is not None and chosen is not None:
            share = chosen.sum() / words_in(text, model.vocabulary).sum().clamp(min=1)
            words[kind] = _Told(wide(of_words), text.values[chosen], share)
        if image is not None and hidden is not None:
            patches[kind] = _Told(wide(of_patches), self._ids(image)[hidden], hidden.float().mean())

    def _ids(self, image: ModalityInputs) -> Tensor:
        """(B, P) int64, the visual tokens of pictures that were prepared for the model."""
        self.tokenizer.eval()  # the hook of `freeze` runs where a module is called, and ``ids`` does not call it
        if self.pixels is None:
            return self.tokenizer.ids(image)
        with torch.no_grad(), torch.autocast(image.values.device.type, enabled=False):
            return self.tokenizer.ids(image._replace(values=repainted(image.values.float(), *self.pixels)))


class _Nobody(nn.Module):
    """Stands for a tokenizer where nothing has a value."""

    def __init__(self, grid: tuple[int, int]) -> None:
        super().__init__()
        self.patches = grid[0] * grid[1]

    def ids(self, image: ModalityInputs) -> Tensor:
        """(B, P) zeros."""
        return torch.zeros(len(image.values), self.patches, dtype=torch.int64, device=image.values.device)


def _rows(batch: Batch) -> dict[Kind, Tensor]:
    """(B,) bool of each kind."""
    if not batch.inputs:
        return {}
    one = next(iter(batch.inputs.values())).values
    nobody = torch.zeros(len(one), dtype=torch.bool, device=one.device)
    there = {}
    for name in ("image", "text"):
        x = batch.inputs.get(name)
        there[name] = nobody if x is None else ~nobody if x.present is None else x.present
    return {kind: (there["image"] == has[0]) & (there["text"] == has[1]) for kind, has in KINDS.items()}


def _mean(told: list[_Told], like: Tensor) -> tuple[Tensor, Tensor]:
    """() mean cross entropy over all that was hidden, and () the share of it that was found; 0 of nothing, in the graph of ``like``."""
    if not told:
        return wide(like).flatten()[0] * 0, wide(like).new_zeros(())
    logits, right = torch.cat([t.logits for t in told]), torch.cat([t.right for t in told])
    of = max(len(right), 1)
    found = (logits.argmax(1) == right).to(logits.dtype).sum().detach() / of
    return F.cross_entropy(logits, right, reduction="sum") / of, found


def _times(grid: tuple[int, int]) -> str:
    return f"{grid[0]} x {grid[1]}"
