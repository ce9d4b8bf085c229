"""What must hold for every encoder, whoever wrote it, and the adapters against the libraries' own forward."""

import pickle
import subprocess
import sys
from io import BytesIO

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load, save
from torch import nn
from torchvision import transforms
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    RobertaConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from zoo.collate import stack
from zoo.data._collection import decode
from zoo.encoders import _open_clip, clip_vit_b16
from zoo.encoders._audio import LogMel
from zoo.encoders._hf_vision import HfVisionEncoder, family_processor, vision_model
from zoo.encoders._image import ImageProcessor
from zoo.encoders.features import FeatureProcessor
from zoo.encoders.frames import FrameProcessor
from zoo.errors import ZooError
from zoo.pictures import MOST_PIXELS
from zoo.registry import make, names
from zoo.types import ModalityInputs

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
CLIP = CLIPVisionConfig(**SIZES, hidden_act="quick_gelu")
VISION = {
    "clip": (CLIPVisionModel, CLIP),
    "siglip": (SiglipVisionModel, SiglipVisionConfig(**SIZES)),
    "vit": (ViTModel, ViTConfig(**SIZES)),
    "dinov2": (Dinov2Model, Dinov2Config(**{k: v for k, v in SIZES.items() if k != "intermediate_size"}, mlp_ratio=2)),
}
# Names with a prefix need something after the colon; the others are made by their defaults.
SPELLED = {
    "timm": ["timm:test_vit", "timm:test_resnet"],
    "open_clip": ["open_clip:tiny-test"],
    "hf": ["hf:clip", "hf:siglip", "hf:vit", "hf:dinov2", "hf:bert"],
    "open_clip_vit_bigg_14": [],  # 7 GB; it has tests of its own
}
TINY = {  # two of its twelve layers; and sizes that train in seconds
    "clip_vit_b16": {"layer": 1},
    "audio_resnet": {"arch": "tiny"},
    "audio_transformer": {"arch": "tiny"},
    "frames": {"image": "image_resnet:tiny"},
    "image_transformer": {"arch": "tiny"},
    "text_transformer": {"arch": "tiny"},
}
NAMES = [spelled for name in names("encoder") for spelled in SPELLED.get(name, [name])]
every = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module", autouse=True)
def _tiny_open_clip(tmp_path_factory):
    """open_clip has no model small enough: teach it one."""
    folder = tmp_path_factory.mktemp("open_clip")
    tower = '{"image_size": 28, "layers": 3, "width": 64, "head_width": 16, "patch_size": 14}'
    words = '{"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}'
    (folder / "tiny-test.json").write_text(f'{{"embed_dim": 24, "vision_cfg": {tower}, "text_cfg": {words}}}')
    open_clip.add_model_config(folder / "tiny-test.json")


def bert_tokenizer():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "shoes", "blue", "hat", "[", "]", "cls"]
    return BertTokenizerFast(vocab={w: i for i, w in enumerate(words)})


def encoder(name, **settings):
    torch.manual_seed(0)
    prefix, _, arch = name.partition(":")
    if prefix == "hf":
        config = BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=12)
        config = config if arch == "bert" else VISION[arch][1]
        tokenizer = {"tokenizer": {"serialized": bert_tokenizer().backend_tokenizer.to_str()}} if arch == "bert" else {}
        settings = {"pretrained": False, "config": config.to_dict(), **tokenizer, **settings}
    return make("encoder", name, **{**TINY.get(name, {}), **settings}).eval()


def reads_text(built):
    """An encoder of images takes a string for a path; the file is not there."""
    try:
        built.processor("red shoes")
    except (OSError, ZooError):
        return False
    return True


def reads_arrays(built):
    return isinstance(built.processor, FeatureProcessor)


def raw(built):
    """Two raw things for it; texts, arrays and videos differ in length."""
    if reads_arrays(built):
        return [np.random.randn(n, built.dim) for n in (3, 5)]
    if isinstance(built.processor, LogMel):
        return [np.random.uniform(-1, 1, n) for n in (3000, 5000)]
    if isinstance(built.processor, FrameProcessor):
        return [[picture() for _ in range(n)] for n in (2, 5)]
    if reads_text(built):
        return ["red shoes", "blue hat red shoes hat"]
    return [picture() for _ in range(2)]


def picture():
    return Image.fromarray(np.random.randint(0, 255, (40, 50, 3), np.uint8))


