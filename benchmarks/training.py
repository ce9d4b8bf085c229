"""A step in the manner of NoteLLM-2 in plain torch: what the loss costs in training, and that its implementation changes no curve."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo.kernels.contrastive import contrastive_loss
from zoo.measure import time_call

ALPHA = 9.0  # weight of the multimodal output, where the visual one has 1: Zhang et al., NoteLLM-2, 2024
LOG_SCALE = 3.0
CURVE_TOLERANCE = 0.01  # of the loss: bfloat16 carries 8 bits, and the sums differ in their order


class Notes(nn.Module):
    """Features of picture and text to two embeddings of a note, in the place of the encoder and the language model."""

    def __init__(self, *, features: int, width: int, layers: int, dim: int) -> None:
        super().__init__()
        self.look, self.read = nn.Linear(features, width), nn.Linear(features, width)
        self.trunk = nn.Sequential(*(_Block(width) for _ in range(layers)))
        self.visual, self.multimodal = nn.Linear(width, dim), nn.Linear(width, dim)
        self.log_scale = nn.Parameter(torch.tensor(LOG_SCALE))

    def forward(self, picture: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """(2B, features) of each to the embeddings, (2B, dim) of each."""
        seen = self.look(picture)
        return self.visual(self.trunk(seen)), self.multimodal(self.trunk(seen + self.read(text)))


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def train(
    impl: Literal["auto", "reference", "chunked", "triton"], pairs: int, *, steps: int, device: str, tiny: bool = False
) -> dict[str, Any]:
    """Steps of AdamW over planted pairs: seconds and bytes of a step, and the curve.

    Args:
        impl: Of the loss.
        pairs: B; the loss contrasts 2B rows, for each of the two outputs.
        steps: At least 2; the first is not timed.
        device: "cpu" or "cuda".
        tiny: Widths of a test.
    """
    torch.manual_seed(0)
    features, width, layers, dim = (16, 16, 1, 8) if tiny else (1024, 2048, 4, 1024)
    model = Notes(features=features, width=width, layers=layers, dim=dim).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    partner = (torch.arange(2 * pairs, device=device) + pairs) % (2 * pairs)
    batches = _batches(pairs, features, device)
    losses, seconds = [], []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(steps):
        picture, text = next(batches)

        def step(picture: Tensor = picture, text: Tensor = text) -> None:
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16):
                outputs = model(picture, text)
            scale = model.log_scale.exp()
            visual, multimodal = (
                contrastive_loss(e, scale=scale, positive=partner, direction="rows", normalize=True, impl=impl, validate=False)
                for e in outputs
            )
            loss = (visual + ALPHA * multimodal) / (1 + ALPHA)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())

        seconds.append(time_call(step, device))
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return {
        "impl": impl,
        "pairs": pairs,
        "seconds": statistics.median(seconds[1:]),
        "peak_bytes": peak,
        "losses": [float(loss) for loss in losses],
    }


def _batches(pairs: int, features: int, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Pictures and texts of 2B notes; the two of a pair share what they are about. Made ahead of the step, rotated."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def one() -> Tensor:
        about = draw(pairs, features).repeat(2, 1)
        return (about + draw(2 * pairs, features)) / math.sqrt(2)

    kept = [(one(), one()) for _ in range(2)]
    while True:
        yield from kept


def curves_agree(runs: list[dict[str, Any]]) -> bool:
    """Whether all runs of the same size have the first one's losses, within `CURVE_TOLERANCE` of them."""
    first = runs[0]["losses"]
    return all(math.isclose(a, b, rel_tol=CURVE_TOLERANCE) for run in runs for a, b in zip(first, run["losses"], strict=True))
