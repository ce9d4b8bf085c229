"""What must hold for every backbone, whoever wrote it, and how weights come and go."""

import logging
import pickle

import pytest
import torch
from safetensors.torch import load, save, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen2Model

from zoo.backbones._tokenizers import ByteTokenizer
from zoo.errors import ZooError
from zoo.registry import make, names

TINY = {"qwen": {"size": "tiny"}, "llama": {"size": "tiny"}, "tiny_lm": {"dim": 32, "vocab_size": 300}}
NAMES = names("backbone")
every = pytest.mark.parametrize("name", NAMES)
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300}


def backbone(name, **settings):
    torch.manual_seed(0)
    return make("backbone", name, **{**TINY.get(name, {}), **settings}).eval()


def padded(side, embeds):
    """Rows of 5 and of 3 tokens, with padding on one side and rubbish in it."""
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    rows = embeds.clone()
    rows[1, 3:] = 9.0
    if side == "left":
        mask[1], rows[1] = mask[1].flip(0), torch.cat([rows[1, 3:], rows[1, :3]])
    return rows, mask, (mask.cumsum(1) - 1).clamp(min=0) * mask


def test_there_are_backbones():
    assert {"qwen", "llama", "tiny_lm"} <= set(NAMES)


@every
def test_gives_what_it_says(name):
    model = backbone(name)
    ids = torch.tensor([model.tokenizer.encode("red shoes")[:4] or [0]])
    embeds = model.embed(ids)
    assert embeds.shape == (*ids.shape, model.dim)
    out = model(embeds, torch.ones_like(ids, dtype=torch.bool), torch.arange(ids.shape[1])[None])
    assert out.shape == embeds.shape
    assert out.pow(2).mean(-1).sqrt().allclose(torch.ones(ids.shape), atol=0.05), "it comes from after the final norm"
    assert model.trained is False


@every
def test_every_id_has_a_row(name):
    model = backbone(name)
    ids = [*model.tokenizer.encode('note: {"标题"} 😀'), *(i for i in model.tokenizer.roles.values() if i is not None)]
    assert model.embed(torch.tensor([[*ids, model.tokenizer.vocab_size - 1]])).isfinite().all()


@every
def test_either_side_of_padding_gives_the_same(name):
    model = backbone(name)
    embeds = torch.randn(2, 5, model.dim)
    right, left = (model(*padded(side, embeds)) for side in ("right", "left"))
    torch.testing.assert_close(right[1, :3], left[1, 2:])  # float32 sums in another order
    torch.testing.assert_close(right[0], left[0])
    alone = model(embeds[1:, :3], torch.ones(1, 3, dtype=torch.bool), torch.arange(3)[None])
    torch.testing.assert_close(right[1:, :3], alone)


@every
def test_no_position_sees_later_ones(name):
    model = backbone(name)
    embeds = torch.randn(1, 5, model.dim)
    other = embeds.clone()
    other[0, 3:] += 1.0
    mask, positions = torch.ones(1, 5, dtype=torch.bool), torch.arange(5)[None]
    a, b = model(embeds, mask, positions), model(other, mask, positions)
    assert torch.equal(a[:, :3], b[:, :3])
    assert not torch.allclose(a[:, 3:], b[:, 3:], atol=1e-3)


@every
def test_positions_are_used(name):
    model = backbone(name)
    embeds, mask = torch.randn(1, 4, model.dim), torch.ones(1, 4, dtype=torch.bool)
    steps = model(embeds, mask, torch.tensor([[0, 1, 2, 3]]))
    assert not torch.allclose(steps, model(embeds, mask, torch.tensor([[0, 5, 6, 7]])), atol=1e-5)


@every
def test_padding_is_hidden_by_the_mask_alone(name):
    """Numbered on like real tokens, so that only the mask can tell; transformers also reads packing out of the numbers."""
    model = backbone(name)
    embeds, mask, positions = torch.randn(1, 5, model.dim), torch.tensor([[False, False, True, True, True]]), torch.arange(5)[None]
    other = torch.where(mask[..., None], embeds, 9.0)
    assert torch.equal(model(embeds, mask, positions)[mask], model(other, mask, positions)[mask])


