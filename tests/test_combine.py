"""What is particular to each combine plug-in, worked by hand; what all of them must keep stands in test_contracts_fusion.py."""

import pytest
import torch
from torch import Tensor, nn

from zoo import make

ROWS, DIM = 8, 5
NAMES = ["note", "image", "audio"]


def combine(name: str, count: int) -> nn.Module:
    return make("fusion", name, NAMES[:count], DIM)


def inputs(count: int) -> dict[str, Tensor]:
    return {name: torch.randn(ROWS, DIM) for name in NAMES[:count]}


def everyone(count: int) -> dict[str, Tensor]:
    return {name: torch.ones(ROWS, dtype=torch.bool) for name in NAMES[:count]}


def some() -> dict[str, Tensor]:
    """Row i lacks the modalities whose bits i has: every subset, from all of them to nothing."""
    return {name: (torch.arange(ROWS) >> bit) % 2 == 0 for bit, name in enumerate(NAMES)}


class TestGatedLate:
    def test_zero_weights_give_the_mean(self):
        module, x = make("fusion", "gated_late", NAMES[:2], DIM), inputs(2)
        nn.init.zeros_(module.gates[0].weight)
        torch.testing.assert_close(module(x, everyone(2)), (x["note"] + x["image"]) / 2)

    def test_swapped_operands_are_the_same_class_of_functions(self):
        ours, papers = (make("fusion", "gated_late", order, DIM) for order in (["note", "image"], ["image", "note"]))
        note, image = ours.gates[0].weight.detach().chunk(2, dim=1)
        papers.load_state_dict({"gates.0.weight": -torch.cat([image, note], dim=1)})
        x = inputs(2)
        torch.testing.assert_close(papers(x, everyone(2)), ours(x, everyone(2)))

    def test_what_is_alone_is_left_as_it_is(self):
        module, x = combine("gated_late", 3), inputs(3)
        for k in NAMES:
            assert torch.equal(module(x, {j: torch.full((ROWS,), j == k) for j in NAMES}), x[k])

    def test_names_are_mixed_in_one_after_the_other(self):
        module, x = combine("gated_late", 3), inputs(3)
        note, image, audio = x.values()
        first, second = module.gates

        def mix(gate, a, b):
            z = torch.sigmoid(gate(torch.cat([a, b], dim=1)))
            return z * a + (1 - z) * b

        torch.testing.assert_close(module(x, everyone(3)), mix(second, mix(first, note, image), audio))
        without_note = everyone(3) | {"note": torch.zeros(ROWS).bool()}
        torch.testing.assert_close(module(x, without_note), mix(second, image, audio))

    def test_initial_weights_and_bias(self):
        gate = make("fusion", "gated_late", ["note", "image"], 256).gates[0]
        assert gate.bias is None
        assert gate.weight.std().item() == pytest.approx((2 / (3 * 256)) ** 0.5, rel=0.01)
        assert make("fusion", {"name": "gated_late", "bias": True}, ["note", "image"], DIM).gates[0].bias is not None


class TestOthers:
    def test_sum_and_attention_at_the_start(self):
        x, present = inputs(3), some()
        total = sum(v.masked_fill(~present[k][:, None], 0) for k, v in x.items())
        count = sum(present.values()).clamp(min=1)[:, None]
        torch.testing.assert_close(make("fusion", "sum", NAMES, DIM)(x, present), total)
        torch.testing.assert_close(make("fusion", "attention", NAMES, DIM)(x, present), total / count)

    def test_attention_prefers_what_resembles_its_query(self):
        module = make("fusion", "attention", ["note", "image"], 4)
        x = {"note": torch.eye(4)[:1], "image": torch.eye(4)[1:2]}
        with torch.no_grad():
            module.query.copy_(torch.tensor([2.0, 0, 0, 0]))
        weight = torch.tensor([1.0, 0.0]).softmax(0)  # <query, note> / sqrt(4) = 1
        expected = torch.tensor([[weight[0], weight[1], 0, 0]])
        torch.testing.assert_close(module(x, {k: torch.ones(1).bool() for k in x}), expected)

    def test_film(self):
        module, x = combine("film", 2), inputs(2)
        scale, shift = module.conditions[0](x["image"]).chunk(2, dim=1)
        torch.testing.assert_close(module(x, everyone(2)), (1 + scale) * x["note"] + shift)
        nobody_else = everyone(2) | {"image": torch.zeros(ROWS).bool()}
        assert torch.equal(module(x, nobody_else), x["note"])

    def test_bigated(self):
        module, x = combine("bigated", 2), inputs(2)
        (a, b), (gate_a, gate_b) = module.values, module.gates
        note, image = x["note"], x["image"]
        expected = a(note) * torch.sigmoid(gate_b(image)) + b(image) * torch.sigmoid(gate_a(note))
        torch.testing.assert_close(module(x, everyone(2)), expected)
        alone = everyone(2) | {"image": torch.zeros(ROWS).bool()}
        torch.testing.assert_close(module(x, alone), a(note))

    def test_bigated_with_one_of_three_absent_is_bigated_of_two(self):
        three, two, x = combine("bigated", 3), combine("bigated", 2), inputs(3)
        two.load_state_dict({key: three.state_dict()[key] for key in two.state_dict()})
        without_audio = everyone(3) | {"audio": torch.zeros(ROWS).bool()}
        torch.testing.assert_close(three(x, without_audio), two(x, everyone(2)))

    def test_concat(self):
        module, x = combine("concat", 2), inputs(2)
        expected = torch.cat([x["note"], x["image"]], dim=1) @ module.project.weight.T + module.project.bias
        torch.testing.assert_close(module(x, everyone(2)), expected)
