"""The trunk against BERT, BLIP, CoCa, ViT, BEiT and torch: outputs and gradients, on weights that make every sub-layer count."""

import weakref
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from open_clip.transformer import MultimodalTransformer
from timm.models.beit import Block as BeitBlock
from timm.models.vision_transformer import Block as VitBlock
from torch import Tensor, nn
from transformers import BertConfig, BertModel
from transformers.models.blip.configuration_blip import BlipTextConfig
from transformers.models.blip.modeling_blip_text import BlipTextModel

from zoo.attention import Sight, sight
from zoo.errors import ZooError
from zoo.kernels.expert_linear import expert_linear
from zoo.trunk import Block, Cache, Shape, Trunk

B, N, M, D, HEADS, HIDDEN, WIDE = 3, 7, 5, 16, 2, 24, 20  # rows, places, places of the memory, widths; WIDE is the memory's
PRECISE = {torch.float32: 2e-6, torch.float64: 1e-13}  # on outputs of order 1: some roundings
dtypes = pytest.mark.parametrize("dtype", PRECISE, ids=str)
Weights = dict[str, Tensor]


def heat(module: nn.Module) -> nn.Module:
    """Weights at which no sub-layer is idle: vectors drawn at random, matrices as large as keeps numbers in range."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 0.5 if parameter.ndim < 2 else 1.5 / parameter.shape[-1] ** 0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def tokens(rows: int = B, places: int = N, width: int = D, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, places, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def padded(side: str = "right") -> Tensor:
    """(3, 7) rows of 7, 4 and 1 real places."""
    mask = torch.arange(N) < torch.tensor([7, 4, 1])[:, None]
    return mask if side == "right" else mask.flip(1)


def agree(
    trunk: nn.Module,
    theirs: nn.Module,
    names: Callable[[Mapping[str, Tensor]], Weights],
    run: Callable[[nn.Module, list[Tensor]], Tensor],
    run_theirs: Callable[[nn.Module, list[Tensor]], Tensor],
    inputs: list[Tensor],
    dtype: torch.dtype,
    real: Tensor | None = None,
) -> None:
    """Outputs at real places, and gradients of all inputs and all parameters, are equal.

    Args:
        names: The parameters of ``theirs``, or their gradients, under the names of ``trunk``.
        run: A module and inputs to (B, N, D).
    """
    heat(theirs).to(dtype)
    trunk.to(dtype).eval().load_state_dict(names({k: v.detach() for k, v in theirs.named_parameters()}))
    weight = tokens(seed=9, dtype=dtype) if real is None else tokens(seed=9, dtype=dtype) * real[..., None]
    found = []
    for module, forward in ((trunk, run), (theirs, run_theirs)):
        given = [x.to(dtype).requires_grad_() for x in inputs]
        out = forward(module, given)
        (out * weight).sum().backward()
        found.append((out * (weight != 0), [x.grad for x in given], {k: p.grad for k, p in module.named_parameters()}))
    (out, of_inputs, of_weights), (expected, of_their_inputs, of_their_weights) = found
    torch.testing.assert_close(out, expected, rtol=0, atol=PRECISE[dtype])
    for ours, reference in zip(of_inputs, of_their_inputs, strict=True):
        assert bool(reference.any())
        torch.testing.assert_close(ours, reference, rtol=0, atol=30 * PRECISE[dtype])
    wanted = names(of_their_weights)
    assert wanted.keys() == of_weights.keys()
    for name, ours in of_weights.items():  # sums over rows and places
        torch.testing.assert_close(ours, wanted[name], rtol=0, atol=100 * PRECISE[dtype], msg=lambda m, name=name: f"{name}: {m}")


def fuse(w: Mapping[str, Tensor], *stems: str) -> Weights:
    return {end: torch.cat([w[f"{stem}.{end}"] for stem in stems]) for end in ("weight", "bias")}


def under(stem: str, w: Mapping[str, Tensor]) -> Weights:
    return {f"{stem}.{end}": x for end, x in w.items()}


def of_bert(stem: str, layers: int, bank: str = "") -> Callable[[Mapping[str, Tensor]], Weights]:
    """Names of BERT's and of BLIP's layers."""

    def names(w: Mapping[str, Tensor]) -> Weights:
        ours: Weights = {}
        for i in range(layers):
            a, b = f"{stem}layer.{i}.", f"blocks.{i}."
            self, cross = f"{a}attention.self.", f"{a}crossattention.self."
            ours |= under(f"{b}qkv{bank}", fuse(w, f"{self}query", f"{self}key", f"{self}value"))
            pairs = {"attention.output.dense": f"out{bank}", "attention.output.LayerNorm": f"norm1{bank}"}
            pairs |= {"intermediate.dense": "ffn.fc1", "output.dense": "ffn.fc2", "output.LayerNorm": "norm2"}
            if f"{cross}query.weight" in w:
                ours |= under(f"{b}cross.kv", fuse(w, f"{cross}key", f"{cross}value")) | under(f"{b}cross.q", fuse(w, f"{cross}query"))
                pairs |= {"crossattention.output.dense": "cross.out", "crossattention.output.LayerNorm": "cross.norm"}
            for old, new in pairs.items():
                ours |= under(b + new, fuse(w, a + old))
        return ours

    return names


BERT = Shape(D, HEADS, HIDDEN, norm="post", eps=1e-12)


@dtypes
@pytest.mark.parametrize("side", ["right", "left"])
def test_bert(dtype, side):
    sizes = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": HIDDEN, "vocab_size": 5}
    theirs = BertModel(BertConfig(**sizes, layer_norm_eps=1e-12), add_pooling_layer=False)
    mask = padded(side)

    hidden = torch.zeros(B, 1, 1, N, dtype=dtype).masked_fill(~mask[:, None, None], -1e9)
    agree(
        Trunk(BERT, 2),
        theirs.encoder,
        of_bert("", 2),
        lambda t, x: t(x[0], mask),
        lambda e, x: e(x[0], attention_mask=hidden).last_hidden_state,
        [tokens()],
        dtype,
        mask,
    )


@dtypes
@pytest.mark.parametrize("mode", ["text", "encode", "decode"])
def test_blip(dtype, mode):
    """All three uses of its text model: alone, reading a picture, and writing."""
    sizes = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": HIDDEN, "vocab_size": 5}
    config = BlipTextConfig(**sizes, encoder_hidden_size=WIDE, layer_norm_eps=1e-12, hidden_act="gelu", attention_probs_dropout_prob=0.0)
    theirs = BlipTextModel(config, add_pooling_layer=False)
    theirs.encoder.layer = theirs.encoder.layer if mode != "text" else without_cross(theirs.encoder.layer)
    theirs.embeddings = nn.Identity()
    mask, causal = padded(), mode == "decode"
    inputs = [tokens()] if mode == "text" else [tokens(), tokens(B, M, WIDE, 2)]

    def reference(model, x):
        memory = x[1] if len(x) > 1 else None
        return model(encoder_embeds=x[0], attention_mask=mask, encoder_hidden_states=memory, is_decoder=causal).last_hidden_state

    def ours(trunk, x):
        memory = x[1] if len(x) > 1 else None
        return trunk(x[0], mask, attend="causal" if causal else "all", memory=memory)

    trunk = Trunk(BERT._replace(memory_dim=WIDE), 2, cross_layers=() if mode == "text" else (0, 1))
    agree(trunk, theirs, of_bert("encoder.", 2), ours, reference, inputs, dtype, mask)


def without_cross(layers: nn.ModuleList) -> nn.ModuleList:
    for layer in layers:
        del layer.crossattention
    return layers


def of_torch(w: Mapping[str, Tensor]) -> Weights:
    """Names of one of torch's layers, encoder or decoder."""
    has_cross = "multihead_attn.in_proj_weight" in w
    last = "norm3" if has_cross else "norm2"
    pairs = {"self_attn.out_proj": "out", "norm1": "norm1", "linear1": "ffn.fc1", "linear2": "ffn.fc2", last: "norm2"}
    ours = {f"qkv.{end}": w[f"self_attn.in_proj_{end}"] for end in ("weight", "bias")}
    if has_cross:
        pairs |= {"norm2": "cross.norm", "multihead_attn.out_proj": "cross.out"}
        for end in ("weight", "bias"):
            joined = w[f"multihead_attn.in_proj_{end}"]
            ours |= {f"cross.q.{end}": joined[:D], f"cross.kv.{end}": joined[D:]}
    for old, new in pairs.items():
        ours |= under(new, fuse(w, old))
    return under("blocks.0", ours)


