"""NoteLLM-2's late fusion: a learned gate decides, feature by feature, how much of the image's own vector enters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from zoo.fusions._absent import blanked
from zoo.kernels.gated_fusion import gated_fusion
from zoo.registry import register


@register("fusion", "gated_late", joints=("combine",), paper="Zhang et al., NoteLLM-2, 2024, https://arxiv.org/abs/2405.16789")
class GatedLate(nn.Module):
    """z * a + (1 - z) * b with z = sigmoid(W [a; b]), where a is the first name and b the second.

    The paper writes a = image and b = language model, with a bias in the gate; the released code hands over the language
    model first and has no bias. We follow the code. Both orders are the same class of functions: swap the halves of W and
    negate it. Further names are mixed in one after the other, each through a gate of its own. Where only one of the two is there the
    gate is the identity on it.

    Args:
        names: The modalities; their order is the order of mixing.
        dim: D, width of every vector and of the result.
        bias: Whether the gates have one.
    """

    def __init__(self, names: list[str], dim: int, *, bias: bool = False) -> None:
        super().__init__()
        self.names = names
        gates = [nn.Linear(2 * dim, dim, bias=bias) for _ in names[1:]]
        for gate in gates:
            nn.init.xavier_normal_(gate.weight)
        self.gates = nn.ModuleList(gates)

    def forward(self, x: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """{name: (B, D)} and {name: (B,) bool} to (B, D)."""
        first, *others = blanked(x, present, self.names)
        mixed, there = first, present[self.names[0]]
        for name, other, gate in zip(self.names[1:], others, self.gates, strict=True):
            assert isinstance(gate, nn.Linear), gate  # it holds the parameters, but is not called: what wraps it would be passed by
            both = (there & present[name])[:, None]
            fused = gated_fusion(mixed, other, gate.weight, gate.bias)  # (B, D)
            mixed = torch.where(both, fused, mixed + other)  # of two that are not both there, one is zeros
            there = there | present[name]
        return mixed

    def shares(self, x: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{name: (B, D)}: z for the vectors mixed so far and 1 - z for the next, gate after gate."""
        first, *others = blanked(x, present, self.names)
        mixed, there = first, present[self.names[0]][:, None]
        shares = {self.names[0]: there.expand_as(first).to(first.dtype)}
        for name, other, gate in zip(self.names[1:], others, self.gates, strict=True):
            here = present[name][:, None]
            z = torch.where(there & here, torch.sigmoid(gate(torch.cat([mixed, other], dim=1))), there.to(other.dtype))  # (B, D)
            mixed = z * mixed + torch.where(here, 1 - z, 0) * other
            shares = {k: z * share for k, share in shares.items()} | {name: torch.where(here, 1 - z, 0)}
            there = there | here
        return shares