@every
def test_shared_positions_hide_nothing(name):
    """Image tokens may share one position; that must not be taken for a new sequence."""
    model = backbone(name)
    embeds, mask, positions = torch.randn(1, 5, model.dim), torch.ones(1, 5, dtype=torch.bool), torch.tensor([[0, 1, 1, 1, 2]])
    other = embeds.clone()
    other[0, 0] += 1.0
    assert not torch.allclose(model(embeds, mask, positions)[0, 4], model(other, mask, positions)[0, 4], atol=1e-4)


@every
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradient_reaches_every_parameter_and_no_padding(name, side, checkpointed):
    model = backbone(name).train()
    if checkpointed:
        model.checkpoint_gradients()
    embeds, mask, positions = padded(side, model.embed(torch.randint(0, 200, (2, 5))))
    embeds.retain_grad()
    model(embeds, mask, positions)[mask].pow(3).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    assert embeds.grad.isfinite().all()
    assert embeds.grad[~mask].abs().sum() == 0


@every
def test_checkpointing_changes_no_number(name):
    plain, checkpointed = backbone(name).train(), backbone(name).train()
    checkpointed.checkpoint_gradients()
    inputs = padded("right", torch.randn(2, 5, plain.dim))
    for model in (plain, checkpointed):
        model(*inputs).pow(2).sum().backward()
    for (n, a), (_, b) in zip(plain.named_parameters(), checkpointed.named_parameters(), strict=True):
        if a.grad is not None:
            assert torch.equal(a.grad, b.grad), n


@every
def test_runs_in_bfloat16(name):
    model = backbone(name).bfloat16()
    assert model(*padded("left", torch.randn(2, 5, model.dim).bfloat16())).isfinite().all()


@every
def test_survives_saving(name):
    model = backbone(name)
    torch.manual_seed(1)
    other = make("backbone", name, **{**TINY.get(name, {}), **model.portable()}).eval()
    other.load_state_dict(load(save(model.state_dict())))
    inputs = padded("right", torch.randn(2, 5, model.dim))
    assert torch.equal(model(*inputs), other(*inputs))
    assert other.tokenizer.config() == model.tokenizer.config()
    assert pickle.loads(pickle.dumps(model.tokenizer)).encode("a b") == model.tokenizer.encode("a b")


# Sizes and memory


@pytest.mark.parametrize(
    "name, size, parameters",
    [
        ("qwen", "0.5b", 494_032_768),
        ("qwen", "1.5b", 1_543_714_304),
        ("qwen", "7b", 7_615_616_512 - 152_064 * 3584),  # the published counts have a head
        ("qwen", "qwen1_7b_chat", 7_721_324_544 - 151_936 * 4096),
        ("llama", "1.1b", 1_100_048_384 - 32_000 * 2048),
        ("llama", "7b", 6_738_415_616 - 32_000 * 4096),
    ],
)
def test_sizes_are_the_published_ones(name, size, parameters):
    model = make("backbone", name, size=size, device="meta")
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert all(p.device.type == "meta" for p in model.parameters())


@pytest.mark.parametrize("name, size, gigabytes", [("qwen", "1.5b", "6.2"), ("qwen", "7b", "28.3"), ("llama", "7b", "26.4")])
def test_large_random_weights_are_refused(name, size, gigabytes):
    with pytest.raises(ZooError, match=rf"{name} {size}: .* G parameters, {gigabytes} GB of memory, all random: write pretrained: true"):
        make("backbone", name, size=size)


def test_what_only_loading_may_allocate_is_rebuilt_on_meta():
    assert make("backbone", "qwen", size="7b", device="meta").portable()["device"] == "meta"
    assert "device" not in make("backbone", "qwen", size="0.5b", device="meta").portable()


