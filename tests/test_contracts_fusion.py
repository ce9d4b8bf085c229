"""What every fusion must keep, whoever wrote it: the lists are what the registry finds, so a new file is tested on arrival."""

import pickle
import re
from itertools import product

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zoo import build, make, names, registry
from zoo.block import BANKED
from zoo.collate import processed, stack
from zoo.errors import ZooError
from zoo.fusions.joint import Joint
from zoo.joints import Merging, Parts, Phase, Segment, Words, banks_of
from zoo.registry import entry, register
from zoo.trunk import Shape, Trunk
from zoo.types import Batch, ModalityInputs

ROWS, DIM = 8, 5
NAMES = ["note", "image", "audio"]
WORDS = Words(note="note:", compress=", in one word: “", close="”. ", comma=",", stop=". ", keys={"title": "title", "image": "image"})


def filling(joint: str) -> list[str]:
    """The fusions that fill ``joint`` themselves."""
    return [name for name in names("fusion") if entry("fusion", name).joints.get(joint, "another") is None]


COMBINE, ARRANGE, SCHEDULE, TRUNK = filling("combine"), filling("arrange"), filling("schedule"), filling("trunk")
combines = pytest.mark.parametrize("name", COMBINE)
several = pytest.mark.parametrize("count", [1, 2, 3])


