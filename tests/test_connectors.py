"""What must hold for every connector, and the Q-Former against the one of transformers."""

import itertools

import pytest
import torch
from safetensors.torch import load, save
from transformers import Blip2QFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel, Blip2TextEmbeddings

from zoo.connectors.qformer import QFormer
from zoo.errors import ZooError
from zoo.registry import make, names
from zoo.types import Tokens

WIDTH = 16
TINY = {"qformer": {"layers": 3, "hidden": 24, "heads": 4, "ffn": 48, "num_queries": 5, "dropout": 0.0}}
NAMES = names("connector")
every = pytest.mark.parametrize("name", NAMES)


def connector(name, dim_out=WIDTH):
    torch.manual_seed(0)
    return make("connector", name, WIDTH, dim_out, **TINY.get(name, {})).eval()


def media(*, dtype=torch.float32):
    """Three rows of four tokens: all real, two real, none."""
    mask = torch.tensor([[True] * 4, [True, True, False, False], [False] * 4])
    tokens = torch.randn(3, 4, WIDTH, dtype=dtype)
    return Tokens(tokens, mask, tokens.mean(1), torch.tensor([True, True, False]))


def test_there_are_connectors():
    assert {"identity", "linear", "mlp", "qformer", "attention_pool"} <= set(NAMES)


@every
def test_gives_what_it_says(name):
    bridge, x = connector(name), media()
    out = bridge(x)
    count = bridge.num_tokens or x.tokens.shape[1]
    assert out.tokens.shape == (3, count, WIDTH)
    assert out.mask.shape == (3, count)
    assert out.mask.dtype == out.present.dtype == torch.bool
    assert out.present.equal(x.present)
    assert out.tokens.isfinite().all()
    assert not out.mask[2].any(), "an absent row has no real tokens"
    assert bridge.num_tokens is None or out.tokens[2].abs().sum() == 0
    assert out.pooled is None or out.pooled.shape == (3, WIDTH)


@every
def test_padding_changes_nothing(name):
    bridge, x = connector(name), media()
    out = bridge(x)
    other = bridge(x._replace(tokens=torch.where(x.mask[..., None], x.tokens, 7.0)))
    assert torch.equal(out.tokens[out.mask], other.tokens[other.mask])
    alone = bridge(Tokens(x.tokens[1:2, :2], x.mask[1:2, :2], None, x.present[1:2]))
    torch.testing.assert_close(out.tokens[1][out.mask[1]], alone.tokens[0])  # float32 sums in another order


@every
def test_gradient_reaches_every_parameter_and_no_padding(name):
    bridge, x = connector(name).train(), media()
    x.tokens.requires_grad_()
    out = bridge(x)
    (out.tokens[out.mask] * torch.randn(WIDTH)).pow(3).sum().backward()  # a linear read-out is blind to a last norm's input
    assert [n for n, p in bridge.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    assert x.tokens.grad.isfinite().all()
    assert x.tokens.grad[x.mask].abs().sum() > 0
    assert x.tokens.grad[~x.mask].abs().sum() == 0


@every
def test_runs_in_bfloat16_and_under_autocast(name):
    x = media()
    assert connector(name).bfloat16()(media(dtype=torch.bfloat16)).tokens.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert connector(name)(x).tokens.isfinite().all()


@every
def test_survives_saving(name):
    bridge, other, x = connector(name), connector(name), media()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    other.load_state_dict(load(save(bridge.state_dict())))
    assert torch.equal(bridge(x).tokens, other(x).tokens)


def test_identity_says_what_to_use():
    with pytest.raises(ZooError, match="'identity' cannot turn width 16 into 24: use linear"):
        make("connector", "identity", 16, 24)


@pytest.mark.parametrize("name", ["qformer", "attention_pool"])
def test_heads_must_divide(name):
    with pytest.raises(ZooError, match=f"connector '{name}': 7 heads do not divide the width"):
        make("connector", name, 16, 24, heads=7)


@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_pooled_goes_through_the_same_map(name):
    bridge, x = connector(name, 24), media()
    torch.testing.assert_close(bridge(x).pooled, bridge(x._replace(tokens=x.pooled[:, None])).tokens[:, 0])


def test_order_of_tokens_means_nothing_to_attention_pool():
    bridge, x = connector("attention_pool"), media()
    turned = bridge(x._replace(tokens=x.tokens.flip(1), mask=x.mask.flip(1)))
    torch.testing.assert_close(bridge(x).tokens, turned.tokens)


# The Q-Former


def qformer(**settings):
    torch.manual_seed(1)
    return make(
        "connector", "qformer", WIDTH, 20, **{**TINY["qformer"], "text": True, "vocab_size": 50, "positions": 12, **settings}
    ).eval()


def text():
    """Three rows of five words, the second padded."""
    ids = torch.randint(0, 50, (3, 5))
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1, 3:] = False
    return ids, mask