def test_memory_is_stated_before_it_is_taken(monkeypatch, caplog):
    from zoo.backbones import _decoder

    monkeypatch.setattr(_decoder, "WORTH_SAYING", 1000)
    monkeypatch.setattr(_decoder, "_allocate", lambda *_: pytest.fail("said" if "GB of memory" in caplog.text else "allocated in silence"))
    with caplog.at_level(logging.WARNING, logger="zoo"), pytest.raises(pytest.fail.Exception, match="said"):
        backbone("qwen")


@pytest.mark.parametrize("name", ["qwen", "llama"])
def test_a_model_that_is_only_looked_at_says_nothing(name, caplog):
    make("backbone", name, device="meta")
    assert not caplog.records


def test_the_default_llama_needs_no_network_and_is_not_refused(monkeypatch):
    from zoo.backbones import _decoder

    monkeypatch.setattr(_decoder, "_randomise", lambda _: None)  # nothing touches the memory that is allocated
    assert make("backbone", "llama").dim == 2048


@pytest.mark.slow
def test_the_default_qwen_fits_a_laptop():
    import resource
    import time

    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    model = make("backbone", "qwen")
    assert time.process_time() - start < 20
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 2.5e9
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.01)


def test_random_weights_are_as_transformers_makes_them():
    model = backbone("qwen").model
    for name, parameter in Qwen2Model(model.config).named_parameters():
        ours = model.get_parameter(name)
        assert ours.std().item() == pytest.approx(parameter.std().item(), rel=0.15, abs=1e-9), name
        assert ours.mean().item() == pytest.approx(parameter.mean().item(), abs=0.01), name


# Weights that were published


def published(folder, kind, config, *, tokenizer=True):
    """A folder as the hub has it."""
    from tests.test_tokenizers import byte_level

    torch.manual_seed(2)
    model = kind(config)
    model.save_pretrained(folder)
    if tokenizer:
        byte_level(folder)
    return model


@pytest.mark.parametrize(
    "name, kind, config",
    [
        ("qwen", Qwen2ForCausalLM, Qwen2Config(**SMALL, num_key_value_heads=2)),
        ("llama", LlamaForCausalLM, LlamaConfig(**SMALL)),
    ],
)
def test_loads_a_folder(name, kind, config, tmp_path):
    theirs = published(tmp_path, kind, config).eval()
    model = backbone(name, pretrained=str(tmp_path))
    assert model.trained
    assert model.tokenizer.roles["compressed"] is not None
    ids = torch.tensor([[1, 2, 3]])
    out = model(model.embed(ids), torch.ones(1, 3, dtype=torch.bool), torch.arange(3)[None])
    assert torch.equal(out, theirs.base_model(ids).last_hidden_state)

    again = make("backbone", name, **model.portable())
    assert not again.trained
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(model.embed(ids), torch.ones(1, 3, dtype=torch.bool), torch.arange(3)[None]), out)
    assert again.tokenizer.config() == model.tokenizer.config()


def test_new_tokens_start_as_the_mean(tmp_path):
    config = LlamaConfig(**{**SMALL, "vocab_size": 259})  # byte_level has 259, the compressed word is one more
    theirs = published(tmp_path, LlamaForCausalLM, config)
    model = backbone("llama", pretrained=str(tmp_path))
    rows, old = model.model.embed_tokens.weight, theirs.model.embed_tokens.weight
    assert len(rows) == 260
    assert torch.equal(rows[:259], old)
    torch.testing.assert_close(rows[259], old.mean(0))
    assert make("backbone", "llama", **model.portable()).model.embed_tokens.weight.shape == rows.shape


def test_loads_in_bfloat16(tmp_path):
    published(tmp_path, LlamaForCausalLM, LlamaConfig(**SMALL))
    assert {p.dtype for p in backbone("llama", pretrained=str(tmp_path), dtype="bfloat16").parameters()} == {torch.bfloat16}