def combine(name: str, count: int) -> nn.Module:
    """Made as a model makes it; parameters that start at zero are moved off it, where they would hide a broken gradient."""
    torch.manual_seed(0)
    module = make("fusion", name, NAMES[:count], DIM)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def inputs(count: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {name: torch.randn(ROWS, DIM).to(dtype).requires_grad_() for name in NAMES[:count]}


def everyone(count: int) -> dict[str, Tensor]:
    return {name: torch.ones(ROWS, dtype=torch.bool) for name in NAMES[:count]}


def some(count: int) -> dict[str, Tensor]:
    """Row i lacks the modalities whose bits i has: every subset, from all of them to nothing."""
    return {name: (torch.arange(ROWS) >> bit) % 2 == 0 for bit, name in enumerate(NAMES[:count])}


def test_the_lists_are_not_empty():
    assert {"gated_late", "concat", "sum", "film", "bigated", "attention"} <= set(COMBINE)
    assert {"early", "micl", "text_only"} <= set(ARRANGE)
    assert "joint" in SCHEDULE
    assert "cross_attention" in TRUNK


@pytest.mark.parametrize("name", names("fusion"))
def test_every_fusion_says_what_it_is(name):
    known = entry("fusion", name)
    assert known.joints
    assert known.summary.endswith(".")


def test_a_fusion_of_a_test_is_found_and_does_not_leak(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(registry._known, "entries", dict(registry._known.entries))

        @register("fusion", "of_a_test", joints=("combine",))
        class OfATest(nn.Module):
            """The first vector."""

        assert "of_a_test" in filling("combine")
    assert "of_a_test" not in names("fusion")


class TestCombine:
    @combines
    @several
    def test_shape_and_determinism(self, name, count):
        module, x = combine(name, count).eval(), inputs(count)
        out = module(x, everyone(count))
        assert out.shape == (ROWS, DIM)
        assert out.dtype == torch.float32
        assert torch.equal(out, module(x, everyone(count)))

    @combines
    @several
    def test_rows_do_not_see_each_other(self, name, count):
        module, x, present = combine(name, count).eval(), inputs(count), some(count)
        order = torch.arange(ROWS).flip(0)
        flipped = module({k: v[order] for k, v in x.items()}, {k: v[order] for k, v in present.items()})
        torch.testing.assert_close(flipped, module(x, present)[order])
        one = module({k: v[:1] for k, v in x.items()}, {k: v[:1] for k, v in present.items()})
        torch.testing.assert_close(one, module(x, present)[:1])

    @combines
    @several
    def test_absent_vectors_have_no_influence(self, name, count):
        module, x, present = combine(name, count).eval(), inputs(count), some(count)
        plain = module(x, present)
        for filler in (0.0, 1e6, torch.inf, torch.nan):
            filled = {k: v.detach().masked_fill(~present[k][:, None], filler) for k, v in x.items()}
            assert torch.equal(module(filled, present), plain)

    @combines
    @several
    def test_absent_vectors_get_no_gradient_even_where_they_are_nan(self, name, count):
        module, present = combine(name, count), some(count)
        x = {k: v.detach().masked_fill(~present[k][:, None], torch.nan).requires_grad_() for k, v in inputs(count).items()}
        module(x, present).square().sum().backward()
        for k, v in x.items():
            assert torch.equal(v.grad[~present[k]], torch.zeros(int((~present[k]).sum()), DIM))
            assert bool(v.grad.isfinite().all())
        assert all(p.grad.isfinite().all() for p in module.parameters())

    @combines
    @several
    def test_nothing_there_gives_zeros(self, name, count):
        nobody = {k: ~v for k, v in everyone(count).items()}
        assert torch.equal(combine(name, count)(inputs(count), nobody), torch.zeros(ROWS, DIM))

    @combines
    @several
    def test_gradient_reaches_every_modality(self, name, count):
        module, x = combine(name, count), inputs(count)
        module(x, everyone(count)).square().sum().backward()
        assert all(bool(v.grad.any(1).all()) for v in x.values())

    @combines
    @pytest.mark.parametrize("count", [2, 3])
    def test_gradient_reaches_every_parameter(self, name, count):
        module = combine(name, count)
        module(inputs(count), everyone(count)).square().sum().backward()
        assert [key for key, p in module.named_parameters() if p.grad is None or not p.grad.any()] == []

    @combines
    @several
    def test_each_modality_alone_gets_through(self, name, count):
        for k in NAMES[:count]:
            x, only = inputs(count), {j: torch.full((ROWS,), j == k) for j in NAMES[:count]}
            out = combine(name, count)(x, only)
            out.square().sum().backward()
            assert bool(out.any(1).all())

    @combines
    def test_save_and_load(self, name, tmp_path):
        module, x, present = combine(name, 3).eval(), inputs(3), some(3)
        save_file(module.state_dict(), tmp_path / "weights.safetensors")
        again = make("fusion", name, NAMES, DIM).eval()
        again.load_state_dict(load_file(tmp_path / "weights.safetensors"))
        assert torch.equal(again(x, present), module(x, present))

    @combines
    @several
    def test_bfloat16(self, name, count):
        module, x, present = combine(name, count), inputs(count, torch.bfloat16), some(count)
        exact = module(x={k: v.float() for k, v in x.items()}, present=present)
        out = module.bfloat16()(x, present)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), exact, rtol=0.05, atol=0.05)  # 2^-8 a rounding, a few in a row
        out.float().square().sum().backward()
        assert all(bool(v.grad.isfinite().all()) for v in x.values())

    @combines
    @several
    def test_autocast(self, name, count):
        module, x, present = combine(name, count), inputs(count), some(count)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = module(x, present)
        torch.testing.assert_close(out.float(), module(x, present), rtol=0.05, atol=0.05)

    @combines
    def test_compiles_into_one_graph(self, name):
        torch.compiler.reset()
        check_compiled(name, "aot_eager")

    @pytest.mark.slow  # the C++ compiler takes its time
    def test_inductor(self):
        torch.compiler.reset()
        check_compiled("gated_late", "inductor")


def check_compiled(name: str, backend: str) -> None:
    module, x, present = combine(name, 3), inputs(3), some(3)
    plain = module(x, present)
    out = torch.compile(module, fullgraph=True, backend=backend)(x, present)
    torch.testing.assert_close(out, plain)
    ours, theirs = (torch.autograd.grad(o.square().sum(), list(x.values())) for o in (out, plain))
    torch.testing.assert_close(ours, theirs)


arranges = pytest.mark.parametrize("name", ARRANGE)
TEXT, IMAGE = {"title": "shoes", "content": "red"}, ("image",)
PARTS = [Parts(fields, media, WORDS) for fields, media in product((TEXT, {}), (IMAGE, ())) if fields or media]


