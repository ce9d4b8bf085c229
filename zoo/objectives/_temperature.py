"""What cosines are divided by before the softmax: learned as a logarithm or as it is, or fixed."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from zoo.errors import ZooError

Kind = Literal["log_scale", "raw", "fixed"]
BOUNDS = {"log_scale": (0.0, math.log(100)), "raw": (0.001, 0.5)}  # CLIP's, of the logarithm of the scale; ALBEF's, of the temperature


class Temperature(nn.Module):
    """A temperature, asked for as ``scale``, its inverse.

    The parameter is called as its kind, so that weights of the one do not load as the other.

    Args:
        kind: "log_scale": the logarithm of the scale is learned (CLIP). "raw": the temperature is (ALBEF). "fixed": nothing is.
        start: The temperature at first, above 0.
        clamp: Whether what is learned stays inside `BOUNDS`.

    Raises:
        ZooError: If ``start`` is not above 0.
    """

    def __init__(self, kind: Kind, start: float, clamp: bool) -> None:
        super().__init__()
        if not 0 < start < math.inf:
            raise ZooError(f"start: a temperature is above 0 and finite, not {start}: write 0.07")
        self.kind, self.clamp = kind, clamp
        value = torch.tensor(-math.log(start) if kind == "log_scale" else start)
        if kind == "fixed":
            self.register_buffer(kind, value)
        else:
            self.register_parameter(kind, nn.Parameter(value))

    @property
    def scale(self) -> Tensor:
        """() the factor in use. Beyond the bounds a parameter gets the gradient at the bound, or it could never come back."""
        stored: Tensor = self.get_parameter(self.kind) if self.kind != "fixed" else self.get_buffer(self.kind)
        if self.clamp and self.kind != "fixed":
            low, high = BOUNDS[self.kind]
            stored = stored.detach().clamp(low, high) + (stored - stored.detach())
        return stored.exp() if self.kind == "log_scale" else 1 / stored

    @torch.no_grad()
    def bound(self) -> None:
        """Put what is learned back inside the bounds: once after each step of the optimizer."""
        if self.clamp and self.kind != "fixed":
            self.get_parameter(self.kind).clamp_(*BOUNDS[self.kind])
