"""The recipe's section of stages, apart from `zoo.init_from`: what a run takes from runs before it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A run whose model gives some of its parts to the model of this recipe, before the first step.

    A stage with a ``recipe`` is trained when its result is not in the cache, and never when it is: the name there is a hash of all that
    decides the weights. A ``folder`` is taken as it is. One of the two is given.

    Attributes:
        recipe: A file, or the name of a shipped recipe, which may name stages of its own.
        folder: Of a saved model: what a run left, or what `zoo convert` made of published weights.
        parts: Modules, by name as in ``freeze``: ``backbone``, ``connector``. Each has the same shape in both models.
        share: Settings, dotted, in which the stage's recipe follows this one: ``data``, ``model.backbone``. Its ``seed`` is its own,
            as that of published weights would be.
        cache: The folder of finished stages.
    """

    recipe: str | None = None
    folder: Path | None = None
    parts: Annotated[tuple[str, ...], Field(min_length=1)]
    share: tuple[str, ...] = ("data",)
    cache: Path = Path("runs/stages")

    @property
    def source(self) -> str:
        """What it is called in messages."""
        return self.recipe if self.recipe is not None else str(self.folder)