def inputs(built):
    return stack([{"it": built.processor(thing)} for thing in raw(built)])["it"]


def test_there_are_encoders():
    assert {"timm", "open_clip", "hf", "clip_vit_b16", "open_clip_vit_bigg_14", "tiny_image", "tiny_text"} <= set(names("encoder"))
    assert {"audio_resnet", "audio_transformer", "frames", "image_resnet", "image_transformer", "text_transformer"} <= set(names("encoder"))


@every
def test_gives_what_it_says(name):
    built = encoder(name)
    x = inputs(built)
    with torch.no_grad():
        out = built(x)
    assert out.tokens.shape == (2, out.mask.shape[1], built.dim)
    assert out.pooled.shape == (2, built.dim)
    assert out.mask.dtype == out.present.dtype == torch.bool
    assert out.present.all()
    assert out.mask.sum().item() == (x.mask.sum().item() if x.mask is not None else out.mask.numel())
    assert out.tokens.isfinite().all()
    assert not torch.allclose(out.pooled[0], out.pooled[1]), "it looks at its input"


@every
def test_rows_do_not_see_each_other_nor_padding(name):
    built = encoder(name)
    x = inputs(built)
    real = slice(None) if x.mask is None else x.mask[0]
    alone = ModalityInputs(x.values[0][real])
    with torch.no_grad():
        both, one = built(x), built(ModalityInputs(alone.values[None]))
    torch.testing.assert_close(both.tokens[0][both.mask[0]], one.tokens[0], rtol=1e-4, atol=1e-5)  # other kernels for other sizes
    torch.testing.assert_close(both.pooled[0], one.pooled[0], rtol=1e-4, atol=1e-5)