@dtypes
@pytest.mark.parametrize("attend", ["all", "causal"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_torch_encoder_layer(dtype, norm, attend):
    theirs = nn.TransformerEncoderLayer(D, HEADS, HIDDEN, 0.0, "gelu", 1e-5, batch_first=True, norm_first=norm == "pre")
    hidden = torch.ones(N, N).triu(1).bool() if attend == "causal" else None
    mask = padded()
    agree(
        Trunk(Shape(D, HEADS, HIDDEN, norm=norm, eps=1e-5), 1),
        theirs,
        of_torch,
        lambda t, x: t(x[0], mask, attend=attend),
        lambda t, x: t(x[0], hidden, src_key_padding_mask=~mask),
        [tokens()],
        dtype,
        mask,
    )


@dtypes
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_torch_decoder_layer(dtype, norm):
    """Cross-attention between self-attention and feed-forward, with padding on both sides."""
    theirs = nn.TransformerDecoderLayer(D, HEADS, HIDDEN, 0.0, "gelu", 1e-5, batch_first=True, norm_first=norm == "pre")
    hidden, mask, memory_mask = torch.ones(N, N).triu(1).bool(), padded(), torch.arange(M) < torch.tensor([5, 1, 3])[:, None]
    agree(
        Trunk(Shape(D, HEADS, HIDDEN, norm=norm, eps=1e-5), 1, cross_layers=[0]),
        theirs,
        of_torch,
        lambda t, x: t(x[0], mask, attend="causal", memory=x[1], memory_mask=memory_mask),
        lambda t, x: t(x[0], x[1], hidden, tgt_key_padding_mask=~mask, memory_key_padding_mask=~memory_mask),
        [tokens(), tokens(B, M, D, 2)],
        dtype,
        mask,
    )


@dtypes
@pytest.mark.parametrize("scale", [None, 0.1])
def test_open_clip_multimodal_transformer(dtype, scale):
    """CoCa's: a causal block, then one that reads the picture, each with a feed-forward."""
    theirs = MultimodalTransformer(D, 2, HEADS, context_length=N, mlp_ratio=HIDDEN / D, ls_init_value=scale)
    theirs.text_projection = None

    def names(w):
        ours = under("norm", fuse(w, "ln_final"))
        for i in range(2):
            own, cross = f"resblocks.{i}.", f"cross_attn.{i}."
            for end in ("weight", "bias"):
                joined = w[f"{cross}attn.in_proj_{end}"]
                ours |= {f"blocks.{i}.qkv.{end}": w[f"{own}attn.in_proj_{end}"]}
                ours |= {f"blocks.{i}.cross.q.{end}": joined[:D], f"blocks.{i}.cross.kv.{end}": joined[D:]}
            pairs = {"ln_1": "norm1", "attn.out_proj": "out", "ln_2": "norm2", "mlp.c_fc": "ffn.fc1", "mlp.c_proj": "ffn.fc2"}
            for old, new in pairs.items():
                ours |= under(f"blocks.{i}.{new}", fuse(w, own + old))
                new = {"norm1": "norm", "norm2": "ffn_norm"}.get(new, new)
                ours |= under(f"blocks.{i}.cross.{new}", fuse(w, cross + old))
            ours |= under(f"blocks.{i}.cross.memory_norm", fuse(w, f"{cross}ln_1_kv"))
            if scale is not None:
                scales = {"scale1": f"{own}ls_1", "scale2": f"{own}ls_2", "cross.scale": f"{cross}ls_1", "cross.ffn_scale": f"{cross}ls_2"}
                ours |= {f"blocks.{i}.{new}": w[f"{old}.gamma"] for new, old in scales.items()}
        return ours

    agree(
        Trunk(
            Shape(D, HEADS, HIDDEN, eps=1e-5, layer_scale=scale, memory_norm=True, cross_ffn=True), 2, cross_layers=[0, 1], final_norm=True
        ),
        theirs,
        names,
        lambda t, x: t(x[0], attend="causal", memory=x[1]),
        lambda t, x: t.to(dtype)(x[1], x[0]),
        [tokens(), tokens(B, M, D, 2)],
        dtype,
    )


@dtypes
@pytest.mark.parametrize("inner", [False, True])
def test_timm_vit_block(dtype, inner):
    """LayerScale, and the inner norms of BEiT-3."""
    theirs = VitBlock(D, HEADS, HIDDEN / D, qkv_bias=True, init_values=0.1, scale_attn_norm=inner, scale_mlp_norm=inner)

    def names(w):
        pairs = {"norm1": "norm1", "attn.qkv": "qkv", "attn.proj": "out", "norm2": "norm2", "mlp.fc1": "ffn.fc1", "mlp.fc2": "ffn.fc2"}
        pairs |= {"attn.norm": "inner_norm", "mlp.norm": "ffn.inner_norm"} if inner else {}
        ours = {"scale1": w["ls1.gamma"], "scale2": w["ls2.gamma"]}
        for old, new in pairs.items():
            ours |= under(new, fuse(w, old))
        return under("blocks.0", ours)

    trunk = Trunk(Shape(D, HEADS, HIDDEN, layer_scale=0.1, inner_norm=inner), 1)
    agree(trunk, theirs, names, lambda t, x: t(x[0]), lambda b, x: b(x[0]), [tokens()], dtype)


@dtypes
def test_timm_beit_blocks(dtype):
    """VLMo's and BEiT's: no bias of keys, and a bias of positions, another in each block."""

    class Beit(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(
                BeitBlock(D, HEADS, qkv_bias=True, mlp_ratio=HIDDEN / D, init_values=0.1, window_size=(2, 3)) for _ in range(2)
            )

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    theirs, bias = Beit(), []
    names_of_blocks = {"norm1": "norm1", "attn.proj": "out", "norm2": "norm2", "mlp.fc1": "ffn.fc1", "mlp.fc2": "ffn.fc2"}

    def names(w):
        ours: Weights = {}
        for i in range(2):
            a = f"blocks.{i}."
            ours |= {f"{a}scale1": w[f"{a}gamma_1"], f"{a}scale2": w[f"{a}gamma_2"], f"{a}qkv.weight": w[f"{a}attn.qkv.weight"]}
            ours |= {f"{a}qkv.q_bias": w[f"{a}attn.q_bias"], f"{a}qkv.v_bias": w[f"{a}attn.v_bias"]}
            for old, new in names_of_blocks.items():
                ours |= under(a + new, fuse(w, a + old))
        return ours

    def ours(trunk, x):
        bias[:] = [block.attn._get_rel_pos_bias()[0].detach().requires_grad_() for block in theirs.blocks]  # (heads, 7, 7)
        return trunk(x[0], bias=bias)

    agree(Trunk(Shape(D, HEADS, HIDDEN, bias="qv", layer_scale=0.1), 2), theirs, names, ours, lambda b, x: b(x[0]), [tokens()], dtype)
    for given, block in zip(bias, theirs.blocks, strict=True):
        attention = block.attn
        summed = torch.zeros_like(attention.relative_position_bias_table).index_add_(
            0, attention.relative_position_index.flatten(), given.grad.permute(1, 2, 0).flatten(0, 1)
        )
        torch.testing.assert_close(summed, attention.relative_position_bias_table.grad, rtol=0, atol=100 * PRECISE[dtype])


def test_quick_gelu():
    trunk = heat(Trunk(Shape(D, HEADS, HIDDEN, activation="quick_gelu"), 1))
    block, x = trunk.blocks[0], tokens()
    wide = block.ffn.fc1(x)
    torch.testing.assert_close(block.ffn(x), block.ffn.fc2(wide * torch.sigmoid(1.702 * wide)))


KINDS = ("image", "text")
EVERYTHING = dict.fromkeys(("norm1", "qkv", "inner_norm", "out", "norm2", "ffn"), KINDS)
MULTIWAY = Shape(D, HEADS, HIDDEN, eps=1e-5, inner_norm=True)
STRETCHES = [("image", 4), ("text", 3)]


def joint_by_hand(trunk: Trunk, x: Tensor, allowed: Tensor) -> Tensor:
    """Each stretch through its own plain layers, only the attention map is joint."""
    of_kind = [(0, 4, "image"), (4, 7, "text")]
    for block in trunk.blocks:
        parts = [block.qkv[k](block.norm1[k](x[:, a:b])) for a, b, k in of_kind]
        query, key, value = torch.cat(parts, 1).view(B, N, 3, HEADS, D // HEADS).permute(2, 0, 3, 1, 4)
        scores = torch.einsum("bhqd,bhkd->bhqk", query, key) / (D // HEADS) ** 0.5
        weights = torch.softmax(scores.masked_fill(~allowed, -torch.inf), -1)
        read = torch.einsum("bhqk,bhkd->bqhd", weights, value).reshape(B, N, D)
        x = x + torch.cat([block.out[k](block.inner_norm[k](read[:, a:b])) for a, b, k in of_kind], 1)
        wide = [nn.functional.gelu(ffn.fc1(block.norm2[k](x[:, a:b]))) for a, b, k in of_kind for ffn in [block.ffn[k]]]
        x = x + torch.cat([block.ffn[k].fc2(block.ffn[k].inner_norm(w)) for w, (_, _, k) in zip(wide, of_kind, strict=True)], 1)
    return torch.cat([trunk.norm[k](x[:, a:b]) for a, b, k in of_kind], 1)


class TestRoutes:
    def multiway(self, layers: int = 2) -> Trunk:
        return heat(Trunk(MULTIWAY, layers, banks={**EVERYTHING, "norm": KINDS}, final_norm=True)).double()

    @pytest.mark.parametrize("attend", ["all", 4])
    def test_every_sub_layer_twice_is_beit_3(self, attend):
        trunk, x = self.multiway(), tokens(dtype=torch.float64)
        allowed = torch.ones(N, N, dtype=torch.bool)
        if attend == 4:  # the picture sees itself, a word the picture and what stands before it
            allowed[:4, 4:] = False
            allowed[4:, 4:] = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]]).bool()
        torch.testing.assert_close(trunk(x, route=STRETCHES, attend=attend), joint_by_hand(trunk, x, allowed), rtol=0, atol=1e-12)

    def test_one_kind_is_a_plain_trunk(self):
        trunk, x = self.multiway(), tokens(dtype=torch.float64)
        plain = Trunk(MULTIWAY, 2, final_norm=True).double()
        for kind in KINDS:
            plain.load_state_dict({k.replace(f".{kind}.", "."): v for k, v in trunk.state_dict().items() if f".{kind}." in k})
            assert torch.equal(trunk(x, route=kind), plain(x))
            assert torch.equal(trunk(x, route=[(kind, N)]), plain(x))
            assert torch.equal(trunk(x, route=[(kind, 3), (kind, 0), (kind, 4)]), plain(x))
        split = [("image", 1), ("image", 3), ("text", 2), ("text", 1)]
        assert torch.equal(trunk(x, route=split), trunk(x, route=STRETCHES))

    def test_experts_of_equal_weights_are_one(self):
        trunk, x = self.multiway(), tokens(dtype=torch.float64)
        state = trunk.state_dict()
        trunk.load_state_dict({k: state[k.replace(".text.", ".image.")] for k in state})
        torch.testing.assert_close(trunk(x, route=STRETCHES), trunk(x, route="image"), rtol=0, atol=1e-13)

    def test_vlmo(self):
        """Norm and feed-forward by modality below; above, one expert for pairs, and words alone keep their own."""

        def banks(number):
            return dict.fromkeys(("norm2", "ffn"), (*KINDS, "vl") if number >= 2 else KINDS)

        trunk = heat(
            Trunk(
                Shape(D, HEADS, HIDDEN, bias="qv", layer_scale=0.1),
                3,
                banks=banks,
                experts=lambda kind, number, fused: "vl" if kind == "pair" and number >= 2 else {"pair": "text"}.get(kind, kind),
            )
        ).double()
        x = tokens(dtype=torch.float64)
        assert {k.split(".")[3] for k, _ in trunk.named_parameters() if k.startswith("blocks.2.ffn")} == {"image", "text", "vl"}
        half = trunk(x, layers=slice(0, 2), route=STRETCHES)
        plain = Trunk(trunk.shape, 1).double()
        own = {k.removeprefix("blocks.2."): v for k, v in trunk.state_dict().items() if k.startswith("blocks.2.")}
        for kind, expert in (("pair", "vl"), ("text", "text"), ("image", "image")):
            kept = {k: v for k, v in own.items() if not any(f".{other}." in k for other in ("image", "text", "vl") if other != expert)}
            plain.load_state_dict({f"blocks.0.{k.replace(f'.{expert}.', '.')}": v for k, v in kept.items()})
            torch.testing.assert_close(trunk(half, layers=slice(2, 3), route=kind), plain(half), rtol=0, atol=1e-13)

    def test_blip_shares_all_but_self_attention(self):
        banks = dict.fromkeys(("norm1", "qkv", "out"), ("encode", "decode"))
        trunk = heat(Trunk(BERT._replace(memory_dim=WIDE), 2, cross_layers=[0, 1], banks=banks)).double()
        x, memory = tokens(dtype=torch.float64), tokens(B, M, WIDE, 2, torch.float64)
        plain = Trunk(BERT._replace(memory_dim=WIDE), 2, cross_layers=[0, 1]).double()
        outs = []
        for mode, other in (("encode", "decode"), ("decode", "encode")):
            plain.load_state_dict({k.replace(f".{mode}.", "."): v for k, v in trunk.state_dict().items() if f".{other}." not in k})
            outs.append(trunk(x, route=mode, attend="causal", memory=memory))
            assert torch.equal(outs[-1], plain(x, attend="causal", memory=memory))
        assert not torch.allclose(*outs)

    @pytest.mark.parametrize("route", ["image", "text"])
    def test_gradients_reach_the_routed_experts_alone(self, route):
        trunk = self.multiway()
        trunk(tokens(dtype=torch.float64), route=route).sum().backward()
        assert {k for k, p in trunk.named_parameters() if p.grad is None} == {
            k for k, _ in trunk.named_parameters() if f".{route}." not in k
        }

    def test_gradients_reach_both(self):
        trunk = self.multiway()
        trunk(tokens(dtype=torch.float64), route=STRETCHES).square().sum().backward()
        assert all(bool(p.grad.any()) for k, p in trunk.named_parameters())

    @pytest.mark.parametrize(
        "route, said",
        [
            ("audio", "norm1 of block 0 has no expert 'audio': route tokens to image, text"),
            ([("image", 4), ("text", 2)], "of 6 tokens, given are 7"),
            ("", "has no expert ''"),
        ],
    )
    def test_a_wrong_route_is_said(self, route, said):
        with pytest.raises(ZooError, match=said):
            self.multiway()(tokens(dtype=torch.float64), route=route)

    def test_a_route_that_the_final_norm_lacks(self):
        trunk = Trunk(Shape(D, HEADS), 1, banks={"norm": KINDS}, final_norm=True)
        with pytest.raises(ZooError, match="norm of the end has no expert 'audio'"):
            trunk(tokens(), route="audio")


class TestMemory:
    def fusion(self) -> Trunk:
        return heat(Trunk(BERT._replace(memory_dim=WIDE), 4, cross_layers=[2, 3]))

    def test_only_some_blocks_have_it(self):
        assert [i for i, block in enumerate(self.fusion().blocks) if block.cross is not None] == [2, 3]

    def test_halves_are_the_whole(self):
        """ALBEF: the text half, then the fusion half on what it gave, is all of it at once."""
        trunk, x, mask, memory = self.fusion(), tokens(), padded(), tokens(B, M, WIDE, 2)
        held = trunk(x, mask, layers=slice(0, 2))
        assert torch.equal(trunk(held, mask, layers=slice(2, None), memory=memory), trunk(x, mask, memory=memory))

    def test_without_a_memory_it_is_left_out(self):
        trunk, plain = self.fusion(), Trunk(BERT, 4)
        plain.load_state_dict({k: v for k, v in trunk.state_dict().items() if ".cross." not in k})
        assert torch.equal(trunk(tokens(), padded()), plain(tokens(), padded()))

    def test_masked_memory_has_no_influence(self):
        trunk, memory = self.fusion(), tokens(B, M, WIDE, 2)
        mask = torch.arange(M) < torch.tensor([5, 2, 0])[:, None]
        out = trunk(tokens(), memory=memory, memory_mask=mask)
        assert torch.equal(trunk(tokens(), memory=memory.where(mask[..., None], 1e4), memory_mask=mask), out)
        assert bool(out.isfinite().all())

    def test_a_memory_that_no_block_reads(self):
        with pytest.raises(AssertionError, match="none of the blocks 0, 1 reads a memory"):
            self.fusion()(tokens(), layers=slice(0, 2), memory=tokens(B, M, WIDE))

    def test_coca_runs_its_blocks_twice_as_one(self):
        """The norm after the last block comes with it alone."""
        trunk = heat(Trunk(Shape(D, HEADS), 2, final_norm=True))
        low = trunk(tokens(), layers=slice(0, 1))
        assert torch.equal(trunk(low, layers=slice(1, 2)), trunk(tokens()))
        assert torch.equal(trunk.norm(trunk.blocks[1](low, [("", N)], Sight())[0]), trunk(tokens()))


def grown(trunk: Trunk, x: Tensor, mask: Tensor | None, sizes: list[int], **given: Any) -> tuple[Tensor, Cache]:
    """The sequence in pieces of these sizes, one after the other."""
    cache, outs = Cache(), []
    route = given.pop("route", "")
    for start, end in pairwise([0, *torch.tensor(sizes).cumsum(0).tolist()]):
        piece = route if isinstance(route, str) else [(k, max(0, min(b, end) - max(a, start))) for k, a, b in route]
        out, cache = trunk(x[:, start:end], None if mask is None else mask[:, start:end], cache=cache, route=piece, **given)
        outs.append(out)
    return torch.cat(outs, 1), cache


class TestCache:
    def decoder(self) -> Trunk:
        return heat(Trunk(BERT._replace(memory_dim=WIDE), 3, cross_layers=[1, 2]))

    @pytest.mark.parametrize("sizes", [[1] * N, [3, 1, 1, 2], [N]])
    @pytest.mark.parametrize("side", ["right", "left", "none"])
    def test_growing_equals_the_whole(self, side, sizes):
        trunk, x, memory = self.decoder(), tokens(), tokens(B, M, WIDE, 2)
        mask = None if side == "none" else padded(side)
        given = {"attend": "causal", "memory": memory, "memory_mask": torch.arange(M) < torch.tensor([5, 2, 0])[:, None]}
        out, cache = grown(trunk, x, mask, sizes, **given)
        whole = trunk(x, mask, **given)
        seen = slice(None) if mask is None else mask
        torch.testing.assert_close(out[seen], whole[seen], rtol=0, atol=2e-6)
        assert cache.length == N
        assert Cache().length == 0

    def test_beams_change_places(self):
        trunk, x, mask, memory = self.decoder(), tokens(), padded("left"), tokens(B, M, WIDE, 2)
        memory_mask = torch.arange(M) < torch.tensor([5, 2, 3])[:, None]
        _, cache = trunk(x[:, :4], mask[:, :4], attend="causal", memory=memory, memory_mask=memory_mask, cache=Cache())
        order = torch.tensor([2, 0, 0, 1])
        out, after = trunk(x[order, 4:], mask[order, 4:], attend="causal", cache=cache.rows(order))
        again = trunk(x[order], mask[order], attend="causal", memory=memory[order], memory_mask=memory_mask[order])
        torch.testing.assert_close(out, again[:, 4:], rtol=0, atol=2e-6)
        assert after.rows(torch.tensor([1])).mask.shape == (1, N)

    def test_the_memory_is_looked_at_once(self):
        trunk, x, memory = self.decoder(), tokens(), tokens(B, M, WIDE, 2)
        out, _ = grown(trunk, x, None, [4, 3], attend="causal", memory=memory)
        _, cache = trunk(x[:, :4], attend="causal", memory=memory, cache=Cache())
        rest, _ = trunk(x[:, 4:], attend="causal", memory=torch.full_like(memory, torch.nan), cache=cache)
        assert torch.equal(rest, out[:, 4:])
        assert torch.equal(trunk(x[:, 4:], attend="causal", cache=cache)[0], rest)

    def test_beit_3_writes_at_a_mask_that_is_forgotten(self):
        """Captioning: the picture first, then words one by one, each guessed at a [MASK] whose keys are dropped."""
        trunk = heat(Trunk(MULTIWAY, 2, banks=EVERYTHING))
        x, guess, mask = tokens(), tokens(B, 1, seed=5), torch.arange(N + 1) != torch.tensor([9, 1, 3])[:, None]
        _, cache = trunk(x[:, :4], mask[:, :4], route="image", attend=4, cache=Cache())
        for place in range(4, N):
            out, cache = trunk(
                torch.cat([x[:, place - 1 : place] if place > 4 else x[:, :0], guess], 1), route="text", attend=4, cache=cache
            )
            cache = cache.upto(place)
            assert cache.length == place
            assert cache.mask.shape == (B, place)
            whole = trunk(torch.cat([x[:, :place], guess], 1), mask[:, : place + 1], route=[("image", 4), ("text", place - 3)], attend=4)
            torch.testing.assert_close(out[:, -1], whole[:, -1], rtol=0, atol=2e-6)

    @pytest.mark.parametrize("sizes", [[4, 1, 1, 1], [4, 3]])
    def test_prefix_and_stretches(self, sizes):
        trunk = heat(Trunk(MULTIWAY, 2, banks=EVERYTHING))
        out, _ = grown(trunk, tokens(), padded(), sizes, attend=4, route=[("image", 0, 4), ("text", 4, 7)])
        whole = trunk(tokens(), padded(), attend=4, route=STRETCHES)
        torch.testing.assert_close(out[padded()], whole[padded()], rtol=0, atol=2e-6)

    def test_with_a_bias(self):
        trunk, bias = heat(Trunk(Shape(D, HEADS), 2)), torch.randn(HEADS, N, N)
        _, cache = trunk(tokens()[:, :5], attend="causal", bias=bias[:, :5, :5], cache=Cache())
        out, _ = trunk(tokens()[:, 5:], attend="causal", bias=bias[:, 5:], cache=cache)
        torch.testing.assert_close(out, trunk(tokens(), attend="causal", bias=bias)[:, 5:], rtol=0, atol=2e-6)

    def test_half_a_trunk(self):
        trunk, memory = self.decoder(), tokens(B, M, WIDE, 2)
        out, cache = grown(trunk, tokens(), None, [4, 3], attend="causal", memory=memory, layers=slice(1, None))
        torch.testing.assert_close(out, trunk(tokens(), attend="causal", memory=memory, layers=slice(1, None)), rtol=0, atol=2e-6)
        assert len(cache.blocks) == 2


@pytest.mark.parametrize("attend", ["all", "causal", 2])
@pytest.mark.parametrize("side", ["right", "left"])
def test_what_stands_at_padding_changes_nothing(side, attend):
    trunk, mask = heat(Trunk(BERT, 2)), padded(side)
    out = trunk(tokens(), mask, attend=attend)
    other = trunk(tokens().where(mask[..., None], 1e3), mask, attend=attend)
    assert torch.equal(out[mask], other[mask])
    if attend != 2 or side == "right":
        row = tokens()[1:2, mask[1]]
        torch.testing.assert_close(trunk(row, attend=attend)[0], out[1][mask[1]], rtol=0, atol=2e-6)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_rows_of_nothing_but_padding_stay_finite(norm):
    trunk = heat(Trunk(Shape(D, HEADS, norm=norm), 2, cross_layers=[1])).train()
    x, memory = tokens().requires_grad_(), tokens(B, M, seed=2).requires_grad_()
    mask, memory_mask = padded("left") & torch.tensor([[False], [True], [True]]), torch.zeros(B, M, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        out = trunk(x, mask, attend="causal", memory=memory, memory_mask=memory_mask)
    out.float().square().sum().backward()
    assert bool(out.isfinite().all())
    assert all(bool(p.grad.isfinite().all()) for p in [x, *trunk.parameters()])
    assert not memory.grad.any()


def test_recomputed_activations_give_the_same_gradients():
    trunk = heat(Trunk(BERT._replace(memory_dim=WIDE, dropout=0.1, attention_dropout=0.1), 2, cross_layers=[1])).train()
    found = []
    for recomputes in (False, True):
        calls: list[None] = []
        hook = trunk.blocks[0].ffn.register_forward_hook(lambda *_, calls=calls: calls.append(None))
        x, memory = tokens().requires_grad_(), tokens(B, M, WIDE, 2).requires_grad_()
        if recomputes:
            trunk.checkpoint_gradients()
        torch.manual_seed(3)
        trunk(x, padded(), attend="causal", memory=memory).square().sum().backward()
        found.append([x.grad, memory.grad, *(p.grad.clone() for p in trunk.parameters())])
        trunk.zero_grad()
        hook.remove()
        assert len(calls) == 1 + recomputes
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_who_sees_whom_is_made_block_by_block(monkeypatch):
    """Where each block has a bias, masks are of rows times heads: one of them is there at a time, and none waits for the backward pass."""
    trunk, table = heat(Trunk(Shape(D, HEADS), 4)), torch.randn(4, HEADS, N, N, requires_grad=True)
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def watched(*given: Any, **how: Any) -> Sight:
        seen = sight(*given, **how)
        made.extend([] if seen.added is None else [weakref.ref(seen.added)])
        return seen

    def living() -> int:
        return sum(each() is not None for each in made)

    monkeypatch.setattr("zoo.trunk.sight", watched)
    for block in trunk.blocks:
        block.register_forward_hook(lambda *_: alive.append(living()))
    with torch.no_grad():
        trunk(tokens(), padded(), bias=[*table])
    assert alive == [1] * 4
    trunk.train()
    found = []
    for recomputes in (False, True):
        if recomputes:
            trunk.checkpoint_gradients()
        out = trunk(tokens(), padded(), bias=[*table])
        assert not recomputes or living() == 0
        out.square().sum().backward()
        found.append([p.grad.clone() for p in [table, *trunk.parameters()]])
        for parameter in [table, *trunk.parameters()]:
            parameter.grad = None
    torch.testing.assert_close(*found, rtol=0, atol=0)
    made.clear()
    trunk(tokens(), padded(), bias=table[0])
    assert len(made) == 1  # of all blocks


def test_a_block_of_experts_multiplies_at_once(monkeypatch):
    """A pair's maps go through the kernel: of each block queries, what attention read, and both layers of the feed-forward."""
    trunk, calls = heat(Trunk(MULTIWAY, 2, banks=EVERYTHING)), []

    def watched(x: Tensor, weights: list[Tensor], biases: list[Tensor] | None, *, sizes: list[int]) -> Tensor:
        calls.append(([tuple(each.shape) for each in weights], list(sizes)))
        return expert_linear(x, weights, biases, sizes=sizes)

    monkeypatch.setattr("zoo.block.expert_linear", watched)
    trunk(tokens(), route=STRETCHES)
    shapes = [(3 * D, D), (D, D), (HIDDEN, D), (D, HIDDEN)]
    assert calls == [([shape] * 2, [4, 3]) for shape in shapes] * 2
    calls.clear()
    trunk(tokens(), route="text")
    assert not calls


@pytest.mark.parametrize("kind", ["dropout", "attention_dropout"])
def test_dropout_is_of_training_alone(kind):
    """Of every sub-layer: each is the only one that says anything in turn."""
    for speaks in ("out", "ffn.fc2", "cross.out", "cross.ffn.fc2"):
        trunk = heat(Trunk(Shape(D, HEADS, cross_ffn=True)._replace(**{kind: 0.5}), 1, cross_layers=[0]))
        for name in {"out", "ffn.fc2", "cross.out", "cross.ffn.fc2"} - {speaks}:
            layer = trunk.blocks[0].get_submodule(name)
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        x, memory = tokens(), tokens(B, M, seed=2)
        assert torch.equal(trunk(x, memory=memory), trunk(x, memory=memory))
        trunk.train()
        drops = kind == "dropout" or not speaks.endswith("fc2")
        assert torch.equal(trunk(x, memory=memory), trunk(x, memory=memory)) != drops, speaks


def test_names_are_plain():
    trunk = Trunk(Shape(D, HEADS, memory_norm=True, cross_ffn=True), 2, cross_layers=[1], banks={"qkv": ("image", "text")}, final_norm=True)
    names = {name.removesuffix(".weight") for name, _ in trunk.named_parameters() if name.endswith("weight")}
    below = {"norm1", "qkv.image", "qkv.text", "out", "norm2", "ffn.fc1", "ffn.fc2"}
    cross = {"norm", "memory_norm", "q", "kv", "out", "ffn_norm", "ffn.fc1", "ffn.fc2"}
    assert names == {f"blocks.{i}.{n}" for i in range(2) for n in below} | {f"blocks.1.cross.{n}" for n in cross} | {"norm"}


def test_first_weights():
    torch.manual_seed(0)
    trunk = Trunk(Shape(64, 2, bias="qv", init=0.125, layer_scale=0.1, inner_norm=True), 2, final_norm=True)
    for name, parameter in trunk.named_parameters():
        if parameter.ndim > 1:
            assert float(parameter.detach().std()) == pytest.approx(0.125, rel=0.05), name
        else:
            constant = 0.0 if name.endswith("bias") else 0.1 if "scale" in name else 1.0
            assert torch.equal(parameter, torch.full_like(parameter, constant)), name


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: Trunk(Shape(10, 3), 1), "3 heads do not divide the width 10: write another number of heads"),
        (lambda: Trunk(Shape(8, 2), 2, cross_layers=[2]), "cross-attention in block 2: there are 2, 0 to 1"),
        (lambda: Block(Shape(8, 2), {"fnn": ["a"]}), "fnn"),
    ],
)
def test_what_cannot_be_built_is_said(make, said):
    with pytest.raises(ZooError, match=said):
        make()