def image():
    tokens = torch.randn(3, 4, WIDTH)
    return Tokens(tokens, torch.ones(3, 4, dtype=torch.bool), None, torch.ones(3, dtype=torch.bool))


def in_transformers_words(name):
    for ours, theirs in [
        ("Qformer.bert.embeddings.LayerNorm", "layernorm"),
        ("Qformer.bert.", ""),
        ("attention.self.", "attention.attention."),
    ]:
        name = name.replace(ours, theirs)
    return name


def reference(ours):
    """transformers' Q-Former and text embeddings in float64 with the weights of ours."""
    config = Blip2QFormerConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        encoder_hidden_size=WIDTH,
        cross_attention_frequency=2,
        max_position_embeddings=12,
        use_qformer_text_input=True,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    theirs, words = Blip2QFormerModel(config).double().eval(), Blip2TextEmbeddings(config).double()
    state = {n: p for n, p in ours.state_dict().items() if n.startswith("Qformer")}
    embeddings = {n.removeprefix("Qformer.bert.embeddings."): state.pop(n) for n in list(state) if "_embeddings" in n}
    theirs.load_state_dict({in_transformers_words(n): p for n, p in state.items()})
    words.load_state_dict(embeddings)
    return theirs, words


def blocked(visible):
    """A mask as transformers' attention adds it."""
    return torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, torch.finfo(torch.float64).min)[:, None]


def whole_mask(mode, real):
    """Written out from BLIP-2's table, apart from the code under test."""
    Q, T = TINY["qformer"]["num_queries"], real.shape[1]
    out = torch.zeros(len(real), Q + T, Q + T, dtype=torch.bool)
    for b, i, j in itertools.product(range(len(real)), range(Q + T), range(Q + T)):
        if j < Q:
            out[b, i, j] = True
        elif mode == "joint" or i >= Q:
            out[b, i, j] = bool(real[b, j - Q]) and (mode == "joint" or j <= i)
    return out


@pytest.mark.parametrize("mode", ["image", "text", "joint", "prefix"])
def test_qformer_equals_that_of_transformers(mode):
    ours = qformer().double()
    for n, p in ours.named_parameters():  # the norms too must differ from their start, to be seen
        p.data.add_(0.1 * torch.randn_like(p)) if "LayerNorm" in n else None
    theirs, words = reference(ours)
    ids, real = text()
    picture = image()._replace(tokens=torch.randn(3, 4, WIDTH, dtype=torch.float64))
    queries, states = ours.run(mode, image=picture, ids=ids, text_mask=real)

    asking = ours.query_tokens.detach().expand(3, -1, -1)
    Q = 0 if mode == "text" else asking.shape[1]
    if mode == "image":
        given, mask = asking, None
    elif mode == "text":
        given, mask = words(ids), blocked(real[:, None].expand(-1, 5, -1))
    else:
        given, mask = words(ids, query_embeds=asking), blocked(whole_mask(mode, real))
    out = theirs(
        given, query_length=Q, attention_mask=mask, encoder_hidden_states=None if mode == "text" else picture.tokens
    ).last_hidden_state
    mine = torch.cat([x for x in (queries, states) if x is not None], 1)
    assert mine.std() > 0.1
    torch.testing.assert_close(mine, out, rtol=0, atol=1e-12)  # float64, sums in another order

    weight = torch.randn_like(mine)
    (mine * weight).sum().backward()
    (out * weight).sum().backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters()}
    compared = 0
    for name, parameter in ours.named_parameters():
        if name.startswith("Qformer") and "_embeddings" not in name and parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradients[in_transformers_words(name)], rtol=1e-9, atol=1e-9)
            compared += 1
    assert compared >= 40