@every
def test_gradient_reaches_every_parameter(name):
    built = encoder(name).train()
    if not list(built.parameters()):
        pytest.skip("nothing in it learns")
    with torch.no_grad():
        for parameter in built.parameters():  # some start at zero, and hide what is before them
            parameter.add_(0.02 * torch.randn_like(parameter))
    out = built(inputs(built))
    (out.tokens[out.mask] * torch.randn(built.dim)).pow(3).sum().backward()
    assert [n for n, p in built.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@every
def test_runs_in_bfloat16(name):
    built = encoder(name)
    x = inputs(built)
    with torch.no_grad():
        out = built.bfloat16()(x)
    assert out.tokens.dtype == torch.bfloat16
    assert out.tokens.isfinite().all()


def test_the_preprocessing_of_an_open_clip_tag_survives_without_its_weights(monkeypatch):
    tag = open_clip.get_pretrained_cfg("ViT-B-16-SigLIP", "webli")

    def tower(name, weights, image_size, device="cpu"):
        visual = _open_clip.tower(name, None, image_size, device)
        if weights == "webli":
            visual.preprocess_cfg.update({k: tag[k] for k in ("mean", "std", "interpolation", "resize_mode")})
        return visual

    monkeypatch.setattr("zoo.encoders.open_clip.tower", tower)
    built = make("encoder", "open_clip:tiny-test/webli")
    assert built.processor.squash
    assert built.processor.mean == (0.5, 0.5, 0.5)
    again = make("encoder", "open_clip:tiny-test/webli", **built.portable())
    assert again.processor.config() == built.processor.config()


@every
def test_survives_saving(name):
    built = encoder(name)
    other = encoder(name, **built.portable())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    other.load_state_dict(load(save({k: v.contiguous() for k, v in built.state_dict().items()})))
    x = inputs(built)
    with torch.no_grad():
        assert torch.equal(built(x).tokens, other(x).tokens)
    assert other.processor.config() == built.processor.config()


@every
def test_processor_is_small_picklable_and_always_the_same(name):
    built = encoder(name)
    thing = raw(built)[0]
    packed = pickle.dumps(built.processor)
    assert len(packed) < 20_000
    first, again, other = (p(thing).values for p in (built.processor, built.processor, pickle.loads(packed)))
    assert torch.equal(first, again)
    assert torch.equal(first, other)
    assert pickle.loads(packed).config() == built.processor.config()


def test_tiny_encoders_import_no_heavy_library():
    code = (
        "import sys, zoo.encoders.tiny_image, zoo.encoders.tiny_text, zoo.encoders.text_transformer;"
        "print(sorted({'timm', 'open_clip', 'transformers', 'torchvision'} & sys.modules.keys()))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_tiny_encoders_say_what_does_not_fit():
    with pytest.raises(ZooError, match="image_size 30 must be a multiple of 8"):
        make("encoder", "tiny_image", image_size=30)
    with pytest.raises(ZooError, match="dim 30 must be a multiple of heads 4"):
        make("encoder", "tiny_text", dim=30)


def test_hashed_words():
    processor = encoder("tiny_text", max_length=4).processor
    assert processor("Red 标题").values.tolist() == [processor(w).values.item() for w in ("red", "标", "题")]
    assert processor("").values.tolist() == [1]
    assert len(processor("a b c d e f").values) == 4


# Which layer, which tokens, which norm


OPTIONS = ["timm:test_vit", "open_clip:tiny-test", "hf:clip", "hf:vit", "hf:dinov2"]


@pytest.mark.parametrize("name", OPTIONS)
def test_cls_can_be_dropped_and_stays_the_pooled(name):
    kept, dropped = encoder(name), encoder(name, keep_cls=False)
    x = inputs(kept)
    with torch.no_grad():
        a, b = kept(x), dropped(x)
    assert torch.equal(a.tokens[:, 1:], b.tokens)
    assert torch.equal(a.pooled, a.tokens[:, 0])
    assert torch.equal(a.pooled, b.pooled)


def test_without_cls_pooled_is_the_mean():
    built = encoder("hf:siglip")
    out = built(inputs(built))
    torch.testing.assert_close(out.pooled, out.tokens.mean(1))


@pytest.mark.parametrize("name", [*OPTIONS, "hf:siglip"])
def test_layers_that_are_not_run_are_not_kept(name):
    whole, cut = encoder(name), encoder(name, layer=-2)
    assert 0 < sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in whole.parameters())
    assert [n for n, p in cut.named_parameters() if p.grad is not None] == []
    x = inputs(whole)
    assert not torch.allclose(whole(x).tokens, cut(x).tokens)


@pytest.mark.parametrize("name", [*OPTIONS, "hf:siglip", "hf:bert"])
def test_no_such_layer(name):
    with pytest.raises(ZooError, match=r"no layer 40: it has \d+, write -\d+ to \d+ \(-1 is the last\)"):
        encoder(name, layer=40)


@pytest.mark.parametrize("layer, norm", [(-1, False), (-1, True), (-2, False), (0, True)])
def test_timm_equals_its_own_forward(layer, norm):
    ours = encoder("timm:test_vit", layer=layer, final_norm=norm).double()
    theirs = timm.create_model("test_vit", num_classes=0).double().eval()
    theirs.load_state_dict(ours.model.state_dict(), strict=False)
    seen = []
    depth = range(len(theirs.blocks))[layer]
    theirs.blocks[depth].register_forward_hook(lambda *a: seen.append(a[-1]))
    x = ours.processor(Image.fromarray(np.random.randint(0, 255, (200, 180, 3), np.uint8))).values.double()[None]
    theirs(x)
    expected = theirs.norm(seen[0]) if norm else seen[0]
    torch.testing.assert_close(ours(ModalityInputs(x)).tokens, expected, rtol=0, atol=1e-12)  # float64


def test_timm_reads_feature_maps():
    ours = encoder("timm:test_resnet").double()
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    theirs = timm.create_model("test_resnet", num_classes=0).double().eval()
    theirs.load_state_dict(ours.model.state_dict(), strict=False)
    grid = theirs.forward_features(x)
    out = ours(ModalityInputs(x))
    torch.testing.assert_close(out.tokens, grid.flatten(2).transpose(1, 2), rtol=0, atol=1e-12)
    torch.testing.assert_close(out.pooled, grid.mean((2, 3)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name, keep_cls", [("timm:test_vit", True), ("timm:test_vit", False), ("timm:test_resnet", True)])
def test_timm_pools_the_mean_of_what_is_kept(name, keep_cls):
    built = encoder(name, keep_cls=keep_cls, pool="mean")
    out = built(inputs(built))
    torch.testing.assert_close(out.pooled, out.tokens.mean(1))


def test_timm_image_size_moves_model_and_processor():
    built = encoder("timm:test_vit", image_size=64)
    assert built.processor(Image.new("RGB", (90, 70))).values.shape == (3, 64, 64)
    assert built(inputs(built)).tokens.shape[1] == 1 + (64 // 16) ** 2


def test_timm_takes_other_colours_than_its_own():
    own, clip = (encoder("timm:test_vit", **given).processor.config() for given in ({}, {"colours": "clip", "squash": True}))
    assert own["mean"] == [0.5, 0.5, 0.5]
    assert clip["mean"] == pytest.approx([0.4815, 0.4578, 0.4082], abs=1e-4)
    assert clip["std"] == pytest.approx([0.2686, 0.2613, 0.2758], abs=1e-4)
    assert (own["squash"], clip["squash"], clip["shorter"]) == (False, True, clip["size"])


def test_timm_loads_a_file(tmp_path):
    from safetensors.torch import save_file

    theirs = timm.create_model("test_vit")
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    ours = make("encoder", "timm:test_vit", pretrained=str(tmp_path / "w.safetensors"))
    assert torch.equal(ours.model.blocks[0].attn.qkv.weight, theirs.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize(
    "name, settings, says",
    [
        ("timm:vit_tiny_patch16_225", {}, "no timm model named 'vit_tiny_patch16_225'; did you mean 'vit_tiny_patch16_224'?"),
        ("timm:test_vit", {"pretrained": "there/is/none"}, "no weights file there/is/none: name a file"),
        ("timm:test_vit", {"pretrained": True}, "weights of timm:test_vit could not be loaded .* fetch it once with a network"),
        ("open_clip:ViT-B-33", {}, "no open_clip model named 'ViT-B-33'; did you mean 'ViT-B-32'?"),
        ("open_clip:RN50", {}, "the vision tower of open_clip:RN50 is a ModifiedResNet: take it from timm"),
        ("open_clip:ViT-B-32/openai", {}, "weights 'openai' of open_clip:ViT-B-32 could not be loaded"),
        ("hf:zoo-tests/not-there", {}, "hf:zoo-tests/not-there could not be loaded"),
        ("hf:x", {"config": {}}, "config has no 'model_type': write one, such as clip_vision_model"),
        ("hf:x", {"config": {"model_type": "llama"}}, "hf:x is a 'llama': known are, of vision, clip_vision_model"),
        ("hf:x", {"config": {"model_type": "vit"}, "tokenizer": "y"}, "is a vision encoder \\(vit\\): it takes no tokenizer"),
        ("hf:x", {"config": {"model_type": "bert"}, "final_norm": True}, "is a text encoder \\(bert\\): it takes no processor"),
        ("clip_vit_b16", {"pretrained": True}, "weights of clip_vit_b16 from openai/clip-vit-base-patch16 could not be loaded"),
    ],
)
def test_says_what_to_write(name, settings, says):
    with pytest.raises(ZooError, match=says):
        make("encoder", name, **settings)


@pytest.mark.parametrize("layer, norm", [(-1, False), (-1, True), (-2, False)])
def test_open_clip_equals_its_own_forward(layer, norm):
    ours = encoder("open_clip:tiny-test", layer=layer, final_norm=norm).double()
    theirs = open_clip.create_model("tiny-test").visual.double().eval()
    theirs.load_state_dict(ours.model.state_dict(), strict=False)
    seen = []
    theirs.transformer.resblocks[layer].register_forward_hook(lambda *a: seen.append(a[-1]))
    x = torch.randn(2, 3, 28, 28, dtype=torch.float64)
    theirs(x)
    expected = theirs.ln_post(seen[0]) if norm else seen[0]
    torch.testing.assert_close(ours(ModalityInputs(x)).tokens, expected, rtol=0, atol=1e-12)  # float64


@pytest.mark.parametrize("family", list(VISION))
@pytest.mark.parametrize("layer, norm", [(-1, False), (-1, True), (-2, False), (0, True)])
def test_hf_vision_equals_its_own_forward(family, layer, norm):
    ours = encoder(f"hf:{family}", layer=layer, final_norm=norm).double()
    kind, config = VISION[family]
    torch.manual_seed(3)
    theirs = kind(config).double().eval()
    blocks = theirs.layers if family == "vit" else theirs.encoder.layer if family == "dinov2" else theirs.encoder.layers
    last_norm = theirs.post_layernorm if family in ("clip", "siglip") else theirs.layernorm
    nn.init.normal_(last_norm.weight, 1.0, 0.2)
    missing, _ = ours.load_state_dict({f"model.{k}": v for k, v in theirs.state_dict().items()}, strict=False)
    if norm:
        (
            ours.norm if family == "clip" else ours.model.get_submodule("post_layernorm" if family == "siglip" else "layernorm")
        ).load_state_dict(last_norm.state_dict())
    assert all(m.startswith("norm.") for m in missing)
    seen = []
    blocks[range(len(blocks))[layer]].register_forward_hook(lambda *a: seen.append(a[-1][0] if isinstance(a[-1], tuple) else a[-1]))
    x = torch.randn(2, 3, 28, 28, dtype=torch.float64)
    theirs(x)
    expected = last_norm(seen[0]) if norm else seen[0]
    torch.testing.assert_close(ours(ModalityInputs(x)).tokens, expected, rtol=0, atol=1e-12)  # float64


def test_clip_reads_what_notellm2_reads():
    """Its v and its tokens are ``hidden_states[-1]`` of transformers' CLIP, before the post-norm; gradients agree too."""
    ours = HfVisionEncoder(vision_model(CLIP, None, -1, "tiny"), family_processor(CLIP), keep_cls=True, final_norm=False, portable={})
    ours = ours.double().eval()
    theirs = CLIPVisionModel(CLIP).double().eval()
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("post_layernorm")}
    ours.model.load_state_dict(state)
    nn.init.normal_(theirs.post_layernorm.weight, 1.0, 0.2)
    x = torch.randn(2, 3, 28, 28, dtype=torch.float64)
    out, expected = ours(ModalityInputs(x)), theirs(x, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(out.tokens, expected, rtol=0, atol=1e-12)  # float64
    torch.testing.assert_close(out.pooled, expected[:, 0], rtol=0, atol=1e-12)
    weight = torch.randn_like(expected)
    (out.tokens * weight).sum().backward()
    (expected * weight).sum().backward()
    for name, parameter in ours.model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs.get_parameter(name).grad, rtol=1e-9, atol=1e-12)


def test_clip_equals_timm_with_the_same_weights():
    """Another library's idea of the same architecture, QuickGELU and pre-norm included."""
    ours = HfVisionEncoder(vision_model(CLIP, None, -1, "tiny"), family_processor(CLIP), keep_cls=True, final_norm=False, portable={})
    ours = ours.double().eval()
    for p in ours.parameters():
        nn.init.normal_(p, std=0.3)
    theirs = timm.create_model(
        "vit_base_patch16_clip_quickgelu_224", img_size=28, patch_size=14, embed_dim=32, depth=3, num_heads=4, mlp_ratio=2, num_classes=0
    )
    theirs.double().eval()
    state = {}
    for name, value in ours.model.state_dict().items():
        for a, b in [
            ("embeddings.class_embedding", "cls_token"),
            ("embeddings.position_embedding.weight", "pos_embed"),
            ("embeddings.patch_embedding", "patch_embed.proj"),
            ("pre_layrnorm", "norm_pre"),
            ("encoder.layers", "blocks"),
            ("self_attn.out_proj", "attn.proj"),
            ("layer_norm", "norm"),
        ]:
            name = name.replace(a, b)
        state[name] = value.view(1, -1, 32) if name in ("cls_token", "pos_embed") else value
    for i in range(3):
        for what in ("weight", "bias"):
            state[f"blocks.{i}.attn.qkv.{what}"] = torch.cat([state.pop(f"blocks.{i}.self_attn.{x}_proj.{what}") for x in "qkv"])
    left, surplus = theirs.load_state_dict(state, strict=False)
    assert set(left) <= {"norm.weight", "norm.bias"}
    assert surplus == []
    x = torch.randn(2, 3, 28, 28, dtype=torch.float64)
    (found,) = theirs.forward_intermediates(x, indices=1, intermediates_only=True, output_fmt="NLC", return_prefix_tokens=True)
    expected = torch.cat([found[1], found[0]], 1)
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(ModalityInputs(x)).tokens, expected, rtol=1e-9, atol=1e-9)  # float64


def test_clip_vit_b16_has_the_papers_geometry():
    built = encoder("clip_vit_b16", layer=-1)
    out = built(ModalityInputs(torch.zeros(1, 3, 224, 224)))
    assert out.tokens.shape == (1, 197, 768)
    whole = 86_192_640 - 768 * 512  # OpenAI's tower without its projection
    assert sum(p.numel() for p in built.parameters()) == whole - 2 * 768  # and without the post-norm
    assert clip_vit_b16.WEIGHTS.startswith("openai/")
    config = built.processor.config()
    assert (config["size"], config["interpolation"], config["squash"]) == (224, "bicubic", False)


def test_bigg_has_the_papers_geometry():
    built = make("encoder", "open_clip_vit_bigg_14", device="meta")
    out = built(ModalityInputs(torch.zeros(1, 3, 224, 224, device="meta")))
    assert out.tokens.shape == (1, 257, 1664)
    assert len(built.model.transformer.resblocks) == 48
    assert built.portable() == {"pretrained": False, "device": "meta"}


def test_bigg_states_its_memory_and_refuses_random_weights():
    from zoo.encoders.open_clip_vit_bigg_14 import PARAMETERS

    with pytest.raises(ZooError, match=r"1\.84 G parameters, 7\.4 GB in float32, all random: write pretrained: true"):
        make("encoder", "open_clip_vit_bigg_14")
    with pytest.raises(ZooError, match="device: meta holds no weights"):
        make("encoder", "open_clip_vit_bigg_14", device="meta", pretrained=True)
    built = make("encoder", "open_clip_vit_bigg_14", device="meta", final_norm=True)
    assert sum(p.numel() for p in built.parameters()) + 1664 * 1280 == PARAMETERS


# Folders of transformers


@pytest.mark.parametrize("family", list(VISION))
def test_hf_loads_a_vision_folder(family, tmp_path):
    kind, config = VISION[family]
    theirs = kind(config)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ZooError, match=r"preprocessor_config.json of hf:.* could not be loaded"):
        make("encoder", f"hf:{tmp_path}")
    said = '{"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}, "do_center_crop": true, "resample": 2,'
    (tmp_path / "preprocessor_config.json").write_text(said + '"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}')
    ours = make("encoder", f"hf:{tmp_path}")
    config = ours.processor.config()
    assert (config["size"], config["shorter"], config["mean"], config["interpolation"]) == (28, 32, [0.1, 0.2, 0.3], "bilinear")
    mine = ours.model.state_dict()
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in mine.items())


def test_hf_squashes_what_is_not_cropped(tmp_path):
    kind, config = VISION["siglip"]
    kind(config).save_pretrained(tmp_path)
    said = '{"size": {"height": 28, "width": 28}, "resample": 3, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
    (tmp_path / "preprocessor_config.json").write_text(said)
    assert make("encoder", f"hf:{tmp_path}").processor.config()["squash"]


def test_hf_loads_a_text_folder(tmp_path):
    config = BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=12)
    theirs = BertModel(config).eval()
    theirs.save_pretrained(tmp_path)
    bert_tokenizer().save_pretrained(tmp_path)
    ours = make("encoder", f"hf:{tmp_path}").eval()
    ids = ours.processor("red shoes").values
    assert ids.tolist() == [2, 5, 6, 3]  # [CLS] red shoes [SEP]
    assert 2 not in ours.processor("[CLS] red").values[1:], "a special token that a user writes is text"
    out = ours(ModalityInputs(ids[None]))
    torch.testing.assert_close(out.tokens, theirs(ids[None]).last_hidden_state)
    torch.testing.assert_close(out.pooled, out.tokens.mean(1))
    assert torch.equal(make("encoder", f"hf:{tmp_path}", keep_cls=False).eval()(ModalityInputs(ids[None])).tokens, out.tokens[:, 1:])