def test_original_qwen_loads_through_the_key_map(tmp_path):
    config = Qwen2Config(**SMALL, num_key_value_heads=4)
    theirs = Qwen2Model(config).eval()
    for n, p in theirs.named_parameters():
        torch.nn.init.normal_(p, std=0.1) if n.endswith("bias") else None
    state = {"transformer.wte.weight": theirs.embed_tokens.weight, "transformer.ln_f.weight": theirs.norm.weight}
    state["lm_head.weight"] = torch.zeros(300, 32)
    for i, layer in enumerate(theirs.layers):
        at, attention = f"transformer.h.{i}.", layer.self_attn
        fused = (attention.q_proj, attention.k_proj, attention.v_proj)
        state[f"{at}attn.c_attn.weight"] = torch.cat([x.weight for x in fused])
        state[f"{at}attn.c_attn.bias"] = torch.cat([x.bias for x in fused])
        state[f"{at}attn.c_proj.weight"] = attention.o_proj.weight
        state[f"{at}mlp.w1.weight"], state[f"{at}mlp.w2.weight"] = layer.mlp.up_proj.weight, layer.mlp.gate_proj.weight
        state[f"{at}mlp.c_proj.weight"] = layer.mlp.down_proj.weight
        state[f"{at}ln_1.weight"], state[f"{at}ln_2.weight"] = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
    save_file({k: v.detach().contiguous() for k, v in state.items()}, tmp_path / "model-00001-of-00001.safetensors")

    settings = {"size": "qwen1_7b_chat", "config": config.to_dict(), "tokenizer": "bytes"}
    model = backbone("qwen", pretrained=str(tmp_path), **settings)
    ids = torch.tensor([[1, 2, 3]])
    out = model(model.embed(ids), torch.ones(1, 3, dtype=torch.bool), torch.arange(3)[None])
    assert torch.equal(out, theirs(ids).last_hidden_state)

    (tmp_path / "model-00001-of-00001.safetensors").unlink()
    save_file({"transformer.ln_f.weight": theirs.norm.weight.detach()}, tmp_path / "half.safetensors")
    with pytest.raises(ZooError, match=r"lacks 25 of 26 weights of Qwen, such as embed_tokens\.weight"):
        backbone("qwen", pretrained=str(tmp_path), **settings)


# What is said when something is wrong


def test_tiny_has_no_weights():
    for name in ("qwen", "llama"):
        with pytest.raises(ZooError, match=f"{name} tiny has no published weights: write another size"):
            backbone(name, pretrained=True)


def test_nothing_there(tmp_path):
    with pytest.raises(ZooError, match=r"could not be loaded .*: check the name, fetch it once with a network"):
        backbone("llama", pretrained="zoo-tests/not-there")
    with pytest.raises(ZooError, match=r"has no config.json with a model_type, wanted is a 'llama'"):
        backbone("llama", pretrained=str(tmp_path))


def test_another_kind_of_model(tmp_path):
    published(tmp_path, LlamaForCausalLM, LlamaConfig(**SMALL))
    with pytest.raises(ZooError, match="is a 'llama', wanted is a 'qwen2'"):
        backbone("qwen", pretrained=str(tmp_path))


def test_weights_that_lack_some(tmp_path):
    model = published(tmp_path, LlamaForCausalLM, LlamaConfig(**SMALL))
    state = {k: v.contiguous() for k, v in model.state_dict().items() if "layers.1.mlp.up_proj" not in k}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ZooError, match=r"lacks 1 weights, such as .*layers.1.mlp.up_proj.weight"):
        backbone("llama", pretrained=str(tmp_path))


def test_meta_holds_no_weights():
    with pytest.raises(ZooError, match="device: meta holds no weights: write pretrained: false with it"):
        make(
            "backbone", "qwen", size="0.5b", pretrained="somewhere", tokenizer="bytes", config=Qwen2Config(**SMALL).to_dict(), device="meta"
        )


def test_tiny_lm_says_what_does_not_fit():
    with pytest.raises(ZooError, match="dim 30 is no even multiple of heads 4"):
        make("backbone", "tiny_lm", dim=30)
    with pytest.raises(ZooError, match="bytes need 261 rows: write vocab_size: 261 or more"):
        make("backbone", "tiny_lm", tokenizer="bytes", vocab_size=100)


def test_tiny_lm_reads_bytes_too():
    assert isinstance(make("backbone", "tiny_lm", tokenizer="bytes").tokenizer, ByteTokenizer)