class TestArrange:
    @arranges
    @pytest.mark.parametrize("parts", PARTS)
    def test_strings_in_segments_out(self, name, parts):
        plugin = make("fusion", name)
        segments = plugin(parts)
        assert segments
        assert all(isinstance(s, Segment) for s in segments)
        assert all(bool(s.text) + (s.media is not None) + (s.role is not None) <= 1 for s in segments)
        assert plugin(parts) == segments

    @arranges
    @pytest.mark.parametrize("parts", PARTS)
    def test_anchors(self, name, parts):
        plugin = make("fusion", name)
        found = [s.anchor for s in plugin(parts) if s.anchor is not None]
        assert len(found) == len(set(found))
        assert set(found) <= set(plugin.anchors)
        assert plugin.anchors[0] in found
        assert all(s.text and s.keep for s in plugin(parts) if s.anchor is not None)

    @arranges
    def test_every_declared_anchor_is_read_where_everything_is_there(self, name):
        plugin = make("fusion", name)
        assert {s.anchor for s in plugin(Parts(TEXT, IMAGE, WORDS))} - {None} == set(plugin.anchors)

    @pytest.mark.parametrize("parts", PARTS)
    def test_only_micl_reads_the_image_and_only_where_there_is_one(self, parts):
        expected = ["visual", "note"] if parts.media else ["note"]
        assert [s.anchor for s in make("fusion", "micl")(parts) if s.anchor is not None] == expected
        assert [s.anchor for s in make("fusion", "early")(parts) if s.anchor is not None] == ["note"]

    @arranges
    @pytest.mark.parametrize("parts", PARTS)
    def test_media_stand_where_they_are_and_nowhere_else(self, name, parts):
        plugin = make("fusion", name)
        segments = plugin(parts)
        assert [s.media for s in segments if s.media is not None] == (list(parts.media) if plugin.media else [])
        text = "".join(s.text for s in segments)
        assert ("image" in text) == (plugin.media and "image" in parts.media)
        assert all(value in text for value in parts.fields.values())

    @arranges
    def test_travels_to_the_workers(self, name):
        parts = Parts(TEXT, IMAGE, WORDS)
        plugin = make("fusion", name)
        again = pickle.loads(pickle.dumps(plugin))
        assert again(parts) == plugin(parts)
        assert (again.anchors, again.media) == (plugin.anchors, plugin.media)


trunks = pytest.mark.parametrize("name", TRUNK)