def test_roberta_has_fewer_positions_than_it_says():
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 12}
    config = RobertaConfig(**settings, max_position_embeddings=10, pad_token_id=1)
    tokenizer = {"serialized": bert_tokenizer().backend_tokenizer.to_str()}
    built = make("encoder", "hf:x", pretrained=False, config=config.to_dict(), tokenizer=tokenizer)
    x = built.processor("red " * 30)
    assert len(x.values) == 8
    assert built(ModalityInputs(x.values[None])).tokens.isfinite().all()


# Images


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (33, 32), (20, 300), (31, 31)])
@pytest.mark.parametrize("shorter", [32, 37])
def test_image_equals_that_of_torchvision(shape, shorter):
    picture = Image.fromarray(np.random.randint(0, 255, (*shape, 3), np.uint8))
    ours = ImageProcessor(32, shorter=shorter)
    steps = [
        transforms.Resize(shorter, transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(32),
        transforms.ToTensor(),
        transforms.Normalize(ours.mean, ours.std),
    ]
    torch.testing.assert_close(ours(picture).values, transforms.Compose(steps)(picture), rtol=0, atol=1e-6)


def test_image_from_anywhere_is_the_same(tmp_path):
    picture = Image.fromarray(np.random.randint(0, 255, (40, 50, 3), np.uint8))
    picture.save(tmp_path / "a.png")
    ours = ImageProcessor(16)
    expected = ours(picture).values
    for thing in (tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()):
        assert torch.equal(ours(thing).values, expected)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1", "I;16"])
def test_image_of_any_mode(mode):
    assert ImageProcessor(16)(Image.new(mode, (20, 20))).values.shape == (3, 16, 16)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white_as_in_data_sets(mode, tmp_path):
    picture = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 10, 20))
    (picture.quantize(4) if mode == "P" else picture.convert(mode)).save(tmp_path / "a.png")
    processor = ImageProcessor(20, mean=(0, 0, 0), std=(1, 1, 1))
    values = processor(tmp_path / "a.png").values
    assert values.mean((0, 1)).tolist() == [0] * 10 + [1] * 10
    for thing in (decode(str(tmp_path / "a.png"), None), (tmp_path / "a.png").read_bytes(), Image.open(tmp_path / "a.png")):
        assert torch.equal(processor(thing).values, values)