def test_text_never_changes_the_queries_but_in_joint():
    ours, picture, (ids, real) = qformer(), image(), text()
    other = (ids + 1) % 50
    alone, _ = ours.run("image", image=picture)
    torch.testing.assert_close(ours.run("prefix", image=picture, ids=ids)[0], alone, rtol=0, atol=1e-6)
    assert torch.equal(ours.run("prefix", image=picture, ids=ids)[0], ours.run("prefix", image=picture, ids=other)[0])
    joint, _ = ours.run("joint", image=picture, ids=ids, text_mask=real)
    assert not torch.allclose(joint, ours.run("joint", image=picture, ids=other, text_mask=real)[0], atol=1e-3)


def test_text_of_prefix_sees_no_later_word():
    ours, picture, (ids, _) = qformer(), image(), text()
    later = ids.clone()
    later[:, 3:] = (later[:, 3:] + 1) % 50
    a, b = (ours.run("prefix", image=picture, ids=i)[1] for i in (ids, later))
    assert torch.equal(a[:, :3], b[:, :3])
    assert not torch.allclose(a[:, 3:], b[:, 3:], atol=1e-3)
    assert not torch.allclose(a[:, :3], ours.run("prefix", image=image(), ids=ids)[1][:, :3], atol=1e-4), "it sees the queries"


def test_text_mode_ignores_image_and_padding():
    ours, (ids, real) = qformer(), text()
    queries, states = ours.run("text", ids=ids, text_mask=real)
    assert queries is None
    other = torch.where(real, ids, 0)
    assert torch.equal(states[real], ours.run("text", ids=other, text_mask=real, image=image())[1][real])


def test_zero_queries_stay_equal_and_normal_ones_do_not():
    picture = image()
    assert qformer(query_init="zeros").run("image", image=picture)[0].std(1).max() < 1e-6
    assert qformer().run("image", image=picture)[0].std(1).min() > 0.01


def test_dropout_acts_in_training_alone():
    ours, picture = qformer(dropout=0.5), image()
    assert torch.equal(ours(picture).tokens, ours(picture).tokens)
    ours.train()
    assert not torch.equal(ours(picture).tokens, ours(picture).tokens)


@pytest.mark.parametrize(
    "mode, given, says",
    [
        ("captions", {}, "no mode 'captions': write image, text, joint or prefix"),
        ("joint", {"ids": 1}, "mode 'joint' reads an image: give image="),
        ("prefix", {"image": 1}, "mode 'prefix' reads a text: give ids="),
        ("text", {"ids": 1}, "needs the text branch: build it with text: true"),
    ],
)
def test_run_says_what_is_missing(mode, given, says):
    ids, _ = text()
    keywords = {k: {"image": image(), "ids": ids}[k] for k in given}
    with pytest.raises(ZooError, match=says):
        qformer(text=mode != "text").run(mode, **keywords)


@pytest.mark.parametrize(
    "vision, hidden, body, head", [(768, 768, 49.62e6, 19.93e6), (1664, 1536, 142.87e6, 23.08e6)], ids=["base", "bigG"]
)
def test_qformer_has_the_papers_size(vision, hidden, body, head):
    """The counts that were measured on NoteLLM-2's code, to its last printed digit."""
    with torch.device("meta"):
        built = QFormer(vision, 4096, hidden=hidden)
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert count(built.Qformer) == pytest.approx(body, abs=0.005e6)
    assert count(built.projector) == pytest.approx(head, abs=0.005e6)
    assert built.query_tokens.numel() == 16 * hidden


def test_keys_are_those_of_lavis():
    keys = set(qformer().state_dict())
    layer = "Qformer.bert.encoder.layer.0."
    assert {
        "query_tokens",
        "Qformer.bert.embeddings.word_embeddings.weight",
        "Qformer.bert.embeddings.LayerNorm.weight",
        f"{layer}attention.self.query.weight",
        f"{layer}attention.output.LayerNorm.bias",
        f"{layer}crossattention.self.key.weight",
        f"{layer}intermediate.dense.weight",
        f"{layer}output.dense.weight",
        f"{layer}intermediate_query.dense.weight",
        f"{layer}output_query.LayerNorm.weight",
    } <= keys
    assert not any("layer.1.crossattention" in k for k in keys)