class TestTrunk:
    @trunks
    def test_decides_for_every_block(self, name):
        plugin = make("fusion", name, 6, 3)
        assert set(plugin.banks) <= {*BANKED, "norm"}
        assert all(isinstance(plugin(kind, layer), str) for kind in NAMES for layer in range(6))
        assert all(isinstance(plugin.reads(layer), bool) for layer in range(6))
        again = pickle.loads(pickle.dumps(plugin))
        assert [again.reads(layer) for layer in range(6)] == [plugin.reads(layer) for layer in range(6)]

    @trunks
    def test_its_blocks_can_be_built_and_run(self, name):
        plugin = make("fusion", name, 2, 1)
        banks = banks_of(plugin, lambda _: [(kind, fused) for kind in NAMES for fused in (False, True)])
        reading = [layer for layer in range(2) if plugin.reads(layer)]
        trunk = Trunk(Shape(8, 2), 2, cross_layers=reading, banks=banks, experts=plugin, final_norm=True)
        for fused in (False, True):
            memory = torch.randn(2, 3, 8) if reading else None
            out = trunk(torch.randn(2, 4, 8), route=[("note", 3), ("image", 1)], fused=fused, memory=memory)
            assert out.shape == (2, 4, 8)

    @pytest.mark.parametrize("keywords, first", [({}, 4), ({"from_layer": 0}, 0), ({"from_layer": 6}, 6)])
    def test_mome_has_an_expert_of_pairs_above(self, keywords, first):
        plugin = make("fusion", {"name": "mome", **keywords}, 6, 4)
        for layer in range(6):
            assert plugin("image", layer, fused=True) == ("vl" if layer >= first else "image")
            assert plugin("image", layer) == "image"  # alone it keeps its own everywhere
        banks = banks_of(plugin, lambda layer: [("text", False), ("text", True)])
        assert banks(5) == dict.fromkeys(("norm2", "ffn"), ("text", "vl") if first < 6 else ("text",))

    @pytest.mark.parametrize("name", ["mome", "multiway"])
    def test_there_is_no_block_behind_the_last(self, name):
        with pytest.raises(ZooError, match=f"fusion '{name}': from_layer 7 is none of the 6 blocks: write 0 to 6"):
            make("fusion", {"name": name, "from_layer": 7}, 6, 3)

    @pytest.mark.parametrize("model", ["albef", "blip", "coca"])
    def test_experts_that_begin_alike_change_nothing(self, model):
        """The model with one feed-forward for all, and the one with one for words and one for pairs, of the same weights."""
        plain, experts = build(model), build(model, fusion="mome")
        state = plain.state_dict()
        experts.load_state_dict({name: state[re.sub(r"\.(norm2|ffn)\.(text|vl)\.", r".\1.", name)] for name in experts.state_dict()})
        assert set(experts.state_dict()) != set(state)
        rows = [{"image": Image.new("RGB", (32, 32), colour), "text": text} for colour, text in (("red", "a red heart"), ("blue", "sky"))]
        batch = Batch(stack([processed(plain.processor, row, i) for i, row in enumerate(rows)]))
        ours, theirs = plain.eval()(batch), experts.eval()(batch)
        torch.testing.assert_close(theirs.embeddings["text"], ours.embeddings["text"])
        if model != "albef":
            torch.testing.assert_close(experts.caption(batch.inputs["text"], theirs)[0], plain.caption(batch.inputs["text"], ours)[0])
        if model != "coca":
            scores = []
            for of, out in ((plain, ours), (experts, theirs)):
                scores.append(of.match(of.hold(batch.inputs["text"], out.tokens["text"]), out.tokens["image"]))
            torch.testing.assert_close(*scores)
            scores[1].sum().backward()
            assert any(".ffn.vl." in name and p.grad is not None for name, p in experts.named_parameters())
            assert all(p.grad is None for name, p in experts.named_parameters() if ".ffn.text." in name and model == "blip")

    @pytest.mark.parametrize("keywords, reading", [({}, [4, 5]), ({"from_layer": 0}, [0, 1, 2, 3, 4, 5]), ({"from_layer": 5}, [5])])
    def test_cross_attention_reads_from_one_block_on(self, keywords, reading):
        plugin = make("fusion", {"name": "cross_attention", **keywords}, 6, 4)
        assert [layer for layer in range(6) if plugin.reads(layer)] == reading

    def test_cross_attention_needs_a_block(self):
        with pytest.raises(ZooError, match="fusion 'cross_attention': from_layer 6 is none of the 6 blocks: write 0 to 5"):
            make("fusion", {"name": "cross_attention", "from_layer": 6}, 6, 3)


schedules = pytest.mark.parametrize("name", SCHEDULE)


class TestSchedule:
    @schedules
    def test_phases_and_hooks(self, name):
        schedule, model = make("fusion", name, NAMES, DIM, 2), nn.Linear(3, 2)
        batch = Batch({name: ModalityInputs(torch.zeros(4, 3)) for name in NAMES}, targets=torch.zeros(4, dtype=torch.long))
        phases = list(schedule.phases(batch))
        assert isinstance(schedule, nn.Module)
        assert phases
        assert all(isinstance(phase, Phase) for phase in phases)
        assert schedule.multi_phase or len(phases) == 1
        gradients = {}
        for phase in phases:
            assert phase.batch.inputs.keys() <= set(NAMES)
            assert phase.modalities is None or set(phase.batch.inputs) == set(phase.modalities)
            model(next(iter(phase.batch.inputs.values())).values).sum().backward()
            gradients[phase.name] = {k: p.grad for k, p in model.named_parameters()}
            model.zero_grad()
        if isinstance(schedule, Merging):
            assert all(g.isfinite().all() for g in schedule.merge(gradients).values())

    @schedules
    def test_state_round_trip(self, name):
        schedule = make("fusion", name, NAMES, DIM, 2)
        make("fusion", name, NAMES, DIM, 2).load_state_dict(schedule.state_dict())

    def test_joint_is_one_update_with_everything(self):
        batch = Batch({"text": ModalityInputs(torch.zeros(4, 3))})
        assert not Joint.multi_phase
        assert list(Joint(["text"], 3, 0).phases(batch)) == [Phase("joint", batch)]