def test_16_bits_of_grey_are_not_cut_to_white(tmp_path):
    grey = np.linspace(0, 65535, 400).astype(np.uint16).reshape(20, 20)
    Image.fromarray(grey).save(tmp_path / "a.png")
    values = ImageProcessor(20, mean=(0, 0, 0), std=(1, 1, 1))(tmp_path / "a.png").values
    np.testing.assert_allclose(values, np.broadcast_to(grey / 65535, (3, 20, 20)), atol=1 / 255)
    np.testing.assert_array_equal(np.asarray(decode(str(tmp_path / "a.png"), None))[..., 0], grey >> 8)


def test_a_picture_without_pixels():
    with pytest.raises(ZooError, match=r"a PIL image of mode RGB: no image that can be decoded \(0 x 5 pixels are none\)"):
        ImageProcessor(16)(Image.new("RGB", (0, 5)))


def test_squash_crops_nothing():
    picture = Image.new("RGB", (60, 20))
    picture.paste((255, 255, 255), (0, 0, 10, 20))  # the left sixth
    values = ImageProcessor(12, squash=True, mean=(0, 0, 0), std=(1, 1, 1))(picture).values
    assert values[0, 6, 0] > 0.9
    assert ImageProcessor(12, mean=(0, 0, 0), std=(1, 1, 1))(picture).values.max() == 0


def test_broken_images_are_named(tmp_path):
    ours = ImageProcessor(16)
    whole = BytesIO()
    Image.fromarray(np.random.randint(0, 255, (64, 64, 3), np.uint8)).save(whole, "JPEG")
    (tmp_path / "half.jpg").write_bytes(whole.getvalue()[:500])
    (tmp_path / "text.jpg").write_text("no image")
    for path in ("half.jpg", "text.jpg", "missing.jpg"):
        with pytest.raises(ZooError, match=rf"{path}: no image that can be decoded"):
            ours(tmp_path / path)
    with pytest.raises(ZooError, match=r"4 bytes that start with b'oops': no image that can be decoded"):
        ours(b"oops")
    with pytest.raises(ZooError, match="int is no image: give a PIL image, the bytes of a file, or a path"):
        ours(3)


@pytest.mark.parametrize("side", [8200, 10_000, 20_000])
def test_huge_images_are_refused_before_they_are_decoded(side):
    """A header alone says how large an image would be."""
    head = b"P6 %d %d 255\n" % (side, side)
    with pytest.raises(ZooError, match=f"more than {MOST_PIXELS}"):
        ImageProcessor(16)(head)


def test_image_settings_that_do_not_fit():
    with pytest.raises(ZooError, match="resized to 8, less than the crop of 16: write shorter=16 or more"):
        ImageProcessor(16, shorter=8)
    with pytest.raises(ZooError, match="interpolation 'nearest' is none of bicubic, bilinear"):
        ImageProcessor(16, interpolation="nearest")
